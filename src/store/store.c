/*
 * store/store.c
 *		A backend's knowledge of stores.
 *
 * The cache maps a table's OID to its row in eventstore.store_catalog and to
 * the plans of the statements that the functions run again and again.  Relcache
 * invalidations mark an entry as not valid; so do changes of a schema's name,
 * which the plans have in them.  The next es_store_get loads it again.  Plans
 * that are running just then (a trigger of the user's may come back to us) are
 * kept until a call that finds none running.
 *
 * Unlogged stores: a crash leaves the table empty, and PostgreSQL says nothing.
 * The changelog is logged, so we can: a table without a single block beside a
 * changelog in which the last event of some key is a put was emptied.  Nothing
 * else brings that about (TRUNCATE is refused, and VACUUM gives up blocks only
 * of rows that were deleted, which the changelog says).  No backend outlives a
 * crash, so each asks once.
 */
#include "postgres.h"

#include "store/store.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/stratnum.h"
#include "access/tableam.h"
#include "catalog/pg_class.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "compat.h"
#include "errors.h"
#include "executor/tuptable.h"
#include "spi.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

EsStoreFollowHook es_store_follow_hook = NULL;
EsStoreOriginHook es_store_origin_hook = NULL;
uint32			  es_store_following = 0;

static HTAB *stores = NULL;

static const struct
{
	const char *name;
	Oid			type;
} formats[] = {{"json", JSONBOID}, {"text", TEXTOID}, {"bytes", BYTEAOID}};

const char *
es_store_format_name(EsStoreFormat format)
{
	return formats[format].name;
}

bool
es_store_format_parse(const char *name, EsStoreFormat *format)
{
	for (int i = 0; i < lengthof(formats); i++)
		if (strcmp(name, formats[i].name) == 0)
		{
			*format = (EsStoreFormat) i;
			return true;
		}
	return false;
}

Oid
es_store_type(EsStoreFormat format)
{
	return formats[format].type;
}

/* ---------------------------------------------------------------------------
 * The cache
 * ------------------------------------------------------------------------- */

static void
invalidate_all(void)
{
	HASH_SEQ_STATUS status;
	EsStore		   *store;

	hash_seq_init(&status, stores);
	while ((store = hash_seq_search(&status)) != NULL)
		store->valid = false;
}

static void
invalidate_relation(Datum arg, Oid relid)
{
	EsStore *store;

	if (!OidIsValid(relid))
	{
		invalidate_all();
		return;
	}
	store = hash_search(stores, &relid, HASH_FIND, NULL);
	if (store != NULL)
		store->valid = false;
}

static void
invalidate_schemas(Datum arg, int cacheid, uint32 hashvalue)
{
	invalidate_all();
}

