/*
 * kafka/group.c
 *		A source as a member of a consumer group: which partitions are its own.
 *
 * Several servers share a topic: Kafka's group coordinator says who reads which
 * partitions, and gives those of a member that left or died to the others.
 *
 * Two clients.  The member only takes part in the group: it never fetches, and
 * whatever partitions it is given it assigns none of them to itself.  What is
 * read is read by the source's other client (source.c), whose partitions are
 * assigned by hand, as always: those that the group says are ours.  So a restore,
 * a gap or a topic made anew is dealt with in one way, with a group and without,
 * and none of it disturbs the group; and the known faults of librdkafka in
 * handing partitions over while they are fetched (cooperative groups before
 * 2.8, say) are out of the way: here nothing is.
 *
 * Where a partition begins.  Each database has its own table of offsets, in the
 * same transaction as the records, and reads each record of what it owns once:
 * what another server did changes nothing about it.
 *
 *	-	Without a changelog topic: a partition that was read here before goes on
 *		where that ended, and what others have read meanwhile is read here, too;
 *		one that is new here begins where 'start' says.  'latest' means the end as
 *		of the group's beginning: where the group has been already, it is where
 *		that stands, or records would be in no store at all.
 *	-	With one: it is first restored from the partition of that topic (restore.c),
 *		from where we stood in it, each time that it becomes ours; then it goes on
 *		behind what the restored changes came from, or where we were, if that is
 *		later.
 *
 * A partition that is taken away: what was read of it is written, or where that
 * cannot be done now forgotten, and then it is given up.  Its keys stay in the
 * store, as they were.  With a changelog topic its changes get a moment to be
 * published, by the membership that we then have; what is not then, never is (the
 * fence: share.c).
 *
 * Offsets are committed to Kafka behind the transaction that wrote them, once in
 * a while, for tools that watch a group's lag, and for 'latest'.
 *
 * How fast another server takes over: at once from one that stops or is paused,
 * after session.timeout.ms (librdkafka: 45 s) from one that died.  A
 * group.instance.id among the properties makes the member static: it leaves
 * nothing when it stops, and has its partitions again if it is back in time.
 *
 * A batch that takes longer than max.poll.interval.ms (librdkafka: five minutes):
 * its partitions go to others, as those of a dead member do.  The batch may still
 * commit, for offsets are each server's own; what it changes in the changelog topic
 * is up to the fence.  Then the worker hears of it, says so, and joins again.
 * Between the transactions of a batch that is halved the group is shown that it
 * lives (es_group_attend).
 *
 * The rebalance callback runs inside of librdkafka: it notes what is given and
 * taken in librdkafka's own lists, and the answer, which the group waits for,
 * follows after the call.
 *
 * Locks: those of batch.c and progress.c.  A crash: the coordinator notices; the
 * offsets in the table tell how far it was.
 */
#include "postgres.h"

#include "kafka/group.h"

#include "kafka/batch.h"
#include "kafka/property.h"
#include "kafka/share.h"
#include "kafka/task.h"
#include "lib/stringinfo.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* How often offsets are committed to Kafka. */
#define COMMIT_MS 1000
/* How long the changelog topic may take to get what it does not have yet. */
#define DRAIN_MS 5000
/* More partitions are noticed by a member's look at the topic, after so long. */
#define REFRESH_MS "5000"
/* The pause after a member has failed doubles up to the first; who lives so long begins anew. */
#define FAILED_PAUSE_MS	   (30 * 1000)
#define FAILED_LONG_AGO_MS (120 * 1000)

/* Of a partition in 'owned': its address, nothing else. */
static char restored_mark;
#define RESTORED ((void *) &restored_mark)

struct EsGroup
{
	EsKafkaClient *member;

