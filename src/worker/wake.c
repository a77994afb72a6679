/*
 * worker/wake.c
 *		The shared table of workers, and how a worker is woken.
 *
 * Each database with collections has a worker, and a notifier from the first
 * one who waits or listens; both are started by the launcher (launcher.c).  A
 * slot of this table tells, for one database and one kind of worker, which state
 * that is in:
 *
 *		NONE ---------> WANTED		es_wake_*, es_worker_want: somebody asks
 *		WANTED -------> STARTING	launcher: process registered
 *		WANTED -------> NO_SLOT		launcher: max_worker_processes reached
 *		NO_SLOT, FAILED -> STARTING	launcher: the pause is over
 *		STARTING -----> RUNNING		worker: it has found the extension
 *		STARTING, RUNNING -> ABSENT	worker: no extension (any more)
 *		STARTING, RUNNING -> FAILED	worker at its exit, or the launcher
 *		STARTING, RUNNING -> WANTED	worker at its exit, when it was held
 *		ABSENT -------> WANTED		es_wake_*, or a look after a while
 *		any ----------> NONE		launcher: the database is gone
 *
 * An ABSENT slot may be given to another database.
 *
 * The way of a wake-up.  An appender sets a flag in the slot, and the latch
 * only if it was he who set it; so as long as a flag stands, asking again
 * costs one read.  The worker leaves ES_WAKE_ACTIVITY standing while it looks
 * at the heads every tick_delay anyway, and takes it down before it goes to
 * sleep; then it looks once more.  Flag and state are a store followed by a
 * load of the other on both sides, with a full barrier between, so one of the
 * two sees the other.
 *
 * A worker is a connection to its database, and DROP DATABASE and CREATE
 * DATABASE ... TEMPLATE wait only five seconds for connections to go.  So a
 * hook (launcher.c) holds the database first: the worker ends, and no other
 * one is started.  For this a worker attaches before it connects (one that is
 * about to start sees the hold) and detaches after its PGPROC has left the
 * array that is searched for connections (on_shmem_exit callbacks run in
 * reverse order, and ours is registered first).  A hold by a backend that dies
 * ends by time.
 *
 * Locks: 'lock' for everything but the atomics; held for some dozen
 * instructions.  'database' and 'state' are changed under it and may be read
 * without.  A latch lies in a PGPROC, which is always there: one that belongs
 * to somebody else by now is only woken in vain.
 *
 * A crash resets it all; the launcher looks at every database anew.
 */
#include "postgres.h"

#include "worker/wake.h"

#include <signal.h>

#include "access/xact.h"
#include "access/xlog.h"
#include "compat.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "port/atomics.h"
#include "storage/condition_variable.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "storage/shmem.h"
#include "utils/timestamp.h"
#include "worker/launcher.h"
#include "worker/listeners.h"

/*
 * More workers than this cannot run or be wanted at one time; each is a process,
 * so max_worker_processes is the smaller limit.
 */
#define SLOT_COUNT 512
/* Of these, for sources and sinks, which any user with a server can make: the
 * databases' own workers are to have theirs. */
#define TASK_SLOTS (SLOT_COUNT / 2)
/* Processes that are no database's: our launcher, and that of logical replication. */
#define LAUNCHERS 2

/* A worker that lived so long is not failing at its start. */
#define STABLE_MS (60 * 1000)
/* The pause after a failure doubles from the first to the last value. */
#define PAUSE_FIRST_MS 500
#define PAUSE_LAST_MS  (60 * 1000)
/* Until a free process slot is looked for again. */
#define NO_SLOT_PAUSE_MS 5000
/* A start that takes longer no longer makes the others wait. */
#define START_PATIENCE_MS 5000
/* A start whose outcome nobody reported (the launcher died) is given up. */
#define START_LOST_MS (60 * 1000)
/* A hold that nobody ends; longer than any wait for connections to go. */
#define HOLD_MS (30 * 1000)
/* A worker that is asked to stop gets this long before it is terminated. */
#define STOP_POLITE_MS 300
/* ... and this long before the holder goes on regardless. */
#define STOP_PATIENCE_MS 5000

