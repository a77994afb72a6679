/*
 * store/change.h
 *		The triggers of a store, as far as the functions have to do with them.
 */
#ifndef ES_STORE_CHANGE_H
#define ES_STORE_CHANGE_H

#include "postgres.h"

/*
 * What the next statement of this function puts in place of: the trigger sees
 * the row that is replaced, locked, so that this is exact under concurrency.
 */
typedef struct EsReplaced
{
	Oid			store;
	Datum		key;
	int			depth;			/* of the statement's triggers */
	bool		found;
	Datum		value;			/* detoasted, in 'context' */
	MemoryContext context;
	struct EsReplaced *outer;	/* a trigger may call put */
} EsReplaced;

extern void es_store_watch_begin(EsReplaced *replaced, Oid store, Datum key);
extern void es_store_watch_end(EsReplaced *replaced);

/*
 * From here to the end of it the statements of this function (not those of
 * triggers that they fire) are written as they are and not recorded.
 */
extern void es_store_unrecorded_begin(Oid store);
extern void es_store_unrecorded_end(void);

#endif							/* ES_STORE_CHANGE_H */
