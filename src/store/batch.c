/*
 * store/batch.c
 *		Many changes of a store in one go: what a worker writes with.
 *
 * Two ways, which come to the same:
 *
 *	direct	for a store with nothing of the user's in its way, at READ COMMITTED:
 *			each key is looked up in the primary key and its row written past
 *			the executor, then all events are appended in one go (record.c).
 *			What the triggers of change.c do for a statement is done here.
 *	rows	for every other: put's and delete's own statements, key by key.
 *
 * is_direct decides, and has to learn of each new thing that a table can have.
 *
 * Of several changes of a key only the last is looked at: the others are not
 * seen by anybody.
 *
 * Others may write the store at the same time.  A row is found with a snapshot,
 * and then locked or replaced in the version that was found; where it is no
 * longer the newest, after waiting for whoever changed it, a new snapshot shows
 * what there is now.  A new row is inserted speculatively, as ON CONFLICT does:
 * where somebody else is first, that one is waited for and then found.  A row
 * that has the value already is locked too, so that the batch as a whole comes
 * before or after each other transaction that changes its keys.  What cannot be
 * locked is a key that is not there and is to go: a new snapshot says that.
 *
 * Where the transaction has a lock on the store that keeps all others from writing
 * it (a restore has), one look is enough: the new rows are written as COPY writes
 * them (bulk.c), and so are the new streams of the changelog, which nobody but the
 * store's writers begins.  What fills an empty store from a changelog topic is
 * recorded later (backlog.c): its rows have version 1, and no event yet.
 *
 * Locks: the store, rows in bytewise order of their keys, then the changelog and
 * its streams in the same order.  Two batches do not deadlock; a statement that
 * changes many keys in another order may (40P01).
 *
 * A crash or an error in the middle undoes all of it: it is one transaction.
 */
#include "postgres.h"

#include "store/batch.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_am.h"
#include "catalog/pg_type.h"
#include "collection/bulk.h"
#include "collection/collection.h"
#include "collection/event.h"
#include "collection/heads.h"
#include "collection/key_walk.h"
#include "collection/sorting.h"
#include "collection/speculative.h"
#include "compat.h"
#include "errors.h"
#include "executor/executor.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "shmem.h"
#include "storage/lmgr.h"
#include "store/backlog.h"
#include "store/change.h"
#include "store/record.h"
#include "store/store.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(es_store_apply_arrays);

/* See touch(). */
#define TOUCH_CHANGES 64
#define CACHE_LINE	  64

/* One call. */
typedef struct Batch
{
	EsStore				 *store;
	Relation			  rel;
	int					  nchanges; /* one for each key */
	const EsStoreChange **changes;	/* in bytewise order of their keys */
	bool				  has_deletes;
	const char			 *later_from; /* recorded later, as of this topic; NULL: now */
	EsStoreBatchResult	 *result;
} Batch;

/* ---------------------------------------------------------------------------
 * The last change of each key
 * ------------------------------------------------------------------------- */

static void
merge_changes(Batch *batch, const EsStoreChange *changes, int nchanges)
{
	struct varlena **keys = palloc_extended(sizeof(*keys) * nchanges, MCXT_ALLOC_HUGE);
	uint32			*order;
	int				 n = 0;

	for (int i = 0; i < nchanges; i++)
		keys[i] = (struct varlena *) DatumGetPointer(changes[i].key);
	order = es_sort_bytes(keys, nchanges);
	batch->changes = palloc_extended(sizeof(*batch->changes) * nchanges, MCXT_ALLOC_HUGE);
	for (int i = 0; i < nchanges; i++)
	{
		if (i + 1 < nchanges && es_text_equal(keys[order[i]], keys[order[i + 1]]))
			continue;
		batch->has_deletes |= changes[order[i]].is_delete;
		batch->changes[n++] = &changes[order[i]];
	}
	batch->nchanges = n;
	pfree(order);
	pfree(keys);
}

/* ---------------------------------------------------------------------------
 * Which way
 * ------------------------------------------------------------------------- */

