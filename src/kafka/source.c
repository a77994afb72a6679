/*
 * kafka/source.c
 *		The worker of a source: records from a topic, in batches, exactly once.
 *
 * The loop:
 *
 *	1.	Take what librdkafka has fetched (collect), as long as the batch has room.
 *	2.	Once the batch is due, write it (write_batch): records, dead letters and
 *		offsets in one transaction.  While it is written librdkafka fetches on.
 *	3.	Now and then look at the topic itself (look_at_topic): gone, made anew,
 *		more partitions.
 *	4.	Errands: flush() and wait_for_source().
 *	5.	Wait for the queue, the latch or the clock, without a transaction.
 *
 * Exactly once.  Where to read from is what the table says (progress.c); nothing
 * is committed to Kafka.  A batch that did not commit is read again, one that did
 * is not: whether the worker, the server or the broker died makes no difference.
 * Fences: the session's lock on the source (es_task_own); each offset moves only
 * from where we left it; a record below the offset that we want next is dropped,
 * since librdkafka may hand out one twice after a reconnect.
 *
 * A batch that fails.  What is wrong with the server (locks, disk, rights, the
 * target gone) is tried again with a growing pause: no record is to blame.  What
 * may be a record's fault (classes 22, 23, 54, raised by a trigger ...) is found
 * by halving: half the batch in a transaction, then half of that; where a part
 * commits, twice as much the next time.  A single record that fails is parked,
 * skipped, or stops the source, as it says.
 *
 * Whatever stops the source waits for resume() (Halt); a trouble that may pass
 * by itself is tried again, and is the state that the view sources shows.
 *
 * Locks: the source (a session lock), then those of progress.c and of the
 * target, for the time of a batch.  A crash: see above.
 */
#include "postgres.h"

#include "kafka/client.h"
#include "kafka/progress.h"
#include "kafka/source.h"
#include "kafka/task.h"
#include "kafka/writer.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "spi.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "worker/process.h"

/* A batch is due at so many bytes, however few records they are. */
#define BATCH_BYTES			(16 * 1024 * 1024)
/* Messages taken from the queue in one go. */
#define TAKE_MAX			1000
/* How long a call into librdkafka may keep us from serving interrupts. */
#define CALL_MS				1000
/* How often the topic itself is looked at; where it is gone. */
#define TOPIC_LOOK_MS		5000
#define TOPIC_RETRY_MS		1000
/* The pause after a failed transaction doubles from the first to the last value. */
#define RETRY_FIRST_MS		20
#define RETRY_LAST_MS		10000
/* With nothing to do. */
#define IDLE_MS				(60 * 1000)
/* A worker that has lived so long is not failing at its start. */
#define STABLE_MS			(60 * 1000)

/* What a source has stopped at, until resume(). */
typedef enum Halt
{
	HALT_NONE,
	HALT_RECORD,				/* on_error, on_null_key: stop */
	HALT_GAP,					/* on_gap: stop */
	HALT_RECREATED				/* the topic is not the one that was read */
} Halt;

/* Why the loop is left. */
typedef enum Leave
{
	LEAVE_NOT,
	LEAVE_AND_RETURN,			/* to begin anew, with a new client */
	LEAVE_FOR_GOOD
} Leave;

typedef enum Outcome
{
	OUTCOME_WRITTEN,
	OUTCOME_BAD_RECORD,			/* one of those in the range, perhaps */
	OUTCOME_STOPPED,			/* the first of the range must not be passed over */
	OUTCOME_RETRY,
	OUTCOME_LEAVE				/* paused, dropped */
} Outcome;

typedef struct Partition
{
	EsProgress	progress;
	int64		position;		/* of the next record to be taken: lower ones are dropped */
	int64		seen_end;		/* the end, when it was reached; 0 = not yet */
	int64		wanted;			/* wait_for_source(): up to here; 0 = nobody waits */
} Partition;

/* What follows lies in 'life', which lasts as long as the client; 'scratch' lasts a round. */
static MemoryContext life = NULL;
static MemoryContext scratch = NULL;
static EsSource *source = NULL;
static EsKafkaClient *client = NULL;
static rd_kafka_topic_t *topic = NULL;
static Partition *partitions = NULL;
static int	npartitions = 0;

/* The batch: messages, and the same as records. */
static rd_kafka_message_t **messages = NULL;
static EsRecord *records = NULL;
static int	nrecords = 0;
static int	nwritten = 0;		/* of them, from the front */
static size_t nbytes = 0;
static TimestampTz oldest = 0;	/* when the first of them was taken */
static int	width = 0;			/* how many are tried in one transaction */

static Leave leave = LEAVE_NOT;
static Halt halt = HALT_NONE;
static int	halted_partition = 0;	/* an index: HALT_GAP, HALT_RECREATED */
static int64 accepted_resumes = 0;
static TimestampTz retry_at = 0;
static int	retry_ms = 0;
static TimestampTz look_at = 0; /* at the topic */
static bool topic_missing = false;
static bool fetch_denied = false;	/* the topic may be seen, and not read */
static bool pause_first = false;	/* before the next client */
static bool progressed = false; /* a batch was written since the start */
static bool reconnect = false;	/* the server or the mapping was changed */

