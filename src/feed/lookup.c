/*
 * feed/lookup.c
 *		Walking a B-tree index of a known shape.
 *
 * The index is found by its columns at every call, in the relcache's list and
 * the syscache: some 0.2 us, and right after REINDEX, after a restore that
 * named it otherwise, and where the user made another one of the same shape.
 */
#include "postgres.h"

#include "feed/lookup.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/stratnum.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/pg_am.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_index.h"
#include "collection/collection.h"
#include "collection/layout.h"
#include "compat.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/syscache.h"

struct EsLookup
{
	Relation		rel;
	Relation		index;
	IndexScanDesc	scan;
	ScanDirection	direction;
	TupleTableSlot *slot;
	ScanKeyData		keys[ES_LOOKUP_MAX_KEYS];
};

const EsIndexShape es_index_of_positions = {1, {ES_ATT_POSITION}};
const EsIndexShape es_index_of_versions = {2, {ES_ATT_STREAM, ES_ATT_VERSION}};
const EsIndexShape es_index_of_streams = {1, {ES_HEADS_STREAM}};

/*
 * Usable for every row: valid, not partial, or partial in a way that leaves out
 * only rows without a stream, which a key on the stream never asks for.
 */
static bool
has_shape(Oid indexid, const EsIndexShape *shape)
{
	HeapTuple	  tuple = SearchSysCache1(INDEXRELID, ObjectIdGetDatum(indexid));
	Form_pg_index form;
	bool		  fits;

	if (!HeapTupleIsValid(tuple))
		return false;
	form = (Form_pg_index) GETSTRUCT(tuple);
	fits = form->indisvalid && form->indisready && form->indnkeyatts == shape->ncolumns;
	for (int i = 0; fits && i < shape->ncolumns; i++)
		fits = form->indkey.values[i] == shape->columns[i];
	if (fits && shape != &es_index_of_versions)
		fits = heap_attisnull(tuple, Anum_pg_index_indpred, NULL);
	ReleaseSysCache(tuple);
	return fits;
}

static Relation
open_index(Relation rel, const EsIndexShape *shape)
{
	List	 *indexes = RelationGetIndexList(rel);
	Relation  found = NULL;
	ListCell *cell;

	foreach (cell, indexes)
	{
		Oid indexid = lfirst_oid(cell);

		if (!has_shape(indexid, shape))
			continue;
		found = index_open(indexid, AccessShareLock);
		if (found->rd_rel->relam == BTREE_AM_OID)
			break;
		index_close(found, AccessShareLock);
		found = NULL;
	}
	list_free(indexes);

	if (found == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"%s\" has lost an index that eventstore made",
						RelationGetRelationName(rel)),
				 errdetail("No valid B-tree index is on column \"%s\"%s alone.",
						   get_attname(RelationGetRelid(rel), shape->columns[0], false),
						   shape->ncolumns > 1 ? " and the version" : ""),
				 errhint("Make it again, or call eventstore.repair_collection() as the "
						 "owner of the collection.")));
	return found;
}

EsLookup *
es_lookup_begin(Oid relid, const EsIndexShape *shape, const ScanKeyData *keys, int nkeys,
				ScanDirection direction, Snapshot snapshot)
{
	Relation  rel = try_table_open(relid, AccessShareLock);
	EsLookup *lookup;

	if (rel == NULL)
		return NULL;
	Assert(nkeys <= ES_LOOKUP_MAX_KEYS);
	if (rel->rd_rel->relispartition)
		es_layout_check(rel);
	else
		es_layout_check_heads(rel);
	lookup = palloc(sizeof(EsLookup));
	lookup->rel = rel;
	lookup->index = open_index(rel, shape);
	lookup->direction = direction;
	lookup->slot = table_slot_create(rel, NULL);
	if (nkeys > 0)
		memcpy(lookup->keys, keys, sizeof(ScanKeyData) * nkeys);
	lookup->scan = es_index_beginscan(rel, lookup->index, snapshot, nkeys);
	index_rescan(lookup->scan, lookup->keys, nkeys, NULL, 0);
	return lookup;
}

TupleTableSlot *
es_lookup_next(EsLookup *lookup)
{
	if (!index_getnext_slot(lookup->scan, lookup->direction, lookup->slot))
		return NULL;
	return lookup->slot;
}

void
es_lookup_end(EsLookup *lookup)
{
	ExecDropSingleTupleTableSlot(lookup->slot);
	index_endscan(lookup->scan);
	index_close(lookup->index, AccessShareLock);
	table_close(lookup->rel, AccessShareLock);
	pfree(lookup);
}

void
es_lookup_text_key(ScanKey key, AttrNumber column, StrategyNumber strategy,
				   const text *value)
{
	RegProcedure proc = strategy == BTEqualStrategyNumber ? F_TEXTEQ : F_TEXT_GE;

	Assert(strategy == BTEqualStrategyNumber || strategy == BTGreaterEqualStrategyNumber);
	/* The columns are COLLATE "C", which is what ScanKeyInit assumes. */
	ScanKeyInit(key, column, strategy, proc, PointerGetDatum(value));
	Assert(key->sk_collation == C_COLLATION_OID);
}

void
es_lookup_int_key(ScanKey key, AttrNumber column, StrategyNumber strategy, int64 value)
{
	RegProcedure proc;

	switch (strategy)
	{
		case BTLessEqualStrategyNumber:
			proc = F_INT8LE;
			break;
		case BTGreaterEqualStrategyNumber:
			proc = F_INT8GE;
			break;
		default:
			Assert(strategy == BTEqualStrategyNumber);
			proc = F_INT8EQ;
			break;
	}
	ScanKeyInit(key, column, strategy, proc, Int64GetDatum(value));
}
