-- A read model in SQL, kept by a subscription: exactly once, and how to rebuild it.
--
-- The model's table changes in the transaction that moves the subscription's
-- cursor.  Both commit, or neither does, so no event is missing from the model
-- and none is in it twice, whatever dies, and whenever.
--
-- Run it in an empty database:  psql -f examples/projection.sql

CREATE EXTENSION IF NOT EXISTS eventstore;
CREATE SCHEMA shop;

-- ---- the events --------------------------------------------------------------------

SELECT eventstore.create_collection('shop.orders');
SELECT count(*) AS appended FROM eventstore.append_batch('shop.orders', '[
	{"type": "order.placed", "stream": "order-1", "data": {"customer": "ann", "total": 30}},
	{"type": "order.placed", "stream": "order-2", "data": {"customer": "bob", "total": 12}},
	{"type": "order.packed", "stream": "order-1"},
	{"type": "order.placed", "stream": "order-3", "data": {"customer": "ann", "total": 8}},
	{"type": "order.cancelled", "stream": "order-1", "data": {"customer": "ann", "total": 30}}
]');

-- ---- the model ---------------------------------------------------------------------

CREATE TABLE shop.customers (
	customer text PRIMARY KEY,
	open_orders int NOT NULL,
	owed numeric NOT NULL
);
SELECT eventstore.subscribe('customers', 'shop.orders',
	query => '[{"types": ["order.placed", "order.cancelled"]}]');

-- What one event does to the model.
CREATE PROCEDURE shop.apply_to_customers(event eventstore.event) LANGUAGE plpgsql AS $$
DECLARE
	sign int := CASE event.type WHEN 'order.placed' THEN 1 ELSE -1 END;
BEGIN
	INSERT INTO shop.customers AS c
	VALUES (event.data ->> 'customer', sign, sign * (event.data ->> 'total')::numeric)
	ON CONFLICT (customer) DO UPDATE
	SET open_orders = c.open_orders + excluded.open_orders, owed = c.owed + excluded.owed;
END $$;

-- One batch: polls, and applies what it got, in the order of the events.  The
-- statements that apply are others than the one that polls: each sees what the
-- consumer before us has made of the events before.
CREATE FUNCTION shop.keep_customers(batch bigint = 1000) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
	event eventstore.event;
	n bigint := 0;
BEGIN
	FOR event IN SELECT * FROM eventstore.poll('customers', batch) LOOP
		CALL shop.apply_to_customers(event);
		n := n + 1;
	END LOOP;
	RETURN n;
END $$;

-- The worker: batch after batch, each in a transaction of its own.  Start it as
-- often as you like; where one is at work the others find nothing to do.
CREATE PROCEDURE shop.catch_up(batch bigint = 1000) LANGUAGE plpgsql AS $$
BEGIN
	WHILE shop.keep_customers(batch) > 0 LOOP
		COMMIT;
	END LOOP;
END $$;

CALL shop.catch_up(batch => 2);
SELECT * FROM shop.customers ORDER BY customer;

-- ---- exactly once ------------------------------------------------------------------

SELECT position FROM eventstore.append('shop.orders', 'order.placed', '{"customer": "bob", "total": 5}', stream => 'order-4');

-- A worker that fails in the middle leaves neither the change nor the cursor behind.
BEGIN;
SELECT shop.keep_customers() AS events;
SELECT owed FROM shop.customers WHERE customer = 'bob';
ROLLBACK;
SELECT owed FROM shop.customers WHERE customer = 'bob';
SELECT lag_events FROM eventstore.subscriptions WHERE name = 'customers';

CALL shop.catch_up();
SELECT owed FROM shop.customers WHERE customer = 'bob';
SELECT lag_events, lag_seconds FROM eventstore.subscriptions WHERE name = 'customers';

-- ---- rebuild: in place -------------------------------------------------------------
-- Readers see the old model until the COMMIT, and then one that catches up.

ALTER TABLE shop.customers ADD COLUMN last_order text;
CREATE OR REPLACE PROCEDURE shop.apply_to_customers(event eventstore.event) LANGUAGE plpgsql AS $$
DECLARE
	sign int := CASE event.type WHEN 'order.placed' THEN 1 ELSE -1 END;
BEGIN
	INSERT INTO shop.customers AS c
	VALUES (event.data ->> 'customer', sign, sign * (event.data ->> 'total')::numeric, event.stream)
	ON CONFLICT (customer) DO UPDATE
	SET open_orders = c.open_orders + excluded.open_orders, owed = c.owed + excluded.owed, last_order = excluded.last_order;
END $$;

BEGIN;
SELECT eventstore.seek('customers', null);		-- waits for a batch that is being applied
DELETE FROM shop.customers;
COMMIT;
CALL shop.catch_up();
SELECT * FROM shop.customers ORDER BY customer;

-- ---- rebuild: beside ---------------------------------------------------------------
-- A second table with a subscription of its own catches up while the first one
-- goes on; then they change places.  Nobody ever sees half a model.

CREATE TABLE shop.totals AS SELECT customer, owed FROM shop.customers WITH NO DATA;
SELECT eventstore.subscribe('totals', 'shop.orders', query => '[{"types": ["order.placed"]}]');
INSERT INTO shop.totals
SELECT data ->> 'customer', sum((data ->> 'total')::numeric) FROM eventstore.poll('totals', null) GROUP BY 1;

BEGIN;
DROP TABLE shop.customers;
ALTER TABLE shop.totals RENAME TO customers;
SELECT eventstore.unsubscribe('customers');
COMMIT;
SELECT * FROM shop.customers ORDER BY customer;
SELECT name, position, lag_events FROM eventstore.subscriptions;

SELECT eventstore.drop_collection('shop.orders');
SET client_min_messages = warning;
DROP SCHEMA shop CASCADE;
