/*
 * kafka/definition.c
 *		What a source is told to do: creating, dropping, pausing, waiting for it.
 *
 * All that a worker needs to know stands in eventstore.source, whose rows only
 * these functions write, as the extension's owner.  The worker holds its row FOR
 * SHARE in each transaction that writes something, so who has updated or deleted
 * the row knows, once he has it, that no batch is being written, and after his
 * commit none is.  The worker is called at that commit (call_at_end).
 *
 * Whatever can be checked is checked here, in the session of who gives it:
 * properties by librdkafka itself (property.c), rights as of now.  They may
 * change later, so the worker meets the same errors and shows them as its state.
 *
 * flush() and wait_for_source() are errands (wake.c): asked in shared memory and
 * awaited there.  The caller's own locks may be what the worker waits for; then
 * the time-out ends it.
 *
 * A crash: nothing but the table matters.
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/inventory.h"
#include "compat.h"
#include "errors.h"
#include "feed/subscription.h"
#include "feed/wait.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "funcapi.h"
#include "kafka/connection.h"
#include "kafka/source.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/regproc.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "worker/launcher.h"
#include "worker/wake.h"

PG_FUNCTION_INFO_V1(es_create_source);
PG_FUNCTION_INFO_V1(es_drop_source);
PG_FUNCTION_INFO_V1(es_kafka_pause);
PG_FUNCTION_INFO_V1(es_kafka_resume);
PG_FUNCTION_INFO_V1(es_kafka_flush);
PG_FUNCTION_INFO_V1(es_wait_for_source);
PG_FUNCTION_INFO_V1(es_kafka_workers);

#define FLUSH_COUNT_MAX		1000000
#define TOPIC_MAX_BYTES		249		/* Kafka's own limit */

/* create_source's arguments, by position. */
enum
{
	ARG_NAME, ARG_SERVER, ARG_TOPIC, ARG_TARGET, ARG_START, ARG_PARTITIONS, ARG_GROUP_ID,
	ARG_REPLICA_PARTITIONS, ARG_MODE, ARG_VALUE_FORMAT, ARG_TRANSFORM, ARG_ON_ERROR,
	ARG_ON_NULL_KEY, ARG_ON_GAP, ARG_FLUSH_COUNT, ARG_FLUSH_INTERVAL, ARG_CHANGELOG_TOPIC,
	ARG_CONSUMER_PROPERTIES, ARG_PRODUCER_PROPERTIES, ARG_CHANGELOG_PROPERTIES, ARG_KEY_AS,
	ARG_COUNT
};

static const char *const arg_names[ARG_COUNT] = {
	"name", "server", "topic", "target", "start", "partitions", "group_id",
	"replica_partitions", "mode", "value_format", "transform", "on_error",
	"on_null_key", "on_gap", "flush_count", "flush_interval", "changelog_topic",
	"consumer_properties", "producer_properties", "changelog_properties", "key_as"
};

/* Words, in the order of the enums that they stand for. */
static const char *const policy_words[] = {"park", "skip", "stop", NULL};
static const char *const gap_words[] = {"stop", "earliest", "latest", NULL};
static const char *const mode_words[] = {"primary", "replica", "relay", NULL};
static const char *const key_as_words[] = {"stream", "tag", NULL};

/* ---------------------------------------------------------------------------
 * Calling the worker when the transaction has committed
 * ------------------------------------------------------------------------- */

static List *to_call = NIL;		/* of EsWorkerKey *, in TopMemoryContext */

static void
call_at_end(XactEvent event, void *arg)
{
	ListCell   *cell;

	if (to_call == NIL || (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT))
		return;
	if (event == XACT_EVENT_COMMIT)
		foreach(cell, to_call)
			es_worker_call(*(EsWorkerKey *) lfirst(cell), ES_WAKE_CONFIG);
	list_free_deep(to_call);
	to_call = NIL;
}

