/*
 * kafka/run.c
 *		What the parts of a source's worker have in common: its state, its
 *		transactions, its partitions.
 *
 * source.c is the loop, batch.c writes, topic.c sees to the topic and its
 * partitions.  All run in the worker's only thread.
 */
#include "postgres.h"

#include "kafka/run.h"
#include "utils/timestamp.h"
#include "worker/launcher.h"

void
es_run_set_state(EsSourceRun *run, const char *name, const char *message)
{
	if (strcmp(run->state, name) != 0 && strcmp(name, "running") != 0 &&
		strcmp(name, "starting") != 0)
		ereport(LOG, (errmsg("source \"%s\": %s", run->source->name, name),
					  message[0] != '\0' ? errdetail_internal("%s", message) : 0));
	strlcpy(run->state, name, sizeof(run->state));
	es_worker_report(run->source->name, name, message);
}

/* What is wrong with the connection, unless something else is, too. */
void
es_run_show_connection(EsSourceRun *run)
{
	const char *const names[] = {run->restoring ? "restoring" : "running", "disconnected",
								 "denied", "disconnected"};

	if (run->halt != ES_HALT_NONE || run->topic_missing || run->fetch_denied ||
		run->retry_at != 0)
		return;
	if (strcmp(run->state, names[run->client->trouble]) != 0)
		es_run_set_state(run, names[run->client->trouble],
						 run->client->trouble == ES_KAFKA_FINE ? ""
															   : run->client->message);
	if (run->client->trouble == ES_KAFKA_FATAL)
	{
		run->leave = ES_LEAVE_AND_RETURN;
		run->pause_ms = ES_TASK_PAUSE_MS;
	}
}

void
es_run_stop_at(EsSourceRun *run, EsHalt reason, const char *message)
{
	static const char *const names[] = {"", "stopped", "gap", "topic_recreated"};

	run->halt = reason;
	es_run_set_state(run, names[reason], message);
}

TimestampTz
es_run_ms_from_now(int ms)
{
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), ms);
}

int
es_run_load_progress(EsSourceRun *run, const char *topic, EsProgress **loaded)
{
	MemoryContext old;
	int			  n;

	es_task_begin();
	old = MemoryContextSwitchTo(run->scratch);
	n = es_progress_load(run->source, topic, loaded);
	MemoryContextSwitchTo(old);
	es_task_commit(run->scratch);
	return n;
}

EsPartition *
es_run_partition(EsSourceRun *run, const char *topic, int32 number)
{
	for (int i = 0; i < run->npartitions; i++)
		if (run->partitions[i].progress.partition == number &&
			strcmp(run->partitions[i].progress.topic, topic) == 0)
			return &run->partitions[i];
	return NULL;
}

EsPartition *
es_run_partition_of(EsSourceRun *run, const rd_kafka_message_t *message)
{
	return message->rkt == NULL ? NULL
								: es_run_partition(run, rd_kafka_topic_name(message->rkt),
												   message->partition);
}

bool
es_run_all_answered(const EsSourceRun *run)
{
	for (int i = 0; i < run->npartitions; i++)
		if (!run->partitions[i].answered)
			return false;
	return true;
}

bool
es_run_all_ended(const EsSourceRun *run)
{
	for (int i = 0; i < run->npartitions; i++)
		if (!run->partitions[i].ended)
			return false;
	return true;
}

void
es_run_advance(EsSourceRun *run, const EsProgress *moves, int n)
{
	if (es_progress_advance(run->source, moves, n))
		return;
	run->leave = ES_LEAVE_AND_RETURN;
	run->pause_ms = ES_TASK_PAUSE_MS;
	ereport(LOG, (errmsg("offsets of source \"%s\" were moved by somebody else",
						 run->source->name),
				  errdetail("They are read again.")));
	ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
					errmsg("offsets of source \"%s\" were moved by somebody else",
						   run->source->name)));
}

void
es_run_note_advanced(EsSourceRun *run)
{
	for (int i = 0; i < run->npartitions; i++)
		run->partitions[i].progress.written = run->partitions[i].progress.next;
}
