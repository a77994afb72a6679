/*
 * feed/read.c
 *		Reading a collection: arguments, view, and where the events come from.
 *
 * The order of steps is what no reader may get wrong (design, section 5):
 *
 *	1.	lock the collection (AccessShare) and check the SELECT right;
 *	2.	take the head, accept invalidations, take a snapshot: es_view_open.  A
 *		stream has no need of a head, its versions being ordered by the lock on
 *		the stream; there it is a snapshot, and then the invalidations, so that
 *		the list of segments is never older than what the snapshot sees;
 *	3.	check the cursor against that same state of the collection;
 *	4.	walk, up to the head.
 *
 * Where the events come from:
 *
 *	row-level security applies	a query of the user's own (visible.c)
 *	a stream					the indexes of (stream, version) (stream_walk.c)
 *	everything else				collection/match.c
 *
 * The view is kept from es_read_begin to es_read_end, over restarts too: a
 * nested loop that reads the collection again for each row sees one state.
 *
 * Everything is released by the resource owner after an error: snapshot, pins,
 * relations.  A read needs no transaction id and writes nothing of its own, so it
 * works on a standby.
 */
#include "postgres.h"

#include "feed/read.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "collection/match.h"
#include "errors.h"
#include "feed/lane.h"
#include "feed/stream_walk.h"
#include "feed/visible.h"
#include "feed/wait.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

struct EsRead
{
	EsReadArgs	  args;
	EsCollection *coll;
	EsView		  view;		/* of a stream: no head */
	bool		  own_view; /* to be closed by us */
	bool		  row_security;
	MemoryContext context;		/* of this struct */
	MemoryContext walk_context; /* emptied when a walk ends */

	/* The walk: one of three, none when there is nothing (more) to read. */
	EsMatch		 *match;
	EsStreamWalk *stream;
	EsVisible	 *visible;
	int64		  remaining; /* of max_count */
	bool		  may_wait;	 /* nothing was given out yet */
	EsPosition	  looked;	 /* while waiting: nothing up to here matches */
	uint64		  nread;	 /* events given out, for the statistics */
};

/* ---------------------------------------------------------------------------
 * Arguments
 * ------------------------------------------------------------------------- */

Oid
es_read_collection_arg(const NullableDatum *value)
{
	es_refuse_null(value, "collection");
	return DatumGetObjectId(value->value);
}

int64
es_read_max_count_arg(const NullableDatum *value)
{
	int64 max_count;

	if (value->isnull)
		return ES_READ_ALL;
	max_count = DatumGetInt64(value->value);
	if (max_count < 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("\"max_count\" must not be negative"),
						errdetail("It is " INT64_FORMAT ".", max_count),
						errhint("Null means all events, 0 none.")));
	return max_count;
}

EsPosition
es_read_position_arg(const NullableDatum *value, const char *name, EsPosition absent)
{
	EsPosition position;

	if (value->isnull)
		return absent;
	position = DatumGetInt64(value->value);
	if (position < 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("\"%s\" must not be negative", name),
						errdetail("It is " INT64_FORMAT ".", position)));
	return position;
}

EsQuery *
es_read_query_arg(const NullableDatum *types, const NullableDatum *tags,
				  const NullableDatum *query)
{
	return es_query_from_args(types->isnull ? NULL : DatumGetArrayTypeP(types->value),
							  tags->isnull ? NULL : DatumGetArrayTypeP(tags->value),
							  query->isnull ? NULL : DatumGetJsonbP(query->value));
}

static ScanDirection
direction_arg(const NullableDatum *value)
{
	char *direction;

	if (value->isnull)
		return ForwardScanDirection;
	direction = TextDatumGetCString(value->value);
	if (strcmp(direction, "forward") == 0)
		return ForwardScanDirection;
	if (strcmp(direction, "backward") != 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("\"direction\" must not be \"%s\"", direction),
						errhint("The directions are \"forward\" and \"backward\".")));
	return BackwardScanDirection;
}

/*
 * read(collection, after, max_count, types, tags, query, since, until, before,
 *		direction, wait)
 */
