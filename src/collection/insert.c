/*
 * collection/insert.c
 *		INSERT and COPY into a collection: a column default and a row trigger.
 *
 * Partition routing comes before row triggers, so the position has to be there
 * before the trigger runs: the default of column position takes it
 * (next_position), and the trigger (append_row) does the rest.  It is named to
 * run after all triggers of the user, and
 *
 *	1.	accepts the position only if the default (or an append function, below)
 *		handed it out and nobody used it yet: a caller's own position is LG003.
 *		Those handed out are kept in a list of this backend, emptied when a
 *		subtransaction aborts and when the transaction ends;
 *	2.	checks the event and registers its labels, which may wait for
 *		conditional appends;
 *	3.	locks the stream and takes the next version;
 *	4.	where, meanwhile, the stream or a conditional append got a position
 *		above ours, takes a new one, so that positions and versions agree and
 *		no condition is undercut.  The row is routed already, so the new one
 *		must lie in the same segment, or the statement fails with 40001;
 *	5.	writes the stream's row, checksum and safe_head.
 *
 * The append functions come this way too where a table has something that only
 * the executor does (triggers, row-level security, generated columns): they
 * have done 2 to 5, hand out the positions with es_insert_expect, and the
 * trigger only completes the row.
 *
 * The partitions that a statement can fill are fixed when it begins.  Two hooks
 * note the end of the segments that are ready then, and wait for some where
 * there is little room (segment.c); the default goes no further (55000), and
 * wakes the worker in time for the next statement.
 *
 * Rights: the default runs as whoever inserts, through views and definer
 * functions too, so it cannot ask for INSERT on the table in general; but
 * without a check anyone could burn positions and hold the head back.  It
 * serves those who have INSERT, and statements that the executor has let
 * insert into this collection (noted by a hook, per transaction).
 */
#include "postgres.h"

#include "collection/append.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "collection/event.h"
#include "collection/heads.h"
#include "collection/label_index.h"
#include "collection/layout.h"
#include "collection/segment.h"
#include "commands/trigger.h"
#include "compat.h"
#include "errors.h"
#include "executor/executor.h"
#include "guc.h"
#include "miscadmin.h"
#include "nodes/plannodes.h"
#include "parser/parsetree.h"
#include "shmem.h"
#include "storage/lmgr.h"
#include "utility.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "worker/wake.h"

PG_FUNCTION_INFO_V1(es_next_position);
PG_FUNCTION_INFO_V1(es_append_row);

/* A position handed out to a row that has not come to the trigger yet. */
typedef struct HandedOut
{
	Oid				 collection;
	EsPosition		 position;
	EsPosition		 safe;
	const EsEvent	*event; /* of an append function; NULL from the default */
	SubTransactionId subid; /* it goes when this one aborts, or one around it */
} HandedOut;

static HandedOut *handed = NULL; /* TopMemoryContext */
static int		  nhanded = 0;
static int		  handed_size = 0;
static int		  handed_next = 0; /* where the next one is looked for first */

/* A collection that a statement of this transaction inserts into. */
typedef struct Target
{
	Oid		   collection;
	bool	   allowed; /* the executor has checked the right to do so */
	EsPosition end;		/* of the segments when the newest one began */
} Target;

static List *targets = NIL; /* of Target, TopTransactionContext */

static ExecutorStart_hook_type	previous_executor_start = NULL;
static ProcessUtility_hook_type previous_process_utility = NULL;

/* ---------------------------------------------------------------------------
 * Positions handed out
 * ------------------------------------------------------------------------- */

static void
clear_handed(void)
{
	nhanded = 0;
	handed_next = 0;
}

static void
clear_at_end(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
		event == XACT_EVENT_PREPARE)
	{
		clear_handed();
		targets = NIL;
	}
}

static void
clear_at_subabort(SubXactEvent event, SubTransactionId subid, SubTransactionId parent,
				  void *arg)
{
	if (event != SUBXACT_EVENT_ABORT_SUB)
		return;
	/* Subtransactions within it have greater numbers; what is outside stays. */
	while (nhanded > 0 && handed[nhanded - 1].subid >= subid)
		nhanded--;
	handed_next = Min(handed_next, nhanded);
}

static void
hand_out(Oid collection, EsPosition position, EsPosition safe, const EsEvent *event)
{
	if (nhanded == handed_size)
	{
		int size = handed_size == 0 ? 64 : handed_size * 2;

		if (handed == NULL)
			handed = MemoryContextAlloc(TopMemoryContext, sizeof(HandedOut) * size);
		else
			handed = repalloc_huge(handed, sizeof(HandedOut) * size);
		handed_size = size;
	}
	handed[nhanded].collection = collection;
	handed[nhanded].position = position;
	handed[nhanded].safe = safe;
	handed[nhanded].event = event;
	handed[nhanded].subid = GetCurrentSubTransactionId();
	nhanded++;
}

