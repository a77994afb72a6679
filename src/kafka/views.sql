/*
 * What sources and sinks do, as each caller may see it.
 */

CREATE FUNCTION eventstore.kafka_state(
	failure text,
	paused boolean,
	system_identifier bigint,
	database_oid oid,
	process text,
	state text
) RETURNS text
LANGUAGE sql STABLE PARALLEL RESTRICTED
BEGIN ATOMIC
	SELECT CASE
		WHEN kafka_state.failure IS NOT NULL THEN 'failed'
		WHEN kafka_state.paused THEN 'paused'
		WHEN kafka_state.system_identifier <>
			(SELECT c.system_identifier FROM pg_catalog.pg_control_system() c) OR
			kafka_state.database_oid <> (SELECT d.oid FROM pg_catalog.pg_database d
				WHERE d.datname = pg_catalog.current_database()) THEN 'cloned'
		WHEN kafka_state.process = 'running' THEN COALESCE(NULLIF(kafka_state.state, ''), 'starting')
		WHEN kafka_state.process = 'no free process slot' THEN 'waiting_for_slot'
		WHEN kafka_state.process = 'failed' THEN 'restarting'
		ELSE 'starting' END;
END;
COMMENT ON FUNCTION eventstore.kafka_state(text, boolean, bigint, oid, text, text) IS
'The state of a source or sink, for the views: from its row, and from what its worker says.';

CREATE VIEW eventstore.sources WITH (security_barrier) AS
SELECT s.name, s.server, s.topic, s.target, s.owner, s.mode, s.paused,
	eventstore.kafka_state(s.failure, s.paused, s.system_identifier, s.database_oid,
		w.process, w.state) AS state,
	w.since,
	COALESCE(s.failure, NULLIF(w.message, '')) AS message,
	w.pid,
	s.value_format, s.transform, s.on_error, s.on_null_key, s.on_gap,
	s.flush_count, s.flush_interval, s.start, s.partitions, s.group_id, s.replica_partitions,
	s.changelog_topic, p.changelog_state, p.changelog_message, p.changelog_lag,
	w.records, w.batches, w.parked, w.skipped,
	s.created_at
FROM eventstore.source s
	LEFT JOIN eventstore.kafka_workers('source') w ON w.id = s.id
	LEFT JOIN (SELECT k.changelog_of,
			eventstore.kafka_state(k.failure, k.paused, k.system_identifier, k.database_oid,
				v.process, v.state) AS changelog_state,
			COALESCE(k.failure, NULLIF(v.message, '')) AS changelog_message,
			GREATEST(eventstore.collection_head(k.collection) - o.position, 0) AS changelog_lag
		FROM eventstore.sink k
			JOIN eventstore.sink_position o ON o.sink = k.id
			LEFT JOIN eventstore.kafka_workers('sink') v ON v.id = k.id) p ON p.changelog_of = s.id
WHERE eventstore.source_shown(s.owner, s.target);
COMMENT ON VIEW eventstore.sources IS
'The Kafka sources that the caller owns, or whose target he may SELECT from (all of it: no policy of row-level security applies to him). state: running; paused; starting; joining (its group shares out the partitions); restoring; disconnected (no broker answers; it goes on trying); denied (a password or an ACL); topic_missing; topic_recreated, gap and stopped (a record that cannot be written: on_error) wait for resume(); retrying (an error of the database, tried again); cloned (in a copy of the server or database, waits for resume()); waiting_for_slot (max_worker_processes); restarting (the worker ended by an error); failed (it ended so several times at its start, waits for resume()). message: why. changelog_state, changelog_message: of the publishing to the changelog topic, as a sink has them; changelog_lag: positions of the store''s changelog that are not published yet. records, batches, parked (dead letters) and skipped count since the worker''s start.';
GRANT SELECT ON eventstore.sources TO PUBLIC;

CREATE VIEW eventstore.source_partitions WITH (security_barrier) AS
SELECT s.name AS source, o.topic, o.partition, o.next_offset AS position, o.end_offset AS end_position,
	CASE WHEN o.end_offset <= o.next_offset THEN 0 ELSE o.end_offset - o.next_offset END AS lag_records,
	CASE WHEN o.end_offset <= o.next_offset THEN 0
		WHEN o.record_time IS NOT NULL
			THEN GREATEST(EXTRACT(EPOCH FROM pg_catalog.clock_timestamp() - o.record_time), 0) END::double precision
		AS lag_seconds,
	o.record_time, o.updated_at,
	s.group_id IS NULL OR COALESCE(o.topic = s.topic AND o.partition = ANY (s.assigned), false) AS assigned
FROM eventstore.source_offset o
	JOIN eventstore.source s ON s.id = o.source
WHERE eventstore.source_shown(s.owner, s.target);
COMMENT ON VIEW eventstore.source_partitions IS
'How far each partition of a source''s topic has been written: position, the offset of the next record; end_position, the end of the partition as last heard of; lag_records, offsets between the two (of compacted records and of transaction markers too; null: the end is not known yet); lag_seconds, age of the last record written where there are more, 0 where there are none; record_time, its time (null: not known); assigned: false for one that belongs to another member of the source''s group, or that was read here only to restore the store.';
GRANT SELECT ON eventstore.source_partitions TO PUBLIC;

CREATE VIEW eventstore.gaps WITH (security_barrier) AS
SELECT s.name AS source, g.topic, g.partition, g.first_offset, g.next_offset, g.reason, g.created_at
FROM eventstore.source_gap g
	JOIN eventstore.source s ON s.id = g.source
