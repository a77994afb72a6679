/*
 * kafka/task_worker.c
 *		The frame of the process that a source or sink has.
 *
 * The process owns its task for the session (es_task_own), so nobody else
 * serves it.  An error ends the client, never the process: after a pause, which
 * grows while it goes on like that, the row is loaded again.  Where the row is
 * gone, paused, failed, or a copy's, the process says that it is absent, and
 * ends; whoever changes that calls it (task.c).
 */
#include "postgres.h"

#include "kafka/client.h"
#include "kafka/task_worker.h"

#include "access/xact.h"
#include "spi.h"
#include "storage/ipc.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "worker/process.h"

/* How long a pause goes on without hearing of changes. */
#define PAUSE_STEP_MS 1000

/* What a pause grows to while clients end by an error. */
#define PAUSE_LAST_MS (10 * 1000)

bool es_task_server_changed = false;

/* ---------------------------------------------------------------------------
 * Transactions
 * ------------------------------------------------------------------------- */

void
es_task_begin(void)
{
	StartTransactionCommand();
	/* With nothing else in hand: we are not in the way of an update's locks, nor it of ours. */
	es_extension_share();
	PushActiveSnapshot(GetTransactionSnapshot());
}

void
es_task_commit(MemoryContext scratch)
{
	PopActiveSnapshot();
	CommitTransactionCommand();
	MemoryContextSwitchTo(scratch);
}

ErrorData *
es_task_catch(MemoryContext scratch)
{
	ErrorData *error;

	MemoryContextSwitchTo(scratch);
	error = CopyErrorData();
	FlushErrorState();
	AbortCurrentTransaction();
	MemoryContextSwitchTo(scratch);
	return error;
}

const char *
es_task_state_after(const ErrorData *error)
{
	return error->sqlerrcode == ERRCODE_INSUFFICIENT_PRIVILEGE ? "denied" : "retrying";
}

/* ---------------------------------------------------------------------------
 * From client to client
 * ------------------------------------------------------------------------- */

static void
note_server_change(Datum arg, int cacheid, uint32 hash)
{
	es_task_server_changed = true;
}

static void
listen_to_changes(void)
{
	static const int caches[] = {FOREIGNSERVEROID, USERMAPPINGOID, AUTHOID,
								 AUTHMEMROLEMEM};

	for (int i = 0; i < lengthof(caches); i++)
		CacheRegisterSyscacheCallback(caches[i], note_server_change, (Datum) 0);
}

/* Is it to be run, here and now?  Shows what is against it, and notes a start. */
static bool
is_wanted(EsWorkerKey key, const EsTaskRow *row, bool first)
{
	if (row->resting)
		return false;
	if (row->at_home)
		return !first || es_task_note_start(key);
	es_worker_report(row->name, "cloned",
					 "this is a copy of the server or database that it ran in");
	return false;
}

static bool
load_if_wanted(EsWorkerKey key, const EsTaskWork *work, bool first)
{
	bool wanted = false;

	es_task_begin();
	if (OidIsValid(es_extension_schema()))
	{
		MemoryContext old;
		EsTaskRow	  row;

		if (first)
			es_task_own(key);
		old = MemoryContextSwitchTo(work->life);
		wanted = work->load(work->run, key.object, &row);
		MemoryContextSwitchTo(old);
		wanted = wanted && is_wanted(key, &row, first);
	}
	es_task_commit(work->scratch);
	return wanted;
}

static EsLeave
serve_reporting(const EsTaskWork *work, int *pause_ms)
{
	static int growing_ms = 0;
	EsLeave	   leave;

	*pause_ms = 0;
	PG_TRY();
	{
		leave = work->serve(work->run, pause_ms);
		growing_ms = 0;
	}
	PG_CATCH();
	{
		ErrorData *error = es_task_catch(work->scratch);

		work->fail(work->run, es_task_state_after(error), error->message);
		leave = ES_LEAVE_AND_RETURN;
		growing_ms = es_task_longer_pause(growing_ms, ES_TASK_PAUSE_MS, PAUSE_LAST_MS);
		*pause_ms = growing_ms;
	}
	PG_END_TRY();
	return leave;
}

/*
 * Waits, less where its row or server changes, or the extension goes; false
 * where the process is to end.
 */
static bool
pause_work(int pause_ms)
{
	TimestampTz until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), pause_ms);

	while (pause_ms > 0 && !es_task_server_changed &&
		   es_worker_pending(ES_WAKE_CONFIG) == 0)
	{
		long left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), until);

		if (left == 0)
			break;
		es_kafka_wait(NULL, 0, Min(left, PAUSE_STEP_MS));
		if (es_process_interrupts())
			return false;
		/* A transaction: it hears of changes to the server. */
		if (!es_process_has_extension())
			break;
	}
	return true;
}

EsTaskWork *
es_task_work(const char *name, void *run)
{
	EsTaskWork *work = MemoryContextAllocZero(TopMemoryContext, sizeof(EsTaskWork));

	work->run = run;
	work->life = AllocSetContextCreate(TopMemoryContext, "eventstore client",
									   ALLOCSET_DEFAULT_SIZES);
	work->scratch = AllocSetContextCreate(TopMemoryContext, "eventstore round",
										  ALLOCSET_DEFAULT_SIZES);
	MemoryContextSetIdentifier(work->life, name);
	MemoryContextSetIdentifier(work->scratch, name);
	return work;
}

void
es_task_work_main(EsWorkerKey key, const EsTaskWork *work)
{
	EsLeave leave = ES_LEAVE_NOT;
	bool	first = true;

	listen_to_changes();
	MemoryContextSwitchTo(work->scratch);
	es_worker_set_running();
	while (leave != ES_LEAVE_FOR_GOOD)
	{
		int pause_ms;

		MemoryContextReset(work->scratch);
		MemoryContextReset(work->life);
		/* One that is left standing would have an absent worker started again and again. */
		(void) es_worker_take(ES_WAKE_CONFIG | ES_WAKE_ERRAND);
		if (!load_if_wanted(key, work, first))
		{
			es_worker_set_absent();
			break;
		}
		first = false;
		es_task_server_changed = false;
		leave = serve_reporting(work, &pause_ms);
		if (leave != ES_LEAVE_FOR_GOOD && !pause_work(pause_ms))
			break;
	}
	proc_exit(0);
}
