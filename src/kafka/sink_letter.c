/*
 * kafka/sink_letter.c
 *		Events that a sink has parked, published again.
 *
 * retry_dead_letters() marks their rows and calls the worker, for only workers
 * have clients.  The worker takes one at a time, while nothing else is on its way
 * and no transaction of Kafka's is open: so what fails is that one's fault.  When
 * it has arrived its row goes; one that fails again has one attempt more, and is
 * not marked any more.
 *
 * A store's changelog topic must not get an old value behind a new one of the same
 * key: so where the store has changed the key since, the row goes, and nothing else;
 * that change is in the topic, or will be.  One whose key is another member's of the
 * group stays (share.c).
 *
 * Exactly once: the transaction's progress record names the row as well.  Who
 * begins after a crash finds there whether it was published, and drops the row.
 *
 * Locks: the row, for the time of a statement.  A crash: the row is still marked;
 * without exactly_once its event may come twice.
 */
#include "postgres.h"

#include "kafka/sink_run.h"

#include "catalog/pg_type.h"
#include "spi.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/uuid.h"

/* The first one that is marked, into run->letter; false where there is none. */
static bool
find_letter(EsSinkRun *run)
{
	Oid			 types[1] = {INT4OID};
	Datum		 values[1] = {Int32GetDatum((int32) run->sink->id)};
	EsRoleSwitch saved;
	bool		 found;

	es_task_begin();
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("SELECT id::text, position FROM eventstore.sink_dead_letter"
				   " WHERE sink = $1 AND retry ORDER BY position LIMIT 1",
				   1, types, values, NULL, true, SPI_OK_SELECT);
	found = SPI_processed > 0;
	if (found)
	{
		bool isnull;

		strlcpy(run->letter,
				SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1),
				sizeof(run->letter));
		run->letter_position = DatumGetInt64(
			SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull));
	}
	SPI_finish();
	es_role_restore(&saved);
	es_task_commit(run->scratch);
	return found;
}

/* Runs a statement about the row $1. */
static void
execute_for(EsSinkRun *run, const char *id, const char *sql, int expected, int sqlstate,
			const char *reason)
{
	Oid	  types[3] = {TEXTOID, TEXTOID, TEXTOID};
	Datum values[3] = {CStringGetTextDatum(id),
					   CStringGetTextDatum(unpack_sql_state(sqlstate)),
					   CStringGetTextDatum(reason)};

	es_task_begin();
	(void) es_spi_execute_as_owner(sql, 3, types, values, NULL, expected);
	es_task_commit(run->scratch);
}

void
es_sink_letter_forget(EsSinkRun *run, const char *id)
{
	execute_for(run, id, "DELETE FROM eventstore.sink_dead_letter WHERE id::text = $1",
				SPI_OK_DELETE, 0, "");
}

void
es_sink_letter_failed(EsSinkRun *run, const char *id, int sqlstate, const char *reason)
{
	execute_for(
		run, id,
		"UPDATE eventstore.sink_dead_letter SET retry = false,"
		" attempts = attempts + 1, sqlstate = $2, reason = $3 WHERE id::text = $1",
		SPI_OK_UPDATE, sqlstate, reason);
}

bool
es_sink_letters_wait(const EsSinkRun *run)
{
	return run->letters && run->bad == 0 && run->read_to >= run->single_to;
}

bool
es_sink_letter_is_due(const EsSinkRun *run, TimestampTz now)
{
	return es_sink_letters_wait(run) && run->letter[0] == '\0' &&
		   run->halt == ES_SINK_GOES_ON && run->leave == ES_LEAVE_NOT &&
		   run->retry_at <= now && !run->in_transaction &&
		   run->delivery.error == RD_KAFKA_RESP_ERR_NO_ERROR &&
		   es_delivery_is_empty(&run->delivery);
}

void
es_sink_letter_put(EsSinkRun *run)
{
	char id[lengthof(run->letter)];

	if (!find_letter(run))
	{
		run->letters = false;
		run->more = true;
		return;
	}
	strlcpy(id, run->letter, sizeof(id));
	run->oldest = GetCurrentTimestamp();
	if (es_sink_read_letter(run))
		return;
	/* What is open has nothing of it. */
	run->letter[0] = '\0';
	if (run->bad == 0)
		return;
	run->bad = 0;
	es_sink_letter_failed(run, id, run->bad_sqlstate, run->bad_reason);
}

void
es_sink_letter_settle(EsSinkRun *run)
{
	if (run->letter[0] == '\0' || run->in_transaction || run->halt != ES_SINK_GOES_ON ||
		run->delivery.error != RD_KAFKA_RESP_ERR_NO_ERROR ||
		!es_delivery_is_empty(&run->delivery))
		return;
	es_sink_letter_forget(run, run->letter);
	run->letter[0] = '\0';
}
