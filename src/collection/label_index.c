/*
 * collection/label_index.c
 *		The index access method eventstore_labels: nbtree fed with labels.
 *
 * Readers want "the events with this tag after position p, in order, the first
 * n", in time that follows the result.  A B-tree of (label, position) gives
 * that.  Kept as a table beside each segment it would cost a second heap, a
 * second set of row headers and its own inserts; as an index it costs index
 * tuples only.  No index expression can make several entries out of one row,
 * and GIN, which can, keeps the rows of a key in heap order and only as
 * bitmaps.  So this is an access method of our own, but the tree is
 * PostgreSQL's:
 *
 *	1.	The index is declared on (tags text[], type text, position bigint).  Its
 *		operator classes say STORAGE integer for the first two, so its stored
 *		tuples are (integer, integer, bigint): the halves of a 64-bit label, and
 *		the position.  Their support function 1 compares what is stored, and
 *		all of nbtree works on them unchanged.
 *	2.	aminsert makes one such tuple for the type and one for each distinct
 *		tag, all pointing at the row, and hands them to nbtree.
 *	3.	VACUUM, page deletion, WAL, crash recovery, standbys, predicate locks:
 *		nbtree's own code, called through its own entry points.
 *	4.	eventstore's readers walk the entries of a label with label_scan.c.
 *		The planner gets bitmap scans (tags @> array, type = text, bounds on
 *		position).
 *
 * Two choices of layout.  Three declared columns make three stored ones; halves
 * of a label keep the tuple at the width of two bigints, up to which nbtree
 * packs the pages of a growing group ("localized monotonically increasing
 * insertions") to the fillfactor.  Deduplication is off (there is no equalimage
 * support function): no two entries are equal.
 *
 * Invariants: a label is a hash, so rows found by it have to be checked.  Labels
 * are on disk, so the hash must never change; hash_bytes_extended is what hash
 * partitioning relies on too.
 *
 * A crash between two tuples of a row leaves the row without some entries, and
 * the row is then dead: its transaction did not commit.
 */
#include "postgres.h"

#include <math.h>

#include "access/amapi.h"
#include "access/htup_details.h"
#include "access/nbtree.h"
#include "access/relscan.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xloginsert.h"
#include "catalog/pg_am.h"
#include "catalog/pg_index.h"
#include "catalog/pg_operator.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/label_entry.h"
#include "collection/label_index.h"
#include "collection/sorting.h"
#include "collection/tree_insert.h"
#include "commands/defrem.h"
#include "commands/vacuum.h"
#include "common/hashfn.h"
#include "executor/tuptable.h"
#include "miscadmin.h"
#include "nodes/execnodes.h"
#include "nodes/pathnodes.h"
#include "nodes/tidbitmap.h"
#include "optimizer/cost.h"
#include "optimizer/optimizer.h"
#include "storage/bufmgr.h"
#include "storage/predicate.h"
#include "utils/array.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/selfuncs.h"
#include "utils/snapmgr.h"
#include "utils/tuplesort.h"

/*
 * Types and tags hash apart, so that a tag named as a type has another label.
 * The seeds are on disk with the labels.
 */
#define TYPE_SEED	UINT64CONST(0x7479706500000001)
#define TAG_SEED	UINT64CONST(0x7461670000000001)
#define STREAM_SEED UINT64CONST(0x7374726500000001)

/* Most events have few tags; beyond this the array is allocated. */
#define FEW_LABELS 32

/* What the planner is to think of the entries per row, having no statistics of it. */
#define GUESSED_LABELS_PER_ROW 4

/* The distinct labels of one row, in no order. */
typedef struct LabelSet
{
	int		 n;
	EsLabel *labels; /* 'few', or palloc'd */
	EsLabel	 few[FEW_LABELS];
} LabelSet;

/* A stored tuple as nbtree takes it. */
typedef struct LabelTuple
{
	IndexTupleData header;
	EsLabelEntry   entry;
} LabelTuple;

