-- nobody sees or writes by a function what a plain statement would refuse
\set SHOW_CONTEXT never
\set VERBOSITY terse
CREATE ROLE es_own;
CREATE ROLE es_read;
CREATE ROLE es_write;
CREATE ROLE es_both;
CREATE ROLE es_none;
CREATE ROLE es_member;
GRANT es_own TO es_member;
CREATE SCHEMA closed AUTHORIZATION es_own;

-- ---- making collections ----
SET ROLE es_none;
SELECT eventstore.create_collection('closed.c');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('c');
\echo :LAST_ERROR_SQLSTATE
SET ROLE es_own;
SELECT eventstore.create_collection('closed.c');
SELECT position FROM eventstore.append('closed.c', 'a', '{"secret": 1}', tags => '{t:1}', stream => 's');
SELECT position FROM eventstore.append('closed.c', 'b', '{"secret": 2}', stream => 's2');
GRANT SELECT ON closed.c TO es_read;
GRANT INSERT ON closed.c TO es_write;
GRANT SELECT, INSERT ON closed.c TO es_both;
-- USAGE on the schema, to name it
GRANT USAGE ON SCHEMA closed TO es_read, es_write, es_both, es_none;
RESET ROLE;

-- ---- one table of who may what ----
-- Each statement is run as each role; what is shown is the state it ends with.
CREATE FUNCTION state_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE statement;
	RAISE EXCEPTION USING errcode = 'PP000';
EXCEPTION
	WHEN SQLSTATE 'PP000' THEN RETURN 'may';
	WHEN OTHERS THEN RETURN SQLSTATE;
END $$;
CREATE TABLE statements (n int GENERATED ALWAYS AS IDENTITY, statement text);
INSERT INTO statements (statement) VALUES
	('SELECT * FROM closed.c'),
	('INSERT INTO closed.c (type) VALUES (''x'')'),
	('INSERT INTO closed.c (type) VALUES (''x'') RETURNING position'),
	('SELECT * FROM eventstore.append(''closed.c'', ''x'')'),
	('SELECT * FROM eventstore.append(''closed.c'', ''x'', stream => ''s'', expected_version => 1)'),
	('SELECT * FROM eventstore.append(''closed.c'', ''x'', stream => ''s'', expected_version => 9)'),
	('SELECT * FROM eventstore.append(''closed.c'', ''x'', fail_if => ''[{"types": ["zzz"]}]'')'),
	('SELECT * FROM eventstore.append(''closed.c'', ''x'', fail_if => ''[{"types": ["a"]}]'')'),
	('SELECT * FROM eventstore.append_batch(''closed.c'', ''[{"type": "x"}]'')'),
	('SELECT * FROM eventstore.append_batch(''closed.c'', ''[]'')'),
	('SELECT * FROM eventstore.append_array(''closed.c'', ARRAY[ROW(''x'', null, null, null, null, null, null, null, null)]::eventstore.new_event[])'),
	('SELECT eventstore.next_position(''closed.c'')'),
	('SELECT * FROM eventstore.read(''closed.c'')'),
	('SELECT * FROM eventstore.read(''closed.c'') LIMIT 0'),
	('SELECT eventstore.read(''closed.c'')'),
	('SELECT * FROM eventstore.read(''closed.c'', tags => ''{t:1}'')'),
	('SELECT * FROM eventstore.read_stream(''closed.c'', ''s'')'),
	('SELECT * FROM eventstore.peek(''closed.c'')'),
	('SELECT * FROM eventstore.peek(''closed.c'', ''s'')'),
	('SELECT * FROM eventstore.streams(''closed.c'')'),
	('SELECT eventstore.head(''closed.c'')'),
	('SELECT * FROM eventstore.read_merged(''{closed.c}'')'),
	('SELECT * FROM eventstore.verify(''closed.c'')'),
	('SELECT eventstore.set_option(''closed.c'', ''notify'', ''none'')'),
	('SELECT eventstore.truncate_before(''closed.c'', 1)'),
	('SELECT eventstore.repair_collection(''closed.c'')'),
	('SELECT eventstore.drop_collection(''closed.c'')'),
	('UPDATE closed.c SET type = type'),
	('TRUNCATE closed.c'),
	('ALTER TABLE closed.c ADD COLUMN more int'),
	('SELECT * FROM closed.c_heads'),
	('INSERT INTO closed.c_heads VALUES (''s'', 9, 1, 1, now(), now())'),
	('SELECT * FROM closed.c_1'),
	('INSERT INTO closed.c_1 (type) VALUES (''x'')'),
	('SELECT * FROM eventstore.collection_catalog'),
	('INSERT INTO eventstore.tick VALUES (1, 1)'),
	('UPDATE eventstore.collection_catalog SET first_position = 9'),
	('DELETE FROM eventstore.segment_disposal'),
	('SELECT nextval(''eventstore.incarnation_seq'')'),
	('SELECT * FROM eventstore.collections'),
	('SELECT * FROM eventstore.segments'),
	('SELECT * FROM eventstore.holders'),
	('SELECT * FROM eventstore.progress'),
	('SELECT * FROM eventstore.pg_stat_eventstore'),
	('SELECT * FROM eventstore.pg_stat_eventstore_workers'),
	('SELECT * FROM eventstore.doctor()');
