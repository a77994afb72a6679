/*
 * collection/append.c
 *		append, append_batch, append_array.
 *
 * One call goes through these steps, each a function below:
 *
 *	1.	check and complete the events (event.c)
 *	2.	register the intent: labels, and the condition where there is fail_if.
 *		Waits for appends that matter to it (position/head.c).
 *	3.	lock the streams, in bytewise order, so that two batches cannot deadlock
 *		(who records a store's changes decides now which events they are)
 *	4.	check versions against the locked rows
 *	5.	check the condition with a snapshot taken after all locks
 *	6.	allot positions; make or await a segment where they do not fit
 *	7.	write the streams' new last versions
 *	8.	write the rows: past the executor where nothing of the user's needs it,
 *		else as an INSERT
 *
 * Nothing is spent before step 6, so an append that is refused by its own
 * checks leaves no gap.  Nothing is visible before the transaction commits;
 * an error anywhere undoes all of it with the (sub)transaction, except that
 * positions stay spent.
 *
 * A check that fails may be the repetition of an append whose answer got lost.
 * If the event that stands in the way bears the id of one of ours, the first
 * append's events are compared with this one's ids, one by one from where the
 * first would have begun, and its results returned.
 *
 * Lock order: collection (RowExclusive), intents, streams (bytewise), the
 * head's LWLock, segments.
 */
#include "postgres.h"

#include "collection/append.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/hio.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_am.h"
#include "catalog/pg_type.h"
#include "collection/entries.h"
#include "collection/heads.h"
#include "collection/label_index.h"
#include "collection/layout.h"
#include "collection/match.h"
#include "collection/segment.h"
#include "collection/sorting.h"
#include "compat.h"
#include "errors.h"
#include "executor/executor.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/execnodes.h"
#include "shmem.h"
#include "spi.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/typcache.h"

/*
 * Rows written together: so many that their entries come close together in each
 * index, of events that can be held in memory once more.
 */
#define CHUNK_EVENTS 10000
#define CHUNK_BYTES	 (8 * 1024 * 1024)

/* Rows from which on a ring of buffers and places remembered pay. */
#define BULK_EVENTS 1000

typedef struct AppendRun
{
	EsAppend	 *append;
	EsCollection *coll;
	int			  nstreams;
	EsStreamHead *streams; /* bytewise order */
	EsHeads		 *heads;   /* NULL without streams */
	EsAllotment	  allotment;
} AppendRun;

/* ---------------------------------------------------------------------------
 * Streams
 * ------------------------------------------------------------------------- */

/* The distinct streams, in order; each event learns the number of its own. */
static void
collect_streams(AppendRun *run)
{
	EsAppend *append = run->append;
	EsEvent **events =
		palloc_extended(sizeof(EsEvent *) * append->nevents, MCXT_ALLOC_HUGE);
	struct varlena **streams =
		palloc_extended(sizeof(struct varlena *) * append->nevents, MCXT_ALLOC_HUGE);
	uint32 *order;
	text   *last = NULL;
	int		n = 0;

	for (int i = 0; i < append->nevents; i++)
	{
		append->events[i].stream_index = -1;
		if (append->events[i].stream == NULL)
			continue;
		streams[n] = append->events[i].stream;
		events[n++] = &append->events[i];
	}
	order = es_sort_bytes(streams, n);
	run->streams = palloc_extended(sizeof(EsStreamHead) * (n + 1),
								   MCXT_ALLOC_HUGE | MCXT_ALLOC_ZERO);
	for (int i = 0; i < n; i++)
	{
		EsEvent *event = events[order[i]];

		if (last == NULL || !es_text_equal(last, event->stream))
		{
			run->streams[run->nstreams].is_new = event->stream_is_new;
			run->streams[run->nstreams++].stream = event->stream;
		}
		event->stream_index = run->nstreams - 1;
		last = event->stream;
	}
	pfree(order);
	pfree(events);
	pfree(streams);
}

static void
lock_streams(AppendRun *run)
{
	if (run->nstreams == 0)
		return;
	run->heads = es_heads_begin(run->coll);
	if (run->nstreams == 1 && !run->streams[0].is_new)
		es_heads_lock(run->heads, &run->streams[0]);
	else
		es_heads_lock_all(run->heads, run->streams, run->nstreams);

	/* What was inserted as a placeholder is to be updated in step 7. */
	CommandCounterIncrement();
}

