/*
 * kafka/sink_progress.c
 *		How far a sink has come, and what it could not publish.
 *
 * The position moves only from where the mover left it, so of two workers of one
 * sink (there is a lock against that) the second is refused.  It may be lost in a
 * crash of the server together with the last commits: then events come again, or,
 * with exactly_once, Kafka knows better.
 *
 * What a group's member publishes is in its own store, so it need not restore it
 * when it gets a partition back: how far it has come in the changelog topic moves
 * along behind what it has committed there, of the partitions that are ours.
 * Before those records lies only what it had restored (share.c).
 *
 * Locks: the row of sink_position, then rows of source_offset; to the end of the
 * transaction.
 */
#include "postgres.h"

#include "kafka/sink_run.h"

#include "catalog/pg_type.h"
#include "spi.h"
#include "utils/array.h"
#include "utils/builtins.h"

/* As an array; 0 where the topic is not known yet. */
static Datum
acknowledged_ends(const EsDelivery *delivery)
{
	Datum *ends = palloc(sizeof(Datum) * Max(delivery->nends, 1));

	if (delivery->nends == 0)
		return (Datum) 0;
	for (int i = 0; i < delivery->nends; i++)
		ends[i] = Int64GetDatum(delivery->ends[i]);
	return es_spi_array(ends, NULL, delivery->nends, INT8OID);
}

/* Behind what is acknowledged of ours; what the source has restored may be further. */
static void
save_restored(EsSinkRun *run)
{
	static const char sql[] =
		"UPDATE eventstore.source_offset o SET next_offset = e.next,"
		" end_offset = GREATEST(o.end_offset, e.next), record_time = NULL,"
		" updated_at = pg_catalog.clock_timestamp()"
		" FROM unnest($3) WITH ORDINALITY e (next, number)"
		" WHERE o.source = $1 AND o.topic = $2 AND o.partition = e.number - 1"
		" AND o.next_offset < e.next";
	const EsDelivery *delivery = &run->delivery;
	Datum			 *ends = palloc0(sizeof(Datum) * delivery->nends);
	Oid				  types[3] = {INT4OID, TEXTOID, INT8ARRAYOID};
	Datum			  values[3] = {Int32GetDatum((int32) run->sink->changelog_of),
								   CStringGetTextDatum(run->sink->topic), 0};

	for (int i = 0; i < delivery->nends; i++)
		ends[i] = Int64GetDatum(es_share_has(run->share, i) ? delivery->ends[i] : 0);
	values[2] = es_spi_array(ends, NULL, delivery->nends, INT8OID);
	(void) es_spi_execute_as_owner(sql, 3, types, values, NULL, SPI_OK_UPDATE);
}

void
es_sink_save(EsSinkRun *run, EsPosition position)
{
	Oid	  types[4] = {INT4OID, INT8OID, INT8OID, INT8ARRAYOID};
	Datum values[4] = {Int32GetDatum((int32) run->sink->id), Int64GetDatum(position),
					   Int64GetDatum(run->saved)};

	es_task_begin();
	values[3] = acknowledged_ends(&run->delivery);
	if (es_spi_execute_as_owner("UPDATE eventstore.sink_position SET position = $2,"
								" ends = COALESCE($4, ends),"
								" updated_at = pg_catalog.clock_timestamp()"
								" WHERE sink = $1 AND position = $3",
								4, types, values, values[3] == (Datum) 0 ? "   n" : NULL,
								SPI_OK_UPDATE) > 0)
	{
		run->saved = position;
		run->progressed = true;
		if (run->share != NULL && run->delivery.nends > 0)
			save_restored(run);
	}
	else if (es_spi_execute_as_owner(
				 "SELECT FROM eventstore.sink_position WHERE sink = $1", 1, types, values,
				 NULL, SPI_OK_SELECT) > 0)
		ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
						errmsg("the position of sink \"%s\" was moved by somebody else",
							   run->sink->name)));
	else
		run->leave = ES_LEAVE_AND_RETURN;
	es_task_commit(run->scratch);
	es_worker_count(ES_WORKER_BATCHES, 1);
}

void
es_sink_park(EsSinkRun *run, EsPosition position, int sqlstate, const char *reason)
{
	Oid	  types[4] = {INT4OID, INT8OID, TEXTOID, TEXTOID};
	Datum values[4] = {Int32GetDatum((int32) run->sink->id), Int64GetDatum(position),
					   CStringGetTextDatum(unpack_sql_state(sqlstate)),
					   CStringGetTextDatum(reason)};

	(void) es_spi_execute_as_owner(
		"INSERT INTO eventstore.sink_dead_letter (sink, position, sqlstate,"
		" reason) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
		4, types, values, NULL, SPI_OK_INSERT);
}
