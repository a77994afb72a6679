/*
 * kafka/sink_record.c
 *		An event as a record of Kafka's.
 *
 * Value: the data as JSON text, or the body as it is; none where the event has
 * neither, so that the delete of a store's changelog is what deletes a key in a
 * compacted topic.  Time: created_at.  Everything else is in headers, as text in
 * UTF-8, their names beginning with "es-": position, id, type, tags (a JSON
 * array), stream (unless it is the key) and version, metadata (JSON).
 *
 * In the changelog of a store whose keys are bytes the stream is those bytes
 * spelt out; the record's key is the bytes.
 *
 * A changelog's own sink says, instead of the metadata, from which record of
 * which topic the change came (es-topic, es-partition, es-offset, es-since), and leaves
 * out what came from the topic that it writes: that was restored from there, unless
 * it was from a former one of that name (sink_topic.c).
 *
 * This runs for each event, hundreds of thousands a second, so nothing is
 * formatted by way of SQL's output functions.
 */
#include "postgres.h"

#include "kafka/delivery.h"
#include "kafka/json_text.h"
#include "kafka/publish.h"
#include "kafka/sink_record.h"

#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "collection/event.h"
#include "feed/read.h"
#include "fmgr.h"
#include "kafka/argument.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "spi.h"
#include "store/store.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/typcache.h"
#include "utils/uuid.h"

#define HEADERS_MAX 10

struct EsSinkWriter
{
	const EsSink  *sink;
	const EsShare *share;	/* of a changelog's sink; NULL: all */
	EsPosition	   current; /* of the event that is being made */
	Datum		   stream;	/* its own */
	EsShareVerdict verdict;
	const EsStore
			 *byte_keys; /* the store whose changelog this is, if its keys are bytes */
	bool	  text_body; /* the body is text, in the database's encoding */
	FmgrInfo  function;
	Oid		  key_type; /* what it returns */
	TupleDesc event_desc;
	bool	  utf8; /* is the database's encoding */
	EsHeader  headers[HEADERS_MAX];
	char	  position[MAXINT8LEN + 1];
	char	  version[MAXINT8LEN + 1];
	char	  id[ES_UUID_TEXT_LEN];
	StringInfoData tags;
};

/*
 * By its name, each time: whoever may make a function anew may give it other
 * types.
 */
static void
find_key_function(EsSinkWriter *writer)
{
	const EsSink *sink = writer->sink;
	Oid			  event = get_rel_type_id(es_extension_relation("event"));
	Oid			  function;
	Oid			  argument;

	function = DatumGetObjectId(
		DirectFunctionCall1(regprocedurein, CStringGetDatum(sink->key_text)));
	es_kafka_check_execute(function, sink->owner);
	if (!es_kafka_function_types(function, &argument, &writer->key_type) ||
		argument != event ||
		(writer->key_type != TEXTOID && writer->key_type != BYTEAOID))
		ereport(ERROR, (errcode(ERRCODE_DATATYPE_MISMATCH),
						errmsg("function %s returns neither text nor bytea any more",
							   sink->key_text),
						errdetail("It is the key of sink \"%s\".", sink->name)));
	fmgr_info(function, &writer->function);
	writer->event_desc = lookup_rowtype_tupdesc_copy(event, -1);
}

EsSinkWriter *
es_sink_record_begin(const EsSink *sink, const EsCollection *coll, const EsShare *share)
{
	EsSinkWriter *writer = palloc0(sizeof(EsSinkWriter));

	writer->sink = sink;
	writer->share = share;
	writer->utf8 = GetDatabaseEncoding() == PG_UTF8;
	initStringInfo(&writer->tags);
	if (OidIsValid(coll->store))
	{
		const EsStore *store = es_store_open(coll->store, AccessShareLock);

		writer->byte_keys = store->key_format == ES_STORE_BYTES ? store : NULL;
		writer->text_body = store->format == ES_STORE_TEXT;
	}
	if (sink->key == ES_SINK_KEY_FUNCTION)
		find_key_function(writer);
	return writer;
}

/* ---------------------------------------------------------------------------
 * Pieces
 * ------------------------------------------------------------------------- */

/* Text is UTF-8 in Kafka. */
static const char *
to_utf8(const EsSinkWriter *writer, const char *text, size_t *length)
{
	char *converted;

	if (writer->utf8)
		return text;
	converted = pg_server_to_any(text, (int) *length, PG_UTF8);
	if (converted != text)
		*length = strlen(converted);
	return converted;
}

static const char *
text_bytes(const EsSinkWriter *writer, const text *value, size_t *length)
{
	*length = VARSIZE_ANY_EXHDR(value);
	return to_utf8(writer, VARDATA_ANY(value), length);
}

