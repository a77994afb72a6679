/*
 * kafka/codec.c
 *		Between a record's bytes and values of PostgreSQL.
 *
 * A record that does not decode must neither stop its topic nor vanish, so what
 * is wrong with it is a result here and not an error.  What raises one inside
 * PostgreSQL only computes, and is caught (es_convert_noting).
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
#include "utils/datum.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"

/* ---------------------------------------------------------------------------
 * Values
 * ------------------------------------------------------------------------- */

/* A text behind which there is a 0, so that its bytes are a C string, too. */
static text *
terminated_text(const char *bytes, size_t length)
{
	text *copy = palloc(VARHDRSZ + length + 1);

	SET_VARSIZE(copy, VARHDRSZ + length);
	memcpy(VARDATA(copy), bytes, length);
	VARDATA(copy)[length] = '\0';
	return copy;
}

/* (bytes, length) to text in the database's encoding; a function for es_convert's sake. */
static Datum
text_from_utf8(PG_FUNCTION_ARGS)
{
	char *bytes = (char *) PG_GETARG_POINTER(0);
	int	  length = PG_GETARG_INT32(1);
	char *converted = pg_any_to_server(bytes, length, PG_UTF8);

	if (converted != bytes)
		length = (int) strlen(converted);
	PG_RETURN_TEXT_P(terminated_text(converted, length));
}

static bool
set_problem(EsProblem *problem, int sqlstate, const char *reason)
{
	problem->sqlstate = sqlstate;
	problem->reason = reason;
	return false;
}

/* Mostly nothing is to be converted, and then nothing has to be caught. */
static bool
decode_text(const char *bytes, size_t length, Datum *value, EsProblem *problem)
{
	bool valid;

	if (memchr(bytes, '\0', length) != NULL)
		return set_problem(problem, ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
						   "it has a byte 0, which text cannot have");
	if (GetDatabaseEncoding() == PG_UTF8)
	{
		valid = pg_verify_mbstr(PG_UTF8, bytes, (int) length, true);
		if (valid)
			*value = PointerGetDatum(terminated_text(bytes, length));
	}
	else
		valid = es_convert(text_from_utf8, PointerGetDatum(bytes),
						   Int32GetDatum((int32) length), 0, value);
	return valid || set_problem(problem, ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
								"it is not UTF-8, or not in the database's encoding");
}

/*
 * Making jsonb takes some kilobytes, for each of the tens of thousands of records of
 * a batch: only what comes of it is kept.  Emptied before and after each use.
 */
static MemoryContext
making_context(void)
{
	static MemoryContext context = NULL;

	if (context == NULL)
		context = AllocSetContextCreate(TopMemoryContext, "eventstore record as JSON",
										ALLOCSET_DEFAULT_SIZES);
	MemoryContextReset(context);
	return context;
}

/* The SQLSTATE of what is wrong with the text; 0. */
static int
parse_json(const text *json, Datum *value)
{
	MemoryContext context = making_context();
	MemoryContext old = MemoryContextSwitchTo(context);
	int			  sqlstate =
		es_convert_noting(jsonb_in, CStringGetDatum(VARDATA(json)), 0, 0, value);

	MemoryContextSwitchTo(old);
	if (sqlstate == 0)
		*value = datumCopy(*value, false, -1);
	MemoryContextReset(context);
	return sqlstate;
}

