/*
 * kafka/batch.c
 *		A batch of a source: taken, and written in one transaction with its offsets.
 *
 * A batch that fails.  What is wrong with the server (locks, disk, rights, the
 * target gone) is tried again with a growing pause: no record is to blame.  What
 * may be a record's fault (classes 22, 23, 54, raised by a trigger ...) is found
 * by halving: half the batch in a transaction, then half of that; where a part
 * commits, twice as much the next time.  A single record that fails is parked,
 * skipped, or stops the source, as it says.
 *
 * Messages are kept until they are written: their bytes are the records'.
 *
 * Locks: those of progress.c and of the target, for the time of a transaction.
 */
#include "postgres.h"

#include "kafka/batch.h"
#include "kafka/group.h"
#include "kafka/relay.h"
#include "kafka/restore.h"
#include "kafka/task.h"
#include "kafka/writer.h"

#include "miscadmin.h"
#include "spi.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* A batch is due at so many bytes, however few records they are. */
#define BATCH_BYTES (16 * 1024 * 1024)
/*
 * What is restored nobody waits for record by record, and the more keys a batch has,
 * the closer they lie together in the indexes.  Each takes a kilobyte or two while it
 * is written.
 */
#define RESTORE_RECORDS 100000
#define RESTORE_BYTES	(4 * BATCH_BYTES)
/* The pause after a failed transaction doubles from the first to the last value. */
#define RETRY_FIRST_MS 20
#define RETRY_LAST_MS  10000

typedef enum Outcome
{
	OUTCOME_WRITTEN,
	OUTCOME_BAD_RECORD, /* one of those in the range, perhaps */
	OUTCOME_STOPPED,	/* the first of the range must not be passed over */
	OUTCOME_RETRY,
	OUTCOME_LEAVE /* paused, dropped */
} Outcome;

/* ---------------------------------------------------------------------------
 * Taking
 * ------------------------------------------------------------------------- */

void
es_batch_drop(EsSourceRun *run)
{
	for (int i = 0; i < run->nrecords; i++)
	{
		if (run->records[i].headers != NULL)
			pfree(run->records[i].headers);
		rd_kafka_message_destroy(run->messages[i]);
	}
	run->nrecords = run->nwritten = run->nrelayed = 0;
	run->nbytes = 0;
	run->width = run->capacity;
}

static void
make_room(EsSourceRun *run, int capacity, size_t capacity_bytes)
{
	run->capacity = capacity;
	run->capacity_bytes = capacity_bytes;
	run->width = capacity;
	run->messages = MemoryContextAlloc(run->life, sizeof(*run->messages) * run->capacity);
	run->records = MemoryContextAlloc(run->life, sizeof(*run->records) * run->capacity);
}

void
es_batch_begin(EsSourceRun *run)
{
	make_room(run, run->source->flush_count, BATCH_BYTES);
	es_batch_drop(run);
}

void
es_batch_begin_restore(EsSourceRun *run)
{
	es_batch_drop(run);
	pfree(run->messages);
	pfree(run->records);
	make_room(run, Max(run->source->flush_count, RESTORE_RECORDS), RESTORE_BYTES);
}

static void
set_headers(EsSourceRun *run, EsRecord *record, const rd_kafka_message_t *message)
{
	rd_kafka_headers_t *headers;
	rd_kafka_resp_err_t error = rd_kafka_message_headers(message, &headers);
	size_t				count;

	record->headers_lost =
		error != RD_KAFKA_RESP_ERR_NO_ERROR && error != RD_KAFKA_RESP_ERR__NOENT;
	if (error != RD_KAFKA_RESP_ERR_NO_ERROR)
		return;
	count = rd_kafka_header_cnt(headers);
	if (count == 0)
		return;
	record->headers = MemoryContextAllocHuge(run->life, sizeof(EsHeader) * count);
	run->nbytes += sizeof(EsHeader) * count;
	for (size_t i = 0; i < count; i++)
	{
		EsHeader   *header = &record->headers[i];
		const void *value;

		if (rd_kafka_header_get_all(headers, i, &header->name, &value, &header->length) !=
			RD_KAFKA_RESP_ERR_NO_ERROR)
			break;
		header->value = value;
		run->nbytes += strlen(header->name) + header->length;
		record->nheaders++;
	}
}

