/*
 * kafka/writer.c
 *		Records into a store or a collection.
 *
 * In two steps, because they fail in two ways.  Decoding only computes: a
 * record that is no JSON is known before any table is touched, and costs the
 * others nothing.  Writing runs what the user has put there (the transform,
 * triggers, constraints); what that raises aborts the transaction, and the
 * worker finds the record that it was by halving (batch.c).
 *
 * A store gets the batch in one go (store/batch.c), in which the last record of
 * a key counts; a collection one append.  Used by the worker and by
 * retry_dead_letters(), in a backend.
 */
#include "postgres.h"

#include "kafka/writer.h"

#include "catalog/pg_type.h"
#include "collection/append.h"
#include "collection/collection.h"
#include "kafka/argument.h"
#include "miscadmin.h"
#include "store/batch.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/syscache.h"

struct EsDecoded
{
	Datum key;
	bool  has_key;
	Datum value; /* as the source's value_format; then as it is stored */
	bool  has_value;
	bool  dropped;
};

/*
 * Whoever may make the function anew under its name may give it other types, and
 * what it returns would be taken for what it is not.
 */
static void
find_transform(EsWriter *writer)
{
	const EsSource *source = writer->source;
	Oid				argument;
	Oid				result;

	if (!SearchSysCacheExists1(PROCOID, ObjectIdGetDatum(source->transform)))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_FUNCTION),
				 errmsg("function %s does not exist", source->transform_name),
				 errdetail("It is the transform of source \"%s\".", source->name)));
	es_kafka_check_execute(source->transform, source->owner);
	if (!es_kafka_function_types(source->transform, &argument, &result) ||
		argument != es_store_type(source->value_format) ||
		(source->is_store
			 ? result != es_store_type(writer->stored_format)
			 : result != JSONBOID && result != TEXTOID && result != BYTEAOID))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("transform %s does not fit", source->transform_name),
				 errdetail("It returns another type than when source \"%s\" was created.",
						   source->name)));
	fmgr_info(source->transform, &writer->transform);
	writer->result_type = result;
}

EsWriter *
es_writer_begin(const EsSource *source)
{
	EsWriter *writer = palloc0(sizeof(EsWriter));

	writer->source = source;
	writer->key_format = source->mode == ES_SOURCE_RELAY ? ES_STORE_BYTES : ES_STORE_TEXT;
	writer->stored_format = source->value_format;
	writer->keeps_headers = source->mode != ES_SOURCE_RELAY;
	if (source->is_store)
	{
		EsStore *store = es_store_open(source->target, RowExclusiveLock);

		writer->key_format = store->key_format;
		writer->stored_format = store->format;
		writer->keeps_headers = OidIsValid(store->changelog);
	}
	writer->event_type = cstring_to_text(source->topic);
	if (source->transform_name != NULL)
		find_transform(writer);
	return writer;
}

/* ---------------------------------------------------------------------------
 * Decoding
 * ------------------------------------------------------------------------- */

static void
decode_record(const EsWriter *writer, const EsRecord *record, EsDecoded *decoded,
			  EsProblem *problem)
{
	const EsSource *source = writer->source;
	EsStoreFormat	format =
		  record->from_changelog ? writer->stored_format : source->value_format;

	problem->sqlstate = 0;
	problem->reason = NULL;
	decoded->has_key = record->key != NULL;
	decoded->has_value = record->value != NULL;
	decoded->dropped = false;
	if (!decoded->has_key && (source->is_store || source->mode == ES_SOURCE_RELAY))
	{
		problem->sqlstate = ERRCODE_NULL_VALUE_NOT_ALLOWED;
		problem->reason = "the record has no key";
	}
	else if (decoded->has_key &&
			 !es_codec_decode(writer->key_format, record->key, record->key_length,
							  &decoded->key, problem))
		problem->reason = psprintf("the key cannot be taken: %s", problem->reason);
	else if (decoded->has_value &&
			 !es_codec_decode(format, record->value, record->value_length,
							  &decoded->value, problem))
		problem->reason = psprintf("the value cannot be taken as %s: %s",
								   es_store_format_name(format), problem->reason);
	else if (writer->keeps_headers && !es_codec_headers_fit(record))
	{
		problem->sqlstate = ERRCODE_PROGRAM_LIMIT_EXCEEDED;
		problem->reason = "its headers are too many or too large for metadata";
	}
}

EsDecoded *
es_writer_decode(const EsWriter *writer, const EsRecord *records, int n,
				 EsProblem *problems)
{
	EsDecoded *decoded = palloc(sizeof(EsDecoded) * n);

	for (int i = 0; i < n; i++)
		decode_record(writer, &records[i], &decoded[i], &problems[i]);
	return decoded;
}

/* ---------------------------------------------------------------------------
 * Writing
 * ------------------------------------------------------------------------- */

