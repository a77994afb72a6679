/*
 * stats/work.h
 *		Long work under way, and how far it is: the view progress.
 */
#ifndef ES_STATS_WORK_H
#define ES_STATS_WORK_H

#include "postgres.h"

extern Size es_work_shmem_size(void);
extern void es_work_shmem_init(void);

/* In _PG_init, in a server that has the shared memory. */
extern void es_work_install(void);

/*
 * This session works on a relation, to es_work_end, to an error, or to the end of
 * the (sub)transaction that aborts.  One at a time: what is begun within another
 * is not shown.  Without shared memory all of these do nothing.
 */
extern void es_work_begin(const char *command, Oid relation);
extern void es_work_end(void);

/* What it does now, and of how many in all; 0 = not known.  None of them is done. */
extern void es_work_phase(const char *phase, int64 total);

/* So many of them are done.  An atomic store, for loops. */
extern void es_work_done(int64 done);

#endif /* ES_STATS_WORK_H */
