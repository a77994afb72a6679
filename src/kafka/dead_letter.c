/*
 * kafka/dead_letter.c
 *		Dead letters, tried again.
 *
 * In the caller's transaction, as the source's owner, one subtransaction for
 * each: those that can be written now are, and their rows go; the others stay
 * with the new reason.  They are fetched as they are tried, so that memory is
 * needed for one of them, however many there are.
 *
 * A dead letter is old.  In a store whose changelog says that a later record of
 * the same partition has been written for its key, it is out of date, and
 * writing it would bring an old value back: its row goes, and nothing else.  One
 * of the changelog topic is so, too, where a record of the source's own was
 * written since.  So that nothing is written between that look and ours, the
 * source's row is locked: the worker waits for the end of the caller's transaction,
 * and so does who tries them at the same time.
 *
 * A sink's are marked here, and published by its worker once that has committed;
 * with a source's those of what publishes its store's changes (sink_letter.c says
 * what becomes of them).
 *
 * Locks: the source, rows of source_dead_letter, then those of the target.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "errors.h"
#include "fmgr.h"
#include "kafka/progress.h"
#include "kafka/share.h"
#include "kafka/sink.h"
#include "kafka/source.h"
#include "kafka/task.h"
#include "kafka/writer.h"
#include "miscadmin.h"
#include "spi.h"
#include "stats/work.h"
#include "store/backlog.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/uuid.h"

PG_FUNCTION_INFO_V1(es_retry_dead_letters);

typedef struct DeadLetter
{
	pg_uuid_t id;
	EsRecord  record;
} DeadLetter;

/* ---------------------------------------------------------------------------
 * Loading
 * ------------------------------------------------------------------------- */

/* So many rows at once: their values are fetched one by one. */
#define FETCH_ROWS 100

/* In the current context. */
static const char *
bytes_column(HeapTuple row, TupleDesc desc, int column, size_t *length)
{
	bool   isnull;
	Datum  value = SPI_getbinval(row, desc, column, &isnull);
	bytea *bytes;

	if (isnull)
		return NULL;
	bytes = DatumGetByteaPP(value);
	*length = VARSIZE_ANY_EXHDR(bytes);
	return VARDATA_ANY(bytes);
}

static void
read_letter(const EsSource *source, DeadLetter *letter, HeapTuple row, TupleDesc desc)
{
	EsRecord *record = &letter->record;
	Datum	  headers;
	bool	  isnull;

	memset(letter, 0, sizeof(*letter));
	letter->id = *DatumGetUUIDP(SPI_getbinval(row, desc, 1, &isnull));
	record->topic = TextDatumGetCString(SPI_getbinval(row, desc, 2, &isnull));
	record->from_changelog = source->changelog_topic != NULL &&
							 strcmp(record->topic, source->changelog_topic) == 0;
	record->partition = DatumGetInt32(SPI_getbinval(row, desc, 3, &isnull));
	record->offset = DatumGetInt64(SPI_getbinval(row, desc, 4, &isnull));
	record->time = DatumGetTimestampTz(SPI_getbinval(row, desc, 5, &isnull));
	record->has_time = !isnull;
	record->key = bytes_column(row, desc, 6, &record->key_length);
	record->value = bytes_column(row, desc, 7, &record->value_length);
	headers = SPI_getbinval(row, desc, 8, &isnull);
	if (!isnull)
		es_codec_read_headers(DatumGetJsonbP(headers), record);
}

/* Oldest first, locked as they are fetched; in SPI. */
static Portal
open_letters(const EsSource *source, const NullableDatum *ids)
{
	Oid			 types[2] = {INT4OID, UUIDARRAYOID};
	Datum		 values[2] = {Int32GetDatum((int32) source->id), ids->value};
	EsRoleSwitch saved;
	Portal		 letters;

	es_role_assume(es_extension_owner(), &saved);
	letters = SPI_cursor_open_with_args(
		NULL,
		"SELECT id, topic, partition, record_offset, record_time, key, value, headers"
		" FROM eventstore.source_dead_letter"
		" WHERE source = $1 AND ($2 IS NULL OR id = ANY ($2))"
		" ORDER BY created_at, topic, partition, record_offset"
		" FOR UPDATE",
		2, types, values, ids->isnull ? " n" : "  ", false, CURSOR_OPT_NO_SCROLL);
	es_role_restore(&saved);
	return letters;
}

