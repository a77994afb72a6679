/*
 * Stores: the latest value of each key as a table, every change of it as events.
 */

/*
 * One row per store.  Column order is known to C (collection.h).  Written by C
 * as the extension's owner.
 */
CREATE TABLE eventstore.store_catalog (
	store regclass PRIMARY KEY,
	changelog regclass UNIQUE,
	format text NOT NULL,
	key_format text NOT NULL,
	follower integer,
	publisher integer,
	backlog text,
	backlog_due boolean NOT NULL DEFAULT false
);
COMMENT ON TABLE eventstore.store_catalog IS
'The stores of this database with their changelogs and formats. backlog: the topic from which keys were restored that are still to be recorded; backlog_due: may it be recorded now. Internal.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.store_catalog', '');

/* Keys that are in a store and not in its changelog yet (backlog.c).  Not compressed: it lives for minutes. */
CREATE TABLE eventstore.store_backlog (
	store regclass,
	id bigint,
	key_count integer NOT NULL,
	keys bytea NOT NULL,
	PRIMARY KEY (store, id)
);
ALTER TABLE eventstore.store_backlog ALTER COLUMN keys SET STORAGE EXTERNAL;
COMMENT ON TABLE eventstore.store_backlog IS
'Restored keys that are still to be recorded in their store''s changelog, with what is to be said of each: some thousand to a row. Internal.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.store_backlog', '');

CREATE VIEW eventstore.stores WITH (security_barrier) AS
SELECT s.store, s.changelog, s.format, s.key_format
FROM eventstore.store_catalog s
WHERE eventstore.collection_shown(s.store);
COMMENT ON VIEW eventstore.stores IS
'The stores that the caller may SELECT from or owns. changelog: the collection that has its changes; null for none. format: of its values, json, text or bytes. key_format: text or bytes.';
GRANT SELECT ON eventstore.stores TO PUBLIC;

CREATE FUNCTION eventstore.create_store(
	name text,
	format text = 'json',
	key_format text = 'text',
	changelog boolean = true,
	unlogged boolean = false
) RETURNS regclass
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_create_store';
COMMENT ON FUNCTION eventstore.create_store(text, text, text, boolean, boolean) IS
'Creates a store: a table (key primary key, value, version, updated_at) that the caller owns, named like "kv" or "shop.kv" (without a schema: in the first of the search_path). It takes plain SQL; version and updated_at are always the store''s own.
format of values: json (jsonb), text or bytes (bytea). key_format: text (COLLATE "C") or bytes; functions take a key of bytes as text, like \x0a. changelog: every change is also an event of the collection <name>_changelog. unlogged: faster, and empty after a crash until rebuild().
Touches: the new table and collection, eventstore.store_catalog.
Errors: 42P07 a name is taken; 42501 no right to CREATE in the schema; 22023 a bad value, 22004 no name; 3F000; LG006.';

CREATE FUNCTION eventstore.drop_store(store regclass) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_drop_store';
COMMENT ON FUNCTION eventstore.drop_store(regclass) IS
'Drops a store and its changelog. DROP TABLE drops the table alone; its changelog is then a plain collection. For the owner of both.
Errors: 2BP01 something depends on it; 22004; 42501 not the owner; LG007.';

CREATE FUNCTION eventstore.get(store regclass, key text) RETURNS jsonb
LANGUAGE c STABLE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_get';
COMMENT ON FUNCTION eventstore.get(regclass, text) IS
'The value of a key in a store of format json; null where there is no such key. Reads as a SELECT in the same statement would.
Errors: 42804 another format; 22004 null argument; 22P02 a key that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG007.';

CREATE FUNCTION eventstore.get_text(store regclass, key text) RETURNS text
LANGUAGE c STABLE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_get_text';
COMMENT ON FUNCTION eventstore.get_text(regclass, text) IS
'The value of a key in a store of format text; null where there is no such key. Reads as a SELECT in the same statement would.
Errors: 42804 another format; 22004 null argument; 22P02 a key that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG007.';

CREATE FUNCTION eventstore.get_bytes(store regclass, key text) RETURNS bytea
LANGUAGE c STABLE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_get_bytes';
COMMENT ON FUNCTION eventstore.get_bytes(regclass, text) IS
'The value of a key in a store of format bytes; null where there is no such key. Reads as a SELECT in the same statement would.
Errors: 42804 another format; 22004 null argument; 22P02 a key that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG007.';

