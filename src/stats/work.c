/*
 * stats/work.c
 *		Long work under way, and how far it is: the view progress.
 *
 * PostgreSQL has its own views for what it does itself (CREATE INDEX, COPY), which
 * take no commands of extensions.  So each process has a slot in shared memory.
 * Only its owner writes it; how much is done is counted without a lock.
 *
 * Locks: one LWLock, held for filling a slot or, by a reader, for copying all of
 * those in use.  A crash empties them, and ends all sessions.
 */
#include "postgres.h"

#include "stats/work.h"

#include "access/xact.h"
#include "collection/inventory.h"
#include "compat.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "port/atomics.h"
#include "shmem.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(es_stat_progress);

#define PROGRESS_COLUMNS 7

typedef struct Slot
{
	int				 pid; /* 0 = nothing is shown */
	Oid				 database;
	Oid				 relation;
	TimestampTz		 since;
	char			 command[32];
	char			 phase[64];
	int64			 total; /* 0 = not known */
	pg_atomic_uint64 done;
} Slot;

static Slot	  *slots = NULL; /* MaxBackends of them */
static LWLock *slots_lock = NULL;

/* What this process shows; NULL = nothing. */
static Slot *own = NULL;
/* How deep within savepoints it was begun. */
static int own_level = 0;

Size
es_work_shmem_size(void)
{
	return mul_size(sizeof(Slot), MaxBackends);
}

void
es_work_shmem_init(void)
{
	bool found;

	slots = ShmemInitStruct("eventstore work", es_work_shmem_size(), &found);
	for (int i = 0; !found && i < MaxBackends; i++)
	{
		memset(&slots[i], 0, sizeof(Slot));
		pg_atomic_init_u64(&slots[i].done, 0);
	}
	slots_lock = &GetNamedLWLockTranche("EventstoreWork")->lock;
}

void
es_work_begin(const char *command, Oid relation)
{
	Slot *slot;

	if (slots == NULL || own != NULL)
		return;
	slot = &slots[es_process_number()];
	LWLockAcquire(slots_lock, LW_EXCLUSIVE);
	slot->pid = MyProcPid;
	slot->database = MyDatabaseId;
	slot->relation = relation;
	slot->since = GetCurrentTimestamp();
	strlcpy(slot->command, command, sizeof(slot->command));
	slot->phase[0] = '\0';
	slot->total = 0;
	pg_atomic_write_u64(&slot->done, 0);
	LWLockRelease(slots_lock);
	own = slot;
	own_level = GetCurrentTransactionNestLevel();
}

void
es_work_phase(const char *phase, int64 total)
{
	if (own == NULL)
		return;
	LWLockAcquire(slots_lock, LW_EXCLUSIVE);
	strlcpy(own->phase, phase, sizeof(own->phase));
	own->total = Max(total, 0);
	pg_atomic_write_u64(&own->done, 0);
	LWLockRelease(slots_lock);
}

void
es_work_done(int64 done)
{
	if (own != NULL)
		pg_atomic_write_u64(&own->done, done);
}

void
es_work_end(void)
{
	if (own == NULL)
		return;
	LWLockAcquire(slots_lock, LW_EXCLUSIVE);
	own->pid = 0;
	LWLockRelease(slots_lock);
	own = NULL;
}

static void
forget_at_end(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_ABORT || event == XACT_EVENT_COMMIT ||
		event == XACT_EVENT_PREPARE)
		es_work_end();
}

static void
forget_at_subabort(SubXactEvent event, SubTransactionId aborted, SubTransactionId parent,
				   void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB && own != NULL &&
		GetCurrentTransactionNestLevel() <= own_level)
		es_work_end();
}

void
es_work_install(void)
{
	RegisterXactCallback(forget_at_end, NULL);
	RegisterSubXactCallback(forget_at_subabort, NULL);
}

static void
put_slot(FunctionCallInfo fcinfo, Slot *slot)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	int64		   done = (int64) pg_atomic_read_u64(&slot->done);
	Datum		   values[PROGRESS_COLUMNS];
	bool		   nulls[PROGRESS_COLUMNS] = {false};

	values[0] = Int32GetDatum(slot->pid);
	values[1] = ObjectIdGetDatum(slot->relation);
	values[2] = CStringGetTextDatum(slot->command);
	values[3] = TimestampTzGetDatum(slot->since);
	values[4] = CStringGetTextDatum(slot->phase);
	values[5] = Int64GetDatum(done);
	values[6] = Int64GetDatum(slot->total);
	nulls[5] = slot->total == 0 && done == 0;
	nulls[6] = slot->total == 0;
	tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
}

Datum
es_stat_progress(PG_FUNCTION_ARGS)
{
	Slot *copy;
	int	  n = 0;

	InitMaterializedSRF(fcinfo, 0);
	if (!es_preloaded())
		PG_RETURN_NULL();
	copy = palloc(mul_size(sizeof(Slot), MaxBackends));
	LWLockAcquire(slots_lock, LW_SHARED);
	for (int i = 0; i < MaxBackends; i++)
		if (slots[i].pid != 0 && slots[i].database == MyDatabaseId)
			copy[n++] = slots[i];
	LWLockRelease(slots_lock);
	for (int i = 0; i < n; i++)
		if (es_may_see(copy[i].relation))
			put_slot(fcinfo, &copy[i]);
	PG_RETURN_NULL();
}
