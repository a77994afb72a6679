/*
 * collection/heads.c
 *		The heads table: one row per stream, the lock of optimistic concurrency.
 *
 * Whoever appends to a stream locks its row first and holds it to the end of
 * the transaction; positions are taken after that.  So within a stream the
 * order of positions and that of versions agree, versions are dense, and of
 * two writers that expect the same version one finds the other's.  The lock is
 * PostgreSQL's row lock: deadlocks are found, and nothing outlives a crash.
 *
 * A stream's first event has no row to lock.  Its row is inserted
 * speculatively (as INSERT ... ON CONFLICT does), as version 0, by whoever is
 * first; the others find it in the unique index and wait for that transaction.
 * Nobody else sees version 0: the row is brought up to date, or gone, before
 * the transaction ends.  Where the caller keeps others from beginning streams, and
 * has seen that there is no row, none of that is needed, and the rows are written
 * when they are saved, many at once.
 *
 * Rows are read and written here, below the executor, because an appender
 * needs INSERT on the collection and no right on this table.  All reads use a
 * new snapshot: at every isolation level the newest committed version counts.
 *
 * Own rows: a transaction that appends to a stream again and again makes a new
 * row version each time, none of which can be pruned before it ends, and an
 * index lookup would wade through all of them.  So the place of the newest
 * version is remembered until the transaction ends or a subtransaction aborts;
 * that of the first stream, which is often the only one, without a hash table.
 */
#include "postgres.h"

#include "collection/heads.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "collection/bulk.h"
#include "collection/event.h"
#include "collection/layout.h"
#include "collection/speculative.h"
#include "common/hashfn.h"
#include "compat.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/hsearch.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* Places remembered in one transaction; beyond that we start over. */
#define OWN_ROWS_MAX 65536

struct EsHeads
{
	Relation		rel;
	Relation		index; /* the primary key */
	EState		   *estate;
	ResultRelInfo  *rri;
	TupleTableSlot *slot;	  /* a stored row */
	TupleTableSlot *new_slot; /* a row to be stored */
};

typedef struct OwnRowKey
{
	Oid	   heads;
	Oid	   file; /* a rewritten table has other places */
	uint64 stream_hash;
} OwnRowKey;

typedef struct OwnRow
{
	OwnRowKey		key;
	ItemPointerData tid;
} OwnRow;

static OwnRow		 first_own_row;
static bool			 has_own_rows = false; /* first_own_row is valid */
static HTAB			*own_rows = NULL;	   /* all the others; NULL where there are none */
static MemoryContext own_rows_context = NULL; /* NULL until the first is remembered */

/* ---------------------------------------------------------------------------
 * The places of own rows
 * ------------------------------------------------------------------------- */

static void
forget_own_rows(void)
{
	has_own_rows = false;
	if (own_rows != NULL)
		MemoryContextReset(own_rows_context);
	own_rows = NULL;
}

static void
forget_at_end(XactEvent event, void *arg)
{
	if (has_own_rows && (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
						 event == XACT_EVENT_PREPARE))
		forget_own_rows();
}

static void
forget_at_subabort(SubXactEvent event, SubTransactionId subid, SubTransactionId parent,
				   void *arg)
{
	if (has_own_rows && event == SUBXACT_EVENT_ABORT_SUB)
		forget_own_rows();
}

static OwnRowKey
own_row_key(const EsHeads *heads, const text *stream)
{
	OwnRowKey key;

	key.heads = RelationGetRelid(heads->rel);
	key.file = es_relation_file(heads->rel);
	key.stream_hash = hash_bytes_extended((const unsigned char *) VARDATA_ANY(stream),
										  VARSIZE_ANY_EXHDR(stream), 0);
	return key;
}

static bool
is_first_own_row(const OwnRowKey *key)
{
	return has_own_rows && memcmp(&first_own_row.key, key, sizeof(OwnRowKey)) == 0;
}

