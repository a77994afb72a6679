-- metrics() and prometheus(): what they are called, what they say, and to whom
CREATE ROLE es_metrics_reader;
SET client_min_messages = warning;
SELECT eventstore.create_collection('orders');
SELECT eventstore.create_collection('secret');
CREATE SCHEMA "odd ""one""";
SELECT eventstore.create_collection('"odd ""one"""."back\slash
line"');
SELECT count(*) FROM eventstore.append_batch('orders', (SELECT jsonb_agg('{"type": "x", "stream": "s"}'::jsonb) FROM generate_series(1, 7)));
DO $$
BEGIN
	PERFORM eventstore.append('orders', 'x', stream => 's', expected_version => 1);
EXCEPTION WHEN SQLSTATE 'LG001' THEN NULL;
END $$;
SELECT count(*) FROM eventstore.read('orders', max_count => 5);
SELECT eventstore.subscribe('sub', 'orders');
SELECT count(*) FROM eventstore.poll('sub', 3);
CREATE SERVER nowhere FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '127.0.0.1:9');
SELECT eventstore.create_store('kept');
BEGIN;  -- so that no worker starts
SELECT eventstore.create_source('in "it"', 'nowhere', 't', 'kept');
SELECT eventstore.pause('in "it"');
SELECT eventstore.create_sink('out', 'nowhere', 't', 'orders');
SELECT eventstore.pause('out');
COMMIT;

CREATE VIEW here AS
SELECT * FROM eventstore.metrics()
WHERE labels->>'collection' IN ('public.orders', 'public.secret') OR labels->>'source' = 'in "it"' OR labels->>'sink' = 'out';

-- ---- what is said ----
SELECT name, labels, value FROM here
WHERE labels->>'collection' = 'public.orders' AND name !~ 'size_bytes|segments$|lag_seconds'
ORDER BY name, labels::text;
SELECT name, labels FROM here WHERE labels ?| '{source,sink}' ORDER BY name, labels::text;
SELECT value = shown.bytes AS size_is_that_of_the_view
FROM here, (SELECT bytes FROM eventstore.collections WHERE collection = 'orders'::regclass) AS shown
WHERE name = 'eventstore_collection_size_bytes' AND labels->>'collection' = 'public.orders';
-- a transaction that holds a head back
BEGIN;
SELECT version FROM eventstore.append('orders', 'x', stream => 's');
SELECT name, value >= 0 AS old FROM here
WHERE name ~ 'held|open_transactions' AND labels->>'collection' = 'public.orders' ORDER BY name;
ROLLBACK;
SELECT count(*) FROM here WHERE name ~ 'held';
SELECT DISTINCT name, kind FROM eventstore.metrics() WHERE name ~ 'worker' ORDER BY name;

-- ---- names and units ----
SELECT DISTINCT name, kind FROM eventstore.metrics()
WHERE name !~ '^eventstore_[a-z_]+[a-z]$' OR (kind = 'counter') <> (name ~ '_total$') OR kind NOT IN ('counter', 'gauge') OR help !~ '\.$' OR help ~ E'\n';
SELECT name, count(DISTINCT (kind, help)) FROM eventstore.metrics() GROUP BY name HAVING count(DISTINCT (kind, help)) > 1;
SELECT name, labels, count(*) FROM eventstore.metrics() GROUP BY 1, 2 HAVING count(*) > 1;

-- ---- as text ----
CREATE TABLE exposition AS
SELECT number, line FROM regexp_split_to_table(eventstore.prometheus(), E'\n') WITH ORDINALITY AS t(line, number);
SELECT line FROM exposition WHERE line ~ 'appended_total' AND line ~ '^#|orders|odd' ORDER BY number;
SELECT line FROM exposition WHERE line ~ 'source_state' ORDER BY number;
-- nothing that is neither a comment nor a sample, and an end of line at the end
SELECT line FROM exposition WHERE line !~ '^# (HELP|TYPE) eventstore_[a-z_]+ .+$' AND line !~ '^eventstore_[a-z_]+({([a-z]+="([^"\\]|\\["\\n])*",?)+})? [-+]?([0-9.e+-]+|Inf|NaN)$';
-- each family in one piece, and every metric in it
SELECT count(*) FILTER (WHERE line ~ '^# HELP') = count(DISTINCT split_part(line, ' ', 3)) FILTER (WHERE line ~ '^#') AS one_piece,
	count(DISTINCT split_part(line, ' ', 3)) FILTER (WHERE line ~ '^# TYPE') = (SELECT count(DISTINCT name) FROM eventstore.metrics()) AS all_of_them
FROM exposition;

-- ---- to whom ----
GRANT SELECT ON orders TO es_metrics_reader;
SET ROLE es_metrics_reader;
SELECT DISTINCT labels->>'collection' AS collection FROM eventstore.metrics() WHERE labels ? 'collection';
SELECT DISTINCT labels->>'source' AS source, labels->>'sink' AS sink FROM eventstore.metrics() WHERE labels ?| '{source,sink}';
SELECT eventstore.prometheus() ~ 'public.secret|odd|public.kept|in ."it' AS says_more;
RESET ROLE;

SELECT eventstore.drop_source('in "it"'), eventstore.drop_sink('out');
DROP VIEW here;
DROP TABLE exposition;
SELECT eventstore.unsubscribe('sub'), eventstore.drop_collection('orders'), eventstore.drop_collection('secret');
DROP SCHEMA "odd ""one""" CASCADE;
SELECT eventstore.drop_store('kept');
DROP SERVER nowhere;
DROP ROLE es_metrics_reader;
