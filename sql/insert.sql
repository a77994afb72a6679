-- INSERT, COPY and what they refuse; triggers, columns, constraints of the user's
SELECT eventstore.create_collection('logs');
INSERT INTO logs (type, data) VALUES ('a', '{"n": 1}'), ('b', null);
INSERT INTO logs (type, stream, tags) VALUES ('c', 's', '{x,y,x}'), ('d', 's', '{}'), ('e', 't', '{x}') RETURNING position, stream, version, tags;
INSERT INTO logs (type, stream) SELECT 'g', 'many' FROM generate_series(1, 5);
SELECT position, stream, version, type, tags FROM logs ORDER BY position;
COPY logs (type, stream, data) FROM stdin;
copied	s	{"k": 1}
copied	\N	\N
copied	s	{}
\.
COPY logs (stream, type) FROM stdin (FORMAT csv);
s,csv
u,csv
\.
SELECT position, stream, version, type FROM logs WHERE type IN ('copied', 'csv') ORDER BY position;
SELECT version FROM eventstore.append('logs', 'after', stream => 's', expected_version => 5);

-- prepared, and from a trigger of another table
PREPARE ins (text, text) AS INSERT INTO logs (type, stream) VALUES ($1, $2) RETURNING version;
EXECUTE ins('prepared', 'p');
EXECUTE ins('prepared', 'p');
CREATE TABLE accounts (id int PRIMARY KEY, balance int);
CREATE FUNCTION log_account() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM eventstore.append('logs', 'account.' || lower(TG_OP), to_jsonb(NEW), stream => 'account-' || NEW.id);
	INSERT INTO logs (type, stream) VALUES ('account.inserted', 'account-' || NEW.id);
	RETURN NEW;
END $$;
CREATE TRIGGER log BEFORE INSERT OR UPDATE ON accounts FOR EACH ROW EXECUTE FUNCTION log_account();
INSERT INTO accounts VALUES (1, 10), (2, 20);
UPDATE accounts SET balance = balance + 1;
SELECT stream, version, type FROM logs WHERE stream LIKE 'account%' ORDER BY stream, version;

-- append only, on the collection and on its segments
UPDATE logs SET type = 'z';
\echo :LAST_ERROR_SQLSTATE
DELETE FROM logs;
\echo :LAST_ERROR_SQLSTATE
TRUNCATE logs;
\echo :LAST_ERROR_SQLSTATE
UPDATE logs SET type = 'z' WHERE false;
\echo :LAST_ERROR_SQLSTATE
DELETE FROM logs_1;
\echo :LAST_ERROR_SQLSTATE
TRUNCATE logs_1;
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (position, type) VALUES (3, 'own');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (position, type) VALUES (100000, 'own');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (position, type) VALUES (-5, 'own');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (position, type) VALUES (null, 'own');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (stream, version, type) VALUES ('s', 9, 'own');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (version, type) VALUES (9, 'own');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (type) VALUES ('x') ON CONFLICT DO NOTHING;
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (type) VALUES ('x') ON CONFLICT (position) DO UPDATE SET type = 'y';
\echo :LAST_ERROR_SQLSTATE
MERGE INTO logs USING (SELECT 1) s ON false WHEN NOT MATCHED THEN INSERT (type, stream) VALUES ('merged', 'm');
SELECT version FROM logs WHERE stream = 'm';
MERGE INTO logs l USING (SELECT 'm' AS stream) s ON l.stream = s.stream WHEN MATCHED THEN UPDATE SET type = 'z';
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (type) VALUES (null);
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (type, tags) VALUES ('x', null);
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (type, tags) VALUES ('x', '{a,""}');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (type, data, body) VALUES ('x', '{}', '\x00');
\echo :LAST_ERROR_SQLSTATE

-- an error in the middle leaves nothing but a gap
INSERT INTO logs (type, stream) SELECT CASE WHEN i < 3 THEN 'ok' END, 'mid' FROM generate_series(1, 5) i;
SELECT count(*) FROM logs WHERE stream = 'mid';
SELECT version FROM eventstore.append('logs', 'first', stream => 'mid');

-- through a view, without rights on the table
CREATE ROLE es_viewer;
CREATE VIEW logs_view AS SELECT type, stream FROM logs;
GRANT INSERT ON logs_view TO es_viewer;
SET ROLE es_viewer;
INSERT INTO logs_view VALUES ('viewed', 'v');
INSERT INTO logs (type) VALUES ('direct');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.next_position('logs');
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
SELECT stream, version FROM logs WHERE type = 'viewed';

