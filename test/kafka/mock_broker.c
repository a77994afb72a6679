/*
 * A Kafka cluster for tests that fits into one small process: the mock cluster
 * of librdkafka, with a command line.
 *
 *   mock_broker [BROKERS]        one, where none is said
 *
 * The first line of its output is the address for bootstrap.servers; after
 * that it reads a command a line, and answers each with a line "ok" or
 * "error TEXT".  It ends at "quit", and when its input ends, that is, with the
 * test that started it.  It listens on the loopback interface only.
 *
 *   topic NAME PARTITIONS [REPLICAS]
 *   down BROKER                      its connections break, and it takes no new ones
 *   up BROKER
 *   error API COUNT ERROR            the next COUNT requests of that kind fail
 *   delay BROKER API COUNT ERROR MS  so do those to one broker, each after a while;
 *                                    with ERROR "NO_ERROR" they are only slow
 *   clear API                        forgets errors that have not come up yet
 *   topic_error TOPIC ERROR          in metadata; "NO_ERROR" mends it
 *   rtt BROKER MS                    all of a broker's answers take that long
 *   leader TOPIC PARTITION BROKER    moves a partition; broker -1: it has none
 *   follower TOPIC PARTITION BROKER  where consumers are sent to
 *   watermarks TOPIC PARTITION LOW HIGH   what that follower says it has
 *   coordinator group|transaction KEY BROKER
 *   version API MIN MAX              of the protocol, as announced to clients
 *   quit
 *
 * API is a request's name or number, ERROR the name or number of a broker's
 * error (UNKNOWN_TOPIC_OR_PART, 3).
 *
 * It keeps 5 MB or 100,000 records a partition, shows what an aborted
 * transaction wrote, fences nobody, compacts nothing and asks for no password.
 * What depends on these is tested with the real broker (broker, in this folder).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include <librdkafka/rdkafka.h>
#include <librdkafka/rdkafka_mock.h>

#define MAX_WORDS  8
#define MAX_ERRORS 1000

typedef rd_kafka_resp_err_t (*Action)(rd_kafka_mock_cluster_t *cluster, char **words);

typedef struct Command
{
	const char *name;
	int			arguments;
	Action		run;
} Command;

/* The requests that a test may want to fail, by their numbers in the protocol. */
static const struct
{
	const char *name;
	int16_t		number;
} apis[] = {{"Produce", 0},
			{"Fetch", 1},
			{"ListOffsets", 2},
			{"Metadata", 3},
			{"OffsetCommit", 8},
			{"OffsetFetch", 9},
			{"FindCoordinator", 10},
			{"JoinGroup", 11},
			{"Heartbeat", 12},
			{"LeaveGroup", 13},
			{"SyncGroup", 14},
			{"ApiVersions", 18},
			{"InitProducerId", 22},
			{"OffsetForLeaderEpoch", 23},
			{"AddPartitionsToTxn", 24},
			{"AddOffsetsToTxn", 25},
			{"EndTxn", 26},
			{"TxnOffsetCommit", 28}};

/* A word that means nothing must not look like a command that was obeyed. */
static void __attribute__((noreturn)) refuse(const char *problem, const char *word)
{
	fprintf(stderr, "mock_broker: %s: %s\n", problem, word);
	printf("error %s: %s\n", problem, word);
	fflush(stdout);
	exit(2);
}

static int64_t
number_of(const char *word)
{
	char   *end;
	int64_t number;

	errno = 0;
	number = strtoll(word, &end, 10);
	if (errno != 0 || *end != '\0' || end == word)
		refuse("not a number", word);
	return number;
}

static int16_t
api_of(const char *word)
{
	for (size_t i = 0; i < sizeof(apis) / sizeof(apis[0]); i++)
	{
		if (strcasecmp(apis[i].name, word) == 0)
			return apis[i].number;
	}
	return (int16_t) number_of(word);
}

