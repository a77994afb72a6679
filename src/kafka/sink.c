/*
 * kafka/sink.c
 *		The worker of a sink: a collection's events to a topic, in their order.
 *
 * The loop:
 *
 *	1.	Hear what has arrived (delivery.c); what failed is seen to (handle_failure).
 *	2.	Save the position, or close the transaction of Kafka, when it is due.
 *	3.	Read on (sink_read.c), while records are on their way.
 *	4.	Errands: flush().
 *	5.	Of a changelog: record some of what was restored (sink_backlog.c).
 *	6.	Wait for reports, for new events, for the latch or the clock, without a
 *		transaction.
 *
 * At least once.  The position is saved after all up to there were acknowledged
 * by all in-sync replicas, so what a crash loses is at most the news of it.
 * Exactly once, for who reads committed records only: sink_transaction.c.
 *
 * Order.  The producer is idempotent: within a partition records lie in the order
 * of positions, each once, as long as one client lives.  After a failure all is
 * read again from the last one that arrived.
 *
 * What fails.  Broker, topic, rights: tried again with a growing pause.  What may
 * be an event's own fault (Kafka says so of a whole batch) is found by sending
 * one at a time up to where the failure was; the one that fails alone is passed
 * over, parked, or stops the sink, as on_error says.
 *
 * Locks: the sink (a session lock), then those of sink_read.c and
 * sink_progress.c.  A crash: see above.
 */
#include "postgres.h"

#include "kafka/connection.h"
#include "kafka/restore.h"
#include "kafka/sink_run.h"

#include "feed/wait.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "spi.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "worker/process.h"

/* The pause after a failure doubles from the first to the last value. */
#define RETRY_FIRST_MS 20
#define RETRY_LAST_MS  10000
/* A trouble that lasts so long is shown. */
#define RETRY_SHOWN_MS 500
/* Where the topic or the broker is not there, until they are asked again. */
#define AGAIN_MS 1000
/* What is on its way when the sink is paused gets so long to arrive. */
#define FINISH_MS 1000
/* How often the row is looked at, though nobody has called. */
#define RELOAD_MS 5000
/* A worker that has lived so long is not failing at its start. */
#define STABLE_MS (60 * 1000)

/* ---------------------------------------------------------------------------
 * State
 * ------------------------------------------------------------------------- */

void
es_sink_set_state(EsSinkRun *run, const char *name, const char *message)
{
	if (strcmp(run->state, name) != 0 && strcmp(name, "running") != 0 &&
		strcmp(name, "starting") != 0)
		ereport(LOG, (errmsg("sink \"%s\": %s", run->sink->name, name),
					  message[0] != '\0' ? errdetail_internal("%s", message) : 0));
	strlcpy(run->state, name, sizeof(run->state));
	if (message[0] == '\0' && strcmp(name, "running") == 0)
		message = run->warning;
	es_worker_report(run->sink->name, name, message);
}

void
es_sink_stop_at(EsSinkRun *run, EsSinkHalt reason, const char *message)
{
	static const char *const names[] = {
		[ES_SINK_GOES_ON] = "",		 [ES_SINK_AT_EVENT] = "stopped",
		[ES_SINK_AT_GAP] = "gap",	 [ES_SINK_AHEAD] = "stopped",
		[ES_SINK_FENCED] = "fenced", [ES_SINK_RECREATED] = "topic_recreated"};

	run->halt = reason;
	es_sink_set_state(run, names[reason], message);
}

void
es_sink_retry_later(EsSinkRun *run, const char *state, const char *message)
{
	run->retry_ms = es_task_longer_pause(run->retry_ms, RETRY_FIRST_MS, RETRY_LAST_MS);
	run->retry_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), run->retry_ms);
	run->more = true;
	if (run->retry_ms >= RETRY_SHOWN_MS || strcmp(state, "retrying") != 0)
		es_sink_set_state(run, state, message);
}

void
es_sink_note_bad(EsSinkRun *run, EsPosition position, int sqlstate, const char *reason)
{
	run->bad = position;
	run->bad_sqlstate = sqlstate;
	strlcpy(run->bad_reason, reason, sizeof(run->bad_reason));
	run->more = true;
}

