/*
 * kafka/sink_definition.c
 *		What a sink is told to do: creating and dropping it.
 *
 * As definition.c does for sources: all that a worker needs to know stands in
 * eventstore.sink, and what can be checked is checked here, in the session of
 * who gives it.  A function for the key is kept as text, for an OID would not
 * survive pg_upgrade or DROP FUNCTION, and is looked up each time events are read.
 *
 * A crash: nothing but the tables matters.
 */
#include "postgres.h"

#include "access/xlog.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "errors.h"
#include "feed/read.h"
#include "feed/subscription.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "kafka/argument.h"
#include "kafka/connection.h"
#include "kafka/sink.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"

PG_FUNCTION_INFO_V1(es_create_sink);
PG_FUNCTION_INFO_V1(es_drop_sink);

#define PROGRESS_TOPIC "eventstore-sink-progress"

/* create_sink's arguments, by position. */
enum
{
	ARG_NAME,
	ARG_SERVER,
	ARG_TOPIC,
	ARG_COLLECTION,
	ARG_QUERY,
	ARG_KEY,
	ARG_AFTER,
	ARG_EXACTLY_ONCE,
	ARG_ON_ERROR,
	ARG_FLUSH_COUNT,
	ARG_FLUSH_INTERVAL,
	ARG_PROGRESS_TOPIC,
	ARG_PRODUCER_PROPERTIES,
	ARG_COUNT
};

static const char *const arg_names[ARG_COUNT] = {"name",
												 "server",
												 "topic",
												 "collection",
												 "query",
												 "key",
												 "after",
												 "exactly_once",
												 "on_error",
												 "flush_count",
												 "flush_interval",
												 "progress_topic",
												 "producer_properties"};

/* In the order of the enums. */
static const char *const policy_words[] = {"stop", "skip", "park", NULL};
static const char *const key_words[] = {"stream", "id", "position", "type", "none", NULL};

EsWorkerKey
es_sink_key(uint32 id)
{
	return (EsWorkerKey){MyDatabaseId, ES_WORKER_SINK, id};
}

/* ---------------------------------------------------------------------------
 * Loading
 * ------------------------------------------------------------------------- */

/* From key_text. */
static void
parse_key(EsSink *sink)
{
	int word = es_kafka_word_index(key_words, sink->key_text);

	sink->key = ES_SINK_KEY_FUNCTION;
	if (word >= 0)
		sink->key = (EsSinkKey) word;
	else if (strncmp(sink->key_text, "tag:", 4) == 0)
	{
		sink->key = ES_SINK_KEY_TAG;
		sink->tag_prefix = psprintf("%s:", sink->key_text + 4);
	}
}

static void
read_ends(EsSink *sink, Datum array)
{
	Datum *ends;

	if (array == (Datum) 0)
		return;
	deconstruct_array(DatumGetArrayTypeP(array), INT8OID, sizeof(int64), FLOAT8PASSBYVAL,
					  TYPALIGN_DOUBLE, &ends, NULL, &sink->nends);
	sink->ends = palloc(sizeof(int64) * Max(sink->nends, 1));
	for (int i = 0; i < sink->nends; i++)
		sink->ends[i] = DatumGetInt64(ends[i]);
}

