/*
 * collection/speculative.c
 *		Inserting a row that somebody else may be inserting just now.
 *
 * As INSERT ... ON CONFLICT does it: the row is inserted under a token, which
 * whoever meets it waits for, and is taken back at once where the unique index
 * has another of its key.  So nobody gets a unique violation, and of two one
 * finds the other's row.  A crash in between leaves a row of a transaction that
 * did not commit.
 */
#include "postgres.h"

#include "collection/speculative.h"

#include "access/tableam.h"
#include "access/xact.h"
#include "compat.h"
#include "executor/executor.h"
#include "storage/lmgr.h"

bool
es_insert_speculatively(ResultRelInfo *rri, EState *estate, TupleTableSlot *slot,
						Oid arbiter)
{
	Relation rel = rri->ri_RelationDesc;
	List	*arbiters = list_make1_oid(arbiter);
	bool	 conflict = false;
	uint32	 token;

	token = SpeculativeInsertionLockAcquire(GetCurrentTransactionId());
	table_tuple_insert_speculative(rel, slot, GetCurrentCommandId(true), 0, NULL, token);
	list_free(es_insert_index_tuples(rri, slot, estate, &conflict, arbiters));
	table_tuple_complete_speculative(rel, slot, token, !conflict);
	SpeculativeInsertionLockRelease(GetCurrentTransactionId());
	list_free(arbiters);
	return !conflict;
}

void
es_await_dirty(const SnapshotData *dirty)
{
	TransactionId xid = TransactionIdIsValid(dirty->xmin) ? dirty->xmin : dirty->xmax;

	if (!TransactionIdIsValid(xid))
		return;
	if (dirty->speculativeToken != 0)
		SpeculativeInsertionWait(xid, dirty->speculativeToken);
	else
		XactLockTableWait(xid, NULL, NULL, XLTW_None);
}