/* What is wrong with the connection, unless something else is, too. */
static void
show_connection(EsSinkRun *run)
{
	static const char *const names[] = {"running", "disconnected", "denied",
										"disconnected"};
	EsKafkaTrouble			 trouble = run->client->trouble;

	if (trouble == ES_KAFKA_FATAL && run->halt != ES_SINK_FENCED)
	{
		run->leave = ES_LEAVE_AND_RETURN;
		run->pause_ms = ES_TASK_PAUSE_MS;
		if (run->sink->exactly_once)
			es_sink_transaction_fatal(run);
	}
	if (run->halt != ES_SINK_GOES_ON || run->retry_at != 0)
		return;
	if (strcmp(run->state, names[trouble]) != 0)
		es_sink_set_state(run, names[trouble],
						  trouble == ES_KAFKA_FINE ? "" : run->client->message);
}

/* ---------------------------------------------------------------------------
 * What arrives
 * ------------------------------------------------------------------------- */

/* All up to there have arrived. */
static EsPosition
arrived_to(const EsSinkRun *run)
{
	if (es_delivery_is_empty(&run->delivery))
		return run->read_to;
	return Max(run->saved, run->delivery.arrived);
}

static bool
is_events_fault(rd_kafka_resp_err_t error)
{
	switch (error)
	{
		case RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE:
		case RD_KAFKA_RESP_ERR_RECORD_LIST_TOO_LARGE:
		case RD_KAFKA_RESP_ERR_INVALID_MSG:
		case RD_KAFKA_RESP_ERR_INVALID_MSG_SIZE:
		case RD_KAFKA_RESP_ERR_INVALID_RECORD:
		case RD_KAFKA_RESP_ERR_INVALID_TIMESTAMP:
		case RD_KAFKA_RESP_ERR_POLICY_VIOLATION:
			return true;
		default:
			return false;
	}
}

const char *
es_sink_state_for(rd_kafka_resp_err_t error)
{
	switch (error)
	{
		case RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART:
		case RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC:
		case RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION:
			return "topic_missing";
		case RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED:
		case RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED:
			return "denied";
		default:
			return "retrying";
	}
}

void
es_sink_rewind(EsSinkRun *run, EsPosition position)
{
	run->read_to = position;
	run->unsaved = 0;
	run->oldest = 0;
	run->more = true;
	/* It was not published; it is marked still. */
	run->letter[0] = '\0';
	es_delivery_reset(&run->delivery);
}

/* A topic that is not there is looked at anew before more is sent to it. */
static void
retry_for(EsSinkRun *run, rd_kafka_resp_err_t error)
{
	const char *state = es_sink_state_for(error);

	es_sink_retry_later(run, state, rd_kafka_err2str(error));
	if (strcmp(state, "topic_missing") != 0)
		return;
	run->leave = ES_LEAVE_AND_RETURN;
	run->pause_ms = ES_TASK_PAUSE_MS;
}

/* Something did not arrive, and nothing is on its way any more. */
static void
handle_failure(EsSinkRun *run)
{
	rd_kafka_resp_err_t error = run->delivery.error;
	EsPosition			failed = es_delivery_failed(&run->delivery);
	EsPosition			was_read_to = run->read_to;
	char				letter[lengthof(run->letter)];

	strlcpy(letter, run->letter, sizeof(letter));
	if (run->sink->exactly_once)
	{
		es_sink_transaction_abort(run);
		if (run->leave != ES_LEAVE_NOT || run->halt == ES_SINK_FENCED)
			return;
	}
	else
	{
		if (arrived_to(run) > run->saved)
			es_sink_save(run, arrived_to(run));
		es_sink_rewind(run, run->saved);
	}
	if (!is_events_fault(error) || failed == 0)
		retry_for(run, error);
	else if (letter[0] != '\0')
		es_sink_letter_failed(run, letter, ERRCODE_FDW_ERROR, rd_kafka_err2str(error));
	else if (failed <= run->single_to)
		es_sink_note_bad(run, failed, ERRCODE_FDW_ERROR, rd_kafka_err2str(error));
	else
		run->single_to = was_read_to;
}

