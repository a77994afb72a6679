/*
 * kafka/share.c
 *		Which changes of a store the server may publish whose source shares its
 *		topic with others, as a consumer group.
 *
 * A changelog topic has the changes of a key in their order as long as one server
 * at a time publishes those of its partition.  A server that lost a partition
 * may have changes that are not published yet: it was too slow, or stood still,
 * or had died and is back.  The partition's next owner has read their records once
 * more and published what came of them, and later ones (restore.c): an old value
 * behind a new one would be the key's last, and compaction would leave nothing else.
 *
 * The fence is the group's coordinator, who alone knows whose a partition is.
 *
 *	1.	The sink publishes in transactions of Kafka.  When all records of one are
 *		acknowledged it commits offsets of our partitions with it, in the name of the
 *		membership (member, generation) by which they were ours as it began.  The
 *		coordinator takes that from members of the present generation only; what it
 *		does not take is aborted, whoever the sink believes to be
 *		(sink_transaction.c).
 *	2.	The next owner has been given the partition in a later generation, so what may
 *		still be committed of the last owner's is in the changelog topic by then, if
 *		not committed: it restores up to the end that the topic has from now on, which
 *		is the high watermark, not the last stable offset, and waits for transactions
 *		that are open below (restore.c).
 *	3.	Then it publishes, by its own membership.
 *
 * So whoever reads what is committed finds the changes of one owner behind those
 * of the other, never among them.  No clock is needed for that; a transaction that
 * a dead member left open is over after ten seconds.  test/model/group.pml has it
 * all searched, with what goes wrong where a step is left out.
 *
 * So the source's worker says which partitions are ours and by which membership
 * (source.assigned, assigned_as), once they are restored, and that nobody knows
 * (null) while that changes; the sink publishes nothing meanwhile.  Then it leaves
 * out
 *
 *	-	what came from partitions that are another's now;
 *	-	of what was recorded before the last restore (assigned_after), changes of
 *		keys for which the topic had something newer: the key's last change
 *		is one that was restored.
 *
 * What it leaves out for good is in the topic already, or the next owner's to
 * publish; but for changes by SQL of keys that are another's now, of which nobody
 * else knows: those become dead letters.  What the worker said last may be of a
 * worker that has died: it counts only as long as that process lives (assigned_by).
 *
 * A partition is given up in good order after the sink has published all
 * (es_share_drain), so that the next owner need not read it once more, and there
 * are no such letters.
 *
 * Locks: the source's row, when the worker says so.
 */
#include "postgres.h"

#include "kafka/share.h"

#include "catalog/pg_type.h"
#include "kafka/codec.h"
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
	int		   count; /* partitions of the topic; 0: not known */
	int		   n;
	int32	  *partitions; /* ours */
	int64	  *offsets;	   /* of the next record of each */
	bytea	  *membership;
	char	  *changelog_topic;
	Oid		   changelog;
};

/* ---------------------------------------------------------------------------
 * What the worker says
 * ------------------------------------------------------------------------- */

void
es_share_note(uint32 source, const int32 *partitions, int n, bytea *membership)
{
	static const char sql[] =
		"UPDATE eventstore.source s"
		" SET assigned = $2, assigned_by = $3, assigned_as = $4,"
		" assigned_after = COALESCE((SELECT eventstore.collection_head(k.collection)"
		" FROM eventstore.sink k WHERE k.changelog_of = s.id), 0) WHERE s.id = $1";
	Oid	   types[4] = {INT4OID, INT4ARRAYOID, INT4OID, BYTEAOID};
	Datum  values[4] = {Int32GetDatum((int32) source), 0, Int32GetDatum(MyProcPid),
						PointerGetDatum(membership)};
	Datum *elements = palloc(sizeof(Datum) * Max(n, 1));
	char   nulls[] = {' ', partitions == NULL ? 'n' : ' ', ' ',
					  membership == NULL ? 'n' : ' ', '\0'};

	for (int i = 0; i < n; i++)
		elements[i] = Int32GetDatum(partitions[i]);
	values[1] = es_spi_array(elements, NULL, n, INT4OID);
	(void) es_spi_execute_as_owner(sql, 4, types, values, nulls, SPI_OK_UPDATE);
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
	EsWorkerInfo worker;

	return es_worker_find(es_source_key(source), &worker) ? worker.pid : 0;
}

static Datum
column(uint64 row, int number, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, number, isnull);
}

