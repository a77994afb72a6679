/*
 * collection/layout.c
 *		What a collection consists of, and making what is missing of it.
 *
 * A collection "orders" is, all in the owner's schema and the owner's own:
 *
 *		orders				the partitioned table
 *		orders_1, ...		its segments (segment.c)
 *		orders_heads		one row per stream (heads.c); nobody else's to read
 *		orders_position		the counter, OWNED BY orders.position (position.c)
 *
 * and a row of eventstore.collection_catalog.  All of it is made by the SQL
 * that a user would write, so that ordinary rights and event triggers apply,
 * and that it is dumped and restored like anything else.  Companions are found
 * by OID in the catalog row, so renaming them is harmless.
 *
 * create_collection begins with the bare table, repair_collection with what is
 * left of one; from there on they go the same way: each part is looked for and
 * made if it is not there.
 */
#include "postgres.h"

#include "catalog/pg_collation.h"
#include "catalog/pg_am.h"
#include "collection/layout.h"

#include "access/genam.h"
#include "access/relation.h"
#include "access/table.h"
#include "catalog/dependency.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_index.h"
#include "catalog/pg_type.h"
#include "collection/segment.h"
#include "commands/defrem.h"
#include "commands/trigger.h"
#include "common/hashfn.h"
#include "compat.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/relcache.h"

/* Name and type of each column, in the order of ES_ATT_*. */
static const struct
{
	const char *name;
	Oid			type;
	const char *declaration;
} columns[ES_COLLECTION_NATTS] = {
	{"position", INT8OID, "pg_catalog.int8 NOT NULL"},
	{"stream", TEXTOID, "pg_catalog.text COLLATE pg_catalog.\"C\""},
	{"version", INT8OID, "pg_catalog.int8"},
	{"id", UUIDOID, "pg_catalog.uuid NOT NULL DEFAULT eventstore.uuid_v7()"},
	{"type", TEXTOID, "pg_catalog.text COLLATE pg_catalog.\"C\" NOT NULL"},
	{"tags", TEXTARRAYOID,
	 "pg_catalog.text[] COLLATE pg_catalog.\"C\" NOT NULL DEFAULT '{}'"},
	{"data", JSONBOID, "pg_catalog.jsonb"},
	{"body", BYTEAOID, "pg_catalog.bytea"},
	{"metadata", JSONBOID, "pg_catalog.jsonb"},
	{"created_at", TIMESTAMPTZOID,
	 "pg_catalog.timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()"},
	{"checksum", INT4OID, "pg_catalog.int4"},
	{"safe_head", INT8OID, "pg_catalog.int8"},
};

static void run_ddl(const char *format, ...) pg_attribute_printf(1, 2);

static void
run_ddl(const char *format, ...)
{
	StringInfoData sql;

	initStringInfo(&sql);
	for (;;)
	{
		va_list args;
		int		needed;

		va_start(args, format);
		needed = appendStringInfoVA(&sql, format, args);
		va_end(args);
		if (needed == 0)
			break;
		enlargeStringInfo(&sql, needed);
	}
	es_spi_execute(sql.data, 0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
	pfree(sql.data);
}

/* The first attribute that is not as it should be, from 1; 0 where all are. */
static int
first_mismatch(TupleDesc desc)
{
	for (int i = 0; i < ES_COLLECTION_NATTS; i++)
	{
		Form_pg_attribute att;

		if (i >= desc->natts)
			return i + 1;
		att = TupleDescAttr(desc, i);
		if (att->attisdropped || att->atttypid != columns[i].type ||
			strcmp(NameStr(att->attname), columns[i].name) != 0)
			return i + 1;
	}
	return 0;
}

/* C reads and writes heads tables by attribute number. */
static bool
has_columns_of_heads(Relation rel)
{
	static const struct
	{
		const char *name;
		Oid			type;
	} heads_columns[ES_HEADS_NATTS] = {
		{"stream", TEXTOID},		  {"version", INT8OID},
		{"first_position", INT8OID},  {"last_position", INT8OID},
		{"first_at", TIMESTAMPTZOID}, {"last_at", TIMESTAMPTZOID}};
	TupleDesc desc = RelationGetDescr(rel);

	if (desc->natts < ES_HEADS_NATTS)
		return false;
	for (int i = 0; i < ES_HEADS_NATTS; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped || att->atttypid != heads_columns[i].type ||
			strcmp(NameStr(att->attname), heads_columns[i].name) != 0)
			return false;
	}
	return true;
}

