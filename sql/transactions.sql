-- appends and reads in every state that a transaction can be in
\set SHOW_CONTEXT never
SELECT eventstore.create_collection('tx');
CREATE FUNCTION append_tx(stream text, expected bigint = NULL) RETURNS text LANGUAGE sql AS
	$$ SELECT position || ':' || version FROM eventstore.append('tx', 'f', stream => append_tx.stream, expected_version => expected) $$;

-- ---- isolation levels and access modes ----
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT append_tx('rr'), append_tx('rr');
SELECT version FROM eventstore.read_stream('tx', 'rr');
INSERT INTO tx (type, stream) VALUES ('i', 'rr') RETURNING position, version;
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT append_tx('ser', 0);
SELECT version FROM eventstore.read_stream('tx', 'ser');
SELECT position FROM eventstore.append('tx', 'c', fail_if => '[{"types": ["none"]}]');
COMMIT;
BEGIN READ ONLY;
SELECT count(*) FROM eventstore.read('tx');
SELECT eventstore.head('tx'), (eventstore.peek('tx')).position;
INSERT INTO tx (type) VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT eventstore.drop_collection('tx');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
BEGIN READ ONLY;
SELECT eventstore.create_collection('other');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
SET default_transaction_read_only = on;
SELECT append_tx('ro');
\echo :LAST_ERROR_SQLSTATE
RESET default_transaction_read_only;

-- ---- subtransactions ----
BEGIN;
SELECT append_tx('sub');
SAVEPOINT a;
SELECT append_tx('sub');
SAVEPOINT b;
SELECT append_tx('sub');
INSERT INTO tx (type, stream) VALUES ('i', 'sub'), ('i', 'sub2');
RELEASE b;
SAVEPOINT c;
SELECT append_tx('sub', 9);
ROLLBACK TO c;
SELECT append_tx('sub', 4);
ROLLBACK TO a;
SELECT append_tx('sub', 1);
SELECT version FROM eventstore.read_stream('tx', 'sub');
SELECT stream FROM eventstore.streams('tx', 'sub');
COMMIT;
SELECT version FROM eventstore.read_stream('tx', 'sub');
-- an exception block around each
DO $$
DECLARE
	caught int := 0;
BEGIN
	FOR i IN 1 .. 200 LOOP
		BEGIN
			PERFORM append_tx('loop', (i - 1) / 2 * 1);
			IF i % 2 = 0 THEN
				RAISE EXCEPTION 'undone';
			END IF;
		EXCEPTION
			WHEN raise_exception OR SQLSTATE 'LG001' THEN caught := caught + 1;
		END;
	END LOOP;
	RAISE NOTICE '% caught', caught;
END $$;
SELECT max(version), count(*) FROM eventstore.read_stream('tx', 'loop');
-- conditions of an undone savepoint no longer hold
BEGIN;
SAVEPOINT a;
SELECT position > 0 AS ok FROM eventstore.append('tx', 'guard', fail_if => '[{"types": ["forbidden"]}]');
ROLLBACK TO a;
SELECT position > 0 AS ok FROM eventstore.append('tx', 'forbidden');
SELECT position > 0 AS ok FROM eventstore.append('tx', 'guard', fail_if => '[{"types": ["forbidden"]}]');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;

-- ---- what a failed statement leaves: gaps and nothing else ----
SELECT eventstore.head('tx') AS before \gset
BEGIN;
INSERT INTO tx (type, stream) SELECT CASE WHEN i = 7 THEN NULL ELSE 'x' END, 'failed' FROM generate_series(1, 10) i;
\echo :LAST_ERROR_SQLSTATE
SELECT 1;
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
COPY tx (type, stream) FROM stdin;
one	failed
two	failed
\N	failed
\.
SELECT * FROM eventstore.append_batch('tx', '[{"type": "a", "stream": "failed"}, {"type": "b", "tags": [""]}]');
\echo :LAST_ERROR_SQLSTATE
SELECT count(*) FROM tx WHERE stream = 'failed';
SELECT count(*) FROM eventstore.streams('tx', 'failed');
SELECT eventstore.head('tx') > :before AS passed, (SELECT count(*) FROM eventstore.read('tx', after => :before)) AS events;
SELECT version FROM eventstore.append('tx', 'x', stream => 'failed', expected_version => 0);
-- nobody is in the way any more
SELECT count(*) FROM eventstore.holders;

