/*
 * Operations: what happens, who holds the head back, what is wrong.
 */

CREATE FUNCTION eventstore.stat_collections(
	OUT collection regclass,
	OUT appends bigint,
	OUT events bigint,
	OUT version_conflicts bigint,
	OUT condition_failures bigint,
	OUT retries bigint,
	OUT intent_waits bigint,
	OUT segment_waits bigint,
	OUT reads bigint,
	OUT events_read bigint,
	OUT late_wakeups bigint,
	OUT head bigint,
	OUT last_allotted bigint,
	OUT in_flight bigint
) RETURNS SETOF record
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_stat_collections';
COMMENT ON FUNCTION eventstore.stat_collections() IS
'The rows of the view pg_stat_eventstore.';

CREATE VIEW eventstore.pg_stat_eventstore AS
SELECT * FROM eventstore.stat_collections();
COMMENT ON VIEW eventstore.pg_stat_eventstore IS
'Per collection that the caller may SELECT from or owns, since the server''s start: appends (calls, and rows of INSERT and COPY), events appended (rolled back ones included), version_conflicts (LG001), condition_failures (LG002), retries recognised, intent_waits (for another append''s condition or event), segment_waits, reads, events_read, late_wakeups (a waiting session found an event that nobody had woken it for: a fault, please report it). head and last_allotted: null until the collection is used. in_flight: open transactions with positions in it.';
GRANT SELECT ON eventstore.pg_stat_eventstore TO PUBLIC;

CREATE FUNCTION eventstore.stat_holders(
	OUT collection regclass,
	OUT pid integer,
	OUT since timestamptz,
	OUT first_position bigint
) RETURNS SETOF record
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_stat_holders';
COMMENT ON FUNCTION eventstore.stat_holders() IS
'The rows of the view holders.';

CREATE VIEW eventstore.holders AS
SELECT * FROM eventstore.stat_holders();
COMMENT ON VIEW eventstore.holders IS
'Open transactions that have appended to a collection that the caller may SELECT from or owns: the process, since when, and its first position there. The lowest of these, minus one, is the head.';
GRANT SELECT ON eventstore.holders TO PUBLIC;

CREATE FUNCTION eventstore.stat_progress(
	OUT pid integer,
	OUT relation regclass,
	OUT command text,
	OUT since timestamptz,
	OUT phase text,
	OUT done bigint,
	OUT total bigint
) RETURNS SETOF record
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_stat_progress';
COMMENT ON FUNCTION eventstore.stat_progress() IS
'The rows of the view progress.';

CREATE VIEW eventstore.progress AS
SELECT * FROM eventstore.stat_progress();
COMMENT ON VIEW eventstore.progress IS
'Long work under way on a collection or store that the caller may SELECT from or owns: verify, rebuild, repair_collection, retry_dead_letters, and restore: what was restored into a store is recorded in its changelog (total: keys that are left). The process, since when, what it does now (phase), and how much of that is done, of how many in all (positions, events or records; null: not known). What a source restores or has to resync stands in sources and source_partitions; indexes that are made, in PostgreSQL''s pg_stat_progress_create_index.';
GRANT SELECT ON eventstore.progress TO PUBLIC;

CREATE FUNCTION eventstore.stat_workers(
	OUT worker text,
	OUT database name,
	OUT pid integer,
	OUT state text,
	OUT since timestamptz,
	OUT failures integer,
	OUT segments_made bigint,
	OUT segments_dropped bigint,
	OUT ticks bigint,
	OUT errors bigint,
	OUT notifications bigint,
	OUT wakeups bigint,
	OUT records bigint,
	OUT batches bigint,
	OUT parked bigint,
	OUT skipped bigint
) RETURNS SETOF record
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_stat_workers';
COMMENT ON FUNCTION eventstore.stat_workers() IS
'The rows of the view pg_stat_eventstore_workers.';

CREATE VIEW eventstore.pg_stat_eventstore_workers AS
SELECT * FROM eventstore.stat_workers();
COMMENT ON VIEW eventstore.pg_stat_eventstore_workers IS
'The launcher, and of each database of the server its worker, its notifier, its sources and sinks, where it has or wants one: the process (null: none), its state, since when, failures in a row, and what it has done since: segments made and dropped, heads noted (ticks), steps that failed (errors; the server log has them), notifications sent, waiting sessions woken (wakeups), records of a topic read or published, transactions that did so (batches), records that became dead letters (parked) or were passed over (skipped).';
GRANT SELECT ON eventstore.pg_stat_eventstore_workers TO PUBLIC;

CREATE FUNCTION eventstore.doctor(
	OUT item text,
	OUT ok boolean,
	OUT advice text
) RETURNS SETOF record
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_doctor';
COMMENT ON FUNCTION eventstore.doctor() IS
'What is set up as it should be, and how to mend what is not: the server, the worker, and each collection that the caller may SELECT from or owns. advice is null where all is well.';
