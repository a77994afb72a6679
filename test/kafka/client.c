/*
 * A Kafka client for tests and benchmarks: one command, one answer, no JVM.
 *
 *   client [-b ADDRESS] [-X PROPERTY=VALUE]... [-t SECONDS] COMMAND ARGUMENT...
 *
 *   produce TOPIC                    records from the input, a line each
 *   generate TOPIC COUNT [WORD=N]... records made by formula, see below
 *   grid TOPIC TENANTS ITEMS HASHES  one for each combination, see below
 *   consume TOPIC [PARTITION] [FROM] from an offset (the first one) to the end
 *   create TOPIC PARTITIONS [NAME=VALUE]...   with its configuration
 *   alter TOPIC NAME=VALUE...        what is not named becomes the default
 *   delete TOPIC
 *   partitions TOPIC COUNT           makes it have so many
 *   delete_records TOPIC PARTITION OFFSET     those before the offset
 *   describe [TOPIC]                 brokers, and topics or partitions
 *   watermarks TOPIC                 partition, first offset, end
 *   lag GROUP TOPIC                  partition, committed offset or -, end, lag
 *   allow PRINCIPAL OPERATION topic|group|transactional_id|cluster NAME
 *
 * PROPERTY is librdkafka's; isolation.level=read_uncommitted shows what is not
 * committed, transactional.id makes "produce" transactional.  What takes longer
 * than SECONDS (30) has failed.  The exit status is 0 when all went well; else
 * the error output says what did not.
 *
 * A record is a line of fields, separated by tabs, the same in and out:
 *
 *   partition=0  offset=7  timestamp=1700000000000  key=K  value=V  header=N=V
 *
 * No key or value is null, "key=" is an empty one; a header without the second
 * "=" has the value null.  \xHH stands for a byte.  On the way in all fields
 * may be missing, and offset means nothing; nulls=N are N more headers without
 * a name or value.
 *
 * A line that begins with "!" among the records is an order: "!flush" waits
 * until all are delivered, "!commit" and "!abort" end the transaction, which the
 * next record begins anew.  Each answers "ok" or "error TEXT".  At the end of
 * the input all is flushed; a transaction stays open as a crash leaves it.
 *
 * generate: record i, from "first" (0) on, has the key "key-%08d" of
 * (31 i^2 + 17 i) mod 1000003 mod "keys" (100000), and a value {"i": i, "pad":
 * "xx…"} of "size" (100) bytes; with "tombstones" = n, each n-th record's value
 * is null (i mod n = n - 1).  SQL can say the same of what must have come.
 *
 * grid: the key "1/T/I/H" and the value {"tenant": T, "item": I, "hash": H}, all
 * counted from 0, the tenants in turn.
 */
#include <ctype.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <librdkafka/rdkafka.h>

#define MAX_PROPERTIES	64
#define MAX_HEADERS		64
#define DEFAULT_LIMIT_S 120
#define OPEN_LIMIT_MS	3000 /* so long the end of an open transaction is waited for */

static const char *properties[MAX_PROPERTIES][2];
static int		   property_count = 0;
static int		   limit_ms = DEFAULT_LIMIT_S * 1000;

/* Written by the thread that serves the callbacks. */
static atomic_long delivered = 0;
static atomic_long undelivered = 0;
static atomic_int  delivery_error = 0;

/*
 * Not by exit(): a TLS thread of librdkafka may be at work, and would find
 * OpenSSL taken down.
 */
static void __attribute__((noreturn)) leave(int status)
{
	fflush(stdout);
	_exit(status);
}

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	leave(1);
}

static void
check(rd_kafka_resp_err_t error, const char *what)
{
	if (error != RD_KAFKA_RESP_ERR_NO_ERROR)
		fail("%s: %s: %s", what, rd_kafka_err2name(error), rd_kafka_err2str(error));
}

static int64_t
number_of(const char *text)
{
	char   *end;
	int64_t number;

	errno = 0;
	number = strtoll(text, &end, 10);
	if (errno != 0 || *end != '\0' || end == text)
		fail("not a number: %s", text);
	return number;
}

/* ---- the handle --------------------------------------------------------------- */

static const char *
property(const char *name)
{
	for (int i = property_count - 1; i >= 0; i--)
	{
		if (strcmp(properties[i][0], name) == 0)
			return properties[i][1];
	}
	return NULL;
}