static void
call_worker_at_commit(EsWorkerKey key)
{
	static bool registered = false;
	MemoryContext old;
	EsWorkerKey *entry;

	if (!registered)
	{
		RegisterXactCallback(call_at_end, NULL);
		registered = true;
	}
	old = MemoryContextSwitchTo(TopMemoryContext);
	entry = palloc(sizeof(EsWorkerKey));
	*entry = key;
	to_call = lappend(to_call, entry);
	MemoryContextSwitchTo(old);
}

EsWorkerKey
es_source_key(uint32 id)
{
	return (EsWorkerKey) {MyDatabaseId, ES_WORKER_SOURCE, id};
}

/* ---------------------------------------------------------------------------
 * Loading
 * ------------------------------------------------------------------------- */

static int
word_index(const char *const *words, const char *word)
{
	for (int i = 0; words[i] != NULL; i++)
		if (strcmp(words[i], word) == 0)
			return i;
	return -1;
}

/* A column of SPI's first row, copied into the caller's context; (Datum) 0 for null. */
static Datum
column(const char *name, MemoryContext context)
{
	TupleDesc	desc = SPI_tuptable->tupdesc;
	int			number = SPI_fnumber(desc, name);
	Form_pg_attribute att = TupleDescAttr(desc, number - 1);
	MemoryContext old;
	bool		isnull;
	Datum		value = SPI_getbinval(SPI_tuptable->vals[0], desc, number, &isnull);

	if (isnull)
		return (Datum) 0;
	old = MemoryContextSwitchTo(context);
	value = datumCopy(att->attlen == -1 ? PointerGetDatum(PG_DETOAST_DATUM(value)) : value,
					  att->attbyval, att->attlen);
	MemoryContextSwitchTo(old);
	return value;
}

/* The same as a string; NULL for null. */
static char *
text_column(const char *name, MemoryContext context)
{
	char	   *value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc,
									 SPI_fnumber(SPI_tuptable->tupdesc, name));

	return value != NULL ? MemoryContextStrdup(context, value) : NULL;
}

static void
read_partitions(EsSource *source, Datum array)
{
	Datum	   *elements;

	if (array == (Datum) 0)
		return;
	deconstruct_array(DatumGetArrayTypeP(array), INT4OID, 4, true, TYPALIGN_INT,
					  &elements, NULL, &source->npartitions);
	source->partitions = palloc(sizeof(int32) * Max(source->npartitions, 1));
	for (int i = 0; i < source->npartitions; i++)
		source->partitions[i] = DatumGetInt32(elements[i]);
}

bool
es_source_parse_start(EsSource *source, const char *start)
{
	Datum		value;

	source->start_offsets = NULL;
	if (strcmp(start, "earliest") == 0)
		source->start = ES_START_EARLIEST;
	else if (strcmp(start, "latest") == 0)
		source->start = ES_START_LATEST;
	else if (start[0] == '{' && es_convert(jsonb_in, CStringGetDatum(start), 0, 0, &value))
	{
		source->start = ES_START_OFFSETS;
		source->start_offsets = DatumGetJsonbP(value);
	}
	else if (es_convert(timestamptz_in, CStringGetDatum(start), ObjectIdGetDatum(InvalidOid),
						Int32GetDatum(-1), &value) &&
			 !TIMESTAMP_NOT_FINITE(DatumGetTimestampTz(value)))
	{
		source->start = ES_START_TIME;
		source->start_time = DatumGetTimestampTz(value);
	}
	else
		return false;
	return true;
}

