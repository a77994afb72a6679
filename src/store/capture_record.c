/*
 * store/capture_record.c
 *		The triggers of a captured table: each changed row is an event.
 *
 *	type	insert, update, delete, truncate
 *	stream	the key as text; of several columns the JSON array of them
 *	tags	name:value for each column of the key; table:schema.name where the
 *			changelog was given and may be shared
 *	data	{"old": row or null, "new": row or null}, rows as to_jsonb makes them
 *
 * A change of the key is a delete of the old and an insert of the new one: an
 * event belongs to one stream.  So is a row that moves to another partition,
 * where PostgreSQL tells it so.  A row's events are in the order of its changes
 * because whoever changes it holds its lock to the end of the transaction, and
 * takes that of the stream after it.  Each UPDATE of a row is an event, also
 * one that changes nothing (suppress_redundant_updates_trigger is there).
 *
 * TRUNCATE is one event without a stream.  PostgreSQL tells nobody who watches
 * a table that one of its partitions was truncated by name: a hook does
 * (statement.c), and the event has a tag partition:schema.name.
 *
 * Text and JSON of a value depend on settings; here they are always ISO dates,
 * UTC and the defaults of the rest, or a key would have another stream in
 * another session.
 *
 * Rights: who may write the table needs none on the changelog ('recording').
 * Values that did not change are detoasted from the old row; both are intact
 * while the transaction lasts.  When the events are appended: statement.c.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "collection/event.h"
#include "compat.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "pgtime.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "store/capture.h"
#include "store/statement.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/bytea.h"
#include "utils/datum.h"
#include "utils/float.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

PG_FUNCTION_INFO_V1(es_capture_record);

/* ---------------------------------------------------------------------------
 * Settings on which the text of a value depends
 * ------------------------------------------------------------------------- */

typedef struct OutputSettings
{
	int	   date_style;
	int	   interval_style;
	int	   float_digits;
	int	   bytea_format;
	pg_tz *timezone;
} OutputSettings;

static OutputSettings
set_output(OutputSettings settings)
{
	OutputSettings old = {DateStyle, IntervalStyle, extra_float_digits, bytea_output,
						  session_timezone};

	DateStyle = settings.date_style;
	IntervalStyle = settings.interval_style;
	extra_float_digits = settings.float_digits;
	bytea_output = settings.bytea_format;
	session_timezone = settings.timezone;
	return old;
}

static OutputSettings
fixed_settings(void)
{
	static pg_tz  *utc = NULL;
	OutputSettings fixed = {USE_ISO_DATES, INTSTYLE_POSTGRES, 1, BYTEA_OUTPUT_HEX, NULL};

	if (utc == NULL)
		utc = pg_tzset("UTC");
	fixed.timezone = utc;
	return fixed;
}

/* ---------------------------------------------------------------------------
 * Keys
 * ------------------------------------------------------------------------- */

/* A row's key: the values of its columns, none of them null. */
typedef struct RowKey
{
	Datum values[INDEX_MAX_KEYS];
} RowKey;

static void
read_key(const EsCapture *capture, HeapTuple tuple, TupleDesc desc, RowKey *key)
{
	bool isnull;

	for (int i = 0; i < capture->nkeys; i++)
		key->values[i] = heap_getattr(tuple, capture->keys[i].attnum, desc, &isnull);
}

static bool
same_key(const EsCapture *capture, TupleDesc desc, const RowKey *a, const RowKey *b)
{
	for (int i = 0; i < capture->nkeys; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, capture->keys[i].attnum - 1);

		if (!datum_image_eq(a->values[i], b->values[i], att->attbyval, att->attlen))
			return false;
	}
	return true;
}

static char *
column_text(EsCaptureKey *column, Datum value)
{
	if (column->boolean)
		return DatumGetBool(value) ? "true" : "false";
	return OutputFunctionCall(&column->output, value);
}

static text *
key_array(EsCapture *capture, const RowKey *key)
{
	LOCAL_FCINFO(fcinfo, INDEX_MAX_KEYS);
	Jsonb		  *array;
	StringInfoData string;

	InitFunctionCallInfoData(*fcinfo, &capture->key_array, capture->nkeys, InvalidOid,
							 NULL, NULL);
	for (int i = 0; i < capture->nkeys; i++)
	{
		fcinfo->args[i].value = key->values[i];
		fcinfo->args[i].isnull = false;
	}
	array = DatumGetJsonbP(FunctionCallInvoke(fcinfo));
	initStringInfo(&string);
	JsonbToCString(&string, &array->root, VARSIZE(array));
	return cstring_to_text_with_len(string.data, string.len);
}

static Datum
name_tag(const char *name, const char *value)
{
	return PointerGetDatum(cstring_to_text(psprintf("%s:%s", name, value)));
}

static Datum
relation_tag(const char *name, Oid relid)
{
	return name_tag(name, psprintf("%s.%s", get_namespace_name(get_rel_namespace(relid)),
								   get_rel_name(relid)));
}

/* Stream and tags of a row with this key. */
static void
set_key(EsEvent *event, EsCapture *capture, Relation rel, const RowKey *key)
{
	Datum tags[INDEX_MAX_KEYS + 1];
	int	  ntags = 0;

	for (int i = 0; i < capture->nkeys; i++)
	{
		EsCaptureKey *column = &capture->keys[i];
		char		 *value = column_text(column, key->values[i]);

		tags[ntags++] = name_tag(
			NameStr(TupleDescAttr(RelationGetDescr(rel), column->attnum - 1)->attname),
			value);
		if (capture->nkeys == 1)
			event->stream = cstring_to_text(value);
	}
	if (capture->nkeys > 1)
		event->stream = key_array(capture, key);
	if (capture->shared)
		tags[ntags++] = relation_tag("table", capture->source);
	event->tags = construct_array(tags, ntags, TEXTOID, -1, false, TYPALIGN_INT);
}

