/*
 * kafka/sink_read.c
 *		Events out of a collection, and on their way to Kafka.
 *
 * As the sink's owner, by the head and a snapshot like every reader (read.c), a
 * chunk in each transaction.  Records are put into librdkafka's queue as they are
 * read, which copies and never waits; Kafka is waited for outside of it.
 *
 * Durable before it is published.  A transaction that does not wait for its
 * commit record can be read before that is on disk, and a crash would leave in
 * Kafka what never was.  So the log is flushed up to where the snapshot may have
 * seen it, before the first record of a chunk is put.
 *
 * The wait for new events (wait.c) is entered before the look and outlives the
 * transaction, so that the worker sleeps with neither a snapshot nor a lock.
 *
 * An event at which the key's function fails, or that librdkafka does not take,
 * ends the chunk; the next one begins with it and does as on_error says.
 */
#include "postgres.h"

#include "kafka/batch.h"
#include "kafka/sink_record.h"
#include "kafka/sink_run.h"

#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "errors.h"
#include "feed/read.h"
#include "feed/wait.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* What one transaction reads at most: some tens of milliseconds. */
#define CHUNK_EVENTS 5000
/* Until it is asked again which partitions are ours. */
#define UNSETTLED_MS 200
#define CHUNK_BYTES	 (8 * 1024 * 1024)

/*
 * Whatever a snapshot taken before this can see will outlive a crash.  The
 * insert position may lie behind a page's header with nothing there yet, which
 * could not be flushed.
 */
static void
flush_log(void)
{
	XLogRecPtr inserted = GetXLogInsertRecPtr();
	uint32	   offset = XLogSegmentOffset(inserted, wal_segment_size);

	if (offset == SizeOfXLogLongPHD)
		inserted -= SizeOfXLogLongPHD;
	else if (inserted % XLOG_BLCKSZ == SizeOfXLogShortPHD)
		inserted -= SizeOfXLogShortPHD;
	XLogFlush(inserted);
}

/* How many events this chunk may have. */
static int64
chunk_limit(const EsSinkRun *run)
{
	int64 limit = CHUNK_EVENTS;

	if (run->read_to < run->single_to)
		return 1;
	if (run->sink->exactly_once)
		limit = Min(limit, Max(run->sink->flush_count - run->unsaved, 1));
	return limit;
}

/* Nobody else knows of the change, and its key's partition is not ours; as put_event. */
static bool
pass_lost(EsSinkRun *run)
{
	static const char reason[] =
		"the key's partition is another member's of the group now";

	if (run->letter[0] != '\0')
	{
		es_sink_note_bad(run, run->current, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
						 reason);
		return false;
	}
	es_sink_park(run, run->current, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, reason);
	return true;
}

/* False where the chunk ends before this event. */
static bool
put_event(EsSinkRun *run, EsSinkWriter *writer, TupleTableSlot *slot, size_t *bytes)
{
	rd_kafka_resp_err_t result;
	EsRecord			record;

	if (!es_sink_record_make(writer, slot, &record))
		return !es_sink_record_is_lost(writer) || pass_lost(run);
	if (run->sink->exactly_once && !es_sink_transaction_begin(run))
		return false;
	StaticAssertStmt(ES_SINK_ANY_PARTITION == RD_KAFKA_PARTITION_UA, "one meaning");
	result = es_delivery_put(&run->delivery, run->client->handle, run->topic,
							 record.partition, &record, run->current);
	*bytes += record.key_length + record.value_length;
	switch (result)
	{
		case RD_KAFKA_RESP_ERR_NO_ERROR:
			return true;
		case RD_KAFKA_RESP_ERR__QUEUE_FULL:
			run->full = true;
			return false;
		case RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE:
			es_sink_note_bad(run, run->current, ERRCODE_PROGRAM_LIMIT_EXCEEDED,
							 "the record is larger than message.max.bytes");
			return false;
		default:
			es_sink_retry_later(run, "retrying", rd_kafka_err2str(result));
			/* The topic has grown: by itself the client looks every five minutes. */
			if (result == RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION)
			{
				run->leave = ES_LEAVE_AND_RETURN;
				run->pause_ms = ES_TASK_PAUSE_MS;
			}
			/* A transaction that takes nothing more is to be ended. */
			if (run->in_transaction && run->oldest == 0)
				run->oldest = GetCurrentTimestamp();
			return false;
	}
}

