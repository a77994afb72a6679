/*
 * kafka/progress.c
 *		How far a source has come: offsets, gaps, dead letters.
 *
 * Exactly once means that a record's effect and the offset behind it commit
 * together.  So the offsets are here, and Kafka's own are not used.  Two fences
 * keep two workers from writing for one source: a lock that the worker holds
 * for its session (source.c), and this table: an offset moves only from where
 * the mover left it, so whatever else fails, the second one is refused, and all
 * that he has written with it.
 *
 * Locks: the source's row FOR SHARE, then the target's, then rows of
 * source_offset; pause() and drop_source() take the source's row first, too.
 */
#include "postgres.h"

#include "kafka/progress.h"

#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/array.h"
#include "utils/builtins.h"

/* So many starts in a row without any progress, and the source has failed. */
#define STARTS_MAX		10

/* One statement about the source, as the extension's owner.  SPI stays open till es_end. */
static void
begin_statement(EsRoleSwitch *saved)
{
	es_role_assume(es_extension_owner(), saved);
	SPI_connect();
}

static void
end_statement(const EsRoleSwitch *saved)
{
	SPI_finish();
	es_role_restore(saved);
}

/* The whole of it, where no result is wanted; how many rows. */
static uint64
run_statement(const char *sql, int nargs, Oid *types, Datum *values, const char *nulls,
			  int expected)
{
	EsRoleSwitch saved;
	uint64		rows;

	begin_statement(&saved);
	es_spi_execute(sql, nargs, types, values, nulls, false, expected);
	rows = SPI_processed;
	end_statement(&saved);
	return rows;
}

bool
es_progress_hold(const EsSource *source)
{
	Oid			types[3] = {INT4OID, INT8OID, OIDOID};
	Datum		values[3] = {Int32GetDatum((int32) source->id),
		Int64GetDatum((int64) GetSystemIdentifier()), ObjectIdGetDatum(MyDatabaseId)};

	return run_statement("SELECT FROM eventstore.source s WHERE s.id = $1 AND NOT s.paused"
						 " AND s.failure IS NULL AND s.system_identifier = $2"
						 " AND s.database_oid = $3 FOR SHARE",
						 3, types, values, NULL, SPI_OK_SELECT) > 0;
}

/* ---------------------------------------------------------------------------
 * Offsets
 * ------------------------------------------------------------------------- */

int
es_progress_load(const EsSource *source, EsProgress **partitions)
{
	Oid			types[2] = {INT4OID, TEXTOID};
	Datum		values[2] = {Int32GetDatum((int32) source->id), CStringGetTextDatum(source->topic)};
	MemoryContext context = CurrentMemoryContext;
	EsRoleSwitch saved;
	int			n;

	begin_statement(&saved);
	es_spi_execute("SELECT o.partition, o.next_offset, o.record_time FROM eventstore.source_offset o"
				   " WHERE o.source = $1 AND o.topic = $2 ORDER BY 1",
				   2, types, values, NULL, true, SPI_OK_SELECT);
	n = (int) SPI_processed;
	*partitions = MemoryContextAllocZero(context, sizeof(EsProgress) * Max(n, 1));
	for (int i = 0; i < n; i++)
	{
		EsProgress *progress = &(*partitions)[i];
		HeapTuple	row = SPI_tuptable->vals[i];
		bool		isnull;

		progress->partition = DatumGetInt32(SPI_getbinval(row, SPI_tuptable->tupdesc, 1, &isnull));
		progress->written = DatumGetInt64(SPI_getbinval(row, SPI_tuptable->tupdesc, 2, &isnull));
		progress->time = DatumGetTimestampTz(SPI_getbinval(row, SPI_tuptable->tupdesc, 3, &isnull));
		progress->has_time = !isnull;
		progress->next = progress->written;
		progress->end = -1;
	}
	end_statement(&saved);
	return n;
}