/* The primary key, of the shape that es_store_get has checked, and no other. */
static bool
has_one_index(Relation rel)
{
	List *indexes = RelationGetIndexList(rel);
	bool  one = list_length(indexes) == 1 && linitial_oid(indexes) == es_primary_key(rel);

	list_free(indexes);
	if (one)
	{
		Relation index = index_open(es_primary_key(rel), AccessShareLock);

		one = index->rd_index->indimmediate && index->rd_index->indisvalid;
		index_close(index, AccessShareLock);
	}
	return one;
}

static bool
has_other_columns(Relation rel)
{
	TupleDesc desc = RelationGetDescr(rel);

	for (int i = ES_STORE_NATTS; i < desc->natts; i++)
		if (!TupleDescAttr(desc, i)->attisdropped)
			return true;
	return false;
}

/* A table as create_store made it. */
static bool
is_plain(Relation rel, bool changelog)
{
	TupleConstr *constr = RelationGetDescr(rel)->constr;
	bool		 other_triggers;

	return !has_other_columns(rel) && rel->rd_rel->relam == HEAP_TABLE_AM_OID &&
		   !rel->rd_rel->relispartition && !rel->rd_rel->relhassubclass &&
		   !rel->rd_rel->relhasrules &&
		   (constr == NULL ||
			(constr->num_check == 0 && !constr->has_generated_stored)) &&
		   has_one_index(rel) && es_store_has_triggers(rel, changelog, &other_triggers) &&
		   !other_triggers;
}

/* Rights to columns, and policies, are for the executor. */
static bool
may_write(const Batch *batch)
{
	AclMode needed =
		ACL_SELECT | ACL_INSERT | ACL_UPDATE | (batch->has_deletes ? ACL_DELETE : 0);

	return pg_class_aclmask(batch->store->relid, GetUserId(), needed, ACLMASK_ALL) ==
			   needed &&
		   check_enable_rls(batch->store->relid, InvalidOid, true) != RLS_ENABLED;
}

static bool
is_direct(const Batch *batch)
{
	return !IsolationUsesXactSnapshot() &&
		   is_plain(batch->rel, OidIsValid(batch->store->changelog)) && may_write(batch);
}

/* ---------------------------------------------------------------------------
 * Direct: the tables
 * ------------------------------------------------------------------------- */

/* The store, open for writing. */
typedef struct Writer
{
	Batch			*batch;
	Relation		 rel;
	Relation		 index; /* its primary key */
	EState			*estate;
	ResultRelInfo	*rri;
	TupleTableSlot	*found;	   /* the row that is there */
	TupleTableSlot	*row;	   /* the one to be written */
	Snapshot		 snapshot; /* for the first look at each key */
	EsKeyWalk		*walk;
	EsHeads			*heads; /* of the changelog; NULL without one */
	EsKeyWalk		*heads_walk;
	EsBulk			*bulk; /* for new rows; NULL where others may write the store */
	TimestampTz		 now;
	int				 nchanged;
	EsRowChange		*changed; /* to be recorded; NULL: nothing is, or later */
	EsBacklogWriter *backlog; /* ... of which this takes note; else NULL */
} Writer;

static void
open_writer(Writer *writer, Batch *batch)
{
	Oid changelog = batch->store->changelog;

	writer->batch = batch;
	writer->rel = batch->rel;
	writer->index = index_open(es_primary_key(batch->rel), RowExclusiveLock);
	writer->estate = CreateExecutorState();
	writer->rri = makeNode(ResultRelInfo);
	InitResultRelInfo(writer->rri, batch->rel, 0, NULL, 0);
	ExecOpenIndices(writer->rri, true);
	writer->found = table_slot_create(batch->rel, NULL);
	writer->row = table_slot_create(batch->rel, NULL);
	writer->snapshot = RegisterSnapshot(GetLatestSnapshot());
	writer->walk =
		es_key_walk_begin(batch->rel, writer->index, writer->snapshot, batch->nchanges);
	writer->now = GetCurrentTimestamp();
	writer->bulk = NULL;
	if (CheckRelationLockedByMe(batch->rel, ShareRowExclusiveLock, true))
		writer->bulk = es_bulk_begin(writer->rri, writer->estate);
	writer->heads = NULL;
	writer->changed = NULL;
	writer->nchanged = 0;
	writer->backlog = NULL;
	if (batch->later_from != NULL)
		writer->backlog = es_store_backlog_begin(batch->store, batch->later_from);
	else if (OidIsValid(changelog))
	{
		writer->changed =
			palloc_extended(sizeof(EsRowChange) * batch->nchanges, MCXT_ALLOC_HUGE);
		writer->heads = es_heads_begin(es_collection_open(changelog, RowExclusiveLock));
		writer->heads_walk =
			es_heads_walk(writer->heads, writer->snapshot, batch->nchanges);
	}
}

