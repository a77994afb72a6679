/*
 * store/replay.c
 *		What a changelog tells: a key's value at a time, and the whole table.
 *
 * get_at reads the key's stream from its end backwards, with the rights of one
 * who reads the changelog: the history is more than the table shows.  Times of
 * a key never go back, so the first event that is not too late is the one.
 *
 * What was restored and is not recorded yet (backlog.c) is in the table alone.
 *
 * rebuild makes the table what the changelog says, in one transaction: keys
 * whose last event is not a put go, the others get that event's value, version
 * and time.  Rows that are right already are not touched.  ShareRowExclusive
 * on the table keeps writers out (readers go on with the old rows), and waits
 * for those under way; who writes the changelog writes the table first.  The
 * user's triggers and foreign keys take part as always; ours do not record.
 *
 * A changelog that has let events go (retention, truncate_before) can still do
 * this while it has the last event of each key; else LG005.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/heads.h"
#include "errors.h"
#include "feed/read.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "stats/work.h"
#include "store/backlog.h"
#include "store/change.h"
#include "store/record.h"
#include "store/store.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(es_get_at);
PG_FUNCTION_INFO_V1(es_rebuild);

/* ---------------------------------------------------------------------------
 * get_at
 * ------------------------------------------------------------------------- */

/* The event's value; NULL for a delete. */
static Jsonb *
event_value(TupleTableSlot *slot)
{
	bool  isnull;
	Datum data = slot_getattr(slot, ES_ATT_DATA, &isnull);

	return isnull ? NULL : (Jsonb *) PG_DETOAST_DATUM_COPY(data);
}

/* To who has a right to the row, and sees all events: that there is none is known to him. */
static bool
may_see_row(const EsStore *store, const EsCollection *changelog)
{
	return !es_collection_row_security(changelog) &&
		   pg_class_aclcheck(store->relid, GetUserId(), ACL_SELECT) == ACLCHECK_OK &&
		   check_enable_rls(store->relid, InvalidOid, true) != RLS_ENABLED;
}

/*
 * The value of a row without an event, which is to be recorded yet (backlog.c), where it
 * is not later than 'at'; NULL.  By the snapshot, whatever was recorded since.
 */
static Jsonb *
backlog_value_at(const EsStore *store, Datum key, TimestampTz at)
{
	EsCollection   *changelog = es_collection_open(store->changelog, AccessShareLock);
	Relation		rel;
	TupleTableSlot *slot;
	EsStreamHead	head;
	EsStoreRow		row;
	Jsonb		   *value = NULL;

	if (!may_see_row(store, changelog) ||
		es_heads_peek(changelog, es_store_key_to_text(store, key), GetActiveSnapshot(),
					  &head))
		return NULL;
	rel = table_open(store->relid, NoLock);
	slot = table_slot_create(rel, NULL);
	if (es_store_find(store, rel, key, GetActiveSnapshot(), slot))
	{
		es_store_read_row(&row, ExecFetchSlotHeapTuple(slot, false, NULL),
						  RelationGetDescr(rel));
		if (row.version == 1 && row.has_time && row.updated_at <= at)
			value = (Jsonb *) PG_DETOAST_DATUM_COPY(row.value);
	}
	ExecDropSingleTupleTableSlot(slot);
	table_close(rel, NoLock);
	return value;
}

/* The value after the last event of the key's stream that is not later than 'at'. */
static Jsonb *
value_at(const EsStore *store, Datum key, TimestampTz at)
{
	Oid				changelog = store->changelog;
	text		   *stream = es_store_key_to_text(store, key);
	EsReadArgs		args = {0};
	EsRead		   *read;
	TupleTableSlot *slot;
	Jsonb		   *value = NULL;
	int64			version = 0;
	bool			found = false;

	args.collection = changelog;
	args.direction = BackwardScanDirection;
	args.max_count = ES_READ_ALL;
	args.stream = stream;
	read = es_read_begin(&args);
	while (!found && (slot = es_read_next(read)) != NULL)
	{
		bool isnull;

		CHECK_FOR_INTERRUPTS();
		version = DatumGetInt64(slot_getattr(slot, ES_ATT_VERSION, &isnull));
		found = DatumGetTimestampTz(slot_getattr(slot, ES_ATT_CREATED_AT, &isnull)) <= at;
		if (found)
			value = event_value(slot);
	}
	es_read_end(read);
	if (version == 0)
		return backlog_value_at(store, key, at);
	if (!found && version > 1)
		ereport(
			ERROR,
			(errcode(ERRCODE_ES_NOT_RETAINED),
			 errmsg("the events of key \"%s\" at that time are no longer retained",
					text_to_cstring(stream)),
			 errdetail("The first kept in changelog \"%s\" is version " INT64_FORMAT ".",
					   get_rel_name(changelog), version)));
	return value;
}

Datum
es_get_at(PG_FUNCTION_ARGS)
{
	EsStore *store;
	Datum	 key;
	Jsonb	*value;

	es_require_arg(&fcinfo->args[0], "store");
	store = es_store_open(PG_GETARG_OID(0), AccessShareLock);
	if (store->format != ES_STORE_JSON)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("store \"%s\" holds values of format %s, not json",
						get_rel_name(store->relid), es_store_format_name(store->format)),
				 errhint("Read the key's history with eventstore.read_stream() from the "
						 "changelog.")));
	es_require_arg(&fcinfo->args[1], "key");
	es_require_arg(&fcinfo->args[2], "at");
	es_store_require_changelog(store);
	key = es_store_key_from_text(store, PG_GETARG_TEXT_PP(1));
	value = value_at(store, key, PG_GETARG_TIMESTAMPTZ(2));
	if (value == NULL)
		PG_RETURN_NULL();
	PG_RETURN_JSONB_P(value);
}

