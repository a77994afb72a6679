/*
 * collection/event.c
 *		One event: taken from JSON or a composite, checked, completed, turned
 *		into a row.
 *
 * Every way in ends here, so the rules of an event (design, section 3) stand
 * once.  They are checked in C and not by CHECK constraints because the
 * append path would pay for those twice.
 *
 * The checksum covers the ten fields as they are stored (varlena contents
 * without their headers, so that TOAST compression does not matter), in column
 * order, each with a byte that tells null from present and its length.  It is
 * for finding damage, not tampering; verify() reads it, the readers do not.
 */
#include "postgres.h"

#include "collection/event.h"

#include "access/htup_details.h"
#include "access/tupmacs.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/label_index.h"
#include "errors.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "port/pg_crc32c.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

PG_FUNCTION_INFO_V1(es_uuid_v7);

/* ---------------------------------------------------------------------------
 * Tags
 * ------------------------------------------------------------------------- */

void
es_tags_begin(EsTagWalk *walk, ArrayType *tags)
{
	walk->index = 0;
	walk->count = ArrayGetNItems(ARR_NDIM(tags), ARR_DIMS(tags));
	walk->next = ARR_DATA_PTR(tags);
	walk->present = ARR_NULLBITMAP(tags);
}

bool
es_tags_next(EsTagWalk *walk, const char **tag, int *length)
{
	/* Nulls are refused, but rows that come by replication pass no trigger. */
	while (walk->present != NULL && walk->index < walk->count &&
		   (walk->present[walk->index / 8] & (1 << (walk->index % 8))) == 0)
		walk->index++;
	if (walk->index >= walk->count)
		return false;
	walk->index++;
	*tag = VARDATA_ANY(walk->next);
	*length = VARSIZE_ANY_EXHDR(walk->next);
	walk->next = att_addlength_pointer(walk->next, -1, walk->next);
	walk->next = (char *) att_align_nominal(walk->next, TYPALIGN_INT);
	return true;
}

bool
es_text_equal(const text *a, const text *b)
{
	return VARSIZE_ANY_EXHDR(a) == VARSIZE_ANY_EXHDR(b) &&
		   memcmp(VARDATA_ANY(a), VARDATA_ANY(b), VARSIZE_ANY_EXHDR(a)) == 0;
}

int
es_bytes_compare(const struct varlena *a, const struct varlena *b)
{
	int la = VARSIZE_ANY_EXHDR(a);
	int lb = VARSIZE_ANY_EXHDR(b);
	int order = memcmp(VARDATA_ANY(a), VARDATA_ANY(b), Min(la, lb));

	return order != 0 ? order : (la > lb) - (la < lb);
}

static int
compare_tags(const void *a, const void *b)
{
	int order = es_bytes_compare((text *) DatumGetPointer(**(Datum *const *) a),
								 (text *) DatumGetPointer(**(Datum *const *) b));

	if (order != 0)
		return order;
	/* The same text: the earlier one first, which is the one that stays. */
	return *(Datum *const *) a < *(Datum *const *) b ? -1 : 1;
}

/* Marks all but the first of equal tags as null; returns how many stay. */
static int
mark_repeated(Datum *tags, bool *repeated, int ntags)
{
	Datum **order = palloc(sizeof(Datum *) * ntags);
	int		kept = ntags > 0 ? 1 : 0;

	for (int i = 0; i < ntags; i++)
	{
		order[i] = &tags[i];
		repeated[i] = false;
	}
	qsort(order, ntags, sizeof(Datum *), compare_tags);
	for (int i = 1; i < ntags; i++)
	{
		if (es_text_equal((text *) DatumGetPointer(*order[i - 1]),
						  (text *) DatumGetPointer(*order[i])))
			repeated[order[i] - tags] = true;
		else
			kept++;
	}
	pfree(order);
	return kept;
}

static void
report_bad_tag(const char *what)
{
	ereport(ERROR, (errcode(ERRCODE_CHECK_VIOLATION),
					errmsg("tags of an event must not contain %s", what)));
}

