/*
 * kafka/topic.c
 *		The topic of a source: partitions, where they begin, gaps in them.
 *
 * Where to read from is what the table says (progress.c).  A partition that the
 * source has not begun with begins where 'start' says; one that comes later, at
 * its beginning, or its first records would be lost.
 *
 * Whatever makes the next offset another one than that behind the last record
 * (a gap, a topic made anew) is written to the table first; then the client is
 * closed, and the next one reads from there.
 *
 * Locks: those of progress.c, for the time of a transaction, in which Kafka is
 * never waited for.
 */
#include "postgres.h"

#include "kafka/batch.h"
#include "kafka/group.h"
#include "kafka/restore.h"
#include "kafka/task.h"
#include "kafka/topic.h"

#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"

/* How often the topic itself is looked at; where it is gone. */
#define LOOK_MS		  5000
#define LOOK_AGAIN_MS 1000

/*
 * At a partition's end there may be offsets without a record (marks of
 * transactions, compacted records): they are passed, or there would be a lag
 * for ever.
 */
void
es_topic_pass_holes(EsSourceRun *run)
{
	bool holes = false;

	if (run->nrecords > 0 || run->halt != ES_HALT_NONE)
		return;
	for (int i = 0; i < run->npartitions; i++)
		holes =
			holes || run->partitions[i].seen_end > run->partitions[i].progress.written;
	if (!holes)
		return;
	es_task_begin();
	if (es_task_hold(es_source_key(run->source->id)))
	{
		EsProgress *moves = palloc(sizeof(EsProgress) * run->npartitions);
		int			n = 0;

		for (int i = 0; i < run->npartitions; i++)
		{
			EsProgress *progress = &run->partitions[i].progress;

			progress->next = Max(progress->written, run->partitions[i].seen_end);
			progress->end = progress->next;
			if (progress->next > progress->written)
				moves[n++] = *progress;
		}
		es_run_advance(run, moves, n);
	}
	else
		run->leave = ES_LEAVE_AND_RETURN;
	es_task_commit(run->scratch);
	if (run->leave == ES_LEAVE_NOT)
		es_run_note_advanced(run);
}

/* ---------------------------------------------------------------------------
 * Gaps
 * ------------------------------------------------------------------------- */

/* Moves the partition in the table; the client begins anew from there. */
static void
jump(EsSourceRun *run, EsPartition *partition, int64 to, const char *reason)
{
	es_task_begin();
	if (es_task_hold(es_source_key(run->source->id)))
		(void) es_progress_jump(run->source, &partition->progress, to, reason);
	es_task_commit(run->scratch);
	run->leave = ES_LEAVE_AND_RETURN;
}

/* The low and high end of a partition; false where they cannot be had now. */
bool
es_topic_find_ends(EsSourceRun *run, const EsPartition *partition, int64 *low,
				   int64 *high)
{
	return rd_kafka_query_watermark_offsets(run->client->handle,
											partition->progress.topic,
											partition->progress.partition, low, high,
											ES_RUN_CALL_MS) == RD_KAFKA_RESP_ERR_NO_ERROR;
}

/*
 * With one request for each broker: it answers one behind the other, and what comes
 * behind a fetch only when that has waited for records as long as it may.
 */
bool
es_topic_find_all_ends(EsSourceRun *run, int64 *ends)
{
	rd_kafka_topic_partition_list_t *list =
		rd_kafka_topic_partition_list_new(run->npartitions);
	bool known = true;

	/* Among the times that one may ask for the end is one, too. */
	for (int i = 0; i < run->npartitions; i++)
		rd_kafka_topic_partition_list_add(list, run->partitions[i].progress.topic,
										  run->partitions[i].progress.partition)
			->offset = RD_KAFKA_OFFSET_END;
	rd_kafka_topic_partition_list_sort(list, NULL, NULL);
	if (run->npartitions > 0)
		known = rd_kafka_offsets_for_times(run->client->handle, list, ES_RUN_CALL_MS) ==
				RD_KAFKA_RESP_ERR_NO_ERROR;
	for (int i = 0; known && i < run->npartitions; i++)
	{
		const EsProgress				 *progress = &run->partitions[i].progress;
		const rd_kafka_topic_partition_t *answer = rd_kafka_topic_partition_list_find(
			list, progress->topic, progress->partition);

		known = answer->err == RD_KAFKA_RESP_ERR_NO_ERROR;
		ends[i] = answer->offset;
	}
	rd_kafka_topic_partition_list_destroy(list);
	return known;
}

