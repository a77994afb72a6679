-- making collections, their options and views, and DDL as on any table
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA sales;

-- ---- names ----
SELECT eventstore.create_collection('plain');
SELECT eventstore.create_collection('sales.orders');
SELECT eventstore.create_collection('"With Space"');
SELECT eventstore.create_collection('sales."ünï.codé"');
SELECT eventstore.create_collection('Folded');
-- as long as a name can be
SELECT eventstore.create_collection(repeat('n', 63));
SELECT position FROM eventstore.append(repeat('n', 63)::regclass, 'x', stream => 's');
SELECT eventstore.create_collection('plain');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('nowhere.orders');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection(null);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('"open');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('public.""');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('a.b.c.d');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('pg_catalog.orders');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('pg_temp.orders');
\echo :LAST_ERROR_SQLSTATE
CREATE TABLE taken (i int);
SELECT eventstore.create_collection('taken');
\echo :LAST_ERROR_SQLSTATE
-- what belongs to it has a name too
CREATE TABLE pair_heads (i int);
SELECT eventstore.create_collection('pair');
SELECT position, version FROM eventstore.append('pair', 'x', stream => 's');
SELECT stream, version FROM eventstore.streams('pair');
SELECT eventstore.drop_collection('pair');
SELECT count(*) FROM pair_heads;
DROP TABLE pair_heads, taken;
-- a schema in the search_path
SET search_path = sales, public;
SELECT eventstore.create_collection('here');
RESET search_path;
SELECT eventstore.drop_collection('sales.here');

-- ---- what it is ----
SELECT attname, format_type(atttypid, atttypmod) AS type, collname, attnotnull, pg_get_expr(adbin, adrelid) AS "default"
FROM pg_attribute a LEFT JOIN pg_collation c ON c.oid = attcollation AND c.collname <> 'default'
	LEFT JOIN pg_attrdef d ON adrelid = attrelid AND adnum = attnum
WHERE attrelid = 'plain'::regclass AND attnum > 0 ORDER BY attnum;
SELECT tgname, tgenabled FROM pg_trigger WHERE tgrelid = 'plain'::regclass ORDER BY 1;
SELECT conname, contype, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'plain'::regclass AND contype <> 'n' ORDER BY 1;
SELECT collection, notify, channel, segment_size, retain_events, retain_for, retain_bytes, heartbeat, head, events, bytes > 0 AS has_size, segments
FROM eventstore.collections ORDER BY collection::text COLLATE "C";
SELECT segment, first_position, last_position, events, bytes > 0 AS has_size FROM eventstore.segments WHERE collection = 'plain'::regclass ORDER BY 2;
SELECT count(DISTINCT incarnation) = count(*) AS distinct_incarnations FROM eventstore.collections;

-- ---- options at the creation ----
SELECT eventstore.create_collection('opted', 500, retain_events => 1000, retain_for => '7 days', retain_bytes => 1000000000, notify => 'none', channel => 'mine');
SELECT notify, channel, segment_size, retain_events, retain_for, retain_bytes FROM eventstore.collections WHERE collection = 'opted'::regclass;
SELECT eventstore.create_collection('bad', segment_size => 0);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('bad', segment_size => -1);
SELECT eventstore.create_collection('bad', segment_size => 9223372036854775807);
SELECT eventstore.create_collection('bad', retain_events => 0);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('bad', retain_for => '-1 day');
SELECT eventstore.create_collection('bad', retain_for => '0');
SELECT eventstore.create_collection('bad', retain_bytes => -5);
SELECT eventstore.create_collection('bad', notify => 'loudly');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('bad', channel => '');
SELECT eventstore.create_collection('bad', channel => repeat('c', 64));
SELECT to_regclass('bad');