-- ---- several collections, more than one would keep in an array ----
DO $$
BEGIN
	FOR i IN 1 .. 40 LOOP
		PERFORM eventstore.create_collection('many_' || i, segment_size => 100);
	END LOOP;
END $$;
BEGIN;
SELECT sum(position) FROM generate_series(1, 40) i, LATERAL eventstore.append(('many_' || i)::regclass, 'x', stream => 's') a;
SELECT count(*) FROM eventstore.holders;
SELECT sum(version) FROM generate_series(1, 40) i, LATERAL eventstore.append(('many_' || i)::regclass, 'x', stream => 's') a;
SELECT count(*) FROM generate_series(1, 40) i, LATERAL eventstore.read(('many_' || i)::regclass) r;
ROLLBACK;
SELECT count(*) FROM eventstore.holders;
BEGIN;
SELECT sum(position) FROM generate_series(1, 40) i, LATERAL eventstore.append(('many_' || i)::regclass, 'x', stream => 's') a;
COMMIT;
SELECT sum(eventstore.head(('many_' || i)::regclass)) FROM generate_series(1, 40) i;
DO $$
BEGIN
	FOR i IN 1 .. 40 LOOP
		PERFORM eventstore.drop_collection(('many_' || i)::regclass);
	END LOOP;
END $$;

-- ---- in every place of a statement ----
WITH a AS (SELECT * FROM eventstore.append('tx', 'cte', stream => 'places')) SELECT version FROM a;
WITH a AS (INSERT INTO tx (type, stream) VALUES ('cte', 'places') RETURNING version),
	b AS (SELECT version FROM eventstore.append('tx', 'cte', stream => 'places2'))
SELECT a.version, b.version FROM a, b;
SELECT version FROM generate_series(1, 3) i, LATERAL eventstore.append('tx', 'lateral', to_jsonb(i), stream => 'places');
SELECT 1 WHERE (SELECT version FROM eventstore.append('tx', 'where', stream => 'places')) = 6;
CREATE VIEW appending AS SELECT (eventstore.append('tx', 'view', stream => 'places')).version;
SELECT * FROM appending;
CREATE TABLE defaulted (id int, at bigint DEFAULT (eventstore.append('tx', 'default', stream => 'places')).version);
INSERT INTO defaulted VALUES (1), (2) RETURNING at;
EXPLAIN (COSTS off) SELECT * FROM eventstore.append('tx', 'explained', stream => 'places');
DO $$ BEGIN EXECUTE 'EXPLAIN ANALYZE SELECT * FROM eventstore.append(''tx'', ''explained'', stream => ''places'')'; END $$;
SELECT type, version FROM eventstore.read_stream('tx', 'places') ORDER BY version;
DROP VIEW appending;
DROP TABLE defaulted;
-- at the commit, by a deferred trigger
CREATE TABLE accounts (id int);
CREATE FUNCTION log_account() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM eventstore.append('tx', 'deferred', stream => 'account-' || NEW.id);
	INSERT INTO tx (type, stream) VALUES ('deferred', 'account-' || NEW.id);
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER log AFTER INSERT ON accounts DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION log_account();
BEGIN;
INSERT INTO accounts VALUES (1), (2);
SELECT count(*) FROM eventstore.streams('tx', 'account');
COMMIT;
SELECT stream, version FROM eventstore.streams('tx', 'account');
DROP TABLE accounts;
-- a statement that appends sees what it reads as of its beginning
SELECT count(*) FROM tx, LATERAL eventstore.append('tx', 'each', stream => 'each') WHERE tx.stream = 'sub';
INSERT INTO tx (type, stream) SELECT 'copied', 'copies' FROM tx WHERE stream = 'loop';
SELECT max(version) FROM eventstore.read_stream('tx', 'copies');

-- ---- cursors ----
BEGIN;
DECLARE c CURSOR FOR SELECT position, version FROM eventstore.read_stream('tx', 'loop');
DECLARE r CURSOR FOR SELECT version FROM eventstore.read('tx', types => '{f}') WHERE stream = 'loop';
FETCH 2 FROM c;
FETCH 2 FROM r;
SELECT append_tx('loop') IS NOT NULL AS appended;
SAVEPOINT a;
FETCH 1 FROM r;
SELECT append_tx('loop') IS NOT NULL AS appended;
ROLLBACK TO a;
FETCH 1 FROM r;
MOVE FORWARD ALL FROM c;
FETCH 1 FROM c;
ROLLBACK;
BEGIN;
DECLARE h CURSOR WITH HOLD FOR SELECT version FROM eventstore.read('tx', types => '{f}') WHERE stream = 'loop';
FETCH 1 FROM h;
COMMIT;
FETCH 2 FROM h;
CLOSE h;

