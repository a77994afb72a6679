/*
 * worker/listeners.c
 *		Counting who listens to which channel.
 *
 * A notification is only worth sending where somebody listens, and PostgreSQL
 * keeps that to itself.  So each session counts itself in a table of counters
 * that is indexed by a hash of database and channel: two channels may share one
 * and then a notification is sent in vain, that is all.
 *
 *	1.	A session counts itself before its LISTEN runs, not at its commit.  So an
 *		appender that finds zero after its event can be seen precedes the LISTEN,
 *		and what the listener reads next has the event.
 *	2.	It takes itself out when an UNLISTEN commits, and at its exit.  Where a
 *		savepoint was rolled back in that transaction, or LISTEN and UNLISTEN came
 *		together in a way that we cannot follow, it stays counted: too many is
 *		harmless, too few would lose notifications.
 *
 * LISTEN is seen by a utility hook, so those of functions (EXECUTE 'LISTEN x')
 * count too; other C code that calls Async_Listen by itself is not seen.
 *
 * Locks: none, the counters are atomic.  A crash of any process resets shared
 * memory and ends all sessions.
 */
#include "postgres.h"

#include "worker/listeners.h"

#include "access/xact.h"
#include "common/hashfn.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "port/atomics.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "utility.h"
#include "utils/memutils.h"
#include "worker/wake.h"

/* A power of two; with as many channels every second counter is a channel's own. */
#define COUNTERS 4096

typedef struct Listeners
{
	pg_atomic_uint32 generation;
	pg_atomic_uint32 counters[COUNTERS];
} Listeners;

/* A channel that this session is counted for. */
typedef struct Counted
{
	char name[NAMEDATALEN];
	bool ends; /* UNLISTEN has run, and takes effect at commit */
} Counted;

static Listeners			   *listeners = NULL;
static Counted				   *counted = NULL; /* TopMemoryContext */
static int						ncounted = 0;
static int						counted_size = 0;
static bool						ending = false; /* some of them has 'ends' */
static ProcessUtility_hook_type prev_process_utility = NULL;

Size
es_listeners_shmem_size(void)
{
	return MAXALIGN(sizeof(Listeners));
}

void
es_listeners_shmem_init(void)
{
	bool found;

	listeners =
		ShmemInitStruct("eventstore listeners", es_listeners_shmem_size(), &found);
	if (found)
		return;
	pg_atomic_init_u32(&listeners->generation, 0);
	for (int i = 0; i < COUNTERS; i++)
		pg_atomic_init_u32(&listeners->counters[i], 0);
}

/* ---------------------------------------------------------------------------
 * Questions
 * ------------------------------------------------------------------------- */

EsChannel
es_listeners_channel(const char *name)
{
	uint64 hash =
		hash_bytes_extended((const unsigned char *) name, strlen(name), MyDatabaseId);

	return (EsChannel) (hash % COUNTERS) + 1;
}

/* No channel has an empty name, so its counter stands for all of the database. */
static EsChannel
database_channel(void)
{
	return es_listeners_channel("");
}

bool
es_listeners_any(EsChannel channel)
{
	if (channel == 0 || listeners == NULL)
		return false;
	/* The caller's event can be seen before the counter is read: see above, 1. */
	pg_memory_barrier();
	return pg_atomic_read_u32(&listeners->counters[channel - 1]) != 0;
}

uint32
es_listeners_in_database(void)
{
	if (listeners == NULL)
		return 0;
	return pg_atomic_read_u32(&listeners->counters[database_channel() - 1]);
}

uint32
es_listeners_generation(void)
{
	return pg_atomic_read_u32(&listeners->generation);
}

/*
 * Not by an invalidation: those of a transaction are sent after its commit
 * callbacks have run, and the notifier may look before.
 */
