/*
 * kafka/definition.c
 *		What a source is told to do: creating and dropping it.
 *
 * All that a worker needs to know stands in eventstore.source, whose rows only
 * these functions and task.c write, as the extension's owner.
 *
 * Whatever can be checked is checked here, in the session of who gives it:
 * properties by librdkafka itself (property.c), rights as of now.  They may
 * change later, so the worker meets the same errors and shows them as its state.
 *
 * A crash: nothing but the table matters.
 */
#include "postgres.h"

#include "access/xlog.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "compat.h"
#include "errors.h"
#include "feed/subscription.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "kafka/argument.h"
#include "kafka/connection.h"
#include "kafka/publish.h"
#include "kafka/share.h"
#include "kafka/sink.h"
#include "kafka/source.h"
#include "kafka/task.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "store/backlog.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/regproc.h"
#include "utils/syscache.h"

PG_FUNCTION_INFO_V1(es_create_source);
PG_FUNCTION_INFO_V1(es_drop_source);
PG_FUNCTION_INFO_V1(es_resync_source);

/* More than any name in use; Kafka itself takes 32767. */
#define GROUP_MAX_BYTES 1000

/* create_source's arguments, by position. */
enum
{
	ARG_NAME,
	ARG_SERVER,
	ARG_TOPIC,
	ARG_TARGET,
	ARG_START,
	ARG_PARTITIONS,
	ARG_GROUP_ID,
	ARG_REPLICA_PARTITIONS,
	ARG_MODE,
	ARG_VALUE_FORMAT,
	ARG_TRANSFORM,
	ARG_ON_ERROR,
	ARG_ON_NULL_KEY,
	ARG_ON_GAP,
	ARG_FLUSH_COUNT,
	ARG_FLUSH_INTERVAL,
	ARG_CHANGELOG_TOPIC,
	ARG_CONSUMER_PROPERTIES,
	ARG_PRODUCER_PROPERTIES,
	ARG_CHANGELOG_PROPERTIES,
	ARG_KEY_AS,
	ARG_COUNT
};

static const char *const arg_names[ARG_COUNT] = {"name",
												 "server",
												 "topic",
												 "target",
												 "start",
												 "partitions",
												 "group_id",
												 "replica_partitions",
												 "mode",
												 "value_format",
												 "transform",
												 "on_error",
												 "on_null_key",
												 "on_gap",
												 "flush_count",
												 "flush_interval",
												 "changelog_topic",
												 "consumer_properties",
												 "producer_properties",
												 "changelog_properties",
												 "key_as"};

/* Words, in the order of the enums that they stand for. */
static const char *const policy_words[] = {"park", "skip", "stop", NULL};
static const char *const gap_words[] = {"stop", "earliest", "latest", NULL};
static const char *const mode_words[] = {"primary", "replica", "relay", NULL};
static const char *const key_as_words[] = {"stream", "tag", NULL};

EsWorkerKey
es_source_key(uint32 id)
{
	return (EsWorkerKey){MyDatabaseId, ES_WORKER_SOURCE, id};
}

/* ---------------------------------------------------------------------------
 * Loading
 * ------------------------------------------------------------------------- */

/* The numbers of an array; none for null. */
static int
read_partitions(Datum array, int32 **partitions)
{
	Datum *elements;
	int	   n;

	if (array == (Datum) 0)
		return 0;
	deconstruct_array(DatumGetArrayTypeP(array), INT4OID, 4, true, TYPALIGN_INT,
					  &elements, NULL, &n);
	*partitions = palloc(sizeof(int32) * Max(n, 1));
	for (int i = 0; i < n; i++)
		(*partitions)[i] = DatumGetInt32(elements[i]);
	return n;
}

