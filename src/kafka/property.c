/*
 * kafka/property.c
 *		Which of librdkafka's properties may be set, where, and by whom.
 *
 * Some of librdkafka's properties load libraries, run commands, or read files
 * with the rights of the server's operating system user; others would break what
 * the extension promises (the offsets are its own, never the broker's).  So
 * there is a list of what may be set, and what is not in it is refused, whatever
 * a newer librdkafka comes to know.
 *
 *	-	A property belongs to places.  What tunes a consumer or a producer may be
 *		set for one, or on the server for all of them.  Where a client connects to, and whom it
 *		trusts there, is the server's alone: a source's owner who could change
 *		that would have the credentials of the server's mapping sent to himself.
 *	-	Secrets belong into a user mapping, the one catalog whose options
 *		PostgreSQL hides from others.  No message holds their value, and none is
 *		followed by the statement in the server's log.
 *	-	What reads a file, or uses the credentials that the server's process has,
 *		needs the privileges of pg_read_server_files.
 *	-	GSSAPI reads the server's credential cache only: librdkafka puts principal
 *		and keytab into a shell command, so these are refused, and the command
 *		is turned off (client.c).
 *
 * A value is tried on a configuration that is thrown away, which starts no
 * thread and opens nothing, so that the user gets librdkafka's own message at
 * once.  A name that may not be set is never given to rd_kafka_conf_set, which
 * may act on it: plugin.library.paths is loaded there and then.  What
 * librdkafka takes too easily (an empty value, "10x" or 2^32 + 1 for a number,
 * a key that is none) is refused here.
 */
#include "postgres.h"

#include "kafka/property.h"

#include <ctype.h>
#include <librdkafka/rdkafka.h>
#include <limits.h>
#include <math.h>

#include "catalog/pg_authid.h"
#include "compat.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/numeric.h"

/* How a property is treated. */
#define SECRET	  0x01 /* shown to nobody, in a user mapping only */
#define FILE_NAME 0x02 /* for those who may read the server's files */
#define NUMBER	  0x04 /* 'min' and 'max' are ours, beside librdkafka's; 0, 0 = none */
#define PEM		  0x08 /* 'text': what it must have between BEGIN and END */
#define ALIAS	  0x10 /* 'text': the name it stands for */
#define REFUSED	  0x20 /* 'text': why */

#define SERVER	 ES_KAFKA_SERVER
#define MAPPING	 ES_KAFKA_MAPPING
#define CONSUMER ES_KAFKA_CONSUMER
#define PRODUCER ES_KAFKA_PRODUCER
#define CLIENT	 (ES_KAFKA_CONSUMER | ES_KAFKA_PRODUCER)

#define LOADS  "It loads libraries into the server."
#define RUNS   "It is part of a command that librdkafka runs in a shell."
#define OURS   "The extension sets it itself."
#define BREAKS "It would break what the extension promises."
#define LOGS   "What it makes librdkafka write may hold secrets."

#define MEGABYTE INT64CONST(1048576)

/* More than a bundle of certificates has; more than a list of brokers has. */
#define PEM_LIMIT	MEGABYTE
#define VALUE_LIMIT 8192

/* So much of a name that is not known is shown. */
#define SHOWN_BYTES 64

typedef struct Property
{
	const char *name;
	int			places;
	int			flags;
	int64		min;
	int64		max;
	const char *text;
} Property;

