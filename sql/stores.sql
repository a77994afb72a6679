-- stores: the latest value of each key as a table, every change of it as an event
\set SHOW_CONTEXT never
CREATE SCHEMA st;
SET search_path = st, public;

-- What a replay of the changelog gives, in order of positions, beside the table;
-- and whether versions are dense and times of a key never go back.
CREATE FUNCTION replay_problems(store regclass, changelog regclass, value text, key text = 's.key') RETURNS TABLE (problem text) LANGUAGE plpgsql AS $$
BEGIN
	RETURN QUERY EXECUTE format($q$
		WITH replay AS (SELECT DISTINCT ON (stream) * FROM %1$s ORDER BY stream, position DESC),
			steps AS (SELECT *, row_number() OVER w AS n, lag(created_at) OVER w AS before, lag(type) OVER w AS type_before FROM %1$s WINDOW w AS (PARTITION BY stream ORDER BY position))
		SELECT 'row of ' || coalesce(r.stream, %4$s) FROM (SELECT * FROM replay WHERE type = 'put') r FULL JOIN %2$s s ON r.stream = %4$s
			WHERE (s.value, s.version, s.updated_at) IS DISTINCT FROM (%3$s, r.version, r.created_at)
		UNION ALL SELECT 'version of ' || stream FROM steps WHERE version <> n
		UNION ALL SELECT 'time of ' || stream FROM steps WHERE created_at < before
		UNION ALL SELECT 'deleted what was not there: ' || stream FROM steps WHERE type = 'delete' AND type_before IS DISTINCT FROM 'put'$q$,
		changelog, store, value, key);
END $$;

-- ---- creating ----
SELECT eventstore.create_store('kv');
\d kv
SELECT eventstore.create_store('texts', format => 'text');
SELECT eventstore.create_store('st.blobs', format => 'bytes', key_format => 'bytes');
SELECT eventstore.create_store('bare', changelog => false);
SELECT eventstore.create_store('"Odd name"', 'text', unlogged => true);
SELECT store, changelog, format, key_format FROM eventstore.store_catalog ORDER BY store::text;
\set VERBOSITY sqlstate
SELECT eventstore.create_store('kv');
SELECT eventstore.create_store('a.b.c.d');
SELECT eventstore.create_store(NULL);
SELECT eventstore.create_store('x', format => 'xml');
SELECT eventstore.create_store('x', key_format => 'json');
SELECT eventstore.create_store('nowhere.x');
SELECT eventstore.create_store('pg_temp.x');
\set VERBOSITY default
SELECT eventstore.create_store('x', format => 'xml');

-- ---- get, put, delete ----
SELECT eventstore.get('kv', 'a') IS NULL AS absent;
SELECT eventstore.put('kv', 'a', '{"n": 1}');
SELECT eventstore.put('kv', 'a', '{"n": 2}');
SELECT eventstore.get('kv', 'a');
SELECT eventstore.delete('kv', 'a');
SELECT eventstore.delete('kv', 'a') IS NULL AS nothing_there;
SELECT eventstore.put('kv', 'a', '3') IS NULL AS nothing_replaced;
SELECT key, value, version FROM kv;
SELECT version, type, data FROM eventstore.read_stream('kv_changelog', 'a');
-- JSON null, the empty text and the empty bytes are values
SELECT eventstore.put('kv', 'null', 'null'), eventstore.put('kv', '', '""');
SELECT eventstore.get('kv', 'null'), eventstore.get('kv', '') AS empty_key, eventstore.put('kv', 'null', '1') AS replaced;
SELECT eventstore.put_text('texts', 'e', ''), eventstore.put_text('texts', 'e', 'ünï');
SELECT eventstore.get_text('texts', 'e'), eventstore.put_text('texts', 'e', '') AS replaced, eventstore.delete_text('texts', 'e') = '' AS removed_empty;
SELECT version, type, body FROM eventstore.read_stream('texts_changelog', 'e');
SELECT eventstore.put_bytes('blobs', '\x00ff', '\x'), eventstore.put_bytes('blobs', '\x00ff', '\x0001');
SELECT eventstore.get_bytes('blobs', '\x00ff'), eventstore.delete_bytes('blobs', '\x00ff');
SELECT stream, version, type, body FROM eventstore.read('blobs_changelog');
SELECT eventstore.put('bare', 'k', '1'), eventstore.put('bare', 'k', '2'), eventstore.delete('bare', 'k'), eventstore.put('bare', 'k', '3');
SELECT key, value, version, updated_at IS NOT NULL AS timed FROM bare;
-- the same value is no change
SELECT eventstore.put('kv', 'a', '3');
UPDATE kv SET value = '3', version = 99, updated_at = 'infinity' WHERE key = 'a';
SELECT version FROM kv WHERE key = 'a';
-- but 3.0 is another one
SELECT eventstore.put('kv', 'a', '3.0');
SELECT value, version FROM kv WHERE key = 'a';
-- a value far beyond a page
SELECT eventstore.put('kv', 'big', to_jsonb(string_agg(md5(i::text), ''))) IS NULL AS new FROM generate_series(1, 5000) i;
SELECT eventstore.put('kv', 'big', to_jsonb(string_agg(md5(i::text), ''))) IS NOT NULL AS same FROM generate_series(1, 5000) i;
SELECT count(*), length(eventstore.put('kv', 'big', '1')::text) FROM eventstore.read_stream('kv_changelog', 'big');
SELECT length(data::text) FROM eventstore.read_stream('kv_changelog', 'big') WHERE version = 1;

