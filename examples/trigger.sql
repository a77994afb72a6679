-- Application logic in a trigger that appends an event, and who acts on it.
--
-- A table is changed by whatever changes it: an application, an import, a hand.
-- What follows from a change is told by an event, appended in the transaction
-- of the change: it is there if and only if the change is.  What the event
-- brings about outside of the database (a mail, a call) is done by a listener
-- that may be down, be late or die half-way, and misses nothing.
--
-- Run it in an empty database:  psql -f examples/trigger.sql

CREATE EXTENSION IF NOT EXISTS eventstore;
CREATE SCHEMA depot;

-- ---- the table and its logic -------------------------------------------------------

CREATE TABLE depot.stock (
	item text PRIMARY KEY,
	quantity int NOT NULL CHECK (quantity >= 0),
	reorder_at int NOT NULL
);
SELECT eventstore.create_collection('depot.events');

-- An event when the quantity falls below the mark, one when it is above it
-- again; not for each change.  The item is the stream, so its events have an
-- order and versions.
CREATE FUNCTION depot.tell() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	was_low boolean := TG_OP = 'UPDATE' AND OLD.quantity < OLD.reorder_at;
	is_low boolean := NEW.quantity < NEW.reorder_at;
BEGIN
	IF is_low <> was_low THEN
		PERFORM eventstore.append('depot.events', CASE WHEN is_low THEN 'stock.low' ELSE 'stock.fine' END,
			jsonb_build_object('quantity', NEW.quantity, 'reorder_at', NEW.reorder_at),
			stream => NEW.item);
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER tell AFTER INSERT OR UPDATE ON depot.stock FOR EACH ROW EXECUTE FUNCTION depot.tell();

INSERT INTO depot.stock VALUES ('bolt', 100, 20), ('nut', 15, 20);
UPDATE depot.stock SET quantity = quantity - 50 WHERE item = 'bolt';
UPDATE depot.stock SET quantity = quantity - 40 WHERE item = 'bolt';
UPDATE depot.stock SET quantity = 200 WHERE item = 'nut';

-- What is rolled back is not told.
BEGIN;
UPDATE depot.stock SET quantity = 0;
ROLLBACK;

SELECT stream, version, type, data FROM eventstore.read('depot.events');

-- ---- the listener ------------------------------------------------------------------
-- It says once which events it wants; this does nothing when it starts again.

SELECT eventstore.subscribe('purchasing', 'depot.events',
	query => '[{"types": ["stock.low"]}]', max_attempts => 3);

-- Then, for ever: ask for work under its own name, commit, do the work,
-- acknowledge it.  (It hears of new events by eventstore.listen(), or has poll
-- wait for them.)  The lease is longer than the work takes; should the listener
-- die, the next one gets the same events when the lease is over.
SELECT position AS at, stream, data
FROM eventstore.poll('purchasing', 1, member => 'host-1', lease => '1 min') \gset
\echo ordering :stream
SELECT eventstore.ack('purchasing', :at, 'host-1');

-- The next one; the supplier does not answer.  Not now: it comes again, after a
-- while, and after three attempts it is put aside for somebody to look at.
SELECT position AS at, stream, data
FROM eventstore.poll('purchasing', 1, member => 'host-1', lease => '1 min') \gset
\echo trying to order :stream
SELECT eventstore.nack('purchasing', :at, 'host-1');

SELECT position AS at, stream, data
FROM eventstore.poll('purchasing', 1, member => 'host-2', lease => '1 min') \gset
\echo ordering :stream
SELECT eventstore.ack('purchasing', :at, 'host-2');

SELECT name, lag_events, members FROM eventstore.subscriptions;
SELECT position, reason, attempts FROM eventstore.dead_letters;

SELECT eventstore.drop_collection('depot.events');
SET client_min_messages = warning;
DROP SCHEMA depot CASCADE;