/* By section, as in librdkafka's own documentation. */
static const Property properties[] = {
	/* where to, and as whom */
	{"bootstrap.servers", SERVER},
	{"client.id", SERVER | CLIENT},
	{"client.rack", SERVER | CONSUMER},
	{"security.protocol", SERVER},
	{"sasl.mechanism", SERVER},
	{"sasl.kerberos.service.name", SERVER},
	{"sasl.username", SERVER | MAPPING},
	{"sasl.password", MAPPING, SECRET},

	/* TLS */
	{"ssl.ca.pem", SERVER, PEM, 0, 0, "CERTIFICATE"},
	{"ssl.ca.location", SERVER, FILE_NAME},
	{"ssl.crl.location", SERVER, FILE_NAME},
	{"ssl.certificate.pem", SERVER | MAPPING, PEM, 0, 0, "CERTIFICATE"},
	{"ssl.certificate.location", SERVER | MAPPING, FILE_NAME},
	{"ssl.key.pem", MAPPING, SECRET | PEM, 0, 0, "PRIVATE KEY"},
	{"ssl.key.location", SERVER | MAPPING, FILE_NAME},
	{"ssl.key.password", MAPPING, SECRET},
	{"ssl.keystore.location", SERVER | MAPPING, FILE_NAME},
	{"ssl.keystore.password", MAPPING, SECRET},
	{"ssl.cipher.suites", SERVER},
	{"ssl.curves.list", SERVER},
	{"ssl.sigalgs.list", SERVER},
	{"ssl.endpoint.identification.algorithm", SERVER},
	{"enable.ssl.certificate.verification", SERVER},

	/* the network */
	{"broker.address.family", SERVER | CLIENT},
	{"broker.address.ttl", SERVER | CLIENT, NUMBER},
	{"client.dns.lookup", SERVER | CLIENT},
	{"connections.max.idle.ms", SERVER | CLIENT, NUMBER},
	{"max.in.flight.requests.per.connection", SERVER | CLIENT, NUMBER, 1, 5},
	{"metadata.max.age.ms", SERVER | CLIENT, NUMBER, 1000, 86400000},
	{"metadata.recovery.strategy", SERVER | CLIENT},
	{"metadata.recovery.rebootstrap.trigger.ms", SERVER | CLIENT, NUMBER},
	{"reconnect.backoff.ms", SERVER | CLIENT, NUMBER, 10, 3600000},
	{"reconnect.backoff.max.ms", SERVER | CLIENT, NUMBER, 10, 3600000},
	{"retry.backoff.ms", SERVER | CLIENT, NUMBER, 10, 300000},
	{"retry.backoff.max.ms", SERVER | CLIENT, NUMBER, 10, 300000},
	{"socket.connection.setup.timeout.ms", SERVER | CLIENT, NUMBER},
	{"socket.keepalive.enable", SERVER | CLIENT},
	{"socket.max.fails", SERVER | CLIENT, NUMBER},
	{"socket.nagle.disable", SERVER | CLIENT},
	{"socket.receive.buffer.bytes", SERVER | CLIENT, NUMBER, 0, 64 * MEGABYTE},
	{"socket.send.buffer.bytes", SERVER | CLIENT, NUMBER, 0, 64 * MEGABYTE},
	{"socket.timeout.ms", SERVER | CLIENT, NUMBER},
	{"topic.metadata.propagation.max.ms", SERVER | CLIENT, NUMBER},
	{"topic.metadata.refresh.fast.interval.ms", SERVER | CLIENT, NUMBER, 10, 60000},
	{"topic.metadata.refresh.interval.ms", SERVER | CLIENT, NUMBER, 100, 3600000},
	{"topic.metadata.refresh.sparse", SERVER | CLIENT},
	{"message.max.bytes", SERVER | CLIENT, NUMBER, 1000, 128 * MEGABYTE},
	{"receive.message.max.bytes", SERVER | CLIENT, NUMBER, 1000, 256 * MEGABYTE},
	{"allow.auto.create.topics", SERVER | CLIENT},

	/* a consumer; what bounds memory has a bound itself */
	{"check.crcs", SERVER | CONSUMER},
	{"fetch.error.backoff.ms", SERVER | CONSUMER, NUMBER, 10, 300000},
	{"fetch.max.bytes", SERVER | CONSUMER, NUMBER, 1, 128 * MEGABYTE},
	{"fetch.min.bytes", SERVER | CONSUMER, NUMBER},
	{"fetch.queue.backoff.ms", SERVER | CONSUMER, NUMBER, 10, 300000},
	{"fetch.wait.max.ms", SERVER | CONSUMER, NUMBER, 1, 300000},
	{"max.partition.fetch.bytes", SERVER | CONSUMER, NUMBER, 1, 128 * MEGABYTE},
	{"queued.max.messages.kbytes", SERVER | CONSUMER, NUMBER, 1, 256 * 1024},
	{"queued.min.messages", SERVER | CONSUMER, NUMBER, 1, 1000000},

	/* a consumer in a group */
	{"coordinator.query.interval.ms", SERVER | CONSUMER, NUMBER},
	{"group.instance.id", CONSUMER},
	{"group.protocol", SERVER | CONSUMER},
	{"group.remote.assignor", SERVER | CONSUMER},
	{"heartbeat.interval.ms", SERVER | CONSUMER, NUMBER},
	{"max.poll.interval.ms", SERVER | CONSUMER, NUMBER},
	{"partition.assignment.strategy", SERVER | CONSUMER},
	{"session.timeout.ms", SERVER | CONSUMER, NUMBER},

	/* a producer */
	{"batch.num.messages", SERVER | PRODUCER, NUMBER},
	{"batch.size", SERVER | PRODUCER, NUMBER, 1, 64 * MEGABYTE},
	{"compression.level", SERVER | PRODUCER, NUMBER},
	{"compression.type", SERVER | PRODUCER},
	{"delivery.timeout.ms", SERVER | PRODUCER, NUMBER},
	{"linger.ms", SERVER | PRODUCER, NUMBER, 0, 900000},
	{"message.copy.max.bytes", SERVER | PRODUCER, NUMBER},
	{"partitioner", SERVER | PRODUCER},
	{"queue.buffering.max.kbytes", SERVER | PRODUCER, NUMBER, 1, 256 * 1024},
	{"queue.buffering.max.messages", SERVER | PRODUCER, NUMBER, 1, 10000000},
	{"request.timeout.ms", SERVER | PRODUCER, NUMBER},
	{"sticky.partitioning.linger.ms", SERVER | PRODUCER, NUMBER},

	/* other names of the same */
	{"compression.codec", 0, ALIAS, 0, 0, "compression.type"},
	{"fetch.message.max.bytes", 0, ALIAS, 0, 0, "max.partition.fetch.bytes"},
	{"max.in.flight", 0, ALIAS, 0, 0, "max.in.flight.requests.per.connection"},
	{"message.timeout.ms", 0, ALIAS, 0, 0, "delivery.timeout.ms"},
	{"metadata.broker.list", 0, ALIAS, 0, 0, "bootstrap.servers"},
	{"queue.buffering.max.ms", 0, ALIAS, 0, 0, "linger.ms"},
	{"sasl.mechanisms", 0, ALIAS, 0, 0, "sasl.mechanism"},

	/* not for anybody, and why; names that are missing here are refused too */
	{"plugin.library.paths", 0, REFUSED, 0, 0, LOADS},
	{"ssl.engine.id", 0, REFUSED, 0, 0, LOADS},
	{"ssl.engine.location", 0, REFUSED, 0, 0, LOADS},
	{"ssl.providers", 0, REFUSED, 0, 0, LOADS},
	{"sasl.kerberos.keytab", 0, REFUSED, 0, 0, RUNS},
	{"sasl.kerberos.kinit.cmd", 0, REFUSED, 0, 0, RUNS},
	{"sasl.kerberos.min.time.before.relogin", 0, REFUSED, 0, 0, RUNS},
	{"sasl.kerberos.principal", 0, REFUSED, 0, 0, RUNS},
	{"debug", 0, REFUSED, 0, 0, LOGS},
	{"log.connection.close", 0, REFUSED, 0, 0, OURS},
	{"log.queue", 0, REFUSED, 0, 0, OURS},
	{"log.thread.name", 0, REFUSED, 0, 0, OURS},
	{"log_level", 0, REFUSED, 0, 0, OURS},
	{"acks", 0, REFUSED, 0, 0, OURS},
	{"auto.commit.enable", 0, REFUSED, 0, 0, OURS},
	{"auto.commit.interval.ms", 0, REFUSED, 0, 0, OURS},
	{"enable.auto.commit", 0, REFUSED, 0, 0, OURS},
	{"enable.auto.offset.store", 0, REFUSED, 0, 0, OURS},
	{"enable.gapless.guarantee", 0, REFUSED, 0, 0, OURS},
	{"enable.idempotence", 0, REFUSED, 0, 0, OURS},
	{"enable.metrics.push", 0, REFUSED, 0, 0, OURS},
	{"enable.partition.eof", 0, REFUSED, 0, 0, OURS},
	{"isolation.level", 0, REFUSED, 0, 0, OURS},
	{"request.required.acks", 0, REFUSED, 0, 0, OURS},
	{"statistics.interval.ms", 0, REFUSED, 0, 0, OURS},
	{"transactional.id", 0, REFUSED, 0, 0, OURS},
	{"auto.offset.reset", 0, REFUSED, 0, 0,
	 "The arguments \"start\" and \"on_gap\" say where to begin, and what to do at a "
	 "gap."},
	{"group.id", 0, REFUSED, 0, 0, "The argument \"group_id\" names the group."},
	{"delivery.report.only.error", 0, REFUSED, 0, 0, BREAKS},
	{"enable.random.seed", 0, REFUSED, 0, 0, BREAKS},
	{"internal.termination.signal", 0, REFUSED, 0, 0, BREAKS},
	{"message.send.max.retries", 0, REFUSED, 0, 0, BREAKS},
	{"queuing.strategy", 0, REFUSED, 0, 0, BREAKS},
	{"retries", 0, REFUSED, 0, 0, BREAKS},
};

