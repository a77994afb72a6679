-- A table of (hash of tag or type, position) beside the log, partitioned as it is,
-- with its primary key in this order.
-- psql variables: events

CALL bench.create_table(:events);
CREATE TABLE candidate.side (label bigint, position bigint, PRIMARY KEY (label, position)) PARTITION BY RANGE (position);
SELECT format('CREATE TABLE candidate.side_%s PARTITION OF candidate.side FOR VALUES FROM (%s) TO (%s)',
			  i, i * :events / 10 + 1, (i + 1) * :events / 10 + 1)
FROM generate_series(0, 9) i \gexec

-- Two plain statements in one transaction: cheaper than a trigger could be.
CREATE OR REPLACE PROCEDURE candidate.fill(first bigint, last bigint)
LANGUAGE sql
BEGIN ATOMIC
	INSERT INTO candidate.log SELECT * FROM bench.source s WHERE s.position BETWEEN first AND last;
	INSERT INTO candidate.side
	SELECT hashtextextended(label, 0), s.position
	FROM bench.source s, unnest(s.tags || ('type:' || s.type)) label
	WHERE s.position BETWEEN first AND last;
END;

-- One join per tag, then the rows.  The range is said of the log as well, so
-- that its partitions are pruned.
CREATE OR REPLACE FUNCTION candidate.question(tags text[], types text[] = null, after bigint = 0,
											  max_count bigint = null, backward boolean = false) RETURNS text
LANGUAGE sql STABLE
RETURN format('SELECT count(*) FROM (SELECT l.* FROM %s JOIN candidate.log l USING (position)
	WHERE %s AND s1.position > %s AND l.position > %3$s AND l.tags @> %L %s ORDER BY s1.position %s LIMIT %L) e',
	(SELECT string_agg('candidate.side s' || n || CASE WHEN n > 1 THEN ' USING (position)' ELSE '' END, ' JOIN ' ORDER BY n)
	 FROM generate_subscripts(tags, 1) n),
	(SELECT string_agg(format('s%s.label = %L', n, hashtextextended(tags[n], 0)), ' AND ')
	 FROM generate_subscripts(tags, 1) n),
	after, tags,
	CASE WHEN types IS NOT NULL THEN format('AND l.type = ANY (%L)', types) END,
	CASE WHEN backward THEN 'DESC' END, max_count);