static void
make_position_args(NullableDatum *values, EsReadArgs *args)
{
	args->has_after = !values[1].isnull;
	args->after = es_read_position_arg(&values[1], "after", 0);
	args->query = es_read_query_arg(&values[3], &values[4], &values[5]);
	args->has_since = !values[6].isnull;
	args->since = args->has_since ? DatumGetTimestampTz(values[6].value) : 0;
	args->has_until = !values[7].isnull;
	args->until = args->has_until ? DatumGetTimestampTz(values[7].value) : 0;
	args->before = es_read_position_arg(&values[8], "before", ES_READ_END);
	args->wait_until = es_wait_arg(&values[10]);
}

/*
 * read_stream(collection, stream, from_version, max_count, direction, to_version,
 *		types, wait)
 */
static void
make_stream_args(NullableDatum *values, EsReadArgs *args)
{
	NullableDatum none = {.isnull = true};

	es_refuse_null(&values[1], "stream");
	args->stream = DatumGetTextPP(values[1].value);
	args->before = ES_READ_END;
	args->has_from = !values[2].isnull;
	args->from_version = es_read_position_arg(&values[2], "from_version", 0);
	args->has_to = !values[5].isnull;
	args->to_version = es_read_position_arg(&values[5], "to_version", 0);
	args->query = es_read_query_arg(&values[6], &none, &none);
	args->wait_until = es_wait_arg(&values[7]);
}

void
es_read_make_args(EsReadKind kind, NullableDatum *values, EsReadArgs *args)
{
	memset(args, 0, sizeof(EsReadArgs));
	args->collection = es_read_collection_arg(&values[0]);
	args->max_count = es_read_max_count_arg(&values[ES_READ_ARG_MAX_COUNT(kind)]);
	args->direction = direction_arg(&values[ES_READ_ARG_DIRECTION(kind)]);
	if (kind == ES_READ_STREAM)
		make_stream_args(values, args);
	else
		make_position_args(values, args);
}

/* ---------------------------------------------------------------------------
 * Views
 * ------------------------------------------------------------------------- */

EsCollection *
es_read_open_collection(Oid collection)
{
	EsCollection *coll = es_collection_open(collection, AccessShareLock);

	es_collection_check_acl(coll, ACL_SELECT);
	return coll;
}

Snapshot
es_read_snapshot(EsCollection *coll)
{
	Snapshot snapshot;

	if (IsInParallelMode())
		snapshot = RegisterSnapshot(GetActiveSnapshot());
	else if (IsolationUsesXactSnapshot())
		snapshot = RegisterSnapshot(GetTransactionSnapshot());
	else
		snapshot = RegisterSnapshot(GetLatestSnapshot());

	AcceptInvalidationMessages();
	es_collection_get(coll->relid);
	return snapshot;
}

static void
open_view(EsRead *read)
{
	read->own_view = true;
	if (read->args.stream == NULL)
		es_view_open(read->coll, &read->view);
	else
	{
		read->view.head = ES_READ_END;
		read->view.snapshot = es_read_snapshot(read->coll);
	}
	if (read->args.has_after)
		es_collection_check_cursor(read->coll, read->args.after);
}

/* ---------------------------------------------------------------------------
 * Row-level security: the same by a query
 * ------------------------------------------------------------------------- */

/* The first position to read and the one to stop at, both exclusive. */
static void
find_bounds(const EsRead *read, EsPosition *after, EsPosition *before)
{
	EsPosition head = read->view.head;

	*after = Max(read->args.after, read->coll->first_position - 1);
	*after = Max(*after, read->looked);
	*before = Min(read->args.before, head == ES_READ_END ? ES_READ_END : head + 1);
}

static void
append_time_bounds(StringInfo sql, const EsReadArgs *args, EsVisibleQuery *query)
{
	if (args->has_since)
	{
		query->types[query->nparams] = TIMESTAMPTZOID;
		query->values[query->nparams] = TimestampTzGetDatum(args->since);
		appendStringInfo(sql, " AND created_at OPERATOR(pg_catalog.>=) $%d",
						 ++query->nparams);
	}
	if (args->has_until)
	{
		query->types[query->nparams] = TIMESTAMPTZOID;
		query->values[query->nparams] = TimestampTzGetDatum(args->until);
		appendStringInfo(sql, " AND created_at OPERATOR(pg_catalog.<) $%d",
						 ++query->nparams);
	}
}

