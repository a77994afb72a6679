-- subscriptions: durable cursors, lanes, leases of lanes, attempts, dead letters
\set SHOW_CONTEXT never
\set VERBOSITY terse
SELECT eventstore.create_collection('log', segment_size => 100);
SELECT count(*) FROM eventstore.append_batch('log', (SELECT jsonb_agg(jsonb_build_object(
	'type', CASE WHEN i % 5 = 0 THEN 'rare' ELSE 'often' END, 'stream', 's' || i % 7, 'tags', jsonb_build_array('t' || i % 2))) FROM generate_series(1, 20) i));
-- what a test looks at: the positions of a poll, in one line
CREATE FUNCTION polled(name text, max_count bigint = 100, member text = null, lease interval = null) RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(position::text, ' ') FROM eventstore.poll(name, max_count, member => member, lease => lease)
$$;
CREATE VIEW lanes AS SELECT subscription, lane, position, member, handed_out, failed, attempts, lease_until > clock_timestamp() AS live,
	not_before > clock_timestamp() AS asleep FROM eventstore.subscription_lane ORDER BY subscription, lane;
-- time is driven by leases that are over at once: this returns when the clock has moved on
CREATE PROCEDURE let_leases_end() LANGUAGE plpgsql AS $$
DECLARE start timestamptz := (SELECT max(lease_until) FROM eventstore.subscription_lane);
BEGIN
	WHILE clock_timestamp() <= start LOOP END LOOP;
END $$;

-- a collection cannot be dropped by a plain DROP TABLE while segments of it are on their way out
CREATE PROCEDURE await_disposal(segment text) LANGUAGE plpgsql AS $$
BEGIN
	WHILE to_regclass(segment) IS NOT NULL LOOP COMMIT; END LOOP;
END $$;

-- ---- subscribe: again and again the same, or an error ----
SELECT eventstore.subscribe('one', 'log');
SELECT eventstore.subscribe('one', 'log');
SELECT eventstore.subscribe('one', 'log', query => '[{}]', after => 7, max_attempts => 3);
SELECT eventstore.subscribe('one', 'log', query => '[{"types": ["rare"]}]');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.subscribe('one', 'log', lanes => 2);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.create_collection('other');
SELECT eventstore.subscribe('one', 'other');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.subscribe('few', 'log', query => '[{"types": ["rare"], "tags": []}]', after => 6);
SELECT eventstore.subscribe('few', 'log', query => '[{"tags": [], "types": ["rare"]}]');
SELECT eventstore.subscribe('ahead', 'log', after => 21);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.subscribe('none', 'pg_class');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.subscribe('many', 'log', lanes => 1025);
\echo :LAST_ERROR_SQLSTATE
SELECT polled('nobody');
\echo :LAST_ERROR_SQLSTATE
SELECT name, collection, lanes, position, lag_events, lag_seconds > 0 AS lags, members FROM eventstore.subscriptions ORDER BY name;

-- ---- without a lease: the cursor moves in the caller's transaction ----
SELECT polled('one', 3);
SELECT polled('one', 3);
SELECT polled('one', 0);
BEGIN;
SELECT polled('one', 2);
SELECT polled('one', 2);
SAVEPOINT a;
SELECT polled('one', 2);
ROLLBACK TO a;
SELECT polled('one', 3);
SELECT name, position, lag_events FROM eventstore.subscriptions WHERE name = 'one';
ROLLBACK;
SELECT polled('one', 3);
SELECT polled('one', null);
SELECT polled('one', null);
SELECT name, position, lag_events, lag_seconds FROM eventstore.subscriptions WHERE name = 'one';

-- ---- a query: the cursor moves past what does not match ----
SELECT polled('few', 2);
SELECT position FROM eventstore.subscriptions WHERE name = 'few';
SELECT polled('few', 2);
SELECT position, lag_events FROM eventstore.subscriptions WHERE name = 'few';
SELECT position FROM eventstore.append('log', 'often');
SELECT polled('few');
SELECT position, lag_events FROM eventstore.subscriptions WHERE name = 'few';
-- and nothing is written where nothing has moved
SELECT ctid AS before FROM eventstore.subscription_lane WHERE subscription = 'few' \gset
SELECT polled('few');
SELECT ctid = :'before' AS untouched FROM eventstore.subscription_lane WHERE subscription = 'few';

