-- read_stream, peek of a stream, streams
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

SELECT eventstore.create_collection('accounts', segment_size => 4096);
SELECT count(*) FROM eventstore.append_batch('accounts', '[
	{"type": "opened",    "stream": "a", "created_at": "2026-01-01T00:00:00Z", "id": "00000000-0000-7000-8000-000000000001"},
	{"type": "opened",    "stream": "b", "created_at": "2026-01-02T00:00:00Z"},
	{"type": "deposited", "stream": "a", "data": {"amount": 5}, "created_at": "2026-01-03T00:00:00Z"},
	{"type": "noted",     "created_at": "2026-01-04T00:00:00Z"},
	{"type": "deposited", "stream": "a", "created_at": "2026-01-05T00:00:00Z"},
	{"type": "closed",    "stream": "a", "created_at": "2026-01-06T00:00:00Z", "tags": ["x"]}]');

SELECT * FROM eventstore.read_stream('accounts', 'a') LIMIT 1;
SELECT position, stream, version, type, data FROM eventstore.read_stream('accounts', 'a');
SELECT version FROM eventstore.read_stream('accounts', 'a', direction => 'backward');

-- both bounds are inclusive, in the direction of reading
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 2);
SELECT version FROM eventstore.read_stream('accounts', 'a', 2, 2);
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 2, to_version => 3);
SELECT version FROM eventstore.read_stream('accounts', 'a', to_version => 2);
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 3, direction => 'backward');
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 3, to_version => 2, direction => 'backward');
SELECT version FROM eventstore.read_stream('accounts', 'a', to_version => 3, direction => 'backward');
SELECT version FROM eventstore.read_stream('accounts', 'a', max_count => 1, direction => 'backward');
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 0);
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 3, to_version => 2);

-- beyond the end, and unknown streams: nothing
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 5);
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 0, direction => 'backward');
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 99, direction => 'backward');
SELECT version FROM eventstore.read_stream('accounts', 'none');
SELECT version FROM eventstore.read_stream('accounts', '');
SELECT version FROM eventstore.read_stream('accounts', 'a', max_count => 0);

-- types; max_count counts what matches
SELECT version, type FROM eventstore.read_stream('accounts', 'a', types => '{deposited,closed}');
SELECT version, type FROM eventstore.read_stream('accounts', 'a', types => '{deposited}', max_count => 1, direction => 'backward');
SELECT version FROM eventstore.read_stream('accounts', 'a', types => '{deposit}');
SELECT count(*) FROM eventstore.read_stream('accounts', 'a', types => '{}');