/* Into the batch; false where it is one that was written already. */
bool
es_batch_add(EsSourceRun *run, rd_kafka_message_t *message)
{
	EsPartition *partition =
		es_run_partition(run, rd_kafka_topic_name(message->rkt), message->partition);
	EsRecord				 *record = &run->records[run->nrecords];
	rd_kafka_timestamp_type_t type;
	int64					  time;

	if (partition == NULL || message->offset < partition->position)
		return false;
	partition->position = message->offset + 1;
	partition->answered = true;
	memset(record, 0, sizeof(*record));
	record->topic = partition->progress.topic;
	record->from_changelog = partition->from_changelog;
	record->partition = message->partition;
	record->offset = message->offset;
	record->key = message->key;
	record->key_length = message->key_len;
	record->value = message->payload;
	record->value_length = message->len;
	time = rd_kafka_message_timestamp(message, &type);
	record->has_time =
		type != RD_KAFKA_TIMESTAMP_NOT_AVAILABLE && es_codec_time(time, &record->time);
	set_headers(run, record, message);
	if (run->nrecords == 0)
		run->oldest = GetCurrentTimestamp();
	run->messages[run->nrecords++] = message;
	run->nbytes += message->len + message->key_len;
	return true;
}

bool
es_batch_has_room(EsSourceRun *run)
{
	return run->nrecords < run->capacity && run->nbytes < run->capacity_bytes;
}

/* ---------------------------------------------------------------------------
 * Writing
 * ------------------------------------------------------------------------- */

static EsPolicy
policy_for(EsSourceRun *run, const EsRecord *record)
{
	return record->key == NULL ? run->source->on_null_key : run->source->on_error;
}

bool
es_batch_stops_at(EsSourceRun *run, const EsRecord *record)
{
	return policy_for(run, record) == ES_POLICY_STOP;
}

/* Offsets behind the records from..to; the table's row is where 'written' says. */
static void
advance_to(EsSourceRun *run, int from, int to)
{
	EsProgress *moves = palloc(sizeof(EsProgress) * run->npartitions);
	int			n = 0;

	for (int i = 0; i < run->npartitions; i++)
		run->partitions[i].progress.next = run->partitions[i].progress.written;
	for (int i = from; i < to; i++)
	{
		EsRecord   *record = &run->records[i];
		EsProgress *progress =
			&es_run_partition(run, record->topic, record->partition)->progress;

		progress->next = run->records[i].offset + 1;
		if (record->from_changelog)
			progress->resume =
				Max(progress->resume, es_restore_resume_offset(run->source, record));
		progress->has_time = run->records[i].has_time;
		progress->time = run->records[i].time;
	}
	for (int i = 0; i < run->npartitions; i++)
	{
		EsProgress *progress = &run->partitions[i].progress;
		int64		low;

		if (progress->next == progress->written)
			continue;
		if (rd_kafka_get_watermark_offsets(run->client->handle, progress->topic,
										   progress->partition, &low,
										   &progress->end) != RD_KAFKA_RESP_ERR_NO_ERROR)
			progress->end = -1;
		moves[n++] = *progress;
	}
	es_run_advance(run, moves, n);
}

/*
 * The first one that must not be passed over, from..to; with the others' problems
 * dealt with.
 */