-- ---- set_option ----
SELECT eventstore.set_option('opted', 'segment_size', '2000');
SELECT eventstore.set_option('opted', 'retain_events', null);
SELECT eventstore.set_option('opted', 'retain_for', '1 month');
SELECT eventstore.set_option('opted', 'retain_bytes', '5000');
SELECT eventstore.set_option('opted', 'notify', 'streams');
SELECT eventstore.set_option('opted', 'channel', null);
SELECT eventstore.set_option('opted', 'heartbeat', '30 s');
SELECT notify, channel, segment_size, retain_events, retain_for, retain_bytes, heartbeat FROM eventstore.collections WHERE collection = 'opted'::regclass;
SELECT eventstore.set_option('opted', 'segment_size', null);
SELECT eventstore.set_option('opted', 'notify', null);
SELECT eventstore.set_option('opted', 'heartbeat', null);
SELECT notify, segment_size, heartbeat FROM eventstore.collections WHERE collection = 'opted'::regclass;
SELECT eventstore.set_option('opted', 'colour', 'red');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.set_option('opted', 'Notify', 'head');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.set_option('opted', 'segment_size', 'many');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.set_option('opted', 'segment_size', '0');
SELECT eventstore.set_option('opted', 'segment_size', '1.5');
SELECT eventstore.set_option('opted', 'segment_size', '99999999999999999999');
SELECT eventstore.set_option('opted', 'retain_events', '-3');
SELECT eventstore.set_option('opted', 'retain_for', 'soon');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.set_option('opted', 'heartbeat', '0');
SELECT eventstore.set_option('opted', 'notify', 'all');
SELECT eventstore.set_option('opted', 'channel', '');
SELECT eventstore.set_option('opted', null, 'x');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.set_option(null, 'notify', 'head');
SELECT eventstore.set_option('pg_class', 'notify', 'head');
\echo :LAST_ERROR_SQLSTATE
-- modes that publish events say so, and not where rows are secret
SET client_min_messages = notice;
SELECT eventstore.set_option('plain', 'notify', 'events');
SET client_min_messages = warning;
ALTER TABLE opted ENABLE ROW LEVEL SECURITY;
SELECT eventstore.set_option('opted', 'notify', 'streams');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.set_option('opted', 'notify', 'none');
-- it is transactional
BEGIN;
SELECT eventstore.set_option('plain', 'notify', 'none');
ROLLBACK;
SELECT notify FROM eventstore.collections WHERE collection = 'plain'::regclass;
SELECT eventstore.drop_collection('opted');

-- ---- truncate_before ----
SELECT eventstore.create_collection('cut', segment_size => 10);
SELECT max(position) FROM eventstore.append_batch('cut', (SELECT jsonb_agg(jsonb_build_object('type', 'e', 'stream', 's' || i % 2)) FROM generate_series(1, 35) i));
SELECT eventstore.truncate_before('cut', 1);
SELECT eventstore.truncate_before('cut', 10);
BEGIN;
SELECT eventstore.truncate_before('cut', 25);
SELECT min(position) FROM eventstore.read('cut');
SAVEPOINT a;
SELECT eventstore.truncate_before('cut', 31);
ROLLBACK TO a;
SELECT min(position) FROM eventstore.read('cut');
ROLLBACK;
SELECT min(position) FROM eventstore.read('cut');
SELECT eventstore.truncate_before('cut', 21);
SELECT min(position), count(*) FROM eventstore.read('cut');
SELECT min(first_position) FROM eventstore.segments WHERE collection = 'cut'::regclass;
SELECT events FROM eventstore.collections WHERE collection = 'cut'::regclass;
SELECT position FROM eventstore.read('cut', after => 20, max_count => 1);
SELECT position FROM eventstore.read('cut', after => 19);
\echo :LAST_ERROR_SQLSTATE
-- it never goes back, and never takes the segment of the next position
SELECT eventstore.truncate_before('cut', 5);
SELECT eventstore.truncate_before('cut', 9223372036854775807);
SELECT count(*) FROM eventstore.read('cut');
SELECT version FROM eventstore.append('cut', 'e', stream => 's0', expected_version => 17);
SELECT version FROM eventstore.read_stream('cut', 's1', from_version => 16);
SELECT * FROM eventstore.read_stream('cut', 's1', from_version => 2);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.truncate_before('cut', -1);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.truncate_before('cut', null);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.truncate_before(null, 1);
SELECT eventstore.truncate_before('pg_class', 1);
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.verify('cut');
-- an empty one
SELECT eventstore.truncate_before('plain', 1000);
SELECT position FROM eventstore.append('plain', 'first');
SELECT eventstore.drop_collection('cut');