static void
set_property(const char *name, const char *value)
{
	if (property_count == MAX_PROPERTIES)
		fail("more than %d properties", MAX_PROPERTIES);
	properties[property_count][0] = name;
	properties[property_count++][1] = value;
}

/* "name=value" in place. */
static char *
split(char *pair)
{
	char *value = strchr(pair, '=');

	if (value == NULL)
		fail("not NAME=VALUE: %s", pair);
	*value = '\0';
	return value + 1;
}

/* A password that is wrong stays wrong: librdkafka would try for ever. */
static void
note_error(rd_kafka_t *handle, int error, const char *reason, void *opaque)
{
	(void) handle;
	(void) opaque;
	if (error == RD_KAFKA_RESP_ERR__AUTHENTICATION || error == RD_KAFKA_RESP_ERR__SSL ||
		error == RD_KAFKA_RESP_ERR__FATAL)
		fail("%s: %s", rd_kafka_err2name(error), reason);
}

static void
note_delivery(rd_kafka_t *handle, const rd_kafka_message_t *message, void *opaque)
{
	(void) handle;
	(void) opaque;
	if (message->err == RD_KAFKA_RESP_ERR_NO_ERROR)
		atomic_fetch_add(&delivered, 1);
	else
	{
		atomic_store(&delivery_error, message->err);
		atomic_fetch_add(&undelivered, 1);
	}
}

/* In a thread of its own: most calls below block without serving callbacks. */
static void *
serve_callbacks(void *handle)
{
	for (;;)
		rd_kafka_poll(handle, 100);
	return NULL;
}

static rd_kafka_t *
open_handle(rd_kafka_type_t type)
{
	rd_kafka_conf_t *conf = rd_kafka_conf_new();
	rd_kafka_t		*handle;
	pthread_t		 thread;
	char			 problem[512];

	if (property("bootstrap.servers") == NULL)
		fail("no address; say -b HOST:PORT");
	for (int i = 0; i < property_count; i++)
	{
		if (rd_kafka_conf_set(conf, properties[i][0], properties[i][1], problem,
							  sizeof(problem)) != RD_KAFKA_CONF_OK)
			fail("%s", problem);
	}
	rd_kafka_conf_set_error_cb(conf, note_error);
	if (type == RD_KAFKA_PRODUCER)
		rd_kafka_conf_set_dr_msg_cb(conf, note_delivery);
	handle = rd_kafka_new(type, conf, problem, sizeof(problem));
	if (handle == NULL)
		fail("%s", problem);
	if (pthread_create(&thread, NULL, serve_callbacks, handle) != 0)
		fail("no thread");
	return handle;
}

/* Properties that a user of the command may override. */
static void
default_property(const char *name, const char *value)
{
	if (property(name) == NULL)
		set_property(name, value);
}

static rd_kafka_t *
open_producer(void)
{
	/* What comes together is one batch, also where we stand still in between for a moment. */
	default_property("linger.ms", "50");
	default_property("queue.buffering.max.messages", "500000");
	return open_handle(RD_KAFKA_PRODUCER);
}

static rd_kafka_t *
open_consumer(void)
{
	default_property("group.id", "client");
	set_property("enable.auto.commit", "false");
	set_property("enable.partition.eof", "true");
	default_property("auto.offset.reset", "error");
	default_property("fetch.wait.max.ms", "10");
	return open_handle(RD_KAFKA_CONSUMER);
}

/* ---- records as lines --------------------------------------------------------- */

typedef struct Bytes
{
	char  *start; /* NULL: null */
	size_t length;
} Bytes;

typedef struct Record
{
	int32_t partition;
	int64_t timestamp;
	Bytes	key;
	Bytes	value;
	int		null_headers;
	int		header_count;
	struct
	{
		char *name;
		Bytes value;
	} headers[MAX_HEADERS];
} Record;

static int
hex_digit(char c)
{
	if (!isxdigit((unsigned char) c))
		fail("not a hexadecimal digit: %c", c);
	return isdigit((unsigned char) c) ? c - '0' : tolower((unsigned char) c) - 'a' + 10;
}

/* In place: what it stands for is never longer. */
static Bytes
unescape(char *text)
{
	Bytes bytes = {text, 0};

	while (*text != '\0')
	{
		if (text[0] == '\\' && text[1] == 'x' && text[2] != '\0')
		{
			bytes.start[bytes.length++] =
				(char) (hex_digit(text[2]) * 16 + hex_digit(text[3]));
			text += 4;
		}
		else
			bytes.start[bytes.length++] = *text++;
	}
	return bytes;
}

