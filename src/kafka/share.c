/*
 * kafka/share.c
 *		Which changes of a store the server may publish whose source shares its
 *		topic with others, as a consumer group.
 *
 * A changelog topic has the changes of a key in their order as long as one server
 * at a time publishes those of its partition.  A server that lost a partition
 * may have changes that are not published yet: it was too slow, or it had died and
 * is back.  The partition's next owner has read their records once more and
 * published what came of them, and later ones (restore.c), so it would
 * put old values behind new ones.
 *
 * So the source's worker says which partitions are ours (source.assigned), once
 * they are restored, and that nobody knows (null) while that changes; the sink of
 * the changelog publishes nothing meanwhile.  Then it leaves out
 *
 *	-	what came from partitions that are another's now;
 *	-	of what was recorded before the last restore (assigned_after), changes of
 *		keys for which the topic had something newer: the key's last change
 *		is one that was restored.
 *
 * What it leaves out for good is in the topic already, or the next owner's to
 * publish.  What the worker said last may be of a worker that has died: it counts
 * only as long as that process lives (assigned_by).
 *
 * A partition is given up in good order after the sink has published all
 * (es_share_drain), so that the next owner need not read it once more.
 *
 * Locks: the source's row, when the worker says so.
 */
#include "postgres.h"

#include "kafka/share.h"

#include "catalog/pg_type.h"
#include "kafka/sink.h"
#include "kafka/source.h"
#include "miscadmin.h"
#include "spi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "worker/launcher.h"

struct EsShare
{
	bool	   settled;
	EsPosition after;
	char	  *topic;
	int		   n;
	int32	  *partitions; /* ours */
	char	  *changelog_topic;
	Oid		   changelog;
};

/* ---------------------------------------------------------------------------
 * What the worker says
 * ------------------------------------------------------------------------- */

void
es_share_note(uint32 source, const int32 *partitions, int n)
{
	static const char sql[] =
		"UPDATE eventstore.source s SET assigned = $2, assigned_by = $3,"
		" assigned_after = COALESCE((SELECT eventstore.collection_head(k.collection)"
		" FROM eventstore.sink k WHERE k.changelog_of = s.id), 0) WHERE s.id = $1";
	Oid			 types[3] = {INT4OID, INT4ARRAYOID, INT4OID};
	Datum		 values[3] = {Int32GetDatum((int32) source), 0, Int32GetDatum(MyProcPid)};
	Datum		*elements = palloc(sizeof(Datum) * Max(n, 1));
	EsRoleSwitch saved;

	for (int i = 0; i < n; i++)
		elements[i] = Int32GetDatum(partitions[i]);
	values[1] =
		PointerGetDatum(construct_array(elements, n, INT4OID, 4, true, TYPALIGN_INT));
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, 3, types, values, partitions == NULL ? " n " : NULL, false,
				   SPI_OK_UPDATE);
	SPI_finish();
	es_role_restore(&saved);
}

uint32
es_share_find_sink(uint32 source)
{
	Oid			 types[1] = {INT4OID};
	Datum		 values[1] = {Int32GetDatum((int32) source)};
	EsRoleSwitch saved;
	uint32		 sink = 0;
	bool		 isnull;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("SELECT id FROM eventstore.sink WHERE changelog_of = $1", 1, types,
				   values, NULL, true, SPI_OK_SELECT);
	if (SPI_processed > 0)
		sink = DatumGetInt32(
			SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	SPI_finish();
	es_role_restore(&saved);
	return sink;
}

void
es_share_drain(uint32 sink, long timeout_ms)
{
	TimestampTz until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), timeout_ms);
	EsWorkerKey key = es_sink_key(sink);
	uint64		ticket;

	if (es_errand_ask(key, ES_ERRAND_FLUSH, &ticket))
		(void) es_errand_wait(key, ES_ERRAND_FLUSH, ticket, until);
}

/* ---------------------------------------------------------------------------
 * What the sink makes of it
 * ------------------------------------------------------------------------- */