bool
es_source_parse_start(EsSource *source, const char *start)
{
	Datum value;

	source->start_offsets = NULL;
	if (strcmp(start, "earliest") == 0)
		source->start = ES_START_EARLIEST;
	else if (strcmp(start, "latest") == 0)
		source->start = ES_START_LATEST;
	else if (start[0] == '{' &&
			 es_convert(jsonb_in, CStringGetDatum(start), 0, 0, &value))
	{
		source->start = ES_START_OFFSETS;
		source->start_offsets = DatumGetJsonbP(value);
	}
	else if (es_convert(timestamptz_in, CStringGetDatum(start),
						ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1), &value) &&
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
	EsSource	 *source = MemoryContextAllocZero(context, sizeof(EsSource));
	EsStoreFormat format;
	MemoryContext old;

	source->id = DatumGetInt32(es_task_column("id", context));
	source->name = es_task_text("name", context);
	source->owner = DatumGetObjectId(es_task_column("owner", context));
	source->server_name = es_task_text("server", context);
	source->server = get_foreign_server_oid(source->server_name, true);
	source->topic = es_task_text("topic", context);
	source->target = DatumGetObjectId(es_task_column("target", context));
	source->is_store =
		OidIsValid(source->target) && es_store_exists(source->target, NULL);
	source->mode = es_kafka_word_index(mode_words, es_task_text("mode", context));
	(void) es_store_format_parse(es_task_text("value_format", context), &format);
	source->value_format = format;
	source->transform_name = es_task_text("transform", context);
	source->transform = DatumGetObjectId(es_task_column("transform_oid", context));
	source->on_error =
		es_kafka_word_index(policy_words, es_task_text("on_error", context));
	source->on_null_key =
		es_kafka_word_index(policy_words, es_task_text("on_null_key", context));
	source->on_gap = es_kafka_word_index(gap_words, es_task_text("on_gap", context));
	source->flush_count = DatumGetInt32(es_task_column("flush_count", context));
	source->flush_us = es_kafka_interval_us(es_task_column("flush_interval", context));
	source->topic_id = es_task_text("topic_id", context);
	source->partition_count = DatumGetInt32(es_task_column("partition_count", context));
	source->group_id = es_task_text("group_id", context);
	source->key_as_tag = strcmp(es_task_text("key_as", context), "tag") == 0;
	source->consumer_properties =
		(Jsonb *) DatumGetPointer(es_task_column("consumer_properties", context));
	source->changelog_topic = es_task_text("changelog_topic", context);
	source->changelog_properties =
		(Jsonb *) DatumGetPointer(es_task_column("changelog_properties", context));
	source->resync = DatumGetBool(es_task_column("resync", context));
	source->paused = DatumGetBool(es_task_column("paused", context));
	source->failure = es_task_text("failure", context);
	source->resumes = DatumGetInt64(es_task_column("resumes", context));
	source->at_home = DatumGetBool(es_task_column("at_home", context));

	old = MemoryContextSwitchTo(context);
	source->npartitions =
		read_partitions(es_task_column("partitions", context), &source->partitions);
	source->nreplicas =
		read_partitions(es_task_column("replica_partitions", context), &source->replicas);
	(void) es_source_parse_start(source, es_task_text("start", context));
	MemoryContextSwitchTo(old);
	return source;
}

