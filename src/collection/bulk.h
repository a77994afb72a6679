/*
 * collection/bulk.h
 *		Many new rows of a table that nobody else can be inserting.
 */
#ifndef ES_BULK_H
#define ES_BULK_H

#include "postgres.h"

#include "executor/tuptable.h"
#include "nodes/execnodes.h"
#include "storage/itemptr.h"

typedef struct EsBulk EsBulk;

/* Into a table whose indexes are open. */
extern EsBulk *es_bulk_begin(ResultRelInfo *rri, EState *estate);

/* An empty slot for a row, whose values must last until es_bulk_end. */
extern TupleTableSlot *es_bulk_slot(EsBulk *bulk);

/*
 * The slot is filled.  Its row is written by es_bulk_end at the latest; then it is
 * known where it is (place may be NULL).
 */
extern void es_bulk_add(EsBulk *bulk, ItemPointer place);

/* Writes what is left.  23505 where a key was there already. */
extern void es_bulk_end(EsBulk *bulk);

#endif /* ES_BULK_H */
