-- Bad values for each argument of each function, in each state of a transaction:
-- an error of a defined kind, or an answer, and never a crash.
\set SHOW_CONTEXT never
SET client_min_messages = error;
CREATE SCHEMA bad;
SET search_path = bad, public;
SELECT eventstore.create_collection('bad.c', segment_size => 1000);
SELECT eventstore.create_store('kv'), eventstore.create_store('texts', 'text'), eventstore.create_store('blobs', 'bytes', 'bytes');
SELECT eventstore.put('kv', 'k', '1'), eventstore.put_text('texts', 'k', '1'), eventstore.put_bytes('blobs', '\x6b', '\x31');
SELECT count(*) FROM eventstore.append_batch('c', '[{"type": "a", "stream": "s", "tags": ["t"]}, {"type": "b", "stream": "s"}, {"type": "c"}]');

-- what is no collection, in many ways
CREATE TABLE plain (position bigint PRIMARY KEY, stream text);
CREATE TABLE parted (position bigint) PARTITION BY RANGE (position);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (10);
CREATE TEMP TABLE temporary (LIKE c INCLUDING ALL);
CREATE VIEW looker AS SELECT * FROM c;
CREATE MATERIALIZED VIEW stored AS SELECT * FROM c;
CREATE SEQUENCE counted;
CREATE TYPE composed AS (position bigint);
CREATE TABLE unshaped (LIKE c INCLUDING ALL) PARTITION BY RANGE (position);
CREATE TABLE gone (i int);
SELECT 'gone'::regclass::oid AS gone \gset
DROP TABLE gone;

