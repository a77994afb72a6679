/*
 * collection/inventory.c
 *		What the views collections and segments show.
 *
 * The views join the catalog with these functions.  Those that look at events
 * run with the caller's own rights and row-level security, so that nobody
 * counts what he may not see; what they cannot tell is null.  A broken
 * collection does not keep the others from being shown.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/inventory.h"
#include "collection/segment.h"
#include "compat.h"
#include "errors.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "utils/acl.h"
#include "utils/lsyscache.h"
#include "utils/rls.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

PG_FUNCTION_INFO_V1(es_collection_shown);
PG_FUNCTION_INFO_V1(es_collection_head);
PG_FUNCTION_INFO_V1(es_collection_events);
PG_FUNCTION_INFO_V1(es_collection_segments);

bool
es_may_see(Oid collection)
{
	if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(collection)))
		return false;
	return es_owns_relation(collection, GetUserId()) ||
		   pg_class_aclcheck(collection, GetUserId(), ACL_SELECT) == ACLCHECK_OK;
}

Datum
es_collection_shown(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(es_may_see(PG_GETARG_OID(0)));
}

/* Without shared memory the data tell. */
static EsPosition
current_head(Oid collection)
{
	EsCollection *coll = es_collection_open(collection, AccessShareLock);
	EsView		  view;

	if (!es_preloaded())
		return es_collection_head_in(coll, GetActiveSnapshot());
	es_view_open(coll, &view);
	es_view_close(&view);
	return view.head;
}

/* What a broken collection says of itself. */
static bool
is_broken(int sqlstate)
{
	return sqlstate == ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE ||
		   sqlstate == ERRCODE_ES_NOT_A_COLLECTION || sqlstate == ERRCODE_UNDEFINED_TABLE;
}

bool
es_try_head(Oid collection, EsPosition *head)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	ErrorData *volatile error = NULL;

	/* A subtransaction, so that the error leaves nothing behind. */
	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		*head = current_head(collection);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;

	if (error != NULL && !is_broken(error->sqlerrcode))
		ReThrowError(error);
	return error == NULL;
}

Datum
es_collection_head(PG_FUNCTION_ARGS)
{
	Oid		   collection = PG_GETARG_OID(0);
	EsPosition head;

	if (!es_may_see(collection) || !es_try_head(collection, &head))
		PG_RETURN_NULL();
	PG_RETURN_INT64(head);
}

/* Arguments: collection, first position, end (exclusive). */
Datum
es_collection_events(PG_FUNCTION_ARGS)
{
	Oid	  collection = PG_GETARG_OID(0);
	Oid	  types[] = {INT8OID, INT8OID};
	Datum values[] = {PG_GETARG_DATUM(1), PG_GETARG_DATUM(2)};
	int64 events;
	bool  isnull;

	if (get_rel_relkind(collection) == '\0' ||
		pg_class_aclcheck(collection, GetUserId(), ACL_SELECT) != ACLCHECK_OK)
		PG_RETURN_NULL();
	/* Its policies are code that whoever looks at a view did not choose to run. */
	if (check_enable_rls(collection, InvalidOid, true) == RLS_ENABLED)
		PG_RETURN_NULL();
	SPI_connect();
	es_spi_execute(psprintf("SELECT pg_catalog.count(*) FROM %s"
							" WHERE \"position\" OPERATOR(pg_catalog.>=) $1"
							" AND \"position\" OPERATOR(pg_catalog.<) $2",
							es_relation_name(collection)),
				   2, types, values, NULL, true, SPI_OK_SELECT);
	events = DatumGetInt64(
		SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	SPI_finish();
	PG_RETURN_INT64(events);
}

/* A row for each segment: segment, first position, end (exclusive). */
Datum
es_collection_segments(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	EsSegment	  *segments;
	int			   n = 0;

	InitMaterializedSRF(fcinfo, 0);
	if (es_may_see(PG_GETARG_OID(0)))
		n = es_segments_list(PG_GETARG_OID(0), &segments);
	for (int i = 0; i < n; i++)
	{
		Datum values[3] = {ObjectIdGetDatum(segments[i].relid),
						   Int64GetDatum(segments[i].first),
						   Int64GetDatum(segments[i].end)};
		bool  nulls[3] = {false, false, false};

		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	PG_RETURN_NULL();
}
