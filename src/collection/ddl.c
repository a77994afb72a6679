/*
 * collection/ddl.c
 *		Creating, changing, truncating and dropping collections.
 *
 * Everything here is ordinary DDL in the caller's transaction and with the
 * caller's rights; only the catalog row is written as the extension's owner.
 * A change of the row sends a relcache invalidation for the collection, which
 * is what empties the caches of other backends (collection.c).
 *
 * What DDL on the table itself leaves behind is swept up by two event triggers:
 *
 *	on_drop		however the collection went (DROP TABLE, DROP SCHEMA CASCADE,
 *				DROP OWNED, ...) its heads table, its rows in our tables (its
 *				subscriptions and sources too) and its shared entry go too.
 *				The counter is owned by a column and went with it.
 *	on_alter	OWNER TO and SET SCHEMA reach segments and heads table, which
 *				PostgreSQL would leave as they are (a changelog
 *				follows its store by a trigger in store/); who attaches a segment takes
 *				the lock of those who make them (segment.c).
 *
 * DROP EXTENSION drops the event triggers before they could run; it leaves
 * plain tables behind.
 *
 * truncate_before only moves the first kept position; see retention.c for what
 * the worker makes of that.  Two of them take turns by the catalog row's lock.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/dependency.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/ddl.h"
#include "collection/layout.h"
#include "collection/retention.h"
#include "collection/segment.h"
#include "commands/event_trigger.h"
#include "commands/tablecmds.h"
#include "compat.h"
#include "errors.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/relcache.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"
#include "worker/wake.h"

PG_FUNCTION_INFO_V1(es_create_collection);
PG_FUNCTION_INFO_V1(es_set_option);
PG_FUNCTION_INFO_V1(es_drop_collection);
PG_FUNCTION_INFO_V1(es_truncate_before);
PG_FUNCTION_INFO_V1(es_append_only);
PG_FUNCTION_INFO_V1(es_on_drop);
PG_FUNCTION_INFO_V1(es_on_alter);

/* ---------------------------------------------------------------------------
 * Options: one check for each, whichever way the value comes
 * ------------------------------------------------------------------------- */

static void
report_bad_option(const char *option, const char *value, const char *hint)
{
	ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					errmsg("invalid value for option \"%s\": %s", option, value),
					errhint("%s", hint)));
}

static int64
check_count(const char *option, int64 value)
{
	if (value < 1)
		report_bad_option(option, psprintf(INT64_FORMAT, value),
						  "It must be at least 1; null means no limit.");
	return value;
}

static int64
check_segment_size(int64 value)
{
	if (value < 1 || value > ES_SEGMENT_SIZE_MAX)
		report_bad_option("segment_size", psprintf(INT64_FORMAT, value),
						  "It must be between 1 and 2^48 positions.");
	return value;
}

static Interval *
check_interval(const char *option, Interval *value)
{
	Interval zero = {0};
	Datum	 ignored;

	if (DatumGetInt32(DirectFunctionCall2(interval_cmp, IntervalPGetDatum(value),
										  IntervalPGetDatum(&zero))) <= 0)
		report_bad_option(
			option,
			DatumGetCString(DirectFunctionCall1(interval_out, IntervalPGetDatum(value))),
			"It must be longer than nothing; null means no limit.");
	/* Retention will take it off the clock. */
	if (!es_convert(timestamptz_mi_interval, TimestampTzGetDatum(GetCurrentTimestamp()),
					IntervalPGetDatum(value), (Datum) 0, &ignored))
		report_bad_option(
			option,
			DatumGetCString(DirectFunctionCall1(interval_out, IntervalPGetDatum(value))),
			"It reaches back beyond the times that PostgreSQL knows.");
	return value;
}

static const char *
check_channel(const char *value)
{
	if (value[0] == '\0' || strlen(value) > ES_CHANNEL_MAX_BYTES)
		report_bad_option("channel", psprintf("\"%s\"", value),
						  "A channel's name has between 1 and 63 bytes.");
	return value;
}

