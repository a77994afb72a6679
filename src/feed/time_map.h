/*
 * feed/time_map.h
 *		When the events of a collection were created, roughly.
 */
#ifndef ES_TIME_MAP_H
#define ES_TIME_MAP_H

#include "postgres.h"

#include "collection/collection.h"
#include "datatype/timestamp.h"

/* Consecutive positions, and the range of created_at of the events there. */
typedef struct EsTimeRun
{
	EsPosition	first;
	EsPosition	last;
	TimestampTz least;
	TimestampTz greatest;
} EsTimeRun;

/*
 * The runs that this backend knows of, ascending and without gaps; the array is
 * good until the next call of either function.  Returns how many there are.
 */
extern int es_time_map_runs(const EsCollection *coll, const EsTimeRun **runs);

/*
 * Learns the runs after that position (exclusive) as far as the view's head,
 * but for the last, which is not complete.  Reads what was not known yet.
 * Does nothing where what lies below the head may not be final.
 */
extern void es_time_map_extend(EsCollection *coll, EsPosition after, const EsView *view);

#endif /* ES_TIME_MAP_H */