static void
append_version_bounds(StringInfo sql, const EsReadArgs *args, EsVisibleQuery *query)
{
	bool forward = ScanDirectionIsForward(args->direction);

	query->types[0] = TEXTOID;
	query->values[0] = PointerGetDatum(args->stream);
	query->nparams = 1;
	appendStringInfoString(sql, " AND stream OPERATOR(pg_catalog.=) $1");
	if (args->has_from)
		appendStringInfo(sql, " AND version OPERATOR(pg_catalog.%s) '" INT64_FORMAT "'",
						 forward ? ">=" : "<=", args->from_version);
	if (args->has_to)
		appendStringInfo(sql, " AND version OPERATOR(pg_catalog.%s) '" INT64_FORMAT "'",
						 forward ? "<=" : ">=", args->to_version);
}

/* Does the user see any event of the stream? */
static bool
sees_stream(EsRead *read)
{
	EsVisibleQuery query = {0};
	EsVisible	  *visible;
	bool		   sees;

	query.sql = psprintf("SELECT position FROM %s"
						 " WHERE position OPERATOR(pg_catalog.>=) '" INT64_FORMAT "'"
						 " AND stream OPERATOR(pg_catalog.=) $1 LIMIT 1",
						 es_collection_name(read->coll), read->coll->first_position);
	query.nparams = 1;
	query.types[0] = TEXTOID;
	query.values[0] = PointerGetDatum(read->args.stream);
	visible = es_visible_begin(&query, read->view.snapshot);
	sees = es_visible_next(visible) != NULL;
	es_visible_end(visible);
	return sees;
}

/*
 * LG005 tells that a stream exists, so it is only for those who see some of it.
 */
static void
check_visible_stream(EsRead *read)
{
	EsStreamHead head;

	if (es_heads_peek(read->coll, read->args.stream, read->view.snapshot, &head) &&
		sees_stream(read))
		es_stream_check_kept(read->coll, &read->args, &head, read->view.snapshot);
}

static EsVisible *
begin_visible(EsRead *read)
{
	const EsReadArgs *args = &read->args;
	bool			  forward = ScanDirectionIsForward(args->direction);
	EsVisibleQuery	  query = {0};
	StringInfoData	  sql;
	EsPosition		  after;
	EsPosition		  before;

	find_bounds(read, &after, &before);
	initStringInfo(&sql);
	appendStringInfo(&sql,
					 "SELECT " ES_VISIBLE_COLUMNS " FROM %s"
					 " WHERE position OPERATOR(pg_catalog.>) '" INT64_FORMAT "'"
					 " AND position OPERATOR(pg_catalog.<) '" INT64_FORMAT "'",
					 es_collection_name(read->coll), after, before);
	if (args->stream != NULL)
	{
		check_visible_stream(read);
		append_version_bounds(&sql, args, &query);
	}
	append_time_bounds(&sql, args, &query);
	if (args->query != NULL)
		appendStringInfo(&sql, " AND (%s)", es_query_to_sql(args->query));
	appendStringInfo(&sql, " ORDER BY %s%s",
					 args->stream != NULL ? "version" : "position",
					 forward ? "" : " DESC");
	/* Which lane an event belongs to is not asked in SQL. */
	if (args->max_count != ES_READ_ALL && args->lanes <= 1)
		appendStringInfo(&sql, " LIMIT '" INT64_FORMAT "'", args->max_count);
	query.sql = sql.data;
	return es_visible_begin(&query, read->view.snapshot);
}

/* ---------------------------------------------------------------------------
 * The walk
 * ------------------------------------------------------------------------- */

static EsMatch *
begin_match(EsRead *read)
{
	EsPosition after;
	EsPosition before;

	find_bounds(read, &after, &before);
	if (before <= after)
		return NULL;
	return es_match_begin(read->coll, read->args.query, after, before,
						  read->args.direction, read->view.snapshot);
}

static void
begin_walk(EsRead *read)
{
	MemoryContext caller = MemoryContextSwitchTo(read->walk_context);

	/* Where max_count is 0 nobody asks for a row, but what is wrong is said. */
	read->remaining = read->args.max_count;
	read->may_wait = read->args.wait_until != 0 && read->remaining > 0;
	if (read->row_security)
		read->visible = begin_visible(read);
	else if (read->args.stream != NULL)
		read->stream = es_stream_walk_begin(read->coll, &read->args, read->view.snapshot);
	else
		read->match = begin_match(read);
	MemoryContextSwitchTo(caller);
}

