/*
 * store/statement.c
 *		Recording a statement's changes: gathered row by row, appended together.
 *
 * A row trigger learns of each change exactly and in order, whatever the shape
 * of the table, but an append for each would cost more than the statement.  So
 * the trigger hands its events to us and hooks around the executor (and around
 * COPY and TRUNCATE, which do without it) append them when the statement, with all its
 * triggers, has ended; those of a great one a chunk at a time.  An append that
 * fails fails the statement.
 *
 *	ExecutorRun		a statement that writes is put on the stack
 *	  (rows change; functions and BEFORE triggers may run other statements)
 *	ExecutorFinish	the AFTER triggers: the row trigger calls es_statement_add;
 *					triggers of the user's may run other statements
 *	  end			what was added is appended, and the statement leaves the stack
 *
 * The order is that in which rows changed.  An AFTER trigger runs when all rows
 * of its statement have changed, so that what it changes itself comes later,
 * though it is added earlier than the rows that are still queued: the events
 * of a statement that runs amid one that writes recorded tables wait behind
 * those of the outer one.  Hence no chunk of it is appended early.  (Rows that
 * a foreign key of the outer statement changes once more, after a trigger of
 * the user's has, still come first.)
 *
 * An error takes along what belongs to the (sub)transaction that it aborts.  A
 * statement still on the stack at commit would be changes without events: an
 * error, although nothing in PostgreSQL leaves one there.  Who writes rows past
 * the executor (logical replication, with triggers that are ENABLE ALWAYS) is
 * seen to at once, row by row.
 *
 * Events that wait are held in memory, like the queue of triggers that
 * PostgreSQL holds for every row; only a statement that runs amid another one
 * may have many of them.
 *
 * All memory is that of the (sub)transaction in which it was added, but for the
 * lists of those that wait; nothing is shared, and a crash finds nothing.
 */
#include "postgres.h"

#include "store/statement.h"

#include "access/xact.h"
#include "catalog/namespace.h"
#include "collection/append.h"
#include "commands/trigger.h"
#include "compat.h"
#include "executor/executor.h"
#include "nodes/parsenodes.h"
#include "parser/parsetree.h"
#include "store/capture.h"
#include "utility.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/relcache.h"

/* Appended together: what an append writes together, and not too much to hold. */
#define CHUNK_EVENTS 1000
#define CHUNK_BYTES	 (8 * 1024 * 1024)

/* Events in the order in which they are to be appended. */
typedef struct Batch
{
	MemoryContext	 context; /* of all of it */
	SubTransactionId subid;	  /* in which they were added */
	int				 nevents;
	int				 room;
	EsEvent			*events;
	Oid				*changelogs; /* of each */
} Batch;

typedef struct Statement
{
	struct Statement *outer;
	SubTransactionId  subid;
	QueryDesc		 *query;  /* NULL for COPY and TRUNCATE */
	Oid				  copied; /* the table that COPY fills; else InvalidOid */
	bool			  asked;  /* writes_recorded is known */
	bool			  writes_recorded;
	Batch			 *own;	 /* NULL until there are some */
	List			 *later; /* batches of those that ran amid it */
} Statement;

static Statement *innermost = NULL;
static Oid		  trigger_function = InvalidOid;

static ExecutorRun_hook_type	previous_run = NULL;
static ExecutorFinish_hook_type previous_finish = NULL;
static ProcessUtility_hook_type previous_utility = NULL;

void
es_statement_learn_trigger(Oid function)
{
	trigger_function = function;
}

/* ---------------------------------------------------------------------------
 * Batches
 * ------------------------------------------------------------------------- */

static Batch *
make_batch(void)
{
	MemoryContext context = AllocSetContextCreate(
		CurTransactionContext, "eventstore recorded changes", ALLOCSET_DEFAULT_SIZES);
	Batch *batch = MemoryContextAllocZero(context, sizeof(Batch));

	batch->context = context;
	batch->subid = GetCurrentSubTransactionId();
	return batch;
}

static void
make_room(Batch *batch)
{
	MemoryContext old = MemoryContextSwitchTo(batch->context);

	if (batch->room == 0)
	{
		batch->room = 8;
		batch->events = palloc(sizeof(EsEvent) * batch->room);
		batch->changelogs = palloc(sizeof(Oid) * batch->room);
	}
	else if (batch->nevents == batch->room)
	{
		batch->room *= 2;
		batch->events = repalloc_huge(batch->events, sizeof(EsEvent) * batch->room);
		batch->changelogs = repalloc_huge(batch->changelogs, sizeof(Oid) * batch->room);
	}
	MemoryContextSwitchTo(old);
}

