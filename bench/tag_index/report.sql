-- The tables of the report, in Markdown.

\pset format unaligned
\pset fieldsep ' | '
\pset footer off
\pset tuples_only on

\echo '| insert | none | labels | side | gin | gin_slow |'
\echo '|---|--:|--:|--:|--:|--:|'
WITH figures AS (
	SELECT candidate, 1 AS line, 'events/s, median of ten segments' AS what,
		(SELECT count(*) FROM bench.source) / 10 / percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds) AS value
	FROM bench.fill GROUP BY candidate
	UNION ALL
	SELECT candidate, 2, 'bytes of WAL per event', sum(wal_bytes)::float8 / (SELECT count(*) FROM bench.source)
	FROM bench.fill GROUP BY candidate
	UNION ALL
	SELECT candidate, 3, 'bytes of index per event', index_bytes::float8 / (SELECT count(*) FROM bench.source)
	FROM bench.size
)
SELECT '| ' || what,
	round(max(value) FILTER (WHERE candidate = 'none')),
	round(max(value) FILTER (WHERE candidate = 'labels')),
	round(max(value) FILTER (WHERE candidate = 'side')),
	round(max(value) FILTER (WHERE candidate = 'gin')),
	round(max(value) FILTER (WHERE candidate = 'gin_slow')) || ' |'
FROM figures GROUP BY line, what ORDER BY line;

\echo
\echo '| question, ms | answer | labels | side | gin | gin_slow |'
\echo '|---|--:|--:|--:|--:|--:|'
SELECT '| ' || question,
	CASE WHEN count(DISTINCT answer) = 1 THEN min(answer)::text ELSE 'THEY DIFFER' END,
	round(max(ms) FILTER (WHERE candidate = 'labels')::numeric, 2),
	round(max(ms) FILTER (WHERE candidate = 'side')::numeric, 2),
	round(max(ms) FILTER (WHERE candidate = 'gin')::numeric, 2),
	round(max(ms) FILTER (WHERE candidate = 'gin_slow')::numeric, 2) || ' |'
FROM bench.answer GROUP BY question ORDER BY split_part(question, '.', 1)::int;