static bool flush_wanted = false;
static uint64 flush_ticket = 0;
static bool catch_up_wanted = false;
static uint64 catch_up_ticket = 0;

static char state[24] = "";

/* ---------------------------------------------------------------------------
 * State
 * ------------------------------------------------------------------------- */

static void
set_state(const char *name, const char *message)
{
	if (strcmp(state, name) != 0 && strcmp(name, "running") != 0 && strcmp(name, "starting") != 0)
		ereport(LOG,
				(errmsg("source \"%s\": %s", source->name, name),
				 message[0] != '\0' ? errdetail_internal("%s", message) : 0));
	strlcpy(state, name, sizeof(state));
	es_worker_report(source->name, name, message);
}

/* What is wrong with the connection, unless something else is, too. */
static void
show_connection(void)
{
	static const char *const names[] = {"running", "disconnected", "denied", "disconnected"};

	if (halt != HALT_NONE || topic_missing || fetch_denied || retry_at != 0)
		return;
	if (strcmp(state, names[client->trouble]) != 0)
		set_state(names[client->trouble], client->trouble == ES_KAFKA_FINE ? "" : client->message);
	if (client->trouble == ES_KAFKA_FATAL)
	{
		leave = LEAVE_AND_RETURN;
		pause_first = true;
	}
}

static void
stop_at(Halt reason, const char *message)
{
	static const char *const names[] = {"", "stopped", "gap", "topic_recreated"};

	halt = reason;
	set_state(names[reason], message);
}

static void
begin_transaction(void)
{
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
}

static void
commit_transaction(void)
{
	PopActiveSnapshot();
	CommitTransactionCommand();
	MemoryContextSwitchTo(scratch);
}

static void
abort_transaction(void)
{
	AbortCurrentTransaction();
	MemoryContextSwitchTo(scratch);
}

static TimestampTz
ms_from_now(int ms)
{
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), ms);
}

/* ---------------------------------------------------------------------------
 * The batch
 * ------------------------------------------------------------------------- */

static void
drop_batch(void)
{
	for (int i = 0; i < nrecords; i++)
	{
		if (records[i].headers != NULL)
			pfree(records[i].headers);
		rd_kafka_message_destroy(messages[i]);
	}
	nrecords = nwritten = 0;
	nbytes = 0;
	width = source->flush_count;
}

/* Before the client is closed: its messages must be gone. */
static void
release_messages(EsKafkaClient *closing)
{
	for (int i = 0; i < nrecords; i++)
		rd_kafka_message_destroy(messages[i]);
	nrecords = nwritten = 0;
	if (topic != NULL)
		rd_kafka_topic_destroy(topic);
	topic = NULL;
}

static Partition *
find_partition(int32 number)
{
	for (int i = 0; i < npartitions; i++)
		if (partitions[i].progress.partition == number)
			return &partitions[i];
	return NULL;
}

static void
set_headers(EsRecord *record, const rd_kafka_message_t *message)
{
	rd_kafka_headers_t *headers;
	size_t		count;

	if (rd_kafka_message_headers(message, &headers) != RD_KAFKA_RESP_ERR_NO_ERROR)
		return;
	count = rd_kafka_header_cnt(headers);
	if (count == 0)
		return;
	record->headers = MemoryContextAlloc(life, sizeof(EsHeader) * count);
	for (size_t i = 0; i < count; i++)
	{
		EsHeader   *header = &record->headers[i];
		const void *value;

		if (rd_kafka_header_get_all(headers, i, &header->name, &value, &header->length) !=
			RD_KAFKA_RESP_ERR_NO_ERROR)
			break;
		header->value = value;
		record->nheaders++;
	}
}

/* Into the batch; false where it is one that was written already. */
static bool
add_record(rd_kafka_message_t *message)
{
	Partition  *partition = find_partition(message->partition);
	EsRecord   *record = &records[nrecords];
	rd_kafka_timestamp_type_t type;
	int64		time;

	if (partition == NULL || message->offset < partition->position)
		return false;
	partition->position = message->offset + 1;
	memset(record, 0, sizeof(*record));
	record->topic = source->topic;
	record->partition = message->partition;
	record->offset = message->offset;
	record->key = message->key;
	record->key_length = message->key_len;
	record->value = message->payload;
	record->value_length = message->len;
	time = rd_kafka_message_timestamp(message, &type);
	record->has_time = type != RD_KAFKA_TIMESTAMP_NOT_AVAILABLE &&
		es_codec_time(time, &record->time);
	set_headers(record, message);
	if (nrecords == 0)
		oldest = GetCurrentTimestamp();
	messages[nrecords++] = message;
	nbytes += message->len + message->key_len;
	return true;
}

static bool
batch_has_room(void)
{
	return nrecords < source->flush_count && nbytes < BATCH_BYTES;
}

static void out_of_range(int32 number);

