/*
 * kafka/sink_backlog.c
 *		What was restored into a store, and is not in its changelog yet.
 *
 * A restore puts keys and leaves it to us to record them (store/backlog.c): some
 * thousand in a transaction, one after each round of the sink's loop, so that what is
 * changed meanwhile is published all the same.  What is recorded came from the topic,
 * and is passed over when the changelog is read.
 *
 * A topic made anew gets all that the changelog has.  So before that is accepted all is
 * recorded that is left.
 *
 * Locks: those of es_store_backlog_record.  What others have locked, and a failure, is
 * tried again a second later; a crash loses nothing.
 */
#include "postgres.h"

#include "kafka/sink_run.h"

#include "collection/collection.h"
#include "miscadmin.h"
#include "stats/work.h"
#include "store/backlog.h"
#include "utils/lsyscache.h"
#include "utils/timestamp.h"
#include "worker/process.h"

/* What others have locked is tried again after, and a failure from ... to. */
#define AGAIN_MS	  1000
#define AGAIN_LAST_MS 60000

void
es_sink_backlog_look(EsSinkRun *run)
{
	run->store = InvalidOid;
	run->has_backlog = false;
	if (run->sink->changelog_of == 0)
		return;
	run->store = es_collection_find_store(run->sink->collection);
	/* Without a lock, which somebody may be keeping us from. */
	if (OidIsValid(run->store))
		(void) es_store_has_backlog(run->store, &run->has_backlog);
}

bool
es_sink_backlog_is_due(const EsSinkRun *run, TimestampTz now)
{
	return run->has_backlog && run->leave == ES_LEAVE_NOT && run->backlog_at <= now;
}

static EsBacklogResult
record(EsSinkRun *run, bool wait)
{
	EsBacklogResult result = ES_BACKLOG_EMPTY;

	es_task_begin();
	if (es_store_exists(run->store, NULL))
	{
		es_work_begin("restore", run->store);
		es_work_phase("recording what was restored", es_store_backlog_left(run->store));
		result = es_store_backlog_record(run->store, wait);
		es_work_end();
	}
	es_task_commit(run->scratch);
	return result;
}

static void
rest(EsSinkRun *run, int ms)
{
	run->backlog_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), ms);
}

void
es_sink_backlog_record(EsSinkRun *run)
{
	PG_TRY();
	{
		EsBacklogResult result = record(run, false);

		run->has_backlog = result != ES_BACKLOG_EMPTY;
		run->backlog_ms = 0;
		if (result == ES_BACKLOG_LOCKED)
			rest(run, AGAIN_MS);
	}
	PG_CATCH();
	{
		ErrorData *error = es_task_catch(run->scratch);

		run->backlog_ms = es_task_longer_pause(run->backlog_ms, AGAIN_MS, AGAIN_LAST_MS);
		rest(run, run->backlog_ms);
		ereport(LOG, (errmsg("sink \"%s\": what was restored could not be recorded: %s",
							 run->sink->name, error->message)));
	}
	PG_END_TRY();
}

bool
es_sink_backlog_finish(EsSinkRun *run)
{
	EsBacklogResult result = ES_BACKLOG_RECORDED;

	while (OidIsValid(run->store) && result != ES_BACKLOG_EMPTY)
	{
		result = record(run, result == ES_BACKLOG_LOCKED);
		if (es_process_interrupts())
		{
			run->leave = ES_LEAVE_FOR_GOOD;
			return false;
		}
	}
	run->has_backlog = false;
	return true;
}