-- ---- commits within procedures and blocks ----
CREATE PROCEDURE in_steps(n int) LANGUAGE plpgsql AS $$
DECLARE
	seen bigint;
BEGIN
	FOR i IN 1 .. n LOOP
		PERFORM append_tx('steps', i - 1);
		SELECT count(*) INTO seen FROM eventstore.read('tx') WHERE stream = 'steps';
		IF seen <> i THEN
			RAISE EXCEPTION 'saw % of %', seen, i;
		END IF;
		IF i % 3 = 0 THEN
			ROLLBACK;
			PERFORM append_tx('steps', i - 1);
		END IF;
		COMMIT;
	END LOOP;
END $$;
CALL in_steps(6);
SELECT max(version) FROM eventstore.read_stream('tx', 'steps');
-- a loop over a read goes on over its commits
CREATE PROCEDURE follow() LANGUAGE plpgsql AS $$
DECLARE
	e record;
	n int := 0;
BEGIN
	FOR e IN SELECT * FROM eventstore.read('tx') LIMIT 20 LOOP
		PERFORM append_tx('followed');
		n := n + 1;
		COMMIT;
	END LOOP;
	RAISE NOTICE 'followed %', n;
END $$;
CALL follow();

-- ---- two-phase commit ----
BEGIN;
INSERT INTO tx (type) VALUES ('x');
PREPARE TRANSACTION 'es_insert';
\echo :LAST_ERROR_SQLSTATE
BEGIN;
SAVEPOINT a;
SELECT append_tx('prepared') IS NOT NULL AS appended;
ROLLBACK TO a;
PREPARE TRANSACTION 'es_undone';
\echo :LAST_ERROR_SQLSTATE
-- who has only read may
BEGIN;
CREATE TABLE prepared (i int);
SELECT count(*) > 0 AS read FROM eventstore.read('tx');
SELECT eventstore.head('tx') > 0 AS head;
PREPARE TRANSACTION 'es_read';
COMMIT PREPARED 'es_read';
DROP TABLE prepared;
SELECT count(*) FROM eventstore.holders;

-- ---- cancelled ----
SET statement_timeout = '50ms';
SELECT count(*) FROM generate_series(1, 100000000) i, LATERAL eventstore.append('tx', 'cancelled', stream => 'cancelled');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO tx (type, stream) SELECT 'cancelled', 'cancelled' FROM generate_series(1, 100000000);
\echo :LAST_ERROR_SQLSTATE
RESET statement_timeout;
SELECT count(*) FROM eventstore.read_stream('tx', 'cancelled');
SELECT version FROM eventstore.append('tx', 'x', stream => 'cancelled', expected_version => 0);

-- ---- parallel plans ----
SET parallel_setup_cost = 0;
SET parallel_tuple_cost = 0;
SET min_parallel_table_scan_size = 0;
SELECT count(*) FROM tx WHERE stream = 'loop';
SELECT count(*) FROM eventstore.read('tx') WHERE stream = 'loop';
SELECT count(*) FROM tx t JOIN eventstore.read('tx') r USING (position) WHERE t.stream = 'loop';
INSERT INTO tx (type, stream) SELECT 'parallel', 'parallel' FROM tx WHERE stream = 'loop';
SELECT max(version) FROM eventstore.read_stream('tx', 'parallel');
RESET ALL;

-- ---- temporary objects, DISCARD ----
CREATE TEMP TABLE temporary AS SELECT * FROM eventstore.read('tx') WHERE stream = 'sub';
SELECT count(*) FROM temporary;
DISCARD ALL;
SELECT append_tx('discarded', 0) IS NOT NULL AS appended;

-- nothing of all this has left anything amiss
SELECT * FROM eventstore.verify('tx');
SELECT count(*) FROM eventstore.holders;
DROP PROCEDURE in_steps, follow;
DROP FUNCTION append_tx, log_account;
SELECT eventstore.drop_collection('tx');