CREATE TABLE bad_values (type regtype, label text, value text);
INSERT INTO bad_values VALUES
	('regclass', 'null', 'NULL'), ('regclass', 'zero', '0'), ('regclass', 'no such', '4294967295'), ('regclass', 'dropped', :gone),
	('regclass', 'catalog', '''pg_class'''), ('regclass', 'shared', '''pg_database'''), ('regclass', 'table', '''plain'''),
	('regclass', 'partitioned', '''parted'''), ('regclass', 'partition', '''parted_1'''), ('regclass', 'temporary', '''temporary'''),
	('regclass', 'view', '''looker'''), ('regclass', 'stored', '''stored'''), ('regclass', 'sequence', '''counted'''), ('regclass', 'type', '''composed'''),
	('regclass', 'index', '''c_pkey'''), ('regclass', 'segment', '''c_1'''), ('regclass', 'heads', '''c_heads'''), ('regclass', 'unshaped', '''unshaped'''),
	('regclass', 'store', '''kv'''), ('regclass', 'changelog', '''kv_changelog'''), ('regclass', 'own table', '''eventstore.collection_catalog'''), ('regclass', 'own view', '''eventstore.collections'''),
	('text', 'null', 'NULL'), ('text', 'empty', ''''''), ('text', 'blank', ''' '''), ('text', 'long', 'repeat(''x'', 300000)'),
	('text', 'control', 'E''\x01\n'''), ('text', 'number', '''NaN'''), ('text', 'dots', '''a.b.c.d'''), ('text', 'quote', '''"a'''), ('text', 'unicode', 'U&''\+01F600'''),
	('bigint', 'null', 'NULL'), ('bigint', 'negative', '''-1'''), ('bigint', 'zero', '0'), ('bigint', 'lowest', '''-9223372036854775808'''), ('bigint', 'highest', '9223372036854775807'),
	('integer', 'null', 'NULL'), ('integer', 'negative', '''-1'''), ('integer', 'zero', '0'), ('integer', 'highest', '2147483647'),
	('interval', 'null', 'NULL'), ('interval', 'negative', '''-1 day'''), ('interval', 'zero', '''0'''), ('interval', 'ages', '''178000000 years'''), ('interval', 'mixed', '''1 month -30 days'''),
	('timestamptz', 'null', 'NULL'), ('timestamptz', 'infinite', '''infinity'''), ('timestamptz', 'minus infinite', '''-infinity'''), ('timestamptz', 'first', '''4714-11-25 BC UTC'''), ('timestamptz', 'last', '''294276-12-31 UTC'''),
	('uuid', 'null', 'NULL'), ('uuid', 'zeros', '''00000000-0000-0000-0000-000000000000'''),
	('bytea', 'null', 'NULL'), ('bytea', 'empty', ''''''), ('bytea', 'megabytes', 'decode(repeat(''00'', 3000000), ''hex'')'),
	('text[]', 'null', 'NULL'), ('text[]', 'empty', '''{}'''), ('text[]', 'of null', '''{null}'''), ('text[]', 'of empty', '''{""}'''), ('text[]', 'matrix', '''{{a,b},{c,d}}'''),
	('text[]', 'from 5', '''[5:6]={a,b}'''), ('text[]', 'many', 'array(SELECT ''t'' || i FROM generate_series(1, 5000) i)'), ('text[]', 'same', 'array_fill(''t''::text, ARRAY[5000])'), ('text[]', 'long', 'ARRAY[repeat(''x'', 300000)]'),
	('regclass[]', 'null', 'NULL'), ('regclass[]', 'empty', '''{}'''), ('regclass[]', 'of null', '''{null}'''), ('regclass[]', 'matrix', '''{{c,c},{c,c}}'''), ('regclass[]', 'twice', '''{c,c}'''), ('regclass[]', 'zero', '''{0}'''), ('regclass[]', 'catalog', '''{c,pg_class}'''),
	('jsonb', 'null', 'NULL'), ('jsonb', 'JSON null', '''null'''), ('jsonb', 'object', '''{}'''), ('jsonb', 'array', '''[]'''), ('jsonb', 'number', '''1e400'''), ('jsonb', 'string', '''"x"'''), ('jsonb', 'of null', '''[null]'''),
	('jsonb', 'of arrays', '''[[]]'''), ('jsonb', 'of objects', '''[{}]'''), ('jsonb', 'unknown key', '''[{"x": 1}]'''), ('jsonb', 'wrong types', '''[{"types": 5, "tags": {}}]'''), ('jsonb', 'nested null', '''[{"types": [null]}]'''),
	('jsonb', 'deep', '(repeat(''['', 1000) || repeat('']'', 1000))::jsonb'), ('jsonb', 'many', '(SELECT jsonb_agg(jsonb_build_object(''types'', jsonb_build_array(''t'' || i))) FROM generate_series(1, 3000) i)'),
	('jsonb', 'cursor', '''{"bad.c": 9223372036854775807}'''), ('jsonb', 'wrong cursor', '''{"bad.c": "x"}'''), ('jsonb', 'cursor of another', '''{"nowhere.c": 1}'''),
	('jsonb', 'event', '''[{"type": "x"}]'''), ('jsonb', 'no type', '''[{"type": null}]'''), ('jsonb', 'number as type', '''[{"type": 1}]'''), ('jsonb', 'great version', '''[{"type": "x", "stream": "s", "expected_version": 1e400}]'''),
	('jsonb', 'bad version', '''[{"type": "x", "stream": "s", "expected_version": -1}]'''), ('jsonb', 'bad id', '''[{"type": "x", "id": "x"}]'''), ('jsonb', 'bad time', '''[{"type": "x", "created_at": "never"}]'''),
	('jsonb', 'bad body', '''[{"type": "x", "body": "?"}]'''), ('jsonb', 'both', '''[{"type": "x", "body": "", "data": 1}]'''), ('jsonb', 'bad tags', '''[{"type": "x", "tags": [[]]}]'''), ('jsonb', 'own position', '''[{"type": "x", "position": 1}]'''),
	('eventstore.new_event[]', 'null', 'NULL'), ('eventstore.new_event[]', 'empty', '''{}'''), ('eventstore.new_event[]', 'of null', '''{null}'''), ('eventstore.new_event[]', 'of nulls', '''{"(,,,,,,,,)"}'''),
	('eventstore.new_event[]', 'bad version', '''{"(x,,,s,,,,,-1)"}'''), ('eventstore.new_event[]', 'no stream', '''{"(x,,,,,,,,1)"}'''), ('eventstore.new_event[]', 'matrix', '''{{"(x,,,,,,,,)"},{"(y,,,,,,,,)"}}'''),
	('eventstore.new_event[]', 'both', '''{"(x,{},,,,\\\\x00,,,)"}'''), ('eventstore.new_event[]', 'many', 'array_fill(''(x,,,,,,,,)''::eventstore.new_event, ARRAY[5000])');