CREATE TABLE outcomes (n int, role name, state text);
GRANT SELECT ON statements TO PUBLIC;
GRANT INSERT ON outcomes TO PUBLIC;
SET ROLE es_own;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
SET ROLE es_member;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
SET ROLE es_both;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
SET ROLE es_read;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
SET ROLE es_write;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
SET ROLE es_none;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
RESET ROLE;
SELECT max(state) FILTER (WHERE role = 'es_own') AS own,
	max(state) FILTER (WHERE role = 'es_member') AS member,
	max(state) FILTER (WHERE role = 'es_both') AS both,
	max(state) FILTER (WHERE role = 'es_read') AS read,
	max(state) FILTER (WHERE role = 'es_write') AS write,
	max(state) FILTER (WHERE role = 'es_none') AS none,
	statement
FROM outcomes JOIN statements USING (n) GROUP BY n, statement ORDER BY n;

-- ---- views show what one may select from, or owns ----
CREATE FUNCTION shown() RETURNS text LANGUAGE sql AS $$
	SELECT concat_ws(', ', (SELECT 'collections ' || count(*) || ' events ' || coalesce(sum(events)::text, '-') FROM eventstore.collections),
		(SELECT 'segments ' || count(*) FROM eventstore.segments),
		(SELECT 'stat ' || count(*) FROM eventstore.pg_stat_eventstore WHERE collection IS NOT NULL),
		(SELECT 'holders ' || count(*) FROM eventstore.holders),
		(SELECT 'doctor ' || count(*) FROM eventstore.doctor() WHERE item LIKE '%closed.c%: trigger%'))
$$;
SET ROLE es_own;
SELECT shown();
SET ROLE es_read;
SELECT shown();
SET ROLE es_write;
SELECT shown();
SET ROLE es_none;
SELECT shown();
RESET ROLE;
BEGIN;
SELECT position > 2 AS appended FROM eventstore.append('closed.c', 'open');
SET ROLE es_read;
SELECT count(*) FROM eventstore.holders;
SET ROLE es_none;
SELECT count(*) FROM eventstore.holders;
ROLLBACK;

-- ---- schemas: the function needs the name only, but to name it takes USAGE ----
REVOKE USAGE ON SCHEMA closed FROM es_read;
SET ROLE es_read;
SELECT * FROM eventstore.read('closed.c');
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
GRANT USAGE ON SCHEMA closed TO es_read;

-- ---- columns: the whole table's right is what counts ----
SET ROLE es_own;
GRANT SELECT (position, type), INSERT (type) ON closed.c TO es_none;
SET ROLE es_none;
SELECT position, type FROM closed.c ORDER BY 1;
SELECT * FROM eventstore.read('closed.c');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO closed.c (type) VALUES ('column');
SELECT * FROM eventstore.append('closed.c', 'x');
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
REVOKE ALL (position, type) ON closed.c FROM es_none;