typedef struct WorkerSlot
{
	pg_atomic_uint32 database; /* Oid; InvalidOid = free */
	pg_atomic_uint32 kind;	   /* EsWorkerKind */
	pg_atomic_uint32 object;   /* of the key */
	pg_atomic_uint32 state;	   /* EsWorkerState */
	pg_atomic_uint32 pending;  /* ES_WAKE_ flags; set by anyone, cleared by the worker */
	int				 pid;	   /* the worker's, from attach to detach; 0 */
	Latch *volatile latch;	   /* the worker's; read without the lock */
	TimestampTz		 started;  /* of the last start */
	TimestampTz		 due;	   /* FAILED, NO_SLOT: not before */
	TimestampTz		 held_until;				  /* no worker until then; 0 = not held */
	int				 failures;					  /* in a row */
	pg_atomic_uint64 stats[ES_WORKER_STAT_COUNT]; /* by the worker only */
	EsWorkerReport	 report;					  /* by the worker only, under the lock */
	pg_atomic_uint64 asked[ES_ERRAND_COUNT];	  /* by anyone: they only grow */
	pg_atomic_uint64 done[ES_ERRAND_COUNT]; /* by the worker: what was asked up to here */
	ConditionVariable errand_done;
} WorkerSlot;

typedef struct WakeControl
{
	LWLock *lock;		  /* tranche EventstoreWake */
	int		launcher_pid; /* [lock] */
	Latch *volatile launcher_latch;
	pg_atomic_uint32 rescan; /* 1 = databases came or changed */
	pg_atomic_uint32 full;	 /* 1 = somebody found no slot; 0 again when one gets free */
	WorkerSlot		 slots[SLOT_COUNT];
} WakeControl;

static WakeControl *control = NULL;

/* In a worker: its slot, and what it found before it exits. */
static WorkerSlot *own_worker = NULL;
static bool		   found_absent = false;

static bool wake_at_commit = false;

/* ---------------------------------------------------------------------------
 * The table
 * ------------------------------------------------------------------------- */

Size
es_wake_shmem_size(void)
{
	return MAXALIGN(sizeof(WakeControl));
}

void
es_wake_shmem_init(void)
{
	bool found;

	control = ShmemInitStruct("eventstore workers", es_wake_shmem_size(), &found);
	if (found)
		return;

	memset(control, 0, sizeof(WakeControl));
	control->lock = &GetNamedLWLockTranche("EventstoreWake")[0].lock;
	pg_atomic_init_u32(&control->rescan, 0);
	pg_atomic_init_u32(&control->full, 0);
	for (int i = 0; i < SLOT_COUNT; i++)
	{
		WorkerSlot *slot = &control->slots[i];

		pg_atomic_init_u32(&slot->database, InvalidOid);
		pg_atomic_init_u32(&slot->kind, ES_WORKER_MAINTENANCE);
		pg_atomic_init_u32(&slot->object, 0);
		pg_atomic_init_u32(&slot->state, ES_WORKER_NONE);
		pg_atomic_init_u32(&slot->pending, 0);
		for (int j = 0; j < ES_WORKER_STAT_COUNT; j++)
			pg_atomic_init_u64(&slot->stats[j], 0);
		for (int j = 0; j < ES_ERRAND_COUNT; j++)
		{
			pg_atomic_init_u64(&slot->asked[j], 0);
			pg_atomic_init_u64(&slot->done[j], 0);
		}
		ConditionVariableInit(&slot->errand_done);
	}
}

static EsWorkerState
get_state(WorkerSlot *slot)
{
	return (EsWorkerState) pg_atomic_read_u32(&slot->state);
}

/* With the lock.  A full barrier, for the sake of wake-ups (see above). */
static void
set_state(WorkerSlot *slot, EsWorkerState state)
{
	pg_atomic_exchange_u32(&slot->state, state);
}

static EsWorkerKey
key_of(WorkerSlot *slot)
{
	EsWorkerKey key = {pg_atomic_read_u32(&slot->database),
					   (EsWorkerKind) pg_atomic_read_u32(&slot->kind),
					   pg_atomic_read_u32(&slot->object)};

	return key;
}

static bool
is_slot_of(WorkerSlot *slot, EsWorkerKey key)
{
	return pg_atomic_read_u32(&slot->database) == key.database &&
		   pg_atomic_read_u32(&slot->kind) == (uint32) key.kind &&
		   pg_atomic_read_u32(&slot->object) == key.object;
}

