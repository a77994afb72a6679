--
-- Loads the flights (CSV on standard input) into the collection "flights".
--
-- A flight becomes up to three events:
--
--   flight.scheduled                       when it was to leave
--   flight.departed or flight.cancelled    when it left, or was to
--   flight.arrived                         when it landed
--
-- The stream is the aircraft, by its tail number.  Tags say whose flight it is,
-- from where, to where.
--
\set ON_ERROR_STOP on
\pset pager off
SET client_min_messages = warning;

CREATE EXTENSION eventstore;
CREATE SCHEMA demo;

\echo
\echo '### 1. The CSV, as it is'
\echo
\set ECHO queries
CREATE UNLOGGED TABLE demo.flight (
	year int, month int, day int,
	dep_time int, sched_dep_time int, dep_delay int,
	arr_time int, sched_arr_time int, arr_delay int,
	carrier text, flight int, tailnum text, origin text, dest text,
	air_time int, distance int, hour int, minute int, time_hour timestamptz
);
\copy demo.flight FROM pstdin WITH (FORMAT csv, HEADER, NULL 'NA')
\set ECHO none

CREATE UNLOGGED TABLE demo.airport_zone (airport text PRIMARY KEY, zone text NOT NULL);
\copy demo.airport_zone FROM 'demo/airport_zones.csv' WITH (FORMAT csv, HEADER)

-- Moments instead of local clocks: an arrival is the first moment after the
-- departure when the clocks at the destination show arr_time.
CREATE VIEW demo.flight_moment AS
SELECT flight.*, scheduled_at, departed_at,
	CASE WHEN arr_time IS NOT NULL THEN
		(day_there + clock + CASE WHEN day_there + clock < departed_there
			THEN interval '1 day' ELSE interval '0' END) AT TIME ZONE zone
	END AS arrived_at
FROM demo.flight
	JOIN demo.airport_zone ON airport = dest,
	LATERAL (SELECT time_hour + make_interval(mins => minute) AS scheduled_at,
		time_hour + make_interval(mins => minute + dep_delay) AS departed_at) AS moment,
	LATERAL (SELECT departed_at AT TIME ZONE zone AS departed_there,
		date_trunc('day', departed_at AT TIME ZONE zone) AS day_there,
		make_interval(hours => arr_time / 100, mins => arr_time % 100) AS clock) AS there;

-- The events in the order in which they happened.  A flight may leave before its
-- time; it was scheduled before that all the same.
CREATE UNLOGGED TABLE demo.incoming AS
SELECT row_number() OVER (ORDER BY happened_at, carrier, flight, origin, step) AS number,
	(type, data, ARRAY['carrier:' || carrier, 'origin:' || origin, 'dest:' || dest],
		tailnum, null, null, null, created_at, null)::eventstore.new_event AS event
FROM demo.flight_moment,
	LATERAL (VALUES
		(1, 'flight.scheduled', least(scheduled_at, departed_at), scheduled_at,
			jsonb_build_object('flight', carrier || flight, 'sched_dep_time', sched_dep_time,
				'sched_arr_time', sched_arr_time, 'distance', distance)),
		(2, 'flight.departed', departed_at, departed_at,
			jsonb_build_object('flight', carrier || flight, 'dep_time', dep_time,
				'dep_delay', dep_delay)),
		(2, 'flight.cancelled',
			CASE WHEN departed_at IS NULL THEN scheduled_at END, scheduled_at,
			jsonb_build_object('flight', carrier || flight)),
		(3, 'flight.arrived', arrived_at, arrived_at,
			jsonb_build_object('flight', carrier || flight, 'arr_time', arr_time,
				'arr_delay', arr_delay, 'air_time', air_time))
	) AS step (step, type, happened_at, created_at, data)
WHERE happened_at IS NOT NULL;
ALTER TABLE demo.incoming ADD PRIMARY KEY (number);
ANALYZE demo.incoming;

\echo
\echo '### 2. A collection, and the events appended to it, 1000 in a transaction'
\echo
\set ECHO queries
SELECT eventstore.create_collection('flights', segment_size => 250000);

CREATE PROCEDURE demo.append_all() LANGUAGE plpgsql AS $$
DECLARE
	batch eventstore.new_event[];
	first bigint := 1;
BEGIN
	LOOP
		SELECT array_agg(event ORDER BY number) INTO batch
		FROM demo.incoming WHERE number >= first AND number < first + 1000;
		EXIT WHEN batch IS NULL;
		PERFORM eventstore.append_array('flights', batch);
		COMMIT;
		first := first + 1000;
	END LOOP;
END $$;

\set ECHO none
SELECT clock_timestamp() AS began \gset
\set ECHO queries
CALL demo.append_all();

\set ECHO none
SELECT count(*) AS appended, extract(epoch FROM clock_timestamp() - :'began')::numeric(10,1) AS seconds,
	round(count(*) / extract(epoch FROM clock_timestamp() - :'began')) AS rate FROM demo.incoming \gset
\echo :appended events in :seconds s, :rate events/s
\echo

\set ECHO queries
SELECT events, head, segments, pg_size_pretty(bytes) AS size
FROM eventstore.collections WHERE collection = 'flights'::regclass;