static bool
is_index_of_heads(Relation index)
{
	return index->rd_rel->relam == BTREE_AM_OID && index->rd_index->indnkeyatts == 1 &&
		   index->rd_index->indkey.values[0] == ES_HEADS_STREAM &&
		   index->rd_indcollation[0] == C_COLLATION_OID;
}

/* The primary key of a heads table, opened; NULL where the table is not one. */
static Relation
try_open_heads_index(Relation rel, LOCKMODE mode)
{
	Oid		 pk = es_primary_key(rel);
	Relation index;

	if (!OidIsValid(pk) || !has_columns_of_heads(rel))
		return NULL;
	index = index_open(pk, mode);
	if (is_index_of_heads(index))
		return index;
	index_close(index, mode);
	return NULL;
}

static bool
has_shape_of_heads(Relation rel)
{
	Relation index = try_open_heads_index(rel, AccessShareLock);

	if (index != NULL)
		index_close(index, AccessShareLock);
	return index != NULL;
}

Relation
es_layout_open_heads_index(Relation rel, LOCKMODE mode)
{
	Relation index = try_open_heads_index(rel, mode);

	if (index == NULL)
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("table \"%s\" no longer has the columns and the primary key of a "
					"heads table",
					RelationGetRelationName(rel)),
			 errhint("Give them back, or drop it and call eventstore.repair_collection() "
					 "as the owner of the collection.")));
	return index;
}

void
es_layout_check_heads(Relation rel)
{
	index_close(es_layout_open_heads_index(rel, AccessShareLock), AccessShareLock);
}

bool
es_layout_matches(Relation rel)
{
	return rel->rd_rel->relkind == RELKIND_PARTITIONED_TABLE &&
		   first_mismatch(RelationGetDescr(rel)) == 0;
}

void
es_layout_check(Relation rel)
{
	int att = first_mismatch(RelationGetDescr(rel));

	if (att == 0)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("%s \"%s\" does not have the columns of a collection in their order",
					rel->rd_rel->relispartition ? "segment" : "collection",
					RelationGetRelationName(rel)),
			 errdetail("Column %d should be \"%s\" of type %s.", att,
					   columns[att - 1].name, format_type_be(columns[att - 1].type))));
}

Oid
es_layout_create_table(Oid schema, const char *name)
{
	StringInfoData list;

	initStringInfo(&list);
	for (int i = 0; i < ES_COLLECTION_NATTS; i++)
		appendStringInfo(&list, "\"%s\" %s, ", columns[i].name, columns[i].declaration);
	run_ddl("CREATE TABLE %s (%sPRIMARY KEY (\"position\")) PARTITION BY RANGE "
			"(\"position\")",
			quote_qualified_identifier(get_namespace_name(schema), name), list.data);
	return get_relname_relid(name, schema);
}

/* --- counter and defaults --- */

/* The sequence that column position owns; the owner cannot give it two by us. */
static Oid
find_counter(Oid collection)
{
	ListCell *cell;

	foreach (cell, getOwnedSequences(collection))
	{
		Oid	  table;
		int32 column;

		if (sequenceIsOwned(lfirst_oid(cell), DEPENDENCY_AUTO, &table, &column) &&
			column == ES_ATT_POSITION)
			return lfirst_oid(cell);
	}
	return InvalidOid;
}

/* Its value is position.c's affair; as created it has reserved nothing. */
static Oid
make_counter(Oid collection)
{
	Oid	  schema = get_rel_namespace(collection);
	char *name =
		ChooseRelationName(get_rel_name(collection), NULL, "position", schema, false);
	Oid counter;

	run_ddl("CREATE SEQUENCE %s AS pg_catalog.int8 MINVALUE 0 START 0 OWNED BY "
			"%s.\"position\"",
			quote_qualified_identifier(get_namespace_name(schema), name),
			es_relation_name(collection));
	counter = get_relname_relid(name, schema);
	es_reservation_start(counter);
	return counter;
}

static bool
has_default(Oid collection, AttrNumber attnum)
{
	Relation rel = relation_open(collection, NoLock);
	bool	 result = TupleDescAttr(RelationGetDescr(rel), attnum - 1)->atthasdef;

	relation_close(rel, NoLock);
	return result;
}

/* DROP EXTENSION takes away those that call our functions. */
static void
complete_defaults(Oid collection)
{
	char *name = es_relation_name(collection);

	if (!has_default(collection, ES_ATT_POSITION))
		run_ddl("ALTER TABLE %s ALTER COLUMN \"position\" SET DEFAULT "
				"eventstore.next_position(%s::pg_catalog.regclass)",
				name, quote_literal_cstr(name));
	if (!has_default(collection, ES_ATT_ID))
		run_ddl("ALTER TABLE %s ALTER COLUMN id SET DEFAULT eventstore.uuid_v7()", name);
}