static void
close_writer(Writer *writer)
{
	if (writer->bulk != NULL)
		es_bulk_end(writer->bulk);
	if (writer->backlog != NULL)
		es_store_backlog_finish(writer->backlog);
	if (writer->heads != NULL)
	{
		es_key_walk_end(writer->heads_walk);
		es_heads_end(writer->heads);
	}
	es_key_walk_end(writer->walk);
	ExecDropSingleTupleTableSlot(writer->found);
	ExecDropSingleTupleTableSlot(writer->row);
	ExecCloseIndices(writer->rri);
	FreeExecutorState(writer->estate);
	UnregisterSnapshot(writer->snapshot);
	index_close(writer->index, NoLock);
}

/* 'again': what others have committed since is seen. */
static bool
find_row(Writer *writer, Datum key, bool again)
{
	Snapshot snapshot;
	bool	 found;

	if (!again)
		return es_key_walk_find(writer->walk, (struct varlena *) DatumGetPointer(key),
								writer->found);
	snapshot = RegisterSnapshot(GetLatestSnapshot());
	found =
		es_store_find(writer->batch->store, writer->rel, key, snapshot, writer->found);
	UnregisterSnapshot(snapshot);
	return found;
}

static void
fill_row(const Writer *writer, TupleTableSlot *slot, const EsStoreRow *row)
{
	ExecClearTuple(slot);
	memset(slot->tts_isnull, true, sizeof(bool) * slot->tts_tupleDescriptor->natts);
	memset(slot->tts_isnull, false, sizeof(bool) * ES_STORE_NATTS);
	slot->tts_values[ES_STORE_KEY - 1] = row->key;
	slot->tts_values[ES_STORE_VALUE - 1] = row->value;
	slot->tts_values[ES_STORE_VERSION - 1] = Int64GetDatum(row->version);
	slot->tts_values[ES_STORE_UPDATED_AT - 1] = TimestampTzGetDatum(row->updated_at);
	ExecStoreVirtualTuple(slot);
	slot->tts_tableOid = RelationGetRelid(writer->rel);
}

/* ---------------------------------------------------------------------------
 * Direct: one key
 * ------------------------------------------------------------------------- */

/* False where the row that was found is no longer the newest: look again. */
static bool
was_newest(const Writer *writer, TM_Result result)
{
	switch (result)
	{
		case TM_Ok:
			return true;
		case TM_Updated:
		case TM_Deleted:
			return false;
		case TM_SelfModified:
			ereport(ERROR, (errcode(ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION),
							errmsg("a row of store \"%s\" is being changed by the "
								   "statement around this one",
								   RelationGetRelationName(writer->rel))));
			break;
		default:
			elog(ERROR, "unexpected result %d of changing a row of \"%s\"", (int) result,
				 RelationGetRelationName(writer->rel));
	}
	return false;
}

static TimestampTz
time_of(const Writer *writer, const EsStoreChange *change)
{
	return change->created_at_given ? change->created_at : writer->now;
}

/* The row after the change, where its key's last one was 'last'. */
static void
next_row(const Writer *writer, const EsStoreChange *change, const EsStoreRow *last,
		 EsStoreRow *row)
{
	row->key = change->key;
	row->value = change->value;
	row->complete = true;
	row->version = writer->backlog == NULL ? last->version + 1 : 1;
	row->has_time = true;
	row->updated_at = es_store_not_before(time_of(writer, change), last);
}

