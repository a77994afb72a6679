-- capture: a changelog for an existing table
\set SHOW_CONTEXT never
CREATE SCHEMA cap;
SET search_path = cap, public;

-- Where the changelog, replayed, is not the table; where an event does not begin
-- with what the one before it left; whether versions are dense.
CREATE FUNCTION differs(source regclass, changelog regclass = NULL, tag text = NULL) RETURNS TABLE (problem text) LANGUAGE plpgsql
	SET timezone = 'UTC' SET datestyle = 'ISO' SET intervalstyle = 'postgres' SET bytea_output = 'hex' AS $$
BEGIN
	RETURN QUERY EXECUTE format($q$
		WITH events AS (SELECT * FROM %2$s WHERE (%3$L IS NULL OR %3$L = ANY (tags))),
			steps AS (SELECT *, row_number() OVER w AS n, lag(data->'new') OVER w AS before, lag(position) OVER w AS position_before
				FROM events WHERE stream IS NOT NULL WINDOW w AS (PARTITION BY stream ORDER BY position)),
			truncated AS (SELECT coalesce(max(position), 0) AS at FROM events WHERE type = 'truncate'),
			replayed AS (SELECT DISTINCT ON (stream) data->'new' AS row FROM events WHERE stream IS NOT NULL AND position > (SELECT at FROM truncated) ORDER BY stream, position DESC),
			expected AS (SELECT row FROM replayed WHERE row <> 'null'),
			actual AS (SELECT to_jsonb(s) AS row FROM %4$s %1$s s)
		SELECT 'not in the table: ' || row::text FROM (TABLE expected EXCEPT ALL TABLE actual) e
		UNION ALL SELECT 'not in the changelog: ' || row::text FROM (TABLE actual EXCEPT ALL TABLE expected) a
		UNION ALL SELECT 'version of ' || stream FROM steps WHERE version <> n AND %3$L IS NULL
		UNION ALL SELECT 'old row of ' || stream || ' ' || version FROM steps
			WHERE data->'old' IS DISTINCT FROM coalesce(before, 'null') AND NOT EXISTS (SELECT FROM events t WHERE t.type = 'truncate' AND t.position BETWEEN position_before AND steps.position)
		UNION ALL SELECT 'type of ' || stream || ' ' || version FROM steps
			WHERE type <> CASE WHEN data->'old' = 'null' THEN 'insert' WHEN data->'new' = 'null' THEN 'delete' ELSE 'update' END$q$,
		source, coalesce(changelog, (SELECT c.changelog FROM eventstore.capture_catalog c WHERE c.source = $1)), tag,
		-- of a parent of inheritance only its own rows
		CASE (SELECT relkind FROM pg_class WHERE oid = $1) WHEN 'r' THEN 'ONLY' END);
END $$;
CREATE FUNCTION events(changelog regclass, after bigint = 0) RETURNS TABLE (stream text, version bigint, type text, tags text[], old jsonb, new jsonb) LANGUAGE plpgsql AS $$
BEGIN
	RETURN QUERY EXECUTE format($q$SELECT stream, version, type, tags, data->'old', data->'new' FROM %s WHERE position > $1 ORDER BY position$q$, changelog) USING after;
END $$;

-- ---- 1. every kind of statement ----
CREATE TABLE t (id int PRIMARY KEY, v text);
INSERT INTO t VALUES (0, 'there before');
SELECT eventstore.capture('t');
\d t
INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, NULL);
UPDATE t SET v = v || '!' WHERE id < 3;
UPDATE t SET v = v WHERE id = 1;
DELETE FROM t WHERE id = 2;
INSERT INTO t VALUES (1, 'upsert'), (4, 'new') ON CONFLICT (id) DO UPDATE SET v = excluded.v;
INSERT INTO t VALUES (1, 'ignored'), (5, 'new') ON CONFLICT DO NOTHING;
COPY t FROM stdin;
6	copied
7	copied
\.
MERGE INTO t USING (VALUES (6, NULL), (7, 'merged'), (8, 'merged')) m (id, v) ON t.id = m.id
	WHEN MATCHED AND m.v IS NULL THEN DELETE WHEN MATCHED THEN UPDATE SET v = m.v WHEN NOT MATCHED THEN INSERT VALUES (m.id, m.v);
