/*
 * Sources: Kafka topics that feed a store or a collection.
 *
 * The tables belong to the extension's owner, and C writes them as him
 * (definition.c, progress.c); the views show each caller his part.  Column orders
 * are known to C only by name.
 */

CREATE SEQUENCE eventstore.kafka_id_seq AS integer;
SELECT pg_catalog.pg_extension_config_dump('eventstore.kafka_id_seq', '');

/*
 * system_identifier and database_oid: where it was told to run.  In a copy of the
 * server or of the database it waits to be told again.
 */
CREATE TABLE eventstore.source (
	id integer PRIMARY KEY DEFAULT pg_catalog.nextval('eventstore.kafka_id_seq'),
	name text COLLATE "C" UNIQUE NOT NULL,
	server name NOT NULL,
	owner regrole NOT NULL,
	topic text COLLATE "C" NOT NULL,
	target regclass,
	start text NOT NULL,
	partitions integer[],
	group_id text,
	replica_partitions integer[],
	mode text NOT NULL,
	value_format text NOT NULL,
	transform text,
	on_error text NOT NULL,
	on_null_key text NOT NULL,
	on_gap text NOT NULL,
	flush_count integer NOT NULL,
	flush_interval interval NOT NULL,
	changelog_topic text COLLATE "C",
	consumer_properties jsonb NOT NULL,
	producer_properties jsonb NOT NULL,
	changelog_properties jsonb NOT NULL,
	key_as text NOT NULL,
	paused boolean NOT NULL DEFAULT false,
	failure text,
	starts integer NOT NULL DEFAULT 0,
	resumes bigint NOT NULL DEFAULT 0,
	partition_count integer,
	topic_id text COLLATE "C",
	assigned integer[],
	assigned_by integer,
	assigned_after bigint,
	assigned_as bytea,
	resync boolean NOT NULL DEFAULT false,
	system_identifier bigint NOT NULL,
	database_oid oid NOT NULL,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
COMMENT ON TABLE eventstore.source IS
'The Kafka sources of this database. Internal: use the view sources.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.source', '');

/*
 * What was written, in the transaction that wrote it.  The row changes with each
 * batch, and never in a column that an index has: half of each page is left for
 * the next versions (HOT).
 */
CREATE TABLE eventstore.source_offset (
	source integer NOT NULL REFERENCES eventstore.source ON DELETE CASCADE,
	topic text COLLATE "C" NOT NULL,
	partition integer NOT NULL,
	next_offset bigint NOT NULL,
	end_offset bigint,
	resume_offset bigint,
	record_time timestamptz,
	updated_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
	PRIMARY KEY (source, topic, partition)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0.1);
COMMENT ON TABLE eventstore.source_offset IS
'How far each partition of a source''s topic has been written: the offset of the next record. Internal: use the view source_partitions.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.source_offset', '');

CREATE TABLE eventstore.source_gap (
	source integer NOT NULL REFERENCES eventstore.source ON DELETE CASCADE,
	topic text COLLATE "C" NOT NULL,
	partition integer NOT NULL,
	first_offset bigint NOT NULL,
	next_offset bigint NOT NULL,
	reason text NOT NULL,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
CREATE INDEX ON eventstore.source_gap (source);
COMMENT ON TABLE eventstore.source_gap IS
'Records that were gone from the topic before they could be read. Internal: use the view gaps.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.source_gap', '');

CREATE TABLE eventstore.source_dead_letter (
	id uuid PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
	source integer NOT NULL REFERENCES eventstore.source ON DELETE CASCADE,
	topic text COLLATE "C" NOT NULL,
	partition integer NOT NULL,
	record_offset bigint NOT NULL,
	record_time timestamptz,
	key bytea,
	value bytea,
	headers jsonb,
	sqlstate text COLLATE "C" NOT NULL,
	reason text NOT NULL,
	attempts integer NOT NULL DEFAULT 1,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
CREATE INDEX ON eventstore.source_dead_letter (source);
COMMENT ON TABLE eventstore.source_dead_letter IS
'Records that could not be written, as they were. Internal: use the view dead_letters.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.source_dead_letter', '');

