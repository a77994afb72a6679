/*
 * worker/launcher.h
 *		The table of workers, as the launcher, the workers and the monitor see it.
 *
 * wake.h is the same table as appenders see it.  The states and who changes
 * them are drawn at the top of wake.c.
 */
#ifndef ES_LAUNCHER_H
#define ES_LAUNCHER_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "storage/latch.h"

/* The processes that a database may have. */
typedef enum EsWorkerKind
{
	ES_WORKER_MAINTENANCE, /* worker.c: always, where the extension is */
	ES_WORKER_NOTIFIER,	   /* feed/notifier.c: from the first one who waits or listens */
	ES_WORKER_SOURCE,	   /* kafka/source.c: one for each source that is not paused */
	ES_WORKER_SINK,		   /* kafka/sink.c: likewise */
	ES_WORKER_KIND_COUNT
} EsWorkerKind;

typedef struct EsWorkerKey
{
	Oid			 database; /* InvalidOid: no worker */
	EsWorkerKind kind;
	uint32		 object; /* which source or sink; 0 for those that there is one of */
} EsWorkerKey;

typedef enum EsWorkerState
{
	ES_WORKER_NONE,		/* the slot is free */
	ES_WORKER_WANTED,	/* to be started */
	ES_WORKER_STARTING, /* registered; it has not looked for the extension yet */
	ES_WORKER_RUNNING,
	ES_WORKER_FAILED,  /* ended by an error; to be started again after a pause */
	ES_WORKER_NO_SLOT, /* max_worker_processes was reached; tried again */
	ES_WORKER_ABSENT   /* the database does not have the extension */
} EsWorkerState;

/* What a worker has done since it started, for the monitor. */
typedef enum EsWorkerStat
{
	ES_WORKER_SEGMENTS_MADE,
	ES_WORKER_SEGMENTS_DROPPED,
	ES_WORKER_TICKS,
	ES_WORKER_ERRORS,
	ES_WORKER_NOTIFICATIONS, /* sent */
	ES_WORKER_WAKEUPS,		 /* of waiting sessions */
	ES_WORKER_RECORDS,		 /* of a topic: read, or written and acknowledged */
	ES_WORKER_BATCHES,		 /* transactions that did so */
	ES_WORKER_PARKED,		 /* records that became dead letters */
	ES_WORKER_SKIPPED,		 /* records passed over, as the source's policies say */
	ES_WORKER_STAT_COUNT
} EsWorkerStat;

/* What a worker says of itself; all empty where it has nothing to say. */
typedef struct EsWorkerReport
{
	char		name[NAMEDATALEN]; /* of the source or sink */
	char		state[24];
	TimestampTz since;
	char		message[256]; /* the reason of that state */
} EsWorkerReport;

/* What may be asked of a worker, and awaited (es_errand_*). */
typedef enum EsErrand
{
	ES_ERRAND_FLUSH,	/* what it has read is to be written */
	ES_ERRAND_CATCH_UP, /* what there is now is to be written */
	ES_ERRAND_COUNT
} EsErrand;

typedef struct EsWorkerInfo
{
	EsWorkerKey	   key;
	EsWorkerState  state;
	int			   pid;		 /* 0 = none */
	TimestampTz	   since;	 /* of the last start; 0 = never */
	int			   failures; /* in a row */
	EsWorkerReport report;
	uint64		   stats[ES_WORKER_STAT_COUNT];
} EsWorkerInfo;

/* Something was appended / segments and retention are to be looked at. */
#define ES_WAKE_ACTIVITY	0x01
#define ES_WAKE_MAINTENANCE 0x02
/* The worker is to end, because its database is to be dropped or copied. */
#define ES_WAKE_STOP 0x04
/* Somebody's head moved, or somebody came to wait or to listen (notifier). */
#define ES_WAKE_NOTIFIER 0x08
/* The source or sink was changed, paused or dropped. */
#define ES_WAKE_CONFIG 0x10
/* Somebody awaits an errand. */
#define ES_WAKE_ERRAND 0x20