static void
init_cache(void)
{
	HASHCTL ctl;

	if (stores != NULL)
		return;
	ctl.hcxt = TopMemoryContext;
	ctl.keysize = sizeof(Oid);
	ctl.entrysize = sizeof(EsStore);
	stores =
		hash_create("eventstore stores", 16, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	CacheRegisterRelcacheCallback(invalidate_relation, (Datum) 0);
	CacheRegisterSyscacheCallback(NAMESPACEOID, invalidate_schemas, (Datum) 0);
}

static EsStoreFormat
format_of(Datum name)
{
	char		 *string = TextDatumGetCString(name);
	EsStoreFormat format;

	if (!es_store_format_parse(string, &format))
		elog(ERROR, "unknown format of a store: \"%s\"", string);
	pfree(string);
	return format;
}

/* Reads the catalog row; false where there is none. */
static bool
load_row(EsStore *store)
{
	Datum	  values[ES_STORE_CATALOG_NATTS];
	bool	  nulls[ES_STORE_CATALOG_NATTS];
	HeapTuple tuple =
		es_extension_row("store_catalog", NULL, ES_STORE_CATALOG_STORE, store->relid,
						 ES_STORE_CATALOG_NATTS, values, nulls);

	if (tuple == NULL)
		return false;
	store->changelog = nulls[ES_STORE_CATALOG_CHANGELOG - 1]
						   ? InvalidOid
						   : DatumGetObjectId(values[ES_STORE_CATALOG_CHANGELOG - 1]);
	store->format = format_of(values[ES_STORE_CATALOG_FORMAT - 1]);
	store->key_format = format_of(values[ES_STORE_CATALOG_KEY_FORMAT - 1]);
	store->follower = nulls[ES_STORE_CATALOG_FOLLOWER - 1]
						  ? 0
						  : DatumGetInt32(values[ES_STORE_CATALOG_FOLLOWER - 1]);
	store->publisher = nulls[ES_STORE_CATALOG_PUBLISHER - 1]
						   ? 0
						   : DatumGetInt32(values[ES_STORE_CATALOG_PUBLISHER - 1]);
	store->backlog[0] = '\0';
	if (!nulls[ES_STORE_CATALOG_BACKLOG - 1])
		text_to_cstring_buffer(DatumGetTextPP(values[ES_STORE_CATALOG_BACKLOG - 1]),
							   store->backlog, ES_BACKLOG_SIZE);
	store->backlog_due = !nulls[ES_STORE_CATALOG_BACKLOG_DUE - 1] &&
						 DatumGetBool(values[ES_STORE_CATALOG_BACKLOG_DUE - 1]);
	heap_freetuple(tuple);
	return true;
}

/* Where reads are told of: option feed_reads of the changelog. */
static void
load_reads_channel(EsStore *store)
{
	Datum	  values[ES_CATALOG_NATTS];
	bool	  nulls[ES_CATALOG_NATTS];
	HeapTuple tuple = NULL;

	store->reads_channel = 0;
	if (OidIsValid(store->changelog))
		tuple = es_extension_row("collection_catalog", NULL, ES_CATALOG_COLLECTION,
								 store->changelog, ES_CATALOG_NATTS, values, nulls);
	if (tuple == NULL)
		return;
	if (!nulls[ES_CATALOG_FEED_READS - 1] &&
		DatumGetBool(values[ES_CATALOG_FEED_READS - 1]))
		store->reads_channel =
			es_listeners_channel(TextDatumGetCString(values[ES_CATALOG_CHANNEL - 1]));
	heap_freetuple(tuple);
}

/* The primary key is what get looks in. */
static bool
has_key(const EsStore *store, Relation rel)
{
	Oid		 pk = es_primary_key(rel);
	Relation index;
	bool	 fits;

	if (!OidIsValid(pk))
		return false;
	index = index_open(pk, AccessShareLock);
	fits = index->rd_index->indnkeyatts == 1 &&
		   index->rd_index->indkey.values[0] == ES_STORE_KEY &&
		   (store->key_format == ES_STORE_BYTES ||
			index->rd_indcollation[0] == C_COLLATION_OID);
	index_close(index, AccessShareLock);
	return fits;
}

/* C reads stores by attribute number. */
static void
check_shape(const EsStore *store, Relation rel)
{
	const char *const names[ES_STORE_NATTS] = {"key", "value", "version", "updated_at"};
	const Oid		  types[ES_STORE_NATTS] = {es_store_type(store->key_format),
											   es_store_type(store->format), INT8OID,
											   TIMESTAMPTZOID};
	TupleDesc		  desc = RelationGetDescr(rel);

	for (int i = 0; i < ES_STORE_NATTS; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped || att->atttypid != types[i] ||
			strcmp(NameStr(att->attname), names[i]) != 0)
			ereport(
				ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg(
					 "store \"%s\" does not have the columns of a store in their order",
					 RelationGetRelationName(rel)),
				 errdetail("Column %d should be \"%s\" of type %s.", i + 1, names[i],
						   format_type_be(types[i]))));
	}
	if (!has_key(store, rel))
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("store \"%s\" has lost its primary key",
							   RelationGetRelationName(rel)),
						errhint("ALTER TABLE ... ADD PRIMARY KEY (key).")));
}

static void
report_not_store(Oid relid)
{
	if (get_rel_relkind(relid) == '\0')
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("relation with OID %u does not exist", relid)));
	ereport(ERROR, (errcode(ERRCODE_ES_NOT_A_COLLECTION),
					errmsg("relation \"%s\" is not a store", get_rel_name(relid))));
}

static void
load_store(EsStore *store)
{
	Relation rel;

	/* An invalidation that arrives while we read must mark it again. */
	store->valid = true;
	PG_TRY();
	{
		if (get_rel_relkind(store->relid) != RELKIND_RELATION ||
			!OidIsValid(es_extension_schema()) || !load_row(store))
			report_not_store(store->relid);
		load_reads_channel(store);
		rel = relation_open(store->relid, NoLock);
		check_shape(store, rel);
		relation_close(rel, NoLock);
	}
	PG_CATCH();
	{
		store->valid = false;
		PG_RE_THROW();
	}
	PG_END_TRY();
}

