/*
 * store/record.c
 *		Which events changed rows are, and appending them.
 *
 * A row is written first, by whoever, and is then ours; only after that is the
 * key's stream locked: row, then head.  The stream's last version, locked, is
 * the truth, and each row's version is to be that of its event.  Mostly it is
 * what was foreseen when the row was written.  Else
 *
 *	- another transaction deleted the key between the look at the stream and the
 *	  unique check: the stream is ahead, and the row that is there is corrected;
 *	- a trigger or function of the user's, run amid the statement, has changed
 *	  a row whose own event is still queued.  Versions tell: that change finds
 *	  the row it replaced unrecorded and records it first, and the queued event
 *	  finds that it has been recorded;
 *	- somebody has changed the table with triggers off: the row is corrected;
 *	- the row that was changed was restored, and is of the store's backlog
 *	  (backlog.c): that it was put is recorded first.
 *
 * A changed key is a delete and a put, in one append.
 *
 * Rights: who may write the table needs none on the changelog (EsAppend's
 * 'recording').
 *
 * A crash or an abort undoes row and event together: they are one transaction.
 */
#include "postgres.h"

#include "store/record.h"

#include "access/htup_details.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "collection/append.h"
#include "collection/heads.h"
#include "compat.h"
#include "executor/executor.h"
#include "shmem.h"
#include "store/backlog.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* ---------------------------------------------------------------------------
 * Rows
 * ------------------------------------------------------------------------- */

void
es_store_read_row(EsStoreRow *row, HeapTuple tuple, TupleDesc desc)
{
	bool  no_key;
	bool  no_value;
	bool  isnull;
	Datum datum;

	row->key = heap_getattr(tuple, ES_STORE_KEY, desc, &no_key);
	row->value = heap_getattr(tuple, ES_STORE_VALUE, desc, &no_value);
	row->complete = !no_key && !no_value;
	datum = heap_getattr(tuple, ES_STORE_VERSION, desc, &isnull);
	row->version = isnull ? 0 : DatumGetInt64(datum);
	datum = heap_getattr(tuple, ES_STORE_UPDATED_AT, desc, &isnull);
	row->has_time = !isnull;
	row->updated_at = isnull ? 0 : DatumGetTimestampTz(datum);
}

bool
es_store_same_bytes(Datum a, Datum b)
{
	return datum_image_eq(a, b, false, -1);
}

HeapTuple
es_store_with_version(HeapTuple tuple, TupleDesc desc, int64 version, bool has_time,
					  TimestampTz time)
{
	int	  columns[2] = {ES_STORE_VERSION, ES_STORE_UPDATED_AT};
	Datum values[2] = {Int64GetDatum(version), TimestampTzGetDatum(time)};
	bool  nulls[2] = {false, !has_time};

	return heap_modify_tuple_by_cols(tuple, desc, 2, columns, values, nulls);
}

bool
es_store_row_in_backlog(const EsStore *store, const EsStoreRow *row)
{
	return store->backlog[0] != '\0' && row->version == 1;
}

TimestampTz
es_store_not_before(TimestampTz time, const EsStoreRow *previous)
{
	return previous->has_time ? Max(time, previous->updated_at) : time;
}

/* ---------------------------------------------------------------------------
 * The events that a change may be
 * ------------------------------------------------------------------------- */

typedef enum PartKind
{
	PART_PENDING, /* put of the old row, whose own event is queued still, or due */
	PART_DELETE,  /* of the old key */
	PART_PUT	  /* of the new row */
} PartKind;

typedef struct Part
{
	PartKind		   kind;
	const EsRowChange *change;
} Part;

typedef struct Recording
{
	const EsStore *store;
	Relation	   rel;
	text		  *put; /* the types of events */
	text *delete;
	Jsonb	*backlog; /* metadata of a row of the backlog, once one is met */
	int		 nparts;
	Part	*parts; /* beside the events */
	EsEvent *events;
} Recording;

static void
set_value(const EsStore *store, EsEvent *event, Datum value)
{
	struct varlena *detoasted = PG_DETOAST_DATUM(value);

	if (store->format == ES_STORE_JSON)
		event->data = (Jsonb *) detoasted;
	else
		event->body = (bytea *) detoasted; /* a text's bytes */
}

/*
 * The pending one is of an earlier change, whose metadata we do not have.  Of what was
 * restored it is known where from, by which the sink knows that it is there already.
 */
static Jsonb *
metadata_of(Recording *recording, const EsRowChange *change, PartKind kind)
{
	if (kind != PART_PENDING || change->only_backlog)
		return change->metadata;
	if (change->old_is_ours)
		return NULL;
	if (recording->backlog == NULL)
		recording->backlog = es_store_backlog_metadata(recording->store);
	return recording->backlog;
}