/* The offset that we want is not there.  What was read before comes first. */
void
es_topic_out_of_range(EsSourceRun *run, EsPartition *partition)
{
	int64 wanted;
	int64 low;
	int64 high;

	/* Another partition's is dealt with: this one's comes again. */
	if (run->halt != ES_HALT_NONE || run->leave != ES_LEAVE_NOT)
		return;
	es_batch_write(run);
	wanted = partition->progress.written;
	/* It may have been the record before that was asked for, and is gone. */
	run->unprobed = partition->probing;
	if (run->halt != ES_HALT_NONE || run->leave != ES_LEAVE_NOT || run->nrecords > 0 ||
		!es_topic_find_ends(run, partition, &low, &high) ||
		(wanted >= low && (wanted <= high || run->restoring)))
	{
		/*
		 * And ask again; not at once, for what is in the way may last.  Where a restore
		 * wants more than there is, the next client waits until that is accepted
		 * (restore.c).
		 */
		run->leave = ES_LEAVE_AND_RETURN;
		if (!run->unprobed)
			run->pause_ms = ES_TASK_PAUSE_MS;
		return;
	}
	run->halted_topic = partition->progress.topic;
	if (wanted > high)
		es_run_stop_at(
			run, ES_HALT_RECREATED,
			psprintf("partition %d ends at offset " INT64_FORMAT ", and " INT64_FORMAT
					 " was to be read next: the topic was truncated or made anew",
					 partition->progress.partition, high, wanted));
	else if (run->source->on_gap == ES_GAP_STOP && !run->accept_gap)
		es_run_stop_at(run, ES_HALT_GAP,
					   psprintf("partition %d begins at offset " INT64_FORMAT
								", and " INT64_FORMAT " was to be read next",
								partition->progress.partition, low, wanted));
	else
		jump(run, partition, run->source->on_gap == ES_GAP_LATEST ? high : low,
			 "retention");
}

/* In a topic made anew all partitions begin anew. */
static void
restart(EsSourceRun *run)
{
	es_task_begin();
	if (es_task_hold(es_source_key(run->source->id)))
	{
		es_progress_restart(run->source, run->halted_topic, "the topic was made anew");
		if (strcmp(run->halted_topic, es_topic_followed(run->source)) == 0)
			es_progress_note_topic(run->source, "");
	}
	es_task_commit(run->scratch);
}

/* What of it Kafka does not tell now, the next client meets. */
static void
pass_gaps(EsSourceRun *run)
{
	for (int i = 0; i < run->npartitions; i++)
	{
		EsPartition *partition = &run->partitions[i];
		int64		 low;
		int64		 high;

		if (!es_topic_find_ends(run, partition, &low, &high))
			return;
		if (partition->progress.written < low)
			jump(run, partition, low, "retention");
	}
}

/*
 * A record is tried again as it is.  Else the table says first what was accepted, and
 * the client begins anew: until that one reads, the source is shown as it was.
 */
void
es_topic_accept_halt(EsSourceRun *run)
{
	/* It counts until all partitions have answered: there may be more gaps. */
	run->accept_gap = run->halt == ES_HALT_GAP;
	if (run->halt == ES_HALT_RECORD)
	{
		run->halt = ES_HALT_NONE;
		es_run_set_state(run, "running", "");
		return;
	}
	if (run->halt == ES_HALT_GAP)
		pass_gaps(run);
	else
	{
		/* Where that fails the next client does it. */
		run->accept_other = true;
		restart(run);
		run->accept_other = false;
	}
	run->leave = ES_LEAVE_AND_RETURN;
}

/* ---------------------------------------------------------------------------
 * The topic
 * ------------------------------------------------------------------------- */

