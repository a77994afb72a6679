/*
 * feed/poll.c
 *		Handing out the events of a subscription.
 *
 * One look, of which a call that waits makes several:
 *
 *	1.	Load the lanes (lane.c), as of now.  Those that are nobody's are the
 *		candidates; whether an open transaction has one locked shows in step 3.
 *	2.	Take the view: head, then snapshot (es_view_open).
 *	3.	Walk the events that match, from the lowest cursor of a candidate on, to
 *		the first that belongs to a candidate and lies above its cursor.  Lock
 *		that lane if this can be had at once and it is still as loaded, else it
 *		is no candidate any more and the walk goes on.
 *	4.	Read the lane's events and hand them out: without a lease the cursor
 *		moves behind them, with one the lane gets member, time and the last
 *		position handed out.
 *
 * Why nothing is skipped: the cursor that we start from was committed before
 * the head was taken in step 2, and is still the lane's when we have the lock,
 * or we do not take it.  Whoever moved it last saw all that lies at or below
 * it.  So the order is cursor, head, snapshot, rows, and a lock taken before the
 * head would add nothing.  What lies below the head is final, so a cursor may
 * also move past what does not match, up to the head.
 *
 * Why the lane of the oldest event: no lane is left behind, whichever are quiet
 * or busy, and however many consumers there are.
 *
 * Why look first, lock then: a lane without work stays free, for the length of
 * a transaction that may be long; and while a call waits it holds no lock.
 * The walk steps over events of lanes that are busy or done with again and
 * again, so a quiet lane's cursor is pulled along when it is PULL_DISTANCE
 * behind the event that was found; and all of them when there is no work.  That
 * is also what the lag and retention go by.
 *
 * A member has one lane at a time: one session polls for it at a time (a lock
 * on the member's name, to the end of the transaction, not waited for), and it
 * gets the lane that it has.
 *
 * With wait, a call that found nothing sleeps and looks again (await_work).  It
 * enters the wait first and looks then, and whoever locks a lane touches the
 * subscription's topic, which wakes the others when his transaction has ended,
 * so no lane gets free unnoticed; leases and delays end by the clock, and the
 * sleep is no longer than the first of them.  What a look has learnt of a quiet
 * lane (Prospect) it need not walk over again.
 *
 * The end of a lease by the clock is nobody's act, so it is whoever takes the
 * lane next that counts the attempt, for the first event after the cursor.
 *
 * Locks: AccessShareLock on the collection; the member's name; rows of lanes,
 * none of which is waited for.  All end with the transaction.  A crash ends
 * the transaction, and leaves leases to run out.
 */
#include "postgres.h"

#include "access/xact.h"
#include "common/hashfn.h"
#include "errors.h"
#include "feed/read.h"
#include "feed/subscription.h"
#include "feed/wait.h"
#include "fmgr.h"
#include "funcapi.h"
#include "guc.h"
#include "miscadmin.h"
#include "shmem.h"
#include "storage/lock.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* How far a quiet lane may stay behind, in positions: a fraction of a millisecond to walk over. */
#define PULL_DISTANCE 1000

/* Advisory locks of SQL have 1 and 2 in field 4. */
#define MEMBER_LOCK 0xE5

/* Nobody is woken when another session of the same member has polled in vain. */
#define MEMBER_RETRY_MS 100

/* How often, at most, a poll without work notes that there was one. */
#define SIGN_OF_LIFE_MS (60 * 1000)

PG_FUNCTION_INFO_V1(es_poll);

/* What is known of a lane in this call. */
typedef struct Prospect
{
	bool candidate; /* of this look */
	/* No event of the lane is in (from, to]: a fact about the log, which stays. */
	EsPosition from;
	EsPosition to;
} Prospect;

typedef struct Poll
{
	text		   *name;
	EsSubscription *sub;
	int64			max_count;
	TimestampTz		wait_until; /* 0: not at all */
	text		   *member;		/* NULL: none given */
	Interval	   *lease;		/* NULL: without a lease */
	ReturnSetInfo  *result;

	EsLanes		 *lanes;
	int			  nlanes;	 /* loaded: 0 when it was unsubscribed meanwhile */
	Prospect	 *prospects; /* of each lane */
	EsView		  view;		 /* of this look */
	TimestampTz	  next_free; /* when the first lane becomes free by the clock */
	MemoryContext cycle;	 /* of what is opened anew after each sleep */
	bool		  changed;	 /* a lane had changed when we went for it */
} Poll;

