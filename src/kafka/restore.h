/*
 * kafka/restore.h
 *		What a source takes from its changelog topic.
 */
#ifndef ES_KAFKA_RESTORE_H
#define ES_KAFKA_RESTORE_H

#include "postgres.h"

#include "kafka/run.h"

/*
 * Are there partitions (wanted: for each of 'count', whether it is) that the
 * source has not begun, and which its changelog topic may restore?  Then
 * run->partitions become those.  False: there are none.  *ready is false where
 * Kafka does not tell what is needed now; the state says so.
 */
extern bool es_restore_begin(EsSourceRun *run, const bool *wanted, int count,
							 bool *ready);

/*
 * Why the changelog topic is not the one that it was, in the words that tell it from
 * the source's own.  A source with that message waits for resume(), and for its sink to
 * accept the topic: is that what it reports?
 */
extern char *es_restore_doubt(const EsSourceRun *run, const char *doubt);
extern bool	 es_restore_awaits_topic(const EsWorkerReport *report);

/* Has all that is to be restored been taken? */
extern bool es_restore_is_taken(const EsSourceRun *run);

/* Has all been restored?  Then the source's own partitions are begun, and the loop is left. */
extern void es_restore_look(EsSourceRun *run);

/* Adds the partitions of the changelog topic that are followed; false: not now. */
extern bool es_restore_follow(EsSourceRun *run);

/*
 * A crash empties an unlogged store and leaves our offsets: fills it again, from
 * its changelog or, where it has none, from the first records of the partitions
 * that were begun ('begun', n of them) and are among 'count'; those of the store's
 * other sources are begun anew as well.  Once in a process, before anything is
 * restored or read.  False: not now.
 */
extern bool es_restore_refill(EsSourceRun *run, const EsProgress *begun, int n,
							  int count);

/* Where the source's own partition goes on after this record of the changelog topic; -1. */
extern int64 es_restore_resume_offset(const EsSource *source, const EsRecord *record);

/*
 * Marks those records of the changelog topic as out of date (ES_PROBLEM_OUT_OF_DATE)
 * for whose keys the store has something newer.  In a transaction.
 */
extern void es_restore_guard(const EsSourceRun *run, const EsRecord *records, int n,
							 EsProblem *problems);

/*
 * While something is restored: keeps others from changing the store to the end of
 * the transaction, and sets run->guarded where they have changed it.  Before
 * anything of it is looked at; es_restore_note_written after it was written.
 * 'n' records are to be written.
 */
extern void es_restore_hold(EsSourceRun *run, int n);
extern void es_restore_note_written(EsSourceRun *run);

#endif /* ES_KAFKA_RESTORE_H */
