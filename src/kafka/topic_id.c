/*
 * kafka/topic_id.c
 *		The id that a topic has: another one once it was made anew.
 *
 * Brokers give topics ids since Kafka 2.8, and librdkafka tells them since 2.3.
 * Where it does not, topic.c and sink_topic.c go by what else tells two topics of
 * one name apart.
 *
 * Asks the broker, and waits for the answer.  A controller that is not there, or does
 * not answer, is asked again after a pause: the worker can do nothing else meanwhile.
 */
#include "postgres.h"

#include "kafka/client.h"

#include "utils/timestamp.h"

#if RD_KAFKA_VERSION >= 0x020300ff

/* The pause: so many times as long as the answer may take. */
#define PAUSE_FACTOR 10

/* The first topic's id, where it has one.  False where nobody has answered. */
static bool
take_id(rd_kafka_event_t *event, char *id)
{
	const rd_kafka_DescribeTopics_result_t *result =
		rd_kafka_event_DescribeTopics_result(event);
	const rd_kafka_TopicDescription_t **topics = NULL;
	const rd_kafka_Uuid_t			   *uuid;
	size_t								n = 0;

	if (rd_kafka_event_error(event) != RD_KAFKA_RESP_ERR_NO_ERROR || result == NULL)
		return false;
	topics = rd_kafka_DescribeTopics_result_topics(result, &n);
	if (n == 0 || rd_kafka_TopicDescription_error(topics[0]) != NULL)
		return true;
	uuid = rd_kafka_TopicDescription_topic_id(topics[0]);
	if (uuid != NULL && (rd_kafka_Uuid_most_significant_bits(uuid) != 0 ||
						 rd_kafka_Uuid_least_significant_bits(uuid) != 0))
		strlcpy(id, rd_kafka_Uuid_base64str(uuid), ES_TOPIC_ID_SIZE);
	return true;
}

static void
ask_id(EsKafkaClient *client, const char *topic, int timeout_ms, char *id)
{
	rd_kafka_TopicCollection_t *topics =
		rd_kafka_TopicCollection_of_topic_names(&topic, 1);
	rd_kafka_AdminOptions_t *options =
		rd_kafka_AdminOptions_new(client->handle, RD_KAFKA_ADMIN_OP_DESCRIBETOPICS);
	rd_kafka_queue_t *queue = rd_kafka_queue_new(client->handle);
	rd_kafka_event_t *event;

	(void) rd_kafka_AdminOptions_set_request_timeout(options, timeout_ms, NULL, 0);
	rd_kafka_DescribeTopics(client->handle, topics, options, queue);
	event = rd_kafka_queue_poll(queue, timeout_ms);
	if (event == NULL || !take_id(event, id))
		client->id_due =
			TimestampTzPlusMilliseconds(GetCurrentTimestamp(), timeout_ms * PAUSE_FACTOR);
	if (event != NULL)
		rd_kafka_event_destroy(event);
	rd_kafka_queue_destroy(queue);
	rd_kafka_AdminOptions_destroy(options);
	rd_kafka_TopicCollection_destroy(topics);
}

void
es_kafka_topic_id(EsKafkaClient *client, const char *topic, int timeout_ms, char *id)
{
	id[0] = '\0';
	if (GetCurrentTimestamp() >= client->id_due)
		ask_id(client, topic, timeout_ms, id);
}

#else

void
es_kafka_topic_id(EsKafkaClient *client, const char *topic, int timeout_ms, char *id)
{
	id[0] = '\0';
}

#endif

char *
es_kafka_doubt_topic_id(const char *known, const char *id)
{
	if (known == NULL || id[0] == '\0' || strcmp(known, id) == 0)
		return NULL;
	return psprintf("the topic was made anew: its id is %s, and was %s", id, known);
}

bool
es_kafka_is_same_topic(const char *known, const char *id)
{
	return known != NULL && id[0] != '\0' && strcmp(known, id) == 0;
}
