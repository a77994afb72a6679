/*
 * kafka/relay.c
 *		Records of a source's topic to a changelog topic, and to no table.
 *
 * Mode relay lets one server do the work on the source's records (decode,
 * transform, pick out what is bad), and others, in mode replica, have the result.
 * A batch goes like any other (batch.c), but that its records are published where
 * others are written: first a transaction for the transform, then the records are
 * sent and awaited, without one; then the transaction that parks what is to be
 * parked and moves the offsets.
 *
 * Should the worker die between the last two, the records are published once
 * more: the same keys, with the same values and origins, in the same order, so
 * whoever keeps the last value of a key has the same.
 *
 * What is published is as the sink of a store's changelog would do it: the
 * partition of the source's number, and headers that say where it came from.
 */
#include "postgres.h"

#include "kafka/relay.h"

#include "kafka/batch.h"
#include "kafka/delivery.h"
#include "kafka/restore.h"
#include "kafka/writer.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/memutils.h"
#include "worker/process.h"

/* How long a wait for reports may be. */
#define WAIT_MS		1000

static EsKafkaClient *producer = NULL;
static rd_kafka_topic_t *topic = NULL;
static EsDelivery delivery;

/* ---------------------------------------------------------------------------
 * The producer
 * ------------------------------------------------------------------------- */

static void
release_topic(EsKafkaClient *closing)
{
	if (topic != NULL)
		rd_kafka_topic_destroy(topic);
	topic = NULL;
}

static void
open_producer(EsSourceRun *run)
{
	static const char *const own[][2] = {
		{"enable.idempotence", "true"}, {"acks", "all"}, {NULL, NULL}
	};
	List	   *properties;

	if (delivery.slots == NULL)
		es_delivery_init(&delivery);
	es_delivery_reset(&delivery);
	es_run_begin();
	MemoryContextSwitchTo(run->life);
	properties = es_delivery_properties(run->source->server, run->source->owner,
										run->source->changelog_properties);
	es_run_commit(run);
	producer = es_kafka_open(RD_KAFKA_PRODUCER, run->source->name, properties, own,
							 es_delivery_configure, &delivery);
	producer->owner = run->source->owner;
	producer->release = release_topic;
	topic = rd_kafka_topic_new(producer->handle, run->source->changelog_topic, NULL);
}

void
es_relay_close(void)
{
	if (producer != NULL)
		es_kafka_close(producer);
	producer = NULL;
}

/* ---------------------------------------------------------------------------
 * Publishing
 * ------------------------------------------------------------------------- */

/* The records as they are to be published, in the batch's order; how many. */
static int
make_records(EsSourceRun *run, int from, int to, const EsProblem *known, EsRecord *made)
{
	EsWriter   *writer;
	EsProblem  *problems = MemoryContextAlloc(run->scratch, sizeof(EsProblem) * (to - from));
	EsDecoded  *decoded;
	EsRoleSwitch saved;
	int			n = 0;

	es_run_begin();
	/* What is made is sent after the transaction. */
	MemoryContextSwitchTo(run->scratch);
	writer = es_writer_begin(run->source);
	decoded = es_writer_decode(writer, &run->records[from], to - from, problems);
	if (known != NULL)
		problems[0] = *known;
	es_role_assume(run->source->owner, &saved);
	for (int i = 0; i < to - from; i++)
	{
		made[n] = run->records[from + i];
		if (problems[i].sqlstate == 0)
		{
			if (es_writer_value(writer, decoded, i, &made[n]))
				n++;
		}
		else if (es_batch_stops_at(run, &run->records[from + i]))
			break;
	}
	es_role_restore(&saved);
	es_run_commit(run);
	return n;
}

static void
add_origin(EsRecord *record, EsHeader *headers)
{
	const char *partition = psprintf("%d", record->partition);
	const char *offset = psprintf(INT64_FORMAT, record->offset);

	headers[0] = (EsHeader) {ES_HEADER_TOPIC, record->topic, strlen(record->topic)};
	headers[1] = (EsHeader) {ES_HEADER_PARTITION, partition, strlen(partition)};
	headers[2] = (EsHeader) {ES_HEADER_OFFSET, offset, strlen(offset)};
	record->headers = headers;
	record->nheaders = 3;
}

/* Serves the producer until 'settled' reports more have come, or time is over. */
static bool
await_reports(EsSourceRun *run)
{
	es_kafka_wait(&producer, 1, WAIT_MS);
	if (es_process_interrupts())
		run->leave = ES_LEAVE_FOR_GOOD;
	else if (es_worker_pending(ES_WAKE_CONFIG) != 0)
		run->leave = ES_LEAVE_AND_RETURN;
	es_kafka_serve(producer);
	return run->leave == ES_LEAVE_NOT && producer->trouble != ES_KAFKA_FATAL &&
		delivery.error == RD_KAFKA_RESP_ERR_NO_ERROR;
}

static bool
fail(EsProblem *problem, const char *reason)
{
	problem->sqlstate = ERRCODE_CONNECTION_FAILURE;
	problem->reason = reason;
	es_relay_close();
	return false;
}

bool
es_relay_publish(EsSourceRun *run, int from, int to, const EsProblem *known, EsProblem *problem)
{
	EsRecord   *made = MemoryContextAllocHuge(run->scratch, sizeof(EsRecord) * (to - from));
	int			n = make_records(run, from, to, known, made);
	EsHeader	headers[3];

	if (producer == NULL)
		open_producer(run);
	for (int i = 0; i < n; i++)
	{
		rd_kafka_resp_err_t result;

		add_origin(&made[i], headers);
		while ((result = es_delivery_put(&delivery, producer->handle, topic, made[i].partition,
										 &made[i], i)) == RD_KAFKA_RESP_ERR__QUEUE_FULL)
			if (!await_reports(run))
				return fail(problem, "the changelog topic takes no records");
		if (result != RD_KAFKA_RESP_ERR_NO_ERROR)
			return fail(problem, rd_kafka_err2str(result));
	}
	while (!es_delivery_is_settled(&delivery))
		if (!await_reports(run))
			return fail(problem, delivery.error != RD_KAFKA_RESP_ERR_NO_ERROR ?
						rd_kafka_err2str(delivery.error) : "the changelog topic takes no records");
	return true;
}
