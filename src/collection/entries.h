/*
 * collection/entries.h
 *		The entries of many rows in a table's indexes.
 */
#ifndef ES_ENTRIES_H
#define ES_ENTRIES_H

#include "postgres.h"

#include "collection/event.h"
#include "executor/tuptable.h"
#include "nodes/execnodes.h"

/* Of rows that are written: their slots have their places. */
extern void es_entries_insert(ResultRelInfo *rri, EState *estate, const EsEvent *events,
							  TupleTableSlot **slots, int n);

/* The same for rows that are no events; best in the order of the index's keys. */
extern void es_entries_insert_rows(ResultRelInfo *rri, EState *estate,
								   TupleTableSlot **slots, int n);

#endif /* ES_ENTRIES_H */
