-- read and read_stream in FROM: they stream, stop, and agree with the plain call
\set ON_ERROR_STOP 0
\set VERBOSITY terse
SELECT eventstore.create_collection('orders');
SELECT count(*) FROM eventstore.append_batch('orders',
	(SELECT jsonb_agg(jsonb_build_object('type', 't' || n % 3, 'stream', 's-' || n % 10)) FROM generate_series(1, 1000) n));
CREATE TABLE bounds (id int PRIMARY KEY, low bigint, name text);
INSERT INTO bounds VALUES (1, 990, 's-1'), (2, 995, 's-2'), (3, 1000, 's-3');
ANALYZE bounds;

-- the plan, which reads nothing
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read('orders');
EXPLAIN (COSTS OFF) SELECT position FROM eventstore.read('orders', after => 5) WHERE type = 't1' LIMIT 10;
EXPLAIN (COSTS OFF, VERBOSE) SELECT r, r.position + 1 FROM eventstore.read('orders', max_count => 5) r WHERE r.tags <> '{}';
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read_stream('orders', 's-1', from_version => 2);
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read('pg_class');
-- (numbers of rows have decimals since 18)
CREATE FUNCTION analyzed(query text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
	line text;
BEGIN
	FOR line IN EXECUTE 'EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF) ' || query LOOP
		RETURN NEXT replace(line, '.00 ', ' ');
	END LOOP;
END $$;
SELECT analyzed($$SELECT * FROM eventstore.read('orders') LIMIT 3$$);
-- max_count is the estimate
EXPLAIN SELECT * FROM eventstore.read('orders', max_count => 7);

-- events come in order: no sort
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read('orders') ORDER BY position LIMIT 5;
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read('orders', direction => 'backward') ORDER BY position DESC;
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read('orders', direction => 'backward') ORDER BY position;
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read_stream('orders', 's-1') ORDER BY version;
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read_stream('orders', 's-1') ORDER BY position;
SELECT position FROM eventstore.read('orders', direction => 'backward') ORDER BY position DESC LIMIT 2;
SELECT position FROM eventstore.read('orders', direction => 'backward') ORDER BY position LIMIT 2;

-- where it stays a function scan
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read('orders') WITH ORDINALITY;
EXPLAIN (COSTS OFF) SELECT * FROM ROWS FROM (eventstore.read('orders'), generate_series(1, 2));
EXPLAIN (COSTS OFF) SELECT * FROM bounds b, eventstore.read('orders', after => b.low) r;
EXPLAIN (COSTS OFF) SELECT * FROM bounds b, eventstore.read('orders') r WHERE r.position = b.low FOR UPDATE OF b;
SELECT r.position, r.ordinality FROM eventstore.read('orders', 997) WITH ORDINALITY r;
SELECT b.id, count(*) FROM bounds b, eventstore.read('orders', after => b.low) r GROUP BY 1 ORDER BY 1;

-- the rows are taken apart by whoever looks into them: below a sort, a group, a window, joins, a set operation
SELECT count(*), max(tags::text), min(data::text), count(DISTINCT id), count(body)
FROM (SELECT * FROM eventstore.read('orders') ORDER BY stream, version OFFSET 0) r;
SELECT count(*) FROM (SELECT * FROM eventstore.read('orders') EXCEPT SELECT position, stream, version, id, type, tags, data, body, metadata, created_at FROM orders) r;
SELECT count(*) FROM (SELECT *, lag(id) OVER (PARTITION BY stream ORDER BY position) AS before FROM eventstore.read('orders')) r WHERE before <> id;
CREATE TABLE taken AS SELECT * FROM eventstore.read('orders');
SELECT count(*) FROM taken NATURAL JOIN (SELECT position, stream, version, id, type, tags, created_at FROM orders) o;
BEGIN;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_nestloop = off;
SELECT count(*), count(o.id) FROM eventstore.read('orders') r JOIN orders o USING (id, stream, version, position, type, tags, created_at) WHERE r.data IS NULL AND r.body IS NULL AND r.metadata IS NULL;
SET LOCAL enable_mergejoin = off;
SET LOCAL enable_hashjoin = on;
SELECT count(*), count(r.id) FROM orders o LEFT JOIN (SELECT * FROM eventstore.read('orders') OFFSET 0) r ON o.id = r.id AND o.tags = r.tags AND o.created_at = r.created_at;
SET LOCAL enable_hashjoin = off;
SET LOCAL enable_nestloop = on;
SELECT count(*), min(r.type) FROM bounds b CROSS JOIN (SELECT * FROM eventstore.read('orders') OFFSET 0) r;
ROLLBACK;
DROP TABLE taken;

-- all the columns, some of them, none of them, the row as a whole
SELECT count(*) FROM eventstore.read('orders');
SELECT count(*), count(stream), max(version), min(position) FROM eventstore.read('orders') WHERE type = 't1';
SELECT r.position, (r).stream, r IS NULL AS is_null, pg_typeof(r) FROM eventstore.read('orders', 998) r;
SELECT (SELECT count(*) FROM eventstore.read('orders') r WHERE r = e) FROM eventstore.read('orders', 500, 1) e;
SELECT to_jsonb(r) - 'id' - 'created_at' FROM eventstore.read('orders', 999) r;
SELECT row_to_json(r)::jsonb -> 'position' FROM (SELECT * FROM eventstore.read('orders', 999)) r;
-- as the function itself answers
SELECT count(*) FROM (SELECT * FROM eventstore.read('orders') EXCEPT SELECT (e).* FROM (SELECT eventstore.read('orders') AS e OFFSET 0) s) d;
SELECT count(*) FROM (SELECT * FROM eventstore.read_stream('orders', 's-7') EXCEPT SELECT (e).* FROM (SELECT eventstore.read_stream('orders', 's-7') AS e OFFSET 0) s) d;

-- cursors: fetched step by step, both ways, and held over the commit
BEGIN;
DECLARE c CURSOR FOR SELECT position FROM eventstore.read('orders');
FETCH 2 FROM c;
SELECT position FROM eventstore.append('orders', 'later');
FETCH 2 FROM c;
MOVE 995 FROM c;
FETCH ALL FROM c;
COMMIT;
BEGIN;
DECLARE c SCROLL CURSOR FOR SELECT position FROM eventstore.read('orders', max_count => 5);
FETCH 3 FROM c;
FETCH BACKWARD 2 FROM c;
FETCH LAST FROM c;
FETCH FIRST FROM c;
CLOSE c;
DECLARE h CURSOR WITH HOLD FOR SELECT position, stream FROM eventstore.read('orders');
FETCH 2 FROM h;
COMMIT;
FETCH 2 FROM h;
CLOSE h;
-- a cursor that is left open, by a commit and by an error
BEGIN;
DECLARE c CURSOR FOR SELECT position FROM eventstore.read('orders');
FETCH 1 FROM c;
COMMIT;
BEGIN;
DECLARE c CURSOR FOR SELECT position FROM eventstore.read('orders');
FETCH 1 FROM c;
SELECT 1 / 0;
ROLLBACK;
-- opened outside a savepoint, fetched inside it
BEGIN;
DECLARE c CURSOR FOR SELECT position FROM eventstore.read('orders');
SAVEPOINT a;
FETCH 2 FROM c;
RELEASE a;
FETCH 2 FROM c;
SAVEPOINT b;
DECLARE d CURSOR FOR SELECT position FROM eventstore.read('orders');
FETCH 1 FROM d;
ROLLBACK TO b;
FETCH 2 FROM c;
COMMIT;

-- an error in the middle of a row
SELECT 10 / (position - 3) FROM eventstore.read('orders');
SELECT count(*) FROM eventstore.read('orders') WHERE 1 / (position - 1001) < 5;

-- prepared, with plans of both kinds
PREPARE p (regclass, bigint, bigint) AS SELECT position FROM eventstore.read($1, $2, $3);
SET plan_cache_mode = force_generic_plan;
EXPLAIN (COSTS OFF) EXECUTE p('orders', 5, 2);
EXECUTE p('orders', 5, 2);
EXECUTE p('orders', 7, 1);
EXECUTE p('orders', NULL, 1);
EXECUTE p('orders', -1, 1);
EXECUTE p(NULL, 1, 1);
SET plan_cache_mode = force_custom_plan;
EXECUTE p('orders', 5, 2);
RESET plan_cache_mode;

-- nested loops read again, in the same view
SET enable_hashjoin = off; SET enable_mergejoin = off; SET enable_material = off;
EXPLAIN (COSTS OFF) SELECT * FROM bounds b LEFT JOIN eventstore.read('orders', 980) r ON r.position = b.low;
SELECT b.id, r.position FROM bounds b LEFT JOIN eventstore.read('orders', 980) r ON r.position >= b.low ORDER BY 1, 2 LIMIT 20;
RESET enable_hashjoin; RESET enable_mergejoin; RESET enable_material;
SELECT r.position FROM bounds b JOIN eventstore.read('orders') r ON r.position = b.low ORDER BY 1;

-- arguments from an outer query, from a subquery, from nowhere constant
SELECT id, (SELECT count(*) FROM eventstore.read('orders', after => b.low)) FROM bounds b ORDER BY 1;
SELECT id, (SELECT max(version) FROM eventstore.read_stream('orders', b.name)) FROM bounds b ORDER BY 1;
SELECT id, ARRAY(SELECT version FROM eventstore.read_stream('orders', b.name || '', max_count => b.id)) FROM bounds b ORDER BY 1;
SELECT count(*) FROM eventstore.read('orders', (SELECT max(low) FROM bounds));
SELECT count(*) FROM eventstore.read(('ord' || 'ers')::regclass, types => ARRAY(SELECT 't' || n FROM generate_series(0, 1) n));
SELECT id FROM bounds b WHERE EXISTS (SELECT FROM eventstore.read('orders', after => b.low, types => '{t0}') WHERE position > 998) ORDER BY 1;
SELECT c, (SELECT count(*) FROM eventstore.read(c, 990)) FROM unnest('{orders,orders}'::regclass[]) c;

-- unions, views, common table expressions, partitioned by window functions
SELECT position FROM eventstore.read('orders', 999) UNION ALL SELECT position FROM eventstore.read('orders', max_count => 1);
CREATE VIEW newest AS SELECT position, type FROM eventstore.read('orders', direction => 'backward');
SELECT * FROM newest LIMIT 2;
EXPLAIN (COSTS OFF) SELECT * FROM newest LIMIT 2;
WITH e AS MATERIALIZED (SELECT * FROM eventstore.read('orders', max_count => 3)) SELECT count(*), (SELECT max(position) FROM e) FROM e;
SELECT position, count(*) OVER (PARTITION BY type) FROM eventstore.read('orders', max_count => 4) ORDER BY 1;
SELECT count(*) FROM eventstore.read('orders') r FULL JOIN eventstore.read('orders', 5) s USING (position) WHERE s.position IS NULL;
SELECT count(*) FROM eventstore.read('orders') WHERE false;

-- in plpgsql, with writes in the loop: the view stays
DO $$
DECLARE
	e eventstore.event;
	n int := 0;
BEGIN
	FOR e IN SELECT * FROM eventstore.read('orders', after => 995) LOOP
		PERFORM eventstore.append('orders', 'copy', stream => e.stream);
		n := n + 1;
	END LOOP;
	RAISE NOTICE '% events', n;
	FOR e IN SELECT * FROM eventstore.read('orders') LOOP
		EXIT WHEN e.position = 3;
	END LOOP;
	BEGIN
		FOR e IN SELECT * FROM eventstore.read('orders') LOOP
			RAISE EXCEPTION 'stop';
		END LOOP;
	EXCEPTION WHEN raise_exception THEN
		RAISE NOTICE 'stopped at %', e.position;
	END;
END $$;
-- and in one statement
SELECT count(*) FROM eventstore.read('orders') r, LATERAL eventstore.append('orders', 'again', stream => r.stream) a WHERE r.type = 'copy';
CREATE TABLE copies (position bigint);
INSERT INTO copies SELECT position FROM eventstore.read('orders', max_count => 3);
UPDATE copies c SET position = -c.position FROM eventstore.read('orders') r WHERE r.position = c.position;
DELETE FROM copies c USING eventstore.read('orders') r WHERE r.position = -c.position AND r.position > 1;
SELECT * FROM copies;

-- beside a parallel scan
CREATE TABLE big AS SELECT n, n % 1000 AS k FROM generate_series(1, 20000) n;
ANALYZE big;
SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;
SELECT count(*) FROM big JOIN eventstore.read('orders', max_count => 100) r ON r.position = big.k;
SELECT count(*) FROM big JOIN eventstore.read_stream('orders', 's-1') r ON r.position = big.k;
RESET parallel_setup_cost; RESET parallel_tuple_cost; RESET min_parallel_table_scan_size;

-- EXECUTE on the function is checked
CREATE ROLE regress_reader;
GRANT SELECT ON orders TO regress_reader;
SET ROLE regress_reader;
SELECT count(*) FROM eventstore.read('orders', max_count => 2);
RESET ROLE;
REVOKE EXECUTE ON FUNCTION eventstore.read FROM PUBLIC;
SET ROLE regress_reader;
SELECT count(*) FROM eventstore.read('orders', max_count => 2);
EXPLAIN (COSTS OFF) SELECT count(*) FROM eventstore.read('orders', max_count => 2);
RESET ROLE;
GRANT EXECUTE ON FUNCTION eventstore.read TO PUBLIC;
-- the collection's rights are checked when it runs
REVOKE SELECT ON orders FROM regress_reader;
SET ROLE regress_reader;
EXPLAIN (COSTS OFF) SELECT count(*) FROM eventstore.read('orders', max_count => 2);
SELECT count(*) FROM eventstore.read('orders', max_count => 2);
SELECT count(*) FROM newest;
RESET ROLE;
-- a view does not lend its owner's rights to the function in it
GRANT SELECT ON newest TO regress_reader;
SET ROLE regress_reader;
SELECT count(*) FROM newest;
RESET ROLE;
GRANT SELECT ON orders TO regress_reader;

-- row-level security streams too
ALTER TABLE orders ENABLE ROW LEVEL SECURITY;
CREATE POLICY seen ON orders FOR SELECT TO regress_reader USING (position % 100 = 0);
SET ROLE regress_reader;
SELECT position FROM eventstore.read('orders') LIMIT 2;
BEGIN;
DECLARE c CURSOR FOR SELECT position FROM eventstore.read('orders');
FETCH 2 FROM c;
FETCH 2 FROM c;
DECLARE h CURSOR WITH HOLD FOR SELECT position FROM eventstore.read('orders');
FETCH 1 FROM h;
COMMIT;
FETCH 1 FROM h;
CLOSE h;
SELECT c, (SELECT count(*) FROM eventstore.read(c)) FROM unnest('{orders,orders}'::regclass[]) c;
RESET ROLE;

-- altered by its owner, the function is called as it is now
ALTER FUNCTION eventstore.read SET work_mem = '64kB';
EXPLAIN (COSTS OFF) SELECT * FROM eventstore.read('orders');
ALTER FUNCTION eventstore.read RESET work_mem;

DROP VIEW newest;
DROP TABLE bounds, copies, big;
SELECT eventstore.drop_collection('orders');
DROP ROLE regress_reader;