ArrayType *
es_event_clean_tags(ArrayType *tags)
{
	Datum *elems;
	bool  *nulls;
	bool  *repeated;
	int	   ntags;
	int	   kept;

	if (ARR_NDIM(tags) == 0)
		return tags;
	if (ARR_NDIM(tags) > 1)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("tags of an event must be a one-dimensional array"),
						errdetail("The array has %d dimensions.", ARR_NDIM(tags))));

	deconstruct_array(tags, TEXTOID, -1, false, TYPALIGN_INT, &elems, &nulls, &ntags);
	for (int i = 0; i < ntags; i++)
	{
		if (nulls[i])
			report_bad_tag("nulls");
		if (VARSIZE_ANY_EXHDR(DatumGetPointer(elems[i])) == 0)
			report_bad_tag("empty tags");
	}
	repeated = palloc(sizeof(bool) * ntags);
	kept = mark_repeated(elems, repeated, ntags);
	if (kept < ntags || ARR_LBOUND(tags)[0] != 1 || ARR_HASNULL(tags))
	{
		int n = 0;

		for (int i = 0; i < ntags; i++)
			if (!repeated[i])
				elems[n++] = elems[i];
		tags = construct_array(elems, n, TEXTOID, -1, false, TYPALIGN_INT);
	}
	pfree(repeated);
	return tags;
}

int
es_event_labels(text *type, ArrayType *tags, EsLabel *labels)
{
	EsTagWalk	walk;
	const char *tag;
	int			length;
	int			n = 0;

	labels[n++] = es_label_of_type(VARDATA_ANY(type), VARSIZE_ANY_EXHDR(type));
	es_tags_begin(&walk, tags);
	while (es_tags_next(&walk, &tag, &length))
		labels[n++] = es_label_of_tag(tag, length);
	return n;
}

int
es_events_count_labels(const EsEvent *events, int n)
{
	int count = n;

	for (int i = 0; i < n; i++)
		count += ArrayGetNItems(ARR_NDIM(events[i].tags), ARR_DIMS(events[i].tags));
	return count;
}

/* ---------------------------------------------------------------------------
 * Identity
 * ------------------------------------------------------------------------- */

/* Random bytes come from the system in gulps: a call for each id would show. */
static void
take_random(uint8 *bytes, int n)
{
	static uint8 pool[1024];
	static int	 left = 0;

	Assert(n <= (int) sizeof(pool));
	if (left < n)
	{
		if (!pg_strong_random(pool, sizeof(pool)))
			ereport(ERROR, (errcode(ERRCODE_INTERNAL_ERROR),
							errmsg("could not generate random values for an event id")));
		left = sizeof(pool);
	}
	left -= n;
	memcpy(bytes, pool + left, n);
}

/* Milliseconds of the Unix epoch, big-endian, then version, variant and chance. */
void
es_make_uuid_v7(pg_uuid_t *uuid)
{
	int64 ms = (GetCurrentTimestamp() +
				(POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY) /
			   1000;

	for (int i = 0; i < 6; i++)
		uuid->data[i] = (uint8) (ms >> (40 - 8 * i));
	take_random(uuid->data + 6, UUID_LEN - 6);
	uuid->data[6] = (uuid->data[6] & 0x0f) | 0x70;
	uuid->data[8] = (uuid->data[8] & 0x3f) | 0x80;
}

Datum
es_uuid_v7(PG_FUNCTION_ARGS)
{
	pg_uuid_t *uuid = palloc(sizeof(pg_uuid_t));

	es_make_uuid_v7(uuid);
	PG_RETURN_UUID_P(uuid);
}

/* ---------------------------------------------------------------------------
 * Checking and completing
 * ------------------------------------------------------------------------- */

void
es_event_check(EsEvent *event)
{
	if (event->type == NULL)
		ereport(ERROR, (errcode(ERRCODE_NOT_NULL_VIOLATION),
						errmsg("type of an event must not be null")));
	if (event->data != NULL && event->body != NULL)
		ereport(ERROR, (errcode(ERRCODE_CHECK_VIOLATION),
						errmsg("an event cannot have both data and body"),
						errhint("JSON goes to data, raw bytes go to body.")));
	if (event->tags == NULL)
		event->tags = construct_empty_array(TEXTOID);
	else
		event->tags = es_event_clean_tags(event->tags);
	if (!event->id_given)
		es_make_uuid_v7(&event->id);
	if (!event->created_at_given)
		event->created_at = GetCurrentTimestamp();
}

/* ---------------------------------------------------------------------------
 * From JSON
 * ------------------------------------------------------------------------- */

typedef enum EventField
{
	FIELD_TYPE,
	FIELD_DATA,
	FIELD_TAGS,
	FIELD_STREAM,
	FIELD_METADATA,
	FIELD_BODY,
	FIELD_ID,
	FIELD_CREATED_AT,
	FIELD_EXPECTED_VERSION,
	FIELD_POSITION, /* known only to be refused */
	FIELD_VERSION,
	FIELD_COUNT
} EventField;

static const char *const field_names[FIELD_COUNT] = {
	"type",	  "data", "tags",		"stream",			"metadata",
	"body",	  "id",	  "created_at", "expected_version", "position",
	"version"};

/* So much of a bad value is shown, in bytes. */
#define SHOWN_BYTES 80

/* As JSON, and the beginning only of what is long. */
static char *
shown_value(JsonbValue *value)
{
	Jsonb *json = JsonbValueToJsonb(value);
	char  *string = JsonbToCString(NULL, &json->root, VARSIZE(json));
	int	   length = strlen(string);

	if (length <= SHOWN_BYTES)
		return string;
	return psprintf("%.*s...", pg_mbcliplen(string, length, SHOWN_BYTES), string);
}

static void
report_bad_field(EventField field, JsonbValue *value, int index, const char *expected)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("field \"%s\" of an event must be %s", field_names[field], expected),
			 errdetail("Element %d of the array of events has %s %s.", index,
					   field_names[field], shown_value(value))));
}

