/*
 * kafka/prefetch.c
 *		What a consumer has librdkafka fetch ahead.
 *
 * librdkafka fetches until its queue is full (queued.max.messages.kbytes), and then
 * rests.  How long decides how fast a source can be: at most one full queue in each
 * rest.  By itself it rests for up to a second.
 *
 * Since 2.2 fetch.queue.backoff.ms says how long.  Older ones look again when that
 * second is over, or when the thread of the broker's connection is woken for
 * something else; the one call that wakes it and changes nothing else is to set
 * the credentials that it has already.  With Kerberos there are none of ours, and
 * what would be set might count, so there it rests.
 *
 * A wake-up is due each time that an eighth of a queue was taken, whether or not fetching
 * rests: that begins with a full queue, so it is over long before that is empty.
 */
#include "postgres.h"

#include "kafka/client.h"
#include "kafka/property.h"

#include "utils/memutils.h"

/* The first version that has fetch.queue.backoff.ms. */
#define BACKOFF_VERSION 0x020200ff
/* This part of a full queue taken, and it is woken. */
#define WAKE_PART 8

/* What was set, or '', in a context that lives as long as the client. */
static char *
copy_property(List *properties, const char *name)
{
	const char *value = es_kafka_get_property(properties, name);

	return MemoryContextStrdup(TopMemoryContext, value == NULL ? "" : value);
}

static int64
number_property(List *properties, const char *name)
{
	const char *value = es_kafka_get_property(properties, name);

	if (value == NULL)
		value = es_kafka_default_property(name);
	return value == NULL ? 0 : strtoi64(value, NULL, 10);
}

static bool
uses_kerberos(List *properties)
{
	const char *mechanism = es_kafka_get_property(properties, "sasl.mechanism");

	return mechanism != NULL && pg_strcasecmp(mechanism, "GSSAPI") == 0;
}

void
es_kafka_prefetch_begin(EsKafkaClient *client, List *properties)
{
	if (client->type != RD_KAFKA_CONSUMER || rd_kafka_version() >= BACKOFF_VERSION ||
		uses_kerberos(properties))
		return;
	client->username = copy_property(properties, "sasl.username");
	client->password = copy_property(properties, "sasl.password");
	client->wake_messages =
		number_property(properties, "queued.min.messages") / WAKE_PART;
	client->wake_bytes =
		number_property(properties, "queued.max.messages.kbytes") * 1024 / WAKE_PART;
}

void
es_kafka_prefetch_end(EsKafkaClient *client)
{
	if (client->username != NULL)
		pfree(client->username);
	if (client->password != NULL)
		pfree(client->password);
	client->username = client->password = NULL;
}

static void
wake_fetcher(const EsKafkaClient *client)
{
	rd_kafka_error_t *error;

	error =
		rd_kafka_sasl_set_credentials(client->handle, client->username, client->password);
	if (error != NULL)
		rd_kafka_error_destroy(error);
}

void
es_kafka_note_taken(EsKafkaClient *client, const rd_kafka_message_t *message)
{
	if (client->username == NULL)
		return;
	client->taken_messages++;
	client->taken_bytes += message->len + message->key_len;
	if (client->taken_messages < client->wake_messages &&
		client->taken_bytes < client->wake_bytes)
		return;
	client->taken_messages = 0;
	client->taken_bytes = 0;
	wake_fetcher(client);
}