static void
save_streams(AppendRun *run)
{
	EsAppend *append = run->append;

	if (run->nstreams == 0)
		return;
	for (int i = 0; i < append->nevents; i++)
	{
		EsEvent		 *event = &append->events[i];
		EsStreamHead *head;

		if (event->stream_index < 0)
			continue;
		head = &run->streams[event->stream_index];
		if (event->version == 1)
		{
			head->first_position = event->position;
			head->first_at = event->created_at;
		}
		head->version = event->version;
		head->last_position = event->position;
		head->last_at = event->created_at;
	}
	es_heads_save_all(run->heads, run->streams, run->nstreams);
}

/* ---------------------------------------------------------------------------
 * Recognising a repetition
 * ------------------------------------------------------------------------- */

static bool
all_ids_given(const EsAppend *append)
{
	for (int i = 0; i < append->nevents; i++)
		if (!append->events[i].id_given)
			return false;
	return true;
}

static bool
same_id(const pg_uuid_t *id, TupleTableSlot *slot)
{
	bool  isnull;
	Datum value = slot_getattr(slot, ES_ATT_ID, &isnull);

	return !isnull && memcmp(id->data, DatumGetUUIDP(value)->data, UUID_LEN) == 0;
}

/*
 * Are the events from 'first' on ours, one by one?  Then their positions and
 * versions are the answer.
 */
static bool
is_repetition(AppendRun *run, EsPosition first, Snapshot snapshot)
{
	EsAppend	   *append = run->append;
	EsMatch		   *match;
	TupleTableSlot *slot;
	int				n = 0;

	if (first < run->coll->first_position)
		return false;
	match = es_match_begin(run->coll, NULL, first - 1, first + append->nevents,
						   ForwardScanDirection, snapshot);
	while ((slot = es_match_next(match)) != NULL)
	{
		bool	 isnull;
		EsEvent *event = &append->events[n];
		Datum	 version;

		if (n >= append->nevents || !same_id(&event->id, slot) ||
			DatumGetInt64(slot_getattr(slot, ES_ATT_POSITION, &isnull)) != first + n)
			break;
		event->position = first + n;
		version = slot_getattr(slot, ES_ATT_VERSION, &isnull);
		event->version = isnull ? 0 : DatumGetInt64(version);
		n++;
	}
	es_match_end(match);
	if (n < append->nevents)
		return false;
	es_head_count(&run->coll->head, ES_STAT_RETRIES, 1);
	return true;
}

/* The index on (stream, version) of a segment; InvalidOid where it was dropped. */
static Oid
stream_index_of(Relation segment)
{
	List	 *indexes = RelationGetIndexList(segment);
	ListCell *lc;
	Oid		  found = InvalidOid;

	foreach (lc, indexes)
	{
		Relation	  index = index_open(lfirst_oid(lc), AccessShareLock);
		Form_pg_index form = index->rd_index;

		if (index->rd_rel->relam == BTREE_AM_OID && form->indisvalid &&
			form->indnkeyatts >= 2 && form->indkey.values[0] == ES_ATT_STREAM &&
			form->indkey.values[1] == ES_ATT_VERSION)
			found = RelationGetRelid(index);
		index_close(index, AccessShareLock);
		if (OidIsValid(found))
			break;
	}
	list_free(indexes);
	return found;
}

/* The position of one version of a stream within a segment; 0. */
static EsPosition
find_version_in(Oid segment, const text *stream, int64 version, Snapshot snapshot)
{
	Relation   rel = table_open(segment, AccessShareLock);
	Oid		   index_oid = stream_index_of(rel);
	EsPosition position = 0;

	es_layout_check(rel);
	if (OidIsValid(index_oid))
	{
		Relation		index = index_open(index_oid, AccessShareLock);
		TupleTableSlot *slot = table_slot_create(rel, NULL);
		IndexScanDesc	scan = es_index_beginscan(rel, index, snapshot, 2);
		ScanKeyData		keys[2];

		ScanKeyInit(&keys[0], 1, BTEqualStrategyNumber, F_TEXTEQ,
					PointerGetDatum(stream));
		keys[0].sk_collation = index->rd_indcollation[0];
		ScanKeyInit(&keys[1], 2, BTEqualStrategyNumber, F_INT8EQ, Int64GetDatum(version));
		index_rescan(scan, keys, 2, NULL, 0);
		if (index_getnext_slot(scan, ForwardScanDirection, slot))
		{
			bool isnull;

			position = DatumGetInt64(slot_getattr(slot, ES_ATT_POSITION, &isnull));
		}
		index_endscan(scan);
		ExecDropSingleTupleTableSlot(slot);
		index_close(index, AccessShareLock);
	}
	table_close(rel, AccessShareLock);
	return position;
}