static void
add_part(Recording *recording, const EsRowChange *change, PartKind kind)
{
	const EsStoreRow *row = kind == PART_PUT ? &change->new : &change->old;
	EsEvent			 *event = &recording->events[recording->nparts];

	recording->parts[recording->nparts].kind = kind;
	recording->parts[recording->nparts++].change = change;
	memset(event, 0, sizeof(*event));
	event->expected_version = ES_NO_VERSION;
	event->type = kind == PART_DELETE ? recording->delete : recording->put;
	event->stream = es_store_key_to_text(recording->store, row->key);
	event->created_at_given = true;
	event->created_at = change->time;
	event->stream_is_new =
		change->stream_is_new && (kind == PART_PUT || change->only_backlog);
	event->metadata = metadata_of(recording, change, kind);
	if (kind == PART_DELETE)
		return;
	set_value(recording->store, event, row->value);
	if (row->has_time)
		event->created_at = row->updated_at;
}

/* Has the change the part? */
static bool
has_part(const EsRowChange *change, PartKind kind)
{
	switch (kind)
	{
		case PART_PENDING:
			return change->has_old && (change->old_is_ours || change->old_in_backlog);
		case PART_DELETE:
			return change->has_old && !change->only_backlog &&
				   (change->moved || !change->has_new);
		case PART_PUT:
			return change->has_new;
	}
	return false;
}

static int
count_parts(const EsRowChange *change)
{
	int n = 0;

	for (PartKind kind = PART_PENDING; kind <= PART_PUT; kind++)
		n += has_part(change, kind);
	return n;
}

static void
add_change(Recording *recording, const EsRowChange *change)
{
	for (PartKind kind = PART_PENDING; kind <= PART_PUT; kind++)
		if (has_part(change, kind))
			add_part(recording, change, kind);
}

/* ---------------------------------------------------------------------------
 * The streams are locked: the events that are missing
 * ------------------------------------------------------------------------- */

/* Is the new row the one that is there now, or has this transaction replaced it? */
static bool
fetch_if_live(const Recording *recording, const EsRowChange *change, TupleTableSlot *slot)
{
	ItemPointerData tid = change->new_tid;

	return table_tuple_fetch_row_version(recording->rel, &tid, SnapshotSelf, slot);
}

static bool
is_live(const Recording *recording, const EsRowChange *change)
{
	TupleTableSlot *slot = table_slot_create(recording->rel, NULL);
	bool			live = fetch_if_live(recording, change, slot);

	ExecDropSingleTupleTableSlot(slot);
	return live;
}

/* Has this transaction put the old key again? */
static bool
old_key_is_back(const Recording *recording, const EsRowChange *change)
{
	TupleTableSlot *slot = table_slot_create(recording->rel, NULL);
	Snapshot		snapshot = RegisterSnapshot(GetLatestSnapshot());
	bool			found =
		es_store_find(recording->store, recording->rel, change->old.key, snapshot, slot);

	ExecDropSingleTupleTableSlot(slot);
	UnregisterSnapshot(snapshot);
	return found;
}

/* Is it still to be recorded, where the stream's last version is 'last'? */
static bool
is_missing(const Recording *recording, const Part *part, int64 last)
{
	const EsRowChange *change = part->change;

	switch (part->kind)
	{
		case PART_PENDING:
			return last + 1 == change->old.version;
		case PART_DELETE:
			/* Who has put the key again meanwhile did not find the restored row's event. */
			if (change->old_in_backlog)
				CommandCounterIncrement();
			else if (last <= change->old.version)
				return true;
			return !old_key_is_back(recording, change);
		case PART_PUT:
			return last < change->new.version || is_live(recording, change);
	}
	return false;
}

/* Leaves the events that are missing, in order of time. */
static void
settle(EsAppend *append, const EsStreamHead *streams)
{
	Recording	*recording = append->settle_arg;
	int64		*last = palloc(sizeof(int64) * append->nevents);
	TimestampTz *last_at = palloc(sizeof(TimestampTz) * append->nevents);
	int			 kept = 0;

	for (int i = 0; i < append->nevents; i++)
	{
		int s = append->events[i].stream_index;

		last[s] = streams[s].version;
		last_at[s] = streams[s].version > 0 ? streams[s].last_at : DT_NOBEGIN;
	}
	for (int i = 0; i < append->nevents; i++)
	{
		EsEvent *event = &append->events[kept];
		int		 s = append->events[i].stream_index;

		if (!is_missing(recording, &recording->parts[i], last[s]))
			continue;
		if (kept < i)
		{
			*event = append->events[i];
			recording->parts[kept] = recording->parts[i];
		}
		event->created_at = Max(event->created_at, last_at[s]);
		last_at[s] = event->created_at;
		last[s]++;
		kept++;
	}
	append->nevents = kept;
	recording->nparts = kept;
	pfree(last);
	pfree(last_at);
}

