/*
 * store/change.c
 *		The triggers of a store: each change of a row is an event.
 *
 * Whatever changes a store's row (our functions, INSERT with ON CONFLICT or
 * without, UPDATE, DELETE, MERGE, COPY, a foreign key's action, somebody's
 * trigger) passes two row triggers:
 *
 *	version	BEFORE, after all triggers of the user: gives the row its version and
 *			time.  It has no side effect, for it also runs for rows that ON
 *			CONFLICT then does not insert.  A new key's version follows the last
 *			one of its stream, at which it looks without a lock: it runs before
 *			the unique check, where a lock would be taken in the wrong order.  But a
 *			row that was restored is recorded now, if it was not (backlog.c).
 *	record	AFTER, before all triggers of the user: appends the event (record.c).
 *			By now the row is ours, so locks go row, then head.
 *
 * A value that stays the same, byte for byte, is no change: no version, no
 * event.  Without a changelog there is only the first trigger.
 *
 * A batch (batch.c) that writes rows past the executor does itself what these
 * triggers would do.
 */
#include "postgres.h"

#include "store/change.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "collection/collection.h"
#include "collection/heads.h"
#include "commands/trigger.h"
#include "errors.h"
#include "fmgr.h"
#include "store/backlog.h"
#include "store/record.h"
#include "store/store.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgrprotos.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(es_store_version);
PG_FUNCTION_INFO_V1(es_store_record);
PG_FUNCTION_INFO_V1(es_store_guard);

static EsReplaced *watched = NULL;
static Oid		   unrecorded = InvalidOid;
static int		   unrecorded_depth;

/* ---------------------------------------------------------------------------
 * What the functions ask of the triggers
 * ------------------------------------------------------------------------- */

static int
trigger_depth(void)
{
	return DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum) 0));
}

void
es_store_watch_begin(EsReplaced *replaced, Oid store, Datum key)
{
	replaced->store = store;
	replaced->key = key;
	replaced->depth = trigger_depth() + 1;
	replaced->found = false;
	replaced->same = false;
	replaced->metadata = NULL;
	replaced->time_given = false;
	replaced->value = (Datum) 0;
	replaced->context = CurrentMemoryContext;
	replaced->outer = watched;
	watched = replaced;
}

void
es_store_watch_end(EsReplaced *replaced)
{
	watched = replaced->outer;
}

void
es_store_unrecorded_begin(Oid store)
{
	unrecorded = store;
	unrecorded_depth = trigger_depth() + 1;
}

void
es_store_unrecorded_end(void)
{
	unrecorded = InvalidOid;
}

static bool
is_unrecorded(Relation rel)
{
	return unrecorded == RelationGetRelid(rel) && unrecorded_depth == trigger_depth();
}

/* ---------------------------------------------------------------------------
 * Rows
 * ------------------------------------------------------------------------- */

/* What the function says whose statement this is, and is about this key; NULL. */
static EsReplaced *
watch_for(Relation rel, Datum key)
{
	if (watched == NULL || watched->store != RelationGetRelid(rel) ||
		watched->depth != trigger_depth() || !es_store_same_bytes(watched->key, key))
		return NULL;
	return watched;
}

static TimestampTz
time_of(const EsReplaced *watch)
{
	return watch != NULL && watch->time_given ? watch->time : GetCurrentTimestamp();
}

static void
note_replaced(EsReplaced *watch, const EsStoreRow *row, bool same)
{
	MemoryContext old;

	if (watch == NULL)
		return;
	old = MemoryContextSwitchTo(watch->context);
	watch->value = PointerGetDatum(PG_DETOAST_DATUM_COPY(row->value));
	watch->found = true;
	watch->same = same;
	MemoryContextSwitchTo(old);
}

static TriggerData *
require_row_trigger(FunctionCallInfo fcinfo, const char *name, bool before)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_FOR_ROW(trigdata->tg_event) ||
		(before ? !TRIGGER_FIRED_BEFORE(trigdata->tg_event)
				: !TRIGGER_FIRED_AFTER(trigdata->tg_event)) ||
		(before && TRIGGER_FIRED_BY_DELETE(trigdata->tg_event)))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"eventstore.%s\" must be called %s for each row", name,
						before ? "before insert or update" : "after a change")));
	return trigdata;
}