/* ---------------------------------------------------------------------------
 * Names
 * ------------------------------------------------------------------------- */

static const Property *
find_exactly(const char *name)
{
	for (int i = 0; i < lengthof(properties); i++)
		if (strcmp(properties[i].name, name) == 0)
			return &properties[i];
	return NULL;
}

/* NULL where it is not in the table. */
static const Property *
find_property(const char *name)
{
	const Property *property = find_exactly(name);

	if (property != NULL && (property->flags & ALIAS) != 0)
		property = find_exactly(property->text);
	return property;
}

bool
es_kafka_is_secret(const char *name)
{
	const Property *property = find_property(name);

	return property != NULL && (property->flags & SECRET) != 0;
}

bool
es_kafka_is_for(const char *name, EsKafkaPropertyPlace client)
{
	const Property *property = find_property(name);

	return property == NULL || (property->places & CLIENT) == 0 ||
		   (property->places & client) != 0;
}

static EsKafkaProperty *
find_in_list(List *list, const char *name)
{
	ListCell *cell;

	foreach (cell, list)
	{
		EsKafkaProperty *property = lfirst(cell);

		if (strcmp(property->name, name) == 0)
			return property;
	}
	return NULL;
}

List *
es_kafka_set_property(List *list, const char *name, const char *value)
{
	const Property	*known = find_property(name);
	const char		*canonical = known != NULL ? known->name : name;
	EsKafkaProperty *property = find_in_list(list, canonical);

	if (property == NULL)
	{
		property = palloc(sizeof(EsKafkaProperty));
		property->name = pstrdup(canonical);
		list = lappend(list, property);
	}
	property->value = pstrdup(value);
	return list;
}

