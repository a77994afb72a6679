/*
 * kafka/task.h
 *		What sources and sinks have in common: a row that says what is to be done,
 *		and a worker that does it.
 */
#ifndef ES_KAFKA_TASK_H
#define ES_KAFKA_TASK_H

#include "postgres.h"

#include "worker/launcher.h"

/* Of a row of eventstore.source or eventstore.sink. */
typedef struct EsTask
{
	EsWorkerKey key;
	char	   *name;
	Oid			owner;
	Oid			collection; /* or store */
	bool		resting;	/* paused or failed */
} EsTask;

/* "source" or "sink": for messages, and the name of the table. */
extern const char *es_task_noun(EsWorkerKind kind);

/* --- for who defines one; in a transaction with a snapshot --- */

/*
 * The names of sources and sinks are one space.  Locks the name to the end of
 * the transaction; 42710 where it is taken.
 */
extern void es_task_reserve_name(const char *name);

/* Calls its worker (ES_WAKE_CONFIG) if and when this transaction commits. */
extern void es_task_call_at_commit(EsWorkerKey key);

/* The one that a function's argument names: LG007, 22004. */
extern EsTask *es_task_require(const NullableDatum *name);

/* 42501 where the current user has not the rights of the owner. */
extern void es_task_check_owner(const EsTask *task);

/* May the current user see one of this owner with this collection or store? */
extern bool es_task_may_see(Oid owner, Oid collection);

/* Has the workers started of all that are to run. */
extern void es_tasks_want(void);

/* --- for a row's reader: SPI's current row, by column name --- */

/* Copied into the context; (Datum) 0 and NULL for null. */
extern Datum es_task_column(const char *name, MemoryContext context);
extern char *es_task_text(const char *name, MemoryContext context);

/* --- for its worker --- */

/* 55P03 where another process has it: one whose end was not noticed yet.  For the session. */
extern void es_task_own(EsWorkerKey key);

/*
 * Locks the row against pause() and drop to the end of the transaction; false
 * where it is paused, failed, gone, or to run elsewhere.
 */
extern bool es_task_hold(EsWorkerKey key);

/*
 * Locks the row, also of one that is paused, so that its worker writes nothing until
 * the transaction's end; false where it is gone.
 */
extern bool es_task_lock(EsWorkerKey key);

/*
 * A start of the worker; false where there were too many without any progress:
 * it has failed then, until resume().  es_task_lives ends the count.
 */
extern bool es_task_note_start(EsWorkerKey key);
extern void es_task_lives(EsWorkerKey key);

#endif /* ES_KAFKA_TASK_H */