/* ---------------------------------------------------------------------------
 * BEFORE: version and time
 * ------------------------------------------------------------------------- */

/* What the key's stream ends with, as far as can be told without its lock. */
static void
look_at_stream(const EsStore *store, Datum key, EsStoreRow *last)
{
	EsStreamHead  head;
	EsCollection *changelog;
	Snapshot	  snapshot;

	last->version = 0;
	last->has_time = false;
	if (!OidIsValid(store->changelog))
		return;
	changelog = es_collection_open(store->changelog, RowExclusiveLock);
	snapshot = RegisterSnapshot(GetLatestSnapshot());
	if (es_heads_peek(changelog, es_store_key_to_text(store, key), snapshot, &head))
	{
		last->version = head.version;
		last->has_time = true;
		last->updated_at = head.last_at;
	}
	UnregisterSnapshot(snapshot);
}

/*
 * A row that was restored and is not recorded yet is from now on, before it is replaced:
 * it is locked, so the order is row, then head.
 */
static void
record_backlog(const EsStore *store, TriggerData *trigdata, const EsStoreRow *old)
{
	TransactionId xmin = HeapTupleHeaderGetXmin(trigdata->tg_trigtuple->t_data);

	if (es_store_row_in_backlog(store, old) && !TransactionIdIsCurrentTransactionId(xmin))
		es_store_backlog_record_row(store, trigdata->tg_relation, old);
}

static HeapTuple
version_update(const EsStore *store, TriggerData *trigdata)
{
	TupleDesc  desc = RelationGetDescr(trigdata->tg_relation);
	EsStoreRow old;
	EsStoreRow new;
	EsStoreRow	last;
	EsReplaced *watch;
	bool		moved;
	bool		same;

	es_store_read_row(&old, trigdata->tg_trigtuple, desc);
	es_store_read_row(&new, trigdata->tg_newtuple, desc);
	moved = new.complete && !es_store_same_bytes(old.key, new.key);
	same = new.complete && !moved &&es_store_same_bytes(old.value, new.value);
	watch = watch_for(trigdata->tg_relation, old.key);
	note_replaced(watch, &old, same);
	if (!new.complete)
		return trigdata->tg_newtuple; /* to be refused as null */
	if (same)
		return es_store_with_version(trigdata->tg_newtuple, desc, old.version,
									 old.has_time, old.updated_at);
	record_backlog(store, trigdata, &old);
	last = old;
	if (moved)
		look_at_stream(store, new.key, &last);
	return es_store_with_version(trigdata->tg_newtuple, desc, last.version + 1, true,
								 es_store_not_before(time_of(watch), &last));
}

static HeapTuple
version_insert(EsStore *store, TriggerData *trigdata)
{
	TupleDesc desc = RelationGetDescr(trigdata->tg_relation);
	EsStoreRow new;
	EsStoreRow last;

	es_store_check_filled(store, trigdata->tg_relation);
	es_store_read_row(&new, trigdata->tg_trigtuple, desc);
	if (!new.complete)
		return trigdata->tg_trigtuple;
	look_at_stream(store, new.key, &last);
	return es_store_with_version(
		trigdata->tg_trigtuple, desc, last.version + 1, true,
		es_store_not_before(time_of(watch_for(trigdata->tg_relation, new.key)), &last));
}

Datum
es_store_version(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = require_row_trigger(fcinfo, "store_version", true);
	EsStore		*store = es_store_get(RelationGetRelid(trigdata->tg_relation));
	bool		 update = TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event);

	if (is_unrecorded(trigdata->tg_relation))
		PG_RETURN_POINTER(update ? trigdata->tg_newtuple : trigdata->tg_trigtuple);
	PG_RETURN_POINTER(update ? version_update(store, trigdata)
							 : version_insert(store, trigdata));
}

/* ---------------------------------------------------------------------------
 * AFTER: events
 * ------------------------------------------------------------------------- */