/* One row for each partition that is ours, or one without. */
static EsShare *
read_share(uint32 source, MemoryContext context)
{
	EsShare		 *share = MemoryContextAllocZero(context, sizeof(EsShare));
	MemoryContext old = MemoryContextSwitchTo(context);
	Datum		  membership;
	bool		  isnull;

	share->topic = TextDatumGetCString(column(0, 1, &isnull));
	share->settled = DatumGetInt32(column(0, 2, &isnull)) == worker_of(source);
	share->after = DatumGetInt64(column(0, 3, &isnull));
	share->changelog_topic = TextDatumGetCString(column(0, 4, &isnull));
	share->changelog = DatumGetObjectId(column(0, 5, &isnull));
	share->count = DatumGetInt32(column(0, 6, &isnull));
	membership = column(0, 7, &isnull);
	if (isnull)
		share->settled = false;
	else
		share->membership = DatumGetByteaPCopy(membership);
	share->partitions = palloc(sizeof(int32) * SPI_processed);
	share->offsets = palloc(sizeof(int64) * SPI_processed);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		Datum partition = column(i, 8, &isnull);

		if (isnull)
			continue;
		share->partitions[share->n] = DatumGetInt32(partition);
		share->offsets[share->n++] = DatumGetInt64(column(i, 9, &isnull));
	}
	MemoryContextSwitchTo(old);
	return share;
}

EsShare *
es_share_load(uint32 source)
{
	static const char sql[] =
		"SELECT s.topic, CASE WHEN s.assigned IS NOT NULL THEN COALESCE(s.assigned_by, 0)"
		" ELSE -1 END, COALESCE(s.assigned_after, 0), s.changelog_topic,"
		" k.collection::oid, COALESCE(s.partition_count, 0), s.assigned_as, p.number,"
		" COALESCE(o.next_offset, 0)"
		" FROM eventstore.source s JOIN eventstore.sink k ON k.changelog_of = s.id"
		" LEFT JOIN LATERAL unnest(s.assigned) p (number) ON true"
		" LEFT JOIN eventstore.source_offset o ON o.source = s.id AND o.topic = s.topic"
		" AND o.partition = p.number"
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

bool
es_share_is_overtaken(Oid changelog, EsPosition position, Datum stream, const char *topic)
{
	Oid			 types[4] = {OIDOID, TEXTOID, TEXTOID, INT8OID};
	Datum		 values[4] = {ObjectIdGetDatum(changelog), stream,
						  topic != NULL ? CStringGetTextDatum(topic) : (Datum) 0,
							  Int64GetDatum(position)};
	EsRoleSwitch saved;
	bool		 overtaken;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("SELECT FROM eventstore.peek($1::pg_catalog.regclass, $2) e"
				   " WHERE e.position > $4 AND ($3 IS NULL OR e.metadata->>'topic' = $3)",
				   4, types, values, topic == NULL ? "  n " : NULL, true, SPI_OK_SELECT);
	overtaken = SPI_processed > 0;
	SPI_finish();
	es_role_restore(&saved);
	return overtaken;
}

bool
es_share_has(const EsShare *share, int32 partition)
{
	for (int i = 0; i < share->n; i++)
		if (share->partitions[i] == partition)
			return true;
	return false;
}

int32
es_share_partition_of(const EsShare *share, const char *key, size_t length)
{
	if (share->count < 1)
		return -1;
	return es_codec_partition(key, length, share->count);
}

EsShareVerdict
es_share_judge(const EsShare *share, EsPosition position, const char *topic,
			   int32 partition, Datum stream)
{
	if (!es_share_has(share, partition))
		return topic != NULL && strcmp(share->topic, topic) == 0 ? ES_SHARE_KNOWN
																 : ES_SHARE_LOST;
	/* Whether the key's last change is one that was restored. */
	return position > share->after ||
				   !es_share_is_overtaken(share->changelog, position, stream,
										  share->changelog_topic)
			   ? ES_SHARE_OURS
			   : ES_SHARE_KNOWN;
}

const bytea *
es_share_membership(const EsShare *share)
{
	return share->settled ? share->membership : NULL;
}

bool
es_share_is_by(const EsShare *share, const bytea *membership)
{
	return membership != NULL && share->membership != NULL &&
		   VARSIZE(membership) == VARSIZE(share->membership) &&
		   memcmp(membership, share->membership, VARSIZE(membership)) == 0;
}

int
es_share_partitions(const EsShare *share, const char **topic, const int32 **partitions,
					const int64 **offsets)
{
	*topic = share->topic;
	*partitions = share->partitions;
	*offsets = share->offsets;
	return share->n;
}
