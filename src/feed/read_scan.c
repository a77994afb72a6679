/*
 * feed/read_scan.c
 *		A scan node in the place of a call of read or read_stream in FROM.
 *
 * PostgreSQL puts the result of a function in FROM into a tuplestore before it
 * looks at the first row: "SELECT * FROM eventstore.read('c') LIMIT 1" would
 * read everything.  So a planner hook replaces such a call by a custom scan,
 * which hands out one event at a time and stops when it is not asked again.
 *
 *	1.	Planning: offer_read_scan recognises the call, replaces the paths of
 *		that relation by one of ours, and says in which order the events come,
 *		so that ORDER BY position needs no sort.  It steps back (the function
 *		scan stays) wherever a row might be asked for again by other means
 *		(row marks), where arguments come from other tables of the same FROM
 *		(LATERAL), and where the function was altered (SET, SECURITY DEFINER).
 *	2.	Start: EXECUTE on the function is checked, as a function scan does.
 *		Nothing is read, so EXPLAIN does nothing either.
 *	3.	First row: arguments are evaluated, then es_read_begin does what the
 *		function would do, rights and view included.
 *	4.	Rescan: the same view.  Arguments are evaluated again where a parameter
 *		changed.
 *	5.	End: es_read_end; after an error the resource owner.
 *
 * The node's tuples are the ten columns of an event and, where the query uses
 * the row as a whole, an eleventh with the composite.  Values are passed as
 * pointers into the reader's slot, which are good until the next call.  Where
 * the rows go on as they are they are not even taken apart before somebody
 * looks into them (event_slot.c); the node's own expressions, which were
 * compiled for a virtual slot, get the columns that the query uses.
 *
 * Memory lives in the executor's per-query context, the snapshot belongs to the
 * portal's resource owner: both last from one FETCH of a cursor to the next.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_language.h"
#include "catalog/pg_operator.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "commands/explain.h"
#include "compat.h"
#include "executor/executor.h"
#include "feed/event_slot.h"
#include "feed/read.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/extensible.h"
#include "nodes/makefuncs.h"
#include "nodes/nodeFuncs.h"
#include "optimizer/cost.h"
#include "optimizer/optimizer.h"
#include "optimizer/pathnode.h"
#include "optimizer/paths.h"
#include "optimizer/prep.h"
#include "optimizer/restrictinfo.h"
#include "spi.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/ruleutils.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

#define WHOLE_ROW (ES_EVENT_NATTS + 1) /* its place in the node's tuple */

/* Items of CustomScan.custom_private, a list of integers. */
#define PRIVATE_KIND	  0
#define PRIVATE_NEEDED	  1 /* columns that are used, from the first on */
#define PRIVATE_WHOLE_ROW 2 /* is the composite used? */

/* What reading one event costs beside cpu_tuple_cost. */
#define EVENT_COST(rows) (cpu_operator_cost * 2 * (rows))

typedef struct ReadScanState
{
	CustomScanState css;
	FuncExpr	   *call;
	EsReadKind		kind;
	int				needed;
	bool			whole_row;
	bool			lazy;		  /* the node's slot is an event slot */
	TupleDesc		event_desc;	  /* of the composite */
	List		   *arguments;	  /* of ExprState */
	MemoryContext	args_context; /* what the arguments were evaluated into */
	MemoryContext	read_context; /* the parent of the reader's */
	EsReadArgs		args;
	bool			evaluate; /* the arguments, before the next row */
	bool			restart;  /* the reader, before the next row */
	EsRead		   *read;	  /* NULL: not begun */
} ReadScanState;

static Node			  *create_state(CustomScan *scan);
static void			   begin_scan(CustomScanState *node, EState *estate, int eflags);
static TupleTableSlot *exec_scan(CustomScanState *node);
static void			   end_scan(CustomScanState *node);
static void			   rescan(CustomScanState *node);
static void	 explain_scan(CustomScanState *node, List *ancestors, ExplainState *es);
static Plan *plan_scan(PlannerInfo *root, RelOptInfo *rel, CustomPath *best_path,
					   List *tlist, List *clauses, List *custom_plans);

static const CustomPathMethods path_methods = {
	.CustomName = "Eventstore Read",
	.PlanCustomPath = plan_scan,
};

static const CustomScanMethods scan_methods = {
	.CustomName = "Eventstore Read",
	.CreateCustomScanState = create_state,
};

