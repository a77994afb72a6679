/*
 * collection/tree_insert.h
 *		Tuples for a B-tree, many at a time.
 */
#ifndef ES_TREE_INSERT_H
#define ES_TREE_INSERT_H

#include "postgres.h"

#include "access/itup.h"
#include "utils/relcache.h"

/*
 * Inserts the tuples, made by index_form_tuple or laid out as it would, with
 * their rows' places.  Of any order, and fast in ascending order.  The index is
 * a btree or one of labels; 'unique' as its rows have to be: 23505.
 */
extern void es_tree_insert(Relation index, Relation heap, IndexTuple *tuples, int n,
						   bool unique);

/* One of them. */
extern void es_tree_insert_one(Relation index, Relation heap, IndexTuple tuple,
							   bool unique);

#endif /* ES_TREE_INSERT_H */
