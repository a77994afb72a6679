/*
 * kafka/relay.h
 *		Records of a source's topic to a changelog topic, and to no table.
 */
#ifndef ES_KAFKA_RELAY_H
#define ES_KAFKA_RELAY_H

#include "kafka/run.h"

/*
 * Publishes those of the batch's records from..to that have no problem, and
 * waits until they have arrived.  'known': the first one's problem, or NULL.
 * Where some of them were published before, but not noted in the database, *to
 * becomes the end of those, and nothing is done.
 * Outside of a transaction.  False where Kafka did not take them, with the
 * reason in *problem, or the worker was called away.  Errors: those of the
 * transform, the transaction is the caller's to abort.
 */
extern bool es_relay_publish(EsSourceRun *run, int from, int *to, const EsProblem *known,
							 EsProblem *problem);

/* Before the consumer is closed. */
extern void es_relay_close(void);

#endif /* ES_KAFKA_RELAY_H */