static EsPosition
find_version(AppendRun *run, const EsStreamHead *head, int64 version, Snapshot snapshot)
{
	int		   n = run->coll->nsegments;
	EsSegment *segments = palloc(sizeof(EsSegment) * (n + 1));
	EsPosition position = 0;

	memcpy(segments, run->coll->segments, sizeof(EsSegment) * n);
	for (int i = n - 1; i >= 0 && position == 0; i--)
		if (segments[i].first <= head->last_position &&
			segments[i].end > head->first_position)
			position =
				find_version_in(segments[i].relid, head->stream, version, snapshot);
	pfree(segments);
	return position;
}

/* Was the event that took the expected place our own event number 'i'? */
static bool
repeats_version(AppendRun *run, int i, const EsStreamHead *head, int64 expected)
{
	Snapshot   snapshot;
	EsPosition position;
	bool	   repeated = false;

	if (head->version <= expected || !all_ids_given(run->append))
		return false;
	snapshot = RegisterSnapshot(GetLatestSnapshot());
	position = find_version(run, head, expected + 1, snapshot);
	if (position > i)
		repeated = is_repetition(run, position - i, snapshot);
	UnregisterSnapshot(snapshot);
	return repeated;
}

/* Is the first event that matches the condition one of ours? */
static bool
repeats_match(AppendRun *run, EsPosition position, const pg_uuid_t *id, Snapshot snapshot)
{
	EsAppend *append = run->append;

	if (!all_ids_given(append))
		return false;
	for (int i = 0; i < append->nevents; i++)
		if (memcmp(append->events[i].id.data, id->data, UUID_LEN) == 0)
			return position > i && is_repetition(run, position - i, snapshot);
	return false;
}

/* ---------------------------------------------------------------------------
 * Checks
 * ------------------------------------------------------------------------- */

static void
report_version_conflict(AppendRun *run, const EsStreamHead *head, int64 expected,
						int64 actual)
{
	es_head_count(&run->coll->head, ES_STAT_VERSION_CONFLICTS, 1);
	ereport(
		ERROR,
		(errcode(ERRCODE_ES_VERSION_CONFLICT),
		 errmsg("version conflict in collection \"%s\"", get_rel_name(run->coll->relid)),
		 errdetail("Stream \"%s\": expected version " INT64_FORMAT
				   ", actual version " INT64_FORMAT ".",
				   text_to_cstring(head->stream), expected, actual),
		 errhint(
			 "Read the stream again, decide again, and append with its new version.")));
}

/*
 * Gives each event its version, expecting what is to be expected.  True where
 * the whole append is recognised as a repetition.
 */
static bool
check_versions(AppendRun *run)
{
	EsAppend *append = run->append;
	int64	 *versions = palloc(sizeof(int64) * (run->nstreams + 1));
	bool	  repeated = false;

	for (int i = 0; i < run->nstreams; i++)
		versions[i] = run->streams[i].version;

	for (int i = 0; i < append->nevents && !repeated; i++)
	{
		EsEvent *event = &append->events[i];
		int64	 wanted[2] = {i == 0 ? append->expected_version : ES_NO_VERSION,
						   event->expected_version};
		int64 version;

		if (event->stream_index < 0)
			continue;
		version = versions[event->stream_index];
		for (int k = 0; k < 2 && !repeated; k++)
		{
			EsStreamHead *head = &run->streams[event->stream_index];

			if (wanted[k] == ES_NO_VERSION || wanted[k] == version)
				continue;
			repeated = repeats_version(run, i, head, wanted[k]);
			if (!repeated)
				report_version_conflict(run, head, wanted[k], version);
		}
		if (!repeated) /* else it has the first append's version */
			event->version = ++versions[event->stream_index];
	}
	pfree(versions);
	return repeated;
}

/* A row that came past our triggers (by replication) may lack what it should have. */
static void
copy_id(pg_uuid_t *id, Datum value, bool isnull)
{
	if (isnull)
		memset(id, 0, sizeof(*id));
	else
		*id = *DatumGetUUIDP(value);
}