/* From SPI's first row. */
static EsSink *
read_sink(MemoryContext context)
{
	EsSink		 *sink = MemoryContextAllocZero(context, sizeof(EsSink));
	Jsonb		 *query;
	Datum		  ends;
	MemoryContext old;

	sink->id = DatumGetInt32(es_task_column("id", context));
	sink->name = es_task_text("shown_name", context);
	sink->owner = DatumGetObjectId(es_task_column("owner", context));
	sink->server_name = es_task_text("server", context);
	sink->server = get_foreign_server_oid(sink->server_name, true);
	sink->topic = es_task_text("topic", context);
	sink->collection = DatumGetObjectId(es_task_column("collection", context));
	sink->key_text = es_task_text("key", context);
	sink->exactly_once = DatumGetBool(es_task_column("exactly_once", context));
	sink->on_error = es_kafka_word_index(policy_words, es_task_text("on_error", context));
	sink->flush_count = DatumGetInt32(es_task_column("flush_count", context));
	sink->flush_us = es_kafka_interval_us(es_task_column("flush_interval", context));
	sink->progress_topic = es_task_text("progress_topic", context);
	sink->producer_properties =
		(Jsonb *) DatumGetPointer(es_task_column("producer_properties", context));
	sink->changelog_of = DatumGetInt32(es_task_column("changelog_of", context));
	sink->paused = DatumGetBool(es_task_column("paused", context));
	sink->failure = es_task_text("failure", context);
	sink->created_at = DatumGetTimestampTz(es_task_column("created_at", context));
	sink->resumes = DatumGetInt64(es_task_column("resumes", context));
	sink->at_home = DatumGetBool(es_task_column("at_home", context));
	sink->position = DatumGetInt64(es_task_column("position", context));
	sink->topic_id = es_task_text("topic_id", context);
	sink->again_to = DatumGetInt64(es_task_column("again_to", context));
	sink->known_to = DatumGetInt64(es_task_column("known_to", context));
	ends = es_task_column("ends", context);
	query = (Jsonb *) DatumGetPointer(es_task_column("query", context));

	old = MemoryContextSwitchTo(context);
	if (query != NULL)
		sink->query = es_query_from_jsonb(query, "query");
	parse_key(sink);
	read_ends(sink, ends);
	MemoryContextSwitchTo(old);
	return sink;
}

EsSink *
es_sink_load(uint32 id)
{
	static const char sql[] =
		"SELECT s.*, p.position, p.ends, p.topic_id, p.again_to, p.known_to,"
		" (s.system_identifier OPERATOR(pg_catalog.=) $2"
		" AND s.database_oid OPERATOR(pg_catalog.=) $3) AS at_home,"
		" COALESCE(s.name, f.name, 'changelog sink ' || s.id) AS shown_name"
		" FROM eventstore.sink s JOIN eventstore.sink_position p ON p.sink = s.id"
		" LEFT JOIN eventstore.source f ON f.id = s.changelog_of WHERE s.id = $1";
	MemoryContext context = CurrentMemoryContext;
	EsRoleSwitch  saved;
	EsSink		 *sink = NULL;
	Oid			  types[3] = {INT4OID, INT8OID, OIDOID};
	Datum		  values[3] = {Int32GetDatum((int32) id),
							   Int64GetDatum((int64) GetSystemIdentifier()),
							   ObjectIdGetDatum(MyDatabaseId)};

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, 3, types, values, NULL, false, SPI_OK_SELECT);
	if (SPI_processed > 0)
		sink = read_sink(context);
	SPI_finish();
	es_role_restore(&saved);
	return sink;
}

/* ---------------------------------------------------------------------------
 * create_sink: the arguments
 * ------------------------------------------------------------------------- */

static bool
is_event_type(Oid type)
{
	return type == get_rel_type_id(es_extension_relation("event"));
}

/* The function's name with its schema, as it is kept. */
static char *
check_key_function(const char *given)
{
	Oid function =
		DatumGetObjectId(DirectFunctionCall1(regprocedurein, CStringGetDatum(given)));
	Oid argument;
	Oid result;

	if (!OidIsValid(function))
		es_kafka_refuse("key", psprintf("\"%s\" is no function.", given));
	es_kafka_check_execute(function, GetUserId());
	if (!es_kafka_function_types(function, &argument, &result) ||
		!is_event_type(argument) || (result != TEXTOID && result != BYTEAOID))
		es_kafka_refuse("key", psprintf("%s is not a function of one eventstore.event "
										"that returns text or bytea.",
										format_procedure_qualified(function)));
	return format_procedure_qualified(function);
}

static const char *
key_arg(const NullableDatum *arg)
{
	EsSink sink = {0};

	sink.key_text = arg->isnull ? "stream" : TextDatumGetCString(arg->value);
	parse_key(&sink);
	if (sink.key == ES_SINK_KEY_TAG && sink.key_text[4] == '\0')
		es_kafka_refuse("key", "The tag has no name.");
	if (sink.key != ES_SINK_KEY_FUNCTION)
		return sink.key_text;
	if (strchr(sink.key_text, '(') == NULL)
		es_kafka_refuse("key",
						psprintf("It is \"%s\"; there are \"stream\", \"id\", "
								 "\"position\", \"type\", \"none\", \"tag:NAME\", and "
								 "functions like \"my.key(eventstore.event)\".",
								 sink.key_text));
	return check_key_function(sink.key_text);
}