static void
read_found(Writer *writer, EsStoreRow *row)
{
	TupleTableSlot *slot = writer->found;

	slot_getallattrs(slot);
	row->key = slot->tts_values[ES_STORE_KEY - 1];
	row->value = slot->tts_values[ES_STORE_VALUE - 1];
	row->complete = true;
	row->version = slot->tts_isnull[ES_STORE_VERSION - 1]
					   ? 0
					   : DatumGetInt64(slot->tts_values[ES_STORE_VERSION - 1]);
	row->has_time = !slot->tts_isnull[ES_STORE_UPDATED_AT - 1];
	row->updated_at = row->has_time
						  ? DatumGetTimestampTz(slot->tts_values[ES_STORE_UPDATED_AT - 1])
						  : 0;
}

/* Was it written by this transaction?  Its event may then be queued still. */
static bool
found_is_ours(Writer *writer)
{
	bool  isnull;
	Datum xmin = slot_getsysattr(writer->found, MinTransactionIdAttributeNumber, &isnull);

	return TransactionIdIsCurrentTransactionId(DatumGetTransactionId(xmin));
}

/* The row that was found is about to go or to be replaced; new is NULL for a delete. */
static void
note_change(Writer *writer, const EsStoreChange *change, const EsStoreRow *old,
			const EsStoreRow *new)
{
	EsRowChange *noted;

	if (writer->changed == NULL)
		return;
	noted = &writer->changed[writer->nchanged];
	memset(noted, 0, sizeof(*noted));
	noted->time = time_of(writer, change);
	noted->metadata = change->metadata;
	noted->has_new = new != NULL;
	if (new != NULL)
		noted->new = *new;
	noted->has_old = old != NULL;
	if (old == NULL)
		return;
	noted->old = *old;
	noted->old.key = change->key;
	noted->old.value = (Datum) 0;
	noted->old_is_ours = found_is_ours(writer);
	noted->old_in_backlog =
		!noted->old_is_ours && es_store_row_in_backlog(writer->batch->store, old);
	if (noted->old_is_ours || noted->old_in_backlog)
		noted->old.value = PointerGetDatum(PG_DETOAST_DATUM_COPY(old->value));
}

/* The change that was noted last has happened. */
static void
keep_change(Writer *writer)
{
	if (writer->changed == NULL)
		return;
	writer->changed[writer->nchanged++].new_tid = writer->row->tts_tid;
}

/* What was never recorded and is gone never was: so only of what is put. */
static void
note_later(Writer *writer, const EsStoreChange *change)
{
	if (writer->backlog != NULL)
		es_store_backlog_add(writer->backlog, change->key, change->value,
							 change->metadata);
}

static bool
lock_found(Writer *writer)
{
	TM_FailureData	failure;
	ItemPointerData tid = writer->found->tts_tid;

	return was_newest(writer, table_tuple_lock(writer->rel, &tid, writer->snapshot,
											   writer->row, GetCurrentCommandId(false),
											   LockTupleNoKeyExclusive, LockWaitBlock, 0,
											   &failure));
}

/* Puts the value in place of the one that was found.  False: look again. */
static bool
replace_found(Writer *writer, const EsStoreChange *change)
{
	TM_FailureData failure;
	EsStoreRow	   old;
	EsStoreRow new;
	bool needs_indexes;

	read_found(writer, &old);
	if (es_store_same_bytes(old.value, change->value))
	{
		if (!lock_found(writer))
			return false;
		writer->batch->result->unchanged++;
		return true;
	}
	next_row(writer, change, &old, &new);
	note_change(writer, change, &old, &new);
	fill_row(writer, writer->row, &new);
	if (!was_newest(writer,
					es_try_update_tuple(writer->rel, &writer->found->tts_tid, writer->row,
										writer->snapshot, &failure, &needs_indexes)))
		return false;
	if (needs_indexes)
		list_free(
			es_insert_index_tuples(writer->rri, writer->row, writer->estate, NULL, NIL));
	keep_change(writer);
	note_later(writer, change);
	writer->batch->result->updated++;
	return true;
}

