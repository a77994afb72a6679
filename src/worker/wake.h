/*
 * worker/wake.h
 *		Telling this database's workers that there is something to do.
 *
 * One shared slot per database and kind of worker holds its latch and flags.
 * All calls are cheap, raise no error, and are legal in commit callbacks.
 */
#ifndef ES_WAKE_H
#define ES_WAKE_H

#include "postgres.h"

extern Size es_wake_shmem_size(void);
extern void es_wake_shmem_init(void);

/*
 * Asks for a look at segments and retention now.  Where this database has no
 * worker the launcher is asked to start one.
 */
extern void es_wake_maintenance(void);

/*
 * The same, once this transaction has committed (what it did can be seen then).
 * The notifier, too, looks again at what is to be announced.
 */
extern void es_wake_maintenance_at_commit(void);

/* Notes that something was appended: the worker ticks once it gets quiet. */
extern void es_wake_activity(void);

/*
 * Tells the notifier that a head moved for which somebody waits or listens, or
 * that somebody came to do so.  Where there is none the launcher starts one.
 */
extern void es_wake_notifier(void);

/* True where the notifier runs: whoever waits may rely on being woken. */
extern bool es_wake_notifier_runs(void);

/* True while somebody has called the notifier, and it has not begun to look. */
extern bool es_wake_notifier_called(void);

/* The pid of this database's worker; 0 where none runs. */
extern int es_wake_worker_pid(void);

/* The launcher's pid; 0 where it does not run. */
extern int es_wake_launcher_pid(void);

/* True where the last attempt to start this database's worker found no free slot. */
extern bool es_wake_slots_exhausted(void);

#endif /* ES_WAKE_H */
