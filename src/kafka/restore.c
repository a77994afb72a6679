/*
 * kafka/restore.c
 *		What a source takes from its changelog topic.
 *
 * The changelog topic has every change of the store, for each key in order, and
 * with each change the offset of the record that made it.  It is written after
 * the changes have committed (a sink does it), so it may lag, and never leads.
 *
 * Restoring.  A partition of the source's topic that was not begun here (a new
 * node, another node's partition taken over) is restored first: the partition
 * of the changelog topic of the same number, from where we stand in it to the end
 * that it had when we began.  Its offsets are kept as any other's, so a restore
 * that was interrupted goes on.  Then the source's partition begins where the
 * transaction began that the last restored change is of: it may not be in the
 * changelog topic as a whole, and what is not is read from the source once more.
 * Where no change said so it begins where 'start' says.
 *
 * What is restored is recorded in the store's own changelog like any change, with
 * the topic that it came from in the metadata; by that the sink knows that the
 * topic has it already.  Where the store was empty it is recorded once the restore is
 * done, by the sink (store/backlog.c).  Where the store had something before, the sink waits for the
 * restore, and publishes that and behind it what was restored, once more: else an older
 * value of a key would come last.
 *
 * A store may have changes that the topic does not have, or has further on (made
 * by SQL, also meanwhile, or not published when the source was dropped).  So each
 * record is compared with what the store last recorded of its key
 * (es_restore_guard); a store that nobody but us has ever changed is spared that.
 * For the time of a batch nobody else changes it (es_restore_hold): what is
 * committed between the look and the write would be overwritten.
 *
 * A change made by SQL that was published before the restore began is not in the
 * way: the topic has it, and what follows there is newer (the partition was
 * another server's meanwhile).  Nor is one that was made before the source had come
 * to the record that a change in the topic is of (publish.c): another server has.
 *
 * While a topic made anew is being filled (sink_topic.c) what it has of a key may be
 * older than what was restored from the former one.  So that is in the way as well,
 * unless the record in the topic is of a later one of the source's.  The sink notes up
 * to where, and forgets our offsets in the former topic, when it accepts this one: so a
 * restore waits for that, and hence for resume().
 *
 * Following.  Replica partitions are partitions of the changelog topic that are
 * read like those of the source, without an end.
 *
 * Locks: those of progress.c; between the source and its offsets the store,
 * against others' changes.  A crash: the offsets tell how far it was.
 */
#include "postgres.h"

#include "kafka/batch.h"
#include "kafka/group.h"
#include "kafka/restore.h"
#include "kafka/share.h"
#include "kafka/sink.h"
#include "kafka/task.h"

#include "access/table.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "kafka/topic.h"
#include "miscadmin.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "store/backlog.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "worker/launcher.h"

#define HOLD_TIMEOUT "3s"

/* ---------------------------------------------------------------------------
 * Records of a changelog topic
 * ------------------------------------------------------------------------- */

static bool
header_is(const EsHeader *header, const char *value)
{
	return header != NULL && header->length == strlen(value) &&
		   memcmp(header->value, value, header->length) == 0;
}

/* An offset of the source's topic; -1: none. */
static int64
header_offset(const EsSource *source, const EsRecord *record, const char *name)
{
	const EsHeader *offset = es_codec_header(record, name);
	char			number[12];
	char			digits[24];
	char		   *end;
	int64			value;

	pg_ltoa(record->partition, number);
	/* One of another partition must not move this one's offset. */
	if (offset == NULL || offset->length == 0 || offset->length >= sizeof(digits) ||
		!header_is(es_codec_header(record, ES_HEADER_TOPIC), source->topic) ||
		!header_is(es_codec_header(record, ES_HEADER_PARTITION), number))
		return -1;
	memcpy(digits, offset->value, offset->length);
	digits[offset->length] = '\0';
	errno = 0;
	value = strtoi64(digits, &end, 10);
	return errno != 0 || *end != '\0' || value < 0 || value == PG_INT64_MAX ? -1 : value;
}

int64
es_restore_resume_offset(const EsSource *source, const EsRecord *record)
{
	int64 since = header_offset(source, record, ES_HEADER_SINCE);
	int64 offset = header_offset(source, record, ES_HEADER_OFFSET);

	if (since >= 0 || offset < 0)
		return since;
	return offset + 1;
}

/* ---------------------------------------------------------------------------
 * What the store has that is newer
 * ------------------------------------------------------------------------- */

