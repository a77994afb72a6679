/*
 * kafka/owner.h
 *		The roles that own sources and sinks.
 */
#ifndef ES_KAFKA_OWNER_H
#define ES_KAFKA_OWNER_H

#include "postgres.h"

/* Registers the hook on REASSIGN OWNED and DROP OWNED. */
extern void es_owner_install(void);

/*
 * Has PostgreSQL know which roles own some, once in a process: what is restored
 * past triggers, or comes by pg_upgrade, is not known to it.  Within a
 * transaction; where another one is at it, the next call does it.
 */
extern void es_owner_check(void);

#endif /* ES_KAFKA_OWNER_H */