static void
parse_header(Record *record, char *text)
{
	char *value = strchr(text, '=');
	Bytes name;

	if (record->header_count == MAX_HEADERS)
		fail("more than %d headers", MAX_HEADERS);
	if (value != NULL)
	{
		*value++ = '\0';
		record->headers[record->header_count].value = unescape(value);
	}
	else
		record->headers[record->header_count].value = (Bytes){NULL, 0};
	/* Its length is not kept: a name is text. */
	name = unescape(text);
	name.start[name.length] = '\0';
	record->headers[record->header_count++].name = name.start;
}

static void
parse_record(Record *record, char *line)
{
	char *field;

	*record = (Record){.partition = RD_KAFKA_PARTITION_UA};
	while ((field = strsep(&line, "\t\n")) != NULL)
	{
		char *value;

		if (*field == '\0')
			continue;
		value = split(field);
		if (strcmp(field, "key") == 0)
			record->key = unescape(value);
		else if (strcmp(field, "value") == 0)
			record->value = unescape(value);
		else if (strcmp(field, "header") == 0)
			parse_header(record, value);
		else if (strcmp(field, "nulls") == 0)
			record->null_headers = (int) number_of(value);
		else if (strcmp(field, "partition") == 0)
			record->partition = (int32_t) number_of(value);
		else if (strcmp(field, "timestamp") == 0)
			record->timestamp = number_of(value);
		else if (strcmp(field, "offset") != 0)
			fail("no such field: %s", field);
	}
}

static void
print_escaped(const void *bytes, size_t length, char also)
{
	const unsigned char *next = bytes;

	for (size_t i = 0; i < length; i++)
	{
		if (next[i] < ' ' || next[i] > '~' || next[i] == '\\' || next[i] == also)
			printf("\\x%02x", next[i]);
		else
			putchar(next[i]);
	}
}

static void
print_headers(const rd_kafka_message_t *message)
{
	rd_kafka_headers_t *headers;
	const char		   *name;
	const void		   *value;
	size_t				length;

	if (rd_kafka_message_headers(message, &headers) != RD_KAFKA_RESP_ERR_NO_ERROR)
		return;
	for (size_t i = 0; rd_kafka_header_get_all(headers, i, &name, &value, &length) ==
					   RD_KAFKA_RESP_ERR_NO_ERROR;
		 i++)
	{
		printf("\theader=");
		print_escaped(name, strlen(name), '=');
		if (value != NULL)
		{
			putchar('=');
			print_escaped(value, length, '\0');
		}
	}
}

static void
print_message(const rd_kafka_message_t *message)
{
	printf("partition=%d\toffset=%lld\ttimestamp=%lld", message->partition,
		   (long long) message->offset,
		   (long long) rd_kafka_message_timestamp(message, NULL));
	if (message->key != NULL)
	{
		printf("\tkey=");
		print_escaped(message->key, message->key_len, '\0');
	}
	if (message->payload != NULL)
	{
		printf("\tvalue=");
		print_escaped(message->payload, message->len, '\0');
	}
	print_headers(message);
	putchar('\n');
}

/* ---- producing ---------------------------------------------------------------- */

static bool in_transaction = false;

static rd_kafka_headers_t *
make_headers(const Record *record)
{
	rd_kafka_headers_t *headers;

	if (record->header_count + record->null_headers == 0)
		return NULL;
	headers = rd_kafka_headers_new(record->header_count + record->null_headers);
	for (int i = 0; i < record->header_count; i++)
		check(rd_kafka_header_add(headers, record->headers[i].name, -1,
								  record->headers[i].value.start,
								  (ssize_t) record->headers[i].value.length),
			  "header");
	for (int i = 0; i < record->null_headers; i++)
		check(rd_kafka_header_add(headers, "", 0, NULL, 0), "header");
	return headers;
}

