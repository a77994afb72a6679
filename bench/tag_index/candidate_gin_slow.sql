-- GIN on the tags, each entry written at once.
-- psql variables: events

CALL bench.create_table(:events);
CREATE INDEX ON candidate.log USING gin (tags) WITH (fastupdate = off);
