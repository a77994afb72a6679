/*
 * stats/monitor.c
 *		What an operator looks at: counters, holders, workers, and the doctor.
 *
 * Counters are those of shared memory (position/head.h, worker/launcher.h):
 * since the server's start, and gone with it.  Nothing here changes anything.
 * Each function shows a caller only collections that he may SELECT from or
 * owns; the catalog itself is read as the extension's owner.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/xlog.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/inventory.h"
#include "collection/layout.h"
#include "collection/segment.h"
#include "commands/dbcommands.h"
#include "commands/trigger.h"
#include "compat.h"
#include "fmgr.h"
#include "funcapi.h"
#include "guc.h"
#include "miscadmin.h"
#include "position/head.h"
#include "position/position.h"
#include "position/watch.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "store/change.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/timestamp.h"
#include "worker/launcher.h"
#include "worker/listeners.h"
#include "worker/wake.h"

PG_FUNCTION_INFO_V1(es_stat_collections);
PG_FUNCTION_INFO_V1(es_stat_workers);
PG_FUNCTION_INFO_V1(es_stat_holders);
PG_FUNCTION_INFO_V1(es_doctor);

/* A row of the catalog that the caller may see. */
typedef struct Listed
{
	Oid		   collection;
	EsHeadRef  head;
	EsLayout   layout;
	EsPosition first_position;
} Listed;