/* --- indexes --- */

/* Does the table have an index of this access method that begins with the column? */
static bool
has_index(Oid collection, const char *method, AttrNumber first_column)
{
	Relation  rel = relation_open(collection, NoLock);
	Oid		  am = get_index_am_oid(method, false);
	List	 *indexes = RelationGetIndexList(rel);
	bool	  found = false;
	ListCell *cell;

	foreach (cell, indexes)
	{
		Relation index = index_open(lfirst_oid(cell), AccessShareLock);

		found = found || (index->rd_rel->relam == am &&
						  index->rd_index->indkey.values[0] == first_column);
		index_close(index, AccessShareLock);
	}
	list_free(indexes);
	relation_close(rel, NoLock);
	return found;
}

static void
complete_indexes(Oid collection)
{
	char *name = es_relation_name(collection);

	if (!has_index(collection, "btree", ES_ATT_POSITION))
		run_ddl("ALTER TABLE %s ADD PRIMARY KEY (\"position\")", name);
	if (!has_index(collection, "btree", ES_ATT_STREAM))
		run_ddl("CREATE INDEX ON %s (stream, version) WHERE stream IS NOT NULL", name);
	if (!has_index(collection, "eventstore_labels", ES_ATT_TAGS))
		run_ddl(
			"CREATE INDEX ON %s USING eventstore_labels (tags eventstore.label_tags_ops,"
			" type eventstore.label_type_ops, \"position\" "
			"eventstore.label_position_ops)",
			name);
}

/* --- heads --- */

static bool
is_heads_table(Oid relid)
{
	Relation rel;
	bool	 matches;

	if (get_rel_relkind(relid) != RELKIND_RELATION)
		return false;
	rel = relation_open(relid, AccessShareLock);
	matches = has_shape_of_heads(rel) && !rel->rd_rel->relispartition &&
			  !rel->rd_rel->relrowsecurity && rel->trigdesc == NULL &&
			  rel->rd_rules == NULL;
	relation_close(rel, AccessShareLock);
	return matches;
}

/* After a restore without the catalog row: by its name. */
static Oid
find_heads(Oid collection)
{
	char *name = makeObjectName(get_rel_name(collection), NULL, "heads");
	Oid	  relid = get_relname_relid(name, get_rel_namespace(collection));

	/* Another role's table of that name is not ours to write, nor to trust. */
	return OidIsValid(relid) &&
				   es_relation_owner(relid) == es_relation_owner(collection) &&
				   is_heads_table(relid)
			   ? relid
			   : InvalidOid;
}

/*
 * Each append to a stream updates its row.  Room on the page keeps that a HOT
 * update, and vacuum comes early, since the table is small and busy.
 */
static Oid
make_heads(Oid collection)
{
	Oid	  schema = get_rel_namespace(collection);
	char *name =
		ChooseRelationName(get_rel_name(collection), NULL, "heads", schema, false);
	char *qualified = quote_qualified_identifier(get_namespace_name(schema), name);

	run_ddl(
		"CREATE TABLE %s (stream pg_catalog.text COLLATE pg_catalog.\"C\" PRIMARY KEY,"
		" version pg_catalog.int8 NOT NULL,"
		" first_position pg_catalog.int8 NOT NULL, last_position pg_catalog.int8 NOT "
		"NULL,"
		" first_at pg_catalog.timestamptz NOT NULL, last_at pg_catalog.timestamptz NOT "
		"NULL)"
		" WITH (fillfactor = 70, autovacuum_vacuum_threshold = 1000,"
		" autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.2)",
		qualified);
	run_ddl("REVOKE ALL ON TABLE %s FROM PUBLIC", qualified);
	return get_relname_relid(name, schema);
}

/* --- triggers --- */

static void
complete_triggers(Oid collection)
{
	EsSegment *segments;
	int		   n;

	if (!OidIsValid(get_trigger_oid(collection, ES_APPEND_TRIGGER, true)))
		run_ddl("CREATE TRIGGER \"" ES_APPEND_TRIGGER "\" BEFORE INSERT ON %s"
				" FOR EACH ROW EXECUTE FUNCTION eventstore.append_row()",
				es_relation_name(collection));
	if (!OidIsValid(get_trigger_oid(collection, ES_GUARD_TRIGGER, true)))
		es_segment_guard(collection);
	n = es_segments_list(collection, &segments);
	for (int i = 0; i < n; i++)
		if (!OidIsValid(get_trigger_oid(segments[i].relid, ES_GUARD_TRIGGER, true)))
			es_segment_guard(segments[i].relid);
	pfree(segments);
}