static bool
decode_json(const char *bytes, size_t length, Datum *value, EsProblem *problem)
{
	Datum as_text;
	int	  sqlstate;

	if (!decode_text(bytes, length, &as_text, problem))
		return false;
	sqlstate = parse_json((text *) DatumGetPointer(as_text), value);
	pfree(DatumGetPointer(as_text));
	if (sqlstate == 0)
		return true;
	if (ERRCODE_TO_CATEGORY(sqlstate) != ERRCODE_DATA_EXCEPTION)
		return set_problem(problem, ERRCODE_PROGRAM_LIMIT_EXCEEDED,
						   "it is nested too deeply, or too large");
	return set_problem(problem, ERRCODE_INVALID_TEXT_REPRESENTATION,
					   length == 0 ? "it is empty, which is not JSON" : "it is not JSON");
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

const EsHeader *
es_codec_header(const EsRecord *record, const char *name)
{
	for (int i = 0; i < record->nheaders; i++)
		if (strcmp(record->headers[i].name, name) == 0 &&
			record->headers[i].value != NULL)
			return &record->headers[i];
	return NULL;
}

static void
push_field(JsonbParseState **state, const char *key, JsonbValue value)
{
	push_key(state, key);
	pushJsonbValue(state, WJB_VALUE, &value);
}

static Jsonb *
make_metadata(const EsRecord *record)
{
	MemoryContext	 context = making_context();
	MemoryContext	 old = MemoryContextSwitchTo(context);
	JsonbParseState *state = NULL;
	Jsonb			*metadata;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	push_field(&state, ES_ORIGIN_TOPIC,
			   json_string(record->topic, strlen(record->topic)));
	push_field(&state, ES_ORIGIN_PARTITION, json_int(record->partition));
	push_field(&state, ES_ORIGIN_OFFSET, json_int(record->offset));
	if (record->has_since)
		push_field(&state, ES_ORIGIN_SINCE, json_int(record->since));
	if (record->has_time)
		push_field(&state, ES_ORIGIN_TIMESTAMP,
				   json_int(es_codec_kafka_time(record->time)));
	if (record->nheaders > 0)
	{
		push_key(&state, ES_ORIGIN_HEADERS);
		push_headers(&state, record);
	}
	metadata = JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
	MemoryContextSwitchTo(old);
	metadata = DatumGetJsonbP(datumCopy(JsonbPGetDatum(metadata), false, -1));
	MemoryContextReset(context);
	return metadata;
}

static void
set_pattern(EsMetadataPattern *pattern, const EsRecord *record, Jsonb *metadata)
{
	static const char *const names[ES_METADATA_NUMBERS] = {
		ES_ORIGIN_OFFSET, ES_ORIGIN_SINCE, ES_ORIGIN_TIMESTAMP};

	pattern->metadata = metadata;
	pattern->topic = record->topic;
	pattern->partition = record->partition;
	for (int i = 0; i < ES_METADATA_NUMBERS; i++)
	{
		JsonbValue	number;
		JsonbValue *found = getKeyJsonValueFromContainer(&metadata->root, names[i],
														 strlen(names[i]), &number);

		pattern->at[i] =
			found == NULL ? 0 : (int) ((char *) number.val.numeric - (char *) metadata);
	}
}

static bool
fits_pattern(const EsMetadataPattern *pattern, const EsRecord *record)
{
	return pattern->metadata != NULL && record->nheaders == 0 &&
		   pattern->partition == record->partition && pattern->topic == record->topic &&
		   record->has_since == (pattern->at[ES_METADATA_SINCE_AT] != 0) &&
		   record->has_time == (pattern->at[ES_METADATA_TIMESTAMP_AT] != 0);
}

/* In the place of one that is as long; false where it is not. */
static bool
replace_number(Jsonb *metadata, int at, int64 value)
{
	Numeric number;
	Numeric place = (Numeric) ((char *) metadata + at);
	bool	fits;

	if (at == 0)
		return true;
	number = int64_to_numeric(value);
	fits = VARSIZE(number) == VARSIZE(place);
	if (fits)
		memcpy(place, number, VARSIZE(number));
	pfree(number);
	return fits;
}

Jsonb *
es_codec_metadata(const EsRecord *record, EsMetadataPattern *pattern)
{
	Jsonb *metadata;

	if (fits_pattern(pattern, record))
	{
		metadata = palloc(VARSIZE(pattern->metadata));
		memcpy(metadata, pattern->metadata, VARSIZE(pattern->metadata));
		if (replace_number(metadata, pattern->at[ES_METADATA_OFFSET_AT],
						   record->offset) &&
			replace_number(metadata, pattern->at[ES_METADATA_SINCE_AT], record->since) &&
			replace_number(metadata, pattern->at[ES_METADATA_TIMESTAMP_AT],
						   es_codec_kafka_time(record->time)))
			return metadata;
		pfree(metadata);
	}
	metadata = make_metadata(record);
	if (record->nheaders == 0)
		set_pattern(pattern, record, metadata);
	return metadata;
}