-- ---- EXECUTE on the functions is an ordinary right ----
REVOKE EXECUTE ON FUNCTION eventstore.read FROM PUBLIC;
SET ROLE es_read;
SELECT * FROM eventstore.read('closed.c');
\echo :LAST_ERROR_SQLSTATE
SELECT count(*) > 0 AS reads FROM eventstore.read_stream('closed.c', 's');
RESET ROLE;
GRANT EXECUTE ON FUNCTION eventstore.read TO PUBLIC;

-- ---- definer functions and views lend their owner's rights ----
SET ROLE es_own;
CREATE FUNCTION closed.log(type text) RETURNS bigint LANGUAGE sql SECURITY DEFINER AS
	$$ SELECT version FROM eventstore.append('closed.c', type, stream => 'definer') $$;
CREATE FUNCTION closed.logged() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS
	$$ SELECT count(*) FROM eventstore.read('closed.c', types => '{defined}') $$;
CREATE VIEW closed.peeled AS SELECT position, type FROM closed.c WHERE type = 'defined';
GRANT SELECT ON closed.peeled TO es_none;
SET ROLE es_none;
SELECT closed.log('defined');
SELECT closed.logged();
SELECT count(*) FROM closed.peeled;
SELECT count(*) FROM eventstore.read('closed.c');
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
DROP VIEW closed.peeled;
DROP FUNCTION closed.log, closed.logged;

-- ---- row-level security ----
SET ROLE es_own;
SELECT count(*) FROM eventstore.append_batch('closed.c', '[
	{"type": "e", "stream": "red-1", "tags": ["red"]}, {"type": "e", "stream": "blue-1", "tags": ["blue"]},
	{"type": "e", "stream": "red-2", "tags": ["red"]}, {"type": "e", "stream": "blue-1", "tags": ["blue", "red"]}]');
ALTER TABLE closed.c ENABLE ROW LEVEL SECURITY;
CREATE POLICY red ON closed.c TO es_both USING (stream LIKE 'red%') WITH CHECK (stream LIKE 'red%');
SET ROLE es_both;
SELECT stream, version FROM eventstore.read('closed.c');
SELECT stream, version FROM eventstore.read('closed.c', direction => 'backward', max_count => 1);
SELECT stream FROM eventstore.read('closed.c', tags => '{red}');
SELECT stream FROM eventstore.read('closed.c') LIMIT 1;
SELECT stream FROM eventstore.streams('closed.c');
SELECT stream FROM eventstore.peek('closed.c');
SELECT * FROM eventstore.peek('closed.c', 'blue-1');
SELECT count(*) FROM eventstore.read_stream('closed.c', 'blue-1');
SELECT count(*) FROM eventstore.read_merged('{closed.c}');
SELECT events FROM eventstore.collections;
SELECT * FROM eventstore.verify('closed.c');
\echo :LAST_ERROR_SQLSTATE
SELECT version FROM eventstore.append('closed.c', 'e', stream => 'red-1');
SELECT version FROM eventstore.append('closed.c', 'e', stream => 'blue-1');
\echo :LAST_ERROR_SQLSTATE
SELECT version FROM eventstore.append('closed.c', 'e', stream => 'red-1', fail_if => '[{"tags": ["blue"]}]');
SELECT version FROM eventstore.append_batch('closed.c', '[{"type": "e", "stream": "red-1"}, {"type": "e", "stream": "blue-1"}]');
\echo :LAST_ERROR_SQLSTATE
-- a policy that calls back is run as the reader, not as anybody else
RESET ROLE;
CREATE TABLE spied (who name);
GRANT INSERT ON spied TO PUBLIC;
CREATE FUNCTION spy() RETURNS boolean LANGUAGE plpgsql AS 'BEGIN INSERT INTO spied VALUES (current_user); RETURN true; END';
SET ROLE es_own;
CREATE POLICY spying ON closed.c TO es_read USING (spy());
SET ROLE es_read;
SELECT count(*) > 0 AS reads FROM eventstore.read('closed.c');
SELECT count(*) > 0 AS reads FROM eventstore.streams('closed.c');
RESET ROLE;
SELECT DISTINCT who FROM spied;
-- the owner is above it, unless forced
SET ROLE es_own;
SELECT count(*) FROM eventstore.read('closed.c', types => '{e}');
ALTER TABLE closed.c FORCE ROW LEVEL SECURITY;
SELECT count(*) FROM eventstore.read('closed.c');
ALTER TABLE closed.c NO FORCE ROW LEVEL SECURITY;
SET row_security = off;
SET ROLE es_both;
SELECT count(*) FROM eventstore.read('closed.c');
\echo :LAST_ERROR_SQLSTATE
RESET row_security;
RESET ROLE;
SELECT * FROM eventstore.verify('closed.c');