typedef enum Look
{
	LOOK_NOTHING, /* no lane that can be had has work; no lock is held */
	LOOK_AGAIN,	  /* somebody was faster */
	LOOK_DONE
} Look;

/* ---------------------------------------------------------------------------
 * Arguments
 * ------------------------------------------------------------------------- */

/* poll(name, max_count, wait, member, lease) */
static void
make_args(FunctionCallInfo fcinfo, Poll *poll)
{
	NullableDatum *values = fcinfo->args;

	es_refuse_null(&values[0], "name");
	poll->max_count = es_read_max_count_arg(&values[1]);
	poll->wait_until = es_wait_arg(&values[2]);
	if (!values[3].isnull)
		poll->member = es_name_arg(&values[3], "member");
	poll->lease = es_interval_arg(&values[4], "lease", true);
	if (poll->lease != NULL && poll->member == NULL)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("a lease needs a member"),
						errdetail("\"lease\" is given, \"member\" is null."),
						errhint("The member is whoever is to acknowledge the events.")));
	poll->name = DatumGetTextPP(values[0].value);
	poll->sub = es_subscription_open(poll->name);
	poll->prospects = palloc0(sizeof(Prospect) * poll->sub->lanes);
}

/* ---------------------------------------------------------------------------
 * Lanes that may be had
 * ------------------------------------------------------------------------- */

static void
set_member_tag(const Poll *poll, LOCKTAG *tag)
{
	const text *name = poll->sub->name;
	uint64		key;

	key = hash_bytes_extended((const unsigned char *) VARDATA_ANY(name),
							  VARSIZE_ANY_EXHDR(name), MEMBER_LOCK);
	key = hash_bytes_extended((const unsigned char *) VARDATA_ANY(poll->member),
							  VARSIZE_ANY_EXHDR(poll->member), key);
	SET_LOCKTAG_ADVISORY(*tag, MyDatabaseId, (uint32) (key >> 32), (uint32) key,
						 MEMBER_LOCK);
}