/* The queue holds so much; what is beyond it waits here. */
static void
send_record(rd_kafka_t *producer, const char *topic, const Record *record)
{
	rd_kafka_headers_t *headers = make_headers(record);
	rd_kafka_resp_err_t error;

	while (
		(error = rd_kafka_producev(
			 producer, RD_KAFKA_V_TOPIC(topic), RD_KAFKA_V_PARTITION(record->partition),
			 RD_KAFKA_V_MSGFLAGS(RD_KAFKA_MSG_F_COPY),
			 RD_KAFKA_V_KEY(record->key.start, record->key.length),
			 RD_KAFKA_V_VALUE(record->value.start, record->value.length),
			 RD_KAFKA_V_TIMESTAMP(record->timestamp), RD_KAFKA_V_HEADERS(headers),
			 RD_KAFKA_V_END)) == RD_KAFKA_RESP_ERR__QUEUE_FULL)
		usleep(1000);
	check(error, "produce");
}

static void
check_transaction(rd_kafka_error_t *error, const char *what)
{
	if (error != NULL)
		fail("%s: %s: %s", what, rd_kafka_error_name(error),
			 rd_kafka_error_string(error));
}

static void
begin_if_needed(rd_kafka_t *producer)
{
	if (property("transactional.id") == NULL || in_transaction)
		return;
	check_transaction(rd_kafka_begin_transaction(producer), "begin");
	in_transaction = true;
}

static void
flush_all(rd_kafka_t *producer)
{
	check(rd_kafka_flush(producer, limit_ms), "flush");
	/* flush returns when nothing is under way; the last reports may still be in their queue. */
	while (rd_kafka_outq_len(producer) > 0)
		usleep(1000);
	if (atomic_load(&undelivered) > 0)
		fail("%ld records were not delivered: %s", atomic_load(&undelivered),
			 rd_kafka_err2name(atomic_load(&delivery_error)));
}

static void
obey(rd_kafka_t *producer, const char *order)
{
	rd_kafka_error_t *error = NULL;

	if (strcmp(order, "flush") == 0)
		flush_all(producer);
	else if (strcmp(order, "commit") == 0)
		error = rd_kafka_commit_transaction(producer, limit_ms);
	else if (strcmp(order, "abort") == 0)
	{
		/* What is aborted is to be in the topic, not in our queue. */
		flush_all(producer);
		error = rd_kafka_abort_transaction(producer, limit_ms);
	}
	else
		fail("no such order: %s", order);
	if (error != NULL)
		printf("error %s: %s\n", rd_kafka_error_name(error),
			   rd_kafka_error_string(error));
	else
		printf("ok\n");
	if (strcmp(order, "flush") != 0)
		in_transaction = false;
	fflush(stdout);
}

static void
produce(int count, char **arguments)
{
	rd_kafka_t *producer = open_producer();
	char	   *line = NULL;
	size_t		size = 0;

	(void) count;
	if (property("transactional.id") != NULL)
		check_transaction(rd_kafka_init_transactions(producer, limit_ms),
						  "init_transactions");
	while (getline(&line, &size, stdin) > 0)
	{
		Record record;

		if (line[0] == '!')
		{
			line[strcspn(line, "\n")] = '\0';
			obey(producer, line + 1);
			continue;
		}
		parse_record(&record, line);
		begin_if_needed(producer);
		send_record(producer, arguments[0], &record);
	}
	flush_all(producer);
}

/* The value of the word "name=N" among the arguments. */
static int64_t
word(int count, char **arguments, const char *name, int64_t otherwise)
{
	size_t length = strlen(name);

	for (int i = 0; i < count; i++)
	{
		if (strncmp(arguments[i], name, length) == 0 && arguments[i][length] == '=')
			return number_of(arguments[i] + length + 1);
	}
	return otherwise;
}

static rd_kafka_t *
open_bulk_producer(void)
{
	default_property("linger.ms", "20");
	default_property("batch.num.messages", "50000");
	return open_producer();
}

static void
generate(int count, char **arguments)
{
	rd_kafka_t *producer;
	int64_t		records = number_of(arguments[1]);
	int64_t		first = word(count, arguments, "first", 0);
	int64_t		keys = word(count, arguments, "keys", 100000);
	int64_t		tombstones = word(count, arguments, "tombstones", 0);
	size_t		size = (size_t) word(count, arguments, "size", 100);
	char	   *value = malloc(size + 64);
	char		key[32];

	producer = open_bulk_producer();
	for (int64_t i = first; i < first + records; i++)
	{
		Record record = {.partition = RD_KAFKA_PARTITION_UA};
		size_t length;

		record.key.start = key;
		record.key.length =
			(size_t) snprintf(key, sizeof(key), "key-%08lld",
							  (long long) ((31 * i * i + 17 * i) % 1000003 % keys));
		length = (size_t) snprintf(value, 64, "{\"i\": %lld, \"pad\": \"", (long long) i);
		for (; length + 2 < size; length++)
			value[length] = 'x';
		memcpy(value + length, "\"}", 2);
		if (tombstones == 0 || i % tombstones != tombstones - 1)
			record.value = (Bytes){value, length + 2};
		send_record(producer, arguments[0], &record);
	}
	flush_all(producer);
	printf("%ld\n", atomic_load(&delivered));
}