/* LG004, LG005 for a position that is given. */
static void
set_collection(EsSinkDefinition *sink, const NullableDatum *args)
{
	EsCollection *coll;

	sink->collection =
		es_collection_or_changelog(DatumGetObjectId(args[ARG_COLLECTION].value));
	coll = es_read_open_collection(sink->collection);
	sink->after =
		es_read_position_arg(&args[ARG_AFTER], "after", coll->first_position - 1);
	if (!args[ARG_AFTER].isnull)
	{
		es_collection_load_head(coll);
		es_collection_check_cursor(coll, sink->after);
	}
	if (!args[ARG_QUERY].isnull)
	{
		sink->query = DatumGetJsonbP(args[ARG_QUERY].value);
		(void) es_query_from_jsonb(sink->query, "query");
	}
}

static void
set_progress_topic(EsSinkDefinition *sink, const NullableDatum *args)
{
	const NullableDatum *arg = &args[ARG_PROGRESS_TOPIC];

	sink->exactly_once =
		!args[ARG_EXACTLY_ONCE].isnull && DatumGetBool(args[ARG_EXACTLY_ONCE].value);
	if (!sink->exactly_once && !arg->isnull)
		es_kafka_refuse(arg_names[ARG_PROGRESS_TOPIC], "It goes with exactly_once only.");
	if (sink->exactly_once)
		sink->progress_topic =
			arg->isnull ? PROGRESS_TOPIC
						: es_kafka_topic_arg(arg, arg_names[ARG_PROGRESS_TOPIC]);
	if (sink->exactly_once && strcmp(sink->progress_topic, sink->topic) == 0)
		es_kafka_refuse(arg_names[ARG_PROGRESS_TOPIC], "It is the topic of the events.");
}

/* All that can be wrong, before anything is written. */
static void
check_arguments(EsSinkDefinition *sink, NullableDatum *args)
{
	for (int i = ARG_NAME; i <= ARG_COLLECTION; i++)
		es_require_arg(&args[i], arg_names[i]);
	sink->name = text_to_cstring(es_name_arg(&args[ARG_NAME], "name"));
	sink->server_name = NameStr(*DatumGetName(args[ARG_SERVER].value));
	(void) es_kafka_properties(es_kafka_server(sink->server_name), GetUserId(), NULL);
	sink->topic = es_kafka_topic_arg(&args[ARG_TOPIC], arg_names[ARG_TOPIC]);
	set_collection(sink, args);
	sink->key = key_arg(&args[ARG_KEY]);
	sink->on_error =
		es_kafka_word_arg(&args[ARG_ON_ERROR], arg_names[ARG_ON_ERROR], policy_words);
	sink->flush_count =
		es_kafka_flush_count_arg(&args[ARG_FLUSH_COUNT], sink->flush_count);
	es_kafka_flush_interval_arg(&args[ARG_FLUSH_INTERVAL], "100 ms");
	sink->flush_interval = args[ARG_FLUSH_INTERVAL].value;
	set_progress_topic(sink, args);
	es_kafka_properties_arg(&args[ARG_PRODUCER_PROPERTIES], ES_KAFKA_PRODUCER,
							arg_names[ARG_PRODUCER_PROPERTIES]);
	sink->producer_properties = DatumGetJsonbP(args[ARG_PRODUCER_PROPERTIES].value);
}

/* ---------------------------------------------------------------------------
 * create_sink, drop_sink
 * ------------------------------------------------------------------------- */

void
es_sink_define(EsSinkDefinition *definition)
{
	memset(definition, 0, sizeof(*definition));
	definition->owner = GetUserId();
	definition->key = "stream";
	definition->flush_count = 10000;
	definition->flush_interval =
		DirectFunctionCall3(interval_in, CStringGetDatum("100 ms"), InvalidOid, -1);
	definition->producer_properties =
		DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum("{}")));
}

static Datum
nullable_text(const char *string, char *null)
{
	*null = string == NULL ? 'n' : ' ';
	return string == NULL ? (Datum) 0 : CStringGetTextDatum(string);
}

