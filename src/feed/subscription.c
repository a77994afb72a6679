/*
 * feed/subscription.c
 *		Subscriptions: their definition, and who may use them.
 *
 * A subscription is a row of eventstore.subscription (which events: collection
 * and query; how they are handed out: lanes, max_attempts) and one row for each
 * lane (where it is: lane.c).  Nothing happens at append time, however many
 * subscriptions a collection has: a poll reads the log from its cursor on.
 *
 * Invariants:
 *	- A name is one subscription.  Whoever's INSERT of the name is first makes
 *	  it and its lanes; another one waits for that transaction in the unique
 *	  index, and then compares.
 *	- Lanes never change in number, so a stream stays in its lane.
 *	- The cursors are from the collection's incarnation that is noted here.
 *	  Dropping the collection drops the subscription (ddl.c); repairing it notes
 *	  the new one where no cursor is ahead of what is left (repair.c).  A poll
 *	  that finds another incarnation fails (LG004), also when the log has grown
 *	  past the cursor since, until somebody seeks.
 *
 * Rights: the events are the collection's, so its SELECT right is needed, and
 * row-level security holds as for read().  The cursor is the subscription's:
 * only who has the rights of the role that made it may move it, or who owns
 * the collection, to which it is an obstacle.
 *
 * Locks: AccessShareLock on the collection, so that it is not dropped or
 * repaired meanwhile; then rows.  The row of eventstore.subscription is not
 * locked by poll: two consumers have no business with each other.
 *
 * A crash leaves whatever was committed.
 */
#include "postgres.h"

#include "feed/subscription.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "collection/inventory.h"
#include "common/hashfn.h"
#include "compat.h"
#include "errors.h"
#include "feed/read.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "position/watch.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(es_subscribe);
PG_FUNCTION_INFO_V1(es_unsubscribe);
PG_FUNCTION_INFO_V1(es_seek);
PG_FUNCTION_INFO_V1(es_subscription_lag);

/* A row of eventstore.subscription. */
typedef struct Definition
{
	Oid			collection;
	int64		incarnation;
	Jsonb	   *query; /* NULL: every event */
	int			lanes;
	int			max_attempts; /* 0: null */
	Oid			owner;
	TimestampTz created_at;
} Definition;

/* ---------------------------------------------------------------------------
 * Arguments
 * ------------------------------------------------------------------------- */

text *
es_name_arg(const NullableDatum *value, const char *name)
{
	text *given;

	es_refuse_null(value, name);
	given = DatumGetTextPP(value->value);
	if (VARSIZE_ANY_EXHDR(given) == 0 || VARSIZE_ANY_EXHDR(given) > ES_NAME_MAX_BYTES)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("\"%s\" must have between 1 and %d bytes", name,
							   ES_NAME_MAX_BYTES),
						errdetail("It has %d.", (int) VARSIZE_ANY_EXHDR(given))));
	return given;
}

/* Times that PostgreSQL can count reach this far, and further, from today. */
static void
check_not_ages(const NullableDatum *value, const char *name)
{
	Interval most = {.month = 10000 * MONTHS_PER_YEAR};

	if (DatumGetInt32(DirectFunctionCall2(interval_cmp, value->value,
										  IntervalPGetDatum(&most))) > 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("\"%s\" must not be longer than 10000 years", name),
						es_errdetail_interval(value->value)));
}

Interval *
es_interval_arg(const NullableDatum *value, const char *name, bool positive)
{
	TimestampTz now = GetCurrentTimestamp();
	Interval	zero = {0};
	int			sign;

	if (value->isnull)
		return NULL;
	sign = DatumGetInt32(
		DirectFunctionCall2(interval_cmp, value->value, IntervalPGetDatum(&zero)));
	if (sign < 0 || (positive && sign == 0))
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg(positive ? "\"%s\" must be longer than nothing"
										: "\"%s\" must not be negative",
							   name),
						es_errdetail_interval(value->value)));
	check_not_ages(value, name);
	/* Months of 30 days are not what the calendar has. */
	if (positive && es_time_from_now(DatumGetIntervalP(value->value)) <= now)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("\"%s\" must end in the future", name),
						es_errdetail_interval(value->value)));
	return DatumGetIntervalP(value->value);
}

