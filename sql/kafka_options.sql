-- options of Kafka's servers and user mappings: what may be set, where, by whom
\set SHOW_CONTEXT never
CREATE ROLE es_kafka_plain;
CREATE ROLE es_kafka_files;
GRANT pg_read_server_files TO es_kafka_files;
CREATE SERVER broker FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" 'localhost:9092');

-- What a statement ends with, in full; whatever it did is undone.
CREATE FUNCTION try(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	said text;
	why text;
	advice text;
BEGIN
	EXECUTE statement;
	RAISE EXCEPTION USING errcode = 'PP000';
EXCEPTION
	WHEN SQLSTATE 'PP000' THEN RETURN 'may';
	WHEN OTHERS THEN
		GET STACKED DIAGNOSTICS said = MESSAGE_TEXT, why = PG_EXCEPTION_DETAIL, advice = PG_EXCEPTION_HINT;
		RETURN regexp_replace(concat_ws(' / ', SQLSTATE, said, nullif(why, ''), nullif(advice, '')), '[0-9]+\.[0-9]+\.[0-9]+', 'VERSION', 'g');
END $$;
CREATE FUNCTION of_server(name text, value text) RETURNS text LANGUAGE sql AS $$
	SELECT try(format('CREATE SERVER s FOREIGN DATA WRAPPER eventstore_kafka OPTIONS (%s%I %L)',
		CASE WHEN name IN ('bootstrap.servers', 'metadata.broker.list') THEN '' ELSE '"bootstrap.servers" ''h:1'', ' END, name, value))
$$;
CREATE FUNCTION of_mapping(name text, value text) RETURNS text LANGUAGE sql AS $$
	SELECT try(format('CREATE USER MAPPING FOR PUBLIC SERVER broker OPTIONS (%I %L)', name, value))
$$;

-- ---- the least, and what goes together ----
SELECT try('CREATE SERVER s FOREIGN DATA WRAPPER eventstore_kafka');
SELECT of_server('bootstrap.servers', 'h1:9092,h2:9092');
SELECT of_server('metadata.broker.list', 'h1:9092');
SELECT try($$CREATE SERVER s FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" 'a:1', "metadata.broker.list" 'b:2')$$);
SELECT try($$CREATE SERVER s FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" 'a:1', "bootstrap.servers" 'b:2')$$);
SELECT try($$CREATE SERVER s FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" 'a:1', "security.protocol" 'SASL_SSL')$$);
SELECT try($$CREATE SERVER s FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" 'a:1', "security.protocol" 'SASL_SSL', "sasl.mechanisms" 'PLAIN')$$);
SELECT try($$CREATE SERVER s FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" 'a:1', "security.protocol" 'ssl')$$);
SELECT try('CREATE USER MAPPING FOR PUBLIC SERVER broker');
SELECT try($$CREATE USER MAPPING FOR PUBLIC SERVER broker OPTIONS ("sasl.username" 'me', "sasl.password" 'hush-hush')$$);

-- ---- what every option does in every place ----
CREATE TABLE names (name text, value text);
INSERT INTO names VALUES
	('bootstrap.servers', 'h:1'), ('metadata.broker.list', 'h:1'), ('client.id', 'me'), ('client.rack', 'r'), ('security.protocol', 'ssl'),
	('sasl.mechanism', 'PLAIN'), ('sasl.mechanisms', 'SCRAM-SHA-512'), ('sasl.username', 'me'), ('sasl.password', 'hush-hush'), ('sasl.kerberos.service.name', 'kafka'),
	('ssl.ca.pem', E'-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----\n'), ('ssl.certificate.pem', E'-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----\n'),
	('ssl.key.pem', E'-----BEGIN ENCRYPTED PRIVATE KEY-----\nhush-hush\n-----END ENCRYPTED PRIVATE KEY-----\n'), ('ssl.key.password', 'hush-hush'), ('ssl.keystore.password', 'hush-hush'),
	('ssl.ca.location', '/x'), ('ssl.crl.location', '/x'), ('ssl.certificate.location', '/x'), ('ssl.key.location', '/x'), ('ssl.keystore.location', '/x'),
	('ssl.endpoint.identification.algorithm', 'none'), ('enable.ssl.certificate.verification', 'false'),
	('socket.timeout.ms', '1000'), ('socket.keepalive.enable', 'true'), ('message.max.bytes', '1000000'), ('allow.auto.create.topics', 'true'),
	('queued.min.messages', '10'), ('fetch.wait.max.ms', '10'), ('fetch.message.max.bytes', '10000'), ('session.timeout.ms', '10000'), ('group.instance.id', 'i'),
	('linger.ms', '5'), ('queue.buffering.max.ms', '5'), ('compression.type', 'lz4'), ('compression.codec', 'lz4'), ('partitioner', 'murmur2_random'), ('compression.level', '3'), ('request.timeout.ms', '1000'),
	('plugin.library.paths', '/nowhere/x.so'), ('ssl.engine.location', '/nowhere/x.so'), ('ssl.engine.id', 'dynamic'), ('ssl.providers', 'legacy'),
	('sasl.kerberos.kinit.cmd', 'touch /nowhere'), ('sasl.kerberos.principal', 'x; touch /nowhere'), ('sasl.kerberos.keytab', '/x'), ('internal.termination.signal', '15'), ('enable.random.seed', 'false'),
	('group.id', 'g'), ('transactional.id', 't'), ('enable.auto.commit', 'true'), ('enable.auto.offset.store', 'true'), ('auto.offset.reset', 'latest'), ('enable.partition.eof', 'false'), ('isolation.level', 'read_uncommitted'),
	('acks', '0'), ('enable.idempotence', 'false'), ('retries', '0'), ('debug', 'all'), ('log_level', '7'), ('log.queue', 'false'), ('statistics.interval.ms', '1'),
	('offset.store.method', 'file'), ('offset.store.path', '/x'), ('test.mock.num.brokers', '3'), ('sasl.oauthbearer.method', 'oidc'), ('sasl.oauthbearer.config', 'x'), ('sasl.oauthbearer.token.endpoint.url', 'http://h'), ('enable.sasl.oauthbearer.unsecure.jwt', 'true'),
	('error_cb', 'x'), ('opaque', 'x'), ('ssl_key', 'x'), ('interceptors', 'x'), ('builtin.features', 'sasl'), ('topic.blacklist', '.*'), ('broker.version.fallback', '0.8.2'), ('default_topic_conf', 'x'),
	('no.such', 'x'), ('Client.Id', 'x'), ('client.id ', 'x'), ('topic.partitioner', 'random'), ('host', 'h'), ('user', 'u'), ('password', 'hush-hush');
SELECT name, split_part(of_server(name, value), ' / ', 1) AS server, split_part(of_mapping(name, value), ' / ', 1) AS mapping FROM names ORDER BY name COLLATE "C";
-- every one says which, and why
SELECT says FROM (
	SELECT DISTINCT replace(said, '"' || name || '"', '"…"') AS says
	FROM names, LATERAL (VALUES (of_server(name, value)), (of_mapping(name, value))) v (said) WHERE said <> 'may') s
ORDER BY says COLLATE "C";
-- an option of the wrapper itself, or of what it has none
ALTER FOREIGN DATA WRAPPER eventstore_kafka OPTIONS (ADD "client.id" 'x');
CREATE FOREIGN TABLE t (i int) SERVER broker OPTIONS (topic 'x');
CREATE FOREIGN TABLE t (i int OPTIONS ("client.id" 'x')) SERVER broker;
BEGIN;
CREATE FOREIGN TABLE t (i int) SERVER broker;
SELECT * FROM t;
ROLLBACK;

-- ---- values: librdkafka's own message, or a stricter rule ----
SELECT of_server('security.protocol', 'hush');
SELECT of_server('security.protocol', E'a\nb');
SELECT of_server('enable.ssl.certificate.verification', 'maybe');
SELECT of_server('broker.address.family', 'v5');
SELECT of_server('client.id', '');
SELECT of_server('client.id', ' x');
SELECT of_server('client.id', E'x\x01');
SELECT of_server('client.id', 'Größe ☃');
SELECT of_server('client.id', repeat('x', 8192));
SELECT of_server('client.id', repeat('x', 8193));
SELECT of_server('bootstrap.servers', '');
SELECT of_server('bootstrap.servers', ' ');
SELECT of_server('socket.timeout.ms', v) FROM unnest('{"","1000 "," 1000",10x,1e4,0x3e8,01750,1000.5,-1,0,99999999999,4294968296,nan,inf,+1000,٣}'::text[]) v;
SELECT of_server('sasl.mechanism', v) FROM unnest('{plain,SCRAM-SHA-1,OAUTHBEARER,"PLAIN,GSSAPI",scram-sha-256}'::text[]) v;
SELECT of_server('message.max.bytes', '999999999');
SELECT of_server('ssl.ca.pem', v) FROM unnest(ARRAY['/etc/ca.pem', '-----BEGIN CERTIFICATE-----', E'-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----', repeat('x', 2000000), E'-----BEGIN CERTIFICATE-----\n\x01\n-----END CERTIFICATE-----']) v;
SELECT of_server(repeat('x', 60), '1'), of_server(E'a\tb', 'x'), of_server('%s%n', '%s%n'), of_server('client.id', '%s%n');
SELECT try(format('CREATE SERVER s FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" %L)', '%s%s%n'));

-- ---- secrets are in no message ----
SELECT of_mapping('sasl.password', v) FROM unnest(ARRAY['', ' hush', E'hush\x01', 'hush' || repeat('x', 9000), 'hush ☃ %s']) v;
SELECT of_mapping('ssl.key.pem', v) FROM unnest(ARRAY['', 'hush', 'hush' || repeat('x', 2000000), E'-----BEGIN PRIVATE KEY-----\nhush', E'-----BEGIN CERTIFICATE-----\nhush\n-----END CERTIFICATE-----', E'-----BEGIN RSA PRIVATE KEY-----\r\nhush\r\n-----END RSA PRIVATE KEY-----\r\n']) v;
SELECT count(*) FROM names, LATERAL (VALUES (of_server(name, 'hush-hush')), (of_mapping(name, 'hush-hush'))) v (said)
WHERE said LIKE '%hush%' AND name ~ 'password|key\.pem';
CREATE USER MAPPING FOR es_kafka_plain SERVER broker OPTIONS ("sasl.username" 'me', "sasl.password" 'hush-hush');
CREATE USER MAPPING FOR PUBLIC SERVER broker OPTIONS ("sasl.password" 'hush-hush');
ALTER USER MAPPING FOR es_kafka_plain SERVER broker OPTIONS (SET "sasl.password" 'hush-hush2', ADD "ssl.key.password" ' hush');
ALTER USER MAPPING FOR es_kafka_plain SERVER broker OPTIONS (SET "sasl.password" 'hush-hush2', DROP "sasl.username");
ALTER SERVER broker OPTIONS (ADD "sasl.password" 'hush-hush');
SELECT usename, umoptions FROM pg_user_mappings WHERE srvname = 'broker' ORDER BY usename COLLATE "C";
SET ROLE es_kafka_files;
SELECT usename, umoptions FROM pg_user_mappings WHERE srvname = 'broker' ORDER BY usename COLLATE "C";
SELECT umoptions FROM pg_user_mapping;
SELECT count(*) FROM pg_foreign_server WHERE srvoptions::text LIKE '%hush%';
-- PostgreSQL's own rule: to the role itself, with USAGE on the server
SET ROLE es_kafka_plain;
SELECT usename, umoptions FROM pg_user_mappings WHERE srvname = 'broker' ORDER BY usename COLLATE "C";
RESET ROLE;
DROP USER MAPPING FOR PUBLIC SERVER broker;

-- ---- rights ----
-- a server can be made to connect to any host: nobody has USAGE on the wrapper
SET ROLE es_kafka_files;
SELECT of_server('client.id', 'x');
RESET ROLE;
GRANT USAGE ON FOREIGN DATA WRAPPER eventstore_kafka TO es_kafka_plain, es_kafka_files;
GRANT USAGE ON FOREIGN SERVER broker TO es_kafka_plain, es_kafka_files;
DROP USER MAPPING FOR es_kafka_plain SERVER broker;
INSERT INTO names VALUES ('sasl.mechanism', 'GSSAPI');
GRANT SELECT ON names TO PUBLIC;
CREATE FUNCTION tried() RETURNS TABLE (name text, server text, mapping text) LANGUAGE sql AS $$
	SELECT name, of_server(name, value), try(format('CREATE USER MAPPING FOR CURRENT_USER SERVER broker OPTIONS (%I %L)', name, value))
	FROM names
$$;
SELECT count(*) FROM tried() WHERE server LIKE '42501%' OR mapping LIKE '42501%';
SET ROLE es_kafka_files;
SELECT count(*) FROM tried() WHERE server LIKE '42501%' OR mapping LIKE '42501%';
SET ROLE es_kafka_plain;
SELECT name, server FROM tried() WHERE server LIKE '42501%' ORDER BY name COLLATE "C";
SELECT name, left(mapping, 5) AS mapping FROM tried() WHERE mapping LIKE '42501%' ORDER BY name COLLATE "C";
RESET ROLE;
-- what one who may not read files leaves alone
CREATE SERVER filed FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" 'h:1', "ssl.ca.location" '/x');
ALTER SERVER filed OWNER TO es_kafka_plain;
SET ROLE es_kafka_plain;
ALTER SERVER filed OPTIONS (SET "bootstrap.servers" 'elsewhere:1');
ALTER SERVER filed OPTIONS (SET "bootstrap.servers" 'elsewhere:1', DROP "ssl.ca.location");
RESET ROLE;

-- ---- later ----
ALTER SERVER broker OPTIONS (ADD "client.id" 'x', ADD "socket.timeout.ms" '2000');
ALTER SERVER broker OPTIONS (SET "socket.timeout.ms" 'soon');
ALTER SERVER broker OPTIONS (DROP "bootstrap.servers");
ALTER SERVER broker OPTIONS (ADD "metadata.broker.list" 'b:1');
ALTER SERVER broker OPTIONS (ADD "plugin.library.paths" '/nowhere/x.so');
ALTER SERVER broker OPTIONS (DROP "socket.timeout.ms");
SELECT srvoptions FROM pg_foreign_server WHERE srvname = 'broker';

-- ---- a source's and a sink's own ----
SELECT eventstore.create_store('kept');
CREATE FUNCTION of_source(arguments text) RETURNS text LANGUAGE sql AS $$
	SELECT try('SELECT eventstore.create_source(''in'', ''broker'', ''t'', ''kept'', ' || arguments || ')')
$$;
SELECT v, left(of_source(format('start => %L', v)), 5) AS start
FROM unnest(ARRAY['earliest', 'latest', 'sooner', 'infinity', '2026-01-01', '{"0": 42, "7": 0}', '{}', '{"0": "42"}', '{"0": null}', '{"0": -1}',
	'{"0": 1.5}', '{"0": 1e30}', '{"0": 9223372036854775807}', '{"0": {"0": 1}}', '{"0": [1]}', '{"-1": 1}', '{"00": 1}', '{" 0": 1}', '{"x": 1}', '{"99999999999": 1}', '[1]', '{"0": 1']) v;
SELECT of_source('start => ''{"0": "42"}''');
SELECT of_source('changelog_topic => ''log'', partitions => ''{0,1}'', replica_partitions => ''{2,1}''');
-- long lists are compared at once
SET statement_timeout = '60 s';
SELECT of_source(format('changelog_topic => ''log'', partitions => %L, replica_partitions => %L',
	ARRAY(SELECT generate_series(0, 499999)), ARRAY(SELECT generate_series(499999, 999999))));
RESET statement_timeout;
SELECT try($$SELECT eventstore.create_sink('out', 'broker', 't', 'kept', key => 'eventstore.such(eventstore.event)')$$);
-- what keeps the owners' books is a trigger of the extension's tables, and of no other
CREATE TEMPORARY TABLE other (owner regrole);
CREATE TRIGGER note_owners AFTER INSERT ON other EXECUTE FUNCTION eventstore.note_owners();
INSERT INTO other VALUES (NULL);
DROP TABLE other;
SELECT eventstore.drop_store('kept');

-- ---- the log of librdkafka ----
SELECT * FROM eventstore.kafka_log;
SET ROLE es_kafka_plain;
SELECT * FROM eventstore.kafka_log;
RESET ROLE;

DROP SERVER broker CASCADE;
DROP SERVER filed;
DROP OWNED BY es_kafka_plain, es_kafka_files;
DROP ROLE es_kafka_plain, es_kafka_files;