static rd_kafka_resp_err_t
error_of(const char *word)
{
	const struct rd_kafka_err_desc *errors;
	size_t							count;

	if (strcmp(word, "NO_ERROR") == 0)
		return RD_KAFKA_RESP_ERR_NO_ERROR;
	rd_kafka_get_err_descs(&errors, &count);
	for (size_t i = 0; i < count; i++)
	{
		/* Codes below -1 are the client's own; no broker sends them. */
		if (errors[i].name != NULL && errors[i].code >= RD_KAFKA_RESP_ERR_UNKNOWN &&
			strcmp(errors[i].name, word) == 0)
			return errors[i].code;
	}
	return (rd_kafka_resp_err_t) number_of(word);
}

static size_t
count_of(const char *word)
{
	int64_t count = number_of(word);

	if (count < 1 || count > MAX_ERRORS)
		refuse("not a count from 1 to 1000", word);
	return (size_t) count;
}

static rd_kafka_resp_err_t
create_topic(rd_kafka_mock_cluster_t *cluster, char **words)
{
	return rd_kafka_mock_topic_create(cluster, words[1], (int) number_of(words[2]),
									  words[3] != NULL ? (int) number_of(words[3]) : 1);
}

static rd_kafka_resp_err_t
take_down(rd_kafka_mock_cluster_t *cluster, char **words)
{
	return rd_kafka_mock_broker_set_down(cluster, (int32_t) number_of(words[1]));
}

static rd_kafka_resp_err_t
bring_up(rd_kafka_mock_cluster_t *cluster, char **words)
{
	return rd_kafka_mock_broker_set_up(cluster, (int32_t) number_of(words[1]));
}

static rd_kafka_resp_err_t
inject_error(rd_kafka_mock_cluster_t *cluster, char **words)
{
	rd_kafka_resp_err_t errors[MAX_ERRORS];
	size_t				count = count_of(words[2]);

	for (size_t i = 0; i < count; i++)
		errors[i] = error_of(words[3]);
	rd_kafka_mock_push_request_errors_array(cluster, api_of(words[1]), count, errors);
	return RD_KAFKA_RESP_ERR_NO_ERROR;
}

static rd_kafka_resp_err_t
inject_delay(rd_kafka_mock_cluster_t *cluster, char **words)
{
	rd_kafka_resp_err_t result = RD_KAFKA_RESP_ERR_NO_ERROR;
	size_t				count = count_of(words[3]);

	for (size_t i = 0; i < count && result == RD_KAFKA_RESP_ERR_NO_ERROR; i++)
		result = rd_kafka_mock_broker_push_request_error_rtts(
			cluster, (int32_t) number_of(words[1]), api_of(words[2]), 1,
			error_of(words[4]), (int) number_of(words[5]));
	return result;
}

static rd_kafka_resp_err_t
clear_errors(rd_kafka_mock_cluster_t *cluster, char **words)
{
	rd_kafka_mock_clear_request_errors(cluster, api_of(words[1]));
	return RD_KAFKA_RESP_ERR_NO_ERROR;
}

static rd_kafka_resp_err_t
set_topic_error(rd_kafka_mock_cluster_t *cluster, char **words)
{
	rd_kafka_mock_topic_set_error(cluster, words[1], error_of(words[2]));
	return RD_KAFKA_RESP_ERR_NO_ERROR;
}

static rd_kafka_resp_err_t
set_rtt(rd_kafka_mock_cluster_t *cluster, char **words)
{
	return rd_kafka_mock_broker_set_rtt(cluster, (int32_t) number_of(words[1]),
										(int) number_of(words[2]));
}

static rd_kafka_resp_err_t
move_leader(rd_kafka_mock_cluster_t *cluster, char **words)
{
	return rd_kafka_mock_partition_set_leader(
		cluster, words[1], (int32_t) number_of(words[2]), (int32_t) number_of(words[3]));
}

