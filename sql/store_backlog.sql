-- What is restored into an empty store is put first and recorded later; meanwhile nothing is amiss.

\set VERBOSITY terse
CREATE SCHEMA store_backlog;
SET search_path = store_backlog;
SET check_function_bodies = off;

-- A batch of a restore, which nobody else writes beside: of each record its number in the topic.
CREATE PROCEDURE restore(first int, keys text[], new_values jsonb[], topic text = 't') LANGUAGE plpgsql AS $$
DECLARE
	done record;
BEGIN
	LOCK TABLE kv IN SHARE ROW EXCLUSIVE MODE;
	SELECT * INTO done FROM eventstore.store_apply('kv', keys, new_values,
		(SELECT array_agg(CASE WHEN i % 4 > 0 THEN jsonb_build_object('topic', topic, 'offset', i, 'pad', repeat('x', i * 3)) END ORDER BY i)
		FROM generate_series(first, first + cardinality(keys) - 1) i), topic => topic);
	COMMIT;
	RAISE NOTICE '%', done;
END $$;
CREATE FUNCTION rows() RETURNS TABLE (key text, value jsonb, version bigint) LANGUAGE sql AS
'SELECT key, value, version FROM kv ORDER BY key';
CREATE FUNCTION history(variadic keys text[]) RETURNS TABLE (stream text, version bigint, type text, data jsonb, metadata jsonb, timely boolean) LANGUAGE sql AS
'SELECT e.stream, e.version, e.type, e.data, e.metadata, s.updated_at IS NULL OR s.version <> e.version OR s.updated_at = e.created_at
FROM kv_changelog e LEFT JOIN kv s ON s.key = e.stream WHERE e.stream = ANY (keys) ORDER BY 1, 2';
CREATE FUNCTION state(OUT backlog text, OUT keys bigint, OUT events bigint, OUT faults bigint) LANGUAGE sql AS
$$SELECT c.backlog, (SELECT sum(b.key_count) FROM eventstore.store_backlog b WHERE b.store = c.store),
	(SELECT count(*) FROM kv_changelog), (SELECT count(*) FROM eventstore.verify('kv'))
FROM eventstore.store_catalog c WHERE c.store = 'kv'::regclass$$;

-- Put twice, put and deleted, deleted before it was put, without metadata, not of ASCII
SELECT eventstore.create_store('kv');
CALL restore(1, '{same,twice,gone,back,plain,plain2,never,"",änderung}', '{1,1,1,null,1,2,null,3,4}');
CALL restore(10, '{twice,gone,back,last}', '{2,null,5,6}');
CALL restore(14, '{twice}', '{2}');
SELECT * FROM rows();
SELECT * FROM state();
SELECT eventstore.get_at('kv', 'twice', now()) AS now, eventstore.get_at('kv', 'twice', '2000-01-01') AS before, eventstore.get_at('kv', 'gone', now()) AS gone;

-- It is the store's until it is recorded: for who may see both, and all of the changelog.
CREATE ROLE regress_backlog;
GRANT USAGE ON SCHEMA store_backlog TO regress_backlog;
GRANT SELECT ON kv_changelog TO regress_backlog;
SET ROLE regress_backlog;
SELECT eventstore.get_at('kv', 'twice', now()) AS no_right;
RESET ROLE;
GRANT SELECT ON kv TO regress_backlog;
SET ROLE regress_backlog;
SELECT eventstore.get_at('kv', 'twice', now()) AS both;
RESET ROLE;
ALTER TABLE kv ENABLE ROW LEVEL SECURITY;
SET ROLE regress_backlog;
SELECT eventstore.get_at('kv', 'twice', now()) AS not_this_row;
RESET ROLE;
ALTER TABLE kv DISABLE ROW LEVEL SECURITY;
ALTER TABLE kv_changelog ENABLE ROW LEVEL SECURITY;
SET ROLE regress_backlog;
SELECT eventstore.get_at('kv', 'twice', now()) AS not_all_events;
RESET ROLE;
ALTER TABLE kv_changelog DISABLE ROW LEVEL SECURITY;
DROP OWNED BY regress_backlog;
DROP ROLE regress_backlog;

-- Each change of a row finds it recorded: another value, another key, a delete, a batch.  The same value is none.
UPDATE kv SET value = '20' WHERE key = 'twice';
UPDATE kv SET value = value WHERE key = 'same';
UPDATE kv SET key = 'moved' WHERE key = 'plain2';
SELECT eventstore.delete('kv', 'back');
SELECT eventstore.put('kv', 'back', '50');
SELECT * FROM eventstore.store_apply('kv', '{last,same,new}', '{60,1,7}'::jsonb[]);
SELECT * FROM history('twice', 'same', 'plain2', 'moved', 'back', 'last', 'new');
SELECT * FROM state();
SELECT eventstore.get_at('kv', 'twice', now()) AS twice, eventstore.get_at('kv', 'plain', now()) AS plain;

-- The same in one transaction, some of it undone.
BEGIN;
UPDATE kv SET value = value WHERE key = 'plain';
SAVEPOINT s;
UPDATE kv SET value = '2' WHERE key = 'plain';
ROLLBACK TO s;
UPDATE kv SET value = '3' WHERE key = 'plain';
DELETE FROM kv WHERE key = 'plain';
COMMIT;
SELECT * FROM history('plain');

-- The rest, with all that is known of it.  Then it does not grow any more: all is recorded at once.
SELECT eventstore.store_record_backlog('kv') FROM generate_series(1, 4);
SELECT * FROM history('', 'änderung', 'gone', 'never');
SELECT * FROM rows();
SELECT * FROM state();
CALL restore(15, '{later}', '{1}');
SELECT * FROM history('later');
SELECT * FROM state();
SELECT eventstore.drop_store('kv');

