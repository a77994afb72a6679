-- verify of a store: where table and changelog disagree; and who listens to a store.

\set VERBOSITY default
CREATE SCHEMA store_verify;
SET search_path = store_verify;
SET timezone = 'UTC';

SELECT eventstore.create_store('kv');
SELECT count(eventstore.put('kv', k, to_jsonb(k))) FROM unnest('{same,value,version,at,gone,deleted,back}'::text[]) k;
SELECT eventstore.delete('kv', 'deleted'), eventstore.delete('kv', 'back');
SELECT eventstore.put('kv', 'back', '1');
SELECT * FROM eventstore.verify('kv');
SELECT * FROM eventstore.verify('kv_changelog');

-- What somebody does who switches the triggers off
ALTER TABLE kv DISABLE TRIGGER USER;
UPDATE kv SET value = '"another"' WHERE key = 'value';
UPDATE kv SET version = 7 WHERE key = 'version';
UPDATE kv SET updated_at = '2001-02-03 04:05:06+00' WHERE key = 'at';
DELETE FROM kv WHERE key = 'gone';
INSERT INTO kv (key, value, version) VALUES ('deleted', '1', 1), ('unknown', '1', NULL);
SELECT * FROM eventstore.verify('kv') ORDER BY position, problem;
SELECT * FROM eventstore.verify('kv_changelog') EXCEPT SELECT * FROM eventstore.verify('kv');
SELECT * FROM eventstore.verify('kv', after => 2, before => 5) ORDER BY position, problem;
SELECT item, ok, advice FROM eventstore.doctor() WHERE item LIKE 'store store_verify.%';
ALTER TABLE kv ENABLE TRIGGER USER;
SELECT item, ok, advice FROM eventstore.doctor() WHERE item LIKE 'store store_verify.%';
SELECT eventstore.rebuild('kv');
SELECT * FROM eventstore.verify('kv');

-- The other formats
SELECT eventstore.create_store('words', format => 'text');
SELECT eventstore.create_store('blobs', format => 'bytes', key_format => 'bytes');
SELECT eventstore.put_text('words', 'a', 'ä'), eventstore.put_text('words', 'b', ''), eventstore.put_bytes('blobs', '\x0001', '\x00'), eventstore.put_bytes('blobs', '\xff', '\xff');
SELECT * FROM eventstore.verify('words');
SELECT * FROM eventstore.verify('blobs');
ALTER TABLE words DISABLE TRIGGER USER;
ALTER TABLE blobs DISABLE TRIGGER USER;
UPDATE words SET value = 'a' WHERE key = 'a';
UPDATE blobs SET value = '\x' WHERE key = '\x0001';
DELETE FROM blobs WHERE key = '\xff';
SELECT * FROM eventstore.verify('words');
SELECT * FROM eventstore.verify('blobs') ORDER BY position;

-- No changelog, no store, no right
SELECT eventstore.create_store('bare', changelog => false);
SELECT * FROM eventstore.verify('bare');
SELECT * FROM eventstore.verify('pg_class');
CREATE ROLE store_verify_user;
GRANT USAGE ON SCHEMA store_verify TO store_verify_user;
GRANT SELECT ON kv_changelog TO store_verify_user;
SET ROLE store_verify_user;
SELECT * FROM eventstore.verify('kv');
SELECT * FROM eventstore.verify('kv_changelog');
RESET ROLE;
GRANT SELECT ON kv TO store_verify_user;
SET ROLE store_verify_user;
SELECT * FROM eventstore.verify('kv');
RESET ROLE;
ALTER TABLE kv ENABLE ROW LEVEL SECURITY;
SET ROLE store_verify_user;
SELECT * FROM eventstore.verify('kv_changelog');
RESET ROLE;

-- Who listens to a store, or waits for it, does so for its changelog.
SELECT channel = (SELECT channel FROM eventstore.collections WHERE collection = 'kv_changelog'::regclass) AS same, head = eventstore.head('kv_changelog') AS head
FROM eventstore.listen('kv');
UNLISTEN *;
SELECT eventstore.wait_for('kv', 0) = eventstore.head('kv_changelog') AS head;
CALL eventstore.await('kv', 0);
SELECT eventstore.listen('bare');
SELECT eventstore.wait_for('bare', 0);
SET ROLE store_verify_user;
SELECT eventstore.listen('words');
RESET ROLE;
SELECT eventstore.drop_store('kv');
SELECT * FROM eventstore.listen('pg_class');

SET client_min_messages = warning;
DROP OWNED BY store_verify_user;
DROP ROLE store_verify_user;
DROP SCHEMA store_verify CASCADE;
