/*
 * Metrics: the views, once more, as numbers with names for a monitoring system.
 *
 * Everything comes from the views that people look at, as the caller sees them;
 * so there is nothing here that could show him more.
 */

CREATE FUNCTION eventstore.metrics(
	OUT name text,
	OUT labels jsonb,
	OUT value double precision,
	OUT help text,
	OUT kind text
) RETURNS SETOF record
LANGUAGE sql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT a.name, a.labels, a.value, a.help, a.kind FROM (
	SELECT m.name, pg_catalog.jsonb_build_object('collection', v.collection) AS labels, m.value, m.help, m.kind
	FROM eventstore.pg_stat_eventstore v
		CROSS JOIN LATERAL (VALUES
		('eventstore_collection_appends_total', 'counter',
			'Append calls, and rows of INSERT and COPY, since the server started.', v.appends::double precision),
		('eventstore_collection_events_appended_total', 'counter',
			'Events appended, those rolled back included, since the server started.', v.events::double precision),
		('eventstore_collection_version_conflicts_total', 'counter',
			'Appends refused because the stream was not at the expected version (LG001).', v.version_conflicts::double precision),
		('eventstore_collection_condition_failures_total', 'counter',
			'Appends refused because an event matched (LG002).', v.condition_failures::double precision),
		('eventstore_collection_retries_total', 'counter',
			'Appends recognised as repetitions of an earlier one.', v.retries::double precision),
		('eventstore_collection_intent_waits_total', 'counter',
			'Times an append waited for another one that its condition, or whose condition, concerned.', v.intent_waits::double precision),
		('eventstore_collection_segment_waits_total', 'counter',
			'Times an append waited for a segment to be made.', v.segment_waits::double precision),
		('eventstore_collection_reads_total', 'counter',
			'Calls of reading functions.', v.reads::double precision),
		('eventstore_collection_events_read_total', 'counter',
			'Events that reading functions returned.', v.events_read::double precision),
		('eventstore_collection_late_wakeups_total', 'counter',
			'Waiting sessions that found an event nobody had woken them for; more than 0 is a fault.', v.late_wakeups::double precision),
		('eventstore_collection_head_position', 'gauge',
			'The highest position that may be read; absent until the collection is used.', v.head::double precision),
		('eventstore_collection_last_allotted_position', 'gauge',
			'The highest position given to an append.', v.last_allotted::double precision),
		('eventstore_collection_open_transactions', 'gauge',
			'Open transactions that have appended.', v.in_flight::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('collection', v.collection) AS labels, m.value, m.help, m.kind
	FROM eventstore.collections v
		CROSS JOIN LATERAL (VALUES
		('eventstore_collection_size_bytes', 'gauge',
			'Size of all segments with their indexes.', v.bytes::double precision),
		('eventstore_collection_segments', 'gauge',
			'Segments, those kept ready included.', v.segments::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('collection', v.collection) AS labels, m.value, m.help, m.kind
	FROM (SELECT h.collection, EXTRACT(EPOCH FROM pg_catalog.clock_timestamp() - pg_catalog.min(h.since)) AS age
		FROM eventstore.holders h GROUP BY h.collection) v
		CROSS JOIN LATERAL (VALUES
		('eventstore_collection_head_held_seconds', 'gauge',
			'Age of the oldest open transaction that has appended; absent where there is none.', v.age::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('worker', v.worker) AS labels, m.value, m.help, m.kind
	FROM (SELECT w.worker, pg_catalog.count(w.pid) AS processes, pg_catalog.max(w.failures) AS failures,
			pg_catalog.sum(w.segments_made) AS segments_made, pg_catalog.sum(w.segments_dropped) AS segments_dropped,
			pg_catalog.sum(w.ticks) AS ticks, pg_catalog.sum(w.errors) AS errors,
			pg_catalog.sum(w.notifications) AS notifications, pg_catalog.sum(w.wakeups) AS wakeups
		FROM eventstore.pg_stat_eventstore_workers w
		WHERE w.database IS NULL OR w.database = pg_catalog.current_database() GROUP BY w.worker) v
		CROSS JOIN LATERAL (VALUES
		('eventstore_worker_processes', 'gauge',
			'Processes of this kind that run: the server''s launcher, and those of this database.', v.processes::double precision),
		('eventstore_worker_failures', 'gauge',
			'Times in a row that a process of this kind has ended by an error; the worst where there are several.', v.failures::double precision),
		('eventstore_worker_segments_made_total', 'counter',
			'Segments made.', v.segments_made::double precision),
		('eventstore_worker_segments_dropped_total', 'counter',
			'Segments dropped.', v.segments_dropped::double precision),
		('eventstore_worker_ticks_total', 'counter',
			'Heads noted in a table after a quiet time.', v.ticks::double precision),
		('eventstore_worker_errors_total', 'counter',
			'Steps that failed; the server''s log has them.', v.errors::double precision),
		('eventstore_worker_notifications_total', 'counter',
			'Notifications sent.', v.notifications::double precision),
		('eventstore_worker_wakeups_total', 'counter',
			'Waiting sessions woken.', v.wakeups::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('subscription', v.name, 'collection', v.collection) AS labels, m.value, m.help, m.kind
	FROM eventstore.subscriptions v
		CROSS JOIN LATERAL (VALUES
		('eventstore_subscription_position', 'gauge',
			'All events up to there are done with.', v.position::double precision),
		('eventstore_subscription_lag_events', 'gauge',
			'Positions from there to the head.', v.lag_events::double precision),
		('eventstore_subscription_lag_seconds', 'gauge',
			'Age of the oldest event that is not done with.', v.lag_seconds::double precision),
		('eventstore_subscription_members', 'gauge',
			'Members that hold a lease.', v.members::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('source', v.name) AS labels, m.value, m.help, m.kind
	FROM eventstore.sources v
		CROSS JOIN LATERAL (VALUES
		('eventstore_source_records_total', 'counter',
			'Records read from the topic since the worker started.', v.records::double precision),
		('eventstore_source_batches_total', 'counter',
			'Transactions that wrote them.', v.batches::double precision),
		('eventstore_source_parked_total', 'counter',
			'Records that became dead letters.', v.parked::double precision),
		('eventstore_source_skipped_total', 'counter',
			'Records passed over.', v.skipped::double precision),
		('eventstore_source_changelog_lag_events', 'gauge',
			'Positions of the store''s changelog that are not in the changelog topic yet.', v.changelog_lag::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('source', v.name, 'state', v.state) AS labels, m.value, m.help, m.kind
	FROM eventstore.sources v
		CROSS JOIN LATERAL (VALUES
		('eventstore_source_state', 'gauge',
			'1 for the state that the source is in.', 1::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('source', v.source, 'topic', v.topic, 'partition', v.partition) AS labels, m.value, m.help, m.kind
	FROM eventstore.source_partitions v
		CROSS JOIN LATERAL (VALUES
		('eventstore_source_partition_position', 'gauge',
			'The offset of the next record.', v.position::double precision),
		('eventstore_source_partition_end_position', 'gauge',
			'The end of the partition, as last heard of.', v.end_position::double precision),
		('eventstore_source_partition_lag_records', 'gauge',
			'Offsets between the two.', v.lag_records::double precision),
		('eventstore_source_partition_lag_seconds', 'gauge',
			'Age of the last record written where there are more; 0 where there are none.', v.lag_seconds::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('source', v.source) AS labels, m.value, m.help, m.kind
	FROM (SELECT g.source, pg_catalog.count(*) AS gaps FROM eventstore.gaps g GROUP BY g.source) v
		CROSS JOIN LATERAL (VALUES
		('eventstore_source_gaps', 'gauge',
			'Ranges of records that were gone before they could be read.', v.gaps::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('sink', v.name) AS labels, m.value, m.help, m.kind
	FROM eventstore.sinks v
		CROSS JOIN LATERAL (VALUES
		('eventstore_sink_records_total', 'counter',
			'Events published since the worker started.', v.records::double precision),
		('eventstore_sink_batches_total', 'counter',
			'Flushes that were acknowledged.', v.batches::double precision),
		('eventstore_sink_parked_total', 'counter',
			'Events that became dead letters.', v.parked::double precision),
		('eventstore_sink_skipped_total', 'counter',
			'Events passed over.', v.skipped::double precision),
		('eventstore_sink_position', 'gauge',
			'All events up to there are acknowledged by Kafka.', v.position::double precision),
		('eventstore_sink_lag_events', 'gauge',
			'Positions from there to the head.', v.lag_events::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_build_object('sink', v.name, 'state', v.state) AS labels, m.value, m.help, m.kind
	FROM eventstore.sinks v
		CROSS JOIN LATERAL (VALUES
		('eventstore_sink_state', 'gauge',
			'1 for the state that the sink is in.', 1::double precision)
		) AS m (name, kind, help, value)
	UNION ALL
	SELECT m.name, pg_catalog.jsonb_strip_nulls(pg_catalog.jsonb_build_object('subscription', v.subscription, 'source', v.source, 'sink', v.sink)) AS labels, m.value, m.help, m.kind
	FROM (SELECT CASE WHEN d.sink IS NULL AND d.topic IS NULL THEN d.subscription END AS subscription,
			CASE WHEN d.topic IS NOT NULL THEN d.source END AS source, d.sink, pg_catalog.count(*) AS letters
		FROM eventstore.dead_letters d GROUP BY 1, 2, 3) v
		CROSS JOIN LATERAL (VALUES
		('eventstore_dead_letters', 'gauge',
			'Dead letters kept.', v.letters::double precision)
		) AS m (name, kind, help, value)
	) a
	WHERE a.value IS NOT NULL
	ORDER BY a.name, a.labels::pg_catalog.text COLLATE "C";
END;
COMMENT ON FUNCTION eventstore.metrics() IS
'What the views of this database say that can be counted, a row for each number, by name: its labels, its value, what it means, and whether it is a counter (only grows, and begins again at 0 with the server or the worker) or a gauge. Of the collections, subscriptions, sources and sinks that the caller may see. What is not known has no row.';

CREATE FUNCTION eventstore.prometheus() RETURNS text
LANGUAGE sql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
SET extra_float_digits = 1
BEGIN ATOMIC
	SELECT COALESCE(pg_catalog.string_agg(f.family, '' ORDER BY f.name COLLATE "C"), '') FROM (
		SELECT s.name, pg_catalog.concat(
			'# HELP ', s.name, ' ', s.help, E'\n',
			'# TYPE ', s.name, ' ', s.kind, E'\n',
			pg_catalog.string_agg(s.name || COALESCE('{' || s.labels || '}', '') || ' ' || s.value || E'\n', ''
				ORDER BY s.labels COLLATE "C")) AS family
		FROM (SELECT m.name, m.help, m.kind,
				pg_catalog.replace(m.value::pg_catalog.text, 'Infinity', '+Inf') AS value,
				(SELECT pg_catalog.string_agg(l.key || '="' ||
						pg_catalog.replace(pg_catalog.replace(pg_catalog.replace(
							l.value, E'\\', E'\\\\'), '"', E'\\"'), E'\n', E'\\n') || '"',
						',' ORDER BY l.key)
					FROM pg_catalog.jsonb_each_text(m.labels) l) AS labels
			FROM eventstore.metrics() m) s
		GROUP BY s.name, s.help, s.kind) f;
END;
COMMENT ON FUNCTION eventstore.prometheus() IS
'metrics() as Prometheus reads it (text exposition format 0.0.4), for an exporter, or for whoever serves it by HTTP.';