const char *
es_kafka_get_property(List *list, const char *name)
{
	EsKafkaProperty *property = find_in_list(list, name);

	return property != NULL ? property->value : NULL;
}

/* A name of any length and any characters, as messages show it. */
static char *
show_name(const char *name)
{
	int	  length = strlen(name);
	char *shown;

	if (length > SHOWN_BYTES)
		shown = psprintf("%.*s...", pg_mbcliplen(name, length, SHOWN_BYTES), name);
	else
		shown = pstrdup(name);
	for (char *c = shown; *c != '\0'; c++)
		if ((unsigned char) *c < ' ' || *c == 0x7f)
			*c = ' ';
	return shown;
}

/* Has this librdkafka ever heard of it?  Reading does not act on anything. */
static bool
librdkafka_knows(const char *name)
{
	rd_kafka_conf_t		  *conf = rd_kafka_conf_new();
	rd_kafka_topic_conf_t *topic_conf = rd_kafka_topic_conf_new();
	size_t				   size = 0;
	bool				   known;

	known =
		rd_kafka_conf_get(conf, name, NULL, &size) != RD_KAFKA_CONF_UNKNOWN ||
		rd_kafka_topic_conf_get(topic_conf, name, NULL, &size) != RD_KAFKA_CONF_UNKNOWN;
	rd_kafka_topic_conf_destroy(topic_conf);
	rd_kafka_conf_destroy(conf);
	return known;
}

