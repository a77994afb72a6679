/*
 * feed/settle.c
 *		What comes back from the members of a subscription: ack, nack, leave.
 *
 * Each finds the lane that the member has a lease of, waits for its row lock
 * (another session of the same member, or a seek, may be at it) and looks at
 * the clock again once it has it.  A lease that has run out by then is nobody's
 * any more, whether another member has taken the lane or not: 55000.  So the
 * member that comes back too late neither moves the cursor of his successor nor
 * ends that one's lease.
 *
 *	ack		moves the cursor; the lease is renewed by its own length, or ends
 *			with the last event that was handed out
 *	nack	moves the cursor to before the event that failed, counts an attempt
 *			for it, and ends the lease; the lane sleeps for the delay
 *	leave	ends the lease; nothing is counted
 *
 * All are ordinary changes of one row: they hold from the caller's commit on.
 */
#include "postgres.h"

#include "collection/event.h"
#include "errors.h"
#include "feed/read.h"
#include "feed/subscription.h"
#include "miscadmin.h"
#include "shmem.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(es_ack);
PG_FUNCTION_INFO_V1(es_nack);
PG_FUNCTION_INFO_V1(es_leave);

/* A call: the subscription, and the lane of the member, locked. */
typedef struct Settling
{
	EsSubscription *sub;
	text		   *member;
	EsLanes		   *lanes;
	EsLane		   *lane; /* NULL: the member has no live lease */
} Settling;

/* name is argument 0 of all three. */
static void
begin_settling(FunctionCallInfo fcinfo, const NullableDatum *member, Settling *call)
{
	es_refuse_null(&fcinfo->args[0], "name");
	call->member = es_name_arg(member, "member");
	call->sub = es_subscription_open(DatumGetTextPP(fcinfo->args[0].value));
	call->lanes = es_lanes_open(call->sub->name, RowExclusiveLock);
	es_lanes_load(call->lanes);
	call->lane = es_lanes_of_member(call->lanes, call->member, GetCurrentTimestamp());
	if (call->lane != NULL)
		es_subscription_touch(call->sub->name);
	if (call->lane != NULL &&
		(!es_lane_lock(call->lanes, call->lane) ||
		 es_lane_state(call->lane, GetCurrentTimestamp()) != ES_LANE_LEASED ||
		 !es_text_equal(call->lane->member, call->member)))
		call->lane = NULL;
}

static void
end_settling(Settling *call)
{
	if (call->lane != NULL)
		es_lane_save(call->lanes, call->lane);
	es_lanes_close(call->lanes, false);
}

static void
require_lease(const Settling *call)
{
	if (call->lane == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("member \"%s\" has no lease of subscription \"%s\"",
						text_to_cstring(call->member), text_to_cstring(call->sub->name)),
				 errdetail("It has run out, was given back, or its lane was moved by "
						   "eventstore.seek()."),
				 errhint("What was handed out and not acknowledged comes again: poll.")));
}

/* 22023 for a position that is not among what the live lease is about. */
static void
report_not_handed_out(const Settling *call, const char *name, EsPosition position)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("position " INT64_FORMAT " was not handed out to member \"%s\"",
					position, text_to_cstring(call->member)),
			 errdetail("\"%s\" is " INT64_FORMAT ", the cursor " INT64_FORMAT
					   ", the last event handed out " INT64_FORMAT ".",
					   name, position, call->lane->position, call->lane->handed_out)));
}

static EsPosition
position_arg(const NullableDatum *value, const char *name)
{
	es_refuse_null(value, name);
	return es_read_position_arg(value, name, 0);
}

/* ack(name, up_to, member) */
Datum
es_ack(PG_FUNCTION_ARGS)
{
	Settling   call;
	EsPosition up_to = position_arg(&fcinfo->args[1], "up_to");

	es_require_preloaded();
	PreventCommandIfReadOnly("ack");
	begin_settling(fcinfo, &fcinfo->args[2], &call);
	require_lease(&call);
	if (up_to > call.lane->handed_out)
		report_not_handed_out(&call, "up_to", up_to);

	es_lane_advance(call.lane, up_to);
	if (up_to == call.lane->handed_out)
		es_lane_free(call.lane);
	else
		call.lane->lease_until = es_time_from_now(call.lane->lease);
	end_settling(&call);
	PG_RETURN_VOID();
}

/* Is the position that of an event which the lane holds and the caller sees? */
static bool
is_event_of_lane(const Settling *call, EsPosition position)
{
	EsReadArgs args = {.collection = call->sub->coll->relid,
					   .direction = ForwardScanDirection,
					   .max_count = 1,
					   .query = call->sub->query,
					   .has_after = true,
					   .after = position - 1,
					   .before = position + 1,
					   .lanes = call->sub->lanes,
					   .lane = call->lane->lane};
	EsRead	  *read = es_read_begin(&args);
	bool	   found = es_read_next(read) != NULL;

	es_read_end(read);
	return found;
}

/* nack(name, first, member, delay) */
Datum
es_nack(PG_FUNCTION_ARGS)
{
	Settling	call;
	EsPosition	first = position_arg(&fcinfo->args[1], "first");
	Interval   *delay = es_interval_arg(&fcinfo->args[3], "delay", false);
	TimestampTz not_before = delay == NULL ? 0 : es_time_from_now(delay);

	es_require_preloaded();
	PreventCommandIfReadOnly("nack");
	begin_settling(fcinfo, &fcinfo->args[2], &call);
	require_lease(&call);
	if (first <= call.lane->position || first > call.lane->handed_out ||
		!is_event_of_lane(&call, first))
		report_not_handed_out(&call, "first", first);

	es_lane_free(call.lane);
	es_lane_advance(call.lane, first - 1);
	/* An event that is given up holds nobody up. */
	if (!es_subscription_count_attempt(call.sub, call.lane, first, "nack"))
		call.lane->not_before = not_before;
	end_settling(&call);
	PG_RETURN_VOID();
}

/* leave(name, member) */
Datum
es_leave(PG_FUNCTION_ARGS)
{
	Settling call;

	es_require_preloaded();
	PreventCommandIfReadOnly("leave");
	begin_settling(fcinfo, &fcinfo->args[1], &call);
	if (call.lane != NULL)
		es_lane_free(call.lane);
	end_settling(&call);
	PG_RETURN_VOID();
}
