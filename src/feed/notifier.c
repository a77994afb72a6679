/*
 * feed/notifier.c
 *		The process that wakes who waits, and notifies who listens.
 *
 * An appending transaction that called NOTIFY itself would hold a lock of the
 * whole cluster until its commit is on disk, and all such commits would queue.
 * So it only calls this process (head.c), one per database, and only where
 * somebody waits for, or listens to, one of its collections.  The launcher
 * starts it when it is called for the first time.  Its loop:
 *
 *	1.	Wake sessions whose wait may be over (es_watch_pass).  It takes no
 *		transaction, and comes first, since it is the faster way to hear.
 *	2.	Where somebody listens: take a transaction, see which collections have a
 *		channel that is listened to (survey), and send one notification for each
 *		whose head has moved since the last one, however many commits that was.
 *
 * Reads of a store's keys (key_reads.c) go the same way, in notifications of
 * their own and as seldom.
 *
 * On a standby there are no appends to call it, and no LISTEN.  As long as
 * somebody waits it looks every STANDBY_LOOK_MS whether replay has advanced, and
 * if so at the heads that travel with the data, once for all who wait.
 *
 * After a notification for a collection the next one waits a little, so that a
 * busy collection sends hundreds a second, not tens of thousands; the first one
 * after a rest goes out at once.  PostgreSQL before 19 wakes every listener of
 * the database for each notification, whatever he listens to, so the pause grows
 * with their number.
 *
 * Passes over the waiters are held apart likewise.  Each costs an appender the
 * call, and all of them the processor that it takes; so as long as passes wake
 * nobody (what is waited for is rare, and much else is appended) the pause between
 * them doubles, to PASS_PAUSE_MAX_US.  That is the most by which it delays a
 * wake-up, and only amid other appends: after a rest as long, none is left of it.
 *
 * What was announced last is kept in shared memory, so another notifier goes on
 * where this one ended; nobody misses a notification because of that, and who
 * waits looks for himself meanwhile (wait.c).  A collection that cannot be read
 * (locked, broken) is left out for a while, and the others are notified of.
 * Before the queue of notifications can refuse one, it takes listeners that do
 * not read for hours; then an error is logged once, and sending is tried again
 * after a pause.  Appenders never feel it.
 *
 * Locks: those of a reader, for the time of one short transaction; one that
 * somebody holds against us is not waited for, since that would hold up all who
 * wait.  A crash ends all sessions, listeners too; after it nothing is owed to
 * anybody.
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "access/xlogrecovery.h"
#include "compat.h"
#include "feed/announce.h"
#include "guc.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "position/watch.h"
#include "postmaster/bgworker.h"
#include "spi.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "worker/launcher.h"
#include "worker/listeners.h"
#include "worker/process.h"
#include "worker/wake.h"

/* Passes over the waiters come no closer than this, or they would eat a processor. */
#define PASS_PAUSE_US 200
/* ... and, while they wake nobody, as far apart as this. */
#define PASS_PAUSE_MAX_US 1000
/* What a listener more adds to the pause between notifications, and the most. */
#define PAUSE_PER_LISTENER_US 100
#define PAUSE_MAX_US		  (50 * 1000)
/* After an error, before sending is tried again. */
#define ERROR_PAUSE_MS 1000
/* On a standby, while somebody waits. */
#define STANDBY_LOOK_MS 5
/* Before a collection that is locked is tried again. */
#define LOCKED_PAUSE_MS 20
/* No heartbeat is faster, whatever the option says. */
#define HEARTBEAT_MIN_US (20 * INT64CONST(1000))
/* Collections in one transaction: each costs it some ten locks. */
#define SEND_MAX 100
/* For what is locked below a collection; all others wait meanwhile. */
#define LOCK_TIMEOUT "10ms"
/* With nothing to do. */
#define IDLE_MS (60 * 1000)

/* A collection whose channel somebody may listen to. */
typedef struct Announced
{
	EsHeadRef	head;
	EsNotify	notify;
	char		channel[NAMEDATALEN];
	int64		heartbeat_us; /* 0 = none */
	TimestampTz sent_at;	/* or, where nothing was sent yet, since when we know of it */
	EsPosition	sent_head;	/* 0 = nothing was sent yet */
	TimestampTz not_before; /* it could not be read; 0 = it could */
	int			error;		/* of the last attempt, logged: an SQLSTATE */
	bool		sending;	/* in the open transaction ... */
	EsAnnounced told;		/* ... this */
} Announced;