CREATE FUNCTION eventstore.get_many(
	store regclass,
	keys text[],
	OUT key text,
	OUT value jsonb
) RETURNS SETOF record
LANGUAGE c STABLE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_get_many';
COMMENT ON FUNCTION eventstore.get_many(regclass, text[]) IS
'The keys among these that a store of format json has, with their values, in the order given.
Errors: as get(); 22004 also for a null among the keys.';

CREATE FUNCTION eventstore.put(store regclass, key text, value jsonb) RETURNS jsonb
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_put';
COMMENT ON FUNCTION eventstore.put(regclass, text, jsonb) IS
'Sets the value of a key in a store of format json, and returns the one that it replaced, null where there was none. The same value again is no change: no event, no new version.
Errors: 42804 another format; 22004 a null (SQL null is no value: delete() removes a key); 22P02 a key that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG006, LG007.';

CREATE FUNCTION eventstore.put_text(store regclass, key text, value text) RETURNS text
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_put_text';
COMMENT ON FUNCTION eventstore.put_text(regclass, text, text) IS
'Sets the value of a key in a store of format text, and returns the one that it replaced, null where there was none. The same value again is no change: no event, no new version.
Errors: 42804 another format; 22004 a null (SQL null is no value: delete_text() removes a key); 22P02 a key that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG006, LG007.';

CREATE FUNCTION eventstore.put_bytes(store regclass, key text, value bytea) RETURNS bytea
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_put_bytes';
COMMENT ON FUNCTION eventstore.put_bytes(regclass, text, bytea) IS
'Sets the value of a key in a store of format bytes, and returns the one that it replaced, null where there was none. The same value again is no change: no event, no new version.
Errors: 42804 another format; 22004 a null (SQL null is no value: delete_bytes() removes a key); 22P02 a key that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG006, LG007.';

CREATE FUNCTION eventstore.delete(store regclass, key text) RETURNS jsonb
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_delete';
COMMENT ON FUNCTION eventstore.delete(regclass, text) IS
'Removes a key from a store of format json, and returns its value; null, and no event, where there is none.
Errors: 42804 another format; 22004 null argument; 22P02 a key that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG006, LG007.';

CREATE FUNCTION eventstore.delete_text(store regclass, key text) RETURNS text
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_delete_text';
COMMENT ON FUNCTION eventstore.delete_text(regclass, text) IS
'Removes a key from a store of format text, and returns its value; null, and no event, where there is none.
Errors: 42804 another format; 22004 null argument; 22P02 a key that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG006, LG007.';

CREATE FUNCTION eventstore.delete_bytes(store regclass, key text) RETURNS bytea
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_delete_bytes';
COMMENT ON FUNCTION eventstore.delete_bytes(regclass, text) IS
'Removes a key from a store of format bytes, and returns its value; null, and no event, where there is none.
Errors: 42804 another format; 22004 null argument; 22P02 a key that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG006, LG007.';

CREATE FUNCTION eventstore.keys(store regclass, prefix text = '') RETURNS SETOF text
LANGUAGE c STABLE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_keys';
COMMENT ON FUNCTION eventstore.keys(regclass, text) IS
'The keys that begin with the prefix, which is literal, in bytewise order.
Errors: 22004 null argument; 22P02 a prefix that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG007.';

CREATE FUNCTION eventstore.delete_prefix(store regclass, prefix text) RETURNS SETOF text
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_delete_prefix';
COMMENT ON FUNCTION eventstore.delete_prefix(regclass, text) IS
'Removes the keys that begin with the prefix, which is literal, and returns them in bytewise order. An event for each.
Errors: 22004 null argument; 22P02 a prefix that is no bytes; 55000 an unlogged store that a crash has emptied; 42501; LG006, LG007.';

CREATE FUNCTION eventstore.clear(store regclass) RETURNS bigint
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_clear';
COMMENT ON FUNCTION eventstore.clear(regclass) IS
'Removes all keys and returns how many there were. An event for each.
Errors: 22004 null argument; 55000 an unlogged store that a crash has emptied; 42501; LG006, LG007.';