/* Before the lanes are loaded, so that what the last session took is seen. */
static bool
lock_member(const Poll *poll)
{
	LOCKTAG tag;

	if (poll->member == NULL)
		return true;
	set_member_tag(poll, &tag);
	return LockAcquire(&tag, ExclusiveLock, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

/* Nothing was taken: a session that waits, or idles, keeps no other from polling. */
static void
unlock_member(const Poll *poll)
{
	LOCKTAG tag;

	if (poll->member == NULL)
		return;
	set_member_tag(poll, &tag);
	LockRelease(&tag, ExclusiveLock, false);
}

/* Where to look for the first event of a lane. */
static EsPosition
first_unknown(const Poll *poll, int i)
{
	EsPosition		cursor = es_lanes_get(poll->lanes, i)->position;
	const Prospect *prospect = &poll->prospects[i];

	if (cursor >= prospect->from && cursor < prospect->to)
		return prospect->to;
	return cursor;
}

/* Chooses the candidates; the others' next chance is in next_free. */
static int
find_candidates(Poll *poll, TimestampTz now)
{
	int n = 0;

	poll->next_free = DT_NOEND;
	for (int i = 0; i < poll->nlanes; i++)
	{
		const EsLane *lane = es_lanes_get(poll->lanes, i);
		EsLaneState	  state = es_lane_state(lane, now);

		poll->prospects[i].candidate = state == ES_LANE_FREE || state == ES_LANE_EXPIRED;
		if (poll->prospects[i].candidate)
			n++;
		else
			poll->next_free =
				Min(poll->next_free,
					state == ES_LANE_LEASED ? lane->lease_until : lane->not_before);
	}
	return n;
}

static EsLaneLock
try_lock(Poll *poll, EsLane *lane)
{
	EsLaneLock lock = es_lane_try_lock(poll->lanes, lane);

	if (lock == ES_LANE_LOCKED)
		es_subscription_touch(poll->sub->name);
	return lock;
}

static void
note_lost(Poll *poll, int i, EsLaneLock lock)
{
	poll->prospects[i].candidate = false;
	if (lock == ES_LANE_CHANGED)
		poll->changed = true;
}

/* ---------------------------------------------------------------------------
 * Reading
 * ------------------------------------------------------------------------- */

static EsRead *
begin_read(const Poll *poll, EsPosition after, int64 max_count, int lane)
{
	EsReadArgs args = {.collection = poll->sub->coll->relid,
					   .direction = ForwardScanDirection,
					   .max_count = max_count,
					   .query = poll->sub->query,
					   .after = after,
					   .before = ES_READ_END};

	if (lane >= 0)
	{
		args.lanes = poll->sub->lanes;
		args.lane = lane;
	}
	return es_read_begin_in(&args, &poll->view);
}

/*
 * Step 3: the lane, locked, of the oldest event that is to be had, or NULL.
 * Where it is NULL the candidates that are left have nothing up to the head.
 */
static EsLane *
find_work(Poll *poll, int ncandidates, EsPosition *found)
{
	EsPosition		after = PG_INT64_MAX;
	EsLane		   *taken = NULL;
	TupleTableSlot *slot;
	EsRead		   *read;

	for (int i = 0; i < poll->nlanes; i++)
		if (poll->prospects[i].candidate)
			after = Min(after, first_unknown(poll, i));
	read = begin_read(poll, after, ES_READ_ALL, -1);
	while (taken == NULL && ncandidates > 0 && (slot = es_read_next(read)) != NULL)
	{
		int		   i = es_lane_of_event(slot, poll->sub->lanes);
		EsLane	  *lane = es_lanes_get(poll->lanes, i);
		EsLaneLock lock;
		bool	   isnull;

		*found = DatumGetInt64(slot_getattr(slot, ES_ATT_POSITION, &isnull));
		if (!poll->prospects[i].candidate || *found <= lane->position)
			continue;
		lock = try_lock(poll, lane);
		if (lock == ES_LANE_LOCKED)
			taken = lane;
		else
		{
			note_lost(poll, i, lock);
			ncandidates--;
		}
	}
	es_read_end(read);
	return taken;
}

/* ---------------------------------------------------------------------------
 * Handing out
 * ------------------------------------------------------------------------- */

/* Puts the lane's events into the result; the position of the last, 0 for none. */
static EsPosition
put_events(Poll *poll, const EsLane *lane, EsPosition after, int64 *count)
{
	EsRead		   *read = begin_read(poll, after, poll->max_count, lane->lane);
	EsPosition		last = 0;
	TupleTableSlot *slot;

	*count = 0;
	while ((slot = es_read_next(read)) != NULL)
	{
		slot_getsomeattrs(slot, ES_EVENT_NATTS);
		tuplestore_putvalues(poll->result->setResult, poll->result->setDesc,
							 slot->tts_values, slot->tts_isnull);
		last = DatumGetInt64(slot->tts_values[ES_ATT_POSITION - 1]);
		(*count)++;
	}
	es_read_end(read);
	return last;
}

/*
 * Step 4, with the lane locked and its first event after 'after'.  What it is
 * taken from may be the member's own lease, which goes on or ends here.
 */
static void
hand_out(Poll *poll, EsLane *lane, EsPosition after)
{
	int64	   count;
	EsPosition last = put_events(poll, lane, after, &count);

	if (poll->lease != NULL && count > 0)
	{
		lane->member = poll->member;
		lane->lease = poll->lease;
		lane->lease_until = es_time_from_now(poll->lease);
		lane->handed_out = last;
		lane->not_before = 0;
	}
	else
	{
		es_lane_free(lane);
		es_lane_advance(lane, count < poll->max_count ? poll->view.head : last);
	}
	es_lane_save(poll->lanes, lane);
}

/*
 * Quiet lanes that are far behind the event that was found are pulled along, if
 * nobody has them.  They stay locked to the end of the transaction, which is
 * why this does not happen at every step.
 */
static void
pull_quiet_lanes(Poll *poll, const EsLane *taken, EsPosition found)
{
	for (int i = 0; i < poll->nlanes; i++)
	{
		EsLane *lane = es_lanes_get(poll->lanes, i);

		if (!poll->prospects[i].candidate || lane == taken || lane->member != NULL ||
			lane->position + PULL_DISTANCE >= found ||
			try_lock(poll, lane) != ES_LANE_LOCKED)
			continue;
		es_lane_advance(lane, found - 1);
		es_lane_save(poll->lanes, lane);
	}
}

static void
take(Poll *poll, EsLane *lane, EsPosition found)
{
	EsPosition after = found - 1;

	if (lane->member != NULL)
	{
		/* It was another's, until its lease ran out. */
		if (es_subscription_count_attempt(poll->sub, lane, found, "lease expired"))
			after = found;
		es_lane_free(lane);
	}
	hand_out(poll, lane, after);
	pull_quiet_lanes(poll, lane, found);
}

/* ---------------------------------------------------------------------------
 * Looking
 * ------------------------------------------------------------------------- */

/* The member's own lane: from its cursor on, once more. */
static Look
take_own(Poll *poll, EsLane *lane)
{
	EsLaneLock lock;

	es_subscription_check_cursor(poll->sub, lane->position);
	lock = try_lock(poll, lane);
	if (lock == ES_LANE_CHANGED)
		return LOOK_AGAIN;
	if (lock == ES_LANE_HELD)
		return LOOK_NOTHING; /* by another session of the same member */
	hand_out(poll, lane, lane->position);
	return LOOK_DONE;
}

static Look
take_any(Poll *poll, int ncandidates)
{
	EsPosition found;
	EsLane	  *lane;

	for (int i = 0; i < poll->nlanes; i++)
		if (poll->prospects[i].candidate)
			es_subscription_check_cursor(poll->sub,
										 es_lanes_get(poll->lanes, i)->position);
	lane = find_work(poll, ncandidates, &found);
	if (lane != NULL)
	{
		take(poll, lane, found);
		return LOOK_DONE;
	}

	for (int i = 0; i < poll->nlanes; i++)
		if (poll->prospects[i].candidate)
		{
			poll->prospects[i].from = es_lanes_get(poll->lanes, i)->position;
			poll->prospects[i].to = poll->view.head;
		}
	return poll->changed ? LOOK_AGAIN : LOOK_NOTHING;
}

/* Steps 2 to 4. */
static Look
take_lane(Poll *poll)
{
	TimestampTz now = GetCurrentTimestamp();
	int			ncandidates = find_candidates(poll, now);
	EsLane	   *own = NULL;
	Look		outcome = LOOK_NOTHING;

	if (poll->member != NULL)
		own = es_lanes_of_member(poll->lanes, poll->member, now);
	es_view_open(poll->sub->coll, &poll->view);
	if (own != NULL)
		outcome = take_own(poll, own);
	else if (ncandidates > 0)
		outcome = take_any(poll, ncandidates);
	es_view_close(&poll->view);
	return outcome;
}

static Look
look(Poll *poll)
{
	Look outcome;

	poll->changed = false;
	if (!lock_member(poll))
	{
		/* What is new up to here is that session's affair. */
		es_view_open(poll->sub->coll, &poll->view);
		es_view_close(&poll->view);
		poll->next_free =
			TimestampTzPlusMilliseconds(GetCurrentTimestamp(), MEMBER_RETRY_MS);
		return LOOK_NOTHING;
	}
	poll->nlanes = es_lanes_load(poll->lanes);
	if (poll->nlanes != poll->sub->lanes)
	{
		/* Unsubscribed meanwhile, which is an error unless it was made anew. */
		(void) es_subscription_open(poll->name);
		return LOOK_DONE;
	}
	outcome = take_lane(poll);
	if (outcome != LOOK_DONE)
		unlock_member(poll);
	return outcome;
}

/*
 * Above READ COMMITTED somebody who was faster is so for the whole transaction.
 */
static void
check_serializable(const Poll *poll)
{
	if (IsolationUsesXactSnapshot())
		ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
						errmsg("could not serialize access due to concurrent update"),
						errdetail("Another transaction has polled subscription \"%s\" "
								  "since this one's snapshot.",
								  text_to_cstring(poll->sub->name))));
}