-- ---- a transaction's own events ----
BEGIN;
SELECT position FROM eventstore.append('log', 'rare');
SELECT polled('few');
ROLLBACK;
SELECT polled('few');
BEGIN;
SELECT position FROM eventstore.append('log', 'rare');
SELECT polled('few');
COMMIT;
SELECT polled('few');

-- ---- seek ----
SELECT eventstore.seek('few', 10);
SELECT polled('few');
SELECT eventstore.seek('few', null);
SELECT polled('few', 2);
SELECT eventstore.seek('few', 24);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.seek('few', -1);
\echo :LAST_ERROR_SQLSTATE
SELECT polled('few', 1);

-- ---- a lease: the lane is the member's until it gives it back ----
SELECT eventstore.subscribe('jobs', 'log', max_attempts => 3);
SELECT polled('jobs', 3, 'a', '1 hour');
SELECT polled('jobs', 3, 'b', '1 hour');
SELECT polled('jobs', 3);
SELECT * FROM lanes WHERE subscription = 'jobs';
SELECT subscription, lane, member, expires_at > clock_timestamp() + interval '59 min' AS an_hour FROM eventstore.members;
-- once more the same, with this call's count; the newest counts
SELECT polled('jobs', 5, 'a', '1 hour');
SELECT polled('jobs', 4, 'a', '1 hour');
SELECT eventstore.ack('jobs', 5, 'a');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.ack('jobs', 1, 'b');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.ack('jobs', 2, 'a');
SELECT * FROM lanes WHERE subscription = 'jobs';
-- never back
SELECT eventstore.ack('jobs', 1, 'a');
SELECT polled('jobs', 2, 'a', '1 hour');
SELECT eventstore.ack('jobs', 4, 'a');
SELECT * FROM lanes WHERE subscription = 'jobs';
SELECT eventstore.ack('jobs', 4, 'a');
\echo :LAST_ERROR_SQLSTATE
-- what the ack renews is the lease's own length
SELECT polled('jobs', 2, 'a', '1 day');
SELECT eventstore.ack('jobs', 5, 'a');
SELECT expires_at > clock_timestamp() + interval '23 hours' AS a_day FROM eventstore.members;
-- leave: no attempt
SELECT eventstore.leave('jobs', 'b');
SELECT eventstore.leave('jobs', 'a');
SELECT eventstore.leave('jobs', 'a');
SELECT * FROM lanes WHERE subscription = 'jobs';
-- without a lease by the one who has one: the lane is his, and free after
SELECT polled('jobs', 2, 'a', '1 hour');
SELECT polled('jobs', 1, 'b');
SELECT polled('jobs', 1, 'a');
SELECT * FROM lanes WHERE subscription = 'jobs';
-- a hand-out that is rolled back was none
BEGIN;
SELECT polled('jobs', 1, 'a', '1 hour');
ROLLBACK;
SELECT eventstore.ack('jobs', 7, 'a');
\echo :LAST_ERROR_SQLSTATE

-- ---- nack: acknowledges what lies before, counts, frees, waits ----
SELECT polled('jobs', 5, 'a', '1 hour');
SELECT eventstore.nack('jobs', 6, 'a');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.nack('jobs', 12, 'a');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.nack('jobs', 9, 'a', '-1 s');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.nack('jobs', 9, 'a', '1 hour');
SELECT * FROM lanes WHERE subscription = 'jobs';
SELECT polled('jobs', 5, 'b', '1 hour');
SELECT polled('jobs', 5);
SELECT eventstore.nack('jobs', 9, 'a');
\echo :LAST_ERROR_SQLSTATE
-- only an event can fail
SELECT eventstore.seek('few', 4);
SELECT polled('few', 2, 'a', '1 hour');
SELECT eventstore.nack('few', 7, 'a');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.nack('few', 10, 'a');
SELECT * FROM lanes WHERE subscription = 'few';

