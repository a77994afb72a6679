-- append, append_batch, append_array: what comes back, versions, retries, refusals
\set ON_ERROR_STOP 0
SELECT eventstore.create_collection('orders');

-- positions from 1, versions from 1 in each stream, the id that was given
SELECT * FROM eventstore.append('orders', 'placed', '{"n": 1}', id => '00000000-0000-7000-8000-000000000001');
SELECT position, version, id IS NOT NULL AS has_id FROM eventstore.append('orders', 'placed', stream => 's');
SELECT position, version FROM eventstore.append('orders', 'paid', stream => 's', expected_version => 1);
SELECT position, version FROM eventstore.append('orders', 'placed', stream => 't', expected_version => 0);

-- the loser learns both versions
SELECT * FROM eventstore.append('orders', 'paid', stream => 's', expected_version => 1);
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('orders', 'paid', stream => 'none', expected_version => 3);
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('orders', 'paid', stream => 's', expected_version => 0);
\echo :LAST_ERROR_SQLSTATE
-- and spent no position
SELECT position, version FROM eventstore.append('orders', 'shipped', stream => 's', expected_version => 2);

-- a batch: input order, consecutive positions, several streams
SELECT position, version FROM eventstore.append_batch('orders', '[
	{"type": "a", "stream": "s"}, {"type": "b"}, {"type": "c", "stream": "u"},
	{"type": "d", "stream": "s", "data": {"x": [1, null]}}, {"type": "e", "stream": "u", "expected_version": 1}]');
SELECT * FROM eventstore.append_batch('orders', '[]');
SELECT * FROM eventstore.append_array('orders', '{}');
SELECT position, version FROM eventstore.append_array('orders', ARRAY[
	('f', '{"k": 1}', '{a:1,b:2,a:1}', 's', null, null, null, null, 5)::eventstore.new_event,
	('g', null, null, null, '{"m": 1}', '\x00ff', null, '2020-01-01 00:00:00+00', null)::eventstore.new_event]);
SELECT position, stream, version, type, tags, data, body, metadata FROM orders ORDER BY position;
SELECT created_at = '2020-01-01 00:00:00+00' AS kept FROM orders WHERE type = 'g';

-- one stream for the whole batch
SELECT position, version FROM eventstore.append_batch('orders',
	'[{"type": "x", "stream": "v"}, {"type": "y", "stream": "v"}]', expected_version => 0);
SELECT * FROM eventstore.append_batch('orders',
	'[{"type": "x", "stream": "v"}, {"type": "y", "stream": "w"}]', expected_version => 2);
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "stream": "v"}, {"type": "y"}]', expected_version => 2);
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x"}]', expected_version => 0);
SELECT * FROM eventstore.append('orders', 'x', expected_version => 0);
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "expected_version": 0}]');
-- a version that is wrong in the middle refuses all of it
SELECT * FROM eventstore.append_batch('orders', '[
	{"type": "x", "stream": "new"}, {"type": "y", "stream": "v", "expected_version": 7}]');
\echo :LAST_ERROR_SQLSTATE
SELECT count(*) FROM orders WHERE stream = 'new';

-- a safe retry: the same ids and the same expectation give the first answer
SELECT * FROM eventstore.append('orders', 'r', stream => 'retry', expected_version => 0, id => '00000000-0000-7000-8000-00000000000a');
SELECT * FROM eventstore.append('orders', 'r', stream => 'retry', expected_version => 0, id => '00000000-0000-7000-8000-00000000000a');
SELECT position, version FROM eventstore.append('orders', 'r', stream => 'retry', expected_version => 1);
SELECT * FROM eventstore.append('orders', 'r', stream => 'retry', expected_version => 0, id => '00000000-0000-7000-8000-00000000000a');
-- another id is a conflict
SELECT * FROM eventstore.append('orders', 'r', stream => 'retry', expected_version => 0, id => '00000000-0000-7000-8000-00000000000b');
-- a whole batch over two streams
SELECT * FROM eventstore.append_batch('orders', '[
	{"type": "p", "stream": "r1", "expected_version": 0, "id": "00000000-0000-7000-8000-000000000011"},
	{"type": "p", "stream": "r2", "expected_version": 0, "id": "00000000-0000-7000-8000-000000000012"},
	{"type": "p", "stream": "r1", "expected_version": 1, "id": "00000000-0000-7000-8000-000000000013"}]');
SELECT * FROM eventstore.append_batch('orders', '[
	{"type": "p", "stream": "r1", "expected_version": 0, "id": "00000000-0000-7000-8000-000000000011"},
	{"type": "p", "stream": "r2", "expected_version": 0, "id": "00000000-0000-7000-8000-000000000012"},
	{"type": "p", "stream": "r1", "expected_version": 1, "id": "00000000-0000-7000-8000-000000000013"}]');
