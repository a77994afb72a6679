/*
 * collection/speculative.h
 *		Inserting a row that somebody else may be inserting just now.
 */
#ifndef ES_SPECULATIVE_H
#define ES_SPECULATIVE_H

#include "postgres.h"

#include "nodes/execnodes.h"
#include "utils/snapshot.h"

/*
 * Inserts the row unless the unique index 'arbiter' has its key: then false, and
 * nothing is left of it.  The indexes of 'rri' were opened for this.
 */
extern bool es_insert_speculatively(ResultRelInfo *rri, EState *estate,
									TupleTableSlot *slot, Oid arbiter);

/*
 * Waits for whoever a look with this dirty snapshot has found inserting or
 * deleting the row; not at all where it was nobody.
 */
extern void es_await_dirty(const SnapshotData *dirty);

#endif /* ES_SPECULATIVE_H */