/* The first visible event after the position that matches; 0. */
static EsPosition
find_match(AppendRun *run, Snapshot snapshot, pg_uuid_t *id)
{
	EsAppend  *append = run->append;
	EsPosition after =
		append->after_given ? append->after : run->coll->first_position - 1;
	EsPosition position = 0;
	EsMatch	  *match = es_match_begin(run->coll, append->fail_if, after, PG_INT64_MAX,
									  ForwardScanDirection, snapshot);
	TupleTableSlot *slot = es_match_next(match);

	if (slot != NULL)
	{
		bool isnull;

		position = DatumGetInt64(slot_getattr(slot, ES_ATT_POSITION, &isnull));
		copy_id(id, slot_getattr(slot, ES_ATT_ID, &isnull), isnull);
	}
	es_match_end(match);
	return position;
}

/* The same by SQL, for a caller who may see only some of the events. */
static EsPosition
find_match_by_sql(AppendRun *run, Snapshot snapshot, pg_uuid_t *id)
{
	EsAppend  *append = run->append;
	EsPosition position = 0;
	Oid		   types[1] = {INT8OID};
	Datum	   values[1];
	SPIPlanPtr plan;
	char	  *sql;

	sql = psprintf("SELECT position, id FROM %s WHERE position OPERATOR(pg_catalog.>) $1 "
				   "AND %s ORDER BY position LIMIT 1",
				   es_collection_name(run->coll), es_query_to_sql(append->fail_if));
	values[0] = Int64GetDatum(append->after_given ? append->after
												  : run->coll->first_position - 1);
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	plan = SPI_prepare(sql, 1, types);
	if (plan == NULL ||
		SPI_execute_snapshot(plan, values, NULL, snapshot, InvalidSnapshot, true, false,
							 1) != SPI_OK_SELECT)
		elog(ERROR, "could not check an append condition: %s",
			 SPI_result_code_string(SPI_result));
	if (SPI_processed > 0)
	{
		bool  isnull;
		Datum value;

		position = DatumGetInt64(
			SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
		value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull);
		copy_id(id, value, isnull);
	}
	SPI_finish();
	return position;
}

/*
 * The snapshot comes after all locks, whatever the isolation level: an event
 * that the transaction's own snapshot does not see still fails the condition.
 * Invalidations come before it, or an event in a new segment would be missed.
 */
static bool
check_condition(AppendRun *run)
{
	Snapshot   snapshot;
	EsPosition position;
	pg_uuid_t  id;
	bool	   repeated;

	/* Rows that the statement around us has written so far count too. */
	CommandCounterIncrement();
	AcceptInvalidationMessages();
	es_collection_get(run->coll->relid);
	snapshot = RegisterSnapshot(GetLatestSnapshot());
	if (es_collection_row_security(run->coll))
		position = find_match_by_sql(run, snapshot, &id);
	else
		position = find_match(run, snapshot, &id);
	repeated = position > 0 && repeats_match(run, position, &id, snapshot);
	UnregisterSnapshot(snapshot);
	if (position == 0 || repeated)
		return repeated;

	es_head_count(&run->coll->head, ES_STAT_CONDITION_FAILURES, 1);
	ereport(ERROR,
			(errcode(ERRCODE_ES_CONDITION_FAILED),
			 errmsg("append condition failed in collection \"%s\"",
					get_rel_name(run->coll->relid)),
			 errdetail("The event at position " INT64_FORMAT " matches.", position),
			 errhint("After a rollback, wait_for(collection, " INT64_FORMAT
					 ") returns when it can be read; then read, decide and append again.",
					 position - 1)));
	return false;
}

/* What the arguments must fulfil before anything is locked. */
static void
check_arguments(AppendRun *run)
{
	EsAppend *append = run->append;

	if (append->expected_version != ES_NO_VERSION &&
		(run->nstreams != 1 || append->events[0].stream_index < 0))
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("expected_version needs one stream that all events name"),
						errdetail("The events name %d streams.", run->nstreams),
						errhint("A version can be expected of each stream by the events' "
								"own field expected_version.")));
	for (int i = 0; i < append->nevents; i++)
	{
		EsEvent *event = &append->events[i];

		if (append->expected_version != ES_NO_VERSION && event->stream_index < 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("expected_version needs one stream that all events name"),
					 errdetail("Event %d names none.", i)));
		if (event->expected_version != ES_NO_VERSION && event->stream_index < 0)
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							errmsg("expected_version of an event needs a stream"),
							errdetail("Event %d names none.", i)));
	}
	if (append->after_given)
	{
		if (append->fail_if == NULL)
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							errmsg("\"after\" needs \"fail_if\"")));
		es_collection_check_cursor(run->coll, append->after);
	}
}

