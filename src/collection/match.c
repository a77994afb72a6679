/*
 * collection/match.c
 *		The walk over a collection's events that match a query, in position order.
 *
 *	1.	The range is clamped to what is kept, and the segments that it touches
 *		are copied.  A hole between them is an error: it would be skipped events.
 *	2.	One segment is open at a time, in the order of the walk.
 *	3.	Without a query (or with one that matches everything) the rows come by
 *		the index of the primary key, a heap page at a time (page_fetch.c).
 *	4.	With one, each item of it is a conjunction of parts: each tag, and the
 *		union of its types.  A part can leap: "your next position at or beyond
 *		p?" (label_scan.c).  The parts are asked in turn, each about the answer
 *		of the one before, until all give the same position.  So the rarest part
 *		sets the pace, without statistics, and two frequent ones pass each other
 *		in leaps.
 *	5.	The items are merged by position.  Only then is the row fetched, and
 *		compared with the query: labels are hashes.
 *	6.	In a segment without a usable index of labels, each row is fetched and
 *		compared.
 *
 * Time is thus that of the result, plus per segment a descent for each label.
 *
 * Locks: AccessShare on a segment and its index while it is open, released
 * behind it, so that a long walk does not fill the lock table.  A segment
 * cannot be dropped under the walk: dropping waits for the caller's lock on
 * the collection.  If one is gone all the same, the walk ends with an error,
 * never with fewer events.
 *
 * Memory: the walk's context, a context for the open segment (reset with it),
 * a context for the comparison of a row (reset with each).
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/relscan.h"
#include "access/skey.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/pg_am.h"
#include "collection/label_index.h"
#include "collection/layout.h"
#include "collection/match.h"
#include "collection/page_fetch.h"
#include "compat.h"
#include "errors.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"

/* One item of the query in the open segment. */
typedef struct ItemWalk
{
	int			  nlabels; /* scans that must all agree: the tags, or a single type */
	EsLabelScan **labels;
	int			  ntypes; /* scans of which one must: the types, where several */
	EsLabelScan **types;
	EsLabelScan	 *type_found; /* the type scan that stands at 'at' */
	EsPosition	  at;		  /* where all agree */
	bool		  done;		  /* no more in this segment */
} ItemWalk;

/* The open segment: either 'scan' or 'items' is set. */
typedef struct SegmentWalk
{
	Relation		rel;
	Relation		index;
	TupleTableSlot *slot;
	EsPosition		low; /* the range within it, inclusive */
	EsPosition		high;
	IndexScanDesc	scan;
	EsPageFetch	   *fetch;	 /* of 'scan' */
	bool			compare; /* the scan's rows with the query */
	int				nitems;
	ItemWalk	   *items;
	bool			started;
	EsPosition		last; /* where the last row was found */
} SegmentWalk;

struct EsMatch
{
	Oid			   collection;
	const EsQuery *query; /* NULL = everything */
	bool		   forward;
	Snapshot	   snapshot;
	EsPosition	   low; /* inclusive */
	EsPosition	   high;
	int			   nsegments; /* those that the range touches */
	EsSegment	  *segments;  /* in the order of the walk */
	int			   next_segment;
	SegmentWalk	  *open; /* NULL = none */
	MemoryContext  context;
	MemoryContext  segment_context;
	MemoryContext  row_context;
};

static inline bool
comes_before(const EsMatch *match, EsPosition a, EsPosition b)
{
	return match->forward ? a < b : a > b;
}

static inline EsPosition
just_beyond(const EsMatch *match, EsPosition at)
{
	return match->forward ? at + 1 : at - 1;
}

static inline ScanDirection
scan_direction(const EsMatch *match)
{
	return match->forward ? ForwardScanDirection : BackwardScanDirection;
}

/* ---------------------------------------------------------------------------
 * Beginning
 * ------------------------------------------------------------------------- */

static void
report_missing(Oid collection, EsPosition first, EsPosition last)
{
	ereport(
		ERROR,
		(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
		 errmsg("a segment of collection \"%s\" is missing", get_rel_name(collection)),
		 errdetail("No segment holds positions " INT64_FORMAT " to " INT64_FORMAT ".",
				   first, last),
		 errhint("Attach it again with ALTER TABLE ... ATTACH PARTITION, or give up what "
				 "it held with eventstore.truncate_before().")));
}