-- ---- another format, null arguments, other tables ----
SELECT eventstore.get('texts', 'a');
SELECT eventstore.get_text('kv', 'a');
SELECT eventstore.get_bytes('kv', 'a');
SELECT eventstore.put('blobs', 'a', '1');
SELECT eventstore.put_text('blobs', 'a', '1');
SELECT eventstore.delete_text('kv', 'a');
SELECT eventstore.get_many('texts', '{a}');
SELECT eventstore.get_at('texts', 'a', now());
SELECT eventstore.put('kv', 'a', NULL);
SELECT eventstore.put('kv', NULL, '1');
SELECT eventstore.get('kv', NULL);
SELECT eventstore.get_many('kv', '{a,NULL}');
SELECT eventstore.get('kv_changelog', 'a');
SELECT eventstore.get('pg_class', 'a');
SELECT eventstore.put('0', 'a', '1');
SELECT eventstore.get_bytes('blobs', '\xf');
INSERT INTO kv (key) VALUES ('no value');
INSERT INTO kv (value) VALUES ('1');

-- ---- many keys; a prefix is literal ----
SELECT eventstore.clear('kv');
SELECT count(eventstore.put('kv', k, to_jsonb(k))) FROM unnest('{b,a,A,a%,a_b,ab,aé,é}'::text[]) k;
SELECT * FROM eventstore.keys('kv');
SELECT * FROM eventstore.keys('kv', 'a');
SELECT * FROM eventstore.keys('kv', 'a%');
SELECT * FROM eventstore.keys('kv', 'a_');
SELECT * FROM eventstore.keys('kv', 'é');
SELECT * FROM eventstore.get_many('kv', '{b,nothing,A,b}');
SELECT * FROM eventstore.delete_prefix('kv', 'a_');
SELECT * FROM eventstore.delete_prefix('kv', 'zz');
SELECT * FROM eventstore.delete_prefix('kv', 'a');
SELECT eventstore.clear('kv'), eventstore.clear('kv') AS again;
SELECT eventstore.put_bytes('blobs', k, '\x01') FROM unnest('{\\x,\\x00,\\xfe,\\xff,\\xff00,\\xffff}'::text[]) k;
SELECT * FROM eventstore.keys('blobs', '\xff');
SELECT * FROM eventstore.delete_prefix('blobs', '\xffff');
SELECT * FROM eventstore.keys('blobs');

-- ---- every kind of statement ----
CREATE VIEW news AS SELECT stream, version, type, data FROM kv_changelog WHERE position > coalesce(nullif(current_setting('st.seen', true), ''), '0')::bigint ORDER BY position;
CREATE FUNCTION seen() RETURNS text LANGUAGE sql AS $$ SELECT set_config('st.seen', coalesce(max(position), 0)::text, false) FROM kv_changelog $$;
SELECT seen() IS NOT NULL;
INSERT INTO kv (key, value, version) VALUES ('i', '1', 77), ('j', '2', NULL) RETURNING key, version;
INSERT INTO kv (key, value) VALUES ('i', '10'), ('k', '3') ON CONFLICT (key) DO UPDATE SET value = excluded.value RETURNING key, version;
INSERT INTO kv (key, value) VALUES ('i', '11'), ('l', '4') ON CONFLICT DO NOTHING;
UPDATE kv SET value = '20' WHERE key = 'j';
UPDATE kv SET value = value;
UPDATE kv SET key = 'm' WHERE key = 'l' RETURNING key, version;
UPDATE kv SET key = 'l', value = '5' WHERE key = 'm' RETURNING key, version;
DELETE FROM kv WHERE key = 'k' RETURNING value;
COPY kv (key, value) FROM stdin;
k	30
n	6
\.
MERGE INTO kv USING (VALUES ('i', '12'), ('j', NULL), ('o', '7')) v (key, value) ON kv.key = v.key
	WHEN MATCHED AND v.value IS NULL THEN DELETE
	WHEN MATCHED THEN UPDATE SET value = v.value::jsonb
	WHEN NOT MATCHED THEN INSERT (key, value) VALUES (v.key, v.value::jsonb);
