/*
 * worker/worker.c
 *		A database's worker: what its loop does, and in which order.
 *
 * Like eventstore.c this is wiring: the steps live where their matter lives,
 * in collection/.  What is here is the loop, the list of collections, what is
 * done when a step fails, and two small steps of its own (ticks, holders).
 *
 *	1.	Segments.  First of all, since appenders may be waiting.
 *	2.	Ticks.  A collection whose head moved and then stood still for
 *		tick_delay gets that head noted in eventstore.tick, for snapshots that
 *		shared memory cannot help.  The head is read before the transaction
 *		takes its snapshot, so it holds for everybody who sees the row.
 *	3.	Retention, then the disposal of what it let go; this may have to wait
 *		for other transactions, so it comes last, stops when an appender calls,
 *		and waits a fraction of a second at most (lock_timeout).
 *	4.	Holders: transactions that hold a head back for too long.
 *
 * All are done when somebody asks (ES_WAKE_MAINTENANCE) and every
 * maintenance_interval; as long as heads move also steps 1, 2 and 4.
 *
 * Each step of each collection is a transaction of its own.  Its failure (an
 * owner without rights on his schema, a lock that is not to be had) is logged
 * once until it changes, and must not keep the other collections from getting
 * theirs; it is tried again after a pause that grows.  Errors elsewhere end the
 * process, and the launcher starts another.
 *
 * The worker ends when the extension is gone from its database.  Nothing that
 * it knows is needed by the next one.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/retention.h"
#include "collection/segment.h"
#include "compat.h"
#include "guc.h"
#include "kafka/task.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "position/head.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "spi.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "worker/launcher.h"
#include "worker/listeners.h"
#include "worker/process.h"
#include "worker/wake.h"

/*
 * Steps wait for a lock as long as process.h says: appends that stand in the way
 * end soon, and what takes longer (a dump) is better left alone and tried again.
 * Disposal waits for open transactions, which may be waiting for us to make a
 * segment: nothing but this ends that.
 */
#define DISPOSAL_LOCK_TIMEOUT "100ms"
/* How often in a row that may happen before it is logged. */
#define LOCK_PATIENCE 5

/* How often a collection that is not appended to is looked at. */
#define RECHECK_MS (60 * 1000)

/* The pause after a failed step doubles from the first to the last value. */
#define PAUSE_FIRST_MS 500
#define PAUSE_LAST_MS  (5 * 60 * 1000)
/* While appenders wait it grows no further than this ... */
#define PAUSE_URGENT_MS 2000
/* ... and while segments wait to be dropped, no further than this. */
#define PAUSE_DISPOSAL_MS (10 * 1000)

typedef enum Step
{
	STEP_SEGMENTS,
	STEP_HEAD,
	STEP_RETENTION,
	STEP_DISPOSAL,
	STEP_COUNT
} Step;

static const char *const step_names[STEP_COUNT] = {
	"making segments", "reading the head", "applying retention", "dropping segments"};

/* How a step last failed for a collection. */
typedef struct Failure
{
	int			sqlstate; /* 0 = it did not */
	int			times;	  /* in a row */
	TimestampTz retry_at;
} Failure;

/* What the worker knows of a collection; as of the last survey, and its own. */
typedef struct Work
{
	Oid			relid;		/* hash key */
	bool		listed;		/* in the catalog, at this survey */
	bool		checked;	/* its segments were looked at since we started ... */
	TimestampTz checked_at; /* ... at this time the last time */
	int64		segment_size;
	EsRetention retention; /* 'age' points to 'age' */
	Interval	age;
	EsHeadRef	head;
	EsPosition	seen_last; /* last allotted, and head, as last seen ... */
	EsPosition	seen_head;
	TimestampTz changed_at; /* ... and since when they are so */
	EsPosition	ticked;		/* the head that was noted last */
	Failure		failures[STEP_COUNT];
} Work;

typedef void (*StepFunction)(Work *work, void *arg);

static HTAB			*works = NULL; /* in life_context */
static MemoryContext life_context = NULL;
static MemoryContext cycle_context = NULL;