/* Without the lock the answer is a hint, except for one's own database. */
static WorkerSlot *
find_slot(EsWorkerKey key)
{
	for (int i = 0; i < SLOT_COUNT; i++)
		if (is_slot_of(&control->slots[i], key))
			return &control->slots[i];
	return NULL;
}

static WorkerSlot *
find_free_slot(void)
{
	for (int i = 0; i < SLOT_COUNT; i++)
		if (!OidIsValid(pg_atomic_read_u32(&control->slots[i].database)))
			return &control->slots[i];
	return NULL;
}

static bool
is_task(EsWorkerKind kind)
{
	return kind == ES_WORKER_SOURCE || kind == ES_WORKER_SINK;
}

/* Of sources and sinks, or of the others; all of them, or those with a process.  With the lock. */
static int
count_slots(bool tasks, bool with_process)
{
	int n = 0;

	for (int i = 0; i < SLOT_COUNT; i++)
	{
		WorkerSlot *slot = &control->slots[i];

		if (OidIsValid(pg_atomic_read_u32(&slot->database)) &&
			is_task(key_of(slot).kind) == tasks &&
			(!with_process || slot->pid != 0 || get_state(slot) == ES_WORKER_STARTING))
			n++;
	}
	return n;
}

bool
es_worker_has_room(EsWorkerKey key)
{
	int others;
	int tasks;

	if (!is_task(key.kind))
		return true;
	LWLockAcquire(control->lock, LW_SHARED);
	others = count_slots(false, true);
	tasks = count_slots(true, true);
	LWLockRelease(control->lock);
	/* The first database's two may not have begun. */
	return tasks == 0 || tasks < max_worker_processes - LAUNCHERS - Max(others, 2);
}

/* A free slot, or one of a database without the extension.  With the lock. */
static WorkerSlot *
find_unused_slot(void)
{
	WorkerSlot *slot = find_free_slot();

	for (int i = 0; i < SLOT_COUNT && slot == NULL; i++)
	{
		WorkerSlot *other = &control->slots[i];

		if (get_state(other) == ES_WORKER_ABSENT && other->pid == 0 &&
			other->held_until == 0)
			slot = other;
	}
	return slot;
}

/* The worker's slot, made if need be; NULL where the table is full.  With the lock. */
static WorkerSlot *
claim_slot(EsWorkerKey key)
{
	WorkerSlot *slot = find_slot(key);

	if (slot != NULL)
		return slot;
	slot = find_unused_slot();
	if (slot == NULL || (is_task(key.kind) && count_slots(true, false) >= TASK_SLOTS))
	{
		pg_atomic_write_u32(&control->full, 1);
		return NULL;
	}
	pg_atomic_write_u32(&slot->pending, 0);
	slot->pid = 0;
	slot->latch = NULL;
	slot->started = slot->due = slot->held_until = 0;
	slot->failures = 0;
	for (int i = 0; i < ES_WORKER_STAT_COUNT; i++)
		pg_atomic_write_u64(&slot->stats[i], 0);
	memset(&slot->report, 0, sizeof(slot->report));
	set_state(slot, ES_WORKER_NONE);
	/* Its old database goes first: no reader may take it for another's. */
	pg_atomic_write_u32(&slot->database, InvalidOid);
	pg_write_barrier();
	pg_atomic_write_u32(&slot->kind, key.kind);
	pg_atomic_write_u32(&slot->object, key.object);
	pg_write_barrier();
	pg_atomic_write_u32(&slot->database, key.database);
	return slot;
}

static void
wake_launcher(void)
{
	Latch *latch = control->launcher_latch;

	if (latch != NULL)
		SetLatch(latch);
}

/* Does it stand where asking for a worker changes something?  With the lock. */
static bool
want_slot(WorkerSlot *slot)
{
	EsWorkerState state = get_state(slot);

	if (state != ES_WORKER_NONE && state != ES_WORKER_ABSENT)
		return false;
	set_state(slot, ES_WORKER_WANTED);
	return true;
}

/* ---------------------------------------------------------------------------
 * Appenders
 * ------------------------------------------------------------------------- */

