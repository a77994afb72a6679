/*
 * collection/retention.h
 *		Letting go of old segments: the worker's part.
 */
#ifndef ES_RETENTION_H
#define ES_RETENTION_H

#include "postgres.h"

#include "collection/collection.h"

/* A segment that is on its way out, from eventstore.segment_disposal. */
typedef struct EsDisposal
{
	Oid segment;
	Oid collection;
} EsDisposal;

/* What retention goes by, from the catalog; 0 or NULL = no such limit. */
typedef struct EsRetention
{
	int64	  events;
	Interval *age;
	int64	  bytes;
} EsRetention;

/*
 * Moves the first kept position on as far as retention allows.  In a
 * transaction of its own, with a snapshot, outside of SPI.
 */
extern void es_retention_apply(Oid collection, const EsRetention *retention);

/*
 * Puts the segments wholly below the first kept position on the list of those
 * to be disposed of.  In a transaction, with a snapshot, outside of SPI.
 */
extern void es_retention_condemn(Oid collection);

/* The list; palloc'd.  In a transaction, with a snapshot, outside of SPI. */
extern int es_retention_list(EsDisposal **disposals);

/*
 * Detaches and drops one, or takes up where an earlier attempt has stopped.
 * Outside of any transaction: it uses several, and waits between them.  True
 * when it was dropped.  Errors: 55P03 (lock_timeout) where a transaction
 * is still using the collection; try again later.
 */
extern bool es_retention_dispose(const EsDisposal *disposal);

/*
 * The start of the oldest segment that is left when everything wholly below
 * 'before' goes; never beyond the segment that takes the next position.
 */
extern EsPosition es_retention_boundary(EsCollection *coll, EsPosition before);

/* Moves the first kept position; in SPI, as the extension's owner. */
extern void es_retention_set_first(Oid collection, EsPosition first);

#endif /* ES_RETENTION_H */
