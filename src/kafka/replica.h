/*
 * kafka/replica.h
 *		Stores that follow the changelog topic of another one.
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
