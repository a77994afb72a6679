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
 * The records of a batch are a transaction of Kafka's.  A wait that fails leaves
 * requests behind that may arrive at any time; the next producer has the same
 * transactional.id, so whatever its predecessor has not committed never is, and
 * cannot come behind what is newer.
 *
 * Should the worker die between Kafka's commit and PostgreSQL's, the records are
 * published once more: the same keys, with the same values and origins, in the same
 * order, so whoever keeps the last value of a key has the same.
 *
 * Where PostgreSQL's transaction fails after Kafka's it is tried again by itself:
 * run->nrelayed says what of the batch is published.
 *
 * A member of a consumer group commits its offsets in the same transaction, by its
 * membership: the coordinator takes them from present members only, as from a
 * sink (share.c), and they are where a partition goes on, here or at its next
 * owner's (topic.c), so each record is published once.  But for a record that is to
 * be parked, which must not be passed over before that is committed: they stay in
 * front of it, and what follows in the batch may be published twice.
 *
 * What is published is as the sink of a store's changelog would do it: the
 * partition of the source's number, and headers that say where it came from.
 */
#include "postgres.h"

#include "kafka/relay.h"

#include "kafka/batch.h"
#include "kafka/delivery.h"
#include "kafka/group.h"
#include "kafka/restore.h"
#include "kafka/task.h"
#include "kafka/writer.h"
#include "access/xlog.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/memutils.h"
#include "worker/process.h"

/* How long a wait for reports may be. */
#define WAIT_MS 1000
/* What a dead member has left open is in the way of who takes its partitions over. */
#define TIMEOUT_MS 10000

/* What is asked of Kafka for a transaction. */
typedef enum Step
{
	STEP_FENCE, /* whoever had our transactional.id */
	STEP_BEGIN,
	STEP_OFFSETS, /* of a group's member */
	STEP_COMMIT
} Step;

static EsKafkaClient	*producer = NULL;
static rd_kafka_topic_t *topic = NULL;
static EsDelivery		 delivery;

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
	char			 *identity = psprintf("eventstore-" UINT64_FORMAT "-%u-relay-%u",
										  GetSystemIdentifier(), MyDatabaseId, run->source->id);
	const char *const own[][2] = {{"enable.idempotence", "true"},
								  {"acks", "all"},
								  {"transactional.id", identity},
								  {"transaction.timeout.ms", CppAsString2(TIMEOUT_MS)},
								  {"delivery.timeout.ms", CppAsString2(TIMEOUT_MS)},
								  {NULL, NULL}};
	List			 *properties;

	if (delivery.slots == NULL)
		es_delivery_init(&delivery);
	es_delivery_reset(&delivery);
	es_task_begin();
	MemoryContextSwitchTo(run->life);
	properties = es_delivery_properties(run->source->server, run->source->owner,
										run->source->changelog_properties);
	es_task_commit(run->scratch);
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

/* The offsets of the partitions that were published from; of one it stays in front of a problem. */
static void
note_offset(rd_kafka_topic_partition_list_t *offsets, const EsRecord *record, bool passed)
{
	rd_kafka_topic_partition_t *known =
		rd_kafka_topic_partition_list_find(offsets, record->topic, record->partition);

	if (known == NULL)
	{
		known =
			rd_kafka_topic_partition_list_add(offsets, record->topic, record->partition);
		known->offset = record->offset;
	}
	if (known->opaque == NULL && passed)
		known->offset = record->offset + 1;
	else if (!passed)
		known->opaque = known;
}

/*
 * The records as they are to be published, in the batch's order; how many.  Up to
 * *to, or to one that must not be passed over.
 */
static int
make_records(EsSourceRun *run, int from, int *to, const EsProblem *known, EsRecord *made,
			 rd_kafka_topic_partition_list_t *offsets)
{
	EsWriter  *writer;
	EsProblem *problems =
		MemoryContextAlloc(run->scratch, sizeof(EsProblem) * (*to - from));
	EsDecoded	*decoded;
	EsRoleSwitch saved;
	int			 n = 0;

	es_task_begin();
	/* What is made is sent after the transaction. */
	MemoryContextSwitchTo(run->scratch);
	writer = es_writer_begin(run->source);
	decoded = es_writer_decode(writer, &run->records[from], *to - from, problems);
	if (known != NULL)
		problems[0] = *known;
	es_role_assume(run->source->owner, &saved);
	for (int i = 0; i < *to - from; i++)
	{
		const EsRecord *record = &run->records[from + i];

		if (problems[i].sqlstate != 0 && es_batch_stops_at(run, record))
		{
			*to = from + i;
			break;
		}
		note_offset(offsets, record, problems[i].sqlstate == 0);
		made[n] = *record;
		if (problems[i].sqlstate == 0 && es_writer_value(writer, decoded, i, &made[n]))
			n++;
	}
	es_role_restore(&saved);
	es_task_commit(run->scratch);
	return n;
}

