/*
 * kafka/codec.c
 *		Between a record's bytes and values of PostgreSQL.
 *
 * A record that does not decode must neither stop its topic nor vanish, so what
 * is wrong with it is a result here and not an error.  What raises one inside
 * PostgreSQL only computes, and is caught (es_convert_noting).
 *
 * A batch has many records, so what computing leaves behind goes with each: only the
 * results stay.
 */
#include "postgres.h"

#include "kafka/codec.h"

#include <librdkafka/rdkafka.h>

#include "common/base64.h"
#include "common/int.h"
#include "errors.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"

/* ---------------------------------------------------------------------------
 * Values
 * ------------------------------------------------------------------------- */

/* (bytes, length) to text in the database's encoding; a function for es_convert's sake. */
static Datum
text_from_utf8(PG_FUNCTION_ARGS)
{
	char *bytes = (char *) PG_GETARG_POINTER(0);
	int	  length = PG_GETARG_INT32(1);
	char *converted = pg_any_to_server(bytes, length, PG_UTF8);

	if (converted == bytes)
		PG_RETURN_TEXT_P(cstring_to_text_with_len(bytes, length));
	PG_RETURN_TEXT_P(cstring_to_text(converted));
}

static bool
set_problem(EsProblem *problem, int sqlstate, const char *reason)
{
	problem->sqlstate = sqlstate;
	problem->reason = reason;
	return false;
}

/* Text in each encoding that there is. */
static bool
is_ascii(const char *bytes, size_t length)
{
	for (size_t i = 0; i < length; i++)
		if (bytes[i] == '\0' || IS_HIGHBIT_SET(bytes[i]))
			return false;
	return true;
}

static bool
decode_text(const char *bytes, size_t length, Datum *value, EsProblem *problem)
{
	if (is_ascii(bytes, length))
	{
		*value = PointerGetDatum(cstring_to_text_with_len(bytes, (int) length));
		return true;
	}
	if (memchr(bytes, '\0', length) != NULL)
		return set_problem(problem, ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
						   "it has a byte 0, which text cannot have");
	if (!es_convert(text_from_utf8, PointerGetDatum(bytes), Int32GetDatum((int32) length),
					0, value))
		return set_problem(problem, ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
						   "it is not UTF-8, or not in the database's encoding");
	return true;
}

/* What is computed after it is gone with end_work, but for what that returns. */
static MemoryContext
begin_work(void)
{
	return MemoryContextSwitchTo(AllocSetContextCreate(
		CurrentMemoryContext, "eventstore codec", ALLOCSET_DEFAULT_SIZES));
}

static void *
end_work(MemoryContext outer, const void *value)
{
	MemoryContext work = MemoryContextSwitchTo(outer);
	void		 *kept = NULL;

	if (value != NULL)
	{
		kept = palloc(VARSIZE_ANY(value));
		memcpy(kept, value, VARSIZE_ANY(value));
	}
	MemoryContextDelete(work);
	return kept;
}

static bool
parse_json(const char *bytes, size_t length, Datum *value, EsProblem *problem)
{
	Datum as_text;
	int	  sqlstate;

	if (!decode_text(bytes, length, &as_text, problem))
		return false;
	sqlstate = es_convert_noting(
		jsonb_in, CStringGetDatum(text_to_cstring(DatumGetTextPP(as_text))), 0, 0, value);
	if (sqlstate == 0)
		return true;
	if (ERRCODE_TO_CATEGORY(sqlstate) != ERRCODE_DATA_EXCEPTION)
		return set_problem(problem, ERRCODE_PROGRAM_LIMIT_EXCEEDED,
						   "it is nested too deeply, or too large");
	return set_problem(problem, ERRCODE_INVALID_TEXT_REPRESENTATION,
					   length == 0 ? "it is empty, which is not JSON" : "it is not JSON");
}

static bool
decode_json(const char *bytes, size_t length, Datum *value, EsProblem *problem)
{
	MemoryContext outer = begin_work();
	bool		  parsed = parse_json(bytes, length, value, problem);

	*value = PointerGetDatum(end_work(outer, parsed ? DatumGetPointer(*value) : NULL));
	return parsed;
}

