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

#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"

/* ---------------------------------------------------------------------------
 * Offsets
 * ------------------------------------------------------------------------- */

/* Of a row (partition, next_offset, resume_offset, record_time, ...). */
static void
read_row(EsProgress *progress, const char *topic, HeapTuple row, TupleDesc desc)
{
	bool isnull;

	progress->topic = topic;
	progress->partition = DatumGetInt32(SPI_getbinval(row, desc, 1, &isnull));
	progress->written = DatumGetInt64(SPI_getbinval(row, desc, 2, &isnull));
	progress->time = DatumGetTimestampTz(SPI_getbinval(row, desc, 4, &isnull));
	progress->has_time = !isnull;
	progress->next = progress->written;
	progress->end = -1;
	progress->resume = DatumGetInt64(SPI_getbinval(row, desc, 3, &isnull));
	if (isnull)
		progress->resume = -1;
}

int
es_progress_load(const EsSource *source, const char *topic, EsProgress **partitions)
{
	Oid	  types[2] = {INT4OID, TEXTOID};
	Datum values[2] = {Int32GetDatum((int32) source->id), CStringGetTextDatum(topic)};
	MemoryContext context = CurrentMemoryContext;
	EsRoleSwitch  saved;
	int			  n;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("SELECT o.partition, o.next_offset, o.resume_offset, o.record_time"
				   " FROM eventstore.source_offset o"
				   " WHERE o.source = $1 AND o.topic = $2 ORDER BY 1",
				   2, types, values, NULL, true, SPI_OK_SELECT);
	n = (int) SPI_processed;
	*partitions = MemoryContextAllocZero(context, sizeof(EsProgress) * Max(n, 1));
	for (int i = 0; i < n; i++)
		read_row(&(*partitions)[i], topic, SPI_tuptable->vals[i], SPI_tuptable->tupdesc);
	SPI_finish();
	es_role_restore(&saved);
	return n;
}

int
es_progress_load_others(const EsSource *source, EsBegun **others)
{
	Oid			  types[2] = {INT4OID, OIDOID};
	Datum		  values[2] = {Int32GetDatum((int32) source->id),
							   ObjectIdGetDatum(source->target)};
	MemoryContext context = CurrentMemoryContext;
	EsRoleSwitch  saved;
	int			  n;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(
		"SELECT o.partition, o.next_offset, o.resume_offset, o.record_time, o.topic, s.id"
		" FROM eventstore.source_offset o JOIN eventstore.source s ON s.id = o.source"
		" WHERE s.target::oid = $2 AND s.id <> $1 AND o.next_offset > 0"
		" ORDER BY 6, 5, 1",
		2, types, values, NULL, true, SPI_OK_SELECT);
	n = (int) SPI_processed;
	*others = MemoryContextAllocZero(context, sizeof(EsBegun) * Max(n, 1));
	for (int i = 0; i < n; i++)
	{
		HeapTuple row = SPI_tuptable->vals[i];
		TupleDesc desc = SPI_tuptable->tupdesc;
		bool	  isnull;

		read_row(&(*others)[i].progress,
				 MemoryContextStrdup(context, SPI_getvalue(row, desc, 5)), row, desc);
		(*others)[i].source = DatumGetInt32(SPI_getbinval(row, desc, 6, &isnull));
	}
	SPI_finish();
	es_role_restore(&saved);
	return n;
}

void
es_progress_begin(const EsSource *source, const char *topic, int32 partition, int64 next)
{
	Oid	  types[4] = {INT4OID, TEXTOID, INT4OID, INT8OID};
	Datum values[4] = {Int32GetDatum((int32) source->id), CStringGetTextDatum(topic),
					   Int32GetDatum(partition), Int64GetDatum(next)};

	es_spi_execute_as_owner(
		"INSERT INTO eventstore.source_offset (source, topic, partition, next_offset)"
		" VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
		4, types, values, NULL, SPI_OK_INSERT);
}

/* The columns of what is moved, as arrays. */
enum
{
	MOVE_TOPIC,
	MOVE_PARTITION,
	MOVE_WRITTEN,
	MOVE_NEXT,
	MOVE_END,
	MOVE_RESUME,
	MOVE_TIME,
	MOVE_COLUMNS
};

bool
es_progress_advance(const EsSource *source, const EsProgress *partitions, int n)
{
	static const Oid elements[MOVE_COLUMNS] = {TEXTOID, INT4OID, INT8OID,		INT8OID,
											   INT8OID, INT8OID, TIMESTAMPTZOID};
	Oid	   types[1 + MOVE_COLUMNS] = {INT4OID,		TEXTARRAYOID,		INT4ARRAYOID,
									  INT8ARRAYOID, INT8ARRAYOID,		INT8ARRAYOID,
									  INT8ARRAYOID, TIMESTAMPTZARRAYOID};
	Datum *columns[MOVE_COLUMNS];
	bool  *nulls[MOVE_COLUMNS];
	Datum  values[1 + MOVE_COLUMNS] = {Int32GetDatum((int32) source->id)};

	if (n == 0)
		return true;
	for (int c = 0; c < MOVE_COLUMNS; c++)
	{
		columns[c] = palloc(sizeof(Datum) * n);
		nulls[c] = palloc0(sizeof(bool) * n);
	}
	for (int i = 0; i < n; i++)
	{
		const EsProgress *move = &partitions[i];

		columns[MOVE_TOPIC][i] = CStringGetTextDatum(move->topic);
		columns[MOVE_PARTITION][i] = Int32GetDatum(move->partition);
		columns[MOVE_WRITTEN][i] = Int64GetDatum(move->written);
		columns[MOVE_NEXT][i] = Int64GetDatum(move->next);
		columns[MOVE_END][i] = Int64GetDatum(Max(move->end, move->next));
		columns[MOVE_RESUME][i] = Int64GetDatum(move->resume);
		nulls[MOVE_RESUME][i] = move->resume < 0;
		columns[MOVE_TIME][i] = TimestampTzGetDatum(move->time);
		nulls[MOVE_TIME][i] = !move->has_time;
	}
	for (int c = 0; c < MOVE_COLUMNS; c++)
		values[1 + c] = es_spi_array(columns[c], nulls[c], n, elements[c]);

	return es_spi_execute_as_owner(
			   "UPDATE eventstore.source_offset o"
			   " SET next_offset = m.next, end_offset = m.\"end\","
			   " resume_offset = COALESCE(m.resume, o.resume_offset),"
			   " record_time = m.at,"
			   " updated_at = pg_catalog.clock_timestamp()"
			   " FROM unnest($2, $3, $4, $5, $6, $7, $8)"
			   " m (topic, partition, written, next, \"end\", resume, at)"
			   " WHERE o.source = $1 AND o.topic = m.topic AND o.partition = m.partition"
			   " AND o.next_offset = m.written",
			   lengthof(types), types, values, NULL, SPI_OK_UPDATE) == n;
}

