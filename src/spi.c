/*
 * spi.c
 *		SPI and role switching in one place.
 *
 * Code that acts for somebody else does so as that role, in a
 * security-restricted operation and with a search_path that finds nothing of
 * the user's: a function of his that we come to call (a trigger, a default, an
 * index expression) can then neither keep the role nor leave something behind
 * that runs later, when the role is back.
 */
#include "postgres.h"

#include "spi.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/stratnum.h"
#include "access/table.h"
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_namespace.h"
#include "commands/extension.h"
#include "compat.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#define EXTENSION_NAME "eventstore"

static Oid	  schema_known = InvalidOid;
static uint32 schema_changes = 0; /* of any namespace */

void
es_role_assume(Oid role, EsRoleSwitch *saved)
{
	GetUserIdAndSecContext(&saved->user, &saved->context);
	saved->guc_level = NewGUCNestLevel();
	SetUserIdAndSecContext(role, saved->context | SECURITY_LOCAL_USERID_CHANGE |
									 SECURITY_RESTRICTED_OPERATION);
	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
}

void
es_role_restore(const EsRoleSwitch *saved)
{
	AtEOXact_GUC(false, saved->guc_level);
	SetUserIdAndSecContext(saved->user, saved->context);
}

static Oid
namespace_owner(Oid schema)
{
	HeapTuple tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(schema));
	Oid		  owner;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for schema %u", schema);
	owner = ((Form_pg_namespace) GETSTRUCT(tuple))->nspowner;
	ReleaseSysCache(tuple);
	return owner;
}

Oid
es_extension_owner(void)
{
	return namespace_owner(get_namespace_oid(EXTENSION_NAME, false));
}

/* A schema of that name without the extension is somebody else's. */
Oid
es_extension_schema(void)
{
	if (!OidIsValid(get_extension_oid(EXTENSION_NAME, true)))
		return InvalidOid;
	return get_namespace_oid(EXTENSION_NAME, true);
}

/* ConditionalLockDatabaseObject, which not every minor version has, and its like. */
static bool
lock_extension(Oid extension, LOCKMODE mode, bool wait)
{
	LOCKTAG tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, ExtensionRelationId, extension, 0);
	if (LockAcquire(&tag, mode, false, !wait) == LOCKACQUIRE_NOT_AVAIL)
		return false;
	AcceptInvalidationMessages();
	return true;
}

bool
es_extension_pin(void)
{
	Oid extension = get_extension_oid(EXTENSION_NAME, true);

	if (!OidIsValid(extension))
		return false;
	/* DROP EXTENSION takes this lock before anything else. */
	return lock_extension(extension, AccessShareLock, false) &&
		   get_extension_oid(EXTENSION_NAME, true) == extension;
}

void
es_extension_share(void)
{
	Oid extension = get_extension_oid(EXTENSION_NAME, true);

	if (OidIsValid(extension))
		(void) lock_extension(extension, AccessShareLock, true);
}

void
es_extension_lock(const char *name)
{
	Oid extension = get_extension_oid(EXTENSION_NAME, true);

	if (strcmp(name, EXTENSION_NAME) == 0 && OidIsValid(extension) &&
		es_owns_extension(extension, GetUserId()) && !RecoveryInProgress())
		(void) lock_extension(extension, AccessExclusiveLock, true);
}

/* A namespace has changed. */
static void
doubt_schema(Datum arg, int cacheid, uint32 hash)
{
	schema_known = InvalidOid;
	schema_changes++;
}

/* es_extension_schema, remembered: an extension's schema stays for as long as it does. */
static Oid
known_schema(void)
{
	static bool registered = false;

	if (!registered)
	{
		CacheRegisterSyscacheCallback(NAMESPACEOID, doubt_schema, (Datum) 0);
		registered = true;
	}
	while (!OidIsValid(schema_known))
	{
		uint32 before = schema_changes;
		Oid	   schema = es_extension_schema();

		if (!OidIsValid(schema))
			break;
		/* Nothing changed while we looked. */
		if (before == schema_changes)
			schema_known = schema;
	}
	return schema_known;
}

