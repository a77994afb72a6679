/*
 * The schema, the types that everything speaks, and the extension's own tables.
 */

CREATE SCHEMA eventstore;
COMMENT ON SCHEMA eventstore IS
'Event collections: append, read and follow, never skipping an event.';

CREATE TYPE eventstore.event AS (
	position bigint,
	stream text COLLATE "C",
	version bigint,
	id uuid,
	type text COLLATE "C",
	tags text[] COLLATE "C",
	data jsonb,
	body bytea,
	metadata jsonb,
	created_at timestamptz
);
COMMENT ON TYPE eventstore.event IS
'An event as every reading function returns it.';

CREATE TYPE eventstore.new_event AS (
	type text,
	data jsonb,
	tags text[],
	stream text,
	metadata jsonb,
	body bytea,
	id uuid,
	created_at timestamptz,
	expected_version bigint
);
COMMENT ON TYPE eventstore.new_event IS
'An event to append, for append_array. expected_version is the version of its stream just before this event; null fields are absent.';

CREATE TYPE eventstore.appended AS (
	position bigint,
	version bigint,
	id uuid
);
COMMENT ON TYPE eventstore.appended IS
'Where an appended event came to stand: its position in the collection, its version in its stream (null without one), its id.';

CREATE SEQUENCE eventstore.incarnation_seq;
SELECT pg_catalog.pg_extension_config_dump('eventstore.incarnation_seq', '');

/*
 * One row per collection.  Column order is known to C (collection.h).
 * Written by C as the extension's owner; read by others through the views.
 */
CREATE TABLE eventstore.collection_catalog (
	collection regclass PRIMARY KEY,
	heads regclass NOT NULL,
	counter regclass NOT NULL,
	incarnation bigint NOT NULL,
	first_position bigint NOT NULL DEFAULT 1,
	segment_size bigint NOT NULL,
	retain_events bigint,
	retain_for interval,
	retain_bytes bigint,
	notify text NOT NULL,
	channel text NOT NULL,
	heartbeat interval,
	feed_reads boolean
);
COMMENT ON TABLE eventstore.collection_catalog IS
'The collections of this database: options and companions. Internal: use the view collections.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.collection_catalog', '');

/*
 * The head as of the last quiet moment, for snapshots that shared memory
 * cannot help (REPEATABLE READ, a standby).  Written by the worker; not dumped,
 * since a restored collection's worker writes its own.
 */
CREATE TABLE eventstore.tick (
	collection oid PRIMARY KEY,
	head bigint NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0);
COMMENT ON TABLE eventstore.tick IS
'Per collection, a head that holds for every snapshot that sees the row. Internal.';
