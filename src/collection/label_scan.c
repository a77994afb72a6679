/*
 * collection/label_scan.c
 *		Walking the entries of one label, in position order, with leaps.
 *
 * A conjunction of labels is found by leaps: each label's scan is asked in turn
 * for its next entry at or beyond the position where the last one stopped.  So
 * what matters here is the cost of a leap, and that many scans can be open at
 * once.  nbtree's own scan is not made for that: it copies a page's worth of
 * whole tuples per leap, keeps 45 kB and a pin per scan.  This one
 *
 *	1.	descends with _bt_search to the leaf where the wanted entry belongs,
 *	2.	copies position and row pointer of the label's entries on that leaf, from
 *		the wanted one on in the direction of the walk, and releases the leaf,
 *	3.	answers leaps within the copy by binary search, and others by 1.
 *
 * The next leaf is reached by descending anew as well, to the place just
 * beyond the last entry copied (entries are unique by label, position and row
 * pointer, so that place is exact).  That costs a microsecond per leaf and
 * makes both directions alike; only where a leaf turns out to hold nothing of
 * use do we step to its neighbour.
 *
 * What is copied may change behind us.  New entries belong to transactions
 * that our snapshot does not see.  An entry that VACUUM removes pointed to a
 * row that no snapshot sees; where its place in the table is used again, the
 * row there is newer than our snapshot.  nbtree's plain scans go by the same
 * reasoning, and it needs an MVCC snapshot.
 *
 * Locks: a share lock on one leaf at a time, never held on return; predicate
 * locks on each leaf looked at, as in nbtree, so that a serializable reader's
 * gaps are guarded.  Dead entries are not marked as such: nbtree cannot handle
 * that here (label_index.c, insert_tuple), and in a log they are the few rows
 * of aborted appends.
 */
#include "postgres.h"

#include "access/nbtree.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "collection/label_entry.h"
#include "collection/label_index.h"
#include "compat.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/bufmgr.h"
#include "storage/predicate.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

typedef struct ScanEntry
{
	EsPosition		position;
	ItemPointerData tid;
} ScanEntry;

/* A place between entries: before all entries at or after (position, tid). */
typedef struct Boundary
{
	EsPosition		position;
	ItemPointerData tid; /* invalid = before all rows */
} Boundary;

struct EsLabelScan
{
	Relation			 segment;
	Relation			 index;
	IndexFetchTableData *fetch; /* made by the first fetch */
	Snapshot			 snapshot;
	bool				 forward;
	int32				 high; /* the label */
	int32				 low;
	EsPosition			 start; /* bounds in the direction of the walk, inclusive */
	EsPosition			 stop;
	bool				 exhausted; /* nothing of use lies beyond the batch */
	int					 n;			/* the batch, in the direction of the walk */
	int					 current;	/* n = none */
	ScanEntry			 batch[MaxIndexTuplesPerPage];
	BTScanInsertData	 key;
};

/* ---------------------------------------------------------------------------
 * Order
 * ------------------------------------------------------------------------- */

/* Does a come before b in the direction of the walk? */
static inline bool
comes_before(const EsLabelScan *scan, EsPosition a, EsPosition b)
{
	return scan->forward ? a < b : a > b;
}

static inline IndexTuple
tuple_at(Page page, OffsetNumber offset)
{
	return (IndexTuple) PageGetItem(page, PageGetItemId(page, offset));
}

static inline bool
has_label(const EsLabelScan *scan, const IndexTupleData *itup)
{
	const EsLabelEntry *entry = es_label_entry(itup);

	return entry->high == scan->high && entry->low == scan->low;
}

/* Does the entry lie before the boundary, in the order of the index? */
static bool
lies_before(const EsLabelScan *scan, IndexTuple itup, const Boundary *boundary)
{
	const EsLabelEntry *entry = es_label_entry(itup);
	EsPosition			position;

	if (entry->high != scan->high)
		return entry->high < scan->high;
	if (entry->low != scan->low)
		return entry->low < scan->low;
	position = es_label_entry_position(itup);
	if (position != boundary->position)
		return position < boundary->position;
	return ItemPointerIsValid(&boundary->tid) &&
		   ItemPointerCompare(&itup->t_tid, (ItemPointer) &boundary->tid) < 0;
}

/* The first item of a leaf that is not before the boundary; may be max + 1. */
static OffsetNumber
find_boundary(const EsLabelScan *scan, Page page, const Boundary *boundary)
{
	OffsetNumber low = P_FIRSTDATAKEY(BTPageGetOpaque(page));
	OffsetNumber high = OffsetNumberNext(PageGetMaxOffsetNumber(page));

	while (low < high)
	{
		OffsetNumber middle = low + (high - low) / 2;

		if (lies_before(scan, tuple_at(page, middle), boundary))
			low = OffsetNumberNext(middle);
		else
			high = middle;
	}
	return low;
}

/* ---------------------------------------------------------------------------
 * Leaves
 * ------------------------------------------------------------------------- */