/* ---------------------------------------------------------------------------
 * Rows that were not as foreseen
 * ------------------------------------------------------------------------- */

/* Replaces a row, which is ours, past the triggers. */
static void
replace_row(Relation rel, ItemPointer tid, HeapTuple tuple)
{
	EState		   *estate = CreateExecutorState();
	ResultRelInfo  *rri = makeNode(ResultRelInfo);
	TupleTableSlot *slot = table_slot_create(rel, NULL);

	ExecForceStoreHeapTuple(tuple, slot, false);
	slot->tts_tableOid = RelationGetRelid(rel);
	InitResultRelInfo(rri, rel, 0, NULL, 0);
	ExecOpenIndices(rri, false);
	if (es_update_tuple(rel, tid, slot))
		list_free(es_insert_index_tuples(rri, slot, estate, NULL, NIL));
	ExecCloseIndices(rri);
	ExecDropSingleTupleTableSlot(slot);
	FreeExecutorState(estate);
	CommandCounterIncrement();
}

static void
correct_row(const Recording *recording, const EsRowChange *change, const EsEvent *put)
{
	TupleTableSlot *slot = table_slot_create(recording->rel, NULL);
	ItemPointerData tid = change->new_tid;
	HeapTuple		tuple = NULL;

	if (fetch_if_live(recording, change, slot))
		tuple = ExecCopySlotHeapTuple(slot);
	ExecDropSingleTupleTableSlot(slot);
	if (tuple == NULL)
		return;
	replace_row(recording->rel, &tid,
				es_store_with_version(tuple, RelationGetDescr(recording->rel),
									  put->version, true, put->created_at));
	heap_freetuple(tuple);
}

static void
correct_rows(const Recording *recording)
{
	for (int i = 0; i < recording->nparts; i++)
	{
		const EsRowChange *change = recording->parts[i].change;
		const EsEvent	  *event = &recording->events[i];

		if (recording->parts[i].kind == PART_PUT &&
			(event->version != change->new.version ||
			 event->created_at != change->new.updated_at))
			correct_row(recording, change, event);
	}
}

/* A store that follows another one has no changes of its own, or not of all keys. */
static void
check_following(const EsStore *store, const EsRowChange *change)
{
	if (change->has_old)
		es_store_follow_hook(store, change->old.key);
	if (change->has_new && (change->moved || !change->has_old))
		es_store_follow_hook(store, change->new.key);
}

/* The rows are locked: what the store's source had done with them before is done. */
static void
set_origin(const EsStore *store, EsRowChange *changes, int nchanges)
{
	Jsonb *origin = es_store_origin_hook(store);

	for (int i = 0; i < nchanges; i++)
		if (changes[i].metadata == NULL)
			changes[i].metadata = origin;
}

void
es_store_record_rows(const EsStore *store, Relation rel, EsRowChange *changes,
					 int nchanges)
{
	Recording recording = {store, rel};
	EsAppend  append = {0};
	size_t	  room = 0;

	es_require_preloaded();
	if (store->follower != 0 && store->follower != es_store_following)
		for (int i = 0; i < nchanges; i++)
			if (!changes[i].only_backlog)
				check_following(store, &changes[i]);
	if (store->publisher != 0 && store->publisher != es_store_following)
		set_origin(store, changes, nchanges);
	recording.put = cstring_to_text("put");
	recording.delete = cstring_to_text("delete");
	for (int i = 0; i < nchanges; i++)
		room += count_parts(&changes[i]);
	recording.parts = palloc_extended(sizeof(Part) * room, MCXT_ALLOC_HUGE);
	recording.events = palloc_extended(sizeof(EsEvent) * room, MCXT_ALLOC_HUGE);
	for (int i = 0; i < nchanges; i++)
		add_change(&recording, &changes[i]);
	if (recording.nparts == 0)
		return;

	append.coll = es_collection_open(store->changelog, RowExclusiveLock);
	append.nevents = recording.nparts;
	append.events = recording.events;
	append.expected_version = ES_NO_VERSION;
	append.recording = true;
	append.settle = settle;
	append.settle_arg = &recording;
	es_append_run(&append);
	correct_rows(&recording);
}