/* The worker's slot, made if need be; NULL where there is no room for it. */
static WorkerSlot *
obtain_slot(EsWorkerKey key)
{
	WorkerSlot *slot = find_slot(key);

	if (slot == NULL && pg_atomic_read_u32(&control->full) == 0)
	{
		LWLockAcquire(control->lock, LW_EXCLUSIVE);
		slot = claim_slot(key);
		LWLockRelease(control->lock);
	}
	return slot;
}

/* Of this database, and of a kind that there is one of. */
static WorkerSlot *
own_slot(EsWorkerKind kind)
{
	static WorkerSlot *cached[ES_WORKER_KIND_COUNT];
	EsWorkerKey		   key = {MyDatabaseId, kind, 0};
	WorkerSlot		  *slot = cached[kind];

	if (control == NULL || !OidIsValid(MyDatabaseId))
		return NULL;
	if (slot == NULL || !is_slot_of(slot, key))
		cached[kind] = slot = obtain_slot(key);
	return slot;
}

static void
call_worker(WorkerSlot *slot, EsWorkerKey key, uint32 flag)
{
	EsWorkerState state;

	/* What the worker is to see was written before the flag is read. */
	pg_memory_barrier();
	if ((pg_atomic_read_u32(&slot->pending) & flag) != 0)
		return;
	pg_atomic_fetch_or_u32(&slot->pending, flag);

	state = get_state(slot);
	if (state == ES_WORKER_RUNNING)
	{
		Latch *latch = slot->latch;

		if (latch != NULL)
			SetLatch(latch);
	}
	else if (state == ES_WORKER_NONE || state == ES_WORKER_ABSENT)
	{
		LWLockAcquire(control->lock, LW_EXCLUSIVE);
		/* It may have become free, or another's, meanwhile. */
		if (is_slot_of(slot, key))
			(void) want_slot(slot);
		LWLockRelease(control->lock);
		wake_launcher();
	}
}

static void
wake_worker(EsWorkerKind kind, uint32 flag)
{
	WorkerSlot *slot = own_slot(kind);

	if (slot != NULL)
		call_worker(slot, (EsWorkerKey){MyDatabaseId, kind, 0}, flag);
}

void
es_worker_call(EsWorkerKey key, uint32 flag)
{
	WorkerSlot *slot = control != NULL ? obtain_slot(key) : NULL;

	if (slot != NULL)
		call_worker(slot, key, flag);
}

void
es_wake_maintenance(void)
{
	wake_worker(ES_WORKER_MAINTENANCE, ES_WAKE_MAINTENANCE);
}

void
es_wake_notifier(void)
{
	wake_worker(ES_WORKER_NOTIFIER, ES_WAKE_NOTIFIER);
}

bool
es_wake_notifier_runs(void)
{
	WorkerSlot *slot = own_slot(ES_WORKER_NOTIFIER);

	return slot != NULL && get_state(slot) == ES_WORKER_RUNNING;
}

bool
es_wake_notifier_called(void)
{
	WorkerSlot *slot = own_slot(ES_WORKER_NOTIFIER);

	return slot != NULL && (pg_atomic_read_u32(&slot->pending) & ES_WAKE_NOTIFIER) != 0;
}

void
es_wake_activity(void)
{
	wake_worker(ES_WORKER_MAINTENANCE, ES_WAKE_ACTIVITY);
}

static void
wake_at_end(XactEvent event, void *arg)
{
	if (!wake_at_commit)
		return;
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT)
	{
		wake_at_commit = false;
		if (event == XACT_EVENT_COMMIT)
		{
			wake_worker(ES_WORKER_MAINTENANCE, ES_WAKE_MAINTENANCE);
			es_listeners_survey();
		}
	}
}

void
es_wake_maintenance_at_commit(void)
{
	static bool registered = false;

	if (control == NULL)
		return;
	if (!registered)
	{
		RegisterXactCallback(wake_at_end, NULL);
		registered = true;
	}
	wake_at_commit = true;
}

int
es_wake_worker_pid(void)
{
	EsWorkerKey key = {MyDatabaseId, ES_WORKER_MAINTENANCE, 0};
	WorkerSlot *slot;
	int			pid = 0;

	if (control == NULL)
		return 0;
	LWLockAcquire(control->lock, LW_SHARED);
	slot = find_slot(key);
	if (slot != NULL && get_state(slot) == ES_WORKER_RUNNING)
		pid = slot->pid;
	LWLockRelease(control->lock);
	return pid;
}