-- bad arguments
SELECT refusal($$SELECT * FROM eventstore.read_stream(NULL, 'a')$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', NULL)$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'a', from_version => -1)$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'a', to_version => -1)$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'a', max_count => -1)$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'a', direction => 'up')$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'a', types => '{null}')$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'a', wait => '-1 s')$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('pg_class', 'a')$$);
SELECT refusal($$SELECT * FROM eventstore.streams('pg_class')$$);
SELECT refusal($$SELECT * FROM eventstore.streams(NULL)$$);

-- a stream needs no head: what is committed shows, and what is one's own
BEGIN;
SELECT version FROM eventstore.append('accounts', 'opened', stream => 'own');
SELECT version, type FROM eventstore.read_stream('accounts', 'own');
SELECT version FROM eventstore.peek('accounts', 'own');
SELECT stream, version FROM eventstore.streams('accounts', 'o');
ROLLBACK;
SELECT count(*) FROM eventstore.read_stream('accounts', 'own');
SELECT eventstore.peek('accounts', 'own');
SELECT count(*) FROM eventstore.streams('accounts', 'o');

-- streams over many segments: bounds in the middle of each, both ways
DO $$
BEGIN
	FOR batch IN 1..5 LOOP
		PERFORM eventstore.append_batch('accounts', jsonb_agg(jsonb_build_object('type', 't',
			'stream', CASE WHEN n % 2 = 0 THEN 'wide' ELSE 'odd-' || n % 7 END))) FROM generate_series(1, 4000) n;
	END LOOP;
END $$;
SELECT count(*), min(version), max(version) FROM eventstore.read_stream('accounts', 'wide');
SELECT count(*) FROM generate_series(1, 10000, 97) v,
	LATERAL (SELECT version FROM eventstore.read_stream('accounts', 'wide', v, 3)) e
	WHERE e.version NOT BETWEEN v AND v + 2;
SELECT count(*) FROM generate_series(1, 10000, 97) v WHERE
	v <> (SELECT version FROM eventstore.read_stream('accounts', 'wide', v) LIMIT 1) OR
	v <> (SELECT version FROM eventstore.read_stream('accounts', 'wide', v, direction => 'backward') LIMIT 1);
SELECT count(*) FROM (SELECT version, lag(version) OVER () AS previous FROM eventstore.read_stream('accounts', 'wide', direction => 'backward')) s
	WHERE version <> previous - 1;
SELECT version FROM eventstore.peek('accounts', 'wide');
-- sparse: in the first segment and in the last
SELECT version FROM eventstore.append('accounts', 'late', stream => 'b');
SELECT position, version FROM eventstore.read_stream('accounts', 'b');
SELECT position, version FROM eventstore.read_stream('accounts', 'b', from_version => 2);

-- the inventory: bytewise order, prefixes are literal
SELECT count(*) FROM eventstore.append_batch('accounts', '[
	{"type": "t", "stream": "a%b"}, {"type": "t", "stream": "a%"}, {"type": "t", "stream": "a_b"}, {"type": "t", "stream": "a\\b"},
	{"type": "t", "stream": "axb"}, {"type": "t", "stream": "Z"}, {"type": "t", "stream": "ä"}, {"type": "t", "stream": "äö"},
	{"type": "t", "stream": "z"}, {"type": "t", "stream": ""}]');
SELECT stream, version FROM eventstore.streams('accounts');
SELECT stream, version, first_position, last_position, first_at, last_at FROM eventstore.streams('accounts', 'a') WHERE stream = 'a';
SELECT stream FROM eventstore.streams('accounts', 'a%');
SELECT stream FROM eventstore.streams('accounts', 'a_');
SELECT stream FROM eventstore.streams('accounts', 'a\');
SELECT stream FROM eventstore.streams('accounts', 'ä');
SELECT stream FROM eventstore.streams('accounts', prefix => 'zz');
SELECT count(*) FROM eventstore.streams('accounts', NULL);
SELECT stream FROM eventstore.streams('accounts', 'wide');

-- a segment that was taken away is an error where the stream lies in it, not a gap
BEGIN;
ALTER TABLE accounts DETACH PARTITION accounts_12289;
SELECT count(*) FROM eventstore.read_stream('accounts', 'wide');
ROLLBACK;
BEGIN;
ALTER TABLE accounts DETACH PARTITION accounts_12289;
SELECT count(*) FROM eventstore.read_stream('accounts', 'z');
ROLLBACK;

-- truncation: versions go on, what was dropped is refused where it is asked for
SELECT eventstore.truncate_before('accounts', 9000);
SELECT min(version) FROM eventstore.read_stream('accounts', 'wide');
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'wide', from_version => 3)$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'wide', from_version => 3, direction => 'backward')$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'wide', from_version => 0)$$);
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'wide', from_version => 3, max_count => 0)$$);
SELECT count(*) FROM eventstore.read_stream('accounts', 'wide', from_version => 0, direction => 'backward');
SELECT version FROM eventstore.read_stream('accounts', 'wide', direction => 'backward', to_version => 3) ORDER BY version LIMIT 1;
SELECT version FROM eventstore.read_stream('accounts', 'b');
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'b', from_version => 1)$$);
-- a stream of which nothing is kept
SELECT version FROM eventstore.read_stream('accounts', 'a');
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'a', from_version => 4)$$);
SELECT version FROM eventstore.read_stream('accounts', 'a', from_version => 5);
SELECT eventstore.peek('accounts', 'a') IS NULL AS nothing_kept;
SELECT stream, version, last_position FROM eventstore.streams('accounts', 'a') WHERE stream = 'a';

