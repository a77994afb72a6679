/*
 * kafka/sink_transaction.c
 *		Exactly once: events and the position behind them in one transaction of
 *		Kafka's.
 *
 *	1.	At its start the worker initialises its transactional.id, which ends
 *		whatever a predecessor has left open and refuses him everything more.
 *	2.	Then it reads the progress topic to its end, as committed: the last record
 *		of its key says how far the last committed transaction went.  Where that is
 *		beyond the table's position, the server died between the two commits.
 *	3.	Each transaction has a range of events and one record with the position
 *		behind them.  It is committed once all of them are acknowledged; then the
 *		table follows.
 *
 * The order of 1 and 2 matters: what the predecessor commits before he is fenced
 * is seen, and after it he commits nothing.  The outcome of a commit that is not
 * known (the connection went) is learnt in the same way, by a new client.
 *
 * The progress topic is compacted, has one partition, and is shared by all sinks
 * that do not name another one.  Its end is the high watermark, not the last
 * stable offset: another sink's open transaction may lie before our record.  So
 * we wait for those, which end by transaction.timeout.ms at the latest.
 *
 * Kafka also fences a transaction that has taken too long; as long as ours was
 * open for about that time, it is taken for that, and begun again.  Any other
 * fence means that somebody else runs as this sink (a copy of this server), and
 * is a reason to stop.
 *
 * The changelog of a store whose source is in a consumer group.  There the group's
 * coordinator is asked whether what a transaction has written is still ours to
 * write: before the commit it is given offsets of those partitions, with the
 * membership by which they were ours when the transaction began (share.c).  There
 * is no progress topic then, and a position that was lost only has the same changes
 * published once more, by whoever the partitions are of.  A membership that was
 * refused is not tried again: the source's worker will say a later one.
 *
 * Each call into librdkafka ends after CALL_MS, is made again where that was the
 * only reason, and interrupts are served between.  All but one go on where they
 * were; the question to the group (es_kafka_send_offsets) begins anew, and takes up
 * to four seconds.
 */
#include "postgres.h"

#include "kafka/connection.h"
#include "kafka/sink_run.h"

#include "access/xlog.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "worker/process.h"

#define CALL_MS	   500
#define TIMEOUT_MS 60000
/* A dead member's transaction is in the way of who takes its partitions over. */
#define GROUP_TIMEOUT_MS 10000
/* An abort that takes longer is left to the next client. */
#define ABORT_CALLS 10
/* A record that was refused is reported within so long. */
#define REPORT_MS 500

/* Of a progress record: the dead letter that was published again with it. */
#define LETTER_HEADER "es-dead-letter"

/* ---------------------------------------------------------------------------
 * Settings
 * ------------------------------------------------------------------------- */

static bool
is_groups(const EsSinkRun *run)
{
	return run->sink->progress_topic == NULL;
}

void
es_sink_transaction_own(EsSinkRun *run, const char *own[][2])
{
	const char *timeout =
		is_groups(run) ? CppAsString2(GROUP_TIMEOUT_MS) : CppAsString2(TIMEOUT_MS);
	int n = 0;

	/* Ids begin anew with the extension: another sink of the same id is not this one. */
	snprintf(run->identity, sizeof(run->identity),
			 "eventstore-" UINT64_FORMAT "-%u-%u-" INT64_FORMAT, GetSystemIdentifier(),
			 MyDatabaseId, run->sink->id, run->sink->created_at);
	while (own[n][0] != NULL)
		n++;
	own[n][0] = "transactional.id";
	own[n++][1] = run->identity;
	own[n][0] = "transaction.timeout.ms";
	own[n++][1] = timeout;
	/* no record may take longer than its transaction */
	own[n][0] = "delivery.timeout.ms";
	own[n++][1] = timeout;
	own[n][0] = own[n][1] = NULL;
}

/* ---------------------------------------------------------------------------
 * Errors
 * ------------------------------------------------------------------------- */

