-- Everything that the candidate stores beside the rows and their primary key.
-- psql variables: candidate

INSERT INTO bench.size
SELECT :'candidate', coalesce(sum(pg_total_relation_size(c.oid)), 0)
FROM pg_class c
WHERE c.relnamespace = 'candidate'::regnamespace
	AND (c.relkind = 'i' AND c.relname ~ '^log_' AND c.relname !~ 'pkey'
		 OR c.relkind = 'r' AND c.relname ~ '^side_');