/* ---------------------------------------------------------------------------
 * Intent and positions
 * ------------------------------------------------------------------------- */

static void
register_intent(AppendRun *run)
{
	EsAppend   *append = run->append;
	EsIntent	intent = {0};
	EsCondition condition;
	EsLabel	   *labels;
	int room = run->nstreams + es_events_count_labels(append->events, append->nevents);
	int n = 0;

	labels = palloc_extended(sizeof(EsLabel) * room, MCXT_ALLOC_HUGE);
	for (int i = 0; i < append->nevents; i++)
		n += es_event_labels(append->events[i].type, append->events[i].tags, labels + n);
	n = es_labels_sort(labels, n);

	/* Behind them the streams'. */
	for (int i = 0; i < run->nstreams; i++)
		labels[n + i] = es_label_of_stream(run->streams[i].stream);

	intent.labels = labels;
	intent.nlabels = n;
	intent.streams = labels + n;
	intent.nstreams = run->nstreams;
	if (append->fail_if != NULL)
	{
		es_query_to_condition(append->fail_if, &condition);
		intent.condition = &condition;
	}
	es_head_register(&run->coll->head, &intent);
	pfree(labels);
}

static void
allot_positions(AppendRun *run)
{
	EsAppend	 *append = run->append;
	EsCollection *coll = run->coll;

	while (!es_head_allot(&coll->head, append->nevents, append->fail_if != NULL,
						  &run->allotment))
		es_segments_await(coll, es_head_last_allotted(&coll->head) + append->nevents + 1);
	for (int i = 0; i < append->nevents; i++)
		append->events[i].position = run->allotment.first + i;
}

/* ---------------------------------------------------------------------------
 * Writing
 * ------------------------------------------------------------------------- */

/* One segment, open for writing. */
typedef struct SegmentWriter
{
	Relation		 rel;
	EState			*estate;
	ResultRelInfo	*rri;
	TupleDesc		 desc;
	TupleTableSlot **slots;
	int				 nslots; /* made so far */
	BulkInsertState	 bulk;	 /* NULL for few */
} SegmentWriter;

static void
open_writer(SegmentWriter *writer, Relation rel, int nevents)
{
	writer->rel = rel;
	writer->estate = CreateExecutorState();
	writer->rri = makeNode(ResultRelInfo);
	InitResultRelInfo(writer->rri, rel, 0, NULL, 0);
	ExecOpenIndices(writer->rri, false);
	writer->nslots = 0;
	writer->slots = palloc(sizeof(TupleTableSlot *) * Min(nevents, CHUNK_EVENTS));
	/* A copy is not reference-counted, which a thousand slots would feel. */
	writer->desc = CreateTupleDescCopy(RelationGetDescr(rel));
	writer->bulk = nevents >= BULK_EVENTS ? GetBulkInsertState() : NULL;
}

static void
close_writer(SegmentWriter *writer)
{
	if (writer->bulk != NULL)
		FreeBulkInsertState(writer->bulk);
	for (int i = 0; i < writer->nslots; i++)
		ExecDropSingleTupleTableSlot(writer->slots[i]);
	ExecCloseIndices(writer->rri);
	FreeExecutorState(writer->estate);
	table_close(writer->rel, NoLock);
}

/* How many of the events come into the next chunk; at least one. */
static int
chunk_length(const EsEvent *events, int n)
{
	Size bytes = 0;
	int	 length = 0;

	n = Min(n, CHUNK_EVENTS);
	while (length < n && bytes < CHUNK_BYTES)
		bytes += es_event_bytes(&events[length++]);
	return length;
}

static TupleTableSlot *
writer_slot(SegmentWriter *writer, int number)
{
	if (number == writer->nslots)
		writer->slots[writer->nslots++] =
			MakeSingleTupleTableSlot(writer->desc, table_slot_callbacks(writer->rel));
	return ExecClearTuple(writer->slots[number]);
}

static void
write_chunk(SegmentWriter *writer, const EsEvent *events, int n, EsPosition safe)
{
	CommandId cid = GetCurrentCommandId(true);

	for (int i = 0; i < n; i++)
	{
		TupleTableSlot *slot = writer_slot(writer, i);

		es_event_values(&events[i], safe, slot->tts_tupleDescriptor->natts,
						slot->tts_values, slot->tts_isnull);
		ExecStoreVirtualTuple(slot);
		slot->tts_tableOid = RelationGetRelid(writer->rel);
		if (writer->rel->rd_att->constr != NULL)
			ExecConstraints(writer->rri, slot, writer->estate);
	}
	if (n == 1)
		table_tuple_insert(writer->rel, writer->slots[0], cid, 0, writer->bulk);
	else
		table_multi_insert(writer->rel, writer->slots, n, cid, 0, writer->bulk);
	es_entries_insert(writer->rri, writer->estate, events, writer->slots, n);
}