/* The leaf where the boundary lies, share-locked; invalid in an empty index. */
static Buffer
descend(EsLabelScan *scan, const Boundary *boundary)
{
	BTScanInsert key = &scan->key;
	ScanKey		 position = &key->scankeys[ES_LABEL_ATT_POSITION - 1];
	Buffer		 buffer;

	position->sk_argument = Int64GetDatum(boundary->position);
	position->sk_flags = boundary->position == ES_LABEL_NULL_POSITION ? SK_ISNULL : 0;
	key->scantid =
		ItemPointerIsValid(&boundary->tid) ? (ItemPointer) &boundary->tid : NULL;
	_bt_freestack(es_bt_search(scan->index, key, &buffer, scan->snapshot));
	if (!BufferIsValid(buffer) && IsolationIsSerializable())
	{
		/* There is no page to guard the gap, so the index does; then look again. */
		PredicateLockRelation(scan->index, scan->snapshot);
		_bt_freestack(es_bt_search(scan->index, key, &buffer, scan->snapshot));
	}
	return buffer;
}

/* Lets go of a leaf and locks the one with the given number. */
static Buffer
change_leaf(EsLabelScan *scan, Buffer buffer, BlockNumber next)
{
	_bt_relbuf(scan->index, buffer);
	CHECK_FOR_INTERRUPTS();
	buffer = _bt_getbuf(scan->index, next, BT_READ);
	es_test_for_old_snapshot(scan->snapshot, scan->index, BufferGetPage(buffer));
	return buffer;
}

/*
 * Takes an item into the batch; false where it is beyond what the walk wants,
 * as is everything after it.
 */
static inline bool
take_item(EsLabelScan *scan, Page page, OffsetNumber offset)
{
	IndexTuple itup = tuple_at(page, offset);
	ScanEntry *entry = &scan->batch[scan->n];

	Assert(!BTreeTupleIsPivot(itup) && !BTreeTupleIsPosting(itup));
	if (!has_label(scan, itup))
		return false;
	entry->position = es_label_entry_position(itup);
	if (comes_before(scan, scan->stop, entry->position))
		return false;
	entry->tid = itup->t_tid;
	if (!ItemIdIsDead(PageGetItemId(page, offset)))
		scan->n++;
	return true;
}

/* Fills the batch from a leaf, from the boundary on.  Sets exhausted at the end. */
static void
read_leaf(EsLabelScan *scan, Buffer buffer, const Boundary *boundary)
{
	Page		 page = BufferGetPage(buffer);
	BTPageOpaque opaque = BTPageGetOpaque(page);
	OffsetNumber first = P_FIRSTDATAKEY(opaque);
	OffsetNumber last = PageGetMaxOffsetNumber(page);
	OffsetNumber offset;

	PredicateLockPage(scan->index, BufferGetBlockNumber(buffer), scan->snapshot);
	if (P_IGNORE(opaque))
	{
		scan->exhausted = scan->forward ? P_RIGHTMOST(opaque) : P_LEFTMOST(opaque);
		return;
	}
	offset = find_boundary(scan, page, boundary);
	if (scan->forward)
	{
		while (offset <= last && take_item(scan, page, offset))
			offset++;
		scan->exhausted = offset <= last || P_RIGHTMOST(opaque);
	}
	else
	{
		while (offset > first && take_item(scan, page, offset - 1))
			offset--;
		scan->exhausted = offset > first || P_LEFTMOST(opaque);
	}
}

/*
 * The left neighbour of a leaf, or invalid where the chain has changed while
 * no lock was held: then the caller descends again.  A half-dead page is in
 * the chain, empty; a deleted one has left it.
 */
static Buffer
step_left(EsLabelScan *scan, Buffer buffer)
{
	BlockNumber	 from = BufferGetBlockNumber(buffer);
	BTPageOpaque opaque = BTPageGetOpaque(BufferGetPage(buffer));

	buffer = change_leaf(scan, buffer, opaque->btpo_prev);
	opaque = BTPageGetOpaque(BufferGetPage(buffer));
	if (!P_ISDELETED(opaque) && opaque->btpo_next == from)
		return buffer;
	_bt_relbuf(scan->index, buffer);
	return InvalidBuffer;
}

/* Reads the first leaf beyond the boundary that has anything of use. */
static void
load_batch(EsLabelScan *scan, const Boundary *boundary)
{
	Buffer buffer = descend(scan, boundary);

	scan->n = 0;
	scan->current = 0;
	scan->exhausted = !BufferIsValid(buffer);
	while (BufferIsValid(buffer))
	{
		read_leaf(scan, buffer, boundary);
		if (scan->n > 0 || scan->exhausted)
		{
			_bt_relbuf(scan->index, buffer);
			break;
		}
		if (scan->forward)
			buffer = change_leaf(scan, buffer,
								 BTPageGetOpaque(BufferGetPage(buffer))->btpo_next);
		else
		{
			buffer = step_left(scan, buffer);
			if (!BufferIsValid(buffer))
				buffer = descend(scan, boundary);
		}
	}
	pgstat_count_index_tuples(scan->index, scan->n);
}