static EventField
find_field(const JsonbValue *key, int index)
{
	for (int i = 0; i < FIELD_COUNT; i++)
		if (key->val.string.len == (int) strlen(field_names[i]) &&
			memcmp(key->val.string.val, field_names[i], key->val.string.len) == 0)
			return (EventField) i;
	ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					errmsg("unknown field \"%s\" of an event",
						   pnstrdup(key->val.string.val, key->val.string.len)),
					errdetail("It is in element %d of the array of events.", index),
					errhint("The fields are type, data, tags, stream, metadata, body, "
							"id, created_at and expected_version.")));
	return FIELD_COUNT;
}

static text *
json_text(JsonbValue *value, EventField field, int index, const char *expected)
{
	if (value->type != jbvString)
		report_bad_field(field, value, index, expected);
	return cstring_to_text_with_len(value->val.string.val, value->val.string.len);
}

/* By the type's own input function. */
static Datum
json_typed(JsonbValue *value, EventField field, int index, PGFunction input,
		   const char *expected)
{
	text *string = json_text(value, field, index, expected);
	Datum result;

	if (!es_convert(input, CStringGetDatum(text_to_cstring(string)),
					ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1), &result))
		report_bad_field(field, value, index, expected);
	return result;
}

static bytea *
json_bytes(JsonbValue *value, int index)
{
	static const char *const expected = "a string in base64";
	text					*string = json_text(value, FIELD_BODY, index, expected);
	Datum					 result;

	if (!es_convert(binary_decode, PointerGetDatum(string), CStringGetTextDatum("base64"),
					(Datum) 0, &result))
		report_bad_field(FIELD_BODY, value, index, expected);
	return DatumGetByteaP(result);
}

static ArrayType *
json_tags(JsonbValue *value, int index)
{
	JsonbContainer *array;
	int				n;
	Datum		   *tags;

	if (value->type != jbvBinary || !JsonContainerIsArray(value->val.binary.data) ||
		JsonContainerIsScalar(value->val.binary.data))
		report_bad_field(FIELD_TAGS, value, index, "an array of strings");
	array = value->val.binary.data;
	n = JsonContainerSize(array);
	tags = palloc(sizeof(Datum) * (n + 1));
	for (int i = 0; i < n; i++)
	{
		JsonbValue *elem = getIthJsonbValueFromContainer(array, i);

		if (elem->type == jbvNull)
			report_bad_tag("nulls");
		if (elem->type != jbvString)
			report_bad_field(FIELD_TAGS, value, index, "an array of strings");
		tags[i] = PointerGetDatum(
			cstring_to_text_with_len(elem->val.string.val, elem->val.string.len));
	}
	return construct_array(tags, n, TEXTOID, -1, false, TYPALIGN_INT);
}