static OwnRow *
enter_own_row(const OwnRowKey *key)
{
	if (own_rows == NULL)
	{
		HASHCTL ctl;

		ctl.hcxt = own_rows_context;
		ctl.keysize = sizeof(OwnRowKey);
		ctl.entrysize = sizeof(OwnRow);
		own_rows = hash_create("eventstore own heads", 64, &ctl,
							   HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	return hash_search(own_rows, key, HASH_ENTER, NULL);
}

static void
remember_own_row(const EsHeads *heads, const EsStreamHead *head)
{
	OwnRowKey key = own_row_key(heads, head->stream);

	if (own_rows_context == NULL)
	{
		own_rows_context = AllocSetContextCreate(TopMemoryContext, "eventstore own heads",
												 ALLOCSET_DEFAULT_SIZES);
		RegisterXactCallback(forget_at_end, NULL);
		RegisterSubXactCallback(forget_at_subabort, NULL);
	}
	if (own_rows != NULL && hash_get_num_entries(own_rows) >= OWN_ROWS_MAX)
		forget_own_rows();
	if (!has_own_rows)
		first_own_row.key = key;
	if (!has_own_rows || is_first_own_row(&key))
	{
		first_own_row.tid = head->tid;
		has_own_rows = true;
	}
	else
		enter_own_row(&key)->tid = head->tid;
}

static bool
recall_own_row(const EsHeads *heads, const text *stream, ItemPointer tid)
{
	OwnRowKey key;
	OwnRow	 *row = NULL;

	if (!has_own_rows)
		return false;
	key = own_row_key(heads, stream);
	if (is_first_own_row(&key))
		row = &first_own_row;
	else if (own_rows != NULL)
		row = hash_search(own_rows, &key, HASH_FIND, NULL);
	if (row == NULL)
		return false;
	*tid = row->tid;
	return true;
}

/* ---------------------------------------------------------------------------
 * Opening
 * ------------------------------------------------------------------------- */

EsHeads *
es_heads_begin(const EsCollection *coll)
{
	EsHeads *heads = palloc(sizeof(EsHeads));

	heads->rel = table_open(coll->heads, RowExclusiveLock);
	heads->index = es_layout_open_heads_index(heads->rel, RowExclusiveLock);
	heads->slot = table_slot_create(heads->rel, NULL);
	heads->new_slot = table_slot_create(heads->rel, NULL);
	heads->estate = NULL; /* only a row that moves or is new needs the executor */
	heads->rri = NULL;
	return heads;
}

static void
open_indexes(EsHeads *heads)
{
	if (heads->rri != NULL)
		return;
	heads->estate = CreateExecutorState();
	heads->rri = makeNode(ResultRelInfo);
	InitResultRelInfo(heads->rri, heads->rel, 0, NULL, 0);
	ExecOpenIndices(heads->rri, true);
}

void
es_heads_end(EsHeads *heads)
{
	ExecDropSingleTupleTableSlot(heads->slot);
	ExecDropSingleTupleTableSlot(heads->new_slot);
	if (heads->rri != NULL)
	{
		ExecCloseIndices(heads->rri);
		FreeExecutorState(heads->estate);
	}
	index_close(heads->index, NoLock);
	table_close(heads->rel, NoLock);
	pfree(heads);
}

/* ---------------------------------------------------------------------------
 * Looking up
 * ------------------------------------------------------------------------- */

/* The first row of the stream that the snapshot lets through, into the slot. */
static bool
find_row(Relation rel, Relation index, const text *stream, Snapshot snapshot,
		 TupleTableSlot *slot)
{
	ScanKeyData	  key;
	IndexScanDesc scan;
	bool		  found;

	ScanKeyInit(&key, 1, BTEqualStrategyNumber, F_TEXTEQ, PointerGetDatum(stream));
	key.sk_collation = index->rd_indcollation[0];
	scan = es_index_beginscan(rel, index, snapshot, 1);
	index_rescan(scan, &key, 1, NULL, 0);
	found = index_getnext_slot(scan, ForwardScanDirection, slot);
	index_endscan(scan);
	return found;
}

static void
read_head(EsStreamHead *head, TupleTableSlot *slot)
{
	slot_getallattrs(slot);
	head->version = DatumGetInt64(slot->tts_values[ES_HEADS_VERSION - 1]);
	head->first_position = DatumGetInt64(slot->tts_values[ES_HEADS_FIRST_POSITION - 1]);
	head->last_position = DatumGetInt64(slot->tts_values[ES_HEADS_LAST_POSITION - 1]);
	head->first_at = DatumGetTimestampTz(slot->tts_values[ES_HEADS_FIRST_AT - 1]);
	head->last_at = DatumGetTimestampTz(slot->tts_values[ES_HEADS_LAST_AT - 1]);
	head->tid = slot->tts_tid;
}

bool
es_heads_peek(const EsCollection *coll, const text *stream, Snapshot snapshot,
			  EsStreamHead *head)
{
	Relation		rel = table_open(coll->heads, AccessShareLock);
	Relation		index;
	TupleTableSlot *slot;
	bool			found;

	index = es_layout_open_heads_index(rel, AccessShareLock);
	slot = table_slot_create(rel, NULL);
	found = find_row(rel, index, stream, snapshot, slot);
	if (found)
		read_head(head, slot);
	ExecDropSingleTupleTableSlot(slot);
	index_close(index, AccessShareLock);
	table_close(rel, AccessShareLock);
	return found && head->version > 0;
}

EsKeyWalk *
es_heads_walk(EsHeads *heads, Snapshot snapshot, int nstreams)
{
	return es_key_walk_begin(heads->rel, heads->index, snapshot, nstreams);
}

bool
es_heads_look(EsHeads *heads, EsKeyWalk *walk, text *stream, EsStreamHead *head)
{
	bool found = es_key_walk_find(walk, stream, heads->slot);

	if (found)
		read_head(head, heads->slot);
	ExecClearTuple(heads->slot);
	return found;
}

static bool
find_committed(EsHeads *heads, const text *stream, Snapshot snapshot, ItemPointer tid)
{
	bool found;

	if (recall_own_row(heads, stream, tid))
		return true;
	found = find_row(heads->rel, heads->index, stream, snapshot, heads->slot);
	if (found)
		*tid = heads->slot->tts_tid;
	ExecClearTuple(heads->slot);
	return found;
}

/* ---------------------------------------------------------------------------
 * Locking
 * ------------------------------------------------------------------------- */

/* Not so where two streams have one hash among the own rows. */
static bool
is_row_of(TupleTableSlot *slot, const text *stream)
{
	bool  isnull;
	text *stored = DatumGetTextPP(slot_getattr(slot, ES_HEADS_STREAM, &isnull));

	return es_text_equal(stored, stream);
}

/*
 * Locks the newest version of the row that was found at 'tid'.  False where it
 * went away meanwhile (its inserter aborted): look again.
 */
static bool
lock_row(EsHeads *heads, EsStreamHead *head, Snapshot snapshot, ItemPointer tid)
{
	TM_FailureData failure;
	TM_Result	   result;

	result = table_tuple_lock(heads->rel, tid, snapshot, heads->slot,
							  GetCurrentCommandId(false), LockTupleNoKeyExclusive,
							  LockWaitBlock, TUPLE_LOCK_FLAG_FIND_LAST_VERSION, &failure);
	switch (result)
	{
		case TM_Ok:
			read_head(head, heads->slot);
			return is_row_of(heads->slot, head->stream);
		case TM_Deleted:
		case TM_Updated:
			return false;
		case TM_Invisible:
		case TM_SelfModified:
			/* A place we remember, that a statement (of a repair) has left since. */
			if (has_own_rows)
				return false;
			/* FALLTHROUGH */
		default:
			elog(ERROR, "unexpected result %d of locking a row of \"%s\"", (int) result,
				 RelationGetRelationName(heads->rel));
	}
	return false;
}

static void
fill_slot(TupleTableSlot *slot, const EsStreamHead *head)
{
	int natts = slot->tts_tupleDescriptor->natts;

	ExecClearTuple(slot);
	memset(slot->tts_isnull, true, sizeof(bool) * natts);
	memset(slot->tts_isnull, false, sizeof(bool) * ES_HEADS_NATTS);
	slot->tts_values[ES_HEADS_STREAM - 1] = PointerGetDatum(head->stream);
	slot->tts_values[ES_HEADS_VERSION - 1] = Int64GetDatum(head->version);
	slot->tts_values[ES_HEADS_FIRST_POSITION - 1] = Int64GetDatum(head->first_position);
	slot->tts_values[ES_HEADS_LAST_POSITION - 1] = Int64GetDatum(head->last_position);
	slot->tts_values[ES_HEADS_FIRST_AT - 1] = TimestampTzGetDatum(head->first_at);
	slot->tts_values[ES_HEADS_LAST_AT - 1] = TimestampTzGetDatum(head->last_at);
	ExecStoreVirtualTuple(slot);
}

/*
 * Inserts the row of a new stream unless another does so: then false, and the
 * caller waits for that one.
 */
static bool
insert_placeholder(EsHeads *heads, EsStreamHead *head)
{
	bool inserted;

	open_indexes(heads);
	head->version = 0;
	head->first_position = 0;
	head->last_position = 0;
	head->first_at = 0;
	head->last_at = 0;
	fill_slot(heads->new_slot, head);
	heads->new_slot->tts_tableOid = RelationGetRelid(heads->rel);

	inserted = es_insert_speculatively(heads->rri, heads->estate, heads->new_slot,
									   RelationGetRelid(heads->index));
	head->tid = heads->new_slot->tts_tid;
	ExecClearTuple(heads->new_slot);
	ResetPerTupleExprContext(heads->estate);
	return inserted;
}

/* Waits for the transaction that is about to insert the same stream, if any. */
static void
await_inserter(EsHeads *heads, const text *stream)
{
	SnapshotData dirty;
	bool		 found;

	InitDirtySnapshot(dirty);
	found = find_row(heads->rel, heads->index, stream, &dirty, heads->slot);
	ExecClearTuple(heads->slot);
	if (found)
		es_await_dirty(&dirty);
}

/* Locks the row that is there; false where there is none, or it just went. */
static bool
lock_committed(EsHeads *heads, EsStreamHead *head, bool *found)
{
	Snapshot		snapshot = RegisterSnapshot(GetLatestSnapshot());
	ItemPointerData tid;
	bool			locked;

	*found = find_committed(heads, head->stream, snapshot, &tid);
	locked = *found && lock_row(heads, head, snapshot, &tid);
	UnregisterSnapshot(snapshot);
	return locked;
}

void
es_heads_lock(EsHeads *heads, EsStreamHead *head)
{
	for (;;)
	{
		bool found;

		CHECK_FOR_INTERRUPTS();
		if (lock_committed(heads, head, &found))
			return;
		if (found)
		{
			forget_own_rows();
			continue;
		}
		if (insert_placeholder(heads, head))
		{
			remember_own_row(heads, head);
			return;
		}
		await_inserter(heads, head->stream);
	}
}

/* The first attempt for one of many; false: as es_heads_lock does it. */
static bool
lock_walked(EsHeads *heads, EsKeyWalk *walk, Snapshot snapshot, EsStreamHead *head)
{
	ItemPointerData tid;
	bool			found = recall_own_row(heads, head->stream, &tid);

	CHECK_FOR_INTERRUPTS();
	if (!found)
	{
		found = es_key_walk_find(walk, head->stream, heads->slot);
		if (found)
			tid = heads->slot->tts_tid;
		ExecClearTuple(heads->slot);
	}
	if (found)
		return lock_row(heads, head, snapshot, &tid);
	if (!insert_placeholder(heads, head))
		return false;
	remember_own_row(heads, head);
	return true;
}

void
es_heads_lock_all(EsHeads *heads, EsStreamHead *streams, int nstreams)
{
	Snapshot   snapshot = RegisterSnapshot(GetLatestSnapshot());
	EsKeyWalk *walk = es_heads_walk(heads, snapshot, nstreams);

	for (int i = 0; i < nstreams; i++)
		if (!streams[i].is_new && !lock_walked(heads, walk, snapshot, &streams[i]))
			es_heads_lock(heads, &streams[i]);
	es_key_walk_end(walk);
	UnregisterSnapshot(snapshot);
}

/* ---------------------------------------------------------------------------
 * Saving
 * ------------------------------------------------------------------------- */

void
es_heads_save(EsHeads *heads, EsStreamHead *head)
{
	bool needs_indexes;

	fill_slot(heads->new_slot, head);
	needs_indexes = es_update_tuple(heads->rel, &head->tid, heads->new_slot);
	head->tid = heads->new_slot->tts_tid;
	if (needs_indexes)
	{
		open_indexes(heads);
		list_free(es_insert_index_tuples(heads->rri, heads->new_slot, heads->estate, NULL,
										 NIL));
		ResetPerTupleExprContext(heads->estate);
	}
	ExecClearTuple(heads->new_slot);
	remember_own_row(heads, head);
}

static void
save_new(EsHeads *heads, EsBulk **bulk, const EsStreamHead *head)
{
	open_indexes(heads);
	if (*bulk == NULL)
		*bulk = es_bulk_begin(heads->rri, heads->estate);
	fill_slot(es_bulk_slot(*bulk), head);
	es_bulk_add(*bulk, NULL);
}

void
es_heads_save_all(EsHeads *heads, EsStreamHead *streams, int nstreams)
{
	EsBulk *bulk = NULL;

	for (int i = 0; i < nstreams; i++)
		if (streams[i].is_new)
			save_new(heads, &bulk, &streams[i]);
		else
			es_heads_save(heads, &streams[i]);
	if (bulk != NULL)
		es_bulk_end(bulk);
}
