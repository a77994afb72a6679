/*
 * feed/merged.c
 *		Several collections as one, by the time of their events.
 *
 * Rows come by created_at, then by the collection's name (bytewise,
 * schema-qualified), then by position.  created_at is information that callers
 * may set, so it does not grow with the position: an event with a higher
 * position, or one that is appended tomorrow, can be older than the row that a
 * reader stopped at.  "Everything after this row" would therefore miss events.
 * So a reader reads in windows:
 *
 *	1.	The first call takes the head of each collection, then one snapshot, and
 *		reads the window from its start (exclusive) to that head (inclusive).
 *		What is in the window never changes again, so the sort key of a row is
 *		a place in it.
 *	2.	The cursor of each row holds the windows and the row's sort key.
 *	3.	A call with a cursor first finishes the cursor's window: the rows
 *		with a greater key.  Then comes the next window: from the last one's end
 *		to the heads of this call.
 *
 * So no row is skipped and none comes twice, and one call's rows, within a
 * window, are in order.  A caller whose own view does not reach the window's end
 * (a transaction with an older snapshot, a standby that lags behind) gets no
 * rows, as a reader whose cursor is at the head does.
 *
 * The lower end of a collection's window moves up behind the rows that were
 * given out, when a call finds so; it tells retention's losses (LG005) from
 * what was read before.
 *
 * Memory: a sort that work_mem bounds, and that keeps only max_count rows where
 * there is a bound.  Time is that of reading the open window, for each call: many
 * rows a call are cheaper than few, and at the tail a window is short.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_operator.h"
#include "catalog/pg_type.h"
#include "feed/merge_cursor.h"
#include "feed/read.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/tuplesort.h"
#include "utils/typcache.h"

/* Columns of the sort: the key, whose third part is the event's first column. */
#define SORT_CREATED_AT		1
#define SORT_SOURCE			2
#define SORT_EVENT			3	/* ES_EVENT_NATTS columns from here on */
#define SORT_NATTS			(SORT_EVENT + ES_EVENT_NATTS - 1)

/* Columns of the result. */
#define RESULT_COLLECTION	1
#define RESULT_CURSOR		2
#define RESULT_EVENT		3
#define RESULT_NATTS		3

typedef struct Merge
{
	EsMergeState state;
	Snapshot	snapshot;		/* one for all, newer than each head */
	EsReadArgs	filter;			/* query, since, until */
	int64		remaining;		/* of max_count */
	TupleDesc	sort_desc;
	TupleDesc	event_desc;
	ReturnSetInfo *result;
	MemoryContext row_context;	/* emptied after each row given out */
} Merge;

/* ---------------------------------------------------------------------------
 * Collections and their view
 * ------------------------------------------------------------------------- */

static int
compare_names(const void *a, const void *b)
{
	return strcmp(((const EsMergeSource *) a)->name, ((const EsMergeSource *) b)->name);
}

static void
open_sources(ArrayType *collections, EsMergeState *state)
{
	Datum	   *relids;
	bool	   *nulls;

	deconstruct_array(collections, REGCLASSOID, sizeof(Oid), true, TYPALIGN_INT,
					  &relids, &nulls, &state->nsources);
	state->sources = palloc0(sizeof(EsMergeSource) * Max(state->nsources, 1));
	for (int i = 0; i < state->nsources; i++)
	{
		EsMergeSource *source = &state->sources[i];

		if (nulls[i])
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("\"collections\" must not contain nulls")));
		source->relid = DatumGetObjectId(relids[i]);
		source->coll = es_read_open_collection(source->relid);
		source->name = es_relation_name(source->relid);
		source->short_name =
			DatumGetCString(DirectFunctionCall1(regclassout, relids[i]));
	}
	qsort(state->sources, state->nsources, sizeof(EsMergeSource), compare_names);
	for (int i = 1; i < state->nsources; i++)
		if (state->sources[i].relid == state->sources[i - 1].relid)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("\"collections\" names collection \"%s\" twice",
							get_rel_name(state->sources[i].relid))));
}

/*
 * All heads, then the snapshot: the last view's, which sees whatever lies below
 * the heads that were taken before it.
 */
static void
open_view(Merge *merge)
{
	EsMergeState *state = &merge->state;

	for (int i = 0; i < state->nsources; i++)
	{
		EsView		view;

		es_view_open(state->sources[i].coll, &view);
		state->sources[i].head = view.head;
		if (merge->snapshot != NULL)
			UnregisterSnapshot(merge->snapshot);
		merge->snapshot = view.snapshot;
	}
	for (int i = 0; i < state->nsources; i++)
		es_collection_get(state->sources[i].relid);
}