static void
end_walk(EsRead *read)
{
	if (read->visible != NULL)
		es_visible_end(read->visible);
	if (read->stream != NULL)
		es_stream_walk_end(read->stream);
	if (read->match != NULL)
		es_match_end(read->match);
	read->visible = NULL;
	read->stream = NULL;
	read->match = NULL;
	MemoryContextReset(read->walk_context);
}

static EsRead *
make_read(const EsReadArgs *args)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "eventstore read",
												  ALLOCSET_DEFAULT_SIZES);
	EsRead		 *read = MemoryContextAllocZero(context, sizeof(EsRead));

	read->args = *args;
	read->context = context;
	read->walk_context =
		AllocSetContextCreate(context, "eventstore read walk", ALLOCSET_DEFAULT_SIZES);
	return read;
}

static void
enter_view(EsRead *read, EsCollection *coll)
{
	read->coll = coll;
	read->row_security = es_collection_row_security(read->coll);
	open_view(read);
	begin_walk(read);
}

EsRead *
es_read_begin(const EsReadArgs *args)
{
	EsRead *read = make_read(args);

	enter_view(read, es_read_open_collection(args->collection));
	return read;
}

EsRead *
es_read_begin_in(const EsReadArgs *args, const EsView *view)
{
	EsRead *read = make_read(args);

	Assert(args->stream == NULL);
	read->coll = es_collection_get(args->collection);
	read->row_security = es_collection_row_security(read->coll);
	read->view = *view;
	begin_walk(read);
	return read;
}

/* A read in somebody else's view is a part of what he reads. */
static void
count_read(EsRead *read)
{
	if (read->coll->head.head != NULL)
	{
		if (read->own_view)
			es_head_count(&read->coll->head, ES_STAT_READS, 1);
		es_head_count(&read->coll->head, ES_STAT_EVENTS_READ, read->nread);
	}
	read->nread = 0;
}

void
es_read_stop(EsRead *read)
{
	end_walk(read);
	count_read(read);
	read->remaining = 0;
}

void
es_read_restart(EsRead *read, const EsReadArgs *args)
{
	bool same_collection = args->collection == read->args.collection;

	es_read_stop(read);
	read->args = *args;
	read->looked = 0;
	if (same_collection && read->view.snapshot != NULL)
	{
		es_collection_get(args->collection);
		if (args->has_after)
			es_collection_check_cursor(read->coll, args->after);
	}
	else
	{
		if (read->own_view && read->view.snapshot != NULL)
			es_view_close(&read->view);
		enter_view(read, es_read_open_collection(args->collection));
		return;
	}
	begin_walk(read);
}

static inline TupleTableSlot *
next_row(EsRead *read)
{
	if (read->match != NULL)
		return es_match_next(read->match);
	if (read->stream != NULL)
		return es_stream_walk_next(read->stream);
	if (read->visible != NULL)
		return es_visible_next(read->visible);
	return NULL;
}

static inline bool
in_time(const EsReadArgs *args, TupleTableSlot *slot)
{
	bool		isnull;
	TimestampTz created_at;

	if (!args->has_since && !args->has_until)
		return true;
	created_at = DatumGetTimestampTz(slot_getattr(slot, ES_ATT_CREATED_AT, &isnull));
	return (!args->has_since || created_at >= args->since) &&
		   (!args->has_until || created_at < args->until);
}

static inline bool
in_lane(const EsReadArgs *args, TupleTableSlot *slot)
{
	return args->lanes <= 1 || es_lane_of_event(slot, args->lanes) == args->lane;
}

static TupleTableSlot *
next_in_walk(EsRead *read)
{
	MemoryContext	caller = MemoryContextSwitchTo(read->walk_context);
	TupleTableSlot *slot;

	do
	{
		CHECK_FOR_INTERRUPTS();
		slot = next_row(read);
	} while (slot != NULL && !(in_time(&read->args, slot) && in_lane(&read->args, slot)));
	MemoryContextSwitchTo(caller);
	return slot;
}