/* The next time something is to be tried again; moved down by each step. */
static TimestampTz next_retry = 0;

/* ---------------------------------------------------------------------------
 * Transactions and failures
 * ------------------------------------------------------------------------- */

static void commit_work(void);

/*
 * False, without a transaction, where the extension is going: the next survey
 * will tell.  A DROP that is not through yet must not be in our way, nor we in
 * its.
 */
static bool
begin_work(const char *activity)
{
	pgstat_report_activity(STATE_RUNNING, activity);
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	if (es_extension_pin())
		return true;
	commit_work();
	return false;
}

static void
commit_work(void)
{
	PopActiveSnapshot();
	CommitTransactionCommand();
	MemoryContextSwitchTo(cycle_context);
	pgstat_report_stat(true);
}

static void
note_success(Work *work, Step step)
{
	memset(&work->failures[step], 0, sizeof(Failure));
}

static void
note_failure(Work *work, Step step, int sqlstate)
{
	Failure *failure = &work->failures[step];
	int		 limit_ms = PAUSE_LAST_MS;
	int		 pause_ms = PAUSE_FIRST_MS;

	if (step == STEP_SEGMENTS)
		limit_ms = PAUSE_URGENT_MS;
	else if (step == STEP_DISPOSAL)
		limit_ms = PAUSE_DISPOSAL_MS;
	for (int i = 0; i < failure->times && pause_ms < limit_ms; i++)
		pause_ms *= 2;
	failure->times++;
	failure->sqlstate = sqlstate;
	failure->retry_at =
		TimestampTzPlusMilliseconds(GetCurrentTimestamp(), Min(pause_ms, limit_ms));
	es_worker_count(ES_WORKER_ERRORS, 1);
}

/* Has it to sit out a pause?  If so, the loop comes back when that is over. */
static bool
is_paused(const Work *work, Step step, TimestampTz now)
{
	TimestampTz retry_at = work->failures[step].retry_at;

	if (retry_at <= now)
		return false;
	if (next_retry == 0 || retry_at < next_retry)
		next_retry = retry_at;
	return true;
}

/*
 * Once until it changes.  A lock that is not to be had is no news while it may
 * still come; that others use what is to be dropped, never.
 */
