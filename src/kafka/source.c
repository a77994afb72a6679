/*
 * kafka/source.c
 *		The worker of a source: records from a topic, in batches, exactly once.
 *
 * The loop:
 *
 *	1.	Take what librdkafka has fetched (collect), as long as the batch has room.
 *	2.	Once the batch is due, write it (batch.c): records, dead letters and
 *		offsets in one transaction.  While it is written librdkafka fetches on.
 *	3.	Now and then look at the topic itself (topic.c): gone, made anew, more
 *		partitions.
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
 * Whatever stops the source waits for resume() (EsHalt); a trouble that may pass
 * by itself is tried again, and is the state that the view sources shows.
 *
 * Locks: the source (a session lock), then those of batch.c, for the time of a
 * transaction.  A crash: see above.
 */
#include "postgres.h"

#include "kafka/batch.h"
#include "kafka/connection.h"
#include "kafka/group.h"
#include "kafka/restore.h"
#include "kafka/resync.h"
#include "kafka/task.h"
#include "kafka/topic.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "spi.h"
#include "storage/ipc.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "worker/process.h"

/* Messages taken from the queue in one go. */
#define TAKE_MAX 1000
/* Where the topic or the broker is not there, until they are asked again. */
#define AGAIN_MS 1000
/* With nothing to do. */
#define IDLE_MS (60 * 1000)
/* A worker that has lived so long is not failing at its start. */
#define STABLE_MS (60 * 1000)

/* The server or the mapping was changed: set by an invalidation. */
static bool reconnect = false;

/* ---------------------------------------------------------------------------
 * Taking
 * ------------------------------------------------------------------------- */

/* What came instead of a record. */
static void
note_message_error(EsSourceRun *run, const rd_kafka_message_t *message)
{
	EsPartition *partition = message->rkt == NULL ? NULL :
		es_run_partition(run, rd_kafka_topic_name(message->rkt), message->partition);

	switch (message->err)
	{
		case RD_KAFKA_RESP_ERR__PARTITION_EOF:
			if (partition != NULL)
				partition->seen_end = message->offset;
			run->fetch_denied = false;
			es_kafka_fine(run->client);
			break;
		case RD_KAFKA_RESP_ERR__AUTO_OFFSET_RESET:
		case RD_KAFKA_RESP_ERR_OFFSET_OUT_OF_RANGE:
			if (partition != NULL)
				es_topic_out_of_range(run, partition);
			break;
		case RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART:
		case RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC:
		case RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION:
			run->look_at = 0;
			break;
		case RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED:
			run->fetch_denied = true;
			es_run_set_state(run, "denied", rd_kafka_message_errstr(message));
			break;
		default:
			ereport(LOG, (errmsg("source \"%s\": %s", run->source->name,
								 rd_kafka_message_errstr(message))));
			break;
	}
}

/* Takes what is there, as long as the batch has room. */
static void
collect(EsSourceRun *run)
{
	static rd_kafka_message_t *taken[TAKE_MAX];

	run->drained = false;
	while (es_batch_has_room(run) && run->leave == ES_LEAVE_NOT &&
		   run->halt == ES_HALT_NONE)
	{
		int		room = Min(TAKE_MAX, run->source->flush_count - run->nrecords);
		ssize_t n = rd_kafka_consume_batch_queue(run->client->queue, 0, taken, room);

		run->drained = n <= 0;
		if (run->drained)
			break;
		for (ssize_t i = 0; i < n; i++)
		{
			if (taken[i]->err == RD_KAFKA_RESP_ERR_NO_ERROR &&
				run->leave == ES_LEAVE_NOT && es_batch_add(run, taken[i]))
				continue;
			if (taken[i]->err != RD_KAFKA_RESP_ERR_NO_ERROR)
				note_message_error(run, taken[i]);
			rd_kafka_message_destroy(taken[i]);
		}
		if (run->nrecords > 0)
		{
			run->fetch_denied = false;
			es_kafka_fine(run->client);
		}
		CHECK_FOR_INTERRUPTS();
	}
	es_kafka_note(run->client);
	es_run_show_connection(run);
}

/* ---------------------------------------------------------------------------
 * The client
 * ------------------------------------------------------------------------- */

/* Before the client is closed: what is of it must be gone. */
static void
release_messages(EsKafkaClient *closing)
{
	EsSourceRun *run = closing->arg;

	for (int i = 0; i < run->nrecords; i++)
		rd_kafka_message_destroy(run->messages[i]);
	run->nrecords = run->nwritten = 0;
}

static void
open_client(EsSourceRun *run)
{
	char *group = psprintf("eventstore-" UINT64_FORMAT "-%u-%u", GetSystemIdentifier(),
						   MyDatabaseId, run->source->id);
	const char *const own[][2] = {{"group.id", group},
								  {"enable.auto.commit", "false"},
								  {"enable.auto.offset.store", "false"},
								  {"auto.offset.reset", "error"},
								  {"enable.partition.eof", "true"},
								  {"isolation.level", "read_committed"},
								  {"allow.auto.create.topics", "false"},
								  {NULL, NULL}};
	List			 *properties;

	es_run_begin();
	if (!OidIsValid(run->source->server))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("server \"%s\" does not exist", run->source->server_name)));
	MemoryContextSwitchTo(run->life);
	properties = es_kafka_properties(run->source->server, run->source->owner,
									 run->source->consumer_properties);
	es_run_commit(run);
	run->client =
		es_kafka_open(RD_KAFKA_CONSUMER, run->source->name, properties, own, NULL, run);
	run->client->owner = run->source->owner;
	run->client->release = release_messages;
}