static bool
delete_found(Writer *writer, const EsStoreChange *change)
{
	TM_FailureData failure;
	EsStoreRow	   old;

	read_found(writer, &old);
	note_change(writer, change, &old, NULL);
	if (!was_newest(writer,
					table_tuple_delete(writer->rel, &writer->found->tts_tid,
									   GetCurrentCommandId(true), writer->snapshot,
									   InvalidSnapshot, true, &failure, false)))
		return false;
	keep_change(writer);
	writer->batch->result->deleted++;
	return true;
}

/*
 * What the key's stream ends with, as far as can be told without its lock; false
 * where there is none.
 */
static bool
look_at_stream(Writer *writer, Datum key, EsStoreRow *last)
{
	EsStreamHead head;

	memset(last, 0, sizeof(*last));
	if (writer->heads == NULL ||
		!es_heads_look(writer->heads, writer->heads_walk,
					   es_store_key_to_text(writer->batch->store, key), &head))
		return false;
	if (head.version == 0)
		return true;
	last->version = head.version;
	last->has_time = true;
	last->updated_at = head.last_at;
	return true;
}

/* Nobody else can be inserting the key, nor begin its stream. */
static void
add_row(Writer *writer, const EsStoreChange *change, const EsStoreRow *new,
		bool has_stream)
{
	EsRowChange *noted = NULL;

	if (writer->changed != NULL)
	{
		note_change(writer, change, NULL, new);
		noted = &writer->changed[writer->nchanged++];
		noted->stream_is_new = !has_stream;
	}
	fill_row(writer, es_bulk_slot(writer->bulk), new);
	es_bulk_add(writer->bulk, noted == NULL ? NULL : &noted->new_tid);
	note_later(writer, change);
	writer->batch->result->inserted++;
}

/* False where somebody else has inserted the key, or is about to. */
static bool
insert_row(Writer *writer, const EsStoreChange *change)
{
	EsStoreRow last;
	EsStoreRow new;
	bool has_stream = look_at_stream(writer, change->key, &last);

	next_row(writer, change, &last, &new);
	if (writer->bulk != NULL)
	{
		add_row(writer, change, &new, has_stream);
		return true;
	}
	fill_row(writer, writer->row, &new);
	if (!es_insert_speculatively(writer->rri, writer->estate, writer->row,
								 RelationGetRelid(writer->index)))
		return false;
	note_change(writer, change, NULL, &new);
	keep_change(writer);
	writer->batch->result->inserted++;
	return true;
}

/* Waits for whoever is inserting the key. */
static void
await_inserter(Writer *writer, Datum key)
{
	SnapshotData dirty;
	bool		 found;

	InitDirtySnapshot(dirty);
	found = es_store_find(writer->batch->store, writer->rel, key, &dirty, writer->found);
	ExecClearTuple(writer->found);
	if (found)
		es_await_dirty(&dirty);
}

/* One attempt; false: look again. */
static bool
try_change(Writer *writer, const EsStoreChange *change, bool again)
{
	if (find_row(writer, change->key, again))
		return change->is_delete ? delete_found(writer, change)
								 : replace_found(writer, change);
	if (change->is_delete)
	{
		/* Only a new look is sure that it is not there. */
		if (again)
			writer->batch->result->unchanged++;
		return again;
	}
	if (insert_row(writer, change))
		return true;
	await_inserter(writer, change->key);
	return false;
}

static void
apply_change(Writer *writer, const EsStoreChange *change)
{
	bool again = false;

	while (!try_change(writer, change, again))
	{
		CHECK_FOR_INTERRUPTS();
		ExecClearTuple(writer->found);
		again = true;
	}
}

/*
 * Changes lie in memory in the order in which they came, and are gone through in that
 * of their keys: each would be waited for.  Of some hundred at once, which depend on
 * nothing, the processor waits for many at a time.
 */
