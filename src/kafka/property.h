/*
 * kafka/property.h
 *		Which of librdkafka's properties may be set, where, and by whom.
 */
#ifndef ES_KAFKA_PROPERTY_H
#define ES_KAFKA_PROPERTY_H

#include "postgres.h"

#include "nodes/pg_list.h"
#include "utils/jsonb.h"

/*
 * In an error about options: the statement, or the function that it stands in,
 * may hold secrets.
 */
#define KEEP_OUT_OF_LOG errhidestmt(true), errhidecontext(true)

/* Both in the memory context of the list that they are in. */
typedef struct EsKafkaProperty
{
	char *name;
	char *value;
} EsKafkaProperty;

/* Where a property is set; a mask in the table of properties. */
typedef enum EsKafkaPropertyPlace
{
	ES_KAFKA_SERVER = 0x01,
	ES_KAFKA_MAPPING = 0x02,
	ES_KAFKA_CONSUMER = 0x04,
	ES_KAFKA_PRODUCER = 0x08
} EsKafkaPropertyPlace;

/*
 * Each of these properties, for the current user: 22023 with the reason, 42501
 * for one that needs more rights.  'argument' is what the message calls the
 * place.  No message holds the value of a secret.
 */
extern void es_kafka_check_list(List *properties, EsKafkaPropertyPlace place,
								const char *argument);

/* The same for an object of strings, numbers and booleans; NULL is fine. */
extern void es_kafka_check_properties(Jsonb *properties, EsKafkaPropertyPlace place,
									  const char *argument);

/* Such an object's properties, unchecked. */
extern List *es_kafka_list_properties(Jsonb *properties, const char *argument);

/* Sets one in the list, in place of an older value; an alias as what it stands for. */
extern List *es_kafka_set_property(List *properties, const char *name, const char *value);

/* The value in a list, by librdkafka's preferred name; NULL where there is none. */
extern const char *es_kafka_get_property(List *properties, const char *name);

/* Does it matter to such a client?  A server's options are for all kinds. */
extern bool es_kafka_is_for(const char *name, EsKafkaPropertyPlace client);

/* Is its value to be shown to nobody? */
extern bool es_kafka_is_secret(const char *name);

#endif /* ES_KAFKA_PROPERTY_H */