CREATE FUNCTION eventstore.get_at(store regclass, key text, at timestamptz) RETURNS jsonb
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_get_at';
COMMENT ON FUNCTION eventstore.get_at(regclass, text, timestamptz) IS
'The value that a key of a store of format json had at a time: that of its highest version not later; null where there was none. Needs SELECT on the changelog. For other formats read the key''s stream in the changelog.
Errors: 42804 another format; 22004 null argument; 22P02 a key that is no bytes; 55000 no changelog; LG005 the events of that time are no longer retained; 42501; LG007.';

CREATE FUNCTION eventstore.rebuild(store regclass) RETURNS bigint
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_rebuild';
COMMENT ON FUNCTION eventstore.rebuild(regclass) IS
'Makes the table of a store from its changelog again, and returns how many keys it has then. Rows that are right stay as they are, and nothing is recorded. Writers wait meanwhile, readers do not. For its owner.
Errors: 22004 null argument; 55000 no changelog; LG005 the last event of some key is no longer retained; 25001 not at READ COMMITTED; 42501 not the owner; LG006, LG007.';

CREATE FUNCTION eventstore.store_apply(
	store regclass,
	keys text[],
	new_values anyarray,
	metadata jsonb[] = null,
	times timestamptz[] = null,
	by_rows boolean = false,
	topic text = null,
	OUT inserted bigint,
	OUT updated bigint,
	OUT deleted bigint,
	OUT unchanged bigint
) RETURNS record
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_store_apply_arrays';
REVOKE EXECUTE ON FUNCTION eventstore.store_apply(regclass, text[], anyarray, jsonb[], timestamptz[], boolean, text) FROM PUBLIC;
COMMENT ON FUNCTION eventstore.store_apply(regclass, text[], anyarray, jsonb[], timestamptz[], boolean, text) IS
'Internal: what workers change a store with, for tests and measurements. A null value deletes the key; the last of a key''s changes counts. by_rows: statement by statement, however plain the store. topic: where it is restored from; an empty store that nobody else writes has it recorded later.
Errors: 42804 values of another type; 22023 arrays of different lengths; 22004 a null key; otherwise as put() and delete().';

CREATE FUNCTION eventstore.store_record_backlog(store regclass, wait boolean = false) RETURNS text
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_store_record_backlog';
REVOKE EXECUTE ON FUNCTION eventstore.store_record_backlog(regclass, boolean) FROM PUBLIC;
COMMENT ON FUNCTION eventstore.store_record_backlog(regclass, boolean) IS
'Internal: records some thousand keys of those that were restored into a store and are not in its changelog yet, as the worker does that publishes it. recorded; locked: what is left is being changed by others, whom wait makes it wait for; empty: nothing was left.
Errors: 22004; 25001 at another isolation level than READ COMMITTED; LG007.';

CREATE FUNCTION eventstore.store_version() RETURNS trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_store_version';
COMMENT ON FUNCTION eventstore.store_version() IS
'Row trigger of stores, before insert or update: gives a row its version and time. Runs after all other triggers.
Errors: 55000 an unlogged store that a crash has emptied; LG007 the table is not a store.';

CREATE FUNCTION eventstore.store_record() RETURNS trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_store_record';
COMMENT ON FUNCTION eventstore.store_record() IS
'Row trigger of stores with a changelog, after each change: appends the event. Runs before all other triggers.
Errors: LG006; LG007 the table is not a store.';

CREATE FUNCTION eventstore.store_guard() RETURNS trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_store_guard';
COMMENT ON FUNCTION eventstore.store_guard() IS
'Statement trigger of stores: refuses TRUNCATE (LG003).';

CREATE FUNCTION eventstore.on_alter_store() RETURNS event_trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_on_alter_store';
COMMENT ON FUNCTION eventstore.on_alter_store() IS
'Event trigger: after ALTER TABLE ... OWNER TO or SET SCHEMA on a store or a captured table, does the same to its changelog.';

CREATE EVENT TRIGGER eventstore_on_alter_store ON ddl_command_end
	WHEN TAG IN ('ALTER TABLE')
	EXECUTE FUNCTION eventstore.on_alter_store();
COMMENT ON EVENT TRIGGER eventstore_on_alter_store IS
'Lets changelogs follow their store or table to another owner or schema.';
