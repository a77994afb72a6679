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
 * there is a bound.  Time: without max_count, that of reading and sorting the
 * window.  With it, the window is read in parts, those with the oldest events
 * first, until there are enough rows and no other part can have an older one.
 * Which part has what times the backend learns at its first call (time_map.c);
 * from then on a page costs what it holds, as long as times mostly grow with
 * positions.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_operator.h"
#include "catalog/pg_type.h"
#include "errors.h"
#include "feed/merge_cursor.h"
#include "feed/read.h"
#include "feed/time_map.h"
#include "funcapi.h"
#include "lib/binaryheap.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/tuplesort.h"
#include "utils/typcache.h"

/* Columns of the sort: the key, whose third part is the event's first column. */
#define SORT_CREATED_AT 1
#define SORT_SOURCE		2
#define SORT_EVENT		3 /* ES_EVENT_NATTS columns from here on */
#define SORT_NATTS		(SORT_EVENT + ES_EVENT_NATTS - 1)

/* Columns of the result. */
#define RESULT_COLLECTION 1
#define RESULT_CURSOR	  2
#define RESULT_EVENT	  3
#define RESULT_NATTS	  3

/* Pages up to this are worth reading in parts; their times fit into memory. */
#define PAGE_LIMIT 65536

/* So many matches that knowing the times would have been cheaper than reading them. */
#define MANY_MATCHES 65536

/* A part of one collection's window: positions in (after, upto]. */
typedef struct Part
{
	int			source;
	EsPosition	after;
	EsPosition	upto;
	TimestampTz least; /* no event there is older */
} Part;

typedef struct Merge
{
	EsMergeState state;
	Snapshot	 snapshot;	/* one for all, newer than each head */
	EsReadArgs	 filter;	/* query, since, until */
	int64		 remaining; /* of max_count */
	bool		 paged;		/* remaining is small enough to read in parts */

	/* One window's: */
	int				nparts;
	int				room;
	Part		   *parts;
	Tuplesortstate *sort;
	int64			nread;	/* matching events */
	binaryheap	   *oldest; /* times of the oldest rows, as many as remain; or NULL */
	EsPosition	   *begins; /* per source, where the window will begin */

	TupleDesc	   sort_desc;
	TupleDesc	   event_desc;
	ReturnSetInfo *result;
	MemoryContext  row_context; /* emptied after each row given out */
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
	Datum *relids;
	bool  *nulls;

	deconstruct_array(collections, REGCLASSOID, sizeof(Oid), true, TYPALIGN_INT, &relids,
					  &nulls, &state->nsources);
	state->sources = palloc0(sizeof(EsMergeSource) * Max(state->nsources, 1));
	for (int i = 0; i < state->nsources; i++)
	{
		EsMergeSource *source = &state->sources[i];

		if (nulls[i])
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							errmsg("\"collections\" must not contain nulls")));
		source->relid = DatumGetObjectId(relids[i]);
		source->coll = es_read_open_collection(source->relid);
		source->row_security = es_collection_row_security(source->coll);
		source->name = es_relation_name(source->relid);
		source->short_name = DatumGetCString(DirectFunctionCall1(regclassout, relids[i]));
	}
	qsort(state->sources, state->nsources, sizeof(EsMergeSource), compare_names);
	for (int i = 1; i < state->nsources; i++)
		if (state->sources[i].relid == state->sources[i - 1].relid)
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
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
		EsView view;

		es_view_open(state->sources[i].coll, &view);
		if (state->sources[i].coll->head.head != NULL)
			es_head_count(&state->sources[i].coll->head, ES_STAT_READS, 1);
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
	bool any = false;

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

/* Does this call's view reach to the end of every window that is not read yet? */
static bool
view_reaches(const EsMergeState *state)
{
	for (int i = 0; i < state->nsources; i++)
	{
		const EsMergeSource *source = &state->sources[i];

		if (source->low < source->high && source->head < source->high)
			return false;
	}
	return true;
}

/* ---------------------------------------------------------------------------
 * Sorting a window
 * ------------------------------------------------------------------------- */