	/* Written by the callback. */
	rd_kafka_topic_partition_list_t *owned;
	rd_kafka_topic_partition_list_t *going;	   /* ours until we have answered */
	bool							 lost;	   /* they are another's already */
	bool							 assigned; /* it has been said which are ours */
	bool							 changed;  /* which they are */
	bool							 asked;	   /* the group waits for our answer */
	bool							 giving;   /* which is to: partitions were given */

	bool shared; /* it is said what may be published */

	bool overdue; /* the group went on without us (note_overdue) */

	TimestampTz						 commit_at;
	rd_kafka_topic_partition_list_t *committed; /* what was committed last */
	bool							 joined;
	char							*made_for; /* properties */
};

/* ---------------------------------------------------------------------------
 * The callback: plain memory only
 * ------------------------------------------------------------------------- */

static void
hear_rebalance(rd_kafka_t *handle, rd_kafka_resp_err_t error,
			   rd_kafka_topic_partition_list_t *partitions, void *opaque)
{
	struct EsGroup *group = ((EsKafkaClient *) opaque)->arg;

	group->asked = true;
	group->giving = error == RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
	group->changed = group->changed || !group->assigned || partitions->cnt > 0;
	if (group->giving)
	{
		for (int i = 0; i < partitions->cnt; i++)
			rd_kafka_topic_partition_list_add(group->owned, partitions->elems[i].topic,
											  partitions->elems[i].partition);
		group->assigned = true;
		return;
	}
	group->lost = group->lost || rd_kafka_assignment_lost(handle);
	for (int i = 0; i < partitions->cnt; i++)
	{
		const rd_kafka_topic_partition_t *gone = &partitions->elems[i];

		rd_kafka_topic_partition_list_del(group->owned, gone->topic, gone->partition);
		rd_kafka_topic_partition_list_add(group->going, gone->topic, gone->partition);
	}
	/* In a cooperative group the rest stays ours.  Who has none awaits his share anew. */
	group->assigned = group->owned->cnt > 0;
	group->changed = group->changed || !group->assigned;
}

/* ---------------------------------------------------------------------------
 * Membership
 * ------------------------------------------------------------------------- */

/* How librdkafka spells a membership: this, then the generation in four bytes. */
#define MEMBERSHIP_MAGIC "CGMDv2:"

/*
 * In no generation: a coordinator lets one without a member's name pass for a
 * client that is no member, and the fence is open.
 */
static bool
is_in_generation(const rd_kafka_consumer_group_metadata_t *metadata)
{
#if RD_KAFKA_VERSION >= 0x020800ff
	return rd_kafka_consumer_group_metadata_generation_id(metadata) >= 0;
#else
	int32			  generation = -1;
	size_t			  magic = strlen(MEMBERSHIP_MAGIC);
	void			 *bytes;
	size_t			  length;
	rd_kafka_error_t *error =
		rd_kafka_consumer_group_metadata_write(metadata, &bytes, &length);

	if (error != NULL)
	{
		rd_kafka_error_destroy(error);
		return false;
	}
	if (length >= magic + sizeof(generation) &&
		memcmp(bytes, MEMBERSHIP_MAGIC, magic) == 0)
		memcpy(&generation, (char *) bytes + magic, sizeof(generation));
	rd_kafka_mem_free(NULL, bytes);
	return generation >= 0;
#endif
}

rd_kafka_consumer_group_metadata_t *
es_group_membership(EsSourceRun *run)
{
	rd_kafka_consumer_group_metadata_t *metadata =
		rd_kafka_consumer_group_metadata(run->group->member->handle);

	if (metadata == NULL || is_in_generation(metadata))
		return metadata;
	rd_kafka_consumer_group_metadata_destroy(metadata);
	return NULL;
}

