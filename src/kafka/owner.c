/*
 * kafka/owner.c
 *		The roles that own sources and sinks.
 *
 * A role that owns a source or sink cannot be dropped, and REASSIGN OWNED and
 * DROP OWNED do with these what they do with tables.
 *
 * PostgreSQL asks pg_shdepend whether a role is needed, also from other
 * databases, and takes objects of its own catalogs only.  So it is told that the
 * role has a privilege on column "owner" of the view that lists what it owns:
 * one that names the place to look at, and that means nothing else.  A trigger of
 * either table compares what it was told with what the tables say.
 *
 * REASSIGN OWNED and DROP OWNED know nothing of rows; a hook on utility
 * statements sees to them.  Before DROP OWNED, which would take that privilege
 * away, and find that there is none; after REASSIGN OWNED, which has checked who
 * may do that by then.
 *
 * Locks: the row of each source and sink, for which its worker's batch is waited
 * for; then the lock of this file (one transaction at a time compares), to the
 * end of the transaction.  A crash: the catalog and the tables are written in one
 * transaction.
 */
#include "postgres.h"

#include "kafka/owner.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/dependency.h"
#include "catalog/indexing.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_class.h"
#include "catalog/pg_shdepend.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "commands/user.h"
#include "fmgr.h"
#include "kafka/sink.h"
#include "kafka/source.h"
#include "kafka/task.h"
#include "miscadmin.h"
#include "spi.h"
#include "storage/lock.h"
#include "utility.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(es_note_owners);

/* task.c has the others of this kind. */
#define OWNERS_LOCK 0xE8

/* The tables, and the view in which their owners are to be seen. */
static const struct
{
	EsWorkerKind kind;
	const char	*view;
} kinds[] = {{ES_WORKER_SOURCE, "sources"}, {ES_WORKER_SINK, "sinks"}};

static ProcessUtility_hook_type previous_utility = NULL;

/* ---------------------------------------------------------------------------
 * What PostgreSQL is told
 * ------------------------------------------------------------------------- */

/* Which roles own some, in the order of their OIDs; those that are gone cannot be told. */
static int
list_owners(EsWorkerKind kind, Oid **owners)
{
	MemoryContext context = CurrentMemoryContext;
	EsRoleSwitch  saved;
	int			  n;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(psprintf("SELECT DISTINCT s.owner::oid FROM eventstore.%s s"
							" JOIN pg_roles r ON r.oid = s.owner::oid ORDER BY 1",
							es_task_noun(kind)),
				   0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	n = (int) SPI_processed;
	*owners = MemoryContextAlloc(context, sizeof(Oid) * Max(n, 1));
	for (int i = 0; i < n; i++)
	{
		bool isnull;

		(*owners)[i] = DatumGetObjectId(
			SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull));
	}
	SPI_finish();
	es_role_restore(&saved);
	return n;
}

/* Which ones it was told of, likewise. */
static int
list_told(Oid view, AttrNumber column, Oid **told)
{
	Relation	rel = table_open(SharedDependRelationId, AccessShareLock);
	ScanKeyData keys[4];
	SysScanDesc scan;
	HeapTuple	tuple;
	List	   *roles = NIL;
	ListCell   *cell;
	int			n = 0;

	ScanKeyInit(&keys[0], Anum_pg_shdepend_dbid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(MyDatabaseId));
	ScanKeyInit(&keys[1], Anum_pg_shdepend_classid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(RelationRelationId));
	ScanKeyInit(&keys[2], Anum_pg_shdepend_objid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(view));
	ScanKeyInit(&keys[3], Anum_pg_shdepend_objsubid, BTEqualStrategyNumber, F_INT4EQ,
				Int32GetDatum(column));
	scan = systable_beginscan(rel, SharedDependDependerIndexId, true, NULL,
							  lengthof(keys), keys);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_shdepend row = (Form_pg_shdepend) GETSTRUCT(tuple);

		if (row->refclassid == AuthIdRelationId && row->deptype == SHARED_DEPENDENCY_ACL)
			roles = list_append_unique_oid(roles, row->refobjid);
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);

	list_sort(roles, list_oid_cmp);
	*told = palloc(sizeof(Oid) * Max(list_length(roles), 1));
	foreach (cell, roles)
		(*told)[n++] = lfirst_oid(cell);
	return n;
}

/* Tells it of those that it does not know, and of those that own none any more. */
static void
tell_owners(EsWorkerKind kind, const char *name)
{
	Oid		   view = es_extension_relation(name);
	AttrNumber column = get_attnum(view, "owner");
	Oid		  *told;
	Oid		  *owners;
	int		   ntold = list_told(view, column, &told);
	int		   nowners = list_owners(kind, &owners);

	/* It frees both. */
	updateAclDependencies(RelationRelationId, view, column, es_relation_owner(view),
						  ntold, told, nowners, owners);
}