/*
 * When a call ends without an event: the free lanes' cursors go to the head,
 * past what does not match.  Written only where something changes, or where
 * retention wants to know that there is still a consumer.
 */
static void
pass_what_does_not_match(Poll *poll)
{
	int			hold_ms = es_subscription_hold_ms;
	TimestampTz now = GetCurrentTimestamp();

	for (int i = 0; i < poll->nlanes; i++)
	{
		EsLane *lane = es_lanes_get(poll->lanes, i);
		bool	moves = poll->prospects[i].to > lane->position;
		bool	silent = i == 0 && hold_ms > 0 &&
					  TimestampDifferenceExceeds(lane->updated_at, now,
												 Min(SIGN_OF_LIFE_MS, hold_ms / 2));

		if (!poll->prospects[i].candidate || lane->member != NULL || !(moves || silent) ||
			try_lock(poll, lane) != ES_LANE_LOCKED)
			continue;
		es_lane_advance(lane, first_unknown(poll, i));
		es_lane_save(poll->lanes, lane);
	}
}

/* Until nobody is faster. */
static Look
look_until_settled(Poll *poll)
{
	Look outcome;

	while ((outcome = look(poll)) == LOOK_AGAIN)
	{
		CHECK_FOR_INTERRUPTS();
		check_serializable(poll);
	}
	return outcome;
}