/* As librdkafka spells it, to be read by the sink's process. */
static bytea *
read_membership(EsSourceRun *run)
{
	rd_kafka_consumer_group_metadata_t *metadata = es_group_membership(run);
	void							   *bytes = NULL;
	size_t								length = 0;
	rd_kafka_error_t				   *error;
	bytea							   *membership = NULL;

	if (metadata == NULL)
		return NULL;
	error = rd_kafka_consumer_group_metadata_write(metadata, &bytes, &length);
	rd_kafka_consumer_group_metadata_destroy(metadata);
	if (error != NULL)
	{
		rd_kafka_error_destroy(error);
		return NULL;
	}
	membership = palloc_extended(VARHDRSZ + length, MCXT_ALLOC_NO_OOM);
	if (membership != NULL)
	{
		SET_VARSIZE(membership, VARHDRSZ + length);
		memcpy(VARDATA(membership), bytes, length);
	}
	rd_kafka_mem_free(NULL, bytes);
	return membership;
}

/* Which partitions are ours and restored; 'known' false: that changes just now. */
static void
note_share(EsSourceRun *run, bool known)
{
	const struct EsGroup *group = run->group;
	int32				 *numbers;
	int					  n = 0;

	es_task_begin();
	numbers = palloc(sizeof(int32) * (group->owned->cnt + group->going->cnt + 1));
	for (int i = 0; i < group->owned->cnt; i++)
		numbers[n++] = group->owned->elems[i].partition;
	for (int i = 0; i < group->going->cnt; i++)
		numbers[n++] = group->going->elems[i].partition;
	if (es_task_hold(es_source_key(run->source->id)))
		es_share_note(run->source->id, known ? numbers : NULL, known ? n : 0,
					  known ? read_membership(run) : NULL);
	es_task_commit(run->scratch);
	run->group->shared = known;
}

void
es_group_note_loaded(EsSourceRun *run)
{
	if (run->group != NULL && !run->restoring && run->halt == ES_HALT_NONE)
		note_share(run, true);
}

static void
configure_member(rd_kafka_conf_t *conf, void *arg)
{
	rd_kafka_conf_set_rebalance_cb(conf, hear_rebalance);
}

/* To compare: a server or mapping may be changed. */
static char *
spell(List *properties)
{
	StringInfoData text;
	ListCell	  *cell;

	initStringInfo(&text);
	foreach (cell, properties)
	{
		const EsKafkaProperty *property = lfirst(cell);

		appendStringInfo(&text, "%s\n%s\n", property->name, property->value);
	}
	return text.data;
}

static void
open_member(EsSourceRun *run, struct EsGroup *group)
{
	/* The end of a changelog topic (es_group_find_end); where a relay goes on. */
	const char *isolation =
		run->source->mode == ES_SOURCE_RELAY ? "read_committed" : "read_uncommitted";
	const char *const own[][2] = {{"group.id", run->source->group_id},
								  {"enable.auto.commit", "false"},
								  {"enable.auto.offset.store", "false"},
								  {"auto.offset.reset", "error"},
								  /* es_group_find_end */
								  {"isolation.level", isolation},
								  {"allow.auto.create.topics", "false"},
								  {NULL, NULL}};
	List			 *properties = list_copy(run->properties);

	if (es_kafka_get_property(properties, "topic.metadata.refresh.interval.ms") == NULL)
		properties = es_kafka_set_property(
			properties, "topic.metadata.refresh.interval.ms", REFRESH_MS);
	group->made_for = MemoryContextStrdup(TopMemoryContext, spell(run->properties));
	group->member = es_kafka_open(RD_KAFKA_CONSUMER, run->source->name, properties, own,
								  configure_member, group);
	group->member->owner = run->source->owner;
	group->member->in_group = true;
}

static void
subscribe(EsSourceRun *run)
{
	rd_kafka_topic_partition_list_t *topics = rd_kafka_topic_partition_list_new(1);
	rd_kafka_resp_err_t				 error;

	rd_kafka_topic_partition_list_add(topics, run->source->topic, RD_KAFKA_PARTITION_UA);
	error = rd_kafka_subscribe(run->group->member->handle, topics);
	rd_kafka_topic_partition_list_destroy(topics);
	if (error != RD_KAFKA_RESP_ERR_NO_ERROR)
		ereport(ERROR, (errcode(ERRCODE_FDW_ERROR),
						errmsg("source \"%s\" cannot join group \"%s\"",
							   run->source->name, run->source->group_id),
						errdetail_internal("%s", rd_kafka_err2str(error))));
}

