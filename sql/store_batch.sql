-- A batch of changes of a store: past the executor and row by row come to the same.

\set VERBOSITY terse
CREATE SCHEMA store_batch;
SET search_path = store_batch;

-- One key of a pair of changes, deletes of what is there and what is not, the same value again
SELECT eventstore.create_store('kv');
SELECT * FROM eventstore.store_apply('kv', '{b,a,b,c}', '{1,2,3,null}'::jsonb[]);
SELECT key, value, version FROM kv ORDER BY key;
SELECT position, stream, version, type, data, metadata FROM kv_changelog ORDER BY position;
-- Past the executor a batch has one time.
SELECT count(DISTINCT updated_at) AS times FROM kv;
SELECT * FROM eventstore.store_apply('kv', '{b,a,d}', '{3,null,4}'::jsonb[], '{null,"{\"partition\": 1, \"offset\": 7}","{\"offset\": 8}"}');
SELECT * FROM eventstore.store_apply('kv', '{a}', '{5}'::jsonb[], times => '{2000-01-01 00:00:00+00}');
SELECT * FROM eventstore.store_apply('kv', '{e}', '{6}'::jsonb[], times => '{2000-01-01 00:00:00+00}');
SELECT key, value, version, updated_at = '2000-01-01 00:00:00+00' AS given FROM kv ORDER BY key;
SELECT position, stream, version, type, data, metadata FROM kv_changelog WHERE position > 2 ORDER BY position;
SELECT * FROM eventstore.store_apply('kv', '{}', '{}'::jsonb[]);

-- The same random changes, both ways, on stores of each kind; 'alone': with nobody else writing
CREATE PROCEDURE compare(format text, key_format text, changelog boolean, rounds int, alone boolean = false)
LANGUAGE plpgsql AS $$
DECLARE
	keys text[];
	metas jsonb[];
	times timestamptz[];
	type text := CASE format WHEN 'json' THEN 'jsonb' WHEN 'text' THEN 'text' ELSE 'bytea' END;
	input text;
	one record;
	two record;
	differ bigint;
BEGIN
	PERFORM eventstore.create_store('direct', format, key_format, changelog);
	PERFORM eventstore.create_store('by_row', format, key_format, changelog);
	FOR round IN 1 .. rounds LOOP
		SELECT array_agg(CASE key_format WHEN 'text' THEN 'k' || k ELSE '\x00' || lpad(to_hex(k), 4, '0') END),
			array_agg(CASE WHEN m < 0.5 THEN jsonb_build_object('offset', i) END),
			array_agg(CASE WHEN m < 0.8 THEN timestamptz '2030-01-01' + (round * 1000 + i) * interval '1 s' END),
			array_agg(CASE WHEN d > 0.3 THEN (repeat('x', CASE WHEN m < 0.02 THEN 5000 ELSE 0 END) || v) END)::text
		INTO keys, metas, times, input
		FROM (SELECT i, (random() * 300)::int AS k, (random() * 2)::int AS v, random() AS d, random() AS m
			FROM generate_series(1, 400) i) s;
		IF format = 'json' THEN
			input := (SELECT array_agg(to_jsonb(t))::text FROM unnest(input::text[]) t);
		ELSIF format = 'bytes' THEN
			input := (SELECT array_agg(convert_to(t, 'UTF8'))::text FROM unnest(input::text[]) t);
		END IF;
		IF alone THEN
			LOCK TABLE direct IN SHARE ROW EXCLUSIVE MODE;
		END IF;
		EXECUTE format('SELECT * FROM eventstore.store_apply(%L, $1, $2::%s[], $3, $4)', 'direct', type) INTO one USING keys, input, metas, times;
		EXECUTE format('SELECT * FROM eventstore.store_apply(%L, $1, $2::%s[], $3, $4, true)', 'by_row', type) INTO two USING keys, input, metas, times;
		IF one IS DISTINCT FROM two THEN
			RAISE WARNING 'round %: % and %', round, one, two;
		END IF;
		COMMIT;
	END LOOP;
	-- The clock's times are not the same for both.
	SELECT count(*) INTO differ FROM direct d FULL JOIN by_row r USING (key)
	WHERE (d.key, d.value, d.version) IS DISTINCT FROM (r.key, r.value, r.version)
		OR (d.updated_at IS DISTINCT FROM r.updated_at AND least(d.updated_at, r.updated_at) >= '2030-01-01');
	RAISE INFO '% % %: % of the rows differ, % keys', format, key_format, changelog, differ, (SELECT count(*) > 50 FROM direct);
	IF changelog THEN
		EXECUTE $q$SELECT count(*) FROM direct_changelog d FULL JOIN by_row_changelog r USING (position)
			WHERE (d.stream, d.version, d.type, d.data, d.body, d.metadata) IS DISTINCT FROM (r.stream, r.version, r.type, r.data, r.body, r.metadata)
				OR (d.created_at IS DISTINCT FROM r.created_at AND least(d.created_at, r.created_at) >= '2030-01-01')$q$ INTO differ;
		RAISE INFO 'of the events %, faults: %', differ, (SELECT count(*) FROM eventstore.verify('direct_changelog'));
		EXECUTE $q$SELECT count(*) FROM direct s FULL JOIN (SELECT DISTINCT ON (stream) * FROM direct_changelog ORDER BY stream, position DESC) e
				ON e.stream = CASE pg_typeof(s.key) WHEN 'text'::regtype THEN s.key::text ELSE '\x' || encode(s.key::text::bytea, 'hex') END
			WHERE (s.key IS NULL) <> (e.type = 'delete') OR (s.version, s.updated_at) IS DISTINCT FROM (CASE e.type WHEN 'put' THEN e.version END, CASE e.type WHEN 'put' THEN e.created_at END)$q$ INTO differ;
		RAISE INFO 'rows that are not their key''s last event: %', differ;
	END IF;
	PERFORM eventstore.drop_store('direct'), eventstore.drop_store('by_row');
