/*
 * kafka/client.c
 *		A consumer or producer of librdkafka inside a background worker.
 *
 * Threads.  A client has threads of its own, and PostgreSQL's code must never
 * run in them.  They block all signals (librdkafka does so itself; we do too,
 * for what it calls).  Nothing of ours is called there: errors, logs and
 * reports are queued ("log.queue"), and served by calls that the worker makes.
 * Even so a callback runs inside librdkafka, where an error's jump would leave
 * its locks held: callbacks copy into plain memory, es_kafka_note acts on it.
 *
 * Waiting.  librdkafka writes to a file descriptor when the queue gets something
 * after it was empty; the worker waits for that beside its latch, in a set that
 * is kept, and polls without waiting.  So a worker that waits for Kafka heeds
 * every interrupt, and costs nothing.
 *
 * The end.  A process that runs exit() while a TLS thread lives can crash in
 * OpenSSL's clean-up, and a worker's crash restarts the server.  So clients that
 * are still open are closed, threads joined, in before_shmem_exit, on every way
 * out but a crash.  A client is in the list before it has threads.
 *
 * A client that does not end.  librdkafka before 2.6.1 waits for ever for messages
 * of a partition that is gone.  So it is ended in a thread of its own, and waited
 * for so long; after that the process ends instead, without exit(), once it has
 * left the server's shared memory.
 *
 * Memory.  librdkafka aborts the process when it gets none, so what it may hold
 * is bounded: defaults here, their bounds in property.c; and glibc is kept from
 * giving each thread an arena.
 *
 * Trouble.  librdkafka tries for ever; what it meets is a state to report, not a
 * reason to end.  The worse state wins until es_kafka_fine; the first failed
 * connection is only a reason, until no broker is left.
 */
#include "postgres.h"

#include "kafka/client.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "compat.h"
#include "guc.h"
#include "kafka/log.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* How long a consumer may take to leave its group. */
#define LEAVE_MS 1000

/* How long a group's answer may take, at first and at most. */
#define ANSWER_FIRST_MS 500
#define ANSWER_LAST_MS	4000

/* How long a client may take to end, which is a matter of milliseconds. */
#define END_SECONDS 2

/* Free memory that a worker keeps for its next batch (at most 32 MB: malloc's limit). */
#define KEPT_BYTES (32 * 1024 * 1024)

/* Lines that wait to be noted; more are counted. */
#define HEARD_LINES 64

/* So many lines for the server's log in so much time; kafka_log has them all. */
#define LOG_BURST	 5
#define LOG_BURST_MS (60 * 1000)

/* Shorter ones would blot out ordinary words. */
#define SECRET_MIN_BYTES 4

/* The first librdkafka that can authenticate by SCRAM to Kafka 4.0. */
#define SCRAM_FIXED_VERSION 0x020601ff

static const char *const state_names[] = {"fine", "disconnected", "denied",
										  "failed for good"};

typedef struct HeardLine
{
	const EsKafkaClient *client; /* NULL: before it had a handle */
	int					 level;
	char				 facility[32];
	char				 message[512];
} HeardLine;

/* Written by callbacks, on the worker's thread. */
static HeardLine heard_lines[HEARD_LINES];
static int		 heard_count = 0;
static int		 heard_lost = 0;

/* All open clients of this process. */
static dlist_head clients = DLIST_STATIC_INIT(clients);

/* What the set of events was made for. */
#define WAIT_CLIENTS 8
static WaitEventSet		   *wait_set = NULL;
static const EsKafkaClient *wait_clients[WAIT_CLIENTS];
static int					wait_count = 0;

/* ---------------------------------------------------------------------------
 * Callbacks: plain memory only
 * ------------------------------------------------------------------------- */

static void
hear_line(const rd_kafka_t *handle, int level, const char *facility, const char *message)
{
	HeardLine *line;

	if (heard_count == HEARD_LINES)
	{
		heard_lost++;
		return;
	}
	line = &heard_lines[heard_count++];
	line->client = handle != NULL ? rd_kafka_opaque(handle) : NULL;
	line->level = level;
	strlcpy(line->facility, facility, sizeof(line->facility));
	strlcpy(line->message, message, sizeof(line->message));
}