StaticAssertDecl(sizeof(LabelTuple) == MAXALIGN(sizeof(IndexTupleData)) + 16,
				 "label tuples must lie in memory as in the index");

/* The columns that CREATE INDEX sorts by. */
enum
{
	SORT_HIGH = 1,
	SORT_LOW,
	SORT_POSITION,
	SORT_TID,
	SORT_NATTS = SORT_TID
};

typedef struct BuildState
{
	Tuplesortstate *sort;
	TupleTableSlot *in;			 /* virtual; both have SORT_NATTS columns */
	TupleTableSlot *out;		 /* minimal */
	MemoryContext	row_context; /* reset after each row */
	double			entries;
} BuildState;

/* What the planner's scan keys ask for. */
typedef struct BitmapQuery
{
	bool	 impossible;
	LabelSet labels; /* none = all rows */
	int64	 low;	 /* both inclusive */
	int64	 high;
} BitmapQuery;

PG_FUNCTION_INFO_V1(es_label_index_handler);

/* ---------------------------------------------------------------------------
 * Labels
 * ------------------------------------------------------------------------- */

EsLabel
es_label_of_type(const char *type, int length)
{
	return hash_bytes_extended((const unsigned char *) type, length, TYPE_SEED);
}

EsLabel
es_label_of_tag(const char *tag, int length)
{
	return hash_bytes_extended((const unsigned char *) tag, length, TAG_SEED);
}

EsLabel
es_label_of_stream(const text *stream)
{
	EsLabel label = hash_bytes_extended((const unsigned char *) VARDATA_ANY(stream),
										VARSIZE_ANY_EXHDR(stream), STREAM_SEED);

	return label != 0 ? label : 1;
}

static void
init_labels(LabelSet *set)
{
	set->n = 0;
	set->labels = set->few;
}

static void
free_labels(LabelSet *set)
{
	if (set->labels != set->few)
		pfree(set->labels);
}

/* Makes room for 'more' labels. */
static void
grow_labels(LabelSet *set, int more)
{
	EsLabel *labels;

	if (set->n + more <= FEW_LABELS)
		return;
	labels = palloc(sizeof(EsLabel) * (set->n + more));
	memcpy(labels, set->labels, sizeof(EsLabel) * set->n);
	free_labels(set);
	set->labels = labels;
}

int
es_labels_sort(EsLabel *labels, int n)
{
	int kept = 0;

	if (n < 2)
		return n;
	es_sort_numbers(labels, n);
	for (int i = 1; i < n; i++)
		if (labels[i] != labels[kept])
			labels[++kept] = labels[i];
	return kept + 1;
}

static void
add_type(LabelSet *set, Datum type)
{
	text *value = DatumGetTextPP(type);

	grow_labels(set, 1);
	set->labels[set->n++] =
		es_label_of_type(VARDATA_ANY(value), VARSIZE_ANY_EXHDR(value));
	if ((Pointer) value != DatumGetPointer(type))
		pfree(value);
}

/* Adds the elements of an array of any shape; returns whether one was null. */
static bool
add_tags(LabelSet *set, Datum tags)
{
	ArrayType *array = DatumGetArrayTypeP(tags);
	Datum	  *elements;
	bool	  *nulls;
	int		   n;
	bool	   has_null = false;

	deconstruct_array(array, TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &n);
	grow_labels(set, n);
	for (int i = 0; i < n; i++)
	{
		text *tag = (text *) DatumGetPointer(elements[i]);

		if (nulls[i])
			has_null = true;
		else
			set->labels[set->n++] =
				es_label_of_tag(VARDATA_ANY(tag), VARSIZE_ANY_EXHDR(tag));
	}
	pfree(elements);
	pfree(nulls);
	if ((Pointer) array != DatumGetPointer(tags))
		pfree(array);
	return has_null;
}