/* What came instead of a record. */
static void
note_message_error(const rd_kafka_message_t *message)
{
	Partition  *partition = find_partition(message->partition);

	switch (message->err)
	{
		case RD_KAFKA_RESP_ERR__PARTITION_EOF:
			if (partition != NULL)
				partition->seen_end = message->offset;
			fetch_denied = false;
			es_kafka_fine(client);
			break;
		case RD_KAFKA_RESP_ERR__AUTO_OFFSET_RESET:
		case RD_KAFKA_RESP_ERR_OFFSET_OUT_OF_RANGE:
			out_of_range(message->partition);
			break;
		case RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART:
		case RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC:
		case RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION:
			look_at = 0;
			break;
		case RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED:
			fetch_denied = true;
			set_state("denied", rd_kafka_message_errstr(message));
			break;
		default:
			ereport(LOG,
					(errmsg("source \"%s\": %s", source->name, rd_kafka_message_errstr(message))));
			break;
	}
}

/* Takes what is there, as long as the batch has room. */
static void
collect(void)
{
	static rd_kafka_message_t *taken[TAKE_MAX];

	while (batch_has_room() && leave == LEAVE_NOT && halt == HALT_NONE)
	{
		int			room = Min(TAKE_MAX, source->flush_count - nrecords);
		ssize_t		n = rd_kafka_consume_batch_queue(client->queue, 0, taken, room);

		if (n <= 0)
			break;
		for (ssize_t i = 0; i < n; i++)
		{
			if (taken[i]->err == RD_KAFKA_RESP_ERR_NO_ERROR && leave == LEAVE_NOT &&
				add_record(taken[i]))
				continue;
			if (taken[i]->err != RD_KAFKA_RESP_ERR_NO_ERROR)
				note_message_error(taken[i]);
			rd_kafka_message_destroy(taken[i]);
		}
		if (nrecords > 0)
		{
			fetch_denied = false;
			es_kafka_fine(client);
		}
		CHECK_FOR_INTERRUPTS();
	}
	es_kafka_note(client);
	show_connection();
}

/* ---------------------------------------------------------------------------
 * Writing
 * ------------------------------------------------------------------------- */

static EsPolicy
policy_for(const EsRecord *record)
{
	return record->key == NULL ? source->on_null_key : source->on_error;
}

/* Offsets behind the records from..to; the table's row is where 'written' says. */
static void
advance_to(int from, int to)
{
	EsProgress *moves = palloc(sizeof(EsProgress) * npartitions);
	int			n = 0;

	for (int i = 0; i < npartitions; i++)
		partitions[i].progress.next = partitions[i].progress.written;
	for (int i = from; i < to; i++)
	{
		EsProgress *progress = &find_partition(records[i].partition)->progress;

		progress->next = records[i].offset + 1;
		progress->has_time = records[i].has_time;
		progress->time = records[i].time;
	}
	for (int i = 0; i < npartitions; i++)
	{
		EsProgress *progress = &partitions[i].progress;
		int64		low;

		if (progress->next == progress->written)
			continue;
		if (rd_kafka_get_watermark_offsets(client->handle, source->topic, progress->partition,
										   &low, &progress->end) != RD_KAFKA_RESP_ERR_NO_ERROR)
			progress->end = -1;
		moves[n++] = *progress;
	}
	es_progress_advance(source, moves, n);
}

/* The transaction has committed. */
static void
note_advanced(void)
{
	for (int i = 0; i < npartitions; i++)
		partitions[i].progress.written = partitions[i].progress.next;
}

/*
 * The first one that must not be passed over, from..to; with the others' problems
 * dealt with.
 */
static int
apply_policies(int from, int to, const EsProblem *problems, int *parked, int *skipped)
{
	for (int i = from; i < to; i++)
	{
		const EsProblem *problem = &problems[i - from];

		if (problem->sqlstate == 0)
			continue;
		switch (policy_for(&records[i]))
		{
			case ES_POLICY_STOP:
				return i;
			case ES_POLICY_PARK:
				es_progress_park(source, &records[i], problem);
				(*parked)++;
				break;
			case ES_POLICY_SKIP:
				(*skipped)++;
				break;
		}
	}
	return to;
}

/*
 * In a transaction: the records from..to, or those before one that must not be
 * passed over; says up to which.  'known' is the problem of a single record that
 * an earlier attempt has found.
 */
static int
write_range(int from, int to, const EsProblem *known, EsProblem *stopped_by)
{
	EsWriter   *writer = es_writer_begin(source);
	EsProblem  *problems = palloc(sizeof(EsProblem) * (to - from));
	EsDecoded  *decoded = es_writer_decode(writer, &records[from], to - from, problems);
	EsRoleSwitch saved;
	EsWritten	written;
	int			parked = 0;
	int			skipped = 0;
	int			end;

	if (known != NULL && problems[0].sqlstate == 0)
		problems[0] = *known;
	end = apply_policies(from, to, problems, &parked, &skipped);
	if (end < to)
		*stopped_by = problems[end - from];

	es_role_assume(source->owner, &saved);
	es_writer_write(writer, &records[from], decoded, end - from, problems, &written);
	es_role_restore(&saved);
	advance_to(from, end);

	es_worker_count(ES_WORKER_RECORDS, end - from);
	es_worker_count(ES_WORKER_BATCHES, 1);
	es_worker_count(ES_WORKER_PARKED, parked);
	es_worker_count(ES_WORKER_SKIPPED, skipped + written.dropped);
	return end;
}

