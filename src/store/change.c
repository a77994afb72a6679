/*
 * store/change.c
 *		The triggers of a store: each change of a row is an event.
 *
 * Whatever changes a store's row (our functions, INSERT with ON CONFLICT or
 * without, UPDATE, DELETE, MERGE, COPY, a foreign key's action, somebody's
 * trigger) passes two row triggers:
 *
 *	version	BEFORE, after all triggers of the user: gives the row its version and
 *			time.  It has no side effect, for it also runs for rows that ON
 *			CONFLICT then does not insert.  A new key's version follows the last
 *			one of its stream, at which it looks without a lock: it runs before
 *			the unique check, where a lock would be taken in the wrong order.
 *	record	AFTER, before all triggers of the user: locks the key's stream and
 *			appends.  By now the row is ours, so locks go row, then head.
 *
 * The stream's last version, locked, is the truth, and each row's version is to
 * be that of its event.  Mostly it is what the first trigger foresaw.  Else
 *
 *	- another transaction deleted the key between the look and the unique
 *	  check: the stream is ahead, and the row that is there is corrected;
 *	- a trigger or function of the user's, run amid the statement, has changed
 *	  a row whose own event is still queued.  Versions tell: that change finds
 *	  the row it replaced unrecorded and records it first, and the queued event
 *	  finds that it has been recorded;
 *	- somebody has changed the table with triggers off: the row is corrected.
 *
 * A value that stays the same, byte for byte, is no change: no version, no
 * event.  A changed key is a delete and a put, in one append.
 *
 * Rights: who may write the table needs none on the changelog (EsAppend's
 * 'recording').  Without a changelog there is only the first trigger.
 *
 * A crash or an abort undoes row and event together: they are one transaction.
 */
#include "postgres.h"

#include "store/change.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_collation.h"
#include "collection/append.h"
#include "collection/heads.h"
#include "commands/trigger.h"
#include "compat.h"
#include "errors.h"
#include "executor/executor.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "shmem.h"
#include "store/store.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgrprotos.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(es_store_version);
PG_FUNCTION_INFO_V1(es_store_record);
PG_FUNCTION_INFO_V1(es_store_guard);

static EsReplaced *watched = NULL;
static Oid	unrecorded = InvalidOid;
static int	unrecorded_depth;

/* ---------------------------------------------------------------------------
 * What the functions ask of the triggers
 * ------------------------------------------------------------------------- */

static int
trigger_depth(void)
{
	return DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum) 0));
}

void
es_store_watch_begin(EsReplaced *replaced, Oid store, Datum key)
{
	replaced->store = store;
	replaced->key = key;
	replaced->depth = trigger_depth() + 1;
	replaced->found = false;
	replaced->value = (Datum) 0;
	replaced->context = CurrentMemoryContext;
	replaced->outer = watched;
	watched = replaced;
}

void
es_store_watch_end(EsReplaced *replaced)
{
	watched = replaced->outer;
}

void
es_store_unrecorded_begin(Oid store)
{
	unrecorded = store;
	unrecorded_depth = trigger_depth() + 1;
}

void
es_store_unrecorded_end(void)
{
	unrecorded = InvalidOid;
}

static bool
is_unrecorded(Relation rel)
{
	return unrecorded == RelationGetRelid(rel) && unrecorded_depth == trigger_depth();
}

/* ---------------------------------------------------------------------------
 * Rows
 * ------------------------------------------------------------------------- */

/* A row's own columns. */
typedef struct StoreRow
{
	Datum		key;
	Datum		value;
	bool		complete;		/* neither key nor value is null */
	int64		version;		/* 0 for null */
	bool		has_time;
	TimestampTz updated_at;
} StoreRow;

static void
read_row(StoreRow *row, HeapTuple tuple, TupleDesc desc)
{
	bool		no_key;
	bool		no_value;
	bool		isnull;
	Datum		datum;

	row->key = heap_getattr(tuple, ES_STORE_KEY, desc, &no_key);
	row->value = heap_getattr(tuple, ES_STORE_VALUE, desc, &no_value);
	row->complete = !no_key && !no_value;
	datum = heap_getattr(tuple, ES_STORE_VERSION, desc, &isnull);
	row->version = isnull ? 0 : DatumGetInt64(datum);
	datum = heap_getattr(tuple, ES_STORE_UPDATED_AT, desc, &isnull);
	row->has_time = !isnull;
	row->updated_at = isnull ? 0 : DatumGetTimestampTz(datum);
}

