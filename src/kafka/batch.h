/*
 * kafka/batch.h
 *		The records that a source's worker has taken and not yet written.
 */
#ifndef ES_KAFKA_BATCH_H
#define ES_KAFKA_BATCH_H

#include "postgres.h"

#include "kafka/run.h"

/* Room for an empty batch, in run->life; of a restore, for a larger one. */
extern void es_batch_begin(EsSourceRun *run);
extern void es_batch_begin_restore(EsSourceRun *run);

/* Takes the message; false where it was taken before, or is of a partition that is not ours. */
extern bool es_batch_add(EsSourceRun *run, rd_kafka_message_t *message);

/* Is it one that must not be passed over, where it has a problem? */
extern bool es_batch_stops_at(EsSourceRun *run, const EsRecord *record);

/* May it grow?  Is it to be written now? */
extern bool es_batch_has_room(EsSourceRun *run);
extern bool es_batch_is_due(EsSourceRun *run, TimestampTz now);

/*
 * Writes as much of it as it can, and drops it when it is written.  No errors:
 * what goes wrong is in run->halt, run->retry_at, run->leave.
 */
extern void es_batch_write(EsSourceRun *run);

/* Gives the messages back. */
extern void es_batch_drop(EsSourceRun *run);

/* May a record be to blame for an error of that SQLSTATE? */
extern bool es_batch_is_records_fault(int sqlstate);

#endif /* ES_KAFKA_BATCH_H */