/* The keys of the records from a changelog, partitions, and the offsets they came from, as arrays. */
static int
collect_changes(const EsSource *source, const EsRecord *records, int n,
				const EsProblem *problems, int *numbers, Datum *values)
{
	Datum *keys = palloc(sizeof(Datum) * n);
	Datum *offsets = palloc(sizeof(Datum) * n);
	Datum *partitions = palloc(sizeof(Datum) * n);
	bool  *offset_nulls = palloc0(sizeof(bool) * n);
	int	   count = 0;

	for (int i = 0; i < n; i++)
	{
		int64 offset;

		if (!records[i].from_changelog || problems[i].sqlstate != 0 ||
			records[i].key == NULL)
			continue;
		offset = header_offset(source, &records[i], ES_HEADER_OFFSET);
		keys[count] = PointerGetDatum(
			cstring_to_text_with_len(records[i].key, (int) records[i].key_length));
		offsets[count] = Int64GetDatum(offset);
		offset_nulls[count] = offset < 0;
		partitions[count] = CStringGetTextDatum(psprintf("%d", records[i].partition));
		numbers[count++] = i;
	}
	values[0] = es_spi_array(keys, NULL, count, BYTEAOID);
	values[1] = es_spi_array(offsets, offset_nulls, count, INT8OID);
	values[2] = es_spi_array(partitions, NULL, count, TEXTOID);
	return count;
}

/* The last position that its changelog has given away. */
static EsPosition
last_change(const EsSourceRun *run)
{
	Oid changelog;

	if (!es_store_exists(run->source->target, &changelog) || !OidIsValid(changelog))
		return 0;
	return es_collection_last_allotted(es_collection_open(changelog, AccessShareLock));
}

/*
 * A replica that is behind writes twice as fast where nobody writes beside it
 * (store/batch.c).  Hardly anybody does, and it waits for nobody.
 */
static void
hold_if_behind(const EsSourceRun *run, int n)
{
	if (run->source->mode == ES_SOURCE_REPLICA && n >= run->source->flush_count)
		(void) ConditionalLockRelationOid(run->source->target, ShareRowExclusiveLock);
}

void
es_restore_hold(EsSourceRun *run, int n)
{
	if (!run->restoring)
	{
		hold_if_behind(run, n);
		return;
	}
	/*
	 * A crash that loses the last batches loses their offsets with them.  The end of
	 * the restore is waited for, and with it all that came before.
	 */
	(void) set_config_option("synchronous_commit", "off", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	/* Longer than deadlock_timeout, after which an autovacuum gives way. */
	(void) set_config_option("lock_timeout", HOLD_TIMEOUT, PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	LockRelationOid(run->source->target, ShareRowExclusiveLock);
	if (last_change(run) != run->last_change)
		run->guarded = true;
}

void
es_restore_note_written(EsSourceRun *run)
{
	if (run->restoring)
		run->last_change = last_change(run);
}

/* Of a change e that was restored: the offset that the record had come from; -1: none. */
#define FORMER_OFFSET                                                                    \
	"COALESCE((SELECT (h->>1)::int8 FROM jsonb_array_elements(CASE"                      \
	" jsonb_typeof(e.metadata->'headers') WHEN 'array' THEN e.metadata->'headers' END)"  \
	" h WHERE h->>0 = '" ES_HEADER_OFFSET "' AND h->>1 ~ '^\\d{1,18}$' LIMIT 1), -1)"

void
es_restore_guard(const EsSourceRun *run, const EsRecord *records, int n,
				 EsProblem *problems)
{
	/*
	 * A change without a topic was made by SQL, here.  One up to again_to that came
	 * from a changelog topic came from a former one ($9: unless nothing has been
	 * published yet).
	 */
	static const char sql[] =
		"SELECT r.i FROM eventstore.sink s JOIN eventstore.sink_position p"
		" ON p.sink = s.id AND s.changelog_of = $8,"
		" unnest($1, $2, $3) WITH ORDINALITY r (key, source_offset, partition, i),"
		" LATERAL eventstore.peek($4::pg_catalog.regclass,"
		" CASE WHEN $5 THEN r.key::text ELSE pg_catalog.convert_from(r.key, 'UTF8') END) "
		"e"
		" WHERE e.position IS NOT NULL"
		" AND ((e.metadata->>'topic') IS NULL AND e.position > LEAST($7, p.position)"
		" AND (e.metadata->'progress'->>'topic' = $6"
		" AND (e.metadata->'progress'->>r.partition)::int8 <= r.source_offset) IS NOT "
		"TRUE"
		" OR e.metadata->>'topic' = s.topic AND e.position <= NULLIF(p.again_to, $9)"
		" AND e.position > LEAST($7, p.position)"
		" AND (" FORMER_OFFSET " < r.source_offset) IS NOT TRUE"
		" OR e.metadata->>'topic' = $6 AND " ES_METADATA_OFFSET " >= r.source_offset)";
	const EsSource *source = run->source;
	Oid			 types[9] = {BYTEAARRAYOID, INT8ARRAYOID, TEXTARRAYOID, OIDOID, BOOLOID,
							 TEXTOID,		INT8OID,	  INT4OID,		INT8OID};
	Datum		 values[9];
	EsStore		*store = es_store_open(source->target, RowExclusiveLock);
	int			*numbers = palloc(sizeof(int) * n);
	EsRoleSwitch saved;

	if (!OidIsValid(store->changelog) ||
		collect_changes(source, records, n, problems, numbers, values) == 0)
		return;
	values[3] = ObjectIdGetDatum(store->changelog);
	values[4] = BoolGetDatum(store->key_format == ES_STORE_BYTES);
	values[5] = CStringGetTextDatum(source->topic);
	values[6] = Int64GetDatum(run->published);
	values[7] = Int32GetDatum((int32) source->id);
	values[8] = Int64GetDatum(ES_SINK_UNTIL_RESTORED);
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, 9, types, values, NULL, false, SPI_OK_SELECT);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		bool  isnull;
		int64 number = DatumGetInt64(
			SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull));

		problems[numbers[number - 1]].sqlstate = ES_PROBLEM_OUT_OF_DATE;
	}
	SPI_finish();
	es_role_restore(&saved);
}