static void
collect_labels(const Datum *values, const bool *isnull, LabelSet *set)
{
	init_labels(set);
	if (!isnull[ES_LABEL_ATT_TYPE - 1])
		add_type(set, values[ES_LABEL_ATT_TYPE - 1]);
	if (!isnull[ES_LABEL_ATT_TAGS - 1])
		(void) add_tags(set, values[ES_LABEL_ATT_TAGS - 1]);
	set->n = es_labels_sort(set->labels, set->n);
}

/* ---------------------------------------------------------------------------
 * Inserting
 * ------------------------------------------------------------------------- */

/*
 * nbtree may delete entries when a page is full, guided by the hint that an
 * UPDATE changed nothing in the index, or by entries that scans marked dead.
 * Both ways it takes for granted that a leaf points at a row only once, which
 * here two labels of one row can break.  So it gets no such hint, and nothing
 * here marks entries: VACUUM removes them, which looks at each by itself.
 */
static void
set_tuple(LabelTuple *tuple, const EsLabelEntry *entry, ItemPointer tid)
{
	tuple->header.t_tid = *tid;
	tuple->header.t_info = sizeof(LabelTuple);
	tuple->entry = *entry;
}

static void
insert_entry(Relation index, Relation heap, const EsLabelEntry *entry, ItemPointer tid)
{
	LabelTuple tuple;

	set_tuple(&tuple, entry, tid);
	es_tree_insert_one(index, heap, &tuple.header, false);
}

/* The rare row without a position, in a table that is no collection. */
static void
insert_entry_without_position(Relation index, Relation heap, const EsLabelEntry *entry,
							  ItemPointer tid)
{
	Datum	   values[ES_LABEL_NATTS];
	bool	   isnull[ES_LABEL_NATTS] = {false, false, true};
	IndexTuple itup;

	values[ES_LABEL_ATT_TAGS - 1] = Int32GetDatum(entry->high);
	values[ES_LABEL_ATT_TYPE - 1] = Int32GetDatum(entry->low);
	values[ES_LABEL_ATT_POSITION - 1] = (Datum) 0;
	itup = index_form_tuple(RelationGetDescr(index), values, isnull);
	itup->t_tid = *tid;
	es_tree_insert_one(index, heap, itup, false);
	pfree(itup);
}

static bool
insert_row(Relation index, Datum *values, bool *isnull, ItemPointer tid, Relation heap,
		   IndexUniqueCheck check_unique, bool unchanged, IndexInfo *info)
{
	bool	 no_position = isnull[ES_LABEL_ATT_POSITION - 1];
	LabelSet set;

	collect_labels(values, isnull, &set);
	for (int i = 0; i < set.n; i++)
	{
		EsLabelEntry entry;

		entry.high = es_label_high(set.labels[i]);
		entry.low = es_label_low(set.labels[i]);
		entry.position =
			no_position ? 0 : DatumGetInt64(values[ES_LABEL_ATT_POSITION - 1]);
		if (no_position)
			insert_entry_without_position(index, heap, &entry, tid);
		else
			insert_entry(index, heap, &entry, tid);
	}
	free_labels(&set);
	return false;
}

/* Entries are in order of their halves as signed numbers. */
#define SIGNS UINT64CONST(0x8000000080000000)

/* The labels of all events, each with its event's number, as the index sorts them. */
static EsSortKey *
sort_labels(const EsEvent *events, int n, int *nlabels)
{
	int		   room = es_events_count_labels(events, n);
	EsLabel	  *labels = palloc_extended(sizeof(EsLabel) * room, MCXT_ALLOC_HUGE);
	EsSortKey *sorted = palloc_extended(sizeof(EsSortKey) * room, MCXT_ALLOC_HUGE);

	*nlabels = 0;
	for (int i = 0; i < n; i++)
	{
		int count = es_event_labels(events[i].type, events[i].tags, labels);

		for (int k = 0; k < count; k++)
		{
			sorted[*nlabels].key = labels[k] ^ SIGNS;
			sorted[(*nlabels)++].number = i;
		}
	}
	es_sort_keys(sorted, *nlabels);
	pfree(labels);
	return sorted;
}

