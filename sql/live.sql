-- Waiting and listening, as far as one session can show it.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA live;
SET search_path = live, public;
\set VERBOSITY default
CREATE FUNCTION refusal(command text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	detail text;
	hint text;
BEGIN
	EXECUTE command;
	RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
	RETURN concat_ws(' | ', SQLSTATE, SQLERRM, nullif(detail, ''), nullif(hint, ''));
END $$;
SELECT eventstore.create_collection('c');

-- ---- what is there need not be waited for ----
SELECT eventstore.wait_for('c', 0, '0');
SELECT position FROM eventstore.append_batch('c', '[{"type": "a", "stream": "s", "tags": ["t"]}, {"type": "b"}]');
SELECT eventstore.wait_for('c', 0);
SELECT eventstore.wait_for('c', 1, NULL);
SELECT position FROM eventstore.read('c', wait => '1 hour');
SELECT position FROM eventstore.read('c', tags => '{t}', wait => '1 hour');
SELECT position FROM eventstore.read('c', direction => 'backward', max_count => 1, wait => '1 hour');
SELECT position FROM eventstore.read_stream('c', 's', wait => '1 hour');
CALL eventstore.await('c', 1);
CALL eventstore.await('c', 0, 77, '1 hour');

-- ---- what does not come is waited for, and then there is nothing ----
SELECT eventstore.wait_for('c', 2, '10 ms');
SELECT * FROM eventstore.read('c', after => 2, wait => '10 ms');
SELECT * FROM eventstore.read('c', types => '{none}', wait => '10 ms');
SELECT * FROM eventstore.read_stream('c', 'none', wait => '10 ms');
CALL eventstore.await('c', 2, timeout => '10 ms');
DO $$
DECLARE
	head bigint := 5;
BEGIN
	CALL eventstore.await('c', 2, head, '10 ms');
	RAISE WARNING 'head %', head;
	CALL eventstore.await('c', 0, head);
	RAISE WARNING 'head %', head;
END $$;

-- ---- what cannot come is not waited for ----
SELECT * FROM eventstore.read('c', after => 2, before => 2, wait => '1 hour');
SELECT * FROM eventstore.read('c', types => '{none}', before => 2, wait => '1 hour');
SELECT * FROM eventstore.read('c', max_count => 0, wait => '1 hour');
SELECT * FROM eventstore.read('c', types => '{none}', wait => '0');

-- ---- a join that waits does so for each of its rows ----
SELECT p.i, r.position FROM generate_series(0, 2) p (i) LEFT JOIN LATERAL eventstore.read('c', after => p.i, wait => '5 ms') r ON true ORDER BY 1, 2;

-- ---- where waiting is refused ----
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT refusal($$SELECT eventstore.wait_for('c', 0)$$);
SELECT refusal($$SELECT * FROM eventstore.read('c', wait => '1 s')$$);
COMMIT;
BEGIN;
SELECT position FROM eventstore.append('c', 'own');
SELECT refusal($$SELECT eventstore.wait_for('c', 0)$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('c', 's', wait => '1 s')$$);
SELECT refusal($$CALL eventstore.await('c', 0)$$);
ROLLBACK;
SELECT refusal($$SELECT eventstore.wait_for('c', -1)$$);
SELECT refusal($$SELECT eventstore.wait_for('c', NULL)$$);
SELECT refusal($$SELECT eventstore.wait_for('c', 0, '-1 s')$$);
SELECT refusal($$SELECT eventstore.wait_for('c', 4)$$);
SELECT refusal($$SELECT eventstore.wait_for('pg_class', 0)$$);
SELECT refusal($$CALL eventstore.await('c', 900)$$);
CREATE ROLE live_nobody;
GRANT USAGE ON SCHEMA live TO live_nobody;
SET ROLE live_nobody;
SELECT refusal($$SELECT eventstore.wait_for('live.c', 0)$$);
SELECT refusal($$SELECT * FROM eventstore.listen('live.c')$$);
RESET ROLE;

-- ---- a cancelled wait leaves nothing behind ----
SET statement_timeout = '20 ms';
SELECT eventstore.wait_for('c', 3);
SELECT * FROM eventstore.read('c', after => 3, wait => '1 hour');
CALL eventstore.await('c', 3);
RESET statement_timeout;
SELECT eventstore.wait_for('c', 3, '1 ms');

-- ---- listening ----
SELECT * FROM eventstore.listen('c');
SELECT * FROM pg_listening_channels();
UNLISTEN *;
BEGIN;
SELECT channel FROM eventstore.listen('c');
ROLLBACK;
SELECT * FROM pg_listening_channels();
SELECT eventstore.set_option('c', 'channel', 'news of c');
SELECT * FROM eventstore.listen('c');
SELECT eventstore.set_option('c', 'notify', 'none');
SET client_min_messages = warning;
SELECT * FROM eventstore.listen('c');
UNLISTEN "news of c";
SELECT refusal($$SELECT * FROM eventstore.listen('pg_class')$$);
SELECT refusal($$SELECT * FROM eventstore.listen(NULL)$$);

-- ---- nobody is made to listen by what he refreshes ----
CREATE FUNCTION overhears() RETURNS text LANGUAGE sql AS 'SELECT live.refusal($$SELECT * FROM eventstore.listen(''live.c'')$$)';
CREATE VIEW overhearing AS SELECT overhears() AS said;
CREATE MATERIALIZED VIEW overheard AS SELECT * FROM overhearing;
SELECT * FROM overheard;
SELECT * FROM pg_listening_channels();

SET client_min_messages = error;
DROP SCHEMA live CASCADE;
DROP ROLE live_nobody;