bool
es_codec_decode(EsStoreFormat format, const char *bytes, size_t length, Datum *value,
				EsProblem *problem)
{
	if (length > MaxAllocSize - VARHDRSZ - 1)
		return set_problem(problem, ERRCODE_PROGRAM_LIMIT_EXCEEDED,
						   "it is longer than 1 GB");
	switch (format)
	{
		case ES_STORE_JSON:
			return decode_json(bytes, length, value, problem);
		case ES_STORE_TEXT:
			return decode_text(bytes, length, value, problem);
		case ES_STORE_BYTES:
			*value = PointerGetDatum(cstring_to_text_with_len(bytes, (int) length));
			return true;
	}
	return set_problem(problem, ERRCODE_INTERNAL_ERROR, "unknown format");
}

const char *
es_codec_bytes(EsStoreFormat format, Datum value, size_t *length)
{
	struct varlena *packed = PG_DETOAST_DATUM_PACKED(value);
	char		   *bytes = VARDATA_ANY(packed);
	char		   *converted = bytes;

	*length = VARSIZE_ANY_EXHDR(packed);
	if (format == ES_STORE_TEXT)
		converted = pg_server_to_any(bytes, (int) *length, PG_UTF8);
	if (converted != bytes)
		*length = strlen(converted);
	return converted;
}

int32
es_codec_partition(const char *key, size_t length, int32 count)
{
	return rd_kafka_msg_partitioner_murmur2(NULL, key, length, count, NULL, NULL);
}

/* ---------------------------------------------------------------------------
 * Headers and metadata
 * ------------------------------------------------------------------------- */

static JsonbValue
json_string(const char *string, size_t length)
{
	JsonbValue value;

	value.type = jbvString;
	value.val.string.val = (char *) string;
	value.val.string.len = (int) length;
	return value;
}

static JsonbValue
json_int(int64 number)
{
	JsonbValue value;

	value.type = jbvNumeric;
	value.val.numeric = int64_to_numeric(number);
	return value;
}

static JsonbValue
base64_of(const char *bytes, size_t length)
{
	int	  room = pg_b64_enc_len((int) length);
	char *encoded = palloc(room);

	return json_string(encoded,
					   pg_b64_encode((const void *) bytes, (int) length, encoded, room));
}

static void
push_key(JsonbParseState **state, const char *key)
{
	JsonbValue value = json_string(key, strlen(key));

	pushJsonbValue(state, WJB_KEY, &value);
}

/* As text where it is that, else as {"base64": ...}. */
static void
push_bytes(JsonbParseState **state, const char *bytes, size_t length)
{
	EsProblem  problem;
	JsonbValue value;
	Datum	   as_text;

	if (bytes == NULL)
	{
		value.type = jbvNull;
		pushJsonbValue(state, WJB_ELEM, &value);
	}
	else if (is_ascii(bytes, length))
	{
		value = json_string(bytes, length);
		pushJsonbValue(state, WJB_ELEM, &value);
	}
	else if (decode_text(bytes, length, &as_text, &problem))
	{
		value = json_string(VARDATA_ANY(as_text), VARSIZE_ANY_EXHDR(as_text));
		pushJsonbValue(state, WJB_ELEM, &value);
	}
	else
	{
		value = base64_of(bytes, length);
		pushJsonbValue(state, WJB_BEGIN_OBJECT, NULL);
		push_key(state, "base64");
		pushJsonbValue(state, WJB_VALUE, &value);
		pushJsonbValue(state, WJB_END_OBJECT, NULL);
	}
}

static JsonbValue *
push_headers(JsonbParseState **state, const EsRecord *record)
{
	pushJsonbValue(state, WJB_BEGIN_ARRAY, NULL);
	for (int i = 0; i < record->nheaders; i++)
	{
		const EsHeader *header = &record->headers[i];

		pushJsonbValue(state, WJB_BEGIN_ARRAY, NULL);
		push_bytes(state, header->name, strlen(header->name));
		push_bytes(state, header->value, header->length);
		pushJsonbValue(state, WJB_END_ARRAY, NULL);
	}
	return pushJsonbValue(state, WJB_END_ARRAY, NULL);
}

/* ---------------------------------------------------------------------------
 * Times: Kafka's are milliseconds since 1970
 * ------------------------------------------------------------------------- */

