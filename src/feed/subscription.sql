/*
 * Subscriptions: durable cursors, for one consumer or a group; and leases.
 *
 * The tables belong to the extension's owner, and C writes them as him (lane.c,
 * subscription.c); the views show each caller his part.  Column orders are
 * known to C (subscription.h, lane.h).
 */

CREATE TABLE eventstore.subscription (
	name text COLLATE "C" PRIMARY KEY,
	collection regclass NOT NULL,
	incarnation bigint NOT NULL,
	query jsonb,
	lanes integer NOT NULL,
	max_attempts integer,
	owner regrole NOT NULL,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
CREATE INDEX ON eventstore.subscription (collection);
COMMENT ON TABLE eventstore.subscription IS
'The subscriptions of this database: which events, and how they are handed out. Internal: use the view subscriptions.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.subscription', '');

/*
 * A row changes with each poll, and never in a column that an index has: half
 * of each page is left for the next versions (HOT).
 */
CREATE TABLE eventstore.subscription_lane (
	subscription text COLLATE "C" NOT NULL,
	lane integer NOT NULL,
	position bigint NOT NULL,
	member text COLLATE "C",
	lease_until timestamptz,
	lease interval,
	handed_out bigint,
	failed bigint,
	attempts integer NOT NULL DEFAULT 0,
	not_before timestamptz,
	updated_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
	PRIMARY KEY (subscription, lane)
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0.1);
COMMENT ON TABLE eventstore.subscription_lane IS
'The cursor of each lane of each subscription, and whose the lane is. Internal: use the views subscriptions and members.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.subscription_lane', '');

CREATE TABLE eventstore.dead_letter (
	id uuid PRIMARY KEY DEFAULT pg_catalog.gen_random_uuid(),
	subscription text COLLATE "C",
	source text NOT NULL,
	collection regclass,
	position bigint,
	reason text NOT NULL,
	attempts integer NOT NULL,
	created_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
COMMENT ON TABLE eventstore.dead_letter IS
'What was given up after the last attempt. Internal: use the view dead_letters.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.dead_letter', '');

CREATE TABLE eventstore.lease (
	name text COLLATE "C" PRIMARY KEY,
	holder text COLLATE "C" NOT NULL,
	metadata jsonb,
	role regrole NOT NULL,
	expires_at timestamptz NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_scale_factor = 0.1);
COMMENT ON TABLE eventstore.lease IS
'Leases, those that are over included. Internal: use the view leases.';
SELECT pg_catalog.pg_extension_config_dump('eventstore.lease', '');

CREATE FUNCTION eventstore.subscribe(
	name text,
	collection regclass,
	query jsonb = NULL,
	after bigint = NULL,
	lanes integer = 1,
	max_attempts integer = NULL
) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_subscribe';
COMMENT ON FUNCTION eventstore.subscribe(text, regclass, jsonb, bigint, integer, integer) IS
'Makes a subscription: a durable cursor over the events of a collection that match the query (null: all), for poll(). Its name (1 to 255 bytes) is one of the database. Does nothing where it is there already with the same collection, query and lanes, so that each worker of a group may start with it; max_attempts and after are those of the first call.
after: the position to begin after (null: with the oldest event that is kept). lanes: how many consumers can share the work, 1 to 1024; a stream belongs to one lane, an event without a stream to the lane of its position. max_attempts: how often an event may fail (nack, or a lease that runs out) before it goes to the view dead_letters (null: for ever).
Needs SELECT on the collection. The caller owns the subscription: only who has his privileges, or owns the collection, may use it.
Errors: 42710 another one has the name; LG004 after is ahead of the collection, LG005 events after it are no longer retained; LG007 not a collection; 22023 bad argument, 22004 no name or collection; 42501; 25006 in a read-only transaction; LG006.';