/* NULL at the end. */
static SPITupleTable *
fetch_letters(Portal letters)
{
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	SPI_cursor_fetch(letters, true, FETCH_ROWS);
	es_role_restore(&saved);
	return SPI_processed > 0 ? SPI_tuptable : NULL;
}

/* ---------------------------------------------------------------------------
 * One of them
 * ------------------------------------------------------------------------- */

/* Has a later record of the partition, or of what it was restored for, been written for its key? */
static bool
is_out_of_date(const EsSource *source, const EsRecord *record)
{
	Oid			 types[6] = {OIDOID, TEXTOID, TEXTOID, INT4OID, INT8OID, TEXTOID};
	EsProblem	 problem;
	EsRoleSwitch saved;
	EsStore		*store;
	Datum		 key;
	Datum		 values[6];
	bool		 later;

	if (!source->is_store || record->key == NULL)
		return false;
	store = es_store_open(source->target, RowExclusiveLock);
	if (!OidIsValid(store->changelog) ||
		!es_codec_decode(store->key_format, record->key, record->key_length, &key,
						 &problem))
		return false;
	values[0] = ObjectIdGetDatum(store->changelog);
	values[1] = PointerGetDatum(es_store_key_to_text(store, key));
	values[2] = CStringGetTextDatum(record->topic);
	values[3] = Int32GetDatum(record->partition);
	values[4] = Int64GetDatum(record->offset);
	values[5] =
		CStringGetTextDatum(record->from_changelog ? source->topic : record->topic);
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(
		"SELECT FROM eventstore.peek($1::pg_catalog.regclass, $2) e"
		" WHERE e.metadata->>'topic' = $3 AND e.metadata->'partition' = to_jsonb($4)"
		" AND " ES_METADATA_OFFSET " > $5"
		" OR $6 <> $3 AND e.metadata->>'topic' = $6",
		6, types, values, NULL, true, SPI_OK_SELECT);
	later = SPI_processed > 0;
	SPI_finish();
	es_role_restore(&saved);
	return later;
}

static void
execute_for(const char *sql, const DeadLetter *letter, const EsProblem *problem,
			int expected)
{
	Oid	  types[3] = {UUIDOID, TEXTOID, TEXTOID};
	Datum values[3] = {
		UUIDPGetDatum(&letter->id),
		CStringGetTextDatum(problem->reason != NULL ? problem->reason : ""),
		CStringGetTextDatum(unpack_sql_state(problem->sqlstate))};

	(void) es_spi_execute_as_owner(sql, 3, types, values, NULL, expected);
}

/* True where it is written now; else the problem, or none where it was dropped. */
static bool
write_letter(const EsSource *source, EsWriter *writer, const DeadLetter *letter,
			 EsProblem *problem)
{
	EsDecoded	*decoded = es_writer_decode(writer, &letter->record, 1, problem);
	EsRoleSwitch saved;
	EsWritten	 written;

	if (problem->sqlstate != 0 || is_out_of_date(source, &letter->record))
		return false;
	es_role_assume(source->owner, &saved);
	es_writer_write(writer, &letter->record, decoded, 1, problem, &written);
	es_role_restore(&saved);
	return written.written > 0;
}