static bool
is_wanted_partition(EsSourceRun *run, int32 number)
{
	if (run->group != NULL)
		return es_group_has(run, number);
	if (run->source->npartitions == 0)
		return true;
	for (int i = 0; i < run->source->npartitions; i++)
		if (run->source->partitions[i] == number)
			return true;
	return false;
}

/* The broker does not answer; once the source runs a slow one is no news. */
static void
show_silence(EsSourceRun *run, const char *error)
{
	EsKafkaTrouble trouble = run->client->trouble;

	if (trouble == ES_KAFKA_FINE && run->npartitions > 0)
		return;
	es_run_set_state(run, trouble == ES_KAFKA_DENIED ? "denied" : "disconnected",
					 run->client->message[0] != '\0' ? run->client->message : error);
}

/* Was something of the topic read already? */
static bool
has_read(const EsProgress *loaded, int n)
{
	for (int i = 0; i < n; i++)
		if (loaded[i].written > 0)
			return true;
	return false;
}

/*
 * How many partitions the topic has; 0 where that cannot be told, or there is
 * none: the state says why.
 */
int
es_topic_count_partitions(EsSourceRun *run, const char *name)
{
	rd_kafka_topic_t			   *topic;
	const struct rd_kafka_metadata *metadata;
	rd_kafka_resp_err_t				error;
	int								count = 0;

	topic = rd_kafka_topic_new(run->client->handle, name, NULL);
	error = rd_kafka_metadata(run->client->handle, 0, topic, &metadata, ES_RUN_CALL_MS);
	rd_kafka_topic_destroy(topic);
	if (error != RD_KAFKA_RESP_ERR_NO_ERROR)
	{
		show_silence(run, rd_kafka_err2str(error));
		return 0;
	}
	es_kafka_fine(run->client);
	if (metadata->topic_cnt > 0)
	{
		error = metadata->topics[0].err;
		count = metadata->topics[0].partition_cnt;
	}
	rd_kafka_metadata_destroy(metadata);
	if (error == RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED)
		es_run_set_state(run, "denied", rd_kafka_err2str(error));
	else if (error == RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART)
	{
		run->topic_missing |= strcmp(name, es_topic_followed(run->source)) == 0;
		es_run_set_state(run, "topic_missing",
						 psprintf("there is no topic \"%s\"", name));
	}
	else if (error == RD_KAFKA_RESP_ERR_NO_ERROR && count > 0)
		return count;
	return 0;
}

/* Who changes the store by SQL goes by it, also where not all partitions are read. */
static void
note_count(EsSourceRun *run, int count)
{
	if (count == run->source->partition_count)
		return;
	if (run->source->partition_count > 0 && count > run->source->partition_count)
		ereport(LOG,
				(errmsg("source \"%s\": the topic has %d partitions, and had %d",
						run->source->name, count, run->source->partition_count),
				 errdetail("Records of a key may be in another partition than older ones "
						   "of it; between the two there is no order.")));
	es_task_begin();
	es_progress_note_count(run->source, count);
	es_task_commit(run->scratch);
	run->source->partition_count = count;
}

/* Why it is not the one that was read, by its id; NULL. */
static char *
doubt_id(EsSourceRun *run, char *id)
{
	es_kafka_topic_id(run->client, es_topic_followed(run->source), ES_RUN_CALL_MS, id);
	return es_kafka_doubt_topic_id(run->source->topic_id, id);
}

bool
es_topic_look(EsSourceRun *run)
{
	bool was_missing = run->topic_missing;
	char id[ES_TOPIC_ID_SIZE];
	int	 count;
	int	 wanted = 0;

	run->look_at = es_run_ms_from_now(LOOK_MS);
	if (run->halt != ES_HALT_NONE)
		return false;
	count = es_topic_count_partitions(run, es_topic_followed(run->source));
	if (count == 0)
	{
		if (run->topic_missing)
			es_batch_write(run);
		run->look_at = es_run_ms_from_now(LOOK_AGAIN_MS);
		return false;
	}
	note_count(run, count);
	if (was_missing)
	{
		/* The next client finds out whether that matters. */
		es_batch_write(run);
		run->leave = ES_LEAVE_AND_RETURN;
		return false;
	}
	for (int32 i = 0; i < count; i++)
		if (is_wanted_partition(run, i))
			wanted++;
	if (doubt_id(run, id) != NULL)
	{
		es_batch_write(run);
		run->leave = ES_LEAVE_AND_RETURN;
	}
	else if (!run->restoring && wanted > run->npartitions - run->source->nreplicas &&
			 run->group == NULL)
		run->leave = ES_LEAVE_AND_RETURN;
	else
		es_run_show_connection(run);
	return run->leave == ES_LEAVE_NOT;
}

