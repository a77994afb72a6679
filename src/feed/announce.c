/*
 * feed/announce.c
 *		What a notification says, and eventstore.listen.
 *
 * A payload is a JSON object:
 *
 *		{"collection": "sales.orders", "head": 42, "count": 3}
 *
 * with "events": [...] or "streams": {...} behind it where the collection's
 * option notify asks for them, row-level security is off, and all of it fits
 * into what PostgreSQL carries; else they are left out as a whole, and the
 * listener reads.  A notification is a hint in any case: it says up to where
 * there is something to read.
 *
 * How often keys of a store were read is told apart from that, where option
 * feed_reads asks for it:
 *
 *		{"collection": "public.kv_changelog", "get": {"theme": 3, "size": 1}}
 *
 * The events are read as by any reader, head first, so "head" is safe to have
 * read up to, and what is told has been committed.
 */
#include "postgres.h"

#include "feed/announce.h"

#include "access/detoast.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "collection/event.h"
#include "commands/async.h"
#include "common/base64.h"
#include "feed/read.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/rel.h"
#include "utils/uuid.h"
#include "worker/listeners.h"
#include "worker/wake.h"

/* PostgreSQL's limit (NOTIFY_PAYLOAD_MAX_LENGTH in async.c, less one). */
#define PAYLOAD_MAX_BYTES 7999

/* Events are counted by reading them; of more than this the count is a guide. */
#define COUNTED_MAX 100000

/* Streams that could fit into a payload, with the shortest of names. */
#define STREAMS_MAX 1000

/* A key with its count, each byte of it as JSON's \\u0001, and what closes the payload. */
#define READ_MAX_BYTES (6 * ES_READ_KEY_MAX_BYTES + 24)

typedef struct StreamVersion
{
	text *stream;
	int64 version;
} StreamVersion;

typedef struct Payload
{
	EsNotify	   notify;
	bool		   too_large; /* the details do not fit: left out */
	StringInfoData details;	  /* of events */
	StreamVersion *streams;	  /* of streams */
	int			   nstreams;
	int64		   count;
} Payload;

EsNotify
es_notify_from_text(const char *value)
{
	if (strcmp(value, "head") == 0)
		return ES_NOTIFY_HEAD;
	if (strcmp(value, "events") == 0)
		return ES_NOTIFY_EVENTS;
	if (strcmp(value, "streams") == 0)
		return ES_NOTIFY_STREAMS;
	return ES_NOTIFY_NONE;
}

/* ---------------------------------------------------------------------------
 * An event as JSON
 * ------------------------------------------------------------------------- */

static void
append_text(StringInfo out, const text *value)
{
	escape_json(out, text_to_cstring(value));
}

static void
append_tags(StringInfo out, ArrayType *tags)
{
	EsTagWalk	walk;
	const char *tag;
	int			length;
	const char *separator = "";

	appendStringInfoChar(out, '[');
	es_tags_begin(&walk, tags);
	while (es_tags_next(&walk, &tag, &length))
	{
		appendStringInfoString(out, separator);
		escape_json(out, pnstrdup(tag, length));
		separator = ", ";
	}
	appendStringInfoChar(out, ']');
}

static void
append_base64(StringInfo out, bytea *value)
{
	int	  length = VARSIZE_ANY_EXHDR(value);
	int	  room = pg_b64_enc_len(length);
	char *encoded = palloc(room + 1);

	/* Bytes are char before PostgreSQL 18, and uint8 since. */
	room = pg_b64_encode((void *) VARDATA_ANY(value), length, encoded, room);
	appendStringInfo(out, "\"%.*s\"", room, encoded);
}