/* Copies the segments of the range; what lies beyond the last one is not there yet. */
static void
copy_segments(EsMatch *match, const EsCollection *coll)
{
	EsPosition expected = match->low;

	match->segments = palloc(sizeof(EsSegment) * Max(coll->nsegments, 1));
	match->nsegments = 0;
	for (int i = 0; i < coll->nsegments; i++)
	{
		const EsSegment *segment = &coll->segments[i];

		if (segment->end <= match->low)
			continue;
		if (expected > match->high)
			break;
		if (segment->first > expected)
			report_missing(match->collection, expected,
						   Min(segment->first - 1, match->high));
		match->segments[match->nsegments++] = *segment;
		expected = segment->end;
	}
}

static void
reverse_segments(EsMatch *match)
{
	for (int i = 0, j = match->nsegments - 1; i < j; i++, j--)
	{
		EsSegment segment = match->segments[i];

		match->segments[i] = match->segments[j];
		match->segments[j] = segment;
	}
}

EsMatch *
es_match_begin(EsCollection *coll, const EsQuery *query, EsPosition after,
			   EsPosition before, ScanDirection direction, Snapshot snapshot)
{
	MemoryContext context = AllocSetContextCreate(
		CurrentMemoryContext, "walk over events", ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	EsMatch		 *match = palloc0(sizeof(EsMatch));

	match->collection = coll->relid;
	match->query = query != NULL && query->everything ? NULL : query;
	match->forward = !ScanDirectionIsBackward(direction);
	match->snapshot = snapshot;
	match->context = context;
	match->segment_context =
		AllocSetContextCreate(context, "segment of a walk", ALLOCSET_DEFAULT_SIZES);
	match->row_context =
		AllocSetContextCreate(context, "row of a walk", ALLOCSET_SMALL_SIZES);

	/* A position one beyond the range has to be representable in both directions. */
	match->low = Max(Max(after, coll->first_position - 1), 0) + 1;
	match->high = Min(before, PG_INT64_MAX - 1) - 1;
	if (after >= PG_INT64_MAX - 1)
	{
		match->low = 1;
		match->high = 0;
	}
	if (match->low <= match->high)
		copy_segments(match, coll);
	if (!match->forward)
		reverse_segments(match);
	MemoryContextSwitchTo(old);
	return match;
}

/* ---------------------------------------------------------------------------
 * Opening a segment
 * ------------------------------------------------------------------------- */

/*
 * Opens the relation of a segment.  One that is gone was dropped by retention
 * after our list was made, or taken away by hand.
 */
static Relation
open_segment(const EsMatch *match, const EsSegment *segment)
{
	Relation	  rel = try_table_open(segment->relid, AccessShareLock);
	EsCollection *coll;

	if (rel != NULL)
	{
		/* Attaching takes a table of any column order; C reads by number. */
		es_layout_check(rel);
		return rel;
	}
	coll = es_collection_get(match->collection);
	if (segment->end > coll->first_position)
		report_missing(match->collection, segment->first, segment->end - 1);
	ereport(ERROR,
			(errcode(ERRCODE_ES_NOT_RETAINED),
			 errmsg("events of collection \"%s\" were dropped while they were being read",
					get_rel_name(match->collection)),
			 errdetail("Requested " INT64_FORMAT ", first kept " INT64_FORMAT ".",
					   Max(segment->first, match->low), coll->first_position)));
	return NULL;
}

/* A B-tree that has every row of the segment and begins with the position. */
static bool
orders_by_position(Relation index)
{
	Form_pg_index form = index->rd_index;

	return index->rd_rel->relam == BTREE_AM_OID &&
		   form->indkey.values[0] == ES_ATT_POSITION &&
		   (index->rd_indoption[0] & INDOPTION_DESC) == 0 && es_index_is_complete(index);
}

static Relation
open_position_index(Relation segment)
{
	List	 *indexes = RelationGetIndexList(segment);
	ListCell *cell;

	foreach (cell, indexes)
	{
		Relation index = index_open(lfirst_oid(cell), AccessShareLock);

		if (orders_by_position(index))
		{
			list_free(indexes);
			return index;
		}
		index_close(index, AccessShareLock);
	}
	ereport(
		ERROR,
		(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
		 errmsg("segment \"%s\" has no valid index of positions",
				RelationGetRelationName(segment)),
		 errhint("REINDEX its primary key, or create a B-tree index on (position).")));
	return NULL;
}

/* Rows in the order of the primary key. */
static void
begin_plain(EsMatch *match, SegmentWalk *walk, const EsSegment *segment)
{
	ScanKeyData keys[2];
	int			n = 0;

	/* The segment's own bounds need no keys. */
	if (walk->low > segment->first)
		ScanKeyInit(&keys[n++], 1, BTGreaterEqualStrategyNumber, F_INT8GE,
					Int64GetDatum(walk->low));
	if (walk->high < segment->end - 1)
		ScanKeyInit(&keys[n++], 1, BTLessEqualStrategyNumber, F_INT8LE,
					Int64GetDatum(walk->high));
	walk->index = open_position_index(walk->rel);
	walk->scan = es_index_beginscan(walk->rel, walk->index, match->snapshot, n);
	index_rescan(walk->scan, keys, n, NULL, 0);
	walk->fetch = es_page_fetch_begin(walk->scan, scan_direction(match));
	walk->compare = match->query != NULL;
}

static EsLabelScan **
begin_labels(EsMatch *match, SegmentWalk *walk, const EsLabel *labels, int n, int room)
{
	EsLabelScan **scans = palloc(sizeof(EsLabelScan *) * Max(n + room, 1));

	for (int i = 0; i < n; i++)
		scans[i] =
			es_label_scan_begin(walk->rel, walk->index, labels[i], walk->low, walk->high,
								scan_direction(match), match->snapshot);
	return scans;
}

static void
begin_items(EsMatch *match, SegmentWalk *walk, Oid index)
{
	const EsQuery *query = match->query;

	walk->index = index_open(index, AccessShareLock);
	walk->nitems = query->nitems;
	walk->items = palloc0(sizeof(ItemWalk) * query->nitems);
	for (int i = 0; i < query->nitems; i++)
	{
		const EsQueryItem *wanted = &query->items[i];
		ItemWalk		  *item = &walk->items[i];

		item->nlabels = wanted->ntags;
		item->labels = begin_labels(match, walk, wanted->tag_labels, wanted->ntags, 1);
		item->ntypes = wanted->ntypes;
		item->types = begin_labels(match, walk, wanted->type_labels, wanted->ntypes, 0);

		/* A single type is a label like any other. */
		if (item->ntypes == 1)
		{
			item->labels[item->nlabels++] = item->types[0];
			item->ntypes = 0;
		}
	}
}

static void
open_walk(EsMatch *match, const EsSegment *segment)
{
	MemoryContext old = MemoryContextSwitchTo(match->segment_context);
	SegmentWalk	 *walk = palloc0(sizeof(SegmentWalk));
	Oid			  label_index = InvalidOid;

	walk->rel = open_segment(match, segment);
	walk->low = Max(match->low, segment->first);
	walk->high = Min(match->high, segment->end - 1);
	walk->slot = table_slot_create(walk->rel, NULL);
	if (match->query != NULL)
		label_index = es_label_index_of(walk->rel);
	if (OidIsValid(label_index))
		begin_items(match, walk, label_index);
	else
		begin_plain(match, walk, segment);
	match->open = walk;
	MemoryContextSwitchTo(old);
}

static void
close_walk(EsMatch *match)
{
	SegmentWalk *walk = match->open;

	match->open = NULL;
	ExecDropSingleTupleTableSlot(walk->slot);
	if (walk->scan != NULL)
	{
		es_page_fetch_end(walk->fetch);
		index_endscan(walk->scan);
	}
	for (int i = 0; i < walk->nitems; i++)
	{
		ItemWalk *item = &walk->items[i];

		for (int j = 0; j < item->nlabels; j++)
			es_label_scan_end(item->labels[j]);
		for (int j = 0; j < item->ntypes; j++)
			es_label_scan_end(item->types[j]);
	}
	index_close(walk->index, AccessShareLock);
	table_close(walk->rel, AccessShareLock);
	MemoryContextReset(match->segment_context);
}

/* ---------------------------------------------------------------------------
 * Leaping
 * ------------------------------------------------------------------------- */

/* The nearest position at or beyond 'at' that has one of the types. */
static bool
seek_types(EsMatch *match, ItemWalk *item, EsPosition at, EsPosition *nearest)
{
	EsPosition found;

	item->type_found = NULL;
	for (int i = 0; i < item->ntypes;)
	{
		if (!es_label_scan_seek(item->types[i], at, &found))
		{
			/* At its end; the order of the others does not matter. */
			es_label_scan_end(item->types[i]);
			item->types[i] = item->types[--item->ntypes];
			continue;
		}
		if (item->type_found == NULL || comes_before(match, found, *nearest))
		{
			*nearest = found;
			item->type_found = item->types[i];
		}
		i++;
	}
	return item->type_found != NULL;
}

/* Moves an item to its next position at or beyond 'at', or notes that it is done. */
static void
seek_item(EsMatch *match, ItemWalk *item, EsPosition at)
{
	int nparts = item->nlabels + (item->ntypes > 0 ? 1 : 0);
	int agreed = 0; /* how many parts in a row stand at 'at' */
	int part = 0;

	while (agreed < nparts)
	{
		EsPosition found;
		bool	   any = part < item->nlabels
							 ? es_label_scan_seek(item->labels[part], at, &found)
							 : seek_types(match, item, at, &found);

		if (!any)
		{
			item->done = true;
			return;
		}
		if (found != at)
		{
			CHECK_FOR_INTERRUPTS();
			at = found;
			agreed = 0;
		}
		agreed++;
		part = (part + 1) % nparts;
	}
	item->at = at;
}

/* Fetches the row where an item stands; false where the snapshot has none there. */
static bool
fetch_row(ItemWalk *item, TupleTableSlot *slot)
{
	EsLabelScan *scan = item->nlabels > 0 ? item->labels[0] : item->type_found;
	EsPosition	 found = item->at;

	/* One position can have several entries where a row was changed by force. */
	do
	{
		if (es_label_scan_fetch(scan, slot))
			return true;
	} while (es_label_scan_next(scan, &found) && found == item->at);
	return false;
}

/* ---------------------------------------------------------------------------
 * Walking
 * ------------------------------------------------------------------------- */

/* Compares the row with the query. */
static bool
row_matches(EsMatch *match, TupleTableSlot *slot)
{
	MemoryContext old = MemoryContextSwitchTo(match->row_context);
	bool		  no_type;
	bool		  no_tags;
	Datum		  type = slot_getattr(slot, ES_ATT_TYPE, &no_type);
	Datum		  tags = slot_getattr(slot, ES_ATT_TAGS, &no_tags);
	bool		  matches =
		!no_type && !no_tags &&
		es_query_matches(match->query, DatumGetTextPP(type), DatumGetArrayTypeP(tags));

	MemoryContextSwitchTo(old);
	MemoryContextReset(match->row_context);
	return matches;
}

static bool
next_plain(EsMatch *match)
{
	SegmentWalk *walk = match->open;

	while (es_page_fetch_next(walk->fetch, walk->slot))
	{
		CHECK_FOR_INTERRUPTS();
		if (!walk->compare || row_matches(match, walk->slot))
			return true;
	}
	return false;
}

/* Lets each item that stands at or before 'at' go on beyond it. */
static void
leave_position(EsMatch *match, EsPosition at)
{
	SegmentWalk *walk = match->open;

	for (int i = 0; i < walk->nitems; i++)
	{
		ItemWalk *item = &walk->items[i];

		if (!item->done && !comes_before(match, at, item->at))
			seek_item(match, item, just_beyond(match, at));
	}
}

static void
start_items(EsMatch *match)
{
	SegmentWalk *walk = match->open;

	for (int i = 0; i < walk->nitems; i++)
		seek_item(match, &walk->items[i], match->forward ? walk->low : walk->high);
	walk->started = true;
}

static ItemWalk *
nearest_item(EsMatch *match)
{
	SegmentWalk *walk = match->open;
	ItemWalk	*nearest = NULL;

	for (int i = 0; i < walk->nitems; i++)
	{
		ItemWalk *item = &walk->items[i];

		if (!item->done &&
			(nearest == NULL || comes_before(match, item->at, nearest->at)))
			nearest = item;
	}
	return nearest;
}

static bool
next_by_labels(EsMatch *match)
{
	SegmentWalk *walk = match->open;

	for (;;)
	{
		ItemWalk *item;

		/* Moving on comes first, not last: the caller may want one row only. */
		if (walk->started)
			leave_position(match, walk->last);
		else
			start_items(match);
		item = nearest_item(match);
		if (item == NULL)
			return false;
		walk->last = item->at;
		CHECK_FOR_INTERRUPTS();
		if (fetch_row(item, walk->slot) && row_matches(match, walk->slot))
			return true;
	}
}

TupleTableSlot *
es_match_next(EsMatch *match)
{
	MemoryContext old = MemoryContextSwitchTo(match->context);
	bool		  found = false;

	for (;;)
	{
		if (match->open == NULL)
		{
			if (match->next_segment >= match->nsegments)
				break;
			CHECK_FOR_INTERRUPTS();
			open_walk(match, &match->segments[match->next_segment++]);
		}
		MemoryContextSwitchTo(match->segment_context);
		found = match->open->scan != NULL ? next_plain(match) : next_by_labels(match);
		if (found)
			break;
		close_walk(match);
	}
	MemoryContextSwitchTo(old);
	return found ? match->open->slot : NULL;
}

void
es_match_end(EsMatch *match)
{
	if (match->open != NULL)
		close_walk(match);
	MemoryContextDelete(match->context);
}