/* A member that has lost all brokers looks their addresses up anew, as the reader does. */
static bool
is_good(EsSourceRun *run)
{
	const struct EsGroup *group = run->group;

	return group != NULL && group->joined &&
		   group->member->trouble != ES_KAFKA_DISCONNECTED &&
		   strcmp(group->made_for, spell(run->properties)) == 0;
}

void
es_group_join(EsSourceRun *run)
{
	struct EsGroup *group;

	if (run->source->group_id == NULL || is_good(run))
		return;
	es_group_leave(run);
	group = MemoryContextAllocZero(TopMemoryContext, sizeof(struct EsGroup));
	group->owned = rd_kafka_topic_partition_list_new(0);
	group->going = rd_kafka_topic_partition_list_new(0);
	group->committed = rd_kafka_topic_partition_list_new(0);
	run->group = group;
	open_member(run, group);
	note_share(run, false);
	subscribe(run);
	group->joined = true;
}

void
es_group_leave(EsSourceRun *run)
{
	struct EsGroup *group = run->group;

	if (group == NULL)
		return;
	if (group->member != NULL)
		es_kafka_close(group->member);
	rd_kafka_topic_partition_list_destroy(group->owned);
	rd_kafka_topic_partition_list_destroy(group->going);
	rd_kafka_topic_partition_list_destroy(group->committed);
	if (group->made_for != NULL)
		pfree(group->made_for);
	pfree(group);
	run->group = NULL;
}

/* ---------------------------------------------------------------------------
 * Offsets, for others to look at
 * ------------------------------------------------------------------------- */

/*
 * A relay's are in its transactions, and must not be overtaken by older ones.  Of
 * who is no member any more an empty group would take what it knows better.
 */
static bool
may_commit(EsSourceRun *run)
{
	rd_kafka_consumer_group_metadata_t *membership;

	if (run->source->mode == ES_SOURCE_RELAY || run->group->lost)
		return false;
	membership = es_group_membership(run);
	if (membership == NULL)
		return false;
	rd_kafka_consumer_group_metadata_destroy(membership);
	return true;
}

static void
commit_offsets(EsSourceRun *run)
{
	struct EsGroup					*group = run->group;
	rd_kafka_topic_partition_list_t *news;

	group->commit_at = es_run_ms_from_now(COMMIT_MS);
	if (!may_commit(run))
		return;
	news = rd_kafka_topic_partition_list_new(0);
	for (int i = 0; i < run->npartitions; i++)
	{
		const EsPartition		   *partition = &run->partitions[i];
		int32						number = partition->progress.partition;
		rd_kafka_topic_partition_t *last;

		if (partition->from_changelog)
			continue;
		last = rd_kafka_topic_partition_list_find(group->committed,
												  partition->progress.topic, number);
		if (last == NULL)
			last = rd_kafka_topic_partition_list_add(group->committed,
													 partition->progress.topic, number);
		if (last->offset == partition->progress.written)
			continue;
		last->offset = partition->progress.written;
		rd_kafka_topic_partition_list_add(news, partition->progress.topic, number)
			->offset = last->offset;
	}
	/* Whether it arrives matters to nobody here: the next one says more. */
	if (news->cnt > 0)
		(void) rd_kafka_commit(group->member->handle, news, 1);
	rd_kafka_topic_partition_list_destroy(news);
}