void
es_progress_begin(const EsSource *source, int32 partition, int64 next)
{
	Oid			types[4] = {INT4OID, TEXTOID, INT4OID, INT8OID};
	Datum		values[4] = {Int32GetDatum((int32) source->id), CStringGetTextDatum(source->topic),
	Int32GetDatum(partition), Int64GetDatum(next)};

	run_statement("INSERT INTO eventstore.source_offset (source, topic, partition, next_offset)"
				  " VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
				  4, types, values, NULL, SPI_OK_INSERT);
}

static Datum
make_array(Datum *elements, bool *nulls, int n, Oid type, int length)
{
	int			dims[1] = {n};
	int			lower[1] = {1};

	return PointerGetDatum(construct_md_array(elements, nulls, 1, dims, lower, type, length,
											  true, length == 8 ? TYPALIGN_DOUBLE : TYPALIGN_INT));
}

bool
es_progress_advance(const EsSource *source, const EsProgress *partitions, int n)
{
	Oid			types[7] = {INT4OID, TEXTOID, INT4ARRAYOID, INT8ARRAYOID, INT8ARRAYOID,
	INT8ARRAYOID, TIMESTAMPTZARRAYOID};
	Datum	   *columns[5];
	bool	   *nulls[5];
	Datum		values[7] = {Int32GetDatum((int32) source->id), CStringGetTextDatum(source->topic)};

	if (n == 0)
		return true;
	for (int c = 0; c < 5; c++)
	{
		columns[c] = palloc(sizeof(Datum) * n);
		nulls[c] = palloc0(sizeof(bool) * n);
	}
	for (int i = 0; i < n; i++)
	{
		columns[0][i] = Int32GetDatum(partitions[i].partition);
		columns[1][i] = Int64GetDatum(partitions[i].written);
		columns[2][i] = Int64GetDatum(partitions[i].next);
		columns[3][i] = Int64GetDatum(Max(partitions[i].end, partitions[i].next));
		columns[4][i] = TimestampTzGetDatum(partitions[i].time);
		nulls[4][i] = !partitions[i].has_time;
	}
	values[2] = make_array(columns[0], nulls[0], n, INT4OID, 4);
	for (int c = 1; c < 4; c++)
		values[2 + c] = make_array(columns[c], nulls[c], n, INT8OID, 8);
	values[6] = make_array(columns[4], nulls[4], n, TIMESTAMPTZOID, 8);

	return run_statement("UPDATE eventstore.source_offset o"
					  " SET next_offset = m.next, end_offset = m.\"end\","
					  " record_time = m.at,"
					  " updated_at = pg_catalog.clock_timestamp()"
					  " FROM unnest($3, $4, $5, $6, $7) m (partition, written, next, \"end\", at)"
					  " WHERE o.source = $1 AND o.topic = $2 AND o.partition = m.partition"
					  " AND o.next_offset = m.written",
					  7, types, values, NULL, SPI_OK_UPDATE) == n;
}

bool
es_progress_jump(const EsSource *source, const EsProgress *from, int64 to, const char *reason)
{
	EsProgress	move = *from;
	Oid			types[6] = {INT4OID, TEXTOID, INT4OID, INT8OID, INT8OID, TEXTOID};
	Datum		values[6] = {Int32GetDatum((int32) source->id), CStringGetTextDatum(source->topic),
		Int32GetDatum(from->partition), Int64GetDatum(from->written), Int64GetDatum(to),
	CStringGetTextDatum(reason)};

	/* The time is that of the record before the offset: that is another one now. */
	move.has_time = false;
	move.next = to;
	if (!es_progress_advance(source, &move, 1))
		return false;
	run_statement("INSERT INTO eventstore.source_gap"
				  " (source, topic, partition, first_offset, next_offset, reason)"
				  " VALUES ($1, $2, $3, $4, $5, $6)",
				  6, types, values, NULL, SPI_OK_INSERT);
	return true;
}