/* From SPI's first row. */
static EsSource *
read_source(MemoryContext context)
{
	EsSource   *source = MemoryContextAllocZero(context, sizeof(EsSource));
	EsStoreFormat format;
	Interval   *flush;
	MemoryContext old;

	source->id = DatumGetInt32(column("id", context));
	source->name = text_column("name", context);
	source->owner = DatumGetObjectId(column("owner", context));
	source->server_name = text_column("server", context);
	source->server = get_foreign_server_oid(source->server_name, true);
	source->topic = text_column("topic", context);
	source->target = DatumGetObjectId(column("target", context));
	source->is_store = es_store_exists(source->target, NULL);
	source->mode = word_index(mode_words, text_column("mode", context));
	(void) es_store_format_parse(text_column("value_format", context), &format);
	source->value_format = format;
	source->transform_name = text_column("transform", context);
	source->transform = DatumGetObjectId(column("transform_oid", context));
	source->on_error = word_index(policy_words, text_column("on_error", context));
	source->on_null_key = word_index(policy_words, text_column("on_null_key", context));
	source->on_gap = word_index(gap_words, text_column("on_gap", context));
	source->flush_count = DatumGetInt32(column("flush_count", context));
	flush = DatumGetIntervalP(column("flush_interval", context));
	source->flush_us = flush->time +
		(flush->day + (int64) flush->month * DAYS_PER_MONTH) * USECS_PER_DAY;
	source->group_id = text_column("group_id", context);
	source->key_as_tag = strcmp(text_column("key_as", context), "tag") == 0;
	source->consumer_properties = (Jsonb *) DatumGetPointer(column("consumer_properties", context));
	source->changelog_topic = text_column("changelog_topic", context);
	source->paused = DatumGetBool(column("paused", context));
	source->failure = text_column("failure", context);
	source->resumes = DatumGetInt64(column("resumes", context));
	source->at_home = DatumGetBool(column("at_home", context));

	old = MemoryContextSwitchTo(context);
	read_partitions(source, column("partitions", context));
	(void) es_source_parse_start(source, text_column("start", context));
	MemoryContextSwitchTo(old);
	return source;
}

static EsSource *
load_source(const char *condition, Oid type, Datum value)
{
	MemoryContext context = CurrentMemoryContext;
	EsRoleSwitch saved;
	EsSource   *source = NULL;
	Oid			types[3] = {type, INT8OID, OIDOID};
	Datum		values[3] = {value, Int64GetDatum((int64) GetSystemIdentifier()),
	ObjectIdGetDatum(MyDatabaseId)};

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(psprintf("SELECT s.*, (s.system_identifier OPERATOR(pg_catalog.=) $2"
							" AND s.database_oid OPERATOR(pg_catalog.=) $3) AS at_home,"
							" pg_catalog.to_regprocedure(s.transform)::pg_catalog.oid AS transform_oid"
							" FROM eventstore.source s WHERE %s", condition),
				   3, types, values, NULL, false, SPI_OK_SELECT);
	if (SPI_processed > 0)
		source = read_source(context);
	SPI_finish();
	es_role_restore(&saved);
	return source;
}

EsSource *
es_source_load(uint32 id)
{
	return load_source("s.id OPERATOR(pg_catalog.=) $1", INT4OID, Int32GetDatum((int32) id));
}

EsSource *
es_source_load_named(const char *name)
{
	return load_source("s.name OPERATOR(pg_catalog.=) $1", TEXTOID, CStringGetTextDatum(name));
}

void
es_sources_want(void)
{
	Oid			types[2] = {INT8OID, OIDOID};
	Datum		values[2] = {Int64GetDatum((int64) GetSystemIdentifier()),
	ObjectIdGetDatum(MyDatabaseId)};

	SPI_connect();
	es_spi_execute("SELECT s.id FROM eventstore.source s"
				   " WHERE NOT s.paused AND s.failure IS NULL"
				   " AND s.system_identifier OPERATOR(pg_catalog.=) $1"
				   " AND s.database_oid OPERATOR(pg_catalog.=) $2",
				   2, types, values, NULL, true, SPI_OK_SELECT);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		bool		isnull;
		Datum		id = SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull);

		es_worker_want(es_source_key(DatumGetInt32(id)));
	}
	SPI_finish();
}

/* LG007 where there is none of that name. */
static EsSource *
require_source(const NullableDatum *name)
{
	char	   *given = text_to_cstring(es_name_arg(name, "name"));
	EsSource   *source = es_source_load_named(given);

	if (source == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_ES_NOT_A_COLLECTION),
				 errmsg("there is no source \"%s\"", given)));
	return source;
}

