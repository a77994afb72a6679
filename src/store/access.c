/*
 * store/access.c
 *		get, put, delete, and those about many keys.
 *
 * All of them do what a plain statement would do, with the caller's rights and
 * row-level security.  get looks into the primary key itself, with the rights
 * checked as SELECT checks them; where policies apply it runs a SELECT.  What
 * changes something is a statement, whose triggers record it (change.c).
 *
 * Exact under concurrency: put's INSERT ... ON CONFLICT locks the row that it
 * replaces, and the trigger shows us that very row; delete's is returned by
 * DELETE.  Readers use the snapshot of the statement around them, like any
 * SELECT in it.
 *
 * Prefixes are literal: from the prefix itself to the next sequence of bytes
 * that does not begin with it, in bytewise order.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "errors.h"
#include "executor/executor.h"
#include "feed/key_reads.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "spi.h"
#include "store/change.h"
#include "store/store.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(es_get);
PG_FUNCTION_INFO_V1(es_get_text);
PG_FUNCTION_INFO_V1(es_get_bytes);
PG_FUNCTION_INFO_V1(es_get_many);
PG_FUNCTION_INFO_V1(es_put);
PG_FUNCTION_INFO_V1(es_put_text);
PG_FUNCTION_INFO_V1(es_put_bytes);
PG_FUNCTION_INFO_V1(es_delete);
PG_FUNCTION_INFO_V1(es_delete_text);
PG_FUNCTION_INFO_V1(es_delete_bytes);
PG_FUNCTION_INFO_V1(es_keys);
PG_FUNCTION_INFO_V1(es_delete_prefix);
PG_FUNCTION_INFO_V1(es_clear);

/* Keys fetched at a time where there may be very many. */
#define KEYS_CHUNK 1000

/* ---------------------------------------------------------------------------
 * Arguments
 * ------------------------------------------------------------------------- */

/* 'hints' has what to do instead for each format; the one of 'wanted' is not looked at. */
static void
require_format(const EsStore *store, EsStoreFormat wanted, const char *const *hints)
{
	if (store->format != wanted)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("store \"%s\" holds values of format %s, not %s",
						get_rel_name(store->relid), es_store_format_name(store->format),
						es_store_format_name(wanted)),
				 errhint("%s", hints[store->format])));
}

static EsStore *
open_store(FunctionCallInfo fcinfo, LOCKMODE mode)
{
	es_require_arg(&fcinfo->args[0], "store");
	return es_store_open(PG_GETARG_OID(0), mode);
}

static Datum
key_arg(FunctionCallInfo fcinfo, const EsStore *store)
{
	es_require_arg(&fcinfo->args[1], "key");
	return es_store_key_from_text(store, PG_GETARG_TEXT_PP(1));
}

/* ---------------------------------------------------------------------------
 * One key
 * ------------------------------------------------------------------------- */

/* SELECT on the table, or on both columns. */
static void
check_select(Oid relid)
{
	Oid user = GetUserId();

	if (pg_class_aclcheck(relid, user, ACL_SELECT) != ACLCHECK_OK &&
		(pg_attribute_aclcheck(relid, ES_STORE_KEY, user, ACL_SELECT) != ACLCHECK_OK ||
		 pg_attribute_aclcheck(relid, ES_STORE_VALUE, user, ACL_SELECT) != ACLCHECK_OK))
		aclcheck_error(ACLCHECK_NO_PRIV, OBJECT_TABLE, get_rel_name(relid));
}

/* The first value of the result of a statement in SPI, in 'context'. */
static bool
returned_value(MemoryContext context, Datum *value)
{
	MemoryContext old;
	Datum		  datum;
	bool		  isnull;

	if (SPI_processed == 0)
		return false;
	datum = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	if (isnull)
		return false;
	old = MemoryContextSwitchTo(context);
	*value = PointerGetDatum(PG_DETOAST_DATUM_COPY(datum));
	MemoryContextSwitchTo(old);
	return true;
}

static bool
select_value(EsStore *store, Datum key, Datum *value)
{
	MemoryContext context = CurrentMemoryContext;
	bool		  found;

	SPI_connect();
	es_store_execute(store, ES_STORE_SELECT, &key, true);
	found = returned_value(context, value);
	SPI_finish();
	return found;
}

static bool
look_up(const EsStore *store, Relation rel, Datum key, Datum *value)
{
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	bool			isnull = true;

	if (es_store_find(store, rel, key, GetActiveSnapshot(), slot))
		*value = slot_getattr(slot, ES_STORE_VALUE, &isnull);
	if (!isnull)
		*value = PointerGetDatum(PG_DETOAST_DATUM_COPY(*value));
	ExecDropSingleTupleTableSlot(slot);
	return !isnull;
}

/* The value of a key, in the current memory context; false where there is none. */
static bool
fetch_value(EsStore *store, Datum key, Datum *value)
{
	Relation rel = table_open(store->relid, NoLock);
	bool	 found;

	es_store_check_filled(store, rel);
	if (check_enable_rls(store->relid, InvalidOid, false) == RLS_ENABLED)
		found = select_value(store, key, value);
	else
	{
		check_select(store->relid);
		found = look_up(store, rel, key, value);
	}
	/* A read stays a read: no row of ours, no transaction id. */
	if (es_listeners_any(store->reads_channel) && !rel->rd_rel->relrowsecurity)
		es_key_reads_note(store->changelog, es_store_key_to_text(store, key));
	table_close(rel, NoLock);
	return found;
}