/* What it has taken of a transaction is nothing; what came without one is there. */
static void
stop_at_other_topic(EsSinkRun *run)
{
	if (run->in_transaction)
		es_sink_transaction_abort(run);
	if (run->leave == ES_LEAVE_NOT && run->halt == ES_SINK_GOES_ON)
		es_sink_stop_at(run, ES_SINK_RECREATED,
						"an offset was given to two records: the topic was truncated or "
						"made anew");
}

static void
hear(EsSinkRun *run)
{
	uint64 reports = run->delivery.reports;
	uint64 first = run->delivery.first;

	es_kafka_serve(run->client);
	if (run->delivery.first > first)
	{
		/* The last one of a transaction is its position. */
		es_worker_count(ES_WORKER_RECORDS,
						run->delivery.first - first -
							(run->closing && run->progress_topic != NULL &&
									 es_delivery_is_empty(&run->delivery)
								 ? 1
								 : 0));
		es_kafka_fine(run->client);
		run->retry_at = 0;
		run->retry_ms = 0;
	}
	if (run->delivery.reports > reports)
		run->full = false;
	if (run->delivery.went_back && run->halt == ES_SINK_GOES_ON)
		stop_at_other_topic(run);
	es_sink_topic_note_others(run);
	/* In a transaction the rest is purged. */
	if (run->delivery.error != RD_KAFKA_RESP_ERR_NO_ERROR &&
		(run->in_transaction || es_delivery_is_settled(&run->delivery)))
		handle_failure(run);
	show_connection(run);
}

/* ---------------------------------------------------------------------------
 * Saving
 * ------------------------------------------------------------------------- */

static TimestampTz
save_due_at(const EsSinkRun *run)
{
	if (run->oldest == 0)
		return DT_NOEND;
	if (run->closing || run->flush_wanted || es_sink_letters_wait(run) ||
		run->unsaved >= run->sink->flush_count || run->read_to <= run->single_to ||
		run->halt == ES_SINK_AT_EVENT)
		return 0;
	return run->oldest + run->sink->flush_us;
}

static void
save(EsSinkRun *run)
{
	if (run->in_transaction)
		es_sink_transaction_close(run);
	else if (arrived_to(run) > run->saved)
		es_sink_save(run, arrived_to(run));
	if (run->in_transaction || run->leave != ES_LEAVE_NOT)
		return;
	run->unsaved = 0;
	run->oldest = run->saved < run->read_to ? GetCurrentTimestamp() : 0;
}

/* ---------------------------------------------------------------------------
 * Reading
 * ------------------------------------------------------------------------- */

static bool
may_read(EsSinkRun *run, TimestampTz now)
{
	if (run->halt != ES_SINK_GOES_ON || run->leave != ES_LEAVE_NOT || run->full ||
		run->closing || es_sink_letters_wait(run) || run->retry_at > now ||
		run->delivery.error != RD_KAFKA_RESP_ERR_NO_ERROR)
		return false;
	if (run->read_to < run->single_to && run->saved < run->read_to)
		return false;
	return run->more || es_wait_keep_due();
}

/* ---------------------------------------------------------------------------
 * What is asked of the worker
 * ------------------------------------------------------------------------- */

/* What begins with another client is shown as it was until that one is known to do well. */
static void
accept_halt(EsSinkRun *run)
{
	if (run->halt == ES_SINK_RECREATED)
	{
		es_sink_topic_accept(run);
		return;
	}
	if (run->halt == ES_SINK_FENCED)
	{
		run->leave = ES_LEAVE_AND_RETURN;
		return;
	}
	if (run->halt == ES_SINK_AT_GAP)
		es_sink_pass_gap(run);
	else
		run->bad = 0;
	run->halt = ES_SINK_GOES_ON;
	run->more = true;
	es_sink_set_state(run, "running", "");
}

