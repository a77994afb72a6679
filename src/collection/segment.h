/*
 * collection/segment.h
 *		Making segments, by the worker and by whoever creates a collection.
 */
#ifndef ES_SEGMENT_H
#define ES_SEGMENT_H

#include "postgres.h"

#include "collection/collection.h"

/*
 * Makes segments, each of the collection's segment size, until the end of the
 * last is at least 'wanted_end' (exclusive).  Runs as the collection's owner,
 * in the current transaction, which must append nothing (design 5.2); the
 * caller publishes the end by es_head_set_ready_end after its commit.  Holds
 * ShareUpdateExclusiveLock on the collection and the lock of es_segments_lock
 * exclusively to the end of the transaction.  The collection must not be open.
 * Returns the new end.
 */
extern EsPosition es_segments_make(Oid collection, EsPosition wanted_end);

/*
 * The same until eventstore.segments_ahead empty ones lie beyond the next
 * position and appenders that wait have what they want.  Leaves alone what is
 * no collection or not a whole one (a restore in progress); returns 0 then.
 */
extern EsPosition es_segments_keep_ahead(Oid collection);

/* The next position to be handed out, as far as it can be told now. */
extern EsPosition es_segments_next_position(EsCollection *coll);

/*
 * The collection's segments, ascending, from the catalogs; palloc'd.  Those
 * that are being detached are left out.
 */
extern int es_segments_list(Oid collection, EsSegment **segments);

/*
 * The end (exclusive) of the last one in the cache that this transaction did
 * not attach itself; 1 for none.
 */
extern EsPosition es_segments_committed_end(const EsCollection *coll);

/* The bounds of a segment; false where the relation is not one. */
extern bool es_segment_bounds(Oid segment, EsPosition *first, EsPosition *end);

/*
 * The triggers of a collection.  The first is on each segment too, by
 * es_segment_guard (between SPI_connect and SPI_finish), since PostgreSQL does
 * not clone statement triggers; the second is cloned.  Its name sorts last.
 */
#define ES_GUARD_TRIGGER  "eventstore_append_only"
#define ES_APPEND_TRIGGER "~eventstore_append"
extern void es_segment_guard(Oid relid);

/*
 * The heavyweight lock between those who make or attach segments (ExclusiveLock,
 * to the end of the transaction, which is after its invalidations are sent) and
 * those who read the list to load a head (ShareLock, released at once).
 */
extern void es_segments_lock(Oid collection, LOCKMODE mode);
extern void es_segments_unlock(Oid collection, LOCKMODE mode);

/*
 * An append that does not fit: makes the segments itself where the collection
 * was created by this transaction, else asks the worker and waits, at most
 * eventstore.segment_timeout (55000 then).  The collection is refreshed.
 */
extern void es_segments_await(EsCollection *coll, EsPosition wanted_end);

/*
 * An INSERT or COPY is about to begin: where it would find little room it may
 * wait for the worker as above, but goes on with what there is when the time is
 * over.  Returns the end of what is ready, to be read before the list of
 * partitions; 0 = unknown yet.
 */
extern EsPosition es_segments_prepare(Oid collection, bool wait);

#endif /* ES_SEGMENT_H */