WHERE eventstore.source_shown(s.owner, s.target);
COMMENT ON VIEW eventstore.gaps IS
'Records that were gone from a topic before they could be read: from first_offset to next_offset (exclusive), why, and since when that is known.';
GRANT SELECT ON eventstore.gaps TO PUBLIC;

CREATE VIEW eventstore.sinks WITH (security_barrier) AS
SELECT s.name, s.server, s.topic, s.collection, s.owner, s.paused,
	eventstore.kafka_state(s.failure, s.paused, s.system_identifier, s.database_oid,
		w.process, w.state) AS state,
	w.since,
	COALESCE(s.failure, NULLIF(w.message, '')) AS message,
	w.pid,
	p.position,
	CASE WHEN h.head > p.position THEN h.head - p.position
		WHEN h.head IS NOT NULL THEN 0 END AS lag_events,
	p.updated_at,
	s.query, s.key, s.exactly_once, s.on_error, s.flush_count, s.flush_interval, s.progress_topic,
	w.records, w.batches, w.parked, w.skipped,
	s.created_at
FROM eventstore.sink s
	JOIN eventstore.sink_position p ON p.sink = s.id
	CROSS JOIN LATERAL (SELECT eventstore.collection_head(s.collection) AS head) h
	LEFT JOIN eventstore.kafka_workers('sink') w ON w.id = s.id
WHERE s.name IS NOT NULL AND eventstore.source_shown(s.owner, s.collection);
COMMENT ON VIEW eventstore.sinks IS
'The Kafka sinks that the caller owns, or whose collection he may SELECT from (all of it: no policy of row-level security applies to him). state: running; paused; starting; disconnected (no broker answers; it goes on trying); denied (a password or an ACL); topic_missing (tried again); retrying (another error, tried again); topic_recreated (it is not the one that was published to), stopped (an event that cannot be published: on_error), gap (events were dropped before they were published) and fenced (another server publishes as this sink) wait for resume(); cloned (in a copy of the server or database, waits for resume()); waiting_for_slot (max_worker_processes); restarting (the worker ended by an error); failed (it ended so several times at its start, waits for resume()). message: why. position: all events up to there are acknowledged by Kafka; lag_events: positions from there to the head; updated_at: when it last moved. records, batches, parked (dead letters) and skipped count since the worker''s start.';
GRANT SELECT ON eventstore.sinks TO PUBLIC;

CREATE VIEW eventstore.dead_letters WITH (security_barrier) AS
SELECT d.subscription, d.source, d.collection, d.position, d.reason, d.attempts, d.created_at,
	d.id, NULL::text AS topic, NULL::integer AS partition, NULL::bigint AS record_offset,
	NULL::timestamptz AS record_time, NULL::bytea AS key, NULL::bytea AS value,
	NULL::jsonb AS headers, NULL::text AS sqlstate, NULL::text AS sink
FROM eventstore.dead_letter d
WHERE eventstore.collection_shown(d.collection)
UNION ALL
SELECT NULL, s.name, s.target, NULL, d.reason, d.attempts, d.created_at,
	d.id, d.topic, d.partition, d.record_offset,
	d.record_time, d.key, d.value,
	d.headers, d.sqlstate, NULL
FROM eventstore.source_dead_letter d
	JOIN eventstore.source s ON s.id = d.source
WHERE eventstore.source_shown(s.owner, s.target)
UNION ALL
SELECT NULL, f.name, s.collection, d.position, d.reason, d.attempts, d.created_at,
	d.id, s.topic, NULL, NULL,
	NULL, NULL, NULL,
	NULL, d.sqlstate, s.name
FROM eventstore.sink_dead_letter d
	JOIN eventstore.sink s ON s.id = d.sink
	LEFT JOIN eventstore.source f ON f.id = s.changelog_of
WHERE eventstore.source_shown(s.owner, s.collection);
COMMENT ON VIEW eventstore.dead_letters IS
'Events that a subscription gave up after the last attempt, of collections that the caller may SELECT from or owns; records that a source has parked, and events that a sink has, of those that he may see.
Of a subscription: source is "subscription"; reason: "nack" or "lease expired", of the last attempt. The event itself is in the collection at that position, for as long as it is retained. A row stays until unsubscribe(); where seek() goes back, the event comes again, and may be given up again.
Of a source: source is its name, collection its target; the record as it was, with its headers ([name, value] in their order); reason and sqlstate of the last attempt. A row stays until retry_dead_letters() has written it, or drop_source().
Of a sink: sink is its name; the event is in the collection at that position. One whose reason says that events are no longer retained stands for all of them. A row stays until retry_dead_letters() has had it published, or drop_sink().
Of the publishing of a store''s changes to its changelog topic: source is the name of the source that has that topic, topic the changelog topic, collection the store''s changelog, position that of the change. A row stays until retry_dead_letters(source) has had it published, or drop_source().';
GRANT SELECT ON eventstore.dead_letters TO PUBLIC;

CREATE FUNCTION eventstore.note_owners() RETURNS trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_note_owners';
COMMENT ON FUNCTION eventstore.note_owners() IS
'Statement trigger of sources and sinks: keeps the roles that own some from being dropped. PostgreSQL shows them as having a privilege on column "owner" of the views sources and sinks.';

CREATE TRIGGER note_owners AFTER INSERT OR DELETE OR UPDATE OF owner ON eventstore.source
	FOR EACH STATEMENT EXECUTE FUNCTION eventstore.note_owners();
CREATE TRIGGER note_owners AFTER INSERT OR DELETE OR UPDATE OF owner ON eventstore.sink
	FOR EACH STATEMENT EXECUTE FUNCTION eventstore.note_owners();