static bool
is_news(const Failure *failure, Step step, int sqlstate)
{
	if (sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
		return step != STEP_DISPOSAL && failure->times == LOCK_PATIENCE;
	return sqlstate != failure->sqlstate;
}

/*
 * Runs a step for one collection, as autovacuum does for one table: an error
 * is logged, the transaction is rolled back, and the loop goes on.
 */
static bool
run_step(Work *work, Step step, StepFunction function, void *arg)
{
	volatile bool done = false;

	if (is_paused(work, step, GetCurrentTimestamp()))
		return false;
	PG_TRY();
	{
		function(work, arg);
		done = true;
	}
	PG_CATCH();
	{
		int sqlstate = geterrcode();

		HOLD_INTERRUPTS();
		errcontext("%s of eventstore collection with OID %u", step_names[step],
				   work->relid);
		if (is_news(&work->failures[step], step, sqlstate))
			EmitErrorReport();
		AbortOutOfAnyTransaction();
		MemoryContextSwitchTo(cycle_context);
		FlushErrorState();
		note_failure(work, step, sqlstate);
		(void) is_paused(work, step, GetCurrentTimestamp());
		RESUME_INTERRUPTS();
	}
	PG_END_TRY();
	if (done)
		note_success(work, step);
	return done;
}

/* ---------------------------------------------------------------------------
 * The list of collections
 * ------------------------------------------------------------------------- */

static Work *
find_work(Oid relid)
{
	bool  found;
	Work *work = hash_search(works, &relid, HASH_ENTER, &found);

	if (!found)
		memset((char *) work + sizeof(Oid), 0, sizeof(Work) - sizeof(Oid));
	return work;
}

/* One row: collection, incarnation, segment_size, the limits, the tick. */
static void
note_collection(HeapTuple row, TupleDesc desc)
{
	bool  isnull;
	Work *work = find_work(DatumGetObjectId(SPI_getbinval(row, desc, 1, &isnull)));
	int64 incarnation = DatumGetInt64(SPI_getbinval(row, desc, 2, &isnull));
	Datum value;

	work->listed = true;
	if (work->head.incarnation != incarnation)
		work->checked = false;
	work->head.relid = work->relid;
	work->head.incarnation = incarnation;
	work->segment_size = DatumGetInt64(SPI_getbinval(row, desc, 3, &isnull));

	value = SPI_getbinval(row, desc, 4, &isnull);
	work->retention.events = isnull ? 0 : DatumGetInt64(value);
	value = SPI_getbinval(row, desc, 5, &isnull);
	if (!isnull)
		work->age = *DatumGetIntervalP(value);
	work->retention.age = isnull ? NULL : &work->age;
	value = SPI_getbinval(row, desc, 6, &isnull);
	work->retention.bytes = isnull ? 0 : DatumGetInt64(value);
	value = SPI_getbinval(row, desc, 7, &isnull);
	work->ticked = isnull ? 0 : DatumGetInt64(value);
}

/* A hash table's scan does not outlive a transaction; this list does. */
static List *
list_works(void)
{
	HASH_SEQ_STATUS status;
	Work		   *work;
	List		   *list = NIL;

	hash_seq_init(&status, works);
	while ((work = hash_seq_search(&status)) != NULL)
		list = lappend(list, work);
	return list;
}

static void
forget_unlisted(void)
{
	ListCell *cell;

	foreach (cell, list_works())
	{
		Work *work = lfirst(cell);

		if (!work->listed)
			hash_search(works, &work->relid, HASH_REMOVE, NULL);
		else
			work->listed = false;
	}
}

/* False where the extension is not there (any more). */
static bool
survey_collections(void)
{
	if (!begin_work("eventstore: reading the list of collections"))
		return es_process_has_extension();
	es_tasks_want();
	SPI_connect();
	es_spi_execute(
		"SELECT c.collection::pg_catalog.oid, c.incarnation, c.segment_size,"
		" c.retain_events, c.retain_for, c.retain_bytes, t.head"
		" FROM eventstore.collection_catalog c"
		" LEFT JOIN eventstore.tick t ON t.collection = c.collection::pg_catalog.oid",
		0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	for (uint64 i = 0; i < SPI_processed; i++)
		note_collection(SPI_tuptable->vals[i], SPI_tuptable->tupdesc);
	SPI_finish();
	commit_work();
	forget_unlisted();
	return true;
}

/* ---------------------------------------------------------------------------
 * Step 1: segments
 * ------------------------------------------------------------------------- */

/* From shared memory alone: is there surely nothing to do? */
static bool
has_enough_segments(Work *work)
{
	EsPosition ready;
	EsPosition next;

	if (!work->checked || !es_head_find(&work->head) ||
		es_head_wanted_end(&work->head) != 0)
		return false;

	/* Nobody appends here, but events may come by replication. */
	if (!es_head_in_use(&work->head))
		return !TimestampDifferenceExceeds(work->checked_at, GetCurrentTimestamp(),
										   RECHECK_MS);

	ready = es_head_ready_end(&work->head);
	next = es_head_last_allotted(&work->head) + 1;
	/* Boundaries are regular, so this many positions hold that many segments. */
	return ready - next > work->segment_size * es_segments_ahead;
}

/* At the first look also loads the head, so that what a crash left unticked is. */
static void
make_segments(Work *work, void *arg)
{
	EsPosition end;

	if (has_enough_segments(work))
		return;

	if (!begin_work("eventstore: making segments"))
		return;
	LockRelationOid(work->relid, AccessShareLock);
	if (!work->checked && es_collection_exists(work->relid))
		es_collection_load_head(es_collection_get(work->relid));
	end = es_segments_keep_ahead(work->relid);
	commit_work();

	/* Only now does everybody know of them: see segment.c. */
	if (end > 0 && es_head_find(&work->head))
		es_head_set_ready_end(&work->head, end);
	work->checked = end > 0;
	work->checked_at = GetCurrentTimestamp();
}

/* For those that were looked at before: mostly a glance at shared memory. */
static void
keep_segments(List *list)
{
	ListCell *cell;

	foreach (cell, list)
	{
		Work *work = lfirst(cell);

		if (work->checked && work->head.head != NULL)
			run_step(work, STEP_SEGMENTS, make_segments, NULL);
	}
}

/* ---------------------------------------------------------------------------
 * Step 2: ticks
 * ------------------------------------------------------------------------- */

/* What a pass over the heads has found. */
typedef struct HeadPass
{
	bool  busy; /* some head moves, or waits to be noted */
	List *due;	/* of Work: to be noted now */
} HeadPass;

static void
look_at_head(Work *work, void *arg)
{
	HeadPass   *pass = arg;
	TimestampTz now = GetCurrentTimestamp();
	EsPosition	last;
	EsPosition	head;

	if (!es_head_find(&work->head))
		return;
	last = es_head_last_allotted(&work->head);
	head = es_head_read(&work->head, true);
	if (last != work->seen_last || head != work->seen_head)
	{
		work->seen_last = last;
		work->seen_head = head;
		work->changed_at = now;
		pass->busy = true;
	}
	else if (head > work->ticked)
	{
		pass->busy = true;
		if (TimestampDifferenceExceeds(work->changed_at, now, es_tick_delay_ms))
			pass->due = lappend(pass->due, work);
	}
}

/*
 * The heads were read before: the snapshot of this transaction is younger.  Of a
 * collection that is being dropped none is noted, or it would stay: hence the lock,
 * which who drops it waits for before he deletes its tick.
 */
static void
write_ticks(List *due)
{
	Oid		  types[] = {REGCLASSOID, INT8OID};
	ListCell *cell;

	if (!begin_work("eventstore: noting heads"))
		return;
	SPI_connect();
	foreach (cell, due)
	{
		Work *work = lfirst(cell);
		Datum values[] = {ObjectIdGetDatum(work->relid), Int64GetDatum(work->seen_head)};

		es_spi_execute(
			"INSERT INTO eventstore.tick AS t (collection, head)"
			" SELECT c.collection, $2 FROM eventstore.collection_catalog c"
			" WHERE c.collection OPERATOR(pg_catalog.=) $1 FOR KEY SHARE SKIP LOCKED"
			" ON CONFLICT (collection) DO UPDATE SET head = excluded.head"
			" WHERE t.head OPERATOR(pg_catalog.<) excluded.head",
			2, types, values, NULL, false, SPI_OK_INSERT);
		if (SPI_processed == 0)
			due = foreach_delete_current(due, cell);
	}
	SPI_finish();
	commit_work();
	foreach (cell, due)
		((Work *) lfirst(cell))->ticked = ((Work *) lfirst(cell))->seen_head;
	es_worker_count(ES_WORKER_TICKS, list_length(due));
}

/*
 * True while it has to be done again after tick_delay.  Where heads move,
 * segments get used up.
 */
static bool
tick(void)
{
	HeadPass  pass = {false, NIL};
	List	 *list = list_works();
	ListCell *cell;

	foreach (cell, list)
		run_step(lfirst(cell), STEP_HEAD, look_at_head, &pass);
	keep_segments(list);
	if (pass.due != NIL)
		write_ticks(pass.due);
	return pass.busy;
}

/* ---------------------------------------------------------------------------
 * Step 3: retention
 * ------------------------------------------------------------------------- */

static void
apply_retention(Work *work, void *arg)
{
	if (work->retention.events > 0 || work->retention.age != NULL ||
		work->retention.bytes > 0)
	{
		if (!begin_work("eventstore: applying retention"))
			return;
		es_retention_apply(work->relid, &work->retention);
		commit_work();
	}
	if (!begin_work("eventstore: applying retention"))
		return;
	es_retention_condemn(work->relid);
	commit_work();
}

static void
set_lock_timeout(const char *value)
{
	SetConfigOption("lock_timeout", value, PGC_SUSET, PGC_S_OVERRIDE);
}

static void
dispose(Work *work, void *arg)
{
	pgstat_report_activity(STATE_RUNNING, "eventstore: dropping segments");
	SetCurrentStatementStartTimestamp();
	if (es_retention_dispose(arg))
		es_worker_count(ES_WORKER_SEGMENTS_DROPPED, 1);
	pgstat_report_stat(true);
}

/* True where an appender called, so that the rest has to wait. */
static bool
dispose_all(List *list)
{
	EsDisposal *disposals;
	int			n;

	if (!begin_work("eventstore: dropping segments"))
		return false;
	MemoryContextSwitchTo(cycle_context);
	n = es_retention_list(&disposals);
	commit_work();

	for (int i = 0; i < n; i++)
	{
		/* One each time at least, or those who call often would stop it. */
		if (i > 0 && es_worker_pending(ES_WAKE_MAINTENANCE | ES_WAKE_STOP) != 0)
			return true;
		CHECK_FOR_INTERRUPTS();
		keep_segments(list);
		set_lock_timeout(DISPOSAL_LOCK_TIMEOUT);
		run_step(find_work(disposals[i].collection), STEP_DISPOSAL, dispose,
				 &disposals[i]);
		set_lock_timeout(ES_WORKER_LOCK_TIMEOUT);
	}
	return false;
}

/* ---------------------------------------------------------------------------
 * Step 4: holders
 * ------------------------------------------------------------------------- */

/* A transaction that was reported; by pid and start it is known again. */
typedef struct Reported
{
	int			pid;
	TimestampTz since;
	bool		terminated;
} Reported;

static List *reported = NIL; /* of Reported, in life_context */

static Reported *
find_reported(const EsHolder *holder)
{
	MemoryContext old;
	Reported	 *entry;
	ListCell	 *cell;

	foreach (cell, reported)
	{
		entry = lfirst(cell);
		if (entry->pid == holder->pid && entry->since == holder->since)
			return entry;
	}
	old = MemoryContextSwitchTo(life_context);
	entry = palloc0(sizeof(Reported));
	entry->pid = holder->pid;
	entry->since = holder->since;
	reported = lappend(reported, entry);
	MemoryContextSwitchTo(old);

	ereport(
		WARNING,
		(errmsg("process %d holds back the head of a collection", holder->pid),
		 errdetail(
			 "Its transaction has held collection with OID %u at position " INT64_FORMAT
			 " since %s.",
			 holder->relid, holder->first - 1, timestamptz_to_str(holder->since)),
		 errhint("See the view eventstore.holders.")));
	return entry;
}

static void
forget_reported(const EsHolder *holders, int n)
{
	ListCell *cell;

	foreach (cell, reported)
	{
		Reported *entry = lfirst(cell);
		bool	  still = false;

		for (int i = 0; i < n && !still; i++)
			still = holders[i].pid == entry->pid && holders[i].since == entry->since;
		if (!still)
		{
			reported = foreach_delete_current(reported, cell);
			pfree(entry);
		}
	}
}

static void
terminate_holder(const EsHolder *holder, Reported *entry)
{
	PGPROC *proc = BackendPidGetProc(holder->pid);

	/* The pid may be another's by now, but not with this transaction. */
	if (entry->terminated || proc == NULL || proc->xid != holder->xid)
		return;
	ereport(
		LOG,
		(errmsg("terminating process %d, which holds back the head of a collection",
				holder->pid),
		 errdetail("Its transaction has lasted longer than eventstore.max_hold (%d ms).",
				   es_max_hold_ms)));
	entry->terminated = true;
	kill(holder->pid, SIGTERM);
}

static void
check_holders(void)
{
	TimestampTz now = GetCurrentTimestamp();
	EsHolder   *holders;
	int			n;

	if (es_max_hold_warning_ms == 0 && es_max_hold_ms == 0)
		return;
	n = es_head_holders(&holders);
	forget_reported(holders, n);
	for (int i = 0; i < n; i++)
	{
		bool warn =
			es_max_hold_warning_ms > 0 &&
			TimestampDifferenceExceeds(holders[i].since, now, es_max_hold_warning_ms);
		bool end = es_max_hold_ms > 0 &&
				   TimestampDifferenceExceeds(holders[i].since, now, es_max_hold_ms);

		if (end)
			terminate_holder(&holders[i], find_reported(&holders[i]));
		else if (warn)
			(void) find_reported(&holders[i]);
	}
}

/* ---------------------------------------------------------------------------
 * The process
 * ------------------------------------------------------------------------- */

/* Steps 1 and 3 for all collections.  False where the extension is gone. */
static bool
maintain(bool *again)
{
	List	 *list;
	ListCell *cell;

	if (!survey_collections())
		return false;
	list = list_works();
	foreach (cell, list)
		run_step(lfirst(cell), STEP_SEGMENTS, make_segments, NULL);
	foreach (cell, list)
		run_step(lfirst(cell), STEP_RETENTION, apply_retention, NULL);
	*again = dispose_all(list);
	return true;
}

static TimestampTz
next_maintenance(bool again)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz next = TimestampTzPlusMilliseconds(now, es_maintenance_interval_ms);

	if (again)
		return now;
	return next_retry != 0 ? Min(next, next_retry) : next;
}

static void
sleep_worker(TimestampTz until, bool busy)
{
	static uint32 wait_event = 0;
	long		  wait_ms = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), until);

	if (busy)
		wait_ms = Min(wait_ms, es_tick_delay_ms);
	if (es_max_hold_warning_ms > 0)
		wait_ms = Min(wait_ms, es_max_hold_warning_ms / 4 + 1);
	if (es_max_hold_ms > 0)
		wait_ms = Min(wait_ms, es_max_hold_ms / 4 + 1);

	pgstat_report_activity(STATE_IDLE, NULL);
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, wait_ms,
					 es_wait_event(wait_event, "EventstoreWorkerMain"));
	ResetLatch(MyLatch);
}