/* The events' positions ascend.  Two entries of one label, which a hash may give, are one. */
void
es_label_index_insert(Relation index, Relation heap, const EsEvent *events,
					  TupleTableSlot **slots, int n)
{
	int			nlabels;
	EsSortKey  *labels = sort_labels(events, n, &nlabels);
	LabelTuple *tuples = palloc_extended(sizeof(LabelTuple) * nlabels, MCXT_ALLOC_HUGE);
	IndexTuple *sorted = palloc_extended(sizeof(IndexTuple) * nlabels, MCXT_ALLOC_HUGE);
	int			ntuples = 0;

	for (int i = 0; i < nlabels; i++)
	{
		EsLabel		 label = labels[i].key ^ SIGNS;
		int			 number = labels[i].number;
		EsLabelEntry entry = {es_label_high(label), es_label_low(label),
							  events[number].position};

		if (i > 0 && labels[i].key == labels[i - 1].key &&
			labels[i].number == labels[i - 1].number)
			continue;
		set_tuple(&tuples[ntuples], &entry, &slots[number]->tts_tid);
		sorted[ntuples] = &tuples[ntuples].header;
		ntuples++;
	}
	es_tree_insert(index, heap, sorted, ntuples, false);
	pfree(sorted);
	pfree(tuples);
	pfree(labels);
}

/* ---------------------------------------------------------------------------
 * Building
 *
 * nbtree's bulk loader takes one tuple per row, and its sort wants a btree.  We
 * sort by ourselves and insert in ascending order: each tuple goes to the
 * rightmost page, which nbtree keeps at hand and splits at the fillfactor.
 * ------------------------------------------------------------------------- */

/*
 * The stored tuple has its meaning from the columns' order, so no other can be
 * allowed; and labels are equal only where bytes are.
 */
static void
check_columns(Relation index)
{
	static const Oid expected[ES_LABEL_NATTS] = {TEXTARRAYOID, TEXTOID, INT8OID};
	bool			 fits = index->rd_index->indnatts == ES_LABEL_NATTS &&
				index->rd_index->indnkeyatts == ES_LABEL_NATTS;

	for (int i = 0; fits && i < ES_LABEL_NATTS; i++)
		fits = index->rd_opcintype[i] == expected[i];
	if (!fits)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("index \"%s\" does not have the columns of an index of labels",
						RelationGetRelationName(index)),
				 errdetail("Access method eventstore_labels indexes (tags text[], type "
						   "text, position bigint), in this order.")));
	for (int i = 0; i < ES_LABEL_NATTS; i++)
		if (OidIsValid(index->rd_indcollation[i]) &&
			!get_collation_isdeterministic(index->rd_indcollation[i]))
			ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
							errmsg("index \"%s\" of access method eventstore_labels "
								   "cannot use a nondeterministic collation",
								   RelationGetRelationName(index))));
}

static void
write_metapage(Relation index)
{
	Buffer buffer = ReadBuffer(index, P_NEW);

	Assert(BufferGetBlockNumber(buffer) == BTREE_METAPAGE);
	LockBuffer(buffer, BUFFER_LOCK_EXCLUSIVE);
	START_CRIT_SECTION();
	_bt_initmetapage(BufferGetPage(buffer), P_NONE, 0, false);
	MarkBufferDirty(buffer);
	if (RelationNeedsWAL(index))
		log_newpage_buffer(buffer, true);
	END_CRIT_SECTION();
	UnlockReleaseBuffer(buffer);
}

static TupleDesc
make_sort_descriptor(void)
{
	TupleDesc desc = CreateTemplateTupleDesc(SORT_NATTS);

	TupleDescInitEntry(desc, SORT_HIGH, "high", INT4OID, -1, 0);
	TupleDescInitEntry(desc, SORT_LOW, "low", INT4OID, -1, 0);
	TupleDescInitEntry(desc, SORT_POSITION, "position", INT8OID, -1, 0);
	TupleDescInitEntry(desc, SORT_TID, "tid", TIDOID, -1, 0);
	return desc;
}