/* In a subtransaction of its own. */
static bool
retry_letter(const EsSource *source, EsWriter *writer, const DeadLetter *letter)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	EsProblem	  problem = {0};
	volatile bool written = false;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		written = write_letter(source, writer, letter, &problem);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		if (ERRCODE_TO_CATEGORY(error->sqlerrcode) == ERRCODE_OPERATOR_INTERVENTION)
			PG_RE_THROW();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		problem.sqlstate = error->sqlerrcode;
		problem.reason = error->message;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;

	if (problem.sqlstate == 0)
		execute_for("DELETE FROM eventstore.source_dead_letter WHERE id = $1", letter,
					&problem, SPI_OK_DELETE);
	else
		execute_for(
			"UPDATE eventstore.source_dead_letter"
			" SET attempts = attempts + 1, reason = $2, sqlstate = $3 WHERE id = $1",
			letter, &problem, SPI_OK_UPDATE);
	return written;
}

/* How many of these rows are written now; each in a context that is emptied. */
static int64
retry_rows(const EsSource *source, EsWriter *writer, SPITupleTable *rows,
		   MemoryContext each)
{
	int64 written = 0;

	for (uint64 i = 0; i < rows->numvals; i++)
	{
		MemoryContext old = MemoryContextSwitchTo(each);
		DeadLetter	  letter;

		CHECK_FOR_INTERRUPTS();
		read_letter(source, &letter, rows->vals[i], rows->tupdesc);
		if (retry_letter(source, writer, &letter))
			written++;
		MemoryContextSwitchTo(old);
		MemoryContextReset(each);
	}
	return written;
}

static int64
retry_source(const EsTask *task, const NullableDatum *ids)
{
	const EsSource *source;
	EsWriter	   *writer;
	Portal			letters;
	SPITupleTable  *rows;
	MemoryContext	each;
	int64			written = 0;
	int64			tried = 0;

	if (IsolationUsesXactSnapshot())
		ereport(
			ERROR,
			(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
			 errmsg("dead letters can be tried again only at isolation level READ "
					"COMMITTED"),
			 errdetail(
				 "An older snapshot does not show the newer records of their keys.")));
	(void) es_task_lock(task->key);
	source = es_source_load(task->key.object);
	/* It was dropped while we waited. */
	if (source == NULL)
		return 0;
	/* What the store has is asked of its changelog (is_out_of_date). */
	if (source->is_store)
		es_store_backlog_record_all(source->target);
	writer = es_writer_begin(source);
	SPI_connect();
	each = AllocSetContextCreate(CurrentMemoryContext, "eventstore dead letter",
								 ALLOCSET_DEFAULT_SIZES);
	letters = open_letters(source, ids);
	es_work_begin("retry_dead_letters", source->target);
	es_work_phase("writing records", 0);
	while ((rows = fetch_letters(letters)) != NULL)
	{
		written += retry_rows(source, writer, rows, each);
		es_work_done(tried += (int64) rows->numvals);
		SPI_freetuptable(rows);
	}
	es_work_end();
	SPI_cursor_close(letters);
	SPI_finish();
	return written;
}

/* Its worker publishes them (sink_letter.c). */
static int64
retry_sink(uint32 sink, const NullableDatum *ids)
{
	Oid	  types[2] = {INT4OID, UUIDARRAYOID};
	Datum values[2] = {Int32GetDatum((int32) sink), ids->value};

	es_task_call_at_commit(es_sink_key(sink));
	return (int64) es_spi_execute_as_owner(
		"UPDATE eventstore.sink_dead_letter SET retry = true"
		" WHERE sink = $1 AND ($2 IS NULL OR id = ANY ($2))",
		2, types, values, ids->isnull ? " n" : "  ", SPI_OK_UPDATE);
}

Datum
es_retry_dead_letters(PG_FUNCTION_ARGS)
{
	EsTask *task = es_task_require(&fcinfo->args[0]);
	int64	retried = 0;
	uint32	sink;

	es_task_check_owner(task);
	sink = task->key.object;
	if (task->key.kind == ES_WORKER_SOURCE)
	{
		retried = retry_source(task, &fcinfo->args[1]);
		sink = es_share_find_sink(task->key.object);
	}
	if (sink != 0)
		retried += retry_sink(sink, &fcinfo->args[1]);
	PG_RETURN_INT64(retried);
}
