/*
 * Live: hearing of new events without asking again and again.
 *
 * LISTEN is for a connection of one's own; the functions that wait need none,
 * and so work through a pooler that gives out connections by transaction.
 */

CREATE FUNCTION eventstore.listen(
	collection regclass,
	OUT channel text,
	OUT head bigint
) RETURNS record
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_listen';
COMMENT ON FUNCTION eventstore.listen(regclass) IS
'LISTENs on the channel of the collection, or of a store''s changelog, and returns that and the head of this moment. Once it has committed, read from that head on, and then again with each notification: nothing is missed, nothing comes twice.
The payload is JSON: {"collection": "sales.orders", "head": 42, "count": 3}; head is the position up to which all can be read, count the events that became readable since the last notification. With notify => ''events'' also "events", with ''streams'' also "streams" ({"name": version}), where all of it fits into 7,999 bytes. A heartbeat has count 0.
Call it in FROM. UNLISTEN ends it.
Errors: LG007 neither a collection nor a store, 55000 a store without a changelog, 22004 no collection, 42501 no SELECT right on the collection or changelog, 25006 on a standby, 0A000 in a background process.';

CREATE FUNCTION eventstore.wait_for(
	collection regclass,
	after bigint,
	timeout interval = '30 s'
) RETURNS bigint
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', 'es_wait_for';
COMMENT ON FUNCTION eventstore.wait_for(regclass, bigint, interval) IS
'Waits until the head of the collection, or of a store''s changelog, is above the position after, or until timeout is over (null: for ever), and returns the head. It may have passed positions that hold no event (an append that was rolled back), so call read, and then this again.
The statement keeps its snapshot while it waits, which holds VACUUM back; CALL eventstore.await() does not.
Errors: 25001 in a transaction above READ COMMITTED or one that has appended, LG004 after is ahead of the collection, LG005 events after it are no longer retained, LG006 library not preloaded, LG007 neither a collection nor a store, 55000 a store without a changelog, 22004 no collection or after, 22023 negative after or timeout, 42501 no SELECT right on the collection or changelog.';

CREATE PROCEDURE eventstore.await(
	collection regclass,
	after bigint,
	INOUT head bigint = NULL,
	timeout interval = '30 s'
)
LANGUAGE c
AS 'MODULE_PATHNAME', 'es_await';
COMMENT ON PROCEDURE eventstore.await(regclass, bigint, bigint, interval) IS
'The same as wait_for by CALL: head becomes the head of the collection (what it was before does not matter). Outside a transaction block it holds no snapshot while it waits.
Errors: as wait_for.';