/* Does its source wait until a changelog topic made anew is accepted? */
static bool
is_awaited(const EsSinkRun *run)
{
	EsWorkerInfo source;

	return run->sink->changelog_of != 0 &&
		   es_worker_find(es_source_key(run->sink->changelog_of), &source) &&
		   es_restore_awaits_topic(&source.report);
}

/* The row may have changed: pause, resume, drop.  COMMIT PREPARED calls nobody. */
static void
reload(EsSinkRun *run)
{
	EsSink *now;
	bool	resumed = false;

	run->reload_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), RELOAD_MS);
	es_task_begin();
	now = OidIsValid(es_extension_schema()) ? es_sink_load(run->sink->id) : NULL;
	if (now == NULL || now->paused || now->failure != NULL || !now->at_home ||
		now->owner != run->sink->owner)
		run->leave = ES_LEAVE_AND_RETURN;
	else if (now->resumes > run->accepted_resumes)
	{
		run->accepted_resumes = now->resumes;
		run->retry_at = 0;
		resumed = true;
	}
	if (run->leave == ES_LEAVE_NOT)
		es_sink_backlog_look(run);
	es_task_commit(run->scratch);
	if (resumed && run->warning[0] != '\0')
	{
		run->warning[0] = '\0';
		run->delivery.broken_in = -1;
		if (strcmp(run->state, "running") == 0)
			es_sink_set_state(run, "running", "");
	}
	if (resumed && is_awaited(run))
		run->halt = ES_SINK_RECREATED;
	if (resumed && run->halt != ES_SINK_GOES_ON)
		accept_halt(run);
}

static void
take_errands(EsSinkRun *run)
{
	uint64 flush;

	(void) es_worker_take(ES_WAKE_ERRAND);
	flush = es_errand_asked(ES_ERRAND_FLUSH);
	if (flush <= run->flush_ticket || run->flush_wanted)
		return;
	run->flush_wanted = true;
	run->flush_known = false;
	run->flush_ticket = flush;
	run->more = true;
}

static void
settle_errands(EsSinkRun *run)
{
	if (!run->flush_wanted || !run->flush_known || run->saved < run->flush_to)
		return;
	run->flush_wanted = false;
	es_errand_done(ES_ERRAND_FLUSH, run->flush_ticket);
	/* Others may have asked meanwhile. */
	take_errands(run);
}

/* ---------------------------------------------------------------------------
 * The loop
 * ------------------------------------------------------------------------- */

/* False where the client is to be left. */
static bool
begin_round(EsSinkRun *run)
{
	MemoryContextReset(run->scratch);
	if (es_process_interrupts())
		run->leave = ES_LEAVE_FOR_GOOD;
	else if (es_worker_take(ES_WAKE_CONFIG) != 0)
	{
		run->letters = true;
		reload(run);
	}
	else if (GetCurrentTimestamp() >= run->reload_at)
		reload(run);
	/* Another client would fence the one that has fenced us. */
	if (run->leave == ES_LEAVE_NOT && run->halt != ES_SINK_FENCED &&
		(es_task_server_changed || es_kafka_is_lost(run->client)))
		run->leave = ES_LEAVE_AND_RETURN;
	return run->leave == ES_LEAVE_NOT;
}

static void
round_of_loop(EsSinkRun *run)
{
	hear(run);
	if (run->leave == ES_LEAVE_NOT && run->delivery.error == RD_KAFKA_RESP_ERR_NO_ERROR &&
		GetCurrentTimestamp() >= save_due_at(run))
		save(run);
	take_errands(run);
	if (run->leave == ES_LEAVE_NOT)
		es_sink_letter_settle(run);
	if (es_sink_letter_is_due(run, GetCurrentTimestamp()))
		es_sink_letter_put(run);
	if (may_read(run, GetCurrentTimestamp()))
		es_sink_read(run);
	settle_errands(run);
	if (es_sink_backlog_is_due(run, GetCurrentTimestamp()))
		es_sink_backlog_record(run);
}