void
es_layout_complete(Oid collection, EsLayout *layout)
{
	if (get_rel_relkind(layout->counter) != RELKIND_SEQUENCE)
		layout->counter = find_counter(collection);
	if (!OidIsValid(layout->counter))
		layout->counter = make_counter(collection);
	complete_defaults(collection);
	complete_indexes(collection);
	if (!OidIsValid(layout->heads) || !is_heads_table(layout->heads))
		layout->heads = find_heads(collection);
	if (!OidIsValid(layout->heads))
		layout->heads = make_heads(collection);
	complete_triggers(collection);
}

/* --- the catalog row --- */

/* schema.name, cut to an identifier's length with a hash so that it stays unique. */
char *
es_layout_default_channel(Oid collection)
{
	char  *name = psprintf("%s.%s", get_namespace_name(get_rel_namespace(collection)),
						   get_rel_name(collection));
	int	   length = strlen(name);
	uint32 hash;

	if (length <= ES_CHANNEL_MAX_BYTES)
		return name;
	hash = hash_bytes((const unsigned char *) name, length);
	length = pg_mbcliplen(name, length, ES_CHANNEL_MAX_BYTES - 9);
	return psprintf("%.*s_%08x", length, name, hash);
}

bool
es_layout_read(Oid collection, EsLayout *layout, EsPosition *first_position)
{
	Oid			 types[] = {REGCLASSOID};
	Datum		 values[] = {ObjectIdGetDatum(collection)};
	EsRoleSwitch saved;
	bool		 found;
	bool		 isnull;

	es_role_assume(es_extension_owner(), &saved);
	es_spi_execute(
		"SELECT c.heads::pg_catalog.oid, c.counter::pg_catalog.oid, c.first_position"
		" FROM eventstore.collection_catalog c WHERE c.collection = $1",
		1, types, values, NULL, false, SPI_OK_SELECT);
	found = SPI_processed == 1;
	if (found)
	{
		HeapTuple row = SPI_tuptable->vals[0];
		TupleDesc desc = SPI_tuptable->tupdesc;

		layout->heads = DatumGetObjectId(SPI_getbinval(row, desc, 1, &isnull));
		layout->counter = DatumGetObjectId(SPI_getbinval(row, desc, 2, &isnull));
		*first_position = DatumGetInt64(SPI_getbinval(row, desc, 3, &isnull));
	}
	es_role_restore(&saved);
	return found;
}

void
es_layout_register(Oid collection, const EsLayout *layout, const EsOptions *options,
				   EsPosition first_position)
{
	Oid	  types[] = {REGCLASSOID, REGCLASSOID, REGCLASSOID, INT8OID, INT8OID,
					 INT8OID,	  INTERVALOID, INT8OID,		TEXTOID, TEXTOID};
	Datum values[] = {
		ObjectIdGetDatum(collection),			ObjectIdGetDatum(layout->heads),
		ObjectIdGetDatum(layout->counter),		Int64GetDatum(first_position),
		Int64GetDatum(options->segment_size),	Int64GetDatum(options->retain_events),
		IntervalPGetDatum(options->retain_for), Int64GetDatum(options->retain_bytes),
		CStringGetTextDatum(options->notify),	CStringGetTextDatum(options->channel)};
	char		 nulls[] = "          ";
	EsRoleSwitch saved;

	nulls[5] = options->retain_events > 0 ? ' ' : 'n';
	nulls[6] = options->retain_for != NULL ? ' ' : 'n';
	nulls[7] = options->retain_bytes > 0 ? ' ' : 'n';

	es_role_assume(es_extension_owner(), &saved);
	es_spi_execute(
		"INSERT INTO eventstore.collection_catalog (collection, heads, counter,"
		" incarnation, first_position, segment_size, retain_events, retain_for,"
		" retain_bytes, notify, channel)"
		" VALUES ($1, $2, $3, pg_catalog.nextval('eventstore.incarnation_seq'),"
		" $4, $5, $6, $7, $8, $9, $10)",
		lengthof(types), types, values, nulls, false, SPI_OK_INSERT);
	es_role_restore(&saved);
	CacheInvalidateRelcacheByRelid(collection);
}
