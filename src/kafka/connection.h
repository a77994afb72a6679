/*
 * kafka/connection.h
 *		What a server and a user mapping say about how to reach Kafka.
 */
#ifndef ES_KAFKA_CONNECTION_H
#define ES_KAFKA_CONNECTION_H

#include "kafka/property.h"

/* The OID of a server of ours: 42704 where there is none, 22023 for another wrapper's. */
extern Oid es_kafka_server(const char *name);

/*
 * The server's options, then those of the role's user mapping (or PUBLIC's),
 * then those given (may be NULL): later ones win.  42501 where the role has no
 * USAGE on the server; a role without a mapping is fine.  In a transaction; of
 * EsKafkaProperty, in the current memory context.
 */
extern List *es_kafka_properties(Oid server, Oid role, Jsonb *given);

#endif /* ES_KAFKA_CONNECTION_H */
