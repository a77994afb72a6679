/*
 * kafka/sink_run.h
 *		A sink at work: what its worker knows, and how it says so.
 *
 * One process has one of these.  What lies in 'life' lasts as long as a client
 * (from sink.c's run_client to its end), 'scratch' a round of the loop.
 *
 *		saved <= arrived <= read_to <= the collection's head
 */
#ifndef ES_KAFKA_SINK_RUN_H
#define ES_KAFKA_SINK_RUN_H

#include "postgres.h"

#include "kafka/delivery.h"
#include "kafka/run.h"
#include "kafka/share.h"
#include "kafka/sink.h"

/* What a sink has stopped at, until resume(). */
typedef enum EsSinkHalt
{
	ES_SINK_GOES_ON,
	ES_SINK_AT_EVENT, /* on_error: stop */
	ES_SINK_AT_GAP,	  /* events were dropped before they were published */
	ES_SINK_AHEAD,	  /* the collection is not the one that was read */
	ES_SINK_FENCED,	  /* another one publishes as this sink */
	ES_SINK_RECREATED /* the topic is not the one that was published to */
} EsSinkHalt;

typedef struct EsSinkRun
{
	MemoryContext	  life;
	MemoryContext	  scratch;
	MemoryContext	  event; /* emptied after each */
	EsSink			 *sink;
	EsKafkaClient	 *client;
	rd_kafka_topic_t *topic;
	EsDelivery		  delivery;

	EsLeave		leave;
	EsSinkHalt	halt;
	int64		accepted_resumes;
	TimestampTz reload_at; /* the row, at the latest */

	EsPosition	saved;	 /* as it stands in the table */
	EsPosition	read_to; /* all up to there is on its way, or need not be */
	bool		more;	 /* there may be more to read at once */
	bool		full;	 /* as many as may be are on their way */
	int			unsaved; /* events read since the last save */
	TimestampTz oldest;	 /* when the first of them was read; 0 = none */

	/* An event that cannot be published, and up to where they go one at a time to find it. */
	EsPosition current; /* the one that is being read */
	EsPosition bad;		/* 0 = none */
	bool	   at_bad;	/* and the next one to be read */
	int		   bad_sqlstate;
	char	   bad_reason[256];
	EsPosition single_to;

	/* Dead letters that are to be published again (sink_letter.c). */
	bool	   letters;						 /* there may be some */
	char	   letter[ES_UUID_TEXT_LEN + 1]; /* the one that is on its way; '' = none */
	EsPosition letter_position;
	char published_letter[ES_UUID_TEXT_LEN + 1]; /* of the last committed transaction */

	/* exactly_once: a transaction of Kafka (sink_transaction.c). */
	bool			  in_transaction;
	bool			  closing; /* its position is on its way, too */
	TimestampTz		  transaction_began;
	rd_kafka_topic_t *progress_topic;
	char			  identity[128]; /* transactional.id, and the key of its progress */

	/* What a group's member publishes: whose partitions the transaction writes for (share.c). */
	MemoryContext share_life;
	EsShare		 *share;   /* of the transaction, or to begin one; NULL */
	bytea		 *refused; /* a membership that is not one any more; NULL */
	bool		  vouched; /* the group has taken the transaction's offsets */
	bool stale;	 /* the transaction is to be aborted: there is a later membership */
	bool parked; /* the chunk has a dead letter, which goes if the chunk fails */

	/* Of a changelog: its store, and what was restored into that (sink_backlog.c). */
	Oid			store;
	bool		has_backlog; /* some is to be recorded */
	TimestampTz backlog_at;	 /* ... not before */
	int			backlog_ms;	 /* the pause after the last failure */

	TimestampTz retry_at; /* 0 = the last thing went well */
	int			retry_ms;
	int			pause_ms;	/* before the next client */
	bool		progressed; /* something was saved since the start */

	bool topic_missing; /* outlives a client */
	bool accepting;		/* likewise: a topic made anew is being accepted */
	int	 doubts;		/* how often in a row it looked like another one */

	bool	   flush_wanted; /* flush(): all that there is now ... */
	bool	   flush_known;	 /* ... which is up to here */
	EsPosition flush_to;
	uint64	   flush_ticket;

	char state[24];	   /* as shown */
	char warning[160]; /* what is shown with "running"; '' = nothing */
} EsSinkRun;

extern void es_sink_set_state(EsSinkRun *run, const char *name, const char *message);
extern void es_sink_stop_at(EsSinkRun *run, EsSinkHalt reason, const char *message);

