/*
 * feed/stream.c
 *		The last event of a stream or collection, and the inventory of streams.
 *
 * Both rest on the heads table, which has one row per stream.  It belongs to
 * the collection's owner and nobody else has rights on it; here it is read by
 * its index, past all rights, for whoever may SELECT from the collection.
 * Where row-level security applies that would show streams of events that the
 * user may not see, so there both answer from the events that he sees.
 *
 * A stream needs no head (design, section 5): its events are ordered by its
 * lock, so a snapshot will do.  The last event of a collection is the last one
 * at or below the head.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/stratnum.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "feed/lookup.h"
#include "feed/read.h"
#include "feed/visible.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"

/* ---------------------------------------------------------------------------
 * peek
 * ------------------------------------------------------------------------- */

/* To look at the last event is to read one event backward. */
PG_FUNCTION_INFO_V1(es_peek);
Datum
es_peek(PG_FUNCTION_ARGS)
{
	EsReadArgs args = {
		.collection = es_read_collection_arg(&fcinfo->args[0]),
		.direction = BackwardScanDirection,
		.max_count = 1,
		.before = ES_READ_END,
		.stream = PG_ARGISNULL(1) ? NULL : PG_GETARG_TEXT_PP(1),
	};
	EsRead		   *read = es_read_begin(&args);
	TupleTableSlot *slot = es_read_next(read);
	Datum			event = (Datum) 0;

	if (slot != NULL)
	{
		TupleDesc event_desc;

		if (get_call_result_type(fcinfo, NULL, &event_desc) != TYPEFUNC_COMPOSITE)
			elog(ERROR, "return type must be a row type");
		event = es_read_event_datum(slot, event_desc);
	}
	fcinfo->isnull = slot == NULL;
	es_read_end(read);
	return event;
}

/* ---------------------------------------------------------------------------
 * streams
 * ------------------------------------------------------------------------- */

/* Literally: no character of a prefix means anything but itself. */
static bool
has_prefix(Datum stream, const text *prefix)
{
	text *name = DatumGetTextPP(stream);
	int	  length = VARSIZE_ANY_EXHDR(prefix);
	bool  has = VARSIZE_ANY_EXHDR(name) >= length &&
			   memcmp(VARDATA_ANY(name), VARDATA_ANY(prefix), length) == 0;

	if ((Pointer) name != DatumGetPointer(stream))
		pfree(name);
	return has;
}

/* A row of version 0 is a lock that this transaction holds on a stream to be. */
static bool
has_event(TupleTableSlot *slot)
{
	bool isnull;

	return DatumGetInt64(slot_getattr(slot, ES_HEADS_VERSION, &isnull)) > 0;
}

static void
put_row(ReturnSetInfo *result, TupleTableSlot *slot)
{
	slot_getsomeattrs(slot, ES_HEADS_NATTS);
	tuplestore_putvalues(result->setResult, result->setDesc, slot->tts_values,
						 slot->tts_isnull);
}

/*
 * Upward from the prefix in the heads table's primary key, whose order is
 * bytewise; the names with that prefix are neighbours.
 */
static void
list_heads(EsCollection *coll, const text *prefix, Snapshot snapshot,
		   ReturnSetInfo *result)
{
	ScanKeyData		key;
	EsLookup	   *lookup;
	TupleTableSlot *slot;

	es_lookup_text_key(&key, 1, BTGreaterEqualStrategyNumber, prefix);
	lookup = es_lookup_begin(coll->heads, &es_index_of_streams, &key, 1,
							 ForwardScanDirection, snapshot);
	if (lookup == NULL)
		return;
	while ((slot = es_lookup_next(lookup)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();
		slot_getsomeattrs(slot, ES_HEADS_STREAM);
		if (!has_prefix(slot->tts_values[ES_HEADS_STREAM - 1], prefix))
			break;
		if (has_event(slot))
			put_row(result, slot);
	}
	es_lookup_end(lookup);
}

/* The same from what the user sees; first and last are those that he sees. */
static void
list_visible(EsCollection *coll, const text *prefix, Snapshot snapshot,
			 ReturnSetInfo *result)
{
	const char	  *name = es_collection_name(coll);
	EsVisibleQuery query = {
		.nparams = 1,
		.types = {TEXTOID},
		.values = {PointerGetDatum(prefix)},
	};
	EsVisible	   *visible;
	TupleTableSlot *slot;

	query.sql = psprintf("SELECT s.stream, s.version, s.first_position, s.last_position,"
						 " (SELECT e.created_at FROM %s e"
						 " WHERE e.position OPERATOR(pg_catalog.=) s.first_position),"
						 " (SELECT e.created_at FROM %s e"
						 " WHERE e.position OPERATOR(pg_catalog.=) s.last_position)"
						 " FROM (SELECT stream, pg_catalog.max(version) AS version,"
						 " pg_catalog.min(position) AS first_position,"
						 " pg_catalog.max(position) AS last_position FROM %s"
						 " WHERE position OPERATOR(pg_catalog.>=) '" INT64_FORMAT "'"
						 " AND pg_catalog.starts_with(stream, $1) GROUP BY stream) s"
						 " ORDER BY s.stream COLLATE \"C\"",
						 name, name, name, coll->first_position);
	visible = es_visible_begin(&query, snapshot);
	while ((slot = es_visible_next(visible)) != NULL)
		put_row(result, slot);
	es_visible_end(visible);
}

PG_FUNCTION_INFO_V1(es_streams);
Datum
es_streams(PG_FUNCTION_ARGS)
{
	EsCollection *coll;
	text		 *prefix;
	Snapshot	  snapshot;

	InitMaterializedSRF(fcinfo, 0);
	coll = es_read_open_collection(es_read_collection_arg(&fcinfo->args[0]));
	prefix = PG_ARGISNULL(1) ? cstring_to_text("") : PG_GETARG_TEXT_PP(1);
	snapshot = es_read_snapshot(coll);
	if (es_collection_row_security(coll))
		list_visible(coll, prefix, snapshot, (ReturnSetInfo *) fcinfo->resultinfo);
	else
		list_heads(coll, prefix, snapshot, (ReturnSetInfo *) fcinfo->resultinfo);
	UnregisterSnapshot(snapshot);
	return (Datum) 0;
}
