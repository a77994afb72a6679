/*
 * kafka/log.h
 *		The last things that librdkafka said, in shared memory.
 */
#ifndef ES_KAFKA_LOG_H
#define ES_KAFKA_LOG_H

#include "postgres.h"

extern Size es_kafka_log_shmem_size(void);
extern void es_kafka_log_shmem_init(void);

/*
 * Adds a line of this database; 'level' is syslog's.  Texts that are too long
 * are cut, what cannot be shown is replaced.  The owner, if any, may see it.
 */
extern void es_kafka_log_add(Oid owner, const char *worker, int level,
							 const char *facility, const char *message);

/* Copies a foreign text so that it can be shown: one line of valid characters. */
extern void es_kafka_clean_text(char *to, Size size, const char *from);

#endif /* ES_KAFKA_LOG_H */
