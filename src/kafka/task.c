/*
 * kafka/task.c
 *		What sources and sinks have in common: a row that says what is to be done,
 *		and a worker that does it.
 *
 * The row's columns that matter here (id, name, owner, collection or target,
 * paused, failure, starts, resumes, system_identifier, database_oid) are called
 * alike in both tables, and only C writes them, as the extension's owner.  The
 * worker holds its row FOR SHARE in each transaction that writes something, so
 * who has updated or deleted the row knows, once he has it, that nothing is
 * being written, and after his commit nothing is.  The worker is called at that
 * commit (call_at_end).
 *
 * Errands (wake.c) are asked in shared memory and awaited there.  The caller's
 * own locks may be what the worker waits for; then the time-out ends it.
 *
 * Locks: the name (while one is made), then the row.  A crash: nothing but the
 * tables matters.
 */
#include "postgres.h"

#include "kafka/client.h"
#include "kafka/owner.h"
#include "kafka/task.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "collection/inventory.h"
#include "common/hashfn.h"
#include "compat.h"
#include "errors.h"
#include "feed/subscription.h"
#include "feed/wait.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lock.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/memutils.h"
#include "utils/rls.h"
#include "utils/timestamp.h"
#include "worker/process.h"

PG_FUNCTION_INFO_V1(es_kafka_pause);
PG_FUNCTION_INFO_V1(es_kafka_resume);
PG_FUNCTION_INFO_V1(es_kafka_flush);
PG_FUNCTION_INFO_V1(es_wait_for_source);
PG_FUNCTION_INFO_V1(es_kafka_workers);

/* So many starts in a row without any progress, and it has failed. */
#define STARTS_MAX 10

/*
 * Classes of our locks, which are advisory ones (SQL has 1 and 2, owner.c the next):
 * others that are held for a session end with its first aborted transaction.
 */
#define OWNER_LOCK 0xE6
#define NAME_LOCK  0xE7

static List *to_call = NIL; /* of EsWorkerKey *, in TopMemoryContext */

const char *
es_task_noun(EsWorkerKind kind)
{
	return kind == ES_WORKER_SINK ? "sink" : "source";
}

/* ---------------------------------------------------------------------------
 * Statements about one row
 * ------------------------------------------------------------------------- */

/*
 * Runs a statement as the extension's owner: %s in it is the table, $1 the id, $2
 * and $3 this server and database.  How many rows; the first one's first column,
 * an integer, into *result, where that is wanted.
 */
static uint64
run_for(EsWorkerKey key, const char *format, int expected, int32 *result)
{
	Oid			 types[3] = {INT4OID, INT8OID, OIDOID};
	Datum		 values[3] = {Int32GetDatum((int32) key.object),
							  Int64GetDatum((int64) GetSystemIdentifier()),
							  ObjectIdGetDatum(MyDatabaseId)};
	EsRoleSwitch saved;
	uint64		 rows;
	bool		 isnull;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(psprintf(format, es_task_noun(key.kind)), 3, types, values, NULL,
				   false, expected);
	rows = SPI_processed;
	if (result != NULL && rows > 0)
		*result = DatumGetInt32(
			SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	SPI_finish();
	es_role_restore(&saved);
	return rows;
}

bool
es_task_hold(EsWorkerKey key)
{
	/* A function of the user's may have called pg_advisory_unlock_all(). */
	es_task_own(key);
	return run_for(key,
				   "SELECT FROM eventstore.%s t WHERE t.id = $1 AND NOT t.paused"
				   " AND t.failure IS NULL AND t.system_identifier = $2"
				   " AND t.database_oid = $3 FOR SHARE",
				   SPI_OK_SELECT, NULL) > 0;
}

bool
es_task_lock(EsWorkerKey key)
{
	return run_for(key, "SELECT FROM eventstore.%s t WHERE t.id = $1 FOR NO KEY UPDATE",
				   SPI_OK_SELECT, NULL) > 0;
}

bool
es_task_note_start(EsWorkerKey key)
{
	char *sql = psprintf("UPDATE eventstore.%%s SET starts = starts + 1,"
						 " failure = CASE WHEN starts >= %d THEN"
						 " 'the worker has ended %d times without any progress' END"
						 " WHERE id = $1 RETURNING (failure IS NOT NULL)::integer",
						 STARTS_MAX, STARTS_MAX);
	int32 failed = 1;

	(void) run_for(key, sql, SPI_OK_UPDATE_RETURNING, &failed);
	return failed == 0;
}

void
es_task_lives(EsWorkerKey key)
{
	(void) run_for(key,
				   "UPDATE eventstore.%s SET starts = 0 WHERE id = $1 AND starts > 0",
				   SPI_OK_UPDATE, NULL);
}

void
es_task_own(EsWorkerKey key)
{
	LOCKTAG tag;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, key.object, 0, OWNER_LOCK);
	if (es_lock_held_by_me(&tag, ExclusiveLock))
		return;
	if (LockAcquire(&tag, ExclusiveLock, true, true) == LOCKACQUIRE_NOT_AVAIL)
		ereport(ERROR, (errcode(ERRCODE_LOCK_NOT_AVAILABLE),
						errmsg("another process runs Kafka %s %u", es_task_noun(key.kind),
							   key.object)));
}