CREATE FUNCTION eventstore.create_source(
	name text,
	server name,
	topic text,
	target regclass,
	start text = 'earliest',
	partitions integer[] = NULL,
	group_id text = NULL,
	replica_partitions integer[] = NULL,
	mode text = 'primary',
	value_format text = NULL,
	transform regprocedure = NULL,
	on_error text = 'park',
	on_null_key text = 'park',
	on_gap text = 'stop',
	flush_count integer = 10000,
	flush_interval interval = '1 s',
	changelog_topic text = NULL,
	consumer_properties jsonb = '{}',
	producer_properties jsonb = '{}',
	changelog_properties jsonb = '{}',
	key_as text = 'stream'
) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_create_source';
COMMENT ON FUNCTION eventstore.create_source(text, name, text, regclass, text, integer[], text, integer[], text, text, regprocedure, text, text, text, integer, interval, text, jsonb, jsonb, jsonb, text) IS
'Feeds a store or a collection from a Kafka topic, exactly once: records, offsets and dead letters are written in one transaction by a background worker, which acts as the caller (the source''s owner) in a security-restricted operation.
A store keeps the last record of each key; a null value deletes, an empty one does not. A collection gets one event for each record: type = the topic, the key as stream (key_as ''stream'') or as tag "key:..." (''tag''), topic, partition, offset, time and headers in metadata.
server: a foreign server of eventstore_kafka. start: ''earliest'', ''latest'', a time, or offsets like {"0": 42, "1": 7}; for partitions that the source has not read yet. partitions: those to read (null: all, later ones too). group_id: instead, several servers share the partitions out among themselves as a consumer group. Each reads the records of the partitions that it has, once; one that is new to a server is restored from changelog_topic, else read from start. Keys of partitions that a server has no more stay in its store as they were; with a changelog_topic SQL may change those of its own partitions only (55000). One that stops or is paused leaves at once; one that died, after session.timeout.ms (45 s). The properties partition.assignment.strategy ("cooperative-sticky" among others) and group.instance.id apply.
value_format: json, text or bytes (null: that of the store, or of the transform''s argument; json for a collection). transform: a function of one argument, from the value (jsonb, text or bytea) to what is stored; null passes the record over.
on_error (a record that cannot be decoded or written) and on_null_key (of a store''s record): park it as a dead letter, skip it, or stop. on_gap (records are gone from the topic): stop, or go on with the earliest or latest that is there; each gap is in the view gaps.
flush_count, flush_interval: a batch is written when it has so many records, or when its first record has waited so long.
changelog_topic: every change of the store, by the source or by SQL, is published there after it has committed, for each key in order, in the partition of the source''s number. Partitions that were not read here before are restored from it first, and the source goes on behind what was restored; an empty store serves then, and has what was restored recorded in its changelog in the minutes after. replica_partitions: partitions of the changelog topic that are followed; keys in these cannot be changed by SQL (55000).
mode: ''primary''; ''replica'' follows the changelog topic alone (its partitions are those in partitions), and the store takes no other changes; ''relay'' publishes what it reads to the changelog topic (each key''s records in order; in transactions; twice where the worker dies in between, unless it has a group_id) and has no target (null).
consumer_properties, producer_properties, changelog_properties: properties of librdkafka beside those of the server and of the user mapping.
Errors: 42710 the name is taken; 22023 a bad value, with librdkafka''s words; 22004 null; 42704 no such server; 42809 not a server of eventstore_kafka; 42501 no USAGE on the server, no right to write the target or to call the transform, not the owner of a store that is to follow a changelog topic; 42804 formats that do not fit; LG006, LG007 the target is neither store nor collection.';