/* 42501 where notifications would tell what policies hide. */
static void
refuse_row_security(Oid collection, const char *option, const char *value)
{
	Relation rel = RelationIdGetRelation(collection);
	bool	 secured = rel->rd_rel->relrowsecurity;

	RelationClose(rel);
	if (secured)
		ereport(
			ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("cannot set option \"%s\" of collection \"%s\" to \"%s\"", option,
					get_rel_name(collection), value),
			 errdetail(
				 "Row-level security is enabled, and notifications would pass it by.")));
}

/* Some modes publish the events to whoever may connect. */
static const char *
check_notify(const char *value, Oid collection)
{
	static const char *const modes[] = {"head", "events", "streams", "none"};
	int						 mode = 0;

	while (mode < lengthof(modes) && strcmp(value, modes[mode]) != 0)
		mode++;
	if (mode == lengthof(modes))
		report_bad_option("notify", psprintf("\"%s\"", value),
						  "It is one of head, events, streams, none.");
	if (mode == 1 || mode == 2)
	{
		if (OidIsValid(collection))
			refuse_row_security(collection, "notify", value);
		ereport(WARNING,
				(errmsg("notify mode \"%s\" publishes beyond the right to SELECT", value),
				 errdetail("Every role that may connect to the database may LISTEN to "
						   "any channel.")));
	}
	return value;
}

/* Of the changelog of a store. */
static bool
check_feed_reads(Oid collection, const char *value)
{
	bool on;

	if (!parse_bool(value, &on))
		report_bad_option("feed_reads", psprintf("\"%s\"", value),
						  "It is true or false.");
	if (!OidIsValid(es_collection_find_store(collection)))
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("option \"feed_reads\" is for stores"),
						errdetail("Collection \"%s\" is not the changelog of one.",
								  get_rel_name(collection))));
	if (on)
	{
		refuse_row_security(collection, "feed_reads", value);
		ereport(
			WARNING,
			(errmsg("option \"feed_reads\" publishes keys beyond the right to SELECT"),
			 errdetail("Every role that may connect to the database may LISTEN to any "
					   "channel.")));
	}
	return on;
}

/* ---------------------------------------------------------------------------
 * create_collection
 * ------------------------------------------------------------------------- */

/* PostgreSQL's own words for a bad name do not say which one it is. */
static void
check_name(text *name, const char *kind)
{
	char *string = text_to_cstring(name);
	List *parts;
	bool  good = SplitIdentifierString(pstrdup(string), '.', &parts) && parts != NIL &&
				list_length(parts) <= 3;
	ListCell *cell;

	foreach (cell, parts)
		good = good && *(char *) lfirst(cell) != '\0';
	if (!good)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid name of a %s: \"%s\"", kind, string),
				 errhint("It is a name, or a schema's name, a dot and a name; what is "
						 "not a plain identifier stands in double quotes.")));
}

Oid
es_creation_schema(text *name, const char *kind, char **relname)
{
	RangeVar *target;
	Oid		  schema;
	AclResult acl;

	check_name(name, kind);
	target = makeRangeVarFromNameList(textToQualifiedNameList(name));
	schema = RangeVarGetCreationNamespace(target);
	acl = es_schema_aclcheck(schema, GetUserId(), ACL_CREATE);
	if (acl != ACLCHECK_OK)
		aclcheck_error(acl, OBJECT_SCHEMA, get_namespace_name(schema));
	if (isAnyTempNamespace(schema))
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						errmsg("cannot create %s \"%s\" in a temporary schema", kind,
							   target->relname)));
	*relname = target->relname;
	return schema;
}

static void
default_options(EsOptions *options)
{
	memset(options, 0, sizeof(EsOptions));
	options->segment_size = ES_SEGMENT_SIZE_DEFAULT;
	options->notify = ES_NOTIFY_DEFAULT;
}

