/*
 * feed/visible.c
 *		Reading through the planner and the executor.
 *
 * Policies of row-level security are expressions that the rewriter adds to a
 * query; only a query that went through it obeys them.  So where they apply
 * the readers run a SELECT of their own, as the invoking user and under their
 * own snapshot, and take its rows one by one.
 *
 * It is an executor of our own and neither SPI nor a portal.  A row is fetched
 * in the middle of somebody else's query (a custom scan, a cursor), where an
 * SPI connection may not stay open between two rows; and a portal of ours may
 * be dropped at commit before the user's WITH HOLD cursor that reads from it
 * has been stored.  The memory belongs to the caller's context and the
 * snapshot's registration to his resource owner, so an error needs no cleaning.
 */
#include "postgres.h"

#include "feed/visible.h"

#include "compat.h"
#include "executor/executor.h"
#include "nodes/params.h"
#include "nodes/parsenodes.h"
#include "tcop/dest.h"
#include "tcop/tcopprot.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

/* Takes the executor's row to where es_visible_next finds it. */
typedef struct RowReceiver
{
	DestReceiver	pub;
	TupleTableSlot *row; /* NULL: none came */
} RowReceiver;

struct EsVisible
{
	RowReceiver	  receiver;
	QueryDesc	 *desc;
	Snapshot	  snapshot;
	MemoryContext context;
};

static bool
receive_row(TupleTableSlot *slot, DestReceiver *self)
{
	((RowReceiver *) self)->row = slot;
	return true;
}

static void
start_receiving(DestReceiver *self, int operation, TupleDesc desc)
{
}

static void
stop_receiving(DestReceiver *self)
{
}

static ParamListInfo
make_params(const EsVisibleQuery *query)
{
	ParamListInfo params;

	if (query->nparams == 0)
		return NULL;
	params = makeParamList(query->nparams);
	for (int i = 0; i < query->nparams; i++)
	{
		params->params[i].value = query->values[i];
		params->params[i].isnull = false;
		params->params[i].pflags = PARAM_FLAG_CONST;
		params->params[i].ptype = query->types[i];
	}
	return params;
}

/* One plain SELECT: what comes back is one planned statement. */
static PlannedStmt *
plan_query(const EsVisibleQuery *query, ParamListInfo params)
{
	List *parsed = pg_parse_query(query->sql);
	List *rewritten;

	Assert(list_length(parsed) == 1);
	rewritten = pg_analyze_and_rewrite_fixedparams(
		linitial_node(RawStmt, parsed), query->sql, query->types, query->nparams, NULL);
	if (list_length(rewritten) != 1)
		elog(ERROR, "a reading query was rewritten into %d queries",
			 list_length(rewritten));

	/*
	 * Rows are asked for one at a time, maybe few of them: no parallel plan,
	 * and rather an index in the order wanted than a sort of everything.
	 */
	return pg_plan_query(linitial_node(Query, rewritten), query->sql,
						 CURSOR_OPT_FAST_PLAN, params);
}

EsVisible *
es_visible_begin(const EsVisibleQuery *query, Snapshot snapshot)
{
	EsVisible	 *visible = palloc0(sizeof(EsVisible));
	ParamListInfo params = make_params(query);

	Assert(query->nparams <= ES_VISIBLE_MAX_PARAMS);
	visible->context = CurrentMemoryContext;
	visible->snapshot = snapshot;
	visible->receiver.pub.receiveSlot = receive_row;
	visible->receiver.pub.rStartup = start_receiving;
	visible->receiver.pub.rShutdown = stop_receiving;
	visible->receiver.pub.rDestroy = stop_receiving;
	visible->receiver.pub.mydest = DestNone;

	PushActiveSnapshot(snapshot);
	visible->desc =
		CreateQueryDesc(plan_query(query, params), query->sql, GetActiveSnapshot(),
						InvalidSnapshot, &visible->receiver.pub, params, NULL, 0);
	ExecutorStart(visible->desc, 0);
	PopActiveSnapshot();
	return visible;
}

TupleTableSlot *
es_visible_next(EsVisible *visible)
{
	MemoryContext caller = MemoryContextSwitchTo(visible->context);

	visible->receiver.row = NULL;
	PushActiveSnapshot(visible->snapshot);
	es_executor_run(visible->desc, 1);
	PopActiveSnapshot();
	MemoryContextSwitchTo(caller);
	return visible->receiver.row;
}

void
es_visible_end(EsVisible *visible)
{
	ExecutorFinish(visible->desc);
	ExecutorEnd(visible->desc);
	FreeQueryDesc(visible->desc);
	pfree(visible);
}
