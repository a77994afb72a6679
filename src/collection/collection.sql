/*
 * Collections: creating, changing and dropping them, and what there is.
 */

GRANT USAGE ON SCHEMA eventstore TO PUBLIC;

/*
 * Segments that were let go and are to be detached and dropped.  Written by the
 * worker, which goes by it after a crash.
 */
CREATE TABLE eventstore.segment_disposal (
	segment regclass PRIMARY KEY,
	collection regclass NOT NULL
);
COMMENT ON TABLE eventstore.segment_disposal IS
'Segments below the first kept position of their collection, on their way out. Internal.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.segment_disposal', '');

CREATE FUNCTION eventstore.create_collection(
	name text,
	segment_size bigint = 1000000,
	retain_events bigint = NULL,
	retain_for interval = NULL,
	retain_bytes bigint = NULL,
	notify text = 'head',
	channel text = NULL
) RETURNS regclass
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_create_collection';
COMMENT ON FUNCTION eventstore.create_collection(text, bigint, bigint, interval, bigint, text, text) IS
'Creates a collection: an append-only, partitioned table that the caller owns, named like "orders" or "sales.orders" (without a schema: in the first of the search_path).
segment_size: positions in a segment. retain_events, retain_for, retain_bytes: how much is kept at least (null: everything); what is older goes by whole segments. notify: head, events, streams or none. channel: for LISTEN, at most 63 bytes (null: schema.name).
Touches: the new table, its heads table and its counter, eventstore.collection_catalog.
Errors: 42P07 the name is taken; 42501 no right to CREATE in the schema; 22023 a bad value, 22004 no name; 3F000; LG006.';

