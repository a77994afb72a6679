/*
 * kafka/group.h
 *		A source as a member of a consumer group: which partitions are its own.
 *
 * All of it does nothing, or tells so, for a source without a group_id.
 */
#ifndef ES_KAFKA_GROUP_H
#define ES_KAFKA_GROUP_H

#include "postgres.h"

#include "kafka/run.h"

/* Becomes a member, where it is none yet. */
extern void es_group_join(EsSourceRun *run);

/* Gives all partitions back at once; nothing where it is no member. */
extern void es_group_leave(EsSourceRun *run);

/*
 * Serves the membership; to be called every ES_GROUP_SERVE_MS, more or less.  True
 * where partitions came or went: those that are ours now are to be loaded.  What
 * was read of those that went has been written.
 */
extern bool es_group_serve(EsSourceRun *run);

#define ES_GROUP_SERVE_MS 1000

/* Amid a batch, in no transaction: the group sees that we live, and is answered later. */
extern void es_group_attend(EsSourceRun *run);

/* Waits as es_kafka_wait, for the reader and for the group. */
extern void es_group_wait(EsSourceRun *run, long timeout_ms);

/* The group has not said which partitions are ours; the state shows it. */
extern bool es_group_awaits(EsSourceRun *run);

/* All that are ours are loaded: who publishes their changes may go on (share.c). */
extern void es_group_note_loaded(EsSourceRun *run);

/* Is this partition ours? */
extern bool es_group_has(const EsSourceRun *run, int32 partition);

/*
 * What came back may have been changed by others meanwhile: a partition is to be
 * restored from the changelog topic each time that it becomes ours.
 */
extern bool es_group_is_restored(const EsSourceRun *run, int32 partition);
extern void es_group_note_restored(EsSourceRun *run, int32 partition);

/*
 * The end of a partition of the changelog topic, behind all that who had it before
 * us may still commit (share.c); false: not known now.
 */
extern bool es_group_find_end(EsSourceRun *run, int32 partition, int64 *end);

/*
 * Of the generation that has been told to us last, for a transaction of a producer's;
 * to be destroyed.  NULL: we are in none.
 */
extern rd_kafka_consumer_group_metadata_t *es_group_membership(EsSourceRun *run);

/* How far the group has come with a partition, -1: it has not begun; false: not known now. */
extern bool es_group_find_committed(EsSourceRun *run, int32 partition, int64 *offset);

#endif /* ES_KAFKA_GROUP_H */