END $$;
SELECT setseed(0.4);
CALL compare('json', 'text', true, 12);
CALL compare('text', 'text', true, 6);
CALL compare('bytes', 'bytes', true, 6);
CALL compare('json', 'text', false, 12);
CALL compare('bytes', 'bytes', false, 6);
CALL compare('json', 'text', true, 12, alone => true);
CALL compare('bytes', 'bytes', true, 6, alone => true);
CALL compare('text', 'text', false, 6, alone => true);

-- Alone: more new keys than are written at once, some of them deleted before, or of this transaction
SELECT eventstore.create_store('alone', 'text');
SELECT eventstore.put_text('alone', 'k' || i, 'first') FROM generate_series(1, 2000, 400) i \g /dev/null
SELECT eventstore.delete_text('alone', 'k' || i) FROM generate_series(1, 2000, 800) i;
BEGIN;
LOCK TABLE alone IN SHARE ROW EXCLUSIVE MODE;
SELECT * FROM eventstore.store_apply('alone', '{only,k5}', '{one,this}'::text[]);
SELECT * FROM eventstore.store_apply('alone', '{k5,k1205}', '{null,null}'::text[]);
SAVEPOINT s;
SELECT * FROM eventstore.store_apply('alone', '{k5,k6,undone}', '{1,2,3}'::text[]);
ROLLBACK TO s;
SELECT eventstore.store_apply('alone', array_agg('k' || i), array_agg(repeat('value ' || i, CASE WHEN i % 700 = 0 THEN 3000 ELSE 1 END))) FROM generate_series(1, 2500) i;
COMMIT;
SELECT count(*), count(DISTINCT key), sum(version), count(*) FILTER (WHERE value LIKE 'value ' || substr(key, 2) || '%') AS values FROM alone;
SELECT version, count(*) FROM alone GROUP BY version ORDER BY version;
SELECT stream, version, type FROM alone_changelog WHERE stream IN ('k1', 'k401', 'k5', 'k6', 'only', 'undone') ORDER BY stream, version;
SELECT count(*) FROM alone s JOIN alone_changelog e ON e.stream = s.key AND e.version = s.version AND e.body = convert_to(s.value, 'UTF8') AND e.created_at = s.updated_at;
SELECT * FROM eventstore.verify('alone_changelog');
-- A lock that lets others write is none
BEGIN;
LOCK TABLE alone IN SHARE UPDATE EXCLUSIVE MODE;
SELECT * FROM eventstore.store_apply('alone', '{another,k1}', '{1,2}'::text[]);
COMMIT;
SELECT version FROM eventstore.peek('alone_changelog', 'another');