void
es_insert_expect(const EsCollection *coll, const EsEvent *event, EsPosition safe)
{
	hand_out(coll->relid, event->position, safe, event);
}

int
es_insert_mark(void)
{
	return nhanded;
}

void
es_insert_forget_from(int mark)
{
	nhanded = Min(nhanded, mark);
	handed_next = Min(handed_next, nhanded);
}

EsPosition
es_insert_lowest_pending(const EsCollection *coll)
{
	EsPosition lowest = PG_INT64_MAX;

	for (int i = 0; i < nhanded; i++)
		if (handed[i].collection == coll->relid && handed[i].position > 0)
			lowest = Min(lowest, handed[i].position);
	return lowest;
}

static bool
matches_handed(int i, Oid collection, EsPosition position)
{
	return handed[i].position == position && handed[i].collection == collection;
}

/* Takes a position from the list.  Rows come in the order of their positions. */
static bool
take_handed(Oid collection, EsPosition position, HandedOut *taken)
{
	int found = -1;

	if (handed_next < nhanded && matches_handed(handed_next, collection, position))
		found = handed_next;
	for (int i = nhanded - 1; i >= 0 && found < 0; i--)
		if (matches_handed(i, collection, position))
			found = i;
	if (found < 0)
		return false;

	*taken = handed[found];
	handed[found].position = 0;
	handed_next = found + 1;
	if (handed_next >= nhanded)
	{
		/* The common case: nothing else is out. */
		while (nhanded > 0 && handed[nhanded - 1].position == 0)
			nhanded--;
		handed_next = nhanded;
	}
	return true;
}

/* ---------------------------------------------------------------------------
 * The hooks
 * ------------------------------------------------------------------------- */

/* DO NOTHING may drop the row after its version was given: a hole. */
static void
refuse_on_conflict(Plan *plan, PlannedStmt *stmt)
{
	ModifyTable *modify = (ModifyTable *) plan;
	Oid			 relid;

	if (plan == NULL || !IsA(plan, ModifyTable) ||
		modify->onConflictAction != ONCONFLICT_NOTHING)
		return;
	relid = rt_fetch(linitial_int(modify->resultRelations), stmt->rtable)->relid;
	if (!es_collection_exists(relid) && !OidIsValid(es_collection_of_segment(relid)))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_ES_APPEND_ONLY),
			 errmsg("cannot use ON CONFLICT on collection \"%s\"", get_rel_name(relid)),
			 errhint("Use append functions with ids and expected versions: they "
					 "recognise a repetition.")));
}

static Target *
find_target(Oid collection)
{
	ListCell *lc;

	foreach (lc, targets)
		if (((Target *) lfirst(lc))->collection == collection)
			return lfirst(lc);
	return NULL;
}

/*
 * A statement that inserts into the collection is about to begin: it will route
 * by the list of partitions that this backend has then, and a lock that is held
 * already brings no news of it.  So it may fill what is ready now, whenever its
 * first row comes.
 */
static void
begin_target(Oid collection)
{
	Target *target = find_target(collection);

	if (target == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopTransactionContext);

		target = palloc0(sizeof(Target));
		target->collection = collection;
		targets = lappend(targets, target);
		MemoryContextSwitchTo(old);
	}
	/* The rows of an append function have their positions already. */
	target->end = es_segments_prepare(collection, nhanded == 0);
	/* The executor routes by the list of partitions that this may build anew. */
	AcceptInvalidationMessages();
	(void) es_collection_get(collection);
}

static void
allow_target(Oid collection)
{
	Target *target = find_target(collection);

	if (target != NULL)
		target->allowed = true;
}

/* For each collection that the statement is to insert into. */
static void
for_targets(PlannedStmt *stmt, void (*what)(Oid collection))
{
	ListCell *lc;

	foreach (lc, stmt->resultRelations)
	{
		RangeTblEntry *rte = rt_fetch(lfirst_int(lc), stmt->rtable);

		if (rte->relkind == RELKIND_PARTITIONED_TABLE && es_collection_exists(rte->relid))
			what(rte->relid);
	}
}