/* ---------------------------------------------------------------------------
 * Partitions of the changelog topic
 * ------------------------------------------------------------------------- */

/*
 * Begins with this partition of the changelog topic, where it was not begun, and
 * adds it; false where Kafka does not tell its ends now.
 */
static bool
add_partition(EsSourceRun *run, int32 number, const EsProgress *loaded, int n)
{
	const char	*topic = run->source->changelog_topic;
	EsPartition *partition = &run->partitions[run->npartitions];
	int64		 low;
	bool		 begun = false;

	memset(partition, 0, sizeof(*partition));
	partition->from_changelog = true;
	partition->progress.topic = topic;
	partition->progress.partition = number;
	partition->progress.resume = -1;
	if (!es_topic_find_ends(run, partition, &low, &partition->restore_end) ||
		(run->group != NULL && !es_group_find_end(run, number, &partition->restore_end)))
		return false;
	for (int i = 0; i < n; i++)
		if (loaded[i].partition == number)
		{
			partition->progress = loaded[i];
			begun = true;
		}
	if (!begun)
	{
		partition->progress.written = partition->progress.next = low;
		es_task_begin();
		es_progress_begin(run->source, topic, number, low);
		es_task_commit(run->scratch);
	}
	partition->position = partition->progress.written;
	run->npartitions++;
	return true;
}

/* Room for so many, and the first of them. */
static void
make_room(EsSourceRun *run, int count)
{
	EsPartition *room =
		MemoryContextAllocZero(run->life, sizeof(EsPartition) * Max(count, 1));

	if (run->npartitions > 0)
		memcpy(room, run->partitions, sizeof(EsPartition) * run->npartitions);
	if (run->partitions != NULL)
		pfree(run->partitions);
	run->partitions = room;
}

static bool
has_enough(EsSourceRun *run, int32 number, int count)
{
	if (number < count)
		return true;
	es_run_set_state(run, "topic_missing",
					 psprintf("changelog topic \"%s\" has no partition %d",
							  run->source->changelog_topic, number));
	return false;
}

/*
 * All rows count, so it is not asked as the owner, whom policies may hide some
 * from.  Nor by a statement, in the planning of which functions of the user's
 * may run (those in expressions of an index are).
 */
static bool
store_is_empty(EsSourceRun *run)
{
	Relation rel;
	bool	 empty;

	es_task_begin();
	rel = table_open(run->source->target, AccessShareLock);
	empty = es_store_is_empty(rel);
	table_close(rel, AccessShareLock);
	es_task_commit(run->scratch);
	return empty;
}

#define DOUBT "changelog topic"