-- Keys are written in bytewise order, whatever they begin with, and of one key the last counts
SELECT eventstore.create_store('ordered');
WITH given AS (
	SELECT i, CASE i % 4 WHEN 0 THEN '' WHEN 1 THEN 'a beginning of many bytes ' ELSE 'a' END || left(md5((i % 300)::text), i % 21) AS key
	FROM generate_series(1, 3000) i)
SELECT inserted, inserted = (SELECT count(DISTINCT key) FROM given) AS all_of_them
FROM eventstore.store_apply('ordered', (SELECT array_agg(key ORDER BY i) FROM given), (SELECT array_agg(to_jsonb(i) ORDER BY i) FROM given));
SELECT count(*) AS before_its_predecessor FROM (
	SELECT stream COLLATE "C" <= lag(stream COLLATE "C") OVER (ORDER BY position) AS wrong FROM ordered_changelog) s WHERE wrong;
SELECT count(*) AS not_the_last FROM ordered JOIN (
	SELECT CASE i % 4 WHEN 0 THEN '' WHEN 1 THEN 'a beginning of many bytes ' ELSE 'a' END || left(md5((i % 300)::text), i % 21) AS key, max(i) AS last
	FROM generate_series(1, 3000) i GROUP BY 1) g USING (key) WHERE value <> to_jsonb(last);
-- A zero byte is more than none
SELECT eventstore.create_store('ordered_bytes', 'text', 'bytes');
SELECT inserted FROM eventstore.store_apply('ordered_bytes', '{\\x6100,\\x61,\\x,\\x610001,\\x6100000000000000,\\x610000000000000000,\\x61,\\x00}', '{1,2,3,4,5,6,7,8}'::text[]);
SELECT stream, convert_from(body, 'UTF8') AS value FROM ordered_bytes_changelog ORDER BY position;

-- What the user has added is asked: a trigger that sees the old value and changes the new one, or refuses
CREATE FUNCTION add_old() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NEW.key = 'refused' THEN
		RETURN NULL;
	END IF;
	IF TG_OP = 'UPDATE' THEN
		NEW.value := to_jsonb(NEW.value::int + OLD.value::int);
	END IF;
	RETURN NEW;
END $$;
CREATE TRIGGER add_old BEFORE INSERT OR UPDATE ON kv FOR EACH ROW EXECUTE FUNCTION add_old();
SELECT * FROM eventstore.store_apply('kv', '{a,b,f,refused,d}', '{1,0,7,1,null}'::jsonb[], '{"{}","{}","{\"n\": 1}","{}","{\"n\": 2}"}');
SELECT key, value, version FROM kv ORDER BY key;
SELECT position, stream, version, type, data, metadata FROM kv_changelog WHERE position > 6 ORDER BY position;
DROP TRIGGER add_old ON kv;

-- An added column with a default, a second index, a check, a rule
ALTER TABLE kv ADD COLUMN more int DEFAULT 42;
SELECT * FROM eventstore.store_apply('kv', '{g}', '{1}'::jsonb[]);
SELECT more FROM kv WHERE key = 'g';
ALTER TABLE kv DROP COLUMN more;
CREATE INDEX ON kv (value);
SELECT * FROM eventstore.store_apply('kv', '{g}', '{2}'::jsonb[]);
SET enable_seqscan = off;
SELECT key FROM kv WHERE value = '2';
RESET enable_seqscan;
DROP INDEX kv_value_idx;
ALTER TABLE kv ADD CONSTRAINT small CHECK (value < '100');
SELECT * FROM eventstore.store_apply('kv', '{g}', '{100}'::jsonb[]);
ALTER TABLE kv DROP CONSTRAINT small;