static int64
json_version(JsonbValue *value, int index)
{
	Datum number;

	if (value->type == jbvNumeric)
	{
		number = NumericGetDatum(value->val.numeric);
		if (!numeric_is_nan(value->val.numeric) &&
			DatumGetBool(DirectFunctionCall2(
				numeric_eq, number,
				DirectFunctionCall2(numeric_trunc, number, Int32GetDatum(0)))))
		{
			Datum limit = DirectFunctionCall1(int8_numeric, Int64GetDatum(PG_INT64_MAX));

			if (DatumGetBool(DirectFunctionCall2(numeric_le, number, limit)) &&
				DatumGetBool(DirectFunctionCall2(
					numeric_ge, number,
					DirectFunctionCall1(int8_numeric, Int64GetDatum(0)))))
				return DatumGetInt64(DirectFunctionCall1(numeric_int8, number));
		}
	}
	report_bad_field(FIELD_EXPECTED_VERSION, value, index,
					 "a whole number that is not negative");
	return 0;
}

static void
set_field(EsEvent *event, EventField field, JsonbValue *value, int index)
{
	switch (field)
	{
		case FIELD_TYPE:
			event->type = json_text(value, field, index, "a string");
			break;
		case FIELD_STREAM:
			event->stream = json_text(value, field, index, "a string");
			break;
		case FIELD_DATA:
			event->data = JsonbValueToJsonb(value);
			break;
		case FIELD_METADATA:
			event->metadata = JsonbValueToJsonb(value);
			break;
		case FIELD_TAGS:
			event->tags = json_tags(value, index);
			break;
		case FIELD_BODY:
			event->body = json_bytes(value, index);
			break;
		case FIELD_ID:
			event->id =
				*DatumGetUUIDP(json_typed(value, field, index, uuid_in, "a UUID"));
			event->id_given = true;
			break;
		case FIELD_CREATED_AT:
			event->created_at = DatumGetTimestampTz(
				json_typed(value, field, index, timestamptz_in, "a timestamp"));
			event->created_at_given = true;
			break;
		case FIELD_EXPECTED_VERSION:
			event->expected_version = json_version(value, index);
			break;
		case FIELD_POSITION:
		case FIELD_VERSION:
			ereport(
				ERROR,
				(errcode(ERRCODE_ES_APPEND_ONLY),
				 errmsg("an event to append cannot have its own %s", field_names[field]),
				 errdetail("It is in element %d of the array of events.", index),
				 errhint("Positions and versions are given by the collection.")));
			break;
		case FIELD_COUNT:
			break;
	}
}

void
es_event_from_json(EsEvent *event, JsonbContainer *object, int index)
{
	JsonbIterator	  *it = JsonbIteratorInit(object);
	JsonbIteratorToken token;
	JsonbValue		   value;
	EventField		   field = FIELD_COUNT;

	memset(event, 0, sizeof(*event));
	event->expected_version = ES_NO_VERSION;
	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			field = find_field(&value, index);
		else if (token == WJB_VALUE && value.type != jbvNull)
			set_field(event, field, &value, index);
	}
}

/* ---------------------------------------------------------------------------
 * From a composite
 * ------------------------------------------------------------------------- */

static void *
detoasted(Datum value, bool isnull)
{
	return isnull ? NULL : PG_DETOAST_DATUM(value);
}

void
es_event_from_composite(EsEvent *event, Datum composite)
{
	HeapTupleHeader row = DatumGetHeapTupleHeader(composite);
	TupleDesc		desc = lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(row),
												  HeapTupleHeaderGetTypMod(row));
	HeapTupleData	tuple;
	Datum			values[9];
	bool			nulls[9];

	Assert(desc->natts == 9);
	tuple.t_len = HeapTupleHeaderGetDatumLength(row);
	ItemPointerSetInvalid(&tuple.t_self);
	tuple.t_tableOid = InvalidOid;
	tuple.t_data = row;
	heap_deform_tuple(&tuple, desc, values, nulls);
	ReleaseTupleDesc(desc);

	memset(event, 0, sizeof(*event));
	event->type = detoasted(values[0], nulls[0]);
	event->data = detoasted(values[1], nulls[1]);
	event->tags = detoasted(values[2], nulls[2]);
	event->stream = detoasted(values[3], nulls[3]);
	event->metadata = detoasted(values[4], nulls[4]);
	event->body = detoasted(values[5], nulls[5]);
	event->id_given = !nulls[6];
	if (event->id_given)
		event->id = *DatumGetUUIDP(values[6]);
	event->created_at_given = !nulls[7];
	event->created_at = nulls[7] ? 0 : DatumGetTimestampTz(values[7]);
	event->expected_version = nulls[8] ? ES_NO_VERSION : DatumGetInt64(values[8]);
	if (!nulls[8] && event->expected_version < 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("expected_version of an event must not be negative"),
						errdetail("It is " INT64_FORMAT ".", event->expected_version)));
}