/* Where nothing else was said, a window goes from the oldest event to the head. */
static void
set_windows(EsMergeState *state)
{
	for (int i = 0; i < state->nsources; i++)
	{
		EsMergeSource *source = &state->sources[i];

		if (source->has_window)
			continue;
		source->low = source->coll->first_position - 1;

		/* New beside a cursor: its time begins with the next window. */
		source->high = state->key.valid ? source->low : Max(source->low, source->head);
	}
}

/* On to the window that follows; false where there is none. */
static bool
advance_windows(EsMergeState *state)
{
	bool		any = false;

	state->key.valid = false;
	for (int i = 0; i < state->nsources; i++)
	{
		EsMergeSource *source = &state->sources[i];

		source->low = source->high;
		source->high = Max(source->low, source->head);
		any = any || source->high > source->low;
	}
	return any;
}

/* Does this call's view reach to the end of every window? */
static bool
view_reaches(const EsMergeState *state)
{
	for (int i = 0; i < state->nsources; i++)
		if (state->sources[i].head < state->sources[i].high)
			return false;
	return true;
}

/* ---------------------------------------------------------------------------
 * Sorting a window
 * ------------------------------------------------------------------------- */

static TupleDesc
make_sort_desc(TupleDesc event_desc)
{
	TupleDesc	desc = CreateTemplateTupleDesc(SORT_NATTS);

	TupleDescInitEntry(desc, SORT_CREATED_AT, "created_at", TIMESTAMPTZOID, -1, 0);
	TupleDescInitEntry(desc, SORT_SOURCE, "source", INT4OID, -1, 0);
	for (int i = 0; i < ES_EVENT_NATTS; i++)
		TupleDescCopyEntry(desc, SORT_EVENT + i, event_desc, i + 1);
	return desc;
}

static Tuplesortstate *
begin_sort(const Merge *merge)
{
	TypeCacheEntry *time_type = lookup_type_cache(TIMESTAMPTZOID, TYPECACHE_LT_OPR);
	AttrNumber	columns[] = {SORT_CREATED_AT, SORT_SOURCE, SORT_EVENT};
	Oid			operators[] = {time_type->lt_opr, Int4LessOperator, Int8LessOperator};
	Oid			collations[] = {InvalidOid, InvalidOid, InvalidOid};
	bool		nulls_first[] = {false, false, false};
	bool		bounded = merge->remaining < PG_INT32_MAX;
	Tuplesortstate *sort = tuplesort_begin_heap(merge->sort_desc, lengthof(columns),
												columns, operators, collations,
												nulls_first, work_mem, NULL,
												bounded ? TUPLESORT_ALLOWBOUNDED :
												TUPLESORT_NONE);

	if (bounded)
		tuplesort_set_bound(sort, merge->remaining);
	return sort;
}

static bool
is_after_key(const EsMergeKey *key, TimestampTz created_at, int source,
			 EsPosition position)
{
	if (!key->valid)
		return true;
	if (created_at != key->created_at)
		return created_at > key->created_at;
	if (source != key->source)
		return source > key->source;
	return position > key->position;
}

/*
 * Puts what is left of one collection's window into the sort, and lets the
 * window begin where the first of it is.
 */
static void
sort_source(Merge *merge, int index, Tuplesortstate *sort, TupleTableSlot *row)
{
	EsMergeSource *source = &merge->state.sources[index];
	EsReadArgs	args = merge->filter;
	EsView		view = {.head = source->high, .snapshot = merge->snapshot};
	EsPosition	begin = source->high;
	EsRead	   *read;
	TupleTableSlot *slot;

	args.collection = source->relid;
	args.after = source->low;
	read = es_read_begin_in(&args, &view);
	while ((slot = es_read_next(read)) != NULL)
	{
		TimestampTz created_at;
		EsPosition	position;

		slot_getsomeattrs(slot, ES_EVENT_NATTS);
		created_at = DatumGetTimestampTz(slot->tts_values[ES_ATT_CREATED_AT - 1]);
		position = DatumGetInt64(slot->tts_values[ES_ATT_POSITION - 1]);
		if (!is_after_key(&merge->state.key, created_at, index, position))
			continue;
		begin = Min(begin, position - 1);

		ExecClearTuple(row);
		row->tts_values[SORT_CREATED_AT - 1] = TimestampTzGetDatum(created_at);
		row->tts_isnull[SORT_CREATED_AT - 1] = false;
		row->tts_values[SORT_SOURCE - 1] = Int32GetDatum(index);
		row->tts_isnull[SORT_SOURCE - 1] = false;
		memcpy(&row->tts_values[SORT_EVENT - 1], slot->tts_values,
			   sizeof(Datum) * ES_EVENT_NATTS);
		memcpy(&row->tts_isnull[SORT_EVENT - 1], slot->tts_isnull,
			   sizeof(bool) * ES_EVENT_NATTS);
		ExecStoreVirtualTuple(row);
		tuplesort_puttupleslot(sort, row);
	}
	es_read_end(read);
	source->low = begin;
}

