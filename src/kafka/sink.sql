/*
 * Sinks: collections that are published to Kafka topics.
 *
 * The tables belong to the extension's owner, and C writes them as him
 * (sink_definition.c, sink_progress.c); the view shows each caller his part.
 * Column orders are known to C only by name.
 */

/*
 * name: null is one that another object uses for itself, and no view shows.
 * system_identifier and database_oid: as in eventstore.source.
 */
CREATE TABLE eventstore.sink (
	id integer PRIMARY KEY DEFAULT pg_catalog.nextval('eventstore.kafka_id_seq'),
	name text COLLATE "C" UNIQUE,
	server name NOT NULL,
	owner regrole NOT NULL,
	topic text COLLATE "C" NOT NULL,
	collection regclass,
	query jsonb,
	key text NOT NULL,
	exactly_once boolean NOT NULL,
	on_error text NOT NULL,
	flush_count integer NOT NULL,
	flush_interval interval NOT NULL,
	progress_topic text COLLATE "C",
	producer_properties jsonb NOT NULL,
	changelog_of integer UNIQUE REFERENCES eventstore.source ON DELETE CASCADE,
	paused boolean NOT NULL DEFAULT false,
	failure text,
	starts integer NOT NULL DEFAULT 0,
	resumes bigint NOT NULL DEFAULT 0,
	system_identifier bigint NOT NULL,
	database_oid oid NOT NULL,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
COMMENT ON TABLE eventstore.sink IS
'The Kafka sinks of this database. Internal: use the view sinks.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.sink', '');

/* Apart from the sink's row, for it changes all the time (HOT). */
CREATE TABLE eventstore.sink_position (
	sink integer PRIMARY KEY REFERENCES eventstore.sink ON DELETE CASCADE,
	position bigint NOT NULL,
	ends bigint[],
	topic_id text COLLATE "C",
	again_to bigint NOT NULL DEFAULT 0,
	known_to bigint NOT NULL DEFAULT 0,
	updated_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0.1);
COMMENT ON TABLE eventstore.sink_position IS
'How far each sink has come: all events up to there were acknowledged by Kafka. Internal: use the view sinks.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.sink_position', '');

CREATE TABLE eventstore.sink_dead_letter (
	id uuid PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
	sink integer NOT NULL REFERENCES eventstore.sink ON DELETE CASCADE,
	position bigint NOT NULL,
	sqlstate text COLLATE "C" NOT NULL,
	reason text NOT NULL,
	attempts integer NOT NULL DEFAULT 1,
	retry boolean NOT NULL DEFAULT false,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
CREATE UNIQUE INDEX ON eventstore.sink_dead_letter (sink, position);
COMMENT ON TABLE eventstore.sink_dead_letter IS
'Events that a sink could not publish. Internal: use the view dead_letters.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.sink_dead_letter', '');

CREATE FUNCTION eventstore.create_sink(
	name text,
	server name,
	topic text,
	collection regclass,
	query jsonb = NULL,
	key text = 'stream',
	after bigint = NULL,
	exactly_once boolean = false,
	on_error text = 'stop',
	flush_count integer = 10000,
	flush_interval interval = '100 ms',
	progress_topic text = NULL,
	producer_properties jsonb = '{}'
) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_create_sink';
COMMENT ON FUNCTION eventstore.create_sink(text, name, text, regclass, jsonb, text, bigint, boolean, text, integer, interval, text, jsonb) IS
'Publishes a collection to a Kafka topic, in the order of positions: a background worker, which acts as the caller (the sink''s owner), produces each event that matches, once it may be read and its commit is on disk.
A record''s value is the event''s data as JSON text, or its body; an event with neither has a null value. Its time is created_at; its headers are es-position, es-id, es-type, es-tags (a JSON array), es-version (of an event with a stream), es-stream (the same, where the key is something else), es-metadata (JSON, where there is some).
collection: or a store, which means its changelog. query: as in read(). key: ''stream'', ''id'', ''position'', ''type'', ''none'', ''tag:NAME'' (what follows "NAME:" in the first tag that begins so), or a function like ''my.key(eventstore.event)'' that returns text or bytea; null is a record without a key. after: the position behind which to begin (null: with the oldest event that is kept).
exactly_once: false: an event is produced again where its acknowledgement was not saved (a crash); true: each flush is a transaction of Kafka that holds its position as well, in progress_topic (null: eventstore-sink-progress; made, compacted, where it is missing), so that a consumer with isolation.level = read_committed gets each event once.
on_error (an event that Kafka refuses for good, or whose key function fails): stop, skip, or park it as a dead letter.
flush_count, flush_interval: the position is saved (or the transaction committed) when so many events were produced, or so long after the first of them.
producer_properties: properties of librdkafka beside those of the server and of the user mapping. Keys are spread over partitions as Java''s producers do (partitioner = murmur2_random), unless they say otherwise.
Errors: 42710 the name is taken; 22023 a bad value, with librdkafka''s words; 22004 null; 42704 no such server; 42809 not a server of eventstore_kafka; 42501 no USAGE on the server, no SELECT on the collection, no right to call the function; 42883 no such function; 55000 a store without a changelog; LG004, LG005 after; LG006, LG007 neither collection nor store.';

CREATE FUNCTION eventstore.drop_sink(name text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_drop_sink';
COMMENT ON FUNCTION eventstore.drop_sink(text) IS
'Drops a sink with its position and dead letters. What it has produced stays; what is on its way may still come. Nothing else is changed in Kafka.
Errors: LG007 no such sink; 42501 not the owner; 22004 null.';