bool
es_group_find_committed(EsSourceRun *run, int32 partition, int64 *offset)
{
	rd_kafka_topic_partition_list_t *list = rd_kafka_topic_partition_list_new(1);
	rd_kafka_resp_err_t				 error;

	rd_kafka_topic_partition_list_add(list, run->source->topic, partition);
	error = rd_kafka_committed(run->group->member->handle, list, ES_RUN_CALL_MS);
	if (error == RD_KAFKA_RESP_ERR_NO_ERROR)
		error = list->elems[0].err;
	*offset = Max(list->elems[0].offset, -1);
	rd_kafka_topic_partition_list_destroy(list);
	return error == RD_KAFKA_RESP_ERR_NO_ERROR;
}

/* The reader would be told where the first open transaction begins. */
bool
es_group_find_end(EsSourceRun *run, int32 partition, int64 *end)
{
	int64 low;

	return rd_kafka_query_watermark_offsets(
			   run->group->member->handle, run->source->changelog_topic, partition, &low,
			   end, ES_RUN_CALL_MS) == RD_KAFKA_RESP_ERR_NO_ERROR;
}

/* ---------------------------------------------------------------------------
 * Partitions come and go
 * ------------------------------------------------------------------------- */

static bool
is_cooperative(const struct EsGroup *group)
{
	return strcmp(rd_kafka_rebalance_protocol(group->member->handle), "COOPERATIVE") == 0;
}

/* The member itself reads nothing, whatever it was given. */
static void
answer(struct EsGroup *group)
{
	rd_kafka_t						*handle = group->member->handle;
	rd_kafka_topic_partition_list_t *none = rd_kafka_topic_partition_list_new(0);
	rd_kafka_error_t				*error = NULL;

	if (!is_cooperative(group))
		(void) rd_kafka_assign(handle, group->giving ? none : NULL);
	else if (group->giving)
		error = rd_kafka_incremental_assign(handle, none);
	else
		error = rd_kafka_incremental_unassign(handle, none);
	if (error != NULL)
		rd_kafka_error_destroy(error);
	rd_kafka_topic_partition_list_destroy(none);
	rd_kafka_topic_partition_list_destroy(group->going);
	group->going = rd_kafka_topic_partition_list_new(0);
	group->asked = group->lost = false;
}

/*
 * What was read of partitions that go: later than this they are another's.  In a
 * cooperative group there is a new generation already, of which they are ours as
 * long as we do not answer.
 */
static void
settle(EsSourceRun *run)
{
	struct EsGroup *group = run->group;
	uint32			sink;

	if (run->halt == ES_HALT_NONE && run->retry_at == 0 && run->leave == ES_LEAVE_NOT)
		es_batch_write(run);
	commit_offsets(run);
	/* Nothing is published while something is restored. */
	if (run->npartitions == 0 || run->restoring || group->lost || !group->shared)
		return;
	es_task_begin();
	sink = es_share_find_sink(run->source->id);
	es_task_commit(run->scratch);
	if (sink == 0)
		return;
	if (is_cooperative(group))
		note_share(run, true);
	es_share_drain(sink, DRAIN_MS);
}

/* It has taken so long that librdkafka has left the group, and joins it anew. */
static void
note_overdue(EsSourceRun *run)
{
	const char *what = "a batch took longer than max.poll.interval.ms";

	run->group->overdue = true;
	ereport(LOG, (errmsg("source \"%s\" has left group \"%s\": %s", run->source->name,
						 run->source->group_id, what),
				  errdetail("Its partitions are others' until it has joined again."),
				  errhint("Increase max.poll.interval.ms in consumer_properties, or "
						  "decrease flush_count.")));
	es_run_set_state(run, "joining", what);
}

/* Errors are all that a member can be sent: a right on the group that is missing, say. */
static void
poll_member(EsSourceRun *run)
{
	EsKafkaClient	   *member = run->group->member;
	rd_kafka_message_t *message;

	while ((message = rd_kafka_consumer_poll(member->handle, 0)) != NULL)
	{
		if (message->err == RD_KAFKA_RESP_ERR__MAX_POLL_EXCEEDED)
			note_overdue(run);
		else
			es_kafka_hear(member, message);
		rd_kafka_message_destroy(message);
	}
	es_kafka_note(member);
}