#define EPOCH_DIFFERENCE_MS                                                              \
	((POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * (int64) (SECS_PER_DAY * 1000))

int64
es_codec_kafka_time(TimestampTz time)
{
	return time / 1000 + EPOCH_DIFFERENCE_MS;
}

bool
es_codec_time(int64 kafka_time, TimestampTz *time)
{
	int64 us;

	if (kafka_time < 0 ||
		pg_mul_s64_overflow(kafka_time - EPOCH_DIFFERENCE_MS, 1000, &us) ||
		!IS_VALID_TIMESTAMP(us))
		return false;
	*time = us;
	return true;
}

/*
 * A quarter of what jsonb can hold in one array, 256 MB, for memory has to be
 * bounded; librdkafka takes no more than 100,000 headers.
 */
#define HEADERS_MAX_BYTES (64 * 1024 * 1024)

bool
es_codec_headers_fit(const EsRecord *record)
{
	size_t bytes = 0;

	for (int i = 0; i < record->nheaders; i++)
	{
		const EsHeader *header = &record->headers[i];

		/* As base64, at most. */
		bytes += (strlen(header->name) + header->length) / 3 * 4;
	}
	return !record->headers_lost && bytes <= HEADERS_MAX_BYTES;
}

Jsonb *
es_codec_headers(const EsRecord *record)
{
	JsonbParseState *state = NULL;

	return record->nheaders == 0 ? NULL : JsonbValueToJsonb(push_headers(&state, record));
}

/* What push_bytes has made of them; NULL for null. */
static const char *
bytes_of(JsonbValue *value, size_t *length)
{
	JsonbValue encoded;
	char	  *bytes;

	*length = 0;
	if (value == NULL || value->type == jbvNull)
		return NULL;
	if (value->type == jbvString)
	{
		text *string =
			cstring_to_text_with_len(value->val.string.val, value->val.string.len);

		return es_codec_bytes(ES_STORE_TEXT, PointerGetDatum(string), length);
	}
	if (value->type != jbvBinary || !JsonContainerIsObject(value->val.binary.data) ||
		getKeyJsonValueFromContainer(value->val.binary.data, "base64", 6, &encoded) ==
			NULL ||
		encoded.type != jbvString)
		return NULL;
	bytes = palloc(pg_b64_dec_len(encoded.val.string.len) + 1);
	*length = Max(pg_b64_decode(encoded.val.string.val, encoded.val.string.len,
								(void *) bytes, pg_b64_dec_len(encoded.val.string.len)),
				  0);
	return bytes;
}

void
es_codec_read_headers(Jsonb *headers, EsRecord *record)
{
	int n = JB_ROOT_IS_ARRAY(headers) ? JB_ROOT_COUNT(headers) : 0;

	record->headers = palloc(sizeof(EsHeader) * Max(n, 1));
	for (int i = 0; i < n; i++)
	{
		JsonbValue *pair = getIthJsonbValueFromContainer(&headers->root, i);
		EsHeader   *header = &record->headers[record->nheaders];
		const char *name;
		size_t		length;

		if (pair->type != jbvBinary || !JsonContainerIsArray(pair->val.binary.data))
			continue;
		name = bytes_of(getIthJsonbValueFromContainer(pair->val.binary.data, 0), &length);
		header->name = name == NULL ? "" : pnstrdup(name, length);
		header->value = bytes_of(getIthJsonbValueFromContainer(pair->val.binary.data, 1),
								 &header->length);
		record->nheaders++;
	}
}

static void
push_field(JsonbParseState **state, const char *key, JsonbValue value)
{
	push_key(state, key);
	pushJsonbValue(state, WJB_VALUE, &value);
}

Jsonb *
es_codec_metadata(const EsRecord *record)
{
	MemoryContext	 outer = begin_work();
	JsonbParseState *state = NULL;
	Jsonb			*metadata;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	push_field(&state, "topic", json_string(record->topic, strlen(record->topic)));
	push_field(&state, "partition", json_int(record->partition));
	push_field(&state, "offset", json_int(record->offset));
	if (record->has_since)
		push_field(&state, "since", json_int(record->since));
	if (record->has_time)
		push_field(&state, "timestamp", json_int(es_codec_kafka_time(record->time)));
	if (record->nheaders > 0)
	{
		push_key(&state, "headers");
		push_headers(&state, record);
	}
	metadata = JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
	return end_work(outer, metadata);
}
