-- GIN on the tags, with its list of pending entries.
-- psql variables: events

CALL bench.create_table(:events);
CREATE INDEX ON candidate.log USING gin (tags);