/* False where nothing has changed. */
static bool
collect_change(const EsStore *store, EsRowChange *change, TriggerData *trigdata)
{
	TupleDesc desc = RelationGetDescr(trigdata->tg_relation);
	HeapTuple old =
		TRIGGER_FIRED_BY_INSERT(trigdata->tg_event) ? NULL : trigdata->tg_trigtuple;
	HeapTuple new = NULL;

	if (TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event))
		new = trigdata->tg_newtuple;
	else if (old == NULL)
		new = trigdata->tg_trigtuple;

	change->has_old = old != NULL;
	change->has_new = new != NULL;
	if (old != NULL)
	{
		es_store_read_row(&change->old, old, desc);
		change->old_is_ours =
			TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(old->t_data));
		change->old_in_backlog =
			!change->old_is_ours && es_store_row_in_backlog(store, &change->old);
	}
	if (new != NULL)
	{
		es_store_read_row(&change->new, new, desc);
		change->new_tid = new->t_self;
	}
	if (old == NULL || new == NULL)
		return true;
	change->moved = !es_store_same_bytes(change->old.key, change->new.key);
	return change->moved || !es_store_same_bytes(change->old.value, change->new.value);
}

Datum
es_store_record(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = require_row_trigger(fcinfo, "store_record", false);
	Relation	 rel = trigdata->tg_relation;
	EsStore		*store = es_store_get(RelationGetRelid(rel));
	EsRowChange	 change = {0};

	if (OidIsValid(store->changelog) && !is_unrecorded(rel) &&
		collect_change(store, &change, trigdata))
	{
		EsReplaced *watch =
			watch_for(rel, change.has_new ? change.new.key : change.old.key);

		change.time = time_of(watch);
		change.metadata = watch != NULL ? watch->metadata : NULL;
		es_store_record_rows(store, rel, &change, 1);
	}
	PG_RETURN_POINTER(NULL); /* nobody looks at it, but null is an error */
}

/* ---------------------------------------------------------------------------
 * Whose triggers
 * ------------------------------------------------------------------------- */

static bool
runs(const Trigger *trigger, const char *name, PGFunction function)
{
	FmgrInfo info;

	if (strcmp(trigger->tgname, name) != 0 || trigger->tgqual != NULL ||
		trigger->tgnattr > 0 ||
		(trigger->tgenabled != TRIGGER_FIRES_ON_ORIGIN &&
		 trigger->tgenabled != TRIGGER_FIRES_ALWAYS))
		return false;
	fmgr_info(trigger->tgfoid, &info);
	return info.fn_addr == function;
}

bool
es_store_has_triggers(Relation rel, bool changelog, bool *others)
{
	TriggerDesc *triggers = rel->trigdesc;
	bool		 versions = false;
	bool		 records = false;
	bool		 guards = false;

	*others = false;
	if (triggers == NULL || SessionReplicationRole == SESSION_REPLICATION_ROLE_REPLICA)
		return false;
	for (int i = 0; i < triggers->numtriggers; i++)
	{
		const Trigger *trigger = &triggers->triggers[i];

		if (runs(trigger, ES_STORE_VERSION_TRIGGER, es_store_version))
			versions = true;
		else if (runs(trigger, ES_STORE_RECORD_TRIGGER, es_store_record))
			records = true;
		else if (runs(trigger, ES_STORE_GUARD_TRIGGER, es_store_guard))
			guards = true;
		else
			*others = true;
	}
	return versions && records == changelog && guards;
}

/* ---------------------------------------------------------------------------
 * TRUNCATE
 * ------------------------------------------------------------------------- */

Datum
es_store_guard(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("function \"%s\" was not called as a trigger",
							   "eventstore.store_guard")));
	ereport(ERROR, (errcode(ERRCODE_ES_APPEND_ONLY),
					errmsg("cannot TRUNCATE store \"%s\"",
						   RelationGetRelationName(trigdata->tg_relation)),
					errdetail("It would not be recorded key by key."),
					errhint("Use eventstore.clear() or DELETE."),
					errtable(trigdata->tg_relation)));
	PG_RETURN_NULL();
}
