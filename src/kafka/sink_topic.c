/*
 * kafka/sink_topic.c
 *		The topic of a sink: is it there, and is it the one that was published to?
 *
 * A topic made anew under its name has nothing of what was published before, and
 * nobody who reads it would know.  It is told by
 *
 *		its id, where librdkafka and broker know that (topic_id.c);
 *		its having been missing, after something was published to it, where its id
 *		does not say that it is the same: a broker that has just come may not know it yet;
 *		its ends: the offset behind the last record that was acknowledged, of each
 *		partition.  One that ends before that, or acknowledges a lower one, is
 *		another one, or was cut.
 *
 * The sink stops then, until resume() lets it go on with this one.  What was
 * acknowledged is in sink_position with the position; a crash loses both alike.
 *
 * A store's changelog topic is what other servers restore it from, so it must not
 * go on with a part of it.  What its source has restored from it counts for its
 * ends, too; and after resume() the store's changelog, with all that was restored
 * (sink_backlog.c), is published once more from its first event on, with what was restored from the former topic (again_to).  The
 * source may notice first, as it begins to restore (restore.c): then resume() is meant
 * for what we have yet to notice.
 *
 * Others.  Where the source's partitions are taken by hand, two servers may have the
 * same by mistake, and nothing fences one of them: that would take a transaction for
 * each batch, with an id for each partition, and readers that know of them.  Who
 * wants that has group_id (share.c).  But it is noticed (delivery.c), and said as
 * long as this client lives.
 *
 * A partition's end may be told too low for a moment, by a broker that has just
 * become its leader: so it is asked again before it counts.
 */
#include "postgres.h"

#include "kafka/sink_run.h"

#include "catalog/pg_type.h"
#include "spi.h"
#include "utils/builtins.h"

/* So many times in a row. */
#define CHECKS 3

/* ---------------------------------------------------------------------------
 * The table
 * ------------------------------------------------------------------------- */

static void
note_topic(EsSinkRun *run, const char *id)
{
	Oid	  types[2] = {INT4OID, TEXTOID};
	Datum values[2] = {Int32GetDatum((int32) run->sink->id), CStringGetTextDatum(id)};

	es_task_begin();
	(void) es_spi_execute_as_owner("UPDATE eventstore.sink_position SET topic_id = $2"
								   " WHERE sink = $1",
								   2, types, values, NULL, SPI_OK_UPDATE);
	es_task_commit(run->scratch);
}

/* Of a changelog: all is published again, and nothing was restored from this topic. */
static void
begin_again(EsSinkRun *run)
{
	Oid	  types[1] = {INT4OID};
	Datum values[1] = {Int32GetDatum((int32) run->sink->id)};

	(void) es_spi_execute_as_owner(
		"UPDATE eventstore.sink_position p SET position = 0,"
		" known_to = GREATEST(p.known_to, p.position),"
		" again_to = GREATEST(p.again_to, p.position,"
		" eventstore.collection_head(s.collection))"
		" FROM eventstore.sink s WHERE s.id = $1 AND p.sink = s.id",
		1, types, values, NULL, SPI_OK_UPDATE);
	(void) es_spi_execute_as_owner(
		"DELETE FROM eventstore.source_offset o USING eventstore.source f,"
		" eventstore.sink s WHERE s.id = $1 AND f.id = s.changelog_of AND o.source = f.id"
		" AND o.topic = s.topic"
		" AND o.partition <> ALL (COALESCE(f.replica_partitions, '{}'))",
		1, types, values, NULL, SPI_OK_DELETE);
}