static void
close_client(EsSourceRun *run)
{
	if (run->client != NULL)
		es_kafka_close(run->client);
	run->client = NULL;
}

/* ---------------------------------------------------------------------------
 * What is asked of the worker
 * ------------------------------------------------------------------------- */

/* The row may have changed: pause, resume, drop. */
static void
reload(EsSourceRun *run)
{
	EsSource *now;

	es_run_begin();
	now = es_source_load(run->source->id);
	if (now == NULL || now->paused || now->failure != NULL || !now->at_home ||
		(now->resync && !run->source->resync))
		run->leave = ES_LEAVE_AND_RETURN;
	else if (now->resumes > run->accepted_resumes)
	{
		run->accepted_resumes = now->resumes;
		run->retry_at = 0;
	}
	else
		now = NULL;
	es_run_commit(run);
	if (now != NULL && run->leave == ES_LEAVE_NOT && run->halt != ES_HALT_NONE)
		es_topic_accept_halt(run);
}

/* The ends of all partitions, as of now: wait_for_source() waits for them. */
static bool
note_wanted_ends(EsSourceRun *run)
{
	for (int i = 0; i < run->npartitions; i++)
	{
		int64 low;

		if (!es_topic_find_ends(run, &run->partitions[i], &low,
								&run->partitions[i].wanted))
			return false;
	}
	return true;
}

static void
take_errands(EsSourceRun *run)
{
	uint64 flush = es_errand_asked(ES_ERRAND_FLUSH);
	uint64 catch_up = es_errand_asked(ES_ERRAND_CATCH_UP);

	if (flush > run->flush_ticket)
	{
		run->flush_wanted = true;
		run->flush_ticket = flush;
	}
	/* Those who asked after the ends were noted have to wait for their own. */
	if (catch_up > run->catch_up_ticket && !run->catch_up_wanted && !run->restoring &&
		run->halt == ES_HALT_NONE && note_wanted_ends(run))
	{
		run->catch_up_wanted = true;
		run->catch_up_ticket = catch_up;
	}
}

static void
settle_errands(EsSourceRun *run)
{
	if (run->halt != ES_HALT_NONE || run->nrecords > 0)
		return;
	if (run->flush_wanted)
	{
		run->flush_wanted = false;
		es_errand_done(ES_ERRAND_FLUSH, run->flush_ticket);
	}
	if (run->catch_up_wanted)
	{
		for (int i = 0; i < run->npartitions; i++)
			if (run->partitions[i].progress.written < run->partitions[i].wanted)
				return;
		run->catch_up_wanted = false;
		es_errand_done(ES_ERRAND_CATCH_UP, run->catch_up_ticket);
	}
}

/* ---------------------------------------------------------------------------
 * The loop
 * ------------------------------------------------------------------------- */

static long
time_to_wait(EsSourceRun *run, TimestampTz now)
{
	TimestampTz until = TimestampTzPlusMilliseconds(now, IDLE_MS);

	until = Min(until, run->look_at);
	if (run->nrecords > 0 && run->halt == ES_HALT_NONE)
		until = Min(until, run->retry_at > now ? run->retry_at
											   : run->oldest + run->source->flush_us);
	return TimestampDifferenceMilliseconds(now, until);
}

static void
sleep_in(EsSourceRun *run, long timeout_ms)
{
	if (timeout_ms > 0)
		es_group_wait(run, timeout_ms);
}

/* One round; what it does not get done now it does in the next. */
static void
round_of_loop(EsSourceRun *run)
{
	TimestampTz now;

	MemoryContextReset(run->scratch);
	if (es_process_interrupts())
	{
		run->leave = ES_LEAVE_FOR_GOOD;
		return;
	}
	if (es_worker_take(ES_WAKE_CONFIG) != 0)
		reload(run);
	if (reconnect)
		run->leave = ES_LEAVE_AND_RETURN;
	if (es_group_serve(run) && run->leave == ES_LEAVE_NOT)
		run->leave = ES_LEAVE_AND_RETURN;
	if (run->leave != ES_LEAVE_NOT)
		return;
	collect(run);
	(void) es_worker_take(ES_WAKE_ERRAND);
	take_errands(run);
	now = GetCurrentTimestamp();
	if (es_batch_is_due(run, now))
		es_batch_write(run);
	if (run->leave == ES_LEAVE_NOT)
		es_topic_pass_holes(run);
	if (run->leave == ES_LEAVE_NOT && run->restoring)
		es_restore_look(run);
	if (run->leave == ES_LEAVE_NOT && now >= run->look_at)
		es_topic_look(run);
	settle_errands(run);
}