static void
produce_grid(int count, char **arguments)
{
	rd_kafka_t *producer = open_bulk_producer();
	int64_t		tenants = number_of(arguments[1]);
	int64_t		items = number_of(arguments[2]);
	int64_t		hashes = number_of(arguments[3]);

	(void) count;
	for (int64_t i = 0; i < tenants * items * hashes; i++)
	{
		Record	  record = {.partition = RD_KAFKA_PARTITION_UA};
		char	  key[80];
		char	  value[120];
		long long tenant = i % tenants;
		long long item = i / tenants % items;
		long long hash = i / tenants / items;

		record.key.start = key;
		record.key.length =
			(size_t) snprintf(key, sizeof(key), "1/%lld/%lld/%lld", tenant, item, hash);
		record.value.start = value;
		record.value.length = (size_t) snprintf(
			value, sizeof(value), "{\"tenant\": %lld, \"item\": %lld, \"hash\": %lld}",
			tenant, item, hash);
		send_record(producer, arguments[0], &record);
	}
	flush_all(producer);
	printf("%ld\n", atomic_load(&delivered));
}

/* ---- metadata and consuming --------------------------------------------------- */

static const rd_kafka_metadata_t *
get_metadata(rd_kafka_t *handle, const char *topic)
{
	const rd_kafka_metadata_t *metadata;
	rd_kafka_topic_t *only = topic ? rd_kafka_topic_new(handle, topic, NULL) : NULL;

	check(rd_kafka_metadata(handle, topic == NULL, only, &metadata, limit_ms),
		  "metadata");
	if (topic != NULL)
		check(metadata->topics[0].err, topic);
	return metadata;
}

/* All partitions of a topic, each from the offset given. */
static rd_kafka_topic_partition_list_t *
list_partitions(rd_kafka_t *handle, const char *topic, int64_t offset)
{
	const rd_kafka_metadata_t		*metadata = get_metadata(handle, topic);
	rd_kafka_topic_partition_list_t *list =
		rd_kafka_topic_partition_list_new(metadata->topics[0].partition_cnt);

	for (int i = 0; i < metadata->topics[0].partition_cnt; i++)
		rd_kafka_topic_partition_list_add(list, topic,
										  metadata->topics[0].partitions[i].id)
			->offset = offset;
	rd_kafka_topic_partition_list_sort(list, NULL, NULL);
	return list;
}

/* What lies behind the end that was reached belongs to an open transaction. */
static bool
is_open_behind(rd_kafka_t *consumer, const rd_kafka_message_t *end)
{
	int64_t low;
	int64_t high;

	return rd_kafka_get_watermark_offsets(consumer, rd_kafka_topic_name(end->rkt),
										  end->partition, &low,
										  &high) == RD_KAFKA_RESP_ERR_NO_ERROR &&
		   end->offset < high;
}

/*
 * To the end.  A transaction's end is written into its partitions after its
 * producer was told of it, so one that is still open gets a while.
 */
static void
print_to_end(rd_kafka_t *consumer, const rd_kafka_topic_partition_list_t *list)
{
	enum
	{
		READING,
		OPEN,
		ENDED
	} *states =
		calloc((size_t) list->elems[list->cnt - 1].partition + 1, sizeof(*states));
	int reading = list->cnt;
	int open = 0;

	while (reading + open > 0)
	{
		rd_kafka_message_t *message =
			rd_kafka_consumer_poll(consumer, reading > 0 ? limit_ms : OPEN_LIMIT_MS);

		if (message == NULL && reading > 0)
			fail("nothing came for %d s, and the end is not reached", limit_ms / 1000);
		if (message == NULL)
			break;
		if (message->err != RD_KAFKA_RESP_ERR__PARTITION_EOF)
		{
			check(message->err, rd_kafka_topic_name(message->rkt));
			print_message(message);
		}
		else if (states[message->partition] != ENDED)
		{
			bool is_open = is_open_behind(consumer, message);

			if (states[message->partition] == READING)
				reading--;
			else
				open--;
			states[message->partition] = is_open ? OPEN : ENDED;
			open += is_open;
		}
		rd_kafka_message_destroy(message);
	}
	free(states);
}