static void
begin_sort(BuildState *state)
{
	AttrNumber columns[SORT_NATTS] = {SORT_HIGH, SORT_LOW, SORT_POSITION, SORT_TID};
	Oid	 operators[SORT_NATTS] = {Int4LessOperator, Int4LessOperator, Int8LessOperator,
								  TIDLessOperator};
	Oid	 collations[SORT_NATTS] = {InvalidOid};
	bool nulls_first[SORT_NATTS] = {false};
	TupleDesc desc = make_sort_descriptor();

	state->in = MakeSingleTupleTableSlot(desc, &TTSOpsVirtual);
	state->out = MakeSingleTupleTableSlot(desc, &TTSOpsMinimalTuple);
	state->sort =
		tuplesort_begin_heap(desc, SORT_NATTS, columns, operators, collations,
							 nulls_first, maintenance_work_mem, NULL, TUPLESORT_NONE);
}

/* Called for each row of the table that some transaction may see. */
static void
sort_row(Relation index, ItemPointer tid, Datum *values, bool *isnull, bool alive,
		 void *arg)
{
	BuildState	   *state = arg;
	TupleTableSlot *slot = state->in;
	MemoryContext	old = MemoryContextSwitchTo(state->row_context);
	LabelSet		set;

	collect_labels(values, isnull, &set);
	for (int i = 0; i < set.n; i++)
	{
		ExecClearTuple(slot);
		slot->tts_values[SORT_HIGH - 1] = Int32GetDatum(es_label_high(set.labels[i]));
		slot->tts_values[SORT_LOW - 1] = Int32GetDatum(es_label_low(set.labels[i]));
		slot->tts_values[SORT_POSITION - 1] = values[ES_LABEL_ATT_POSITION - 1];
		slot->tts_values[SORT_TID - 1] = PointerGetDatum(tid);
		memset(slot->tts_isnull, 0, sizeof(bool) * SORT_NATTS);
		slot->tts_isnull[SORT_POSITION - 1] = isnull[ES_LABEL_ATT_POSITION - 1];
		ExecStoreVirtualTuple(slot);
		tuplesort_puttupleslot(state->sort, slot);
	}
	ExecClearTuple(slot);
	state->entries += set.n;
	MemoryContextSwitchTo(old);
	MemoryContextReset(state->row_context);
}

static void
load_sorted(Relation index, Relation heap, BuildState *state)
{
	TupleTableSlot *slot = state->out;

	while (tuplesort_gettupleslot(state->sort, true, false, slot, NULL))
	{
		EsLabelEntry entry;
		ItemPointer	 tid;

		CHECK_FOR_INTERRUPTS();
		slot_getallattrs(slot);
		entry.high = DatumGetInt32(slot->tts_values[SORT_HIGH - 1]);
		entry.low = DatumGetInt32(slot->tts_values[SORT_LOW - 1]);
		tid = (ItemPointer) DatumGetPointer(slot->tts_values[SORT_TID - 1]);
		if (slot->tts_isnull[SORT_POSITION - 1])
			insert_entry_without_position(index, heap, &entry, tid);
		else
		{
			entry.position = DatumGetInt64(slot->tts_values[SORT_POSITION - 1]);
			insert_entry(index, heap, &entry, tid);
		}
	}
}

static IndexBuildResult *
build_index(Relation heap, Relation index, IndexInfo *info)
{
	IndexBuildResult *result = palloc(sizeof(IndexBuildResult));
	BuildState		  state = {0};

	check_columns(index);
	if (RelationGetNumberOfBlocks(index) != 0)
		elog(ERROR, "index \"%s\" already contains data", RelationGetRelationName(index));
	write_metapage(index);

	state.row_context = AllocSetContextCreate(CurrentMemoryContext, "labels of a row",
											  ALLOCSET_SMALL_SIZES);
	begin_sort(&state);
	result->heap_tuples =
		table_index_build_scan(heap, index, info, true, true, sort_row, &state, NULL);
	tuplesort_performsort(state.sort);
	load_sorted(index, heap, &state);
	tuplesort_end(state.sort);
	ExecDropSingleTupleTableSlot(state.in);
	ExecDropSingleTupleTableSlot(state.out);
	MemoryContextDelete(state.row_context);

	result->index_tuples = state.entries;
	return result;
}