static const CustomExecMethods exec_methods = {
	.CustomName = "Eventstore Read",
	.BeginCustomScan = begin_scan,
	.ExecCustomScan = exec_scan,
	.EndCustomScan = end_scan,
	.ReScanCustomScan = rescan,
	.ExplainCustomScan = explain_scan,
};

static set_rel_pathlist_hook_type previous_hook = NULL;

/* ---------------------------------------------------------------------------
 * Planning
 * ------------------------------------------------------------------------- */

/* Is it eventstore.read or read_stream, as the extension made it? */
static bool
is_reading_function(Oid funcid, EsReadKind *kind)
{
	HeapTuple	 tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(funcid));
	Form_pg_proc form;
	bool		 is_ours = true;

	if (!HeapTupleIsValid(tuple))
		return false;
	form = (Form_pg_proc) GETSTRUCT(tuple);
	if (strcmp(NameStr(form->proname), "read") == 0)
		*kind = ES_READ_POSITIONS;
	else if (strcmp(NameStr(form->proname), "read_stream") == 0)
		*kind = ES_READ_STREAM;
	else
		is_ours = false;
	is_ours = is_ours && form->prolang == ClanguageId && !form->prosecdef &&
			  heap_attisnull(tuple, Anum_pg_proc_proconfig, NULL) &&
			  form->pronargs == ES_READ_NARGS(*kind) &&
			  form->pronamespace == es_extension_schema();
	ReleaseSysCache(tuple);
	return is_ours;
}

/* The call, where it is all there is in this item of FROM; else NULL. */
static FuncExpr *
find_call(PlannerInfo *root, RelOptInfo *rel, Index rti, RangeTblEntry *rte,
		  EsReadKind *kind)
{
	RangeTblFunction *function;
	FuncExpr		 *call;

	if (rte->rtekind != RTE_FUNCTION || rte->funcordinality ||
		list_length(rte->functions) != 1)
		return NULL;
	function = linitial_node(RangeTblFunction, rte->functions);
	call = (FuncExpr *) function->funcexpr;
	if (!IsA(call, FuncExpr) || function->funccolnames != NIL ||
		!is_reading_function(call->funcid, kind) ||
		list_length(call->args) != ES_READ_NARGS(*kind))
		return NULL;
	if (!bms_is_empty(rel->lateral_relids) || contain_var_clause((Node *) call))
		return NULL;

	/* Where a row may be rechecked it has to come out of a tuplestore. */
	if (get_plan_rowmark(root->rowMarks, rti) != NULL)
		return NULL;
	return call;
}

/* The constant that an argument is; NULL where it is none, or null. */
static Const *
constant_argument(const FuncExpr *call, int argument)
{
	Const *constant = list_nth(call->args, argument);

	return IsA(constant, Const) && !constant->constisnull ? constant : NULL;
}

/* Takes max_count for the number of rows, where the call names it. */
static void
adjust_estimate(PlannerInfo *root, RelOptInfo *rel, const FuncExpr *call, EsReadKind kind)
{
	Const *max_count = constant_argument(call, ES_READ_ARG_MAX_COUNT(kind));
	double rows;

	if (max_count == NULL)
		return;
	rows = clamp_row_est((double) DatumGetInt64(max_count->constvalue));
	rel->rows = clamp_row_est(rel->rows * rows / Max(rel->tuples, 1.0));
	rel->tuples = rows;
}

/* Sorted by position or version, where the direction is known and anybody asks. */
static List *
find_pathkeys(PlannerInfo *root, RelOptInfo *rel, Index rti, const FuncExpr *call,
			  EsReadKind kind, AttrNumber column)
{
	Node *direction = list_nth(call->args, ES_READ_ARG_DIRECTION(kind));
	Oid	  opno = Int8LessOperator;
	Var	 *var;

	if (!IsA(direction, Const))
		return NIL;
	if (!((Const *) direction)->constisnull)
	{
		char *name = TextDatumGetCString(((Const *) direction)->constvalue);

		if (strcmp(name, "backward") == 0)
			opno = get_commutator(Int8LessOperator);
	}
	var = makeVar(rti, column, INT8OID, -1, InvalidOid, 0);
	return es_expression_pathkey(root, (Expr *) var, opno, rel->relids);
}

