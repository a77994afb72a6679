/*
 * collection/tree_insert.c
 *		Inserting many tuples into a B-tree.
 *
 * nbtree inserts one tuple at a time: a descent from the root, a binary search
 * on each page of it, a lock on the leaf.  For a thousand events with four
 * entries each that was more work than all the rest of writing them.  In
 * ascending order, though, many tuples go to the leaf to which the one before
 * went, mostly right behind it.  So the leaf stays locked, and as long as
 *
 *	-	the tuple comes behind the last one and not beyond the leaf's high key,
 *	-	it fits on the page,
 *	-	and no other of its key is there, which is nbtree's business: duplicates
 *		of unique keys, posting lists
 *
 * it is put there, and logged as nbtree logs it.  Whatever else there is to do
 * (splits, deletion of dead entries, waiting for whoever inserted the same key)
 * nbtree does, with the leaf released.  Then comes another descent.
 *
 * A leaf that is locked stays itself: nobody splits it or deletes it, so that
 * what is between its last tuple and its high key belongs to it.
 *
 * Locks: the leaf, exclusively, during one call at most; nothing else is locked
 * and nothing is waited for meanwhile.  A crash in between leaves entries of
 * rows whose transaction did not commit.
 */
#include "postgres.h"

#include "collection/tree_insert.h"

#include "access/nbtree.h"
#include "access/nbtxlog.h"
#include "access/xloginsert.h"
#include "catalog/pg_am.h"
#include "compat.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "storage/predicate.h"
#include "utils/rel.h"

/* What is larger, nbtree may have to refuse. */
#define MAX_TUPLE_BYTES 1024

/* The leaf that is held. */
typedef struct Leaf
{
	Relation	 index;
	Relation	 heap;
	bool		 unique;
	BTScanInsert key;	 /* of the tuple */
	Buffer		 buffer; /* InvalidBuffer: none */
	OffsetNumber last;	 /* where the last tuple was put; InvalidOffsetNumber */
} Leaf;

typedef enum Place
{
	PLACE_FOUND,
	PLACE_ELSEWHERE, /* on another leaf, or before the last tuple */
	PLACE_UNKNOWN	 /* nbtree knows */
} Place;

/*
 * nbtree's macros for index options assert that the index is a btree.  That is
 * the only place where it looks at the access method, so for a server with
 * assertions the relcache entry of an index of labels says btree meanwhile.
 */
void
es_tree_insert_one(Relation index, Relation heap, IndexTuple tuple, bool unique)
{
	IndexUniqueCheck check = unique ? UNIQUE_CHECK_YES : UNIQUE_CHECK_NO;
#ifdef USE_ASSERT_CHECKING
	Oid am = index->rd_rel->relam;

	PG_TRY();
	{
		index->rd_rel->relam = BTREE_AM_OID;
		_bt_doinsert(index, tuple, check, false, heap);
	}
	PG_FINALLY();
	{
		index->rd_rel->relam = am;
	}
	PG_END_TRY();
#else
	_bt_doinsert(index, tuple, check, false, heap);
#endif
}

static void
release_leaf(Leaf *leaf)
{
	if (BufferIsValid(leaf->buffer))
		_bt_relbuf(leaf->index, leaf->buffer);
	leaf->buffer = InvalidBuffer;
}

/* Of a unique index the first place of the key is asked for, whatever row it is of. */
static void
set_key(Leaf *leaf, IndexTuple tuple)
{
	BTScanInsert key = leaf->key;

	key->anynullkeys = false;
	for (int i = 0; i < key->keysz; i++)
	{
		ScanKey scankey = &key->scankeys[i];
		bool	isnull;

		scankey->sk_argument =
			index_getattr(tuple, i + 1, RelationGetDescr(leaf->index), &isnull);
		scankey->sk_flags &= ~SK_ISNULL;
		if (!isnull)
			continue;
		scankey->sk_flags |= SK_ISNULL;
		key->anynullkeys = true;
	}
	key->scantid = leaf->unique ? NULL : &tuple->t_tid;
}

static void
descend(Leaf *leaf)
{
	release_leaf(leaf);
	_bt_freestack(
		es_bt_search_to_write(leaf->index, leaf->heap, leaf->key, &leaf->buffer));
	leaf->last = InvalidOffsetNumber;
}