static const char *
json_bytes(const EsSinkWriter *writer, Datum value, size_t *length)
{
	Jsonb		  *jsonb = DatumGetJsonbP(value);
	StringInfoData out;

	initStringInfo(&out);
	es_json_add(&out, jsonb);
	*length = out.len;
	return to_utf8(writer, out.data, length);
}

static void
spell_uuid(Datum value, char *out)
{
	static const char	 digits[] = "0123456789abcdef";
	const unsigned char *bytes = DatumGetUUIDP(value)->data;

	for (int i = 0; i < UUID_LEN; i++)
	{
		if (i == 4 || i == 6 || i == 8 || i == 10)
			*out++ = '-';
		*out++ = digits[bytes[i] >> 4];
		*out++ = digits[bytes[i] & 0x0f];
	}
}

static void
add_header(EsSinkWriter *writer, EsRecord *record, const char *name, const char *value,
		   size_t length)
{
	EsHeader *header = &writer->headers[record->nheaders++];

	Assert(record->nheaders <= HEADERS_MAX);
	header->name = name;
	header->value = value;
	header->length = length;
}

static void
add_text(EsSinkWriter *writer, EsRecord *record, const char *name, Datum value)
{
	size_t		length;
	const char *bytes = text_bytes(writer, DatumGetTextPP(value), &length);

	add_header(writer, record, name, bytes, length);
}

/* ["a", "b"] */
static void
add_tags(EsSinkWriter *writer, EsRecord *record, ArrayType *tags)
{
	StringInfo	out = &writer->tags;
	EsTagWalk	walk;
	const char *tag;
	int			length;
	size_t		size;
	const char *bytes;

	resetStringInfo(out);
	appendStringInfoChar(out, '[');
	es_tags_begin(&walk, tags);
	while (es_tags_next(&walk, &tag, &length))
	{
		if (out->len > 1)
			appendStringInfoString(out, ", ");
		es_json_add_string(out, tag, length);
	}
	appendStringInfoChar(out, ']');
	size = out->len;
	bytes = to_utf8(writer, out->data, &size);
	add_header(writer, record, "es-tags", bytes, size);
}

/* ---------------------------------------------------------------------------
 * Key
 * ------------------------------------------------------------------------- */

static void
set_key(EsRecord *record, const char *key, size_t length)
{
	record->key = key;
	record->key_length = length;
}

static void
set_text_key(const EsSinkWriter *writer, EsRecord *record, const text *key)
{
	size_t		length;
	const char *bytes = text_bytes(writer, key, &length);

	set_key(record, bytes, length);
}

static void
set_tag_key(const EsSinkWriter *writer, EsRecord *record, ArrayType *tags)
{
	const char *prefix = writer->sink->tag_prefix;
	int			prefix_length = (int) strlen(prefix);
	EsTagWalk	walk;
	const char *tag;
	int			length;

	es_tags_begin(&walk, tags);
	while (es_tags_next(&walk, &tag, &length))
		if (length >= prefix_length && memcmp(tag, prefix, prefix_length) == 0)
		{
			size_t		size = length - prefix_length;
			const char *bytes = to_utf8(writer, tag + prefix_length, &size);

			set_key(record, bytes, size);
			return;
		}
}

static void
call_key_function(EsSinkWriter *writer, EsRecord *record, TupleTableSlot *slot)
{
	LOCAL_FCINFO(fcinfo, 1);
	Datum result;

	InitFunctionCallInfoData(*fcinfo, &writer->function, 1, DEFAULT_COLLATION_OID, NULL,
							 NULL);
	fcinfo->args[0].value = es_read_event_datum(slot, writer->event_desc);
	fcinfo->args[0].isnull = false;
	result = FunctionCallInvoke(fcinfo);
	if (fcinfo->isnull)
		return;
	if (writer->key_type == BYTEAOID)
	{
		bytea *bytes = DatumGetByteaPP(result);

		set_key(record, VARDATA_ANY(bytes), VARSIZE_ANY_EXHDR(bytes));
	}
	else
		set_text_key(writer, record, DatumGetTextPP(result));
}

static void
set_stream_key(EsSinkWriter *writer, EsRecord *record, Datum stream)
{
	bytea *key;

	if (writer->byte_keys == NULL)
	{
		set_text_key(writer, record, DatumGetTextPP(stream));
		return;
	}
	key = DatumGetByteaPP(
		es_store_key_from_text(writer->byte_keys, DatumGetTextPP(stream)));
	set_key(record, VARDATA_ANY(key), VARSIZE_ANY_EXHDR(key));
}

