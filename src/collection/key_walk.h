/*
 * collection/key_walk.h
 *		Looking up many keys of one index, in ascending order.
 */
#ifndef ES_KEY_WALK_H
#define ES_KEY_WALK_H

#include "postgres.h"

#include "executor/tuptable.h"
#include "utils/relcache.h"
#include "utils/snapshot.h"

typedef struct EsKeyWalk EsKeyWalk;

/*
 * The index is a B-tree whose first column is text COLLATE "C" or bytea, and
 * unique among the rows that a snapshot sees.  'nkeys' is how many are coming.
 * The snapshot must outlive the walk.
 */
extern EsKeyWalk *es_key_walk_begin(Relation rel, Relation index, Snapshot snapshot,
									int nkeys);

/* The row of the key, in the slot; false where there is none.  Keys must ascend. */
extern bool es_key_walk_find(EsKeyWalk *walk, struct varlena *key, TupleTableSlot *slot);

extern void es_key_walk_end(EsKeyWalk *walk);

#endif /* ES_KEY_WALK_H */
