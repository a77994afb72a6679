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
 * by itself is tried again, and is the state that the view sources shows.  That
 * goes for errors, too (a server that was dropped, a right that was revoked): the
 * client is closed, and another one opened after a pause.  So a process that ends
 * before its time has crashed or was ended, and one that does so again and again
 * at its start has failed (es_task_note_start).
 *
 * Locks: the source (a session lock), then those of batch.c, for the time of a
 * transaction.  A crash: see above.
 */
#include "postgres.h"

#include "kafka/batch.h"
#include "kafka/connection.h"
#include "kafka/group.h"
#include "kafka/relay.h"
#include "kafka/restore.h"
#include "kafka/resync.h"
#include "kafka/topic.h"

#include "access/xlog.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "spi.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "worker/process.h"

/* Messages taken from the queue in one go. */
#define TAKE_MAX 1000
/* Where the topic or the broker is not there, or does not tell, until they are asked again. */
#define AGAIN_MS 1000
/* With nothing to do. */
#define IDLE_MS (60 * 1000)
/* A worker that has lived so long is not failing at its start. */
#define STABLE_MS (60 * 1000)

/* ---------------------------------------------------------------------------
 * Taking
 * ------------------------------------------------------------------------- */

/*
 * The topic may be there again already, as another one.  Where it is the changelog
 * topic, beside our own, the next client sees to that, and ours is as it was.
 */
static void
note_missing_topic(EsSourceRun *run, const rd_kafka_message_t *message)
{
	if (message->rkt == NULL ||
		strcmp(rd_kafka_topic_name(message->rkt), es_topic_followed(run->source)) == 0)
	{
		run->topic_missing = true;
		run->look_at = 0;
	}
	else
	{
		run->leave = ES_LEAVE_AND_RETURN;
		run->pause_ms = ES_TASK_PAUSE_MS;
	}
}

