/*
 * feed/lane.c
 *		The durable cursors of subscriptions: reading, locking, writing them.
 *
 * A subscription has one row for each lane in eventstore.subscription_lane: the
 * cursor, and whose the lane is.  A lane is somebody's in one of two ways:
 *
 *	by a row lock	of an open transaction, which moves the cursor and commits
 *					with the work done.  Nothing is written to take the lane;
 *					rollback, crash and kill -9 give it back.
 *	by a lease		'member' until 'lease_until', by the clock.  It is an
 *					ordinary committed row; a crash takes nothing from it.
 *
 * Rows are read and written here, below the executor, for two reasons: the
 * caller has no rights on this table (and needs none), and a poll makes three
 * or four of these steps, each of which would be a statement.
 *
 * Optimistic: lanes are loaded with a snapshot, looked at, and then locked
 * without waiting, on the condition that nobody has changed the row since
 * (es_lane_try_lock).  So whoever gets a lane knows that what he concluded
 * before holds, and a lane that is not taken is not locked.  Only ack, nack,
 * leave and seek wait for a lane (es_lane_lock).  Of several, locks are taken in
 * the order of the lanes.
 *
 * At READ COMMITTED each load uses a new snapshot.  Above it uses the
 * transaction's: a consumer whose snapshot does not see what the one before
 * him has done with the events must not go on from that one's cursor, but
 * fail with 40001, as an UPDATE would.
 *
 * Bloat: no index is on anything that changes, and pages are left half empty,
 * so the updates are HOT and their dead versions are pruned as one goes.
 */
#include "postgres.h"

#include "feed/lane.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_collation.h"
#include "collection/collection.h"
#include "collection/event.h"
#include "common/hashfn.h"
#include "compat.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgroids.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

struct EsLanes
{
	const text	   *subscription;
	Relation		rel;
	LOCKMODE		mode;  /* of the lock on it */
	Oid				index; /* the primary key */
	TupleTableSlot *slot;
	Snapshot		snapshot; /* registered; of the last load; NULL before */
	int				n;
	EsLane		   *lanes;
	MemoryContext	context; /* of the rows; emptied at each load */
};

/* ---------------------------------------------------------------------------
 * What belongs where
 * ------------------------------------------------------------------------- */

/*
 * The order within a stream is kept because a stream has one lane, for as long
 * as the subscription lives: this hash must never become another one.
 */
int
es_lane_of_event(TupleTableSlot *slot, int lanes)
{
	bool   isnull;
	Datum  value = slot_getattr(slot, ES_ATT_STREAM, &isnull);
	uint64 key;

	if (isnull)
		key = (uint64) DatumGetInt64(slot_getattr(slot, ES_ATT_POSITION, &isnull));
	else
	{
		text *stream = DatumGetTextPP(value);

		key = hash_bytes_extended((const unsigned char *) VARDATA_ANY(stream),
								  VARSIZE_ANY_EXHDR(stream), 0);
		if ((Pointer) stream != DatumGetPointer(value))
			pfree(stream);
	}
	return (int) (key % (uint64) lanes);
}

EsLaneState
es_lane_state(const EsLane *lane, TimestampTz now)
{
	if (lane->member != NULL)
		return lane->lease_until > now ? ES_LANE_LEASED : ES_LANE_EXPIRED;
	return lane->not_before > now ? ES_LANE_ASLEEP : ES_LANE_FREE;
}

void
es_lane_free(EsLane *lane)
{
	lane->member = NULL;
	lane->lease_until = 0;
	lane->lease = NULL;
	lane->handed_out = 0;
	lane->not_before = 0;
}

void
es_lane_advance(EsLane *lane, EsPosition position)
{
	lane->position = Max(lane->position, position);
	if (lane->failed <= lane->position)
	{
		lane->failed = 0;
		lane->attempts = 0;
	}
}

/* ---------------------------------------------------------------------------
 * Reading
 * ------------------------------------------------------------------------- */

EsLanes *
es_lanes_open(const text *subscription, LOCKMODE mode)
{
	EsLanes *lanes = palloc0(sizeof(EsLanes));

	lanes->subscription = subscription;
	lanes->rel = table_open(es_extension_relation("subscription_lane"), mode);
	lanes->mode = mode;
	lanes->index = es_primary_key(lanes->rel);
	lanes->slot = table_slot_create(lanes->rel, NULL);
	lanes->context = AllocSetContextCreate(CurrentMemoryContext, "eventstore lanes",
										   ALLOCSET_SMALL_SIZES);
	return lanes;
}

void
es_lanes_close(EsLanes *lanes, bool unlock)
{
	if (lanes->snapshot != NULL)
		UnregisterSnapshot(lanes->snapshot);
	ExecDropSingleTupleTableSlot(lanes->slot);
	table_close(lanes->rel, unlock ? lanes->mode : NoLock);
	MemoryContextDelete(lanes->context);
	pfree(lanes);
}