static EsKafkaTrouble
trouble_of(int error)
{
	switch (error)
	{
		case RD_KAFKA_RESP_ERR__FATAL:
		case RD_KAFKA_RESP_ERR__FENCED:
		case RD_KAFKA_RESP_ERR_FENCED_INSTANCE_ID:
			return ES_KAFKA_FATAL;
		case RD_KAFKA_RESP_ERR__AUTHENTICATION:
		case RD_KAFKA_RESP_ERR_SASL_AUTHENTICATION_FAILED:
		case RD_KAFKA_RESP_ERR_UNSUPPORTED_SASL_MECHANISM:
		case RD_KAFKA_RESP_ERR_ILLEGAL_SASL_STATE:
		case RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED:
		case RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED:
		case RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED:
		case RD_KAFKA_RESP_ERR_TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
			return ES_KAFKA_DENIED;
		case RD_KAFKA_RESP_ERR__ALL_BROKERS_DOWN:
			return ES_KAFKA_DISCONNECTED;
		default:
			return ES_KAFKA_FINE;
	}
}

static void
hear_error(rd_kafka_t *handle, int error, const char *reason, void *opaque)
{
	EsKafkaHeard  *heard = &((EsKafkaClient *) opaque)->heard;
	EsKafkaTrouble trouble = trouble_of(error);

	if (trouble == ES_KAFKA_FINE)
	{
		/* One broker of several, maybe: it says why when the last one goes. */
		strlcpy(heard->reason, reason, sizeof(heard->reason));
		return;
	}
	if (trouble < heard->trouble)
		return;
	heard->trouble = trouble;
	if (trouble == ES_KAFKA_FATAL)
		rd_kafka_fatal_error(handle, heard->message, sizeof(heard->message));
	else if (trouble == ES_KAFKA_DISCONNECTED && heard->reason[0] != '\0')
		strlcpy(heard->message, heard->reason, sizeof(heard->message));
	else
		strlcpy(heard->message, reason, sizeof(heard->message));
}

/* ---------------------------------------------------------------------------
 * What was heard
 * ------------------------------------------------------------------------- */

static void
blot_secret(const char *secret, char *text)
{
	Size  size = strlen(secret);
	char *found = text;

	while ((found = strstr(found, secret)) != NULL)
	{
		memset(found, '*', size);
		found += size;
	}
	/* The text may have been cut within it. */
	for (Size part = Min(size, strlen(text)); part >= SECRET_MIN_BYTES; part--)
	{
		char *tail = text + strlen(text) - part;

		if (strncmp(tail, secret, part) == 0)
			memset(tail, '*', part);
	}
}

/* A broker may repeat what it was told. */
static void
blot_secrets(const EsKafkaClient *client, char *text)
{
	ListCell *cell;

	foreach (cell, client->secrets)
		blot_secret(lfirst(cell), text);
}

/* To the server's log, unless there was too much of it lately. */
static void
log_rarely(const EsKafkaClient *client, const char *text)
{
	static TimestampTz began = 0;
	static int		   count = 0;
	static int		   left_out = 0;
	TimestampTz		   now = GetCurrentTimestamp();

	if (TimestampDifferenceExceeds(began, now, LOG_BURST_MS))
	{
		began = now;
		count = 0;
	}
	if (count == LOG_BURST)
	{
		left_out++;
		return;
	}
	count++;
	ereport(
		LOG,
		(errmsg("Kafka client of \"%s\": %s", client->name, text),
		 left_out > 0
			 ? errdetail(
				   "%d messages were left out; eventstore.kafka_log has the last ones.",
				   left_out)
			 : 0));
	left_out = 0;
}

static void
note_line(const EsKafkaClient *client, HeardLine *line)
{
	char text[sizeof(line->message)];

	blot_secrets(client, line->message);
	es_kafka_clean_text(text, sizeof(text), line->message);
	es_kafka_log_add(client->owner, client->name, line->level, line->facility, text);
	/* syslog's "error"; a failed connection is a state that is told apart */
	if (line->level <= 3 && strcmp(line->facility, "FAIL") != 0)
		log_rarely(client, text);
}

