/*
 * collection/page_fetch.c
 *		The rows of an index scan, fetched a heap page at a time.
 *
 * Events lie in the heap nearly in the order of their positions, so that the
 * index of positions names one row after the other of the same page.
 * index_getnext_slot locks that page anew for each; here it is locked once for
 * all rows that the index names in a row, as a sequential scan does, and they
 * are then handed out under a pin.
 *
 * That is right because the snapshot is an MVCC one: what it sees of a row does
 * not change between the look and the use, and the pin keeps the page from
 * being rearranged.  A place in the heap that is given to a new row after the
 * index was read shows a row that the snapshot does not see.
 *
 * Rows ahead of the one asked for may never be asked for, so a walk begins with
 * one, then two, and so on.
 *
 * Dead index entries are not marked as such, as index_getnext_slot would:
 * events are not updated, and vacuum finds those of aborted appends.  Tables
 * that are not a heap are read row by row.
 */
#include "postgres.h"

#include "collection/page_fetch.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "pgstat.h"
#include "storage/bufmgr.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* More than events of some data are on a page; few enough for a small chunk. */
#define PLACES_MAX 64

struct EsPageFetch
{
	IndexScanDesc	scan;
	ScanDirection	direction;
	bool			is_heap;
	bool			at_end; /* of the index */
	bool			has_next;
	ItemPointerData next;  /* the first place of the next page */
	int				limit; /* places looked at together */
	int				ntids;
	Buffer			buffer; /* pinned; holds the tuples */
	int				ntuples;
	int				given; /* out of them */
	ItemPointerData tids[PLACES_MAX];
	HeapTupleData	tuples[PLACES_MAX];
};

EsPageFetch *
es_page_fetch_begin(IndexScanDesc scan, ScanDirection direction)
{
	EsPageFetch *fetch = palloc(sizeof(EsPageFetch));

	Assert(IsMVCCSnapshot(scan->xs_snapshot));
	fetch->scan = scan;
	fetch->direction = direction;
	fetch->is_heap = scan->heapRelation->rd_tableam == GetHeapamTableAmRoutine();
	fetch->at_end = false;
	fetch->has_next = false;
	fetch->limit = 1;
	fetch->buffer = InvalidBuffer;
	fetch->ntuples = 0;
	fetch->given = 0;
	return fetch;
}

void
es_page_fetch_end(EsPageFetch *fetch)
{
	if (BufferIsValid(fetch->buffer))
		ReleaseBuffer(fetch->buffer);
	pfree(fetch);
}

static bool
next_place(EsPageFetch *fetch)
{
	ItemPointer tid;

	if (fetch->at_end)
		return false;
	tid = index_getnext_tid(fetch->scan, fetch->direction);
	fetch->at_end = tid == NULL;
	fetch->has_next = !fetch->at_end;
	if (fetch->has_next)
		fetch->next = *tid;
	return fetch->has_next;
}

/* The next places that the index names, as far as they are on one page. */
static void
collect_places(EsPageFetch *fetch)
{
	BlockNumber block;

	fetch->ntids = 0;
	if (!fetch->has_next && !next_place(fetch))
		return;
	block = ItemPointerGetBlockNumber(&fetch->next);
	do
	{
		fetch->tids[fetch->ntids++] = fetch->next;
		fetch->has_next = false;
	} while (fetch->ntids < fetch->limit && next_place(fetch) &&
			 ItemPointerGetBlockNumber(&fetch->next) == block);
	fetch->limit = Min(fetch->limit * 2, PLACES_MAX);
}

/* What the snapshot sees at these places. */
static void
look_at_page(EsPageFetch *fetch)
{
	Relation rel = fetch->scan->heapRelation;
	Buffer	 previous = fetch->buffer;

	fetch->buffer =
		ReleaseAndReadBuffer(previous, rel, ItemPointerGetBlockNumber(&fetch->tids[0]));
	if (fetch->buffer != previous)
		heap_page_prune_opt(rel, fetch->buffer);
	LockBuffer(fetch->buffer, BUFFER_LOCK_SHARE);
	for (int i = 0; i < fetch->ntids; i++)
		if (heap_hot_search_buffer(&fetch->tids[i], rel, fetch->buffer,
								   fetch->scan->xs_snapshot,
								   &fetch->tuples[fetch->ntuples], NULL, true))
			fetch->ntuples++;
	LockBuffer(fetch->buffer, BUFFER_LOCK_UNLOCK);
}

bool
es_page_fetch_next(EsPageFetch *fetch, TupleTableSlot *slot)
{
	if (!fetch->is_heap)
		return index_getnext_slot(fetch->scan, fetch->direction, slot);
	while (fetch->given == fetch->ntuples)
	{
		/* The slot has a pointer to one of the tuples. */
		ExecClearTuple(slot);
		fetch->given = 0;
		fetch->ntuples = 0;
		collect_places(fetch);
		if (fetch->ntids == 0)
			return false;
		look_at_page(fetch);
	}
	pgstat_count_heap_fetch(fetch->scan->indexRelation);
	slot->tts_tableOid = RelationGetRelid(fetch->scan->heapRelation);
	ExecStoreBufferHeapTuple(&fetch->tuples[fetch->given++], slot, fetch->buffer);
	return true;
}