/* Registers the launcher and the hook on DROP DATABASE and its like. */
extern void es_launcher_install(void);

/* Process mains, started by name. */
extern PGDLLEXPORT void es_launcher_main(Datum arg);
extern PGDLLEXPORT void es_worker_main(Datum arg);
extern PGDLLEXPORT void es_notifier_main(Datum arg);
extern PGDLLEXPORT void es_source_main(Datum arg);
extern PGDLLEXPORT void es_sink_main(Datum arg);

/* --- for whoever needs a database to be without our worker --- */

/*
 * Ends the database's workers, waits for them (some seconds at most) and keeps
 * the launcher from starting others until es_worker_release, or half a minute.
 */
extern void es_worker_hold(Oid database);
extern void es_worker_release(Oid database);

/* --- for a worker --- */

/*
 * Takes the slot, and gives it back at exit; false where another has it or the
 * database is held.  Before the connection: see wake.c.
 */
extern bool es_worker_attach(EsWorkerKey key);
extern void es_worker_set_running(void);

/* The database has no extension (any more): not to be started until asked. */
extern void es_worker_set_absent(void);

/* Which of these flags were set?  es_worker_take also clears them. */
extern uint32 es_worker_pending(uint32 flags);
extern uint32 es_worker_take(uint32 flags);

/* Counts for the monitor; nothing where this process is not a worker. */
extern void es_worker_count(EsWorkerStat stat, uint64 n);

/* Its own report; 'since' stays where the state is as it was. */
extern void es_worker_report(const char *name, const char *state, const char *message);

/* The newest errand that was asked for, to be given to es_errand_done when it is. */
extern uint64 es_errand_asked(EsErrand errand);
extern void	  es_errand_done(EsErrand errand, uint64 ticket);

/* --- for whoever wants something of a source's or sink's worker --- */

/* Sets the flag and wakes it; has it started where it does not run.  No error. */
extern void es_worker_call(EsWorkerKey key, uint32 flag);

/*
 * Asks for an errand; false where no worker could be given it.  The wait ends
 * when the errand is done, or at the deadline (false).  It may be cancelled.
 */
extern bool es_errand_ask(EsWorkerKey key, EsErrand errand, uint64 *ticket);
extern bool es_errand_wait(EsWorkerKey key, EsErrand errand, uint64 ticket,
						   TimestampTz deadline);

/* --- for the launcher --- */

extern void es_launcher_attach(void);

/* The next worker that is to be started now; none: how long to wait. */
extern EsWorkerKey es_worker_due(TimestampTz now, long *wait_ms);

/* Notes the outcome of an attempt to start it. */
extern void es_worker_set_starting(EsWorkerKey key);
extern void es_worker_set_no_slot(EsWorkerKey key);

/*
 * May it have a process?  Sources and sinks leave some of max_worker_processes to
 * the databases' own workers, which may come later.
 */
extern bool es_worker_has_room(EsWorkerKey key);

/* The process that was started is gone. */
extern void es_worker_ended(EsWorkerKey key);

/* Asks for a worker, and wakes the launcher, unless the database has one or sits out a pause. */
extern void es_worker_want(EsWorkerKey key);

/* The database is gone: its slots are free. */
extern void es_worker_forget(Oid database);

/* True once after databases came or changed. */
extern bool es_launcher_take_rescan(void);
extern void es_launcher_rescan(void);

/* --- for the monitor --- */

/* All workers that there are or should be; palloc'd. */
extern int es_worker_list(EsWorkerInfo **workers);
/* One of them; false where it is not in that list. */
extern bool		   es_worker_find(EsWorkerKey key, EsWorkerInfo *info);
extern const char *es_worker_state_name(EsWorkerState state);
extern const char *es_worker_kind_name(EsWorkerKind kind);

#endif /* ES_LAUNCHER_H */
