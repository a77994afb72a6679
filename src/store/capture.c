/*
 * store/capture.c
 *		Capturing: a changelog for any table with a primary key.
 *
 * A captured table "t" is, beside itself,
 *
 *		t_changelog		a collection; or one of the owner's that he named
 *		two triggers	each row, and TRUNCATE (capture_record.c)
 *
 * and a row of eventstore.capture_catalog, which is where the triggers look: a
 * name or an OID among a trigger's arguments would be wrong after a RENAME, or
 * after a dump and restore.
 *
 * Row triggers and no transition tables: to queue, fetch and call for each row is
 * 4 % of the time that recording it takes once the rows of a statement are
 * appended together (statement.c), which is all that tuplestores could save.
 * And what is seen is exact, for every shape of table: PostgreSQL clones row triggers
 * to all partitions, also to those attached later, and they see a statement
 * that names a partition, in which statement triggers of the parent do not
 * fire; they see each row in the order in which it changed, and the rows of a
 * table alone, without those of its inheritance children.
 *
 * The catalog row goes with the table; the changelog stays, a plain collection.
 * It cannot go before its table (collection/ddl.c has both).  Where it was made
 * by us it follows the table to another owner or schema (ddl.c).
 *
 * The cache maps a table's OID, or a partition's, to its capture; relcache
 * invalidations mark an entry as not valid.  What it had is freed at the end of
 * the transaction, for somebody's conversion function may be running on it.
 */
#include "postgres.h"

#include "store/capture.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/transam.h"
#include "catalog/dependency.h"
#include "catalog/namespace.h"
#include "catalog/partition.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/ddl.h"
#include "commands/defrem.h"
#include "compat.h"
#include "errors.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "parser/parse_func.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "store/row_json.h"
#include "store/store.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"

PG_FUNCTION_INFO_V1(es_capture);
PG_FUNCTION_INFO_V1(es_release);

static HTAB *captures = NULL;

/* ---------------------------------------------------------------------------
 * The cache
 * ------------------------------------------------------------------------- */

/* A partition's entry hangs on its parent's row, too. */
static void
invalidate_relation(Datum arg, Oid relid)
{
	HASH_SEQ_STATUS status;
	EsCapture	   *capture;

	hash_seq_init(&status, captures);
	while ((capture = hash_seq_search(&status)) != NULL)
		if (!OidIsValid(relid) || capture->relid == relid || capture->source == relid)
			capture->valid = false;
}

static void
init_cache(void)
{
	HASHCTL ctl;

	if (captures != NULL)
		return;
	ctl.hcxt = TopMemoryContext;
	ctl.keysize = sizeof(Oid);
	ctl.entrysize = sizeof(EsCapture);
	captures = hash_create("eventstore captured tables", 16, &ctl,
						   HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	CacheRegisterRelcacheCallback(invalidate_relation, (Datum) 0);
}

static bool
load_row(Oid relid, Oid *changelog, bool *shared)
{
	Datum	  values[ES_CAPTURE_CATALOG_NATTS];
	bool	  nulls[ES_CAPTURE_CATALOG_NATTS];
	HeapTuple tuple = es_extension_row("capture_catalog", NULL, ES_CAPTURE_CATALOG_SOURCE,
									   relid, ES_CAPTURE_CATALOG_NATTS, values, nulls);

	if (tuple == NULL)
		return false;
	if (changelog != NULL)
		*changelog = DatumGetObjectId(values[ES_CAPTURE_CATALOG_CHANGELOG - 1]);
	if (shared != NULL)
		*shared = DatumGetBool(values[ES_CAPTURE_CATALOG_SHARED - 1]);
	heap_freetuple(tuple);
	return true;
}

Oid
es_capture_source(Oid relid, Oid *changelog, bool *shared)
{
	if (!OidIsValid(es_extension_schema()))
		return InvalidOid;
	/* While a partition is detached CONCURRENTLY it still has the trigger. */
	while (!load_row(relid, changelog, shared))
	{
		if (!get_rel_relispartition(relid))
			return InvalidOid;
		relid = get_partition_parent(relid, true);
	}
	return relid;
}

/* RelationGetPrimaryKeyIndex passes over one that is deferrable. */
static Oid
find_primary_key(Relation rel)
{
	List	 *indexes = RelationGetIndexList(rel);
	Oid		  found = InvalidOid;
	ListCell *cell;

	foreach (cell, indexes)
	{
		Relation index = index_open(lfirst_oid(cell), AccessShareLock);

		if (index->rd_index->indisprimary && index->rd_index->indisvalid)
			found = RelationGetRelid(index);
		index_close(index, AccessShareLock);
	}
	list_free(indexes);
	return found;
}

static void
load_key(EsCapture *capture, Relation rel, Relation index)
{
	List *args = NIL;

	capture->nkeys = index->rd_index->indnkeyatts;
	capture->keys = palloc0(sizeof(EsCaptureKey) * capture->nkeys);
	for (int i = 0; i < capture->nkeys; i++)
	{
		EsCaptureKey *key = &capture->keys[i];
		Oid			  type;
		Oid			  output;
		bool		  is_varlena;

		key->attnum = index->rd_index->indkey.values[i];
		type = TupleDescAttr(RelationGetDescr(rel), key->attnum - 1)->atttypid;
		key->boolean = getBaseType(type) == BOOLOID;
		getTypeOutputInfo(type, &output, &is_varlena);
		fmgr_info_cxt(output, &key->output, CurrentMemoryContext);
		args = lappend(args, es_argument_of_type(type));
	}
	es_prepare_any_call(&capture->key_array, F_JSONB_BUILD_ARRAY_ANY, JSONBOID, args);
}

static void
report_not_captured(Relation rel)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("table \"%s\" is not captured, but has the trigger of one that is",
					RelationGetRelationName(rel)),
			 errhint("Drop trigger \"%s\", or call eventstore.capture().",
					 ES_CAPTURE_TRIGGER),
			 errtable(rel)));
}