CREATE FUNCTION eventstore.drop_source(name text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_drop_source';
COMMENT ON FUNCTION eventstore.drop_source(text) IS
'Drops a source with its offsets, gaps and dead letters, as DROP TABLE of its target does; what it has written stays. A batch that is being written is waited for, and what was restored and is not in the store''s changelog yet is recorded first. Nothing is changed in Kafka.
Errors: LG007 no such source; 42501 not the owner; 25001 something is to be recorded, at another isolation level than READ COMMITTED; 22004 null.';

CREATE FUNCTION eventstore.pause(name text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_kafka_pause';
COMMENT ON FUNCTION eventstore.pause(text) IS
'Stops the worker of a source or sink until resume(). A batch that is being written is waited for; none comes after this has committed. Of a sink: what is on its way may still arrive.
Errors: LG007 no such source or sink; 42501 not the owner; 22004 null.';

CREATE FUNCTION eventstore.resume(name text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_kafka_resume';
COMMENT ON FUNCTION eventstore.resume(text) IS
'Lets a source or sink go on: after pause(), and where it has stopped by itself. A gap in the topic that it has stopped at is accepted (the view gaps has it), a topic made anew is read from its beginning (a sink goes on with what comes from then on), a record that it has stopped at is tried again. What publishes a source''s changelog goes on with it. In a copy of the server it says that this copy is to run it.
Errors: LG007 no such source or sink; 42501 not the owner; 22004 null.';

CREATE FUNCTION eventstore.flush(name text, timeout interval = '30 s') RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_kafka_flush';
COMMENT ON FUNCTION eventstore.flush(text, interval) IS
'Has a source write now what it has read, or a sink publish what may be read, and waits for it: true when that is done (and acknowledged by Kafka), false at the timeout (also where the worker does not run, or waits for a lock of the caller''s).
Errors: LG007 no such source or sink; LG008 at the timeout, where a source''s topic, or records of it, are gone (states topic_missing, topic_recreated, gap); 42501 not the owner, nor allowed to read the target or collection; 22004 null; 22023 a negative timeout.';

CREATE FUNCTION eventstore.wait_for_source(name text, timeout interval = '30 s') RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_wait_for_source';
COMMENT ON FUNCTION eventstore.wait_for_source(text, interval) IS
'Waits until a source has written all that the topic held when this was called: true; false at the timeout. What is produced before the call can then be read by the next statement (at READ COMMITTED). With group_id: of the partitions that are its own, once the group has said which these are.
Errors: as flush().';

CREATE FUNCTION eventstore.resync(name text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_resync_source';
COMMENT ON FUNCTION eventstore.resync(text) IS
'Has a source of a store look for keys that its topic has no more, and remove them: a compacted topic forgets deleted keys, and a source that did not run meanwhile does not hear of it. Returns at once; the state in view sources is "resyncing" until the topic has been read once (nothing new is written meanwhile) and the store gone through. Keys that SQL changed last stay; in a store without a changelog, which cannot tell, they go, too. Needs SELECT on the store, and about 50 bytes of memory for each key.
Errors: LG007 no such source; 42501 not the owner; 55000 the source feeds no store, follows a changelog topic, or has a group_id; 22004 null.';

CREATE FUNCTION eventstore.retry_dead_letters(
	name text,
	ids uuid[] = NULL
) RETURNS bigint
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_retry_dead_letters';
COMMENT ON FUNCTION eventstore.retry_dead_letters(text, uuid[]) IS
'Tries dead letters again: all, or those of these ids. Run it after mending the cause.
Of a source: writes the records, oldest first, in the caller''s transaction. Returns how many are written now, and no longer dead letters; the others keep their row, with one attempt more and the new reason. In a store a record older than what the changelog last recorded of its key is dropped: it is out of date. With a changelog topic, also the changes that could not be published to it: as of a sink, but that one whose key has a later change is dropped, and one whose key is another member''s of the group stays; they count as well.
Of a sink: its worker publishes the events, in the order of their positions, once the caller''s transaction has committed. Returns how many will be. The row of one goes when Kafka has acknowledged it; else it stays, with one attempt more and the new reason. It comes behind what was published meanwhile, also of the same key: consumers can tell by es-position. With exactly_once it comes once, as all do.
Errors: LG007 no such source or sink; 42501 not the owner; 22004 null; 25001 a source''s, not at READ COMMITTED.';

CREATE FUNCTION eventstore.kafka_workers(
	kind text,
	OUT id integer,
	OUT pid integer,
	OUT process text,
	OUT state text,
	OUT since timestamptz,
	OUT message text,
	OUT records bigint,
	OUT batches bigint,
	OUT parked bigint,
	OUT skipped bigint
) RETURNS SETOF record
LANGUAGE c STABLE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_kafka_workers';
COMMENT ON FUNCTION eventstore.kafka_workers(text) IS
'What the workers of this database''s sources (kind ''source'') or sinks (''sink'') that the caller may see say of themselves, for the views.';

CREATE FUNCTION eventstore.source_shown(owner oid, target oid) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
	SELECT pg_catalog.pg_has_role(source_shown.owner, 'USAGE') OR
		COALESCE(eventstore.collection_shown(source_shown.target) AND
			NOT pg_catalog.row_security_active(source_shown.target), false);
END;
COMMENT ON FUNCTION eventstore.source_shown(oid, oid) IS
'May the caller see a source of this owner with this target? Its messages and dead letters hold keys and values, so not where row-level security hides rows of the target from him.';