/* ---------------------------------------------------------------------------
 * Events
 * ------------------------------------------------------------------------- */

static void
begin_event(EsEvent *event, const char *type)
{
	memset(event, 0, sizeof(*event));
	event->expected_version = ES_NO_VERSION;
	event->type = cstring_to_text(type);
}

static void
add_event(EsCapture *capture, Relation rel, const char *type, const RowKey *key,
		  HeapTuple old, HeapTuple new)
{
	OutputSettings outside = set_output(fixed_settings());
	EsEvent		   event;

	begin_event(&event, type);
	PG_TRY();
	{
		set_key(&event, capture, rel, key);
		event.data = es_row_json_change(capture->rows, RelationGetDescr(rel), old, new);
	}
	PG_FINALLY();
	{
		set_output(outside);
	}
	PG_END_TRY();
	es_statement_add(capture->changelog, &event);
}

static void
record_row(EsCapture *capture, Relation rel, HeapTuple old, HeapTuple new)
{
	TupleDesc desc = RelationGetDescr(rel);
	RowKey	  old_key;
	RowKey	  new_key;

	if (old != NULL)
		read_key(capture, old, desc, &old_key);
	if (new != NULL)
		read_key(capture, new, desc, &new_key);
	if (old != NULL && new != NULL && same_key(capture, desc, &old_key, &new_key))
	{
		add_event(capture, rel, "update", &new_key, old, new);
		return;
	}
	if (old != NULL)
		add_event(capture, rel, "delete", &old_key, old, NULL);
	if (new != NULL)
		add_event(capture, rel, "insert", &new_key, NULL, new);
}

/* Of the whole table, or of a partition that was named. */
static void
record_truncate(Oid changelog, bool shared, Oid source, Oid truncated)
{
	EsEvent event;
	Datum	tags[2];
	int		ntags = 0;

	begin_event(&event, "truncate");
	event.data = DatumGetJsonbP(
		DirectFunctionCall1(jsonb_in, CStringGetDatum("{\"old\": null, \"new\": null}")));
	if (shared)
		tags[ntags++] = relation_tag("table", source);
	if (truncated != source)
		tags[ntags++] = relation_tag("partition", truncated);
	event.tags = construct_array(tags, ntags, TEXTOID, -1, false, TYPALIGN_INT);
	es_statement_add(changelog, &event);
}

/* Else the name was given to another table before it was locked. */
static bool
was_truncated(Oid relid)
{
	LOCKTAG tag;

	SET_LOCKTAG_RELATION(tag, MyDatabaseId, relid);
	return es_lock_held_by_me(&tag, AccessExclusiveLock);
}

void
es_capture_truncated(List *relids)
{
	ListCell *cell;

	foreach (cell, relids)
	{
		Oid	 relid = lfirst_oid(cell);
		Oid	 changelog;
		Oid	 source;
		bool shared;

		if (!get_rel_relispartition(relid) || !was_truncated(relid))
			continue;
		source = es_capture_source(relid, &changelog, &shared);
		if (OidIsValid(source) && source != relid)
			record_truncate(changelog, shared, source, relid);
	}
}

/* ---------------------------------------------------------------------------
 * The trigger
 * ------------------------------------------------------------------------- */

static void
record_trigger(TriggerData *trigdata)
{
	Relation   rel = trigdata->tg_relation;
	EsCapture *capture = es_capture_get(rel);

	if (TRIGGER_FIRED_BY_TRUNCATE(trigdata->tg_event))
		record_truncate(capture->changelog, capture->shared, capture->source,
						RelationGetRelid(rel));
	else if (TRIGGER_FIRED_BY_INSERT(trigdata->tg_event))
		record_row(capture, rel, NULL, trigdata->tg_trigtuple);
	else if (TRIGGER_FIRED_BY_DELETE(trigdata->tg_event))
		record_row(capture, rel, trigdata->tg_trigtuple, NULL);
	else
		record_row(capture, rel, trigdata->tg_trigtuple, trigdata->tg_newtuple);
}

Datum
es_capture_record(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_AFTER(trigdata->tg_event) ||
		(!TRIGGER_FIRED_FOR_ROW(trigdata->tg_event) &&
		 !TRIGGER_FIRED_BY_TRUNCATE(trigdata->tg_event)))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("function \"%s\" must be called after a change for each "
							   "row, or after TRUNCATE",
							   "eventstore.capture_record")));
	/* What comes after its statement would be out of order, or outlive a savepoint. */
	if (trigdata->tg_trigger->tgdeferrable)
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("function \"%s\" cannot be called by a deferrable trigger",
							   "eventstore.capture_record"),
						errdetail("Trigger \"%s\" of table \"%s\" is.",
								  trigdata->tg_trigger->tgname,
								  RelationGetRelationName(trigdata->tg_relation))));
	es_require_preloaded();
	es_statement_learn_trigger(fcinfo->flinfo->fn_oid);

	record_trigger(trigdata);
	PG_RETURN_POINTER(NULL); /* nobody looks at it, but null is an error */
}