char *
es_restore_doubt(const EsSourceRun *run, const char *doubt)
{
	return psprintf(DOUBT " \"%s\": %s", run->source->changelog_topic, doubt);
}

bool
es_restore_awaits_topic(const EsWorkerReport *report)
{
	return strcmp(report->state, "topic_recreated") == 0 &&
		   strncmp(report->message, DOUBT, strlen(DOUBT)) == 0;
}

/* What publishes the store's changes; before we look where the topic ends.  NULL. */
static EsSink *
load_sink(EsSourceRun *run)
{
	EsSink *sink;

	es_task_begin();
	MemoryContextSwitchTo(run->scratch);
	sink = es_sink_load(es_share_find_sink(run->source->id));
	es_task_commit(run->scratch);
	return sink;
}

/* By its id.  *known is false where that is not told now. */
static char *
doubt_id(EsSourceRun *run, const EsSink *sink, bool *known)
{
	bool was_ours = es_sink_has_published(sink);
	char id[ES_TOPIC_ID_SIZE];

	*known = true;
	for (int i = 0; i < run->npartitions; i++)
		was_ours = was_ours || run->partitions[i].position > 0;
	if (!was_ours || sink->topic_id == NULL)
		return NULL;
	es_kafka_topic_id(run->client, run->source->changelog_topic, ES_RUN_CALL_MS, id);
	*known = id[0] != '\0' || ++run->unidentified >= ES_TOPIC_ID_CHECKS;
	return es_kafka_doubt_topic_id(sink->topic_id, id);
}

/*
 * Why the topic is not the one that was published to and restored from; NULL.  Other
 * members of a group may have begun to fill it, with what is older than what we have;
 * then it may end where the former one did, and only the sink knows.
 */
static char *
doubt_topic(EsSourceRun *run, const EsSink *sink, bool *known)
{
	EsWorkerInfo worker;
	char		*doubt;

	if (es_worker_find(es_sink_key(sink->id), &worker) && worker.pid != 0 &&
		strcmp(worker.report.state, "topic_recreated") == 0)
		return pstrdup(worker.report.message);
	doubt = doubt_id(run, sink, known);
	for (int i = 0; i < run->npartitions && doubt == NULL; i++)
	{
		const EsPartition *partition = &run->partitions[i];
		int32			   number = partition->progress.partition;
		int64			   had = partition->position;

		/* Without a group the end is where the first open transaction begins. */
		if (run->group != NULL && number < sink->nends)
			had = Max(had, sink->ends[number]);
		doubt = es_sink_doubt_end(number, partition->restore_end, had);
	}
	return doubt;
}

bool
es_restore_begin(EsSourceRun *run, const bool *wanted, int count, bool *ready)
{
	EsProgress *loaded;
	EsSink	   *sink;
	char	   *doubt;
	int			nloaded;
	int			nlog;
	bool		known = true;
	bool		any = false;

	for (int i = 0; i < count; i++)
		any = any || wanted[i];
	if (!any)
		return false;
	*ready = false;
	nlog = es_topic_count_partitions(run, run->source->changelog_topic);
	if (nlog == 0)
		return true;
	sink = load_sink(run);
	run->published = sink != NULL ? sink->position : 0;
	nloaded = es_run_load_progress(run, run->source->changelog_topic, &loaded);
	run->npartitions = 0;
	make_room(run, count);
	for (int32 i = 0; i < count; i++)
		if (wanted[i] &&
			(!has_enough(run, i, nlog) || !add_partition(run, i, loaded, nloaded)))
			return true;
	doubt = sink != NULL ? doubt_topic(run, sink, &known) : NULL;
	if (doubt != NULL)
		es_run_set_state(run, "topic_recreated", es_restore_doubt(run, doubt));
	if (doubt != NULL || !known)
		return true;
	run->restoring = true;
	run->last_change = 0;
	es_batch_begin_restore(run);
	*ready = true;
	return true;
}

bool
es_restore_follow(EsSourceRun *run)
{
	const EsSource *source = run->source;
	EsProgress	   *loaded;
	int				nloaded;
	int				nlog;

	if (source->nreplicas == 0)
		return true;
	nlog = es_topic_count_partitions(run, source->changelog_topic);
	if (nlog == 0)
		return false;
	nloaded = es_run_load_progress(run, run->source->changelog_topic, &loaded);
	make_room(run, run->npartitions + source->nreplicas);
	for (int i = 0; i < source->nreplicas; i++)
		if (!has_enough(run, source->replicas[i], nlog) ||
			!add_partition(run, source->replicas[i], loaded, nloaded))
			return false;
	return true;
}