/* ---------------------------------------------------------------------------
 * Beginning
 * ------------------------------------------------------------------------- */

const char *
es_topic_followed(const EsSource *source)
{
	return source->mode == ES_SOURCE_REPLICA ? source->changelog_topic : source->topic;
}

/* The offset that "start" names for a partition; -1: none. */
static int64
named_offset(EsSourceRun *run, int32 partition)
{
	char	   *key = psprintf("%d", partition);
	JsonbValue	buffer;
	JsonbValue *value = getKeyJsonValueFromContainer(&run->source->start_offsets->root,
													 key, strlen(key), &buffer);

	if (value == NULL || value->type != jbvNumeric)
		return -1;
	return DatumGetInt64(
		DirectFunctionCall1(numeric_int8, NumericGetDatum(value->val.numeric)));
}

/* The first offset of that time or later, or the end. */
static bool
find_time(EsSourceRun *run, int32 partition, int64 *offset)
{
	rd_kafka_topic_partition_list_t *list = rd_kafka_topic_partition_list_new(1);
	rd_kafka_resp_err_t				 error;

	rd_kafka_topic_partition_list_add(list, es_topic_followed(run->source), partition)
		->offset = es_codec_kafka_time(run->source->start_time);
	error = rd_kafka_offsets_for_times(run->client->handle, list, ES_RUN_CALL_MS);
	if (error == RD_KAFKA_RESP_ERR_NO_ERROR)
		error = list->elems[0].err;
	*offset = list->elems[0].offset;
	rd_kafka_topic_partition_list_destroy(list);
	return error == RD_KAFKA_RESP_ERR_NO_ERROR;
}

/* Where to begin with a partition that was not begun; false where Kafka does not say now. */
static bool
find_start(EsSourceRun *run, int32 partition, EsStart start, int64 *offset)
{
	int64 low;
	int64 high;

	if (rd_kafka_query_watermark_offsets(
			run->client->handle, es_topic_followed(run->source), partition, &low, &high,
			ES_RUN_CALL_MS) != RD_KAFKA_RESP_ERR_NO_ERROR)
		return false;
	*offset = low;
	if (start == ES_START_LATEST)
		*offset = high;
	else if (start == ES_START_OFFSETS && named_offset(run, partition) >= 0)
		*offset = named_offset(run, partition);
	else if (start == ES_START_TIME)
	{
		if (!find_time(run, partition, offset))
			return false;
		if (*offset < 0)
			*offset = high;
	}
	return true;
}

static bool
has_progress(const EsProgress *loaded, int n, int32 partition)
{
	for (int i = 0; i < n; i++)
		if (loaded[i].partition == partition)
			return true;
	return false;
}

bool
es_topic_find_start(EsSourceRun *run, int32 partition, int64 *offset)
{
	EsProgress *loaded;
	int			n = es_run_load_progress(run, es_topic_followed(run->source), &loaded);
	EsStart start = n == 0 || run->group != NULL ? run->source->start : ES_START_EARLIEST;
	bool	known = true;

	*offset = -1;
	if (run->group != NULL &&
		(start == ES_START_LATEST || run->source->mode == ES_SOURCE_RELAY))
	{
		known = es_group_find_committed(run, partition, offset);
		if (n > 0 && start == ES_START_LATEST)
			start = ES_START_EARLIEST;
	}
	if (known && (*offset >= 0 || find_start(run, partition, start, offset)))
		return true;
	es_run_set_state(run, "disconnected", "the broker does not tell the topic's offsets");
	return false;
}

