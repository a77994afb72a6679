/*
 * Reading: by position, by stream, by time over several collections.
 *
 * None of these functions is ever inlined or evaluated twice with one
 * snapshot: each takes the head first and then a snapshot of its own.
 */

CREATE FUNCTION eventstore.read(
	collection regclass,
	after bigint = NULL,
	max_count bigint = NULL,
	types text[] = NULL,
	tags text[] = NULL,
	query jsonb = NULL,
	since timestamptz = NULL,
	until timestamptz = NULL,
	before bigint = NULL,
	direction text = 'forward',
	wait interval = NULL
) RETURNS SETOF eventstore.event
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_read';
COMMENT ON FUNCTION eventstore.read(regclass, bigint, bigint, text[], text[], jsonb, timestamptz, timestamptz, bigint, text, interval) IS
'The events of a collection in the order of their positions (direction => ''backward'': the other way round), never above the head.
after and before are positions, both exclusive; after null: from the oldest that is kept.
max_count counts matching events, null = all, 0 = none.
types and tags: the type is among the types, all of the tags are there; query: [{"types": [...], "tags": [...]}, ...], any item matches; not both.
since (inclusive) and until (exclusive) filter by created_at.
wait: where nothing matches, how long to wait until one event does; then it returns at once. The statement keeps its snapshot meanwhile.
Call it in FROM, where it streams and stops at LIMIT.
Errors: LG004 after is ahead of the collection, LG005 events after it are no longer retained, LG007 not a collection, 22023 bad argument, 22004 no collection, 42501 no SELECT right, 25001 wait in a transaction above READ COMMITTED or one that has appended.';

CREATE FUNCTION eventstore.read_stream(
	collection regclass,
	stream text,
	from_version bigint = NULL,
	max_count bigint = NULL,
	direction text = 'forward',
	to_version bigint = NULL,
	types text[] = NULL,
	wait interval = NULL
) RETURNS SETOF eventstore.event
LANGUAGE c VOLATILE PARALLEL RESTRICTED ROWS 100
AS 'MODULE_PATHNAME', 'es_read_stream';
COMMENT ON FUNCTION eventstore.read_stream(regclass, text, bigint, bigint, text, bigint, text[], interval) IS
'The events of one stream in the order of their versions (direction => ''backward'': the other way round): every committed one, and the transaction''s own.
from_version and to_version are inclusive, in the direction of reading; null = the first (backward: the last). Beyond the end, and for a stream that does not exist, there are no rows.
max_count counts matching events, null = all, 0 = none; types: only events of these types.
wait: where there is none, how long to wait until there is one; then it returns at once. The statement keeps its snapshot meanwhile.
Call it in FROM, where it streams and stops at LIMIT.
Errors: LG005 from_version is no longer retained, LG007 not a collection, 22023 bad argument, 22004 no collection or stream, 42501 no SELECT right, 25001 wait in a transaction above READ COMMITTED or one that has appended.';

CREATE FUNCTION eventstore.peek(
	collection regclass,
	stream text = NULL
) RETURNS eventstore.event
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_peek';
COMMENT ON FUNCTION eventstore.peek(regclass, text) IS
'The last event of the stream, or (stream null) of the collection at or below its head; null, which is a row of nulls in FROM, where there is none, or it is no longer retained.
Call it in FROM: SELECT (eventstore.peek(...)).* calls it once for each column.
Errors: LG007 not a collection, 22004 no collection, 42501 no SELECT right.';

CREATE FUNCTION eventstore.streams(
	collection regclass,
	prefix text = ''
) RETURNS TABLE (
	stream text,
	version bigint,
	first_position bigint,
	last_position bigint,
	first_at timestamptz,
	last_at timestamptz
)
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_streams';
COMMENT ON FUNCTION eventstore.streams(regclass, text) IS
'The streams whose names begin with prefix (literally; empty or null = all), in bytewise order: last version, positions and created_at of the first event ever and of the last one.
Under row-level security: of the events that the caller sees.
Errors: LG007 not a collection, 22004 no collection, 42501 no SELECT right.';

CREATE FUNCTION eventstore.head(
	collection regclass
) RETURNS bigint
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_head';
COMMENT ON FUNCTION eventstore.head(regclass) IS
'The highest position that is safe to have read up to: nothing at or below it will still appear; 0 before the first event.
The idiom of a reader: head() first, read(after) second, and the next after is the greater of that head and the last position read.
Errors: LG007 not a collection, 22004 no collection, 42501 no SELECT right.';

CREATE FUNCTION eventstore.read_merged(
	collections regclass[],
	after jsonb = NULL,
	max_count bigint = NULL,
	types text[] = NULL,
	tags text[] = NULL,
	query jsonb = NULL,
	since timestamptz = NULL,
	until timestamptz = NULL
) RETURNS TABLE (
	collection regclass,
	cursor jsonb,
	event eventstore.event
)
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_read_merged';
COMMENT ON FUNCTION eventstore.read_merged(regclass[], jsonb, bigint, text[], text[], jsonb, timestamptz, timestamptz) IS
'The events of several collections by created_at, then by collection (its schema-qualified name, bytewise), then by position.
after: the cursor of a row, to go on after exactly that row with nothing skipped or repeated, or positions, {"sales.orders": 42}, null and absent ones being the oldest.
What is appended after the first call comes after all that was there, whatever its created_at.
Filters as for read; keep them the same from call to call.
Without max_count everything is sorted. With one (up to 65536) a session''s first call reads everything once, to learn the times; from then on a page costs what it holds, where created_at mostly grows with the position.
Errors: LG004, LG005 as for read, LG007 not a collection, 22023 bad argument or cursor, 22004 no collections, 42501 no SELECT right.';

CREATE FUNCTION eventstore.verify(
	collection regclass,
	after bigint = NULL,
	before bigint = NULL
) RETURNS TABLE (
	"position" bigint,
	stream text,
	version bigint,
	problem text
)
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_verify';
COMMENT ON FUNCTION eventstore.verify(regclass, bigint, bigint) IS
'Checks the events at positions after < position < before (both null: all that are kept) and returns one row for each fault: checksums, stream and version both there or neither, dense versions, and the heads table that agrees with the events. Of a store, or of its changelog: also each key whose row in the store is not what its last event says; position is null where there is no event.
Changes nothing; no rows: no fault.
Errors: LG007 neither a collection nor a store, 55000 a store without a changelog, 22023 bad argument, 22004 no collection, 42501 no SELECT right (on both), or row-level security applies.';