static EsSource *
load_source(const char *condition, Oid type, Datum value)
{
	MemoryContext context = CurrentMemoryContext;
	EsRoleSwitch  saved;
	EsSource	 *source = NULL;
	Oid			  types[3] = {type, INT8OID, OIDOID};
	Datum		  values[3] = {value, Int64GetDatum((int64) GetSystemIdentifier()),
							   ObjectIdGetDatum(MyDatabaseId)};

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(
		psprintf(
			"SELECT s.*, (s.system_identifier OPERATOR(pg_catalog.=) $2"
			" AND s.database_oid OPERATOR(pg_catalog.=) $3) AS at_home,"
			" pg_catalog.to_regprocedure(s.transform)::pg_catalog.oid AS transform_oid"
			" FROM eventstore.source s WHERE %s",
			condition),
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
	return load_source("s.id OPERATOR(pg_catalog.=) $1", INT4OID,
					   Int32GetDatum((int32) id));
}

EsSource *
es_source_load_named(const char *name)
{
	return load_source("s.name OPERATOR(pg_catalog.=) $1", TEXTOID,
					   CStringGetTextDatum(name));
}

/* LG007 where there is none of that name. */
static EsSource *
require_source(const NullableDatum *name)
{
	char	 *given = text_to_cstring(es_name_arg(name, "name"));
	EsSource *source = es_source_load_named(given);

	if (source == NULL)
		ereport(ERROR, (errcode(ERRCODE_ES_NOT_A_COLLECTION),
						errmsg("there is no source \"%s\"", given)));
	return source;
}

EsSource *
es_source_require_own(const NullableDatum *name)
{
	EsSource *source = require_source(name);

	if (!has_privs_of_role(GetUserId(), source->owner))
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
						errmsg("must be owner of source \"%s\"", source->name)));
	return source;
}

/* ---------------------------------------------------------------------------
 * create_source: the arguments
 * ------------------------------------------------------------------------- */

/* Offsets such as {"0": 42}; a worker that cannot read one would only fail. */
static bool
are_offsets(const Jsonb *offsets)
{
	JsonbIterator	  *it = JsonbIteratorInit((JsonbContainer *) &offsets->root);
	JsonbIteratorToken token;
	JsonbValue		   part;
	Datum			   number;

	while ((token = JsonbIteratorNext(&it, &part, true)) != WJB_DONE)
	{
		char *text;

		if (token == WJB_KEY)
		{
			text = pnstrdup(part.val.string.val, part.val.string.len);
			if (!es_convert(int4in, CStringGetDatum(text), 0, 0, &number) ||
				DatumGetInt32(number) < 0 ||
				strcmp(psprintf("%d", DatumGetInt32(number)), text) != 0)
				return false;
		}
		else if (token == WJB_VALUE)
		{
			if (part.type != jbvNumeric)
				return false;
			text = DatumGetCString(
				DirectFunctionCall1(numeric_out, NumericGetDatum(part.val.numeric)));
			if (!es_convert(int8in, CStringGetDatum(text), 0, 0, &number) ||
				DatumGetInt64(number) < 0)
				return false;
		}
	}
	return true;
}

static void
check_start(EsSource *source, const NullableDatum *arg)
{
	const char *start;

	if (arg->isnull)
		return;
	start = TextDatumGetCString(arg->value);
	if (!es_source_parse_start(source, start) ||
		(source->start == ES_START_OFFSETS && !are_offsets(source->start_offsets)))
		es_kafka_refuse("start", psprintf("\"%s\" is not \"earliest\", \"latest\", a "
										  "time, nor offsets like {\"0\": 42}.",
										  start));
}

/* Partition numbers: not negative, none twice; an empty list is none. */
static void
check_partitions(const NullableDatum *args, int n)
{
	ArrayType *array;
	Datum	  *elements;
	bool	  *nulls;
	int		   count;
	Bitmapset *seen = NULL;

	if (args[n].isnull)
		return;
	array = DatumGetArrayTypeP(args[n].value);
	deconstruct_array(array, INT4OID, 4, true, TYPALIGN_INT, &elements, &nulls, &count);
	if (count == 0)
		es_kafka_refuse(arg_names[n], "It names no partition.");
	for (int i = 0; i < count; i++)
	{
		int partition = nulls[i] ? -1 : DatumGetInt32(elements[i]);

		if (partition < 0 || partition > 1000000)
			es_kafka_refuse(arg_names[n],
							nulls[i] ? "It has a null."
									 : psprintf("There is no partition %d.", partition));
		if (bms_is_member(partition, seen))
			es_kafka_refuse(arg_names[n],
							psprintf("It names partition %d twice.", partition));
		seen = bms_add_member(seen, partition);
	}
}