static bool
is_fence(int code)
{
	return code == RD_KAFKA_RESP_ERR__FENCED ||
		   code == RD_KAFKA_RESP_ERR_PRODUCER_FENCED ||
		   code == RD_KAFKA_RESP_ERR_INVALID_PRODUCER_EPOCH;
}

/* The group knows no such member, in this generation. */
static bool
is_no_member(int code)
{
	return code == RD_KAFKA_RESP_ERR_ILLEGAL_GENERATION ||
		   code == RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID ||
		   code == RD_KAFKA_RESP_ERR_FENCED_INSTANCE_ID;
}

static const char *
state_after(int code)
{
	return code == RD_KAFKA_RESP_ERR_TRANSACTIONAL_ID_AUTHORIZATION_FAILED ||
				   code == RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED ||
				   code == RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED
			   ? "denied"
			   : "retrying";
}

/* The client will do nothing any more. */
static void
leave_client(EsSinkRun *run, int code, const char *message)
{
	bool too_long = run->in_transaction &&
					TimestampDifferenceExceeds(
						run->transaction_began, GetCurrentTimestamp(),
						(is_groups(run) ? GROUP_TIMEOUT_MS : TIMEOUT_MS) * 9 / 10);

	if (is_fence(code) && !too_long)
	{
		run->leave = ES_LEAVE_NOT;
		run->in_transaction = run->closing = false;
		/* What was acknowledged was never committed. */
		es_sink_rewind(run, run->saved);
		es_sink_stop_at(run, ES_SINK_FENCED, message);
		return;
	}
	es_sink_retry_later(run, state_after(code), message);
	run->leave = ES_LEAVE_AND_RETURN;
	run->pause_ms = ES_TASK_PAUSE_MS;
}

static void
note_refused(EsSinkRun *run)
{
	const bytea *membership = es_share_membership(run->share);

	run->refused = MemoryContextAlloc(run->life, VARSIZE(membership));
	memcpy(run->refused, membership, VARSIZE(membership));
}

/*
 * What to do after a call: true where it is done.  Else it is to be made again,
 * unless the client is to be left or the transaction was aborted.
 */
static bool
settle(EsSinkRun *run, rd_kafka_error_t *error)
{
	int	 code;
	char message[256];

	es_kafka_note(run->client);
	if (error == NULL)
		return true;
	code = rd_kafka_error_code(error);
	strlcpy(message, rd_kafka_error_string(error), sizeof(message));
	if (rd_kafka_error_is_fatal(error) || is_fence(code))
	{
		rd_kafka_error_destroy(error);
		leave_client(run, code, message);
	}
	else if (rd_kafka_error_txn_requires_abort(error))
	{
		rd_kafka_error_destroy(error);
		if (is_no_member(code))
			note_refused(run);
		es_sink_transaction_abort(run);
		es_sink_retry_later(run, state_after(code), message);
	}
	else if (rd_kafka_error_is_retriable(error) || code == RD_KAFKA_RESP_ERR__TIMED_OUT)
		rd_kafka_error_destroy(error);
	else
	{
		rd_kafka_error_destroy(error);
		leave_client(run, code, message);
	}
	return false;
}

/* ---------------------------------------------------------------------------
 * The progress topic
 * ------------------------------------------------------------------------- */

static EsKafkaClient *
open_reader(EsSinkRun *run)
{
	const char *const own[][2] = {
		{"group.id", run->identity},		   {"enable.auto.commit", "false"},
		{"enable.auto.offset.store", "false"}, {"auto.offset.reset", "earliest"},
		{"enable.partition.eof", "true"},	   {"isolation.level", "read_committed"},
		{"allow.auto.create.topics", "false"}, {NULL, NULL}};
	EsKafkaClient *reader;
	List		  *properties;

	es_task_begin();
	MemoryContextSwitchTo(run->life);
	properties = es_kafka_properties(run->sink->server, run->sink->owner, NULL);
	es_task_commit(run->scratch);
	reader =
		es_kafka_open(RD_KAFKA_CONSUMER, run->sink->name, properties, own, NULL, run);
	reader->owner = run->sink->owner;
	return reader;
}

