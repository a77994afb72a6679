/*
 * The index of types and tags.
 */

CREATE FUNCTION eventstore.label_index_handler(internal) RETURNS index_am_handler
AS 'MODULE_PATHNAME', 'es_label_index_handler'
LANGUAGE C STRICT PARALLEL SAFE;
COMMENT ON FUNCTION eventstore.label_index_handler(internal) IS
'Handler of the index access method eventstore_labels.';

CREATE ACCESS METHOD eventstore_labels TYPE INDEX HANDLER eventstore.label_index_handler;
COMMENT ON ACCESS METHOD eventstore_labels IS
'A B-tree of (type or tag, position), for the columns (tags, type, position) in this order. Serves tags @> ''{a,b}'', type = ''x'' and both with bounds on position; eventstore''s own readers walk it in position order.';

-- The stored types differ from the declared ones: a label is a 64-bit hash,
-- whose halves take the places of tags and type.  Support function 1 compares
-- what is stored.

CREATE OPERATOR CLASS eventstore.label_tags_ops DEFAULT FOR TYPE text[] USING eventstore_labels AS
	OPERATOR 1 pg_catalog.@> (anyarray, anyarray),
	FUNCTION 1 pg_catalog.btint4cmp(integer, integer),
	STORAGE integer;
COMMENT ON OPERATOR FAMILY eventstore.label_tags_ops USING eventstore_labels IS
'Tags in an index of labels.';
COMMENT ON OPERATOR CLASS eventstore.label_tags_ops USING eventstore_labels IS
'Tags in an index of labels: supports tags @> array.';

CREATE OPERATOR CLASS eventstore.label_type_ops DEFAULT FOR TYPE text USING eventstore_labels AS
	OPERATOR 1 pg_catalog.= (text, text),
	FUNCTION 1 pg_catalog.btint4cmp(integer, integer),
	STORAGE integer;
COMMENT ON OPERATOR FAMILY eventstore.label_type_ops USING eventstore_labels IS
'The event type in an index of labels.';
COMMENT ON OPERATOR CLASS eventstore.label_type_ops USING eventstore_labels IS
'The event type in an index of labels: supports type = text.';

-- Strategies are numbered as in a B-tree.  The narrower integers are here
-- because a literal such as 5 is one.
CREATE OPERATOR CLASS eventstore.label_position_ops DEFAULT FOR TYPE bigint USING eventstore_labels AS
	OPERATOR 1 pg_catalog.< (bigint, bigint),
	OPERATOR 2 pg_catalog.<= (bigint, bigint),
	OPERATOR 3 pg_catalog.= (bigint, bigint),
	OPERATOR 4 pg_catalog.>= (bigint, bigint),
	OPERATOR 5 pg_catalog.> (bigint, bigint),
	OPERATOR 1 pg_catalog.< (bigint, integer),
	OPERATOR 2 pg_catalog.<= (bigint, integer),
	OPERATOR 3 pg_catalog.= (bigint, integer),
	OPERATOR 4 pg_catalog.>= (bigint, integer),
	OPERATOR 5 pg_catalog.> (bigint, integer),
	FUNCTION 1 pg_catalog.btint8cmp(bigint, bigint);
COMMENT ON OPERATOR FAMILY eventstore.label_position_ops USING eventstore_labels IS
'The position in an index of labels.';
COMMENT ON OPERATOR CLASS eventstore.label_position_ops USING eventstore_labels IS
'The position in an index of labels: narrows what a type or a tag has found.';
