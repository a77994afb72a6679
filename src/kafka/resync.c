/*
 * kafka/resync.c
 *		Keys that a store has, and its topic has no more.
 *
 * A compacted topic forgets a deleted key, and after a while (delete.retention.ms)
 * the record that deleted it.  A source that did not run in between never hears
 * of that, and its store keeps the key for ever.  resync() finds such keys.
 *
 * While the source does not read on: read each partition from its first record to
 * where it is written, and note for each key whether its last record there has a
 * value (Seen, a hash table of hashes: 32 bytes a key).  Then go through the store
 * in the order of keys, some thousand in a transaction, and delete those that have
 * none, if it was a record of this topic that wrote them last.  Who reads the
 * store sees it as it is meanwhile.
 *
 * A key that was changed by SQL is not touched, nor is one from a partition of the
 * topic that another source reads: the changelog says who changed it
 * last, looked up with the row locked.  A store without a changelog cannot say;
 * there each key goes that the topic does not have.
 *
 * Two keys with one hash (once in 2^64 pairs) may hide each other; the hash has a
 * new seed each time.  A crash: it begins again, what is deleted is deleted.
 *
 * Its owner needs SELECT on the store beside what a source needs.
 *
 * Locks: rows of the store, as a DELETE of them takes.
 */
#include "postgres.h"

#include "kafka/resync.h"

#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "common/pg_prng.h"
#include "kafka/batch.h"
#include "kafka/codec.h"
#include "kafka/task.h"
#include "kafka/topic.h"
#include "miscadmin.h"
#include "spi.h"
#include "store/batch.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "worker/process.h"

/* Keys looked at in one transaction. */
#define SWEEP_CHUNK 5000
/* Messages taken from the queue in one go. */
#define TAKE_MAX 1000
/* How long a wait for the queue may be. */
#define WAIT_MS 1000

typedef struct Seen
{
	uint64 hash; /* of the key; hash key */
	bool   live; /* its last record has a value */
} Seen;

typedef struct Resync
{
	EsSourceRun *run;
	HTAB		*seen;
	uint64		 seed;
	int64		*ends; /* of each of the run's partitions: up to there */
	int64		*reached;
} Resync;

static uint64
hash_key(const Resync *resync, const void *key, size_t length)
{
	return DatumGetUInt64(hash_any_extended(key, (int) length, resync->seed));
}

/* Paused, dropped, or the server stops. */
static bool
called_away(EsSourceRun *run)
{
	if (es_process_interrupts())
		run->leave = ES_LEAVE_FOR_GOOD;
	else if (es_worker_pending(ES_WAKE_CONFIG) != 0)
		run->leave = ES_LEAVE_AND_RETURN;
	return run->leave != ES_LEAVE_NOT;
}

/* ---------------------------------------------------------------------------
 * Reading
 * ------------------------------------------------------------------------- */

/* From the first record that each partition has; false where Kafka does not tell. */
static bool
assign_all(Resync *resync)
{
	EsSourceRun						*run = resync->run;
	rd_kafka_topic_partition_list_t *list =
		rd_kafka_topic_partition_list_new(run->npartitions);
	rd_kafka_resp_err_t error;
	bool				known = true;

	for (int i = 0; i < run->npartitions && known; i++)
	{
		EsProgress *progress = &run->partitions[i].progress;
		int64		low;
		int64		high;

		if (run->partitions[i].from_changelog)
			continue;
		resync->ends[i] = progress->written;
		known = es_topic_find_ends(run, &run->partitions[i], &low, &high);
		resync->reached[i] = low;
		rd_kafka_topic_partition_list_add(list, progress->topic, progress->partition)
			->offset = low;
	}
	error =
		known ? rd_kafka_assign(run->client->handle, list) : RD_KAFKA_RESP_ERR_NO_ERROR;
	rd_kafka_topic_partition_list_destroy(list);
	return known && error == RD_KAFKA_RESP_ERR_NO_ERROR;
}

static void
note_message(Resync *resync, const rd_kafka_message_t *message)
{
	EsSourceRun *run = resync->run;
	EsPartition *partition =
		message->rkt == NULL ? NULL
							 : es_run_partition(run, rd_kafka_topic_name(message->rkt),
												message->partition);
	int	   i = partition - run->partitions;
	uint64 hash;
	Seen  *seen;

	if (partition == NULL)
		return;
	if (message->err == RD_KAFKA_RESP_ERR__PARTITION_EOF)
		resync->reached[i] = Max(resync->reached[i], message->offset);
	if (message->err != RD_KAFKA_RESP_ERR_NO_ERROR)
		return;
	if (message->offset < resync->ends[i] && message->key != NULL)
	{
		hash = hash_key(resync, message->key, message->key_len);
		seen = hash_search(resync->seen, &hash, HASH_ENTER, NULL);
		seen->live = message->payload != NULL;
	}
	resync->reached[i] = Max(resync->reached[i], message->offset + 1);
}