EsSource *
es_source_require_own(const NullableDatum *name)
{
	EsSource   *source = require_source(name);

	if (!has_privs_of_role(GetUserId(), source->owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("must be owner of source \"%s\"", source->name)));
	return source;
}

static bool
may_see(const EsSource *source)
{
	return has_privs_of_role(GetUserId(), source->owner) ||
		(OidIsValid(source->target) && es_may_see(source->target));
}

/* ---------------------------------------------------------------------------
 * create_source: the arguments
 * ------------------------------------------------------------------------- */

static void
refuse_value(const char *argument, const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid value for argument \"%s\"", argument),
			 errdetail_internal("%s", detail)));
}

/* Is it one of the words?  Null is the first. */
static int
word_arg(const NullableDatum *args, int n, const char *const *words)
{
	char	   *given;
	int			index;
	StringInfoData list;

	if (args[n].isnull)
		return 0;
	given = TextDatumGetCString(args[n].value);
	index = word_index(words, given);
	if (index >= 0)
		return index;
	initStringInfo(&list);
	for (int i = 0; words[i] != NULL; i++)
		appendStringInfo(&list, "%s\"%s\"", i > 0 ? ", " : "", words[i]);
	refuse_value(arg_names[n], psprintf("It is \"%s\"; there are %s.", given, list.data));
	return -1;
}

static char *
topic_arg(const NullableDatum *args, int n)
{
	char	   *topic = TextDatumGetCString(args[n].value);
	size_t		length = strlen(topic);

	if (length == 0 || length > TOPIC_MAX_BYTES || strcmp(topic, ".") == 0 ||
		strcmp(topic, "..") == 0 ||
		strspn(topic, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != length)
		refuse_value(arg_names[n],
					 psprintf("\"%s\" is no name of a topic: 1 to %d letters, digits, dots, hyphens and underscores.",
							  topic, TOPIC_MAX_BYTES));
	return topic;
}

/* Partition numbers: not negative, none twice; an empty list is none. */
static void
check_partitions(const NullableDatum *args, int n)
{
	ArrayType  *array;
	Datum	   *elements;
	bool	   *nulls;
	int			count;
	Bitmapset  *seen = NULL;

	if (args[n].isnull)
		return;
	array = DatumGetArrayTypeP(args[n].value);
	deconstruct_array(array, INT4OID, 4, true, TYPALIGN_INT, &elements, &nulls, &count);
	if (count == 0)
		refuse_value(arg_names[n], "It names no partition.");
	for (int i = 0; i < count; i++)
	{
		int			partition = nulls[i] ? -1 : DatumGetInt32(elements[i]);

		if (partition < 0 || partition > 1000000)
			refuse_value(arg_names[n], nulls[i] ? "It has a null." :
						 psprintf("There is no partition %d.", partition));
		if (bms_is_member(partition, seen))
			refuse_value(arg_names[n], psprintf("It names partition %d twice.", partition));
		seen = bms_add_member(seen, partition);
	}
}

static void
check_rights(Oid target, AclMode needed)
{
	AclResult	allowed = pg_class_aclcheck(target, GetUserId(), needed);

	if (allowed != ACLCHECK_OK)
		aclcheck_error(allowed, get_relkind_objtype(get_rel_relkind(target)),
					   get_rel_name(target));
}

/* What is stored: the store's type, or that of an event's data or body. */
static Oid
stored_type(const EsSource *source)
{
	return source->is_store ? es_store_type(es_store_get(source->target)->format) :
		es_store_type(source->value_format);
}

static void
check_transform(EsSource *source, bool format_given)
{
	Oid		   *argtypes;
	int			nargs;
	Oid			result = get_func_signature(source->transform, &argtypes, &nargs);
	AclResult	allowed = es_function_aclcheck(source->transform, GetUserId(), ACL_EXECUTE);
	EsStoreFormat format;

	if (allowed != ACLCHECK_OK)
		aclcheck_error(allowed, OBJECT_FUNCTION, get_func_name(source->transform));
	if (nargs != 1 || get_func_retset(source->transform) ||
		get_func_prokind(source->transform) != PROKIND_FUNCTION)
		refuse_value("transform", psprintf("%s is not a function of one argument with one result.",
										   source->transform_name));
	for (format = ES_STORE_JSON; format <= ES_STORE_BYTES; format++)
		if (es_store_type(format) == argtypes[0])
			break;
	if (format > ES_STORE_BYTES)
		refuse_value("transform", psprintf("The argument of %s is %s; it can be jsonb, text or bytea.",
										   source->transform_name, format_type_be(argtypes[0])));
	if (!format_given)
		source->value_format = format;
	if (source->value_format != format ||
		(source->is_store ? result != stored_type(source) :
		 result != JSONBOID && result != TEXTOID && result != BYTEAOID))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("transform %s does not fit", source->transform_name),
				 errdetail("It makes %s from %s; the value is %s, and %s is stored.",
						   format_type_be(result), format_type_be(argtypes[0]),
						   format_type_be(es_store_type(source->value_format)),
						   source->is_store ? format_type_be(stored_type(source)) :
						   "jsonb, text or bytea")));
}

