--
-- Nothing of the store is left but the changelog topic.
--
\set ON_ERROR_STOP on
\set ECHO queries
SELECT eventstore.drop_source('aircraft');
SELECT eventstore.drop_store('aircraft');