-- Triggers that are off, record nothing
ALTER TABLE kv DISABLE TRIGGER "!eventstore_record";
SELECT * FROM eventstore.store_apply('kv', '{g}', '{3}'::jsonb[]);
ALTER TABLE kv ENABLE TRIGGER "!eventstore_record";
SELECT count(*) FROM kv_changelog WHERE stream = 'g';
SELECT * FROM eventstore.store_apply('kv', '{g}', '{4}'::jsonb[]);
SELECT stream, version, type, data FROM kv_changelog WHERE stream = 'g' ORDER BY version;
SELECT value, version FROM kv WHERE key = 'g';

-- Within a statement that writes the same store
CREATE FUNCTION apply_within(k text, v jsonb) RETURNS jsonb LANGUAGE sql AS $$ SELECT eventstore.store_apply('kv', ARRAY[k], ARRAY[v]); SELECT v $$;
INSERT INTO kv (key, value) SELECT k, apply_within(k || '-within', '1') FROM unnest(ARRAY['w1', 'w2']) k;
BEGIN;
SELECT eventstore.put('kv', 'own', '1');
SELECT * FROM eventstore.store_apply('kv', '{own,own2}', '{2,1}'::jsonb[]);
SELECT * FROM eventstore.store_apply('kv', '{own,own2}', '{null,2}'::jsonb[]);
SELECT * FROM eventstore.store_apply('kv', '{own}', '{3}'::jsonb[]);
COMMIT;
SELECT stream, version, type, data FROM kv_changelog WHERE stream LIKE 'own%' OR stream LIKE 'w%' ORDER BY stream, version;
SELECT key, value, version FROM kv WHERE key LIKE 'own%' ORDER BY key;

-- At REPEATABLE READ
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT * FROM eventstore.store_apply('kv', '{a,h}', '{null,1}'::jsonb[]);
COMMIT;

-- Rights: of the table, of its columns, of its rows
CREATE ROLE store_batch_user;
GRANT USAGE ON SCHEMA store_batch TO store_batch_user;
SET ROLE store_batch_user;
SELECT * FROM eventstore.store_apply('kv', '{a}', '{1}'::jsonb[]);
RESET ROLE;
GRANT EXECUTE ON FUNCTION eventstore.store_apply TO store_batch_user;
GRANT SELECT, INSERT ON kv TO store_batch_user;
SET ROLE store_batch_user;
SELECT * FROM eventstore.store_apply('kv', '{r1}', '{1}'::jsonb[]);
RESET ROLE;
GRANT UPDATE (value) ON kv TO store_batch_user;
SET ROLE store_batch_user;
SELECT * FROM eventstore.store_apply('kv', '{r1}', '{2}'::jsonb[]);
SELECT * FROM eventstore.store_apply('kv', '{r1}', '{null}'::jsonb[]);
RESET ROLE;
GRANT UPDATE, DELETE ON kv TO store_batch_user;
SET ROLE store_batch_user;
SELECT * FROM eventstore.store_apply('kv', '{r1,r2}', '{null,1}'::jsonb[]);
RESET ROLE;
ALTER TABLE kv ENABLE ROW LEVEL SECURITY;
CREATE POLICY mine ON kv USING (key LIKE 'r%');
SET ROLE store_batch_user;
SELECT * FROM eventstore.store_apply('kv', '{g,r2}', '{null,null}'::jsonb[]);
SELECT * FROM eventstore.store_apply('kv', '{s}', '{1}'::jsonb[]);
RESET ROLE;
ALTER TABLE kv DISABLE ROW LEVEL SECURITY;

-- What it refuses
SELECT eventstore.store_apply('kv', '{a,null}', '{1,2}'::jsonb[]);
SELECT eventstore.store_apply('kv', '{a}', '{1,2}'::jsonb[]);
SELECT eventstore.store_apply('kv', '{a}', '{1,2}'::text[]);
SELECT eventstore.store_apply('kv_changelog', '{a}', '{1}'::jsonb[]);
BEGIN READ ONLY;
SELECT eventstore.store_apply('kv', '{a}', '{1}'::jsonb[]);
ROLLBACK;

SELECT * FROM eventstore.verify('kv_changelog');
SET client_min_messages = warning;
DROP OWNED BY store_batch_user;
DROP ROLE store_batch_user;
DROP SCHEMA store_batch CASCADE;