static void
consume(int count, char **arguments)
{
	rd_kafka_t						*consumer = open_consumer();
	int64_t							 from = RD_KAFKA_OFFSET_BEGINNING;
	rd_kafka_topic_partition_list_t *list;

	if (count > 2)
		from = number_of(arguments[2]);
	if (count > 1)
	{
		list = rd_kafka_topic_partition_list_new(1);
		rd_kafka_topic_partition_list_add(list, arguments[0],
										  (int32_t) number_of(arguments[1]))
			->offset = from;
	}
	else
		list = list_partitions(consumer, arguments[0], from);
	check(rd_kafka_assign(consumer, list), "assign");
	print_to_end(consumer, list);
}

static void
describe(int count, char **arguments)
{
	rd_kafka_t				  *handle = open_handle(RD_KAFKA_PRODUCER);
	const rd_kafka_metadata_t *metadata =
		get_metadata(handle, count > 0 ? arguments[0] : NULL);

	for (int i = 0; i < metadata->broker_cnt; i++)
		printf("broker %d %s:%d\n", metadata->brokers[i].id, metadata->brokers[i].host,
			   metadata->brokers[i].port);
	for (int i = 0; i < metadata->topic_cnt; i++)
	{
		const rd_kafka_metadata_topic_t *topic = &metadata->topics[i];

		if (count == 0)
			printf("topic %s %d\n", topic->topic, topic->partition_cnt);
		for (int j = 0; count > 0 && j < topic->partition_cnt; j++)
			printf("partition %d leader %d\n", topic->partitions[j].id,
				   topic->partitions[j].leader);
	}
}

static void
print_watermarks(int count, char **arguments)
{
	rd_kafka_t						*consumer = open_consumer();
	rd_kafka_topic_partition_list_t *list = list_partitions(consumer, arguments[0], 0);

	(void) count;
	for (int i = 0; i < list->cnt; i++)
	{
		int64_t low;
		int64_t high;

		check(rd_kafka_query_watermark_offsets(consumer, arguments[0],
											   list->elems[i].partition, &low, &high,
											   limit_ms),
			  "watermarks");
		printf("%d %lld %lld\n", list->elems[i].partition, (long long) low,
			   (long long) high);
	}
}

static void
print_lag(int count, char **arguments)
{
	rd_kafka_t						*consumer;
	rd_kafka_topic_partition_list_t *list;

	(void) count;
	set_property("group.id", arguments[0]);
	consumer = open_consumer();
	list = list_partitions(consumer, arguments[1], RD_KAFKA_OFFSET_INVALID);
	check(rd_kafka_committed(consumer, list, limit_ms), "committed");
	for (int i = 0; i < list->cnt; i++)
	{
		int64_t low;
		int64_t high;

		check(rd_kafka_query_watermark_offsets(consumer, arguments[1],
											   list->elems[i].partition, &low, &high,
											   limit_ms),
			  "watermarks");
		if (list->elems[i].offset < 0)
			printf("%d - %lld %lld\n", list->elems[i].partition, (long long) high,
				   (long long) (high - low));
		else
			printf("%d %lld %lld %lld\n", list->elems[i].partition,
				   (long long) list->elems[i].offset, (long long) high,
				   (long long) (high - list->elems[i].offset));
	}
}

/* ---- administration ----------------------------------------------------------- */

/* Of a request that is under way: its answer, in which the items may have failed. */
static rd_kafka_event_t *
await_answer(rd_kafka_queue_t *queue, const char *what)
{
	rd_kafka_event_t *event = rd_kafka_queue_poll(queue, limit_ms);

	if (event == NULL)
		fail("%s: no answer for %d s", what, limit_ms / 1000);
	if (rd_kafka_event_error(event) != RD_KAFKA_RESP_ERR_NO_ERROR)
		fail("%s: %s: %s", what, rd_kafka_err2name(rd_kafka_event_error(event)),
			 rd_kafka_event_error_string(event));
	return event;
}