/* After the headers: id and position are spelt out there. */
static void
make_key(EsSinkWriter *writer, TupleTableSlot *slot, EsRecord *record)
{
	const Datum *values = slot->tts_values;

	switch (writer->sink->key)
	{
		case ES_SINK_KEY_STREAM:
			if (!slot->tts_isnull[ES_ATT_STREAM - 1])
				set_stream_key(writer, record, values[ES_ATT_STREAM - 1]);
			break;
		case ES_SINK_KEY_ID:
			set_key(record, writer->id, ES_UUID_TEXT_LEN);
			break;
		case ES_SINK_KEY_POSITION:
			set_key(record, writer->position, strlen(writer->position));
			break;
		case ES_SINK_KEY_TYPE:
			set_text_key(writer, record, DatumGetTextPP(values[ES_ATT_TYPE - 1]));
			break;
		case ES_SINK_KEY_NONE:
			break;
		case ES_SINK_KEY_TAG:
			set_tag_key(writer, record, DatumGetArrayTypeP(values[ES_ATT_TAGS - 1]));
			break;
		case ES_SINK_KEY_FUNCTION:
			call_key_function(writer, record, slot);
			break;
	}
}

/* ---------------------------------------------------------------------------
 * The whole
 * ------------------------------------------------------------------------- */

static void
make_value(const EsSinkWriter *writer, TupleTableSlot *slot, EsRecord *record)
{
	if (!slot->tts_isnull[ES_ATT_DATA - 1])
		record->value =
			json_bytes(writer, slot->tts_values[ES_ATT_DATA - 1], &record->value_length);
	else if (!slot->tts_isnull[ES_ATT_BODY - 1])
	{
		bytea *body = DatumGetByteaPP(slot->tts_values[ES_ATT_BODY - 1]);

		record->value_length = VARSIZE_ANY_EXHDR(body);
		record->value = writer->text_body
							? to_utf8(writer, VARDATA_ANY(body), &record->value_length)
							: VARDATA_ANY(body);
	}
}

static void
make_headers(EsSinkWriter *writer, TupleTableSlot *slot, EsRecord *record)
{
	const Datum *values = slot->tts_values;

	pg_lltoa(DatumGetInt64(values[ES_ATT_POSITION - 1]), writer->position);
	add_header(writer, record, "es-position", writer->position, strlen(writer->position));
	spell_uuid(values[ES_ATT_ID - 1], writer->id);
	add_header(writer, record, "es-id", writer->id, ES_UUID_TEXT_LEN);
	add_text(writer, record, "es-type", values[ES_ATT_TYPE - 1]);
	add_tags(writer, record, DatumGetArrayTypeP(values[ES_ATT_TAGS - 1]));
	if (slot->tts_isnull[ES_ATT_STREAM - 1])
		return;
	/* Each header costs as much as the rest of a small record. */
	if (writer->sink->key != ES_SINK_KEY_STREAM)
		add_text(writer, record, "es-stream", values[ES_ATT_STREAM - 1]);
	pg_lltoa(DatumGetInt64(values[ES_ATT_VERSION - 1]), writer->version);
	add_header(writer, record, "es-version", writer->version, strlen(writer->version));
}

/* A member of the metadata as text; NULL where there is none. */
static const char *
metadata_text(Jsonb *metadata, const char *key)
{
	JsonbValue	buffer;
	JsonbValue *value =
		getKeyJsonValueFromContainer(&metadata->root, key, strlen(key), &buffer);

	if (value == NULL)
		return NULL;
	if (value->type == jbvString)
		return pnstrdup(value->val.string.val, value->val.string.len);
	if (value->type == jbvNumeric)
		return DatumGetCString(
			DirectFunctionCall1(numeric_out, NumericGetDatum(value->val.numeric)));
	return NULL;
}

static void
add_text_header(EsSinkWriter *writer, EsRecord *record, const char *name,
				const char *value)
{
	add_header(writer, record, name, value, strlen(value));
}

/* Of a change by SQL: the record of the source that it came after (publish.c). */
static void
add_progress(EsSinkWriter *writer, EsRecord *record, Jsonb *metadata)
{
	const char *topic;
	int32		partition;
	int64		offset;

	if (!es_publish_progress(metadata, record, &topic, &partition, &offset))
		return;
	record->partition = partition;
	if (offset < 0)
		return;
	add_text_header(writer, record, ES_HEADER_TOPIC, topic);
	add_text_header(writer, record, ES_HEADER_PARTITION, psprintf("%d", partition));
	add_text_header(writer, record, ES_HEADER_OFFSET, psprintf(INT64_FORMAT, offset));
}

/* Of a change that was restored: what the record said that it was restored from. */
static void
add_former_origin(EsSinkWriter *writer, EsRecord *record, Jsonb *metadata)
{
	static const char *const names[] = {ES_HEADER_TOPIC, ES_HEADER_PARTITION,
										ES_HEADER_OFFSET, ES_HEADER_SINCE};
	EsRecord				 former = {0};
	JsonbValue				 buffer;
	JsonbValue				*headers = getKeyJsonValueFromContainer(
					 &metadata->root, ES_ORIGIN_HEADERS, strlen(ES_ORIGIN_HEADERS), &buffer);

	if (headers == NULL)
		return;
	es_codec_read_headers(JsonbValueToJsonb(headers), &former);
	for (int i = 0; i < lengthof(names); i++)
	{
		const EsHeader *header = es_codec_header(&former, names[i]);

		if (header != NULL)
			add_header(writer, record, names[i], header->value, header->length);
	}
}