/* Loads from the first entry at or beyond a position. */
static void
load_from_position(EsLabelScan *scan, EsPosition at)
{
	Boundary boundary;

	/* Walking backward the boundary lies after the entries at that position. */
	boundary.position = scan->forward ? at : at + 1;
	ItemPointerSetInvalid(&boundary.tid);
	load_batch(scan, &boundary);
}

/* Loads what follows the last entry of the batch. */
static void
load_following(EsLabelScan *scan)
{
	const ScanEntry *last = &scan->batch[scan->n - 1];
	Boundary		 boundary;

	boundary.position = last->position;
	boundary.tid = last->tid;
	if (scan->forward)
		ItemPointerInc(&boundary.tid);
	load_batch(scan, &boundary);
}

/* ---------------------------------------------------------------------------
 * The interface
 * ------------------------------------------------------------------------- */

EsLabelScan *
es_label_scan_begin(Relation segment, Relation index, EsLabel label, EsPosition first,
					EsPosition last, ScanDirection direction, Snapshot snapshot)
{
	EsLabelScan *scan = palloc(sizeof(EsLabelScan));
	Datum		 arguments[ES_LABEL_NATTS] = {0};

	Assert(IsMVCCSnapshot(snapshot));
	Assert(!ScanDirectionIsBackward(direction) || last < ES_LABEL_NULL_POSITION);
	scan->segment = segment;
	scan->index = index;
	scan->fetch = NULL;
	scan->snapshot = snapshot;
	scan->forward = !ScanDirectionIsBackward(direction);
	scan->high = es_label_high(label);
	scan->low = es_label_low(label);
	scan->start = scan->forward ? first : last;
	scan->stop = scan->forward ? last : first;
	scan->exhausted = comes_before(scan, scan->stop, scan->start);
	scan->n = 0;
	scan->current = 0;

	memset(&scan->key, 0, offsetof(BTScanInsertData, scankeys));
	scan->key.heapkeyspace = true;
	scan->key.keysz = ES_LABEL_NATTS;
	arguments[ES_LABEL_ATT_TAGS - 1] = Int32GetDatum(scan->high);
	arguments[ES_LABEL_ATT_TYPE - 1] = Int32GetDatum(scan->low);
	for (int i = 0; i < ES_LABEL_NATTS; i++)
		ScanKeyEntryInitializeWithInfo(
			&scan->key.scankeys[i], 0, i + 1, InvalidStrategy, InvalidOid, InvalidOid,
			index_getprocinfo(index, i + 1, BTORDER_PROC), arguments[i]);
	pgstat_count_index_scan(index);
	return scan;
}

static bool
report_current(EsLabelScan *scan, EsPosition *found)
{
	if (scan->current >= scan->n)
		return false;
	*found = scan->batch[scan->current].position;
	return true;
}

/* The batch is known to have an entry at or beyond 'at'. */
static void
leap_in_batch(EsLabelScan *scan, EsPosition at)
{
	int low = scan->current;
	int high = scan->n - 1;

	while (low < high)
	{
		int middle = (low + high) / 2;

		if (comes_before(scan, scan->batch[middle].position, at))
			low = middle + 1;
		else
			high = middle;
	}
	scan->current = low;
}

bool
es_label_scan_seek(EsLabelScan *scan, EsPosition at, EsPosition *found)
{
	if (comes_before(scan, at, scan->start))
		at = scan->start;
	if (scan->current < scan->n &&
		!comes_before(scan, scan->batch[scan->n - 1].position, at))
	{
		/* Mostly it is this one or the next. */
		for (int tries = 0; tries < 2; tries++, scan->current++)
			if (!comes_before(scan, scan->batch[scan->current].position, at))
				return report_current(scan, found);
		leap_in_batch(scan, at);
	}
	else if (scan->exhausted || comes_before(scan, scan->stop, at))
	{
		scan->exhausted = true;
		scan->current = scan->n;
	}
	else
		load_from_position(scan, at);
	return report_current(scan, found);
}

bool
es_label_scan_next(EsLabelScan *scan, EsPosition *found)
{
	if (scan->n == 0)
		return es_label_scan_seek(scan, scan->start, found);
	if (scan->current < scan->n)
		scan->current++;
	if (scan->current == scan->n && !scan->exhausted)
		load_following(scan);
	return report_current(scan, found);
}

ItemPointer
es_label_scan_tid(EsLabelScan *scan)
{
	Assert(scan->current < scan->n);
	return &scan->batch[scan->current].tid;
}

bool
es_label_scan_fetch(EsLabelScan *scan, TupleTableSlot *slot)
{
	ItemPointerData tid;
	bool			again = false;

	if (scan->fetch == NULL)
		scan->fetch = table_index_fetch_begin(scan->segment);

	/* A copy: it is moved to the row's place in a chain of versions. */
	tid = *es_label_scan_tid(scan);
	if (!table_index_fetch_tuple(scan->fetch, &tid, scan->snapshot, slot, &again, NULL))
		return false;
	pgstat_count_heap_fetch(scan->index);
	return true;
}

void
es_label_scan_end(EsLabelScan *scan)
{
	if (scan->fetch != NULL)
		table_index_fetch_end(scan->fetch);
	pfree(scan);
}