static void
report_no_key(Relation rel)
{
	ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					errmsg("captured table \"%s\" has no primary key",
						   RelationGetRelationName(rel)),
					errdetail("Its key names the streams of its changelog."),
					errhint("ALTER TABLE ... ADD PRIMARY KEY, or eventstore.release()."),
					errtable(rel)));
}

static void
load_capture(EsCapture *capture, Relation rel)
{
	MemoryContext old;
	Relation	  index;
	Oid			  index_oid;

	/* An invalidation that arrives while we read must mark it again. */
	capture->valid = true;
	capture->source =
		es_capture_source(capture->relid, &capture->changelog, &capture->shared);
	if (!OidIsValid(capture->source))
		report_not_captured(rel);
	index_oid = find_primary_key(rel);
	if (!OidIsValid(index_oid))
		report_no_key(rel);

	if (capture->context != NULL)
		MemoryContextSetParent(capture->context, TopTransactionContext);
	capture->context = AllocSetContextCreate(
		CacheMemoryContext, "eventstore captured table", ALLOCSET_SMALL_SIZES);
	old = MemoryContextSwitchTo(capture->context);
	index = index_open(index_oid, AccessShareLock);
	load_key(capture, rel, index);
	index_close(index, AccessShareLock);
	capture->rows = es_row_json_prepare(RelationGetDescr(rel));
	MemoryContextSwitchTo(old);
}

EsCapture *
es_capture_get(Relation rel)
{
	Oid		   relid = RelationGetRelid(rel);
	EsCapture *capture;
	bool	   found;

	init_cache();
	capture = hash_search(captures, &relid, HASH_ENTER, &found);
	if (!found)
		memset((char *) capture + sizeof(Oid), 0, sizeof(EsCapture) - sizeof(Oid));
	while (!capture->valid)
	{
		PG_TRY();
		{
			load_capture(capture, rel);
		}
		PG_CATCH();
		{
			capture->valid = false;
			PG_RE_THROW();
		}
		PG_END_TRY();
	}
	return capture;
}

/* ---------------------------------------------------------------------------
 * What can be captured
 * ------------------------------------------------------------------------- */

static void
refuse(Oid relid, int code, const char *why)
{
	ereport(ERROR, (errcode(code), errmsg("cannot capture \"%s\"", get_rel_name(relid)),
					errdetail("%s", why)));
}

/* In SPI. */
static bool
is_heads_table(Oid relid)
{
	Oid			 types[] = {OIDOID};
	Datum		 values[] = {ObjectIdGetDatum(relid)};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	es_spi_execute("SELECT FROM eventstore.collection_catalog c"
				   " WHERE c.heads::pg_catalog.oid = $1",
				   1, types, values, NULL, true, SPI_OK_SELECT);
	es_role_restore(&saved);
	return SPI_processed > 0;
}