static void
forget_plans(EsStore *store)
{
	for (int i = 0; i < ES_STORE_NSTATEMENTS; i++)
	{
		if (store->plans[i] != NULL)
			SPI_freeplan(store->plans[i]);
		store->plans[i] = NULL;
	}
}

EsStore *
es_store_get(Oid relid)
{
	EsStore *store;
	bool	 found;

	init_cache();
	store = hash_search(stores, &relid, HASH_ENTER, &found);
	if (!found)
		memset((char *) store + sizeof(Oid), 0, sizeof(EsStore) - sizeof(Oid));
	while (!store->valid)
	{
		/* Those that run go on with what they are; who plans again knows better. */
		if (store->running == 0)
			forget_plans(store);
		else
			memset(store->plans, 0, sizeof(store->plans));
		load_store(store);
	}
	return store;
}

EsStore *
es_store_open(Oid relid, LOCKMODE mode)
{
	/* What is none is not locked against everybody, whoever asks. */
	es_store_require(relid);
	LockRelationOid(relid, mode);
	return es_store_get(relid);
}

/* The cached entry or, where that is not valid, 'probe'; NULL: it is no store. */
static const EsStore *
look_up(Oid relid, EsStore *probe)
{
	EsStore *store;

	init_cache();
	store = hash_search(stores, &relid, HASH_FIND, NULL);
	if (store != NULL && store->valid)
		return store;
	probe->relid = relid;
	return OidIsValid(es_extension_schema()) &&
				   get_rel_relkind(relid) == RELKIND_RELATION && load_row(probe)
			   ? probe
			   : NULL;
}

bool
es_store_exists(Oid relid, Oid *changelog)
{
	EsStore		   probe = {0};
	const EsStore *store = look_up(relid, &probe);

	if (changelog != NULL)
		*changelog = store != NULL ? store->changelog : InvalidOid;
	return store != NULL;
}

bool
es_store_has_backlog(Oid relid, bool *due)
{
	EsStore		   probe = {0};
	const EsStore *store = look_up(relid, &probe);

	if (due != NULL)
		*due = store != NULL && store->backlog_due;
	return store != NULL && store->backlog[0] != '\0';
}

void
es_store_require(Oid relid)
{
	if (!es_store_exists(relid, NULL))
		report_not_store(relid);
}

void
es_store_require_changelog(const EsStore *store)
{
	if (!OidIsValid(store->changelog))
		es_collection_report_no_changelog(store->relid);
}

/* ---------------------------------------------------------------------------
 * After a crash
 * ------------------------------------------------------------------------- */

/* Is there a key in the changelog that was put and not deleted? */
static bool
changelog_has_keys(const EsStore *store)
{
	EsCollection *changelog = es_collection_open(store->changelog, AccessShareLock);
	EsRoleSwitch  saved;
	bool		  found;

	es_role_assume(es_relation_owner(store->changelog), &saved);
	SPI_connect();
	es_spi_execute(psprintf("SELECT FROM %s h JOIN %s e ON e.position = h.last_position"
							" WHERE e.type = 'put' LIMIT 1",
							es_relation_name(changelog->heads),
							es_relation_name(store->changelog)),
				   0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	found = SPI_processed > 0;
	SPI_finish();
	es_role_restore(&saved);
	return found;
}

bool
es_store_is_empty(Relation rel)
{
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	TableScanDesc	scan = table_beginscan(rel, GetActiveSnapshot(), 0, NULL);
	bool			empty = !table_scan_getnextslot(scan, ForwardScanDirection, slot);

	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	return empty;
}

void
es_store_check_filled(EsStore *store, Relation rel)
{
	if (store->filled || !OidIsValid(store->changelog) ||
		rel->rd_rel->relpersistence != RELPERSISTENCE_UNLOGGED)
		return;
	/*
	 * By the same snapshot, so a row that comes now is in neither.  Not by the file's
	 * size: a rebuild that was rolled back has left rows that nobody sees.
	 */
	if (es_store_is_empty(rel) && changelog_has_keys(store))
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("store \"%s\" is empty since a crash", RelationGetRelationName(rel)),
			 errdetail("It is unlogged; its changelog is not, and has what it held."),
			 errhint("Its owner can call eventstore.rebuild().")));
	store->filled = true;
}