/* The events from 'start' on that belong to the segment; returns how many. */
static int
write_segment(AppendRun *run, Relation rel, int start, int n)
{
	SegmentWriter  writer;
	const EsEvent *events = &run->append->events[start];
	int			   length;

	es_layout_check(rel);
	open_writer(&writer, rel, n);
	for (int done = 0; done < n; done += length)
	{
		CHECK_FOR_INTERRUPTS();
		length = chunk_length(&events[done], n - done);
		write_chunk(&writer, &events[done], length, run->allotment.safe);
	}
	close_writer(&writer);
	return n;
}

/*
 * The segment of a position that was just allotted.  It was published only
 * after its invalidations went out, so accepting them is enough to find it.
 */
static EsSegment
segment_for(AppendRun *run, EsPosition position)
{
	const EsSegment *segment = es_collection_segment(run->coll, position);

	if (segment == NULL)
	{
		AcceptInvalidationMessages();
		es_collection_get(run->coll->relid);
		segment = es_collection_segment(run->coll, position);
	}
	if (segment == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the last segment of collection \"%s\" is missing",
						get_rel_name(run->coll->relid)),
				 errdetail("No segment holds position " INT64_FORMAT ".", position),
				 errhint("Attach it again with ALTER TABLE ... ATTACH PARTITION, or call "
						 "eventstore.repair_collection().")));
	return *segment;
}

/* As an INSERT, under the caller's rights, with all that the user has added. */
static void
write_by_sql(AppendRun *run)
{
	EsAppend *append = run->append;
	TupleDesc desc =
		lookup_rowtype_tupdesc(get_rel_type_id(es_extension_relation("event")), -1);
	Oid	   array_type = get_array_type(desc->tdtypeid);
	Datum *rows = palloc(sizeof(Datum) * append->nevents);
	Datum  values[ES_COLLECTION_NATTS];
	bool   nulls[ES_COLLECTION_NATTS];
	Datum  array;
	int	   mark = es_insert_mark();
	char  *sql;

	for (int i = 0; i < append->nevents; i++)
	{
		es_event_values(&append->events[i], 0, ES_COLLECTION_NATTS, values, nulls);
		rows[i] = heap_copy_tuple_as_datum(heap_form_tuple(desc, values, nulls), desc);
		es_insert_expect(run->coll, &append->events[i], run->allotment.safe);
	}
	array = PointerGetDatum(construct_array(rows, append->nevents, desc->tdtypeid, -1,
											false, TYPALIGN_DOUBLE));
	ReleaseTupleDesc(desc);

	sql = psprintf("INSERT INTO %s (position, stream, version, id, type, tags, data, "
				   "body, metadata, created_at) "
				   "SELECT position, stream, version, id, type, tags, data, body, "
				   "metadata, created_at "
				   "FROM pg_catalog.unnest($1)",
				   es_collection_name(run->coll));
	/* The executor routes by the partitions that this backend knows of. */
	AcceptInvalidationMessages();
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	es_spi_execute(sql, 1, &array_type, &array, NULL, false, SPI_OK_INSERT);
	if (SPI_processed != (uint64) append->nevents)
		ereport(ERROR, (errcode(ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION),
						errmsg("a trigger of collection \"%s\" suppressed an event",
							   get_rel_name(run->coll->relid)),
						errdetail("Of %d events " UINT64_FORMAT " were inserted.",
								  append->nevents, SPI_processed)));
	SPI_finish();
	es_insert_forget_from(mark);
}

/* The caller of one who records may lack the right; the collection's owner has it. */
static void
write_by_sql_as_owner(AppendRun *run)
{
	EsRoleSwitch saved;

	es_role_assume(es_relation_owner(run->coll->relid), &saved);
	write_by_sql(run);
	es_role_restore(&saved);
}

/* Does every segment that the batch goes to allow it? */
static bool
may_write_past_executor(AppendRun *run)
{
	EsAppend  *append = run->append;
	EsPosition position = append->events[0].position;
	EsPosition last = position + append->nevents - 1;

	if (!run->coll->plain ||
		(!append->recording && es_collection_row_security(run->coll)))
		return false;
	while (position <= last)
	{
		EsSegment segment = segment_for(run, position);
		Relation  rel = table_open(segment.relid, RowExclusiveLock);
		bool	  plain = es_collection_segment_plain(run->coll, rel);

		table_close(rel, NoLock);
		if (!plain)
			return false;
		position = segment.end;
	}
	return true;
}