static long
time_to_wait(EsSinkRun *run)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz until = TimestampTzPlusMilliseconds(now, es_wait_keep_ms());
	TimestampTz due = save_due_at(run);

	if (may_read(run, now) || es_sink_letter_is_due(run, now) ||
		es_sink_backlog_is_due(run, now))
		return 0;
	if (run->has_backlog)
		until = Min(until, run->backlog_at);
	if (run->retry_at > now)
		until = Min(until, run->retry_at);
	/* What is due waits for what is on its way, which will wake us. */
	if (due > now)
		until = Min(until, due);
	else if (es_delivery_is_empty(&run->delivery))
		return 0;
	return Max(TimestampDifferenceMilliseconds(now, until), 1);
}

/* Wakes to look at the collection, and whether the extension is there. */
static void
look(EsSinkRun *run)
{
	run->more = true;
	if (!es_process_has_extension())
		run->leave = ES_LEAVE_AND_RETURN;
}

/* Nobody wakes us, perhaps: looks all the same from time to time. */
static void
rest(EsSinkRun *run)
{
	long		ms = time_to_wait(run);
	TimestampTz until =
		TimestampTzPlusMilliseconds(GetCurrentTimestamp(), es_wait_keep_ms());

	if (ms <= 0)
		return;
	pgstat_report_stat(false);
	es_kafka_wait(&run->client, 1, ms);
	if (GetCurrentTimestamp() >= until)
		look(run);
}

static void
run_loop(EsSinkRun *run)
{
	TimestampTz stable = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), STABLE_MS);
	bool		lives = false;

	while (begin_round(run))
	{
		round_of_loop(run);
		if (!lives && run->leave == ES_LEAVE_NOT &&
			(run->progressed || GetCurrentTimestamp() > stable))
		{
			es_task_begin();
			es_task_lives(es_sink_key(run->sink->id));
			es_task_commit(run->scratch);
			lives = true;
		}
		if (run->leave == ES_LEAVE_NOT)
			rest(run);
	}
}

/*
 * What is on its way gets a moment to arrive, so that it need not come again.  Behind
 * a topic that was accepted anew the position is where that begins.
 */
static void
finish(EsSinkRun *run)
{
	TimestampTz until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), FINISH_MS);

	if (run->client->trouble != ES_KAFKA_FINE)
		return;
	if (run->sink->exactly_once)
	{
		es_sink_transaction_abort(run);
		return;
	}
	if (run->halt == ES_SINK_RECREATED)
		return;
	while (!es_delivery_is_settled(&run->delivery) && GetCurrentTimestamp() < until)
	{
		es_kafka_wait(&run->client, 1, FINISH_MS / 10);
		CHECK_FOR_INTERRUPTS();
		es_kafka_serve(run->client);
	}
	if (arrived_to(run) > run->saved)
		es_sink_save(run, arrived_to(run));
	es_sink_letter_settle(run);
}

/* ---------------------------------------------------------------------------
 * The client
 * ------------------------------------------------------------------------- */

/* Before the client is closed: what is of it must be gone. */
static void
release_topics(EsKafkaClient *closing)
{
	EsSinkRun *run =
		(EsSinkRun *) ((char *) closing->arg - offsetof(EsSinkRun, delivery));

	if (run->topic != NULL)
		rd_kafka_topic_destroy(run->topic);
	if (run->progress_topic != NULL)
		rd_kafka_topic_destroy(run->progress_topic);
	run->topic = run->progress_topic = run->delivery.topic = NULL;
}

static void
open_client(EsSinkRun *run)
{
	const char *own[8][2] = {
		{"enable.idempotence", "true"}, {"acks", "all"}, {NULL, NULL}};
	List *properties;

	es_task_begin();
	if (!OidIsValid(run->sink->server))
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
						errmsg("server \"%s\" does not exist", run->sink->server_name)));
	MemoryContextSwitchTo(run->life);
	properties = es_delivery_properties(run->sink->server, run->sink->owner,
										run->sink->producer_properties);
	es_task_commit(run->scratch);
	if (run->sink->exactly_once)
		es_sink_transaction_own(run, own);
	run->client = es_kafka_open(RD_KAFKA_PRODUCER, run->sink->name, properties, own,
								es_delivery_configure, &run->delivery);
	run->client->owner = run->sink->owner;
	run->client->release = release_topics;
	run->topic = rd_kafka_topic_new(run->client->handle, run->sink->topic, NULL);
}