/* Gives back what a read holds, for the time of a sleep, but for the lock. */
static EsPosition
leave_view(EsRead *read)
{
	EsPosition head = read->args.stream == NULL ? read->view.head : 0;

	end_walk(read);
	es_view_close(&read->view);

	/* Forward, the next look begins where this one ended. */
	if (ScanDirectionIsForward(read->args.direction))
		read->looked = head;
	return head;
}

/* Can nothing come any more that lies below the upper bound? */
static bool
is_passed(const EsRead *read, EsPosition head)
{
	return read->args.before != ES_READ_END && head >= read->args.before - 1;
}

/* The walk has found nothing: the first event that comes in time, or NULL. */
static TupleTableSlot *
await_event(EsRead *read)
{
	EsWaitFor what = {
		.query = read->args.query,
		.stream = read->args.stream,
	};
	TupleTableSlot *slot = NULL;
	EsPosition		looked;

	/* Positions in (after, before) are all that matter, and nothing below the head is left. */
	looked = leave_view(read);
	if (is_passed(read, looked))
		return NULL;
	what.looked = looked;
	es_wait_begin(read->coll, &what);
	es_wait_unlock(read->coll);
	for (;;)
	{
		enter_view(read, es_wait_reopen(read->args.collection));
		slot = next_in_walk(read);
		if (slot != NULL)
			break;
		looked = leave_view(read);
		es_wait_unlock(read->coll);
		if (is_passed(read, looked) ||
			!es_wait_sleep(read->coll, looked, read->args.wait_until))
			break;
	}
	es_wait_end(slot != NULL);
	return slot;
}

TupleTableSlot *
es_read_next(EsRead *read)
{
	TupleTableSlot *slot = NULL;

	if (read->remaining > 0)
	{
		slot = next_in_walk(read);
		if (slot == NULL && read->may_wait)
			slot = await_event(read);
		read->may_wait = false;
	}
	if (slot == NULL)
	{
		/* Nobody asks the walk again: it may not like it. */
		read->remaining = 0;
		return NULL;
	}
	read->remaining--;
	read->nread++;
	return slot;
}

void
es_read_end(EsRead *read)
{
	es_read_stop(read);
	/* A wait that was in vain has closed it. */
	if (read->own_view && read->view.snapshot != NULL)
		es_view_close(&read->view);
	MemoryContextDelete(read->context);
}

/* ---------------------------------------------------------------------------
 * The functions
 * ------------------------------------------------------------------------- */

Datum
es_read_event_datum(TupleTableSlot *slot, TupleDesc event_desc)
{
	slot_getsomeattrs(slot, ES_EVENT_NATTS);
	return HeapTupleGetDatum(
		heap_form_tuple(event_desc, slot->tts_values, slot->tts_isnull));
}

/* Reads all of it into the tuplestore that work_mem bounds. */
static Datum
read_into_tuplestore(FunctionCallInfo fcinfo, EsReadKind kind)
{
	ReturnSetInfo  *result;
	EsReadArgs		args;
	EsRead		   *read;
	TupleTableSlot *slot;

	InitMaterializedSRF(fcinfo, 0);
	result = (ReturnSetInfo *) fcinfo->resultinfo;
	es_read_make_args(kind, fcinfo->args, &args);
	read = es_read_begin(&args);
	while ((slot = es_read_next(read)) != NULL)
	{
		slot_getsomeattrs(slot, ES_EVENT_NATTS);
		tuplestore_putvalues(result->setResult, result->setDesc, slot->tts_values,
							 slot->tts_isnull);
	}
	es_read_end(read);
	return (Datum) 0;
}

PG_FUNCTION_INFO_V1(es_read);
Datum
es_read(PG_FUNCTION_ARGS)
{
	return read_into_tuplestore(fcinfo, ES_READ_POSITIONS);
}

PG_FUNCTION_INFO_V1(es_read_stream);
Datum
es_read_stream(PG_FUNCTION_ARGS)
{
	return read_into_tuplestore(fcinfo, ES_READ_STREAM);
}

PG_FUNCTION_INFO_V1(es_head);
Datum
es_head(PG_FUNCTION_ARGS)
{
	EsCollection *coll =
		es_read_open_collection(es_read_collection_arg(&fcinfo->args[0]));
	EsPosition head = es_view_head(coll);

	/* A number needs no lock: wait_for(c, head(c)) is not to stand in a DROP's way. */
	es_wait_unlock(coll);
	PG_RETURN_INT64(head);
}