static void
note_lines(const EsKafkaClient *fallback)
{
	for (int i = 0; i < heard_count; i++)
	{
		HeardLine *line = &heard_lines[i];

		note_line(line->client != NULL ? line->client : fallback, line);
	}
	if (heard_lost > 0)
		es_kafka_log_add(fallback->owner, fallback->name, 5, "LOST",
						 psprintf("%d lines were too many", heard_lost));
	heard_count = 0;
	heard_lost = 0;
}

/* Right passwords are refused then, in words that blame them. */
static const char *
version_advice(const EsKafkaClient *client, EsKafkaTrouble trouble)
{
	if (trouble != ES_KAFKA_DENIED || !client->scram ||
		rd_kafka_version() >= SCRAM_FIXED_VERSION ||
		strstr(client->heard.message, "invalid credentials") == NULL)
		return "";
	return " (librdkafka before 2.6.1 cannot use SCRAM with Kafka 4.0 or newer, even "
		   "with the right password)";
}

static void
tell_state(const EsKafkaClient *client, int level, const char *state)
{
	es_kafka_log_add(client->owner, client->name, level, "STATE", state);
	log_rarely(client, state);
}

static void
set_trouble(EsKafkaClient *client, EsKafkaTrouble trouble)
{
	const char *advice = version_advice(client, trouble);
	int			room = sizeof(client->message) - strlen(advice);

	blot_secrets(client, client->heard.message);
	es_kafka_clean_text(client->message, room, client->heard.message);
	strcat(client->message, advice);
	if (client->trouble == trouble)
		return;
	client->trouble = trouble;
	client->trouble_since = GetCurrentTimestamp();
	tell_state(client, 3, psprintf("%s: %s", state_names[trouble], client->message));
}

void
es_kafka_hear(EsKafkaClient *client, const rd_kafka_message_t *message)
{
	hear_error(client->handle, message->err, rd_kafka_message_errstr(message), client);
}

void
es_kafka_note(EsKafkaClient *client)
{
	EsKafkaTrouble trouble = client->heard.trouble;

	if (heard_count > 0 || heard_lost > 0)
		note_lines(client);
	if (trouble == ES_KAFKA_FINE)
		return;
	client->heard.trouble = ES_KAFKA_FINE;
	if (trouble >= client->trouble)
		set_trouble(client, trouble);
}

void
es_kafka_fine(EsKafkaClient *client)
{
	client->heard.reason[0] = '\0';
	if (client->trouble == ES_KAFKA_FINE || client->trouble == ES_KAFKA_FATAL)
		return;
	client->trouble = ES_KAFKA_FINE;
	client->trouble_since = GetCurrentTimestamp();
	client->message[0] = '\0';
	tell_state(client, 5, "connected again");
}

bool
es_kafka_is_lost(const EsKafkaClient *client)
{
	/* Librdkafka looks no address up again that it has learned from a broker. */
	if (client->trouble != ES_KAFKA_DISCONNECTED ||
		!TimestampDifferenceExceeds(client->trouble_since, GetCurrentTimestamp(),
									es_kafka_renew_after_ms))
		return false;
	tell_state(client, 5, "no broker for long: begins with a new client");
	return true;
}

void
es_kafka_serve(EsKafkaClient *client)
{
	while (rd_kafka_poll(client->handle, 0) > 0)
		;
	es_kafka_note(client);
}

int
es_kafka_count_partitions(EsKafkaClient *client, rd_kafka_topic_t *topic, int timeout_ms,
						  rd_kafka_resp_err_t *error)
{
	const struct rd_kafka_metadata *metadata;
	int								count = 0;

	*error = rd_kafka_metadata(client->handle, 0, topic, &metadata, timeout_ms);
	if (*error != RD_KAFKA_RESP_ERR_NO_ERROR)
	{
		es_kafka_note(client);
		return 0;
	}
	es_kafka_fine(client);
	if (metadata->topic_cnt > 0)
	{
		*error = metadata->topics[0].err;
		count = metadata->topics[0].partition_cnt;
	}
	rd_kafka_metadata_destroy(metadata);
	return *error == RD_KAFKA_RESP_ERR_NO_ERROR ? count : 0;
}