WITH gone AS (DELETE FROM kv WHERE key = 'n' RETURNING value), moved AS (UPDATE kv SET value = '31' WHERE key = 'k' RETURNING key)
	INSERT INTO kv (key, value) SELECT 'p', value FROM gone;
SELECT * FROM news;
SELECT * FROM replay_problems('kv', 'kv_changelog', 'r.data');
-- a key that is freed and taken in one statement
SELECT seen() IS NOT NULL;
INSERT INTO kv (key, value) VALUES ('y', '1'), ('x', '2');
UPDATE kv SET key = CASE key WHEN 'y' THEN 'z' ELSE 'y' END WHERE key IN ('x', 'y');
SELECT key, value, version FROM kv WHERE key >= 'x' ORDER BY key;
SELECT * FROM news;
SELECT * FROM replay_problems('kv', 'kv_changelog', 'r.data');
-- a foreign key's actions
CREATE TABLE owners (name text COLLATE "C" PRIMARY KEY);
ALTER TABLE kv ADD COLUMN owner text COLLATE "C" REFERENCES owners ON DELETE CASCADE ON UPDATE CASCADE;
INSERT INTO owners VALUES ('me');
SELECT seen() IS NOT NULL;
INSERT INTO kv (key, value, owner) VALUES ('mine', '1', 'me');
UPDATE owners SET name = 'I';
DELETE FROM owners;
SELECT * FROM news;
-- rolled back with its statement
BEGIN;
SAVEPOINT a;
SELECT eventstore.put('kv', 'undone', '1');
ROLLBACK TO a;
SELECT eventstore.put('kv', 'done', '1');
COMMIT;
SELECT version FROM eventstore.put('kv', 'undone', '2'), kv WHERE key = 'done';
SELECT stream, version FROM kv_changelog WHERE stream LIKE '%done';
SELECT * FROM replay_problems('kv', 'kv_changelog', 'r.data');
SELECT * FROM eventstore.verify('kv_changelog');

-- ---- triggers of the user's, amid a statement ----
CREATE FUNCTION pads() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.value := NEW.value || '{"padded": true}'; RETURN NEW; END $$;
SELECT eventstore.create_store('t');
CREATE TRIGGER pads BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION pads();
SELECT eventstore.put('t', 'a', '{}');
SELECT eventstore.put('t', 'a', '{}');
SELECT type, version, data FROM t_changelog ORDER BY position;
DROP TRIGGER pads ON t;
-- one that changes other rows of the same statement, before and after their own turn
CREATE FUNCTION meddles() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF pg_trigger_depth() > 1 THEN RETURN NULL; END IF;
	IF TG_OP = 'DELETE' THEN
		INSERT INTO t (key, value) VALUES ('c', '"back"') ON CONFLICT (key) DO UPDATE SET value = '"was back"';
	ELSIF NEW.key = 'a' THEN
		UPDATE t SET value = '"b meddled"' WHERE key = 'b';
		UPDATE t SET value = '"b again"' WHERE key = 'b';
		DELETE FROM t WHERE key = 'd';
		PERFORM eventstore.put('t', 'e', '"e by put"');
	ELSIF NEW.key = 'c' THEN
		UPDATE t SET value = '"a meddled"' WHERE key = 'a';
		UPDATE t SET key = 'moved' WHERE key = 'f';
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER meddles AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION meddles();
INSERT INTO t (key, value) SELECT k, to_jsonb(k) FROM unnest('{a,b,c,d,e,f}'::text[]) k ON CONFLICT (key) DO UPDATE SET value = excluded.value;
SELECT * FROM replay_problems('t', 't_changelog', 'r.data');
SELECT key, value, version FROM t ORDER BY key;
UPDATE t SET value = to_jsonb(key || '!');
SELECT * FROM replay_problems('t', 't_changelog', 'r.data');
SELECT key, value, version FROM t ORDER BY key;
DELETE FROM t;
SELECT * FROM replay_problems('t', 't_changelog', 'r.data');
SELECT key, value, version FROM t ORDER BY key;
SELECT * FROM eventstore.verify('t_changelog');
SELECT eventstore.drop_store('t');