/* The process of the source's worker; 0: there is none. */
static int
worker_of(uint32 source)
{
	EsWorkerKey	  key = es_source_key(source);
	EsWorkerInfo *workers;
	int			  n = es_worker_list(&workers);

	for (int i = 0; i < n; i++)
		if (workers[i].key.database == key.database && workers[i].key.kind == key.kind &&
			workers[i].key.object == key.object)
			return workers[i].pid;
	return 0;
}

/* One row for each partition that is ours, or one without. */
static EsShare *
read_share(uint32 source, MemoryContext context)
{
	EsShare	 *share = MemoryContextAllocZero(context, sizeof(EsShare));
	TupleDesc desc = SPI_tuptable->tupdesc;
	bool	  isnull;
	char	 *topic = SPI_getvalue(SPI_tuptable->vals[0], desc, 1);

	share->topic = MemoryContextStrdup(context, topic);
	share->settled =
		DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], desc, 2, &isnull)) &&
		DatumGetInt32(SPI_getbinval(SPI_tuptable->vals[0], desc, 3, &isnull)) ==
			worker_of(source);
	share->after = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0], desc, 4, &isnull));
	share->partitions = MemoryContextAlloc(context, sizeof(int32) * SPI_processed);
	share->changelog_topic =
		MemoryContextStrdup(context, SPI_getvalue(SPI_tuptable->vals[0], desc, 6));
	share->changelog =
		DatumGetObjectId(SPI_getbinval(SPI_tuptable->vals[0], desc, 7, &isnull));
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		Datum partition = SPI_getbinval(SPI_tuptable->vals[i], desc, 5, &isnull);

		if (!isnull)
			share->partitions[share->n++] = DatumGetInt32(partition);
	}
	return share;
}

EsShare *
es_share_load(uint32 source)
{
	static const char sql[] =
		"SELECT s.topic, s.assigned IS NOT NULL, COALESCE(s.assigned_by, 0),"
		" COALESCE(s.assigned_after, 0), p.number, s.changelog_topic, k.collection::oid"
		" FROM eventstore.source s JOIN eventstore.sink k ON k.changelog_of = s.id"
		" LEFT JOIN LATERAL unnest(s.assigned) p (number) ON true"
		" WHERE s.id = $1 AND s.group_id IS NOT NULL";
	Oid			  types[1] = {INT4OID};
	Datum		  values[1] = {Int32GetDatum((int32) source)};
	MemoryContext context = CurrentMemoryContext;
	EsRoleSwitch  saved;
	EsShare		 *share = NULL;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, 1, types, values, NULL, true, SPI_OK_SELECT);
	if (SPI_processed > 0)
		share = read_share(source, context);
	SPI_finish();
	es_role_restore(&saved);
	return share;
}

bool
es_share_is_settled(const EsShare *share)
{
	return share == NULL || share->settled;
}

/* Is there a later change of that key, and is the last one from the changelog topic? */
static bool
is_overtaken(const EsShare *share, EsPosition position, Datum stream)
{
	Oid			 types[4] = {OIDOID, TEXTOID, TEXTOID, INT8OID};
	Datum		 values[4] = {ObjectIdGetDatum(share->changelog), stream,
							  CStringGetTextDatum(share->changelog_topic),
							  Int64GetDatum(position)};
	EsRoleSwitch saved;
	bool		 overtaken;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("SELECT FROM eventstore.peek($1::pg_catalog.regclass, $2) e"
				   " WHERE e.position > $4 AND e.metadata->>'topic' = $3",
				   4, types, values, NULL, true, SPI_OK_SELECT);
	overtaken = SPI_processed > 0;
	SPI_finish();
	es_role_restore(&saved);
	return overtaken;
}

bool
es_share_has(const EsShare *share, EsPosition position, const char *topic,
			 int32 partition, Datum stream)
{
	if (share == NULL || strcmp(share->topic, topic) != 0)
		return true;
	for (int i = 0; i < share->n; i++)
		if (share->partitions[i] == partition)
			return position > share->after || !is_overtaken(share, position, stream);
	return false;
}