-- ---- objects of the user's run as whoever appends, not as the owner ----
CREATE TABLE ran (who name, what text);
GRANT INSERT ON ran TO PUBLIC;
CREATE FUNCTION note_user() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO ran VALUES (current_user, TG_NAME); RETURN NEW; END';
SET ROLE es_own;
ALTER TABLE closed.c DISABLE ROW LEVEL SECURITY;
CREATE TRIGGER noted BEFORE INSERT ON closed.c FOR EACH ROW EXECUTE FUNCTION note_user();
SET ROLE es_write;
SELECT version FROM eventstore.append('closed.c', 'e', stream => 'trigger');
INSERT INTO closed.c (type, stream) VALUES ('e', 'trigger');
RESET ROLE;
SELECT DISTINCT who, what FROM ran;

-- ---- event triggers follow the rights of DDL ----
SET ROLE es_both;
ALTER TABLE closed.c RENAME TO d;
\echo :LAST_ERROR_SQLSTATE
DROP TABLE closed.c;
\echo :LAST_ERROR_SQLSTATE
DROP TABLE closed.c_heads;
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
-- a malicious search_path changes nothing
CREATE SCHEMA evil;
GRANT USAGE ON SCHEMA evil TO PUBLIC;
CREATE FUNCTION evil.lower(text) RETURNS text LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''evil''; END';
CREATE FUNCTION evil.count() RETURNS bigint LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''evil''; END';
CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, PROCEDURE = texteq);
CREATE FUNCTION evil.eq(bigint, bigint) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''evil''; END';
CREATE OPERATOR evil.= (LEFTARG = bigint, RIGHTARG = bigint, PROCEDURE = evil.eq);
CREATE OPERATOR evil.> (LEFTARG = bigint, RIGHTARG = bigint, PROCEDURE = evil.eq);
CREATE OPERATOR evil.< (LEFTARG = bigint, RIGHTARG = bigint, PROCEDURE = evil.eq);
CREATE OPERATOR evil.>= (LEFTARG = bigint, RIGHTARG = bigint, PROCEDURE = evil.eq);
CREATE TYPE evil.text AS (a int);
SET search_path = evil, pg_catalog, public;
SET ROLE es_own;
SELECT eventstore.create_collection('closed.e', segment_size => 5);
SELECT max(position) FROM eventstore.append_batch('closed.e', '[{"type": "a", "stream": "s", "tags": ["t"]}, {"type": "b", "stream": "s"}]');
INSERT INTO closed.e (type, stream) VALUES ('c', 's');
SELECT version FROM eventstore.append('closed.e', 'd', stream => 's', expected_version => 3, fail_if => '[{"tags": ["u"]}]', after => 1);
SELECT position, stream, version FROM eventstore.read('closed.e', query => '[{"types": ["a"], "tags": ["t"]}, {"types": ["d"]}]');
SELECT version FROM eventstore.read_stream('closed.e', 's');
SELECT (eventstore.peek('closed.e', 's')).version;
SELECT stream, version FROM eventstore.streams('closed.e');
SELECT eventstore.head('closed.e');
SELECT (event).position FROM eventstore.read_merged(ARRAY['closed.e'::regclass]);
SELECT position FROM eventstore.verify('closed.e');
SELECT eventstore.set_option('closed.e', 'retain_for', '1 day');
SELECT eventstore.truncate_before('closed.e', 2);
SELECT eventstore.repair_collection('closed.e');
SELECT collection, head > 0 AS has_head, events FROM eventstore.collections ORDER BY collection::pg_catalog.text;
SELECT item FROM eventstore.doctor() WHERE NOT ok;
SELECT eventstore.drop_collection('closed.e');
SELECT eventstore.create_store('closed.e', key_format => 'bytes', unlogged => true);
SELECT eventstore.put('closed.e', 'k', '1'), eventstore.put('closed.e', 'k', '2'), eventstore.get('closed.e', 'k');
SELECT eventstore.keys('closed.e', 'k'), eventstore.get_at('closed.e', 'k', 'infinity'), eventstore.delete('closed.e', 'j');
SELECT eventstore.delete_prefix('closed.e', 'k');
SELECT eventstore.clear('closed.e'), eventstore.rebuild('closed.e');
SELECT eventstore.drop_store('closed.e');
RESET ROLE;
RESET search_path;