static Datum
get_value(FunctionCallInfo fcinfo, EsStoreFormat format)
{
	static const char *const hints[] = {"Use eventstore.get().",
										"Use eventstore.get_text().",
										"Use eventstore.get_bytes()."};
	EsStore					*store = open_store(fcinfo, AccessShareLock);
	Datum					 value;

	require_format(store, format, hints);
	if (!fetch_value(store, key_arg(fcinfo, store), &value))
		PG_RETURN_NULL();
	PG_RETURN_DATUM(value);
}

Datum
es_get(PG_FUNCTION_ARGS)
{
	return get_value(fcinfo, ES_STORE_JSON);
}

Datum
es_get_text(PG_FUNCTION_ARGS)
{
	return get_value(fcinfo, ES_STORE_TEXT);
}

Datum
es_get_bytes(PG_FUNCTION_ARGS)
{
	return get_value(fcinfo, ES_STORE_BYTES);
}

static Datum
put_value(FunctionCallInfo fcinfo, EsStoreFormat format)
{
	static const char *const hints[] = {"Use eventstore.put().",
										"Use eventstore.put_text().",
										"Use eventstore.put_bytes()."};
	EsReplaced				 replaced;
	EsStore					*store;
	Datum					 values[2];

	PreventCommandIfReadOnly("put");
	store = open_store(fcinfo, RowExclusiveLock);
	require_format(store, format, hints);
	values[0] = key_arg(fcinfo, store);
	if (PG_ARGISNULL(2))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
						errmsg("argument \"%s\" must not be null", "value"),
						errhint("Use eventstore.delete() to remove a key.")));
	values[1] = PG_GETARG_DATUM(2);

	es_store_watch_begin(&replaced, store->relid, values[0]);
	PG_TRY();
	{
		SPI_connect();
		es_store_execute(store, ES_STORE_PUT, values, false);
		SPI_finish();
	}
	PG_FINALLY();
	{
		es_store_watch_end(&replaced);
	}
	PG_END_TRY();
	if (!replaced.found)
		PG_RETURN_NULL();
	PG_RETURN_DATUM(replaced.value);
}

Datum
es_put(PG_FUNCTION_ARGS)
{
	return put_value(fcinfo, ES_STORE_JSON);
}

Datum
es_put_text(PG_FUNCTION_ARGS)
{
	return put_value(fcinfo, ES_STORE_TEXT);
}

Datum
es_put_bytes(PG_FUNCTION_ARGS)
{
	return put_value(fcinfo, ES_STORE_BYTES);
}

/* For what changes rows: there are none to fire a trigger where they are lost. */
static void
check_filled(EsStore *store)
{
	Relation rel = table_open(store->relid, NoLock);

	es_store_check_filled(store, rel);
	table_close(rel, NoLock);
}

static Datum
delete_value(FunctionCallInfo fcinfo, EsStoreFormat format)
{
	static const char *const hints[] = {"Use eventstore.delete().",
										"Use eventstore.delete_text().",
										"Use eventstore.delete_bytes()."};
	MemoryContext			 context = CurrentMemoryContext;
	EsStore					*store;
	Datum					 key;
	Datum					 value;
	bool					 found;

	PreventCommandIfReadOnly("delete");
	store = open_store(fcinfo, RowExclusiveLock);
	require_format(store, format, hints);
	key = key_arg(fcinfo, store);
	check_filled(store);
	SPI_connect();
	es_store_execute(store, ES_STORE_DELETE, &key, false);
	found = returned_value(context, &value);
	SPI_finish();
	if (!found)
		PG_RETURN_NULL();
	PG_RETURN_DATUM(value);
}

Datum
es_delete(PG_FUNCTION_ARGS)
{
	return delete_value(fcinfo, ES_STORE_JSON);
}

Datum
es_delete_text(PG_FUNCTION_ARGS)
{
	return delete_value(fcinfo, ES_STORE_TEXT);
}

Datum
es_delete_bytes(PG_FUNCTION_ARGS)
{
	return delete_value(fcinfo, ES_STORE_BYTES);
}

/* ---------------------------------------------------------------------------
 * Many keys
 * ------------------------------------------------------------------------- */

Datum
es_get_many(PG_FUNCTION_ARGS)
{
	static const char *const hints[] = {"", "Use eventstore.get_text() for each key.",
										"Use eventstore.get_bytes() for each key."};
	ReturnSetInfo			*rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	EsStore					*store;
	Datum					*keys;
	bool					*nulls;
	int						 nkeys;

	InitMaterializedSRF(fcinfo, 0);
	store = open_store(fcinfo, AccessShareLock);
	require_format(store, ES_STORE_JSON, hints);
	es_require_arg(&fcinfo->args[1], "keys");
	deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), TEXTOID, -1, false, TYPALIGN_INT, &keys,
					  &nulls, &nkeys);
	for (int i = 0; i < nkeys; i++)
	{
		Datum values[2];
		bool  isnull[2] = {false, false};

		if (nulls[i])
			ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
							errmsg("keys must not contain nulls")));
		CHECK_FOR_INTERRUPTS();
		if (!fetch_value(store, es_store_key_from_text(store, DatumGetTextPP(keys[i])),
						 &values[1]))
			continue;
		values[0] = keys[i];
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, isnull);
		pfree(DatumGetPointer(values[1]));
	}
	return (Datum) 0;
}