/* May the change be published?  By SQL ('topic' NULL) or by a record of that topic. */
static bool
judge(EsSinkWriter *writer, EsRecord *record, const char *topic)
{
	if (writer->share == NULL)
		return true;
	/* One that was made before there was a source, say. */
	if (record->partition == ES_SINK_ANY_PARTITION)
		record->partition =
			es_share_partition_of(writer->share, record->key, record->key_length);
	writer->verdict = es_share_judge(writer->share, writer->current, topic,
									 record->partition, writer->stream);
	/* It was dealt with when it was published for the first time. */
	if (writer->verdict == ES_SHARE_LOST && writer->current <= writer->sink->known_to)
		writer->verdict = ES_SHARE_KNOWN;
	return writer->verdict == ES_SHARE_OURS;
}

/* False where the change came from the topic itself, or is not ours to publish. */
static bool
add_origin(EsSinkWriter *writer, EsRecord *record, Jsonb *metadata)
{
	const char *topic;
	const char *partition;
	const char *offset;
	const char *since;
	bool		restored;

	if (!JB_ROOT_IS_OBJECT(metadata))
		return judge(writer, record, NULL);
	topic = metadata_text(metadata, ES_ORIGIN_TOPIC);
	partition = metadata_text(metadata, ES_ORIGIN_PARTITION);
	offset = metadata_text(metadata, ES_ORIGIN_OFFSET);
	/* Put as one of the store's backlog, it has no more (store/backlog.h). */
	if (topic != NULL && partition == NULL && strcmp(topic, writer->sink->topic) == 0 &&
		writer->current > writer->sink->again_to)
		return false;
	if (topic == NULL || partition == NULL || offset == NULL)
	{
		add_progress(writer, record, metadata);
		return judge(writer, record, NULL);
	}
	restored = strcmp(topic, writer->sink->topic) == 0;
	if (restored && writer->current > writer->sink->again_to)
		return false;
	/* Who restores a partition of the source looks into the one of that number. */
	record->partition = pg_strtoint32(partition);
	if (!judge(writer, record, topic))
		return false;
	if (restored)
	{
		add_former_origin(writer, record, metadata);
		return true;
	}
	add_text_header(writer, record, ES_HEADER_TOPIC, topic);
	add_text_header(writer, record, ES_HEADER_PARTITION, partition);
	add_text_header(writer, record, ES_HEADER_OFFSET, offset);
	since = metadata_text(metadata, ES_ORIGIN_SINCE);
	if (since != NULL)
		add_text_header(writer, record, ES_HEADER_SINCE, since);
	return true;
}

static bool
add_metadata(EsSinkWriter *writer, EsRecord *record, Datum metadata)
{
	size_t		length;
	const char *bytes;

	if (writer->sink->changelog_of != 0)
		return add_origin(writer, record, DatumGetJsonbP(metadata));
	bytes = json_bytes(writer, metadata, &length);
	add_header(writer, record, "es-metadata", bytes, length);
	return true;
}

bool
es_sink_record_make(EsSinkWriter *writer, TupleTableSlot *slot, EsRecord *record)
{
	TimestampTz created_at;

	slot_getsomeattrs(slot, ES_EVENT_NATTS);
	memset(record, 0, sizeof(*record));
	record->partition = ES_SINK_ANY_PARTITION;
	writer->current = DatumGetInt64(slot->tts_values[ES_ATT_POSITION - 1]);
	writer->stream = slot->tts_values[ES_ATT_STREAM - 1];
	writer->verdict = ES_SHARE_OURS;
	record->headers = writer->headers;
	make_headers(writer, slot, record);
	make_key(writer, slot, record);
	if (slot->tts_isnull[ES_ATT_METADATA - 1]
			? !judge(writer, record, NULL)
			: !add_metadata(writer, record, slot->tts_values[ES_ATT_METADATA - 1]))
		return false;
	make_value(writer, slot, record);
	created_at = DatumGetTimestampTz(slot->tts_values[ES_ATT_CREATED_AT - 1]);
	/* Kafka has no times before 1970, nor infinite ones. */
	record->has_time =
		!TIMESTAMP_NOT_FINITE(created_at) && es_codec_kafka_time(created_at) > 0;
	record->time = created_at;
	return true;
}

bool
es_sink_record_is_lost(const EsSinkWriter *writer)
{
	return writer->verdict == ES_SHARE_LOST;
}