static void
check_topics(const rd_kafka_topic_result_t **results, size_t count)
{
	for (size_t i = 0; i < count; i++)
	{
		if (rd_kafka_topic_result_error(results[i]) != RD_KAFKA_RESP_ERR_NO_ERROR)
			fail("%s: %s: %s", rd_kafka_topic_result_name(results[i]),
				 rd_kafka_err2name(rd_kafka_topic_result_error(results[i])),
				 rd_kafka_topic_result_error_string(results[i]));
	}
}

static void
create_topic(int count, char **arguments)
{
	rd_kafka_t					   *handle = open_handle(RD_KAFKA_PRODUCER);
	rd_kafka_queue_t			   *queue = rd_kafka_queue_new(handle);
	rd_kafka_NewTopic_t			   *topic;
	const rd_kafka_topic_result_t **results;
	size_t							result_count;
	char							problem[512];

	topic = rd_kafka_NewTopic_new(arguments[0], (int) number_of(arguments[1]), -1,
								  problem, sizeof(problem));
	if (topic == NULL)
		fail("%s", problem);
	for (int i = 2; i < count; i++)
	{
		char *value = split(arguments[i]);

		check(rd_kafka_NewTopic_set_config(topic, arguments[i], value), arguments[i]);
	}
	rd_kafka_CreateTopics(handle, &topic, 1, NULL, queue);
	results = rd_kafka_CreateTopics_result_topics(
		rd_kafka_event_CreateTopics_result(await_answer(queue, "create")), &result_count);
	check_topics(results, result_count);
}

static void
alter_topic(int count, char **arguments)
{
	rd_kafka_t						 *handle = open_handle(RD_KAFKA_PRODUCER);
	rd_kafka_queue_t				 *queue = rd_kafka_queue_new(handle);
	rd_kafka_ConfigResource_t		 *topic;
	const rd_kafka_ConfigResource_t **results;
	size_t							  result_count;

	topic = rd_kafka_ConfigResource_new(RD_KAFKA_RESOURCE_TOPIC, arguments[0]);
	for (int i = 1; i < count; i++)
	{
		char *value = split(arguments[i]);

		check(rd_kafka_ConfigResource_set_config(topic, arguments[i], value),
			  arguments[i]);
	}
	rd_kafka_AlterConfigs(handle, &topic, 1, NULL, queue);
	results = rd_kafka_AlterConfigs_result_resources(
		rd_kafka_event_AlterConfigs_result(await_answer(queue, "alter")), &result_count);
	check(rd_kafka_ConfigResource_error(results[0]), arguments[0]);
}

static void
delete_topic(int count, char **arguments)
{
	rd_kafka_t					   *handle = open_handle(RD_KAFKA_PRODUCER);
	rd_kafka_queue_t			   *queue = rd_kafka_queue_new(handle);
	rd_kafka_DeleteTopic_t		   *topic = rd_kafka_DeleteTopic_new(arguments[0]);
	const rd_kafka_topic_result_t **results;
	size_t							result_count;

	(void) count;
	rd_kafka_DeleteTopics(handle, &topic, 1, NULL, queue);
	results = rd_kafka_DeleteTopics_result_topics(
		rd_kafka_event_DeleteTopics_result(await_answer(queue, "delete")), &result_count);
	check_topics(results, result_count);
}

static void
add_partitions(int count, char **arguments)
{
	rd_kafka_t					   *handle = open_handle(RD_KAFKA_PRODUCER);
	rd_kafka_queue_t			   *queue = rd_kafka_queue_new(handle);
	rd_kafka_NewPartitions_t	   *partitions;
	const rd_kafka_topic_result_t **results;
	size_t							result_count;
	char							problem[512];

	(void) count;
	partitions = rd_kafka_NewPartitions_new(
		arguments[0], (size_t) number_of(arguments[1]), problem, sizeof(problem));
	if (partitions == NULL)
		fail("%s", problem);
	rd_kafka_CreatePartitions(handle, &partitions, 1, NULL, queue);
	results = rd_kafka_CreatePartitions_result_topics(
		rd_kafka_event_CreatePartitions_result(await_answer(queue, "partitions")),
		&result_count);
	check_topics(results, result_count);
}