-- ---- rename, schema, owner ----
CREATE ROLE es_owner;
GRANT USAGE, CREATE ON SCHEMA sales TO es_owner;
SELECT version FROM eventstore.append('plain', 'x', stream => 's');
ALTER TABLE plain RENAME TO renamed;
SELECT version FROM eventstore.append('renamed', 'x', stream => 's');
INSERT INTO renamed (type, stream) VALUES ('x', 's') RETURNING version;
SELECT position, version FROM eventstore.read('renamed');
ALTER TABLE renamed SET SCHEMA sales;
SELECT version FROM eventstore.append('sales.renamed', 'x', stream => 's');
SELECT collection, channel FROM eventstore.collections WHERE collection = 'sales.renamed'::regclass;
ALTER TABLE sales.renamed OWNER TO es_owner;
-- what belongs to it follows
SELECT c.relkind, n.nspname, pg_get_userbyid(c.relowner) AS owner, count(*)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname ~ '^(plain|renamed)' GROUP BY 1, 2, 3 ORDER BY 1, 2, 3;
SET ROLE es_owner;
SELECT version FROM eventstore.append('sales.renamed', 'x', stream => 's');
SELECT eventstore.set_option('sales.renamed', 'retain_events', '10');
-- a new name does not stand in the way of another one
RESET ROLE;
SELECT eventstore.create_collection('plain');
SELECT position, version FROM eventstore.append('plain', 'x', stream => 's');
SELECT * FROM eventstore.verify('sales.renamed');
-- segments yet to come are made under the new name and owner
SELECT count(*) FROM eventstore.create_collection('moved', segment_size => 5);
ALTER TABLE moved RENAME TO moved_on;
ALTER TABLE moved_on OWNER TO es_owner;
-- who, though, has to have the right to make them
SELECT advice FROM eventstore.doctor() WHERE NOT ok AND item LIKE '%owner%';
GRANT CREATE ON SCHEMA public TO es_owner;
SELECT advice FROM eventstore.doctor() WHERE NOT ok AND item LIKE '%owner%';
SELECT max(position) FROM eventstore.append_batch('moved_on', (SELECT jsonb_agg('{"type": "e"}'::jsonb) FROM generate_series(1, 60)));
SELECT DISTINCT pg_get_userbyid(c.relowner) AS owner FROM eventstore.segments s JOIN pg_class c ON c.oid = s.segment WHERE s.collection = 'moved_on'::regclass;
ALTER TABLE moved_on RENAME COLUMN data TO payload;
SELECT * FROM eventstore.append('moved_on', 'x');
\echo :LAST_ERROR_SQLSTATE
ALTER TABLE moved_on RENAME COLUMN payload TO data;
SELECT position FROM eventstore.append('moved_on', 'x');
ALTER TABLE moved_on ADD COLUMN extra int, ADD CONSTRAINT small CHECK (extra < 10);
SELECT position FROM eventstore.append('moved_on', 'x');
INSERT INTO moved_on (type, extra) VALUES ('x', 5) RETURNING position;
\set VERBOSITY terse
INSERT INTO moved_on (type, extra) VALUES ('x', 50);
\set VERBOSITY default
\echo :LAST_ERROR_SQLSTATE
SELECT max(position) - 64 AS more FROM eventstore.append_batch('moved_on', (SELECT jsonb_agg('{"type": "e"}'::jsonb) FROM generate_series(1, 60)));
SELECT * FROM eventstore.verify('moved_on');
DROP TABLE moved_on;
-- nor does a segment that was detached, and is not gone yet, stand in the way
SELECT eventstore.create_collection('parted_with', segment_size => 10);
ALTER TABLE parted_with DETACH PARTITION parted_with_1;
DROP TABLE parted_with;
DROP TABLE parted_with_1;