/* May a record be to blame for it? */
static bool
is_records_fault(int sqlstate)
{
	static const int others[] = {
		ERRCODE_CONNECTION_EXCEPTION, ERRCODE_FEATURE_NOT_SUPPORTED,
		ERRCODE_INVALID_TRANSACTION_STATE, ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
		ERRCODE_INVALID_CATALOG_NAME, ERRCODE_INVALID_SCHEMA_NAME,
		ERRCODE_TRANSACTION_ROLLBACK, ERRCODE_SYNTAX_ERROR_OR_ACCESS_RULE_VIOLATION,
		ERRCODE_INSUFFICIENT_RESOURCES, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
		ERRCODE_OPERATOR_INTERVENTION, ERRCODE_SYSTEM_ERROR, ERRCODE_CONFIG_FILE_ERROR,
		ERRCODE_INTERNAL_ERROR, MAKE_SQLSTATE('L', 'G', '0', '0', '0')
	};

	for (int i = 0; i < lengthof(others); i++)
		if (ERRCODE_TO_CATEGORY(sqlstate) == ERRCODE_TO_CATEGORY(others[i]))
			return false;
	return true;
}

static void
retry_later(const char *message)
{
	retry_ms = retry_ms == 0 ? RETRY_FIRST_MS : Min(retry_ms * 2, RETRY_LAST_MS);
	retry_at = ms_from_now(retry_ms);
	if (retry_ms >= 500)
		set_state("retrying", message);
}

/*
 * One transaction; *to is how far it came.  'problem' is what a single record is
 * known to suffer from (sqlstate 0: nothing), and what was found.
 */
static Outcome
try_range(int from, int *to, EsProblem *problem)
{
	volatile Outcome outcome = OUTCOME_WRITTEN;
	EsProblem	stopped_by = {0};
	volatile int end = from;

	PG_TRY();
	{
		begin_transaction();
		if (!es_task_hold(es_source_key(source->id)))
			outcome = OUTCOME_LEAVE;
		else
			end = write_range(from, *to, problem->sqlstate != 0 ? problem : NULL, &stopped_by);
		if (end < *to && outcome == OUTCOME_WRITTEN)
			stopped_by.reason = MemoryContextStrdup(scratch, stopped_by.reason);
		commit_transaction();
		note_advanced();
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(scratch);
		error = CopyErrorData();
		FlushErrorState();
		abort_transaction();
		problem->sqlstate = error->sqlerrcode;
		problem->reason = error->message;
		outcome = is_records_fault(error->sqlerrcode) ? OUTCOME_BAD_RECORD : OUTCOME_RETRY;
	}
	PG_END_TRY();

	if (outcome == OUTCOME_WRITTEN && end < *to)
	{
		*problem = stopped_by;
		if (end == from)
			outcome = OUTCOME_STOPPED;
	}
	*to = end;
	return outcome;
}

static void
stop_at_record(const EsRecord *record, const EsProblem *problem)
{
	stop_at(HALT_RECORD,
			psprintf("partition %d, offset " INT64_FORMAT ": %s (%s)", record->partition,
					 record->offset, problem->reason, unpack_sql_state(problem->sqlstate)));
}

/* One step through the batch; false where it cannot go on now. */
static bool
write_step(void)
{
	int			to = nwritten + Min(width, nrecords - nwritten);
	int			tried = to - nwritten;
	EsProblem	problem = {0};
	Outcome		outcome = try_range(nwritten, &to, &problem);

	if (outcome == OUTCOME_BAD_RECORD && tried == 1)
	{
		/* It was this one: once more, to be dealt with as a record that is bad. */
		to = nwritten + 1;
		outcome = try_range(nwritten, &to, &problem);
	}
	switch (outcome)
	{
		case OUTCOME_WRITTEN:
			nwritten = to;
			progressed = true;
			width = Min(width * 2, source->flush_count);
			retry_at = 0;
			retry_ms = 0;
			return true;
		case OUTCOME_BAD_RECORD:
			width = Max(tried / 2, 1);
			return tried > 1;
		case OUTCOME_STOPPED:
			stop_at_record(&records[nwritten], &problem);
			return false;
		case OUTCOME_RETRY:
			retry_later(problem.reason);
			return false;
		case OUTCOME_LEAVE:
			leave = LEAVE_AND_RETURN;
			return false;
	}
	return false;
}

static void
write_batch(void)
{
	while (nwritten < nrecords && leave == LEAVE_NOT && halt == HALT_NONE)
	{
		if (!write_step())
			return;
		CHECK_FOR_INTERRUPTS();
	}
	if (nwritten == nrecords)
		drop_batch();
	if (strcmp(state, "retrying") == 0 || strcmp(state, "stopped") == 0)
		set_state("running", "");
}

static bool
batch_is_due(TimestampTz now)
{
	if (nrecords == 0 || halt != HALT_NONE || retry_at > now)
		return false;
	return !batch_has_room() || nwritten > 0 || flush_wanted || catch_up_wanted ||
		now - oldest >= source->flush_us;
}

/*
 * At a partition's end there may be offsets without a record (marks of
 * transactions, compacted records): they are passed, or there would be a lag
 * for ever.
 */