/* Nothing to do until something comes: a queue that was not emptied would not call. */
static bool
may_rest(EsSourceRun *run)
{
	return run->leave == ES_LEAVE_NOT &&
		   (run->halt != ES_HALT_NONE || run->retry_at != 0 || run->drained);
}

/* The partitions are known and assigned: reads and writes until it is to leave. */
static void
run_loop(EsSourceRun *run)
{
	TimestampTz stable = es_run_ms_from_now(STABLE_MS);
	bool		lives = false;

	while (run->leave == ES_LEAVE_NOT)
	{
		round_of_loop(run);
		if (!lives && run->leave == ES_LEAVE_NOT &&
			(run->progressed || GetCurrentTimestamp() > stable))
		{
			es_run_begin();
			es_task_lives(es_source_key(run->source->id));
			es_run_commit(run);
			lives = true;
		}
		if (may_rest(run))
		{
			pgstat_report_stat(false);
			sleep_in(run, time_to_wait(run, GetCurrentTimestamp()));
		}
	}
}

/* Waits for the topic and the broker. */
static bool
find_topic(EsSourceRun *run)
{
	for (;;)
	{
		int count;

		if (es_process_interrupts())
		{
			run->leave = ES_LEAVE_FOR_GOOD;
			return false;
		}
		if (es_worker_take(ES_WAKE_CONFIG) != 0)
			reload(run);
		(void) es_group_serve(run);
		if (run->leave != ES_LEAVE_NOT || reconnect)
			return false;
		count = es_topic_count_partitions(run, es_topic_followed(run->source));
		if (count > 0 && !es_group_awaits(run) && es_topic_load_partitions(run, count))
			break;
		sleep_in(run, AGAIN_MS);
		MemoryContextReset(run->scratch);
	}
	return true;
}

/* With one client, until it is to be closed. */
static void
run_client(EsSourceRun *run)
{
	if (run->pause_first)
		es_kafka_wait(NULL, 0, AGAIN_MS);
	run->pause_first = false;
	MemoryContextSwitchTo(run->life);
	run->leave = ES_LEAVE_NOT;
	run->halt = ES_HALT_NONE;
	run->npartitions = 0;
	if (reconnect)
		es_group_leave(run);
	reconnect = false;
	run->retry_at = 0;
	run->retry_ms = 0;
	run->accepted_resumes = run->source->resumes;
	run->flush_wanted = run->catch_up_wanted = false;
	run->catch_up_ticket = 0;
	run->messages = palloc(sizeof(*run->messages) * run->source->flush_count);
	run->records = palloc(sizeof(*run->records) * run->source->flush_count);
	MemoryContextSwitchTo(run->scratch);
	es_batch_drop(run);
	es_run_set_state(run, "starting", "");
	open_client(run);
	es_group_join(run);
	if (find_topic(run) && (run->restoring || es_resync(run)))
	{
		es_topic_assign(run);
		es_run_set_state(run, run->restoring ? "restoring" : "running", "");
		run_loop(run);
	}
	close_client(run);
}

/* An error ends the process; the view tells it until the next one starts. */
static void
run_client_reporting(EsSourceRun *run)
{
	PG_TRY();
	{
		run_client(run);
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(run->scratch);
		error = CopyErrorData();
		es_worker_report(run->source->name, "restarting", error->message);
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
load_if_wanted(EsSourceRun *run, uint32 id, bool first)
{
	EsSource	 *loaded;
	MemoryContext old;

	es_run_begin();
	if (!OidIsValid(es_extension_schema()))
	{
		es_run_commit(run);
		return NULL;
	}
	if (first)
		es_task_own(es_source_key(id));
	old = MemoryContextSwitchTo(run->life);
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
	es_run_commit(run);
	return loaded;
}

void
es_source_main(Datum arg)
{
	EsWorkerKey	 key = es_process_key(ES_WORKER_SOURCE, arg);
	EsSourceRun *run = MemoryContextAllocZero(TopMemoryContext, sizeof(EsSourceRun));
	bool		 first = true;

	es_process_begin(key);
	/* Who has read a record's effect must find it after a crash, too. */
	SetConfigOption("synchronous_commit", "on", PGC_SUSET, PGC_S_OVERRIDE);
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, note_server_change, (Datum) 0);
	CacheRegisterSyscacheCallback(USERMAPPINGOID, note_server_change, (Datum) 0);
	run->life = AllocSetContextCreate(TopMemoryContext, "eventstore source",
									  ALLOCSET_DEFAULT_SIZES);
	run->scratch = AllocSetContextCreate(TopMemoryContext, "eventstore source round",
										 ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(run->scratch);
	es_store_following = true;
	es_worker_set_running();

	while (run->leave != ES_LEAVE_FOR_GOOD)
	{
		MemoryContextReset(run->scratch);
		MemoryContextReset(run->life);
		run->source = NULL;
		(void) es_worker_take(ES_WAKE_CONFIG);
		run->source = load_if_wanted(run, key.object, first);
		first = false;
		if (run->source == NULL)
		{
			es_worker_set_absent();
			break;
		}
		run_client_reporting(run);
	}
	proc_exit(0);
}