/* A count of at least 1; 'absent' for null. */
static int
count_arg(const NullableDatum *value, const char *name, int absent, int most)
{
	int count;

	if (value->isnull)
		return absent;
	count = DatumGetInt32(value->value);
	if (count < 1 || count > most)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("\"%s\" must be between 1 and %d", name, most),
						errdetail("It is %d.", count)));
	return count;
}

TimestampTz
es_time_from_now(Interval *interval)
{
	return DatumGetTimestampTz(DirectFunctionCall2(
		timestamptz_pl_interval, TimestampTzGetDatum(GetCurrentTimestamp()),
		IntervalPGetDatum(interval)));
}

/* ---------------------------------------------------------------------------
 * Opening
 * ------------------------------------------------------------------------- */

static void
read_definition(HeapTuple tuple, TupleDesc desc, Definition *def)
{
	bool  isnull;
	Datum value;

	def->collection =
		DatumGetObjectId(heap_getattr(tuple, ES_SUBSCRIPTION_COLLECTION, desc, &isnull));
	def->incarnation =
		DatumGetInt64(heap_getattr(tuple, ES_SUBSCRIPTION_INCARNATION, desc, &isnull));
	value = heap_getattr(tuple, ES_SUBSCRIPTION_QUERY, desc, &isnull);
	def->query = isnull ? NULL : DatumGetJsonbPCopy(value);
	def->lanes = DatumGetInt32(heap_getattr(tuple, ES_SUBSCRIPTION_LANES, desc, &isnull));
	value = heap_getattr(tuple, ES_SUBSCRIPTION_MAX_ATTEMPTS, desc, &isnull);
	def->max_attempts = isnull ? 0 : DatumGetInt32(value);
	def->owner =
		DatumGetObjectId(heap_getattr(tuple, ES_SUBSCRIPTION_OWNER, desc, &isnull));
	def->created_at = DatumGetTimestampTz(
		heap_getattr(tuple, ES_SUBSCRIPTION_CREATED_AT, desc, &isnull));
}

/* As of now (above READ COMMITTED: of the transaction's snapshot). */
static bool
find_definition(const text *name, Definition *def)
{
	Relation rel = table_open(es_extension_relation("subscription"), AccessShareLock);
	Snapshot snapshot = RegisterSnapshot(
		IsolationUsesXactSnapshot() ? GetTransactionSnapshot() : GetLatestSnapshot());
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, ES_SUBSCRIPTION_NAME, BTEqualStrategyNumber, F_TEXTEQ,
				PointerGetDatum(name));
	scan = systable_beginscan(rel, es_primary_key(rel), true, snapshot, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
		read_definition(tuple, RelationGetDescr(rel), def);
	systable_endscan(scan);
	UnregisterSnapshot(snapshot);
	table_close(rel, AccessShareLock);
	return HeapTupleIsValid(tuple);
}

static void
report_unknown(const text *name)
{
	int shown = Min(VARSIZE_ANY_EXHDR(name), ES_NAME_MAX_BYTES);

	shown = pg_mbcliplen(VARDATA_ANY(name), VARSIZE_ANY_EXHDR(name), shown);
	ereport(ERROR,
			(errcode(ERRCODE_ES_NOT_A_COLLECTION),
			 errmsg("subscription \"%.*s\" does not exist", shown, VARDATA_ANY(name)),
			 errhint("Make it with eventstore.subscribe().")));
}

static void
check_owner(const text *name, const Definition *def)
{
	if (has_privs_of_role(GetUserId(), def->owner) ||
		es_owns_relation(def->collection, GetUserId()))
		return;
	ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					errmsg("must be owner of subscription \"%s\"", text_to_cstring(name)),
					errhint("Its owner is who called eventstore.subscribe(); the owner "
							"of the collection may use it, too.")));
}