static void
pass_holes(void)
{
	bool		holes = false;

	if (nrecords > 0 || halt != HALT_NONE)
		return;
	for (int i = 0; i < npartitions; i++)
		holes = holes || partitions[i].seen_end > partitions[i].progress.written;
	if (!holes)
		return;
	begin_transaction();
	if (es_task_hold(es_source_key(source->id)))
	{
		EsProgress *moves = palloc(sizeof(EsProgress) * npartitions);
		int			n = 0;

		for (int i = 0; i < npartitions; i++)
		{
			EsProgress *progress = &partitions[i].progress;

			progress->next = Max(progress->written, partitions[i].seen_end);
			progress->end = progress->next;
			if (progress->next > progress->written)
				moves[n++] = *progress;
		}
		es_progress_advance(source, moves, n);
	}
	else
		leave = LEAVE_AND_RETURN;
	commit_transaction();
	if (leave == LEAVE_NOT)
		note_advanced();
}

/* ---------------------------------------------------------------------------
 * Gaps
 * ------------------------------------------------------------------------- */

/* Moves the partition in the table; the client begins anew from there. */
static void
jump(Partition *partition, int64 to, const char *reason)
{
	begin_transaction();
	if (es_task_hold(es_source_key(source->id)))
		es_progress_jump(source, &partition->progress, to, reason);
	commit_transaction();
	leave = LEAVE_AND_RETURN;
}

/* The low and high end of a partition; false where they cannot be had now. */
static bool
find_ends(const Partition *partition, int64 *low, int64 *high)
{
	return rd_kafka_query_watermark_offsets(client->handle, source->topic,
											partition->progress.partition, low, high,
											CALL_MS) == RD_KAFKA_RESP_ERR_NO_ERROR;
}

/* The offset that we want is not there.  What was read before comes first. */
static void
out_of_range(int32 number)
{
	Partition  *partition = find_partition(number);
	int64		wanted;
	int64		low;
	int64		high;

	if (partition == NULL)
		return;
	write_batch();
	wanted = partition->progress.written;
	if (halt != HALT_NONE || leave != LEAVE_NOT || nrecords > 0 ||
		!find_ends(partition, &low, &high) || (wanted >= low && wanted <= high))
	{
		leave = LEAVE_AND_RETURN;	/* and ask again */
		return;
	}
	halted_partition = partition - partitions;
	if (wanted > high)
		stop_at(HALT_RECREATED,
				psprintf("partition %d ends at offset " INT64_FORMAT ", and " INT64_FORMAT
						 " was to be read next: the topic was truncated or made anew",
						 number, high, wanted));
	else if (source->on_gap == ES_GAP_STOP)
		stop_at(HALT_GAP,
				psprintf("partition %d begins at offset " INT64_FORMAT ", and " INT64_FORMAT
						 " was to be read next", number, low, wanted));
	else
		jump(partition, source->on_gap == ES_GAP_LATEST ? high : low, "retention");
}

/* resume() was called. */
static void
accept_halt(void)
{
	Halt		reason = halt;
	Partition  *partition = &partitions[halted_partition];
	int64		low;
	int64		high;

	halt = HALT_NONE;
	set_state("running", "");
	if (reason == HALT_GAP || reason == HALT_RECREATED)
	{
		leave = LEAVE_AND_RETURN;
		if (find_ends(partition, &low, &high))
			jump(partition, low, reason == HALT_GAP ? "retention" : "topic made anew");
	}
}

/* ---------------------------------------------------------------------------
 * The topic
 * ------------------------------------------------------------------------- */

static bool
is_wanted_partition(int32 number)
{
	if (source->npartitions == 0)
		return true;
	for (int i = 0; i < source->npartitions; i++)
		if (source->partitions[i] == number)
			return true;
	return false;
}

/*
 * How many partitions the topic has; 0 where that cannot be told, or there is
 * none: the state says why.
 */
static int
count_partitions(void)
{
	const struct rd_kafka_metadata *metadata;
	rd_kafka_resp_err_t error;
	int			count = 0;

	error = rd_kafka_metadata(client->handle, 0, topic, &metadata, CALL_MS);
	if (error != RD_KAFKA_RESP_ERR_NO_ERROR)
	{
		es_kafka_note(client);
		set_state(client->trouble == ES_KAFKA_DENIED ? "denied" : "disconnected",
				  client->message[0] != '\0' ? client->message : rd_kafka_err2str(error));
		return 0;
	}
	es_kafka_fine(client);
	if (metadata->topic_cnt > 0)
	{
		error = metadata->topics[0].err;
		count = metadata->topics[0].partition_cnt;
	}
	rd_kafka_metadata_destroy(metadata);
	if (error == RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED)
		set_state("denied", rd_kafka_err2str(error));
	else if (error == RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART)
	{
		topic_missing = true;
		set_state("topic_missing", psprintf("there is no topic \"%s\"", source->topic));
	}
	else if (error == RD_KAFKA_RESP_ERR_NO_ERROR && count > 0)
		return count;
	return 0;
}

/*
 * While the source runs: has the topic gone, come again, or grown?  And are we
 * wanted still?  (A transaction: it also hears of changes to the server.)
 */