/* The least sequence of bytes above all that begin with the prefix; NULL for none. */
static struct varlena *
end_of_prefix(struct varlena *prefix)
{
	int				length = VARSIZE_ANY_EXHDR(prefix);
	struct varlena *end;

	while (length > 0 && (uint8) VARDATA_ANY(prefix)[length - 1] == 0xff)
		length--;
	if (length == 0)
		return NULL;
	end = (struct varlena *) cstring_to_text_with_len(VARDATA_ANY(prefix), length);
	VARDATA(end)[length - 1]++;
	return end;
}

/* A statement about the keys with a prefix, its parameters bound. */
typedef struct PrefixQuery
{
	StringInfoData sql;
	Oid			   types[2];
	Datum		   values[2];
	int			   nvalues;
} PrefixQuery;

static void
append_prefix_condition(PrefixQuery *query, const EsStore *store, text *prefix)
{
	struct varlena *from =
		(struct varlena *) DatumGetPointer(es_store_key_from_text(store, prefix));
	struct varlena *end = end_of_prefix(from);

	query->types[0] = query->types[1] = es_store_type(store->key_format);
	query->values[0] = PointerGetDatum(from);
	query->values[1] = PointerGetDatum(end);
	query->nvalues = end != NULL ? 2 : 1;
	appendStringInfoString(&query->sql, " WHERE key OPERATOR(pg_catalog.>=) $1");
	if (end != NULL)
		appendStringInfoString(&query->sql, " AND key OPERATOR(pg_catalog.<) $2");
}

/* Runs it, and returns the keys that come back, as text. */
static void
return_keys(FunctionCallInfo fcinfo, EsStore *store, PrefixQuery *query, bool read_only)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	Portal		   portal;

	SPI_connect();
	portal = SPI_cursor_open_with_args(NULL, query->sql.data, query->nvalues,
									   query->types, query->values, NULL, read_only, 0);
	do
	{
		SPI_cursor_fetch(portal, true, KEYS_CHUNK);
		for (uint64 i = 0; i < SPI_processed; i++)
		{
			bool  isnull;
			Datum key =
				SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull);

			key = PointerGetDatum(es_store_key_to_text(store, key));
			tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, &key, &isnull);
		}
		SPI_freetuptable(SPI_tuptable);
	} while (SPI_processed > 0);
	SPI_cursor_close(portal);
	SPI_finish();
}

Datum
es_keys(PG_FUNCTION_ARGS)
{
	PrefixQuery query;
	EsStore	   *store;

	InitMaterializedSRF(fcinfo, MAT_SRF_USE_EXPECTED_DESC);
	store = open_store(fcinfo, AccessShareLock);
	es_require_arg(&fcinfo->args[1], "prefix");
	check_filled(store);
	initStringInfo(&query.sql);
	appendStringInfo(&query.sql, "SELECT key FROM %s", es_relation_name(store->relid));
	append_prefix_condition(&query, store, PG_GETARG_TEXT_PP(1));
	appendStringInfoString(&query.sql, " ORDER BY key");
	return_keys(fcinfo, store, &query, true);
	return (Datum) 0;
}

Datum
es_delete_prefix(PG_FUNCTION_ARGS)
{
	PrefixQuery query;
	EsStore	   *store;

	PreventCommandIfReadOnly("delete_prefix");
	InitMaterializedSRF(fcinfo, MAT_SRF_USE_EXPECTED_DESC);
	store = open_store(fcinfo, RowExclusiveLock);
	es_require_arg(&fcinfo->args[1], "prefix");
	check_filled(store);
	initStringInfo(&query.sql);
	appendStringInfo(&query.sql, "WITH gone AS (DELETE FROM %s",
					 es_relation_name(store->relid));
	append_prefix_condition(&query, store, PG_GETARG_TEXT_PP(1));
	appendStringInfoString(&query.sql,
						   " RETURNING key) SELECT key FROM gone ORDER BY key");
	return_keys(fcinfo, store, &query, false);
	return (Datum) 0;
}

Datum
es_clear(PG_FUNCTION_ARGS)
{
	EsStore *store;
	int64	 deleted;

	PreventCommandIfReadOnly("clear");
	store = open_store(fcinfo, RowExclusiveLock);
	check_filled(store);
	SPI_connect();
	es_spi_execute(psprintf("DELETE FROM %s", es_relation_name(store->relid)), 0, NULL,
				   NULL, NULL, false, SPI_OK_DELETE);
	deleted = (int64) SPI_processed;
	SPI_finish();
	PG_RETURN_INT64(deleted);
}