/*
 * Finds it, with its collection locked: what it says has to hold once the lock
 * is there, which somebody may have held who repaired or dropped the collection.
 */
static EsCollection *
open_definition(text *name, Definition *def)
{
	EsCollection *coll = NULL;

	for (;;)
	{
		if (VARSIZE_ANY_EXHDR(name) > ES_NAME_MAX_BYTES || !find_definition(name, def))
			report_unknown(name);
		if (coll != NULL && coll->relid == def->collection)
			break;
		check_owner(name, def);
		coll = es_read_open_collection(def->collection);
	}
	check_owner(name, def);
	return coll;
}

EsSubscription *
es_subscription_open(text *name)
{
	EsSubscription *sub = palloc0(sizeof(EsSubscription));
	Definition		def;

	sub->name = name;
	sub->coll = open_definition(name, &def);
	sub->incarnation = def.incarnation;
	if (def.query != NULL)
		sub->query = es_query_from_jsonb(def.query, "query");
	sub->lanes = def.lanes;
	sub->max_attempts = def.max_attempts;
	sub->created_at = def.created_at;
	return sub;
}

void
es_subscription_check_cursor(const EsSubscription *sub, EsPosition cursor)
{
	EsCollection *coll = sub->coll;

	if (cursor < coll->first_position - 1)
		ereport(
			ERROR,
			(errcode(ERRCODE_ES_NOT_RETAINED),
			 errmsg(
				 "events that subscription \"%s\" has not passed are no longer retained",
				 text_to_cstring(sub->name)),
			 errdetail("Requested " INT64_FORMAT ", first kept " INT64_FORMAT ".", cursor,
					   coll->first_position),
			 errhint("Go on with what is left by eventstore.seek() to null.")));
	if (sub->incarnation != coll->head.incarnation ||
		cursor > es_collection_last_allotted(coll))
		ereport(
			ERROR,
			(errcode(ERRCODE_ES_CURSOR_AHEAD),
			 errmsg("subscription \"%s\" is ahead of collection \"%s\"",
					text_to_cstring(sub->name), get_rel_name(coll->relid)),
			 errdetail("Requested " INT64_FORMAT ", last allotted " INT64_FORMAT ".",
					   cursor, es_collection_last_allotted(coll)),
			 errhint(
				 "The collection is not the one, or has no longer the events, that the "
				 "cursor is from. Choose where to go on with eventstore.seek().")));
}

uint64
es_subscription_topic(const text *name)
{
	uint64 topic = hash_bytes_extended((const unsigned char *) VARDATA_ANY(name),
									   VARSIZE_ANY_EXHDR(name), MyDatabaseId);

	return topic != 0 ? topic : 1; /* 0 is no topic */
}

void
es_subscription_touch(const text *name)
{
	es_watch_touch(es_subscription_topic(name));
}

/* ---------------------------------------------------------------------------
 * subscribe
 * ------------------------------------------------------------------------- */

typedef struct SubscribeArgs
{
	text	  *name;
	Oid		   collection;
	Jsonb	  *query; /* NULL: every event */
	bool	   has_after;
	EsPosition after;
	int		   lanes;
	int		   max_attempts; /* 0: without limit */
} SubscribeArgs;

/* subscribe(name, collection, query, after, lanes, max_attempts) */
static void
make_subscribe_args(FunctionCallInfo fcinfo, SubscribeArgs *args)
{
	NullableDatum *values = fcinfo->args;

	args->name = es_name_arg(&values[0], "name");
	args->collection = es_read_collection_arg(&values[1]);
	args->query = NULL;

	/* One that matches everything is none: one way of saying it. */
	if (!values[2].isnull &&
		!es_query_from_jsonb(DatumGetJsonbP(values[2].value), "query")->everything)
		args->query = DatumGetJsonbP(values[2].value);
	args->has_after = !values[3].isnull;
	args->after = es_read_position_arg(&values[3], "after", 0);
	args->lanes = count_arg(&values[4], "lanes", 1, ES_LANES_MAX);
	args->max_attempts = count_arg(&values[5], "max_attempts", 0, INT_MAX);
}