/* ---------------------------------------------------------------------------
 * Configuration
 * ------------------------------------------------------------------------- */

typedef struct Setting
{
	const char *name;
	const char *value;
	bool		consumer; /* of which type of client */
	bool		producer;
} Setting;

/* Other than librdkafka's own; properties may override them. */
static const Setting defaults[] = {
	{"client.id", "eventstore", true, true},
	{"socket.keepalive.enable", "true", true, true},
	/* as fast as librdkafka's four times as much */
	{"queued.max.messages.kbytes", "16384", true, false},
	/* bytes alone are to be the bound */
	{"queued.min.messages", "1000000", true, false},
	/* how long fetching rests at a full queue (prefetch.c): often enough, and hardly any work while nobody reads */
	{"fetch.queue.backoff.ms", "100", true, false},
	/* a broker answers nothing else meanwhile: what wait_for_source() asks, say */
	{"fetch.wait.max.ms", "100", true, false},
	{"queue.buffering.max.kbytes", "32768", false, true},
};

/* What nobody may override; not known to every librdkafka. */
static const Setting fixed[] = {
	{"log.queue", "true", true, true},
	/* idle connections that a broker closes are no news */
	{"log.connection.close", "false", true, true},
	{"log.thread.name", "false", true, true},
	/* a command for a shell; an empty one is none */
	{"sasl.kerberos.kinit.cmd", "", true, true},
	{"enable.metrics.push", "false", true, true},
};

const char *
es_kafka_default_property(const char *name)
{
	for (int i = 0; i < lengthof(defaults); i++)
		if (strcmp(defaults[i].name, name) == 0)
			return defaults[i].value;
	return NULL;
}

static void
apply_settings(rd_kafka_conf_t *conf, rd_kafka_type_t type, const Setting *settings,
			   int n)
{
	for (int i = 0; i < n; i++)
		if (type == RD_KAFKA_CONSUMER ? settings[i].consumer : settings[i].producer)
			(void) rd_kafka_conf_set(conf, settings[i].name, settings[i].value, NULL, 0);
}

/* Frees the configuration and raises the error; what librdkafka said has no secrets any more. */
es_noreturn static void
refuse_configuration(EsKafkaClient *client, rd_kafka_conf_t *conf, const char *what,
					 char *said)
{
	char text[512];

	rd_kafka_conf_destroy(conf);
	blot_secrets(client, said);
	es_kafka_clean_text(text, sizeof(text), said);
	ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					errmsg("could not start the Kafka client of \"%s\"", client->name),
					errdetail("%s: %s", what, text)));
}

static void
set_one(EsKafkaClient *client, rd_kafka_conf_t *conf, const char *name, const char *value)
{
	char said[512] = "";

	if (rd_kafka_conf_set(conf, name, value, said, sizeof(said)) == RD_KAFKA_CONF_OK)
		return;
	if (es_kafka_is_secret(name))
		strlcpy(said, "its value is not taken", sizeof(said));
	refuse_configuration(client, conf, name, said);
}

static void
keep_secrets(EsKafkaClient *client, List *properties)
{
	const char	 *mechanism = es_kafka_get_property(properties, "sasl.mechanism");
	MemoryContext caller = MemoryContextSwitchTo(TopMemoryContext);
	ListCell	 *cell;

	client->scram = mechanism != NULL && strncmp(mechanism, "SCRAM", 5) == 0;
	foreach (cell, properties)
	{
		EsKafkaProperty *property = lfirst(cell);

		if (es_kafka_is_secret(property->name) &&
			strlen(property->value) >= SECRET_MIN_BYTES)
			client->secrets = lappend(client->secrets, pstrdup(property->value));
	}
	MemoryContextSwitchTo(caller);
}