/* ---------------------------------------------------------------------------
 * Keys
 * ------------------------------------------------------------------------- */

/* Bytes as \x and hexadecimal digits, whatever bytea_output says. */
text *
es_store_key_to_text(const EsStore *store, Datum key)
{
	struct varlena *value = PG_DETOAST_DATUM_PACKED(key);
	int				length = VARSIZE_ANY_EXHDR(value);
	text		   *result;

	if (store->key_format != ES_STORE_BYTES)
		return (text *) PG_DETOAST_DATUM(key);
	result = palloc(VARHDRSZ + 2 + 2 * (Size) length);
	SET_VARSIZE(result, VARHDRSZ + 2 + 2 * length);
	memcpy(VARDATA(result), "\\x", 2);
	hex_encode(VARDATA_ANY(value), length, VARDATA(result) + 2);
	return result;
}

Datum
es_store_key_from_text(const EsStore *store, text *key)
{
	if (store->key_format != ES_STORE_BYTES)
		return PointerGetDatum(key);
	return DirectFunctionCall1(byteain, CStringGetDatum(text_to_cstring(key)));
}

const char *
es_store_stream_sql(const EsStore *store)
{
	return store->key_format == ES_STORE_BYTES
			   ? "('\\x' || pg_catalog.encode(s.key, 'hex'))"
			   : "s.key";
}

bool
es_store_find(const EsStore *store, Relation rel, Datum key, Snapshot snapshot,
			  TupleTableSlot *slot)
{
	Relation	  index = index_open(es_primary_key(rel), AccessShareLock);
	IndexScanDesc scan = es_index_beginscan(rel, index, snapshot, 1);
	ScanKeyData	  scankey;
	bool		  found;

	ScanKeyInit(&scankey, 1, BTEqualStrategyNumber,
				store->key_format == ES_STORE_BYTES ? F_BYTEAEQ : F_TEXTEQ, key);
	scankey.sk_collation = index->rd_indcollation[0];
	index_rescan(scan, &scankey, 1, NULL, 0);
	found = index_getnext_slot(scan, ForwardScanDirection, slot);
	index_endscan(scan);
	index_close(index, AccessShareLock);
	return found;
}

/* ---------------------------------------------------------------------------
 * Statements
 * ------------------------------------------------------------------------- */

static SPIPlanPtr
prepare(const EsStore *store, EsStoreStatement statement)
{
	static const char *const sql[ES_STORE_NSTATEMENTS] = {
		[ES_STORE_PUT] = ("INSERT INTO %s (key, value) VALUES ($1, $2)"
						  " ON CONFLICT (key) DO UPDATE SET value = excluded.value"),
		[ES_STORE_DELETE] =
			"DELETE FROM %s WHERE key OPERATOR(pg_catalog.=) $1 RETURNING value",
		[ES_STORE_SELECT] = "SELECT value FROM %s WHERE key OPERATOR(pg_catalog.=) $1"};
	Oid types[2] = {es_store_type(store->key_format), es_store_type(store->format)};
	SPIPlanPtr plan =
		SPI_prepare(psprintf(sql[statement], es_relation_name(store->relid)),
					statement == ES_STORE_PUT ? 2 : 1, types);

	if (plan == NULL)
		elog(ERROR, "could not prepare a statement on a store: %s",
			 SPI_result_code_string(SPI_result));
	SPI_keepplan(plan);
	return plan;
}

void
es_store_execute(EsStore *store, EsStoreStatement statement, Datum *values,
				 bool read_only)
{
	static const int expected[ES_STORE_NSTATEMENTS] = {
		SPI_OK_INSERT, SPI_OK_DELETE_RETURNING, SPI_OK_SELECT};
	int result = 0;

	if (store->plans[statement] == NULL)
		store->plans[statement] = prepare(store, statement);
	store->running++;
	PG_TRY();
	{
		result = SPI_execute_plan(store->plans[statement], values, NULL, read_only, 0);
	}
	PG_FINALLY();
	{
		store->running--;
	}
	PG_END_TRY();
	if (result != expected[statement])
		elog(ERROR, "unexpected result of a statement on a store: %s",
			 SPI_result_code_string(result));
}