/* ---------------------------------------------------------------------------
 * Giving out
 * ------------------------------------------------------------------------- */

static void
put_row(Merge *merge, TupleTableSlot *row)
{
	MemoryContext caller = MemoryContextSwitchTo(merge->row_context);
	Datum		values[RESULT_NATTS];
	bool		nulls[RESULT_NATTS] = {false, false, false};
	EsMergeKey	key = {.valid = true};
	HeapTuple	event;

	slot_getallattrs(row);
	key.created_at = DatumGetTimestampTz(row->tts_values[SORT_CREATED_AT - 1]);
	key.source = DatumGetInt32(row->tts_values[SORT_SOURCE - 1]);
	key.position = DatumGetInt64(row->tts_values[SORT_EVENT - 1]);

	event = heap_form_tuple(merge->event_desc, &row->tts_values[SORT_EVENT - 1],
							&row->tts_isnull[SORT_EVENT - 1]);
	values[RESULT_COLLECTION - 1] =
		ObjectIdGetDatum(merge->state.sources[key.source].relid);
	values[RESULT_CURSOR - 1] = JsonbPGetDatum(es_merge_cursor_make(&merge->state, &key));
	values[RESULT_EVENT - 1] = HeapTupleGetDatum(event);
	tuplestore_putvalues(merge->result->setResult, merge->result->setDesc, values, nulls);
	MemoryContextSwitchTo(caller);
	MemoryContextReset(merge->row_context);
}

/* Gives out the open window's rows beyond the key. */
static void
merge_window(Merge *merge)
{
	Tuplesortstate *sort = begin_sort(merge);
	TupleTableSlot *row = MakeSingleTupleTableSlot(merge->sort_desc, &TTSOpsVirtual);
	TupleTableSlot *sorted = MakeSingleTupleTableSlot(merge->sort_desc,
													  &TTSOpsMinimalTuple);

	for (int i = 0; i < merge->state.nsources; i++)
		sort_source(merge, i, sort, row);
	tuplesort_performsort(sort);
	while (merge->remaining > 0 &&
		   tuplesort_gettupleslot(sort, true, false, sorted, NULL))
	{
		CHECK_FOR_INTERRUPTS();
		put_row(merge, sorted);
		merge->remaining--;
	}
	ExecDropSingleTupleTableSlot(sorted);
	ExecDropSingleTupleTableSlot(row);
	tuplesort_end(sort);
}

static void
read_windows(Merge *merge)
{
	if (!view_reaches(&merge->state))
		return;
	if (merge->remaining > 0)
		merge_window(merge);
	if (merge->remaining > 0 && advance_windows(&merge->state))
		merge_window(merge);
}

/* read_merged(collections, after, max_count, types, tags, query, since, until) */
static void
make_merge(FunctionCallInfo fcinfo, Merge *merge)
{
	NullableDatum *values = fcinfo->args;
	EsReadArgs *filter = &merge->filter;

	merge->remaining = es_read_max_count_arg(&values[2]);
	filter->direction = ForwardScanDirection;
	filter->max_count = ES_READ_ALL;
	filter->has_after = true;
	filter->before = ES_READ_END;
	filter->query = es_read_query_arg(&values[3], &values[4], &values[5]);
	filter->has_since = !values[6].isnull;
	filter->since = filter->has_since ? DatumGetTimestampTz(values[6].value) : 0;
	filter->has_until = !values[7].isnull;
	filter->until = filter->has_until ? DatumGetTimestampTz(values[7].value) : 0;

	if (values[0].isnull)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("\"collections\" must not be null")));
	open_sources(DatumGetArrayTypeP(values[0].value), &merge->state);
	open_view(merge);
	if (!values[1].isnull)
		es_merge_cursor_parse(DatumGetJsonbP(values[1].value), &merge->state);
	set_windows(&merge->state);
}

PG_FUNCTION_INFO_V1(es_read_merged);
Datum
es_read_merged(PG_FUNCTION_ARGS)
{
	Merge		merge = {0};

	InitMaterializedSRF(fcinfo, 0);
	merge.result = (ReturnSetInfo *) fcinfo->resultinfo;
	make_merge(fcinfo, &merge);
	if (merge.state.nsources > 0)
	{
		Form_pg_attribute event = TupleDescAttr(merge.result->setDesc, RESULT_EVENT - 1);

		merge.event_desc = lookup_rowtype_tupdesc_copy(event->atttypid, -1);
		merge.sort_desc = make_sort_desc(merge.event_desc);
		merge.row_context = AllocSetContextCreate(CurrentMemoryContext,
												  "eventstore merged row",
												  ALLOCSET_DEFAULT_SIZES);
		read_windows(&merge);
		UnregisterSnapshot(merge.snapshot);
	}
	return (Datum) 0;
}