/* Something that may pass by itself; 'state' is shown once it lasts. */
extern void es_sink_retry_later(EsSinkRun *run, const char *state, const char *message);

/* What lies behind the position is to be read again, and nothing is on its way. */
extern void es_sink_rewind(EsSinkRun *run, EsPosition position);

/* What cannot be published is known to be this event; begins again with it. */
extern void es_sink_note_bad(EsSinkRun *run, EsPosition position, int sqlstate,
							 const char *reason);

/* --- sink_progress.c: the tables, each in a transaction of its own --- */

/*
 * From run->saved to 'position'.  40001 where it does not stand there: another
 * worker publishes for this sink.  Where the sink is gone, it is to be left.
 */
extern void es_sink_save(EsSinkRun *run, EsPosition position);

/* In the caller's transaction; once for a position. */
extern void es_sink_park(EsSinkRun *run, EsPosition position, int sqlstate,
						 const char *reason);

/* --- sink_backlog.c: keys of a changelog's store that are to be recorded --- */

/* Is there something to be recorded?  In the caller's transaction. */
extern void es_sink_backlog_look(EsSinkRun *run);

extern bool es_sink_backlog_is_due(const EsSinkRun *run, TimestampTz now);

/* Records some of it; what fails is tried again later. */
extern void es_sink_backlog_record(EsSinkRun *run);

/* All of it, before anything else; false where the sink is to be left. */
extern bool es_sink_backlog_finish(EsSinkRun *run);

/* --- sink_read.c --- */

/* Reads what there is, as far as it may be on its way at one time. */
extern void es_sink_read(EsSinkRun *run);

/* resume() after a gap: what was dropped is passed over, and noted. */
extern void es_sink_pass_gap(EsSinkRun *run);

/*
 * Puts the event of run->letter; false where it was not: because of it
 * (run->bad), or something that may pass.
 */
extern bool es_sink_read_letter(EsSinkRun *run);

/* The state that the error of a record shows. */
extern const char *es_sink_state_for(rd_kafka_resp_err_t error);

/* --- sink_topic.c --- */

/* How many partitions the topic has; 0 where it is not there now, and the state says why. */
extern int es_sink_topic_count(EsSinkRun *run);

/* False where that cannot be told now; stops where the topic is another one. */
extern bool es_sink_topic_check(EsSinkRun *run, int count);

/*
 * Of a changelog topic: it ended no earlier than what its source has restored.  In
 * a transaction with a snapshot, before something is put.
 */
extern void es_sink_topic_note_restored(EsSinkRun *run);

/* Warns where others publish to the changelog topic. */
extern void es_sink_topic_note_others(EsSinkRun *run);

/* resume(): it is to be this one. */
extern void es_sink_topic_accept(EsSinkRun *run);

/* --- sink_letter.c: dead letters again --- */

/* Are they to be seen to before anything is read?  May the next one be put now? */
extern bool es_sink_letters_wait(const EsSinkRun *run);
extern bool es_sink_letter_is_due(const EsSinkRun *run, TimestampTz now);

extern void es_sink_letter_put(EsSinkRun *run);

/* Where it has arrived its row goes. */
extern void es_sink_letter_settle(EsSinkRun *run);
extern void es_sink_letter_forget(EsSinkRun *run, const char *id);
extern void es_sink_letter_failed(EsSinkRun *run, const char *id, int sqlstate,
								  const char *reason);

/* --- sink_transaction.c: exactly once --- */

/* Settings of the client, {NULL, NULL} at the end; 'own' has room for them. */
extern void es_sink_transaction_own(EsSinkRun *run, const char *own[][2]);

/*
 * Fences whoever was this sink before, and learns how far it has come; false
 * where that cannot be now, or the client is to be left.
 */
extern bool es_sink_transaction_init(EsSinkRun *run);

/*
 * Looks whose partitions may be written for; false: none now.  Before anything is
 * read for a group's member, in a transaction with a snapshot.
 */
extern bool es_sink_transaction_share(EsSinkRun *run);

/* Before an event is put; false where it cannot be now. */
extern bool es_sink_transaction_begin(EsSinkRun *run);

/* Towards its end, as far as it goes now: call it again until run->in_transaction is false. */
extern void es_sink_transaction_close(EsSinkRun *run);

/* The client has failed for good: is it fenced, or may the next one go on? */
extern void es_sink_transaction_fatal(EsSinkRun *run);

/* What is on its way is nothing: all is read again. */
extern void es_sink_transaction_abort(EsSinkRun *run);

#endif /* ES_KAFKA_SINK_RUN_H */