-- not the same batch
SELECT * FROM eventstore.append_batch('orders', '[
	{"type": "p", "stream": "r1", "expected_version": 0, "id": "00000000-0000-7000-8000-000000000011"},
	{"type": "p", "stream": "r2", "expected_version": 0, "id": "00000000-0000-7000-8000-000000000099"}]');
\echo :LAST_ERROR_SQLSTATE

-- what an event must be
SELECT * FROM eventstore.append('orders', null);
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('orders', 'x', '{}', body => '\x00');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('orders', 'x', tags => '{a,null}');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('orders', 'x', tags => '{a,""}');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('orders', 'x', tags => '{{a},{b}}');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('orders', 'x', stream => 's', expected_version => -1);
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "colour": 1}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "position": 4}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "stream": "s", "version": 4}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[{"type": 5}]');
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "tags": "a"}]');
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "tags": ["a", 1]}]');
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "tags": ["a", null]}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "stream": "s", "expected_version": 1.5}]');
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "stream": "s", "expected_version": -1}]');
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "id": "zzz"}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x"}, {"type": "x", "id": 7}]');
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x"}, {"type": "x", "created_at": "never"}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "created_at": "2024-02-30"}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "created_at": "294277-01-01"}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[{"type": "x", "body": "!"}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', jsonb_build_array(jsonb_build_object('type', 'x', 'body', repeat('ü', 100000))));
SELECT * FROM eventstore.append_batch('orders', '[{"type": null}]');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_batch('orders', '[1]');
SELECT * FROM eventstore.append_batch('orders', '{"type": "x"}');
SELECT * FROM eventstore.append_batch('orders', '3');
SELECT * FROM eventstore.append_batch('orders', null);
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append_array('orders', ARRAY[null]::eventstore.new_event[]);
SELECT * FROM eventstore.append_array('orders', null);
SELECT * FROM eventstore.append(null, 'x');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('pg_class', 'x');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append(0, 'x');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('orders_heads', 'x');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.append('orders', 'x', after => 3);
\echo :LAST_ERROR_SQLSTATE

-- JSON null and absence are the same in a batch; an empty object is data
SELECT position, version FROM eventstore.append_batch('orders',
	'[{"type": "n", "stream": null, "data": null, "tags": null, "expected_version": null}, {"type": "n", "data": {}, "tags": []}]');
SELECT stream, data, tags FROM orders WHERE type = 'n' ORDER BY position;

-- rolled back: a gap, and the versions go on without one
BEGIN;
SELECT version FROM eventstore.append('orders', 'gone', stream => 's');
ROLLBACK;
SELECT version FROM eventstore.append('orders', 'kept', stream => 's');
BEGIN;
SELECT version FROM eventstore.append('orders', 'one', stream => 'sp');
SAVEPOINT a;
SELECT version FROM eventstore.append('orders', 'two', stream => 'sp');
SELECT version FROM eventstore.append('orders', 'new', stream => 'sp-new');
ROLLBACK TO a;
SELECT version FROM eventstore.append('orders', 'three', stream => 'sp');
SELECT version FROM eventstore.append('orders', 'new', stream => 'sp-new', expected_version => 0);
COMMIT;
SELECT stream, version, type FROM orders WHERE stream LIKE 'sp%' ORDER BY position;

-- several calls in one statement, and in one transaction
SELECT (SELECT version FROM eventstore.append('orders', 'm', stream => 'multi')),
       (SELECT version FROM eventstore.append('orders', 'm', stream => 'multi'));

-- a transaction that appended cannot be prepared; one that is read-only cannot append
BEGIN;
SELECT version FROM eventstore.append('orders', 'x', stream => 'p');
PREPARE TRANSACTION 'es';
\echo :LAST_ERROR_SQLSTATE
BEGIN READ ONLY;
SELECT version FROM eventstore.append('orders', 'x', stream => 'p');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;

-- heads agree with the events
SELECT count(*) FROM (SELECT stream, max(version) AS version, max(position) AS position, min(position) AS first
	FROM orders WHERE stream IS NOT NULL GROUP BY stream) e
	FULL JOIN orders_heads h USING (stream)
	WHERE e.version IS DISTINCT FROM h.version OR e.position IS DISTINCT FROM h.last_position
		OR e.first IS DISTINCT FROM h.first_position;
SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY stream ORDER BY position) AS n
	FROM orders WHERE stream IS NOT NULL) e WHERE version <> n;
SELECT eventstore.drop_collection('orders');