static void
add_read_path(PlannerInfo *root, RelOptInfo *rel, FuncExpr *call, EsReadKind kind,
			  List *pathkeys)
{
	CustomPath *path = makeNode(CustomPath);
	QualCost	qual;

	cost_qual_eval(&qual, rel->baserestrictinfo, root);
	path->path.pathtype = T_CustomScan;
	path->path.parent = rel;
	path->path.pathtarget = rel->reltarget;
	path->path.rows = rel->rows;
	path->path.startup_cost =
		cpu_operator_cost * 100 + qual.startup + rel->reltarget->cost.startup;
	path->path.total_cost = path->path.startup_cost + EVENT_COST(rel->tuples) +
							(cpu_tuple_cost + qual.per_tuple) * rel->tuples +
							rel->reltarget->cost.per_tuple * rel->rows;
	path->path.pathkeys = pathkeys;
	path->flags = CUSTOMPATH_SUPPORT_PROJECTION;
	path->custom_private = list_make2(call, makeInteger(kind));
	path->methods = &path_methods;
	add_path(rel, &path->path);
}

static void
offer_read_scan(PlannerInfo *root, RelOptInfo *rel, Index rti, RangeTblEntry *rte)
{
	EsReadKind kind = ES_READ_POSITIONS;
	FuncExpr  *call;

	if (previous_hook != NULL)
		previous_hook(root, rel, rti, rte);
	if (IS_DUMMY_REL(rel))
		return;
	call = find_call(root, rel, rti, rte, &kind);
	if (call == NULL)
		return;

	adjust_estimate(root, rel, call, kind);
	rel->pathlist = NIL;
	add_read_path(root, rel, call, kind,
				  find_pathkeys(root, rel, rti, call, kind, ES_ATT_POSITION));

	/* Within a stream both orders are one. */
	if (kind == ES_READ_STREAM)
		add_read_path(root, rel, call, kind,
					  find_pathkeys(root, rel, rti, call, kind, ES_ATT_VERSION));
}

/*
 * Which columns does the query use?  The highest number; and the row as a
 * whole?  The target list alone does not tell: the planner leaves it out where it
 * means to put another one in its place.
 */
static int
find_needed(const RelOptInfo *rel, const Path *path, const List *tlist, const List *quals,
			bool *whole_row)
{
	Bitmapset *used = NULL;
	int		   needed = 0;
	int		   member = -1;

	pull_varattnos((Node *) rel->reltarget->exprs, rel->relid, &used);
	pull_varattnos((Node *) path->pathtarget->exprs, rel->relid, &used);
	pull_varattnos((Node *) tlist, rel->relid, &used);
	pull_varattnos((Node *) quals, rel->relid, &used);
	*whole_row = bms_is_member(0 - FirstLowInvalidHeapAttributeNumber, used);
	while ((member = bms_next_member(used, member)) >= 0)
		needed = Max(needed, member + FirstLowInvalidHeapAttributeNumber);
	return *whole_row ? ES_EVENT_NATTS : needed;
}

static TargetEntry *
make_column(RelOptInfo *rel, AttrNumber attno, AttrNumber place, TupleDesc desc)
{
	Form_pg_attribute att = TupleDescAttr(desc, attno - 1);

	return makeTargetEntry((Expr *) makeVar(rel->relid, attno, att->atttypid,
											att->atttypmod, att->attcollation, 0),
						   place, pstrdup(NameStr(att->attname)), false);
}

/* What the node's tuples are made of. */
static List *
make_scan_tlist(RelOptInfo *rel, const FuncExpr *call, bool whole_row)
{
	TupleDesc desc = lookup_rowtype_tupdesc(call->funcresulttype, -1);
	List	 *tlist = NIL;

	Assert(desc->natts == ES_EVENT_NATTS);
	for (AttrNumber attno = 1; attno <= ES_EVENT_NATTS; attno++)
		tlist = lappend(tlist, make_column(rel, attno, attno, desc));
	ReleaseTupleDesc(desc);
	if (whole_row)
		tlist =
			lappend(tlist, makeTargetEntry((Expr *) makeVar(rel->relid, InvalidAttrNumber,
															call->funcresulttype, -1,
															InvalidOid, 0),
										   WHOLE_ROW, pstrdup("event"), false));
	return tlist;
}

static Plan *
plan_scan(PlannerInfo *root, RelOptInfo *rel, CustomPath *best_path, List *tlist,
		  List *clauses, List *custom_plans)
{
	CustomScan *scan = makeNode(CustomScan);
	FuncExpr   *call = linitial_node(FuncExpr, best_path->custom_private);
	int			kind = intVal(lsecond(best_path->custom_private));
	bool		whole_row;
	List	   *quals = extract_actual_clauses(clauses, false);
	int			needed = find_needed(rel, &best_path->path, tlist, quals, &whole_row);

	scan->scan.plan.targetlist = tlist;
	scan->scan.plan.qual = quals;
	scan->scan.scanrelid = 0;
	scan->flags = best_path->flags;
	scan->custom_exprs = list_make1(call);
	scan->custom_private = list_make3_int(kind, needed, whole_row);
	scan->custom_scan_tlist = make_scan_tlist(rel, call, whole_row);
	scan->methods = &scan_methods;
	return &scan->scan.plan;
}