/* ---------------------------------------------------------------------------
 * Columns
 * ------------------------------------------------------------------------- */

Datum
es_task_column(const char *name, MemoryContext context)
{
	TupleDesc		  desc = SPI_tuptable->tupdesc;
	int				  number = SPI_fnumber(desc, name);
	Form_pg_attribute att = TupleDescAttr(desc, number - 1);
	MemoryContext	  old;
	bool			  isnull;
	Datum			  value = SPI_getbinval(SPI_tuptable->vals[0], desc, number, &isnull);

	if (isnull)
		return (Datum) 0;
	old = MemoryContextSwitchTo(context);
	value =
		datumCopy(att->attlen == -1 ? PointerGetDatum(PG_DETOAST_DATUM(value)) : value,
				  att->attbyval, att->attlen);
	MemoryContextSwitchTo(old);
	return value;
}

char *
es_task_text(const char *name, MemoryContext context)
{
	char *value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc,
							   SPI_fnumber(SPI_tuptable->tupdesc, name));

	return value != NULL ? MemoryContextStrdup(context, value) : NULL;
}

/* ---------------------------------------------------------------------------
 * Finding one
 * ------------------------------------------------------------------------- */

/* By a condition on t, a row of both tables; NULL where there is none. */
static EsTask *
find_task(const char *condition, Oid type, Datum value)
{
	MemoryContext context = CurrentMemoryContext;
	EsTask		 *task = NULL;
	EsRoleSwitch  saved;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(
		psprintf("SELECT t.* FROM (SELECT false AS is_sink, id, name, owner, target,"
				 " paused OR failure IS NOT NULL AS resting FROM eventstore.source"
				 " UNION ALL SELECT true, id, name, owner, collection,"
				 " paused OR failure IS NOT NULL FROM eventstore.sink) t WHERE %s",
				 condition),
		1, &type, &value, NULL, false, SPI_OK_SELECT);
	if (SPI_processed > 0)
	{
		task = MemoryContextAllocZero(context, sizeof(EsTask));
		task->key.database = MyDatabaseId;
		task->key.kind = DatumGetBool(es_task_column("is_sink", context))
							 ? ES_WORKER_SINK
							 : ES_WORKER_SOURCE;
		task->key.object = DatumGetInt32(es_task_column("id", context));
		task->name = es_task_text("name", context);
		task->owner = DatumGetObjectId(es_task_column("owner", context));
		task->collection = DatumGetObjectId(es_task_column("target", context));
		task->resting = DatumGetBool(es_task_column("resting", context));
	}
	SPI_finish();
	es_role_restore(&saved);
	return task;
}

static EsTask *
find_named(const char *name)
{
	return find_task("t.name OPERATOR(pg_catalog.=) $1", TEXTOID,
					 CStringGetTextDatum(name));
}

EsTask *
es_task_require(const NullableDatum *name)
{
	char   *given;
	EsTask *task;

	es_require_arg(name, "name");
	given = text_to_cstring(es_name_arg(name, "name"));
	task = find_named(given);
	if (task == NULL)
		ereport(ERROR, (errcode(ERRCODE_ES_NOT_A_COLLECTION),
						errmsg("there is no source or sink \"%s\"", given)));
	return task;
}

void
es_task_check_owner(const EsTask *task)
{
	if (!has_privs_of_role(GetUserId(), task->owner))
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
						errmsg("must be owner of %s \"%s\"", es_task_noun(task->key.kind),
							   task->name)));
}

bool
es_task_may_see(Oid owner, Oid collection)
{
	return has_privs_of_role(GetUserId(), owner) ||
		   (OidIsValid(collection) && es_may_see(collection) &&
			check_enable_rls(collection, InvalidOid, true) != RLS_ENABLED);
}

void
es_task_reserve_name(const char *name)
{
	EsTask *other;
	LOCKTAG tag;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId,
						 hash_bytes((const unsigned char *) name, strlen(name)), 0,
						 NAME_LOCK);
	(void) LockAcquire(&tag, ExclusiveLock, false, false);
	other = find_named(name);
	if (other != NULL)
		ereport(ERROR, (errcode(ERRCODE_DUPLICATE_OBJECT),
						errmsg("there is already a %s \"%s\"",
							   es_task_noun(other->key.kind), name)));
}

