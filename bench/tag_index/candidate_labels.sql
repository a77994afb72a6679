-- eventstore_labels: the cost of inserts on the same plain table as the others,
-- the questions by eventstore.read on a collection of the same rows.
-- psql variables: events

CALL bench.create_table(:events);
CREATE INDEX ON candidate.log USING eventstore_labels (tags, type, position);

SELECT eventstore.create_collection('candidate.collection', segment_size => :events / 10) \g /dev/null
DO $$
DECLARE
	chunk CONSTANT bigint := 10000;
	total bigint := (SELECT max(position) FROM bench.source);
BEGIN
	FOR start IN 1..total BY chunk LOOP
		PERFORM FROM eventstore.append_array('candidate.collection', (
			SELECT array_agg(ROW(type, data, tags, NULL, NULL, NULL, NULL, NULL, NULL)::eventstore.new_event ORDER BY position)
			FROM bench.source WHERE position BETWEEN start AND start + chunk - 1));
		COMMIT;
	END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION candidate.question(tags text[], types text[] = null, after bigint = 0,
											  max_count bigint = null, backward boolean = false) RETURNS text
LANGUAGE sql STABLE
RETURN format('SELECT count(*) FROM eventstore.read(''candidate.collection'', tags => %L, types => %L, after => %s, max_count => %L, direction => %L)',
	tags, types, after, max_count, CASE WHEN backward THEN 'backward' ELSE 'forward' END);