static void
note_insert_targets(QueryDesc *query, int eflags)
{
	PlannedStmt *stmt = query->plannedstmt;
	ListCell	*lc;
	bool		 inserts = stmt->resultRelations != NIL &&
				   (eflags & EXEC_FLAG_EXPLAIN_ONLY) == 0 &&
				   stmt->commandType != CMD_UPDATE && stmt->commandType != CMD_DELETE;

	if (inserts)
		for_targets(stmt, begin_target);
	if (previous_executor_start)
		previous_executor_start(query, eflags);
	else
		standard_ExecutorStart(query, eflags);
	if (!inserts)
		return;

	/* The executor has checked the rights by now. */
	for_targets(stmt, allow_target);
	refuse_on_conflict(stmt->planTree, stmt);
	foreach (lc, stmt->subplans)
		refuse_on_conflict((Plan *) lfirst(lc), stmt);
}

/* COPY checks the rights itself, and they are looked at again at the first row. */
static void
begin_copy(CopyStmt *stmt)
{
	Oid relid;

	if (!stmt->is_from || stmt->relation == NULL || RecoveryInProgress())
		return;
	relid = RangeVarGetRelid(stmt->relation, RowExclusiveLock, true);
	if (OidIsValid(relid) && es_collection_exists(relid))
		begin_target(relid);
}

static void
note_copy_target(ES_UTILITY_PARAMETERS)
{
	if (IsA(pstmt->utilityStmt, CopyStmt))
		begin_copy((CopyStmt *) pstmt->utilityStmt);
	es_next_utility(previous_process_utility, ES_UTILITY_ARGUMENTS);
}

void
es_append_install_hooks(void)
{
	previous_executor_start = ExecutorStart_hook;
	ExecutorStart_hook = note_insert_targets;
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = note_copy_target;
	RegisterXactCallback(clear_at_end, NULL);
	RegisterSubXactCallback(clear_at_subabort, NULL);
}

/* ---------------------------------------------------------------------------
 * The default of column position
 * ------------------------------------------------------------------------- */

static void
check_may_insert(const EsCollection *coll)
{
	const Target *target = find_target(coll->relid);

	if (pg_class_aclcheck(coll->relid, GetUserId(), ACL_INSERT) == ACLCHECK_OK ||
		pg_attribute_aclcheck_all(coll->relid, GetUserId(), ACL_INSERT, ACLMASK_ANY) ==
			ACLCHECK_OK ||
		(target != NULL && target->allowed))
		return;
	aclcheck_error(ACLCHECK_NO_PRIV, OBJECT_TABLE, get_rel_name(coll->relid));
}

static void
report_segments_full(const EsCollection *coll)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("the segments of collection \"%s\" that were ready are full",
					get_rel_name(coll->relid)),
			 errdetail(
				 "A statement can fill only the segments that were ready when it began."),
			 errhint("Use append_batch(), smaller statements, a greater segment_size, or "
					 "a greater eventstore.segments_ahead.")));
}

/*
 * The worker is to make the next segment when one begins to be filled and fewer
 * than segments_ahead lie beyond it.  Each position is handed out once, so that
 * of all who insert one wakes him.
 */
static void
wake_in_time(const EsCollection *coll, int64 left)
{
	if (left <= coll->segment_size * es_segments_ahead && left % coll->segment_size == 0)
		es_wake_maintenance();
}

/* What the default remembers between the rows of one statement. */
typedef struct StatementState
{
	Oid		   collection;
	EsPosition end; /* of the segments when the statement began */
} StatementState;

static EsCollection *
begin_statement(FunctionCallInfo fcinfo, Oid relid)
{
	StatementState *state;
	EsCollection   *coll;
	const Target   *target;
	EsIntent		nothing = {0};

	es_require_preloaded();
	PreventCommandIfReadOnly("append");
	PreventCommandIfParallelMode("append");
	coll = es_collection_open(relid, RowExclusiveLock);
	check_may_insert(coll);
	es_collection_refuse_changelog(coll);
	es_collection_load_head_for_append(coll);
	es_head_register(&coll->head, &nothing);

	state = MemoryContextAlloc(fcinfo->flinfo->fn_mcxt, sizeof(StatementState));
	state->collection = relid;
	state->end = es_head_ready_end(&coll->head);
	target = find_target(relid);
	if (target != NULL && target->end > 0)
		state->end = Min(state->end, target->end);
	fcinfo->flinfo->fn_extra = state;
	return coll;
}

Datum
es_next_position(PG_FUNCTION_ARGS)
{
	Oid				relid = PG_GETARG_OID(0);
	StatementState *state = fcinfo->flinfo->fn_extra;
	EsCollection   *coll;
	EsAllotment		allotment;

	if (state == NULL || state->collection != relid)
	{
		coll = begin_statement(fcinfo, relid);
		state = fcinfo->flinfo->fn_extra;
	}
	else
		coll = es_collection_get(relid);

	if (es_head_last_allotted(&coll->head) + 1 >= state->end ||
		!es_head_allot(&coll->head, 1, false, &allotment) ||
		allotment.first >= state->end)
		report_segments_full(coll);
	wake_in_time(coll, allotment.left);
	hand_out(relid, allotment.first, allotment.safe, NULL);
	PG_RETURN_INT64(allotment.first);
}