Oid
es_extension_relation(const char *name)
{
	/* What a user has put there instead need not even have the columns that we read. */
	Oid schema = known_schema();
	Oid relid = OidIsValid(schema) ? get_relname_relid(name, schema) : InvalidOid;

	if (!OidIsValid(relid))
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("relation \"%s.%s\" does not exist", EXTENSION_NAME, name),
						errhint("Use CREATE EXTENSION eventstore.")));
	return relid;
}

static void
read_fields(HeapTuple tuple, TupleDesc desc, int natts, Datum *values, bool *nulls)
{
	for (int i = 0; i < natts; i++)
	{
		nulls[i] = true;
		if (i < desc->natts)
			values[i] = heap_getattr(tuple, i + 1, desc, &nulls[i]);
	}
}

HeapTuple
es_extension_row(const char *table, const char *index, AttrNumber column, Oid key,
				 int natts, Datum *values, bool *nulls)
{
	Relation	rel = table_open(es_extension_relation(table), AccessShareLock);
	Oid			indexid = index == NULL ? es_primary_key(rel)
										: get_relname_relid(index, RelationGetNamespace(rel));
	ScanKeyData scankey;
	SysScanDesc scan;
	HeapTuple	tuple;

	ScanKeyInit(&scankey, column, BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(key));
	scan = systable_beginscan(rel, indexid, OidIsValid(indexid), NULL, 1, &scankey);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		tuple = heap_copytuple(tuple);
		read_fields(tuple, RelationGetDescr(rel), natts, values, nulls);
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return tuple;
}

static void
check_result(const char *sql, int result, int expected)
{
	if (result != expected)
		elog(ERROR, "unexpected result of \"%s\": %s", sql,
			 SPI_result_code_string(result));
}

void
es_spi_execute(const char *sql, int nargs, Oid *types, Datum *values, const char *nulls,
			   bool read_only, int expected)
{
	check_result(sql,
				 SPI_execute_with_args(sql, nargs, types, values, nulls, read_only, 0),
				 expected);
}

void
es_spi_execute_now(const char *sql, int expected)
{
	SPIPlanPtr plan = SPI_prepare(sql, 0, NULL);

	if (plan == NULL)
		check_result(sql, SPI_result, expected);
	check_result(sql,
				 SPI_execute_snapshot(plan, NULL, NULL, GetLatestSnapshot(),
									  InvalidSnapshot, false, true, 0),
				 expected);
}

uint64
es_spi_execute_as_owner(const char *sql, int nargs, Oid *types, Datum *values,
						const char *nulls, int expected)
{
	EsRoleSwitch saved;
	uint64		 rows;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, nargs, types, values, nulls, false, expected);
	rows = SPI_processed;
	SPI_finish();
	es_role_restore(&saved);
	return rows;
}

Datum
es_spi_array(Datum *elements, bool *nulls, int n, Oid type)
{
	int	  dims[1] = {n};
	int	  lower[1] = {1};
	int16 length;
	bool  by_value;
	char  align;

	get_typlenbyvalalign(type, &length, &by_value, &align);
	return PointerGetDatum(construct_md_array(elements, nulls, 1, dims, lower, type,
											  length, by_value, align));
}

char *
es_relation_name(Oid relid)
{
	char *name = get_rel_name(relid);

	if (name == NULL)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("relation with OID %u does not exist", relid)));
	return quote_qualified_identifier(get_namespace_name(get_rel_namespace(relid)), name);
}

Oid
es_relation_owner(Oid relid)
{
	HeapTuple tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	Oid		  owner;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for relation %u", relid);
	owner = ((Form_pg_class) GETSTRUCT(tuple))->relowner;
	ReleaseSysCache(tuple);
	return owner;
}
