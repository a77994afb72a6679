/*
 * kafka/replica.h
 *		Stores that follow the changelog topic of another one.
 */
#ifndef ES_KAFKA_REPLICA_H
#define ES_KAFKA_REPLICA_H

#include "postgres.h"

#include "store/store.h"

/* The store follows by that source.  55000 where it follows by another one. */
extern void es_replica_set(Oid store, uint32 source);

/* What follows by that source follows no more. */
extern void es_replica_unset(uint32 source);

/*
 * The hook of store.h: 55000 for a key that is another server's to change, or
 * that cannot be told yet.
 */
extern void es_replica_check(const EsStore *store, Datum key);

#endif							/* ES_KAFKA_REPLICA_H */
