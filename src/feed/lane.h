/*
 * feed/lane.h
 *		Lanes: the durable cursors of a subscription.
 */
#ifndef ES_LANE_H
#define ES_LANE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "executor/tuptable.h"
#include "position/position.h"
#include "storage/itemptr.h"
#include "storage/lock.h"
#include "utils/timestamp.h"

/* Attribute numbers of eventstore.subscription_lane (subscription.sql). */
#define ES_LANE_SUBSCRIPTION 1	/* text, primary key with lane */
#define ES_LANE_LANE		 2	/* integer, from 0 */
#define ES_LANE_POSITION	 3	/* bigint, the cursor */
#define ES_LANE_MEMBER		 4	/* text or null */
#define ES_LANE_LEASE_UNTIL	 5	/* timestamptz or null */
#define ES_LANE_LEASE		 6	/* interval or null */
#define ES_LANE_HANDED_OUT	 7	/* bigint or null */
#define ES_LANE_FAILED		 8	/* bigint or null */
#define ES_LANE_ATTEMPTS	 9	/* integer */
#define ES_LANE_NOT_BEFORE	 10 /* timestamptz or null */
#define ES_LANE_UPDATED_AT	 11 /* timestamptz */
#define ES_LANE_NATTS		 11

/* Whose a lane is at a moment.  Locks of open transactions are another matter. */
typedef enum EsLaneState
{
	ES_LANE_FREE,
	ES_LANE_LEASED,	 /* to 'member', until 'lease_until' */
	ES_LANE_EXPIRED, /* was: whoever takes it counts an attempt */
	ES_LANE_ASLEEP	 /* given back with a delay, until 'not_before' */
} EsLaneState;

/* A row, in memory of the EsLanes that it is from. */
typedef struct EsLane
{
	ItemPointerData tid;
	int				lane;
	EsPosition		position;	 /* all events of the lane up to here are done with */
	text		   *member;		 /* who has the lease; NULL: nobody */
	TimestampTz		lease_until; /* 0: no lease */
	Interval	   *lease;		 /* its length, to renew it by; NULL: no lease */
	EsPosition		handed_out;	 /* the last event under the lease; 0: no lease */
	EsPosition		failed;		 /* the first event after the cursor that has failed; 0 */
	int				attempts;	 /* of that event */
	TimestampTz		not_before;	 /* 0: at once */
	TimestampTz		updated_at;
} EsLane;

/* What came of the attempt to lock a lane's row. */
typedef enum EsLaneLock
{
	ES_LANE_LOCKED, /* to the end of the transaction; as it was loaded */
	ES_LANE_HELD,	/* by another open transaction */
	ES_LANE_CHANGED /* it is not what was loaded any more */
} EsLaneLock;

/* The table, opened, and the lanes of one subscription, ascending. */
typedef struct EsLanes EsLanes;

/* 'mode' RowExclusiveLock to write, AccessShareLock to look (also on a standby). */
extern EsLanes *es_lanes_open(const text *subscription, LOCKMODE mode);

/* Loads them as of now; what was loaded before is gone.  Returns how many. */
extern int	   es_lanes_load(EsLanes *lanes);
extern EsLane *es_lanes_get(EsLanes *lanes, int lane);

/* The lane that the member has a live lease of, or NULL. */
extern EsLane *es_lanes_of_member(EsLanes *lanes, const text *member, TimestampTz now);

/* Without waiting, and only if it is as loaded. */
extern EsLaneLock es_lane_try_lock(EsLanes *lanes, EsLane *lane);

/*
 * Waits for whoever has it, and loads what it is then.  False where it is gone.
 * Errors: 40001 where it was changed since this transaction's snapshot.
 */
extern bool es_lane_lock(EsLanes *lanes, EsLane *lane);

/* Writes a locked lane; others see it after the transaction, this one at once. */
extern void es_lane_save(EsLanes *lanes, EsLane *lane);

/* Closes it; 'unlock' also gives the lock of es_lanes_open back, where nothing was written. */
extern void es_lanes_close(EsLanes *lanes, bool unlock);

extern EsLaneState es_lane_state(const EsLane *lane, TimestampTz now);

/* Ends the lease, if there is one: in memory, save it after. */
extern void es_lane_free(EsLane *lane);

/* Moves the cursor, never back: in memory, save it after. */
extern void es_lane_advance(EsLane *lane, EsPosition position);

/* Which lane an event belongs to, of so many. */
extern int es_lane_of_event(TupleTableSlot *slot, int lanes);

#endif /* ES_LANE_H */