/* The initialization fork, of an unlogged table. */
static void
build_empty_index(Relation index)
{
	check_columns(index);
	btbuildempty(index);
}

/* ---------------------------------------------------------------------------
 * The planner's scans
 * ------------------------------------------------------------------------- */

static IndexScanDesc
begin_scan(Relation index, int nkeys, int norderbys)
{
	return RelationGetIndexScan(index, nkeys, norderbys);
}

static void
restart_scan(IndexScanDesc scan, ScanKey keys, int nkeys, ScanKey orderbys, int norderbys)
{
	if (keys != NULL && scan->numberOfKeys > 0)
		memmove(scan->keyData, keys, scan->numberOfKeys * sizeof(ScanKeyData));
}

static void
end_scan(IndexScanDesc scan)
{
	/* amgetbitmap leaves nothing behind. */
}

static void
narrow_positions(BitmapQuery *query, const ScanKeyData *key)
{
	int64 bound = key->sk_subtype == INT4OID ? (int64) DatumGetInt32(key->sk_argument)
											 : DatumGetInt64(key->sk_argument);
	StrategyNumber strategy = key->sk_strategy;

	if ((strategy == BTLessStrategyNumber && bound == PG_INT64_MIN) ||
		(strategy == BTGreaterStrategyNumber && bound == PG_INT64_MAX))
	{
		query->impossible = true;
		return;
	}
	if (strategy == BTLessStrategyNumber)
		query->high = Min(query->high, bound - 1);
	if (strategy == BTLessEqualStrategyNumber || strategy == BTEqualStrategyNumber)
		query->high = Min(query->high, bound);
	if (strategy == BTGreaterEqualStrategyNumber || strategy == BTEqualStrategyNumber)
		query->low = Max(query->low, bound);
	if (strategy == BTGreaterStrategyNumber)
		query->low = Max(query->low, bound + 1);
	if (query->low > query->high)
		query->impossible = true;
}

static void
read_keys(IndexScanDesc scan, BitmapQuery *query)
{
	init_labels(&query->labels);
	query->impossible = false;
	query->low = PG_INT64_MIN;
	query->high = PG_INT64_MAX;
	for (int i = 0; i < scan->numberOfKeys; i++)
	{
		const ScanKeyData *key = &scan->keyData[i];

		/* All operators are strict. */
		if (key->sk_flags & SK_ISNULL)
			query->impossible = true;
		else if (key->sk_attno == ES_LABEL_ATT_TAGS)
		{
			/* No array contains a null: null equals nothing. */
			if (add_tags(&query->labels, key->sk_argument))
				query->impossible = true;
		}
		else if (key->sk_attno == ES_LABEL_ATT_TYPE)
			add_type(&query->labels, key->sk_argument);
		else
			narrow_positions(query, key);
	}
	query->labels.n = es_labels_sort(query->labels.labels, query->labels.n);
}

/* Adds the rows that have one label to the bitmap. */
static int64
add_entries(IndexScanDesc outer, const BitmapQuery *query, EsLabel label,
			TIDBitmap *bitmap)
{
	EsLabelScan *scan =
		es_label_scan_begin(NULL, outer->indexRelation, label, query->low, query->high,
							ForwardScanDirection, outer->xs_snapshot);
	EsPosition position;
	int64	   found = 0;

	while (es_label_scan_next(scan, &position))
	{
		CHECK_FOR_INTERRUPTS();
		tbm_add_tuples(bitmap, es_label_scan_tid(scan), 1, true);
		found++;
	}
	es_label_scan_end(scan);
	return found;
}