static void
touch(const Batch *batch, int from)
{
	int			  to = Min(from + TOUCH_CHANGES, batch->nchanges);
	volatile char last;
	char		  sum = 0;

	for (int i = from; i < to; i++)
		sum += batch->changes[i]->is_delete;
	for (int i = from; i < to; i++)
	{
		const EsStoreChange *change = batch->changes[i];
		const char			*value = DatumGetPointer(change->value);
		const char			*metadata = (const char *) change->metadata;

		sum += *DatumGetPointer(change->key);
		if (!change->is_delete)
			sum += value[0] + value[Min(VARSIZE_ANY(value) - 1, CACHE_LINE)];
		if (metadata != NULL)
			sum += metadata[0] + metadata[Min(VARSIZE(metadata) - 1, CACHE_LINE)];
	}
	last = sum;
	(void) last;
}

static void
apply_direct(Batch *batch)
{
	Writer writer;

	CheckCmdReplicaIdentity(batch->rel, CMD_UPDATE);
	if (batch->has_deletes)
		CheckCmdReplicaIdentity(batch->rel, CMD_DELETE);
	/* What the statement around us has written so far is to be found. */
	CommandCounterIncrement();
	open_writer(&writer, batch);
	for (int i = 0; i < batch->nchanges; i++)
	{
		CHECK_FOR_INTERRUPTS();
		if (i % TOUCH_CHANGES == 0)
			touch(batch, i);
		apply_change(&writer, batch->changes[i]);
		ResetPerTupleExprContext(writer.estate);
	}
	close_writer(&writer);
	if (writer.nchanged > 0)
		es_store_record_rows(batch->store, batch->rel, writer.changed, writer.nchanged);
	CommandCounterIncrement();
}

/* ---------------------------------------------------------------------------
 * Row by row
 * ------------------------------------------------------------------------- */

static void
count_row(EsStoreBatchResult *result, const EsStoreChange *change,
		  const EsReplaced *replaced)
{
	if (SPI_processed == 0 || replaced->same)
		result->unchanged++;
	else if (change->is_delete)
		result->deleted++;
	else if (replaced->found)
		result->updated++;
	else
		result->inserted++;
}

/* In SPI. */
static void
apply_row(Batch *batch, const EsStoreChange *change)
{
	Datum	   values[2] = {change->key, change->value};
	EsReplaced replaced;

	es_store_watch_begin(&replaced, batch->store->relid, change->key);
	replaced.metadata = change->metadata;
	replaced.time_given = change->created_at_given;
	replaced.time = change->created_at;
	PG_TRY();
	{
		es_store_execute(batch->store, change->is_delete ? ES_STORE_DELETE : ES_STORE_PUT,
						 values, false);
	}
	PG_FINALLY();
	{
		es_store_watch_end(&replaced);
	}
	PG_END_TRY();
	count_row(batch->result, change, &replaced);
	SPI_freetuptable(SPI_tuptable);
}

static void
apply_rows(Batch *batch)
{
	MemoryContext context;
	MemoryContext old;

	SPI_connect();
	context = AllocSetContextCreate(CurrentMemoryContext, "eventstore changed row",
									ALLOCSET_DEFAULT_SIZES);
	old = MemoryContextSwitchTo(context);
	for (int i = 0; i < batch->nchanges; i++)
	{
		CHECK_FOR_INTERRUPTS();
		apply_row(batch, batch->changes[i]);
		MemoryContextReset(context);
	}
	MemoryContextSwitchTo(old);
	SPI_finish();
}

/* ---------------------------------------------------------------------------
 * The whole
 * ------------------------------------------------------------------------- */

static void
apply(Oid relid, const EsStoreChange *changes, int nchanges, const char *topic,
	  bool by_rows, EsStoreBatchResult *result)
{
	Batch batch = {0};

	PreventCommandIfReadOnly("a change of a store");
	PreventCommandIfParallelMode("a change of a store");
	es_require_preloaded();
	memset(result, 0, sizeof(*result));
	batch.store = es_store_open(relid, RowExclusiveLock);
	if (nchanges == 0)
		return;
	batch.rel = table_open(relid, NoLock);
	batch.result = result;
	es_store_check_filled(batch.store, batch.rel);
	merge_changes(&batch, changes, nchanges);
	if (!by_rows && is_direct(&batch))
	{
		if (topic != NULL && es_store_backlog_may_grow(batch.store, batch.rel, topic))
			batch.later_from = topic;
		apply_direct(&batch);
	}
	else
		apply_rows(&batch);
	table_close(batch.rel, NoLock);
}