uint32
es_sink_create_internal(const EsSinkDefinition *sink)
{
	static const char sql[] =
		"WITH made AS (INSERT INTO eventstore.sink (name, server, owner, topic, "
		"collection, query,"
		" key, exactly_once, on_error, flush_count, flush_interval, progress_topic,"
		" producer_properties, changelog_of, system_identifier, database_oid)"
		" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"
		" RETURNING id)"
		" INSERT INTO eventstore.sink_position (sink, position, again_to)"
		" SELECT id, $17, $18 FROM made"
		" RETURNING sink";
	Oid			 types[] = {TEXTOID,  TEXTOID, REGROLEOID, TEXTOID, REGCLASSOID, JSONBOID,
							TEXTOID,  BOOLOID, TEXTOID,	   INT4OID, INTERVALOID, TEXTOID,
							JSONBOID, INT4OID, INT8OID,	   OIDOID,	INT8OID,	 INT8OID};
	char		 nulls[lengthof(types) + 1];
	EsRoleSwitch saved;
	uint32		 id;
	bool		 isnull;

	memset(nulls, ' ', lengthof(types));
	nulls[5] = sink->query == NULL ? 'n' : ' ';
	nulls[13] = sink->changelog_of == 0 ? 'n' : ' ';
	{
		Datum values[] = {nullable_text(sink->name, &nulls[0]),
						  CStringGetTextDatum(sink->server_name),
						  ObjectIdGetDatum(sink->owner),
						  CStringGetTextDatum(sink->topic),
						  ObjectIdGetDatum(sink->collection),
						  JsonbPGetDatum(sink->query),
						  CStringGetTextDatum(sink->key),
						  BoolGetDatum(sink->exactly_once),
						  CStringGetTextDatum(policy_words[sink->on_error]),
						  Int32GetDatum(sink->flush_count),
						  sink->flush_interval,
						  nullable_text(sink->progress_topic, &nulls[11]),
						  JsonbPGetDatum(sink->producer_properties),
						  Int32GetDatum((int32) sink->changelog_of),
						  Int64GetDatum((int64) GetSystemIdentifier()),
						  ObjectIdGetDatum(MyDatabaseId),
						  Int64GetDatum(sink->after),
						  Int64GetDatum(sink->again_to)};

		es_role_assume(es_extension_owner(), &saved);
		SPI_connect();
		es_spi_execute(sql, lengthof(types), types, values, nulls, false,
					   SPI_OK_INSERT_RETURNING);
	}
	id = DatumGetInt32(
		SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	SPI_finish();
	es_role_restore(&saved);
	es_task_call_at_commit(es_sink_key(id));
	return id;
}

Datum
es_create_sink(PG_FUNCTION_ARGS)
{
	EsSinkDefinition sink;
	NullableDatum	 args[ARG_COUNT];

	es_require_preloaded();
	memcpy(args, fcinfo->args, sizeof(args));
	es_sink_define(&sink);
	check_arguments(&sink, args);
	es_task_reserve_name(sink.name);
	(void) es_sink_create_internal(&sink);
	PG_RETURN_VOID();
}

void
es_sink_drop_internal(uint32 id)
{
	Oid			 types[1] = {INT4OID};
	Datum		 values[1] = {Int32GetDatum((int32) id)};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(
		"WITH gone AS (DELETE FROM eventstore.sink WHERE id = $1 RETURNING id),"
		" positions AS (DELETE FROM eventstore.sink_position p USING gone"
		" WHERE p.sink = gone.id)"
		" DELETE FROM eventstore.sink_dead_letter l USING gone WHERE l.sink = gone.id",
		1, types, values, NULL, false, SPI_OK_DELETE);
	SPI_finish();
	es_role_restore(&saved);
	es_task_call_at_commit(es_sink_key(id));
}

Datum
es_drop_sink(PG_FUNCTION_ARGS)
{
	EsTask *task = es_task_require(&fcinfo->args[0]);

	if (task->key.kind != ES_WORKER_SINK)
		ereport(ERROR, (errcode(ERRCODE_ES_NOT_A_COLLECTION),
						errmsg("\"%s\" is a source, not a sink", task->name),
						errhint("Use drop_source().")));
	es_task_check_owner(task);
	es_sink_drop_internal(task->key.object);
	PG_RETURN_VOID();
}
