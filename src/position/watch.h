/*
 * position/watch.h
 *		Sessions that wait for a head to move, or for an event of a kind.
 *
 * The design is at the top of watch.c.
 */
#ifndef ES_WATCH_H
#define ES_WATCH_H

#include "postgres.h"

#include "position/head.h"

/* A set of labels, with false positives. */
typedef struct EsBloom
{
	uint64 words[4];
} EsBloom;

/* What a transaction that committed has added to a collection. */
typedef struct EsReleased
{
	EsPosition first; /* its positions lie between these two */
	EsPosition last;
	EsBloom	   labels; /* of types, tags and streams */
} EsReleased;

#define ES_RELEASES_KEPT 64

/*
 * The latest releases of a collection, kept while somebody watches it; in
 * shared memory under the EsHead's lock, or a copy.
 */
typedef struct EsReleases
{
	uint64	   next;	  /* number of the next one */
	uint64	   oldest;	  /* number of the oldest one that is known */
	EsPosition lost_last; /* those before it lie at or below this */
	EsReleased kept[ES_RELEASES_KEPT];
} EsReleases;

/* What a session waits for. */
typedef struct EsWatch
{
	EsHeadRef		   head;   /* head NULL, or gone: nobody will wake it but by topic */
	EsPosition		   looked; /* events up to here are of no interest */
	const EsCondition *condition; /* NULL: every event */
	EsLabel			   stream;	  /* not 0: an event of this stream, whatever the head */
	uint64			   topic;	  /* not 0: also woken by es_watch_touch */
	bool kept; /* a worker's: ends with the process, not with the transaction */
} EsWatch;

extern Size es_watch_shmem_size(void);
extern void es_watch_shmem_init(void);

extern void es_bloom_add(EsBloom *bloom, EsLabel label);

/* With the head's lock: nothing released up to 'upto' is known any more. */
extern void es_releases_init(EsReleases *releases, EsPosition upto);
extern void es_releases_put(EsReleases *releases, const EsReleased *released);

/* --- for who waits; one wait per process at a time --- */

/*
 * From now on this process is woken (its latch is set).  Whatever was there
 * before is for the caller to look at, after this call.  Ends by itself with
 * the transaction.
 */
extern void es_watch_begin(const EsWatch *watch);

/*
 * Does this session wait already?  No: a wait that an error has ended, even if
 * the error was caught and the transaction goes on.
 */
extern bool es_watch_underway(void);

/* Was it woken since it looked? */
extern bool es_watch_woken(void);

/* To be called before it looks again. */
extern void es_watch_looking(void);

/*
 * It has looked up to this head, in vain.  True where something has come since
 * that it should look at again before it sleeps.
 */
extern bool es_watch_looked(EsPosition head);

extern void es_watch_end(void);

/* --- for who wakes; none of these raises an error --- */

/* Wakes those whose wait may be over; returns how many.  The notifier's. */
extern int es_watch_pass(void);

/*
 * The same for a collection whose head is not in shared memory (on a standby):
 * those who wait for something above what they have looked at, up to this head.
 */
extern int es_watch_pass_over(Oid relid, EsPosition head);

/* The collections of such waiters, each once; palloc'd. */
extern int es_watch_list_unshared(Oid **relids);

/* Everybody in this database: the notifier goes. */
extern void es_watch_wake_all(void);

/* Those who wait for this collection, which is gone or has another entry. */
extern void es_watch_wake_collection(Oid relid);

/*
 * At the end of this transaction, commit or not, wakes those who wait for the
 * topic.  This one may raise an error (out of memory).
 */
extern void es_watch_touch(uint64 topic);

/* How many sessions wait, in this database. */
extern int es_watch_count(void);

#endif /* ES_WATCH_H */
