-- read_merged: several collections by time, resumed anywhere
\set ON_ERROR_STOP 0
\set VERBOSITY terse
SET timezone = 'UTC';
CREATE FUNCTION refusal(query text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	message text; detail text;
BEGIN
	EXECUTE query;
	RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL;
	RETURN concat_ws(' | ', sqlstate, message, nullif(detail, ''));
END $$;
CREATE SCHEMA hr;
SELECT eventstore.create_collection('hr.people', segment_size => 4096);
SELECT eventstore.create_collection('orders', segment_size => 4096);
SELECT eventstore.create_collection('"Odd Name"');

-- times do not follow positions, and some are equal
SELECT count(*) FROM eventstore.append_batch('orders', '[
	{"type": "o1", "tags": ["k:1"], "created_at": "2026-01-05T00:00:00Z"}, {"type": "o2", "created_at": "2026-01-01T00:00:00Z"},
	{"type": "o3", "tags": ["k:1"], "created_at": "2026-01-03T00:00:00Z"}, {"type": "o4", "created_at": "2026-01-03T00:00:00Z"}]');
SELECT count(*) FROM eventstore.append_batch('hr.people', '[
	{"type": "p1", "tags": ["k:1"], "created_at": "2026-01-03T00:00:00Z"}, {"type": "p2", "created_at": "2026-01-02T00:00:00Z"},
	{"type": "p3", "created_at": "2026-01-06T00:00:00Z"}]');

SELECT collection, (event).position, (event).type, (event).created_at FROM eventstore.read_merged('{orders,hr.people}');
-- the order of the argument does not matter
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{hr.people,orders}');
SELECT cursor FROM eventstore.read_merged('{orders,hr.people,"\"Odd Name\""}', max_count => 1);
SELECT pg_typeof(collection), pg_typeof(event) FROM eventstore.read_merged('{orders}', max_count => 1);

-- filters, and max_count of what is left
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}', types => '{o1,p1,p3}');
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}', tags => '{k:1}');
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}', query => '[{"types": ["o2"]}, {"tags": ["k:1"]}]', max_count => 2);
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}', since => '2026-01-02', until => '2026-01-05');
SELECT count(*) FROM eventstore.read_merged('{orders,hr.people}', max_count => 0);
SELECT count(*) FROM eventstore.read_merged('{}');
SELECT count(*) FROM eventstore.read_merged('{"\"Odd Name\""}');

-- resumed after each row, everything comes once and in the same order
CREATE FUNCTION pages(collections regclass[], page bigint, types text[] = NULL) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	at jsonb; found text[] := '{}'; r record; n int;
BEGIN
	LOOP
		n := 0;
		FOR r IN SELECT * FROM eventstore.read_merged(collections, at, page, types) LOOP
			found := found || (r.event).type;
			at := r.cursor;
			n := n + 1;
		END LOOP;
		EXIT WHEN n = 0;
	END LOOP;
	RETURN array_to_string(found, ' ');
END $$;
SELECT n, pages('{orders,hr.people}', n) FROM generate_series(1, 8) n;
SELECT pages('{orders,hr.people}', 1, '{o1,p1,p3}');
SELECT pages('{orders}', 1);

-- what comes later comes after, however old it says it is
CREATE TABLE kept AS SELECT cursor FROM eventstore.read_merged('{orders,hr.people}', max_count => 3) OFFSET 2;
SELECT count(*) FROM eventstore.append('orders', 'o5', created_at => '2020-01-01 00:00+00');
SELECT count(*) FROM eventstore.append('hr.people', 'p4', created_at => '2019-01-01 00:00+00');
SELECT string_agg((event).type, ' ') FROM kept, LATERAL eventstore.read_merged('{orders,hr.people}', cursor);
SELECT string_agg((event).type, ' ') FROM kept, LATERAL eventstore.read_merged('{orders,hr.people}', cursor, max_count => 5);
SELECT (event).type, r.cursor FROM kept k, LATERAL eventstore.read_merged('{orders,hr.people}', k.cursor, max_count => 5) r;
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}');
-- a collection that is new to the cursor begins where the next window does
SELECT count(*) FROM eventstore.append('"Odd Name"', 'x1', created_at => '2018-01-01 00:00+00');
SELECT string_agg((event).type, ' ') FROM kept, LATERAL eventstore.read_merged('{orders,hr.people,"\"Odd Name\""}', cursor);
-- at the end there is nothing, until there is
DELETE FROM kept;
INSERT INTO kept SELECT cursor FROM eventstore.read_merged('{orders,hr.people}') OFFSET 8;
SELECT count(*) FROM kept, LATERAL eventstore.read_merged('{orders,hr.people}', cursor);
SELECT count(*) FROM eventstore.append('orders', 'o6');
SELECT string_agg((event).type, ' ') FROM kept, LATERAL eventstore.read_merged('{orders,hr.people}', cursor);

