/*
 * kafka/delivery.c
 *		Records on their way to Kafka, and up to where they have arrived.
 *
 * Reports come in the order of partitions, not of positions, so each record has
 * a slot in a ring, numbered as it was put; what counts is how far all have
 * arrived.  One that failed stays in the way: nothing behind it counts, and who
 * put it begins again from there.
 *
 * Two records of one client that lie one behind the other have consecutive offsets,
 * but for transactions, whose marks take some: a gap between them is what somebody
 * else has written there.  Nothing is known after a failure (the record may be there
 * all the same), or where the broker does not say the offset.
 *
 * The report callback runs within calls of librdkafka on the worker's own
 * thread: it writes plain memory.
 */
#include "postgres.h"

#include "kafka/delivery.h"

#include "utils/memutils.h"

#define SLOT(delivery, number) (&(delivery)->slots[(number) & (ES_DELIVERY_MAX - 1)])

void
es_delivery_init(EsDelivery *delivery)
{
	memset(delivery, 0, sizeof(*delivery));
	delivery->slots =
		MemoryContextAlloc(TopMemoryContext, sizeof(EsDeliverySlot) * ES_DELIVERY_MAX);
}

void
es_delivery_reset(EsDelivery *delivery)
{
	memset(delivery, 0, offsetof(EsDelivery, slots));
	for (int i = 0; i < delivery->nunbroken; i++)
		delivery->unbroken[i] = 0;
}

static void
note_unbroken(EsDelivery *delivery, const rd_kafka_message_t *message)
{
	int64 *end;

	if (message->partition >= delivery->nunbroken || message->partition < 0)
		return;
	end = &delivery->unbroken[message->partition];
	if (*end > 0 && message->offset > *end)
	{
		delivery->broken_in = message->partition;
		delivery->broken_at = *end;
	}
	*end = message->offset < 0 ? 0 : message->offset + 1;
}

static void
note_end(EsDelivery *delivery, const rd_kafka_message_t *message)
{
	int64 *end;

	if (message->rkt != delivery->topic)
		return;
	note_unbroken(delivery, message);
	if (message->partition >= delivery->nends || message->partition < 0 ||
		message->offset < 0)
		return;
	end = &delivery->ends[message->partition];
	/* Of another topic: who begins later is to see that, too. */
	if (message->offset < *end)
		delivery->went_back = true;
	else
		*end = message->offset + 1;
}

static void
hear_report(rd_kafka_t *handle, const rd_kafka_message_t *message, void *opaque)
{
	EsDelivery *delivery = ((EsKafkaClient *) opaque)->arg;
	uint64		number = (uint64) (uintptr_t) message->_private;

	delivery->reports++;
	if (message->err != RD_KAFKA_RESP_ERR_NO_ERROR)
	{
		if (delivery->error == RD_KAFKA_RESP_ERR_NO_ERROR || number < delivery->failed)
		{
			delivery->error = message->err;
			delivery->failed = number;
		}
		return;
	}
	note_end(delivery, message);
	SLOT(delivery, number)->arrived = true;
	while (delivery->first < delivery->next && SLOT(delivery, delivery->first)->arrived)
	{
		delivery->arrived =
			Max(delivery->arrived, SLOT(delivery, delivery->first)->position);
		delivery->first++;
	}
}

void
es_delivery_configure(rd_kafka_conf_t *conf, void *arg)
{
	rd_kafka_conf_set_dr_msg_cb(conf, hear_report);
}

List *
es_delivery_properties(Oid server, Oid owner, Jsonb *given)
{
	List *properties = es_kafka_properties(server, owner, given);

	/* As Java's producers do, so that a key lies where they would put it. */
	if (es_kafka_get_property(properties, "partitioner") == NULL)
		properties = es_kafka_set_property(properties, "partitioner", "murmur2_random");
	/* A record is given up by its sink, not by the clock. */
	if (es_kafka_get_property(properties, "delivery.timeout.ms") == NULL &&
		es_kafka_get_property(properties, "message.timeout.ms") == NULL)
		properties = es_kafka_set_property(properties, "delivery.timeout.ms", "0");
	return properties;
}

static rd_kafka_headers_t *
make_headers(const EsRecord *record)
{
	rd_kafka_headers_t *headers;

	if (record->nheaders == 0)
		return NULL;
	headers = rd_kafka_headers_new(record->nheaders);
	for (int i = 0; i < record->nheaders; i++)
		(void) rd_kafka_header_add(headers, record->headers[i].name, -1,
								   record->headers[i].value,
								   (ssize_t) record->headers[i].length);
	return headers;
}

rd_kafka_resp_err_t
es_delivery_put(EsDelivery *delivery, rd_kafka_t *handle, rd_kafka_topic_t *topic,
				int32 partition, const EsRecord *record, EsPosition position)
{
	EsDeliverySlot	   *slot = SLOT(delivery, delivery->next);
	rd_kafka_headers_t *headers;
	rd_kafka_resp_err_t result = RD_KAFKA_RESP_ERR_NO_ERROR;
	rd_kafka_error_t   *error;
	rd_kafka_vu_t		vus[] = {
			  {.vtype = RD_KAFKA_VTYPE_RKT, .u.rkt = topic},
			  {.vtype = RD_KAFKA_VTYPE_PARTITION, .u.i32 = partition},
			  {.vtype = RD_KAFKA_VTYPE_MSGFLAGS, .u.i = RD_KAFKA_MSG_F_COPY},
			  {.vtype = RD_KAFKA_VTYPE_KEY,
			   .u.mem = {(void *) record->key, record->key_length}},
			  {.vtype = RD_KAFKA_VTYPE_VALUE,
			   .u.mem = {(void *) record->value, record->value_length}},
			  {.vtype = RD_KAFKA_VTYPE_TIMESTAMP,
			   .u.i64 = record->has_time ? es_codec_kafka_time(record->time) : 0},
			  {.vtype = RD_KAFKA_VTYPE_OPAQUE, .u.ptr = (void *) (uintptr_t) delivery->next},
			  {.vtype = RD_KAFKA_VTYPE_HEADERS, .u.headers = NULL}};

	if (delivery->next - delivery->first >= ES_DELIVERY_MAX)
		return RD_KAFKA_RESP_ERR__QUEUE_FULL;
	headers = make_headers(record);
	vus[lengthof(vus) - 1].u.headers = headers;
	slot->position = position;
	slot->arrived = false;
	error = rd_kafka_produceva(handle, vus,
							   headers != NULL ? lengthof(vus) : lengthof(vus) - 1);
	if (error == NULL)
	{
		delivery->next++;
		return RD_KAFKA_RESP_ERR_NO_ERROR;
	}
	/* The headers are still ours. */
	if (headers != NULL)
		rd_kafka_headers_destroy(headers);
	result = rd_kafka_error_code(error);
	rd_kafka_error_destroy(error);
	return result;
}

bool
es_delivery_is_empty(const EsDelivery *delivery)
{
	return delivery->first == delivery->next;
}

bool
es_delivery_is_settled(const EsDelivery *delivery)
{
	return delivery->reports == delivery->next;
}

EsPosition
es_delivery_failed(const EsDelivery *delivery)
{
	return SLOT(delivery, delivery->failed)->position;
}