static void
check_rights(Oid target, AclMode needed)
{
	AclResult allowed = pg_class_aclcheck(target, GetUserId(), needed);

	if (allowed != ACLCHECK_OK)
		aclcheck_error(allowed, get_relkind_objtype(get_rel_relkind(target)),
					   get_rel_name(target));
}

/* What is stored: the store's type, or that of an event's data or body. */
static Oid
stored_type(const EsSource *source)
{
	return source->is_store ? es_store_type(es_store_get(source->target)->format)
							: es_store_type(source->value_format);
}

static void
check_transform(EsSource *source, bool format_given)
{
	Oid			  argument;
	Oid			  result;
	EsStoreFormat format;

	es_kafka_check_execute(source->transform, GetUserId());
	if (!es_kafka_function_types(source->transform, &argument, &result))
		es_kafka_refuse("transform",
						psprintf("%s is not a function of one argument with one result.",
								 source->transform_name));
	for (format = ES_STORE_JSON; format <= ES_STORE_BYTES; format++)
		if (es_store_type(format) == argument)
			break;
	if (format > ES_STORE_BYTES)
		es_kafka_refuse(
			"transform",
			psprintf("The argument of %s is %s; it can be jsonb, text or bytea.",
					 source->transform_name, format_type_be(argument)));
	if (!format_given)
		source->value_format = format;
	if (source->value_format != format ||
		(source->is_store
			 ? result != stored_type(source)
			 : result != JSONBOID && result != TEXTOID && result != BYTEAOID))
		ereport(ERROR,
				(errcode(ERRCODE_DATATYPE_MISMATCH),
				 errmsg("transform %s does not fit", source->transform_name),
				 errdetail("It makes %s from %s; the value is %s, and %s is stored.",
						   format_type_be(result), format_type_be(argument),
						   format_type_be(es_store_type(source->value_format)),
						   source->is_store ? format_type_be(stored_type(source))
											: "jsonb, text or bytea")));
}

