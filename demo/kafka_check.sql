--
-- The store, once it has all that the topic has, against the CSV.
--
\set ON_ERROR_STOP on
\pset pager off
\set ECHO queries
SELECT eventstore.wait_for_source('aircraft', timeout => '2 min') AS caught_up;

SELECT key AS tailnum, value, version FROM aircraft WHERE key = 'N725MQ';

SELECT count(*) AS aircraft, sum((value->>'flights')::int) AS flights, sum((value->>'miles')::int) AS miles
FROM aircraft;
\set ECHO none

DO $$
BEGIN
	IF (SELECT ROW(count(*), sum((value->>'flights')::int), sum((value->>'miles')::int)) FROM aircraft)
		IS DISTINCT FROM (SELECT ROW(aircraft, flights, miles) FROM demo.csv)
	THEN
		RAISE EXCEPTION 'these are not the counts of the CSV: %', (SELECT csv FROM demo.csv);
	END IF;
	IF EXISTS (SELECT FROM aircraft FULL JOIN demo.latest ON key = tailnum WHERE value IS DISTINCT FROM state) THEN
		RAISE EXCEPTION 'some aircraft are not in the state that the CSV says';
	END IF;
	IF EXISTS (SELECT FROM eventstore.verify('aircraft')) THEN
		RAISE EXCEPTION 'the store and its changelog do not agree';
	END IF;
END $$;
\echo 'The counts, and the state of each aircraft, are those of the CSV.'
\echo