/* Makes it; false where there is one of that name.  In SPI, as the extension's owner. */
static bool
insert_subscription(const SubscribeArgs *args, const EsCollection *coll, Oid owner)
{
	Oid types[] = {TEXTOID, REGCLASSOID, INT8OID, JSONBOID, INT4OID, INT4OID, REGROLEOID};
	Datum	   values[] = {PointerGetDatum(args->name),
						   ObjectIdGetDatum(coll->relid),
						   Int64GetDatum(coll->head.incarnation),
						   PointerGetDatum(args->query),
						   Int32GetDatum(args->lanes),
						   Int32GetDatum(args->max_attempts),
						   ObjectIdGetDatum(owner)};
	char	   nulls[] = {' ', ' ',
						  ' ', args->query == NULL ? 'n' : ' ',
						  ' ', args->max_attempts == 0 ? 'n' : ' ',
						  ' ', '\0'};
	EsPosition cursor = args->has_after ? args->after : coll->first_position - 1;
	Oid		   lane_types[] = {TEXTOID, INT4OID, INT8OID};
	Datum	   lane_values[] = {values[0], values[4], Int64GetDatum(cursor)};

	es_spi_execute("INSERT INTO eventstore.subscription"
				   " (name, collection, incarnation, query, lanes, max_attempts, owner)"
				   " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (name) DO NOTHING",
				   7, types, values, nulls, false, SPI_OK_INSERT);
	if (SPI_processed == 0)
		return false;
	es_spi_execute(
		"INSERT INTO eventstore.subscription_lane (subscription, lane, position)"
		" SELECT $1, i - 1, $3 FROM pg_catalog.generate_series(1, $2) i",
		3, lane_types, lane_values, NULL, false, SPI_OK_INSERT);
	return true;
}

/*
 * Compares the definition with one that is there, or is there no longer (then
 * false).  Others' collections are not told of.
 */
static bool
check_same(const SubscribeArgs *args)
{
	Definition def;
	bool	   same;

	if (!find_definition(args->name, &def))
		return false;
	same = def.collection == args->collection && def.lanes == args->lanes &&
		   (def.query == NULL) == (args->query == NULL) &&
		   (def.query == NULL ||
			compareJsonbContainers(&def.query->root, &args->query->root) == 0);
	if (!same)
		ereport(
			ERROR,
			(errcode(ERRCODE_DUPLICATE_OBJECT),
			 errmsg("subscription \"%s\" already exists", text_to_cstring(args->name)),
			 es_may_see(def.collection)
				 ? errdetail("It is on collection \"%s\", lanes %d, %s.",
							 get_rel_name(def.collection), def.lanes,
							 def.query == NULL ? "without a query" : "with a query")
				 : 0,
			 errhint("The same collection, query and lanes would be accepted. "
					 "eventstore.unsubscribe() drops it.")));
	return true;
}

Datum
es_subscribe(PG_FUNCTION_ARGS)
{
	SubscribeArgs args;
	EsCollection *coll;
	EsRoleSwitch  saved;
	Oid			  owner = GetUserId();
	bool		  done;

	es_require_preloaded();
	PreventCommandIfReadOnly("subscribe");
	make_subscribe_args(fcinfo, &args);
	coll = es_read_open_collection(args.collection);
	if (args.has_after)
		es_collection_check_cursor(coll, args.after);

	do
	{
		es_role_assume(es_extension_owner(), &saved);
		SPI_connect();
		done = insert_subscription(&args, coll, owner);
		SPI_finish();
		es_role_restore(&saved);
		if (!done)
			done = check_same(&args);
	} while (!done);
	PG_RETURN_VOID();
}