int
es_wake_launcher_pid(void)
{
	int pid;

	if (control == NULL)
		return 0;
	LWLockAcquire(control->lock, LW_SHARED);
	pid = control->launcher_pid;
	LWLockRelease(control->lock);
	return pid;
}

bool
es_wake_slots_exhausted(void)
{
	bool known = false;

	if (control == NULL)
		return false;
	for (int i = 0; i < SLOT_COUNT; i++)
	{
		WorkerSlot *slot = &control->slots[i];

		if (pg_atomic_read_u32(&slot->database) != MyDatabaseId)
			continue;
		if (get_state(slot) == ES_WORKER_NO_SLOT)
			return true;
		known = true;
	}
	return !known && pg_atomic_read_u32(&control->full) != 0;
}

/* ---------------------------------------------------------------------------
 * Workers
 * ------------------------------------------------------------------------- */

static bool
is_held(const WorkerSlot *slot, TimestampTz now)
{
	return slot->held_until > now;
}

/* The process is gone without having said why.  With the lock. */
static void
set_failed(WorkerSlot *slot, TimestampTz now)
{
	int pause_ms = PAUSE_FIRST_MS;

	if (TimestampDifferenceExceeds(slot->started, now, STABLE_MS))
		slot->failures = 0;
	for (int i = 0; i < slot->failures && pause_ms < PAUSE_LAST_MS; i++)
		pause_ms *= 2;
	slot->failures++;
	slot->due = TimestampTzPlusMilliseconds(now, Min(pause_ms, PAUSE_LAST_MS));
	set_state(slot, ES_WORKER_FAILED);
}

static void
detach_worker(int code, Datum arg)
{
	WorkerSlot *slot = own_worker;
	TimestampTz now = GetCurrentTimestamp();

	own_worker = NULL;
	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	slot->pid = 0;
	slot->latch = NULL;
	if (is_held(slot, now))
		set_state(slot, ES_WORKER_WANTED);
	else if (found_absent)
	{
		slot->failures = 0;
		set_state(slot, ES_WORKER_ABSENT);
		pg_atomic_write_u32(&control->full, 0);
		/* Who asked since we looked saw us running, and relies on us. */
		if ((pg_atomic_read_u32(&slot->pending) & ~ES_WAKE_STOP) != 0)
			set_state(slot, ES_WORKER_WANTED);
	}
	else
		set_failed(slot, now);
	LWLockRelease(control->lock);
	wake_launcher();
}

bool
es_worker_attach(EsWorkerKey key)
{
	WorkerSlot *slot;
	bool		attached = false;

	/* Before the connection is made, and so after it is gone. */
	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	slot = find_slot(key);
	if (slot != NULL && slot->pid == 0 && !is_held(slot, GetCurrentTimestamp()))
	{
		slot->pid = MyProcPid;
		slot->latch = MyLatch;
		slot->started = GetCurrentTimestamp();
		pg_atomic_fetch_and_u32(&slot->pending, ~ES_WAKE_STOP);
		for (int i = 0; i < ES_WORKER_STAT_COUNT; i++)
			pg_atomic_write_u64(&slot->stats[i], 0);
		/* What the last process was doing is not what this one does. */
		memset(&slot->report, 0, sizeof(slot->report));
		own_worker = slot;
		on_shmem_exit(detach_worker, (Datum) 0);
		attached = true;
	}
	LWLockRelease(control->lock);
	return attached;
}

void
es_worker_set_running(void)
{
	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	set_state(own_worker, ES_WORKER_RUNNING);
	LWLockRelease(control->lock);
	/* The launcher starts one at a time. */
	wake_launcher();
}

void
es_worker_set_absent(void)
{
	found_absent = true;
}

uint32
es_worker_pending(uint32 flags)
{
	return pg_atomic_read_u32(&own_worker->pending) & flags;
}

uint32
es_worker_take(uint32 flags)
{
	return pg_atomic_fetch_and_u32(&own_worker->pending, ~flags) & flags;
}

void
es_worker_count(EsWorkerStat stat, uint64 n)
{
	if (own_worker != NULL)
		pg_atomic_fetch_add_u64(&own_worker->stats[stat], n);
}