void
es_group_attend(EsSourceRun *run)
{
	if (run->group != NULL)
		poll_member(run);
}

/*
 * The member can do nothing any more: another has its group.instance.id, say.  The
 * next one comes after a pause that grows, or two of them would take it from each
 * other all the time.
 */
static void
leave_failed(EsSourceRun *run)
{
	static TimestampTz failed_at = 0;
	static int		   pause_ms = 0;
	TimestampTz		   now = GetCurrentTimestamp();

	if (TimestampDifferenceExceeds(failed_at, now, FAILED_LONG_AGO_MS))
		pause_ms = 0;
	failed_at = now;
	pause_ms = es_task_longer_pause(pause_ms, ES_TASK_PAUSE_MS, FAILED_PAUSE_MS);
	es_run_set_state(run, "disconnected", run->group->member->message);
	es_group_leave(run);
	run->pause_ms = pause_ms;
	run->leave = ES_LEAVE_AND_RETURN;
}

bool
es_group_serve(EsSourceRun *run)
{
	struct EsGroup *group = run->group;
	bool			changed;
	bool			shared;

	if (group == NULL)
		return false;
	poll_member(run);
	if (group->member->trouble == ES_KAFKA_FATAL)
	{
		leave_failed(run);
		return false;
	}
	if (!group->asked)
	{
		if (GetCurrentTimestamp() >= group->commit_at)
			commit_offsets(run);
		return false;
	}
	if (!group->giving)
		settle(run);
	else
		group->overdue = false;
	shared = group->shared && !group->changed;
	if (group->changed)
		note_share(run, false);
	answer(group);
	/* The same partitions, and another generation. */
	if (shared && group->giving)
		note_share(run, true);
	/* The coordinator has answered. */
	es_kafka_fine(group->member);
	changed = group->changed;
	group->changed = false;
	return changed;
}

void
es_group_wait(EsSourceRun *run, long timeout_ms)
{
	EsKafkaClient *clients[2] = {run->client};
	int			   n = 1;

	if (run->group != NULL)
	{
		clients[n++] = run->group->member;
		timeout_ms = Min(timeout_ms, ES_GROUP_SERVE_MS);
	}
	es_kafka_wait(clients, n, timeout_ms);
}

/* ---------------------------------------------------------------------------
 * Questions
 * ------------------------------------------------------------------------- */

bool
es_group_awaits(EsSourceRun *run)
{
	struct EsGroup *group = run->group;

	if (group == NULL || group->assigned)
		return false;
	if (group->member->trouble != ES_KAFKA_FINE)
		es_run_set_state(
			run, group->member->trouble == ES_KAFKA_DENIED ? "denied" : "disconnected",
			group->member->message);
	else
		es_run_set_state(
			run, "joining",
			psprintf(
				"group \"%s\" has not said which partitions it reads%s",
				run->source->group_id,
				group->overdue
					? " again, after a batch that took longer than max.poll.interval.ms"
					: ""));
	return true;
}

static rd_kafka_topic_partition_t *
find_owned(const EsSourceRun *run, int32 partition)
{
	return rd_kafka_topic_partition_list_find(run->group->owned, run->source->topic,
											  partition);
}

bool
es_group_has(const EsSourceRun *run, int32 partition)
{
	return find_owned(run, partition) != NULL;
}

bool
es_group_is_restored(const EsSourceRun *run, int32 partition)
{
	const rd_kafka_topic_partition_t *owned = find_owned(run, partition);

	return owned == NULL || owned->opaque == RESTORED;
}

void
es_group_note_restored(EsSourceRun *run, int32 partition)
{
	rd_kafka_topic_partition_t *owned = find_owned(run, partition);

	if (owned != NULL)
		owned->opaque = RESTORED;
}
