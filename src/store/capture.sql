/*
 * Capture: a changelog for any table with a primary key.
 */

/*
 * One row per captured table.  Column order is known to C (collection.h).
 * Written by C as the extension's owner.
 */
CREATE TABLE eventstore.capture_catalog (
	source regclass PRIMARY KEY,
	changelog regclass NOT NULL,
	shared boolean NOT NULL
);
CREATE INDEX capture_catalog_changelog ON eventstore.capture_catalog (changelog);
COMMENT ON TABLE eventstore.capture_catalog IS
'The captured tables of this database with their changelogs; shared where the changelog was named by the caller. Internal.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.capture_catalog', '');

CREATE FUNCTION eventstore.capture(source_table regclass, collection regclass = null) RETURNS regclass
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_capture';
COMMENT ON FUNCTION eventstore.capture(regclass, regclass) IS
'Gives an existing table with a primary key a changelog, and returns it: every change of a row, whoever makes it and however, is from now on also an event there, in the same transaction. Made as <table>_changelog in the table''s schema, or one of the caller''s collections, which several tables may share; its events then have a tag table:schema.name. Nobody appends to a changelog by hand (LG003).
Events: type insert, update or delete; stream = the key as text, for a composite key the JSON array of its columns (["eu", 7]); data = {"old": row or null, "new": row or null}; tags name:value for each column of the key. Times are in UTC, whatever the session says. An UPDATE of the key is a delete in the old stream and an insert in the new one, and so is a row that moves to another partition. TRUNCATE is one event of type truncate without a stream, both rows null; with a tag partition:schema.name where a partition was truncated by name. The events of a statement are appended when it ends, with its triggers.
Partitions are captured with their table; inheritance children are not. Not recorded: what is there already, DETACH and DROP of a partition, changes with session_replication_role = replica, by logical replication or with the trigger disabled, and the loss of an unlogged table''s rows in a crash. While two rows have one key (a deferrable primary key) their events mix in one stream. A virtual generated column is null.
DROP TABLE leaves the changelog, a plain collection. For the owner of the table, who needs CREATE on its schema, or the collection to be his. Locks out writers of the table until the end of the transaction.
Touches: the table''s triggers, the new collection, eventstore.capture_catalog.
Errors: 42809 not a table, or one that cannot be captured (a system catalog, an extension''s, a collection, a store), or the collection is a store''s changelog; 0A000 a temporary table; 55000 no primary key (also later, at the next change, when it was dropped); 42710 captured already; 42P07 <table>_changelog is taken; 42501 no right; 22004, 42P01; LG006, LG007. PREPARE TRANSACTION after a change of a captured table is refused.';

CREATE FUNCTION eventstore.release(source_table regclass) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_release';
COMMENT ON FUNCTION eventstore.release(regclass) IS
'Ends the capture of a table. Its changelog stays, a plain collection, and can be given to capture() again. For the owner of the table.
Errors: 42704 the table is not captured; 22004, 42P01; 42501 not the owner.';

CREATE FUNCTION eventstore.capture_record() RETURNS trigger
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_capture_record';
COMMENT ON FUNCTION eventstore.capture_record() IS
'Trigger of captured tables, after each change of a row and after TRUNCATE: adds the event to those of the statement.
Errors: 55000 the table is not captured, or has lost its primary key; 39P01 called otherwise, or by a deferrable trigger; LG006.';