static void
set_formats(EsSource *source, const NullableDatum *args)
{
	bool given = !args[ARG_VALUE_FORMAT].isnull;

	source->value_format =
		source->mode == ES_SOURCE_RELAY ? ES_STORE_BYTES : ES_STORE_JSON;
	if (source->is_store)
		source->value_format = es_store_get(source->target)->format;
	if (given && !es_store_format_parse(TextDatumGetCString(args[ARG_VALUE_FORMAT].value),
										&source->value_format))
		es_kafka_refuse(arg_names[ARG_VALUE_FORMAT],
						psprintf("It is \"%s\"; there are \"json\", \"text\", \"bytes\".",
								 TextDatumGetCString(args[ARG_VALUE_FORMAT].value)));
	if (OidIsValid(source->transform))
		check_transform(source, given);
	else if (source->is_store &&
			 source->value_format != es_store_get(source->target)->format)
		ereport(ERROR, (errcode(ERRCODE_DATATYPE_MISMATCH),
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
	/* Who may not write it does not even wait for its lock. */
	if (source->is_store || es_collection_exists(target))
		check_rights(target, ACL_INSERT);
	if (source->is_store)
	{
		check_rights(target, ACL_UPDATE);
		check_rights(target, ACL_DELETE);
		(void) es_store_open(target, AccessShareLock);
	}
	else
		(void) es_collection_open(target, AccessShareLock);
}

/* The two lists have no partition in common. */
static void
check_replicas(const NullableDatum *args)
{
	int32	  *partitions;
	int32	  *replicas;
	int		   npartitions;
	int		   nreplicas;
	Bitmapset *own = NULL;

	check_partitions(args, ARG_REPLICA_PARTITIONS);
	if (args[ARG_REPLICA_PARTITIONS].isnull)
		return;
	if (args[ARG_CHANGELOG_TOPIC].isnull)
		es_kafka_refuse("replica_partitions",
						"They are partitions of a changelog topic, and there is none.");
	if (args[ARG_PARTITIONS].isnull)
		es_kafka_refuse(
			"replica_partitions",
			"All partitions are the source's own: name those in \"partitions\".");
	npartitions = read_partitions(args[ARG_PARTITIONS].value, &partitions);
	nreplicas = read_partitions(args[ARG_REPLICA_PARTITIONS].value, &replicas);
	for (int i = 0; i < npartitions; i++)
		own = bms_add_member(own, partitions[i]);
	for (int i = 0; i < nreplicas; i++)
		if (bms_is_member(replicas[i], own))
			es_kafka_refuse(
				"replica_partitions",
				psprintf("Partition %d is in \"partitions\", too.", replicas[i]));
}

/* What goes with a changelog topic, and what needs one. */
static void
check_changelog_topic(EsSource *source, const NullableDatum *args)
{
	Oid changelog = InvalidOid;

	check_replicas(args);
	if (args[ARG_CHANGELOG_TOPIC].isnull)
	{
		if (source->mode != ES_SOURCE_PRIMARY)
			es_kafka_refuse("mode", psprintf("Mode \"%s\" needs a changelog_topic.",
											 mode_words[source->mode]));
		return;
	}
	source->changelog_topic =
		es_kafka_topic_arg(&args[ARG_CHANGELOG_TOPIC], "changelog_topic");
	/* One source has that part in a store, and keys that it follows nobody else can write. */
	if (source->mode != ES_SOURCE_RELAY && !es_owns_relation(source->target, GetUserId()))
		aclcheck_error(ACLCHECK_NOT_OWNER, OBJECT_TABLE, get_rel_name(source->target));
	if (strcmp(source->changelog_topic, source->topic) == 0)
		es_kafka_refuse("changelog_topic", "It is the source's own topic.");
	if (source->mode == ES_SOURCE_RELAY)
		return;
	if (!es_store_exists(source->target, &changelog) || !OidIsValid(changelog))
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("a changelog topic is that of a store with a changelog"),
						errdetail("\"%s\" is %s.", get_rel_name(source->target),
								  source->is_store ? "a store without a changelog"
												   : "a collection")));
	if (source->mode == ES_SOURCE_PRIMARY)
		check_rights(changelog, ACL_SELECT);
	if (source->mode == ES_SOURCE_REPLICA &&
		(OidIsValid(source->transform) || !args[ARG_REPLICA_PARTITIONS].isnull))
		es_kafka_refuse(
			"mode",
			"In mode \"replica\" there is neither a transform nor replica_partitions: "
			"all is read from the changelog topic, as it is stored.");
}

/* The group says which partitions, and all of them. */
static void
check_group(const EsSource *source, const NullableDatum *args)
{
	const char *group;

	if (args[ARG_GROUP_ID].isnull)
		return;
	group = TextDatumGetCString(args[ARG_GROUP_ID].value);
	if (group[0] == '\0' || strlen(group) > GROUP_MAX_BYTES)
		es_kafka_refuse("group_id",
						psprintf("It is 1 to %d bytes long.", GROUP_MAX_BYTES));
	for (const char *c = group; *c != '\0'; c++)
		if ((unsigned char) *c < ' ' || *c == 0x7f)
			es_kafka_refuse("group_id", "It has a control character.");
	if (!args[ARG_PARTITIONS].isnull)
		es_kafka_refuse(
			"group_id",
			"Either the group says which partitions are read, or \"partitions\" does.");
	if (!args[ARG_REPLICA_PARTITIONS].isnull || source->mode == ES_SOURCE_REPLICA)
		es_kafka_refuse(
			"group_id",
			"A replica follows the partitions that it names, or all; it has no group.");
}

