/*
 * kafka/run.h
 *		A source at work: what its worker knows, and how it says so.
 *
 * One process has one of these.  What lies in 'life' lasts as long as a client
 * (a librdkafka handle, from source.c's run_client to its end), 'scratch' lasts
 * a round of the loop.
 */
#ifndef ES_KAFKA_RUN_H
#define ES_KAFKA_RUN_H

#include "postgres.h"

#include "kafka/client.h"
#include "kafka/progress.h"
#include "kafka/source.h"
#include "kafka/task_worker.h"
#include "position/position.h"

/* How long a call into librdkafka may keep us from serving interrupts. */
#define ES_RUN_CALL_MS 1000

/* What a source has stopped at, until resume(). */
typedef enum EsHalt
{
	ES_HALT_NONE,
	ES_HALT_RECORD,	  /* on_error, on_null_key: stop */
	ES_HALT_GAP,	  /* on_gap: stop */
	ES_HALT_RECREATED /* the topic is not the one that was read */
} EsHalt;

typedef struct EsPartition
{
	EsProgress progress;
	bool	   from_changelog; /* of the changelog topic: restored or followed */
	int64	   restore_end;	   /* where restoring it ends */
	int64	   position; /* of the next record to be taken: lower ones are dropped */
	int64	   seen_end; /* the end, when it was reached; 0 = not yet */
	int64	   since;	 /* of the transaction: its first record */
	int64	   wanted;	 /* wait_for_source(): up to here; 0 = nobody waits */
	bool	   probing;	 /* the record before 'position' is awaited (topic.c) */
	bool	   answered; /* since the client began: it gave a record, or its end */
	bool	   ended;	 /* since the client began: its end was reached */
} EsPartition;

struct EsGroup; /* group.c */

typedef struct EsSourceRun
{
	MemoryContext	life;
	MemoryContext	scratch;
	EsSource	   *source;
	EsKafkaClient  *client;
	struct EsGroup *group; /* NULL: partitions are assigned by hand; outlives clients */
	List		   *properties; /* of EsKafkaProperty: the client's */
	EsPartition	   *partitions;
	int				npartitions;
	bool			restoring; /* all of them are of the changelog topic, see restore.c */
	bool			refilled;  /* what a crash has emptied; outlives clients */
	bool			guarded;   /* what the store has may be newer than that */
	EsPosition		last_change; /* of the store, as we know; else others write it, too */
	EsPosition		published;	 /* of its changes, what the topic had when that began */

	/* Messages that were taken from the queue, and are neither in the batch nor destroyed. */
	rd_kafka_message_t **taken;
	int					 next_taken;
	int					 ntaken;

	/* The batch (batch.c): messages, and the same as records. */
	rd_kafka_message_t **messages;
	EsRecord			*records;
	int					 capacity; /* records for which there is room, and as bytes */
	size_t				 capacity_bytes;
	int					 nrecords;
	int					 nwritten; /* of them, from the front */
	int					 nrelayed; /* likewise: published by a relay (relay.c) */
	size_t				 nbytes;
	TimestampTz			 oldest; /* when the first of them was taken */
	int					 width;	 /* how many are tried in one transaction */

	EsLeave		leave;
	EsHalt		halt;
	const char *halted_topic; /* ES_HALT_GAP, ES_HALT_RECREATED */
	const char *suspicion;	  /* why the topic is not the one that was read; NULL */
	bool		unprobed;	  /* the next client is not to probe */
	bool		accept_gap;	  /* resume() was called in a gap */
	bool		accept_other; /* it was of a topic made anew, and that failed */
	int64		accepted_resumes;
	TimestampTz retry_at; /* 0 = the last transaction went well */
	int			retry_ms;
	TimestampTz look_at;	   /* at the topic */
	bool		topic_missing; /* outlives a client */
	int			unidentified;  /* how often in a row it did not tell its id then */
	bool		fetch_denied;  /* the topic may be seen, and not read */
	bool		drained;	   /* the queue was empty: it will wake us for what comes */
	bool		lives;		   /* it is not failing at its start */
	int			pause_ms;	   /* before the next client */

	bool   flush_wanted;
	uint64 flush_ticket;
	bool   catch_up_wanted;
	uint64 catch_up_ticket;

	char state[24]; /* as shown */
} EsSourceRun;

/* Shows a state, and logs one that is new and not good. */
extern void es_run_set_state(EsSourceRun *run, const char *name, const char *message);

/* Shows what is wrong with the connection, unless something else is, too. */
extern void es_run_show_connection(EsSourceRun *run);

/* Nothing more is read or written until resume(). */
extern void es_run_stop_at(EsSourceRun *run, EsHalt reason, const char *message);

extern TimestampTz es_run_ms_from_now(int ms);

/* The partitions of that topic that have been begun, in 'scratch'; how many. */
extern int es_run_load_progress(EsSourceRun *run, const char *topic, EsProgress **loaded);

/* NULL where it is not ours. */
extern EsPartition *es_run_partition(EsSourceRun *run, const char *topic, int32 number);
extern EsPartition *es_run_partition_of(EsSourceRun				 *run,
										const rd_kafka_message_t *message);

/* Have all partitions given something, or all reached their end? */
extern bool es_run_all_answered(const EsSourceRun *run);
extern bool es_run_all_ended(const EsSourceRun *run);

/*
 * Moves the offsets in the table; 40001 where they are not where we left them:
 * another process writes for this source.  Then they are read again.
 */
extern void es_run_advance(EsSourceRun *run, const EsProgress *moves, int n);

/* The transaction that moved the offsets has committed. */
extern void es_run_note_advanced(EsSourceRun *run);

#endif /* ES_KAFKA_RUN_H */