/* What the broker answers to the wish for a topic of one compacted partition. */
static rd_kafka_resp_err_t
ask_for_topic(EsKafkaClient *reader, const char *name, char *said, size_t size)
{
	rd_kafka_NewTopic_t		*topic = rd_kafka_NewTopic_new(name, 1, -1, said, size);
	rd_kafka_queue_t		*queue = rd_kafka_queue_new(reader->handle);
	rd_kafka_AdminOptions_t *options =
		rd_kafka_AdminOptions_new(reader->handle, RD_KAFKA_ADMIN_OP_CREATETOPICS);
	rd_kafka_resp_err_t result = RD_KAFKA_RESP_ERR__TIMED_OUT;
	rd_kafka_event_t   *event;

	(void) rd_kafka_NewTopic_set_config(topic, "cleanup.policy", "compact");
	(void) rd_kafka_AdminOptions_set_request_timeout(options, 5 * CALL_MS, NULL, 0);
	rd_kafka_CreateTopics(reader->handle, &topic, 1, options, queue);
	event = rd_kafka_queue_poll(queue, 6 * CALL_MS);
	if (event != NULL)
	{
		size_t								  n = 0;
		const rd_kafka_CreateTopics_result_t *answer =
			rd_kafka_event_CreateTopics_result(event);
		const rd_kafka_topic_result_t **topics =
			answer == NULL ? NULL : rd_kafka_CreateTopics_result_topics(answer, &n);

		result = rd_kafka_event_error(event);
		if (n > 0)
			result = rd_kafka_topic_result_error(topics[0]);
		strlcpy(said, rd_kafka_err2str(result), size);
		rd_kafka_event_destroy(event);
	}
	rd_kafka_AdminOptions_destroy(options);
	rd_kafka_queue_destroy(queue);
	rd_kafka_NewTopic_destroy(topic);
	return result;
}

/* False where it is not there, and cannot be made now. */
static bool
find_topic(EsSinkRun *run, EsKafkaClient *reader)
{
	const char		   *name = run->sink->progress_topic;
	rd_kafka_topic_t   *topic = rd_kafka_topic_new(reader->handle, name, NULL);
	rd_kafka_resp_err_t error;
	char				said[256] = "";

	(void) es_kafka_count_partitions(reader, topic, CALL_MS, &error);
	rd_kafka_topic_destroy(topic);
	if (error == RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART)
	{
		error = ask_for_topic(reader, name, said, sizeof(said));
		if (error == RD_KAFKA_RESP_ERR_NO_ERROR ||
			error == RD_KAFKA_RESP_ERR_TOPIC_ALREADY_EXISTS)
			return true;
		es_sink_set_state(
			run, "topic_missing",
			psprintf("progress topic \"%s\" cannot be made (%s)", name, said));
		return false;
	}
	if (error == RD_KAFKA_RESP_ERR_NO_ERROR)
		return true;
	es_sink_set_state(run,
					  error == RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED ||
							  reader->trouble == ES_KAFKA_DENIED
						  ? "denied"
						  : "disconnected",
					  reader->message[0] != '\0' ? reader->message
												 : rd_kafka_err2str(error));
	return false;
}

/* Was a dead letter published in that transaction? */
static void
take_letter(EsSinkRun *run, const rd_kafka_message_t *message)
{
	rd_kafka_headers_t *headers;
	const void		   *id;
	size_t				length;

	run->published_letter[0] = '\0';
	if (rd_kafka_message_headers(message, &headers) == RD_KAFKA_RESP_ERR_NO_ERROR &&
		rd_kafka_header_get_last(headers, LETTER_HEADER, &id, &length) ==
			RD_KAFKA_RESP_ERR_NO_ERROR &&
		length == ES_UUID_TEXT_LEN)
		strlcpy(run->published_letter, id, ES_UUID_TEXT_LEN + 1);
}