static rd_kafka_conf_t *
configure_client(EsKafkaClient *client, List *properties, const char *const own[][2])
{
	rd_kafka_conf_t		*conf = rd_kafka_conf_new();
	EsKafkaPropertyPlace kind =
		client->type == RD_KAFKA_CONSUMER ? ES_KAFKA_CONSUMER : ES_KAFKA_PRODUCER;
	ListCell *cell;

	apply_settings(conf, client->type, defaults, lengthof(defaults));
	foreach (cell, properties)
	{
		EsKafkaProperty *property = lfirst(cell);

		if (es_kafka_is_for(property->name, kind))
			set_one(client, conf, property->name, property->value);
	}
	for (int i = 0; own != NULL && own[i][0] != NULL; i++)
		set_one(client, conf, own[i][0], own[i][1]);
	apply_settings(conf, client->type, fixed, lengthof(fixed));
	rd_kafka_conf_set_opaque(conf, client);
	rd_kafka_conf_set_log_cb(conf, hear_line);
	rd_kafka_conf_set_error_cb(conf, hear_error);
	return conf;
}

/* ---------------------------------------------------------------------------
 * Beginning and end
 * ------------------------------------------------------------------------- */

/* A client has not ended, and its threads live. */
static bool stuck = false;

/* After all else that is to be done at the end. */
static void
end_process(int code, Datum arg)
{
	if (stuck)
		_exit(code);
}

static void
close_all(int code, Datum arg)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify (iter, &clients)
		es_kafka_close(dlist_container(EsKafkaClient, node, iter.cur));
}

/* Once in a process. */
static void
prepare_process(void)
{
	static bool prepared = false;

	if (!IsUnderPostmaster || MyBackendType != B_BG_WORKER)
		elog(ERROR, "Kafka clients live in background workers only");
	if (prepared)
		return;
#ifdef __GLIBC__
	(void) mallopt(M_ARENA_MAX, 2);
	/* A batch's memory is taken and given back again and again: not to the kernel. */
	(void) mallopt(M_MMAP_THRESHOLD, KEPT_BYTES);
	(void) mallopt(M_TRIM_THRESHOLD, KEPT_BYTES);
	/*
	 * A record's headers are many small pieces, given back thousands at a time.  malloc
	 * keeps those apart, and every block that PostgreSQL takes has it join them all.
	 */
	(void) mallopt(M_MXFAST, 0);
#endif
	on_proc_exit(end_process, (Datum) 0);
	before_shmem_exit(close_all, (Datum) 0);
	prepared = true;
}

/* A pipe: librdkafka writes a few bytes, and again only after the queue was served. */
static void
open_wake_fds(EsKafkaClient *client)
{
	int fds[2];

	if (pipe(fds) != 0)
		ereport(ERROR,
				(errcode_for_file_access(), errmsg("could not create a pipe: %m")));
	client->wake_fd = fds[0];
	client->wake_write_fd = fds[1];
	for (int i = 0; i < 2; i++)
		if (fcntl(fds[i], F_SETFL, O_NONBLOCK) != 0 ||
			fcntl(fds[i], F_SETFD, FD_CLOEXEC) != 0)
			elog(ERROR, "fcntl failed: %m");
}

/* Threads inherit the signals that are blocked. */
static rd_kafka_t *
start_threads(EsKafkaClient *client, rd_kafka_conf_t *conf)
{
	rd_kafka_t *handle;
	char		said[512] = "";
	sigset_t	all;
	sigset_t	before;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	handle = rd_kafka_new(client->type, conf, said, sizeof(said));
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (handle == NULL)
		refuse_configuration(client, conf, "librdkafka", said);
	return handle;
}

static void
connect_queue(EsKafkaClient *client)
{
	static const uint64 one = 1;

	if (client->type == RD_KAFKA_CONSUMER)
	{
		rd_kafka_poll_set_consumer(client->handle);
		client->queue = rd_kafka_queue_get_consumer(client->handle);
	}
	if (client->queue == NULL)
		client->queue = rd_kafka_queue_get_main(client->handle);
	rd_kafka_set_log_queue(client->handle, NULL);
	rd_kafka_queue_io_event_enable(client->queue, client->wake_write_fd, &one,
								   sizeof(one));
}