/*
 * A scan without a label (bounds on the position alone, or a partial index):
 * any row.  It costs more than a sequential scan, and the planner knows.
 */
static int64
add_all_rows(IndexScanDesc scan, TIDBitmap *bitmap)
{
	Relation	heap = table_open(scan->indexRelation->rd_index->indrelid, NoLock);
	BlockNumber nblocks = RelationGetNumberOfBlocks(heap);

	/* No leaf was looked at that could guard the gaps. */
	PredicateLockRelation(heap, scan->xs_snapshot);
	for (BlockNumber block = 0; block < nblocks; block++)
		tbm_add_page(bitmap, block);
	table_close(heap, NoLock);
	return (int64) nblocks * MaxHeapTuplesPerPage;
}

static int64
intersect_labels(IndexScanDesc scan, const BitmapQuery *query, TIDBitmap *bitmap)
{
	TIDBitmap *common = NULL;
	int64	   found = 0;

	for (int i = 0; i < query->labels.n; i++)
	{
		TIDBitmap *one = tbm_create(work_mem * 1024L, NULL);
		int64	   n = add_entries(scan, query, query->labels.labels[i], one);

		found = i == 0 ? n : Min(found, n);
		if (common == NULL)
			common = one;
		else
		{
			tbm_intersect(common, one);
			tbm_free(one);
		}
		if (tbm_is_empty(common))
			break;
	}
	tbm_union(bitmap, common);
	tbm_free(common);
	return found;
}

static int64
get_bitmap(IndexScanDesc scan, TIDBitmap *bitmap)
{
	BitmapQuery query;
	int64		found = 0;

	read_keys(scan, &query);
	if (query.impossible)
		found = 0;
	else if (query.labels.n == 0)
		found = add_all_rows(scan, bitmap);
	else if (query.labels.n == 1)
		found = add_entries(scan, &query, query.labels.labels[0], bitmap);
	else
		found = intersect_labels(scan, &query, bitmap);
	free_labels(&query.labels);
	return found;
}

/* ---------------------------------------------------------------------------
 * The planner's costs
 * ------------------------------------------------------------------------- */

/* How many labels the right side of a clause stands for. */
static int
count_labels(const OpExpr *clause, AttrNumber column)
{
	const Node	*argument = lsecond(clause->args);
	const Const *constant = (const Const *) argument;

	if (column != ES_LABEL_ATT_TAGS || !IsA(argument, Const) || constant->constisnull)
		return 1;
	return ArrayGetNItems(ARR_NDIM(DatumGetArrayTypeP(constant->constvalue)),
						  ARR_DIMS(DatumGetArrayTypeP(constant->constvalue)));
}

/*
 * The entries to be read: those of each label, however few rows have them all.
 * The planner's selectivity is of all tags together; each alone is taken to
 * have the root of it.
 */
static double
estimate_entries(PlannerInfo *root, IndexPath *path, int *nlabels)
{
	IndexOptInfo *index = path->indexinfo;
	double		  entries = 0;
	ListCell	 *cell;

	*nlabels = 0;
	foreach (cell, path->indexclauses)
	{
		IndexClause *iclause = lfirst_node(IndexClause, cell);
		Node		*clause = (Node *) iclause->rinfo->clause;
		AttrNumber	 column = iclause->indexcol + 1;
		double		 selectivity;
		int			 n = 1;

		if (column == ES_LABEL_ATT_POSITION)
			continue;
		if (IsA(clause, OpExpr))
			n = count_labels((OpExpr *) clause, column);
		if (n == 0)
			continue;
		selectivity =
			clause_selectivity(root, clause, index->rel->relid, JOIN_INNER, NULL);
		entries += n * pow(selectivity, 1.0 / n) * index->rel->tuples;
		*nlabels += n;
	}
	if (*nlabels == 0)
		return index->rel->tuples * GUESSED_LABELS_PER_ROW;
	return entries;
}