/* A record of ours says a position. */
static void
take_progress(EsSinkRun *run, const rd_kafka_message_t *message, EsPosition *position)
{
	char  digits[MAXINT8LEN + 1];
	char *end;
	int64 found;

	if (message->key_len != strlen(run->identity) ||
		memcmp(message->key, run->identity, message->key_len) != 0 ||
		message->payload == NULL || message->len > MAXINT8LEN)
		return;
	memcpy(digits, message->payload, message->len);
	digits[message->len] = '\0';
	found = strtoll(digits, &end, 10);
	if (*end != '\0' || end == digits)
		return;
	*position = found;
	take_letter(run, message);
}

/*
 * Reads to the end; false where it is to be left before.  The last stable offset
 * is passed on the way to the high watermark once others' transactions end.
 */
static bool
read_to_end(EsSinkRun *run, EsKafkaClient *reader, EsPosition *position)
{
	const char *name = run->sink->progress_topic;
	int64		end = -1;
	int64		at = 0;

	while (end < 0 || at < end)
	{
		rd_kafka_message_t *message;

		if (es_process_interrupts())
		{
			run->leave = ES_LEAVE_FOR_GOOD;
			return false;
		}
		message = rd_kafka_consumer_poll(reader->handle, 0);
		es_kafka_note(reader);
		if (message == NULL)
		{
			es_kafka_wait(&reader, 1, CALL_MS);
			if (es_worker_pending(ES_WAKE_CONFIG) != 0)
				return false;
			if (reader->trouble != ES_KAFKA_FINE)
			{
				es_sink_set_state(
					run, reader->trouble == ES_KAFKA_DENIED ? "denied" : "disconnected",
					reader->message);
				return false;
			}
			continue;
		}
		at = message->offset;
		if (message->err == RD_KAFKA_RESP_ERR_NO_ERROR)
		{
			take_progress(run, message, position);
			at++;
		}
		else if (message->err == RD_KAFKA_RESP_ERR__PARTITION_EOF && end < 0)
		{
			int64 low;

			(void) rd_kafka_get_watermark_offsets(reader->handle, name, 0, &low, &end);
		}
		else if (message->err != RD_KAFKA_RESP_ERR__PARTITION_EOF)
		{
			es_sink_set_state(run, "retrying", rd_kafka_message_errstr(message));
			rd_kafka_message_destroy(message);
			return false;
		}
		rd_kafka_message_destroy(message);
	}
	return true;
}

static bool
read_progress(EsSinkRun *run, EsKafkaClient *reader, EsPosition *position)
{
	rd_kafka_topic_partition_list_t *list = rd_kafka_topic_partition_list_new(1);
	rd_kafka_resp_err_t				 error;

	rd_kafka_topic_partition_list_add(list, run->sink->progress_topic, 0)->offset =
		RD_KAFKA_OFFSET_BEGINNING;
	error = rd_kafka_assign(reader->handle, list);
	rd_kafka_topic_partition_list_destroy(list);
	if (error != RD_KAFKA_RESP_ERR_NO_ERROR)
	{
		es_sink_set_state(run, "retrying", rd_kafka_err2str(error));
		return false;
	}
	return read_to_end(run, reader, position);
}

/* ---------------------------------------------------------------------------
 * Transactions
 * ------------------------------------------------------------------------- */