es_noreturn static void
refuse_name(const char *name, const Property *property, const char *argument)
{
	const char *reason = property != NULL ? property->text : NULL;

	if (reason == NULL && librdkafka_knows(name))
		reason = "It is not one of those that the extension allows.";
	if (reason != NULL)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("Kafka property \"%s\" is not allowed in %s",
							   show_name(name), argument),
						errdetail("%s", reason), KEEP_OUT_OF_LOG));
	ereport(
		ERROR,
		(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
		 errmsg("unknown Kafka property \"%s\" in %s", show_name(name), argument),
		 errdetail("librdkafka %s has no property of that name.", rd_kafka_version_str()),
		 KEEP_OUT_OF_LOG));
}

/* ---------------------------------------------------------------------------
 * Places and rights
 * ------------------------------------------------------------------------- */

/* Where it belongs, for those who put it elsewhere. */
static const char *
place_hint(const Property *property)
{
	switch (property->places)
	{
		case MAPPING:
			return "Set it with CREATE USER MAPPING or ALTER USER MAPPING.";
		case SERVER | CONSUMER:
			return "Set it for a consumer, or with CREATE SERVER or ALTER SERVER.";
		case SERVER | PRODUCER:
			return "Set it for a producer, or with CREATE SERVER or ALTER SERVER.";
		case CONSUMER:
			return "Set it for a consumer.";
		default:
			return "Set it with CREATE SERVER or ALTER SERVER.";
	}
}

static void
check_place(const Property *property, EsKafkaPropertyPlace place, const char *argument)
{
	if ((property->places & place) != 0)
		return;
	ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					errmsg("Kafka property \"%s\" is not allowed in %s", property->name,
						   argument),
					(property->flags & SECRET) != 0
						? errdetail("It is a secret, which only a user mapping keeps.")
						: 0,
					errhint("%s", place_hint(property)), KEEP_OUT_OF_LOG));
}

static void
require_server_files(const char *what, const char *hint)
{
	if (has_privs_of_role(GetUserId(), ROLE_PG_READ_SERVER_FILES))
		return;
	ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					errmsg("permission denied to set Kafka property %s", what),
					errdetail("Only roles with privileges of the \"%s\" role may set it.",
							  "pg_read_server_files"),
					hint != NULL ? errhint("%s", hint) : 0, KEEP_OUT_OF_LOG));
}

static void
check_file(const Property *property)
{
	const char *hint = NULL;

	if ((property->flags & FILE_NAME) == 0)
		return;
	if (strcmp(property->name, "ssl.ca.location") == 0)
		hint = "Give the certificates themselves in \"ssl.ca.pem\".";
	else if (strcmp(property->name, "ssl.crl.location") != 0)
		hint = "Give certificate and key themselves in \"ssl.certificate.pem\" and "
			   "\"ssl.key.pem\" of a user mapping.";
	require_server_files(psprintf("\"%s\"", property->name), hint);
}

/* ---------------------------------------------------------------------------
 * Values
 * ------------------------------------------------------------------------- */

/* 'why' must not hold the value of a secret. */
es_noreturn static void
refuse_value(const Property *property, const char *argument, const char *why)
{
	ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					errmsg("invalid value for Kafka property \"%s\" in %s",
						   property->name, argument),
					errdetail("%s", why), KEEP_OUT_OF_LOG));
}