static void
check_properties(NullableDatum *args)
{
	static const struct
	{
		int					 arg;
		EsKafkaPropertyPlace place;
	} given[] = {{ARG_CONSUMER_PROPERTIES, ES_KAFKA_CONSUMER},
				 {ARG_PRODUCER_PROPERTIES, ES_KAFKA_PRODUCER},
				 {ARG_CHANGELOG_PROPERTIES, ES_KAFKA_PRODUCER}};

	for (int i = 0; i < lengthof(given); i++)
		es_kafka_properties_arg(&args[given[i].arg], given[i].place,
								arg_names[given[i].arg]);
}

/* All that can be wrong, before anything is written. */
static void
check_arguments(EsSource *source, NullableDatum *args)
{
	source->mode = es_kafka_word_arg(&args[ARG_MODE], arg_names[ARG_MODE], mode_words);
	for (int i = ARG_NAME; i <= ARG_TARGET; i++)
		if (i != ARG_TARGET || source->mode != ES_SOURCE_RELAY)
			es_require_arg(&args[i], arg_names[i]);
	source->name = text_to_cstring(es_name_arg(&args[ARG_NAME], "name"));
	source->server_name = NameStr(*DatumGetName(args[ARG_SERVER].value));
	source->server = es_kafka_server(source->server_name);
	(void) es_kafka_properties(source->server, GetUserId(), NULL);
	source->topic = es_kafka_topic_arg(&args[ARG_TOPIC], arg_names[ARG_TOPIC]);
	if (source->mode != ES_SOURCE_RELAY)
		set_target(source, DatumGetObjectId(args[ARG_TARGET].value));
	else if (!args[ARG_TARGET].isnull)
		es_kafka_refuse(
			"target",
			"In mode \"relay\" records go to the changelog topic, and to no table.");
	check_start(source, &args[ARG_START]);
	check_partitions(args, ARG_PARTITIONS);
	source->transform = args[ARG_TRANSFORM].isnull
							? InvalidOid
							: DatumGetObjectId(args[ARG_TRANSFORM].value);
	if (OidIsValid(source->transform))
		source->transform_name = format_procedure_qualified(source->transform);
	set_formats(source, args);
	check_group(source, args);
	check_changelog_topic(source, args);
	source->on_error =
		es_kafka_word_arg(&args[ARG_ON_ERROR], arg_names[ARG_ON_ERROR], policy_words);
	source->on_null_key = es_kafka_word_arg(&args[ARG_ON_NULL_KEY],
											arg_names[ARG_ON_NULL_KEY], policy_words);
	source->on_gap =
		es_kafka_word_arg(&args[ARG_ON_GAP], arg_names[ARG_ON_GAP], gap_words);
	source->key_as_tag =
		es_kafka_word_arg(&args[ARG_KEY_AS], arg_names[ARG_KEY_AS], key_as_words) == 1;
	source->flush_count = es_kafka_flush_count_arg(&args[ARG_FLUSH_COUNT], 10000);
	es_kafka_flush_interval_arg(&args[ARG_FLUSH_INTERVAL], "1 s");
	check_properties(args);
}

/* ---------------------------------------------------------------------------
 * create_source, drop_source
 * ------------------------------------------------------------------------- */

/* What "start" says, such that the worker's settings for times do not matter. */
static const char *
start_as_text(const EsSource *source, const NullableDatum *args)
{
	struct pg_tm tm;
	fsec_t		 fsec;
	char		 iso[MAXDATELEN + 1];

	if (args[ARG_START].isnull)
		return "earliest";
	if (source->start != ES_START_TIME ||
		timestamp2tm(source->start_time, NULL, &tm, &fsec, NULL, NULL) != 0)
		return TextDatumGetCString(args[ARG_START].value);
	tm.tm_isdst = 0;
	EncodeDateTime(&tm, fsec, true, 0, "UTC", USE_ISO_DATES, iso);
	return pstrdup(iso);
}