static void
set_formats(EsSource *source, const NullableDatum *args)
{
	bool		given = !args[ARG_VALUE_FORMAT].isnull;

	source->value_format = ES_STORE_JSON;
	if (source->is_store)
		source->value_format = es_store_get(source->target)->format;
	if (given && !es_store_format_parse(TextDatumGetCString(args[ARG_VALUE_FORMAT].value),
										&source->value_format))
		refuse_value(arg_names[ARG_VALUE_FORMAT],
					 psprintf("It is \"%s\"; there are \"json\", \"text\", \"bytes\".",
							  TextDatumGetCString(args[ARG_VALUE_FORMAT].value)));
	if (OidIsValid(source->transform))
		check_transform(source, given);
	else if (source->is_store &&
			 source->value_format != es_store_get(source->target)->format)
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("a store of format %s cannot hold values of format %s",
						es_store_format_name(es_store_get(source->target)->format),
						es_store_format_name(source->value_format)),
				 errhint("Name a transform from one to the other.")));
}

/* LG007 where it is neither store nor collection. */
static void
set_target(EsSource *source, Oid target)
{
	source->target = target;
	source->is_store = es_store_exists(target, NULL);
	if (source->is_store)
		(void) es_store_open(target, AccessShareLock);
	else
		(void) es_collection_open(target, AccessShareLock);
	check_rights(target, ACL_INSERT);
	if (source->is_store)
	{
		check_rights(target, ACL_UPDATE);
		check_rights(target, ACL_DELETE);
	}
}

static void
refuse_unbuilt(const NullableDatum *args, const EsSource *source)
{
	static const int unbuilt[] = {ARG_GROUP_ID, ARG_REPLICA_PARTITIONS, ARG_CHANGELOG_TOPIC};

	for (int i = 0; i < lengthof(unbuilt); i++)
		if (!args[unbuilt[i]].isnull)
			ereport(ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg("\"%s\" is not supported yet", arg_names[unbuilt[i]])));
	if (source->mode != ES_SOURCE_PRIMARY)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("mode \"%s\" is not supported yet", mode_words[source->mode])));
}

static void
check_properties(NullableDatum *args)
{
	static const struct
	{
		int			arg;
		EsKafkaPropertyPlace place;
	}			given[] = {
		{ARG_CONSUMER_PROPERTIES, ES_KAFKA_CONSUMER},
		{ARG_PRODUCER_PROPERTIES, ES_KAFKA_PRODUCER},
		{ARG_CHANGELOG_PROPERTIES, ES_KAFKA_PRODUCER}
	};

	for (int i = 0; i < lengthof(given); i++)
	{
		NullableDatum *arg = &args[given[i].arg];

		if (arg->isnull)
		{
			arg->value = DirectFunctionCall1(jsonb_in, CStringGetDatum("{}"));
			arg->isnull = false;
		}
		es_kafka_check_properties(DatumGetJsonbP(arg->value), given[i].place,
								  arg_names[given[i].arg]);
	}
}

