/*
 * feed/wait.h
 *		Sleeping until there may be something to read.
 *
 * Whoever waits goes through the same steps; wait_for in wait.c is the model:
 *
 *		look; return if there is something
 *		es_wait_begin
 *		loop
 *			look again; leave the loop if there is something
 *			give back snapshot, row locks and the lock on the collection
 *			if es_wait_sleep says false: the time is over, leave the loop
 *		es_wait_end
 */
#ifndef ES_WAIT_H
#define ES_WAIT_H

#include "postgres.h"

#include "collection/collection.h"
#include "collection/query.h"
#include "datatype/timestamp.h"
#include "fmgr.h"

#define ES_WAIT_FOR_EVER DT_NOEND

typedef struct EsWaitFor
{
	EsPosition	   looked; /* events up to here are of no interest */
	const EsQuery *query;  /* NULL: any event */
	const text
		  *stream; /* not NULL: an event of this stream, without regard to the head */
	uint64 topic;  /* not 0: also what es_watch_touch is called with */
} EsWaitFor;

/*
 * An argument that says how long to wait, as the time when that is over, counted
 * from now; null is for ever, and no time at all is 0.  Negative: 22023.
 */
extern TimestampTz es_wait_deadline(const NullableDatum *value, const char *name);

/*
 * The argument "wait" of a function that reads: the same, where null means not to
 * wait (0).  Where there is to be a wait, checks that it is allowed.
 */
extern TimestampTz es_wait_arg(const NullableDatum *value);

/*
 * 25001 where this transaction must not wait: its snapshot does not move, or it
 * has open positions itself, for which what it waits for may be waiting.
 */
extern void es_wait_check_allowed(void);

/* Enters the wait, so that nothing that comes from now on is missed. */
extern void es_wait_begin(EsCollection *coll, const EsWaitFor *what);

/*
 * Sleeps until it is worth while to look again; false when 'until' has come
 * first.  'looked' is the head up to which the caller has looked in vain.  The
 * caller holds no snapshot of its own and no lock on the collection, so that
 * VACUUM and DROP do not wait for it.  Errors: cancel, terminate.
 */
extern bool es_wait_sleep(EsCollection *coll, EsPosition looked, TimestampTz until);

/*
 * Opens the collection for the next look, as es_read_open_collection does.
 * 42P01 where it was dropped meanwhile.
 */
extern EsCollection *es_wait_reopen(Oid collection);

/* Ends it; 'found' is for the statistics.  An error ends it by itself. */
extern void es_wait_end(bool found);

/*
 * For a worker that waits beside its other work: one wait, over many
 * transactions, in which it sleeps as it likes (its latch is set).  In each
 * transaction it opens the collection, es_wait_keep, looks, and, where it has
 * looked up to the head in vain, es_wait_keep_looked, which says true where it
 * should look again at once.  Before it sleeps it asks es_wait_keep_due, and
 * sleeps no longer than es_wait_keep_ms before it looks all the same.
 */
extern void es_wait_keep(EsCollection *coll, EsPosition looked, const EsQuery *query);
extern bool es_wait_keep_looked(EsPosition looked);
extern bool es_wait_keep_due(void);
extern long es_wait_keep_ms(void);

/* The lock that es_collection_open took, given back for the time of the sleep. */
extern void es_wait_unlock(const EsCollection *coll);

#endif /* ES_WAIT_H */