/* Its id. */
static uint32
insert_source(const EsSource *source, const NullableDatum *args)
{
	static const char sql[] =
		"INSERT INTO eventstore.source (name, server, owner, topic, target, start, "
		"partitions,"
		" mode, value_format, transform, on_error, on_null_key, on_gap, flush_count, "
		"flush_interval,"
		" consumer_properties, producer_properties, changelog_properties, key_as,"
		" system_identifier, database_oid, replica_partitions, changelog_topic, group_id)"
		" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, "
		"$17, $18,"
		" $19, $20, $21, $22, $23, $24) RETURNING id";
	Oid			 types[] = {TEXTOID,  NAMEOID,		REGROLEOID, TEXTOID, REGCLASSOID,
							TEXTOID,  INT4ARRAYOID, TEXTOID,	TEXTOID, TEXTOID,
							TEXTOID,  TEXTOID,		TEXTOID,	INT4OID, INTERVALOID,
							JSONBOID, JSONBOID,		JSONBOID,	TEXTOID, INT8OID,
							OIDOID,	  INT4ARRAYOID, TEXTOID,	TEXTOID};
	Datum		 values[] = {CStringGetTextDatum(source->name),
							 args[ARG_SERVER].value,
							 ObjectIdGetDatum(GetUserId()),
							 CStringGetTextDatum(source->topic),
							 ObjectIdGetDatum(source->target),
							 CStringGetTextDatum(start_as_text(source, args)),
							 args[ARG_PARTITIONS].value,
							 CStringGetTextDatum(mode_words[source->mode]),
							 CStringGetTextDatum(es_store_format_name(source->value_format)),
						 source->transform_name != NULL
								 ? CStringGetTextDatum(source->transform_name)
								 : (Datum) 0,
							 CStringGetTextDatum(policy_words[source->on_error]),
							 CStringGetTextDatum(policy_words[source->on_null_key]),
							 CStringGetTextDatum(gap_words[source->on_gap]),
							 Int32GetDatum(source->flush_count),
							 args[ARG_FLUSH_INTERVAL].value,
							 args[ARG_CONSUMER_PROPERTIES].value,
							 args[ARG_PRODUCER_PROPERTIES].value,
							 args[ARG_CHANGELOG_PROPERTIES].value,
							 CStringGetTextDatum(key_as_words[source->key_as_tag ? 1 : 0]),
							 Int64GetDatum((int64) GetSystemIdentifier()),
							 ObjectIdGetDatum(MyDatabaseId),
							 args[ARG_REPLICA_PARTITIONS].value,
							 args[ARG_CHANGELOG_TOPIC].value,
							 args[ARG_GROUP_ID].value};
	char		 nulls[lengthof(types) + 1];
	EsRoleSwitch saved;
	uint32		 id = 0;
	bool		 isnull;

	memset(nulls, ' ', lengthof(types));
	nulls[4] = OidIsValid(source->target) ? ' ' : 'n';
	nulls[6] = args[ARG_PARTITIONS].isnull ? 'n' : ' ';
	nulls[9] = source->transform_name == NULL ? 'n' : ' ';
	nulls[21] = args[ARG_REPLICA_PARTITIONS].isnull ? 'n' : ' ';
	nulls[22] = args[ARG_CHANGELOG_TOPIC].isnull ? 'n' : ' ';
	nulls[23] = args[ARG_GROUP_ID].isnull ? 'n' : ' ';
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, lengthof(types), types, values, nulls, false,
				   SPI_OK_INSERT_RETURNING);
	if (SPI_processed > 0)
		id = DatumGetInt32(
			SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	SPI_finish();
	es_role_restore(&saved);
	return id;
}

/*
 * From its first event on: who restores from the topic is to find all of the store in
 * it.  What the store has already may be older than what another server has published
 * since: so that is restored first, and then published behind it, once more.
 */
