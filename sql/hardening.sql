-- what a hostile or careless owner can do to a collection ends in an error, not a crash
SELECT eventstore.create_collection('h', segment_size => 10);

-- an error that is caught while a row is under way takes nothing from the others
CREATE FUNCTION catches() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	BEGIN
		PERFORM 1 / 0;
	EXCEPTION WHEN division_by_zero THEN
		NEW.metadata := '{"caught": true}';
	END;
	RETURN NEW;
END $$;
CREATE TRIGGER catches BEFORE INSERT ON h FOR EACH ROW EXECUTE FUNCTION catches();
INSERT INTO h (type, stream) VALUES ('a', 's'), ('b', 's') RETURNING position, version, metadata;
SELECT position, version FROM eventstore.append_batch('h', '[{"type": "c", "stream": "s"}, {"type": "d", "stream": "s"}]');

-- an append in a trigger, where both go through the executor
SELECT eventstore.create_collection('h2');
CREATE TRIGGER catches BEFORE INSERT ON h2 FOR EACH ROW EXECUTE FUNCTION catches();
CREATE FUNCTION passes_on() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM eventstore.append('h2', 'of.' || NEW.type, stream => NEW.stream);
	RETURN NEW;
END $$;
CREATE TRIGGER passes_on BEFORE INSERT ON h FOR EACH ROW EXECUTE FUNCTION passes_on();
SELECT position, version FROM eventstore.append_batch('h', '[{"type": "e", "stream": "s"}, {"type": "f", "stream": "t"}]');
INSERT INTO h (type, stream) VALUES ('g', 's') RETURNING version;
SELECT stream, version, type FROM h2 ORDER BY position;

-- a trigger that reads does not get past the row it runs for
CREATE FUNCTION looks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	RAISE NOTICE 'head below the row: %', eventstore.head('h') < NEW.position;
	RETURN NEW;
END $$;
CREATE TRIGGER looks BEFORE INSERT ON h FOR EACH ROW EXECUTE FUNCTION looks();
INSERT INTO h (type) VALUES ('looked');
DROP TRIGGER looks ON h;

-- a condition counts the rows that the statement around it has written
CREATE FUNCTION checks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	BEGIN
		PERFORM eventstore.append('h', 'inner', fail_if => '[{"types": ["outer"]}]');
	EXCEPTION WHEN sqlstate 'LG002' THEN
		RAISE NOTICE 'an outer event is there';
	END;
	RETURN NULL;
END $$;
DROP TRIGGER passes_on ON h;
CREATE TRIGGER checks AFTER INSERT ON h FOR EACH ROW WHEN (NEW.type = 'outer') EXECUTE FUNCTION checks();
INSERT INTO h (type) VALUES ('outer');
DROP TRIGGER checks ON h;
DROP TRIGGER catches ON h;

-- rows that pass no trigger: nulls where there should be none
SET session_replication_role = replica;
ALTER TABLE h ALTER COLUMN type DROP NOT NULL, ALTER COLUMN id DROP NOT NULL;
INSERT INTO h_11 (position, stream, version, id, type, tags) VALUES (20, 'odd', 1, NULL, NULL, '{a,NULL,NULL,b}');
RESET session_replication_role;
SELECT count(*) FROM eventstore.read('h', tags => '{a,x}');
SELECT count(*) FROM eventstore.read('h', types => '{t}', tags => '{a}');
SELECT count(*) FROM eventstore.read_stream('h', 'odd', types => '{t}');
SELECT position FROM eventstore.append('h', 'x', fail_if => '[{"tags": ["a", "x"]}]') LIMIT 0;

-- a segment of another column order
SELECT eventstore.create_collection('h3', segment_size => 5);
ALTER TABLE h3 DETACH PARTITION h3_1;
DROP TABLE h3_1;
CREATE TABLE h3_odd (type text COLLATE "C" NOT NULL, position bigint NOT NULL, stream text COLLATE "C", version bigint,
	id uuid NOT NULL, tags text[] COLLATE "C" NOT NULL, data jsonb, body bytea, metadata jsonb,
	created_at timestamptz NOT NULL, checksum int, safe_head bigint);
ALTER TABLE h3 ATTACH PARTITION h3_odd FOR VALUES FROM (1) TO (6);
SELECT * FROM eventstore.append('h3', 'x');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO h3 (type) VALUES ('x');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.read('h3');
\echo :LAST_ERROR_SQLSTATE

-- a heads table that was altered
ALTER TABLE h2_heads ALTER COLUMN version TYPE text;
SELECT * FROM eventstore.append('h2', 'x', stream => 's');
\echo :LAST_ERROR_SQLSTATE
SELECT * FROM eventstore.streams('h2');
\echo :LAST_ERROR_SQLSTATE
ALTER TABLE h2_heads ALTER COLUMN version TYPE bigint USING version::bigint;
ALTER TABLE h2_heads DROP CONSTRAINT h2_heads_pkey, ADD PRIMARY KEY (version, stream);
SELECT * FROM eventstore.append('h2', 'x', stream => 's');
\echo :LAST_ERROR_SQLSTATE

DROP TABLE h, h2, h3;
DROP FUNCTION catches, passes_on, looks, checks;

-- a trigger of the collection's own that appends to the very stream
SELECT eventstore.create_collection('h4', segment_size => 3);
CREATE FUNCTION echoes() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NEW.type <> 'echo' THEN
		PERFORM eventstore.append(TG_ARGV[0]::regclass, 'echo', stream => NEW.stream);
	END IF;
	RETURN NEW;
END $$;
CREATE TRIGGER echoes BEFORE INSERT ON h4 FOR EACH ROW EXECUTE FUNCTION echoes('h4');
SELECT position, version FROM eventstore.append_batch('h4', '[{"type": "a", "stream": "s"}, {"type": "b", "stream": "s"}]');
SELECT position, version, type FROM eventstore.read_stream('h4', 's');
SELECT * FROM eventstore.verify('h4');
DROP TRIGGER echoes ON h4;

-- one segment of several has a trigger: a batch that reaches it fires it
CREATE FUNCTION marks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	NEW.metadata := '{"marked": true}';
	RETURN NEW;
END $$;
CREATE TRIGGER marks BEFORE INSERT ON h4_7 FOR EACH ROW EXECUTE FUNCTION marks();
SELECT count(*) FROM eventstore.append_batch('h4', '[{"type": "c"}, {"type": "c"}, {"type": "c"}, {"type": "c"}]');
SELECT position > 6 AS in_the_third, metadata FROM eventstore.read('h4', types => '{c}');

-- created, appended to and rolled back, again and again
DO $$
BEGIN
	FOR i IN 1..50 LOOP
		BEGIN
			PERFORM eventstore.create_collection('h5');
			PERFORM eventstore.append('h5', 'x', stream => 's');
			RAISE EXCEPTION 'back';
		EXCEPTION WHEN raise_exception THEN
			NULL;
		END;
	END LOOP;
END $$;
SELECT eventstore.create_collection('h5');
SELECT position, version FROM eventstore.append('h5', 'x', stream => 's');

-- nothing of an INSERT without rows is left behind by PREPARE TRANSACTION
BEGIN;
INSERT INTO h5 (type) SELECT 'x' WHERE false;
PREPARE TRANSACTION 'h';
ROLLBACK PREPARED 'h';
INSERT INTO h5 (type) VALUES ('y') RETURNING position;
DROP TABLE h4, h5;
DROP FUNCTION echoes, marks;