static void
look_at_topic(void)
{
	bool		was_missing = topic_missing;
	int			count = count_partitions();
	int			wanted = 0;

	if (!es_process_has_extension())
		leave = LEAVE_AND_RETURN;
	look_at = ms_from_now(count == 0 ? TOPIC_RETRY_MS : TOPIC_LOOK_MS);
	if (count == 0)
		return;
	topic_missing = false;
	if (was_missing)
	{
		halted_partition = 0;
		stop_at(HALT_RECREATED, "the topic was deleted and made anew");
		return;
	}
	for (int32 i = 0; i < count; i++)
		if (is_wanted_partition(i))
			wanted++;
	if (wanted > npartitions && source->group_id == NULL)
		leave = LEAVE_AND_RETURN;
	else
		show_connection();
}

/* ---------------------------------------------------------------------------
 * Beginning
 * ------------------------------------------------------------------------- */

/* The offset that "start" names for a partition; -1: none. */
static int64
named_offset(int32 partition)
{
	char	   *key = psprintf("%d", partition);
	JsonbValue	buffer;
	JsonbValue *value = getKeyJsonValueFromContainer(&source->start_offsets->root, key,
													 strlen(key), &buffer);

	if (value == NULL || value->type != jbvNumeric)
		return -1;
	return DatumGetInt64(DirectFunctionCall1(numeric_int8, NumericGetDatum(value->val.numeric)));
}

/* The first offset of that time or later, or the end. */
static bool
find_time(int32 partition, int64 *offset)
{
	rd_kafka_topic_partition_list_t *list = rd_kafka_topic_partition_list_new(1);
	rd_kafka_resp_err_t error;

	rd_kafka_topic_partition_list_add(list, source->topic, partition)->offset =
		es_codec_kafka_time(source->start_time);
	error = rd_kafka_offsets_for_times(client->handle, list, CALL_MS);
	if (error == RD_KAFKA_RESP_ERR_NO_ERROR)
		error = list->elems[0].err;
	*offset = list->elems[0].offset;
	rd_kafka_topic_partition_list_destroy(list);
	return error == RD_KAFKA_RESP_ERR_NO_ERROR;
}

/* Where to begin with a partition that was not begun; false where Kafka does not say now. */
static bool
find_start(int32 partition, EsStart start, int64 *offset)
{
	int64		low;
	int64		high;

	if (rd_kafka_query_watermark_offsets(client->handle, source->topic, partition, &low, &high,
										 CALL_MS) != RD_KAFKA_RESP_ERR_NO_ERROR)
		return false;
	*offset = low;
	if (start == ES_START_LATEST)
		*offset = high;
	else if (start == ES_START_OFFSETS && named_offset(partition) >= 0)
		*offset = named_offset(partition);
	else if (start == ES_START_TIME)
	{
		if (!find_time(partition, offset))
			return false;
		if (*offset < 0)
			*offset = high;
	}
	return true;
}

/* In life; the number of them. */
static int
load_progress(EsProgress **loaded)
{
	MemoryContext old;
	int			n;

	begin_transaction();
	old = MemoryContextSwitchTo(life);
	n = es_progress_load(source, loaded);
	MemoryContextSwitchTo(old);
	commit_transaction();
	return n;
}

static bool
has_progress(const EsProgress *loaded, int n, int32 partition)
{
	for (int i = 0; i < n; i++)
		if (loaded[i].partition == partition)
			return true;
	return false;
}

/*
 * Begins with those of 'count' partitions that are wanted and were not begun.
 * One that comes later is read from its beginning, or its first records would be
 * lost.  False where that cannot be done now.  Kafka is asked first: no
 * transaction waits for it.
 */
static bool
begin_partitions(int count, const EsProgress *loaded, int n)
{
	EsStart		start = n == 0 ? source->start : ES_START_EARLIEST;
	int64	   *offsets = palloc0(sizeof(int64) * count);
	bool	   *begin = palloc0(sizeof(bool) * count);

	for (int32 i = 0; i < count; i++)
	{
		begin[i] = is_wanted_partition(i) && !has_progress(loaded, n, i);
		if (begin[i] && !find_start(i, start, &offsets[i]))
		{
			set_state("disconnected", "the broker does not tell the topic's offsets");
			return false;
		}
	}
	begin_transaction();
	for (int32 i = 0; i < count; i++)
		if (begin[i])
			es_progress_begin(source, i, offsets[i]);
	commit_transaction();
	return true;
}

/* Those of 'count' partitions that are wanted, begun and ready; false where that cannot be now. */
static bool
load_partitions(int count)
{
	EsProgress *loaded;
	int			n = load_progress(&loaded);

	if (!begin_partitions(count, loaded, n))
		return false;
	n = load_progress(&loaded);
	partitions = MemoryContextAllocZero(life, sizeof(Partition) * Max(n, 1));
	npartitions = 0;
	for (int i = 0; i < n; i++)
		if (is_wanted_partition(loaded[i].partition) && loaded[i].partition < count)
		{
			partitions[npartitions].progress = loaded[i];
			partitions[npartitions++].position = loaded[i].written;
		}
	return true;
}