/* Fences whoever was this sink before; false where that cannot be now. */
static bool
fence_predecessor(EsSinkRun *run)
{
	while (run->leave == ES_LEAVE_NOT && run->halt == ES_SINK_GOES_ON &&
		   es_worker_pending(ES_WAKE_CONFIG) == 0)
	{
		if (es_process_interrupts())
		{
			run->leave = ES_LEAVE_FOR_GOOD;
			return false;
		}
		if (settle(run, rd_kafka_init_transactions(run->client->handle, CALL_MS)))
			return true;
		if (run->client->trouble != ES_KAFKA_FINE && run->leave == ES_LEAVE_NOT)
			es_sink_set_state(
				run, run->client->trouble == ES_KAFKA_DENIED ? "denied" : "disconnected",
				run->client->message);
	}
	return false;
}

/* Steps 1 and 2, with a client for the time of that. */
static bool
find_progress(EsSinkRun *run, EsPosition *position)
{
	EsKafkaClient *reader = open_reader(run);
	volatile bool  found = false;

	PG_TRY();
	{
		found = find_topic(run, reader) && fence_predecessor(run) &&
				read_progress(run, reader, position);
	}
	PG_FINALLY();
	{
		es_kafka_close(reader);
	}
	PG_END_TRY();
	return found;
}

bool
es_sink_transaction_init(EsSinkRun *run)
{
	EsPosition position = 0;

	if (is_groups(run))
		return fence_predecessor(run);
	if (!find_progress(run, &position))
		return false;
	if (position > run->saved)
		es_sink_save(run, position);
	if (run->published_letter[0] != '\0')
		es_sink_letter_forget(run, run->published_letter);
	run->read_to = run->saved;
	if (run->progress_topic == NULL)
		run->progress_topic =
			rd_kafka_topic_new(run->client->handle, run->sink->progress_topic, NULL);
	return true;
}

bool
es_sink_transaction_share(EsSinkRun *run)
{
	MemoryContext old;
	EsShare		 *now;

	if (!run->in_transaction)
	{
		MemoryContextReset(run->share_life);
		run->share = NULL;
	}
	old = MemoryContextSwitchTo(run->in_transaction ? run->scratch : run->share_life);
	now = es_share_load(run->sink->changelog_of);
	MemoryContextSwitchTo(old);
	if (run->in_transaction)
		run->stale = now == NULL || !es_share_is_by(now, es_share_membership(run->share));
	else if (now != NULL && es_share_is_settled(now) &&
			 !es_share_is_by(now, run->refused))
		run->share = now;
	return run->share != NULL && !run->stale;
}

bool
es_sink_transaction_begin(EsSinkRun *run)
{
	if (run->in_transaction)
		return true;
	if (!settle(run, rd_kafka_begin_transaction(run->client->handle)))
		return false;
	run->in_transaction = true;
	run->closing = run->vouched = false;
	run->transaction_began = GetCurrentTimestamp();
	return true;
}

/*
 * The transaction takes nothing more: something of it was refused, or cannot be
 * sent.  Waits a moment for the report of what was, which says why.
 */
static bool
refusal_is_reported(EsSinkRun *run)
{
	TimestampTz until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), REPORT_MS);

	while (run->delivery.error == RD_KAFKA_RESP_ERR_NO_ERROR &&
		   !es_delivery_is_empty(&run->delivery) && GetCurrentTimestamp() < until)
	{
		es_kafka_wait(&run->client, 1, REPORT_MS);
		es_kafka_serve(run->client);
		CHECK_FOR_INTERRUPTS();
	}
	return run->delivery.error != RD_KAFKA_RESP_ERR_NO_ERROR;
}