static MemoryContext life_context = NULL;
static MemoryContext cycle_context = NULL;

static Announced  *audience = NULL; /* in life_context */
static int		   naudience = 0;
static bool		   survey_due = true;
static uint32	   surveyed_generation = 0;
static TimestampTz paused_until = 0;
static Announced  *at_work = NULL;	  /* the one being sent */
static int		   last_error = 0;	  /* of what concerns all, logged: an SQLSTATE */
static TimestampTz reads_sent_at = 0; /* the last time that reads of keys were */
static TimestampTz passed_at = 0;	  /* the last pass over the waiters ... */
static int64	   pass_pause_us = PASS_PAUSE_US; /* ... and the pause after it */

/* ---------------------------------------------------------------------------
 * Who listens to what
 * ------------------------------------------------------------------------- */

/* An option may have changed, or a collection have come or gone. */
static void
note_invalidation(Datum arg, Oid relid)
{
	survey_due = true;
}

static int64
interval_us(const Interval *interval)
{
	return interval->time +
		   ((int64) interval->month * DAYS_PER_MONTH + interval->day) * USECS_PER_DAY;
}

/* When and what was sent before goes on to hold. */
static void
keep_history(Announced *entry, const Announced *old, int nold)
{
	entry->sent_at = GetCurrentTimestamp();
	for (int i = 0; i < nold; i++)
		if (old[i].head.relid == entry->head.relid &&
			old[i].head.incarnation == entry->head.incarnation)
		{
			entry->sent_at = old[i].sent_at;
			entry->sent_head = old[i].sent_head;
			entry->not_before = old[i].not_before;
			entry->error = old[i].error;
		}
}

/* One row: collection, incarnation, notify, channel, heartbeat. */
static void
note_row(HeapTuple row, TupleDesc desc, const Announced *old, int nold)
{
	Announced *entry = &audience[naudience];
	char	  *channel = SPI_getvalue(row, desc, 4);
	EsChannel  number = es_listeners_channel(channel);
	bool	   isnull;
	Datum	   heartbeat;

	if (!es_listeners_any(number))
		return;
	memset(entry, 0, sizeof(Announced));
	entry->head.relid = DatumGetObjectId(SPI_getbinval(row, desc, 1, &isnull));
	entry->head.incarnation = DatumGetInt64(SPI_getbinval(row, desc, 2, &isnull));
	entry->notify = es_notify_from_text(SPI_getvalue(row, desc, 3));
	strlcpy(entry->channel, channel, NAMEDATALEN);
	heartbeat = SPI_getbinval(row, desc, 5, &isnull);
	entry->heartbeat_us = isnull ? 0 : interval_us(DatumGetIntervalP(heartbeat));
	keep_history(entry, old, nold);
	if (es_head_find(&entry->head))
		es_head_set_channel(&entry->head, number);
	naudience++;
}