static void
append_field(StringInfo out, int att, Datum value)
{
	char buffer[MAXDATELEN + 1];

	switch (att)
	{
		case ES_ATT_POSITION:
		case ES_ATT_VERSION:
			appendStringInfo(out, INT64_FORMAT, DatumGetInt64(value));
			break;
		case ES_ATT_ID:
			appendStringInfo(out, "\"%s\"",
							 DatumGetCString(DirectFunctionCall1(uuid_out, value)));
			break;
		case ES_ATT_TAGS:
			append_tags(out, DatumGetArrayTypeP(value));
			break;
		case ES_ATT_DATA:
		case ES_ATT_METADATA:
		{
			Jsonb *json = DatumGetJsonbP(value);

			(void) JsonbToCString(out, &json->root, VARSIZE(json));
			break;
		}
		case ES_ATT_BODY:
			append_base64(out, DatumGetByteaPP(value));
			break;
		case ES_ATT_CREATED_AT:
			appendStringInfo(out, "\"%s\"",
							 JsonEncodeDateTime(buffer, value, TIMESTAMPTZOID, NULL));
			break;
		default:
			append_text(out, DatumGetTextPP(value));
			break;
	}
}

/* Null fields are absent. */
static void
append_event(StringInfo out, TupleTableSlot *slot)
{
	static const char *const names[ES_EVENT_NATTS] = {
		"position", "stream", "version", "id",		 "type",
		"tags",		"data",	  "body",	 "metadata", "created_at"};
	const char *separator = "";

	slot_getsomeattrs(slot, ES_EVENT_NATTS);
	appendStringInfoChar(out, '{');
	for (int i = 0; i < ES_EVENT_NATTS; i++)
	{
		if (slot->tts_isnull[i])
			continue;
		appendStringInfo(out, "%s\"%s\": ", separator, names[i]);
		append_field(out, i + 1, slot->tts_values[i]);
		separator = ", ";
	}
	appendStringInfoChar(out, '}');
}

/* ---------------------------------------------------------------------------
 * The details
 * ------------------------------------------------------------------------- */

/*
 * Surely more than a payload holds?  Then it is not even fetched.  What takes
 * least room as text beside its binary form is jsonb, with a quarter.
 */
static bool
is_large(TupleTableSlot *slot)
{
	Size size = 0;

	slot_getsomeattrs(slot, ES_EVENT_NATTS);
	for (int i = 0; i < ES_EVENT_NATTS; i++)
		if (!slot->tts_isnull[i] &&
			TupleDescAttr(slot->tts_tupleDescriptor, i)->attlen == -1)
			size += toast_raw_datum_size(slot->tts_values[i]);
	return size / 8 > PAYLOAD_MAX_BYTES;
}

static void
add_event(Payload *payload, TupleTableSlot *slot)
{
	payload->too_large = is_large(slot);
	if (payload->too_large)
		return;
	if (payload->details.len > 0)
		appendStringInfoString(&payload->details, ", ");
	append_event(&payload->details, slot);
	payload->too_large = payload->details.len > PAYLOAD_MAX_BYTES;
}

static void
add_stream(Payload *payload, TupleTableSlot *slot)
{
	bool  isnull;
	Datum value = slot_getattr(slot, ES_ATT_STREAM, &isnull);
	int64 version;
	text *stream;

	if (isnull)
		return;
	stream = DatumGetTextPP(value);
	version = DatumGetInt64(slot_getattr(slot, ES_ATT_VERSION, &isnull));
	for (int i = payload->nstreams - 1; i >= 0; i--)
		if (es_text_equal(payload->streams[i].stream, stream))
		{
			payload->streams[i].version = version;
			return;
		}
	if (payload->nstreams == STREAMS_MAX)
	{
		payload->too_large = true;
		return;
	}
	if (payload->streams == NULL)
		payload->streams = palloc(sizeof(StreamVersion) * STREAMS_MAX);
	payload->streams[payload->nstreams].stream =
		(text *) pg_detoast_datum_copy((struct varlena *) stream);
	payload->streams[payload->nstreams++].version = version;
}

