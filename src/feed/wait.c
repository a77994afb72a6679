/*
 * feed/wait.c
 *		wait_for, await, and what every long poll sleeps in.
 *
 * position/watch.c tells how a session that waits is woken.  Here is the rest:
 * when one must not wait, how long one sleeps, and what one does where nobody
 * wakes it.
 *
 *	1.	Nothing is held while we sleep: no snapshot of our own, no row lock, and
 *		not the lock on the collection, so DROP TABLE goes through at once; it
 *		wakes us, and the next look finds that the collection is gone (42P01).
 *		The statement that called us has its snapshot all the same; await, as a
 *		procedure outside a transaction block, gives that back too.
 *	2.	Waiting is refused (25001) where the transaction's snapshot does not move,
 *		since then nothing new will ever be seen, and where it has positions in
 *		flight itself: what it waits for may be waiting for it, and no deadlock
 *		detector would know.  Nor may what a look calls (a policy's function)
 *		wait itself.
 *	3.	Where the notifier does not run (it is being started, or there is no
 *		process slot for it) we look every POLL_MS; on a standby only if replay
 *		has advanced, as its notifier would, which follows replay for all who
 *		wait.  On a logical copy events come without appends that would call it,
 *		so there we look every POLL_MS in any case.
 *	4.	Should a wake-up be lost after all, SAFETY_MS bounds the harm, and the
 *		statistics tell (late_wakeups in pg_stat_eventstore): it is a fault.  An
 *		event may come just then, though; so the notifier gets GRACE_MS more where
 *		it has been called.
 *
 * Cancel, terminate and shutdown set the latch that we sleep on.
 */
#include "postgres.h"

#include "feed/wait.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "access/xlogrecovery.h"
#include "catalog/pg_type.h"
#include "collection/label_index.h"
#include "compat.h"
#include "errors.h"
#include "feed/read.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "pgstat.h"
#include "position/watch.h"
#include "shmem.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "tcop/pquery.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/portal.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "worker/wake.h"

/* How often one looks whom nobody wakes. */
#define POLL_MS 10
/* How often one looks who should have been woken. */
#define SAFETY_MS 5000
/* How much longer he waits where the notifier was called a moment ago. */
#define GRACE_MS 1000

/* The wait that this process is in; there is one at a time. */
static EsWatch	   watch;
static EsCondition condition;
static char		   waited_for[NAMEDATALEN]; /* the collection's name, should it go */
static bool		   by_safety = false;		/* the last sleep ended without a wake-up */

/* ---------------------------------------------------------------------------
 * What every wait has in common
 * ------------------------------------------------------------------------- */

TimestampTz
es_wait_deadline(const NullableDatum *value, const char *name)
{
	Interval	zero = {0};
	TimestampTz now = GetCurrentTimestamp();
	int			sign;

	if (value->isnull)
		return ES_WAIT_FOR_EVER;
	sign = DatumGetInt32(
		DirectFunctionCall2(interval_cmp, value->value, IntervalPGetDatum(&zero)));
	if (sign < 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("\"%s\" must not be negative", name),
						es_errdetail_interval(value->value)));
	if (sign == 0)
		return 0;
	return DatumGetTimestampTz(DirectFunctionCall2(
		timestamptz_pl_interval, TimestampTzGetDatum(now), value->value));
}

void
es_wait_check_allowed(void)
{
	es_require_preloaded();
	if (IsInParallelMode())
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("cannot wait for events in a parallel query"),
				 errdetail("Its snapshot does not move, so it would never see them."),
				 errhint("Set max_parallel_workers_per_gather to 0.")));
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("cannot wait for events in this transaction"),
				 errdetail("Its snapshot does not move, so it would never see them."),
				 errhint("Wait at isolation level READ COMMITTED.")));
	if (es_head_holding())
		ereport(ERROR, (errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
						errmsg("cannot wait for events in this transaction"),
						errdetail("It has appended events itself, and what it waits for "
								  "may be waiting for them."),
						errhint("Commit first.")));
	if (es_watch_underway())
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("cannot wait for events while this session waits for events"),
				 errdetail("A function that row-level security calls must not wait.")));
}

TimestampTz
es_wait_arg(const NullableDatum *value)
{
	TimestampTz until = value->isnull ? 0 : es_wait_deadline(value, "wait");

	if (until != 0)
		es_wait_check_allowed();
	return until;
}