/* Arguments 1 to 6 of create_collection; null means what it says. */
static void
read_options(FunctionCallInfo fcinfo, EsOptions *options)
{
	default_options(options);
	if (!PG_ARGISNULL(1))
		options->segment_size = check_segment_size(PG_GETARG_INT64(1));
	if (!PG_ARGISNULL(2))
		options->retain_events = check_count("retain_events", PG_GETARG_INT64(2));
	if (!PG_ARGISNULL(3))
		options->retain_for = check_interval("retain_for", PG_GETARG_INTERVAL_P(3));
	if (!PG_ARGISNULL(4))
		options->retain_bytes = check_count("retain_bytes", PG_GETARG_INT64(4));
	if (!PG_ARGISNULL(5))
		options->notify = check_notify(text_to_cstring(PG_GETARG_TEXT_PP(5)), InvalidOid);
	if (!PG_ARGISNULL(6))
		options->channel = check_channel(text_to_cstring(PG_GETARG_TEXT_PP(6)));
}

/* With these options; in SPI, in the role of its owner to be. */
static Oid
create_collection(Oid schema, const char *name, EsOptions *options)
{
	EsLayout layout = {InvalidOid, InvalidOid};
	Oid		 collection = es_layout_create_table(schema, name);

	es_layout_complete(collection, &layout);
	if (options->channel == NULL)
		options->channel = es_layout_default_channel(collection);
	es_layout_register(collection, &layout, options, 1);
	return collection;
}

Oid
es_create_changelog(Oid schema, const char *name)
{
	EsOptions options;

	default_options(&options);
	return create_collection(schema, name, &options);
}

void
es_make_ready_to_append(Oid collection)
{
	es_segments_keep_ahead(collection);
	es_wake_maintenance_at_commit();
}

Datum
es_create_collection(PG_FUNCTION_ARGS)
{
	EsOptions	 options;
	EsRoleSwitch saved;
	char		*name;
	Oid			 schema;
	Oid			 collection;

	es_require_preloaded();
	PreventCommandIfReadOnly("create_collection");
	es_require_arg(&fcinfo->args[0], "name");
	read_options(fcinfo, &options);
	schema = es_creation_schema(PG_GETARG_TEXT_PP(0), "collection", &name);

	/* The caller's own role: what this adds is the locked search_path. */
	es_role_assume(GetUserId(), &saved);
	SPI_connect();
	collection = create_collection(schema, name, &options);
	SPI_finish();
	es_role_restore(&saved);

	es_make_ready_to_append(collection);
	PG_RETURN_OID(collection);
}

/* ---------------------------------------------------------------------------
 * set_option
 * ------------------------------------------------------------------------- */

static int64
parse_number(const char *option, const char *value)
{
	char *end;
	int64 number;

	errno = 0;
	number = strtoi64(value, &end, 10);
	if (errno != 0 || end == value || *end != '\0')
		report_bad_option(option, psprintf("\"%s\"", value), "It is a whole number.");
	return number;
}

static Interval *
parse_interval(const char *option, const char *value)
{
	Datum interval;

	if (!es_convert(interval_in, CStringGetDatum(value), ObjectIdGetDatum(InvalidOid),
					Int32GetDatum(-1), &interval))
		report_bad_option(option, psprintf("\"%s\"", value), "It is an interval.");
	return DatumGetIntervalP(interval);
}

/*
 * What the option's column is to hold, as its type; 'value' NULL resets it.
 * 'isnull' where it holds nothing then.
 */
static Datum
option_value(Oid collection, const char *option, const char *value, Oid *type,
			 bool *isnull)
{
	*isnull = false;
	*type = INT8OID;
	if (strcmp(option, "segment_size") == 0)
		return Int64GetDatum(value == NULL
								 ? ES_SEGMENT_SIZE_DEFAULT
								 : check_segment_size(parse_number(option, value)));

	*type = TEXTOID;
	if (strcmp(option, "notify") == 0)
		return CStringGetTextDatum(
			check_notify(value == NULL ? ES_NOTIFY_DEFAULT : value, collection));
	if (strcmp(option, "channel") == 0)
		return CStringGetTextDatum(value == NULL ? es_layout_default_channel(collection)
												 : check_channel(value));

	*isnull = value == NULL;
	*type = INT8OID;
	if (strcmp(option, "retain_events") == 0 || strcmp(option, "retain_bytes") == 0)
		return value == NULL
				   ? (Datum) 0
				   : Int64GetDatum(check_count(option, parse_number(option, value)));

	*type = BOOLOID;
	if (strcmp(option, "feed_reads") == 0)
		return BoolGetDatum(value != NULL && check_feed_reads(collection, value));

	*type = INTERVALOID;
	if (strcmp(option, "retain_for") == 0 || strcmp(option, "heartbeat") == 0)
		return value == NULL ? (Datum) 0
							 : IntervalPGetDatum(
								   check_interval(option, parse_interval(option, value)));

	ereport(
		ERROR,
		(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
		 errmsg("unknown option \"%s\"", option),
		 errhint("The options are segment_size, retain_events, retain_for, retain_bytes, "
				 "notify, channel, heartbeat, and of a store feed_reads.")));
	return (Datum) 0; /* keep the compiler quiet */
}

