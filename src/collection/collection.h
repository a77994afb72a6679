/*
 * collection/collection.h
 *		What a backend knows of a collection: identity, options, segments, head.
 *
 * A collection is a partitioned table that the user owns.  Its options, the
 * first kept position and the names of its two companions (the heads table,
 * the counter sequence) are a row of eventstore.collection_catalog; its
 * segments are its partitions.  A backend keeps all this in a cache that
 * relcache invalidations empty: whoever changes the row must send one
 * (CacheInvalidateRelcacheByRelid).
 */
#ifndef ES_COLLECTION_H
#define ES_COLLECTION_H

#include "postgres.h"

#include "nodes/parsenodes.h"
#include "position/head.h"
#include "storage/lock.h"
#include "utils/relcache.h"
#include "utils/snapshot.h"

/* Attribute numbers of a collection and of each of its segments. */
#define ES_ATT_POSITION		1
#define ES_ATT_STREAM		2
#define ES_ATT_VERSION		3
#define ES_ATT_ID			4
#define ES_ATT_TYPE			5
#define ES_ATT_TAGS			6
#define ES_ATT_DATA			7
#define ES_ATT_BODY			8
#define ES_ATT_METADATA		9
#define ES_ATT_CREATED_AT	10
#define ES_EVENT_NATTS		10 /* the composite eventstore.event ends here */
#define ES_ATT_CHECKSUM		11 /* integer, CRC-32C: event.c */
#define ES_ATT_SAFE_HEAD	12 /* bigint, the head at the event's allotment */
#define ES_COLLECTION_NATTS 12

/* Attribute numbers of a heads table, one row per stream. */
#define ES_HEADS_STREAM			1 /* text COLLATE "C", primary key */
#define ES_HEADS_VERSION		2
#define ES_HEADS_FIRST_POSITION 3
#define ES_HEADS_LAST_POSITION	4
#define ES_HEADS_FIRST_AT		5
#define ES_HEADS_LAST_AT		6
#define ES_HEADS_NATTS			6

/* Attribute numbers of eventstore.collection_catalog (schema.sql). */
#define ES_CATALOG_COLLECTION	  1	 /* regclass, primary key */
#define ES_CATALOG_HEADS		  2	 /* regclass */
#define ES_CATALOG_COUNTER		  3	 /* regclass */
#define ES_CATALOG_INCARNATION	  4	 /* bigint */
#define ES_CATALOG_FIRST_POSITION 5	 /* bigint, the first kept */
#define ES_CATALOG_SEGMENT_SIZE	  6	 /* bigint, positions */
#define ES_CATALOG_RETAIN_EVENTS  7	 /* bigint or null */
#define ES_CATALOG_RETAIN_FOR	  8	 /* interval or null */
#define ES_CATALOG_RETAIN_BYTES	  9	 /* bigint or null */
#define ES_CATALOG_NOTIFY		  10 /* text: head, events, streams, none */
#define ES_CATALOG_CHANNEL		  11 /* text */
#define ES_CATALOG_HEARTBEAT	  12 /* interval or null */
#define ES_CATALOG_FEED_READS	  13 /* bool or null, of a store's changelog */
#define ES_CATALOG_NATTS		  13

/* Attribute numbers of eventstore.store_catalog (store.sql). */
#define ES_STORE_CATALOG_STORE		1 /* regclass, primary key */
#define ES_STORE_CATALOG_CHANGELOG	2 /* regclass or null, unique */
#define ES_STORE_CATALOG_FORMAT		3 /* text: json, text, bytes */
#define ES_STORE_CATALOG_KEY_FORMAT 4 /* text: text, bytes */
#define ES_STORE_CATALOG_FOLLOWER	5 /* integer or null: the source that it follows */
#define ES_STORE_CATALOG_PUBLISHER                                                       \
	6 /* integer or null: the source with its changelog topic */
#define ES_STORE_CATALOG_BACKLOG	 7 /* text or null: a topic (store/backlog.h) */
#define ES_STORE_CATALOG_BACKLOG_DUE 8 /* boolean */
#define ES_STORE_CATALOG_NATTS		 8

/* Attribute numbers of eventstore.capture_catalog (capture.sql). */
#define ES_CAPTURE_CATALOG_SOURCE	 1 /* regclass, primary key */
#define ES_CAPTURE_CATALOG_CHANGELOG 2 /* regclass */
#define ES_CAPTURE_CATALOG_SHARED	 3 /* boolean: it was given */
#define ES_CAPTURE_CATALOG_NATTS	 3

typedef struct EsSegment
{
	EsPosition first;
	EsPosition end; /* exclusive */
	Oid		   relid;
	int8	   plain; /* as EsCollection.plain; -1 = not looked at yet */
} EsSegment;

/*
 * The address of an EsCollection is good for the backend's life; its contents
 * are as of the last es_collection_get or es_view_open, and may be rebuilt in
 * any later call that accepts invalidations (opening or locking a relation
 * does).  Copy the segments to walk over them.
 */