/* Of any property: what librdkafka would cut, drop, or write into a log as it is. */
static void
check_text(const Property *property, const char *value, const char *argument)
{
	bool  pem = (property->flags & PEM) != 0;
	int64 limit = pem ? PEM_LIMIT : VALUE_LIMIT;

	if (value[0] == '\0')
		refuse_value(property, argument,
					 "It is empty. A property that is left out has its default.");
	if (strlen(value) > limit)
		refuse_value(property, argument,
					 psprintf("It is longer than " INT64_FORMAT " bytes.", limit));
	if (isspace((unsigned char) value[0]) && !pem)
		refuse_value(property, argument,
					 "It begins with white space, which librdkafka would drop.");
	for (const char *c = value; *c != '\0'; c++)
	{
		if ((unsigned char) *c >= ' ' && *c != 0x7f)
			continue;
		if (!pem || strchr("\t\r\n", *c) == NULL)
			refuse_value(property, argument, "It contains a control character.");
	}
}

/* A whole decimal number within our bounds; librdkafka's own are checked by itself. */
static void
check_number(const Property *property, const char *value, const char *argument)
{
	char  *end;
	double number;

	if ((property->flags & NUMBER) == 0)
		return;
	number = strtod(value, &end);
	if (value[strspn(value, "+-.0123456789")] != '\0' || end == value || *end != '\0')
		refuse_value(property, argument,
					 psprintf("\"%s\" is not a number.", show_name(value)));
	/* librdkafka reads a leading 0 as octal, and cuts what does not fit an int. */
	if ((value[0] == '0' && isdigit((unsigned char) value[1])) || fabs(number) > INT_MAX)
		refuse_value(
			property, argument,
			psprintf("\"%s\" is not a number that librdkafka reads.", show_name(value)));
	if (strchr(value, '.') != NULL && strcmp(property->name, "linger.ms") != 0)
		refuse_value(property, argument,
					 psprintf("\"%s\" is not a whole number.", show_name(value)));
	if (property->max > 0 && (number < property->min || number > property->max))
		refuse_value(property, argument,
					 psprintf("%s is outside of what the extension allows, " INT64_FORMAT
							  " to " INT64_FORMAT ".",
							  value, property->min, property->max));
}

/*
 * The shape alone: librdkafka looks inside when it connects.  Most mistakes are
 * a file name, or a part that was not copied.
 */
static void
check_pem(const Property *property, const char *value, const char *argument)
{
	const char *begin;
	const char *label;

	if ((property->flags & PEM) == 0)
		return;
	begin = strstr(value, "-----BEGIN ");
	label = begin != NULL ? strstr(begin, psprintf("%s-----", property->text)) : NULL;
	if (label == NULL || strstr(label, psprintf("%s-----", property->text)) == NULL ||
		strstr(label, "-----END ") == NULL)
		refuse_value(property, argument,
					 psprintf("It is not PEM: it must have the lines \"-----BEGIN "
							  "%s-----\" and \"-----END %s-----\".",
							  property->text, property->text));
}

/* librdkafka's default is GSSAPI, and it checks the name only when it starts. */
static void
check_mechanism(const Property *property, const char *value, const char *argument)
{
	if (strcmp(property->name, "sasl.mechanism") != 0)
		return;
	if (strcmp(value, "GSSAPI") == 0)
		require_server_files("\"sasl.mechanism\" to GSSAPI",
							 "GSSAPI uses the credentials of the database server's "
							 "process. Use PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.");
	else if (strcmp(value, "PLAIN") != 0 && strcmp(value, "SCRAM-SHA-256") != 0 &&
			 strcmp(value, "SCRAM-SHA-512") != 0)
		refuse_value(
			property, argument,
			psprintf(
				"\"%s\" is not one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 and GSSAPI.",
				show_name(value)));
}