Datum
es_set_option(PG_FUNCTION_ARGS)
{
	Oid			 collection;
	Oid			 store;
	char		*option;
	EsRoleSwitch saved;
	Oid			 types[2] = {REGCLASSOID, InvalidOid};
	Datum		 values[2];
	bool		 isnull;

	PreventCommandIfReadOnly("set_option");
	es_require_arg(&fcinfo->args[0], "collection");
	es_require_arg(&fcinfo->args[1], "option");
	collection = es_collection_or_changelog(PG_GETARG_OID(0));
	option = text_to_cstring(PG_GETARG_TEXT_PP(1));
	store = es_collection_open(collection, AccessShareLock)->store;
	es_collection_check_owner(collection);

	values[0] = ObjectIdGetDatum(collection);
	values[1] =
		option_value(collection, option,
					 PG_ARGISNULL(2) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(2)),
					 &types[1], &isnull);

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	/* The option is one of those above, each of which is a column. */
	es_spi_execute(
		psprintf("UPDATE eventstore.collection_catalog SET %s = $2 WHERE collection = $1",
				 quote_identifier(option)),
		2, types, values, isnull ? " n" : "  ", false, SPI_OK_UPDATE);
	SPI_finish();
	es_role_restore(&saved);
	CacheInvalidateRelcacheByRelid(collection);
	/* A store knows some of its changelog's options. */
	if (OidIsValid(store) && get_rel_relkind(store) != '\0')
		CacheInvalidateRelcacheByRelid(store);
	es_wake_maintenance_at_commit();
	PG_RETURN_VOID();
}

/* ---------------------------------------------------------------------------
 * drop_collection, truncate_before
 * ------------------------------------------------------------------------- */

Datum
es_drop_collection(PG_FUNCTION_ARGS)
{
	Oid collection;

	/* Asked for before the lock, which a standby would refuse in its own words. */
	PreventCommandIfReadOnly("drop_collection");
	es_require_arg(&fcinfo->args[0], "collection");
	collection = PG_GETARG_OID(0);
	/* What is none is not locked against everybody, whoever asks. */
	if (!es_collection_exists(collection))
		es_collection_open(collection, AccessShareLock);
	es_collection_check_owner(collection);
	/* The strongest lock first: two who upgrade it would wait for each other. */
	es_collection_open(collection, AccessExclusiveLock);
	es_collection_check_owner(collection);

	SPI_connect();
	es_spi_execute(psprintf("DROP TABLE %s", es_relation_name(collection)), 0, NULL, NULL,
				   NULL, false, SPI_OK_UTILITY);
	SPI_finish();
	PG_RETURN_VOID();
}

