/*
 * kafka/topic.h
 *		The topic of a source, its partitions, and what becomes of them.
 *
 * These ask Kafka, each for ES_RUN_CALL_MS at most, and never within a
 * transaction.
 */
#ifndef ES_KAFKA_TOPIC_H
#define ES_KAFKA_TOPIC_H

#include "postgres.h"

#include "kafka/run.h"

/*
 * So many times in a row, a second each, a topic that was missing, or is to be restored
 * from, may not tell its id: it is asked for it twice (topic_id.c).
 */
#define ES_TOPIC_ID_CHECKS 15

/*
 * How many partitions the topic has; 0 where that cannot be told, or there is
 * none: the state says why.
 */
extern int es_topic_count_partitions(EsSourceRun *run, const char *name);

/*
 * Those of 'count' partitions that are wanted, into run->partitions; begins with
 * those that are new.  False where that cannot be now.
 */
extern bool es_topic_load_partitions(EsSourceRun *run, int count);

/* The topic that the source reads: in mode replica its changelog topic. */
extern const char *es_topic_followed(const EsSource *source);

/* Where to begin with a partition of it that was not begun; false: not now. */
extern bool es_topic_find_start(EsSourceRun *run, int32 partition, int64 *offset);

/* Has the client read them, unless the topic seems to be another one. */
extern void es_topic_assign(EsSourceRun *run);

/* While the source runs: has the topic gone, come again, or grown?  True where it has not. */
extern bool es_topic_look(EsSourceRun *run);

/* Passes the offsets at the end of partitions that have no record. */
extern void es_topic_pass_holes(EsSourceRun *run);

/*
 * The ends of all partitions of the run, in their order, as of now; false where they
 * cannot be had now.
 */
extern bool es_topic_find_all_ends(EsSourceRun *run, int64 *ends);

/* The low and high end of a partition; false where they cannot be had now. */
extern bool es_topic_find_ends(EsSourceRun *run, const EsPartition *partition, int64 *low,
							   int64 *high);

/* The broker does not have the offset that this partition wants. */
extern void es_topic_out_of_range(EsSourceRun *run, EsPartition *partition);

/*
 * Is the record before the first one that is wanted the one that was read, by its
 * time?  If it is not, or is not there though the end is, the topic is another
 * one.  For each message, before it is taken.
 */
extern void es_topic_recognise(EsSourceRun *run, const rd_kafka_message_t *message);

/* resume() was called for a source that has halted. */
extern void es_topic_accept_halt(EsSourceRun *run);

#endif /* ES_KAFKA_TOPIC_H */