-- rights: SELECT on the collection is enough, for the inventory too
CREATE ROLE regress_reader;
SET ROLE regress_reader;
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'b')$$);
SELECT refusal($$SELECT * FROM eventstore.peek('accounts', 'b')$$);
SELECT refusal($$SELECT * FROM eventstore.streams('accounts')$$);
RESET ROLE;
GRANT SELECT ON accounts TO regress_reader;
SET ROLE regress_reader;
SELECT version FROM eventstore.read_stream('accounts', 'b');
SELECT version FROM eventstore.peek('accounts', 'b');
SELECT count(*) FROM eventstore.streams('accounts');
RESET ROLE;

-- row-level security: only what is visible, and no hint of the rest
ALTER TABLE accounts ENABLE ROW LEVEL SECURITY;
CREATE POLICY seen ON accounts FOR SELECT TO regress_reader USING (stream IN ('wide', 'z') AND version % 2 = 1);
SET ROLE regress_reader;
SELECT stream, version, first_position, last_position, first_at IS NOT NULL AS first_at, last_at IS NOT NULL AS last_at FROM eventstore.streams('accounts');
SELECT stream FROM eventstore.streams('accounts', 'w');
SELECT stream FROM eventstore.streams('accounts', '%');
SELECT version FROM eventstore.read_stream('accounts', 'wide', from_version => 7000, max_count => 3);
SELECT version FROM eventstore.read_stream('accounts', 'wide', from_version => 7000, max_count => 3, direction => 'backward');
SELECT version FROM eventstore.read_stream('accounts', 'wide', from_version => 7000, to_version => 7003);
SELECT version FROM eventstore.read_stream('accounts', 'wide', from_version => 7000, max_count => 1, types => '{t}');
SELECT count(*) FROM eventstore.read_stream('accounts', 'wide', types => '{u}');
SELECT refusal($$SELECT * FROM eventstore.read_stream('accounts', 'wide', from_version => 3)$$);
SELECT count(*) FROM eventstore.read_stream('accounts', 'b', from_version => 1);
SELECT version FROM eventstore.peek('accounts', 'wide');
SELECT eventstore.peek('accounts', 'b') IS NULL AS hidden;
RESET ROLE;

-- two segments are walked without a look at the heads table, which a serializable transaction takes: the same events
SELECT eventstore.create_collection('ledger', segment_size => 4096);
SELECT count(*) FROM eventstore.append_batch('ledger',
	(SELECT jsonb_agg(jsonb_build_object('type', 't' || n % 3, 'stream', CASE WHEN n = 1 THEN 'first' WHEN n = 5000 THEN 'last' ELSE 's-' || n % 7 END))
	 FROM generate_series(1, 5000) n));
CREATE VIEW walks AS
SELECT s, direction, low, high, n, r.position, r.version, r.type
FROM unnest('{s-0,s-3,first,last,none}'::text[]) s, unnest('{forward,backward}'::text[]) direction,
	unnest('{null,0,1,2,700,714,9999}'::bigint[]) low, unnest('{null,0,1,3,713,9999}'::bigint[]) high, unnest('{null,0,1,3}'::bigint[]) n,
	LATERAL eventstore.read_stream('ledger', s, from_version => low, max_count => n, direction => direction, to_version => high) r;
CREATE TEMP TABLE unasked AS SELECT * FROM walks;
SELECT count(*), count(DISTINCT (s, direction)) FROM unasked;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT count(*) = (SELECT count(*) FROM unasked) AS as_many FROM walks;
SELECT count(*) AS different FROM (SELECT * FROM walks EXCEPT SELECT * FROM unasked) r;
SELECT s, (eventstore.peek('ledger', s)).version FROM unnest('{s-0,s-3,first,last,none}'::text[]) s;
COMMIT;
SELECT s, (eventstore.peek('ledger', s)).version FROM unnest('{s-0,s-3,first,last,none}'::text[]) s;
DROP VIEW walks;
DROP TABLE unasked;
SELECT eventstore.drop_collection('ledger');

DROP FUNCTION refusal;
SELECT eventstore.drop_collection('accounts');
DROP ROLE regress_reader;
