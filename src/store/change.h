/*
 * store/change.h
 *		The triggers of a store, as far as the functions have to do with them.
 */
#ifndef ES_STORE_CHANGE_H
#define ES_STORE_CHANGE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "utils/jsonb.h"
#include "utils/relcache.h"

/*
 * What the next statement of this function puts in place of: the trigger sees
 * the row that is replaced, locked, so that this is exact under concurrency.
 * And what it brings that has no column; to be set after watch_begin.
 */
typedef struct EsReplaced
{
	Oid				   store;
	Datum			   key;
	int				   depth; /* of the statement's triggers */
	bool			   found;
	bool			   same;  /* it was replaced by itself */
	Datum			   value; /* detoasted, in 'context' */
	MemoryContext	   context;
	Jsonb			  *metadata;   /* of the event; NULL */
	bool			   time_given; /* else the clock */
	TimestampTz		   time;
	struct EsReplaced *outer; /* a trigger may call put */
} EsReplaced;

extern void es_store_watch_begin(EsReplaced *replaced, Oid store, Datum key);
extern void es_store_watch_end(EsReplaced *replaced);

/*
 * From here to the end of it the statements of this function (not those of
 * triggers that they fire) are written as they are and not recorded.
 */
extern void es_store_unrecorded_begin(Oid store);
extern void es_store_unrecorded_end(void);

/*
 * Are the store's triggers all there and at work?  'others' tells whether there
 * is any that a change of a row fires beside them.
 */
extern bool es_store_has_triggers(Relation rel, bool changelog, bool *others);

#endif /* ES_STORE_CHANGE_H */