static bool
same_bytes(Datum a, Datum b)
{
	return datum_image_eq(a, b, false, -1);
}

static void
note_replaced(Relation rel, const StoreRow *row)
{
	MemoryContext old;

	if (watched == NULL || watched->store != RelationGetRelid(rel) ||
		watched->depth != trigger_depth() || !same_bytes(watched->key, row->key))
		return;
	old = MemoryContextSwitchTo(watched->context);
	watched->value = PointerGetDatum(PG_DETOAST_DATUM_COPY(row->value));
	watched->found = true;
	MemoryContextSwitchTo(old);
}

static TimestampTz
not_before(TimestampTz time, const StoreRow *previous)
{
	return previous->has_time ? Max(time, previous->updated_at) : time;
}

static TriggerData *
require_row_trigger(FunctionCallInfo fcinfo, const char *name, bool before)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_FOR_ROW(trigdata->tg_event) ||
		(before ? !TRIGGER_FIRED_BEFORE(trigdata->tg_event) :
		 !TRIGGER_FIRED_AFTER(trigdata->tg_event)) ||
		(before && TRIGGER_FIRED_BY_DELETE(trigdata->tg_event)))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"eventstore.%s\" must be called %s for each row",
						name, before ? "before insert or update" : "after a change")));
	return trigdata;
}

/* ---------------------------------------------------------------------------
 * BEFORE: version and time
 * ------------------------------------------------------------------------- */

/* What the key's stream ends with, as far as can be told without its lock. */
static void
look_at_stream(const EsStore *store, Datum key, StoreRow *last)
{
	EsStreamHead head;
	EsCollection *changelog;
	Snapshot	snapshot;

	last->version = 0;
	last->has_time = false;
	if (!OidIsValid(store->changelog))
		return;
	changelog = es_collection_open(store->changelog, RowExclusiveLock);
	snapshot = RegisterSnapshot(GetLatestSnapshot());
	if (es_heads_peek(changelog, es_store_key_to_text(store, key), snapshot, &head))
	{
		last->version = head.version;
		last->has_time = true;
		last->updated_at = head.last_at;
	}
	UnregisterSnapshot(snapshot);
}

static HeapTuple
with_version(HeapTuple tuple, TupleDesc desc, int64 version, bool has_time, TimestampTz time)
{
	int			columns[2] = {ES_STORE_VERSION, ES_STORE_UPDATED_AT};
	Datum		values[2] = {Int64GetDatum(version), TimestampTzGetDatum(time)};
	bool		nulls[2] = {false, !has_time};

	return heap_modify_tuple_by_cols(tuple, desc, 2, columns, values, nulls);
}

static HeapTuple
version_update(const EsStore *store, TriggerData *trigdata)
{
	TupleDesc	desc = RelationGetDescr(trigdata->tg_relation);
	StoreRow	old;
	StoreRow	new;
	StoreRow	last;

	read_row(&old, trigdata->tg_trigtuple, desc);
	read_row(&new, trigdata->tg_newtuple, desc);
	note_replaced(trigdata->tg_relation, &old);
	if (!new.complete)
		return trigdata->tg_newtuple;	/* to be refused as null */
	last = old;
	if (!same_bytes(old.key, new.key))
		look_at_stream(store, new.key, &last);
	else if (same_bytes(old.value, new.value))
		return with_version(trigdata->tg_newtuple, desc, old.version, old.has_time,
							old.updated_at);
	return with_version(trigdata->tg_newtuple, desc, last.version + 1, true,
						not_before(GetCurrentTimestamp(), &last));
}

static HeapTuple
version_insert(EsStore *store, TriggerData *trigdata)
{
	TupleDesc	desc = RelationGetDescr(trigdata->tg_relation);
	StoreRow	new;
	StoreRow	last;

	es_store_check_filled(store, trigdata->tg_relation);
	read_row(&new, trigdata->tg_trigtuple, desc);
	if (!new.complete)
		return trigdata->tg_trigtuple;
	look_at_stream(store, new.key, &last);
	return with_version(trigdata->tg_trigtuple, desc, last.version + 1, true,
						not_before(GetCurrentTimestamp(), &last));
}

