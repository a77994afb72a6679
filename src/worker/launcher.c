/*
 * worker/launcher.c
 *		One process that sees to it that each database has its workers.
 *
 * The launcher is connected to no database; it can read pg_database.  It looks
 * at every database once after the start, and at those without the extension
 * again about once a minute, by starting a worker there, which ends at once
 * where there is nothing for it.  In between it is woken by appenders
 * (wake.c), by ends of workers (the postmaster signals them) and by the hook
 * below.  Workers are started one after the other.
 *
 * Which database is in which state stands in shared memory (wake.c), so a
 * launcher that died is replaced by one that goes on; what it loses is the
 * handles of the workers it started, and a start that came to nothing is then
 * noticed by time.
 *
 * The hook: DROP DATABASE, ALTER DATABASE ... RENAME, ... SET TABLESPACE and
 * CREATE DATABASE ... TEMPLATE need a database without connections, and a
 * worker is one.  Who may give such a command has the worker stopped first and
 * kept away until the command is over.
 */
#include "postgres.h"

#include "worker/launcher.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "compat.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "spi.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utility.h"
#include "utils/acl.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "worker/wake.h"

/* How often databases without the extension are looked at unasked. */
#define RESCAN_MS (60 * 1000)
/* On a standby, how often it looks whether it has been promoted. */
#define PROMOTION_MS 1000
/* Should the launcher itself die of an error. */
#define RESTART_S 5

/* A worker that this launcher has started. */
typedef struct Started
{
	EsWorkerKey				key;
	BackgroundWorkerHandle *handle;
} Started;

/* The main function of each kind. */
static const char *const main_functions[ES_WORKER_KIND_COUNT] = {
	"es_worker_main", "es_notifier_main", "es_source_main", "es_sink_main"};

static ProcessUtility_hook_type prev_process_utility = NULL;

static List			*started = NIL; /* of Started, in life_context */
static MemoryContext life_context = NULL;
static MemoryContext cycle_context = NULL;

/* ---------------------------------------------------------------------------
 * The hook
 * ------------------------------------------------------------------------- */

static const char *
string_option(List *options, const char *name, const char *otherwise)
{
	ListCell *cell;

	foreach (cell, options)
	{
		DefElem *option = lfirst_node(DefElem, cell);

		if (strcmp(option->defname, name) == 0)
			return defGetString(option);
	}
	return otherwise;
}

/* The database that the statement needs free of connections; NULL. */
static const char *
database_to_empty(Node *stmt)
{
	switch (nodeTag(stmt))
	{
		case T_DropdbStmt:
			return ((DropdbStmt *) stmt)->dbname;
		case T_CreatedbStmt:
			return string_option(((CreatedbStmt *) stmt)->options, "template",
								 "template1");
		case T_RenameStmt:
			if (((RenameStmt *) stmt)->renameType == OBJECT_DATABASE)
				return ((RenameStmt *) stmt)->subname;
			return NULL;
		case T_AlterDatabaseStmt:
			if (string_option(((AlterDatabaseStmt *) stmt)->options, "tablespace",
							  NULL) != NULL)
				return ((AlterDatabaseStmt *) stmt)->dbname;
			return NULL;
		default:
			return NULL;
	}
}

static bool
may_create_databases(void)
{
	HeapTuple tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(GetUserId()));
	bool	  result = false;

	if (HeapTupleIsValid(tuple))
	{
		result = ((Form_pg_authid) GETSTRUCT(tuple))->rolcreatedb;
		ReleaseSysCache(tuple);
	}
	return result;
}

static bool
is_template(Oid database)
{
	HeapTuple tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(database));
	bool	  result = false;

	if (HeapTupleIsValid(tuple))
	{
		result = ((Form_pg_database) GETSTRUCT(tuple))->datistemplate;
		ReleaseSysCache(tuple);
	}
	return result;
}

/* Nobody stops the worker of a database by a command that will be refused. */
static bool
may_empty(Oid database, Node *stmt)
{
	if (es_owns_database(database, GetUserId()))
		return true;
	return IsA(stmt, CreatedbStmt) && is_template(database) && may_create_databases();
}

