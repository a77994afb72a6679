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
 * Would a change of this table, past the executor, miss no trigger but ours?
 * False also where ours are not all there and at work.
 */
extern bool es_store_has_our_triggers_only(Relation rel, bool changelog);

#endif /* ES_STORE_CHANGE_H */
