-- The rows that every candidate gets, the questions, and where answers go.
-- psql variables: events

CREATE SCHEMA bench;

-- Spreads i evenly, the same way each time.
CREATE FUNCTION bench.spread(i bigint, salt bigint, n bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN mod(hashint8extended(i, salt) & 9223372036854775807, n);

-- On 30 % of the events region:eu; on 10 % each channel:web and campaign:may,
-- which meet on three; on five rare:1; customers with some 20 events each;
-- orders with five each, close together.
CREATE UNLOGGED TABLE bench.source AS
SELECT i AS position,
	'type' || least(bench.spread(i, 1, 20), bench.spread(i, 2, 20)) AS type,
	array_remove(ARRAY[
		'customer:' || bench.spread(i, 3, :events / 20),
		'order:' || i / 5,
		CASE WHEN bench.spread(i, 4, 10) < 3 THEN 'region:eu' END,
		CASE WHEN bench.spread(i, 5, 10) = 0 OR meets THEN 'channel:web' END,
		CASE WHEN bench.spread(i, 5, 10) = 1 OR meets THEN 'campaign:may' END,
		CASE WHEN i % (:events / 5) = 1234 THEN 'rare:1' END], NULL) AS tags,
	jsonb_build_object('amount', i, 'currency', 'EUR', 'note', 'a note of some length, as they are') AS data
FROM (SELECT i, i % (:events / 3) = 4321 AS meets FROM generate_series(1, :events::bigint) i) s;
ALTER TABLE bench.source ADD PRIMARY KEY (position);
ANALYZE bench.source;

CREATE TABLE bench.fill (candidate text, slice int, seconds float8, wal_bytes numeric);
CREATE TABLE bench.size (candidate text, index_bytes numeric);
CREATE TABLE bench.answer (candidate text, question text, answer bigint, ms float8);

-- A plain partitioned table with the columns that matter here, ten segments; how
-- to fill it; how to ask it in plain SQL.  Candidates replace what is different.
CREATE PROCEDURE bench.create_table(events bigint)
LANGUAGE plpgsql
AS $$
BEGIN
	EXECUTE 'CREATE SCHEMA candidate';
	EXECUTE 'CREATE TABLE candidate.log (position bigint PRIMARY KEY, type text COLLATE "C" NOT NULL,
		tags text[] COLLATE "C" NOT NULL, data jsonb) PARTITION BY RANGE (position)';
	FOR i IN 0..9 LOOP
		EXECUTE format('CREATE TABLE candidate.log_%s PARTITION OF candidate.log FOR VALUES FROM (%s) TO (%s)',
					   i, i * events / 10 + 1, (i + 1) * events / 10 + 1);
	END LOOP;

	CREATE PROCEDURE candidate.fill(first bigint, last bigint)
	LANGUAGE sql
	BEGIN ATOMIC
		INSERT INTO candidate.log SELECT * FROM bench.source s WHERE s.position BETWEEN first AND last;
	END;

	CREATE FUNCTION candidate.question(tags text[], types text[] = null, after bigint = 0,
									   max_count bigint = null, backward boolean = false) RETURNS text
	LANGUAGE sql STABLE
	RETURN format('SELECT count(*) FROM (SELECT * FROM candidate.log WHERE tags @> %L %s AND position > %s ORDER BY position %s LIMIT %L) e',
		tags, CASE WHEN types IS NOT NULL THEN format('AND type = ANY (%L)', types) END, after,
		CASE WHEN backward THEN 'DESC' END, max_count);
END
$$;

-- The median of 'runs' runs after one that warms up.  The query gives one bigint.
CREATE PROCEDURE bench.ask(candidate text, question text, query text, runs int)
LANGUAGE plpgsql
AS $$
DECLARE
	answer bigint;
	started timestamptz;
	times float8[] := '{}';
BEGIN
	FOR run IN 0..runs LOOP
		started := clock_timestamp();
		EXECUTE query INTO answer;
		IF run > 0 THEN
			times := times || extract(epoch FROM clock_timestamp() - started)::float8 * 1000;
		END IF;
	END LOOP;
	INSERT INTO bench.answer
	SELECT candidate, question, answer, percentile_cont(0.5) WITHIN GROUP (ORDER BY t) FROM unnest(times) t;
END
$$;
