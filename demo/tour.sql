--
-- Questions to the collection "flights", and two appends that must fail.
-- Whatever does not come out as it should ends the script with an error.
--
\set ON_ERROR_STOP on
\pset pager off
\pset null '(null)'
\timing off
SET timezone = 'America/New_York';

CREATE PROCEDURE demo.must_have_failed(expected text, actual text) LANGUAGE plpgsql AS $$
BEGIN
	IF actual <> expected THEN
		RAISE EXCEPTION 'this should have failed with %, but its SQLSTATE was %', expected, actual;
	END IF;
END $$;

\echo
\echo '### 3. One aircraft, in order: its stream'
\echo
\set ECHO queries
\timing on
SELECT position, version, type, data->>'flight' AS flight, created_at
FROM eventstore.read_stream('flights', 'N725MQ', max_count => 9);

SELECT position, version, type, created_at FROM eventstore.peek('flights', 'N725MQ');
\timing off
\set ECHO none

\echo
\echo '### 4. All of United into Houston, after a position: tags'
\echo
SELECT eventstore.head('flights') / 2 AS middle \gset
\echo 'Say that the last event seen was the one at position' :middle
\echo
\set ECHO queries
\timing on
SELECT position, type, stream, tags, created_at
FROM eventstore.read('flights', after => :middle, max_count => 6, tags => '{carrier:UA,dest:IAH}');

SELECT count(*) AS arrivals, round(avg((data->>'arr_delay')::int), 1) AS mean_delay_minutes
FROM eventstore.read('flights', after => :middle, types => '{flight.arrived}', tags => '{carrier:UA,dest:IAH}');
\timing off
\set ECHO none

\echo
\echo '### 5. Two writers saw the aircraft at the same version; one of them wins'
\echo
SELECT version AS seen FROM eventstore.peek('flights', 'N725MQ') \gset
\echo 'Both read its last event, of version' :seen
\echo
\set ECHO queries
SELECT * FROM eventstore.append('flights', 'aircraft.inspected', '{"by": "Ada"}',
	stream => 'N725MQ', expected_version => :seen, created_at => '2014-01-01');
\set ON_ERROR_STOP off
SELECT * FROM eventstore.append('flights', 'aircraft.inspected', '{"by": "Bob"}',
	stream => 'N725MQ', expected_version => :seen, created_at => '2014-01-01');
\set ON_ERROR_STOP on
\set ECHO none
\echo 'SQLSTATE' :LAST_ERROR_SQLSTATE
CALL demo.must_have_failed('LG001', :'LAST_ERROR_SQLSTATE');

\echo
\echo '### 6. A gate is given once: append only if no event matches this query'
\echo
SELECT eventstore.head('flights') AS looked \gset
\echo 'Both saw the gate free when they looked, up to position' :looked
\echo
\set ECHO queries
SELECT * FROM eventstore.append('flights', 'gate.assigned', '{"flight": "UA1545"}',
	tags => '{gate:C71}', after => :looked,
	fail_if => '[{"types": ["gate.assigned"], "tags": ["gate:C71"]}]');
\set ON_ERROR_STOP off
SELECT * FROM eventstore.append('flights', 'gate.assigned', '{"flight": "UA1714"}',
	tags => '{gate:C71}', after => :looked,
	fail_if => '[{"types": ["gate.assigned"], "tags": ["gate:C71"]}]');
\set ON_ERROR_STOP on
\set ECHO none
\echo 'SQLSTATE' :LAST_ERROR_SQLSTATE
CALL demo.must_have_failed('LG002', :'LAST_ERROR_SQLSTATE');

\echo
\echo '### 7. Nothing lost, nothing twice: the counts, from the log and from the CSV'
\echo
\set ECHO queries
\timing on
CREATE TEMP TABLE comparison AS
SELECT type, in_log, in_csv, in_log IS NOT DISTINCT FROM in_csv AS agree
FROM (SELECT type, count(*) AS in_log
		FROM eventstore.read('flights') WHERE type LIKE 'flight.%' GROUP BY type) AS log
	FULL JOIN (VALUES
		('flight.scheduled', (SELECT count(*) FROM demo.flight)),
		('flight.departed', (SELECT count(*) FROM demo.flight WHERE dep_time IS NOT NULL)),
		('flight.cancelled', (SELECT count(*) FROM demo.flight WHERE dep_time IS NULL)),
		('flight.arrived', (SELECT count(*) FROM demo.flight WHERE arr_time IS NOT NULL))
	) AS csv (type, in_csv) USING (type);
\timing off
SELECT * FROM comparison ORDER BY type;
\set ECHO none

DO $$
BEGIN
	IF (SELECT count(*) FROM comparison WHERE agree) <> 4 OR EXISTS (SELECT FROM comparison WHERE NOT agree) THEN
		RAISE EXCEPTION 'the counts do not agree';
	END IF;
END $$;

\echo
\echo 'The counts agree, and both refusals were the expected ones.'
