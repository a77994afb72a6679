/*
 * kafka/client.h
 *		A consumer or producer of librdkafka inside a background worker.
 *
 * For background workers only: a client has threads, and a backend that exits
 * while they live can crash the server.
 */
#ifndef ES_KAFKA_CLIENT_H
#define ES_KAFKA_CLIENT_H

#include "postgres.h"

#include <librdkafka/rdkafka.h>

#include "datatype/timestamp.h"
#include "kafka/connection.h"
#include "lib/ilist.h"

#if RD_KAFKA_VERSION < 0x02000000
#error "eventstore needs librdkafka 2.0 or newer"
#endif

/* In order: a later one takes the place of an earlier one, not the reverse. */
typedef enum EsKafkaTrouble
{
	ES_KAFKA_FINE,
	ES_KAFKA_DISCONNECTED, /* no broker can be reached; librdkafka tries for ever */
	ES_KAFKA_DENIED,	   /* credentials or rights; it tries again all the same */
	ES_KAFKA_FATAL		   /* this client will do nothing any more */
} EsKafkaTrouble;

/* What callbacks have heard since the last note; plain memory, no palloc. */
typedef struct EsKafkaHeard
{
	EsKafkaTrouble trouble;
	char		   message[512]; /* about it; '' = none */
	char		   reason[512];	 /* why the last connection failed */
} EsKafkaHeard;

typedef struct EsKafkaClient
{
	rd_kafka_t *handle;

	/* What wakes us: a consumer's queue (the main one is forwarded to it) or a producer's main queue. */
	rd_kafka_queue_t *queue;
	int				  wake_fd;		 /* readable when the queue has got something */
	int				  wake_write_fd; /* for librdkafka */

	/* As of the last es_kafka_note or es_kafka_serve. */
	EsKafkaTrouble trouble;
	TimestampTz	   trouble_since;
	char		   message[512];

	/* The caller's: */
	void *arg;		/* as given; callbacks get the client as their opaque */
	Oid	  owner;	/* may see its lines in kafka_log; InvalidOid = monitors only */
	bool  in_group; /* it is to leave its group when it is closed */
	void (*release)(
		struct EsKafkaClient *client); /* gives messages back, before a close */

	/* Our own: */
	dlist_node		node;
	rd_kafka_type_t type;
	char			name[NAMEDATALEN];
	bool			scram;	   /* it authenticates by SCRAM */
	int				answer_ms; /* how long a group's answer may take */
	TimestampTz		id_due;	   /* ids of topics are not asked for before */
	List		   *secrets;   /* char *: blotted out of every message */
	char		*username; /* to wake librdkafka by (prefetch.c); NULL: it is not to be */
	char		*password;
	int64		 taken_messages; /* since it was last woken */
	int64		 taken_bytes;
	int64		 wake_messages; /* after so many it is again */
	int64		 wake_bytes;
	EsKafkaHeard heard;
} EsKafkaClient;

/*
 * Starts a client.  'own' is {{"enable.auto.commit", "false"}, …, {NULL, NULL}}:
 * set last, and not to be overridden.  'configure' may set callbacks; the
 * opaque, log and error callbacks are ours.  A consumer needs a group.id among
 * its own, even where it never joins the group; where the role may not use that
 * group at the broker, an error message GROUP_AUTHORIZATION_FAILED comes once in a
 * while, and means nothing to one that has its partitions assigned.  22023 where librdkafka
 * does not take the configuration.  Outlives transactions and memory contexts.
 *
 * Callbacks run within calls of librdkafka on the worker's own thread; they must
 * not raise an error, allocate or log: record in plain memory, act afterwards.
 */
extern EsKafkaClient *es_kafka_open(rd_kafka_type_t type, const char *name,
									List *properties, const char *const own[][2],
									void (*configure)(rd_kafka_conf_t *conf, void *arg),
									void *arg);

/*
 * Ends its threads, after 'release'.  What is still open is closed in
 * before_shmem_exit.
 */
extern void es_kafka_close(EsKafkaClient *client);

/*
 * Waits for the latch, one of the clients' queues, the time-out (-1 none) or the
 * postmaster's death; resets the latch.  A queue wakes us once, then again only
 * after it was served: so serve it until it is empty before this.
 */
extern void es_kafka_wait(EsKafkaClient **clients, int n, long timeout_ms);

/*
 * es_kafka_serve: a producer's delivery reports, errors and logs, then
 * es_kafka_note.  A consumer's errors and logs are served by
 * rd_kafka_consume_batch_queue(client->queue, …); es_kafka_note then turns
 * them into 'trouble', lines of kafka_log and of the server's log.
 */
extern void es_kafka_serve(EsKafkaClient *client);
extern void es_kafka_note(EsKafkaClient *client);

/*
 * A message was taken from a consumer's queue, so there is room for another: each is to
 * be noted, or librdkafka rests for a second when the queue is full (prefetch.c).
 */
extern void es_kafka_note_taken(EsKafkaClient *client, const rd_kafka_message_t *message);

/* What a client has by default, where that is not librdkafka's own; NULL. */
extern const char *es_kafka_default_property(const char *name);

/* Of es_kafka_open and es_kafka_close. */
extern void es_kafka_prefetch_begin(EsKafkaClient *client, List *properties);
extern void es_kafka_prefetch_end(EsKafkaClient *client);

/* A message of a group's member that is no record; before es_kafka_note. */
extern void es_kafka_hear(EsKafkaClient *client, const rd_kafka_message_t *message);

/*
 * How many partitions the topic has, asked of a broker; 0 with the error where
 * that cannot be told or there is none.
 */
extern int es_kafka_count_partitions(EsKafkaClient *client, rd_kafka_topic_t *topic,
									 int timeout_ms, rd_kafka_resp_err_t *error);

/* '' where it cannot be told: an old library or broker, or not now; a while after no answer, at once. */
#define ES_TOPIC_ID_SIZE 32
extern void es_kafka_topic_id(EsKafkaClient *client, const char *topic, int timeout_ms,
							  char *id);

/* Why a topic that had the one id (NULL: not known) is not that of the other; NULL: it may be. */
extern char *es_kafka_doubt_topic_id(const char *known, const char *id);
/* It is known to be the same, though a broker may have said that there is none. */
extern bool es_kafka_is_same_topic(const char *known, const char *id);

/*
 * Offsets of a consumer group as a part of the producer's transaction; NULL, or the
 * error, to be destroyed.  librdkafka asks the coordinator anew with each call, so
 * one that answers late would never be heard: after a time-out the next call waits
 * twice as long, up to four seconds.
 */
extern rd_kafka_error_t *
es_kafka_send_offsets(EsKafkaClient							   *producer,
					  const rd_kafka_topic_partition_list_t	   *offsets,
					  const rd_kafka_consumer_group_metadata_t *membership);

/*
 * Has it found no broker for so long (eventstore.kafka_renew_after) that another
 * client is to look for them?  Says so in the log.
 */
extern bool es_kafka_is_lost(const EsKafkaClient *client);

/* A message, metadata or a delivery report came: whatever was wrong is over, unless fatal. */
extern void es_kafka_fine(EsKafkaClient *client);

#endif /* ES_KAFKA_CLIENT_H */