/* ---------------------------------------------------------------------------
 * rebuild
 * ------------------------------------------------------------------------- */

/* In SPI, here and below. */
static void
check_complete(const EsCollection *changelog)
{
	es_spi_execute(
		psprintf("SELECT stream, version FROM %s WHERE last_position < " INT64_FORMAT
				 " LIMIT 1",
				 es_relation_name(changelog->heads), changelog->first_position),
		0, NULL, NULL, NULL, false, SPI_OK_SELECT);
	if (SPI_processed > 0)
		ereport(
			ERROR,
			(errcode(ERRCODE_ES_NOT_RETAINED),
			 errmsg("changelog \"%s\" no longer has the last event of each key",
					get_rel_name(changelog->relid)),
			 errdetail("That of key \"%s\", version %s, is not retained.",
					   SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1),
					   SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2))));
}

static void
delete_others(const EsStore *store, const char *table, const char *last_events)
{
	es_spi_execute(psprintf("DELETE FROM %s s WHERE NOT EXISTS"
							" (SELECT FROM %s WHERE h.stream = %s AND e.type = 'put')",
							table, last_events, es_store_stream_sql(store)),
				   0, NULL, NULL, NULL, false, SPI_OK_DELETE);
}

static void
put_latest(const EsStore *store, const char *table, const char *last_events)
{
	static const char *const values[] = {
		"e.data", "pg_catalog.convert_from(e.body, pg_catalog.getdatabaseencoding())",
		"e.body"};
	const char *key = store->key_format == ES_STORE_BYTES
						  ? "pg_catalog.decode(pg_catalog.substr(h.stream, 3), 'hex')"
						  : "h.stream";

	es_spi_execute(
		psprintf("INSERT INTO %s AS s (key, value, version, updated_at)"
				 " SELECT %s, %s, e.version, e.created_at FROM %s WHERE e.type = 'put'"
				 " ON CONFLICT (key) DO UPDATE SET value = excluded.value,"
				 " version = excluded.version, updated_at = excluded.updated_at"
				 " WHERE ROW(s.value, s.version, s.updated_at)::record "
				 "OPERATOR(pg_catalog.*<>)"
				 " ROW(excluded.value, excluded.version, excluded.updated_at)::record",
				 table, key, values[store->format], last_events),
		0, NULL, NULL, NULL, false, SPI_OK_INSERT);
}

static int64
count_keys(const char *table)
{
	bool isnull;

	es_spi_execute(psprintf("SELECT pg_catalog.count(*) FROM %s", table), 0, NULL, NULL,
				   NULL, false, SPI_OK_SELECT);
	return DatumGetInt64(
		SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
}

static int64
rebuild(EsStore *store)
{
	EsCollection *changelog = es_collection_open(store->changelog, AccessShareLock);
	char		 *table = es_relation_name(store->relid);
	char		 *last_events =
		psprintf("%s h JOIN %s e ON e.\"position\" = h.last_position",
				 es_relation_name(changelog->heads), es_relation_name(store->changelog));
	volatile int64 nkeys = 0;

	check_complete(changelog);
	es_work_phase("recording what was restored", 0);
	es_store_backlog_record_all(store->relid);
	es_store_unrecorded_begin(store->relid);
	PG_TRY();
	{
		es_work_phase("deleting keys", 0);
		delete_others(store, table, last_events);
		es_work_phase("putting keys", 0);
		put_latest(store, table, last_events);
		nkeys = count_keys(table);
	}
	PG_FINALLY();
	{
		es_store_unrecorded_end();
	}
	PG_END_TRY();
	return nkeys;
}

static EsStore *
open_to_rebuild(Oid relid)
{
	EsStore *store = es_store_open(relid, AccessShareLock);

	es_collection_check_owner(relid);
	es_store_require_changelog(store);
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("rebuild() must run at isolation level READ COMMITTED"),
				 errdetail(
					 "It has to see every change that was committed before its lock.")));
	store = es_store_open(relid, ShareRowExclusiveLock);
	/* It may have changed hands while we waited for the lock. */
	es_collection_check_owner(relid);
	return store;
}

Datum
es_rebuild(PG_FUNCTION_ARGS)
{
	EsStore		*store;
	EsRoleSwitch saved;
	int64		 nkeys;

	es_require_preloaded();
	PreventCommandIfReadOnly("rebuild");
	es_require_arg(&fcinfo->args[0], "store");
	store = open_to_rebuild(PG_GETARG_OID(0));

	es_role_assume(es_relation_owner(store->relid), &saved);
	/* Rather an error than a table made of what the policies let through. */
	(void) set_config_option("row_security", "off", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	SPI_connect();
	es_work_begin("rebuild", store->relid);
	nkeys = rebuild(store);
	es_work_end();
	SPI_finish();
	es_role_restore(&saved);
	PG_RETURN_INT64(nkeys);
}