static void
add_origin(EsRecord *record, EsHeader *headers)
{
	const char *partition = psprintf("%d", record->partition);
	const char *offset = psprintf(INT64_FORMAT, record->offset);

	headers[0] = (EsHeader){ES_HEADER_TOPIC, record->topic, strlen(record->topic)};
	headers[1] = (EsHeader){ES_HEADER_PARTITION, partition, strlen(partition)};
	headers[2] = (EsHeader){ES_HEADER_OFFSET, offset, strlen(offset)};
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

static rd_kafka_error_t *
call(EsSourceRun *run, Step step, const rd_kafka_topic_partition_list_t *offsets)
{
	rd_kafka_consumer_group_metadata_t *membership;
	rd_kafka_error_t				   *error;

	switch (step)
	{
		case STEP_FENCE:
			return rd_kafka_init_transactions(producer->handle, ES_RUN_CALL_MS);
		case STEP_BEGIN:
			return rd_kafka_begin_transaction(producer->handle);
		case STEP_COMMIT:
			return rd_kafka_commit_transaction(producer->handle, ES_RUN_CALL_MS);
		case STEP_OFFSETS:
			break;
	}
	if (run->group == NULL)
		return NULL;
	membership = es_group_membership(run);
	if (membership == NULL)
		return rd_kafka_error_new(RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID,
								  "the group shares its partitions out");
	error = es_kafka_send_offsets(producer, offsets, membership);
	rd_kafka_consumer_group_metadata_destroy(membership);
	return error;
}

/* Until it is done; false where it cannot be, or the worker is called away. */
static bool
take_step(EsSourceRun *run, Step step, const rd_kafka_topic_partition_list_t *offsets,
		  EsProblem *problem)
{
	rd_kafka_error_t *error;

	while ((error = call(run, step, offsets)) != NULL)
	{
		const char *reason =
			MemoryContextStrdup(run->scratch, rd_kafka_error_string(error));
		bool again = rd_kafka_error_is_retriable(error) ||
					 rd_kafka_error_code(error) == RD_KAFKA_RESP_ERR__TIMED_OUT;

		rd_kafka_error_destroy(error);
		es_kafka_note(producer);
		if (!again || !await_reports(run))
			return fail(problem, reason);
	}
	return true;
}

/* Sends them, and waits until they have arrived. */
static bool
send_records(EsSourceRun *run, EsRecord *made, int n, EsProblem *problem)
{
	EsHeader headers[3];

	for (int i = 0; i < n; i++)
	{
		rd_kafka_resp_err_t result;

		add_origin(&made[i], headers);
		while ((result = es_delivery_put(&delivery, producer->handle, topic,
										 made[i].partition, &made[i], i)) ==
			   RD_KAFKA_RESP_ERR__QUEUE_FULL)
			if (!await_reports(run))
				return fail(problem, "the changelog topic takes no records");
		if (result != RD_KAFKA_RESP_ERR_NO_ERROR)
			return fail(problem, rd_kafka_err2str(result));
	}
	while (!es_delivery_is_settled(&delivery))
		if (!await_reports(run))
			return fail(problem, delivery.error != RD_KAFKA_RESP_ERR_NO_ERROR
									 ? rd_kafka_err2str(delivery.error)
									 : "the changelog topic takes no records");
	return true;
}

/* In one transaction.  What fails closes the producer; the next one aborts what is left. */
static bool
publish(EsSourceRun *run, EsRecord *made, int n,
		const rd_kafka_topic_partition_list_t *offsets, EsProblem *problem)
{
	if (producer == NULL)
	{
		open_producer(run);
		if (!take_step(run, STEP_FENCE, offsets, problem))
			return false;
	}
	return take_step(run, STEP_BEGIN, offsets, problem) &&
		   send_records(run, made, n, problem) &&
		   take_step(run, STEP_OFFSETS, offsets, problem) &&
		   take_step(run, STEP_COMMIT, offsets, problem);
}

bool
es_relay_publish(EsSourceRun *run, int from, int *to, const EsProblem *known,
				 EsProblem *problem)
{
	EsRecord						*made;
	rd_kafka_topic_partition_list_t *offsets;
	volatile bool					 published = false;

	if (from < run->nrelayed)
	{
		*to = Min(*to, run->nrelayed);
		return true;
	}
	made = MemoryContextAllocHuge(run->scratch, sizeof(EsRecord) * (*to - from));
	offsets = rd_kafka_topic_partition_list_new(0);
	PG_TRY();
	{
		int passed = *to;
		int n = make_records(run, from, &passed, known, made, offsets);

		published = n == 0 || publish(run, made, n, offsets, problem);
		if (published)
			run->nrelayed = passed;
	}
	PG_FINALLY();
	{
		rd_kafka_topic_partition_list_destroy(offsets);
	}
	PG_END_TRY();
	return published;
}