static void
note_read(EsSinkRun *run, EsPosition position, int events)
{
	run->read_to = position;
	run->unsaved += events;
	if (run->oldest == 0)
		run->oldest = GetCurrentTimestamp();
}

/* True at the end of what there is. */
static bool
put_events(EsSinkRun *run, EsCollection *coll, EsRead *read)
{
	EsSinkWriter *writer = es_sink_record_begin(run->sink, coll, run->share);
	MemoryContext chunk = CurrentMemoryContext;
	int64		  limit = chunk_limit(run);
	size_t		  bytes = 0;
	int64		  n = 0;

	while (n < limit && bytes < CHUNK_BYTES)
	{
		TupleTableSlot *slot = es_read_next(read);
		bool			isnull;
		bool			put;

		if (slot == NULL)
			return true;
		run->current = DatumGetInt64(slot_getattr(slot, ES_ATT_POSITION, &isnull));
		if (run->current == run->bad)
		{
			run->at_bad = true;
			return false;
		}
		MemoryContextSwitchTo(run->event);
		put = put_event(run, writer, slot, &bytes);
		MemoryContextSwitchTo(chunk);
		MemoryContextReset(run->event);
		if (!put)
			return false;
		note_read(run, run->current, 1);
		n++;
	}
	return false;
}

/* Has the source restored what the changelog topic had when it was created? */
static bool
is_restored(EsSinkRun *run)
{
	const EsSink *now;

	if (run->sink->again_to == ES_SINK_UNTIL_RESTORED)
	{
		now = es_sink_load(run->sink->id);
		if (now != NULL)
			run->sink->again_to = now->again_to;
	}
	return run->sink->again_to != ES_SINK_UNTIL_RESTORED;
}

/* May a changelog's events be published, and is it known which?  Else it is asked again soon. */
static bool
knows_share(EsSinkRun *run)
{
	if (run->sink->changelog_of == 0 ||
		(run->sink->exactly_once ? es_sink_transaction_share(run) : is_restored(run)))
		return true;
	run->more = true;
	run->retry_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), UNSETTLED_MS);
	return false;
}

static void
read_chunk(EsSinkRun *run)
{
	bool		  flush = run->flush_wanted && !run->flush_known;
	EsReadArgs	  args = {.collection = run->sink->collection,
						  .direction = ForwardScanDirection,
						  .max_count = ES_READ_ALL,
						  .query = run->sink->query,
						  .after = run->read_to,
						  .before = ES_READ_END};
	EsRoleSwitch  saved;
	EsCollection *coll;
	EsView		  view;
	EsRead		 *read;
	bool		  end;

	run->current = 0;
	run->at_bad = false;
	if (!knows_share(run))
		return;
	es_sink_topic_note_restored(run);
	es_role_assume(run->sink->owner, &saved);
	coll = es_read_open_collection(run->sink->collection);
	es_wait_keep(coll, run->read_to, run->sink->query);
	es_view_open(coll, &view);
	es_collection_check_cursor(coll, run->read_to);
	flush_log();
	read = es_read_begin_in(&args, &view);
	end = put_events(run, coll, read);
	es_read_end(read);
	es_view_close(&view);
	es_role_restore(&saved);

	run->more = !end;
	if (!end)
		return;
	if (view.head > run->read_to)
		note_read(run, view.head, 0);
	run->more = es_wait_keep_looked(view.head);
	if (flush)
	{
		run->flush_to = view.head;
		run->flush_known = true;
	}
}

static void
note_error(EsSinkRun *run, const ErrorData *error)
{
	if (error->sqlerrcode == ERRCODE_ES_NOT_RETAINED)
		es_sink_stop_at(
			run, ES_SINK_AT_GAP,
			psprintf("events after position " INT64_FORMAT " are no longer retained (%s)",
					 run->read_to, error->detail != NULL ? error->detail : ""));
	else if (error->sqlerrcode == ERRCODE_ES_CURSOR_AHEAD)
		es_sink_stop_at(run, ES_SINK_AHEAD, error->message);
	else if (run->current != 0 && es_batch_is_records_fault(error->sqlerrcode))
		es_sink_note_bad(run, run->current, error->sqlerrcode, error->message);
	else
		es_sink_retry_later(run, "retrying", error->message);
}