EsKafkaClient *
es_kafka_open(rd_kafka_type_t type, const char *name, List *properties,
			  const char *const own[][2],
			  void (*configure)(rd_kafka_conf_t *conf, void *arg), void *arg)
{
	EsKafkaClient	*client;
	rd_kafka_conf_t *conf;

	prepare_process();
	client = MemoryContextAllocZero(TopMemoryContext, sizeof(EsKafkaClient));
	client->type = type;
	client->arg = arg;
	client->wake_fd = client->wake_write_fd = -1;
	es_kafka_clean_text(client->name, sizeof(client->name), name);
	dlist_push_tail(&clients, &client->node);

	PG_TRY();
	{
		keep_secrets(client, properties);
		es_kafka_prefetch_begin(client, properties);
		open_wake_fds(client);
		conf = configure_client(client, properties, own);
		if (configure != NULL)
			configure(conf, arg);
		client->handle = start_threads(client, conf);
	}
	PG_CATCH();
	{
		es_kafka_close(client);
		PG_RE_THROW();
	}
	PG_END_TRY();
	connect_queue(client);
	return client;
}

rd_kafka_error_t *
es_kafka_send_offsets(EsKafkaClient							   *producer,
					  const rd_kafka_topic_partition_list_t	   *offsets,
					  const rd_kafka_consumer_group_metadata_t *membership)
{
	rd_kafka_error_t *error;

	if (producer->answer_ms == 0)
		producer->answer_ms = ANSWER_FIRST_MS;
	error = rd_kafka_send_offsets_to_transaction(producer->handle, offsets, membership,
												 producer->answer_ms);
	if (error != NULL && rd_kafka_error_code(error) == RD_KAFKA_RESP_ERR__TIMED_OUT)
		producer->answer_ms = Min(producer->answer_ms * 2, ANSWER_LAST_MS);
	return error;
}

/* Only a member that leaves frees its partitions at once. */
static void
leave_group(EsKafkaClient *client)
{
	rd_kafka_queue_t *queue = rd_kafka_queue_new(client->handle);
	TimestampTz until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), LEAVE_MS);
	rd_kafka_error_t *error = rd_kafka_consumer_close_queue(client->handle, queue);

	if (error != NULL)
		rd_kafka_error_destroy(error);
	else
	{
		while (!rd_kafka_consumer_closed(client->handle) && GetCurrentTimestamp() < until)
		{
			rd_kafka_event_t *event = rd_kafka_queue_poll(queue, 50);

			if (event == NULL)
				continue;
			/* What it has to give back; the group waits for the answer. */
			if (rd_kafka_event_type(event) == RD_KAFKA_EVENT_REBALANCE)
				(void) rd_kafka_assign(client->handle, NULL);
			rd_kafka_event_destroy(event);
		}
	}
	rd_kafka_queue_destroy(queue);
}

static void
forget_heard_lines(const EsKafkaClient *client)
{
	for (int i = 0; i < heard_count; i++)
		if (heard_lines[i].client == client)
			heard_lines[i].client = NULL;
}

static void
drop_wait_set(void)
{
	if (wait_set != NULL)
		FreeWaitEventSet(wait_set);
	wait_set = NULL;
	wait_count = 0;
}

/* The end of a client, which outlives who awaits it where it does not come. */
typedef struct Ending
{
	rd_kafka_t	   *handle;
	pthread_mutex_t mutex;
	pthread_cond_t	ended;
	bool			is_over;
} Ending;

/* In a thread of its own. */
static void *
end_handle(void *arg)
{
	Ending *ending = arg;

	rd_kafka_destroy_flags(ending->handle, RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE);
	pthread_mutex_lock(&ending->mutex);
	ending->is_over = true;
	pthread_cond_signal(&ending->ended);
	pthread_mutex_unlock(&ending->mutex);
	return NULL;
}

