--
-- What the topic will have, and what must come out of it.
--
--   -v address=ADDRESS        of the Kafka
--   -v topic_file=FILE        for the records, a line each (test/kafka/client.c)
--
-- A record is a flight; its key the tail number, its value where the aircraft is
-- then, how many flights it has behind it and how many miles.  So the last record
-- of each says how many came before it, and one that was lost or came twice would
-- be seen.
--
\set ON_ERROR_STOP on

-- Permanent, unlike what was loaded: the server will crash.
CREATE TABLE demo.leg AS
SELECT row_number() OVER (ORDER BY time_hour, minute, carrier, flight, origin) AS number, tailnum,
	jsonb_build_object('at', dest, 'flight', carrier || flight, 'left', time_hour + make_interval(mins => minute),
		'flights', count(*) OVER aircraft, 'miles', sum(distance) OVER aircraft) AS state
FROM demo.flight
WHERE tailnum IS NOT NULL
WINDOW aircraft AS (PARTITION BY tailnum ORDER BY time_hour, minute, carrier, flight, origin ROWS UNBOUNDED PRECEDING);
CREATE TABLE demo.latest AS
SELECT DISTINCT ON (tailnum) tailnum, state FROM demo.leg ORDER BY tailnum, number DESC;
CREATE TABLE demo.csv AS
SELECT count(DISTINCT tailnum) AS aircraft, count(*) AS flights, sum(distance) AS miles
FROM demo.flight WHERE tailnum IS NOT NULL;

\pset format unaligned
\pset tuples_only on
\set FETCH_COUNT 10000
\o :topic_file
SELECT 'key=' || tailnum || E'\tvalue=' || state FROM demo.leg ORDER BY number;
\o
CHECKPOINT;

\set server_options '("bootstrap.servers" ' :'address' ')'
CREATE SERVER kafka FOREIGN DATA WRAPPER eventstore_kafka OPTIONS :server_options;
