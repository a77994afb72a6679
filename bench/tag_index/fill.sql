-- One tenth of the rows into the candidate's table, timed.
-- psql variables: candidate, slice, events

SELECT clock_timestamp() AS started, pg_current_wal_insert_lsn() AS wal_start \gset
CALL candidate.fill(:slice::bigint * :events / 10 + 1, (:slice::bigint + 1) * :events / 10);
INSERT INTO bench.fill
SELECT :'candidate', :slice, extract(epoch FROM clock_timestamp() - :'started'),
	pg_current_wal_insert_lsn() - :'wal_start'::pg_lsn;