static int64
left_to_read(const Resync *resync)
{
	int64 left = 0;

	for (int i = 0; i < resync->run->npartitions; i++)
		left += Max(resync->ends[i] - resync->reached[i], 0);
	return left;
}

/* False where it was called away. */
static bool
read_all(Resync *resync)
{
	static rd_kafka_message_t *taken[TAKE_MAX];
	EsSourceRun				  *run = resync->run;
	int64					   left;

	while ((left = left_to_read(resync)) > 0)
	{
		ssize_t n = rd_kafka_consume_batch_queue(run->client->queue, 0, taken, TAKE_MAX);

		run->taken = taken;
		run->ntaken = (int) n;
		for (int i = run->next_taken = 0; i < n; i = ++run->next_taken)
		{
			es_kafka_note_taken(run->client, taken[i]);
			note_message(resync, taken[i]);
			rd_kafka_message_destroy(taken[i]);
		}
		run->ntaken = 0;
		if (called_away(run))
			return false;
		es_kafka_note(run->client);
		if (n > 0)
			continue;
		es_run_set_state(run, "resyncing",
						 psprintf(INT64_FORMAT " records are left to be read", left));
		MemoryContextReset(run->scratch);
		es_kafka_wait(&run->client, 1, WAIT_MS);
	}
	return true;
}

/* ---------------------------------------------------------------------------
 * Sweeping
 * ------------------------------------------------------------------------- */

/* {"topic": ..., "resync": true}: why a key was deleted. */
static Jsonb *
reason_of(const EsSource *source)
{
	JsonbParseState *state = NULL;
	JsonbValue		 value;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	value.type = jbvString;
	value.val.string.val = ES_ORIGIN_TOPIC;
	value.val.string.len = strlen(ES_ORIGIN_TOPIC);
	pushJsonbValue(&state, WJB_KEY, &value);
	value.val.string.val = source->topic;
	value.val.string.len = strlen(source->topic);
	pushJsonbValue(&state, WJB_VALUE, &value);
	value.val.string.val = "resync";
	value.val.string.len = strlen("resync");
	pushJsonbValue(&state, WJB_KEY, &value);
	value.type = jbvBool;
	value.val.boolean = true;
	pushJsonbValue(&state, WJB_VALUE, &value);
	return JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
}

static bool
is_live(const Resync *resync, const EsStore *store, Datum key)
{
	size_t		length;
	const char *bytes = es_codec_bytes(store->key_format, key, &length);
	uint64		hash = hash_key(resync, bytes, length);
	Seen	   *seen = hash_search(resync->seen, &hash, HASH_FIND, NULL);

	return seen != NULL && seen->live;
}

/*
 * The next keys after 'last' (which becomes the last of them); false where there
 * are none.  Those that are to go: '*gone', so many in '*ngone'.
 */
static bool
next_keys(Resync *resync, EsStore *store, Datum *last, Datum **gone, int *ngone)
{
	MemoryContext caller = CurrentMemoryContext;
	Oid			  types[1] = {store->key_format == ES_STORE_BYTES ? BYTEAOID : TEXTOID};
	char		  nulls[2] = {*last == (Datum) 0 ? 'n' : ' ', '\0'};
	bool		  any;

	SPI_connect();
	es_spi_execute(
		psprintf(
			"SELECT s.key FROM %s s WHERE $1 IS NULL OR s.key OPERATOR(pg_catalog.>) $1"
			" ORDER BY s.key LIMIT %d",
			es_relation_name(store->relid), SWEEP_CHUNK),
		1, types, last, nulls, true, SPI_OK_SELECT);
	any = SPI_processed > 0;
	*gone = MemoryContextAlloc(caller, sizeof(Datum) * Max(SPI_processed, 1));
	*ngone = 0;
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		bool  isnull;
		Datum key =
			SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull);
		MemoryContext old = MemoryContextSwitchTo(caller);

		key = PointerGetDatum(PG_DETOAST_DATUM_COPY(key));
		if (!is_live(resync, store, key))
			(*gone)[(*ngone)++] = key;
		*last = key;
		MemoryContextSwitchTo(old);
	}
	SPI_finish();
	return any;
}

/* Those of the source's topic that were read. */
static Datum
partitions_array(const EsSourceRun *run)
{
	Datum *numbers = palloc(sizeof(Datum) * Max(run->npartitions, 1));
	int	   n = 0;

	for (int i = 0; i < run->npartitions; i++)
		if (!run->partitions[i].from_changelog)
			numbers[n++] = Int32GetDatum(run->partitions[i].progress.partition);
	return es_spi_array(numbers, NULL, n, INT4OID);
}