/* What librdkafka itself says. */
static void
try_value(const Property *property, const char *value, const char *argument)
{
	rd_kafka_conf_t	   *conf = rd_kafka_conf_new();
	rd_kafka_conf_res_t result;
	char				said[512] = "";
	int					length;

	result = rd_kafka_conf_set(conf, property->name, value, said, sizeof(said));
	rd_kafka_conf_destroy(conf);
	if (result == RD_KAFKA_CONF_OK)
		return;
	if (result == RD_KAFKA_CONF_UNKNOWN)
		refuse_name(property->name, NULL, argument);
	/* It repeats the value. */
	if ((property->flags & SECRET) != 0)
		refuse_value(property, argument, "librdkafka does not take it.");
	/* It may end in a line feed, or in half a character. */
	length = pg_mbcliplen(said, strlen(said), strlen(said));
	while (length > 0 && isspace((unsigned char) said[length - 1]))
		length--;
	refuse_value(property, argument, pnstrdup(said, length));
}

/* ---------------------------------------------------------------------------
 * Lists
 * ------------------------------------------------------------------------- */

static void
check_one(const EsKafkaProperty *given, EsKafkaPropertyPlace place, const char *argument)
{
	const Property *property = find_property(given->name);

	if (property == NULL || (property->flags & REFUSED) != 0)
		refuse_name(given->name, property, argument);
	check_place(property, place, argument);
	check_file(property);
	check_text(property, given->value, argument);
	check_number(property, given->value, argument);
	check_pem(property, given->value, argument);
	check_mechanism(property, given->value, argument);
	try_value(property, given->value, argument);
}

void
es_kafka_check_list(List *list, EsKafkaPropertyPlace place, const char *argument)
{
	List	 *seen = NIL;
	ListCell *cell;

	foreach (cell, list)
	{
		const EsKafkaProperty *given = lfirst(cell);
		int					   before = list_length(seen);

		check_one(given, place, argument);
		seen = es_kafka_set_property(seen, given->name, given->value);
		if (list_length(seen) == before)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("Kafka property \"%s\" is given twice in %s",
							find_property(given->name)->name, argument),
					 errdetail("Its other names count as the same."), KEEP_OUT_OF_LOG));
	}
}

static const char *
scalar_text(const JsonbValue *value, const char *name, const char *argument)
{
	switch (value->type)
	{
		case jbvString:
			return pnstrdup(value->val.string.val, value->val.string.len);
		case jbvNumeric:
			return DatumGetCString(
				DirectFunctionCall1(numeric_out, NumericGetDatum(value->val.numeric)));
		case jbvBool:
			return value->val.boolean ? "true" : "false";
		default:
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							errmsg("Kafka property \"%s\" in %s must be a string, a "
								   "number or a boolean",
								   show_name(name), argument),
							KEEP_OUT_OF_LOG));
	}
}

static List *
list_object(Jsonb *object, const char *argument)
{
	List		  *list = NIL;
	JsonbIterator *iterator;
	JsonbValue	   value;

	if (!JB_ROOT_IS_OBJECT(object))
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("%s must be a JSON object of Kafka properties", argument),
						KEEP_OUT_OF_LOG));
	iterator = JsonbIteratorInit(&object->root);
	(void) JsonbIteratorNext(&iterator, &value, true);
	while (JsonbIteratorNext(&iterator, &value, true) == WJB_KEY)
	{
		EsKafkaProperty *property = palloc(sizeof(EsKafkaProperty));

		property->name = pnstrdup(value.val.string.val, value.val.string.len);
		(void) JsonbIteratorNext(&iterator, &value, true);
		property->value =
			unconstify(char *, scalar_text(&value, property->name, argument));
		list = lappend(list, property);
	}
	return list;
}

List *
es_kafka_list_properties(Jsonb *object, const char *argument)
{
	return object != NULL ? list_object(object, argument) : NIL;
}

void
es_kafka_check_properties(Jsonb *object, EsKafkaPropertyPlace place, const char *argument)
{
	es_kafka_check_list(es_kafka_list_properties(object, argument), place, argument);
}
