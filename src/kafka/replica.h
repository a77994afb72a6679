/*
 * kafka/replica.h
 *		Whose a key is to change: stores that follow the changelog topic of another
 *		one, and stores that share a topic with others.
 */
#ifndef ES_KAFKA_REPLICA_H
#define ES_KAFKA_REPLICA_H

#include "postgres.h"

#include "store/store.h"

/*
 * The hook of store.h: 55000 for a key that is another server's to change, or
 * that cannot be told yet.
 */
extern void es_replica_check(const EsStore *store, Datum key);

#endif							/* ES_KAFKA_REPLICA_H */