/* All that can be wrong, before anything is written. */
static void
check_arguments(EsSource *source, NullableDatum *args)
{
	for (int i = ARG_NAME; i <= ARG_TARGET; i++)
		es_require_arg(&args[i], arg_names[i]);
	source->name = text_to_cstring(es_name_arg(&args[ARG_NAME], "name"));
	source->server_name = NameStr(*DatumGetName(args[ARG_SERVER].value));
	source->server = es_kafka_server(source->server_name);
	(void) es_kafka_properties(source->server, GetUserId(), NULL);
	source->topic = topic_arg(args, ARG_TOPIC);
	source->mode = word_arg(args, ARG_MODE, mode_words);
	refuse_unbuilt(args, source);
	set_target(source, DatumGetObjectId(args[ARG_TARGET].value));
	if (!args[ARG_START].isnull &&
		!es_source_parse_start(source, TextDatumGetCString(args[ARG_START].value)))
		refuse_value("start", psprintf("\"%s\" is not \"earliest\", \"latest\", a time, nor offsets like {\"0\": 42}.",
									   TextDatumGetCString(args[ARG_START].value)));
	check_partitions(args, ARG_PARTITIONS);
	source->transform = args[ARG_TRANSFORM].isnull ? InvalidOid :
		DatumGetObjectId(args[ARG_TRANSFORM].value);
	if (OidIsValid(source->transform))
		source->transform_name = format_procedure_qualified(source->transform);
	set_formats(source, args);
	source->on_error = word_arg(args, ARG_ON_ERROR, policy_words);
	source->on_null_key = word_arg(args, ARG_ON_NULL_KEY, policy_words);
	source->on_gap = word_arg(args, ARG_ON_GAP, gap_words);
	source->key_as_tag = word_arg(args, ARG_KEY_AS, key_as_words) == 1;
	source->flush_count = args[ARG_FLUSH_COUNT].isnull ? 10000 :
		DatumGetInt32(args[ARG_FLUSH_COUNT].value);
	if (source->flush_count < 1 || source->flush_count > FLUSH_COUNT_MAX)
		refuse_value("flush_count", psprintf("It is %d; it can be 1 to %d.", source->flush_count,
											 FLUSH_COUNT_MAX));
	if (args[ARG_FLUSH_INTERVAL].isnull)
		args[ARG_FLUSH_INTERVAL].value =
			DirectFunctionCall3(interval_in, CStringGetDatum("1 s"), InvalidOid, -1);
	args[ARG_FLUSH_INTERVAL].isnull = false;
	(void) es_interval_arg(&args[ARG_FLUSH_INTERVAL], "flush_interval", false);
	check_properties(args);
}

/* ---------------------------------------------------------------------------
 * create_source, drop_source
 * ------------------------------------------------------------------------- */

