/*
 * shmem.h
 *		Reserving and laying out the extension's shared memory at server start.
 *
 * shmem.c is wiring: it calls each module's _shmem_size and _shmem_init.
 */
#ifndef ES_SHMEM_H
#define ES_SHMEM_H

#include "postgres.h"

/* Registers the hooks; only while shared_preload_libraries is processed. */
extern void es_shmem_install(void);

/* True when the library was preloaded, so that there is shared memory. */
extern bool es_preloaded(void);

/* LG006 with the line to add, unless preloaded. */
extern void es_require_preloaded(void);

#endif /* ES_SHMEM_H */