/* ---------------------------------------------------------------------------
 * The row trigger
 * ------------------------------------------------------------------------- */

/* A row on its way through the trigger. */
typedef struct InsertRow
{
	EsCollection *coll;
	HandedOut	  taken;
	TupleDesc	  desc;
	Datum		 *values;
	bool		 *nulls;
	EsEvent		  event; /* made of the values */
} InsertRow;

static void
check_trigger_call(FunctionCallInfo fcinfo)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_BEFORE(trigdata->tg_event) ||
		!TRIGGER_FIRED_FOR_ROW(trigdata->tg_event) ||
		!TRIGGER_FIRED_BY_INSERT(trigdata->tg_event))
		ereport(
			ERROR,
			(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
			 errmsg(
				 "function \"append_row\" must be called before insert for each row")));
}

static void
report_own_value(const EsCollection *coll, const char *column, int64 value)
{
	ereport(ERROR, (errcode(ERRCODE_ES_APPEND_ONLY),
					errmsg("cannot insert a %s into collection \"%s\"", column,
						   get_rel_name(coll->relid)),
					errdetail("The row has %s " INT64_FORMAT ".", column, value),
					errhint("Leave the column out: the collection gives it.")));
}

/* Only through the collection does a row get one. */
static void
report_no_position(const EsCollection *coll)
{
	ereport(ERROR, (errcode(ERRCODE_ES_APPEND_ONLY),
					errmsg("cannot insert into a segment of collection \"%s\"",
						   get_rel_name(coll->relid)),
					errdetail("The row has no position."),
					errhint("Insert into the collection: it gives the position.")));
}

static void *
varlena_field(const InsertRow *row, int att)
{
	if (row->nulls[att - 1])
		return NULL;
	return PG_DETOAST_DATUM(row->values[att - 1]);
}

static void
read_event(InsertRow *row)
{
	EsEvent *event = &row->event;

	memset(event, 0, sizeof(*event));
	event->expected_version = ES_NO_VERSION;
	event->position = row->taken.position;
	event->stream = varlena_field(row, ES_ATT_STREAM);
	event->type = varlena_field(row, ES_ATT_TYPE);
	event->tags = varlena_field(row, ES_ATT_TAGS);
	event->data = varlena_field(row, ES_ATT_DATA);
	event->body = varlena_field(row, ES_ATT_BODY);
	event->metadata = varlena_field(row, ES_ATT_METADATA);
	event->id_given = !row->nulls[ES_ATT_ID - 1];
	if (event->id_given)
		event->id = *DatumGetUUIDP(row->values[ES_ATT_ID - 1]);
	event->created_at_given = !row->nulls[ES_ATT_CREATED_AT - 1];
	if (event->created_at_given)
		event->created_at = DatumGetTimestampTz(row->values[ES_ATT_CREATED_AT - 1]);
	es_event_check(event);
}

static void
register_row(InsertRow *row)
{
	EsIntent intent = {0};
	EsLabel	 stream;
	EsLabel *labels =
		palloc(sizeof(EsLabel) * (1 + ArrayGetNItems(ARR_NDIM(row->event.tags),
													 ARR_DIMS(row->event.tags))));

	intent.labels = labels;
	intent.nlabels = es_event_labels(row->event.type, row->event.tags, labels);
	if (row->event.stream != NULL)
	{
		stream = es_label_of_stream(row->event.stream);
		intent.streams = &stream;
		intent.nstreams = 1;
	}
	es_head_register(&row->coll->head, &intent);
	pfree(labels);
}

/* Step 4: a new position in the same segment, where ours was overtaken. */
static void
renew_position(InsertRow *row, Oid segment_oid, EsPosition overtaken_by)
{
	EsAllotment		 allotment;
	const EsSegment *segment;

	if (overtaken_by <= row->event.position)
		return;
	segment = es_collection_segment(row->coll, row->event.position);
	if (segment == NULL || segment->relid != segment_oid ||
		!es_head_allot(&row->coll->head, 1, false, &allotment) ||
		allotment.first >= segment->end)
		ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
						errmsg("could not serialize an insert at the end of a segment of "
							   "collection \"%s\"",
							   get_rel_name(row->coll->relid)),
						errdetail("Position " INT64_FORMAT
								  " was overtaken by position " INT64_FORMAT ".",
								  row->event.position, overtaken_by),
						errhint("Try again, or use append_batch().")));
	wake_in_time(row->coll, allotment.left);
	row->event.position = allotment.first;
	row->taken.safe = allotment.safe;
}