static void
delete_records(int count, char **arguments)
{
	rd_kafka_t							  *handle = open_handle(RD_KAFKA_PRODUCER);
	rd_kafka_queue_t					  *queue = rd_kafka_queue_new(handle);
	rd_kafka_topic_partition_list_t		  *list = rd_kafka_topic_partition_list_new(1);
	rd_kafka_DeleteRecords_t			  *request;
	const rd_kafka_topic_partition_list_t *offsets;

	(void) count;
	rd_kafka_topic_partition_list_add(list, arguments[0],
									  (int32_t) number_of(arguments[1]))
		->offset = number_of(arguments[2]);
	request = rd_kafka_DeleteRecords_new(list);
	rd_kafka_DeleteRecords(handle, &request, 1, NULL, queue);
	offsets = rd_kafka_DeleteRecords_result_offsets(
		rd_kafka_event_DeleteRecords_result(await_answer(queue, "delete_records")));
	check(offsets->elems[0].err, arguments[0]);
}

static rd_kafka_AclOperation_t
operation_of(const char *name)
{
	for (int i = RD_KAFKA_ACL_OPERATION_ALL; i < RD_KAFKA_ACL_OPERATION__CNT; i++)
	{
		if (strcasecmp(rd_kafka_AclOperation_name(i), name) == 0)
			return i;
	}
	fail("no such operation: %s", name);
}

static rd_kafka_ResourceType_t
resource_of(const char *name)
{
	if (strcmp(name, "cluster") == 0)
		return RD_KAFKA_RESOURCE_BROKER;
	for (int i = RD_KAFKA_RESOURCE_TOPIC; i < RD_KAFKA_RESOURCE__CNT; i++)
	{
		if (strcasecmp(rd_kafka_ResourceType_name(i), name) == 0)
			return i;
	}
	fail("no such kind of resource: %s", name);
}

static void
allow(int count, char **arguments)
{
	rd_kafka_t					 *handle = open_handle(RD_KAFKA_PRODUCER);
	rd_kafka_queue_t			 *queue = rd_kafka_queue_new(handle);
	rd_kafka_AclBinding_t		 *binding;
	const rd_kafka_acl_result_t **results;
	const rd_kafka_error_t		 *error;
	size_t						  result_count;
	char						  problem[512];

	(void) count;
	binding = rd_kafka_AclBinding_new(
		resource_of(arguments[2]), arguments[3], RD_KAFKA_RESOURCE_PATTERN_LITERAL,
		arguments[0], "*", operation_of(arguments[1]), RD_KAFKA_ACL_PERMISSION_TYPE_ALLOW,
		problem, sizeof(problem));
	if (binding == NULL)
		fail("%s", problem);
	rd_kafka_CreateAcls(handle, &binding, 1, NULL, queue);
	results = rd_kafka_CreateAcls_result_acls(
		rd_kafka_event_CreateAcls_result(await_answer(queue, "allow")), &result_count);
	error = rd_kafka_acl_result_error(results[0]);
	if (error != NULL)
		fail("allow: %s", rd_kafka_error_string(error));
}

/* ---- commands ----------------------------------------------------------------- */

static const struct
{
	const char *name;
	int			arguments;
	void (*run)(int count, char **arguments);
} commands[] = {{"produce", 1, produce},
				{"generate", 2, generate},
				{"grid", 4, produce_grid},
				{"consume", 1, consume},
				{"create", 2, create_topic},
				{"alter", 2, alter_topic},
				{"delete", 1, delete_topic},
				{"partitions", 2, add_partitions},
				{"delete_records", 3, delete_records},
				{"describe", 0, describe},
				{"watermarks", 1, print_watermarks},
				{"lag", 2, print_lag},
				{"allow", 4, allow}};

static void
read_options(int argc, char **argv)
{
	int option;

	while ((option = getopt(argc, argv, "+b:X:t:")) != -1)
	{
		if (option == 'b')
			set_property("bootstrap.servers", optarg);
		else if (option == 't')
			limit_ms = (int) number_of(optarg) * 1000;
		else if (option == 'X')
		{
			const char *value = split(optarg);

			set_property(optarg, value);
		}
		else
			leave(2);
	}
}

int
main(int argc, char **argv)
{
	/* First, so that a caller may say otherwise: what matters is on the error output anyway. */
	set_property("log_level", "3");
	read_options(argc, argv);
	if (optind == argc)
		fail("no command; the head of client.c says which there are");
	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++)
	{
		if (strcmp(commands[i].name, argv[optind]) != 0)
			continue;
		argc -= optind + 1;
		if (argc < commands[i].arguments)
			fail("%s: too few arguments", argv[optind]);
		commands[i].run(argc, argv + optind + 1);
		leave(0);
	}
	fail("no such command: %s", argv[optind]);
}