/* ---------------------------------------------------------------------------
 * To a row
 * ------------------------------------------------------------------------- */

static void
set_varlena(Datum *values, bool *nulls, int att, void *value)
{
	nulls[att - 1] = (value == NULL);
	values[att - 1] = PointerGetDatum(value);
}

void
es_event_values(const EsEvent *event, EsPosition safe, int natts, Datum *values,
				bool *nulls)
{
	memset(nulls, true, sizeof(bool) * natts);
	memset(values, 0, sizeof(Datum) * natts);

	values[ES_ATT_POSITION - 1] = Int64GetDatum(event->position);
	set_varlena(values, nulls, ES_ATT_STREAM, event->stream);
	values[ES_ATT_VERSION - 1] = Int64GetDatum(event->version);
	values[ES_ATT_ID - 1] = UUIDPGetDatum(&event->id);
	set_varlena(values, nulls, ES_ATT_TYPE, event->type);
	set_varlena(values, nulls, ES_ATT_TAGS, event->tags);
	set_varlena(values, nulls, ES_ATT_DATA, event->data);
	set_varlena(values, nulls, ES_ATT_BODY, event->body);
	set_varlena(values, nulls, ES_ATT_METADATA, event->metadata);
	values[ES_ATT_CREATED_AT - 1] = TimestampTzGetDatum(event->created_at);
	values[ES_ATT_SAFE_HEAD - 1] = Int64GetDatum(safe);
	nulls[ES_ATT_POSITION - 1] = false;
	nulls[ES_ATT_VERSION - 1] = (event->stream == NULL);
	nulls[ES_ATT_ID - 1] = false;
	nulls[ES_ATT_CREATED_AT - 1] = false;
	nulls[ES_ATT_SAFE_HEAD - 1] = false;

	values[ES_ATT_CHECKSUM - 1] = Int32GetDatum(es_event_checksum(values, nulls));
	nulls[ES_ATT_CHECKSUM - 1] = false;
}

static Size
varlena_bytes(const void *value)
{
	return value == NULL ? 0 : VARSIZE_ANY(value);
}

Size
es_event_bytes(const EsEvent *event)
{
	return varlena_bytes(event->type) + varlena_bytes(event->stream) +
		   varlena_bytes(event->tags) + varlena_bytes(event->data) +
		   varlena_bytes(event->body) + varlena_bytes(event->metadata);
}

static pg_crc32c
add_bytes(pg_crc32c crc, const void *bytes, int32 length)
{
	COMP_CRC32C(crc, &length, sizeof(length));
	COMP_CRC32C(crc, bytes, length);
	return crc;
}

static pg_crc32c
add_varlena(pg_crc32c crc, Datum value)
{
	struct varlena *flat = PG_DETOAST_DATUM_PACKED(value);

	crc = add_bytes(crc, VARDATA_ANY(flat), VARSIZE_ANY_EXHDR(flat));
	if ((Pointer) flat != DatumGetPointer(value))
		pfree(flat);
	return crc;
}

int32
es_event_checksum(const Datum *values, const bool *nulls)
{
	pg_crc32c crc;

	INIT_CRC32C(crc);
	for (int i = 0; i < ES_EVENT_NATTS; i++)
	{
		char present = !nulls[i];

		COMP_CRC32C(crc, &present, 1);
		if (!present)
			continue;
		switch (i + 1)
		{
			case ES_ATT_POSITION:
			case ES_ATT_VERSION:
			case ES_ATT_CREATED_AT:
			{
				int64 number = DatumGetInt64(values[i]);

				crc = add_bytes(crc, &number, sizeof(number));
				break;
			}
			case ES_ATT_ID:
				crc = add_bytes(crc, DatumGetUUIDP(values[i])->data, UUID_LEN);
				break;
			default:
				crc = add_varlena(crc, values[i]);
		}
	}
	FIN_CRC32C(crc);
	return (int32) crc;
}

bool
es_event_verify_slot(TupleTableSlot *slot)
{
	slot_getsomeattrs(slot, ES_COLLECTION_NATTS);
	return !slot->tts_isnull[ES_ATT_CHECKSUM - 1] &&
		   DatumGetInt32(slot->tts_values[ES_ATT_CHECKSUM - 1]) ==
			   es_event_checksum(slot->tts_values, slot->tts_isnull);
}