Datum
es_store_version(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = require_row_trigger(fcinfo, "store_version", true);
	EsStore    *store = es_store_get(RelationGetRelid(trigdata->tg_relation));
	bool		update = TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event);

	if (is_unrecorded(trigdata->tg_relation))
		PG_RETURN_POINTER(update ? trigdata->tg_newtuple : trigdata->tg_trigtuple);
	PG_RETURN_POINTER(update ? version_update(store, trigdata) :
					  version_insert(store, trigdata));
}

/* ---------------------------------------------------------------------------
 * AFTER: events
 * ------------------------------------------------------------------------- */

typedef enum ChangePart
{
	PART_PENDING,				/* put of the old row, whose own event is queued still */
	PART_DELETE,				/* of the old key */
	PART_PUT					/* of the new row */
} ChangePart;

#define MAX_PARTS	3

/* A changed row, and the events that it may be. */
typedef struct Change
{
	const EsStore *store;
	Relation	rel;
	StoreRow	old;
	StoreRow	new;
	HeapTuple	new_tuple;		/* NULL for a delete */
	int			nparts;
	ChangePart	parts[MAX_PARTS];
	EsEvent		events[MAX_PARTS];
	const EsEvent *put;			/* the event of PART_PUT, where it stayed; else NULL */
} Change;

static void
set_value(const EsStore *store, EsEvent *event, Datum value)
{
	struct varlena *detoasted = PG_DETOAST_DATUM(value);

	if (store->format == ES_STORE_JSON)
		event->data = (Jsonb *) detoasted;
	else
		event->body = (bytea *) detoasted;	/* a text's bytes */
}

static void
add_part(Change *change, ChangePart part)
{
	const StoreRow *row = part == PART_PUT ? &change->new : &change->old;
	EsEvent    *event = &change->events[change->nparts];

	change->parts[change->nparts++] = part;
	memset(event, 0, sizeof(*event));
	event->expected_version = ES_NO_VERSION;
	event->type = cstring_to_text(part == PART_DELETE ? "delete" : "put");
	event->stream = es_store_key_to_text(change->store, row->key);
	event->created_at_given = true;
	event->created_at = GetCurrentTimestamp();
	if (part == PART_DELETE)
		return;
	set_value(change->store, event, row->value);
	if (row->has_time)
		event->created_at = row->updated_at;
}

/* False where nothing has changed. */
static bool
collect_parts(Change *change, TriggerData *trigdata)
{
	TupleDesc	desc = RelationGetDescr(change->rel);
	HeapTuple	old = TRIGGER_FIRED_BY_INSERT(trigdata->tg_event) ? NULL :
		trigdata->tg_trigtuple;
	bool		moved = true;

	if (TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event))
		change->new_tuple = trigdata->tg_newtuple;
	else if (old == NULL)
		change->new_tuple = trigdata->tg_trigtuple;

	if (old != NULL)
		read_row(&change->old, old, desc);
	if (change->new_tuple != NULL)
		read_row(&change->new, change->new_tuple, desc);
	if (old != NULL && change->new_tuple != NULL)
	{
		moved = !same_bytes(change->old.key, change->new.key);
		if (!moved && same_bytes(change->old.value, change->new.value))
			return false;
	}

	if (old != NULL &&
		TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(old->t_data)))
		add_part(change, PART_PENDING);
	if (old != NULL && moved)
		add_part(change, PART_DELETE);
	if (change->new_tuple != NULL)
		add_part(change, PART_PUT);
	return true;
}

/* Is the new row the one that is there now, or has this transaction replaced it? */
static bool
is_live(const Change *change)
{
	TupleTableSlot *slot = table_slot_create(change->rel, NULL);
	bool		live = table_tuple_fetch_row_version(change->rel, &change->new_tuple->t_self,
													 SnapshotSelf, slot);

	ExecDropSingleTupleTableSlot(slot);
	return live;
}

/* Has this transaction put the old key again? */
static bool
old_key_is_back(const Change *change)
{
	TupleTableSlot *slot = table_slot_create(change->rel, NULL);
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	bool		found = es_store_find(change->store, change->rel, change->old.key, snapshot,
									  slot);

	ExecDropSingleTupleTableSlot(slot);
	UnregisterSnapshot(snapshot);
	return found;
}