/* Its id; 42710 where the name is taken. */
static uint32
insert_source(const EsSource *source, const NullableDatum *args)
{
	static const char sql[] =
	"INSERT INTO eventstore.source (name, server, owner, topic, target, start, partitions,"
	" mode, value_format, transform, on_error, on_null_key, on_gap, flush_count, flush_interval,"
	" consumer_properties, producer_properties, changelog_properties, key_as,"
	" system_identifier, database_oid)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18,"
	" $19, $20, $21) ON CONFLICT (name) DO NOTHING RETURNING id";
	Oid			types[] = {TEXTOID, NAMEOID, REGROLEOID, TEXTOID, REGCLASSOID, TEXTOID, INT4ARRAYOID,
		TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT4OID, INTERVALOID,
		JSONBOID, JSONBOID, JSONBOID, TEXTOID, INT8OID, OIDOID};
	Datum		values[] = {
		CStringGetTextDatum(source->name), args[ARG_SERVER].value, ObjectIdGetDatum(GetUserId()),
		CStringGetTextDatum(source->topic), ObjectIdGetDatum(source->target),
		args[ARG_START].isnull ? CStringGetTextDatum("earliest") : args[ARG_START].value,
		args[ARG_PARTITIONS].value, CStringGetTextDatum(mode_words[source->mode]),
		CStringGetTextDatum(es_store_format_name(source->value_format)),
		source->transform_name != NULL ? CStringGetTextDatum(source->transform_name) : (Datum) 0,
		CStringGetTextDatum(policy_words[source->on_error]),
		CStringGetTextDatum(policy_words[source->on_null_key]),
		CStringGetTextDatum(gap_words[source->on_gap]), Int32GetDatum(source->flush_count),
		args[ARG_FLUSH_INTERVAL].value, args[ARG_CONSUMER_PROPERTIES].value,
		args[ARG_PRODUCER_PROPERTIES].value, args[ARG_CHANGELOG_PROPERTIES].value,
		CStringGetTextDatum(key_as_words[source->key_as_tag ? 1 : 0]),
		Int64GetDatum((int64) GetSystemIdentifier()), ObjectIdGetDatum(MyDatabaseId)
	};
	char		nulls[lengthof(types) + 1];
	EsRoleSwitch saved;
	uint32		id = 0;
	bool		isnull;

	memset(nulls, ' ', lengthof(types));
	nulls[6] = args[ARG_PARTITIONS].isnull ? 'n' : ' ';
	nulls[9] = source->transform_name == NULL ? 'n' : ' ';
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, lengthof(types), types, values, nulls, false, SPI_OK_INSERT_RETURNING);
	if (SPI_processed > 0)
		id = DatumGetInt32(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	SPI_finish();
	es_role_restore(&saved);
	if (id == 0)
		ereport(ERROR,
				(errcode(ERRCODE_DUPLICATE_OBJECT),
				 errmsg("there is already a source \"%s\"", source->name)));
	return id;
}

Datum
es_create_source(PG_FUNCTION_ARGS)
{
	EsSource	source = {0};
	NullableDatum args[ARG_COUNT];

	es_require_preloaded();
	memcpy(args, fcinfo->args, sizeof(args));
	check_arguments(&source, args);
	call_worker_at_commit(es_source_key(insert_source(&source, args)));
	PG_RETURN_VOID();
}

/* Runs one statement about the source $1 as the extension's owner. */
static void
execute_for(const char *sql, uint32 id, int expected)
{
	Oid			types[3] = {INT4OID, INT8OID, OIDOID};
	Datum		values[3] = {Int32GetDatum((int32) id),
		Int64GetDatum((int64) GetSystemIdentifier()), ObjectIdGetDatum(MyDatabaseId)};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, 3, types, values, NULL, false, expected);
	SPI_finish();
	es_role_restore(&saved);
}

Datum
es_drop_source(PG_FUNCTION_ARGS)
{
	EsSource   *source;

	es_require_arg(&fcinfo->args[0], "name");
	source = es_source_require_own(&fcinfo->args[0]);
	execute_for("DELETE FROM eventstore.source"
				" WHERE id = $1 AND $2 IS NOT NULL AND $3 IS NOT NULL",
				source->id, SPI_OK_DELETE);
	call_worker_at_commit(es_source_key(source->id));
	PG_RETURN_VOID();
}

/* ---------------------------------------------------------------------------
 * pause, resume
 * ------------------------------------------------------------------------- */

Datum
es_kafka_pause(PG_FUNCTION_ARGS)
{
	EsSource   *source;

	es_require_arg(&fcinfo->args[0], "name");
	source = es_source_require_own(&fcinfo->args[0]);
	execute_for("UPDATE eventstore.source SET paused = true"
				" WHERE id = $1 AND $2 IS NOT NULL AND $3 IS NOT NULL",
				source->id, SPI_OK_UPDATE);
	call_worker_at_commit(es_source_key(source->id));
	PG_RETURN_VOID();
}