static void
add_to_payload(Payload *payload, TupleTableSlot *slot)
{
	payload->count++;
	if (payload->too_large)
		return;
	if (payload->notify == ES_NOTIFY_EVENTS)
		add_event(payload, slot);
	else if (payload->notify == ES_NOTIFY_STREAMS)
		add_stream(payload, slot);
}

static void
append_details(StringInfo out, const Payload *payload)
{
	if (payload->notify == ES_NOTIFY_EVENTS)
		appendStringInfo(out, ", \"events\": [%s]", payload->details.data);
	else if (payload->notify == ES_NOTIFY_STREAMS)
	{
		appendStringInfoString(out, ", \"streams\": {");
		for (int i = 0; i < payload->nstreams; i++)
		{
			if (i > 0)
				appendStringInfoString(out, ", ");
			append_text(out, payload->streams[i].stream);
			appendStringInfo(out, ": " INT64_FORMAT, payload->streams[i].version);
		}
		appendStringInfoChar(out, '}');
	}
}

/* ---------------------------------------------------------------------------
 * Sending
 * ------------------------------------------------------------------------- */

/*
 * Row-level security refuses the modes that tell more than the head; where it
 * was switched on after the mode was chosen, the details are withheld.
 */
static bool
is_row_secured(const EsCollection *coll)
{
	Relation rel = RelationIdGetRelation(coll->relid);
	bool	 secured = rel->rd_rel->relrowsecurity;

	RelationClose(rel);
	return secured;
}

static void
read_payload(Payload *payload, Oid collection, EsPosition after, const EsView *view)
{
	EsReadArgs args = {
		.collection = collection,
		.direction = ForwardScanDirection,
		.max_count = ES_READ_ALL,
		.after = after,
		.before = view->head + 1,
	};
	EsRead		   *read = es_read_begin_in(&args, view);
	TupleTableSlot *slot;

	while ((slot = es_read_next(read)) != NULL)
		add_to_payload(payload, slot);
	es_read_end(read);
}

static char *
format_payload(const EsCollection *coll, const Payload *payload, EsPosition head)
{
	StringInfoData out;
	int			   length;

	initStringInfo(&out);
	appendStringInfoString(&out, "{\"collection\": ");
	escape_json(&out, es_collection_name(coll));
	appendStringInfo(&out, ", \"head\": " INT64_FORMAT ", \"count\": " INT64_FORMAT, head,
					 payload->count);
	length = out.len;
	if (!payload->too_large)
		append_details(&out, payload);
	if (out.len + 1 > PAYLOAD_MAX_BYTES)
	{
		out.len = length;
		out.data[length] = '\0';
	}
	appendStringInfoChar(&out, '}');
	return out.data;
}

void
es_announce(Oid collection, EsNotify notify, const char *channel, EsAnnounced *announced)
{
	EsCollection *coll = es_collection_open(collection, AccessShareLock);
	Payload		  payload = {.notify = notify};
	EsView		  view;

	if (is_row_secured(coll))
		payload.notify = ES_NOTIFY_HEAD;
	es_view_open(coll, &view);
	initStringInfo(&payload.details);
	if (view.head - announced->head > COUNTED_MAX)
	{
		payload.count = announced->events;
		payload.too_large = true;
	}
	else if (view.head > announced->head)
		read_payload(&payload, collection, announced->head, &view);
	Async_Notify(channel, format_payload(coll, &payload, view.head));
	announced->head = view.head;
	announced->events = payload.count;
	es_view_close(&view);
}

static void
begin_reads(StringInfo out, const EsCollection *coll)
{
	resetStringInfo(out);
	appendStringInfoString(out, "{\"collection\": ");
	escape_json(out, es_collection_name(coll));
	appendStringInfoString(out, ", \"get\": {");
}