/* ---------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------- */

/* Gives back all that a look in vain has left. */
static void
rest(Poll *poll)
{
	es_lanes_close(poll->lanes, true);
	es_wait_unlock(poll->sub->coll);
}

/* False where the subscription is not the one that was waited for any more. */
static bool
resume(Poll *poll, const EsSubscription *before)
{
	MemoryContext caller;

	MemoryContextReset(poll->cycle);
	caller = MemoryContextSwitchTo(poll->cycle);
	poll->sub = es_subscription_open(poll->name);
	poll->lanes = es_lanes_open(poll->sub->name, RowExclusiveLock);
	MemoryContextSwitchTo(caller);
	return poll->sub->created_at == before->created_at;
}

/*
 * A look has found nothing: sleeps until an event comes, a lane becomes free (its
 * subscription is touched, or the clock says so), or the time is over.
 */
static Look
await_work(Poll *poll)
{
	const EsSubscription *before = poll->sub;
	EsWaitFor			  what = {.looked = poll->view.head,
								  .query = before->query,
								  .topic = es_subscription_topic(poll->name)};
	Look				  outcome;

	es_wait_begin(before->coll, &what);
	for (;;)
	{
		outcome = look_until_settled(poll);
		if (outcome == LOOK_DONE || GetCurrentTimestamp() >= poll->wait_until)
			break;
		rest(poll);
		(void) es_wait_sleep(before->coll, poll->view.head,
							 Min(poll->wait_until, poll->next_free));
		if (!resume(poll, before))
		{
			outcome = LOOK_DONE;
			break;
		}
	}
	es_wait_end(outcome == LOOK_DONE);
	return outcome;
}

/* ---------------------------------------------------------------------------
 * The function
 * ------------------------------------------------------------------------- */

Datum
es_poll(PG_FUNCTION_ARGS)
{
	Poll poll = {0};
	Look outcome;

	es_require_preloaded();
	PreventCommandIfReadOnly("poll");
	InitMaterializedSRF(fcinfo, 0);
	poll.result = (ReturnSetInfo *) fcinfo->resultinfo;
	make_args(fcinfo, &poll);
	if (poll.max_count == 0)
		return (Datum) 0;
	poll.cycle = AllocSetContextCreate(CurrentMemoryContext, "eventstore poll",
									   ALLOCSET_SMALL_SIZES);
	poll.lanes = es_lanes_open(poll.sub->name, RowExclusiveLock);
	outcome = look_until_settled(&poll);
	if (outcome == LOOK_NOTHING && poll.wait_until != 0)
		outcome = await_work(&poll);
	if (outcome == LOOK_NOTHING)
		pass_what_does_not_match(&poll);
	es_lanes_close(poll.lanes, false);
	return (Datum) 0;
}