static void
append_events(Oid changelog, EsEvent *events, int nevents)
{
	EsAppend append = {0};

	append.coll = es_collection_open(changelog, RowExclusiveLock);
	append.nevents = nevents;
	append.events = events;
	append.expected_version = ES_NO_VERSION;
	append.recording = true;
	es_append_run(&append);
}

/* Appends what the batch has, and frees it; what a chunk takes meanwhile, too. */
static void
append_batch(Batch *batch)
{
	MemoryContext chunk = AllocSetContextCreate(
		batch->context, "eventstore chunk of recorded changes", ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(chunk);
	int			  end;

	for (int start = 0; start < batch->nevents; start = end)
	{
		end = start + 1;
		while (end < batch->nevents && end - start < CHUNK_EVENTS &&
			   batch->changelogs[end] == batch->changelogs[start])
			end++;
		append_events(batch->changelogs[start], batch->events + start, end - start);
		MemoryContextReset(chunk);
	}
	MemoryContextSwitchTo(old);
	MemoryContextDelete(batch->context);
}

/* ---------------------------------------------------------------------------
 * The statements under way
 * ------------------------------------------------------------------------- */

static bool
is_recorded(Oid relid)
{
	Relation rel = OidIsValid(relid) ? RelationIdGetRelation(relid) : NULL;
	bool	 found = false;

	if (rel == NULL)
		return false;
	for (int i = 0; rel->trigdesc != NULL && i < rel->trigdesc->numtriggers && !found;
		 i++)
		found = rel->trigdesc->triggers[i].tgfoid == trigger_function;
	RelationClose(rel);
	return found;
}

static bool
has_recorded_target(const Statement *statement)
{
	PlannedStmt *plan;
	ListCell	*cell;

	if (statement->query == NULL)
		return is_recorded(statement->copied);
	plan = statement->query->plannedstmt;
	foreach (cell, plan->resultRelations)
		if (is_recorded(rt_fetch(lfirst_int(cell), plan->rtable)->relid))
			return true;
	return false;
}

/* The nearest statement behind whose events those of an inner one have to wait; NULL. */
static Statement *
find_awaited(Statement *statement)
{
	for (; statement != NULL; statement = statement->outer)
	{
		if (!statement->asked)
			statement->writes_recorded = has_recorded_target(statement);
		statement->asked = true;
		if (statement->writes_recorded || statement->own != NULL)
			return statement;
	}
	return NULL;
}

static void
begin_statement(QueryDesc *query, Oid copied)
{
	Statement *statement =
		MemoryContextAllocZero(CurTransactionContext, sizeof(Statement));

	statement->outer = innermost;
	statement->subid = GetCurrentSubTransactionId();
	statement->query = query;
	statement->copied = copied;
	innermost = statement;
}

static void
append_or_wait(List *batches)
{
	Statement *awaited = batches == NIL ? NULL : find_awaited(innermost);
	ListCell  *cell;

	if (awaited != NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopTransactionContext);

		awaited->later = list_concat(awaited->later, batches);
		MemoryContextSwitchTo(old);
		return;
	}
	foreach (cell, batches)
		append_batch(lfirst(cell));
}

/* It has left the stack before anything is appended, which may run statements too. */
static void
end_statement(void)
{
	Statement *statement = innermost;
	List	  *batches = statement->later;

	innermost = statement->outer;
	if (statement->own != NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopTransactionContext);

		batches = lcons(statement->own, batches);
		MemoryContextSwitchTo(old);
	}
	pfree(statement);
	append_or_wait(batches);
	list_free(batches);
}

/* ---------------------------------------------------------------------------
 * Adding
 * ------------------------------------------------------------------------- */

static void *
copy_value(MemoryContext context, const void *value)
{
	void *copy;

	if (value == NULL)
		return NULL;
	copy = MemoryContextAlloc(context, VARSIZE(value));
	memcpy(copy, value, VARSIZE(value));
	return copy;
}

static void
take_event(Batch *batch, Oid changelog, const EsEvent *event)
{
	EsEvent *taken;

	make_room(batch);
	batch->changelogs[batch->nevents] = changelog;
	taken = &batch->events[batch->nevents++];
	*taken = *event;
	taken->type = copy_value(batch->context, event->type);
	taken->stream = copy_value(batch->context, event->stream);
	taken->tags = copy_value(batch->context, event->tags);
	taken->data = copy_value(batch->context, event->data);
}

/* Is the statement's batch to wait for its end, or to be appended at once? */
static bool
may_grow(const Batch *batch)
{
	return (batch->nevents < CHUNK_EVENTS &&
			MemoryContextMemAllocated(batch->context, false) < CHUNK_BYTES) ||
		   find_awaited(innermost->outer) != NULL;
}