-- ---- stores: the rights are those of the table, and the changelog is nobody's to write ----
SET ROLE es_own;
SELECT eventstore.create_store('closed.kv');
SELECT eventstore.put('closed.kv', 'k', '"secret"');
GRANT SELECT ON closed.kv TO es_read;
GRANT INSERT ON closed.kv TO es_write;
GRANT SELECT, INSERT, UPDATE, DELETE ON closed.kv TO es_both;
GRANT ALL ON closed.kv_changelog TO es_write;
RESET ROLE;
TRUNCATE statements, outcomes;
INSERT INTO statements (statement) VALUES
	('SELECT eventstore.get(''closed.kv'', ''k'')'),
	('SELECT * FROM eventstore.get_many(''closed.kv'', ''{k}'')'),
	('SELECT * FROM eventstore.keys(''closed.kv'')'),
	('SELECT eventstore.put(''closed.kv'', ''k'', ''1'')'),
	('SELECT eventstore.put(''closed.kv'', ''new'', ''1'')'),
	('INSERT INTO closed.kv (key, value) VALUES (''new'', ''1'')'),
	('UPDATE closed.kv SET value = ''1'''),
	('SELECT eventstore.delete(''closed.kv'', ''k'')'),
	('SELECT eventstore.delete_prefix(''closed.kv'', '''')'),
	('SELECT eventstore.clear(''closed.kv'')'),
	('TRUNCATE closed.kv'),
	('SELECT eventstore.get_at(''closed.kv'', ''k'', now())'),
	('SELECT * FROM eventstore.read_stream(''closed.kv_changelog'', ''k'')'),
	('SELECT * FROM eventstore.append(''closed.kv_changelog'', ''put'', stream => ''k'')'),
	('INSERT INTO closed.kv_changelog (type, stream) VALUES (''put'', ''k'')'),
	('SELECT eventstore.rebuild(''closed.kv'')'),
	('SELECT eventstore.drop_store(''closed.kv'')'),
	('SELECT eventstore.create_store(''closed.other'')'),
	('INSERT INTO eventstore.store_catalog SELECT * FROM eventstore.store_catalog');
SET ROLE es_own;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
SET ROLE es_both;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
SET ROLE es_read;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
SET ROLE es_write;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
SET ROLE es_none;
INSERT INTO outcomes SELECT n, current_user, state_of(statement) FROM statements;
RESET ROLE;
SELECT max(state) FILTER (WHERE role = 'es_own') AS own,
	max(state) FILTER (WHERE role = 'es_both') AS both,
	max(state) FILTER (WHERE role = 'es_read') AS read,
	max(state) FILTER (WHERE role = 'es_write') AS write,
	max(state) FILTER (WHERE role = 'es_none') AS none,
	statement
FROM outcomes JOIN statements USING (n) GROUP BY n, statement ORDER BY n;

-- ---- and all of it goes ----
DROP SCHEMA evil CASCADE;
DROP SCHEMA closed CASCADE;
DROP TABLE statements, outcomes, spied, ran;
DROP FUNCTION state_of, shown, spy, note_user;
DROP ROLE es_member, es_own, es_read, es_write, es_both, es_none;