static void
close_client(EsSinkRun *run)
{
	if (run->client != NULL)
		es_kafka_close(run->client);
	run->client = NULL;
}

/* Waits for the broker, the topic, and the end of a predecessor. */
static bool
get_ready(EsSinkRun *run)
{
	while (begin_round(run))
	{
		int count = es_sink_topic_count(run);

		if (count > 0 && es_sink_topic_check(run, count) &&
			(run->halt != ES_SINK_GOES_ON || !run->sink->exactly_once ||
			 es_sink_transaction_init(run)))
			return true;
		if (run->leave == ES_LEAVE_NOT)
			es_kafka_wait(&run->client, 1, AGAIN_MS);
		es_kafka_serve(run->client);
	}
	return false;
}

/* With one client, until it is to be closed. */
static void
run_client(EsSinkRun *run)
{
	run->pause_ms = 0;
	run->leave = ES_LEAVE_NOT;
	run->halt = ES_SINK_GOES_ON;
	run->accepted_resumes = run->sink->resumes;
	run->saved = run->sink->position;
	run->retry_at = 0;
	run->retry_ms = 0;
	run->in_transaction = run->closing = run->full = false;
	run->share = NULL;
	run->refused = NULL;
	run->vouched = run->stale = false;
	run->flush_wanted = false;
	run->flush_ticket = 0;
	run->bad = run->single_to = 0;
	run->doubts = 0;
	run->delivery.nends = run->delivery.nunbroken = 0;
	run->letters = true;
	run->reload_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), RELOAD_MS);
	es_sink_rewind(run, run->saved);
	es_task_begin();
	es_sink_backlog_look(run);
	es_task_commit(run->scratch);
	if (run->accepting)
	{
		es_sink_topic_accept(run);
		return;
	}
	/* A trouble is shown until it is known to be over. */
	if (run->state[0] == '\0' || strcmp(run->state, "running") == 0)
		es_sink_set_state(run, "starting", "");
	open_client(run);
	if (get_ready(run))
	{
		if (run->halt == ES_SINK_GOES_ON)
			es_sink_set_state(run, "running", "");
		run_loop(run);
		if (run->leave == ES_LEAVE_AND_RETURN)
			finish(run);
	}
	close_client(run);
}

static bool
load_sink(void *arg, uint32 id, EsTaskRow *row)
{
	EsSinkRun *run = arg;

	run->sink = es_sink_load(id);
	if (run->sink == NULL)
		return false;
	row->name = run->sink->name;
	row->resting = run->sink->paused || run->sink->failure != NULL;
	row->at_home = run->sink->at_home;
	return true;
}

static EsLeave
serve_sink(void *arg, int *pause_ms)
{
	EsSinkRun *run = arg;

	run_client(run);
	*pause_ms = run->pause_ms;
	return run->leave;
}

static void
fail_sink(void *arg, const char *state, const char *message)
{
	EsSinkRun *run = arg;

	/* Until it is accepted it is what it was. */
	es_sink_set_state(run, run->accepting ? "topic_recreated" : state, message);
	close_client(run);
}

void
es_sink_main(Datum arg)
{
	EsWorkerKey key = es_process_key(ES_WORKER_SINK, arg);
	EsSinkRun  *run = MemoryContextAllocZero(TopMemoryContext, sizeof(EsSinkRun));
	EsTaskWork *work;

	es_process_begin(key);
	work = es_task_work("sink", run);
	work->load = load_sink;
	work->serve = serve_sink;
	work->fail = fail_sink;
	run->life = work->life;
	run->scratch = work->scratch;
	run->event = AllocSetContextCreate(TopMemoryContext, "eventstore sink event",
									   ALLOCSET_DEFAULT_SIZES);
	run->share_life = AllocSetContextCreate(TopMemoryContext, "eventstore sink share",
											ALLOCSET_DEFAULT_SIZES);
	es_delivery_init(&run->delivery);
	es_task_work_main(key, work);
}