/* Is it still to be recorded, where the stream's last version is 'last'? */
static bool
is_missing(const Change *change, ChangePart part, int64 last)
{
	switch (part)
	{
		case PART_PENDING:
			return last + 1 == change->old.version;
		case PART_DELETE:
			return last <= change->old.version || !old_key_is_back(change);
		case PART_PUT:
			return last < change->new.version || is_live(change);
	}
	return false;
}

/* The streams are locked: leaves the events that are missing, in order of time. */
static void
settle_change(EsAppend *append, const EsStreamHead *streams)
{
	Change	   *change = append->settle_arg;
	int64		last[MAX_PARTS];
	TimestampTz last_at[MAX_PARTS];
	int			kept = 0;

	for (int i = 0; i < append->nevents; i++)
	{
		int			s = append->events[i].stream_index;

		last[s] = streams[s].version;
		last_at[s] = streams[s].version > 0 ? streams[s].last_at : DT_NOBEGIN;
	}
	for (int i = 0; i < append->nevents; i++)
	{
		EsEvent    *event = &append->events[kept];
		int			s = append->events[i].stream_index;

		if (!is_missing(change, change->parts[i], last[s]))
			continue;
		if (kept < i)
			*event = append->events[i];
		event->created_at = Max(event->created_at, last_at[s]);
		last_at[s] = event->created_at;
		last[s]++;
		if (change->parts[i] == PART_PUT)
			change->put = event;
		kept++;
	}
	append->nevents = kept;
}

/* Replaces the row, which is ours, past the triggers. */
static void
correct_row(const Change *change)
{
	EState	   *estate = CreateExecutorState();
	ResultRelInfo *rri = makeNode(ResultRelInfo);
	TupleTableSlot *slot = table_slot_create(change->rel, NULL);
	ItemPointerData tid = change->new_tuple->t_self;
	HeapTuple	tuple = with_version(change->new_tuple, RelationGetDescr(change->rel),
									 change->put->version, true, change->put->created_at);

	ExecForceStoreHeapTuple(tuple, slot, false);
	slot->tts_tableOid = RelationGetRelid(change->rel);
	InitResultRelInfo(rri, change->rel, 0, NULL, 0);
	ExecOpenIndices(rri, false);
	if (es_update_tuple(change->rel, &tid, slot))
		list_free(es_insert_index_tuples(rri, slot, estate, NULL, NIL));
	ExecCloseIndices(rri);
	ExecDropSingleTupleTableSlot(slot);
	FreeExecutorState(estate);
	CommandCounterIncrement();
}

static void
record(Change *change)
{
	EsAppend	append = {0};

	es_require_preloaded();
	append.coll = es_collection_open(change->store->changelog, RowExclusiveLock);
	append.nevents = change->nparts;
	append.events = change->events;
	append.expected_version = ES_NO_VERSION;
	append.recording = true;
	append.settle = settle_change;
	append.settle_arg = change;
	es_append_run(&append);

	if (change->put != NULL &&
		(change->put->version != change->new.version ||
		 change->put->created_at != change->new.updated_at) && is_live(change))
		correct_row(change);
}

Datum
es_store_record(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = require_row_trigger(fcinfo, "store_record", false);
	Change		change;

	memset(&change, 0, sizeof(change));
	change.rel = trigdata->tg_relation;
	change.store = es_store_get(RelationGetRelid(change.rel));
	if (OidIsValid(change.store->changelog) && !is_unrecorded(change.rel) &&
		collect_parts(&change, trigdata))
		record(&change);
	PG_RETURN_POINTER(NULL);	/* nobody looks at it, but null is an error */
}

/* ---------------------------------------------------------------------------
 * TRUNCATE
 * ------------------------------------------------------------------------- */

Datum
es_store_guard(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" was not called as a trigger", "eventstore.store_guard")));
	ereport(ERROR,
			(errcode(ERRCODE_ES_APPEND_ONLY),
			 errmsg("cannot TRUNCATE store \"%s\"",
					RelationGetRelationName(trigdata->tg_relation)),
			 errdetail("It would not be recorded key by key."),
			 errhint("Use eventstore.clear() or DELETE."),
			 errtable(trigdata->tg_relation)));
	PG_RETURN_NULL();
}
