/*
 * feed/verify.c
 *		Looking for what should not be in a collection.  The SQL function is in
 *		store/verify.c, which goes on with the store of a changelog.
 *
 *	1.	Every event of the range is read and its checksum compared; stream and
 *		version have to be both null, or neither.
 *	2.	(stream, position, version) of each goes into a sort that work_mem
 *		bounds.
 *	3.	The sorted events and the heads table, both in the bytewise order of
 *		streams, are walked side by side: within a stream versions are dense,
 *		the first is 1 where the range has the stream's first position, and the
 *		last is the one that the heads table names.
 *
 * All in one snapshot, in which events and heads agree because they were written
 * by the same transactions; a head is not needed.  Nothing is written.  What
 * lies before the first kept position is not looked at, it is only waiting to
 * be dropped.
 *
 * One who does not see every event cannot tell a gap from a secret, so under
 * row-level security this is refused.
 */
#include "postgres.h"

#include "catalog/pg_collation.h"
#include "catalog/pg_operator.h"
#include "catalog/pg_type.h"
#include "collection/event.h"
#include "collection/match.h"
#include "feed/lookup.h"
#include "feed/read.h"
#include "feed/verify.h"
#include "miscadmin.h"
#include "stats/work.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/tuplesort.h"

/* Columns of the sort. */
#define SORT_STREAM	  1
#define SORT_POSITION 2
#define SORT_VERSION  3
#define SORT_NATTS	  3

#define RESULT_NATTS 4

/* The events of one stream in the range, as far as they were seen. */
typedef struct StreamSummary
{
	text	  *stream; /* NULL = none begun */
	EsPosition last_position;
	int64	   last_version;
} StreamSummary;

/* A row of the heads table. */
typedef struct Head
{
	text	  *stream; /* NULL = no more */
	int64	   version;
	EsPosition first_position;
	EsPosition last_position;
} Head;

typedef struct Verify
{
	EsCollection   *coll;
	Snapshot		snapshot;
	EsPosition		after;	/* exclusive */
	EsPosition		before; /* exclusive */
	ReturnSetInfo  *result;
	Tuplesortstate *sort;
	TupleDesc		sort_desc;
	EsLookup	   *heads;
	Head			head;	   /* where the walk over the heads stands */
	StreamSummary	events;	   /* of the stream that is being walked */
	int64			nstreamed; /* events that went into the sort */
	MemoryContext	row_context;
} Verify;

/* ---------------------------------------------------------------------------
 * Faults
 * ------------------------------------------------------------------------- */

/* A null stream or a version of 0 is shown as null. */
static void
put_fault(Verify *verify, EsPosition position, const text *stream, int64 version,
		  const char *problem)
{
	Datum values[RESULT_NATTS];
	bool  nulls[RESULT_NATTS] = {false, stream == NULL, version == 0, false};

	values[0] = Int64GetDatum(position);
	values[1] = PointerGetDatum(stream);
	values[2] = Int64GetDatum(version);
	values[3] = CStringGetTextDatum(problem);
	tuplestore_putvalues(verify->result->setResult, verify->result->setDesc, values,
						 nulls);
}

/* ---------------------------------------------------------------------------
 * Event by event
 * ------------------------------------------------------------------------- */

/* Its position. */
static EsPosition
check_event(Verify *verify, TupleTableSlot *slot, TupleTableSlot *row)
{
	bool	   no_stream;
	bool	   no_version;
	Datum	   stream = slot_getattr(slot, ES_ATT_STREAM, &no_stream);
	Datum	   version = slot_getattr(slot, ES_ATT_VERSION, &no_version);
	EsPosition position;
	bool	   isnull;

	position = DatumGetInt64(slot_getattr(slot, ES_ATT_POSITION, &isnull));
	if (!es_event_verify_slot(slot))
		put_fault(verify, position, no_stream ? NULL : DatumGetTextPP(stream),
				  no_version ? 0 : DatumGetInt64(version),
				  "the checksum does not agree with the event");
	if (no_stream != no_version)
		put_fault(verify, position, no_stream ? NULL : DatumGetTextPP(stream),
				  no_version ? 0 : DatumGetInt64(version),
				  no_stream ? "there is a version but no stream"
							: "there is a stream but no version");
	if (no_stream || no_version)
		return position;

	ExecClearTuple(row);
	row->tts_values[SORT_STREAM - 1] = stream;
	row->tts_values[SORT_POSITION - 1] = Int64GetDatum(position);
	row->tts_values[SORT_VERSION - 1] = version;
	memset(row->tts_isnull, false, sizeof(bool) * SORT_NATTS);
	ExecStoreVirtualTuple(row);
	tuplesort_puttupleslot(verify->sort, row);
	verify->nstreamed++;
	return position;
}