/* The first kept position as of now, with a lock on the row; in SPI. */
static EsPosition
lock_first_position(Oid collection)
{
	Oid	  types[] = {REGCLASSOID};
	Datum values[] = {ObjectIdGetDatum(collection)};
	bool  isnull;

	es_spi_execute("SELECT c.first_position FROM eventstore.collection_catalog c"
				   " WHERE c.collection = $1 FOR UPDATE",
				   1, types, values, NULL, false, SPI_OK_SELECT);
	if (SPI_processed != 1)
		elog(ERROR, "collection with OID %u has no catalog row", collection);
	return DatumGetInt64(
		SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
}

Datum
es_truncate_before(PG_FUNCTION_ARGS)
{
	Oid			  collection;
	EsPosition	  before;
	EsPosition	  first;
	EsCollection *coll;
	EsRoleSwitch  saved;

	es_require_preloaded();
	PreventCommandIfReadOnly("truncate_before");
	es_require_arg(&fcinfo->args[0], "collection");
	es_require_arg(&fcinfo->args[1], "before");
	collection = PG_GETARG_OID(0);
	before = PG_GETARG_INT64(1);
	coll = es_collection_open(collection, AccessShareLock);
	es_collection_check_owner(collection);
	if (before < 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("argument \"before\" must not be negative"),
						errdetail("It is " INT64_FORMAT ".", before)));

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	first = lock_first_position(collection);
	/* What others did before us may have arrived with the lock. */
	coll = es_collection_get(collection);
	first = Max(first, es_retention_boundary(coll, before));
	es_retention_set_first(collection, first);
	SPI_finish();
	es_role_restore(&saved);
	es_wake_maintenance_at_commit();
	PG_RETURN_INT64(first);
}

/* ---------------------------------------------------------------------------
 * Triggers
 * ------------------------------------------------------------------------- */

Datum
es_append_only(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	 rel;
	const char	*verb = "UPDATE";

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("function \"%s\" was not called as a trigger",
							   "eventstore.append_only")));
	rel = trigdata->tg_relation;
	if (TRIGGER_FIRED_BY_DELETE(trigdata->tg_event))
		verb = "DELETE";
	else if (TRIGGER_FIRED_BY_TRUNCATE(trigdata->tg_event))
		verb = "TRUNCATE";
	ereport(ERROR,
			(errcode(ERRCODE_ES_APPEND_ONLY),
			 errmsg("cannot %s %s \"%s\"", verb,
					rel->rd_rel->relispartition ? "segment" : "collection",
					RelationGetRelationName(rel)),
			 errdetail("Events are appended and never changed."),
			 errhint("Old events go by eventstore.truncate_before() or by retention."),
			 errtable(rel)));
	PG_RETURN_NULL();
}

static void
require_event_trigger(FunctionCallInfo fcinfo, const char *name)
{
	if (!CALLED_AS_EVENT_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_EVENT_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" was not called as an event trigger", name)));
}

/* As "d", the tables that are being dropped; a condition with AND may follow. */
#define DROPPED_TABLES                                                                   \
	" pg_catalog.pg_event_trigger_dropped_objects() d"                                   \
	" WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objsubid = 0"

/*
 * All that follows is done with a snapshot of now: whoever drops a table has it to
 * himself, but the snapshot of a transaction at REPEATABLE READ may be older than
 * what is noted of it.
 */

/* Their subscriptions; what these handed out is nobody's any more. */
static void
delete_dropped_subscriptions(void)
{
	es_spi_execute_now("WITH gone AS (DELETE FROM eventstore.subscription s"
					   " USING" DROPPED_TABLES
					   " AND d.objid = s.collection::pg_catalog.oid"
					   " RETURNING s.name)"
					   " DELETE FROM eventstore.subscription_lane l USING gone"
					   " WHERE l.subscription = gone.name",
					   SPI_OK_DELETE);
	es_spi_execute_now("DELETE FROM eventstore.dead_letter l"
					   " USING" DROPPED_TABLES
					   " AND d.objid = l.collection::pg_catalog.oid",
					   SPI_OK_DELETE);
}

/* The Kafka sources that feed them; a worker finds out by itself. */
static void
delete_dropped_sources(void)
{
	es_spi_execute_now("DELETE FROM eventstore.source s"
					   " USING" DROPPED_TABLES " AND d.objid = s.target::pg_catalog.oid",
					   SPI_OK_DELETE);
}

/* What records its changes in a collection, and where that is noted. */
typedef struct Recorder
{
	const char *catalog;
	const char *column; /* its table */
	const char *kind;
	const char *hint; /* to who drops the changelog alone */
} Recorder;

static const Recorder recorders[] = {
	{"store_catalog", "store", "store", "Drop both with eventstore.drop_store()."},
	{"capture_catalog", "source", "captured table",
	 "End the capture with eventstore.release()."}};

