-- leases: leader election and presence, by the clock
\set SHOW_CONTEXT never
\set VERBOSITY terse
-- time is driven by leases that are over at once: this returns when the clock has moved on
CREATE PROCEDURE let_leases_end(names text) LANGUAGE plpgsql AS $$
DECLARE start timestamptz := (SELECT max(expires_at) FROM eventstore.lease WHERE name = names);
BEGIN
	WHILE clock_timestamp() <= start LOOP END LOOP;
END $$;

-- ---- one has it, the others not ----
SELECT eventstore.lease('leader', 'a', '1 hour', '{"host": "x"}');
SELECT eventstore.lease('leader', 'b', '1 hour', '{"host": "y"}');
SELECT name, holder, metadata, expires_at > clock_timestamp() + interval '59 min' AS an_hour FROM eventstore.leases;
-- again: refreshed; metadata stays unless there is another
SELECT eventstore.lease('leader', 'a', '1 day');
SELECT name, holder, metadata, expires_at > clock_timestamp() + interval '23 hours' AS a_day FROM eventstore.leases;
SELECT eventstore.lease('leader', 'a', '1 min', '{"host": "z"}');
SELECT name, holder, metadata, expires_at < clock_timestamp() + interval '2 min' AS a_minute FROM eventstore.leases;
-- only the holder gives it back
SELECT eventstore.release_lease('leader', 'b');
SELECT eventstore.release_lease('other', 'a');
SELECT eventstore.release_lease('leader', 'a');
SELECT eventstore.release_lease('leader', 'a');
SELECT eventstore.lease('leader', 'b', '1 hour');
SELECT name, holder, metadata FROM eventstore.leases;

-- ---- the clock ends it ----
SELECT eventstore.lease('leader', 'b', '1 us');
CALL let_leases_end('leader');
SELECT count(*) FROM eventstore.leases;
SELECT eventstore.release_lease('leader', 'b');
SELECT eventstore.lease('leader', 'c', '1 us', '{"new": true}');
CALL let_leases_end('leader');
-- who takes it anew has none of what was said before
SELECT eventstore.lease('leader', 'c', '1 hour');
SELECT name, holder, metadata FROM eventstore.leases;
-- the clock, and not the transaction's time
BEGIN;
SELECT eventstore.lease('short', 'a', '1 us');
DO $$
DECLARE start timestamptz := (SELECT expires_at FROM eventstore.lease WHERE name = 'short');
BEGIN
	WHILE clock_timestamp() <= start LOOP END LOOP;
END $$;
SELECT count(*) FROM eventstore.leases WHERE name = 'short';
SELECT eventstore.lease('short', 'b', '1 hour');
ROLLBACK;
SELECT count(*) FROM eventstore.lease WHERE name = 'short';
-- presence: names that are over are swept out in time
UPDATE eventstore.lease SET expires_at = now() - interval '1 hour';
INSERT INTO eventstore.lease SELECT 'gone' || i, 'x', null, current_user::regrole, now() - interval '1 hour' FROM generate_series(1, 15) i;
SELECT eventstore.lease('present', 'me', '1 hour');
SELECT count(*) FROM eventstore.lease;
SELECT eventstore.lease('present', 'me', '1 hour');
SELECT count(*) FROM eventstore.lease;
SELECT eventstore.lease('present too', 'you', '1 hour');
SELECT name, holder FROM eventstore.leases ORDER BY name;
SELECT count(*) FROM eventstore.lease;

-- ---- a holder's name alone is not enough ----
CREATE ROLE es_lease_a;
CREATE ROLE es_lease_b;
CREATE ROLE es_lease_member;
GRANT es_lease_a TO es_lease_member;
SET ROLE es_lease_a;
SELECT eventstore.lease('job', 'worker', '1 hour', '{"mine": 1}');
SET ROLE es_lease_b;
SELECT eventstore.lease('job', 'worker', '1 hour');
SELECT eventstore.release_lease('job', 'worker');
SELECT name, holder, metadata FROM eventstore.leases WHERE name = 'job';
SELECT count(*) FROM eventstore.lease;
SET ROLE es_lease_member;
SELECT name, holder, metadata FROM eventstore.leases WHERE name = 'job';
SELECT eventstore.lease('job', 'worker', '1 hour');
SET ROLE es_lease_a;
SELECT eventstore.lease('job', 'worker', '1 hour');
RESET ROLE;
SELECT eventstore.release_lease('job', 'worker');
DROP ROLE es_lease_member, es_lease_b;
SET ROLE es_lease_a;
SELECT eventstore.lease('orphan', 'worker', '1 hour');
RESET ROLE;
DROP ROLE es_lease_a;
SELECT name, holder FROM eventstore.leases WHERE name = 'orphan';
SELECT eventstore.release_lease('orphan', 'worker');

-- ---- what is refused ----
SELECT eventstore.lease(null, 'a', '1 s');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.lease('x', null, '1 s');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.lease('x', 'a', null);
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.lease('x', 'a', '0');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.lease('x', 'a', '-1 s');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.lease('', 'a', '1 s');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.lease('x', repeat('a', 256), '1 s');
\echo :LAST_ERROR_SQLSTATE
SELECT eventstore.release_lease('x', null);
\echo :LAST_ERROR_SQLSTATE
DELETE FROM eventstore.lease;