static void
apply_transform(EsWriter *writer, EsDecoded *decoded, EsWritten *written)
{
	LOCAL_FCINFO(fcinfo, 1);

	if (!decoded->has_value)
		return; /* a delete stays one */
	InitFunctionCallInfoData(*fcinfo, &writer->transform, 1, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = decoded->value;
	fcinfo->args[0].isnull = false;
	decoded->value = FunctionCallInvoke(fcinfo);
	if (fcinfo->isnull)
	{
		decoded->dropped = true;
		written->dropped++;
	}
	else
		decoded->value = PointerGetDatum(PG_DETOAST_DATUM(decoded->value));
}

bool
es_writer_value(EsWriter *writer, EsDecoded *decoded, int number, EsRecord *record)
{
	EsWritten		written = {0};
	struct varlena *value;

	if (!OidIsValid(writer->source->transform) || !decoded[number].has_value)
		return true;
	apply_transform(writer, &decoded[number], &written);
	if (decoded[number].dropped)
		return false;
	value = (struct varlena *) DatumGetPointer(decoded[number].value);
	record->value = VARDATA_ANY(value);
	record->value_length = VARSIZE_ANY_EXHDR(value);
	if (writer->result_type == JSONBOID)
	{
		record->value = JsonbToCString(NULL, &((Jsonb *) value)->root, VARSIZE(value));
		record->value_length = strlen(record->value);
	}
	return true;
}

static void
write_store(EsWriter *writer, const EsRecord *records, const EsDecoded *decoded, int n,
			const EsProblem *problems)
{
	EsStoreChange	  *changes = palloc0(sizeof(EsStoreChange) * n);
	EsMetadataPattern  pattern = {0};
	EsStoreBatchResult result;
	Oid				   changelog;
	int				   nchanges = 0;

	(void) es_store_exists(writer->source->target, &changelog);
	for (int i = 0; i < n; i++)
	{
		EsStoreChange *change = &changes[nchanges];

		if (problems[i].sqlstate != 0 || decoded[i].dropped)
			continue;
		change->key = decoded[i].key;
		change->value = decoded[i].value;
		change->is_delete = !decoded[i].has_value;
		if (OidIsValid(changelog))
			change->metadata = es_codec_metadata(&records[i], &pattern);
		nchanges++;
	}
	es_store_apply(writer->source->target, changes, nchanges,
				   writer->restoring ? writer->source->changelog_topic : NULL, &result);
}

/* What the value is, by its type. */
static void
set_value(EsWriter *writer, EsEvent *event, const EsDecoded *decoded)
{
	Oid type = OidIsValid(writer->source->transform)
				   ? writer->result_type
				   : es_store_type(writer->source->value_format);

	if (!decoded->has_value)
		return;
	if (type == JSONBOID)
		event->data = DatumGetJsonbP(decoded->value);
	else
		event->body = (bytea *) DatumGetPointer(decoded->value);
}

static ArrayType *
key_tag(const EsDecoded *decoded)
{
	static const char prefix[] = {'k', 'e', 'y', ':'};
	const text		 *key = DatumGetTextPP(decoded->key);
	Size			  length = sizeof(prefix) + VARSIZE_ANY_EXHDR(key);
	text			 *tag = palloc(VARHDRSZ + length);
	Datum			  elements[1] = {PointerGetDatum(tag)};

	SET_VARSIZE(tag, VARHDRSZ + length);
	memcpy(VARDATA(tag), prefix, sizeof(prefix));
	memcpy(VARDATA(tag) + sizeof(prefix), VARDATA_ANY(key), VARSIZE_ANY_EXHDR(key));
	return construct_array(elements, 1, TEXTOID, -1, false, TYPALIGN_INT);
}

static void
write_collection(EsWriter *writer, const EsRecord *records, const EsDecoded *decoded,
				 int n, const EsProblem *problems)
{
	EsMetadataPattern pattern = {0};
	EsAppend		  append = {0};

	append.coll = es_collection_open(writer->source->target, RowExclusiveLock);
	append.events = palloc0(sizeof(EsEvent) * n);
	append.expected_version = ES_NO_VERSION;
	for (int i = 0; i < n; i++)
	{
		EsEvent *event = &append.events[append.nevents];

		if (problems[i].sqlstate != 0 || decoded[i].dropped)
			continue;
		event->type = writer->event_type;
		event->expected_version = ES_NO_VERSION;
		event->metadata = es_codec_metadata(&records[i], &pattern);
		event->created_at_given = records[i].has_time;
		event->created_at = records[i].time;
		set_value(writer, event, &decoded[i]);
		if (decoded[i].has_key && writer->source->key_as_tag)
			event->tags = key_tag(&decoded[i]);
		else if (decoded[i].has_key)
			event->stream = DatumGetTextPP(decoded[i].key);
		append.nevents++;
	}
	if (append.nevents > 0)
		es_append_run(&append);
}

void
es_writer_write(EsWriter *writer, const EsRecord *records, EsDecoded *decoded, int n,
				const EsProblem *problems, EsWritten *written)
{
	memset(written, 0, sizeof(*written));
	for (int i = 0; i < n; i++)
	{
		if (problems[i].sqlstate != 0)
			continue;
		if (OidIsValid(writer->source->transform) && !records[i].from_changelog)
			apply_transform(writer, &decoded[i], written);
		if (!decoded[i].dropped)
			written->written++;
	}
	if (written->written == 0)
		return;
	if (writer->source->is_store)
		write_store(writer, records, decoded, n, problems);
	else
		write_collection(writer, records, decoded, n, problems);
}