static int64
int_or_zero(TupleTableSlot *slot, AttrNumber column)
{
	return slot->tts_isnull[column - 1] ? 0 : DatumGetInt64(slot->tts_values[column - 1]);
}

static void
read_lane(EsLanes *lanes, EsLane *lane)
{
	MemoryContext	old = MemoryContextSwitchTo(lanes->context);
	TupleTableSlot *slot = lanes->slot;

	slot_getallattrs(slot);
	memset(lane, 0, sizeof(EsLane));
	lane->tid = slot->tts_tid;
	lane->lane = DatumGetInt32(slot->tts_values[ES_LANE_LANE - 1]);
	lane->position = int_or_zero(slot, ES_LANE_POSITION);
	if (!slot->tts_isnull[ES_LANE_MEMBER - 1])
		lane->member = DatumGetTextPCopy(slot->tts_values[ES_LANE_MEMBER - 1]);
	lane->lease_until = int_or_zero(slot, ES_LANE_LEASE_UNTIL);
	if (!slot->tts_isnull[ES_LANE_LEASE - 1])
		lane->lease = DatumGetIntervalP(
			datumCopy(slot->tts_values[ES_LANE_LEASE - 1], false, sizeof(Interval)));
	lane->handed_out = int_or_zero(slot, ES_LANE_HANDED_OUT);
	lane->failed = int_or_zero(slot, ES_LANE_FAILED);
	lane->attempts = DatumGetInt32(slot->tts_values[ES_LANE_ATTEMPTS - 1]);
	lane->not_before = int_or_zero(slot, ES_LANE_NOT_BEFORE);
	lane->updated_at = int_or_zero(slot, ES_LANE_UPDATED_AT);
	MemoryContextSwitchTo(old);
}

static void
take_snapshot(EsLanes *lanes)
{
	if (lanes->snapshot != NULL)
		UnregisterSnapshot(lanes->snapshot);
	lanes->snapshot = RegisterSnapshot(
		IsolationUsesXactSnapshot() ? GetTransactionSnapshot() : GetLatestSnapshot());
}

int
es_lanes_load(EsLanes *lanes)
{
	Relation	  index = index_open(lanes->index, AccessShareLock);
	IndexScanDesc scan;
	ScanKeyData	  key;
	int			  room = 1;

	take_snapshot(lanes);
	MemoryContextReset(lanes->context);
	lanes->lanes = MemoryContextAlloc(lanes->context, sizeof(EsLane) * room);
	lanes->n = 0;
	ScanKeyInit(&key, ES_LANE_SUBSCRIPTION, BTEqualStrategyNumber, F_TEXTEQ,
				PointerGetDatum(lanes->subscription));
	scan = es_index_beginscan(lanes->rel, index, lanes->snapshot, 1);
	index_rescan(scan, &key, 1, NULL, 0);
	while (index_getnext_slot(scan, ForwardScanDirection, lanes->slot))
	{
		if (lanes->n == room)
		{
			room *= 4;
			lanes->lanes = repalloc(lanes->lanes, sizeof(EsLane) * room);
		}
		read_lane(lanes, &lanes->lanes[lanes->n++]);
	}
	index_endscan(scan);
	index_close(index, AccessShareLock);
	ExecClearTuple(lanes->slot);
	return lanes->n;
}

EsLane *
es_lanes_get(EsLanes *lanes, int lane)
{
	Assert(lane >= 0 && lane < lanes->n);
	return &lanes->lanes[lane];
}

EsLane *
es_lanes_of_member(EsLanes *lanes, const text *member, TimestampTz now)
{
	for (int i = 0; i < lanes->n; i++)
	{
		EsLane *lane = &lanes->lanes[i];

		if (es_lane_state(lane, now) == ES_LANE_LEASED &&
			es_text_equal(lane->member, member))
			return lane;
	}
	return NULL;
}

/* ---------------------------------------------------------------------------
 * Locking
 * ------------------------------------------------------------------------- */

/* Whoever reads events calls the functions of policies. */
static void
report_unexpected(TM_Result result)
{
	if (result == TM_SelfModified || result == TM_Invisible)
		ereport(
			ERROR,
			(errcode(ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION),
			 errmsg("the lane was changed by a function that this command has called"),
			 errhint("A function that row-level security calls must not move "
					 "subscriptions.")));
	elog(ERROR, "unexpected result %d of locking a lane", (int) result);
}

