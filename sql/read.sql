-- read, peek, head: what comes, in which order, and what is refused
\set ON_ERROR_STOP 0
\set VERBOSITY terse
SET timezone = 'UTC';
CREATE FUNCTION refusal(query text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	message text; detail text; hint text;
BEGIN
	EXECUTE query;
	RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL;
	RETURN concat_ws(' | ', sqlstate, message, nullif(detail, ''));
END $$;

SELECT eventstore.create_collection('orders', segment_size => 4096);

-- nothing there yet
SELECT eventstore.head('orders');
SELECT count(*) FROM eventstore.read('orders');
SELECT count(*) FROM eventstore.read('orders', 0);
SELECT eventstore.peek('orders');
SELECT eventstore.peek('orders', 'o-1');

SELECT count(*) FROM eventstore.append_batch('orders', '[
	{"type": "placed",  "stream": "o-1", "tags": ["user:1", "shop:a"], "data": {"n": 1}, "created_at": "2026-01-01T10:00:00Z", "id": "00000000-0000-7000-8000-000000000001"},
	{"type": "placed",  "stream": "o-2", "tags": ["user:2", "shop:a"], "data": {"n": 2}, "created_at": "2026-01-01T11:00:00Z", "id": "00000000-0000-7000-8000-000000000002"},
	{"type": "paid",    "stream": "o-1", "tags": ["user:1"], "metadata": {"by": "card"}, "created_at": "2026-01-02T10:00:00Z", "id": "00000000-0000-7000-8000-000000000003"},
	{"type": "noted",   "body": "AP8=", "created_at": "2025-12-31T00:00:00Z", "id": "00000000-0000-7000-8000-000000000004"},
	{"type": "placed",  "stream": "o-3", "tags": ["user:1", "shop:b"], "created_at": "2026-01-03T10:00:00Z", "id": "00000000-0000-7000-8000-000000000005"},
	{"type": "shipped", "stream": "o-1", "tags": ["user:1"], "created_at": "2026-01-04T10:00:00Z", "id": "00000000-0000-7000-8000-000000000006"}]');

-- all ten columns, in the function's own right and as a table
SELECT * FROM eventstore.read('orders');
SELECT eventstore.head('orders');
SELECT count(*) FROM (SELECT * FROM eventstore.read('orders') EXCEPT ALL
	SELECT position, stream, version, id, type, tags, data, body, metadata, created_at FROM orders) d;

-- bounds are exclusive, max_count counts what matches
SELECT position FROM eventstore.read('orders', after => 2);
SELECT position FROM eventstore.read('orders', 2, 2);
SELECT position FROM eventstore.read('orders', before => 3);
SELECT position FROM eventstore.read('orders', after => 2, before => 5);
SELECT position FROM eventstore.read('orders', before => 0);
SELECT position FROM eventstore.read('orders', after => 6);
SELECT position FROM eventstore.read('orders', after => 3, before => 2);
SELECT position FROM eventstore.read('orders', before => 9223372036854775807, max_count => 9223372036854775807);
SELECT position FROM eventstore.read('orders', max_count => 0);
SELECT position FROM eventstore.read('orders', direction => 'backward');
SELECT position FROM eventstore.read('orders', direction => 'backward', max_count => 2, before => 6);
SELECT position FROM eventstore.read('orders', direction => 'backward', after => 4);

-- types, tags, queries
SELECT position, type FROM eventstore.read('orders', types => '{placed,paid}');
SELECT position, tags FROM eventstore.read('orders', tags => '{user:1,shop:a}');
SELECT position, type FROM eventstore.read('orders', types => '{placed}', tags => '{user:1}');
SELECT position, type FROM eventstore.read('orders', query => '[{"types": ["noted"]}, {"types": ["placed"], "tags": ["shop:b"]}]');
SELECT position FROM eventstore.read('orders', query => '[{}]', max_count => 2);
SELECT position FROM eventstore.read('orders', types => '{placed}', max_count => 2);
SELECT position FROM eventstore.read('orders', types => '{placed}', max_count => 2, direction => 'backward');
SELECT position FROM eventstore.read('orders', types => '{}', tags => '{}', max_count => 1);
SELECT position FROM eventstore.read('orders', types => '{none}');

-- times filter and do not stop
SELECT position, created_at FROM eventstore.read('orders', since => '2026-01-01 11:00+00', until => '2026-01-03 10:00+00');
SELECT position FROM eventstore.read('orders', until => '2026-01-01 11:00+00');
SELECT position FROM eventstore.read('orders', since => '2026-01-02', max_count => 2);
SELECT position FROM eventstore.read('orders', since => '-infinity', until => 'infinity', direction => 'backward', max_count => 1);

-- null is absent
SELECT count(*) FROM eventstore.read('orders', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);

-- the last event
SELECT position, stream, version FROM eventstore.peek('orders');
SELECT position, stream, version, data FROM eventstore.peek('orders', 'o-2');
SELECT * FROM eventstore.peek('orders', 'o-1');
SELECT eventstore.peek('orders', 'none') IS NULL AS none;
SELECT (eventstore.peek('orders', 'o-3')).type;

-- in the select list it is a composite of the same type
SELECT pg_typeof(eventstore.read('orders', max_count => 1));
SELECT (e).position, (e).type FROM (SELECT eventstore.read('orders', after => 4) AS e) s;
SELECT eventstore.read('orders', max_count => 1);

-- cursors that cannot be honoured
SELECT refusal($$SELECT * FROM eventstore.read('orders', after => 7)$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', after => 7, max_count => 0)$$);

-- bad arguments
SELECT refusal($$SELECT * FROM eventstore.read(NULL)$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', after => -1)$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', before => -1)$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', max_count => -1)$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', direction => 'sideways')$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', direction => 'sideways', max_count => 0)$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', types => '{a,null}')$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', tags => '{null}')$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', types => '{a}', query => '[{}]')$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', query => '[]')$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', query => '[{"type": "a"}]')$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', wait => '-1 s')$$);
SELECT refusal($$SELECT * FROM eventstore.read('pg_class')$$);
SELECT refusal($$SELECT * FROM eventstore.read(0::oid::regclass)$$);
SELECT refusal($$SELECT eventstore.peek(NULL)$$);
SELECT refusal($$SELECT eventstore.head(NULL)$$);
SELECT refusal($$SELECT eventstore.head('pg_class')$$);