static void
work_for_ever(void)
{
	TimestampTz due = 0;

	for (;;)
	{
		bool again = false;
		bool busy;

		Assert(CurrentMemoryContext == cycle_context);
		if (es_process_interrupts())
			return;

		if (es_worker_take(ES_WAKE_MAINTENANCE) != 0 || due <= GetCurrentTimestamp())
		{
			next_retry = 0;
			if (!maintain(&again))
			{
				es_worker_set_absent();
				return;
			}
			due = next_maintenance(again);
			/* A LISTEN may have come before we ran. */
			if (es_listeners_in_database() > 0)
				es_wake_notifier();
		}

		/* While the flag stands nobody wakes us; take it down, then look again. */
		busy = tick();
		if (!busy && es_worker_take(ES_WAKE_ACTIVITY) != 0)
			busy = tick();
		check_holders();
		if (next_retry != 0)
			due = Min(due, next_retry);

		MemoryContextReset(cycle_context);
		sleep_worker(due, busy);
	}
}

void
es_worker_main(Datum arg)
{
	EsWorkerKey key = es_process_key(ES_WORKER_MAINTENANCE, arg);
	HASHCTL		ctl;

	es_process_begin(key);

	life_context = AllocSetContextCreate(TopMemoryContext, "eventstore worker",
										 ALLOCSET_DEFAULT_SIZES);
	cycle_context = AllocSetContextCreate(life_context, "eventstore worker cycle",
										  ALLOCSET_DEFAULT_SIZES);
	ctl.keysize = sizeof(Oid);
	ctl.entrysize = sizeof(Work);
	ctl.hcxt = life_context;
	works = hash_create("eventstore collections to work for", 64, &ctl,
						HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	MemoryContextSwitchTo(cycle_context);

	/* What was asked before is what the first pass does anyway. */
	es_worker_take(ES_WAKE_MAINTENANCE | ES_WAKE_ACTIVITY);
	if (survey_collections())
	{
		es_worker_set_running();
		work_for_ever();
	}
	else
		es_worker_set_absent();
	proc_exit(0);
}