void
es_statement_add(Oid changelog, const EsEvent *event)
{
	Batch *batch = innermost != NULL ? innermost->own : NULL;

	if (batch == NULL)
		batch = make_batch();
	if (innermost != NULL)
		innermost->own = batch;
	take_event(batch, changelog, event);
	if (innermost != NULL)
	{
		if (may_grow(batch))
			return;
		innermost->own = NULL;
		innermost->asked = innermost->writes_recorded = true;
	}
	append_batch(batch);
}

/* ---------------------------------------------------------------------------
 * Hooks
 * ------------------------------------------------------------------------- */

static bool
writes(const QueryDesc *query)
{
	return query->plannedstmt->resultRelations != NIL;
}

static void
run_statement(ES_EXECUTOR_RUN_PARAMETERS)
{
	if (writes(query) && (innermost == NULL || innermost->query != query))
		begin_statement(query, InvalidOid);
	if (previous_run != NULL)
		previous_run(ES_EXECUTOR_RUN_ARGUMENTS);
	else
		standard_ExecutorRun(ES_EXECUTOR_RUN_ARGUMENTS);
}

static void
finish_statement(QueryDesc *query)
{
	bool known = writes(query) && innermost != NULL && innermost->query == query;

	if (previous_finish != NULL)
		previous_finish(query);
	else
		standard_ExecutorFinish(query);
	if (known)
		end_statement();
}

/*
 * What a name means is asked before the statement runs: its triggers, and what
 * it calls, may have another search_path.
 */
static List *
find_relations(List *names)
{
	List	 *relids = NIL;
	ListCell *cell;

	foreach (cell, names)
		relids = lappend_oid(relids, RangeVarGetRelid(lfirst(cell), NoLock, true));
	return relids;
}

static void
copy_statement(ES_UTILITY_PARAMETERS)
{
	CopyStmt *copy = (CopyStmt *) pstmt->utilityStmt;

	begin_statement(NULL, RangeVarGetRelid(copy->relation, NoLock, true));
	es_next_utility(previous_utility, ES_UTILITY_ARGUMENTS);
	end_statement();
}

static void
truncate_statement(ES_UTILITY_PARAMETERS)
{
	List *relids = find_relations(((TruncateStmt *) pstmt->utilityStmt)->relations);

	begin_statement(NULL, InvalidOid);
	es_next_utility(previous_utility, ES_UTILITY_ARGUMENTS);
	es_capture_truncated(relids);
	end_statement();
	list_free(relids);
}

static void
utility_statement(ES_UTILITY_PARAMETERS)
{
	Node *statement = pstmt->utilityStmt;

	if (IsA(statement, CopyStmt) && ((CopyStmt *) statement)->is_from &&
		((CopyStmt *) statement)->relation != NULL)
		copy_statement(ES_UTILITY_ARGUMENTS);
	else if (IsA(statement, TruncateStmt))
		truncate_statement(ES_UTILITY_ARGUMENTS);
	else
		es_next_utility(previous_utility, ES_UTILITY_ARGUMENTS);
}

/* ---------------------------------------------------------------------------
 * Errors and ends
 * ------------------------------------------------------------------------- */

static void
forget_at_end(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			if (innermost != NULL)
				elog(ERROR, "changes of a captured table were not recorded");
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PREPARE:
		case XACT_EVENT_ABORT:
			innermost = NULL;
			break;
		default:
			break;
	}
}

static void
forget_batches(Statement *statement, SubTransactionId aborted)
{
	ListCell *cell;

	foreach (cell, statement->later)
	{
		Batch *batch = lfirst(cell);

		if (batch->subid < aborted)
			continue;
		statement->later = foreach_delete_current(statement->later, cell);
	}
}

/*
 * Subtransactions that began later have greater numbers, and belong to this one.
 * The memory goes with it.
 */
static void
forget_at_subabort(SubXactEvent event, SubTransactionId aborted, SubTransactionId parent,
				   void *arg)
{
	if (event != SUBXACT_EVENT_ABORT_SUB)
		return;
	while (innermost != NULL && innermost->subid >= aborted)
		innermost = innermost->outer;
	for (Statement *statement = innermost; statement != NULL;
		 statement = statement->outer)
		forget_batches(statement, aborted);
}

void
es_statement_install(void)
{
	previous_run = ExecutorRun_hook;
	ExecutorRun_hook = run_statement;
	previous_finish = ExecutorFinish_hook;
	ExecutorFinish_hook = finish_statement;
	previous_utility = ProcessUtility_hook;
	ProcessUtility_hook = utility_statement;
	RegisterXactCallback(forget_at_end, NULL);
	RegisterSubXactCallback(forget_at_subabort, NULL);
}