-- ---- get_at ----
SELECT eventstore.create_store('h');
CREATE TABLE moments (n int, at timestamptz);
INSERT INTO moments VALUES (0, clock_timestamp());
SELECT eventstore.put('h', 'k', '1');
INSERT INTO moments VALUES (1, clock_timestamp());
SELECT eventstore.put('h', 'k', '2');
INSERT INTO moments VALUES (2, clock_timestamp());
SELECT eventstore.delete('h', 'k');
INSERT INTO moments VALUES (3, clock_timestamp());
SELECT eventstore.put('h', 'k', 'null');
SELECT n, eventstore.get_at('h', 'k', at), eventstore.get_at('h', 'none', at) AS none FROM moments ORDER BY n;
SELECT eventstore.get_at('h', 'k', 'infinity'), eventstore.get_at('h', 'k', (SELECT updated_at FROM h)), eventstore.get_at('h', 'k', '-infinity') IS NULL AS before;
SELECT eventstore.get_at('bare', 'k', now());

-- ---- rebuild ----
CREATE TEMP TABLE kept AS SELECT key, value, version, updated_at FROM kv;
SELECT count(*) = eventstore.rebuild('kv') AS same FROM kv;
SET session_replication_role = replica;
DELETE FROM kv WHERE key < 'j';
UPDATE kv SET value = '"damaged"', version = 1000 WHERE key = 'k';
INSERT INTO kv (key, value, version) VALUES ('stray', '1', 1);
RESET session_replication_role;
SELECT * FROM replay_problems('kv', 'kv_changelog', 'r.data') ORDER BY 1;
SELECT seen() IS NOT NULL;
SELECT count(*) = eventstore.rebuild('kv') AS same FROM kept;
SELECT * FROM (TABLE kept EXCEPT ALL SELECT key, value, version, updated_at FROM kv) d;
SELECT * FROM news;
SELECT eventstore.put('kv', 'after', '1');
SELECT * FROM replay_problems('kv', 'kv_changelog', 'r.data');
SET session_replication_role = replica;
DELETE FROM blobs;
RESET session_replication_role;
SELECT eventstore.rebuild('blobs');
SELECT * FROM replay_problems('blobs', 'blobs_changelog', 'r.body', 's.key::text');
SELECT eventstore.put_text('texts', 'ü', 'ö');
SET session_replication_role = replica;
DELETE FROM texts;
RESET session_replication_role;
SELECT eventstore.rebuild('texts');
SELECT * FROM replay_problems('texts', 'texts_changelog', 'convert_from(r.body, ''UTF8'')');
-- a row that triggers did not see, then changed with them
SET session_replication_role = replica;
INSERT INTO kv (key, value) VALUES ('unseen', '1');
RESET session_replication_role;
SELECT eventstore.put('kv', 'unseen', '2');
SELECT * FROM replay_problems('kv', 'kv_changelog', 'r.data');
SELECT eventstore.rebuild('bare');
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT eventstore.rebuild('kv');
ROLLBACK;

-- ---- what is refused ----
TRUNCATE kv;
INSERT INTO kv_changelog (type, stream) VALUES ('put', 'forged');
SELECT eventstore.append('kv_changelog', 'put', '1', stream => 'forged');
SELECT eventstore.append_batch('kv_changelog', '[{"type": "put"}]');
COPY kv_changelog (type) FROM stdin;
put
\.
\echo :LAST_ERROR_SQLSTATE
DELETE FROM kv_changelog;
DROP TABLE texts_changelog;
SELECT eventstore.drop_collection('texts_changelog');
SELECT eventstore.drop_store('kv_changelog');
SELECT eventstore.drop_collection('kv');
BEGIN;
SELECT eventstore.put('kv', 'p', '0');
PREPARE TRANSACTION 'st';
BEGIN READ ONLY;
SELECT eventstore.get('kv', 'p');
SELECT eventstore.put('kv', 'p', '0');
ROLLBACK;
SELECT count(*) FROM kv_changelog WHERE stream = 'forged';