/* ---------------------------------------------------------------------------
 * unsubscribe, seek
 * ------------------------------------------------------------------------- */

Datum
es_unsubscribe(PG_FUNCTION_ARGS)
{
	text		*name;
	Definition	 def;
	EsRoleSwitch saved;
	Oid			 types[] = {TEXTOID};
	Datum		 values[1];

	PreventCommandIfReadOnly("unsubscribe");
	es_refuse_null(&fcinfo->args[0], "name");
	name = PG_GETARG_TEXT_PP(0);
	/* The collection may be anything, or gone: that is no reason to keep this. */
	if (VARSIZE_ANY_EXHDR(name) > ES_NAME_MAX_BYTES || !find_definition(name, &def))
		report_unknown(name);
	check_owner(name, &def);

	values[0] = PointerGetDatum(name);
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("DELETE FROM eventstore.subscription WHERE name = $1", 1, types,
				   values, NULL, false, SPI_OK_DELETE);
	es_spi_execute("DELETE FROM eventstore.subscription_lane WHERE subscription = $1", 1,
				   types, values, NULL, false, SPI_OK_DELETE);
	es_spi_execute("DELETE FROM eventstore.dead_letter"
				   " WHERE subscription = $1 AND source = 'subscription'",
				   1, types, values, NULL, false, SPI_OK_DELETE);
	SPI_finish();
	es_role_restore(&saved);
	/* Who waits for it is told that it is gone. */
	if (es_preloaded())
		es_subscription_touch(name);
	PG_RETURN_VOID();
}

/* The cursors are from what the collection is now. */
static void
note_incarnation(const EsSubscription *sub)
{
	Oid			 types[] = {TEXTOID, INT8OID};
	Datum		 values[] = {PointerGetDatum(sub->name),
							 Int64GetDatum(sub->coll->head.incarnation)};
	EsRoleSwitch saved;

	if (sub->incarnation == sub->coll->head.incarnation)
		return;
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("UPDATE eventstore.subscription SET incarnation = $2 WHERE name = $1",
				   2, types, values, NULL, false, SPI_OK_UPDATE);
	SPI_finish();
	es_role_restore(&saved);
}

/* Waits for whoever has a lane; leases and attempts are void. */
static void
move_lanes(const EsSubscription *sub, EsPosition position)
{
	EsLanes *lanes = es_lanes_open(sub->name, RowExclusiveLock);
	int		 n = es_lanes_load(lanes);

	for (int i = 0; i < n; i++)
	{
		EsLane *lane = es_lanes_get(lanes, i);

		if (!es_lane_lock(lanes, lane))
			continue; /* unsubscribed meanwhile */
		es_lane_free(lane);
		lane->position = position;
		lane->failed = 0;
		lane->attempts = 0;
		es_lane_save(lanes, lane);
	}
	es_lanes_close(lanes, false);
}

Datum
es_seek(PG_FUNCTION_ARGS)
{
	bool			has_after = !PG_ARGISNULL(1);
	EsPosition		after;
	EsSubscription *sub;

	es_require_preloaded();
	PreventCommandIfReadOnly("seek");
	es_refuse_null(&fcinfo->args[0], "name");
	after = es_read_position_arg(&fcinfo->args[1], "after", 0);
	sub = es_subscription_open(PG_GETARG_TEXT_PP(0));
	if (has_after)
		es_collection_check_cursor(sub->coll, after);
	else
		after = sub->coll->first_position - 1;
	note_incarnation(sub);
	move_lanes(sub, after);
	es_subscription_touch(sub->name);
	PG_RETURN_VOID();
}

/* ---------------------------------------------------------------------------
 * Attempts
 * ------------------------------------------------------------------------- */