void
es_announce_reads(Oid changelog, const char *channel, const EsKeyReads *reads, int nreads)
{
	EsCollection  *coll = es_collection_open(changelog, AccessShareLock);
	StringInfoData out;
	int			   n = 0;

	if (is_row_secured(coll))
		return;
	initStringInfo(&out);
	begin_reads(&out, coll);
	for (int i = 0; i < nreads; i++)
	{
		if (reads[i].changelog != changelog)
			continue;
		if (out.len > PAYLOAD_MAX_BYTES - READ_MAX_BYTES)
		{
			appendStringInfoString(&out, "}}");
			Async_Notify(channel, out.data);
			begin_reads(&out, coll);
			n = 0;
		}
		if (n++ > 0)
			appendStringInfoString(&out, ", ");
		escape_json(&out, pnstrdup(reads[i].key, reads[i].length));
		appendStringInfo(&out, ": %u", reads[i].count);
	}
	if (n > 0)
	{
		appendStringInfoString(&out, "}}");
		Async_Notify(channel, out.data);
	}
}

/* ---------------------------------------------------------------------------
 * listen
 * ------------------------------------------------------------------------- */

/* Channel and mode of a collection, from the catalog; palloc'd. */
static char *
read_channel(Oid collection, EsNotify *notify)
{
	Oid			  types[] = {REGCLASSOID};
	Datum		  values[] = {ObjectIdGetDatum(collection)};
	MemoryContext caller = CurrentMemoryContext;
	EsRoleSwitch  saved;
	HeapTuple	  row;
	char		 *channel;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("SELECT c.channel, c.notify FROM eventstore.collection_catalog c"
				   " WHERE c.collection = $1",
				   1, types, values, NULL, true, SPI_OK_SELECT);
	if (SPI_processed != 1)
		elog(ERROR, "collection with OID %u is not in the catalog", collection);
	row = SPI_tuptable->vals[0];
	channel = MemoryContextStrdup(caller, SPI_getvalue(row, SPI_tuptable->tupdesc, 1));
	*notify = es_notify_from_text(SPI_getvalue(row, SPI_tuptable->tupdesc, 2));
	SPI_finish();
	es_role_restore(&saved);
	return channel;
}

static void
check_may_listen(void)
{
	PreventCommandDuringRecovery("LISTEN");
	PreventCommandIfParallelMode("LISTEN");
	if (MyBackendType == B_BG_WORKER)
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						errmsg("cannot LISTEN within a background process")));
	/* It would outlive the operation, in the session of who runs it. */
	if (InSecurityRestrictedOperation())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("cannot execute LISTEN within security-restricted operation")));
}

/*
 * Counts this session among the listeners.  The first one needs no news of what
 * was there before he came.  Whoever comes second has a head that is not below
 * the one that we read before we came, so he loses nothing by it.
 */
static void
join_listeners(EsCollection *coll, const char *channel)
{
	EsAnnounced announced = {.head = es_view_head(coll), .events = PG_UINT64_MAX};

	if (es_listeners_add(channel) && coll->head.head != NULL)
		es_head_set_announced(&coll->head, &announced);
	es_wake_notifier();
}

/* listen(collection) */
PG_FUNCTION_INFO_V1(es_listen);
Datum
es_listen(PG_FUNCTION_ARGS)
{
	Oid collection = es_collection_or_changelog(es_read_collection_arg(&fcinfo->args[0]));
	EsCollection *coll;
	EsNotify	  notify;
	char		 *channel;
	TupleDesc	  desc;
	Datum		  values[2];
	bool		  nulls[2] = {false, false};

	es_require_preloaded();
	check_may_listen();
	coll = es_read_open_collection(collection);
	channel = read_channel(collection, &notify);
	if (notify == ES_NOTIFY_NONE)
		ereport(WARNING, (errmsg("nothing is sent to channel \"%s\"", channel),
						  errhint("The collection's option notify is \"none\"; its owner "
								  "can change it with eventstore.set_option().")));

	/* The head comes after the session is counted: see worker/listeners.c. */
	join_listeners(coll, channel);
	Async_Listen(channel);
	values[0] = CStringGetTextDatum(channel);
	values[1] = Int64GetDatum(es_view_head(coll));

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	PG_RETURN_DATUM(
		HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}