static void
forget_dropped(const Recorder *recorder)
{
	es_spi_execute_now(psprintf("DELETE FROM eventstore.%s s USING" DROPPED_TABLES
								" AND d.objid = s.%s::pg_catalog.oid"
								" RETURNING s.changelog::pg_catalog.oid",
								recorder->catalog, recorder->column),
					   SPI_OK_DELETE_RETURNING);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		bool isnull;
		Oid	 changelog = DatumGetObjectId(
			 SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull));

		if (!isnull && get_rel_relkind(changelog) != '\0')
			CacheInvalidateRelcacheByRelid(changelog);
	}
}

static void
keep_changelogs(const Recorder *recorder)
{
	Datum source;
	bool  isnull;

	es_spi_execute_now(psprintf("SELECT s.%s::pg_catalog.oid, d.object_identity"
								" FROM eventstore.%s s," DROPPED_TABLES
								" AND d.objid = s.changelog::pg_catalog.oid",
								recorder->column, recorder->catalog),
					   SPI_OK_SELECT);
	if (SPI_processed == 0)
		return;
	source = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	ereport(ERROR, (errcode(ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST),
					errmsg("cannot drop changelog %s of a %s",
						   SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2),
						   recorder->kind),
					errdetail("%c%s \"%s\" records its changes there.",
							  pg_toupper((unsigned char) recorder->kind[0]),
							  recorder->kind + 1, get_rel_name(DatumGetObjectId(source))),
					errhint("%s", recorder->hint)));
}

/*
 * A changelog without its store or table is a plain collection; one of these
 * without its changelog would be one that forgets, so that is refused.
 */
static void
delete_dropped_recorders(void)
{
	es_spi_execute_now("DELETE FROM eventstore.store_backlog b"
					   " USING" DROPPED_TABLES " AND d.objid = b.store::pg_catalog.oid",
					   SPI_OK_DELETE);
	for (int i = 0; i < lengthof(recorders); i++)
		forget_dropped(&recorders[i]);
	for (int i = 0; i < lengthof(recorders); i++)
		keep_changelogs(&recorders[i]);
}

/* The rows of dropped collections: each one's OID and that of its heads table. */
static void
delete_dropped_rows(void)
{
	es_spi_execute_now("DELETE FROM eventstore.segment_disposal s"
					   " USING" DROPPED_TABLES " AND d.objid = s.segment::pg_catalog.oid",
					   SPI_OK_DELETE);
	es_spi_execute_now("DELETE FROM eventstore.collection_catalog c"
					   " USING" DROPPED_TABLES
					   " AND d.objid = c.collection::pg_catalog.oid"
					   " RETURNING c.collection::pg_catalog.oid, c.heads::pg_catalog.oid",
					   SPI_OK_DELETE_RETURNING);
}

/* Once the collection's row is gone the worker writes no other (write_ticks). */
static void
delete_dropped_ticks(void)
{
	es_spi_execute_now("DELETE FROM eventstore.tick t"
					   " USING" DROPPED_TABLES " AND d.objid = t.collection",
					   SPI_OK_DELETE);
}

/* What depends on a heads table (a view of the owner's) goes with it, with a NOTICE. */
static void
drop_heads(Oid heads)
{
	ObjectAddress address;

	if (get_rel_relkind(heads) != RELKIND_RELATION)
		return;
	ObjectAddressSet(address, RelationRelationId, heads);
	performDeletion(&address, DROP_CASCADE, 0);
}

/*
 * Whoever drops the table, with whichever rights he did it: the rest follows.
 */