/* ---------------------------------------------------------------------------
 * After a crash
 * ------------------------------------------------------------------------- */

/* From its changelog, as the owner would; the offsets are right then. */
static void
rebuild_store(EsSourceRun *run)
{
	Oid			 types[1] = {REGCLASSOID};
	Datum		 values[1] = {ObjectIdGetDatum(run->source->target)};
	EsRoleSwitch saved;

	es_run_set_state(run, "restoring", "an unlogged store is rebuilt from its changelog");
	es_task_begin();
	es_role_assume(es_relation_owner(run->source->target), &saved);
	SPI_connect();
	es_spi_execute("SELECT eventstore.rebuild($1)", 1, types, values, NULL, false,
				   SPI_OK_SELECT);
	SPI_finish();
	es_role_restore(&saved);
	es_task_commit(run->scratch);
}

/*
 * Where each begins; false where Kafka does not tell.  Of a topic that is not ours
 * we do not know: from 0, and if that is gone its source says so.
 */
static bool
find_first_offsets(EsSourceRun *run, EsBegun *begun, int n, int count)
{
	const char *topic = es_topic_followed(run->source);

	for (int i = 0; i < n; i++)
	{
		EsPartition partition = {.progress = begun[i].progress};
		int64		high;

		begun[i].progress.has_time = false;
		begun[i].progress.next = 0;
		if (strcmp(partition.progress.topic, topic) == 0 &&
			partition.progress.partition < count &&
			!es_topic_find_ends(run, &partition, &begun[i].progress.next, &high))
			return false;
	}
	return true;
}

/* False where the source is paused or gone.  40001: one of them was moved meanwhile. */
static bool
read_again(EsSourceRun *run, const EsBegun *begun, int n)
{
	bool held;

	es_task_begin();
	held = es_task_hold(es_source_key(run->source->id));
	for (int i = 0; i < n && held; i++)
	{
		EsSource source = {.id = begun[i].source};

		if (!es_progress_advance(&source, &begun[i].progress, 1))
			ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
							errmsg("offsets of source %u were moved by somebody else",
								   begun[i].source)));
	}
	es_task_commit(run->scratch);
	if (!held)
		run->leave = ES_LEAVE_AND_RETURN;
	else
		ereport(LOG,
				(errmsg("source \"%s\": an unlogged store is filled again from the topic",
						run->source->name)));
	return held;
}

/*
 * All partitions that were begun: in a group others have some of them now, and they
 * may be ours again when the store is not empty any more.  Those of the store's
 * other sources as well, which may come when we have filled it with ours.
 */
static bool
read_all_again(EsSourceRun *run, const EsProgress *begun, int n, int count)
{
	EsBegun *others;
	EsBegun *all;
	int		 nothers;
	int		 nall = 0;

	es_task_begin();
	MemoryContextSwitchTo(run->scratch);
	nothers = es_progress_load_others(run->source, &others);
	es_task_commit(run->scratch);
	all = palloc0(sizeof(EsBegun) * (n + nothers + 1));
	for (int i = 0; i < n; i++)
		if (begun[i].written > 0 && begun[i].partition < count)
			all[nall++] = (EsBegun){run->source->id, begun[i]};
	memcpy(&all[nall], others, sizeof(EsBegun) * nothers);
	nall += nothers;
	return nall == 0 ||
		   (find_first_offsets(run, all, nall, count) && read_again(run, all, nall));
}

bool
es_restore_refill(EsSourceRun *run, const EsProgress *begun, int n, int count)
{
	const EsSource *source = run->source;
	Oid				changelog = InvalidOid;
	bool			unlogged;

	/* A crash is the end of this process. */
	if (!source->is_store || run->refilled)
		return true;
	es_task_begin();
	unlogged = get_rel_persistence(source->target) == RELPERSISTENCE_UNLOGGED &&
			   es_store_exists(source->target, &changelog) &&
			   (!OidIsValid(changelog) || last_change(run) > 0);
	es_task_commit(run->scratch);
	if (unlogged && store_is_empty(run))
	{
		if (OidIsValid(changelog))
			rebuild_store(run);
		else if (!read_all_again(run, begun, n, count))
			return false;
	}
	run->refilled = true;
	return true;
}

/* ---------------------------------------------------------------------------
 * The end of a restore
 * ------------------------------------------------------------------------- */