/* With a snapshot. */
static void
survey(void)
{
	Announced *old = audience;
	int		   nold = naudience;

	/* First, so that what changes meanwhile is seen the next time. */
	survey_due = false;
	surveyed_generation = es_listeners_generation();
	SPI_connect();
	es_spi_execute(
		"SELECT c.collection::pg_catalog.oid, c.incarnation, c.notify, c.channel,"
		" c.heartbeat FROM eventstore.collection_catalog c"
		" WHERE c.notify OPERATOR(pg_catalog.<>) 'none'",
		0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	audience = MemoryContextAlloc(life_context, sizeof(Announced) * (SPI_processed + 1));
	naudience = 0;
	for (uint64 i = 0; i < SPI_processed; i++)
		note_row(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, old, nold);
	SPI_finish();
	if (old != NULL)
		pfree(old);
}

/* ---------------------------------------------------------------------------
 * Sending
 * ------------------------------------------------------------------------- */

static int64
pause_us(void)
{
	int64 pause = es_notify_interval_ms * INT64CONST(1000);

	return Max(pause, Min(PAUSE_MAX_US,
						  (int64) es_listeners_in_database() * PAUSE_PER_LISTENER_US));
}

/* When something is to be sent, if it can be read; 0 = nothing to be sent. */
static TimestampTz
wanted_at(Announced *entry)
{
	TimestampTz beat = entry->heartbeat_us == 0
						   ? 0
						   : entry->sent_at + Max(entry->heartbeat_us,
												  Max(HEARTBEAT_MIN_US, pause_us()));
	EsAnnounced announced;
	EsPosition	head;

	/* Until it is used there is nothing new to tell. */
	if (!es_head_find(&entry->head))
		return beat;
	es_head_announced(&entry->head, &announced);
	head = es_head_read(&entry->head, true);
	if (head > Max(announced.head, entry->sent_head))
		return entry->sent_head == 0 ? entry->sent_at : entry->sent_at + pause_us();
	return beat;
}

/* The same, not before it is to be tried again. */
static TimestampTz
due_at(Announced *entry)
{
	TimestampTz due = wanted_at(entry);

	return due != 0 ? Max(due, entry->not_before) : 0;
}

static void
postpone(Announced *entry, int pause_ms)
{
	entry->not_before = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), pause_ms);
}

/* Others, and those who wait to be woken, are not to wait for a lock on this one. */
static bool
lock_at_once(Announced *entry)
{
	if (!ConditionalLockRelationOid(entry->head.relid, AccessShareLock))
	{
		postpone(entry, LOCKED_PAUSE_MS);
		return false;
	}
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(entry->head.relid)))
	{
		survey_due = true;
		postpone(entry, ERROR_PAUSE_MS);
		return false;
	}
	return true;
}

static void
send_notification(Announced *entry)
{
	if (!lock_at_once(entry))
		return;
	entry->told.events = 0;
	if (es_head_find(&entry->head))
		es_head_announced(&entry->head, &entry->told);
	else
		entry->told.head = PG_INT64_MAX; /* a heartbeat: no events to count */
	if (entry->sent_head != 0)
		entry->told.head = Max(entry->told.head, entry->sent_head);
	es_announce(entry->head.relid, entry->notify, entry->channel, &entry->told);
	entry->sending = true;
}

/* In a transaction with a snapshot.  What is too much for one is due at once again. */
static void
send_due(void)
{
	static int	turn = 0; /* who comes first, so that everybody's turn comes */
	TimestampTz now = GetCurrentTimestamp();
	int			nsent = 0;

	for (int i = 0; i < naudience; i++)
		audience[i].sending = false;
	for (int i = 0; i < naudience && nsent < SEND_MAX; i++)
	{
		TimestampTz due;

		turn = (turn + 1) % naudience;
		at_work = &audience[turn];
		due = due_at(at_work);
		if (due != 0 && due <= now)
		{
			send_notification(at_work);
			nsent++;
		}
	}
	at_work = NULL;
}

/* The earlier of two times; 0 is none. */
static TimestampTz
earlier(TimestampTz a, TimestampTz b)
{
	if (a == 0 || b == 0)
		return Max(a, b);
	return Min(a, b);
}

/* When reads of keys are to be sent; 0 = there are none. */
static TimestampTz
reads_due_at(void)
{
	return es_key_reads_any() ? reads_sent_at + pause_us() : 0;
}

static bool
has_reads(Oid changelog, const EsKeyReads *reads, int nreads)
{
	for (int i = 0; i < nreads; i++)
		if (reads[i].changelog == changelog)
			return true;
	return false;
}

/* In a transaction.  What cannot be sent now is lost, as this feed may lose some. */
static void
send_reads(void)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz due = reads_due_at();
	EsKeyReads *reads;
	int			nreads;

	if (due == 0 || due > now)
		return;
	reads_sent_at = now;
	nreads = es_key_reads_take(&reads);
	for (int i = 0; i < naudience; i++)
	{
		at_work = &audience[i];
		if (has_reads(at_work->head.relid, reads, nreads) && lock_at_once(at_work))
			es_announce_reads(at_work->head.relid, at_work->channel, reads, nreads);
	}
	at_work = NULL;
}