Datum
es_on_drop(PG_FUNCTION_ARGS)
{
	EsRoleSwitch saved;
	Oid			*heads;
	uint64		 n;

	require_event_trigger(fcinfo, "eventstore.on_drop");
	if (!OidIsValid(es_extension_schema()))
		PG_RETURN_NULL();

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	delete_dropped_subscriptions();
	delete_dropped_sources();
	delete_dropped_recorders();
	delete_dropped_rows();
	n = SPI_processed;
	heads = palloc(sizeof(Oid) * (n + 1));
	for (uint64 i = 0; i < n; i++)
	{
		HeapTuple row = SPI_tuptable->vals[i];
		TupleDesc desc = SPI_tuptable->tupdesc;
		bool	  isnull;

		heads[i] = DatumGetObjectId(SPI_getbinval(row, desc, 2, &isnull));
		if (es_preloaded())
			es_head_forget_at_commit(
				DatumGetObjectId(SPI_getbinval(row, desc, 1, &isnull)));
	}
	delete_dropped_ticks();
	for (uint64 i = 0; i < n; i++)
		drop_heads(heads[i]);
	SPI_finish();
	es_role_restore(&saved);
	PG_RETURN_NULL();
}

/* Segments and heads table; in SPI. */
static List *
list_parts(Oid collection)
{
	EsSegment *segments;
	int		   n = es_segments_list(collection, &segments);
	List	  *parts = NIL;
	EsLayout   layout;
	EsPosition first;

	for (int i = 0; i < n; i++)
		parts = lappend_oid(parts, segments[i].relid);
	if (es_layout_read(collection, &layout, &first) &&
		get_rel_relkind(layout.heads) == RELKIND_RELATION)
		parts = lappend_oid(parts, layout.heads);
	return parts;
}

/* The rights to do so were checked when the collection itself was changed. */
static void
follow_owner(Oid collection)
{
	Oid		  owner = es_relation_owner(collection);
	ListCell *cell;

	SPI_connect();
	foreach (cell, list_parts(collection))
		ATExecChangeOwner(lfirst_oid(cell), owner, true, AccessExclusiveLock);
	SPI_finish();
}

static void
follow_schema(Oid collection)
{
	Oid			schema = get_rel_namespace(collection);
	const char *schema_name = quote_identifier(get_namespace_name(schema));
	ListCell   *cell;

	SPI_connect();
	foreach (cell, list_parts(collection))
		if (get_rel_namespace(lfirst_oid(cell)) != schema)
			es_spi_execute(psprintf("ALTER TABLE %s SET SCHEMA %s",
									es_relation_name(lfirst_oid(cell)), schema_name),
						   0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
	SPI_finish();
}

static bool
has_command(AlterTableStmt *stmt, AlterTableType subtype)
{
	ListCell *cell;

	foreach (cell, stmt->cmds)
		if (lfirst_node(AlterTableCmd, cell)->subtype == subtype)
			return true;
	return false;
}

/*
 * The collection that the statement is about, where it has the command; the
 * relation is locked by now.
 */
static Oid
altered_collection(AlterTableStmt *stmt, AlterTableType subtype)
{
	Oid relid;

	if (!has_command(stmt, subtype))
		return InvalidOid;
	relid = RangeVarGetRelid(stmt->relation, NoLock, true);
	return OidIsValid(relid) && es_collection_exists(relid) ? relid : InvalidOid;
}

/* Runs after every ALTER TABLE, so it looks at the statement first. */
Datum
es_on_alter(PG_FUNCTION_ARGS)
{
	Node *stmt;
	Oid	  relid = InvalidOid;

	require_event_trigger(fcinfo, "eventstore.on_alter");
	stmt = ((EventTriggerData *) fcinfo->context)->parsetree;
	if (IsA(stmt, AlterTableStmt))
	{
		relid = altered_collection((AlterTableStmt *) stmt, AT_ChangeOwner);
		if (OidIsValid(relid))
			follow_owner(relid);
		/* Until others have heard of the segment, nobody is to publish it. */
		relid = altered_collection((AlterTableStmt *) stmt, AT_AttachPartition);
		if (OidIsValid(relid))
			es_segments_lock(relid, ExclusiveLock);
	}
	else if (IsA(stmt, AlterObjectSchemaStmt) &&
			 ((AlterObjectSchemaStmt *) stmt)->relation != NULL)
	{
		AlterObjectSchemaStmt *move = (AlterObjectSchemaStmt *) stmt;

		relid = get_relname_relid(move->relation->relname,
								  get_namespace_oid(move->newschema, true));
		if (OidIsValid(relid) && es_collection_exists(relid))
			follow_schema(relid);
	}
	PG_RETURN_NULL();
}