-- positions by hand
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}', '{"public.orders": 4, "hr.people": 2}');
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}', '{"orders": 4, "hr.people": null}');
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}', '{"orders": 4}');
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}', '{}');
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,"\"Odd Name\""}', '{"\"Odd Name\"": 1, "orders": 5}');
SELECT refusal($$SELECT * FROM eventstore.read_merged('{orders}', '{"orders": 900}')$$);
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}', '{"orders": 6, "hr.people": 2}');

-- bad arguments
SELECT refusal($$SELECT * FROM eventstore.read_merged(NULL)$$);
SELECT refusal($$SELECT * FROM eventstore.read_merged('{orders,NULL}')$$);
SELECT refusal($$SELECT * FROM eventstore.read_merged('{orders,hr.people,orders}')$$);
SELECT refusal($$SELECT * FROM eventstore.read_merged('{pg_class}')$$);
SELECT refusal($$SELECT * FROM eventstore.read_merged('{orders}', max_count => -1)$$);
SELECT refusal($$SELECT * FROM eventstore.read_merged('{orders}', types => '{a}', query => '[{}]')$$);
SELECT refusal(format('SELECT * FROM eventstore.read_merged(''{orders}'', %L)', bad)) FROM unnest(ARRAY[
	'[]', '5', 'null', '{"hr.people": 1}', '{"orders": -1}', '{"orders": 1.5}', '{"orders": "1"}', '{"orders": [1, 2]}',
	'{"orders": 1e30}', '{"orders": 1, "public.orders": 1}', '{"windows": {}}', '{"windows": {"hr.people": [0, 1]}, "after": [0, "hr.people", 1]}',
	'{"windows": {"orders": [0, 1]}, "after": []}', '{"windows": {"orders": [0, 1]}, "after": [0, "orders"]}',
	'{"windows": {"orders": [0, 1]}, "after": ["x", "orders", 1]}', '{"windows": {"orders": [0, 1]}, "after": [0, 5, 1]}',
	'{"windows": {"orders": [0, 1]}, "after": [0, "orders", -1]}', '{"windows": {"orders": [2, 1]}, "after": [0, "orders", 1]}',
	'{"windows": {"orders": 1}, "after": [0, "orders", 1]}', '{"windows": {"orders": [0]}, "after": [0, "orders", 1]}',
	'{"windows": {"orders": [0, 900]}, "after": [0, "orders", 1]}', '{"windows": {"orders": [0, 1]}, "after": [0, "orders", 1], "more": 1}',
	'{"windows": {"orders": [0, 1]}, "after": [9223372036854775808, "orders", 1]}',
	'{"windows": {"orders": [0, 1]}, "after": [-9223372036854775807, "orders", 1]}']) bad;

-- more than work_mem, in pages of an odd size
SET work_mem = '64kB';
SELECT count(*) FROM eventstore.append_batch('orders',
	(SELECT jsonb_agg(jsonb_build_object('type', 'b' || n, 'created_at', timestamptz '2026-02-01 00:00+00' + n * 7919 % 5000 * interval '1 s')) FROM generate_series(1, 6000) n));
SELECT count(*), count(DISTINCT (event).type) FROM eventstore.read_merged('{orders,hr.people}', types => NULL);
SELECT count(*) FROM (SELECT (event).created_at AS t, lag((event).created_at) OVER () AS previous FROM eventstore.read_merged('{orders,hr.people}')) s WHERE t < previous;
SELECT md5(pages('{orders,hr.people}', 1237)) = md5((SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{orders,hr.people}'))) AS same;
RESET work_mem;

-- truncation: what was passed may go, what was not is an error
DELETE FROM kept;
INSERT INTO kept SELECT cursor FROM eventstore.read_merged('{orders}', max_count => 3) OFFSET 2;
SELECT eventstore.truncate_before('orders', 5000);
SELECT refusal(format('SELECT * FROM eventstore.read_merged(''{orders}'', %L)', cursor)) FROM kept;
SELECT refusal($$SELECT * FROM eventstore.read_merged('{orders}', '{"orders": 3}')$$);
SELECT min((event).position) FROM eventstore.read_merged('{orders}');

-- rights and row-level security of each collection
CREATE ROLE regress_reader;
GRANT USAGE ON SCHEMA hr TO regress_reader;
GRANT SELECT ON orders TO regress_reader;
SET ROLE regress_reader;
SELECT refusal($$SELECT * FROM eventstore.read_merged('{orders,hr.people}')$$);
RESET ROLE;
GRANT SELECT ON hr.people TO regress_reader;
ALTER TABLE hr.people ENABLE ROW LEVEL SECURITY;
CREATE POLICY seen ON hr.people FOR SELECT TO regress_reader USING (type IN ('p2', 'p4'));
SET ROLE regress_reader;
SELECT string_agg((event).type, ' ') FROM eventstore.read_merged('{hr.people}');
SELECT collection, (event).type FROM eventstore.read_merged('{hr.people,orders}', max_count => 3);
RESET ROLE;

DROP TABLE kept;
DROP FUNCTION pages, refusal;
SELECT eventstore.drop_collection('orders');
SELECT eventstore.drop_collection('hr.people');
SELECT eventstore.drop_collection('"Odd Name"');
DROP SCHEMA hr;
DROP ROLE regress_reader;