/* How many positions there are to be read; 0 where nobody knows. */
static int64
count_positions(const Verify *verify)
{
	if (verify->coll->head.head == NULL)
		return 0;
	return Min(verify->before - 1, es_head_last_allotted(&verify->coll->head)) -
		   verify->after;
}

static void
check_events(Verify *verify)
{
	TupleTableSlot *row = MakeSingleTupleTableSlot(verify->sort_desc, &TTSOpsVirtual);
	EsMatch *match = es_match_begin(verify->coll, NULL, verify->after, verify->before,
									ForwardScanDirection, verify->snapshot);
	TupleTableSlot *slot;

	es_work_phase("reading events", count_positions(verify));
	while ((slot = es_match_next(match)) != NULL)
	{
		MemoryContext caller = MemoryContextSwitchTo(verify->row_context);

		CHECK_FOR_INTERRUPTS();
		es_work_done(check_event(verify, slot, row) - verify->after);
		MemoryContextSwitchTo(caller);
		MemoryContextReset(verify->row_context);
	}
	es_match_end(match);
	ExecDropSingleTupleTableSlot(row);
}

static Tuplesortstate *
begin_sort(TupleDesc desc)
{
	AttrNumber columns[] = {SORT_STREAM, SORT_POSITION};
	Oid		   operators[] = {TextLessOperator, Int8LessOperator};
	Oid		   collations[] = {C_COLLATION_OID, InvalidOid};
	bool	   nulls_first[] = {false, false};

	return tuplesort_begin_heap(desc, lengthof(columns), columns, operators, collations,
								nulls_first, work_mem, NULL, TUPLESORT_NONE);
}

static TupleDesc
make_sort_desc(void)
{
	TupleDesc desc = CreateTemplateTupleDesc(SORT_NATTS);

	TupleDescInitEntry(desc, SORT_STREAM, "stream", TEXTOID, -1, 0);
	TupleDescInitEntryCollation(desc, SORT_STREAM, C_COLLATION_OID);
	TupleDescInitEntry(desc, SORT_POSITION, "position", INT8OID, -1, 0);
	TupleDescInitEntry(desc, SORT_VERSION, "version", INT8OID, -1, 0);
	return desc;
}

/* ---------------------------------------------------------------------------
 * Stream by stream
 * ------------------------------------------------------------------------- */

static bool
in_range(const Verify *verify, EsPosition position)
{
	return position > verify->after && position < verify->before;
}

/* To the next row of the heads table that stands for a stream. */
static void
next_head(Verify *verify)
{
	Head		   *head = &verify->head;
	TupleTableSlot *slot;

	if (head->stream != NULL)
		pfree(head->stream);
	head->stream = NULL;
	while (head->stream == NULL && (slot = es_lookup_next(verify->heads)) != NULL)
	{
		slot_getsomeattrs(slot, ES_HEADS_LAST_POSITION);
		head->version = DatumGetInt64(slot->tts_values[ES_HEADS_VERSION - 1]);
		if (head->version == 0)
			continue; /* a lock of this very transaction */
		head->stream = DatumGetTextPCopy(slot->tts_values[ES_HEADS_STREAM - 1]);
		head->first_position =
			DatumGetInt64(slot->tts_values[ES_HEADS_FIRST_POSITION - 1]);
		head->last_position = DatumGetInt64(slot->tts_values[ES_HEADS_LAST_POSITION - 1]);
	}
}

/* A head without events in the range has to point out of it. */
static void
check_head_alone(Verify *verify)
{
	const Head *head = &verify->head;

	if (in_range(verify, head->last_position))
		put_fault(verify, head->last_position, head->stream, head->version,
				  "the heads table names this event, but the stream has none here");
}

/* Passes the heads before this stream; true where the walk stands at its own. */
static bool
find_head(Verify *verify, const text *stream)
{
	while (verify->head.stream != NULL)
	{
		int order = es_bytes_compare(verify->head.stream, stream);

		if (order >= 0)
			return order == 0;
		CHECK_FOR_INTERRUPTS();
		check_head_alone(verify);
		next_head(verify);
	}
	return false;
}