void
es_sink_topic_accept(EsSinkRun *run)
{
	Oid	  types[1] = {INT4OID};
	Datum values[1] = {Int32GetDatum((int32) run->sink->id)};

	run->accepting = true;
	if (!es_sink_backlog_finish(run))
		return;
	es_task_begin();
	(void) es_spi_execute_as_owner("UPDATE eventstore.sink_position"
								   " SET topic_id = NULL, ends = NULL WHERE sink = $1",
								   1, types, values, NULL, SPI_OK_UPDATE);
	if (run->sink->changelog_of != 0)
		begin_again(run);
	es_task_commit(run->scratch);
	run->accepting = run->topic_missing = false;
	run->leave = ES_LEAVE_AND_RETURN;
}

/* ---------------------------------------------------------------------------
 * Is it the same?
 * ------------------------------------------------------------------------- */

bool
es_sink_has_published(const EsSink *sink)
{
	for (int i = 0; i < sink->nends; i++)
		if (sink->ends[i] > 0)
			return true;
	return false;
}

char *
es_sink_doubt_end(int32 partition, int64 end, int64 had)
{
	if (end >= had)
		return NULL;
	return psprintf("partition %d ends at offset " INT64_FORMAT ", and had " INT64_FORMAT
					": the topic was truncated or made anew",
					partition, end, had);
}

/* Why the partition is not the one that it was; NULL.  *known is false where Kafka does not say. */
static const char *
doubt_partition(EsSinkRun *run, int32 partition, int64 end, bool *known)
{
	int64 low;
	int64 high;

	if (rd_kafka_query_watermark_offsets(run->client->handle, run->sink->topic, partition,
										 &low, &high,
										 ES_RUN_CALL_MS) != RD_KAFKA_RESP_ERR_NO_ERROR)
	{
		*known = false;
		return NULL;
	}
	return es_sink_doubt_end(partition, high, end);
}

/* Of replica partitions the source sees to that itself. */
static void
raise_ends(EsSinkRun *run, int64 **ends, int *n)
{
	static const char sql[] =
		"SELECT o.partition, o.next_offset FROM eventstore.source_offset o"
		" JOIN eventstore.source f ON f.id = o.source WHERE f.id = $1 AND o.topic = $2"
		" AND o.partition <> ALL (COALESCE(f.replica_partitions, '{}'))"
		" ORDER BY o.partition DESC";
	Oid			 types[2] = {INT4OID, TEXTOID};
	Datum		 values[2] = {Int32GetDatum((int32) run->sink->changelog_of),
							  CStringGetTextDatum(run->sink->topic)};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, 2, types, values, NULL, true, SPI_OK_SELECT);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		HeapTuple row = SPI_tuptable->vals[i];
		TupleDesc desc = SPI_tuptable->tupdesc;
		bool	  isnull;
		int32	  number = DatumGetInt32(SPI_getbinval(row, desc, 1, &isnull));

		if (number >= *n)
		{
			int64 *more = MemoryContextAllocZero(run->life, sizeof(int64) * (number + 1));

			if (*n > 0)
				memcpy(more, *ends, sizeof(int64) * *n);
			*ends = more;
			*n = number + 1;
		}
		(*ends)[number] =
			Max((*ends)[number], DatumGetInt64(SPI_getbinval(row, desc, 2, &isnull)));
	}
	SPI_finish();
	es_role_restore(&saved);
}

void
es_sink_topic_note_restored(EsSinkRun *run)
{
	if (run->sink->changelog_of != 0 && es_delivery_is_empty(&run->delivery))
		raise_ends(run, &run->delivery.ends, &run->delivery.nends);
}

static const char *
doubt_topic(EsSinkRun *run, int count, bool *known)
{
	const EsSink *sink = run->sink;
	char		  id[ES_TOPIC_ID_SIZE];
	const char	 *doubt = NULL;

	*known = true;
	es_kafka_topic_id(run->client, sink->topic, ES_RUN_CALL_MS, id);
	if (run->topic_missing && es_sink_has_published(sink) &&
		!es_kafka_is_same_topic(sink->topic_id, id))
		return "the topic was deleted and made anew";
	doubt =
		es_sink_has_published(sink) ? es_kafka_doubt_topic_id(sink->topic_id, id) : NULL;
	if (doubt != NULL)
		return doubt;
	for (int i = 0; i < sink->nends && *known && doubt == NULL; i++)
	{
		if (sink->ends[i] > 0 && i >= count)
			doubt = "the topic has fewer partitions than it had";
		else if (sink->ends[i] > 0)
			doubt = doubt_partition(run, i, sink->ends[i], known);
	}
	if (*known && doubt == NULL && id[0] != '\0')
		note_topic(run, id);
	return doubt;
}