/*
 * Does nobody wake us?  Without a shared entry only the notifier of a standby
 * does, which looks for itself.
 */
static bool
must_poll(void)
{
	if (watch.head.head == NULL && !RecoveryInProgress())
		return true;
	return !es_wake_notifier_runs();
}

static void
enter(const EsCollection *coll)
{
	watch.head = coll->head;
	es_watch_begin(&watch);
	/* It has to be started, or to be told that there is somebody to look for. */
	if (watch.head.head == NULL || !es_wake_notifier_runs())
		es_wake_notifier();
}

void
es_wait_begin(EsCollection *coll, const EsWaitFor *what)
{
	const char *name = get_rel_name(coll->relid);

	/* Again: a cursor, or a scan that begins anew, was perhaps allowed long ago. */
	es_wait_check_allowed();
	memset(&watch, 0, sizeof(watch));
	watch.looked = what->looked;
	watch.topic = what->topic;
	if (what->stream != NULL)
		watch.stream = es_label_of_stream(what->stream);
	else if (what->query != NULL)
	{
		es_query_to_condition(what->query, &condition);
		watch.condition = &condition;
	}
	strlcpy(waited_for, name != NULL ? name : "?", NAMEDATALEN);
	by_safety = false;
	es_watch_end(); /* one that a caught error has left behind */
	/* A reader of streams has not needed it so far. */
	es_collection_load_head(coll);
	enter(coll);
}

/* Replay has advanced since this was asked last; elsewhere always true. */
static bool
may_have_replayed(void)
{
	static XLogRecPtr last = InvalidXLogRecPtr;
	XLogRecPtr		  now;

	if (!RecoveryInProgress())
		return true;
	now = GetXLogReplayRecPtr(NULL);
	if (now == last)
		return false;
	last = now;
	return true;
}

bool
es_wait_sleep(EsCollection *coll, EsPosition looked, TimestampTz until)
{
	static uint32 wait_event = 0;
	TimestampTz	  began = GetCurrentTimestamp();
	int			  patience_ms = SAFETY_MS;

	CHECK_FOR_INTERRUPTS();
	/* First, or who is woken in vain again and again would never end. */
	if (began >= until)
		return false;
	by_safety = false;
	watch.looked = Max(watch.looked, looked);
	/* Repaired, or known to shared memory only now: enter as what it is. */
	if (coll->head.head != watch.head.head ||
		coll->head.incarnation != watch.head.incarnation)
	{
		es_watch_end();
		enter(coll);
		return true;
	}
	if (es_watch_looked(looked))
		return true;

	for (;;)
	{
		bool		poll = must_poll();
		TimestampTz next = TimestampTzPlusMilliseconds(
			poll ? GetCurrentTimestamp() : began, poll ? POLL_MS : patience_ms);
		TimestampTz now;

		(void) WaitLatch(
			MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
			TimestampDifferenceMilliseconds(GetCurrentTimestamp(), Min(next, until)),
			es_wait_event(wait_event, "EventstoreWait"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (es_watch_woken())
			break;
		now = GetCurrentTimestamp();
		if (now >= until)
			return false;
		if (now < next)
			continue;
		if (!poll && patience_ms == SAFETY_MS && es_wake_notifier_called())
		{
			patience_ms += GRACE_MS;
			continue;
		}
		by_safety = !poll;
		if (by_safety || may_have_replayed())
			break;
	}
	es_watch_looking();
	return true;
}

EsCollection *
es_wait_reopen(Oid collection)
{
	EsCollection *coll;

	LockRelationOid(collection, AccessShareLock);
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(collection)))
		ereport(
			ERROR,
			(errcode(ERRCODE_UNDEFINED_TABLE),
			 errmsg("collection \"%s\" was dropped while events of it were waited for",
					waited_for)));
	coll = es_read_open_collection(collection);
	UnlockRelationOid(collection, AccessShareLock); /* it has its own */
	es_collection_load_head(coll);
	return coll;
}

void
es_wait_end(bool found)
{
	if (found && by_safety && watch.head.head != NULL)
		es_head_count(&watch.head, ES_STAT_LATE_WAKEUPS, 1);
	es_watch_end();
}

