/*
 * worker/process.h
 *		How each of a database's workers begins.
 */
#ifndef ES_PROCESS_H
#define ES_PROCESS_H

#include "postgres.h"

#include "worker/launcher.h"

/* How long a worker's statement waits for a lock. */
#define ES_WORKER_LOCK_TIMEOUT "500ms"

/* The key of this process, from its main function's argument. */
extern EsWorkerKey es_process_key(EsWorkerKind kind, Datum arg);

/*
 * Signals, slot, connection, settings.  Does not return where another process
 * has the slot or the database is held.  The role is the bootstrap superuser.
 */
extern void es_process_begin(EsWorkerKey key);

/* Is the extension there?  In a transaction of its own. */
extern bool es_process_has_extension(void);

/* What every round of a worker's loop begins with; true where it is to end. */
extern bool es_process_interrupts(void);

#endif /* ES_PROCESS_H */