-- ---- attempts, and what is given up ----
SELECT eventstore.seek('jobs', 8);
SELECT * FROM lanes WHERE subscription = 'jobs';
SELECT polled('jobs', 2, 'a', '1 hour');
SELECT eventstore.nack('jobs', 9, 'a');
SELECT polled('jobs', 2, 'a', '1 us');
CALL let_leases_end();
-- it is over, whoever has taken the lane or not
SELECT eventstore.ack('jobs', 9, 'a');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.nack('jobs', 9, 'a');
\echo :LAST_ERROR_SQLSTATE
SELECT count(*) FROM eventstore.members WHERE subscription = 'jobs';
-- the second attempt is counted when the lane is taken
SELECT attempts FROM lanes WHERE subscription = 'jobs';
SELECT polled('jobs', 2, 'b', '1 hour');
SELECT failed, attempts FROM lanes WHERE subscription = 'jobs';
SELECT subscription, position FROM eventstore.dead_letters;
-- the third was the last; the lane goes on, and does not sleep
SELECT eventstore.nack('jobs', 9, 'b', '1 hour');
SELECT subscription, source, collection, position, reason, attempts FROM eventstore.dead_letters;
SELECT * FROM lanes WHERE subscription = 'jobs';
SELECT polled('jobs', 2, 'b', '1 us');
CALL let_leases_end();
SELECT polled('jobs', 2, 'b', '1 us');
CALL let_leases_end();
SELECT polled('jobs', 2, 'b', '1 us');
CALL let_leases_end();
-- given up while it is taken: what comes after is handed out
SELECT polled('jobs', 2, 'b', '1 hour');
SELECT subscription, position, reason, attempts FROM eventstore.dead_letters ORDER BY position;
-- an attempt at one event is none at the next
SELECT eventstore.nack('jobs', 12, 'b');
SELECT failed, attempts FROM lanes WHERE subscription = 'jobs';
SELECT polled('jobs', 1);
SELECT failed, attempts FROM lanes WHERE subscription = 'jobs';
-- seek forgets them, and ends leases
SELECT polled('jobs', 1, 'b', '1 hour');
SELECT eventstore.seek('jobs', 15);
SELECT eventstore.ack('jobs', 13, 'b');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM lanes WHERE subscription = 'jobs';

-- ---- lanes: a stream belongs to one, an event without a stream to that of its position ----
SELECT eventstore.subscribe('lanes', 'log', lanes => 3);
SELECT polled('lanes', 100, 'a', '1 hour');
SELECT polled('lanes', 100, 'b', '1 hour');
SELECT polled('lanes', 100, 'c', '1 hour');
SELECT polled('lanes', 100, 'd', '1 hour');
SELECT polled('lanes', 100, 'b', '1 hour');
SELECT lane, member, handed_out FROM lanes WHERE subscription = 'lanes';
SELECT lanes, position, members FROM eventstore.subscriptions WHERE name = 'lanes';
SELECT count(*) FILTER (WHERE lanes > 1) AS streams_in_two_lanes FROM (
	SELECT count(DISTINCT hashtextextended(stream, 0) % 3) AS lanes FROM log WHERE stream IS NOT NULL GROUP BY stream) s;
-- max_count counts the lane's events
SELECT eventstore.leave('lanes', 'b');
SELECT polled('lanes', 2);
SELECT polled('lanes', 2);
SELECT eventstore.seek('lanes', null);
-- the one with the oldest event first, all of them in turn
SELECT string_agg(polled('lanes', 4), ' | ') FROM generate_series(1, 8);
SELECT position, lag_events FROM eventstore.subscriptions WHERE name = 'lanes';
SELECT polled('lanes');
SELECT position, lag_events FROM eventstore.subscriptions WHERE name = 'lanes';
-- a quiet lane is pulled along
SELECT count(*) FROM eventstore.append_batch('log', (SELECT jsonb_agg(jsonb_build_object('type', 'x', 'stream', 'busy')) FROM generate_series(1, 2500) i));
DO $$ BEGIN FOR i IN 1..24 LOOP PERFORM eventstore.poll('lanes', 100); END LOOP; END $$;
SELECT count(*) AS far_behind FROM eventstore.subscription_lane WHERE subscription = 'lanes' AND position < 1300;
SELECT lag_events BETWEEN 100 AND 1300 AS moderate FROM eventstore.subscriptions WHERE name = 'lanes';