/*
 * Begins with the partitions in 'begin'.  One that comes later is read from its
 * beginning, or its first records would be lost.  False where that cannot be done
 * now.  Kafka is asked first: no transaction waits for it.
 */
static bool
begin_partitions(EsSourceRun *run, const bool *begin, int count)
{
	int64 *offsets = palloc0(sizeof(int64) * count);

	for (int32 i = 0; i < count; i++)
		if (begin[i] && !es_topic_find_start(run, i, &offsets[i]))
			return false;
	note_count(run, count);
	es_task_begin();
	for (int32 i = 0; i < count; i++)
		if (begin[i])
			es_progress_begin(run->source, es_topic_followed(run->source), i, offsets[i]);
	es_task_commit(run->scratch);
	return true;
}

/*
 * A relay's partitions go on where the group is, if that is later: what it says was
 * published with it (relay.c).  False where it is not known now.
 */
static bool
follow_group(EsSourceRun *run, const bool *begin, int count)
{
	EsProgress *moves;
	int			n = es_run_load_progress(run, run->source->topic, &moves);
	int			nmoves = 0;
	bool		moved = true;

	for (int i = 0; i < n; i++)
	{
		EsProgress move = moves[i];

		if (move.partition >= count || !begin[move.partition])
			continue;
		if (!es_group_find_committed(run, move.partition, &move.next))
		{
			es_run_set_state(run, "joining", "where the group is, is not settled yet");
			return false;
		}
		move.has_time = false;
		if (move.next > move.written)
			moves[nmoves++] = move;
	}
	es_task_begin();
	moved = es_task_hold(es_source_key(run->source->id)) &&
			es_progress_advance(run->source, moves, nmoves);
	es_task_commit(run->scratch);
	for (int32 i = 0; moved && i < count; i++)
		if (begin[i])
			es_group_note_restored(run, i);
	return moved;
}

/*
 * Why the topic is another one, by its name's having come again; NULL.  *known is false
 * where that cannot be told now.
 */
static const char *
doubt_topic(EsSourceRun *run, bool was_read, bool *known)
{
	char  id[ES_TOPIC_ID_SIZE];
	char *doubt = doubt_id(run, id);
	bool  was_missing = was_read && run->topic_missing &&
					   !es_kafka_is_same_topic(run->source->topic_id, id);

	/* A broker that has just come may know it no sooner than the one that was asked. */
	*known = !was_missing || run->source->topic_id == NULL || id[0] != '\0' ||
			 ++run->unidentified >= ES_TOPIC_ID_CHECKS;
	if (was_missing)
		return "the topic was deleted and made anew";
	if (was_read && doubt != NULL)
		return MemoryContextStrdup(run->life, doubt);
	if (id[0] == '\0' || (run->source->topic_id != NULL && doubt == NULL))
		return NULL;
	es_task_begin();
	es_progress_note_topic(run->source, id);
	es_task_commit(run->scratch);
	run->source->topic_id = MemoryContextStrdup(run->life, id);
	return NULL;
}

/* False where it is not known whether the topic is the same. */
static bool
add_partitions(EsSourceRun *run, int count)
{
	EsProgress *loaded;
	int			n = es_run_load_progress(run, es_topic_followed(run->source), &loaded);
	bool		known;

	run->suspicion = doubt_topic(run, has_read(loaded, n), &known);
	if (!known)
		return false;
	if (run->partitions != NULL)
		pfree(run->partitions);
	run->partitions = MemoryContextAllocZero(run->life, sizeof(EsPartition) * Max(n, 1));
	run->npartitions = 0;
	for (int i = 0; i < n; i++)
		if (loaded[i].partition >= count)
		{
			if (loaded[i].written > 0)
				run->suspicion = "the topic has fewer partitions than it had";
		}
		else if (is_wanted_partition(run, loaded[i].partition))
		{
			EsPartition *partition = &run->partitions[run->npartitions++];

			partition->progress = loaded[i];
			partition->position = loaded[i].written;
			partition->from_changelog = run->source->mode == ES_SOURCE_REPLICA;
		}
	return true;
}