-- what the other arguments are meanwhile, where they have no default
CREATE TABLE good_values (argument text, value text);
INSERT INTO good_values VALUES
	('collection', '''c'''), ('collections', '''{c}'''), ('name', '''made'''), ('type', '''x'''), ('stream', '''s'''), ('events', '''[{"type": "x"}]'''),
	('store', '''kv'''), ('source_table', '''plain'''), ('key', '''k'''), ('keys', '''{k,j}'''), ('prefix', '''k'''), ('at', '''infinity'''),
	('option', '''notify'''), ('value', '''head'''), ('before', '2'), ('first', '1'), ('end', '3'),
	('after', '0'), ('up_to', '1'), ('member', '''m'''), ('holder', '''h'''), ('ttl', '''1 hour'''), ('catalog', '''pg_foreign_server''::regclass'),
	('server', '''k'''), ('topic', '''t'''), ('target', '''kv''');
CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '127.0.0.1:1');
-- a member that has events to give back
SELECT eventstore.subscribe('made', 'c');
SELECT position FROM eventstore.poll('made', 2, member => 'm', lease => '1 day');
CREATE FUNCTION good(argument text, type regtype) RETURNS text LANGUAGE sql AS $$
	SELECT CASE WHEN good.type = 'eventstore.new_event[]'::regtype THEN '''{"(x,,,,,,,,)"}'''
		WHEN good.argument = 'value' AND good.type = 'jsonb'::regtype THEN '''1'''
		ELSE (SELECT value FROM good_values g WHERE g.argument = good.argument) END
$$;

CREATE VIEW arguments AS
SELECT p.oid, a.n, a.name, a.type::regtype, a.n <= p.pronargs - p.pronargdefaults AS required
FROM pg_proc p, unnest(p.proargtypes::oid[], p.proargnames[1:p.pronargs]) WITH ORDINALITY a (type, name, n)
WHERE p.pronamespace = 'eventstore'::regnamespace
	AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
	AND NOT p.proargtypes::oid[] && ARRAY['internal'::regtype::oid];

-- Each function that SQL can call, each argument, each bad value.
CREATE VIEW calls AS
SELECT p.proname::text AS function, a.name AS argument, v.label,
	format('eventstore.%I(%s)', p.proname, (
		SELECT string_agg(format('%I => %s::%s', b.name, CASE WHEN b.n = a.n THEN v.value
			WHEN b.name = 'store' AND p.proname LIKE '%\_text' THEN '''texts''' WHEN b.name = 'store' AND p.proname LIKE '%\_bytes' THEN '''blobs'''
			ELSE good(b.name, b.type) END, b.type), ', ')
		FROM arguments b WHERE b.oid = p.oid AND (b.n = a.n OR b.required))) AS call
FROM pg_proc p JOIN arguments a USING (oid) JOIN bad_values v USING (type);

-- The outcome of a call; whatever it did is undone.
CREATE FUNCTION outcome(call text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE CASE WHEN call LIKE 'eventstore.await(%' THEN 'CALL ' ELSE 'SELECT count(*) FROM ' END || call;
	RAISE EXCEPTION USING errcode = 'PP000';
EXCEPTION
	WHEN SQLSTATE 'PP000' THEN RETURN 'ok';
	WHEN OTHERS THEN RETURN SQLSTATE;
END $$;
-- The same where the function is no scan.
CREATE FUNCTION outcome_elsewhere(call text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE CASE WHEN call LIKE 'eventstore.await(%' THEN 'CALL ' || call ELSE 'SELECT count(*) FROM (SELECT ' || call || ' OFFSET 0) s' END;
	RAISE EXCEPTION USING errcode = 'PP000';
EXCEPTION
	WHEN SQLSTATE 'PP000' THEN RETURN 'ok';
	WHEN OTHERS THEN RETURN SQLSTATE;
END $$;
-- What depends on the state of the transaction at all, and does not take long.
CREATE VIEW quick_calls AS
SELECT * FROM calls WHERE label NOT IN ('many', 'long', 'megabytes', 'same') AND (function <> 'create_collection' OR argument = 'name')
-- those that wait or repair come first: later the transaction has appended
ORDER BY function NOT IN ('wait_for', 'await'), function <> 'repair_collection', function COLLATE "C", argument COLLATE "C", label COLLATE "C";
CREATE TABLE outcomes (function text, argument text, label text, call text, how text, state text);

-- ---- every value for itself ----
-- (in the order of quick_calls)
INSERT INTO outcomes SELECT *, 'from', outcome(call) FROM (
	SELECT * FROM calls ORDER BY function NOT IN ('wait_for', 'await'), function <> 'repair_collection', function COLLATE "C", argument COLLATE "C", label COLLATE "C") c;
SELECT function, argument, string_agg(label || ' ' || state, ', ' ORDER BY label COLLATE "C") AS outcomes
FROM outcomes WHERE function NOT LIKE 'collection\_%' GROUP BY 1, 2 ORDER BY function COLLATE "C", argument COLLATE "C";

-- ---- internal errors are bugs, whatever was asked ----
SELECT function, argument, label, state FROM outcomes WHERE state LIKE 'XX%' OR state IN ('53200', '54000') ORDER BY function COLLATE "C", argument COLLATE "C", label COLLATE "C";

-- ---- all arguments null ----
SELECT p.proname AS function, outcome(format('eventstore.%I(%s)', p.proname, string_agg(format('%I => NULL::%s', a.name, a.type), ', ')))
FROM pg_proc p JOIN arguments a USING (oid) WHERE p.proname NOT LIKE 'collection\_%' GROUP BY p.oid, p.proname ORDER BY p.proname;

-- ---- in other places, and in other states of the transaction: what differs ----
-- (40001 aside: from REPEATABLE READ on, what a worker writes meanwhile may bring it)
CREATE FUNCTION differences(in_how text) RETURNS TABLE (function text, state text, before text) LANGUAGE sql AS $$
	SELECT a.function, b.state, string_agg(DISTINCT a.state, ', ' ORDER BY a.state)
	FROM outcomes a JOIN outcomes b USING (function, argument, label)
	WHERE a.how = 'from' AND b.how = in_how AND a.state <> b.state AND b.state <> '40001' AND a.function NOT LIKE 'collection\_%'
	GROUP BY 1, 2 ORDER BY a.function COLLATE "C", b.state
$$;
INSERT INTO outcomes SELECT *, 'select list', outcome_elsewhere(call) FROM quick_calls;
SELECT * FROM differences('select list');
BEGIN ISOLATION LEVEL REPEATABLE READ;
INSERT INTO outcomes SELECT *, 'repeatable read', outcome(call) FROM quick_calls;
COMMIT;
SELECT * FROM differences('repeatable read');
BEGIN ISOLATION LEVEL SERIALIZABLE;
INSERT INTO outcomes SELECT *, 'serializable', outcome(call) FROM quick_calls;
COMMIT;
SELECT * FROM differences('serializable');
BEGIN;
SELECT position > 0 AS appended FROM eventstore.append('c', 'open', stream => 'open');
SAVEPOINT a;
SELECT position > 0 AS appended FROM eventstore.append('c', 'undone', stream => 'open', fail_if => '[{"types": ["none"]}]');
ROLLBACK TO a;
INSERT INTO outcomes SELECT *, 'open append', outcome(call) FROM quick_calls;
COMMIT;
SELECT * FROM differences('open append');
CREATE TEMP TABLE read_only_outcomes (LIKE outcomes);
BEGIN READ ONLY;
INSERT INTO read_only_outcomes SELECT *, 'read only', outcome(call) FROM quick_calls;
COMMIT;
INSERT INTO outcomes SELECT * FROM read_only_outcomes;
SELECT * FROM differences('read only');
SELECT function, state, count(*) FROM outcomes WHERE state LIKE 'XX%' GROUP BY 1, 2;

-- ---- rows that INSERT is given ----
CREATE FUNCTION insert_outcome(columns text, row_values text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('INSERT INTO c (%s) VALUES (%s)', columns, row_values);
	RAISE EXCEPTION USING errcode = 'PP000';
EXCEPTION
	WHEN SQLSTATE 'PP000' THEN RETURN 'ok';
	WHEN OTHERS THEN RETURN SQLSTATE;
END $$;
SELECT a.attname AS "column", string_agg(v.label || ' ' || insert_outcome(
	CASE WHEN attname = 'type' THEN 'type' ELSE 'type, ' || attname END,
	CASE WHEN attname = 'type' THEN v.value ELSE '''x'', ' || v.value || '::' || v.type END), ', ' ORDER BY v.label COLLATE "C") AS outcomes
FROM pg_attribute a JOIN bad_values v ON v.type = a.atttypid
WHERE a.attrelid = 'c'::regclass AND a.attnum > 0
GROUP BY a.attnum, a.attname ORDER BY a.attnum;

-- ---- and it is as sound as before ----
SELECT * FROM eventstore.verify('c');
SELECT position, type, stream, version FROM eventstore.read('c', max_count => 3);
SELECT version FROM eventstore.append('c', 'x', stream => 's', expected_version => 2);
SELECT count(*) FROM eventstore.holders;
SET client_min_messages = warning;
DROP SCHEMA bad CASCADE;