-- ---- events that are gone, a collection that was made whole ----
SELECT eventstore.seek('one', 50);
SELECT eventstore.truncate_before('log', 1000);
SELECT polled('one', 1);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.seek('one', 50);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.subscribe('late', 'log', after => 50);
\echo :LAST_ERROR_SQLSTATE
SELECT lag_events, lag_seconds >= 0 AS lags FROM eventstore.subscriptions WHERE name = 'one';
SELECT eventstore.seek('one', null);
SELECT polled('one', 1);
SELECT eventstore.subscribe('late', 'log');
SELECT polled('late', 1);
SELECT eventstore.repair_collection('log');
SELECT polled('late', 1);
-- a cursor that is ahead of what was found is known for ever
SELECT eventstore.subscribe('lost', 'log');
UPDATE eventstore.subscription_lane SET position = 1000000 WHERE subscription = 'lost';
SELECT polled('lost', 1);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.repair_collection('log');
SELECT polled('late', 1);
UPDATE eventstore.subscription_lane SET position = 2000 WHERE subscription = 'lost';
SELECT eventstore.repair_collection('log');
SELECT polled('lost', 1);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.seek('lost', 2000);
SELECT polled('lost', 1);

-- ---- above READ COMMITTED: what is older than the last append is known to be final ----
SELECT position > 2500 AS appended FROM eventstore.append('log', 'x');
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT polled('late', 1);
SELECT polled('late', 1);
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT polled('late', 1);
COMMIT;

-- ---- in a transaction with its subscription, and in one statement ----
BEGIN;
SELECT eventstore.subscribe('brief', 'log', lanes => 2);
SELECT polled('brief', 1), polled('brief', 1);
SELECT count(*) FROM lanes WHERE subscription = 'brief';
ROLLBACK;
SELECT polled('brief');
\echo :LAST_ERROR_SQLSTATE

-- ---- a rename, and the end ----
CALL await_disposal('log_801');
ALTER TABLE log RENAME TO renamed;
SELECT polled('late', 1);
SELECT count(*) FROM eventstore.dead_letters;
SELECT eventstore.unsubscribe('jobs');
SELECT count(*) FROM eventstore.dead_letters;
SELECT eventstore.unsubscribe('jobs');
\echo :LAST_ERROR_SQLSTATE
BEGIN;
SELECT eventstore.drop_collection('renamed');
SELECT count(*) FROM eventstore.subscription;
ROLLBACK;
SELECT polled('late', 1);
DROP TABLE renamed;
SELECT count(*) AS subscriptions, (SELECT count(*) FROM eventstore.subscription_lane) AS lanes, (SELECT count(*) FROM eventstore.dead_letter) AS letters FROM eventstore.subscription;
SELECT polled('late', 1);
\echo :LAST_ERROR_SQLSTATE

-- ---- who may ----
CREATE ROLE es_sub_owner;
CREATE ROLE es_sub_made;
CREATE ROLE es_sub_member;
CREATE ROLE es_sub_other;
CREATE ROLE es_sub_none;
GRANT es_sub_made TO es_sub_member;
ALTER TABLE other OWNER TO es_sub_owner;
GRANT SELECT ON other TO es_sub_made, es_sub_member, es_sub_other;
SELECT count(*) FROM eventstore.append_batch('other', '[{"type": "a"}, {"type": "b"}, {"type": "a"}]');
SET ROLE es_sub_none;
SELECT eventstore.subscribe('shared', 'other');
\echo :LAST_ERROR_SQLSTATE
SET ROLE es_sub_made;
SELECT eventstore.subscribe('shared', 'other', max_attempts => 1);
SELECT polled('shared', 1, 'm', '1 hour');
RESET ROLE;
CREATE FUNCTION state_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE statement;
	RAISE EXCEPTION USING errcode = 'PP000';
EXCEPTION
	WHEN SQLSTATE 'PP000' THEN RETURN 'may';
	WHEN OTHERS THEN RETURN SQLSTATE;
END $$;
CREATE FUNCTION allowed() RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(what || ' ' || state_of(statement), ', ' ORDER BY n) FROM (VALUES
		(1, 'subscribe', 'SELECT eventstore.subscribe(''shared'', ''other'')'),
		(2, 'poll', 'SELECT * FROM eventstore.poll(''shared'', member => ''m'')'),
		(3, 'ack', 'SELECT eventstore.ack(''shared'', 1, ''m'')'),
		(4, 'nack', 'SELECT eventstore.nack(''shared'', 1, ''m'')'),
		(5, 'leave', 'SELECT eventstore.leave(''shared'', ''m'')'),
		(6, 'seek', 'SELECT eventstore.seek(''shared'', null)'),
		(7, 'unsubscribe', 'SELECT eventstore.unsubscribe(''shared'')'),
		(8, 'table', 'SELECT FROM eventstore.subscription'),
		(9, 'lane', 'UPDATE eventstore.subscription_lane SET position = 0'),
		(10, 'letter', 'INSERT INTO eventstore.dead_letter (source, reason, attempts) VALUES ('''', '''', 1)'),
		(11, 'lease', 'SELECT FROM eventstore.lease')) s (n, what, statement)