static void
estimate_cost(PlannerInfo *root, IndexPath *path, double loop_count, Cost *startup,
			  Cost *total, Selectivity *selectivity, double *correlation, double *pages)
{
	IndexOptInfo *index = path->indexinfo;
	GenericCosts  costs = {0};
	int			  nlabels;
	Cost		  descent;

	costs.numIndexTuples = Max(estimate_entries(root, path, &nlabels), 1.0);
	genericcostestimate(root, path, loop_count, &costs);

	/* One descent per label: about log2(entries) comparisons. */
	descent = cpu_operator_cost * ceil(log(Max(index->tuples, 2.0)) / log(2.0)) *
			  Max(nlabels, 1);
	*startup = costs.indexStartupCost + descent;
	*total = costs.indexTotalCost + descent;
	*selectivity = costs.indexSelectivity;
	*correlation = costs.indexCorrelation;
	*pages = costs.numIndexPages;
}

/* ---------------------------------------------------------------------------
 * The access method
 * ------------------------------------------------------------------------- */

/* The operator classes are the extension's own; the index checks its columns. */
static bool
validate_class(Oid opclass)
{
	return true;
}

Datum
es_label_index_handler(PG_FUNCTION_ARGS)
{
	IndexAmRoutine *am = makeNode(IndexAmRoutine);

	/* Strategies differ from class to class.  What is not set is not offered. */
	am->amstrategies = 0;
	am->amsupport = BTORDER_PROC;
	am->amcanmulticol = true;
	am->amoptionalkey = true;
	am->amstorage = true;
	am->ampredlocks = true;
	am->amparallelvacuumoptions =
		VACUUM_OPTION_PARALLEL_BULKDEL | VACUUM_OPTION_PARALLEL_COND_CLEANUP;

	am->ambuild = build_index;
	am->ambuildempty = build_empty_index;
	am->aminsert = insert_row;
	am->ambulkdelete = btbulkdelete;
	am->amvacuumcleanup = btvacuumcleanup;
	am->amcostestimate = estimate_cost;
	am->amoptions = btoptions;
	am->amvalidate = validate_class;
	am->ambeginscan = begin_scan;
	am->amrescan = restart_scan;
	am->amgetbitmap = get_bitmap;
	am->amendscan = end_scan;
	PG_RETURN_POINTER(am);
}

/* ---------------------------------------------------------------------------
 * Finding the index of a segment
 * ------------------------------------------------------------------------- */

bool
es_index_is_complete(Relation index)
{
	Form_pg_index form = index->rd_index;

	if (!form->indisvalid ||
		!heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL))
		return false;

	/* As the planner does: versions of rows older than the index may be missing in it. */
	return !form->indcheckxmin ||
		   TransactionIdPrecedes(HeapTupleHeaderGetXmin(index->rd_indextuple->t_data),
								 TransactionXmin);
}

static bool
has_event_columns(Relation index)
{
	Form_pg_index form = index->rd_index;

	return form->indnatts == ES_LABEL_NATTS &&
		   form->indkey.values[ES_LABEL_ATT_TAGS - 1] == ES_ATT_TAGS &&
		   form->indkey.values[ES_LABEL_ATT_TYPE - 1] == ES_ATT_TYPE &&
		   form->indkey.values[ES_LABEL_ATT_POSITION - 1] == ES_ATT_POSITION;
}

Oid
es_label_index_am(void)
{
	return get_index_am_oid("eventstore_labels", true);
}

Oid
es_label_index_of(Relation segment)
{
	Oid		  am = es_label_index_am();
	List	 *indexes = RelationGetIndexList(segment);
	Oid		  found = InvalidOid;
	ListCell *cell;

	foreach (cell, indexes)
	{
		Relation index = index_open(lfirst_oid(cell), AccessShareLock);

		if (index->rd_rel->relam == am && has_event_columns(index) &&
			es_index_is_complete(index))
			found = RelationGetRelid(index);
		index_close(index, AccessShareLock);
		if (OidIsValid(found))
			break;
	}
	list_free(indexes);
	return found;
}