/* Positions grow, so a segment takes a run of events. */
static void
write_events(AppendRun *run)
{
	EsAppend *append = run->append;
	int		  start = 0;

	if (!may_write_past_executor(run))
	{
		if (append->recording)
			write_by_sql_as_owner(run);
		else
			write_by_sql(run);
		return;
	}
	while (start < append->nevents)
	{
		EsSegment segment = segment_for(run, append->events[start].position);
		Relation  rel = table_open(segment.relid, RowExclusiveLock);
		int		  n = (int) Min((int64) (append->nevents - start),
								segment.end - append->events[start].position);

		start += write_segment(run, rel, start, n);
	}
}

/* ---------------------------------------------------------------------------
 * The whole
 * ------------------------------------------------------------------------- */

static void
run_steps(AppendRun *run)
{
	EsAppend *append = run->append;

	register_intent(run);
	lock_streams(run);
	if (append->settle != NULL)
		append->settle(append, run->streams);
	if (append->nevents == 0 || check_versions(run))
		return;
	if (append->fail_if != NULL && check_condition(run))
		return;
	allot_positions(run);
	/* Before the rows: a trigger of theirs may append to the same streams. */
	save_streams(run);
	CommandCounterIncrement();
	write_events(run);

	es_head_count(&run->coll->head, ES_STAT_APPENDS, 1);
	es_head_count(&run->coll->head, ES_STAT_EVENTS, append->nevents);
}

void
es_append_run(EsAppend *append)
{
	AppendRun run = {append, append->coll};

	if (!append->recording)
	{
		es_collection_check_acl(append->coll, ACL_INSERT);
		es_collection_refuse_changelog(append->coll);
	}
	if (append->fail_if != NULL)
		es_collection_check_acl(append->coll, ACL_SELECT);
	es_collection_load_head_for_append(append->coll);
	for (int i = 0; i < append->nevents; i++)
		es_event_check(&append->events[i]);
	collect_streams(&run);
	if (append->nevents > 0)
		check_arguments(&run);
	if (append->nevents == 0)
		return;

	run_steps(&run);
	if (run.heads != NULL)
		es_heads_end(run.heads);
	/* What the next statement or function reads must see it. */
	CommandCounterIncrement();
}

/* ---------------------------------------------------------------------------
 * SQL
 * ------------------------------------------------------------------------- */

PG_FUNCTION_INFO_V1(es_append);
PG_FUNCTION_INFO_V1(es_append_batch);
PG_FUNCTION_INFO_V1(es_append_array);

static Oid
collection_arg(FunctionCallInfo fcinfo)
{
	if (PG_ARGISNULL(0))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
						errmsg("collection must not be null")));
	return PG_GETARG_OID(0);
}

static int64
version_arg(FunctionCallInfo fcinfo, int n)
{
	int64 version;

	if (PG_ARGISNULL(n))
		return ES_NO_VERSION;
	version = PG_GETARG_INT64(n);
	if (version < 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("expected_version must not be negative"),
						errdetail("It is " INT64_FORMAT ".", version)));
	return version;
}

/* Arguments expected_version, fail_if and after stand one behind the other. */
static void
read_guards(EsAppend *append, FunctionCallInfo fcinfo, int version_arg_no, int fail_if_no)
{
	append->expected_version = version_arg(fcinfo, version_arg_no);
	if (!PG_ARGISNULL(fail_if_no))
		append->fail_if = es_query_from_jsonb(PG_GETARG_JSONB_P(fail_if_no), "fail_if");
	append->after_given = !PG_ARGISNULL(fail_if_no + 1);
	if (append->after_given)
	{
		append->after = PG_GETARG_INT64(fail_if_no + 1);
		if (append->after < 0)
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							errmsg("\"after\" must not be negative"),
							errdetail("It is " INT64_FORMAT ".", append->after)));
	}
}

static void
begin_append(EsAppend *append, FunctionCallInfo fcinfo)
{
	es_require_preloaded();
	PreventCommandIfReadOnly("append");
	PreventCommandIfParallelMode("append");
	append->coll = es_collection_open(collection_arg(fcinfo), RowExclusiveLock);
}