$$;
CREATE FUNCTION shown() RETURNS text LANGUAGE sql AS $$
	SELECT concat_ws(', ', (SELECT 'subscriptions ' || count(*) || ' lags ' || count(lag_seconds) FROM eventstore.subscriptions),
		(SELECT 'members ' || count(*) FROM eventstore.members), (SELECT 'dead letters ' || count(*) FROM eventstore.dead_letters))
$$;
INSERT INTO eventstore.dead_letter (subscription, source, collection, position, reason, attempts) VALUES ('shared', 'subscription', 'other', 1, 'made up', 1);
SET ROLE es_sub_made;
SELECT allowed();
SELECT shown();
SET ROLE es_sub_member;
SELECT allowed();
SELECT shown();
SET ROLE es_sub_owner;
SELECT allowed();
SELECT shown();
SET ROLE es_sub_other;
SELECT allowed();
SELECT shown();
SET ROLE es_sub_none;
SELECT allowed();
SELECT shown();
RESET ROLE;
-- what was granted may be taken back
REVOKE SELECT ON other FROM es_sub_made;
SET ROLE es_sub_made;
SELECT allowed();
SELECT shown();
RESET ROLE;
-- row-level security holds for a poll
GRANT SELECT ON other TO es_sub_made;
ALTER TABLE other ENABLE ROW LEVEL SECURITY;
CREATE POLICY only_a ON other FOR SELECT TO es_sub_made USING (type = 'a');
SET ROLE es_sub_made;
SELECT eventstore.seek('shared', null);
SELECT polled('shared');
SELECT eventstore.subscribe('halves', 'other', lanes => 2);
SELECT polled('halves', 1), polled('halves', 1), polled('halves', 1);
RESET ROLE;
-- a look at the views runs no policy, which is somebody else's code
CREATE FUNCTION es_sub_trap() RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''run as %'', current_user; END';
CREATE POLICY trapped ON other FOR SELECT TO es_sub_other USING (es_sub_trap());
SET ROLE es_sub_other;
SELECT name, lag_events, lag_seconds FROM eventstore.subscriptions ORDER BY name;
SELECT eventstore.subscription_lag('shared');
RESET ROLE;
DROP POLICY trapped ON other;
DROP FUNCTION es_sub_trap;
-- a policy that moves the very subscription
DROP POLICY only_a ON other;
CREATE FUNCTION es_sub_meddle() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	IF current_setting('es_sub.meddle') <> '' THEN
		EXECUTE 'SELECT ' || current_setting('es_sub.meddle') || set_config('es_sub.meddle', '', false);
	END IF;
	RETURN true;
END $$;
CREATE POLICY meddles ON other FOR SELECT TO es_sub_made USING (es_sub_meddle());
SET ROLE es_sub_made;
SELECT eventstore.seek('shared', null);
SET es_sub.meddle = 'eventstore.seek(''shared'', 2)';
SELECT polled('shared', 1);
SET es_sub.meddle = 'count(*) FROM eventstore.poll(''shared'', 1)';
SELECT polled('shared', 1);
SET es_sub.meddle = 'eventstore.unsubscribe(''shared'')';
SELECT polled('shared', 1);
RESET ROLE;
DROP POLICY meddles ON other;
DROP FUNCTION es_sub_meddle;
-- who made it is gone: the collection's owner still may
DROP OWNED BY es_sub_made;
DROP ROLE es_sub_made;
SET ROLE es_sub_owner;
SELECT eventstore.unsubscribe('shared');
RESET ROLE;
SELECT eventstore.drop_collection('other');
DROP ROLE es_sub_owner, es_sub_member, es_sub_other, es_sub_none;
SELECT count(*) FROM eventstore.subscription_lane;