/* ---------------------------------------------------------------------------
 * Execution
 * ------------------------------------------------------------------------- */

static Node *
create_state(CustomScan *scan)
{
	ReadScanState *state =
		(ReadScanState *) newNode(sizeof(ReadScanState), T_CustomScanState);

	state->css.methods = &exec_methods;
	state->call = linitial_node(FuncExpr, scan->custom_exprs);
	state->kind = list_nth_int(scan->custom_private, PRIVATE_KIND);
	state->needed = list_nth_int(scan->custom_private, PRIVATE_NEEDED);
	state->whole_row = list_nth_int(scan->custom_private, PRIVATE_WHOLE_ROW);
	return (Node *) state;
}

static void
check_execute_right(Oid funcid)
{
	AclResult result = es_function_aclcheck(funcid, GetUserId(), ACL_EXECUTE);

	if (result != ACLCHECK_OK)
		aclcheck_error(result, OBJECT_FUNCTION, get_func_name(funcid));
	InvokeFunctionExecuteHook(funcid);
}

/*
 * Puts an event slot in the place of the node's, and lets those who read from
 * the node know before they compile what they read with.
 */
static void
become_lazy(ReadScanState *state, EState *estate)
{
	ScanState				*node = &state->css.ss;
	const TupleTableSlotOps *ops = es_event_slot_ops();

	node->ss_ScanTupleSlot =
		ExecInitExtraTupleSlot(estate, node->ss_ScanTupleSlot->tts_tupleDescriptor, ops);
	node->ps.scanops = ops;
	node->ps.resultops = ops;
	state->lazy = true;
}

static void
begin_scan(CustomScanState *node, EState *estate, int eflags)
{
	ReadScanState  *state = (ReadScanState *) node;
	TupleTableSlot *slot = node->ss.ss_ScanTupleSlot;

	check_execute_right(state->call->funcid);
	state->arguments = ExecInitExprList(state->call->args, &node->ss.ps);
	state->args_context = AllocSetContextCreate(
		estate->es_query_cxt, "eventstore read arguments", ALLOCSET_SMALL_SIZES);
	state->read_context = estate->es_query_cxt;
	state->evaluate = true;
	state->restart = true;
	if (state->whole_row)
		state->event_desc = lookup_rowtype_tupdesc_copy(state->call->funcresulttype, -1);

	if (!state->whole_row && node->ss.ps.ps_ProjInfo == NULL && node->ss.ps.qual == NULL)
	{
		become_lazy(state, estate);
		return;
	}
	/* What nobody uses stays null. */
	memset(slot->tts_isnull, true, slot->tts_tupleDescriptor->natts);
}

/* A value that comes from a parameter is another node's, for how long we cannot know. */
static Datum
keep_value(const ExprState *argument, Datum value)
{
	int16 length;
	bool  by_value;

	if (IsA(argument->expr, Const))
		return value;
	get_typlenbyval(exprType((Node *) argument->expr), &length, &by_value);
	return datumCopy(value, by_value, length);
}

/* The arguments go where they outlive the row that they are evaluated for. */
static void
evaluate_arguments(ReadScanState *state)
{
	ExprContext	 *econtext = state->css.ss.ps.ps_ExprContext;
	NullableDatum values[ES_READ_NARGS(ES_READ_POSITIONS)];
	MemoryContext caller;
	ListCell	 *cell;

	MemoryContextReset(state->args_context);
	caller = MemoryContextSwitchTo(state->args_context);
	foreach (cell, state->arguments)
	{
		NullableDatum *value = &values[foreach_current_index(cell)];

		value->value = ExecEvalExpr((ExprState *) lfirst(cell), econtext, &value->isnull);
		if (!value->isnull)
			value->value = keep_value(lfirst(cell), value->value);
	}
	es_read_make_args(state->kind, values, &state->args);
	MemoryContextSwitchTo(caller);
}

static void
begin_reading(ReadScanState *state)
{
	MemoryContext caller;

	if (state->evaluate)
		evaluate_arguments(state);
	state->evaluate = false;
	state->restart = false;
	caller = MemoryContextSwitchTo(state->read_context);
	if (state->read == NULL)
		state->read = es_read_begin(&state->args);
	else
		es_read_restart(state->read, &state->args);
	MemoryContextSwitchTo(caller);
}