CREATE FUNCTION eventstore.set_option(collection regclass, option text, value text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_set_option';
COMMENT ON FUNCTION eventstore.set_option(regclass, text, text) IS
'Sets an option of a collection, or resets it with null: segment_size (positions, of segments yet to be made), retain_events, retain_for (interval), retain_bytes (bytes), notify, channel, heartbeat (interval). Of a store, those of its changelog; and feed_reads (true: who listens hears of reads by get too, as {"collection": …, "get": {key: times}}; some are lost under load, and keys of more than 128 bytes). For its owner.
Errors: 22023 unknown option or bad value; 22004 no collection or option; 42501 not the owner, or notify "events" or "streams", or feed_reads, while row-level security is enabled; 55000 a store without a changelog; LG007.';

CREATE FUNCTION eventstore.drop_collection(collection regclass) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_drop_collection';
COMMENT ON FUNCTION eventstore.drop_collection(regclass) IS
'Drops a collection with all its events, as DROP TABLE does. For its owner. A new collection of that name starts at position 1.
Errors: 2BP01 something depends on it; 42501 not the owner; LG007.';

CREATE FUNCTION eventstore.repair_collection(collection regclass) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_repair_collection';
COMMENT ON FUNCTION eventstore.repair_collection(regclass) IS
'Makes heads, counter, segments, and whatever else is missing of a collection again from its events: after a restore of the table alone, on a former subscriber, after DROP EXTENSION. For its owner. Appends and reads wait meanwhile. Options that are lost are the defaults again.
Errors: LG007 the table does not have the columns of a collection; 42501 not the owner; 25001 not at READ COMMITTED; LG006.';

CREATE FUNCTION eventstore.truncate_before(collection regclass, before bigint) RETURNS bigint
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_truncate_before';
COMMENT ON FUNCTION eventstore.truncate_before(regclass, bigint) IS
'Lets go of the segments that lie wholly below position "before", and returns the start of the oldest one left. Never that of the next position. For readers they are gone at commit; a worker drops them soon after, without blocking appends. For its owner.
Errors: 22004 null, 22023 negative; 42501 not the owner; LG006, LG007.';

CREATE FUNCTION eventstore.append_only() RETURNS trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_append_only';
COMMENT ON FUNCTION eventstore.append_only() IS
'Statement trigger of collections and segments: refuses UPDATE, DELETE and TRUNCATE (LG003).';

CREATE FUNCTION eventstore.on_drop() RETURNS event_trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_on_drop';
COMMENT ON FUNCTION eventstore.on_drop() IS
'Event trigger: when a collection was dropped, drops its heads table and its rows in the extension''s tables.';

CREATE FUNCTION eventstore.on_alter() RETURNS event_trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_on_alter';
COMMENT ON FUNCTION eventstore.on_alter() IS
'Event trigger: after ALTER TABLE ... OWNER TO or SET SCHEMA on a collection, does the same to its segments and its heads table.';

CREATE EVENT TRIGGER eventstore_on_drop ON sql_drop
	WHEN TAG IN ('DROP TABLE', 'DROP SCHEMA', 'DROP OWNED', 'DROP EXTENSION')
	EXECUTE FUNCTION eventstore.on_drop();
COMMENT ON EVENT TRIGGER eventstore_on_drop IS
'Sweeps up after dropped event collections.';

CREATE EVENT TRIGGER eventstore_on_alter ON ddl_command_end
	WHEN TAG IN ('ALTER TABLE')
	EXECUTE FUNCTION eventstore.on_alter();
COMMENT ON EVENT TRIGGER eventstore_on_alter IS
'Lets segments and heads tables follow their event collection to another owner or schema.';

CREATE FUNCTION eventstore.collection_shown(collection regclass) RETURNS boolean
LANGUAGE c STABLE STRICT PARALLEL SAFE
AS 'MODULE_PATHNAME', 'es_collection_shown';
COMMENT ON FUNCTION eventstore.collection_shown(regclass) IS
'May the caller SELECT from the relation, or does he own it? False where there is none.';

CREATE FUNCTION eventstore.collection_head(collection regclass) RETURNS bigint
LANGUAGE c STABLE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_collection_head';
COMMENT ON FUNCTION eventstore.collection_head(regclass) IS
'The head, for views: null where the caller may not see the collection or where it is broken.';

CREATE FUNCTION eventstore.collection_events(collection regclass, first bigint, before bigint) RETURNS bigint
LANGUAGE c STABLE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_collection_events';
COMMENT ON FUNCTION eventstore.collection_events(regclass, bigint, bigint) IS
'How many events the caller sees from position "first" to below position "before"; null without the right to SELECT. Counts them one by one.';

CREATE FUNCTION eventstore.collection_segments(
	collection regclass,
	OUT segment regclass,
	OUT first_position bigint,
	OUT end_position bigint
) RETURNS SETOF record
LANGUAGE c STABLE STRICT PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_collection_segments';
COMMENT ON FUNCTION eventstore.collection_segments(regclass) IS
'The segments of a collection with their ranges (the end is exclusive), those that were let go included; none where the caller may not see it.';

CREATE VIEW eventstore.collections WITH (security_barrier) AS
SELECT
	c.collection,
	c.notify,
	c.channel,
	c.segment_size,
	c.retain_events,
	c.retain_for,
	c.retain_bytes,
	c.heartbeat,
	eventstore.collection_head(c.collection) AS head,
	eventstore.collection_events(c.collection, c.first_position, 9223372036854775807) AS events,
	(SELECT coalesce(sum(pg_catalog.pg_total_relation_size(s.segment)), 0)::bigint
		FROM eventstore.collection_segments(c.collection) s
		WHERE s.end_position > c.first_position) AS bytes,
	(SELECT count(*)
		FROM eventstore.collection_segments(c.collection) s
		WHERE s.end_position > c.first_position) AS segments,
	c.incarnation
FROM eventstore.collection_catalog c
WHERE eventstore.collection_shown(c.collection);
COMMENT ON VIEW eventstore.collections IS
'The collections that the caller may SELECT from or owns, with their options. head: nothing at or below it will still appear. events: those he sees, counted (leave the column out where that takes too long). bytes: of all segments with their indexes. segments: the empty ones kept ready included.';
GRANT SELECT ON eventstore.collections TO PUBLIC;

CREATE VIEW eventstore.segments WITH (security_barrier) AS
SELECT
	c.collection,
	s.segment,
	s.first_position,
	s.end_position - 1 AS last_position,
	eventstore.collection_events(c.collection, s.first_position, s.end_position) AS events,
	pg_catalog.pg_total_relation_size(s.segment) AS bytes
FROM eventstore.collection_catalog c
	CROSS JOIN LATERAL eventstore.collection_segments(c.collection) s
WHERE eventstore.collection_shown(c.collection)
	AND s.end_position > c.first_position;
COMMENT ON VIEW eventstore.segments IS
'The segments of the collections that the caller may SELECT from or owns: a range of positions, the events in it that he sees, its size with indexes in bytes. Empty ones are kept ready.';
GRANT SELECT ON eventstore.segments TO PUBLIC;