void
es_worker_report(const char *name, const char *state, const char *message)
{
	EsWorkerReport *report = &own_worker->report;

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	if (strcmp(report->state, state) != 0)
		report->since = GetCurrentTimestamp();
	strlcpy(report->name, name, sizeof(report->name));
	strlcpy(report->state, state, sizeof(report->state));
	memset(report->message, 0, sizeof(report->message));
	memcpy(report->message, message,
		   pg_mbcliplen(message, strlen(message), sizeof(report->message) - 1));
	LWLockRelease(control->lock);
}

/* ---------------------------------------------------------------------------
 * Errands
 * ------------------------------------------------------------------------- */

uint64
es_errand_asked(EsErrand errand)
{
	return pg_atomic_read_u64(&own_worker->asked[errand]);
}

void
es_errand_done(EsErrand errand, uint64 ticket)
{
	pg_atomic_write_u64(&own_worker->done[errand], ticket);
	ConditionVariableBroadcast(&own_worker->errand_done);
}

bool
es_errand_ask(EsWorkerKey key, EsErrand errand, uint64 *ticket)
{
	WorkerSlot *slot = obtain_slot(key);

	if (slot == NULL)
		return false;
	*ticket = pg_atomic_add_fetch_u64(&slot->asked[errand], 1);
	call_worker(slot, key, ES_WAKE_ERRAND);
	return true;
}

bool
es_errand_wait(EsWorkerKey key, EsErrand errand, uint64 ticket, TimestampTz deadline)
{
	static uint32 wait_event = 0;
	WorkerSlot	 *slot = find_slot(key);
	bool		  done = false;

	if (slot == NULL)
		return false;
	ConditionVariablePrepareToSleep(&slot->errand_done);
	for (;;)
	{
		long left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), deadline);

		done = is_slot_of(slot, key) && pg_atomic_read_u64(&slot->done[errand]) >= ticket;
		if (done || left <= 0 || !is_slot_of(slot, key))
			break;
		(void) ConditionVariableTimedSleep(&slot->errand_done, Min(left, INT_MAX),
										   es_wait_event(wait_event, "EventstoreErrand"));
	}
	ConditionVariableCancelSleep();
	return done;
}

/* ---------------------------------------------------------------------------
 * Holding a database free of its worker
 * ------------------------------------------------------------------------- */

/* With the lock: asks one worker to stop, or makes it; false once it is gone. */
static bool
push_worker(WorkerSlot *slot, bool terminate)
{
	if (slot->pid == 0)
		return false;
	pg_atomic_fetch_or_u32(&slot->pending, ES_WAKE_STOP);
	SetLatch(slot->latch);
	/* Under the lock, so that the pid is still the worker's. */
	if (terminate)
		kill(slot->pid, SIGTERM);
	return true;
}

/* The two that a database may get without anybody's asking for them there. */
static void
claim_base_slots(Oid database)
{
	(void) claim_slot((EsWorkerKey){database, ES_WORKER_MAINTENANCE, 0});
	(void) claim_slot((EsWorkerKey){database, ES_WORKER_NOTIFIER, 0});
}

/* The same for all of a database's; 'hold' keeps others from being started. */
static bool
push_workers(Oid database, bool hold, bool terminate)
{
	bool there = false;

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	if (hold)
		claim_base_slots(database);
	for (int i = 0; i < SLOT_COUNT; i++)
	{
		WorkerSlot *slot = &control->slots[i];

		if (pg_atomic_read_u32(&slot->database) != database)
			continue;
		if (hold)
			slot->held_until =
				TimestampTzPlusMilliseconds(GetCurrentTimestamp(), HOLD_MS);
		if (push_worker(slot, terminate))
			there = true;
	}
	LWLockRelease(control->lock);
	return there;
}