/*
 * The next event is the one that is known to be bad.  In a transaction of its own,
 * or the dead letter would go where a later event of the chunk fails.
 */
static void
pass_bad(EsSinkRun *run)
{
	EsPosition position = run->bad;

	if (run->sink->on_error == ES_SINK_STOP)
	{
		es_sink_stop_at(run, ES_SINK_AT_EVENT,
						psprintf("position " INT64_FORMAT ": %s (%s)", position,
								 run->bad_reason, unpack_sql_state(run->bad_sqlstate)));
		return;
	}
	if (run->sink->on_error == ES_SINK_PARK)
	{
		es_task_begin();
		es_sink_park(run, position, run->bad_sqlstate, run->bad_reason);
		es_task_commit(run->scratch);
		es_worker_count(ES_WORKER_PARKED, 1);
	}
	else
		es_worker_count(ES_WORKER_SKIPPED, 1);
	run->bad = 0;
	note_read(run, position, 1);
}

/* After an error in a chunk. */
static void
catch_error(EsSinkRun *run)
{
	ErrorData *error = es_task_catch(run->scratch);

	MemoryContextReset(run->event);
	note_error(run, error);
	run->at_bad = false;
}

void
es_sink_read(EsSinkRun *run)
{
	PG_TRY();
	{
		es_task_begin();
		read_chunk(run);
		es_task_commit(run->scratch);
		if (!run->more && es_delivery_is_empty(&run->delivery))
			run->retry_at = run->retry_ms = 0;
	}
	PG_CATCH();
	{
		catch_error(run);
	}
	PG_END_TRY();
	if (run->stale)
		es_sink_transaction_abort(run);
	else if (run->at_bad)
		pass_bad(run);
}

/* Of a store's changes: its key has a later one, which is in the topic or will be. */
static bool
is_out_of_date(EsSinkRun *run, TupleTableSlot *slot)
{
	bool  isnull;
	Datum stream = slot_getattr(slot, ES_ATT_STREAM, &isnull);

	return run->sink->changelog_of != 0 && !isnull &&
		   es_share_is_overtaken(run->sink->collection, run->letter_position, stream,
								 NULL);
}

/* The event of run->letter alone; true where it was put, or need not be. */
static bool
put_letter(EsSinkRun *run)
{
	EsReadArgs		args = {.collection = run->sink->collection,
							.direction = ForwardScanDirection,
							.max_count = 1,
							.after = run->letter_position - 1,
							.before = run->letter_position + 1};
	EsRoleSwitch	saved;
	EsCollection   *coll;
	EsView			view;
	EsRead		   *read;
	TupleTableSlot *slot;
	size_t			bytes = 0;
	bool			put = false;

	if (!knows_share(run))
		return false;
	run->current = run->letter_position;
	es_role_assume(run->sink->owner, &saved);
	coll = es_read_open_collection(run->sink->collection);
	es_view_open(coll, &view);
	flush_log();
	read = es_read_begin_in(&args, &view);
	slot = es_read_next(read);
	if (slot != NULL)
		put = is_out_of_date(run, slot) ||
			  put_event(run, es_sink_record_begin(run->sink, coll, run->share), slot,
						&bytes);
	else
		es_sink_note_bad(run, run->current, ERRCODE_ES_NOT_RETAINED,
						 "the event is not there any more");
	es_read_end(read);
	es_view_close(&view);
	es_role_restore(&saved);
	return put;
}

bool
es_sink_read_letter(EsSinkRun *run)
{
	volatile bool put = false;

	PG_TRY();
	{
		es_task_begin();
		put = put_letter(run);
		es_task_commit(run->scratch);
	}
	PG_CATCH();
	{
		catch_error(run);
		put = false;
	}
	PG_END_TRY();
	return put;
}

void
es_sink_pass_gap(EsSinkRun *run)
{
	EsPosition first;

	es_task_begin();
	first = es_collection_open(run->sink->collection, AccessShareLock)->first_position;
	if (first - 1 > run->read_to)
	{
		es_sink_park(run, run->read_to + 1, ERRCODE_ES_NOT_RETAINED,
					 psprintf("events up to position " INT64_FORMAT
							  " are no longer retained",
							  first - 1));
		note_read(run, first - 1, 0);
	}
	es_task_commit(run->scratch);
}
