/*
 * collection/match.h
 *		The events of a collection that match a query, in position order.
 */
#ifndef ES_MATCH_H
#define ES_MATCH_H

#include "postgres.h"

#include "access/sdir.h"
#include "collection/collection.h"
#include "collection/query.h"
#include "executor/tuptable.h"

typedef struct EsMatch EsMatch;

/*
 * Begins a walk over positions in (after, before), oldest or newest first, as
 * 'snapshot' (registered or active for as long as the walk lasts) sees them.
 * 'query' NULL means every event.  The caller holds a lock on the collection;
 * segments are locked (AccessShare) as they are reached.  Allocates in the
 * current memory context, which must live as long as the walk.
 * Errors: 55000 where a segment in the range is missing.
 */
extern EsMatch *es_match_begin(EsCollection *coll, const EsQuery *query, EsPosition after,
							   EsPosition before, ScanDirection direction,
							   Snapshot snapshot);

/*
 * The next event, or NULL at the end.  The slot belongs to the walk and holds
 * the segment's row (attributes ES_ATT_*) until the next call.
 */
extern TupleTableSlot *es_match_next(EsMatch *match);

extern void es_match_end(EsMatch *match);

#endif /* ES_MATCH_H */