void
es_worker_hold(Oid database)
{
	static uint32 wait_event = 0;
	TimestampTz	  start = GetCurrentTimestamp();
	bool		  terminated = false;
	bool		  there;

	if (control == NULL)
		return;
	there = push_workers(database, true, false);
	while (there)
	{
		TimestampTz now;
		bool		terminate;

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 5,
						 es_wait_event(wait_event, "EventstoreWorkerStop"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();

		now = GetCurrentTimestamp();
		if (TimestampDifferenceExceeds(start, now, STOP_PATIENCE_MS))
			break;
		terminate = !terminated && TimestampDifferenceExceeds(start, now, STOP_POLITE_MS);
		there = push_workers(database, false, terminate);
		terminated = terminated || terminate;
	}
}

void
es_worker_release(Oid database)
{
	if (control == NULL)
		return;
	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SLOT_COUNT; i++)
	{
		WorkerSlot *slot = &control->slots[i];

		if (pg_atomic_read_u32(&slot->database) != database)
			continue;
		slot->held_until = 0;
		/* Claimed for the hold only: the database may be gone. */
		if (get_state(slot) == ES_WORKER_NONE && slot->pid == 0)
		{
			pg_atomic_write_u32(&slot->database, InvalidOid);
			pg_atomic_write_u32(&control->full, 0);
		}
	}
	LWLockRelease(control->lock);
	es_launcher_rescan();
}

/* ---------------------------------------------------------------------------
 * The launcher
 * ------------------------------------------------------------------------- */

static void
detach_launcher(int code, Datum arg)
{
	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	control->launcher_pid = 0;
	control->launcher_latch = NULL;
	LWLockRelease(control->lock);
}

void
es_launcher_attach(void)
{
	before_shmem_exit(detach_launcher, (Datum) 0);
	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	control->launcher_pid = MyProcPid;
	control->launcher_latch = MyLatch;
	LWLockRelease(control->lock);
}

void
es_launcher_rescan(void)
{
	pg_atomic_write_u32(&control->rescan, 1);
	pg_memory_barrier();
	wake_launcher();
}

bool
es_launcher_take_rescan(void)
{
	return pg_atomic_exchange_u32(&control->rescan, 0) != 0;
}

/* When may this one be started?  0 = now, -1 = not by itself. */
static long
time_until_due(const WorkerSlot *slot, EsWorkerState state, TimestampTz now)
{
	TimestampTz due;

	switch (state)
	{
		case ES_WORKER_WANTED:
			due = now;
			break;
		case ES_WORKER_FAILED:
		case ES_WORKER_NO_SLOT:
			due = slot->due;
			break;
		case ES_WORKER_STARTING:
			if (slot->pid != 0)
				return -1;
			due = TimestampTzPlusMilliseconds(slot->started, START_LOST_MS);
			break;
		default:
			return -1;
	}
	return TimestampDifferenceMilliseconds(now, Max(due, slot->held_until));
}

/* Of two that are due: a database's own worker, then the one that somebody has asked for. */
static bool
goes_before(WorkerSlot *slot, WorkerSlot *other)
{
	bool task = is_task(key_of(slot).kind);

	if (task != is_task(key_of(other).kind))
		return !task;
	return pg_atomic_read_u32(&slot->pending) != 0 &&
		   pg_atomic_read_u32(&other->pending) == 0;
}

EsWorkerKey
es_worker_due(TimestampTz now, long *wait_ms)
{
	WorkerSlot *chosen = NULL;
	bool		in_recovery = RecoveryInProgress();
	bool		starting = false;
	EsWorkerKey result = {InvalidOid};

	LWLockAcquire(control->lock, LW_SHARED);
	for (int i = 0; i < SLOT_COUNT; i++)
	{
		WorkerSlot	 *slot = &control->slots[i];
		EsWorkerState state = get_state(slot);
		long		  until = time_until_due(slot, state, now);

		/* A standby cannot be written to. */
		if (in_recovery && key_of(slot).kind != ES_WORKER_NOTIFIER)
			continue;

		/* One after the other, so as not to take all process slots at once. */
		if (state == ES_WORKER_STARTING &&
			!TimestampDifferenceExceeds(slot->started, now, START_PATIENCE_MS))
			starting = true;
		if (until > 0)
			*wait_ms = Min(*wait_ms, until);
		else if (until == 0 && (chosen == NULL || goes_before(slot, chosen)))
			chosen = slot;
	}
	if (chosen != NULL)
		result = key_of(chosen);
	LWLockRelease(control->lock);

	if (starting && chosen != NULL)
	{
		*wait_ms = Min(*wait_ms, START_PATIENCE_MS);
		result.database = InvalidOid;
	}
	return result;
}

