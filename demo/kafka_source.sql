--
-- The topic feeds the store, whose changes go to a changelog topic.
--
\set ON_ERROR_STOP on
\set ECHO queries
SELECT eventstore.create_source('aircraft', 'kafka', topic => 'flights', target => 'aircraft',
	changelog_topic => 'aircraft-changelog', changelog_properties => '{"compression.type": "zstd"}');