void
es_wait_unlock(const EsCollection *coll)
{
	UnlockRelationOid(coll->relid, AccessShareLock);
}

/* ---------------------------------------------------------------------------
 * A worker's wait
 * ------------------------------------------------------------------------- */

void
es_wait_keep(EsCollection *coll, EsPosition looked, const EsQuery *query)
{
	es_collection_load_head(coll);
	if (es_watch_underway() && coll->head.head == watch.head.head &&
		coll->head.incarnation == watch.head.incarnation)
	{
		es_watch_looking();
		return;
	}
	es_watch_end();
	memset(&watch, 0, sizeof(watch));
	watch.kept = true;
	watch.looked = looked;
	if (query != NULL)
	{
		es_query_to_condition(query, &condition);
		watch.condition = &condition;
	}
	enter(coll);
}

bool
es_wait_keep_looked(EsPosition looked)
{
	watch.looked = Max(watch.looked, looked);
	return es_watch_looked(looked);
}

bool
es_wait_keep_due(void)
{
	return es_watch_underway() && es_watch_woken();
}

long
es_wait_keep_ms(void)
{
	return must_poll() ? POLL_MS : SAFETY_MS;
}

/* ---------------------------------------------------------------------------
 * wait_for, await
 * ------------------------------------------------------------------------- */

/*
 * The statement's own snapshot, which CALL has registered with its portal: a
 * procedure may do without while it runs no SQL.
 */
static void
give_back_snapshots(void)
{
	Portal portal = ActivePortal;

	if (portal != NULL && portal->holdSnapshot != NULL)
	{
		UnregisterSnapshotFromOwner(portal->holdSnapshot, portal->resowner);
		portal->holdSnapshot = NULL;
	}
	ForgetPortalSnapshots();
	InvalidateCatalogSnapshot();
}

static EsPosition
wait_for_head(Oid collection, EsPosition after, TimestampTz until, bool without_snapshot)
{
	EsCollection *coll = es_read_open_collection(collection);
	EsWaitFor	  what = {.looked = after};
	EsPosition	  head;

	es_collection_check_cursor(coll, after);
	head = es_view_head(coll);
	if (head > after)
		return head;

	es_wait_begin(coll, &what);
	for (;;)
	{
		head = es_view_head(coll);
		if (head > after)
			break;
		es_wait_unlock(coll);
		if (without_snapshot)
			give_back_snapshots();
		if (!es_wait_sleep(coll, head, until))
			break;
		if (without_snapshot)
			EnsurePortalSnapshotExists();
		coll = es_wait_reopen(collection);
	}
	es_wait_end(head > after);
	if (without_snapshot)
		EnsurePortalSnapshotExists();
	return head;
}

static EsPosition
after_arg(const NullableDatum *value)
{
	es_refuse_null(value, "after");
	return es_read_position_arg(value, "after", 0);
}

/* wait_for(collection, after, timeout) */
PG_FUNCTION_INFO_V1(es_wait_for);
Datum
es_wait_for(PG_FUNCTION_ARGS)
{
	Oid collection = es_collection_or_changelog(es_read_collection_arg(&fcinfo->args[0]));
	EsPosition	after = after_arg(&fcinfo->args[1]);
	TimestampTz until = es_wait_deadline(&fcinfo->args[2], "timeout");

	es_wait_check_allowed();
	PG_RETURN_INT64(wait_for_head(collection, after, until, false));
}

/* await(collection, after, INOUT head, timeout) */
PG_FUNCTION_INFO_V1(es_await);
Datum
es_await(PG_FUNCTION_ARGS)
{
	Oid collection = es_collection_or_changelog(es_read_collection_arg(&fcinfo->args[0]));
	EsPosition	after = after_arg(&fcinfo->args[1]);
	TimestampTz until = es_wait_deadline(&fcinfo->args[3], "timeout");
	bool		atomic = fcinfo->context == NULL || !IsA(fcinfo->context, CallContext) ||
				  castNode(CallContext, fcinfo->context)->atomic;
	TupleDesc desc;
	Datum	  value;
	bool	  isnull = false;

	es_wait_check_allowed();
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	desc = BlessTupleDesc(desc);
	value = Int64GetDatum(wait_for_head(collection, after, until, !atomic));
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, &value, &isnull)));
}