/* What comes and goes with the extension itself has no trigger to tell it. */
static bool
concerns_extension(Node *stmt)
{
	return IsA(stmt, CreateExtensionStmt) || IsA(stmt, AlterExtensionStmt) ||
		   (IsA(stmt, DropStmt) && ((DropStmt *) stmt)->removeType == OBJECT_EXTENSION);
}

/*
 * A script that updates the extension locks its tables one after the other, and so
 * does a worker's transaction, in another order: each might have what the other
 * one waits for.  So the update waits for the workers first, which take the
 * extension before anything else.  Nobody keeps them from it by a command that
 * will be refused.
 */
static void
await_workers(Node *stmt)
{
	if (IsA(stmt, AlterExtensionStmt))
		es_extension_lock(((AlterExtensionStmt *) stmt)->extname);
}

static void
process_utility(ES_UTILITY_PARAMETERS)
{
	Node	   *stmt = pstmt->utilityStmt;
	const char *name = database_to_empty(stmt);
	Oid			database = name != NULL ? get_database_oid(name, true) : InvalidOid;
	/* The tree may be gone once the statement has run. */
	bool wake = concerns_extension(stmt);

	await_workers(stmt);

	if (!OidIsValid(database) || !may_empty(database, stmt))
	{
		es_next_utility(prev_process_utility, ES_UTILITY_ARGUMENTS);
		if (wake)
			es_wake_maintenance_at_commit();
		return;
	}

	es_worker_hold(database);
	PG_TRY();
	{
		es_next_utility(prev_process_utility, ES_UTILITY_ARGUMENTS);
	}
	PG_FINALLY();
	{
		es_worker_release(database);
	}
	PG_END_TRY();
}

void
es_launcher_install(void)
{
	BackgroundWorker worker;

	/* pg_upgrade wants nobody else in the databases. */
	if (IsBinaryUpgrade)
		return;

	prev_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	/* On a standby too: there are notifiers there. */
	worker.bgw_start_time = BgWorkerStart_ConsistentState;
	worker.bgw_restart_time = RESTART_S;
	strlcpy(worker.bgw_library_name, "eventstore", BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, "es_launcher_main", BGW_MAXLEN);
	strlcpy(worker.bgw_name, "eventstore launcher", BGW_MAXLEN);
	strlcpy(worker.bgw_type, "eventstore launcher", BGW_MAXLEN);
	RegisterBackgroundWorker(&worker);
}

/* ---------------------------------------------------------------------------
 * Databases
 * ------------------------------------------------------------------------- */

/* The databases that one may connect to, in the cycle's memory. */
static List *
list_databases(void)
{
	List		 *databases = NIL;
	Relation	  rel;
	TableScanDesc scan;
	HeapTuple	  tuple;

	StartTransactionCommand();
	/* For its side effect on what pruning may remove, as in autovacuum. */
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while (HeapTupleIsValid(tuple = heap_getnext(scan, ForwardScanDirection)))
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);
		MemoryContext	 old;

		/* A limit below -1 marks what an interrupted DROP DATABASE has left. */
		if (!form->datallowconn || form->datconnlimit < -1)
			continue;
		old = MemoryContextSwitchTo(cycle_context);
		databases = lappend_oid(databases, form->oid);
		MemoryContextSwitchTo(old);
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();
	MemoryContextSwitchTo(cycle_context);
	return databases;
}

/* Forgets databases that are gone, and has a look at those that have no worker. */
static void
rescan_databases(void)
{
	List		 *databases = list_databases();
	EsWorkerInfo *workers;
	int			  nworkers = es_worker_list(&workers);
	ListCell	 *cell;

	for (int i = 0; i < nworkers; i++)
		if (!list_member_oid(databases, workers[i].key.database))
			es_worker_forget(workers[i].key.database);
	/* A standby keeps up what its primary does. */
	if (RecoveryInProgress())
		return;
	foreach (cell, databases)
	{
		EsWorkerKey key = {lfirst_oid(cell), ES_WORKER_MAINTENANCE, 0};

		es_worker_want(key);
	}
}

/* ---------------------------------------------------------------------------
 * Workers
 * ------------------------------------------------------------------------- */