-- the user's trigger, column, constraint and index are honoured by every way in
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	NEW.metadata := coalesce(NEW.metadata, '{}') || '{"stamped": true}';
	RETURN NEW;
END $$;
CREATE TRIGGER stamp BEFORE INSERT ON logs FOR EACH ROW EXECUTE FUNCTION stamp();
ALTER TABLE logs ADD COLUMN region text DEFAULT 'eu';
SELECT version FROM eventstore.append('logs', 'user', stream => 'us');
SELECT version FROM eventstore.append_batch('logs', '[{"type": "user", "stream": "us"}, {"type": "user", "stream": "us"}]');
INSERT INTO logs (type, stream, region) VALUES ('user', 'us', 'us');
SELECT stream, version, metadata, region FROM logs WHERE type = 'user' ORDER BY position;
DROP TRIGGER stamp ON logs;
ALTER TABLE logs ALTER COLUMN region DROP DEFAULT;
ALTER TABLE logs ADD CONSTRAINT no_bad CHECK (type <> 'bad');
\set VERBOSITY terse
SELECT * FROM eventstore.append('logs', 'bad');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('logs', '[{"type": "good"}, {"type": "bad"}]');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (type) VALUES ('bad');
\echo :LAST_ERROR_SQLSTATE
CREATE UNIQUE INDEX ON logs_1 (((data->>'once')));
SELECT position > 0 AS ok FROM eventstore.append('logs', 'u', '{"once": 1}');
SELECT * FROM eventstore.append('logs', 'u', '{"once": 1}');
\echo :LAST_ERROR_SQLSTATE
\set VERBOSITY default
CREATE FUNCTION suppress() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER suppress BEFORE INSERT ON logs FOR EACH ROW WHEN (NEW.type = 'quiet') EXECUTE FUNCTION suppress();
INSERT INTO logs (type, stream) VALUES ('quiet', 'q'), ('loud', 'q') RETURNING stream, version;
SELECT * FROM eventstore.append('logs', 'quiet', stream => 'q');
\echo :LAST_ERROR_SQLSTATE
DROP TRIGGER suppress ON logs;

-- row-level security: WITH CHECK holds for appends
CREATE ROLE es_tenant;
GRANT SELECT, INSERT ON logs TO es_tenant;
ALTER TABLE logs ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON logs TO es_tenant USING (stream LIKE 'tenant-%') WITH CHECK (stream LIKE 'tenant-%');
SET ROLE es_tenant;
SELECT version FROM eventstore.append('logs', 'mine', stream => 'tenant-1');
SELECT version FROM eventstore.append('logs', 'other', stream => 'elsewhere');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO logs (type, stream) VALUES ('mine', 'tenant-1') RETURNING version;
INSERT INTO logs (type, stream) VALUES ('other', 'elsewhere');
\echo :LAST_ERROR_SQLSTATE
-- a condition sees what its caller may see
SELECT version FROM eventstore.append('logs', 'cond', stream => 'tenant-2', fail_if => '[{"types": ["user"]}]');
SELECT * FROM eventstore.append('logs', 'cond', stream => 'tenant-2', fail_if => '[{"types": ["mine"]}]');
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
ALTER TABLE logs DISABLE ROW LEVEL SECURITY;

-- INSERT alone is enough to append; a condition needs SELECT too
CREATE ROLE es_writer;
GRANT INSERT ON logs TO es_writer;
SET ROLE es_writer;
SELECT version FROM eventstore.append('logs', 'w', stream => 'writer');
INSERT INTO logs (type, stream) VALUES ('w', 'writer');
SELECT * FROM eventstore.append('logs', 'w', stream => 'writer', fail_if => '[{}]');
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
SELECT version FROM logs WHERE stream = 'writer' ORDER BY version;

-- heads agree with the events, versions are dense
SELECT count(*) FROM (SELECT stream, max(version) AS version, max(position) AS position
	FROM logs WHERE stream IS NOT NULL GROUP BY stream) e
	FULL JOIN logs_heads h USING (stream)
	WHERE e.version IS DISTINCT FROM h.version OR e.position IS DISTINCT FROM h.last_position;
SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY stream ORDER BY position) AS n
	FROM logs WHERE stream IS NOT NULL) e WHERE version <> n;

DROP TABLE accounts;
DROP VIEW logs_view;
SELECT eventstore.drop_collection('logs');
DROP FUNCTION log_account, stamp, suppress;
DROP ROLE es_viewer, es_tenant, es_writer;
