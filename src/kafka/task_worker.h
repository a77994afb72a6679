/*
 * kafka/task_worker.h
 *		The frame of the process that a source or sink has: its row is loaded, a
 *		client serves it until that is to be closed, and so on until the process
 *		is to end.
 */
#ifndef ES_KAFKA_TASK_WORKER_H
#define ES_KAFKA_TASK_WORKER_H

#include "postgres.h"

#include "compat.h"
#include "kafka/task.h"

/* Before a new client, where the last one came to a bad end. */
#define ES_TASK_PAUSE_MS 1000

/* A pause that doubles from failure to failure; 0 = the last thing went well. */
static inline int
es_task_longer_pause(int pause_ms, int first_ms, int last_ms)
{
	return pause_ms == 0 ? first_ms : Min(pause_ms * 2, last_ms);
}

/* Why a client is closed. */
typedef enum EsLeave
{
	ES_LEAVE_NOT,
	ES_LEAVE_AND_RETURN, /* to begin anew, with a new client */
	ES_LEAVE_FOR_GOOD
} EsLeave;

/* What the frame has to know of a row that was loaded. */
typedef struct EsTaskRow
{
	const char *name;
	bool		resting; /* paused or failed */
	bool		at_home; /* in the server and database that it was made for */
} EsTaskRow;

typedef struct EsTaskWork
{
	void		 *run;	   /* the functions' argument */
	MemoryContext life;	   /* lasts from one load to the next */
	MemoryContext scratch; /* the current context between transactions */

	/* In 'life', in a transaction with a snapshot; false where the row is gone. */
	bool (*load)(void *run, uint32 id, EsTaskRow *row);

	/* With one client, which is closed in the end; '*pause_ms' (0) before the next. */
	EsLeave (*serve)(void *run, int *pause_ms);

	/* After an error in 'serve', whose transaction is aborted: closes the client. */
	void (*fail)(void *run, const char *state, const char *message);
} EsTaskWork;

/* A server, user mapping or role has changed; who has looked may reset it. */
extern bool es_task_server_changed;

/* The contexts, named after what it is, and the other fields null. */
extern EsTaskWork *es_task_work(const char *name, void *run);

/* The rest of the process, after es_process_begin. */
es_noreturn extern void es_task_work_main(EsWorkerKey key, const EsTaskWork *work);

/* A transaction with a snapshot; after its end 'scratch' is the current context. */
extern void es_task_begin(void);
extern void es_task_commit(MemoryContext scratch);

/* In PG_CATCH: aborts the transaction; the error, in 'scratch', which is the current context. */
extern ErrorData *es_task_catch(MemoryContext scratch);

/* The state that it shows: what is wrong with a right is wrong for long. */
extern const char *es_task_state_after(const ErrorData *error);

#endif /* ES_KAFKA_TASK_WORKER_H */