/* With the row locked: was it a record of these partitions that wrote the key last? */
static bool
is_the_topics(const EsSource *source, EsStore *store, Datum partitions, Datum key)
{
	Oid	  types[4] = {store->key_format == ES_STORE_BYTES ? BYTEAOID : TEXTOID, TEXTOID,
					OIDOID, INT4ARRAYOID};
	Datum values[4] = {key, CStringGetTextDatum(source->topic),
					   ObjectIdGetDatum(store->changelog), partitions};
	EsRoleSwitch saved;
	bool		 result;

	SPI_connect();
	es_spi_execute(
		psprintf("SELECT FROM %s s WHERE s.key OPERATOR(pg_catalog.=) $1 FOR UPDATE",
				 es_relation_name(store->relid)),
		1, types, values, NULL, false, SPI_OK_SELECT);
	result = SPI_processed > 0;
	if (result && OidIsValid(store->changelog))
	{
		es_role_assume(es_extension_owner(), &saved);
		es_spi_execute(
			"SELECT FROM eventstore.peek($3::pg_catalog.regclass, $1::pg_catalog.text) e"
			" WHERE e.metadata->>'topic' = $2 AND e.metadata->'partition' IN"
			" (SELECT to_jsonb(p) FROM unnest($4) p)",
			4, types, values, NULL, false, SPI_OK_SELECT);
		result = SPI_processed > 0;
		es_role_restore(&saved);
	}
	SPI_finish();
	return result;
}

/*
 * One transaction; false when the store has been gone through.  As the source's
 * owner throughout: where a statement is planned, functions of the user's may run
 * (those in expressions of an index do).
 */
static bool
sweep_chunk(Resync *resync, Datum *last, int64 *deleted)
{
	const EsSource	  *source = resync->run->source;
	MemoryContext	   life = resync->run->life;
	EsStoreChange	  *changes;
	EsStoreBatchResult result = {0};
	EsRoleSwitch	   saved;
	EsStore			  *store;
	MemoryContext	   old;
	Datum			   partitions;
	Datum			  *gone;
	int				   ngone;
	int				   nchanges = 0;
	bool			   any;

	es_task_begin();
	if (!es_task_hold(es_source_key(source->id)))
	{
		es_task_commit(resync->run->scratch);
		resync->run->leave = ES_LEAVE_AND_RETURN;
		return false;
	}
	store = es_store_open(source->target, RowExclusiveLock);
	partitions = partitions_array(resync->run);
	es_role_assume(source->owner, &saved);
	any = next_keys(resync, store, last, &gone, &ngone);
	changes = palloc0(sizeof(EsStoreChange) * Max(ngone, 1));
	for (int i = 0; i < ngone; i++)
		if (is_the_topics(source, store, partitions, gone[i]))
		{
			EsStoreChange *change = &changes[nchanges++];

			change->key = gone[i];
			change->is_delete = true;
			change->metadata = reason_of(source);
		}
	if (nchanges > 0)
		es_store_apply(source->target, changes, nchanges, NULL, &result);
	es_role_restore(&saved);
	*deleted += result.deleted;
	if (any)
	{
		old = MemoryContextSwitchTo(life);
		*last = PointerGetDatum(PG_DETOAST_DATUM_COPY(*last));
		MemoryContextSwitchTo(old);
	}
	es_task_commit(resync->run->scratch);
	return any;
}

static bool
sweep(Resync *resync)
{
	EsSourceRun *run = resync->run;
	Datum		 last = (Datum) 0;
	int64		 deleted = 0;

	es_run_set_state(run, "resyncing", "looking for keys that the topic does not have");
	for (;;)
	{
		Datum previous = last;
		bool  any = sweep_chunk(resync, &last, &deleted);

		if (previous != (Datum) 0 && previous != last)
			pfree(DatumGetPointer(previous));
		if (!any && run->leave == ES_LEAVE_NOT)
			break;
		if (run->leave != ES_LEAVE_NOT || called_away(run))
			return false;
	}
	ereport(LOG, (errmsg("source \"%s\": resync has removed " INT64_FORMAT " keys",
						 run->source->name, deleted)));
	return true;
}

/* ---------------------------------------------------------------------------
 * All of it
 * ------------------------------------------------------------------------- */

bool
es_resync(EsSourceRun *run)
{
	HASHCTL control = {
		.keysize = sizeof(uint64), .entrysize = sizeof(Seen), .hcxt = run->life};
	Resync resync = {run};
	bool   done;

	if (!run->source->resync)
		return true;
	if (!pg_strong_random(&resync.seed, sizeof(resync.seed)))
		resync.seed = pg_prng_uint64(&pg_global_prng_state);
	resync.seen = hash_create("eventstore resync", 100000, &control,
							  HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	resync.ends =
		MemoryContextAllocZero(run->life, sizeof(int64) * Max(run->npartitions, 1));
	resync.reached =
		MemoryContextAllocZero(run->life, sizeof(int64) * Max(run->npartitions, 1));
	es_run_set_state(run, "resyncing", "");
	if (!assign_all(&resync))
	{
		run->leave = ES_LEAVE_AND_RETURN;
		run->pause_ms = ES_TASK_PAUSE_MS;
		return false;
	}
	done = read_all(&resync) && sweep(&resync);
	if (done)
	{
		es_task_begin();
		es_progress_resynced(run->source);
		es_task_commit(run->scratch);
	}
	hash_destroy(resync.seen);
	return done;
}
