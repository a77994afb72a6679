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

/* Is this partition of the source's topic ours? */
extern bool es_share_has(const EsShare *share, int32 partition);

/* The partition that a key belongs to, by Kafka's own partitioner; -1: not known. */
extern int32 es_share_partition_of(const EsShare *share, const char *key, size_t length);

/* What may become of a change of a key. */
typedef enum EsShareVerdict
{
	ES_SHARE_OURS,	/* it is to be published */
	ES_SHARE_KNOWN, /* the topic has it, or the next owner puts it there */
	ES_SHARE_LOST	/* nobody else knows of it, and it is not ours to publish */
} EsShareVerdict;

/*
 * Of the change at that position: of a key of that stream and partition, made by
 * a record of that topic (NULL: by SQL).
 */
extern EsShareVerdict es_share_judge(const EsShare *share, EsPosition position,
									 const char *topic, int32 partition, Datum stream);

/*
 * Has the key of that stream a later change than the one at that position, made by
 * a record of that topic, where one is named?
 */
extern bool es_share_is_overtaken(Oid changelog, EsPosition position, Datum stream,
								  const char *topic);

/* The membership by which they are ours, in librdkafka's words; NULL: not settled. */
extern const bytea *es_share_membership(const EsShare *share);
extern bool			es_share_is_by(const EsShare *share, const bytea *membership);

/* Ours, and how far the source has come with each; how many. */
extern int es_share_partitions(const EsShare *share, const char **topic,
							   const int32 **partitions, const int64 **offsets);

/*
 * For the source's worker, in a transaction of its own: these partitions are ours,
 * restored, by this membership; NULL: nobody knows for now.
 */
extern void es_share_note(uint32 source, const int32 *partitions, int n,
						  bytea *membership);

/* The sink that publishes the source's changes, 0: none; in a transaction. */
extern uint32 es_share_find_sink(uint32 source);

/* Waits until it has published all that there is, or time is over; in no transaction. */
extern void es_share_drain(uint32 sink, long timeout_ms);

#endif /* ES_KAFKA_SHARE_H */