static TupleTableSlot *
fetch_event(ScanState *node)
{
	ReadScanState  *state = (ReadScanState *) node;
	TupleTableSlot *slot = node->ss_ScanTupleSlot;
	TupleTableSlot *event;

	if (state->restart)
		begin_reading(state);
	event = es_read_next(state->read);
	ExecClearTuple(slot);
	if (event == NULL)
		return slot;
	if (state->lazy)
	{
		es_event_slot_show(slot, event);
		return slot;
	}
	slot_getsomeattrs(event, state->needed);
	memcpy(slot->tts_values, event->tts_values, sizeof(Datum) * state->needed);
	memcpy(slot->tts_isnull, event->tts_isnull, sizeof(bool) * state->needed);
	if (state->whole_row)
	{
		MemoryContext caller =
			MemoryContextSwitchTo(node->ps.ps_ExprContext->ecxt_per_tuple_memory);

		slot->tts_values[WHOLE_ROW - 1] = es_read_event_datum(event, state->event_desc);
		slot->tts_isnull[WHOLE_ROW - 1] = false;
		MemoryContextSwitchTo(caller);
	}
	return ExecStoreVirtualTuple(slot);
}

/*
 * Asked for while the executor rechecks a row of another table after a
 * concurrent update.  A row of ours that would itself be rechecked has a row
 * mark, and then there is no scan of ours; so this is a part of the query that
 * is to run as always.
 */
static bool
recheck_event(ScanState *node, TupleTableSlot *slot)
{
	return !TupIsNull(fetch_event(node));
}

static TupleTableSlot *
exec_scan(CustomScanState *node)
{
	return ExecScan(&node->ss, fetch_event, recheck_event);
}

static void
rescan(CustomScanState *node)
{
	ReadScanState *state = (ReadScanState *) node;

	ExecScanReScan(&node->ss);
	if (node->ss.ps.chgParam != NULL)
		state->evaluate = true;
	state->restart = true;
	if (state->read != NULL)
		es_read_stop(state->read);
}

static void
end_scan(CustomScanState *node)
{
	ReadScanState *state = (ReadScanState *) node;

	if (state->read != NULL)
		es_read_end(state->read);
	state->read = NULL;
}

/* ---------------------------------------------------------------------------
 * EXPLAIN
 * ------------------------------------------------------------------------- */

/* Null, or the default of the argument "direction". */
static bool
is_default(const Node *argument, bool is_direction)
{
	const Const *constant = (const Const *) argument;

	if (!IsA(argument, Const))
		return false;
	return constant->constisnull ||
		   (is_direction &&
			strcmp(TextDatumGetCString(constant->constvalue), "forward") == 0);
}

/* The arguments that say something, by name. */
static char *
deparse_call(const FuncExpr *call, EsReadKind kind, List *context)
{
	StringInfoData text;
	const char	  *separator = "";
	HeapTuple	   tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(call->funcid));
	Oid			  *types;
	char		 **names;
	char		  *modes;
	ListCell	  *cell;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for function %u", call->funcid);
	get_func_arg_info(tuple, &types, &names, &modes);
	initStringInfo(&text);
	appendStringInfo(&text, "eventstore.%s(", get_func_name(call->funcid));
	foreach (cell, call->args)
	{
		Node *argument = lfirst(cell);
		int	  number = foreach_current_index(cell);

		if (is_default(argument, number == ES_READ_ARG_DIRECTION(kind)))
			continue;
		appendStringInfo(&text, "%s%s => %s", separator, names[number],
						 deparse_expression(argument, context, false, false));
		separator = ", ";
	}
	appendStringInfoChar(&text, ')');
	ReleaseSysCache(tuple);
	return text.data;
}

static void
explain_scan(CustomScanState *node, List *ancestors, ExplainState *es)
{
	CustomScan *scan = (CustomScan *) node->ss.ps.plan;
	List	   *context =
		set_deparse_context_plan(es->deparse_cxt, &scan->scan.plan, ancestors);

	ExplainPropertyText("Function Call",
						deparse_call(linitial_node(FuncExpr, scan->custom_exprs),
									 ((ReadScanState *) node)->kind, context),
						es);
}

void
es_read_install(void)
{
	RegisterCustomScanMethods(&scan_methods);
	previous_hook = set_rel_pathlist_hook;
	set_rel_pathlist_hook = offer_read_scan;
}