static void
append_to_stream(InsertRow *row, Oid segment)
{
	EsHeads		*heads = NULL;
	EsStreamHead head = {row->event.stream};

	if (row->event.stream != NULL)
	{
		heads = es_heads_begin(row->coll);
		es_heads_lock(heads, &head);
		CommandCounterIncrement();
		row->event.version = head.version + 1;
	}
	renew_position(row, segment,
				   Max(head.last_position, es_head_last_conditional(&row->coll->head)));
	if (row->event.stream == NULL)
		return;

	if (head.version == 0)
	{
		head.first_position = row->event.position;
		head.first_at = row->event.created_at;
	}
	head.version = row->event.version;
	head.last_position = row->event.position;
	head.last_at = row->event.created_at;
	es_heads_save(heads, &head);
	es_heads_end(heads);
	CommandCounterIncrement();
}

/* A row of an append function, which has done everything; did it stay itself? */
static void
check_unchanged(InsertRow *row)
{
	const EsEvent *event = row->taken.event;
	text		  *stream = row->event.stream;
	bool		   same = (stream == NULL) == (event->stream == NULL);

	if (same && stream != NULL)
		same = es_text_equal(stream, event->stream);
	if (!same)
		ereport(ERROR,
				(errcode(ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION),
				 errmsg("a trigger of collection \"%s\" changed the stream of an event",
						get_rel_name(row->coll->relid))));
	row->event.version = event->version;
}

/* The row as stored: our columns from the event, the user's own as they are. */
static HeapTuple
complete_row(InsertRow *row)
{
	Datum *values = palloc(sizeof(Datum) * row->desc->natts);
	bool  *nulls = palloc(sizeof(bool) * row->desc->natts);

	es_event_values(&row->event, row->taken.safe, row->desc->natts, values, nulls);
	for (int i = ES_COLLECTION_NATTS; i < row->desc->natts; i++)
	{
		values[i] = row->values[i];
		nulls[i] = row->nulls[i];
	}
	return heap_form_tuple(row->desc, values, nulls);
}

static void
read_row(InsertRow *row, TriggerData *trigdata)
{
	Oid		   segment = RelationGetRelid(trigdata->tg_relation);
	Oid		   relid = es_collection_of_segment(segment);
	EsPosition position;

	if (!OidIsValid(relid))
		ereport(ERROR, (errcode(ERRCODE_ES_NOT_A_COLLECTION),
						errmsg("relation \"%s\" is not a segment of a collection",
							   RelationGetRelationName(trigdata->tg_relation))));
	row->coll = es_collection_open(relid, RowExclusiveLock);
	es_layout_check(trigdata->tg_relation);
	row->desc = RelationGetDescr(trigdata->tg_relation);
	row->values = palloc(sizeof(Datum) * row->desc->natts);
	row->nulls = palloc(sizeof(bool) * row->desc->natts);
	heap_deform_tuple(trigdata->tg_trigtuple, row->desc, row->values, row->nulls);

	position = row->nulls[0] ? 0 : DatumGetInt64(row->values[ES_ATT_POSITION - 1]);
	if (row->nulls[0])
		report_no_position(row->coll);
	if (!take_handed(relid, position, &row->taken))
		report_own_value(row->coll, "position", position);
	if (row->taken.event == NULL)
		es_collection_refuse_changelog(row->coll);
	if (row->taken.event == NULL && !row->nulls[ES_ATT_VERSION - 1])
		report_own_value(row->coll, "version",
						 DatumGetInt64(row->values[ES_ATT_VERSION - 1]));
	if (row->nulls[ES_ATT_TAGS - 1])
		ereport(ERROR, (errcode(ERRCODE_NOT_NULL_VIOLATION),
						errmsg("tags of an event must not be null")));
}

Datum
es_append_row(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	InsertRow	 row;

	check_trigger_call(fcinfo);
	read_row(&row, trigdata);
	read_event(&row);
	if (row.taken.event != NULL)
		check_unchanged(&row);
	else
	{
		register_row(&row);
		append_to_stream(&row, RelationGetRelid(trigdata->tg_relation));
		es_head_count(&row.coll->head, ES_STAT_APPENDS, 1);
		es_head_count(&row.coll->head, ES_STAT_EVENTS, 1);
	}
	PG_RETURN_POINTER(complete_row(&row));
}