Datum
es_kafka_resume(PG_FUNCTION_ARGS)
{
	EsSource   *source;

	es_require_preloaded();
	es_require_arg(&fcinfo->args[0], "name");
	source = es_source_require_own(&fcinfo->args[0]);
	execute_for("UPDATE eventstore.source SET paused = false, failure = NULL, starts = 0,"
				" resumes = resumes + 1, system_identifier = $2, database_oid = $3"
				" WHERE id = $1",
				source->id, SPI_OK_UPDATE);
	call_worker_at_commit(es_source_key(source->id));
	PG_RETURN_VOID();
}

/* ---------------------------------------------------------------------------
 * flush, wait_for_source
 * ------------------------------------------------------------------------- */

static bool
run_errand(FunctionCallInfo fcinfo, EsErrand errand)
{
	EsSource   *source;
	EsWorkerKey key;
	TimestampTz deadline;
	uint64		ticket;

	es_require_preloaded();
	es_require_arg(&fcinfo->args[0], "name");
	source = require_source(&fcinfo->args[0]);
	if (!may_see(source))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for source \"%s\"", source->name)));
	deadline = es_wait_deadline(&fcinfo->args[1], "timeout");
	key = es_source_key(source->id);
	if (source->paused || source->failure != NULL)
		return false;
	return es_errand_ask(key, errand, &ticket) &&
		es_errand_wait(key, errand, ticket, deadline);
}

Datum
es_kafka_flush(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(run_errand(fcinfo, ES_ERRAND_FLUSH));
}

Datum
es_wait_for_source(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(run_errand(fcinfo, ES_ERRAND_CATCH_UP));
}

/* ---------------------------------------------------------------------------
 * What the workers say
 * ------------------------------------------------------------------------- */

#define WORKER_COLUMNS	10

static void
put_worker(FunctionCallInfo fcinfo, const EsWorkerInfo *info)
{
	static const EsWorkerStat stats[] = {
		ES_WORKER_RECORDS, ES_WORKER_BATCHES, ES_WORKER_PARKED, ES_WORKER_SKIPPED
	};
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	const EsWorkerReport *report = &info->report;
	Datum		values[WORKER_COLUMNS];
	bool		nulls[WORKER_COLUMNS] = {false};

	values[0] = Int32GetDatum((int32) info->key.object);
	nulls[1] = info->pid == 0;
	values[1] = Int32GetDatum(info->pid);
	values[2] = CStringGetTextDatum(es_worker_state_name(info->state));
	values[3] = CStringGetTextDatum(report->state);
	nulls[4] = report->since == 0;
	values[4] = TimestampTzGetDatum(report->since);
	values[5] = CStringGetTextDatum(report->message);
	for (int i = 0; i < lengthof(stats); i++)
		values[6 + i] = Int64GetDatum((int64) info->stats[stats[i]]);
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/* A message may hold a record's key, so only those see it who may see the source. */
Datum
es_kafka_workers(PG_FUNCTION_ARGS)
{
	EsWorkerInfo *workers;
	EsWorkerKind kind;
	int			n;

	es_require_arg(&fcinfo->args[0], "kind");
	kind = strcmp(TextDatumGetCString(PG_GETARG_DATUM(0)), "sink") == 0 ?
		ES_WORKER_SINK : ES_WORKER_SOURCE;
	InitMaterializedSRF(fcinfo, 0);
	if (!es_preloaded())
		PG_RETURN_NULL();
	n = es_worker_list(&workers);
	for (int i = 0; i < n; i++)
	{
		EsSource   *source;

		if (workers[i].key.database != MyDatabaseId || workers[i].key.kind != kind)
			continue;
		source = es_source_load(workers[i].key.object);
		if (source != NULL && may_see(source))
			put_worker(fcinfo, &workers[i]);
	}
	PG_RETURN_NULL();
}