static void
bury(const EsSubscription *sub, const EsLane *lane, EsPosition position,
	 const char *reason)
{
	Oid	  types[] = {TEXTOID, REGCLASSOID, INT8OID, TEXTOID, INT4OID};
	Datum values[] = {PointerGetDatum(sub->name), ObjectIdGetDatum(sub->coll->relid),
					  Int64GetDatum(position), CStringGetTextDatum(reason),
					  Int32GetDatum(lane->attempts)};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("INSERT INTO eventstore.dead_letter"
				   " (subscription, source, collection, position, reason, attempts)"
				   " VALUES ($1, 'subscription', $2, $3, $4, $5)",
				   5, types, values, NULL, false, SPI_OK_INSERT);
	SPI_finish();
	es_role_restore(&saved);
}

bool
es_subscription_count_attempt(const EsSubscription *sub, EsLane *lane,
							  EsPosition position, const char *reason)
{
	if (lane->failed != position)
		lane->attempts = 0;
	lane->failed = position;
	lane->attempts++;
	if (sub->max_attempts == 0 || lane->attempts < sub->max_attempts)
		return false;
	bury(sub, lane, position, reason);
	es_lane_advance(lane, position);
	return true;
}

/* ---------------------------------------------------------------------------
 * The view
 * ------------------------------------------------------------------------- */

/* How old the first event is that no lane has passed; 0 where there is none. */
static double
lag_seconds(const EsSubscription *sub, EsLanes *lanes, const EsView *view)
{
	EsReadArgs		args = {.collection = sub->coll->relid,
							.direction = ForwardScanDirection,
							.max_count = ES_READ_ALL,
							.query = sub->query,
							.before = ES_READ_END,
							.after = PG_INT64_MAX};
	TupleTableSlot *slot;
	EsRead		   *read;
	double			seconds = 0;
	bool			isnull;

	for (int i = 0; i < sub->lanes; i++)
		args.after = Min(args.after, es_lanes_get(lanes, i)->position);
	read = es_read_begin_in(&args, view);
	while ((slot = es_read_next(read)) != NULL)
	{
		int		   lane = es_lane_of_event(slot, sub->lanes);
		EsPosition position = DatumGetInt64(slot_getattr(slot, ES_ATT_POSITION, &isnull));
		TimestampTz created_at;

		if (position <= es_lanes_get(lanes, lane)->position)
			continue;
		created_at = DatumGetTimestampTz(slot_getattr(slot, ES_ATT_CREATED_AT, &isnull));
		/* As a double, since a caller may have given any time, -infinity too. */
		seconds = ((double) GetCurrentTimestamp() - (double) created_at) / USECS_PER_SEC;
		break;
	}
	es_read_end(read);
	return Max(seconds, 0);
}

/*
 * For the view: null where the caller may not read the events, or sees them through
 * policies, which are code that whoever looks at a view did not choose to run.
 */
Datum
es_subscription_lag(PG_FUNCTION_ARGS)
{
	Definition	   def;
	EsSubscription sub = {.name = PG_GETARG_TEXT_PP(0)};
	EsLanes		  *lanes;
	EsView		   view;
	double		   seconds;

	if (!find_definition(sub.name, &def) || !es_preloaded() ||
		pg_class_aclcheck(def.collection, GetUserId(), ACL_SELECT) != ACLCHECK_OK ||
		check_enable_rls(def.collection, InvalidOid, true) == RLS_ENABLED)
		PG_RETURN_NULL();
	sub.coll = es_read_open_collection(def.collection);
	sub.lanes = def.lanes;
	if (def.query != NULL)
		sub.query = es_query_from_jsonb(def.query, "query");
	lanes = es_lanes_open(sub.name, AccessShareLock);
	if (es_lanes_load(lanes) != sub.lanes)
	{
		es_lanes_close(lanes, true);
		PG_RETURN_NULL(); /* unsubscribed meanwhile */
	}
	es_view_open(sub.coll, &view);
	seconds = lag_seconds(&sub, lanes, &view);
	es_view_close(&view);
	es_lanes_close(lanes, true);
	PG_RETURN_FLOAT8(seconds);
}