/* After the commit; returns when the next one is due, 0 = when we are called. */
static TimestampTz
settle_sent(void)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz next = 0;

	for (int i = 0; i < naudience; i++)
	{
		Announced  *entry = &audience[i];
		TimestampTz due;

		at_work = entry;
		if (entry->sending)
		{
			entry->not_before = 0;
			entry->error = 0;
			entry->sent_at = now;
			entry->sent_head = entry->told.head;
			if (es_head_find(&entry->head))
				es_head_set_announced(&entry->head, &entry->told);
			es_worker_count(ES_WORKER_NOTIFICATIONS, 1);
			entry->sending = false;
		}
		due = due_at(entry);
		if (due != 0 && (next == 0 || due < next))
			next = due;
	}
	at_work = NULL;
	return next;
}

/* Begins a transaction, which accepts invalidations; false: no extension. */
static bool
announce(TimestampTz *next)
{
	bool present = true;

	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	if (survey_due || surveyed_generation != es_listeners_generation())
	{
		PushActiveSnapshot(GetTransactionSnapshot());
		present = es_extension_pin();
		if (present)
			survey();
		PopActiveSnapshot();
	}
	if (present && naudience > 0)
	{
		PushActiveSnapshot(GetTransactionSnapshot());
		send_due();
		PopActiveSnapshot();
	}
	if (present)
		send_reads();
	CommitTransactionCommand();
	MemoryContextSwitchTo(cycle_context);
	*next = earlier(settle_sent(), reads_due_at());
	return present;
}

/* After PG_CATCH: as new, and the error logged unless it is the one logged before. */
static void
recover_from_error(int *logged)
{
	HOLD_INTERRUPTS();
	if (geterrcode() != *logged)
		EmitErrorReport();
	*logged = geterrcode();
	AbortOutOfAnyTransaction();
	MemoryContextSwitchTo(cycle_context);
	FlushErrorState();
	es_worker_count(ES_WORKER_ERRORS, 1);
	RESUME_INTERRUPTS();
}

/* Says when to try again. */
static TimestampTz
postpone_failed(void)
{
	if (at_work != NULL)
	{
		/* Of this one only; the others' are still to be sent. */
		postpone(at_work, ERROR_PAUSE_MS);
		at_work = NULL;
		return GetCurrentTimestamp();
	}
	return paused_until =
			   TimestampTzPlusMilliseconds(GetCurrentTimestamp(), ERROR_PAUSE_MS);
}

/*
 * The same with errors caught.  What was to be sent in a transaction that failed
 * is still due; false: no extension.
 */
static bool
announce_all(TimestampTz *next)
{
	volatile bool present = true;

	PG_TRY();
	{
		present = announce(next);
		last_error = 0;
	}
	PG_CATCH();
	{
		errcontext("notifying eventstore's listeners");
		recover_from_error(at_work != NULL ? &at_work->error : &last_error);
		survey_due = true;
		*next = postpone_failed();
	}
	PG_END_TRY();
	return present;
}

/* ---------------------------------------------------------------------------
 * On a standby
 * ------------------------------------------------------------------------- */

/* The head; where the collection is gone or broken, one that lets all find out. */
static EsPosition
read_head(Oid relid)
{
	EsPosition head = PG_INT64_MAX;

	StartTransactionCommand();
	if (!ConditionalLockRelationOid(relid, AccessShareLock))
		head = 0; /* being dropped, perhaps: later */
	else if (es_collection_exists(relid))
		head = es_view_head(es_collection_get(relid));
	CommitTransactionCommand();
	MemoryContextSwitchTo(cycle_context);
	return head;
}

/* False: it cannot be read (a conflict with replay, a segment that is missing). */
static bool
look_at_head(Oid relid)
{
	volatile EsPosition head = PG_INT64_MAX;
	volatile bool		done = false;

	PG_TRY();
	{
		head = read_head(relid);
		done = true;
	}
	PG_CATCH();
	{
		recover_from_error(&last_error);
	}
	PG_END_TRY();
	es_worker_count(ES_WORKER_WAKEUPS, es_watch_pass_over(relid, head));
	return done;
}