static void
check_kind(Oid relid)
{
	char kind = get_rel_relkind(relid);

	if (kind == '\0')
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("relation with OID %u does not exist", relid)));
	if (kind != RELKIND_RELATION && kind != RELKIND_PARTITIONED_TABLE)
		refuse(relid, ERRCODE_WRONG_OBJECT_TYPE, "It is not a table.");
	if (relid < FirstNormalObjectId)
		refuse(relid, ERRCODE_WRONG_OBJECT_TYPE, "It is a system catalog.");
	if (OidIsValid(getExtensionOfObject(RelationRelationId, relid)))
		refuse(relid, ERRCODE_WRONG_OBJECT_TYPE, "It belongs to an extension.");
	if (get_rel_persistence(relid) == RELPERSISTENCE_TEMP)
		refuse(relid, ERRCODE_FEATURE_NOT_SUPPORTED, "It is a temporary table.");
	if (es_collection_exists(relid) || OidIsValid(es_collection_of_segment(relid)))
		refuse(relid, ERRCODE_WRONG_OBJECT_TYPE,
			   "It is a collection or a segment of one.");
	if (es_store_exists(relid, NULL))
		refuse(relid, ERRCODE_WRONG_OBJECT_TYPE,
			   "It is a store; its changes are recorded, or it was created without a "
			   "changelog.");
}

/* With the lock that keeps it so. */
static void
check_source(Oid relid)
{
	Oid		 source = es_capture_source(relid, NULL, NULL);
	Relation rel;

	if (source == relid)
		refuse(relid, ERRCODE_DUPLICATE_OBJECT, "It is captured already.");
	if (OidIsValid(source))
		refuse(
			relid, ERRCODE_DUPLICATE_OBJECT,
			psprintf("It is captured as a partition of \"%s\".", get_rel_name(source)));
	if (is_heads_table(relid))
		refuse(relid, ERRCODE_WRONG_OBJECT_TYPE, "It is part of a collection.");
	rel = table_open(relid, NoLock);
	if (!OidIsValid(find_primary_key(rel)))
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("cannot capture \"%s\"", RelationGetRelationName(rel)),
						errdetail("It has no primary key."),
						errhint("ALTER TABLE ... ADD PRIMARY KEY.")));
	table_close(rel, NoLock);
}

/* Of the caller's, and nobody else's changelog but a captured table's. */
static void
check_given(Oid collection)
{
	EsCollection *coll = es_collection_open(collection, AccessShareLock);

	es_collection_check_owner(collection);
	if (OidIsValid(coll->store))
		ereport(ERROR, (errcode(ERRCODE_WRONG_OBJECT_TYPE),
						errmsg("cannot record in \"%s\"", get_rel_name(collection)),
						errdetail("It is the changelog of store \"%s\".",
								  get_rel_name(coll->store))));
}

/* ---------------------------------------------------------------------------
 * capture, release
 * ------------------------------------------------------------------------- */