void
es_progress_note_count(const EsSource *source, int count)
{
	Oid	  types[2] = {INT4OID, INT4OID};
	Datum values[2] = {Int32GetDatum((int32) source->id), Int32GetDatum(count)};

	if (count != source->partition_count)
		es_spi_execute_as_owner(
			"UPDATE eventstore.source SET partition_count = $2 WHERE id = $1", 2, types,
			values, NULL, SPI_OK_UPDATE);
}

void
es_progress_note_topic(const EsSource *source, const char *id)
{
	Oid	  types[2] = {INT4OID, TEXTOID};
	Datum values[2] = {Int32GetDatum((int32) source->id), CStringGetTextDatum(id)};

	es_spi_execute_as_owner(
		"UPDATE eventstore.source SET topic_id = NULLIF($2, '') WHERE id = $1", 2, types,
		values, NULL, SPI_OK_UPDATE);
}

void
es_progress_resynced(const EsSource *source)
{
	Oid	  types[1] = {INT4OID};
	Datum values[1] = {Int32GetDatum((int32) source->id)};

	es_spi_execute_as_owner("UPDATE eventstore.source SET resync = false WHERE id = $1",
							1, types, values, NULL, SPI_OK_UPDATE);
}

bool
es_progress_jump(const EsSource *source, const EsProgress *from, int64 to,
				 const char *reason)
{
	EsProgress move = *from;
	Oid		   types[6] = {INT4OID, TEXTOID, INT4OID, INT8OID, INT8OID, TEXTOID};
	Datum	   values[6] = {Int32GetDatum((int32) source->id),
							CStringGetTextDatum(from->topic),
							Int32GetDatum(from->partition),
							Int64GetDatum(from->written),
							Int64GetDatum(to),
							CStringGetTextDatum(reason)};

	/* The time is that of the record before the offset: that is another one now. */
	move.has_time = false;
	move.next = to;
	if (!es_progress_advance(source, &move, 1))
		return false;
	es_spi_execute_as_owner(
		"INSERT INTO eventstore.source_gap"
		" (source, topic, partition, first_offset, next_offset, reason)"
		" VALUES ($1, $2, $3, $4, $5, $6)",
		6, types, values, NULL, SPI_OK_INSERT);
	return true;
}

void
es_progress_restart(const EsSource *source, const char *topic, const char *reason)
{
	Oid	  types[3] = {INT4OID, TEXTOID, TEXTOID};
	Datum values[3] = {Int32GetDatum((int32) source->id), CStringGetTextDatum(topic),
					   CStringGetTextDatum(reason)};

	es_spi_execute_as_owner(
		"WITH old AS MATERIALIZED (SELECT o.* FROM eventstore.source_offset o"
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
	return bytes == NULL ? (Datum) 0
						 : PointerGetDatum(cstring_to_text_with_len(bytes, (int) length));
}

void
es_progress_park(const EsSource *source, const EsRecord *record, const EsProblem *problem)
{
	Oid	   types[10] = {INT4OID,  TEXTOID,	INT4OID,  INT8OID, TIMESTAMPTZOID,
						BYTEAOID, BYTEAOID, JSONBOID, TEXTOID, TEXTOID};
	char   nulls[11] = "          ";
	Jsonb *headers = es_codec_headers_fit(record) ? es_codec_headers(record) : NULL;
	Datum  values[10] = {Int32GetDatum((int32) source->id),
						 CStringGetTextDatum(record->topic),
						 Int32GetDatum(record->partition),
						 Int64GetDatum(record->offset),
						 TimestampTzGetDatum(record->time),
						 bytes_datum(record->key, record->key_length, &nulls[5]),
						 bytes_datum(record->value, record->value_length, &nulls[6]),
						 JsonbPGetDatum(headers),
						 CStringGetTextDatum(unpack_sql_state(problem->sqlstate)),
						 CStringGetTextDatum(problem->reason)};

	nulls[4] = record->has_time ? ' ' : 'n';
	nulls[7] = headers != NULL ? ' ' : 'n';
	es_spi_execute_as_owner(
		"INSERT INTO eventstore.source_dead_letter"
		" (source, topic, partition, record_offset, record_time, key, value, headers,"
		" sqlstate, reason) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
		10, types, values, nulls, SPI_OK_INSERT);
}
