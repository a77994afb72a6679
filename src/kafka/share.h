/*
 * kafka/share.h
 *		Which changes of a store the server may publish whose source shares its
 *		topic with others, as a consumer group.
 */
#ifndef ES_KAFKA_SHARE_H
#define ES_KAFKA_SHARE_H

#include "postgres.h"

#include "position/position.h"

typedef struct EsShare EsShare;

/*
 * Of that source, as of now; NULL: it is in no group, all may be published.  As the
 * extension's owner, in the caller's transaction with a snapshot; palloc'd.
 */
extern EsShare *es_share_load(uint32 source);

/* Is it known which partitions are ours?  Else nothing is to be published now. */
extern bool es_share_is_settled(const EsShare *share);

/* May this change of a key be published, which a record of that topic has made? */
extern bool es_share_has(const EsShare *share, EsPosition position, const char *topic,
						 int32 partition, Datum stream);

/*
 * For the source's worker, in a transaction of its own: these partitions are ours,
 * restored; NULL: nobody knows for now.
 */
extern void es_share_note(uint32 source, const int32 *partitions, int n);

/* The sink that publishes the source's changes, 0: none; in a transaction. */
extern uint32 es_share_find_sink(uint32 source);

/* Waits until it has published all that there is, or time is over; in no transaction. */
extern void es_share_drain(uint32 sink, long timeout_ms);

#endif /* ES_KAFKA_SHARE_H */