-- ---- dropping ----
SELECT eventstore.drop_collection('sales.renamed');
SELECT eventstore.drop_collection('pg_class');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.drop_collection(null);
\echo :LAST_ERROR_SQLSTATE
CREATE VIEW dependent AS SELECT type FROM plain;
SELECT eventstore.drop_collection('plain');
\echo :LAST_ERROR_SQLSTATE
DROP TABLE plain;
DROP TABLE plain CASCADE;
-- nothing of them is left, whichever way they went
SELECT relname FROM pg_class WHERE relname ~ '^(plain|renamed|moved|cut|opted)' ORDER BY 1;
SELECT count(*) FROM eventstore.collection_catalog c WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = c.collection);
SELECT count(*) FROM eventstore.tick t WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = t.collection);
-- a new one begins at 1, with an incarnation of its own
SELECT eventstore.create_collection('again');
SELECT position, version FROM eventstore.append('again', 'x', stream => 's');
SELECT incarnation AS before FROM eventstore.collections WHERE collection = 'again'::regclass \gset
SELECT eventstore.drop_collection('again');
SELECT eventstore.create_collection('again');
SELECT position, version FROM eventstore.append('again', 'x', stream => 's', expected_version => 0);
SELECT incarnation > :before AS newer FROM eventstore.collections WHERE collection = 'again'::regclass;
SELECT * FROM eventstore.read('again', after => 100);
\echo :LAST_ERROR_SQLSTATE
-- within a transaction, and taken back
BEGIN;
SELECT eventstore.drop_collection('again');
SELECT eventstore.create_collection('again');
SELECT position FROM eventstore.append('again', 'x', stream => 's');
SELECT position FROM eventstore.read('again');
SAVEPOINT a;
DROP TABLE again;
SELECT to_regclass('again');
ROLLBACK TO a;
SELECT position FROM eventstore.append('again', 'x', stream => 's');
ROLLBACK;
SELECT position FROM eventstore.append('again', 'x', stream => 's');
SELECT position, version FROM eventstore.read('again');
BEGIN;
SELECT eventstore.create_collection('never');
SELECT position FROM eventstore.append('never', 'x');
ROLLBACK;
SELECT to_regclass('never');
BEGIN;
SELECT eventstore.create_collection('joint', segment_size => 3);
SELECT max(position) FROM eventstore.append_batch('joint', (SELECT jsonb_agg('{"type": "e"}'::jsonb) FROM generate_series(1, 40)));
INSERT INTO joint (type) VALUES ('x') RETURNING position;
SELECT count(*) FROM eventstore.read('joint');
COMMIT;
SELECT position FROM eventstore.append('joint', 'x');
SELECT * FROM eventstore.verify('joint');
-- schemas and roles take theirs along
DROP SCHEMA sales CASCADE;
CREATE SCHEMA es_own AUTHORIZATION es_owner;
SET ROLE es_owner;
SELECT eventstore.create_collection('es_own.mine');
SELECT position FROM eventstore.append('es_own.mine', 'x', stream => 's');
RESET ROLE;
DROP OWNED BY es_owner;
DROP ROLE es_owner;
SELECT count(*) FROM eventstore.collection_catalog c WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = c.collection);

-- ---- repair_collection ----
-- on a sound one it changes nothing that is seen
SELECT version FROM eventstore.append_batch('again', '[{"type": "a", "stream": "s"}, {"type": "a", "stream": "t"}, {"type": "a"}]');
SELECT eventstore.repair_collection('again');
SELECT stream, version, first_position, last_position FROM eventstore.streams('again');
SELECT count(*) FROM eventstore.read('again');
SELECT position > 5 AS beyond, version FROM eventstore.append('again', 'x', stream => 't', expected_version => 1);
SELECT * FROM eventstore.verify('again');
-- one that lost its heads
DELETE FROM again_heads;
SELECT count(*) > 0 AS found FROM eventstore.verify('again');
SELECT eventstore.repair_collection('again');
SELECT * FROM eventstore.verify('again');
SELECT version FROM eventstore.append('again', 'x', stream => 's');
-- in a transaction that appends, before and after, and taken back or not
BEGIN;
SELECT version FROM eventstore.append('again', 'x', stream => 's', expected_version => 4);
SELECT eventstore.repair_collection('again');
SELECT version FROM eventstore.append('again', 'x', stream => 's', expected_version => 5);
SELECT count(*) FROM eventstore.read_stream('again', 's');
ROLLBACK;
SELECT version FROM eventstore.append('again', 'x', stream => 's', expected_version => 4);
BEGIN;
SELECT eventstore.repair_collection('again');
SAVEPOINT a;
SELECT version FROM eventstore.append('again', 'x', stream => 's', expected_version => 5);
ROLLBACK TO a;
SELECT version FROM eventstore.append('again', 'x', stream => 's', expected_version => 5);
COMMIT;
SELECT version FROM eventstore.append('again', 'x', stream => 's', expected_version => 6);
SELECT count(*) = (SELECT count(*) FROM again) AS all_read FROM eventstore.read('again');
SELECT * FROM eventstore.verify('again');
SELECT count(*) FROM eventstore.holders;
SELECT eventstore.repair_collection('pg_class');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.repair_collection(null);
\echo :LAST_ERROR_SQLSTATE
CREATE TABLE lookalike (position bigint, stream text) PARTITION BY RANGE (position);
SELECT eventstore.repair_collection('lookalike');
\echo :LAST_ERROR_SQLSTATE
DROP TABLE lookalike;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT eventstore.repair_collection('again');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
SELECT eventstore.drop_collection('again');
SELECT eventstore.drop_collection('joint');
SELECT eventstore.drop_collection('"With Space"');
SELECT eventstore.drop_collection('folded');
SELECT eventstore.drop_collection(repeat('n', 63)::regclass);
SELECT count(*) FROM eventstore.collection_catalog;
SELECT count(*) FROM eventstore.segment_disposal d WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = d.collection);