/* False where another transaction is at it, and is not to be waited for. */
static bool
compare_owners(bool wait)
{
	LOCKTAG tag;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, 0, 0, OWNERS_LOCK);
	if (LockAcquire(&tag, ExclusiveLock, false, !wait) == LOCKACQUIRE_NOT_AVAIL)
		return false;
	/* What this transaction has done, and what others did before we had the lock. */
	CommandCounterIncrement();
	PushActiveSnapshot(GetLatestSnapshot());
	for (int i = 0; i < lengthof(kinds); i++)
		tell_owners(kinds[i].kind, kinds[i].view);
	PopActiveSnapshot();
	return true;
}

/* Statement trigger of both tables; on another it would let anybody hold the lock. */
Datum
es_note_owners(PG_FUNCTION_ARGS)
{
	Oid relid = InvalidOid;

	if (CALLED_AS_TRIGGER(fcinfo))
		relid = RelationGetRelid(((TriggerData *) fcinfo->context)->tg_relation);
	if (relid != es_extension_relation("source") &&
		relid != es_extension_relation("sink"))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("function \"%s\" was not called as the trigger that it is",
							   "eventstore.note_owners")));
	(void) compare_owners(true);
	return PointerGetDatum(NULL);
}

void
es_owner_check(void)
{
	static bool done = false;

	if (!done && !RecoveryInProgress())
		done = compare_owners(false);
}

/* ---------------------------------------------------------------------------
 * REASSIGN OWNED, DROP OWNED
 * ------------------------------------------------------------------------- */

static Datum
role_array(List *roles)
{
	Datum	 *oids = palloc(sizeof(Datum) * list_length(roles));
	ListCell *cell;
	int		  n = 0;

	foreach (cell, roles)
		oids[n++] = ObjectIdGetDatum(lfirst_oid(cell));
	return es_spi_array(oids, NULL, n, OIDOID);
}

/* The ids, of EsWorkerKey *, that a statement about those of some roles ($1) returns. */
static List *
run_for_owned(EsWorkerKind kind, const char *format, List *roles, Oid to, int expected)
{
	MemoryContext context = CurrentMemoryContext;
	Oid			  types[2] = {OIDARRAYOID, REGROLEOID};
	Datum		  values[2] = {role_array(roles), ObjectIdGetDatum(to)};
	EsRoleSwitch  saved;
	List		 *keys = NIL;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(psprintf(format, es_task_noun(kind)), 2, types, values, NULL, false,
				   expected);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		MemoryContext old = MemoryContextSwitchTo(context);
		EsWorkerKey	 *key = palloc(sizeof(EsWorkerKey));
		bool		  isnull;

		*key =
			(EsWorkerKey){MyDatabaseId, kind,
						  DatumGetInt32(SPI_getbinval(
							  SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull))};
		keys = lappend(keys, key);
		MemoryContextSwitchTo(old);
	}
	SPI_finish();
	es_role_restore(&saved);
	return keys;
}

static void
reassign(const ReassignOwnedStmt *stmt)
{
	List	 *roles = roleSpecsToIds(stmt->roles);
	Oid		  to = get_rolespec_oid(stmt->newrole, false);
	ListCell *cell;

	for (int i = 0; i < lengthof(kinds); i++)
	{
		List *keys = run_for_owned(kinds[i].kind,
								   "UPDATE eventstore.%s SET owner = $2"
								   " WHERE owner::oid = ANY ($1) RETURNING id",
								   roles, to, SPI_OK_UPDATE_RETURNING);

		foreach (cell, keys)
			es_task_call_at_commit(*(EsWorkerKey *) lfirst(cell));
	}
}

static void
drop_owned(const DropOwnedStmt *stmt)
{
	List	 *roles = roleSpecsToIds(stmt->roles);
	ListCell *cell;

	/* The statement itself says so to who may not do that. */
	foreach (cell, roles)
		if (!has_privs_of_role(GetUserId(), lfirst_oid(cell)))
			return;
	for (int i = 0; i < lengthof(kinds); i++)
	{
		List *keys =
			run_for_owned(kinds[i].kind,
						  "SELECT id FROM eventstore.%s WHERE owner::oid = ANY ($1)"
						  " FOR UPDATE",
						  roles, InvalidOid, SPI_OK_SELECT);

		foreach (cell, keys)
		{
			EsWorkerKey *key = lfirst(cell);

			if (key->kind == ES_WORKER_SOURCE)
				es_source_drop_internal(key->object);
			else
				es_sink_drop_internal(key->object);
		}
	}
}

static void
see_to_owned(ES_UTILITY_PARAMETERS)
{
	Node *stmt = pstmt->utilityStmt;
	bool  ours = (IsA(stmt, DropOwnedStmt) || IsA(stmt, ReassignOwnedStmt)) &&
				!XactReadOnly && OidIsValid(es_extension_schema());

	if (ours && IsA(stmt, DropOwnedStmt))
		drop_owned((DropOwnedStmt *) stmt);
	es_next_utility(previous_utility, ES_UTILITY_ARGUMENTS);
	if (ours && IsA(stmt, ReassignOwnedStmt))
		reassign((ReassignOwnedStmt *) stmt);
}

void
es_owner_install(void)
{
	if (IsBinaryUpgrade)
		return;
	previous_utility = ProcessUtility_hook;
	ProcessUtility_hook = see_to_owned;
}