EsLaneLock
es_lane_try_lock(EsLanes *lanes, EsLane *lane)
{
	TM_FailureData failure;
	TM_Result	   result;

	/* What es_lane_save writes changes no key. */
	result = table_tuple_lock(lanes->rel, &lane->tid, lanes->snapshot, lanes->slot,
							  GetCurrentCommandId(false), LockTupleNoKeyExclusive,
							  LockWaitSkip, 0, &failure);
	ExecClearTuple(lanes->slot);
	switch (result)
	{
		case TM_Ok:
			return ES_LANE_LOCKED;
		case TM_WouldBlock:
			return ES_LANE_HELD;
		case TM_Updated:
		case TM_Deleted:
			return ES_LANE_CHANGED;
		default:
			report_unexpected(result);
	}
	return ES_LANE_HELD; /* keep the compiler quiet */
}

static void
report_serialization_failure(void)
{
	ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
					errmsg("could not serialize access due to concurrent update")));
}

bool
es_lane_lock(EsLanes *lanes, EsLane *lane)
{
	bool			newest = !IsolationUsesXactSnapshot();
	ItemPointerData tid = lane->tid;
	TM_FailureData	failure;
	TM_Result		result;

	result = table_tuple_lock(lanes->rel, &tid, lanes->snapshot, lanes->slot,
							  GetCurrentCommandId(false), LockTupleNoKeyExclusive,
							  LockWaitBlock,
							  newest ? TUPLE_LOCK_FLAG_FIND_LAST_VERSION : 0, &failure);
	switch (result)
	{
		case TM_Ok:
			read_lane(lanes, lane);
			break;
		case TM_Updated:
		case TM_Deleted:
			if (!newest)
				report_serialization_failure();
			break;
		default:
			report_unexpected(result);
	}
	ExecClearTuple(lanes->slot);
	return result == TM_Ok;
}

/* ---------------------------------------------------------------------------
 * Writing
 * ------------------------------------------------------------------------- */

static void
set_or_null(TupleTableSlot *slot, AttrNumber column, Datum value, bool isnull)
{
	slot->tts_values[column - 1] = value;
	slot->tts_isnull[column - 1] = isnull;
}

static void
fill_slot(EsLanes *lanes, const EsLane *lane, TupleTableSlot *slot)
{
	ExecClearTuple(slot);
	memset(slot->tts_isnull, true, sizeof(bool) * slot->tts_tupleDescriptor->natts);
	set_or_null(slot, ES_LANE_SUBSCRIPTION, PointerGetDatum(lanes->subscription), false);
	set_or_null(slot, ES_LANE_LANE, Int32GetDatum(lane->lane), false);
	set_or_null(slot, ES_LANE_POSITION, Int64GetDatum(lane->position), false);
	set_or_null(slot, ES_LANE_MEMBER, PointerGetDatum(lane->member),
				lane->member == NULL);
	set_or_null(slot, ES_LANE_LEASE_UNTIL, TimestampTzGetDatum(lane->lease_until),
				lane->member == NULL);
	set_or_null(slot, ES_LANE_LEASE, IntervalPGetDatum(lane->lease), lane->lease == NULL);
	set_or_null(slot, ES_LANE_HANDED_OUT, Int64GetDatum(lane->handed_out),
				lane->handed_out == 0);
	set_or_null(slot, ES_LANE_FAILED, Int64GetDatum(lane->failed), lane->failed == 0);
	set_or_null(slot, ES_LANE_ATTEMPTS, Int32GetDatum(lane->attempts), false);
	set_or_null(slot, ES_LANE_NOT_BEFORE, TimestampTzGetDatum(lane->not_before),
				lane->not_before == 0);
	set_or_null(slot, ES_LANE_UPDATED_AT, TimestampTzGetDatum(lane->updated_at), false);
	ExecStoreVirtualTuple(slot);
}

/* Where the page was full: the new version needs entries in the index. */
static void
insert_index_entries(EsLanes *lanes, TupleTableSlot *slot)
{
	EState		  *estate = CreateExecutorState();
	ResultRelInfo *rri = makeNode(ResultRelInfo);

	InitResultRelInfo(rri, lanes->rel, 0, NULL, 0);
	ExecOpenIndices(rri, false);
	list_free(es_insert_index_tuples(rri, slot, estate, NULL, NIL));
	ExecCloseIndices(rri);
	FreeExecutorState(estate);
}

void
es_lane_save(EsLanes *lanes, EsLane *lane)
{
	TupleTableSlot *slot = table_slot_create(lanes->rel, NULL);

	lane->updated_at = GetCurrentTimestamp();
	fill_slot(lanes, lane, slot);
	slot->tts_tableOid = RelationGetRelid(lanes->rel);
	if (es_update_tuple(lanes->rel, &lane->tid, slot))
		insert_index_entries(lanes, slot);
	lane->tid = slot->tts_tid;
	ExecDropSingleTupleTableSlot(slot);
	CommandCounterIncrement();
}