static int
apply_policies(EsSourceRun *run, int from, int to, const EsProblem *problems, int *parked,
			   int *skipped)
{
	for (int i = from; i < to; i++)
	{
		const EsProblem *problem = &problems[i - from];

		if (problem->sqlstate == 0 || problem->sqlstate == ES_PROBLEM_OUT_OF_DATE)
			continue;
		switch (policy_for(run, &run->records[i]))
		{
			case ES_POLICY_STOP:
				return i;
			case ES_POLICY_PARK:
				es_progress_park(run->source, &run->records[i], problem);
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
 * A transaction's changes are recorded in the order of their keys, not of offsets:
 * who restores from some of them does not know which records the others came
 * from.  So each says where in its partition the transaction begins.
 */
static void
note_since(EsSourceRun *run, int from, int to)
{
	for (int i = 0; i < run->npartitions; i++)
		run->partitions[i].since = -1;
	for (int i = from; i < to; i++)
	{
		EsRecord	*record = &run->records[i];
		EsPartition *partition = es_run_partition(run, record->topic, record->partition);

		if (partition->since < 0)
			partition->since = record->offset;
		record->since = partition->since;
		record->has_since = !record->from_changelog && record->since < record->offset;
	}
}

/*
 * In a transaction: the records from..to, or those before one that must not be
 * passed over; says up to which.  'known' is the problem of a single record that
 * an earlier attempt has found.
 */
static int
write_range(EsSourceRun *run, int from, int to, const EsProblem *known,
			EsProblem *stopped_by)
{
	EsWriter	*writer;
	EsProblem	*problems = palloc(sizeof(EsProblem) * (to - from));
	EsDecoded	*decoded = NULL;
	EsRoleSwitch saved;
	EsWritten	 written = {0};
	int			 parked = 0;
	int			 skipped = 0;
	int			 end;

	es_restore_hold(run, to - from);
	writer = es_writer_begin(run->source);
	writer->restoring = run->restoring;
	/* What is known to fail is not tried again: it may have been its decoding. */
	if (known != NULL)
		problems[0] = *known;
	else
		decoded = es_writer_decode(writer, &run->records[from], to - from, problems);
	if (run->guarded)
		es_restore_guard(run, &run->records[from], to - from, problems);
	end = apply_policies(run, from, to, problems, &parked, &skipped);
	if (end < to)
		*stopped_by = problems[end - from];
	if (run->source->changelog_topic != NULL)
		note_since(run, from, end);

	if (run->source->mode != ES_SOURCE_RELAY)
	{
		es_role_assume(run->source->owner, &saved);
		es_writer_write(writer, &run->records[from], decoded, end - from, problems,
						&written);
		es_role_restore(&saved);
	}
	es_restore_note_written(run);
	advance_to(run, from, end);

	es_worker_count(ES_WORKER_RECORDS, end - from);
	es_worker_count(ES_WORKER_BATCHES, 1);
	es_worker_count(ES_WORKER_PARKED, parked);
	es_worker_count(ES_WORKER_SKIPPED, skipped + written.dropped);
	return end;
}

bool
es_batch_is_records_fault(int sqlstate)
{
	static const int others[] = {ERRCODE_CONNECTION_EXCEPTION,
								 ERRCODE_FEATURE_NOT_SUPPORTED,
								 ERRCODE_INVALID_TRANSACTION_STATE,
								 ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
								 ERRCODE_INVALID_CATALOG_NAME,
								 ERRCODE_INVALID_SCHEMA_NAME,
								 ERRCODE_TRANSACTION_ROLLBACK,
								 ERRCODE_SYNTAX_ERROR_OR_ACCESS_RULE_VIOLATION,
								 ERRCODE_INSUFFICIENT_RESOURCES,
								 ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
								 ERRCODE_OPERATOR_INTERVENTION,
								 ERRCODE_SYSTEM_ERROR,
								 ERRCODE_CONFIG_FILE_ERROR,
								 ERRCODE_INTERNAL_ERROR,
								 MAKE_SQLSTATE('L', 'G', '0', '0', '0')};

	for (int i = 0; i < lengthof(others); i++)
		if (ERRCODE_TO_CATEGORY(sqlstate) == ERRCODE_TO_CATEGORY(others[i]))
			return false;
	return true;
}

static void
retry_later(EsSourceRun *run, const char *message)
{
	run->retry_ms = es_task_longer_pause(run->retry_ms, RETRY_FIRST_MS, RETRY_LAST_MS);
	run->retry_at = es_run_ms_from_now(run->retry_ms);
	if (run->retry_ms >= 500)
		es_run_set_state(run, "retrying", message);
}

/*
 * Paused or gone: nothing is written.  What a relay has published counts all the same,
 * or it would be published once more after resume().
 */
static bool
may_write(EsSourceRun *run)
{
	EsWorkerKey key = es_source_key(run->source->id);

	if (es_task_hold(key))
		return true;
	run->leave = ES_LEAVE_AND_RETURN;
	return run->source->mode == ES_SOURCE_RELAY && es_task_lock(key);
}

/*
 * One transaction; *to is how far it came.  'problem' is what a single record is
 * known to suffer from (sqlstate 0: nothing), and what was found.
 */
static Outcome
try_range(EsSourceRun *run, int from, int *to, EsProblem *problem)
{
	volatile Outcome outcome = OUTCOME_WRITTEN;
	EsProblem		 stopped_by = {0};
	volatile int	 end = from;
	const EsProblem *known = problem->sqlstate != 0 ? problem : NULL;

	PG_TRY();
	{
		if (run->source->mode == ES_SOURCE_RELAY &&
			!es_relay_publish(run, from, to, known, problem))
			outcome = OUTCOME_RETRY;
		else
		{
			es_task_begin();
			if (!may_write(run))
				outcome = OUTCOME_LEAVE;
			else
				end = write_range(run, from, *to, known, &stopped_by);
			if (end < *to && outcome == OUTCOME_WRITTEN)
				stopped_by.reason = MemoryContextStrdup(run->scratch, stopped_by.reason);
			es_task_commit(run->scratch);
			es_run_note_advanced(run);
		}
	}
	PG_CATCH();
	{
		ErrorData *error = es_task_catch(run->scratch);

		problem->sqlstate = error->sqlerrcode;
		problem->reason = error->message;
		outcome = es_batch_is_records_fault(error->sqlerrcode) ? OUTCOME_BAD_RECORD
															   : OUTCOME_RETRY;
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
stop_at_record(EsSourceRun *run, const EsRecord *record, const EsProblem *problem)
{
	es_run_stop_at(run, ES_HALT_RECORD,
				   psprintf("partition %d, offset " INT64_FORMAT ": %s (%s)",
							record->partition, record->offset, problem->reason,
							unpack_sql_state(problem->sqlstate)));
}

/* One step through the batch; false where it cannot go on now. */
static bool
write_step(EsSourceRun *run)
{
	int		  to = run->nwritten + Min(run->width, run->nrecords - run->nwritten);
	int		  tried = to - run->nwritten;
	EsProblem problem = {0};
	Outcome	  outcome = try_range(run, run->nwritten, &to, &problem);

	if (outcome == OUTCOME_BAD_RECORD && tried == 1)
	{
		/* It was this one: once more, to be dealt with as a record that is bad. */
		to = run->nwritten + 1;
		outcome = try_range(run, run->nwritten, &to, &problem);
		/* It cannot even be parked. */
		if (outcome == OUTCOME_BAD_RECORD)
			outcome = OUTCOME_RETRY;
	}
	switch (outcome)
	{
		case OUTCOME_WRITTEN:
			run->nwritten = to;
			run->width = Min(run->width * 2, run->capacity);
			run->retry_at = 0;
			run->retry_ms = 0;
			return true;
		case OUTCOME_BAD_RECORD:
			run->width = Max(tried / 2, 1);
			if (tried > 1)
				return true;
			/* It cannot be dealt with either. */
			retry_later(run, problem.reason);
			return false;
		case OUTCOME_STOPPED:
			stop_at_record(run, &run->records[run->nwritten], &problem);
			return false;
		case OUTCOME_RETRY:
			if (problem.sqlstate == ERRCODE_OUT_OF_MEMORY)
				run->width = Max(tried / 2, 1);
			retry_later(run, problem.reason);
			return false;
		case OUTCOME_LEAVE:
			return false;
	}
	return false;
}

void
es_batch_write(EsSourceRun *run)
{
	while (run->nwritten < run->nrecords && run->leave == ES_LEAVE_NOT &&
		   run->halt == ES_HALT_NONE)
	{
		if (!write_step(run))
			return;
		CHECK_FOR_INTERRUPTS();
		es_group_attend(run);
	}
	if (run->nwritten == run->nrecords)
		es_batch_drop(run);
	if (strcmp(run->state, "retrying") == 0 || strcmp(run->state, "stopped") == 0)
		es_run_set_state(run, run->restoring ? "restoring" : "running", "");
}

bool
es_batch_is_due(EsSourceRun *run, TimestampTz now)
{
	if (run->nrecords == 0 || run->halt != ES_HALT_NONE || run->retry_at > now)
		return false;
	return !es_batch_has_room(run) || run->nwritten > 0 || run->flush_wanted ||
		   run->catch_up_wanted || now - run->oldest >= run->source->flush_us ||
		   (run->restoring && es_restore_is_taken(run));
}