static void
assign_partitions(void)
{
	rd_kafka_topic_partition_list_t *list = rd_kafka_topic_partition_list_new(npartitions);
	rd_kafka_resp_err_t error;

	for (int i = 0; i < npartitions; i++)
		rd_kafka_topic_partition_list_add(list, source->topic,
										  partitions[i].progress.partition)->offset =
			partitions[i].position;
	error = rd_kafka_assign(client->handle, list);
	rd_kafka_topic_partition_list_destroy(list);
	if (error != RD_KAFKA_RESP_ERR_NO_ERROR)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_ERROR),
				 errmsg("source \"%s\" cannot read topic \"%s\"", source->name, source->topic),
				 errdetail_internal("%s", rd_kafka_err2str(error))));
}

static void
open_client(void)
{
	char	   *group = psprintf("eventstore-" UINT64_FORMAT "-%u-%u", GetSystemIdentifier(),
								 MyDatabaseId, source->id);
	const char *const own[][2] = {
		{"group.id", group},
		{"enable.auto.commit", "false"},
		{"enable.auto.offset.store", "false"},
		{"auto.offset.reset", "error"},
		{"enable.partition.eof", "true"},
		{"isolation.level", "read_committed"},
		{"allow.auto.create.topics", "false"},
		{NULL, NULL}
	};
	List	   *properties;

	begin_transaction();
	if (!OidIsValid(source->server))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("server \"%s\" does not exist", source->server_name)));
	MemoryContextSwitchTo(life);
	properties = es_kafka_properties(source->server, source->owner, source->consumer_properties);
	commit_transaction();
	client = es_kafka_open(RD_KAFKA_CONSUMER, source->name, properties, own, NULL, NULL);
	client->owner = source->owner;
	client->release = release_messages;
	topic = rd_kafka_topic_new(client->handle, source->topic, NULL);
}

static void
close_client(void)
{
	if (client != NULL)
		es_kafka_close(client);
	client = NULL;
}

/* ---------------------------------------------------------------------------
 * What is asked of the worker
 * ------------------------------------------------------------------------- */

/* The row may have changed: pause, resume, drop. */
static void
reload(void)
{
	EsSource   *now;

	begin_transaction();
	now = es_source_load(source->id);
	if (now == NULL || now->paused || now->failure != NULL || !now->at_home)
		leave = LEAVE_AND_RETURN;
	else if (now->resumes > accepted_resumes)
	{
		accepted_resumes = now->resumes;
		retry_at = 0;
	}
	else
		now = NULL;
	commit_transaction();
	if (now != NULL && leave == LEAVE_NOT && halt != HALT_NONE)
		accept_halt();
}

/* The ends of all partitions, as of now: wait_for_source() waits for them. */
static bool
note_wanted_ends(void)
{
	for (int i = 0; i < npartitions; i++)
	{
		int64		low;

		if (!find_ends(&partitions[i], &low, &partitions[i].wanted))
			return false;
	}
	return true;
}

static void
take_errands(void)
{
	uint64		flush = es_errand_asked(ES_ERRAND_FLUSH);
	uint64		catch_up = es_errand_asked(ES_ERRAND_CATCH_UP);

	if (flush > flush_ticket)
	{
		flush_wanted = true;
		flush_ticket = flush;
	}
	/* Those who asked after the ends were noted have to wait for their own. */
	if (catch_up > catch_up_ticket && !catch_up_wanted && halt == HALT_NONE &&
		note_wanted_ends())
	{
		catch_up_wanted = true;
		catch_up_ticket = catch_up;
	}
}

static void
settle_errands(void)
{
	if (halt != HALT_NONE || nrecords > 0)
		return;
	if (flush_wanted)
	{
		flush_wanted = false;
		es_errand_done(ES_ERRAND_FLUSH, flush_ticket);
	}
	if (catch_up_wanted)
	{
		for (int i = 0; i < npartitions; i++)
			if (partitions[i].progress.written < partitions[i].wanted)
				return;
		catch_up_wanted = false;
		es_errand_done(ES_ERRAND_CATCH_UP, catch_up_ticket);
	}
}

/* ---------------------------------------------------------------------------
 * The loop
 * ------------------------------------------------------------------------- */

static long
time_to_wait(TimestampTz now)
{
	TimestampTz until = TimestampTzPlusMilliseconds(now, IDLE_MS);

	if (halt == HALT_NONE)
		until = Min(until, look_at);
	if (nrecords > 0 && halt == HALT_NONE)
		until = Min(until, retry_at > now ? retry_at : oldest + source->flush_us);
	return TimestampDifferenceMilliseconds(now, until);
}

static void
sleep_in(long timeout_ms)
{
	if (timeout_ms > 0)
		es_kafka_wait(&client, 1, timeout_ms);
}

/* One round; what it does not get done now it does in the next. */
static void
round_of_loop(void)
{
	TimestampTz now;

	MemoryContextReset(scratch);
	if (es_process_interrupts())
	{
		leave = LEAVE_FOR_GOOD;
		return;
	}
	if (es_worker_take(ES_WAKE_CONFIG) != 0)
		reload();
	if (reconnect)
		leave = LEAVE_AND_RETURN;
	if (leave != LEAVE_NOT)
		return;
	collect();
	(void) es_worker_take(ES_WAKE_ERRAND);
	take_errands();
	now = GetCurrentTimestamp();
	if (batch_is_due(now))
		write_batch();
	if (leave == LEAVE_NOT)
		pass_holes();
	if (leave == LEAVE_NOT && halt == HALT_NONE && now >= look_at)
		look_at_topic();
	settle_errands();
}