void
es_progress_restart(const EsSource *source, const char *reason)
{
	Oid			types[3] = {INT4OID, TEXTOID, TEXTOID};
	Datum		values[3] = {Int32GetDatum((int32) source->id), CStringGetTextDatum(source->topic),
	CStringGetTextDatum(reason)};

	run_statement("WITH old AS MATERIALIZED (SELECT o.* FROM eventstore.source_offset o"
				  " WHERE o.source = $1 AND o.topic = $2 FOR UPDATE),"
				  " gap AS (INSERT INTO eventstore.source_gap"
				  " (source, topic, partition, first_offset, next_offset, reason)"
				  " SELECT old.source, old.topic, old.partition, old.next_offset, 0, $3"
				  " FROM old WHERE old.next_offset > 0)"
				  " UPDATE eventstore.source_offset o SET next_offset = 0, end_offset = NULL,"
				  " record_time = NULL, updated_at = pg_catalog.clock_timestamp() FROM old"
				  " WHERE o.source = old.source AND o.topic = old.topic"
				  " AND o.partition = old.partition",
				  3, types, values, NULL, SPI_OK_UPDATE);
}

/* ---------------------------------------------------------------------------
 * Dead letters
 * ------------------------------------------------------------------------- */

static Datum
bytes_datum(const char *bytes, size_t length, char *isnull)
{
	*isnull = bytes == NULL ? 'n' : ' ';
	return bytes == NULL ? (Datum) 0 :
		PointerGetDatum(cstring_to_text_with_len(bytes, (int) length));
}

void
es_progress_park(const EsSource *source, const EsRecord *record, const EsProblem *problem)
{
	Oid			types[10] = {INT4OID, TEXTOID, INT4OID, INT8OID, TIMESTAMPTZOID, BYTEAOID, BYTEAOID,
	JSONBOID, TEXTOID, TEXTOID};
	char		nulls[11] = "          ";
	Jsonb	   *headers = es_codec_headers(record);
	Datum		values[10] = {
		Int32GetDatum((int32) source->id), CStringGetTextDatum(record->topic),
		Int32GetDatum(record->partition), Int64GetDatum(record->offset),
		TimestampTzGetDatum(record->time),
		bytes_datum(record->key, record->key_length, &nulls[5]),
		bytes_datum(record->value, record->value_length, &nulls[6]),
		JsonbPGetDatum(headers),
		CStringGetTextDatum(unpack_sql_state(problem->sqlstate)),
		CStringGetTextDatum(problem->reason)
	};

	nulls[4] = record->has_time ? ' ' : 'n';
	nulls[7] = headers != NULL ? ' ' : 'n';
	run_statement("INSERT INTO eventstore.source_dead_letter"
				  " (source, topic, partition, record_offset, record_time, key, value, headers,"
				  " sqlstate, reason) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
				  10, types, values, nulls, SPI_OK_INSERT);
}

/* ---------------------------------------------------------------------------
 * Starts
 * ------------------------------------------------------------------------- */

bool
es_progress_note_start(const EsSource *source)
{
	Oid			types[3] = {INT4OID, INT4OID, TEXTOID};
	Datum		values[3] = {Int32GetDatum((int32) source->id), Int32GetDatum(STARTS_MAX),
	CStringGetTextDatum(psprintf("the worker has ended %d times without any progress", STARTS_MAX))};
	EsRoleSwitch saved;
	bool		isnull;
	bool		failed = true;

	begin_statement(&saved);
	es_spi_execute("UPDATE eventstore.source SET starts = starts + 1,"
				   " failure = CASE WHEN starts >= $2 THEN $3 END"
				   " WHERE id = $1 RETURNING failure IS NOT NULL",
				   3, types, values, NULL, false, SPI_OK_UPDATE_RETURNING);
	if (SPI_processed > 0)
		failed = DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1,
											&isnull));
	end_statement(&saved);
	return !failed;
}

void
es_progress_lives(const EsSource *source)
{
	Oid			types[1] = {INT4OID};
	Datum		values[1] = {Int32GetDatum((int32) source->id)};

	run_statement("UPDATE eventstore.source SET starts = 0 WHERE id = $1 AND starts > 0",
				  1, types, values, NULL, SPI_OK_UPDATE);
}