WITH gone AS (DELETE FROM t WHERE id = 8 RETURNING v), moved AS (UPDATE t SET v = 'with' WHERE id = 7) INSERT INTO t SELECT 9, v FROM gone;
CREATE VIEW view_of_t AS SELECT id, v FROM t;
UPDATE view_of_t SET v = 'by a view' WHERE id = 9;
PREPARE p AS UPDATE t SET v = $2 WHERE id = $1;
EXECUTE p (9, 'prepared');
DO $$ BEGIN EXECUTE 'EXPLAIN (ANALYZE) DELETE FROM t WHERE id = 5'; END $$;
SELECT * FROM events('t_changelog');
-- the row that was there before has no insert
UPDATE t SET v = 'now' WHERE id = 0;
SELECT * FROM differs('t');
DELETE FROM t WHERE id = 0;
SELECT count(*) FROM t_changelog \gset
TRUNCATE t;
INSERT INTO t VALUES (1, 'after');
SELECT * FROM events('t_changelog', :count);
-- what is rolled back is nowhere
BEGIN;
INSERT INTO t VALUES (10, 'kept');
SAVEPOINT s;
UPDATE t SET v = 'undone';
DELETE FROM t WHERE id = 10;
ROLLBACK TO s;
UPDATE t SET v = v || '?' WHERE id = 10;
COMMIT;
SELECT * FROM differs('t', 't_changelog') WHERE problem NOT LIKE 'old row of 0 %';
SELECT stream, version, type FROM t_changelog WHERE stream = '10' ORDER BY position;
-- many rows: more than are appended at a time
INSERT INTO t SELECT i, i::text FROM generate_series(100, 3600) i;
UPDATE t SET v = v || '!' WHERE id >= 100;
DELETE FROM t WHERE id % 2 = 0;
SELECT type, count(*) FROM t_changelog GROUP BY type ORDER BY type;
SELECT * FROM differs('t', 't_changelog') WHERE problem NOT LIKE 'old row of 0 %';
SELECT * FROM eventstore.verify('t_changelog');
-- and more than a segment holds
CREATE TABLE long (id int PRIMARY KEY);
SELECT eventstore.create_collection('short', segment_size => 700);
SELECT eventstore.capture('long', 'short');
INSERT INTO long SELECT generate_series(1, 6000);
SELECT count(*), max(version), count(DISTINCT tableoid) > 5 AS many_segments FROM short;
SELECT * FROM differs('long');

-- ---- 2. composite key, identity and generated columns, a key with INCLUDE ----
CREATE TABLE composite (region text, n int GENERATED ALWAYS AS IDENTITY, price numeric, twice numeric GENERATED ALWAYS AS (price * 2) STORED, extra text, PRIMARY KEY (region, n) INCLUDE (extra));
SELECT eventstore.capture('composite');
INSERT INTO composite (region, price) VALUES ('eu', 1.5), ('e"u, ''x', 2);
UPDATE composite SET price = price + 1;
SELECT * FROM events('composite_changelog');
SELECT type, data->'new'->'price' AS price FROM eventstore.read('composite_changelog', tags => '{region:eu}');
SELECT type FROM eventstore.read('composite_changelog', tags => '{region:eu,n:1}');
SELECT version, type FROM eventstore.read_stream('composite_changelog', '["eu", 1]');
SELECT * FROM differs('composite');

