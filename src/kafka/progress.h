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
	const char *topic; /* the source's, or its changelog topic */
	int32		partition;
	int64		written; /* as it stands in the table */
	int64		next;	 /* as it is to stand there */
	int64		end;	 /* of the partition, as last heard of; -1: not known */
	int64		resume; /* of a changelog topic: where the source's own partition goes on;
								 * -1: no record has said so */
	bool		has_time;
	TimestampTz time; /* of the last record */
} EsProgress;

/* The partitions of that topic that have been begun; palloc'd. */
extern int es_progress_load(const EsSource *source, const char *topic,
							EsProgress **partitions);

/* A partition that was begun, and the id of the source that did. */
typedef struct EsBegun
{
	uint32	   source;
	EsProgress progress;
} EsBegun;

/* What other sources of the same target have begun, and read something of; palloc'd. */
extern int es_progress_load_others(const EsSource *source, EsBegun **others);

/* Begins with a partition; nothing where it has been begun. */
extern void es_progress_begin(const EsSource *source, const char *topic, int32 partition,
							  int64 next);

/*
 * From 'written' to 'next'; false where one does not stand where we left it:
 * another worker writes for this source.  The transaction is to be aborted then.
 */
extern bool es_progress_advance(const EsSource *source, const EsProgress *partitions,
								int n);

/* How many partitions the topic has: who changes the store by SQL goes by it. */
extern void es_progress_note_count(const EsSource *source, int count);

/* Which topic it is that is followed: another one of the same name has another id. */
extern void es_progress_note_topic(const EsSource *source, const char *id);

/* resync() was asked for, and is done. */
extern void es_progress_resynced(const EsSource *source);

/* The same, where the records between are gone, for that reason: a row of the view gaps. */
extern bool es_progress_jump(const EsSource *source, const EsProgress *from, int64 to,
							 const char *reason);

/* All partitions of the topic from offset 0 on, each a row of the view gaps: it is another one. */
extern void es_progress_restart(const EsSource *source, const char *topic,
								const char *reason);

extern void es_progress_park(const EsSource *source, const EsRecord *record,
							 const EsProblem *problem);

#endif /* ES_KAFKA_PROGRESS_H */