static void
create_triggers(Oid source)
{
	const char *name = es_relation_name(source);

	es_spi_execute(psprintf("CREATE TRIGGER %s AFTER INSERT OR UPDATE OR DELETE ON %s"
							" FOR EACH ROW EXECUTE FUNCTION eventstore.capture_record()",
							ES_CAPTURE_TRIGGER, name),
				   0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
	es_spi_execute(
		psprintf("CREATE TRIGGER %s AFTER TRUNCATE ON %s"
				 " FOR EACH STATEMENT EXECUTE FUNCTION eventstore.capture_record()",
				 ES_CAPTURE_TRUNCATE_TRIGGER, name),
		0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
}

/* The table's owner gets it, whoever of those who may captures the table; in SPI. */
static Oid
create_changelog(Oid source)
{
	Oid		  schema = get_rel_namespace(source);
	Oid		  owner = es_relation_owner(source);
	AclResult acl = es_schema_aclcheck(schema, GetUserId(), ACL_CREATE);
	Oid		  changelog;

	if (acl != ACLCHECK_OK)
		aclcheck_error(acl, OBJECT_SCHEMA, get_namespace_name(schema));
	changelog = es_create_changelog(
		schema, makeObjectName(get_rel_name(source), NULL, "changelog"));
	if (owner != GetUserId())
		es_spi_execute(psprintf("ALTER TABLE %s OWNER TO %s", es_relation_name(changelog),
								quote_identifier(GetUserNameFromId(owner, false))),
					   0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
	return changelog;
}

/* In SPI; the arguments are (source, changelog, shared), or the first of them. */
static void
change_catalog(const char *sql, int expected, int nargs, Datum *values)
{
	static Oid	 types[] = {REGCLASSOID, REGCLASSOID, BOOLOID};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	es_spi_execute(sql, nargs, types, values, NULL, false, expected);
	es_role_restore(&saved);
}

static void
tell_others(Oid source, Oid changelog)
{
	CacheInvalidateRelcacheByRelid(source);
	if (get_rel_relkind(changelog) != '\0')
		CacheInvalidateRelcacheByRelid(changelog);
}

static void
register_capture(Oid source, Oid changelog, bool shared)
{
	Datum values[] = {ObjectIdGetDatum(source), ObjectIdGetDatum(changelog),
					  BoolGetDatum(shared)};

	change_catalog("INSERT INTO eventstore.capture_catalog (source, changelog, shared)"
				   " VALUES ($1, $2, $3)",
				   SPI_OK_INSERT, lengthof(values), values);
	tell_others(source, changelog);
}

static void
forget_capture(Oid source, Oid changelog)
{
	Datum values[] = {ObjectIdGetDatum(source)};

	change_catalog("DELETE FROM eventstore.capture_catalog WHERE source = $1",
				   SPI_OK_DELETE, lengthof(values), values);
	tell_others(source, changelog);
}

Datum
es_capture(PG_FUNCTION_ARGS)
{
	bool		 given = !PG_ARGISNULL(1);
	EsRoleSwitch saved;
	Oid			 source;
	Oid			 changelog;

	es_require_preloaded();
	PreventCommandIfReadOnly("capture");
	es_require_arg(&fcinfo->args[0], "source_table");
	source = PG_GETARG_OID(0);
	check_kind(source);
	es_collection_check_owner(source);
	/* What CREATE TRIGGER takes, the strongest lock first. */
	LockRelationOid(source, ShareRowExclusiveLock);
	check_kind(source);
	es_collection_check_owner(source);

	/* The caller's own role: what this adds is the locked search_path. */
	es_role_assume(GetUserId(), &saved);
	SPI_connect();
	check_source(source);
	if (given)
	{
		changelog = PG_GETARG_OID(1);
		check_given(changelog);
	}
	else
		changelog = create_changelog(source);
	create_triggers(source);
	register_capture(source, changelog, given);
	SPI_finish();
	es_role_restore(&saved);

	if (!given)
		es_make_ready_to_append(changelog);
	PG_RETURN_OID(changelog);
}

/* By what they call: the owner may have renamed or dropped them. */
static List *
list_triggers(Oid source)
{
	Oid function =
		LookupFuncName(list_make2(makeString("eventstore"), makeString("capture_record")),
					   0, NULL, false);
	Relation rel = table_open(source, NoLock);
	List	*names = NIL;

	for (int i = 0; rel->trigdesc != NULL && i < rel->trigdesc->numtriggers; i++)
		if (rel->trigdesc->triggers[i].tgfoid == function)
			names = lappend(names, pstrdup(rel->trigdesc->triggers[i].tgname));
	table_close(rel, NoLock);
	return names;
}

static void
drop_triggers(Oid source)
{
	ListCell *cell;

	foreach (cell, list_triggers(source))
		es_spi_execute(psprintf("DROP TRIGGER %s ON %s", quote_identifier(lfirst(cell)),
								es_relation_name(source)),
					   0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
}

static void
require_captured(Oid relid, Oid *changelog)
{
	if (OidIsValid(relid) && es_capture_source(relid, changelog, NULL) == relid)
		return;
	if (get_rel_relkind(relid) == '\0')
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("relation with OID %u does not exist", relid)));
	ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
					errmsg("table \"%s\" is not captured", get_rel_name(relid))));
}

Datum
es_release(PG_FUNCTION_ARGS)
{
	EsRoleSwitch saved;
	Oid			 source;
	Oid			 changelog;

	PreventCommandIfReadOnly("release");
	es_require_arg(&fcinfo->args[0], "source_table");
	source = PG_GETARG_OID(0);
	require_captured(source, &changelog);
	es_collection_check_owner(source);
	/* What DROP TRIGGER takes. */
	LockRelationOid(source, AccessExclusiveLock);
	require_captured(source, &changelog);
	es_collection_check_owner(source);

	es_role_assume(GetUserId(), &saved);
	SPI_connect();
	drop_triggers(source);
	forget_capture(source, changelog);
	SPI_finish();
	es_role_restore(&saved);
	PG_RETURN_VOID();
}