-- ---- 3. keys of all types: the same stream, whatever the session's settings ----
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE DOMAIN posint AS int CHECK (value > 0);
CREATE COLLATION odd (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE TYPE pair AS (a int, b text);
CREATE FUNCTION try_key(type text, value text) RETURNS TABLE (stream text, tags text[], streams bigint, both_ways text) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('CREATE TABLE k (k %s PRIMARY KEY, v int)', type);
	PERFORM eventstore.capture('k');
	EXECUTE format('INSERT INTO k VALUES (%L, 1)', value);
	SET LOCAL timezone = 'Asia/Tokyo';
	SET LOCAL datestyle = 'German';
	SET LOCAL intervalstyle = 'sql_standard';
	SET LOCAL bytea_output = 'escape';
	SET LOCAL extra_float_digits = -5;
	UPDATE k SET v = 2;
	RETURN QUERY SELECT c.stream, c.tags, (SELECT count(DISTINCT x.stream) FROM k_changelog x), (SELECT string_agg(DISTINCT coalesce(x.data->'old'->>'k', x.data->'new'->>'k'), ' and ') FROM k_changelog x) FROM k_changelog c WHERE c.version = 1;
	DROP TABLE k;
	PERFORM eventstore.drop_collection('k_changelog');
	SET LOCAL timezone = 'PST8PDT';
	SET LOCAL datestyle = 'ISO, MDY';
	SET LOCAL intervalstyle = 'postgres';
	SET LOCAL bytea_output = 'hex';
	SET LOCAL extra_float_digits = 1;
END $$;
SELECT k.type, t.* FROM (VALUES ('int8', '-9223372036854775808'), ('posint', '7'), ('numeric', '1.50'), ('numeric', 'NaN'), ('float8', '0.1'), ('uuid', '0e0e0e0e-0000-4000-8000-000000000001'), ('bytea', '\x00ff'), ('mood', 'ok'),
	('timestamptz', '2020-01-01 12:00+01'), ('timestamp', '2020-01-01 12:00'), ('date', '2020-02-01'), ('interval', '1 day 02:00'), ('bool', 'f'), ('char(5)', 'ab'), ('text COLLATE odd', 'Ä"\'), ('text', ''), ('int[]', '{1,2}'), ('pair', '(1,"x y")'), ('int4range', '[1,5)'), ('inet', '10.0.0.1/8'), ('name', 'n')) k (type, value), try_key(type, value) t;
CREATE TABLE two (a timestamptz, b bytea, c bool, d float8, e mood, f numeric, PRIMARY KEY (a, b, c, d, e, f));
SELECT eventstore.capture('two');
INSERT INTO two VALUES ('2020-01-01 12:00+01', '\x01', true, 1e20, 'sad', 'NaN');
SELECT stream FROM two_changelog;
SET timezone = 'UTC';
SELECT stream = jsonb_build_array(a, b, c, d, e, f)::text AS as_sql_says FROM two, two_changelog;
RESET timezone;

-- ---- 4. columns dropped, added, renamed and of another type, before and after ----
CREATE TABLE altered (a int, gone text, id int PRIMARY KEY, b text);
INSERT INTO altered VALUES (1, 'x', 1, 'old');
ALTER TABLE altered DROP COLUMN gone;
SELECT eventstore.capture('altered');
UPDATE altered SET a = 2;
ALTER TABLE altered ADD COLUMN added text DEFAULT 'default';
UPDATE altered SET a = 3;
ALTER TABLE altered RENAME COLUMN id TO ident;
ALTER TABLE altered RENAME COLUMN b TO "B b";
ALTER TABLE altered ALTER COLUMN ident TYPE text;
ALTER TABLE altered DROP COLUMN a;
UPDATE altered SET added = 'x';
SELECT * FROM events('altered_changelog');
-- another key
ALTER TABLE altered DROP CONSTRAINT altered_pkey;
UPDATE altered SET added = 'y';
ALTER TABLE altered ADD PRIMARY KEY (added);
UPDATE altered SET "B b" = 'z';
SELECT stream, version, type, tags FROM eventstore.peek('altered_changelog');

-- ---- 5. partitions ----
CREATE TABLE part (region text, id int, v text, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
CREATE TABLE part_eu PARTITION OF part FOR VALUES IN ('eu') PARTITION BY RANGE (id);
CREATE TABLE part_eu_1 PARTITION OF part_eu FOR VALUES FROM (0) TO (100);
SELECT eventstore.capture('part');
CREATE TABLE part_us (junk text, v text, id int NOT NULL, region text NOT NULL);
ALTER TABLE part_us DROP COLUMN junk;
ALTER TABLE part ATTACH PARTITION part_us FOR VALUES IN ('us');
CREATE TABLE part_rest PARTITION OF part DEFAULT;
INSERT INTO part VALUES ('eu', 1, 'a'), ('us', 2, 'b'), ('xx', 3, 'c');
COPY part FROM stdin;
eu	4	copied
us	5	copied
\.
-- on the partition itself; to another partition
INSERT INTO part_us (region, id, v) VALUES ('us', 6, 'leaf');
UPDATE part_us SET v = 'leaf!' WHERE id = 6;
DELETE FROM part_us WHERE id = 2;
UPDATE part SET region = 'us' WHERE id = 1;
UPDATE part SET v = v || '!', region = 'eu' WHERE region = 'us';
INSERT INTO part VALUES ('eu', 5, 'x') ON CONFLICT (region, id) DO UPDATE SET v = 'upsert';
MERGE INTO part USING (VALUES ('eu', 4), ('us', 9)) m (region, id) ON part.region = m.region AND part.id = m.id WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (m.region, m.id, 'merged');
SELECT * FROM events('part_changelog');
SELECT * FROM differs('part');
SELECT count(*) FROM part_changelog \gset
TRUNCATE part_us;
TRUNCATE part_eu, part_rest;
TRUNCATE part;
SELECT * FROM events('part_changelog', :count);
ALTER TABLE part DETACH PARTITION part_us;
INSERT INTO part_us (region, id) VALUES ('us', 1);
SELECT * FROM events('part_changelog', :count + 4);
SELECT eventstore.capture('part_eu');
SELECT eventstore.capture('part_eu_1');
SELECT eventstore.release('part_eu');
-- a partition alone
CREATE TABLE part2 (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE part2_1 PARTITION OF part2 FOR VALUES FROM (0) TO (10);
CREATE TABLE part2_2 PARTITION OF part2 FOR VALUES FROM (10) TO (30);
SELECT eventstore.capture('part2_1');
INSERT INTO part2 VALUES (1), (11);
UPDATE part2 SET id = id + 9;
SELECT * FROM events('part2_1_changelog');
SELECT eventstore.capture('part2');

-- ---- 6. inheritance: each table for itself ----
CREATE TABLE base (id int PRIMARY KEY, v text);
CREATE TABLE child (more int, PRIMARY KEY (id)) INHERITS (base);
CREATE TABLE other_child () INHERITS (base);
SELECT eventstore.capture('base'), eventstore.capture('child');
INSERT INTO base VALUES (1, 'base');
INSERT INTO child VALUES (2, 'child', 3);
INSERT INTO other_child VALUES (3, 'other');
UPDATE base SET v = v || '!';
SELECT * FROM events('base_changelog');
SELECT * FROM events('child_changelog');
SELECT * FROM differs('base') UNION ALL SELECT * FROM differs('child');

-- ---- 7. TOAST ----
CREATE TABLE toast (id int PRIMARY KEY, a text, b text, c int);
ALTER TABLE toast ALTER COLUMN a SET STORAGE external, ALTER COLUMN b SET STORAGE extended;
SELECT eventstore.capture('toast');
INSERT INTO toast SELECT 1, repeat('a', 20000), string_agg(md5(i::text), ''), 0 FROM generate_series(1, 2000) i;
UPDATE toast SET c = 1;
UPDATE toast SET a = 'short', c = 2;
UPDATE toast SET id = 2;
DELETE FROM toast;
SELECT stream, version, type, length(data->'old'->>'a') AS old_a, length(data->'old'->>'b') AS old_b, length(data->'new'->>'a') AS new_a, length(data->'new'->>'b') AS new_b FROM toast_changelog ORDER BY position;
SELECT * FROM differs('toast');

-- ---- 8. the key changes ----
CREATE TABLE moved (id int PRIMARY KEY, v text);
SELECT eventstore.capture('moved');
INSERT INTO moved VALUES (1, 'a'), (2, 'b');
UPDATE moved SET id = 3 WHERE id = 2;
UPDATE moved SET id = id + 1 WHERE id = 3;
INSERT INTO moved VALUES (2, 'again');
SELECT * FROM events('moved_changelog');
SELECT * FROM differs('moved');
-- keys that are equal, but not the same
CREATE TABLE equal (n numeric PRIMARY KEY, t text COLLATE odd UNIQUE);
SELECT eventstore.capture('equal');
INSERT INTO equal VALUES (1.0, 'a');
UPDATE equal SET n = 1.00;
SELECT stream, version, type FROM equal_changelog ORDER BY position;
CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, v text);
SELECT eventstore.capture('deferred');
INSERT INTO deferred VALUES (1, 'a'), (2, 'b');
BEGIN;
UPDATE deferred SET id = 3 - id;
COMMIT;
SELECT stream, version, type, data FROM deferred_changelog ORDER BY position;

-- ---- 9. values ----
CREATE TABLE vals (id int PRIMARY KEY, n numeric, f float8, j json, jb jsonb, a int[], txt text[], p pair, r tstzrange, ts timestamp, d date, b bytea, i interval, m mood, u uuid, x char(4), bits bit(3));
SELECT eventstore.capture('vals');
INSERT INTO vals VALUES (1, 'NaN', 'Infinity', '{"b": 1, "a": null}', '[1, "x"]', '{1,NULL}', '{"q\"uote",NULL}', '(1,"t")', '[2020-01-01 00:00+00,)', 'infinity', '-infinity', '\xdeadbeef', '1 mon -1 day', 'ok', '0e0e0e0e-0000-4000-8000-000000000001', 'ab', '101'),
	(2, '-Infinity', '-Infinity', 'null', 'null', '{}', '{}', NULL, 'empty', NULL, NULL, '', NULL, NULL, NULL, '', NULL), (3, 1e30, 'NaN', '"s"', '{}', '{{1,2},{3,4}}', NULL, '(,)', NULL, '2020-01-01 10:00', '2020-01-01', NULL, '0', NULL, NULL, NULL, NULL);
SELECT new FROM events('vals_changelog');
SELECT * FROM differs('vals');
CREATE DOMAIN amount AS numeric(10, 3);
CREATE DOMAIN verdict AS bool;
CREATE TYPE point3 AS (x int, y int, z int);
CREATE TYPE shade AS ENUM ('light', 'dark');
CREATE FUNCTION as_json(shade) RETURNS json LANGUAGE sql AS $$ SELECT json_build_object('shade', $1::text) $$;
CREATE CAST (shade AS json) WITH FUNCTION as_json(shade);
CREATE TABLE more_vals (yes bool, small int2, id int PRIMARY KEY, f4 float4, money numeric, at time, moment timestamptz, fixed amount, decided verdict, n name, p point3, ps point3[], host inet, at_zone timetz, ids oidvector, dims int4range[], s shade, "ü" text, gone text, nothing text);
ALTER TABLE more_vals DROP COLUMN gone;
SELECT eventstore.capture('more_vals');
INSERT INTO more_vals VALUES (true, -32768, 1, 0.1, 1e-20, '24:00', '2020-01-01 12:00:00.000001+05', 1.5, false, 'a name', '(1,2,3)', '{"(1,2,3)"}', '10.0.0.1/8', '12:00+02', '1 2', '{"[1,3)"}', 'dark', E'\t"\\'), (false, 0, 2, 'NaN', '-Infinity', NULL, '-infinity', 'NaN', NULL, '', NULL, '{}', NULL, NULL, '', '{}', NULL, '');
UPDATE more_vals SET small = 7, "ü" = repeat('ü', 3000);
SELECT new - 'ü' AS new, length(new->>'ü') FROM events('more_vals_changelog');
SELECT * FROM differs('more_vals');
-- a cast that changes the table that is being recorded
CREATE TABLE twice (id int PRIMARY KEY, s shade);
SELECT eventstore.capture('twice');
CREATE OR REPLACE FUNCTION as_json(shade) RETURNS json LANGUAGE plpgsql AS $$ BEGIN INSERT INTO twice VALUES (2) ON CONFLICT DO NOTHING; RETURN to_json($1::text); END $$;
INSERT INTO twice VALUES (1, 'dark');
SELECT stream, version, type, new FROM events('twice_changelog');

-- ---- 10. names ----
CREATE SCHEMA "Sch e.ma";
CREATE TABLE "Sch e.ma"."Table ""of"" sixty-three bytes, äöü, as long as a name can be" ("The Key" int, "select" text, PRIMARY KEY ("The Key", "select"));
SELECT eventstore.capture('"Sch e.ma"."Table ""of"" sixty-three bytes, äöü, as long as a name can be"') AS changelog \gset
SELECT :'changelog';
INSERT INTO "Sch e.ma"."Table ""of"" sixty-three bytes, äöü, as long as a name can be" VALUES (1, 'ü');
SELECT stream, tags, data FROM :changelog;

-- ---- 11. foreign keys ----
CREATE TABLE parent (id int PRIMARY KEY, boss int REFERENCES parent ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE kid (id int PRIMARY KEY, parent int REFERENCES parent ON DELETE SET NULL ON UPDATE CASCADE);
SELECT eventstore.capture('parent'), eventstore.capture('kid');
INSERT INTO parent VALUES (1, NULL), (2, 1), (3, 2);
INSERT INTO kid VALUES (1, 3);
UPDATE parent SET id = id + 10;
DELETE FROM parent WHERE id = 11;
SELECT 'parent' AS source, * FROM events('parent_changelog');
SELECT * FROM events('kid_changelog');
SELECT * FROM differs('parent') UNION ALL SELECT * FROM differs('kid');
TRUNCATE parent CASCADE;
SELECT type FROM eventstore.peek('parent_changelog') UNION ALL SELECT type FROM eventstore.peek('kid_changelog');

-- ---- 12. triggers of the user's, amid a statement: events in the order of changes ----
CREATE TABLE busy (id int PRIMARY KEY, v text);
SELECT eventstore.capture('busy');
CREATE FUNCTION meddles_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	NEW.v := NEW.v || '+';
	IF NEW.id = 3 AND pg_trigger_depth() = 1 THEN UPDATE busy SET v = v || ' before' WHERE id = 1; END IF;
	RETURN NEW;
END $$;
CREATE TRIGGER "!meddles" BEFORE INSERT OR UPDATE ON busy FOR EACH ROW EXECUTE FUNCTION meddles_before();
CREATE FUNCTION meddles_after() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF pg_trigger_depth() > 1 THEN RETURN NULL; END IF;
	IF TG_OP = 'DELETE' THEN
		INSERT INTO busy VALUES (OLD.id, 'back') ON CONFLICT (id) DO UPDATE SET v = 'was back';
		INSERT INTO busy VALUES (3, 'back early') ON CONFLICT (id) DO UPDATE SET v = busy.v || ' early';
	ELSIF NEW.id = 1 THEN
		UPDATE busy SET v = v || ' after' WHERE id IN (2, 3);
		DELETE FROM busy WHERE id = 4;
		BEGIN
			UPDATE busy SET v = 'never';
			RAISE EXCEPTION 'undo';
		EXCEPTION WHEN raise_exception THEN NULL;
		END;
		TRUNCATE kid;
		UPDATE busy SET id = (SELECT max(id) + 1 FROM busy) WHERE id = 5;
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER "!meddles_after" AFTER INSERT OR UPDATE OR DELETE ON busy FOR EACH ROW EXECUTE FUNCTION meddles_after();
INSERT INTO busy SELECT i, i::text FROM generate_series(1, 5) i;
SELECT * FROM differs('busy');
SELECT stream, version, type, old->'v' AS old, new->'v' AS new FROM events('busy_changelog');
SELECT max(position) AS seen FROM busy_changelog \gset
COPY busy FROM stdin;
4	copied
5	copied
\.
UPDATE busy SET v = 'all';
SELECT * FROM differs('busy');
SELECT stream, version, type, old->'v' AS old, new->'v' AS new FROM events('busy_changelog', :seen);
DELETE FROM busy;
SELECT * FROM differs('busy');
SELECT * FROM busy ORDER BY id;
SELECT count(*) FROM kid_changelog WHERE type = 'truncate';
DROP TRIGGER "!meddles" ON busy;
DROP TRIGGER "!meddles_after" ON busy;
-- from a trigger of another table, which is captured too, and by a function amid a statement that is not recorded
CREATE TABLE total (id int PRIMARY KEY, n bigint);
SELECT eventstore.capture('total');
INSERT INTO total VALUES (1, 0);
CREATE FUNCTION counts() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE total SET n = n + 1; RETURN NULL; END $$;
CREATE TRIGGER counts AFTER INSERT ON busy FOR EACH ROW EXECUTE FUNCTION counts();
INSERT INTO busy SELECT i, 'x' FROM generate_series(100, 2600) i;
SELECT * FROM differs('busy') UNION ALL SELECT * FROM differs('total');
SELECT stream, version, data FROM eventstore.peek('total_changelog');
CREATE FUNCTION doubles() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN UPDATE total SET n = n * 2; RETURN (SELECT version FROM eventstore.peek('total_changelog', '1')); END $$;
CREATE TABLE not_captured AS SELECT doubles() AS version;
INSERT INTO not_captured SELECT doubles();
SELECT * FROM not_captured;
SELECT * FROM differs('total');
-- an error amid a statement
DO $$ BEGIN
	INSERT INTO busy VALUES (1000000, 'x'), (100, 'there');
EXCEPTION WHEN unique_violation THEN
	INSERT INTO busy VALUES (1000001, 'instead');
END $$;
SELECT * FROM differs('busy') UNION ALL SELECT * FROM differs('total');

-- with another search_path: what COPY and TRUNCATE name is what they named
CREATE FUNCTION elsewhere() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
	IF pg_catalog.pg_trigger_depth() = 1 THEN UPDATE cap.total SET n = n + 1 WHERE id = NEW.id; END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER "!elsewhere" AFTER INSERT ON total FOR EACH ROW EXECUTE FUNCTION elsewhere();
COPY total FROM stdin;
2	0
3	0
\.
DROP TRIGGER "!elsewhere" ON total;
SELECT stream, version, type FROM total_changelog WHERE stream IN ('2', '3') ORDER BY position;
SELECT * FROM differs('total');
CREATE SCHEMA hers;
CREATE TABLE hers.part (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE hers.leaf PARTITION OF hers.part FOR VALUES FROM (0) TO (10);
CREATE TABLE mine (id int PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE leaf PARTITION OF mine FOR VALUES FROM (0) TO (10);
SELECT eventstore.capture('hers.part'), eventstore.capture('mine');
CREATE FUNCTION goes_to_hers() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN SET search_path = hers; RETURN NULL; END $$;
CREATE TRIGGER goes_to_hers BEFORE TRUNCATE ON leaf FOR EACH STATEMENT EXECUTE FUNCTION goes_to_hers();
TRUNCATE leaf;
SET search_path = cap, public;
SELECT type, tags FROM mine_changelog;
SELECT count(*) FROM hers.part_changelog;

-- ---- 13. several tables in one collection of the owner's ----
SELECT eventstore.create_collection('journal');
SELECT position FROM eventstore.append('journal', 'by hand');
CREATE UNLOGGED TABLE first (id int PRIMARY KEY);
CREATE TABLE second (id int PRIMARY KEY);
SELECT eventstore.capture('first', 'journal'), eventstore.capture('second', collection => 'journal');
INSERT INTO first VALUES (1);
INSERT INTO second VALUES (1);
TRUNCATE first;
SELECT * FROM events('journal');
SELECT * FROM differs('first', tag => 'table:cap.first') UNION ALL SELECT * FROM differs('second', tag => 'table:cap.second');
SELECT eventstore.append('journal', 'by hand');
SELECT eventstore.release('first');
SELECT eventstore.append('journal', 'by hand');
SELECT eventstore.release('second');
SELECT position FROM eventstore.append('journal', 'by hand');

-- ---- what is refused ----
SELECT eventstore.create_store('kv');
CREATE TABLE no_key (id int UNIQUE);
CREATE TEMP TABLE temporary (id int PRIMARY KEY);
CREATE MATERIALIZED VIEW mat AS SELECT 1 AS id;
CREATE SEQUENCE seq;
\set VERBOSITY sqlstate
SELECT eventstore.capture('t');
SELECT eventstore.capture('no_key');
SELECT eventstore.capture('temporary');
SELECT eventstore.capture('view_of_t');
SELECT eventstore.capture('mat');
SELECT eventstore.capture('seq');
SELECT eventstore.capture('t_pkey');
SELECT eventstore.capture('t_changelog');
SELECT eventstore.capture('journal');
SELECT eventstore.capture(inhrelid) FROM pg_inherits WHERE inhparent = 'journal'::regclass LIMIT 1;
SELECT eventstore.capture(heads) FROM eventstore.collection_catalog WHERE collection = 'journal'::regclass;
SELECT eventstore.capture('kv');
SELECT eventstore.capture('pg_class');
SELECT eventstore.capture('information_schema.sql_features');
SELECT eventstore.capture('eventstore.store_catalog');
SELECT eventstore.capture('0');
SELECT eventstore.capture(NULL);
SELECT eventstore.capture('first', 'kv_changelog');
SELECT eventstore.capture('first', 'second');
SELECT eventstore.capture('first', '0');
CREATE TABLE first_changelog (x int);
SELECT eventstore.capture('first');
SELECT eventstore.release('first');
SELECT eventstore.release('0');
SELECT eventstore.release(NULL);
INSERT INTO t_changelog (type, stream) VALUES ('insert', 'forged');
COPY t_changelog (type) FROM stdin;
insert
\.
SELECT eventstore.append('t_changelog', 'insert', '1', stream => 'forged');
DELETE FROM t_changelog;
DROP TABLE t_changelog;
SELECT eventstore.drop_collection('t_changelog');
CREATE TRIGGER own AFTER INSERT ON first FOR EACH ROW EXECUTE FUNCTION eventstore.capture_record();
INSERT INTO first VALUES (2);
DROP TRIGGER own ON first;
CREATE TRIGGER own BEFORE INSERT ON first FOR EACH ROW EXECUTE FUNCTION eventstore.capture_record();
INSERT INTO first VALUES (2);
DROP TRIGGER own ON first;
CREATE CONSTRAINT TRIGGER own AFTER UPDATE ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION eventstore.capture_record();
UPDATE t SET v = 'deferred' WHERE id = 1;
DROP TRIGGER own ON t;
BEGIN;
UPDATE t SET v = 'prepared' WHERE id = 1;
PREPARE TRANSACTION 'cap';
BEGIN READ ONLY;
SELECT eventstore.capture('first', 'journal');
ROLLBACK;
\set VERBOSITY default
SELECT eventstore.capture('no_key');
SELECT eventstore.capture('pg_class');
SELECT eventstore.release('first');
INSERT INTO t_changelog (type) VALUES ('insert');
DROP TABLE t_changelog;

-- ---- rights ----
CREATE ROLE cap_owner;
CREATE ROLE cap_writer;
CREATE SCHEMA owned;
GRANT USAGE ON SCHEMA cap, owned TO cap_owner, cap_writer;
CREATE TABLE owned.r (id int PRIMARY KEY, v text);
ALTER TABLE owned.r OWNER TO cap_owner;
GRANT INSERT, UPDATE, DELETE, TRUNCATE, SELECT ON owned.r TO cap_writer;
SET ROLE cap_writer;
SELECT eventstore.capture('owned.r');
SET ROLE cap_owner;
SELECT eventstore.capture('owned.r');
SELECT eventstore.capture('owned.r', 'journal');
RESET ROLE;
GRANT CREATE ON SCHEMA owned TO cap_owner;
SET ROLE cap_owner;
SELECT eventstore.capture('owned.r');
-- with row-level security, which hides nothing from the changelog
ALTER TABLE owned.r ENABLE ROW LEVEL SECURITY;
CREATE POLICY mine ON owned.r TO cap_writer USING (v = 'mine') WITH CHECK (true);
SET ROLE cap_writer;
INSERT INTO owned.r VALUES (1, 'mine'), (2, 'hidden');
UPDATE owned.r SET v = 'mine' WHERE id IN (1, 2);
DELETE FROM owned.r;
TRUNCATE owned.r;
SELECT count(*) FROM owned.r_changelog;
INSERT INTO owned.r_changelog (type) VALUES ('forged');
SELECT eventstore.append('owned.r_changelog', 'forged');
SELECT eventstore.release('owned.r');
RESET ROLE;
SELECT * FROM events('owned.r_changelog');
INSERT INTO owned.r_changelog (type) VALUES ('forged');
-- with a trigger of its owner's on the changelog
CREATE FUNCTION stamps() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.metadata := to_jsonb(current_user::text); RETURN NEW; END $$;
CREATE TRIGGER stamps BEFORE INSERT ON owned.r_changelog FOR EACH ROW EXECUTE FUNCTION stamps();
SET ROLE cap_writer;
INSERT INTO owned.r VALUES (3, 'mine');
RESET ROLE;
SELECT stream, version, metadata FROM eventstore.peek('owned.r_changelog');
-- by a superuser: it is the owner's all the same
SELECT eventstore.release('owned.r');
SELECT eventstore.drop_collection('owned.r_changelog');
SELECT eventstore.capture('owned.r');
SELECT DISTINCT relowner::regrole FROM pg_class WHERE relname LIKE 'r\_changelog%' AND relnamespace = 'owned'::regnamespace;
SET ROLE cap_writer;
INSERT INTO owned.r VALUES (4, 'mine');
RESET ROLE;

-- ---- rename, schema, owner, drop, release ----
ALTER TABLE owned.r RENAME TO renamed;
ALTER TABLE owned.renamed OWNER TO cap_writer;
ALTER TABLE owned.renamed SET SCHEMA "Sch e.ma";
ALTER SCHEMA "Sch e.ma" RENAME TO elsewhere;
SELECT c.oid::regclass, c.relowner::regrole FROM pg_class c WHERE relname IN ('renamed', 'r_changelog');
UPDATE elsewhere.renamed SET v = 'x' WHERE id = 4;
ALTER TABLE elsewhere.r_changelog RENAME TO log;
ALTER TABLE elsewhere.log SET SCHEMA owned;
UPDATE elsewhere.renamed SET v = 'y' WHERE id = 4;
SELECT stream, version, type FROM owned.log WHERE stream = '4' ORDER BY position;
DROP TABLE elsewhere.renamed;
SELECT count(*) FROM eventstore.capture_catalog WHERE changelog = 'owned.log'::regclass;
SELECT version FROM eventstore.append('owned.log', 'by hand', stream => '4');
DROP SCHEMA elsewhere CASCADE;
SELECT eventstore.release('t');
\d t
UPDATE t SET v = 'unseen';
SELECT count(*) FROM t_changelog WHERE data->'new'->>'v' = 'unseen';
SELECT version FROM eventstore.append('t_changelog', 'by hand', stream => '1');
-- once more, into the same
SELECT eventstore.capture('t', 't_changelog');
UPDATE t SET v = 'seen' WHERE id = 1;
SELECT stream, version, type, tags FROM eventstore.peek('t_changelog');
-- triggers off
SET session_replication_role = replica;
UPDATE t SET v = 'replica' WHERE id = 1;
RESET session_replication_role;
ALTER TABLE t DISABLE TRIGGER eventstore_capture;
UPDATE t SET v = 'disabled' WHERE id = 1;
ALTER TABLE t ENABLE ALWAYS TRIGGER eventstore_capture;
UPDATE t SET v = 'enabled' WHERE id = 1;
SELECT old->'v' AS old, new->'v' AS new FROM events('t_changelog') OFFSET (SELECT count(*) - 1 FROM t_changelog);
DROP TRIGGER eventstore_capture ON t;
ALTER TRIGGER eventstore_capture_truncate ON t RENAME TO "Renamed";
SELECT eventstore.release('t');
TRUNCATE t;
SELECT eventstore.capture('t', 't_changelog');

SET client_min_messages = warning;
DROP OWNED BY cap_owner, cap_writer;
DROP ROLE cap_owner, cap_writer;
DROP SCHEMA cap, owned, hers CASCADE;
SELECT count(*) FROM eventstore.capture_catalog;