/* False where it cannot be put now. */
static bool
put_progress(EsSinkRun *run)
{
	char	 digits[MAXINT8LEN + 1];
	EsRecord record = {.key = run->identity, .key_length = strlen(run->identity)};
	EsHeader letter = {LETTER_HEADER, run->letter, strlen(run->letter)};
	rd_kafka_resp_err_t result;

	if (is_groups(run))
		return run->closing = true;
	pg_lltoa(run->read_to, digits);
	record.value = digits;
	record.value_length = strlen(digits);
	if (run->letter[0] != '\0')
	{
		record.headers = &letter;
		record.nheaders = 1;
	}
	result = es_delivery_put(&run->delivery, run->client->handle, run->progress_topic, 0,
							 &record, 0);
	run->closing = result == RD_KAFKA_RESP_ERR_NO_ERROR;
	if (!run->closing && result != RD_KAFKA_RESP_ERR__QUEUE_FULL &&
		!refusal_is_reported(run))
	{
		es_sink_transaction_abort(run);
		es_sink_retry_later(run, "retrying", rd_kafka_err2str(result));
	}
	return run->closing;
}

/* The group's word that the partitions are ours, as a part of the transaction. */
static bool
ask_group(EsSinkRun *run)
{
	const bytea						   *membership = es_share_membership(run->share);
	rd_kafka_consumer_group_metadata_t *metadata;
	rd_kafka_topic_partition_list_t	   *list;
	rd_kafka_error_t				   *error;
	const char						   *topic;
	const int32						   *partitions;
	const int64						   *offsets;
	int n = es_share_partitions(run->share, &topic, &partitions, &offsets);

	error = rd_kafka_consumer_group_metadata_read(&metadata, VARDATA_ANY(membership),
												  VARSIZE_ANY_EXHDR(membership));
	if (error == NULL)
	{
		list = rd_kafka_topic_partition_list_new(n);
		for (int i = 0; i < n; i++)
			rd_kafka_topic_partition_list_add(list, topic, partitions[i])->offset =
				offsets[i];
		error = es_kafka_send_offsets(run->client, list, metadata);
		rd_kafka_topic_partition_list_destroy(list);
		rd_kafka_consumer_group_metadata_destroy(metadata);
	}
	return run->vouched = settle(run, error);
}

void
es_sink_transaction_close(EsSinkRun *run)
{
	if ((!run->closing && !put_progress(run)) || !es_delivery_is_empty(&run->delivery) ||
		(is_groups(run) && !run->vouched && !ask_group(run)) ||
		!settle(run, rd_kafka_commit_transaction(run->client->handle, CALL_MS)))
		return;
	run->in_transaction = run->closing = false;
	es_kafka_fine(run->client);
	es_sink_save(run, run->read_to);
}

void
es_sink_transaction_fatal(EsSinkRun *run)
{
	char message[256] = "";
	int	 code = rd_kafka_fatal_error(run->client->handle, message, sizeof(message));

	leave_client(run, code, message);
}

/* True where the transaction is no more; false where the client is to be left. */
static bool
abort_transaction(EsSinkRun *run)
{
	for (int i = 0; i < ABORT_CALLS && es_worker_pending(ES_WAKE_CONFIG) == 0; i++)
	{
		rd_kafka_error_t *error;
		bool			  again;

		CHECK_FOR_INTERRUPTS();
		error = rd_kafka_abort_transaction(run->client->handle, CALL_MS);
		es_kafka_note(run->client);
		if (error == NULL)
			return true;
		again = rd_kafka_error_is_retriable(error) ||
				rd_kafka_error_code(error) == RD_KAFKA_RESP_ERR__TIMED_OUT;
		if (rd_kafka_error_is_fatal(error) || is_fence(rd_kafka_error_code(error)))
		{
			rd_kafka_error_destroy(error);
			es_sink_transaction_fatal(run);
			return true;
		}
		rd_kafka_error_destroy(error);
		if (!again)
			break;
	}
	return false;
}

void
es_sink_transaction_abort(EsSinkRun *run)
{
	/* Whoever comes next aborts it. */
	if (run->in_transaction && !abort_transaction(run))
	{
		run->leave = ES_LEAVE_AND_RETURN;
		run->pause_ms = ES_TASK_PAUSE_MS;
	}
	run->in_transaction = run->closing = run->stale = false;
	es_sink_rewind(run, run->saved);
}
