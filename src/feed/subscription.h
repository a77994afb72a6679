/*
 * feed/subscription.h
 *		Subscriptions: what one is, and who may use it.
 *
 * subscription.c has the definition, lane.c the cursors, poll.c what is handed
 * out, settle.c what comes back.
 */
#ifndef ES_SUBSCRIPTION_H
#define ES_SUBSCRIPTION_H

#include "postgres.h"

#include "collection/collection.h"
#include "collection/query.h"
#include "feed/lane.h"
#include "fmgr.h"

/* Attribute numbers of eventstore.subscription (subscription.sql). */
#define ES_SUBSCRIPTION_NAME		 1 /* text, primary key */
#define ES_SUBSCRIPTION_COLLECTION	 2 /* regclass */
#define ES_SUBSCRIPTION_INCARNATION	 3 /* bigint, of the collection */
#define ES_SUBSCRIPTION_QUERY		 4 /* jsonb or null */
#define ES_SUBSCRIPTION_LANES		 5 /* integer */
#define ES_SUBSCRIPTION_MAX_ATTEMPTS 6 /* integer or null */
#define ES_SUBSCRIPTION_OWNER		 7 /* regrole */
#define ES_SUBSCRIPTION_CREATED_AT	 8 /* timestamptz */

/* Each lane is a row that a poll without leases locks for its transaction. */
#define ES_LANES_MAX 1024

/* So that every name fits into an index, and into a message. */
#define ES_NAME_MAX_BYTES 255

typedef struct EsSubscription
{
	text		 *name;
	EsCollection *coll;
	int64		  incarnation; /* of the collection that the cursors are from */
	EsQuery		 *query;	   /* NULL: every event */
	int			  lanes;
	int			  max_attempts; /* 0: an event is tried for ever */
	TimestampTz	  created_at;	/* another one of the same name has another time */
} EsSubscription;

/*
 * Finds a subscription and locks its collection (AccessShare, to the end of the
 * transaction).  In the current memory context.
 * Errors: LG007 there is none; 42501 the current user has no right to SELECT
 * from the collection, or has not the rights of the subscription's owner and
 * does not own the collection.
 */
extern EsSubscription *es_subscription_open(text *name);

/*
 * LG004 where the cursors are from what the collection was before, LG005 where
 * events after 'cursor' were dropped.  The collection has been refreshed.
 */
extern void es_subscription_check_cursor(const EsSubscription *sub, EsPosition cursor);

/*
 * Counts a failed delivery of the event at 'position', the first one after the
 * lane's cursor; after the last attempt that the subscription allows it goes
 * to the dead letters, the cursor passes it, and true is returned.  The lane
 * is locked; the caller saves it.
 */
extern bool es_subscription_count_attempt(const EsSubscription *sub, EsLane *lane,
										  EsPosition position, const char *reason);

/*
 * At the end of the transaction, however it ends, wakes who waits for a lane of
 * the subscription: called wherever one is locked.
 */
extern void	  es_subscription_touch(const text *name);
extern uint64 es_subscription_topic(const text *name); /* for EsWaitFor */

/* Arguments: 22004 for null; 22023 for a name that is empty or too long. */
extern text *es_name_arg(const NullableDatum *value, const char *name);

/* An interval that is not negative, and ('positive') not zero either: 22023. */
extern Interval *es_interval_arg(const NullableDatum *value, const char *name,
								 bool positive);

/* The clock's time (not the transaction's) and so much later. */
extern TimestampTz es_time_from_now(Interval *interval);

#endif /* ES_SUBSCRIPTION_H */
