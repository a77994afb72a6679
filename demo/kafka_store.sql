--
-- The store: the latest state of each aircraft.
--
\set ON_ERROR_STOP on
\set ECHO queries
SELECT eventstore.create_store('aircraft');
