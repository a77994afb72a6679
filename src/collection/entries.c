/*
 * collection/entries.c
 *		The entries of many rows, mostly events, in a table's indexes.
 *
 * The executor gives each row its entries, index after index.  For many rows it
 * is the other way round: all entries of one index, in its order, so that those
 * that lie together are written together (tree_insert.c).  Positions ascend;
 * streams have been sorted for their locks; labels are sorted here.
 *
 * An index that cannot be written like this (of another access method, over
 * expressions, an exclusion constraint) takes all of them to the executor's way.
 */
#include "postgres.h"

#include "collection/entries.h"

#include "access/genam.h"
#include "catalog/index.h"
#include "catalog/pg_am.h"
#include "collection/collection.h"
#include "collection/label_index.h"
#include "collection/sorting.h"
#include "collection/tree_insert.h"
#include "compat.h"
#include "executor/executor.h"
#include "utils/rel.h"

static bool
is_tree(Relation index, const IndexInfo *info)
{
	return index->rd_rel->relam == BTREE_AM_OID && info->ii_Expressions == NIL &&
		   info->ii_ExclusionOps == NULL && index->rd_index->indimmediate;
}

static bool
fits(const ResultRelInfo *rri, Oid label_am)
{
	for (int i = 0; i < rri->ri_NumIndices; i++)
	{
		Relation		 index = rri->ri_IndexRelationDescs[i];
		const IndexInfo *info = rri->ri_IndexRelationInfo[i];

		if (!info->ii_ReadyForInserts ||
			(!is_tree(index, info) &&
			 (index->rd_rel->relam != label_am || info->ii_Predicate != NIL)))
			return false;
	}
	return true;
}

static bool
is_indexed(IndexInfo *info, EState *estate, TupleTableSlot *slot)
{
	if (info->ii_Predicate == NIL)
		return true;
	if (info->ii_PredicateState == NULL)
		info->ii_PredicateState = ExecPrepareQual(info->ii_Predicate, estate);
	GetPerTupleExprContext(estate)->ecxt_scantuple = slot;
	return ExecQual(info->ii_PredicateState, GetPerTupleExprContext(estate));
}

/* The events' numbers by stream, in each stream as they are. */
static uint64 *
order_by_stream(const EsEvent *events, int n)
{
	uint64 *order = palloc(sizeof(uint64) * n);

	/* The streams have numbers in bytewise order; who has none comes last. */
	for (int i = 0; i < n; i++)
		order[i] = (uint64) (uint32) events[i].stream_index << 32 | (uint32) i;
	es_sort_numbers(order, n);
	return order;
}

/* 'events' is NULL where the rows are none. */
static void
insert_into_tree(Relation heap, Relation index, IndexInfo *info, EState *estate,
				 const EsEvent *events, TupleTableSlot **slots, int n)
{
	bool	by_stream = events != NULL && info->ii_IndexAttrNumbers[0] == ES_ATT_STREAM;
	uint64 *order = by_stream ? order_by_stream(events, n) : NULL;
	IndexTuple *tuples = palloc(sizeof(IndexTuple) * n);
	int			ntuples = 0;
	Datum		values[INDEX_MAX_KEYS];
	bool		nulls[INDEX_MAX_KEYS];

	for (int i = 0; i < n; i++)
	{
		TupleTableSlot *slot = slots[by_stream ? (uint32) order[i] : (uint32) i];

		if (!is_indexed(info, estate, slot))
			continue;
		FormIndexDatum(info, slot, estate, values, nulls);
		tuples[ntuples] = index_form_tuple(RelationGetDescr(index), values, nulls);
		tuples[ntuples++]->t_tid = slot->tts_tid;
	}
	es_tree_insert(index, heap, tuples, ntuples, info->ii_Unique);
}

static void
insert_by_row(ResultRelInfo *rri, EState *estate, TupleTableSlot **slots, int n)
{
	for (int i = 0; i < n; i++)
	{
		list_free(es_insert_index_tuples(rri, slots[i], estate, NULL, NIL));
		ResetPerTupleExprContext(estate);
	}
}

static void
insert_by_index(ResultRelInfo *rri, EState *estate, const EsEvent *events,
				TupleTableSlot **slots, int n)
{
	MemoryContext old = MemoryContextSwitchTo(GetPerTupleMemoryContext(estate));

	for (int i = 0; i < rri->ri_NumIndices; i++)
	{
		Relation index = rri->ri_IndexRelationDescs[i];

		if (index->rd_rel->relam == BTREE_AM_OID)
			insert_into_tree(rri->ri_RelationDesc, index, rri->ri_IndexRelationInfo[i],
							 estate, events, slots, n);
		else
			es_label_index_insert(index, rri->ri_RelationDesc, events, slots, n);
	}
	MemoryContextSwitchTo(old);
	ResetPerTupleExprContext(estate);
}

void
es_entries_insert(ResultRelInfo *rri, EState *estate, const EsEvent *events,
				  TupleTableSlot **slots, int n)
{
	if (n > 1 && fits(rri, es_label_index_am()))
		insert_by_index(rri, estate, events, slots, n);
	else
		insert_by_row(rri, estate, slots, n);
}

void
es_entries_insert_rows(ResultRelInfo *rri, EState *estate, TupleTableSlot **slots, int n)
{
	if (n > 1 && fits(rri, InvalidOid))
		insert_by_index(rri, estate, NULL, slots, n);
	else
		insert_by_row(rri, estate, slots, n);
}
