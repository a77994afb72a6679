/*
 * feed/stream_walk.h
 *		The events of one stream in the order of their versions.
 */
#ifndef ES_STREAM_WALK_H
#define ES_STREAM_WALK_H

#include "postgres.h"

#include "collection/collection.h"
#include "collection/heads.h"
#include "executor/tuptable.h"
#include "feed/read.h"

typedef struct EsStreamWalk EsStreamWalk;

/* LG005 for a stream, where 'from_version' lies before the first kept. */
extern void es_stream_check_kept(const EsCollection *coll, const EsReadArgs *args,
								 const EsStreamHead *head, Snapshot snapshot);

/*
 * Begins a walk in the direction of the arguments over what they select, but
 * for max_count.  'coll' is as es_read_snapshot left it.  Allocates in the
 * current memory context.  Errors: LG005.
 */
extern EsStreamWalk	  *es_stream_walk_begin(EsCollection *coll, const EsReadArgs *args,
											Snapshot snapshot);
extern TupleTableSlot *es_stream_walk_next(EsStreamWalk *walk);
extern void			   es_stream_walk_end(EsStreamWalk *walk);

#endif /* ES_STREAM_WALK_H */