void
es_tasks_want(void)
{
	Oid	  types[2] = {INT8OID, OIDOID};
	Datum values[2] = {Int64GetDatum((int64) GetSystemIdentifier()),
					   ObjectIdGetDatum(MyDatabaseId)};

	es_owner_check();
	SPI_connect();
	es_spi_execute("SELECT t.is_sink, t.id FROM"
				   " (SELECT false AS is_sink, id, paused, failure, system_identifier,"
				   " database_oid FROM eventstore.source"
				   " UNION ALL SELECT true, id, paused, failure, system_identifier,"
				   " database_oid FROM eventstore.sink) t"
				   " WHERE NOT t.paused AND t.failure IS NULL"
				   " AND t.system_identifier OPERATOR(pg_catalog.=) $1"
				   " AND t.database_oid OPERATOR(pg_catalog.=) $2",
				   2, types, values, NULL, true, SPI_OK_SELECT);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		HeapTuple row = SPI_tuptable->vals[i];
		bool	  isnull;
		bool	  is_sink =
			DatumGetBool(SPI_getbinval(row, SPI_tuptable->tupdesc, 1, &isnull));
		int32 id = DatumGetInt32(SPI_getbinval(row, SPI_tuptable->tupdesc, 2, &isnull));

		es_worker_want((EsWorkerKey){
			MyDatabaseId, is_sink ? ES_WORKER_SINK : ES_WORKER_SOURCE, (uint32) id});
	}
	SPI_finish();
}

/* ---------------------------------------------------------------------------
 * Calling the worker when the transaction has committed
 * ------------------------------------------------------------------------- */

static void
call_at_end(XactEvent event, void *arg)
{
	ListCell *cell;

	/* Who prepares commits somewhere else: the worker is found by the next survey. */
	if (to_call == NIL || (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT &&
						   event != XACT_EVENT_PREPARE))
		return;
	if (event == XACT_EVENT_COMMIT)
		foreach (cell, to_call)
			es_worker_call(*(EsWorkerKey *) lfirst(cell), ES_WAKE_CONFIG);
	list_free_deep(to_call);
	to_call = NIL;
}

void
es_task_call_at_commit(EsWorkerKey key)
{
	static bool	  registered = false;
	MemoryContext old;
	EsWorkerKey	 *entry;

	if (!registered)
	{
		RegisterXactCallback(call_at_end, NULL);
		registered = true;
	}
	old = MemoryContextSwitchTo(TopMemoryContext);
	entry = palloc(sizeof(EsWorkerKey));
	*entry = key;
	to_call = lappend(to_call, entry);
	MemoryContextSwitchTo(old);
}

/* ---------------------------------------------------------------------------
 * pause, resume
 * ------------------------------------------------------------------------- */

static EsTask *
change(const NullableDatum *name, const char *format)
{
	EsTask *task = es_task_require(name);

	es_task_check_owner(task);
	(void) run_for(task->key, format, SPI_OK_UPDATE, NULL);
	es_task_call_at_commit(task->key);
	return task;
}

Datum
es_kafka_pause(PG_FUNCTION_ARGS)
{
	(void) change(&fcinfo->args[0],
				  "UPDATE eventstore.%s SET paused = true WHERE id = $1");
	PG_RETURN_VOID();
}

#define RESUME                                                                           \
	"UPDATE eventstore.%s SET paused = false, failure = NULL, starts = 0,"               \
	" resumes = resumes + 1, system_identifier = $2, database_oid = $3"

/* What publishes a source's changelog has no name of its own. */
static void
resume_changelog(EsWorkerKey source)
{
	EsWorkerKey key = {MyDatabaseId, ES_WORKER_SINK, source.object};
	int32		id;

	if (run_for(key, RESUME " WHERE changelog_of = $1 RETURNING id",
				SPI_OK_UPDATE_RETURNING, &id) == 0)
		return;
	key.object = (uint32) id;
	es_task_call_at_commit(key);
}

Datum
es_kafka_resume(PG_FUNCTION_ARGS)
{
	EsTask *task;

	es_require_preloaded();
	task = change(&fcinfo->args[0], RESUME " WHERE id = $1");
	if (task->key.kind == ES_WORKER_SOURCE)
		resume_changelog(task->key);
	PG_RETURN_VOID();
}

/* ---------------------------------------------------------------------------
 * flush, wait_for_source
 * ------------------------------------------------------------------------- */