static TupleDesc
make_sort_desc(TupleDesc event_desc)
{
	TupleDesc desc = CreateTemplateTupleDesc(SORT_NATTS);

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
	AttrNumber		columns[] = {SORT_CREATED_AT, SORT_SOURCE, SORT_EVENT};
	Oid				operators[] = {time_type->lt_opr, Int4LessOperator, Int8LessOperator};
	Oid				collations[] = {InvalidOid, InvalidOid, InvalidOid};
	bool			nulls_first[] = {false, false, false};
	bool			bounded = merge->remaining < PG_INT32_MAX;
	Tuplesortstate *sort = tuplesort_begin_heap(
		merge->sort_desc, lengthof(columns), columns, operators, collations, nulls_first,
		work_mem, NULL, bounded ? TUPLESORT_ALLOWBOUNDED : TUPLESORT_NONE);

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

static void
sort_row(Merge *merge, int source, TupleTableSlot *event, TupleTableSlot *row)
{
	ExecClearTuple(row);
	row->tts_values[SORT_CREATED_AT - 1] = event->tts_values[ES_ATT_CREATED_AT - 1];
	row->tts_isnull[SORT_CREATED_AT - 1] = false;
	row->tts_values[SORT_SOURCE - 1] = Int32GetDatum(source);
	row->tts_isnull[SORT_SOURCE - 1] = false;
	memcpy(&row->tts_values[SORT_EVENT - 1], event->tts_values,
		   sizeof(Datum) * ES_EVENT_NATTS);
	memcpy(&row->tts_isnull[SORT_EVENT - 1], event->tts_isnull,
		   sizeof(bool) * ES_EVENT_NATTS);
	ExecStoreVirtualTuple(row);
	tuplesort_puttupleslot(merge->sort, row);
}

/* Keeps the times of as many rows as remain to be given out, the latest on top. */
static void
note_time(Merge *merge, TimestampTz created_at)
{
	binaryheap *oldest = merge->oldest;

	if (oldest == NULL)
		return;
	if (oldest->bh_size < merge->remaining)
		binaryheap_add(oldest, TimestampTzGetDatum(created_at));
	else if (created_at < DatumGetTimestampTz(binaryheap_first(oldest)))
		binaryheap_replace_first(oldest, TimestampTzGetDatum(created_at));
}

/* Are there enough rows already that nothing this young is asked for? */
static bool
is_enough(const Merge *merge, TimestampTz least)
{
	return merge->oldest != NULL && merge->oldest->bh_size >= merge->remaining &&
		   DatumGetTimestampTz(binaryheap_first(merge->oldest)) < least;
}

/* Puts what is left of a part into the sort. */
static void
sort_part(Merge *merge, const Part *part, TupleTableSlot *row)
{
	EsReadArgs		args = merge->filter;
	EsView			view = {.head = part->upto, .snapshot = merge->snapshot};
	EsPosition	   *begin = &merge->begins[part->source];
	EsRead		   *read;
	TupleTableSlot *slot;

	args.collection = merge->state.sources[part->source].relid;
	args.after = part->after;
	read = es_read_begin_in(&args, &view);
	while ((slot = es_read_next(read)) != NULL)
	{
		TimestampTz created_at;
		EsPosition	position;

		merge->nread++;
		slot_getsomeattrs(slot, ES_EVENT_NATTS);
		created_at = DatumGetTimestampTz(slot->tts_values[ES_ATT_CREATED_AT - 1]);
		position = DatumGetInt64(slot->tts_values[ES_ATT_POSITION - 1]);
		if (!is_after_key(&merge->state.key, created_at, part->source, position))
			continue;
		*begin = Min(*begin, position - 1);
		if (is_enough(merge, created_at))
			continue;
		note_time(merge, created_at);
		sort_row(merge, part->source, slot, row);
	}
	es_read_end(read);
}

/* ---------------------------------------------------------------------------
 * The parts of a window
 * ------------------------------------------------------------------------- */

static void
add_part(Merge *merge, int source, EsPosition after, EsPosition upto, TimestampTz least)
{
	Part *part;

	if (after >= upto)
		return;
	if (merge->nparts == merge->room)
	{
		merge->room = Max(merge->room * 2, 64);
		merge->parts =
			merge->parts == NULL
				? palloc(sizeof(Part) * merge->room)
				: repalloc_huge(merge->parts, sizeof(Part) * (Size) merge->room);
	}
	part = &merge->parts[merge->nparts++];
	part->source = source;
	part->after = after;
	part->upto = upto;
	part->least = least;
}

/* Can an event of those times still be asked for? */
static bool
is_wanted(const Merge *merge, const EsTimeRun *run)
{
	const EsReadArgs *filter = &merge->filter;

	return (!merge->state.key.valid || run->greatest >= merge->state.key.created_at) &&
		   (!filter->has_since || run->greatest >= filter->since) &&
		   (!filter->has_until || run->least < filter->until);
}

/* One collection's window in runs whose times are known, and the rest of it. */
static void
add_source(Merge *merge, int index)
{
	const EsMergeSource *source = &merge->state.sources[index];
	EsPosition			 reached = source->low;
	const EsTimeRun		*runs;
	int					 nruns = es_time_map_runs(source->coll, &runs);

	if (!merge->paged || source->row_security ||
		(nruns > 0 && runs[0].first > source->low + 1))
		nruns = 0;
	for (int i = 0; i < nruns && reached < source->high; i++)
	{
		if (runs[i].last <= reached)
			continue;
		if (is_wanted(merge, &runs[i]))
			add_part(merge, index, reached, Min(runs[i].last, source->high),
					 runs[i].least);
		reached = Min(runs[i].last, source->high);
	}
	add_part(merge, index, reached, source->high, DT_NOBEGIN);
}

/* Learns the times of what the windows hold. */
static void
learn_times(Merge *merge)
{
	for (int i = 0; i < merge->state.nsources; i++)
	{
		EsMergeSource *source = &merge->state.sources[i];
		EsView		   view = {.head = source->high, .snapshot = merge->snapshot};

		if (source->row_security)
			continue; /* it is read by queries, which a part each would multiply */
		es_time_map_extend(source->coll, source->low, &view);
	}
}

static int
compare_parts(const void *a, const void *b)
{
	TimestampTz left = ((const Part *) a)->least;
	TimestampTz right = ((const Part *) b)->least;

	return left < right ? -1 : left > right;
}

static int
compare_times(Datum a, Datum b, void *arg)
{
	TimestampTz left = DatumGetTimestampTz(a);
	TimestampTz right = DatumGetTimestampTz(b);

	return left < right ? -1 : left > right;
}

/*
 * Sorts what is left of the window, or enough of it, and lets each collection's
 * window begin where the first that is left lies.
 */
static void
sort_window(Merge *merge)
{
	EsMergeState   *state = &merge->state;
	TupleTableSlot *row = MakeSingleTupleTableSlot(merge->sort_desc, &TTSOpsVirtual);
	int				next;

	merge->nparts = 0;
	for (int i = 0; i < state->nsources; i++)
	{
		merge->begins[i] = state->sources[i].high;
		add_source(merge, i);
	}
	if (merge->nparts > 1)
		qsort(merge->parts, merge->nparts, sizeof(Part), compare_parts);
	for (next = 0; next < merge->nparts; next++)
	{
		if (is_enough(merge, merge->parts[next].least))
			break;
		sort_part(merge, &merge->parts[next], row);
	}
	for (; next < merge->nparts; next++)
	{
		EsPosition *begin = &merge->begins[merge->parts[next].source];

		*begin = Min(*begin, merge->parts[next].after);
	}
	for (int i = 0; i < state->nsources; i++)
		state->sources[i].low = merge->begins[i];
	ExecDropSingleTupleTableSlot(row);
	tuplesort_performsort(merge->sort);
}

/* ---------------------------------------------------------------------------
 * Giving out
 * ------------------------------------------------------------------------- */

static void
put_row(Merge *merge, TupleTableSlot *row)
{
	MemoryContext caller = MemoryContextSwitchTo(merge->row_context);
	Datum		  values[RESULT_NATTS];
	bool		  nulls[RESULT_NATTS] = {false, false, false};
	EsMergeKey	  key = {.valid = true};
	HeapTuple	  event;

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

/*
 * Gives out the open window's rows beyond the key.  To learn all times is to
 * read everything once: for a query that few events match it is cheaper to read
 * those, each time.  Where there turn out to be many, the next call will be glad
 * of it.
 */
static void
merge_window(Merge *merge)
{
	TupleTableSlot *row = MakeSingleTupleTableSlot(merge->sort_desc, &TTSOpsMinimalTuple);

	merge->paged = merge->remaining <= PAGE_LIMIT;
	merge->oldest = merge->paged
						? binaryheap_allocate((int) merge->remaining, compare_times, NULL)
						: NULL;
	merge->nread = 0;
	merge->sort = begin_sort(merge);
	if (merge->paged && merge->filter.query == NULL)
		learn_times(merge);
	sort_window(merge);
	if (merge->paged && merge->filter.query != NULL && merge->nread > MANY_MATCHES)
		learn_times(merge);
	while (merge->remaining > 0 &&
		   tuplesort_gettupleslot(merge->sort, true, false, row, NULL))
	{
		CHECK_FOR_INTERRUPTS();
		put_row(merge, row);
		merge->remaining--;
	}
	ExecDropSingleTupleTableSlot(row);
	tuplesort_end(merge->sort);
	if (merge->oldest != NULL)
		binaryheap_free(merge->oldest);
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
	EsReadArgs	  *filter = &merge->filter;

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

	es_refuse_null(&values[0], "collections");
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
	Merge merge = {0};

	InitMaterializedSRF(fcinfo, 0);
	merge.result = (ReturnSetInfo *) fcinfo->resultinfo;
	make_merge(fcinfo, &merge);
	if (merge.state.nsources > 0)
	{
		Form_pg_attribute event = TupleDescAttr(merge.result->setDesc, RESULT_EVENT - 1);

		merge.event_desc = lookup_rowtype_tupdesc_copy(event->atttypid, -1);
		merge.sort_desc = make_sort_desc(merge.event_desc);
		merge.begins = palloc(sizeof(EsPosition) * merge.state.nsources);
		merge.row_context = AllocSetContextCreate(
			CurrentMemoryContext, "eventstore merged row", ALLOCSET_DEFAULT_SIZES);
		read_windows(&merge);
		UnregisterSnapshot(merge.snapshot);
	}
	return (Datum) 0;
}