/* What came instead of a record. */
static void
note_message_error(EsSourceRun *run, const rd_kafka_message_t *message)
{
	EsPartition *partition = es_run_partition_of(run, message);

	switch (message->err)
	{
		case RD_KAFKA_RESP_ERR__PARTITION_EOF:
			if (partition != NULL)
			{
				partition->seen_end = message->offset;
				partition->answered = partition->ended = true;
			}
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
			note_missing_topic(run, message);
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

/*
 * Takes what is there, as long as the batch has room.  A client whose topic has
 * gone is kept until there is one again, though it is of no use: librdkafka before
 * 2.6.1 may never come back from closing it.
 */
static void
collect(EsSourceRun *run)
{
	static rd_kafka_message_t *taken[TAKE_MAX];

	run->drained = false;
	while (es_batch_has_room(run) && run->leave == ES_LEAVE_NOT &&
		   run->halt == ES_HALT_NONE)
	{
		int		room = Min(TAKE_MAX, run->capacity - run->nrecords);
		ssize_t n = rd_kafka_consume_batch_queue(run->client->queue, 0, taken, room);

		run->drained = n <= 0;
		if (run->drained)
			break;
		run->taken = taken;
		run->ntaken = (int) n;
		for (int i = run->next_taken = 0; i < n; i = ++run->next_taken)
		{
			/* What comes of a topic that was gone may be of another one. */
			if (run->topic_missing)
			{
				rd_kafka_message_destroy(taken[i]);
				continue;
			}
			es_kafka_note_taken(run->client, taken[i]);
			es_topic_recognise(run, taken[i]);
			if (taken[i]->err == RD_KAFKA_RESP_ERR_NO_ERROR &&
				run->leave == ES_LEAVE_NOT && es_batch_add(run, taken[i]))
				continue;
			if (taken[i]->err != RD_KAFKA_RESP_ERR_NO_ERROR)
				note_message_error(run, taken[i]);
			rd_kafka_message_destroy(taken[i]);
		}
		run->ntaken = 0;
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
	run->nrecords = run->nwritten = run->nrelayed = 0;
	for (int i = run->next_taken; i < run->ntaken; i++)
		rd_kafka_message_destroy(run->taken[i]);
	run->ntaken = 0;
}

/* In life.  42704 where there is no such server any more, 42501 without USAGE. */
static List *
read_properties(EsSourceRun *run)
{
	List *properties;

	es_task_begin();
	MemoryContextSwitchTo(run->life);
	properties =
		es_kafka_properties(es_kafka_server(run->source->server_name), run->source->owner,
							run->source->consumer_properties);
	es_task_commit(run->scratch);
	return properties;
}

static bool
equal_properties(List *a, List *b)
{
	ListCell *cell;
	ListCell *other;

	if (list_length(a) != list_length(b))
		return false;
	forboth (cell, a, other, b)
	{
		EsKafkaProperty *one = lfirst(cell);
		EsKafkaProperty *two = lfirst(other);

		if (strcmp(one->name, two->name) != 0 || strcmp(one->value, two->value) != 0)
			return false;
	}
	return true;
}

/* Another client, where this one was not made for what the server says now. */
static void
check_server(EsSourceRun *run)
{
	if (!es_task_server_changed)
		return;
	es_task_server_changed = false;
	if (!equal_properties(run->properties, read_properties(run)))
		run->leave = ES_LEAVE_AND_RETURN;
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

	run->properties = read_properties(run);
	run->client = es_kafka_open(RD_KAFKA_CONSUMER, run->source->name, run->properties,
								own, NULL, run);
	run->client->owner = run->source->owner;
	run->client->release = release_messages;
}

static void
close_client(EsSourceRun *run)
{
	es_relay_close();
	if (run->client != NULL)
		es_kafka_close(run->client);
	run->client = NULL;
}

/* ---------------------------------------------------------------------------
 * What is asked of the worker
 * ------------------------------------------------------------------------- */

/* The row may have changed: pause, resume, drop; or gone with the target or the extension. */
static void
reload(EsSourceRun *run)
{
	EsSource *now;

	es_task_begin();
	now = OidIsValid(es_extension_schema()) ? es_source_load(run->source->id) : NULL;
	if (now == NULL || now->paused || now->failure != NULL || !now->at_home ||
		now->owner != run->source->owner || now->transform != run->source->transform ||
		(now->resync && !run->source->resync))
		run->leave = ES_LEAVE_AND_RETURN;
	else if (now->resumes > run->accepted_resumes)
	{
		run->accepted_resumes = now->resumes;
		run->retry_at = 0;
	}
	else
		now = NULL;
	es_task_commit(run->scratch);
	if (now == NULL || run->leave != ES_LEAVE_NOT)
		return;
	if (run->halt != ES_HALT_NONE)
		es_topic_accept_halt(run);
	else if (run->restoring)
		/* The next client asks anew where the topic ends: it may have been cut. */
		run->leave = ES_LEAVE_AND_RETURN;
}

/*
 * The ends of all partitions, as of now: wait_for_source() waits for them.  False where
 * there are others by now, or Kafka does not tell; a partition that ends before what
 * was read of it is another one, or not told right.
 */
static bool
note_wanted_ends(EsSourceRun *run)
{
	int64 *ends;

	if (!es_topic_look(run))
		return false;
	ends = palloc(sizeof(int64) * run->npartitions);
	if (!es_topic_find_all_ends(run, ends))
		return false;
	for (int i = 0; i < run->npartitions; i++)
	{
		EsPartition *partition = &run->partitions[i];

		if (ends[i] < partition->progress.written)
			return false;
		partition->wanted = ends[i];
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
	if (catch_up <= run->catch_up_ticket || run->catch_up_wanted || run->restoring ||
		run->halt != ES_HALT_NONE)
		return;
	run->catch_up_wanted = note_wanted_ends(run);
	if (run->catch_up_wanted)
		run->catch_up_ticket = catch_up;
	else
		run->look_at = Min(run->look_at, es_run_ms_from_now(AGAIN_MS));
}

static void
settle_errands(EsSourceRun *run)
{
	if (run->halt != ES_HALT_NONE || run->leave != ES_LEAVE_NOT || run->nrecords > 0)
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
	if (es_worker_take(ES_WAKE_CONFIG) != 0 || GetCurrentTimestamp() >= run->look_at)
		reload(run);
	if (run->accept_other && run->halt == ES_HALT_RECREATED && run->leave == ES_LEAVE_NOT)
		es_topic_accept_halt(run);
	check_server(run);
	if (es_kafka_is_lost(run->client))
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
		(void) es_topic_look(run);
	settle_errands(run);
}

/* Nothing to do until something comes: a queue that was not emptied would not call. */
static bool
may_rest(EsSourceRun *run)
{
	return run->leave == ES_LEAVE_NOT &&
		   (run->halt != ES_HALT_NONE || run->retry_at != 0 || run->drained);
}

/*
 * A process that has come through all that there is, or has lived for a while, is
 * not failing at its start.
 */
static void
note_life(EsSourceRun *run, TimestampTz stable)
{
	if (run->halt == ES_HALT_NONE && es_run_all_answered(run))
		run->accept_gap = run->accept_other = false;
	if (run->lives || (!es_run_all_ended(run) && GetCurrentTimestamp() < stable))
		return;
	es_task_begin();
	es_task_lives(es_source_key(run->source->id));
	es_task_commit(run->scratch);
	run->lives = true;
}

/* The partitions are known and assigned: reads and writes until it is to leave. */
static void
run_loop(EsSourceRun *run)
{
	TimestampTz stable = es_run_ms_from_now(STABLE_MS);

	while (run->leave == ES_LEAVE_NOT)
	{
		round_of_loop(run);
		if (run->leave != ES_LEAVE_NOT)
			return;
		note_life(run, stable);
		pgstat_report_stat(false);
		if (may_rest(run))
			sleep_in(run, time_to_wait(run, GetCurrentTimestamp()));
	}
}

/* Errors and logs: there is nothing else as long as nothing is assigned. */
static void
serve_events(EsSourceRun *run)
{
	rd_kafka_message_t *message;

	while (rd_kafka_consume_batch_queue(run->client->queue, 0, &message, 1) > 0)
		rd_kafka_message_destroy(message);
	es_kafka_note(run->client);
}

/* Waits for the topic and the broker. */
static bool
find_topic(EsSourceRun *run)
{
	for (;;)
	{
		int count;

		MemoryContextReset(run->scratch);
		if (es_process_interrupts())
			run->leave = ES_LEAVE_FOR_GOOD;
		else
		{
			(void) es_worker_take(ES_WAKE_CONFIG);
			reload(run);
			check_server(run);
			if (es_kafka_is_lost(run->client))
				run->leave = ES_LEAVE_AND_RETURN;
		}
		if (run->leave != ES_LEAVE_NOT)
			return false;
		(void) es_group_serve(run);
		if (run->leave != ES_LEAVE_NOT)
			return false;
		serve_events(run);
		count = es_topic_count_partitions(run, es_topic_followed(run->source));
		if (count > 0 && !es_group_awaits(run) && es_topic_load_partitions(run, count))
			return true;
		sleep_in(run, AGAIN_MS);
	}
}

/* What a client begins with. */
static void
reset_run(EsSourceRun *run)
{
	MemoryContextSwitchTo(run->life);
	run->leave = ES_LEAVE_NOT;
	run->halt = ES_HALT_NONE;
	run->suspicion = NULL;
	run->partitions = NULL;
	run->npartitions = 0;
	run->retry_at = 0;
	run->retry_ms = 0;
	run->pause_ms = 0;
	run->unidentified = 0;
	run->accepted_resumes = run->source->resumes;
	/* What was asked of the last client and not done is asked of this one. */
	run->flush_wanted = run->catch_up_wanted = false;
	run->flush_ticket = run->catch_up_ticket = 0;
	es_batch_begin(run);
	MemoryContextSwitchTo(run->scratch);
	/* A trouble is shown until it is known to be over. */
	if (run->state[0] == '\0' || strcmp(run->state, "running") == 0)
		es_run_set_state(run, "starting", "");
}

/* With one client, until it is to be closed. */
static void
run_client(EsSourceRun *run)
{
	reset_run(run);
	open_client(run);
	es_group_join(run);
	if (find_topic(run) && (run->restoring || run->suspicion != NULL || es_resync(run)))
	{
		es_topic_assign(run);
		es_group_note_loaded(run);
		run_loop(run);
	}
	close_client(run);
}

static bool
load_source(void *arg, uint32 id, EsTaskRow *row)
{
	EsSourceRun *run = arg;

	run->source = es_source_load(id);
	if (run->source == NULL)
		return false;
	row->name = run->source->name;
	row->resting = run->source->paused || run->source->failure != NULL;
	row->at_home = run->source->at_home;
	return true;
}

static EsLeave
serve_source(void *arg, int *pause_ms)
{
	EsSourceRun *run = arg;

	run_client(run);
	*pause_ms = run->pause_ms;
	return run->leave;
}

static void
fail_source(void *arg, const char *state, const char *message)
{
	EsSourceRun *run = arg;

	es_run_set_state(run, state, message);
	close_client(run);
}

void
es_source_main(Datum arg)
{
	EsWorkerKey	 key = es_process_key(ES_WORKER_SOURCE, arg);
	EsSourceRun *run = MemoryContextAllocZero(TopMemoryContext, sizeof(EsSourceRun));
	EsTaskWork	*work;

	es_process_begin(key);
	/* Who has read a record's effect must find it after a crash, too. */
	SetConfigOption("synchronous_commit", "on", PGC_SUSET, PGC_S_OVERRIDE);
	es_store_following = key.object;
	work = es_task_work("source", run);
	work->load = load_source;
	work->serve = serve_source;
	work->fail = fail_source;
	run->life = work->life;
	run->scratch = work->scratch;
	es_task_work_main(key, work);
}