typedef struct EsCollection
{
	Oid		   relid; /* hash key */
	bool	   valid; /* cleared by invalidation */
	Oid		   heads;
	Oid		   counter;
	int64	   segment_size;
	EsPosition first_position; /* the first kept; earlier ones are LG005 */
	Oid		   store;		   /* the store whose changes it records; InvalidOid */
	Oid		   captured;	   /* a table whose changes it records; InvalidOid */
	bool	   plain; /* nothing of the user's stands against the fast append path */
	int		   nsegments;
	EsSegment *segments; /* ascending, in the cache's memory */
	EsHeadRef  head;	 /* the shared entry, where it has been looked up */
	bool	   behind;	 /* has events above what its counter reserved */
} EsCollection;

/* A consistent view to read from: head first, then snapshot (design, section 5). */
typedef struct EsView
{
	EsPosition head;	 /* nothing at or below it will still appear */
	Snapshot   snapshot; /* registered; sees everything up to head */
} EsView;

/*
 * Locks the relation and returns its cached description.  Errors: LG007 (not a
 * collection), 55000 (one that lost its catalog row or is behind its events;
 * HINT repair_collection).  The lock is kept to the end of the transaction.
 */
extern EsCollection *es_collection_open(Oid relid, LOCKMODE mode);

/* The same with the lock already held; also refreshes a known one. */
extern EsCollection *es_collection_get(Oid relid);

/* Is it a collection (not: a segment)?  No lock, no error. */
extern bool es_collection_exists(Oid relid);

/*
 * Of a store its changelog (55000 where it has none), of anything else itself:
 * who listens to a store listens to its changelog.
 */
extern Oid es_collection_or_changelog(Oid relid);

/* The store that has the collection as its changelog; InvalidOid.  No lock, no error. */
extern Oid es_collection_find_store(Oid changelog);

/* 55000, about a store without a changelog. */
extern void es_collection_report_no_changelog(Oid store);

/* The collection that a segment belongs to; InvalidOid. */
extern Oid es_collection_of_segment(Oid segment);

/* Raises 42501 unless the current user has one of 'mode' on the collection. */
extern void es_collection_check_acl(const EsCollection *coll, AclMode mode);

/* Raises 42501 (must be owner of ...) unless the current user owns it. */
extern void es_collection_check_owner(Oid relid);

/* LG003 where the collection is a changelog: nobody writes those by hand. */
extern void es_collection_refuse_changelog(const EsCollection *coll);

/* True where row-level security applies to the current user (may raise, as SELECT would). */
extern bool es_collection_row_security(const EsCollection *coll);

/* The segment that holds a position, or NULL.  55000 where it is missing but should exist. */
extern const EsSegment *es_collection_segment(const EsCollection *coll,
											  EsPosition		  position);

/*
 * Looks up or makes the shared entry of the head; coll->head.head stays NULL in
 * recovery and where the collection is 'behind' (a logical copy, a partial
 * restore), whose readers use the head that travels with the data.
 */
extern void es_collection_load_head(EsCollection *coll);

/*
 * The same for appenders: 25006 in recovery, 55000 (HINT repair_collection)
 * where the counter is behind the events.
 */
extern void es_collection_load_head_for_append(EsCollection *coll);

/* The highest position in the segments, whoever can see its row; 0. */
extern EsPosition es_collection_highest_present(const EsCollection *coll);

/*
 * The last position handed out (after a restart, and on a standby: reserved).
 */
extern EsPosition es_collection_last_allotted(EsCollection *coll);

/*
 * The same at the price of a look into shared memory, where that is enough to
 * tell: no event that a snapshot taken before sees lies beyond.  False where it
 * is not: not preloaded, in recovery, or unused since the start, when events
 * may have come by replication.
 */
extern bool es_collection_last_known(EsCollection *coll, EsPosition *last);

/* LG004, LG005 for an explicit cursor. */
extern void es_collection_check_cursor(EsCollection *coll, EsPosition after);

/*
 * Takes the head that fits how this transaction reads, accepts invalidations,
 * then takes and registers the snapshot.  The collection is refreshed.
 * The caller holds a lock on it.
 */
extern void es_view_open(EsCollection *coll, EsView *view);
extern void es_view_close(EsView *view);

/* The head alone, of such a view. */
extern EsPosition es_view_head(EsCollection *coll);

/* The head that travels with the data, for a given snapshot (design 5.3). */
extern EsPosition es_collection_head_in(EsCollection *coll, Snapshot snapshot);

/* The tick that the snapshot sees; 0 without one. */
extern EsPosition es_collection_tick(Oid collection, Snapshot snapshot);

extern const char *es_collection_name(const EsCollection *coll);

/* True where the user's triggers, rules or columns need the executor's full insert. */
extern bool es_collection_segment_plain(EsCollection *coll, Relation segment);

#endif /* ES_COLLECTION_H */
