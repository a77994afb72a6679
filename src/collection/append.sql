/*
 * Appending: the functions, and what INSERT and COPY stand on.
 */

CREATE FUNCTION eventstore.append(
	collection regclass,
	type text,
	data jsonb = NULL,
	tags text[] = '{}',
	stream text = NULL,
	expected_version bigint = NULL,
	fail_if jsonb = NULL,
	after bigint = NULL,
	metadata jsonb = NULL,
	body bytea = NULL,
	id uuid = NULL,
	created_at timestamptz = NULL
) RETURNS eventstore.appended
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_append';
COMMENT ON FUNCTION eventstore.append(regclass, text, jsonb, text[], text, bigint, jsonb, bigint, jsonb, bytea, uuid, timestamptz) IS
'Appends one event and returns its position, its version in the stream (null without one) and its id.
expected_version: the stream''s last version must be this (0: no such stream), else LG001. fail_if: a query; an event after position "after" (null: from the oldest kept) that matches makes it fail with LG002; needs SELECT.
The same id again with the same expected_version, or the same fail_if and after, returns the first result. Under fail_if alone that is recognised only where the event matches its own query.
Call it as SELECT * FROM eventstore.append(...): (append(...)).* would append once per column.
Errors: 23502 no type; 23514 data with body, null or empty tag; 22023 bad argument; LG001, LG002, LG004, LG005; 55000 no segment could be made; LG006, LG007; 42501.';

CREATE FUNCTION eventstore.append_batch(
	collection regclass,
	events jsonb,
	expected_version bigint = NULL,
	fail_if jsonb = NULL,
	after bigint = NULL
) RETURNS SETOF eventstore.appended
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_append_batch';
COMMENT ON FUNCTION eventstore.append_batch(regclass, jsonb, bigint, jsonb, bigint) IS
'Appends an array of objects with the fields type, data, tags, stream, metadata, body (base64), id, created_at, expected_version; all or nothing, in consecutive positions, results in input order.
expected_version as an argument is for the one stream that all events name; as a field it is the version of the event''s stream just before it. fail_if, after and repetition as for append().
Errors: as append(); 22023 names the element and field that is unknown or has a bad value; LG003 for a position or version.';

CREATE FUNCTION eventstore.append_array(
	collection regclass,
	events eventstore.new_event[],
	expected_version bigint = NULL,
	fail_if jsonb = NULL,
	after bigint = NULL
) RETURNS SETOF eventstore.appended
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_append_array';
COMMENT ON FUNCTION eventstore.append_array(regclass, eventstore.new_event[], bigint, jsonb, bigint) IS
'Appends an array of eventstore.new_event: append_batch() without JSON around the events. Arguments, results and errors are the same.';

CREATE FUNCTION eventstore.uuid_v7() RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'es_uuid_v7';
COMMENT ON FUNCTION eventstore.uuid_v7() IS
'A new UUID of version 7 (RFC 9562): milliseconds of the clock, then random bits. The default of an event''s id.';

CREATE FUNCTION eventstore.next_position(collection regclass) RETURNS bigint
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_next_position';
COMMENT ON FUNCTION eventstore.next_position(regclass) IS
'The default of column position: takes the next position for a row of INSERT or COPY. Not to be called by hand: the position would stay a gap.
Errors: 55000 the segments that were ready when the statement began are full; 42501; LG006, LG007.';

CREATE FUNCTION eventstore.append_row() RETURNS trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_append_row';
COMMENT ON FUNCTION eventstore.append_row() IS
'Row trigger of collections: makes a row of INSERT or COPY an event. Runs after all other triggers.
Errors: LG003 for a caller''s own position or version; 23502, 23514; 40001 where the position was overtaken at the end of a segment.';