static bool
may_rest(void)
{
	return leave == LEAVE_NOT && (halt != HALT_NONE || retry_at != 0 || batch_has_room());
}

/* The partitions are known and assigned: reads and writes until it is to leave. */
static void
run_loop(void)
{
	TimestampTz stable = ms_from_now(STABLE_MS);
	bool		lives = false;

	while (leave == LEAVE_NOT)
	{
		round_of_loop();
		if (!lives && leave == LEAVE_NOT && (progressed || GetCurrentTimestamp() > stable))
		{
			begin_transaction();
			es_task_lives(es_source_key(source->id));
			commit_transaction();
			lives = true;
		}
		if (may_rest())
		{
			pgstat_report_stat(false);
			sleep_in(time_to_wait(GetCurrentTimestamp()));
		}
	}
}

/* Waits for the topic and the broker. */
static bool
find_topic(void)
{
	for (;;)
	{
		int			count;

		if (es_process_interrupts())
		{
			leave = LEAVE_FOR_GOOD;
			return false;
		}
		if (es_worker_take(ES_WAKE_CONFIG) != 0)
			reload();
		if (leave != LEAVE_NOT || reconnect)
			return false;
		count = count_partitions();
		if (count > 0 && load_partitions(count))
			break;
		sleep_in(TOPIC_RETRY_MS);
		MemoryContextReset(scratch);
	}
	topic_missing = fetch_denied = false;
	look_at = ms_from_now(TOPIC_LOOK_MS);
	return true;
}

/* With one client, until it is to be closed. */
static void
run_client(void)
{
	if (pause_first)
		es_kafka_wait(NULL, 0, TOPIC_RETRY_MS);
	pause_first = false;
	MemoryContextSwitchTo(life);
	leave = LEAVE_NOT;
	halt = HALT_NONE;
	reconnect = false;
	retry_at = 0;
	retry_ms = 0;
	accepted_resumes = source->resumes;
	flush_wanted = catch_up_wanted = false;
	catch_up_ticket = 0;
	messages = palloc(sizeof(*messages) * source->flush_count);
	records = palloc(sizeof(*records) * source->flush_count);
	MemoryContextSwitchTo(scratch);
	drop_batch();
	set_state("starting", "");
	open_client();
	if (find_topic())
	{
		assign_partitions();
		set_state("running", "");
		run_loop();
	}
	close_client();
}

/* An error ends the process; the view tells it until the next one starts. */
static void
run_client_reporting(void)
{
	PG_TRY();
	{
		run_client();
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(scratch);
		error = CopyErrorData();
		es_worker_report(source->name, "restarting", error->message);
		PG_RE_THROW();
	}
	PG_END_TRY();
}

static void
note_server_change(Datum arg, int cacheid, uint32 hash)
{
	reconnect = true;
}

/* The source, where it is to be run now; else NULL, and the state says why. */
static EsSource *
load_if_wanted(uint32 id, bool first)
{
	EsSource   *loaded;
	MemoryContext old;

	begin_transaction();
	if (!OidIsValid(es_extension_schema()))
	{
		commit_transaction();
		return NULL;
	}
	if (first)
		es_task_own(es_source_key(id));
	old = MemoryContextSwitchTo(life);
	loaded = es_source_load(id);
	MemoryContextSwitchTo(old);
	if (loaded != NULL && !loaded->at_home)
	{
		es_worker_report(loaded->name, "cloned",
						 "this is a copy of the server or database that it ran in");
		loaded = NULL;
	}
	if (loaded != NULL && (loaded->paused || loaded->failure != NULL))
		loaded = NULL;
	if (loaded != NULL && first && !es_task_note_start(es_source_key(id)))
		loaded = NULL;
	commit_transaction();
	return loaded;
}

void
es_source_main(Datum arg)
{
	EsWorkerKey key = es_process_key(ES_WORKER_SOURCE, arg);
	bool		first = true;

	es_process_begin(key);
	/* Who has read a record's effect must find it after a crash, too. */
	SetConfigOption("synchronous_commit", "on", PGC_SUSET, PGC_S_OVERRIDE);
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, note_server_change, (Datum) 0);
	CacheRegisterSyscacheCallback(USERMAPPINGOID, note_server_change, (Datum) 0);
	life = AllocSetContextCreate(TopMemoryContext, "eventstore source", ALLOCSET_DEFAULT_SIZES);
	scratch = AllocSetContextCreate(TopMemoryContext, "eventstore source round",
									ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(scratch);
	es_worker_set_running();

	while (leave != LEAVE_FOR_GOOD)
	{
		MemoryContextReset(scratch);
		MemoryContextReset(life);
		source = NULL;
		(void) es_worker_take(ES_WAKE_CONFIG);
		source = load_if_wanted(key.object, first);
		first = false;
		if (source == NULL)
		{
			es_worker_set_absent();
			break;
		}
		run_client_reporting();
	}
	proc_exit(0);
}