/*
 * Those of 'count' partitions that are wanted, begun and ready, or those that are
 * to be restored before that; false where that cannot be now.
 */
bool
es_topic_load_partitions(EsSourceRun *run, int count)
{
	const EsSource *source = run->source;
	EsProgress	   *loaded;
	bool		   *begin = palloc0(sizeof(bool) * count);
	bool			ready;
	int n = es_run_load_progress(run, es_topic_followed(run->source), &loaded);

	run->restoring = run->guarded = false;
	if (!es_restore_refill(run, loaded, n, count))
		return false;
	for (int32 i = 0; i < count; i++)
		begin[i] = is_wanted_partition(run, i) &&
				   (run->group != NULL && source->changelog_topic != NULL
						? !es_group_is_restored(run, i)
						: !has_progress(loaded, n, i));
	if (source->mode == ES_SOURCE_PRIMARY && source->changelog_topic != NULL &&
		es_restore_begin(run, begin, count, &ready))
		return ready;
	if (!begin_partitions(run, begin, count) ||
		(source->mode == ES_SOURCE_RELAY && run->group != NULL &&
		 !follow_group(run, begin, count)))
		return false;
	return add_partitions(run, count) && es_restore_follow(run);
}

/*
 * Where to read from: one record before the one that is wanted, if its time is
 * known (es_topic_recognise).
 */
static int64
first_offset(EsSourceRun *run, EsPartition *partition)
{
	partition->probing =
		!run->unprobed && partition->progress.has_time && partition->position > 0;
	return partition->position - (partition->probing ? 1 : 0);
}

void
es_topic_assign(EsSourceRun *run)
{
	rd_kafka_topic_partition_list_t *list;
	rd_kafka_resp_err_t				 error;

	run->topic_missing = run->fetch_denied = false;
	run->look_at = es_run_ms_from_now(LOOK_MS);
	if (run->suspicion != NULL)
	{
		run->halted_topic = es_topic_followed(run->source);
		es_run_stop_at(run, ES_HALT_RECREATED, run->suspicion);
		return;
	}
	list = rd_kafka_topic_partition_list_new(run->npartitions);
	for (int i = 0; i < run->npartitions; i++)
		rd_kafka_topic_partition_list_add(list, run->partitions[i].progress.topic,
										  run->partitions[i].progress.partition)
			->offset = first_offset(run, &run->partitions[i]);
	run->unprobed = false;
	error = rd_kafka_assign(run->client->handle, list);
	rd_kafka_topic_partition_list_destroy(list);
	if (error != RD_KAFKA_RESP_ERR_NO_ERROR)
		ereport(ERROR, (errcode(ERRCODE_FDW_ERROR),
						errmsg("source \"%s\" cannot read topic \"%s\"",
							   run->source->name, run->source->topic),
						errdetail_internal("%s", rd_kafka_err2str(error))));
	es_run_set_state(run, run->restoring ? "restoring" : "running", "");
}

void
es_topic_recognise(EsSourceRun *run, const rd_kafka_message_t *message)
{
	EsPartition				 *partition = es_run_partition_of(run, message);
	rd_kafka_timestamp_type_t type;
	TimestampTz				  time;
	char					 *doubt;

	if (partition == NULL || !partition->probing ||
		(message->err != RD_KAFKA_RESP_ERR_NO_ERROR &&
		 message->err != RD_KAFKA_RESP_ERR__PARTITION_EOF))
		return;
	partition->probing = false;
	if (message->offset >= partition->position)
		return;
	if (message->err == RD_KAFKA_RESP_ERR_NO_ERROR &&
		es_codec_time(rd_kafka_message_timestamp(message, &type), &time) &&
		time == partition->progress.time)
		return;
	run->halted_topic = partition->progress.topic;
	doubt = psprintf("partition %d, offset " INT64_FORMAT
					 " is not the record that was read: the topic was made anew",
					 message->partition, message->offset);
	es_run_stop_at(run, ES_HALT_RECREATED,
				   run->restoring ? es_restore_doubt(run, doubt) : doubt);
}