/* The first tuple from 'low' on that is not below the key; its order, 1 = none. */
static OffsetNumber
search_page(const Leaf *leaf, Page page, OffsetNumber low, int *order)
{
	OffsetNumber high = OffsetNumberNext(PageGetMaxOffsetNumber(page));
	OffsetNumber middle = low; /* mostly it is the first one */

	*order = 1;
	while (low < high)
	{
		int found = _bt_compare(leaf->index, leaf->key, page, middle);

		if (found > 0)
			low = OffsetNumberNext(middle);
		else
		{
			high = middle;
			*order = found;
		}
		middle = low + (high - low) / 2;
	}
	return low;
}

static Place
find_place(const Leaf *leaf, IndexTuple tuple, OffsetNumber *offset)
{
	Page		 page = BufferGetPage(leaf->buffer);
	BTPageOpaque opaque = BTPageGetOpaque(page);
	int			 order;

	if (P_IGNORE(opaque) || P_INCOMPLETE_SPLIT(opaque) || !leaf->key->heapkeyspace)
		return PLACE_UNKNOWN;
	if (leaf->last != InvalidOffsetNumber &&
		_bt_compare(leaf->index, leaf->key, page, leaf->last) <= 0)
		return PLACE_ELSEWHERE;
	if (!P_RIGHTMOST(opaque))
	{
		order = _bt_compare(leaf->index, leaf->key, page, P_HIKEY);
		if (order > 0)
			return PLACE_ELSEWHERE;
		if (order == 0 && leaf->unique)
			return PLACE_UNKNOWN; /* others of the key may be on the next leaf */
	}
	if (PageGetFreeSpace(page) < IndexTupleSize(tuple))
		return PLACE_UNKNOWN;
	*offset = search_page(leaf, page,
						  leaf->last != InvalidOffsetNumber ? OffsetNumberNext(leaf->last)
															: P_FIRSTDATAKEY(opaque),
						  &order);
	return order == 0 ? PLACE_UNKNOWN : PLACE_FOUND;
}

/* As _bt_insertonpg does on a leaf with room. */
static void
put(Leaf *leaf, IndexTuple tuple, OffsetNumber offset)
{
	Page page = BufferGetPage(leaf->buffer);
	Size size = IndexTupleSize(tuple);

	CheckForSerializableConflictIn(leaf->index, NULL, BufferGetBlockNumber(leaf->buffer));
	START_CRIT_SECTION();
	if (PageAddItem(page, (Item) tuple, size, offset, false, false) ==
		InvalidOffsetNumber)
		elog(PANIC, "could not add an entry to index \"%s\"",
			 RelationGetRelationName(leaf->index));
	MarkBufferDirty(leaf->buffer);
	if (RelationNeedsWAL(leaf->index))
	{
		xl_btree_insert record;
		XLogRecPtr		lsn;

		record.offnum = offset;
		XLogBeginInsert();
		XLogRegisterData((char *) &record, SizeOfBtreeInsert);
		XLogRegisterBuffer(0, leaf->buffer, REGBUF_STANDARD);
		XLogRegisterBufData(0, (char *) tuple, size);
		lsn = XLogInsert(RM_BTREE_ID, XLOG_BTREE_INSERT_LEAF);
		PageSetLSN(page, lsn);
	}
	END_CRIT_SECTION();
	leaf->last = offset;
}

/* False where nbtree is to do it. */
static bool
insert_on_leaf(Leaf *leaf, IndexTuple tuple)
{
	OffsetNumber offset;
	Place		 place = PLACE_ELSEWHERE;

	set_key(leaf, tuple);
	if (IndexTupleSize(tuple) > MAX_TUPLE_BYTES ||
		(leaf->unique && leaf->key->anynullkeys))
		return false;
	if (BufferIsValid(leaf->buffer))
		place = find_place(leaf, tuple, &offset);
	if (place == PLACE_ELSEWHERE)
	{
		descend(leaf);
		place = find_place(leaf, tuple, &offset);
	}
	if (place != PLACE_FOUND)
		return false;
	put(leaf, tuple, offset);
	return true;
}

void
es_tree_insert(Relation index, Relation heap, IndexTuple *tuples, int n, bool unique)
{
	Leaf leaf = {index, heap, unique};

	if (n == 0)
		return;
	leaf.key = _bt_mkscankey(index, tuples[0]);
	for (int i = 0; i < n; i++)
	{
		if (insert_on_leaf(&leaf, tuples[i]))
			continue;
		release_leaf(&leaf);
		es_tree_insert_one(index, heap, tuples[i], unique);
	}
	release_leaf(&leaf);
	pfree(leaf.key);
}