static void
publish_changelog(const EsSource *source, const NullableDatum *args)
{
	EsSinkDefinition sink;
	Oid				 changelog;

	(void) es_store_exists(source->target, &changelog);
	es_sink_define(&sink);
	sink.server_name = source->server_name;
	sink.owner = GetUserId();
	sink.topic = source->changelog_topic;
	sink.collection = changelog;
	sink.producer_properties = DatumGetJsonbP(args[ARG_CHANGELOG_PROPERTIES].value);
	sink.changelog_of = source->id;
	/* In transactions that the group's coordinator vouches for: share.c. */
	sink.exactly_once = !args[ARG_GROUP_ID].isnull;
	if (!sink.exactly_once &&
		(es_store_get(source->target)->backlog[0] != '\0' ||
		 es_collection_last_allotted(es_collection_open(changelog, AccessShareLock)) > 0))
		sink.again_to = ES_SINK_UNTIL_RESTORED;
	(void) es_sink_create_internal(&sink);
}

Datum
es_create_source(PG_FUNCTION_ARGS)
{
	EsSource	  source = {0};
	NullableDatum args[ARG_COUNT];

	es_require_preloaded();
	memcpy(args, fcinfo->args, sizeof(args));
	check_arguments(&source, args);
	es_task_reserve_name(source.name);
	source.id = insert_source(&source, args);
	if (source.changelog_topic != NULL && source.mode == ES_SOURCE_PRIMARY)
	{
		es_publish_mark(source.target, "publisher", source.id);
		publish_changelog(&source, args);
	}
	if (source.mode == ES_SOURCE_REPLICA || !args[ARG_REPLICA_PARTITIONS].isnull ||
		(source.mode == ES_SOURCE_PRIMARY && source.changelog_topic != NULL &&
		 !args[ARG_GROUP_ID].isnull))
	{
		/* Whoever is writing it does not know of the mark. */
		LockRelationOid(source.target, ShareRowExclusiveLock);
		es_publish_mark(source.target, "follower", source.id);
	}
	es_task_call_at_commit(es_source_key(source.id));
	PG_RETURN_VOID();
}

/* Runs one statement about the source $1 as the extension's owner. */
static void
execute_for(const char *sql, uint32 id, int expected)
{
	Oid	  types[3] = {INT4OID, INT8OID, OIDOID};
	Datum values[3] = {Int32GetDatum((int32) id),
					   Int64GetDatum((int64) GetSystemIdentifier()),
					   ObjectIdGetDatum(MyDatabaseId)};

	(void) es_spi_execute_as_owner(sql, 3, types, values, NULL, expected);
}

void
es_source_drop_internal(uint32 id)
{
	uint32	  sink = es_share_find_sink(id);
	EsSource *source;

	if (sink != 0)
		es_sink_drop_internal(sink);
	source = es_source_load(id);
	/* Its worker has the source before the store. */
	execute_for("DELETE FROM eventstore.source WHERE id = $1", id, SPI_OK_DELETE);
	if (source != NULL && source->is_store && source->changelog_topic != NULL)
		es_store_backlog_record_all(source->target);
	es_publish_unmark(id);
	es_task_call_at_commit(es_source_key(id));
}

Datum
es_drop_source(PG_FUNCTION_ARGS)
{
	es_require_arg(&fcinfo->args[0], "name");
	es_source_drop_internal(es_source_require_own(&fcinfo->args[0])->id);
	PG_RETURN_VOID();
}

Datum
es_resync_source(PG_FUNCTION_ARGS)
{
	EsSource *source;

	es_require_preloaded();
	es_require_arg(&fcinfo->args[0], "name");
	source = es_source_require_own(&fcinfo->args[0]);
	if (!source->is_store || source->mode != ES_SOURCE_PRIMARY ||
		source->group_id != NULL)
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("source \"%s\" cannot be resynchronised", source->name),
			 errdetail("Only a source that feeds a store from its own partitions can.")));
	execute_for("UPDATE eventstore.source SET resync = true WHERE id = $1", source->id,
				SPI_OK_UPDATE);
	es_task_call_at_commit(es_source_key(source->id));
	PG_RETURN_VOID();
}
