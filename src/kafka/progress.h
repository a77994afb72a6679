/*
 * kafka/progress.h
 *		How far a source has come: offsets, gaps, dead letters.
 *
 * All as the extension's owner, in the caller's transaction with a snapshot.
 */
#ifndef ES_KAFKA_PROGRESS_H
#define ES_KAFKA_PROGRESS_H

#include "postgres.h"

#include "kafka/codec.h"
#include "kafka/source.h"

/* A partition's offsets: the next record to be read and written. */
typedef struct EsProgress
{
	int32		partition;
	int64		written;		/* as it stands in the table */
	int64		next;			/* as it is to stand there */
	int64		end;			/* of the partition, as last heard of; -1: not known */
	bool		has_time;
	TimestampTz time;			/* of the last record */
} EsProgress;

/*
 * Locks the source against pause() and drop_source() to the end of the
 * transaction; false where it is paused, failed, gone, or to run elsewhere.
 */
extern bool es_progress_hold(const EsSource *source);

/* The partitions that have been begun; palloc'd. */
extern int	es_progress_load(const EsSource *source, EsProgress **partitions);

/* Begins with a partition; nothing where it has been begun. */
extern void es_progress_begin(const EsSource *source, int32 partition, int64 next);

/*
 * From 'written' to 'next'; false where one does not stand where we left it:
 * another worker writes for this source.  The transaction is to be aborted then.
 */
extern bool es_progress_advance(const EsSource *source, const EsProgress *partitions, int n);

/* The same, where the records between are gone, for that reason: a row of the view gaps. */
extern bool es_progress_jump(const EsSource *source, const EsProgress *from, int64 to,
							 const char *reason);

/* All partitions from offset 0 on, each a row of the view gaps: the topic is another one. */
extern void es_progress_restart(const EsSource *source, const char *reason);

extern void es_progress_park(const EsSource *source, const EsRecord *record,
							 const EsProblem *problem);

/*
 * A start of the worker; false where there were too many without any progress:
 * the source has failed then, until resume().  es_progress_lives ends the count.
 */
extern bool es_progress_note_start(const EsSource *source);
extern void es_progress_lives(const EsSource *source);

#endif							/* ES_KAFKA_PROGRESS_H */