-- ---- rename, schema, owner, drop ----
CREATE ROLE st_owner;
CREATE SCHEMA st2 AUTHORIZATION st_owner;
SELECT eventstore.create_store('r');
SELECT eventstore.put('r', 'k', '1');
ALTER TABLE r RENAME TO renamed;
SELECT eventstore.put('renamed', 'k', '2');
ALTER TABLE renamed SET SCHEMA st2;
ALTER TABLE st2.renamed OWNER TO st_owner;
SELECT c.oid::regclass, c.relowner::regrole FROM pg_class c WHERE relnamespace = 'st2'::regnamespace AND relkind IN ('r', 'p') ORDER BY 1;
SELECT eventstore.put('st2.renamed', 'k', '3');
ALTER SCHEMA st2 RENAME TO st3;
SELECT eventstore.put('st3.renamed', 'k', '4'), eventstore.get('st3.renamed', 'k');
SELECT stream, version, data FROM st3.r_changelog ORDER BY position;
-- DROP TABLE leaves the changelog, a collection like others
DROP TABLE st3.renamed;
SELECT count(*) FROM eventstore.store_catalog WHERE changelog = 'st3.r_changelog'::regclass;
SELECT position, version FROM eventstore.append('st3.r_changelog', 'by hand', stream => 'k');
SELECT eventstore.drop_collection('st3.r_changelog');
SELECT eventstore.create_store('st3.gone'), eventstore.create_store('st3.gone2', changelog => false);
SELECT eventstore.drop_store('st3.gone2');
DROP SCHEMA st3 CASCADE;
SELECT count(*) FROM eventstore.store_catalog WHERE store::text LIKE '%gone%' OR store::text ~ '^[0-9]';
DROP ROLE st_owner;
-- columns that C cannot find
SELECT eventstore.create_store('c');
ALTER TABLE c RENAME COLUMN value TO worth;
SELECT eventstore.get('c', 'k');
ALTER TABLE c RENAME COLUMN worth TO value;
ALTER TABLE c DROP CONSTRAINT c_pkey;
SELECT eventstore.get('c', 'k');
SELECT eventstore.drop_store('c');

-- ---- row-level security, with a policy of the table's ----
CREATE ROLE st_some;
GRANT USAGE ON SCHEMA st TO st_some;
GRANT SELECT, INSERT, UPDATE, DELETE ON h TO st_some;
ALTER TABLE h ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON h TO st_some USING (key LIKE 'mine%');
SET ROLE st_some;
SELECT eventstore.get('h', 'k') IS NULL AS hidden, eventstore.put('h', 'mine', '1');
SELECT eventstore.put('h', 'k', '1');
SELECT eventstore.get('h', 'mine'), eventstore.keys('h'), eventstore.delete('h', 'k') IS NULL AS kept;
SELECT * FROM eventstore.get_many('h', '{k,mine}');
SELECT eventstore.clear('h');
SELECT eventstore.get_at('h', 'mine', now());
SELECT count(*) FROM h_changelog;
RESET ROLE;
SELECT key, value FROM h;
SELECT * FROM replay_problems('h', 'h_changelog', 'r.data');
REVOKE ALL ON h FROM st_some;
REVOKE ALL ON SCHEMA st FROM st_some;
DROP POLICY own ON h;
DROP ROLE st_some;
-- a changelog with a trigger of its owner's, written by somebody else
CREATE ROLE st_writer;
GRANT USAGE ON SCHEMA st TO st_writer;
GRANT SELECT, INSERT, UPDATE ON kv TO st_writer;
CREATE FUNCTION stamps() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.metadata := to_jsonb(current_user::text = 'st_writer'); RETURN NEW; END $$;
CREATE TRIGGER stamps BEFORE INSERT ON kv_changelog FOR EACH ROW EXECUTE FUNCTION stamps();
SET ROLE st_writer;
SELECT eventstore.put('kv', 'w', '1');
SELECT * FROM eventstore.stores;
RESET ROLE;
SELECT count(*) > 1 AS shown_to_their_owner FROM eventstore.stores;
SELECT stream, version, metadata FROM eventstore.peek('kv_changelog');
DROP TRIGGER stamps ON kv_changelog;
DROP OWNED BY st_writer;
DROP ROLE st_writer;

SELECT * FROM replay_problems('kv', 'kv_changelog', 'r.data');
SELECT * FROM eventstore.verify('kv_changelog');
SET client_min_messages = warning;
DROP SCHEMA st CASCADE;
SELECT count(*) FROM eventstore.store_catalog;
