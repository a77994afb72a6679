-- No index of tags: what the rows and their primary key cost alone.
-- psql variables: events

CALL bench.create_table(:events);