void
es_worker_set_starting(EsWorkerKey key)
{
	WorkerSlot *slot;

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	slot = claim_slot(key);
	if (slot != NULL && slot->pid == 0)
	{
		slot->started = GetCurrentTimestamp();
		set_state(slot, ES_WORKER_STARTING);
	}
	LWLockRelease(control->lock);
}

void
es_worker_set_no_slot(EsWorkerKey key)
{
	WorkerSlot *slot;

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	slot = find_slot(key);
	if (slot != NULL)
	{
		slot->due = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), NO_SLOT_PAUSE_MS);
		set_state(slot, ES_WORKER_NO_SLOT);
	}
	LWLockRelease(control->lock);
}

void
es_worker_ended(EsWorkerKey key)
{
	WorkerSlot *slot;
	TimestampTz now = GetCurrentTimestamp();

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	slot = find_slot(key);
	/* One that attached has told by itself how it ended. */
	if (slot != NULL && slot->pid == 0 && get_state(slot) == ES_WORKER_STARTING)
	{
		if (is_held(slot, now))
			set_state(slot, ES_WORKER_WANTED);
		else
			set_failed(slot, now);
	}
	LWLockRelease(control->lock);
}

void
es_worker_want(EsWorkerKey key)
{
	WorkerSlot *slot;
	bool		wanted;

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	slot = claim_slot(key);
	wanted = slot != NULL && want_slot(slot);
	LWLockRelease(control->lock);
	/* Who calls it from now on takes it that the launcher knows. */
	if (wanted)
		wake_launcher();
}

void
es_worker_forget(Oid database)
{
	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SLOT_COUNT; i++)
	{
		WorkerSlot *slot = &control->slots[i];

		if (pg_atomic_read_u32(&slot->database) != database || slot->pid != 0)
			continue;
		pg_atomic_write_u32(&slot->database, InvalidOid);
		set_state(slot, ES_WORKER_NONE);
		slot->held_until = 0;
		pg_atomic_write_u32(&control->full, 0);
	}
	LWLockRelease(control->lock);
}

/* ---------------------------------------------------------------------------
 * The monitor
 * ------------------------------------------------------------------------- */

int
es_worker_list(EsWorkerInfo **workers)
{
	int n = 0;

	*workers = palloc0(sizeof(EsWorkerInfo) * SLOT_COUNT);
	if (control == NULL)
		return 0;
	LWLockAcquire(control->lock, LW_SHARED);
	for (int i = 0; i < SLOT_COUNT; i++)
	{
		WorkerSlot	 *slot = &control->slots[i];
		EsWorkerInfo *info = &(*workers)[n];

		info->state = get_state(slot);
		if (info->state == ES_WORKER_NONE || info->state == ES_WORKER_ABSENT)
			continue;
		info->key = key_of(slot);
		info->pid = slot->pid;
		info->since = slot->started;
		info->failures = slot->failures;
		info->report = slot->report;
		for (int j = 0; j < ES_WORKER_STAT_COUNT; j++)
			info->stats[j] = pg_atomic_read_u64(&slot->stats[j]);
		n++;
	}
	LWLockRelease(control->lock);
	return n;
}

bool
es_worker_find(EsWorkerKey key, EsWorkerInfo *info)
{
	EsWorkerInfo *workers;
	int			  n = es_worker_list(&workers);

	for (int i = 0; i < n; i++)
	{
		*info = workers[i];
		if (info->key.database == key.database && info->key.kind == key.kind &&
			info->key.object == key.object)
			return true;
	}
	return false;
}

const char *
es_worker_state_name(EsWorkerState state)
{
	switch (state)
	{
		case ES_WORKER_NONE:
			return "none";
		case ES_WORKER_WANTED:
			return "wanted";
		case ES_WORKER_STARTING:
			return "starting";
		case ES_WORKER_RUNNING:
			return "running";
		case ES_WORKER_FAILED:
			return "failed";
		case ES_WORKER_NO_SLOT:
			return "no free process slot";
		case ES_WORKER_ABSENT:
			return "no extension";
	}
	return "unknown";
}

const char *
es_worker_kind_name(EsWorkerKind kind)
{
	switch (kind)
	{
		case ES_WORKER_NOTIFIER:
			return "notifier";
		case ES_WORKER_SOURCE:
			return "source";
		case ES_WORKER_SINK:
			return "sink";
		default:
			return "worker";
	}
}