CREATE FUNCTION eventstore.unsubscribe(name text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_unsubscribe';
COMMENT ON FUNCTION eventstore.unsubscribe(text) IS
'Drops a subscription with its cursors, its leases and its dead letters. Waits for transactions that have polled it and are open.
Errors: LG007 no such subscription; 42501 neither its owner nor the collection''s; 22004; 25006.';

CREATE FUNCTION eventstore.poll(
	name text,
	max_count bigint = 100,
	wait interval = NULL,
	member text = NULL,
	lease interval = NULL
) RETURNS SETOF eventstore.event
LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 100
AS 'MODULE_PATHNAME', 'es_poll';
COMMENT ON FUNCTION eventstore.poll(text, bigint, interval, text, interval) IS
'Takes one lane of a subscription that nobody has and that has work, the one with the oldest event, and returns its next events in position order: at most max_count (null: all, 0: none). A lane that another open transaction or another member has is passed over.
Without lease: the cursor moves behind these events in the caller''s transaction, so what he does with them commits with it, or none of it; after a rollback they come again.
With lease (by the clock, not the transaction''s time): the lane belongs to member until ack(), nack() or the end of the lease; commit before the work. A member has one lane: who polls again before ack gets the same events, from the cursor on, and a fresh lease. A lease that runs out counts as an attempt for the first event handed out.
With wait: where there is nothing, waits so long until there is (null: does not). The statement keeps its snapshot meanwhile, which holds VACUUM back.
Use max_count, not LIMIT: all that is returned counts as handed out. May return nothing although there will be work at once (somebody else was faster, an event went to the dead letters).
Errors: LG005 events that it has not passed were dropped, LG004 the collection is another one or has lost events (both until seek()); LG007 no such subscription; 22023 bad argument, lease without member; 22004 no name; 42501 no SELECT right, or neither owner of the subscription nor of the collection; 40001 above READ COMMITTED, where another one has polled meanwhile; 25001 wait above READ COMMITTED, or in a transaction that has appended; 25006 in a read-only transaction; LG006.';

CREATE FUNCTION eventstore.ack(name text, up_to bigint, member text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_ack';
COMMENT ON FUNCTION eventstore.ack(text, bigint, text) IS
'Acknowledges what was handed out to the member up to that position. At the last event handed out the lane is free; below it the lease is renewed by its own length. Never moves a cursor back.
Errors: 55000 the member has no lease (any more): the events come again, to whoever polls; 22023 up_to is above what was handed out; LG007, 22004, 42501, 25006 as for poll.';

CREATE FUNCTION eventstore.nack(
	name text,
	first bigint,
	member text,
	delay interval = '0'
) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_nack';
COMMENT ON FUNCTION eventstore.nack(text, bigint, text, interval) IS
'Acknowledges what was handed out to the member before position first, counts a failed attempt for that event, and gives the lane back; nobody gets it before the delay is over. After the last attempt that the subscription allows the event goes to the view dead_letters instead, and the lane goes on at once.
Errors: 55000 the member has no lease (any more); 22023 first is no event that was handed out and is not acknowledged, or a negative delay; LG005 it was dropped meanwhile; LG007, 22004, 42501, 25006 as for poll.';

CREATE FUNCTION eventstore.leave(name text, member text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_leave';
COMMENT ON FUNCTION eventstore.leave(text, text) IS
'Gives back the lane that the member has a lease of, if it has one. No attempt is counted; what it has not acknowledged goes to whoever polls.
Errors: LG007, 22004, 22023, 42501, 25006 as for poll.';

CREATE FUNCTION eventstore.seek(name text, after bigint) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_seek';
COMMENT ON FUNCTION eventstore.seek(text, bigint) IS
'Sets the cursors of all lanes of a subscription: the next event is the first one after that position (null: the oldest that is kept). Leases end (a later ack is 55000) and attempts are forgotten. Waits for transactions that have polled it and are open.
Errors: LG004 after is ahead of the collection, LG005 events after it are no longer retained; LG007, 22004, 22023, 42501, 25006, LG006 as for poll.';

CREATE FUNCTION eventstore.subscription_lag(name text) RETURNS double precision
LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_subscription_lag';
COMMENT ON FUNCTION eventstore.subscription_lag(text) IS
'Age in seconds of the oldest event that the subscription has not passed, by created_at; 0 where there is none, null without the right to SELECT and where row-level security applies. For the view subscriptions.';

CREATE VIEW eventstore.subscriptions WITH (security_barrier) AS
SELECT
	s.name,
	s.collection,
	s.lanes,
	l.position,
	CASE WHEN h.head > l.position THEN h.head - l.position
		WHEN h.head IS NOT NULL THEN 0 END AS lag_events,
	-- one that is broken does not keep the others from being shown
	CASE WHEN h.head IS NOT NULL THEN eventstore.subscription_lag(s.name) END AS lag_seconds,
	l.members
FROM eventstore.subscription s
	CROSS JOIN LATERAL (
		SELECT min(l.position) AS position,
			count(*) FILTER (WHERE l.lease_until > pg_catalog.clock_timestamp()) AS members
		FROM eventstore.subscription_lane l
		WHERE l.subscription = s.name) l
	CROSS JOIN LATERAL (SELECT eventstore.collection_head(s.collection) AS head) h
WHERE eventstore.collection_shown(s.collection);
COMMENT ON VIEW eventstore.subscriptions IS
'The subscriptions to collections that the caller may SELECT from or owns. position: the lowest cursor of a lane, all up to it is done with. lag_events: positions from there to the head, those of events that do not match and of no event included. lag_seconds: age of the oldest event that is not done with, by created_at; 0 where there is none, null where row-level security applies to the caller. members: how many hold a lease.';
GRANT SELECT ON eventstore.subscriptions TO PUBLIC;

CREATE VIEW eventstore.members WITH (security_barrier) AS
SELECT l.subscription, l.lane, l.member, l.lease_until AS expires_at
FROM eventstore.subscription_lane l
	JOIN eventstore.subscription s ON s.name = l.subscription
WHERE l.lease_until > pg_catalog.clock_timestamp()
	AND eventstore.collection_shown(s.collection);
COMMENT ON VIEW eventstore.members IS
'Who has a lease of which lane (counted from 0) of a subscription, and until when; of subscriptions to collections that the caller may SELECT from or owns.';
GRANT SELECT ON eventstore.members TO PUBLIC;

CREATE FUNCTION eventstore.lease(
	name text,
	holder text,
	ttl interval,
	metadata jsonb = NULL
) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_lease';
COMMENT ON FUNCTION eventstore.lease(text, text, interval, jsonb) IS
'Takes the lease of that name for ttl from now (by the clock), or refreshes it: true. False while another holds it. For leader election (all ask for one name, the one who has it refreshes it in time) and presence (each refreshes its own name). metadata: for whoever looks (null when refreshing: as it is).
The holder is who gives the same holder name with the privileges of the role that took the lease. Commit at once: until then others who want it wait.
Errors: 22004 null, 22023 an empty name or one of more than 255 bytes, a ttl that is not longer than nothing; 25006.';

CREATE FUNCTION eventstore.release_lease(name text, holder text) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_release_lease';
COMMENT ON FUNCTION eventstore.release_lease(text, text) IS
'Gives the lease of that name back: true. False where the holder does not hold it (any more).
Errors: 22004 null, 22023 an empty name or one of more than 255 bytes; 25006.';

CREATE VIEW eventstore.leases WITH (security_barrier) AS
SELECT l.name, l.holder,
	CASE WHEN pg_catalog.pg_has_role(l.role, 'USAGE') THEN l.metadata END AS metadata,
	l.expires_at
FROM eventstore.lease l
WHERE l.expires_at > pg_catalog.clock_timestamp();
COMMENT ON VIEW eventstore.leases IS
'The leases that are held now, of everybody in this database. metadata: null without the privileges of the role that took the lease.';
GRANT SELECT ON eventstore.leases TO PUBLIC;