/* The first event of a stream in the range. */
static void
begin_stream(Verify *verify, const text *stream, EsPosition position, int64 version)
{
	const Head *head = &verify->head;
	size_t		size = VARSIZE_ANY(stream);

	verify->events.stream = memcpy(palloc(size), stream, size);
	if (!find_head(verify, stream))
		put_fault(verify, position, stream, version,
				  "the stream has no row in the heads table");
	else if (version == 1 && position != head->first_position)
		put_fault(
			verify, position, stream, version,
			psprintf(
				"the heads table says that the stream begins at position " INT64_FORMAT,
				head->first_position));
	else if (version != 1 && in_range(verify, head->first_position))
		put_fault(verify, position, stream, version,
				  "the stream does not begin with version 1");
}

/* The range has no more events of the stream: its head has to agree. */
static void
end_stream(Verify *verify)
{
	StreamSummary *events = &verify->events;
	const Head	  *head = &verify->head;

	if (events->stream == NULL)
		return;
	if (head->stream != NULL && es_bytes_compare(head->stream, events->stream) == 0)
	{
		bool agrees = head->last_position >= verify->before
						  ? head->version > events->last_version
						  : head->version == events->last_version &&
								head->last_position == events->last_position;

		if (!agrees)
			put_fault(
				verify, events->last_position, events->stream, events->last_version,
				psprintf(
					"the heads table says that the last event is version " INT64_FORMAT
					" at position " INT64_FORMAT,
					head->version, head->last_position));
		next_head(verify);
	}
	pfree(events->stream);
	events->stream = NULL;
}

static void
check_version(Verify *verify, const text *stream, EsPosition position, int64 version)
{
	StreamSummary *events = &verify->events;

	if (events->stream != NULL && es_bytes_compare(events->stream, stream) != 0)
		end_stream(verify);
	if (events->stream == NULL)
		begin_stream(verify, stream, position, version);
	else if (version != events->last_version + 1)
		put_fault(verify, position, stream, version,
				  psprintf("version " INT64_FORMAT " follows version " INT64_FORMAT,
						   version, events->last_version));
	events->last_position = position;
	events->last_version = version;
}

static void
check_streams(Verify *verify)
{
	TupleTableSlot *row =
		MakeSingleTupleTableSlot(verify->sort_desc, &TTSOpsMinimalTuple);
	int64 n = 0;

	es_work_phase("comparing streams", verify->nstreamed);
	tuplesort_performsort(verify->sort);
	verify->heads = es_lookup_begin(verify->coll->heads, &es_index_of_streams, NULL, 0,
									ForwardScanDirection, verify->snapshot);
	next_head(verify);
	while (tuplesort_gettupleslot(verify->sort, true, false, row, NULL))
	{
		CHECK_FOR_INTERRUPTS();
		es_work_done(++n);
		slot_getallattrs(row);
		check_version(verify, DatumGetTextPP(row->tts_values[SORT_STREAM - 1]),
					  DatumGetInt64(row->tts_values[SORT_POSITION - 1]),
					  DatumGetInt64(row->tts_values[SORT_VERSION - 1]));
	}
	end_stream(verify);
	for (; verify->head.stream != NULL; next_head(verify))
	{
		CHECK_FOR_INTERRUPTS();
		check_head_alone(verify);
	}
	es_lookup_end(verify->heads);
	ExecDropSingleTupleTableSlot(row);
}

void
es_verify_collection(ReturnSetInfo *result, Oid collection, EsPosition after,
					 EsPosition before)
{
	Verify verify = {0};

	verify.result = result;
	verify.coll = es_read_open_collection(collection);
	if (es_collection_row_security(verify.coll))
		ereport(
			ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("cannot verify collection \"%s\" under row-level security",
					get_rel_name(verify.coll->relid)),
			 errdetail(
				 "Whoever does not see every event cannot tell whether one is missing."),
			 errhint("Call it as a role that row-level security does not apply to.")));

	verify.snapshot = es_read_snapshot(verify.coll);
	verify.after = Max(after, verify.coll->first_position - 1);
	verify.before = before;
	verify.sort_desc = make_sort_desc();
	verify.sort = begin_sort(verify.sort_desc);
	verify.row_context = AllocSetContextCreate(
		CurrentMemoryContext, "eventstore verify row", ALLOCSET_DEFAULT_SIZES);
	check_events(&verify);
	check_streams(&verify);
	tuplesort_end(verify.sort);
	UnregisterSnapshot(verify.snapshot);
}