/* In the caller's memory context, by name. */
static int
list_collections(Listed **list)
{
	MemoryContext caller = CurrentMemoryContext;
	EsRoleSwitch  saved;
	int			  n;
	int			  shown = 0;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(
		"SELECT c.collection::pg_catalog.oid, c.incarnation, c.heads::pg_catalog.oid,"
		" c.counter::pg_catalog.oid, c.first_position"
		" FROM eventstore.collection_catalog c ORDER BY c.collection::pg_catalog.text",
		0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	es_role_restore(&saved);

	n = (int) SPI_processed;
	*list = MemoryContextAllocZero(caller, sizeof(Listed) * (n + 1));
	for (int i = 0; i < n; i++)
	{
		HeapTuple row = SPI_tuptable->vals[i];
		TupleDesc desc = SPI_tuptable->tupdesc;
		Listed	 *entry = &(*list)[shown];
		bool	  isnull;

		entry->collection = DatumGetObjectId(SPI_getbinval(row, desc, 1, &isnull));
		if (!es_may_see(entry->collection))
			continue;
		entry->head.relid = entry->collection;
		entry->head.incarnation = DatumGetInt64(SPI_getbinval(row, desc, 2, &isnull));
		entry->layout.heads = DatumGetObjectId(SPI_getbinval(row, desc, 3, &isnull));
		entry->layout.counter = DatumGetObjectId(SPI_getbinval(row, desc, 4, &isnull));
		entry->first_position = DatumGetInt64(SPI_getbinval(row, desc, 5, &isnull));
		shown++;
	}
	SPI_finish();
	return shown;
}

static void
put_row(FunctionCallInfo fcinfo, Datum *values, bool *nulls)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/* ---------------------------------------------------------------------------
 * Counters
 * ------------------------------------------------------------------------- */

#define STAT_COLUMNS (1 + ES_STAT_COUNT + 3)

/* How many open transactions have positions in the collection. */
static int64
count_holders(const EsHolder *holders, int nholders, Oid collection)
{
	int64 n = 0;

	for (int i = 0; i < nholders; i++)
		if (holders[i].relid == collection)
			n++;
	return n;
}

Datum
es_stat_collections(PG_FUNCTION_ARGS)
{
	Listed	 *list;
	EsHolder *holders = NULL;
	int		  nholders = 0;
	int		  n;

	InitMaterializedSRF(fcinfo, 0);
	n = list_collections(&list);
	if (es_preloaded())
		nholders = es_head_holders(&holders);
	for (int i = 0; i < n; i++)
	{
		EsHeadRef *ref = &list[i].head;
		bool	   known = es_preloaded() && es_head_find(ref);
		Datum	   values[STAT_COLUMNS] = {0};
		bool	   nulls[STAT_COLUMNS] = {false};
		int		   column = 0;

		values[column++] = ObjectIdGetDatum(list[i].collection);
		for (int stat = 0; stat < ES_STAT_COUNT; stat++)
			values[column++] = Int64GetDatum(known ? (int64) es_head_stat(ref, stat) : 0);
		nulls[column] = nulls[column + 1] = !known;
		if (known)
		{
			values[column] = Int64GetDatum(es_head_read(ref, true));
			values[column + 1] = Int64GetDatum(es_head_last_allotted(ref));
		}
		values[column + 2] =
			Int64GetDatum(count_holders(holders, nholders, list[i].collection));
		put_row(fcinfo, values, nulls);
	}
	PG_RETURN_NULL();
}

Datum
es_stat_holders(PG_FUNCTION_ARGS)
{
	EsHolder *holders;
	int		  n = 0;

	InitMaterializedSRF(fcinfo, 0);
	if (es_preloaded())
		n = es_head_holders(&holders);
	for (int i = 0; i < n; i++)
	{
		Datum values[4] = {
			ObjectIdGetDatum(holders[i].relid), Int32GetDatum(holders[i].pid),
			TimestampTzGetDatum(holders[i].since), Int64GetDatum(holders[i].first)};
		bool nulls[4] = {false, false, false, false};

		if (es_may_see(holders[i].relid))
			put_row(fcinfo, values, nulls);
	}
	PG_RETURN_NULL();
}

#define WORKER_COLUMNS (6 + ES_WORKER_STAT_COUNT)

static void
put_worker(FunctionCallInfo fcinfo, const char *kind, const EsWorkerInfo *info)
{
	Datum values[WORKER_COLUMNS] = {0};
	bool  nulls[WORKER_COLUMNS] = {false};
	char *database = get_database_name(info->key.database);

	values[0] = CStringGetTextDatum(kind);
	nulls[1] = database == NULL;
	if (database != NULL)
		values[1] = DirectFunctionCall1(namein, CStringGetDatum(database));
	nulls[2] = info->pid == 0;
	values[2] = Int32GetDatum(info->pid);
	values[3] = CStringGetTextDatum(es_worker_state_name(info->state));
	nulls[4] = info->since == 0;
	values[4] = TimestampTzGetDatum(info->since);
	values[5] = Int32GetDatum(info->failures);
	for (int i = 0; i < ES_WORKER_STAT_COUNT; i++)
		values[6 + i] = Int64GetDatum((int64) info->stats[i]);
	put_row(fcinfo, values, nulls);
}

Datum
es_stat_workers(PG_FUNCTION_ARGS)
{
	EsWorkerInfo *workers;
	EsWorkerInfo  launcher = {0};
	int			  n;

	InitMaterializedSRF(fcinfo, 0);
	if (!es_preloaded())
		PG_RETURN_NULL();
	launcher.pid = es_wake_launcher_pid();
	launcher.state = launcher.pid != 0 ? ES_WORKER_RUNNING : ES_WORKER_NONE;
	put_worker(fcinfo, "launcher", &launcher);
	n = es_worker_list(&workers);
	for (int i = 0; i < n; i++)
		put_worker(fcinfo, es_worker_kind_name(workers[i].key.kind), &workers[i]);
	PG_RETURN_NULL();
}

/* ---------------------------------------------------------------------------
 * The doctor
 * ------------------------------------------------------------------------- */

static void
diagnose(FunctionCallInfo fcinfo, const char *item, bool ok, const char *advice)
{
	Datum values[3] = {CStringGetTextDatum(item), BoolGetDatum(ok), (Datum) 0};
	bool  nulls[3] = {false, false, ok};

	if (!ok)
		values[2] = CStringGetTextDatum(advice);
	put_row(fcinfo, values, nulls);
}

static void
diagnose_server(FunctionCallInfo fcinfo)
{
	diagnose(fcinfo, "library preloaded", es_preloaded(),
			 "Add shared_preload_libraries = 'eventstore' to postgresql.conf and restart "
			 "the server. Until then nothing can be appended.");

	/* A standby has neither: its primary does the work. */
	if (!es_preloaded() || RecoveryInProgress())
		return;
	diagnose(fcinfo, "launcher running", es_wake_launcher_pid() != 0,
			 "It is started with the server and restarted after a failure: see the "
			 "server log.");
	diagnose(fcinfo, "worker of this database running", es_wake_worker_pid() != 0,
			 "Without it no segments are made and none are dropped: see "
			 "pg_stat_eventstore_workers and the server log.");
	diagnose(fcinfo, "notifier running where it is needed",
			 es_wake_notifier_runs() ||
				 (es_watch_count() == 0 && es_listeners_in_database() == 0),
			 "Sessions wait or listen. Without it waits end up to 10 ms late and nothing "
			 "is sent: see pg_stat_eventstore_workers and the server log.");
	diagnose(fcinfo, "room in the queue of notifications",
			 DatumGetFloat8(DirectFunctionCall1(pg_notification_queue_usage, (Datum) 0)) <
				 0.5,
			 "A session that listens has not read for long: look in pg_stat_activity for "
			 "one in an open transaction. When the queue is full nothing more is sent; "
			 "appends go on.");
	diagnose(fcinfo, "worker slots free", !es_wake_slots_exhausted(),
			 "Increase max_worker_processes and restart the server.");
}

static void
diagnose_collection(FunctionCallInfo fcinfo, const char *name, const char *what, bool ok,
					const char *advice)
{
	diagnose(fcinfo, psprintf("collection %s: %s", name, what), ok, advice);
}

static bool
has_triggers(Oid collection, const EsSegment *segments, int n)
{
	bool all = OidIsValid(get_trigger_oid(collection, ES_APPEND_TRIGGER, true)) &&
			   OidIsValid(get_trigger_oid(collection, ES_GUARD_TRIGGER, true));

	for (int i = 0; i < n && all; i++)
		all = OidIsValid(get_trigger_oid(segments[i].relid, ES_APPEND_TRIGGER, true)) &&
			  OidIsValid(get_trigger_oid(segments[i].relid, ES_GUARD_TRIGGER, true));
	return all;
}

/* The highest position in the table, as its owner sees it. */
static EsPosition
highest_position(Oid collection)
{
	EsRoleSwitch saved;
	EsPosition	 highest;
	bool		 isnull;

	es_role_assume(es_relation_owner(collection), &saved);
	SPI_connect();
	es_spi_execute(psprintf("SELECT pg_catalog.max(\"position\") FROM %s",
							es_relation_name(collection)),
				   0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	highest = DatumGetInt64(
		SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	if (isnull)
		highest = 0;
	SPI_finish();
	es_role_restore(&saved);
	return highest;
}

/* Positions from the first kept on that no segment holds; 0 for none. */
static EsPosition
find_hole(const Listed *entry, const EsSegment *segments, int n)
{
	EsPosition expected = entry->first_position;

	for (int i = 0; i < n; i++)
	{
		if (segments[i].end <= entry->first_position)
			continue;
		if (segments[i].first > expected)
			return expected;
		expected = segments[i].end;
	}
	return 0;
}

static bool
has_pending_detach(Oid collection)
{
	List *all = find_inheritance_children_extended(collection, false, NoLock, NULL, NULL);
	ListCell *cell;

	foreach (cell, all)
		if (PartitionHasPendingDetach(lfirst_oid(cell)))
			return true;
	return false;
}

static void
diagnose_segments(FunctionCallInfo fcinfo, const Listed *entry, const char *name,
				  const EsSegment *segments, int n)
{
	EsPosition hole = find_hole(entry, segments, n);
	Oid		   owner = es_relation_owner(entry->collection);
	Oid		   schema = get_rel_namespace(entry->collection);

	diagnose_collection(
		fcinfo, name, "segments without a gap", hole == 0,
		psprintf("No segment holds position " INT64_FORMAT
				 ". Attach it again with ALTER TABLE ... ATTACH PARTITION, or give up "
				 "what it held with eventstore.truncate_before().",
				 hole));
	diagnose_collection(
		fcinfo, name, "no segment waits to be dropped",
		!has_pending_detach(entry->collection),
		"A transaction that used the collection before is still open: see "
		"pg_stat_activity and pg_locks. The worker goes on when it ends.");
	diagnose_collection(fcinfo, name, "owner may create segments",
						es_schema_aclcheck(schema, owner, ACL_CREATE) == ACLCHECK_OK &&
							es_schema_aclcheck(schema, owner, ACL_USAGE) == ACLCHECK_OK,
						psprintf("GRANT CREATE, USAGE ON SCHEMA %s TO %s;",
								 quote_identifier(get_namespace_name(schema)),
								 quote_identifier(GetUserNameFromId(owner, false))));
	if (es_preloaded() && !RecoveryInProgress())
	{
		EsHeadRef ref = entry->head;
		bool	  ready = n > 0;

		if (es_head_find(&ref))
			ready = es_head_ready_end(&ref) > es_head_last_allotted(&ref) + 1 &&
					es_head_wanted_end(&ref) == 0;
		diagnose_collection(
			fcinfo, name, "segments ready ahead", ready,
			"The worker has not made one in time: see pg_stat_eventstore_workers and the "
			"server log. A greater segment_size or eventstore.segments_ahead gives it "
			"more time.");
	}
}

static void
diagnose_one(FunctionCallInfo fcinfo, const Listed *entry)
{
	const char *name = es_relation_name(entry->collection);
	const char *repair =
		psprintf("SELECT eventstore.repair_collection(%s);", quote_literal_cstr(name));
	EsSegment *segments;
	int		   n = es_segments_list(entry->collection, &segments);
	bool	   whole = get_rel_relkind(entry->layout.heads) == RELKIND_RELATION &&
				 get_rel_relkind(entry->layout.counter) == RELKIND_SEQUENCE;

	diagnose_collection(fcinfo, name, "heads table and counter", whole, repair);
	diagnose_collection(fcinfo, name, "triggers",
						has_triggers(entry->collection, segments, n), repair);
	if (whole)
		diagnose_collection(fcinfo, name, "counter ahead of the events",
							es_reservation_read(entry->layout.counter).reserved >=
								highest_position(entry->collection),
							repair);
	diagnose_segments(fcinfo, entry, name, segments, n);
}

static void
diagnose_store(FunctionCallInfo fcinfo, Oid relid, bool changelog)
{
	Relation rel = table_open(relid, NoLock);
	bool	 others;

	diagnose(fcinfo, psprintf("store %s: triggers", es_relation_name(relid)),
			 es_store_has_triggers(rel, changelog, &others),
			 "Some are disabled or gone: changes are not recorded, or not refused. ALTER "
			 "TABLE ... ENABLE TRIGGER brings back one that is disabled; "
			 "eventstore.verify() finds what was missed.");
	table_close(rel, NoLock);
}

static void
diagnose_stores(FunctionCallInfo fcinfo)
{
	EsRoleSwitch   saved;
	SPITupleTable *stores;
	uint64		   n;

	SPI_connect();
	es_role_assume(es_extension_owner(), &saved);
	es_spi_execute("SELECT s.store::pg_catalog.oid, s.changelog IS NOT NULL"
				   " FROM eventstore.store_catalog s ORDER BY s.store::pg_catalog.text",
				   0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	es_role_restore(&saved);
	stores = SPI_tuptable;
	n = SPI_processed;
	for (uint64 i = 0; i < n; i++)
	{
		bool isnull;
		Oid	 relid =
			DatumGetObjectId(SPI_getbinval(stores->vals[i], stores->tupdesc, 1, &isnull));
		bool changelog =
			DatumGetBool(SPI_getbinval(stores->vals[i], stores->tupdesc, 2, &isnull));

		LockRelationOid(relid, AccessShareLock);
		if (es_may_see(relid) && get_rel_relkind(relid) == RELKIND_RELATION)
			diagnose_store(fcinfo, relid, changelog);
	}
	SPI_finish();
}

/* Of the sources that the caller sees: has the changelog topic another writer? */
static void
diagnose_changelog_topics(FunctionCallInfo fcinfo)
{
	SPITupleTable *sources;
	uint64		   n;

	SPI_connect();
	es_spi_execute("SELECT name, changelog_message FROM eventstore.sources"
				   " WHERE changelog_state = 'running' ORDER BY name",
				   0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	sources = SPI_tuptable;
	n = SPI_processed;
	for (uint64 i = 0; i < n; i++)
	{
		char *name = SPI_getvalue(sources->vals[i], sources->tupdesc, 1);
		char *message = SPI_getvalue(sources->vals[i], sources->tupdesc, 2);

		diagnose(
			fcinfo, psprintf("source %s: changelog topic without another writer", name),
			message == NULL,
			message == NULL
				? ""
				: psprintf("%s. Let each partition be read, and its keys changed, on one "
						   "server only; eventstore.resume() forgets the warning.",
						   message));
	}
	SPI_finish();
}

Datum
es_doctor(PG_FUNCTION_ARGS)
{
	Listed *list;
	int		n;

	InitMaterializedSRF(fcinfo, 0);
	diagnose_server(fcinfo);
	n = list_collections(&list);
	for (int i = 0; i < n; i++)
	{
		/* While we look nothing is detached; it may have been dropped before. */
		LockRelationOid(list[i].collection, AccessShareLock);
		if (get_rel_relkind(list[i].collection) == RELKIND_PARTITIONED_TABLE)
			diagnose_one(fcinfo, &list[i]);
	}
	diagnose_stores(fcinfo);
	if (es_preloaded())
		diagnose_changelog_topics(fcinfo);
	PG_RETURN_NULL();
}