void
es_listeners_survey(void)
{
	if (listeners == NULL || !OidIsValid(MyDatabaseId))
		return;
	pg_atomic_fetch_add_u32(&listeners->generation, 1);
	if (es_listeners_in_database() > 0)
		es_wake_notifier();
}

/* ---------------------------------------------------------------------------
 * This session
 * ------------------------------------------------------------------------- */

/* Returns what it was before.  Atomic operations are full barriers. */
static uint32
change_counter(EsChannel channel, int32 by)
{
	uint32 before = pg_atomic_fetch_add_u32(&listeners->counters[channel - 1], by);

	pg_atomic_fetch_add_u32(&listeners->generation, 1);
	return before;
}

static void
remove_counted(int i)
{
	(void) change_counter(es_listeners_channel(counted[i].name), -1);
	counted[i] = counted[--ncounted];
	if (ncounted == 0)
		(void) change_counter(database_channel(), -1);
}

static void
leave_at_exit(int code, Datum arg)
{
	while (ncounted > 0)
		remove_counted(ncounted - 1);
}

static void
settle_at_end(XactEvent event, void *arg)
{
	if (!ending || (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT))
		return;
	ending = false;
	for (int i = ncounted - 1; i >= 0; i--)
	{
		if (counted[i].ends && event == XACT_EVENT_COMMIT)
			remove_counted(i);
		else
			counted[i].ends = false;
	}
}

static void
settle_subtransaction(SubXactEvent event, SubTransactionId subid, SubTransactionId parent,
					  void *arg)
{
	if (!ending || event != SUBXACT_EVENT_ABORT_SUB)
		return;
	ending = false;
	for (int i = 0; i < ncounted; i++)
		counted[i].ends = false;
}

static void
begin_counting(void)
{
	counted_size = 4;
	counted = MemoryContextAlloc(TopMemoryContext, sizeof(Counted) * counted_size);
	before_shmem_exit(leave_at_exit, (Datum) 0);
	RegisterXactCallback(settle_at_end, NULL);
	RegisterSubXactCallback(settle_subtransaction, NULL);
}

bool
es_listeners_add(const char *name)
{
	if (listeners == NULL || !OidIsValid(MyDatabaseId))
		return false;
	for (int i = 0; i < ncounted; i++)
		if (strcmp(counted[i].name, name) == 0)
		{
			counted[i].ends = false;
			return false;
		}
	if (counted == NULL)
		begin_counting();
	if (ncounted == counted_size)
	{
		counted = repalloc(counted, sizeof(Counted) * counted_size * 2);
		counted_size *= 2;
	}
	strlcpy(counted[ncounted].name, name, NAMEDATALEN);
	counted[ncounted].ends = false;
	if (ncounted++ == 0)
		(void) change_counter(database_channel(), 1);
	return change_counter(es_listeners_channel(name), 1) == 0;
}

/* NULL: from all. */
static void
end_listening(const char *name)
{
	for (int i = 0; i < ncounted; i++)
		if (name == NULL || strcmp(counted[i].name, name) == 0)
		{
			counted[i].ends = true;
			ending = true;
		}
}

static void
process_utility(ES_UTILITY_PARAMETERS)
{
	Node *stmt = pstmt->utilityStmt;

	if (IsA(stmt, ListenStmt))
	{
		(void) es_listeners_add(((ListenStmt *) stmt)->conditionname);
		/* Where there are collections, a heartbeat may be due. */
		if (es_wake_worker_pid() != 0)
			es_wake_notifier();
	}
	else if (IsA(stmt, UnlistenStmt))
		end_listening(((UnlistenStmt *) stmt)->conditionname);
	else if (IsA(stmt, DiscardStmt) && ((DiscardStmt *) stmt)->target == DISCARD_ALL)
		end_listening(NULL);

	es_next_utility(prev_process_utility, ES_UTILITY_ARGUMENTS);
}

void
es_listeners_install(void)
{
	if (IsBinaryUpgrade)
		return;
	prev_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;
}
