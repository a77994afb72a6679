/*
 * kafka/publish.c
 *		Stores whose changes are published, and changes of them that are not the
 *		source's own.
 *
 * Who restores a store from its changelog topic goes on in the source's topic
 * behind the last record that a change says it came from.  A record that changed
 * nothing (the value was there already) is in no change; it is read again, which
 * does no harm, unless SQL has changed the key since: then the old record would
 * undo that.  So a change by SQL says how far the source had come when it was
 * made.  It is made with the row locked, and the source locks the rows of its
 * records, those that it leaves as they are too; so all of its records of this
 * key that came before are among those that the offsets have.
 *
 * {"progress": {"topic": ..., "partitions": 4, "0": 17, "2": 5}}: the next offset of
 * each partition that has been begun.
 *
 * Locks: those of a reader.
 */
#include "postgres.h"

#include "kafka/publish.h"

#include "catalog/pg_type.h"
#include "spi.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/numeric.h"

#define PROGRESS   "progress"
#define TOPIC	   "topic"
#define PARTITIONS "partitions"

/* ---------------------------------------------------------------------------
 * Marks
 * ------------------------------------------------------------------------- */

/* Runs the statement; all stores that it returns are looked up anew. */
static uint64
mark_stores(const char *sql, uint32 source, Oid store)
{
	Oid			 types[2] = {INT4OID, OIDOID};
	Datum		 values[2] = {Int32GetDatum((int32) source), ObjectIdGetDatum(store)};
	EsRoleSwitch saved;
	uint64		 n;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(sql, 2, types, values, NULL, false, SPI_OK_UPDATE_RETURNING);
	n = SPI_processed;
	for (uint64 i = 0; i < n; i++)
	{
		bool isnull;

		CacheInvalidateRelcacheByRelid(DatumGetObjectId(
			SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull)));
	}
	SPI_finish();
	es_role_restore(&saved);
	return n;
}

void
es_publish_mark(Oid store, const char *column, uint32 source)
{
	if (mark_stores(psprintf("UPDATE eventstore.store_catalog SET %s = $1"
							 " WHERE store::oid = $2 AND %s IS NULL RETURNING store::oid",
							 column, column),
					source, store) == 0)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("store \"%s\" has a source with a changelog topic already",
							   get_rel_name(store))));
}

void
es_publish_unmark(uint32 source)
{
	(void) mark_stores(
		"UPDATE eventstore.store_catalog SET follower = NULLIF(follower, $1),"
		" publisher = NULLIF(publisher, $1)"
		" WHERE $1 IN (follower, publisher) RETURNING store::oid",
		source, InvalidOid);
}

/* ---------------------------------------------------------------------------
 * Progress
 * ------------------------------------------------------------------------- */

Jsonb *
es_publish_origin(const EsStore *store)
{
	static const char sql[] =
		"SELECT pg_catalog.jsonb_build_object('" PROGRESS
		"', pg_catalog.jsonb_build_object("
		"'" TOPIC "', s.topic, '" PARTITIONS "', s.partition_count)"
		" || COALESCE((SELECT pg_catalog.jsonb_object_agg(o.partition, o.next_offset)"
		" FROM eventstore.source_offset o WHERE o.source = s.id AND o.topic = s.topic), "
		"'{}'))"
		" FROM eventstore.source s WHERE s.id = $1";
	static SPIPlanPtr plan = NULL;
	Oid				  types[1] = {INT4OID};
	Datum			  values[1] = {Int32GetDatum((int32) store->publisher)};
	MemoryContext	  caller = CurrentMemoryContext;
	EsRoleSwitch	  saved;
	Jsonb			 *origin = NULL;
	bool			  isnull;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	if (plan == NULL)
	{
		plan = SPI_prepare(sql, 1, types);
		if (plan == NULL || SPI_keepplan(plan) != 0)
			elog(ERROR, "could not prepare: %s", sql);
	}
	/* Not read-only: it needs a snapshot that is newer than the row's lock. */
	if (SPI_execute_plan(plan, values, NULL, false, 1) != SPI_OK_SELECT)
		elog(ERROR, "unexpected result of: %s", sql);
	if (SPI_processed > 0)
	{
		Datum value =
			SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
		MemoryContext old = MemoryContextSwitchTo(caller);

		origin = (Jsonb *) PG_DETOAST_DATUM_COPY(value);
		MemoryContextSwitchTo(old);
	}
	SPI_finish();
	es_role_restore(&saved);
	return origin;
}

/* A number of an object; -1 where there is none. */
static int64
number_of(JsonbContainer *object, const char *key)
{
	JsonbValue	buffer;
	JsonbValue *value = getKeyJsonValueFromContainer(object, key, strlen(key), &buffer);

	if (value == NULL || value->type != jbvNumeric)
		return -1;
	return DatumGetInt64(
		DirectFunctionCall1(numeric_int8, NumericGetDatum(value->val.numeric)));
}

bool
es_publish_progress(Jsonb *metadata, const EsRecord *record, const char **topic,
					int32 *partition, int64 *offset)
{
	JsonbValue		buffer;
	JsonbValue		name;
	JsonbValue	   *value = getKeyJsonValueFromContainer(&metadata->root, PROGRESS,
														 strlen(PROGRESS), &buffer);
	JsonbContainer *progress;
	int64			count;

	if (value == NULL || value->type != jbvBinary ||
		!JsonContainerIsObject(value->val.binary.data))
		return false;
	progress = value->val.binary.data;
	count = number_of(progress, PARTITIONS);
	if (count < 1 || count > PG_INT32_MAX || record->key == NULL ||
		getKeyJsonValueFromContainer(progress, TOPIC, strlen(TOPIC), &name) == NULL ||
		name.type != jbvString)
		return false;
	*topic = pnstrdup(name.val.string.val, name.val.string.len);
	*partition = es_codec_partition(record->key, record->key_length, (int32) count);
	*offset = number_of(progress, psprintf("%d", *partition)) - 1;
	return true;
}
