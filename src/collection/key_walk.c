/*
 * collection/key_walk.c
 *		Looking up many keys of one index, in ascending order.
 *
 * A search in a B-tree costs a descent from its root, some two microseconds;
 * passing over an entry of a leaf costs a twentieth of that.  So where the keys
 * lie close together one scan walks from each to the next, and only for a key
 * that does not come soon is there another descent.  Where they do not, each is
 * a search for that one key, as the executor would do it.
 *
 * Whether they do is tried: many keys for the size of the index lie close
 * together anyway; else a walk that did not come to its key is given up for some
 * keys.  A key that is not there begins one, since those come in droves, and a
 * walk knows by the entry that it has reached that there is none of the keys
 * below it.
 *
 * Several entries may have one key: versions of the row, of which the snapshot
 * sees one at most.
 */
#include "postgres.h"

#include "collection/key_walk.h"

#include "access/genam.h"
#include "access/itup.h"
#include "access/relscan.h"
#include "access/stratnum.h"
#include "access/tableam.h"
#include "catalog/pg_type.h"
#include "collection/event.h"
#include "compat.h"
#include "storage/bufmgr.h"
#include "utils/fmgroids.h"
#include "utils/rel.h"

/* Keys for each page of the index from which on it pays to walk. */
#define DENSE_KEYS_PER_PAGE 8

/* Entries that are passed over before the next descent, where keys are dense or not. */
#define STRIDE_DENSE  64
#define STRIDE_SPARSE 8

/* Keys that are searched for before it is tried to walk again. */
#define REST_KEYS 16

struct EsKeyWalk
{
	Relation	  index;
	IndexScanDesc scan;
	bool		  dense;
	int			  rest;	   /* keys that are searched for yet; 0 = walking */
	bool		  started; /* walking: the scan stands on an entry, unless at its end */
	bool		  at_end;

	ItemPointerData tid; /* of the entry that the scan stands on */
};

EsKeyWalk *
es_key_walk_begin(Relation rel, Relation index, Snapshot snapshot, int nkeys)
{
	EsKeyWalk *walk = palloc0(sizeof(EsKeyWalk));

	walk->index = index;
	walk->dense = nkeys / DENSE_KEYS_PER_PAGE >= RelationGetNumberOfBlocks(index);
	walk->scan = es_index_beginscan(rel, index, snapshot, 1);
	walk->scan->xs_want_itup = true;
	return walk;
}

void
es_key_walk_end(EsKeyWalk *walk)
{
	index_endscan(walk->scan);
	pfree(walk);
}

static void
descend(EsKeyWalk *walk, struct varlena *key, StrategyNumber strategy)
{
	bool is_bytes = TupleDescAttr(RelationGetDescr(walk->index), 0)->atttypid == BYTEAOID;
	ScanKeyData	 scankey;
	RegProcedure function;

	if (strategy == BTEqualStrategyNumber)
		function = is_bytes ? F_BYTEAEQ : F_TEXTEQ;
	else
		function = is_bytes ? F_BYTEAGE : F_TEXT_GE;
	ScanKeyInit(&scankey, 1, strategy, function, PointerGetDatum(key));
	scankey.sk_collation = walk->index->rd_indcollation[0];
	index_rescan(walk->scan, &scankey, 1, NULL, 0);
}

/* To the next entry. */
static void
advance(EsKeyWalk *walk)
{
	ItemPointer tid = index_getnext_tid(walk->scan, ForwardScanDirection);

	walk->at_end = tid == NULL;
	if (tid != NULL)
		walk->tid = *tid;
}

/*
 * The row of the entry that the scan stands on.  A key may be asked for twice, and
 * a row that was fetched leaves its own place in the scan: from there, amid a HOT
 * chain, nothing would be found, and the entry be taken for one of the dead.
 */
static bool
fetch_row(EsKeyWalk *walk, TupleTableSlot *slot)
{
	walk->scan->xs_heaptid = walk->tid;
	return index_fetch_heap(walk->scan, slot);
}

/* The entry's key against the wanted one. */
static int
compare_entry(EsKeyWalk *walk, const struct varlena *key)
{
	bool  isnull;
	Datum value = index_getattr(walk->scan->xs_itup, 1, walk->scan->xs_itupdesc, &isnull);
	struct varlena *entry;
	int				order;

	if (isnull)
		return 1; /* nulls come last */
	entry = PG_DETOAST_DATUM_PACKED(value);
	order = es_bytes_compare(entry, key);
	if ((Pointer) entry != DatumGetPointer(value))
		pfree(entry);
	return order;
}

/* Brings the scan to the first entry that is not below the key; the order of that. */
static int
walk_to(EsKeyWalk *walk, struct varlena *key)
{
	int stride = walk->dense ? STRIDE_DENSE : STRIDE_SPARSE;
	int order = 1;

	for (int passed = 0; walk->started && !walk->at_end && passed < stride; passed++)
	{
		order = compare_entry(walk, key);
		if (order >= 0)
			return order;
		advance(walk);
	}
	if (walk->started && walk->at_end)
		return 1;
	if (walk->started && !walk->dense)
		walk->rest = REST_KEYS;
	descend(walk, key, BTGreaterEqualStrategyNumber);
	walk->started = true;
	advance(walk);
	return walk->at_end ? 1 : compare_entry(walk, key);
}

static bool
search(EsKeyWalk *walk, struct varlena *key, TupleTableSlot *slot)
{
	bool found;

	descend(walk, key, BTEqualStrategyNumber);
	found = index_getnext_slot(walk->scan, ForwardScanDirection, slot);
	walk->rest = found ? walk->rest - 1 : 0;
	walk->started = false;
	walk->at_end = false;
	return found;
}

bool
es_key_walk_find(EsKeyWalk *walk, struct varlena *key, TupleTableSlot *slot)
{
	int order;

	if (walk->rest > 0)
		return search(walk, key, slot);
	order = walk_to(walk, key);
	while (order == 0)
	{
		if (fetch_row(walk, slot))
			return true;
		advance(walk);
		order = walk->at_end ? 1 : compare_entry(walk, key);
	}
	return false;
}