static rd_kafka_resp_err_t
set_follower(rd_kafka_mock_cluster_t *cluster, char **words)
{
	return rd_kafka_mock_partition_set_follower(
		cluster, words[1], (int32_t) number_of(words[2]), (int32_t) number_of(words[3]));
}

static rd_kafka_resp_err_t
set_watermarks(rd_kafka_mock_cluster_t *cluster, char **words)
{
	return rd_kafka_mock_partition_set_follower_wmarks(
		cluster, words[1], (int32_t) number_of(words[2]), number_of(words[3]),
		number_of(words[4]));
}

static rd_kafka_resp_err_t
set_coordinator(rd_kafka_mock_cluster_t *cluster, char **words)
{
	return rd_kafka_mock_coordinator_set(cluster, words[1], words[2],
										 (int32_t) number_of(words[3]));
}

static rd_kafka_resp_err_t
set_version(rd_kafka_mock_cluster_t *cluster, char **words)
{
	return rd_kafka_mock_set_apiversion(cluster, api_of(words[1]),
										(int16_t) number_of(words[2]),
										(int16_t) number_of(words[3]));
}

static const Command commands[] = {{"topic", 2, create_topic},
								   {"down", 1, take_down},
								   {"up", 1, bring_up},
								   {"error", 3, inject_error},
								   {"delay", 5, inject_delay},
								   {"clear", 1, clear_errors},
								   {"topic_error", 2, set_topic_error},
								   {"rtt", 2, set_rtt},
								   {"leader", 3, move_leader},
								   {"follower", 3, set_follower},
								   {"watermarks", 4, set_watermarks},
								   {"coordinator", 3, set_coordinator},
								   {"version", 3, set_version}};

static const Command *
find_command(const char *name)
{
	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++)
	{
		if (strcmp(commands[i].name, name) == 0)
			return &commands[i];
	}
	refuse("no such command", name);
}

static void
obey(rd_kafka_mock_cluster_t *cluster, char **words, int count)
{
	const Command	   *command = find_command(words[0]);
	rd_kafka_resp_err_t result;

	if (count <= command->arguments)
		refuse("too few arguments", words[0]);
	result = command->run(cluster, words);
	if (result == RD_KAFKA_RESP_ERR_NO_ERROR)
		printf("ok\n");
	else
		printf("error %s\n", rd_kafka_err2str(result));
	fflush(stdout);
}

int
main(int argc, char **argv)
{
	rd_kafka_mock_cluster_t *cluster;
	rd_kafka_conf_t			*conf = rd_kafka_conf_new();
	rd_kafka_t				*handle;
	char					 problem[512];
	char					*line = NULL;
	size_t					 size = 0;

	/* It has no broker of its own to connect to, and would say so. */
	rd_kafka_conf_set(conf, "log_level", "3", NULL, 0);
	handle = rd_kafka_new(RD_KAFKA_PRODUCER, conf, problem, sizeof(problem));
	if (handle == NULL)
		refuse("no handle", problem);
	cluster = rd_kafka_mock_cluster_new(handle, argc > 1 ? (int) number_of(argv[1]) : 1);
	if (cluster == NULL)
		refuse("no cluster", argc > 1 ? argv[1] : "1");
	printf("%s\n", rd_kafka_mock_cluster_bootstraps(cluster));
	fflush(stdout);

	while (getline(&line, &size, stdin) > 0)
	{
		char *words[MAX_WORDS + 1] = {NULL};
		char *rest = line;
		int	  count = 0;

		while (count < MAX_WORDS && (words[count] = strsep(&rest, " \n")) != NULL)
		{
			if (*words[count] != '\0')
				count++;
		}
		words[count] = NULL;
		if (count == 0)
			continue;
		if (strcmp(words[0], "quit") == 0)
			break;
		obey(cluster, words, count);
	}
	/* Clients may be in the middle of a request; nobody waits for them here. */
	_exit(0);
}
