-- verify: finds each kind of fault, and nothing where there is none
\set ON_ERROR_STOP 0
\set VERBOSITY terse
SELECT eventstore.create_collection('ledger', segment_size => 4096);
SELECT * FROM eventstore.verify('ledger');
SELECT count(*) FROM eventstore.append_batch('ledger', '[
	{"type": "t", "stream": "a", "data": {"n": 1}}, {"type": "t", "stream": "b"}, {"type": "t", "stream": "a", "body": "AP8="},
	{"type": "t"}, {"type": "t", "stream": "a", "tags": ["x", "y"]}, {"type": "t", "stream": "c"}, {"type": "t", "stream": "b"}]');
SELECT count(*) FROM eventstore.append_batch('ledger',
	(SELECT jsonb_agg(jsonb_build_object('type', 't', 'stream', 'many-' || n % 5, 'data', repeat('x', n % 4000))) FROM generate_series(1, 6000) n));
INSERT INTO ledger (type, stream) VALUES ('t', 'a'), ('t', 'd');
SELECT * FROM eventstore.verify('ledger');
SELECT * FROM eventstore.verify('ledger', after => 2, before => 5);
SELECT * FROM eventstore.verify('ledger', before => 0);
BEGIN;
SELECT version FROM eventstore.append('ledger', 't', stream => 'open');
SELECT * FROM eventstore.verify('ledger');
ROLLBACK;

-- truncation leaves no fault behind
SELECT eventstore.create_collection('cut', segment_size => 4096);
SELECT count(*) FROM eventstore.append_batch('cut',
	(SELECT jsonb_agg(jsonb_build_object('type', 't', 'stream', CASE WHEN n < 10 THEN 'old' ELSE 's-' || n % 3 END)) FROM generate_series(1, 9000) n));
SELECT eventstore.truncate_before('cut', 4200);
SELECT * FROM eventstore.verify('cut');

-- faults, made past the triggers
CREATE FUNCTION damage(statement text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	SET LOCAL session_replication_role = replica;
	EXECUTE replace(statement, 'HEADS', (SELECT heads::text FROM eventstore.collection_catalog WHERE collection = 'ledger'::regclass));
	RESET session_replication_role;
END $$;
CREATE FUNCTION faults(statement text) RETURNS SETOF text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM damage(statement);
	RETURN QUERY SELECT concat_ws(' | ', v.position, v.stream, v.version, v.problem) FROM eventstore.verify('ledger') v;
	RAISE EXCEPTION 'undo';
EXCEPTION WHEN raise_exception THEN
	RETURN;
END $$;
SELECT faults($$UPDATE ledger SET data = '{"n": 2}' WHERE position = 1$$);
SELECT faults($$UPDATE ledger SET type = 'u' WHERE position IN (2, 4)$$);
SELECT faults($$UPDATE ledger SET body = NULL WHERE position = 3$$);
SELECT faults($$UPDATE ledger SET tags = '{y,x}' WHERE position = 5$$);
SELECT faults($$UPDATE ledger SET created_at = created_at + interval '1 us' WHERE position = 6$$);
SELECT faults($$UPDATE ledger SET checksum = 0 WHERE position = 6$$);
SELECT faults($$DELETE FROM ledger WHERE position = 3$$);
SELECT faults($$DELETE FROM ledger WHERE position = 1$$);
SELECT faults($$DELETE FROM ledger WHERE position = 5$$);
SELECT faults($$DELETE FROM ledger WHERE position = 6$$);
SELECT faults($$DELETE FROM ledger WHERE position = 7$$);
SELECT faults($$DELETE FROM HEADS WHERE stream IN ('a', 'c')$$);
SELECT faults($$UPDATE HEADS SET version = version + 1 WHERE stream = 'b'$$);
SELECT faults($$UPDATE HEADS SET last_position = 6 WHERE stream = 'b'$$);
SELECT faults($$UPDATE HEADS SET first_position = 1 WHERE stream = 'b'$$);
SELECT faults($$INSERT INTO HEADS SELECT 'ghost', 1, 4, 4, first_at, last_at FROM HEADS WHERE stream = 'a'$$);

-- a part of it
SELECT damage($$UPDATE ledger SET checksum = 0 WHERE position IN (2, 5)$$);
SELECT * FROM eventstore.verify('ledger');
SELECT * FROM eventstore.verify('ledger', after => 2);
SELECT * FROM eventstore.verify('ledger', before => 5);
SELECT * FROM eventstore.verify('ledger', after => 2, before => 5);

-- rights and bad arguments
SELECT * FROM eventstore.verify(NULL);
SELECT * FROM eventstore.verify('ledger', after => -1);
SELECT * FROM eventstore.verify('pg_class');
CREATE ROLE regress_reader;
SET ROLE regress_reader;
SELECT * FROM eventstore.verify('ledger');
RESET ROLE;
GRANT SELECT ON ledger TO regress_reader;
SET ROLE regress_reader;
SELECT position FROM eventstore.verify('ledger');
RESET ROLE;
ALTER TABLE ledger ENABLE ROW LEVEL SECURITY;
SET ROLE regress_reader;
SELECT position FROM eventstore.verify('ledger');
RESET ROLE;

DROP FUNCTION faults, damage;
SELECT eventstore.drop_collection('ledger');
SELECT eventstore.drop_collection('cut');
DROP ROLE regress_reader;