/* Takes note of processes that ended without having attached. */
static void
reap_workers(void)
{
	ListCell *cell;

	foreach (cell, started)
	{
		Started *entry = lfirst(cell);
		pid_t	 pid;

		if (GetBackgroundWorkerPid(entry->handle, &pid) != BGWH_STOPPED)
			continue;
		es_worker_ended(entry->key);
		started = foreach_delete_current(started, cell);
		pfree(entry->handle);
		pfree(entry);
	}
}

static void
report_no_slot(EsWorkerKey key)
{
	static bool reported = false;

	es_worker_set_no_slot(key);
	if (!reported)
		ereport(WARNING,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("could not start an eventstore %s for database with OID %u",
						es_worker_kind_name(key.kind), key.database),
				 errdetail("All background worker slots are in use."),
				 errhint("You might need to increase max_worker_processes.")));
	reported = true;
}

static void
start_worker(EsWorkerKey key)
{
	BackgroundWorker		worker;
	BackgroundWorkerHandle *handle;
	Started				   *entry;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_ConsistentState;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	worker.bgw_notify_pid = MyProcPid;
	worker.bgw_main_arg = ObjectIdGetDatum(key.database);
	memcpy(worker.bgw_extra, &key.object, sizeof(key.object));
	strlcpy(worker.bgw_library_name, "eventstore", BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, main_functions[key.kind], BGW_MAXLEN);
	snprintf(worker.bgw_name, BGW_MAXLEN, "eventstore %s", es_worker_kind_name(key.kind));
	strlcpy(worker.bgw_type, worker.bgw_name, BGW_MAXLEN);

	if (!es_worker_has_room(key))
	{
		es_worker_set_no_slot(key);
		return;
	}
	/* Before it can run: it finds its slot by the key. */
	es_worker_set_starting(key);
	MemoryContextSwitchTo(life_context);
	if (RegisterDynamicBackgroundWorker(&worker, &handle))
	{
		entry = palloc(sizeof(Started));
		entry->key = key;
		entry->handle = handle;
		started = lappend(started, entry);
	}
	else
		report_no_slot(key);
	MemoryContextSwitchTo(cycle_context);
}

/* Starts one that is due, and says how long the launcher may sleep. */
static long
start_due_worker(void)
{
	long		wait_ms = RESCAN_MS;
	EsWorkerKey key = es_worker_due(GetCurrentTimestamp(), &wait_ms);

	if (!OidIsValid(key.database))
		return wait_ms;
	if (list_member_oid(list_databases(), key.database))
		start_worker(key);
	else
		es_worker_forget(key.database);
	return 0;
}

/* ---------------------------------------------------------------------------
 * The process
 * ------------------------------------------------------------------------- */

static void
sleep_launcher(long wait_ms)
{
	static uint32 wait_event = 0;

	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, wait_ms,
					 es_wait_event(wait_event, "EventstoreLauncherMain"));
	ResetLatch(MyLatch);
}

void
es_launcher_main(Datum arg)
{
	TimestampTz last_rescan = 0;
	bool		in_recovery = true;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();

	es_launcher_attach();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	pgstat_report_appname("eventstore launcher");
	life_context = AllocSetContextCreate(TopMemoryContext, "eventstore launcher",
										 ALLOCSET_DEFAULT_SIZES);
	cycle_context = AllocSetContextCreate(life_context, "eventstore launcher cycle",
										  ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(cycle_context);

	for (;;)
	{
		long wait_ms;

		Assert(CurrentMemoryContext == cycle_context);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}

		reap_workers();
		if (in_recovery && !RecoveryInProgress())
		{
			in_recovery = false;
			last_rescan = 0;
		}
		if (es_launcher_take_rescan() ||
			TimestampDifferenceExceeds(last_rescan, GetCurrentTimestamp(), RESCAN_MS))
		{
			rescan_databases();
			last_rescan = GetCurrentTimestamp();
		}
		wait_ms = start_due_worker();

		MemoryContextReset(cycle_context);
		if (in_recovery)
			wait_ms = Min(wait_ms, PROMOTION_MS);
		if (wait_ms > 0)
			sleep_launcher(wait_ms);
	}
}