/* What fails each time, beside others that do not, is logged once. */
static void
look_at_heads(const Oid *relids, int n)
{
	int ndone = 0;

	for (int i = 0; i < n; i++)
		if (look_at_head(relids[i]))
			ndone++;
	if (ndone == n)
		last_error = 0;
}

/* Returns when to look again; 0 = when somebody comes to wait. */
static TimestampTz
follow_replay(void)
{
	static XLogRecPtr seen = InvalidXLogRecPtr;
	XLogRecPtr		  replayed = GetXLogReplayRecPtr(NULL);
	Oid				 *relids;
	int				  n = es_watch_list_unshared(&relids);

	if (n == 0)
		return 0;
	if (replayed != seen || es_worker_pending(ES_WAKE_NOTIFIER) != 0)
		look_at_heads(relids, n);
	seen = replayed;
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), STANDBY_LOOK_MS);
}

/* ---------------------------------------------------------------------------
 * The process
 * ------------------------------------------------------------------------- */

/* What is left of the pause after the last pass. */
static void
pause_before_pass(void)
{
	TimestampTz now = GetCurrentTimestamp();

	if (now - passed_at < pass_pause_us && now >= passed_at)
		pg_usleep(pass_pause_us - (now - passed_at));
}

static void
wake_waiters(void)
{
	int woken = es_watch_pass();

	if (woken > 0)
		es_worker_count(ES_WORKER_WAKEUPS, woken);
	/* Notifications come as often as they are due, so where somebody listens it stays. */
	if (woken > 0 || es_listeners_in_database() > 0)
		pass_pause_us = PASS_PAUSE_US;
	else
		pass_pause_us = Min(2 * pass_pause_us, PASS_PAUSE_MAX_US);
	passed_at = GetCurrentTimestamp();
}

/* Runs after the slot says that we no longer run, so nobody relies on us. */
static void
wake_at_exit(int code, Datum arg)
{
	es_watch_wake_all();
}

static void
sleep_notifier(TimestampTz next)
{
	static uint32 wait_event = 0;
	long		  wait_ms = IDLE_MS;

	if (next != 0)
		wait_ms =
			Min(wait_ms, TimestampDifferenceMilliseconds(GetCurrentTimestamp(), next));
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, wait_ms,
					 es_wait_event(wait_event, "EventstoreNotifierMain"));
	ResetLatch(MyLatch);
}

static void
notify_for_ever(void)
{
	while (!es_process_interrupts())
	{
		TimestampTz next = 0;

		Assert(CurrentMemoryContext == cycle_context);
		/* Who calls meanwhile finds the flag up, and need not set our latch. */
		pause_before_pass();
		/* Before we look: who calls from now on calls again. */
		(void) es_worker_take(ES_WAKE_NOTIFIER);
		wake_waiters();
		if (RecoveryInProgress())
			next = follow_replay();
		else if (es_listeners_in_database() == 0)
			paused_until = 0; /* nor is anything due */
		else if (paused_until > GetCurrentTimestamp())
			next = paused_until;
		else
		{
			paused_until = 0;
			if (!announce_all(&next))
			{
				es_worker_set_absent();
				return;
			}
		}
		MemoryContextReset(cycle_context);
		sleep_notifier(next);
	}
}

void
es_notifier_main(Datum arg)
{
	EsWorkerKey key = es_process_key(ES_WORKER_NOTIFIER, arg);

	on_shmem_exit(wake_at_exit, (Datum) 0);
	es_process_begin(key);
	SetConfigOption("lock_timeout", LOCK_TIMEOUT, PGC_SUSET, PGC_S_OVERRIDE);
	life_context = AllocSetContextCreate(TopMemoryContext, "eventstore notifier",
										 ALLOCSET_DEFAULT_SIZES);
	cycle_context = AllocSetContextCreate(life_context, "eventstore notifier cycle",
										  ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(cycle_context);
	CacheRegisterRelcacheCallback(note_invalidation, (Datum) 0);
	es_head_attach();

	/* What was asked before is what the first pass does anyway. */
	(void) es_worker_take(ES_WAKE_NOTIFIER);
	if (es_process_has_extension())
	{
		es_worker_set_running();
		notify_for_ever();
	}
	else
		es_worker_set_absent();
	proc_exit(0);
}