void
es_store_apply(Oid store, const EsStoreChange *changes, int nchanges, const char *topic,
			   EsStoreBatchResult *result)
{
	apply(store, changes, nchanges, topic, false, result);
}

/* ---------------------------------------------------------------------------
 * SQL, for tests and benchmarks
 * ------------------------------------------------------------------------- */

/* The elements of an array argument; 'n' of them, as many as there are keys. */
static void
take_array(FunctionCallInfo fcinfo, int arg, Oid type, const char *name, Datum **values,
		   bool **nulls, int *n)
{
	ArrayType *array;
	int16	   length;
	bool	   by_value;
	char	   align;
	int		   count;

	es_require_arg(&fcinfo->args[arg], name);
	array = PG_GETARG_ARRAYTYPE_P(arg);
	if (ARR_ELEMTYPE(array) != type)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("\"%s\" must be an array of %s", name, format_type_be(type))));
	get_typlenbyvalalign(type, &length, &by_value, &align);
	deconstruct_array(array, type, length, by_value, align, values, nulls, &count);
	if (*n >= 0 && count != *n)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("\"%s\" must have as many elements as \"%s\"", name, "keys"),
				 errdetail("They have %d and %d.", count, *n)));
	*n = count;
}

static EsStoreChange *
take_changes(FunctionCallInfo fcinfo, const EsStore *store, int *n)
{
	EsStoreChange *changes;
	Datum		  *columns[4];
	bool		  *nulls[4];

	*n = -1;
	take_array(fcinfo, 1, TEXTOID, "keys", &columns[0], &nulls[0], n);
	take_array(fcinfo, 2, es_store_type(store->format), "new_values", &columns[1],
			   &nulls[1], n);
	if (!PG_ARGISNULL(3))
		take_array(fcinfo, 3, JSONBOID, "metadata", &columns[2], &nulls[2], n);
	if (!PG_ARGISNULL(4))
		take_array(fcinfo, 4, TIMESTAMPTZOID, "times", &columns[3], &nulls[3], n);

	changes = palloc0(sizeof(EsStoreChange) * (*n + 1));
	for (int i = 0; i < *n; i++)
	{
		EsStoreChange *change = &changes[i];

		if (nulls[0][i])
			ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
							errmsg("keys must not contain nulls")));
		change->key = es_store_key_from_text(store, DatumGetTextPP(columns[0][i]));
		change->is_delete = nulls[1][i];
		if (!change->is_delete)
			change->value = PointerGetDatum(PG_DETOAST_DATUM(columns[1][i]));
		if (!PG_ARGISNULL(3) && !nulls[2][i])
			change->metadata = DatumGetJsonbP(columns[2][i]);
		change->created_at_given = !PG_ARGISNULL(4) && !nulls[3][i];
		if (change->created_at_given)
			change->created_at = DatumGetTimestampTz(columns[3][i]);
	}
	return changes;
}

Datum
es_store_apply_arrays(PG_FUNCTION_ARGS)
{
	EsStoreBatchResult result;
	EsStoreChange	  *changes;
	Datum			   values[4];
	bool			   nulls[4] = {0};
	TupleDesc		   desc;
	int				   n;

	es_require_arg(&fcinfo->args[0], "store");
	changes = take_changes(fcinfo, es_store_open(PG_GETARG_OID(0), RowExclusiveLock), &n);
	apply(PG_GETARG_OID(0), changes, n,
		  PG_ARGISNULL(6) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(6)),
		  !PG_ARGISNULL(5) && PG_GETARG_BOOL(5), &result);

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	values[0] = Int64GetDatum(result.inserted);
	values[1] = Int64GetDatum(result.updated);
	values[2] = Int64GetDatum(result.deleted);
	values[3] = Int64GetDatum(result.unchanged);
	PG_RETURN_DATUM(
		HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}
