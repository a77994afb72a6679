/*
 * feed/announce.h
 *		What a notification says.
 */
#ifndef ES_ANNOUNCE_H
#define ES_ANNOUNCE_H

#include "postgres.h"

#include "collection/collection.h"
#include "feed/key_reads.h"

/* Option notify of a collection. */
typedef enum EsNotify
{
	ES_NOTIFY_NONE,
	ES_NOTIFY_HEAD,	  /* collection, head, count */
	ES_NOTIFY_EVENTS, /* ... and the events, where they fit */
	ES_NOTIFY_STREAMS /* ... and the last version of each stream, likewise */
} EsNotify;

extern EsNotify es_notify_from_text(const char *value);

/*
 * Sends, with the current transaction, what has become readable of a collection
 * since 'announced', which is moved on to what was sent.  Errors: as for a
 * reader, and where the queue of notifications is full.
 */
extern void es_announce(Oid collection, EsNotify notify, const char *channel,
						EsAnnounced *announced);

/*
 * Sends, likewise, how often keys of a store were read: those among 'reads' of
 * this changelog, in as many notifications as they need.
 */
extern void es_announce_reads(Oid changelog, const char *channel, const EsKeyReads *reads,
							  int nreads);

#endif /* ES_ANNOUNCE_H */