static void
show_progress(EsSourceRun *run)
{
	int64 left = 0;

	for (int i = 0; i < run->npartitions; i++)
		left +=
			Max(run->partitions[i].restore_end - run->partitions[i].progress.written, 0);
	es_run_set_state(run, "restoring",
					 psprintf(INT64_FORMAT " records of changelog topic \"%s\" are left",
							  left, run->source->changelog_topic));
}

/*
 * The source's partitions that were restored go on from these offsets, or from
 * where they were, if that is later.
 */
static void
go_on_from(EsSourceRun *run, const int64 *offsets)
{
	const char *topic = run->source->topic;
	EsProgress *loaded;
	int			n;

	for (int i = 0; i < run->npartitions; i++)
		es_progress_begin(run->source, topic, run->partitions[i].progress.partition,
						  offsets[i]);
	n = es_progress_load(run->source, topic, &loaded);
	for (int i = 0; i < run->npartitions; i++)
		for (int j = 0; j < n; j++)
			if (loaded[j].partition == run->partitions[i].progress.partition &&
				loaded[j].written < run->partitions[i].progress.resume)
			{
				loaded[j].next = run->partitions[i].progress.resume;
				loaded[j].resume = -1;
				/* It is that of the record before; which one that is now is not known. */
				loaded[j].has_time = false;
				es_run_advance(run, &loaded[j], 1);
			}
}

/*
 * What the store had before is published from now on, and may be older than what was
 * restored (publish_changelog): so that follows it.
 */
static void
let_publish(EsSourceRun *run)
{
	Oid	  types[3] = {INT4OID, INT8OID, INT8OID};
	Datum values[3] = {Int32GetDatum((int32) run->source->id),
					   Int64GetDatum(last_change(run)),
					   Int64GetDatum(ES_SINK_UNTIL_RESTORED)};

	(void) es_spi_execute_as_owner(
		"UPDATE eventstore.sink_position p SET again_to = $2 FROM eventstore.sink s"
		" WHERE s.changelog_of = $1 AND p.sink = s.id AND p.again_to = $3",
		3, types, values, NULL, SPI_OK_UPDATE);
}

bool
es_restore_is_taken(const EsSourceRun *run)
{
	for (int i = 0; i < run->npartitions; i++)
	{
		const EsPartition *partition = &run->partitions[i];

		if (Max(partition->position, partition->seen_end) < partition->restore_end)
			return false;
	}
	return true;
}

/*
 * What an earlier source left to be recorded counts as what the store had, and is
 * published, too.
 */
static void
record_backlog(EsSourceRun *run)
{
	EsSink		   *sink = load_sink(run);
	EsBacklogResult result = ES_BACKLOG_RECORDED;

	if (sink == NULL || sink->again_to != ES_SINK_UNTIL_RESTORED)
		return;
	while (result != ES_BACKLOG_EMPTY)
	{
		CHECK_FOR_INTERRUPTS();
		es_task_begin();
		result =
			es_store_backlog_record(run->source->target, result == ES_BACKLOG_LOCKED);
		es_task_commit(run->scratch);
	}
}

void
es_restore_look(EsSourceRun *run)
{
	int64 *offsets = palloc(sizeof(int64) * run->npartitions);
	bool   held;

	if (run->nrecords > 0 || run->halt != ES_HALT_NONE || run->retry_at != 0)
		return;
	for (int i = 0; i < run->npartitions; i++)
		if (run->partitions[i].progress.written < run->partitions[i].restore_end)
		{
			show_progress(run);
			return;
		}
	/* Kafka is asked first: no transaction waits for it. */
	for (int i = 0; i < run->npartitions; i++)
	{
		EsProgress *progress = &run->partitions[i].progress;

		offsets[i] = progress->resume;
		if (offsets[i] < 0 && !es_topic_find_start(run, progress->partition, &offsets[i]))
			return;
	}
	record_backlog(run);
	es_task_begin();
	held = es_task_hold(es_source_key(run->source->id));
	if (held)
	{
		let_publish(run);
		go_on_from(run, offsets);
		es_store_backlog_end(run->source->target);
		es_task_call_at_commit(es_sink_key(es_share_find_sink(run->source->id)));
	}
	es_task_commit(run->scratch);
	for (int i = 0; held && run->group != NULL && i < run->npartitions; i++)
		es_group_note_restored(run, run->partitions[i].progress.partition);
	run->leave = ES_LEAVE_AND_RETURN;
}