/* With as many partitions: what is acknowledged is noted from now on. */
static void
begin_ends(EsSinkRun *run, int count)
{
	const EsSink *sink = run->sink;

	run->delivery.ends = MemoryContextAllocZero(run->life, sizeof(int64) * count);
	run->delivery.nends = count;
	if (sink->nends > 0)
		memcpy(run->delivery.ends, sink->ends, sizeof(int64) * Min(count, sink->nends));
	run->delivery.topic = run->topic;
	run->delivery.went_back = false;
	/* A changelog topic's partition is one server's to write. */
	run->delivery.nunbroken = sink->changelog_of != 0 && !sink->exactly_once ? count : 0;
	run->delivery.unbroken = MemoryContextAllocZero(run->life, sizeof(int64) * count);
	run->delivery.broken_in = -1;
	run->warning[0] = '\0';
}

void
es_sink_topic_note_others(EsSinkRun *run)
{
	if (run->delivery.broken_in < 0 || run->warning[0] != '\0')
		return;
	snprintf(run->warning, sizeof(run->warning),
			 "somebody else writes to partition %d of the changelog topic: the record at "
			 "offset " INT64_FORMAT " is not of this server",
			 run->delivery.broken_in, run->delivery.broken_at);
	ereport(WARNING,
			(errmsg("source \"%s\": %s", run->sink->name, run->warning),
			 errdetail("An older value may come behind a newer one of the same key."),
			 errhint("Each partition is to be read, and its keys changed, on one server: "
					 "see partitions, replica_partitions and group_id.")));
	if (strcmp(run->state, "running") == 0)
		es_sink_set_state(run, "running", "");
}

bool
es_sink_topic_check(EsSinkRun *run, int count)
{
	bool		known;
	const char *doubt;

	if (run->sink->changelog_of != 0)
	{
		es_task_begin();
		raise_ends(run, &run->sink->ends, &run->sink->nends);
		es_task_commit(run->scratch);
	}
	doubt = doubt_topic(run, count, &known);
	if (!known)
		return false;
	if (doubt != NULL && ++run->doubts < CHECKS)
		return false;
	run->doubts = 0;
	begin_ends(run, count);
	if (doubt != NULL)
		es_sink_stop_at(run, ES_SINK_RECREATED, doubt);
	else
		run->topic_missing = false;
	return true;
}

/* ---------------------------------------------------------------------------
 * Is it there?
 * ------------------------------------------------------------------------- */

int
es_sink_topic_count(EsSinkRun *run)
{
	rd_kafka_resp_err_t error;
	const char		   *state;
	int					count =
		es_kafka_count_partitions(run->client, run->topic, ES_RUN_CALL_MS, &error);

	if (count > 0)
		return count;
	state = es_sink_state_for(error);
	if (strcmp(state, "topic_missing") == 0)
	{
		run->topic_missing = true;
		es_sink_set_state(run, state,
						  psprintf("there is no topic \"%s\"", run->sink->topic));
	}
	else if (error != RD_KAFKA_RESP_ERR_NO_ERROR)
		es_sink_set_state(run,
						  strcmp(state, "denied") == 0 ||
								  run->client->trouble == ES_KAFKA_DENIED
							  ? "denied"
							  : "disconnected",
						  run->client->message[0] != '\0' ? run->client->message
														  : rd_kafka_err2str(error));
	return 0;
}