static void
result_values(const EsEvent *event, Datum *values, bool *nulls)
{
	values[0] = Int64GetDatum(event->position);
	values[1] = Int64GetDatum(event->version);
	values[2] = UUIDPGetDatum(&event->id);
	nulls[0] = false;
	nulls[1] = (event->stream == NULL);
	nulls[2] = false;
}

Datum
es_append(PG_FUNCTION_ARGS)
{
	EsAppend  append = {0};
	EsEvent	  event;
	TupleDesc desc;
	Datum	  values[3];
	bool	  nulls[3];

	memset(&event, 0, sizeof(event));
	event.expected_version = ES_NO_VERSION;
	event.type = PG_ARGISNULL(1) ? NULL : PG_GETARG_TEXT_PP(1);
	event.data = PG_ARGISNULL(2) ? NULL : PG_GETARG_JSONB_P(2);
	event.tags = PG_ARGISNULL(3) ? NULL : PG_GETARG_ARRAYTYPE_P(3);
	event.stream = PG_ARGISNULL(4) ? NULL : PG_GETARG_TEXT_PP(4);
	read_guards(&append, fcinfo, 5, 6);
	event.metadata = PG_ARGISNULL(8) ? NULL : PG_GETARG_JSONB_P(8);
	event.body = PG_ARGISNULL(9) ? NULL : PG_GETARG_BYTEA_P(9);
	event.id_given = !PG_ARGISNULL(10);
	if (event.id_given)
		event.id = *PG_GETARG_UUID_P(10);
	event.created_at_given = !PG_ARGISNULL(11);
	if (event.created_at_given)
		event.created_at = PG_GETARG_TIMESTAMPTZ(11);

	begin_append(&append, fcinfo);
	append.nevents = 1;
	append.events = &event;
	es_append_run(&append);

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	result_values(&event, values, nulls);
	PG_RETURN_DATUM(heap_copy_tuple_as_datum(
		heap_form_tuple(BlessTupleDesc(desc), values, nulls), desc));
}

static Datum
return_results(FunctionCallInfo fcinfo, const EsAppend *append)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	for (int i = 0; i < append->nevents; i++)
	{
		Datum values[3];
		bool  nulls[3];

		result_values(&append->events[i], values, nulls);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	return (Datum) 0;
}

Datum
es_append_batch(PG_FUNCTION_ARGS)
{
	EsAppend append = {0};
	Jsonb	*events;

	InitMaterializedSRF(fcinfo, 0);
	read_guards(&append, fcinfo, 2, 3);
	if (PG_ARGISNULL(1))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
						errmsg("events must not be null")));
	events = PG_GETARG_JSONB_P(1);
	if (!JB_ROOT_IS_ARRAY(events) || JB_ROOT_IS_SCALAR(events))
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("events must be an array of objects")));
	begin_append(&append, fcinfo);

	append.nevents = JB_ROOT_COUNT(events);
	append.events =
		palloc_extended(sizeof(EsEvent) * (append.nevents + 1), MCXT_ALLOC_HUGE);
	for (int i = 0; i < append.nevents; i++)
	{
		JsonbValue *elem = getIthJsonbValueFromContainer(&events->root, i);

		if (elem->type != jbvBinary || !JsonContainerIsObject(elem->val.binary.data))
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							errmsg("events must be an array of objects"),
							errdetail("Element %d is not an object.", i)));
		es_event_from_json(&append.events[i], elem->val.binary.data, i);
	}
	es_append_run(&append);
	return return_results(fcinfo, &append);
}

Datum
es_append_array(PG_FUNCTION_ARGS)
{
	EsAppend append = {0};
	Datum	*elems;
	bool	*nulls;

	InitMaterializedSRF(fcinfo, 0);
	read_guards(&append, fcinfo, 2, 3);
	if (PG_ARGISNULL(1))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
						errmsg("events must not be null")));
	begin_append(&append, fcinfo);

	deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), ARR_ELEMTYPE(PG_GETARG_ARRAYTYPE_P(1)),
					  -1, false, TYPALIGN_DOUBLE, &elems, &nulls, &append.nevents);
	append.events =
		palloc_extended(sizeof(EsEvent) * (append.nevents + 1), MCXT_ALLOC_HUGE);
	for (int i = 0; i < append.nevents; i++)
	{
		if (nulls[i])
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							errmsg("events must not contain nulls"),
							errdetail("Element %d is null.", i)));
		es_event_from_composite(&append.events[i], elems[i]);
	}
	es_append_run(&append);
	return return_results(fcinfo, &append);
}