/* LG008 where a source does not read on by itself: its topic, or records, are gone. */
static void
check_goes_on(const EsTask *task)
{
	static const char *const gone[] = {"gap", "topic_missing", "topic_recreated"};
	EsWorkerInfo			 worker;

	if (task->key.kind != ES_WORKER_SOURCE || !es_worker_find(task->key, &worker))
		return;
	for (int i = 0; i < lengthof(gone); i++)
		if (strcmp(worker.report.state, gone[i]) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_ES_CANNOT_GO_ON),
					 errmsg("source \"%s\" cannot go on", task->name),
					 errdetail("Its state is %s: %s.", gone[i], worker.report.message),
					 errhint("resume() accepts a gap, or a topic made anew; one that is "
							 "missing is looked for each second.")));
}

static bool
run_errand(const EsTask *task, const NullableDatum *timeout, EsErrand errand)
{
	TimestampTz deadline;
	uint64		ticket;
	bool		done;

	if (!es_task_may_see(task->owner, task->collection))
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
						errmsg("permission denied for %s \"%s\"",
							   es_task_noun(task->key.kind), task->name)));
	deadline = es_wait_deadline(timeout, "timeout");
	if (task->resting)
		return false;
	done = es_errand_ask(task->key, errand, &ticket) &&
		   es_errand_wait(task->key, errand, ticket, deadline);
	if (!done)
		check_goes_on(task);
	return done;
}

Datum
es_kafka_flush(PG_FUNCTION_ARGS)
{
	es_require_preloaded();
	PG_RETURN_BOOL(
		run_errand(es_task_require(&fcinfo->args[0]), &fcinfo->args[1], ES_ERRAND_FLUSH));
}

Datum
es_wait_for_source(PG_FUNCTION_ARGS)
{
	EsTask *task;

	es_require_preloaded();
	task = es_task_require(&fcinfo->args[0]);
	if (task->key.kind != ES_WORKER_SOURCE)
		ereport(ERROR,
				(errcode(ERRCODE_ES_NOT_A_COLLECTION),
				 errmsg("\"%s\" is a sink, not a source", task->name),
				 errhint("flush() waits until a sink has published what there is.")));
	PG_RETURN_BOOL(run_errand(task, &fcinfo->args[1], ES_ERRAND_CATCH_UP));
}

/* ---------------------------------------------------------------------------
 * What the workers say
 * ------------------------------------------------------------------------- */

#define WORKER_COLUMNS 10

static void
put_worker(FunctionCallInfo fcinfo, const EsWorkerInfo *info)
{
	static const EsWorkerStat stats[] = {ES_WORKER_RECORDS, ES_WORKER_BATCHES,
										 ES_WORKER_PARKED, ES_WORKER_SKIPPED};
	ReturnSetInfo			 *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	const EsWorkerReport	 *report = &info->report;
	Datum					  values[WORKER_COLUMNS];
	bool					  nulls[WORKER_COLUMNS] = {false};

	values[0] = Int32GetDatum((int32) info->key.object);
	nulls[1] = info->pid == 0;
	values[1] = Int32GetDatum(info->pid);
	values[2] = CStringGetTextDatum(es_worker_state_name(info->state));
	values[3] = CStringGetTextDatum(report->state);
	nulls[4] = report->since == 0;
	values[4] = TimestampTzGetDatum(report->since);
	values[5] = CStringGetTextDatum(report->message);
	for (int i = 0; i < lengthof(stats); i++)
		values[6 + i] = Int64GetDatum((int64) info->stats[stats[i]]);
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/* A message may hold a record's key, so only those see it who may see its source. */
Datum
es_kafka_workers(PG_FUNCTION_ARGS)
{
	EsWorkerInfo *workers;
	EsWorkerKind  kind;
	int			  n;

	es_require_arg(&fcinfo->args[0], "kind");
	kind = strcmp(TextDatumGetCString(PG_GETARG_DATUM(0)), "sink") == 0
			   ? ES_WORKER_SINK
			   : ES_WORKER_SOURCE;
	InitMaterializedSRF(fcinfo, 0);
	if (!es_preloaded())
		PG_RETURN_NULL();
	n = es_worker_list(&workers);
	for (int i = 0; i < n; i++)
	{
		EsTask *task;

		if (workers[i].key.database != MyDatabaseId || workers[i].key.kind != kind)
			continue;
		task = find_task("t.id OPERATOR(pg_catalog.=) $1", INT4OID,
						 Int32GetDatum((int32) workers[i].key.object));
		if (task != NULL && es_task_may_see(task->owner, task->collection))
			put_worker(fcinfo, &workers[i]);
	}
	PG_RETURN_NULL();
}