/* False where it has not ended in time. */
static bool
await_end(Ending *ending)
{
	struct timespec until;
	bool			is_over;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += END_SECONDS;
	pthread_mutex_lock(&ending->mutex);
	while (!ending->is_over &&
		   pthread_cond_timedwait(&ending->ended, &ending->mutex, &until) == 0)
		;
	is_over = ending->is_over;
	pthread_mutex_unlock(&ending->mutex);
	return is_over;
}

/* With all signals blocked in the thread, which inherits that. */
static bool
end_threads(rd_kafka_t *handle)
{
	Ending	 *ending = calloc(1, sizeof(Ending));
	pthread_t thread;
	sigset_t  all;
	sigset_t  before;
	int		  failed = ENOMEM;

	if (ending != NULL)
	{
		ending->handle = handle;
		pthread_mutex_init(&ending->mutex, NULL);
		pthread_cond_init(&ending->ended, NULL);
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		failed = pthread_create(&thread, NULL, end_handle, ending);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	if (failed != 0)
		rd_kafka_destroy_flags(handle, RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE);
	else if (await_end(ending))
		(void) pthread_join(thread, NULL);
	else
		return false;
	free(ending);
	return true;
}

/* False where they do not end. */
static bool
stop_threads(EsKafkaClient *client)
{
	if (client->queue != NULL)
		rd_kafka_queue_io_event_enable(client->queue, -1, NULL, 0);
	if (client->release != NULL)
		client->release(client);
	if (client->in_group)
		leave_group(client);
	if (client->queue != NULL)
		rd_kafka_queue_destroy(client->queue);
	return end_threads(client->handle);
}

/* What it has is left to it. */
static void
leave_stuck(const EsKafkaClient *client)
{
	stuck = true;
	ereport(
		proc_exit_inprogress ? LOG : FATAL,
		(errcode(ERRCODE_FDW_ERROR),
		 errmsg("the Kafka client of \"%s\" does not end", client->name),
		 errdetail("librdkafka %s may wait for ever once a topic is gone. The process "
				   "ends instead.",
				   rd_kafka_version_str())));
}

void
es_kafka_close(EsKafkaClient *client)
{
	dlist_delete(&client->node);
	/* The set holds the descriptor. */
	drop_wait_set();
	if (client->handle != NULL && !stop_threads(client))
	{
		leave_stuck(client);
		return;
	}
	forget_heard_lines(client);
	if (client->wake_fd >= 0)
	{
		close(client->wake_fd);
		close(client->wake_write_fd);
	}
	list_free_deep(client->secrets);
	es_kafka_prefetch_end(client);
	pfree(client);
}

/* ---------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------- */

static void
make_wait_set(EsKafkaClient **list, int n)
{
	if (n > WAIT_CLIENTS)
		elog(ERROR, "too many Kafka clients to wait for: %d", n);
	if (wait_set != NULL && wait_count == n &&
		(n == 0 || memcmp(wait_clients, list, n * sizeof(*list)) == 0))
		return;

	drop_wait_set();
	wait_set = es_create_wait_set(n + 2);
	AddWaitEventToSet(wait_set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(wait_set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	for (int i = 0; i < n; i++)
	{
		AddWaitEventToSet(wait_set, WL_SOCKET_READABLE, list[i]->wake_fd, NULL, NULL);
		wait_clients[i] = list[i];
	}
	wait_count = n;
}

static void
drain(int fd)
{
	char buffer[64];

	while (read(fd, buffer, sizeof(buffer)) == sizeof(buffer))
		;
}

void
es_kafka_wait(EsKafkaClient **list, int n, long timeout_ms)
{
	static uint32 wait_event = 0;
	WaitEvent	  events[WAIT_CLIENTS + 2];
	int			  occurred;

	make_wait_set(list, n);
	occurred = WaitEventSetWait(wait_set, timeout_ms, events, lengthof(events),
								es_wait_event(wait_event, "EventstoreKafka"));
	for (int i = 0; i < occurred; i++)
	{
		if ((events[i].events & WL_LATCH_SET) != 0)
			ResetLatch(MyLatch);
		if ((events[i].events & WL_SOCKET_READABLE) != 0)
			drain(events[i].fd);
	}
}