-- a transaction reads its own events, and a rollback takes them away
BEGIN;
SELECT position FROM eventstore.append('orders', 'own');
SELECT eventstore.head('orders');
SELECT position, type FROM eventstore.read('orders', after => 6);
SELECT position FROM eventstore.peek('orders');
ROLLBACK;
SELECT eventstore.head('orders');
SELECT count(*) FROM eventstore.read('orders', after => 7);
SELECT position FROM eventstore.peek('orders');

-- several segments, across their edges and both ways
SELECT count(*) FROM eventstore.append_batch('orders',
	(SELECT jsonb_agg(jsonb_build_object('type', 't' || n % 3, 'tags', jsonb_build_array('mod:' || n % 1000))) FROM generate_series(1, 10000) n));
SELECT count(*), min(position), max(position) FROM eventstore.read('orders');
SELECT count(*) FROM (SELECT position, lag(position) OVER () AS previous FROM eventstore.read('orders')) s WHERE position <= previous;
SELECT count(*) FROM (SELECT position, lag(position) OVER () AS previous FROM eventstore.read('orders', direction => 'backward')) s WHERE position >= previous;
SELECT position FROM eventstore.read('orders', after => 4094, max_count => 4);
SELECT position FROM eventstore.read('orders', before => 4099, max_count => 4, direction => 'backward');
SELECT count(*), min(position), max(position) FROM eventstore.read('orders', tags => '{mod:7}');
SELECT count(*) FROM eventstore.read('orders', types => '{t1}', tags => '{mod:7}');
SELECT position FROM eventstore.read('orders', tags => '{mod:7}', direction => 'backward', max_count => 2);

-- what was truncated is not read, and a cursor into it is refused
SELECT eventstore.truncate_before('orders', 5000);
SELECT min(position) FROM eventstore.read('orders');
SELECT min(position) FROM eventstore.read('orders', tags => '{mod:7}');
SELECT position FROM eventstore.read('orders', after => 4096, max_count => 1);
SELECT refusal($$SELECT * FROM eventstore.read('orders', after => 3)$$);
SELECT count(*) FROM eventstore.read('orders', before => 100);

-- at REPEATABLE READ one's own events are above what the snapshot is known to hold
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT position > 0 AS appended FROM eventstore.append('orders', 'unseen');
SELECT count(*) FROM eventstore.read('orders', types => '{unseen}');
COMMIT;
SELECT count(*) FROM eventstore.read('orders', types => '{unseen}');

-- rights are those of the table
CREATE ROLE regress_reader;
SET ROLE regress_reader;
SELECT refusal($$SELECT * FROM eventstore.read('orders')$$);
SELECT refusal($$SELECT * FROM eventstore.read('orders', max_count => 0)$$);
SELECT refusal($$SELECT eventstore.head('orders')$$);
SELECT refusal($$SELECT eventstore.peek('orders')$$);
RESET ROLE;
GRANT SELECT (position) ON orders TO regress_reader;
SET ROLE regress_reader;
SELECT refusal($$SELECT position FROM eventstore.read('orders')$$);
RESET ROLE;
GRANT SELECT ON orders TO regress_reader;
SET ROLE regress_reader;
SELECT position FROM eventstore.read('orders', max_count => 1);
SELECT position > 0 AS some FROM eventstore.peek('orders');
RESET ROLE;

-- row-level security: every way of reading shows the visible events
ALTER TABLE orders ENABLE ROW LEVEL SECURITY;
CREATE POLICY seen ON orders FOR SELECT TO regress_reader USING (type <> 't1' AND position % 2 = 0);
SET ROLE regress_reader;
SELECT position, type FROM eventstore.read('orders', max_count => 3);
SELECT position, type FROM eventstore.read('orders', max_count => 2, direction => 'backward', before => 10000);
SELECT count(*) FROM eventstore.read('orders', types => '{t1}');
SELECT count(*) FROM eventstore.read('orders', tags => '{mod:7}');
SELECT count(*) = (SELECT count(*) FROM orders WHERE position > 4096) AS same FROM eventstore.read('orders');
SELECT count(*) FROM eventstore.read('orders', since => 'infinity');
SELECT count(*) = (SELECT count(*) FROM orders WHERE position > 4096) AS same FROM eventstore.read('orders', since => '-infinity', until => 'infinity');
SELECT count(*) FROM eventstore.read('orders', max_count => 0);
SELECT position % 2 FROM eventstore.peek('orders');
SELECT refusal($$SELECT * FROM eventstore.read('orders', after => 3)$$);
SET row_security = off;
SELECT refusal($$SELECT * FROM eventstore.read('orders')$$);
RESET row_security;
RESET ROLE;
-- the owner is not subject to it
SELECT count(*) = (SELECT count(*) FROM orders WHERE position > 4096) AS same FROM eventstore.read('orders');

DROP FUNCTION refusal;
SELECT eventstore.drop_collection('orders');
DROP ROLE regress_reader;