-- What a function does amid a statement finds the row recorded, too.
SELECT eventstore.create_store('kv');
CALL restore(1, '{a,b,c,d}', '{1,1,1,1}');
CREATE FUNCTION change_b() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
	UPDATE kv SET value = '"inner"' WHERE key = 'b';
	RETURN NULL;
END $$;
CREATE TRIGGER change_b AFTER UPDATE ON kv FOR EACH ROW WHEN (old.key = 'a') EXECUTE FUNCTION change_b();
UPDATE kv SET value = '"outer"' WHERE key IN ('a', 'b');
DROP TRIGGER change_b ON kv;
CREATE FUNCTION put_again(key text) RETURNS jsonb LANGUAGE sql AS $$SELECT eventstore.put('kv', key, '"again"')$$;
WITH gone AS (DELETE FROM kv WHERE key = 'c' RETURNING key, put_again(key)) SELECT * FROM gone;
DELETE FROM kv WHERE key = 'd';
SELECT * FROM history('a', 'b', 'c', 'd');
SELECT * FROM rows();
SELECT * FROM state();
SELECT eventstore.drop_store('kv');

-- rebuild() records first; what would have to be rebuilt without it is refused.
SELECT eventstore.create_store('kv');
CALL restore(1, '{a,b,c}', '{1,2,3}');
ALTER TABLE kv SET UNLOGGED;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT eventstore.store_record_backlog('kv');
ROLLBACK;
UPDATE kv SET value = '4' WHERE key = 'b';
SELECT eventstore.rebuild('kv');
SELECT * FROM rows();
SELECT * FROM state();
SELECT eventstore.store_record_backlog('kv');
ALTER TABLE kv SET UNLOGGED;
SELECT eventstore.drop_store('kv');

-- Recorded at once: another topic, a row that came otherwise, unlogged, a trigger of the user's, no lock.
SELECT eventstore.create_store('kv');
CALL restore(1, '{a,b}', '{1,2}');
CALL restore(3, '{b,c}', '{3,4}', 'other');
SELECT * FROM history('b', 'c');
SELECT * FROM state();
SELECT eventstore.drop_store('kv');
SELECT count(*) AS left_behind FROM eventstore.store_backlog;
SELECT eventstore.create_store('kv');
ALTER TABLE kv DISABLE TRIGGER USER;
INSERT INTO kv VALUES ('a', '1', 1, now());
ALTER TABLE kv ENABLE TRIGGER USER;
CALL restore(1, '{b}', '{1}');
SELECT * FROM state();
SELECT eventstore.drop_store('kv');
SELECT eventstore.create_store('kv', unlogged => true);
CALL restore(1, '{b}', '{1}');
SELECT * FROM state();
SELECT eventstore.drop_store('kv');
SELECT eventstore.create_store('kv');
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END';
CREATE TRIGGER nothing BEFORE INSERT ON kv FOR EACH ROW EXECUTE FUNCTION nothing();
CALL restore(1, '{b}', '{1}');
SELECT * FROM state();
SELECT eventstore.drop_store('kv');
SELECT eventstore.create_store('kv');
CALL restore(1, '{b}', '{1}', '');
SELECT * FROM eventstore.store_apply('kv', '{a}', '{1}'::jsonb[], topic => 't');
SELECT * FROM state();
SELECT eventstore.drop_store('kv');
SELECT eventstore.create_store('kv', changelog => false);
CALL restore(1, '{b}', '{1}');
SELECT * FROM rows();
SELECT eventstore.store_record_backlog('kv');
SELECT eventstore.drop_store('kv');

-- Bytes, and many keys with large values: several portions, the newest first.
SELECT eventstore.create_store('kv', format => 'bytes', key_format => 'bytes');
BEGIN;
LOCK TABLE kv IN SHARE ROW EXCLUSIVE MODE;
SELECT inserted FROM eventstore.store_apply('kv',
	(SELECT array_agg('\x' || lpad(to_hex(i % 12000), 6, '0') ORDER BY i) FROM generate_series(1, 24000) i),
	(SELECT array_agg(convert_to(CASE WHEN i % 1000 = 0 THEN repeat(md5(i::text), 1000) ELSE i::text END, 'UTF8') ORDER BY i) FROM generate_series(1, 24000) i),
	(SELECT array_agg(jsonb_build_object('topic', 't', 'offset', i) ORDER BY i) FROM generate_series(1, 24000) i), topic => 't');
COMMIT;
SELECT key_count, length(keys) < key_count * 40 AS packed FROM eventstore.store_backlog ORDER BY id;
SELECT * FROM state();
SELECT eventstore.store_record_backlog('kv');
SELECT * FROM state();
SELECT eventstore.store_record_backlog('kv') FROM generate_series(1, 2);
SELECT * FROM state();
SELECT count(*) AS wrong FROM kv_changelog e JOIN kv s ON e.stream = '\x' || encode(s.key, 'hex')
WHERE e.body <> s.value OR (e.metadata->>'offset')::int <> 12000 + CASE WHEN e.stream = '\x000000' THEN 12000 ELSE ('x' || lpad(substr(e.stream, 3), 8, '0'))::bit(32)::int END;
SELECT eventstore.store_record_backlog(null);
SELECT eventstore.store_record_backlog('eventstore.store_catalog');
SELECT eventstore.drop_store('kv');
SET client_min_messages = warning;
DROP SCHEMA store_backlog CASCADE;
