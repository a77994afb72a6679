/*
 * store/verify.c
 *		verify: a collection, and a store beside its changelog.
 *
 * A changelog is verified as any collection is (feed/verify.c).  Then each row
 * of the store is compared with the last event of its key, and each key whose
 * last event is a put is looked for in the store, in one statement and so in one
 * snapshot, in which they agree because they were written by the same
 * transactions.  Where the last event itself is no longer retained, its version
 * and time are known from the heads table.
 *
 * What was restored and is still to be recorded (backlog.c) is no fault.
 *
 * With bounds, only keys whose last event lies within them are compared.
 */
#include "postgres.h"

#include "feed/verify.h"

#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "errors.h"
#include "feed/read.h"
#include "fmgr.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "spi.h"
#include "stats/work.h"
#include "store/store.h"
#include "utils/acl.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rls.h"
#include "utils/tuplestore.h"

PG_FUNCTION_INFO_V1(es_verify);

/* Rows fetched at a time. */
#define FAULTS_CHUNK 1000

static void
check_may_compare(const EsStore *store)
{
	AclResult result = pg_class_aclcheck(store->relid, GetUserId(), ACL_SELECT);

	if (result != ACLCHECK_OK)
		aclcheck_error(result, OBJECT_TABLE, get_rel_name(store->relid));
	if (check_enable_rls(store->relid, InvalidOid, true) == RLS_ENABLED)
		ereport(
			ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("cannot verify store \"%s\" under row-level security",
					get_rel_name(store->relid)),
			 errdetail(
				 "Whoever does not see every row cannot tell whether one is missing."),
			 errhint("Call it as a role that row-level security does not apply to.")));
}

/* Both are there, and the one should be the other. */
#define COMPARABLE                                                                       \
	"s.stream IS NOT NULL AND l.stream IS NOT NULL AND l.type IS DISTINCT FROM "         \
	"'delete' AND "

/* The statement that finds the faults; $1 and $2 are the bounds. */
static char *
compare_sql(const EsStore *store, const EsCollection *changelog, bool has_backlog)
{
	static const char *const stored[] = {
		"ROW(s.value)",
		"ROW(pg_catalog.convert_to(s.value, pg_catalog.getdatabaseencoding()))",
		"ROW(s.value)"};
	StringInfoData sql;

	initStringInfo(&sql);
	appendStringInfo(
		&sql,
		"SELECT l.last_position, coalesce(l.stream, s.stream), l.version, f.problem"
		" FROM (SELECT h.stream, h.version, h.last_position, h.last_at, e.type, e.data, "
		"e.body"
		" FROM %s h LEFT JOIN %s e ON e.\"position\" = h.last_position WHERE h.version > "
		"0) l"
		" FULL JOIN (SELECT %s AS stream, s.value, s.version, s.updated_at FROM %s s) s"
		" ON s.stream = l.stream,",
		es_relation_name(changelog->heads), es_relation_name(store->changelog),
		es_store_stream_sql(store), es_relation_name(store->relid));
	appendStringInfo(
		&sql,
		" LATERAL (VALUES"
		" (l.stream IS NULL AND NOT (%s AND s.version IS NOT DISTINCT FROM 1),"
		" 'the store has the key, the changelog no event of it'),"
		" (l.type NOT IN ('put', 'delete'), 'the last event is neither put nor delete'),"
		" (s.stream IS NOT NULL AND l.type = 'delete', 'the last event is a delete, and "
		"the store has the key'),"
		" (s.stream IS NULL AND l.type = 'put', 'the last event is a put, and the store "
		"does not have the key'),"
		" (" COMPARABLE
		"l.type = 'put' AND %s::record OPERATOR(pg_catalog.*<>) ROW(%s)::record,"
		" 'the store has another value'),"
		" (" COMPARABLE "s.version IS DISTINCT FROM l.version,"
		" 'the store has version ' || coalesce(s.version::text, 'null')),"
		" (" COMPARABLE "s.updated_at IS DISTINCT FROM l.last_at,"
		" 'the store has the time ' || coalesce(s.updated_at::text, 'null'))"
		") f (is_fault, problem)"
		" WHERE f.is_fault AND (l.stream IS NULL OR l.last_position > $1 AND "
		"l.last_position < $2)",
		has_backlog ? "true" : "false", stored[store->format],
		store->format == ES_STORE_JSON ? "l.data" : "l.body");
	return sql.data;
}

static void
put_faults(ReturnSetInfo *result, Portal portal)
{
	do
	{
		SPI_cursor_fetch(portal, true, FAULTS_CHUNK);
		for (uint64 i = 0; i < SPI_processed; i++)
			tuplestore_puttuple(result->setResult, SPI_tuptable->vals[i]);
		SPI_freetuptable(SPI_tuptable);
	} while (SPI_processed > 0);
}

/* By the snapshot that rows and events are seen with.  In SPI. */
static bool
has_backlog(const EsStore *store)
{
	Oid			 types[1] = {REGCLASSOID};
	Datum		 values[1] = {ObjectIdGetDatum(store->relid)};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	es_spi_execute("SELECT FROM eventstore.store_catalog WHERE store = $1"
				   " AND backlog IS NOT NULL",
				   1, types, values, NULL, true, SPI_OK_SELECT);
	es_role_restore(&saved);
	return SPI_processed > 0;
}

/* As the owner, who may read what is behind the changelog. */
static void
compare(ReturnSetInfo *result, const EsStore *store, EsPosition after, EsPosition before)
{
	EsCollection *changelog = es_collection_open(store->changelog, AccessShareLock);
	Oid			  types[] = {INT8OID, INT8OID};
	Datum		  values[] = {Int64GetDatum(after), Int64GetDatum(before)};
	EsRoleSwitch  saved;
	Portal		  portal;

	bool backlog;

	SPI_connect();
	backlog = has_backlog(store);
	es_role_assume(es_relation_owner(store->relid), &saved);
	/* Rather an error than what the policies let through. */
	(void) set_config_option("row_security", "off", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	portal = SPI_cursor_open_with_args(NULL, compare_sql(store, changelog, backlog),
									   lengthof(types), types, values, NULL, true, 0);
	put_faults(result, portal);
	SPI_cursor_close(portal);
	es_role_restore(&saved);
	SPI_finish();
}

/* Of a changelog its store, of a store itself; NULL for any other collection. */
static EsStore *
find_store(Oid relid)
{
	Oid storeid = es_store_exists(relid, NULL) ? relid : es_collection_find_store(relid);
	EsStore *store;

	/* Left alone by a DROP TABLE, it is a plain collection. */
	if (!OidIsValid(storeid) || !es_store_exists(storeid, NULL))
		return NULL;
	store = es_store_open(storeid, AccessShareLock);
	es_store_require_changelog(store);
	check_may_compare(store);
	return store;
}

Datum
es_verify(PG_FUNCTION_ARGS)
{
	Oid			   relid = es_read_collection_arg(&fcinfo->args[0]);
	EsPosition	   after = es_read_position_arg(&fcinfo->args[1], "after", 0);
	EsPosition	   before = es_read_position_arg(&fcinfo->args[2], "before", ES_READ_END);
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	EsStore		  *store = find_store(relid);

	InitMaterializedSRF(fcinfo, 0);
	es_work_begin("verify", relid);
	es_verify_collection(result, store != NULL ? store->changelog : relid, after, before);
	if (store != NULL)
	{
		es_work_phase("comparing the store with its changelog", 0);
		compare(result, store, after, before);
	}
	es_work_end();
	return (Datum) 0;
}
