/*
 * Kafka: how to reach it.
 */

CREATE FUNCTION eventstore.kafka_options(options text[], catalog oid) RETURNS void
LANGUAGE c VOLATILE STRICT PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_kafka_options';
COMMENT ON FUNCTION eventstore.kafka_options(text[], oid) IS
'Checks the options of servers and user mappings of the wrapper eventstore_kafka: PostgreSQL calls it.
Errors: 22023 an option that is not known, not allowed, not allowed there, or with a bad value; 42501 an option that reads the server''s files or uses its credentials, without the privileges of pg_read_server_files.';

CREATE FOREIGN DATA WRAPPER eventstore_kafka
	NO HANDLER
	VALIDATOR eventstore.kafka_options;
COMMENT ON FOREIGN DATA WRAPPER eventstore_kafka IS
'Kafka, for create_source and create_sink. Options of a server and of a user mapping are librdkafka''s own properties; a server needs "bootstrap.servers". Passwords and private keys go into a user mapping, certificates and keys as PEM text. Who has USAGE on this wrapper can create servers, and so have the database server connect to any host: it is granted to nobody.';

CREATE FUNCTION eventstore.stat_kafka_log(
	OUT at timestamptz,
	OUT worker text,
	OUT level text,
	OUT facility text,
	OUT message text
) RETURNS SETOF record
LANGUAGE c VOLATILE PARALLEL RESTRICTED
AS 'MODULE_PATHNAME', 'es_stat_kafka_log';
COMMENT ON FUNCTION eventstore.stat_kafka_log() IS
'The rows of the view kafka_log.';

CREATE VIEW eventstore.kafka_log AS
SELECT * FROM eventstore.stat_kafka_log();
COMMENT ON VIEW eventstore.kafka_log IS
'The last things that the Kafka client library said in this database''s workers, oldest first: when, which worker, how grave (syslog''s levels), what about. Kept in shared memory, 200 lines for the whole server, since its start. For members of pg_monitor; for others the lines of sources and sinks that they own.';
GRANT SELECT ON eventstore.kafka_log TO PUBLIC;
