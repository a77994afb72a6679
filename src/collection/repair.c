/*
 * collection/repair.c
 *		Making a collection whole again from its events.
 *
 * After a dump and restore of a whole database nothing is amiss.  But a single
 * restored table, a logical copy that is to take appends, and what DROP
 * EXTENSION has left are tables full of events without the rest: no catalog
 * row, no triggers, a counter that does not know of the events, a heads table
 * that is empty or missing.  repair_collection makes all of that again, from
 * the events, in one transaction that nobody can append beside:
 *
 *	1.	AccessExclusiveLock on the collection: waits for open appends, and keeps
 *		new ones, the worker and readers out (who would use the shared entry
 *		that is about to become obsolete).
 *	2.	What the table lacks (layout.c), then the catalog row.
 *	3.	The counter is raised to the highest position there is.
 *	4.	Heads.  A stream with events gets what these say.  One without keeps
 *		its row where its last event was truncated (versions go on), else the
 *		row is about events that are not there, and goes.
 *	5.	Segments to append to.
 *	6.	Subscriptions go on, but for those with a cursor ahead of all that is
 *		left.  These keep the old incarnation, by which a poll knows them (LG004)
 *		also when the log has grown past the cursor.
 *	7.	The catalog row gets a new incarnation, which the shared entry does not
 *		have; so a new one is made from the tables.  We do it ourselves, since
 *		this transaction may go on to append, and only it knows yet that the new
 *		segments are ready; should it abort, nobody has that incarnation.
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/layout.h"
#include "collection/segment.h"
#include "errors.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "position/position.h"
#include "shmem.h"
#include "spi.h"
#include "stats/work.h"
#include "storage/lmgr.h"
#include "tcop/utility.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"
#include "worker/wake.h"

PG_FUNCTION_INFO_V1(es_repair_collection);

/* A first value of a query's only row; 0 for none.  In SPI. */
static int64
query_number(const char *sql)
{
	bool  isnull = true;
	Datum value = (Datum) 0;

	es_spi_execute(sql, 0, NULL, NULL, NULL, false, SPI_OK_SELECT);
	if (SPI_processed > 0)
		value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	return isnull ? 0 : DatumGetInt64(value);
}

static void
update_row(Oid collection, const EsLayout *layout)
{
	Oid	  types[] = {REGCLASSOID, REGCLASSOID, REGCLASSOID};
	Datum values[] = {ObjectIdGetDatum(collection), ObjectIdGetDatum(layout->heads),
					  ObjectIdGetDatum(layout->counter)};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	es_spi_execute("UPDATE eventstore.collection_catalog SET heads = $2, counter = $3,"
				   " incarnation = pg_catalog.nextval('eventstore.incarnation_seq')"
				   " WHERE collection = $1",
				   3, types, values, NULL, false, SPI_OK_UPDATE);
	es_role_restore(&saved);
	CacheInvalidateRelcacheByRelid(collection);
}

/* A table that has none gets a row with the defaults; from its oldest segment on. */
static EsPosition
adopt(Oid collection, const EsLayout *layout)
{
	EsOptions  options = {0};
	EsSegment *segments;
	int		   n = es_segments_list(collection, &segments);
	EsPosition first = n > 0 ? Max(segments[0].first, 1) : 1;

	options.segment_size = ES_SEGMENT_SIZE_DEFAULT;
	if (n > 0)
		options.segment_size =
			Min(segments[n - 1].end - segments[n - 1].first, ES_SEGMENT_SIZE_MAX);
	options.notify = ES_NOTIFY_DEFAULT;
	options.channel = es_layout_default_channel(collection);
	es_layout_register(collection, layout, &options, first);
	return first;
}

/* Step 3. */
static void
raise_counter(Oid collection, const EsLayout *layout)
{
	char	  *name = es_relation_name(collection);
	char	  *heads = es_relation_name(layout->heads);
	EsPosition highest;

	highest = query_number(psprintf("SELECT pg_catalog.max(\"position\") FROM %s", name));
	/* A truncated stream's last position was handed out, too. */
	highest = Max(highest, query_number(psprintf(
							   "SELECT pg_catalog.max(last_position) FROM %s", heads)));
	/* And a head that was noted has been shown to readers. */
	highest = Max(highest, es_collection_tick(collection, GetActiveSnapshot()));
	if (highest > es_reservation_read(layout->counter).reserved)
		es_reservation_extend(layout->counter, highest);
}

/* Step 4. */
static void
rebuild_heads(Oid collection, const EsLayout *layout, EsPosition first)
{
	char *events = es_relation_name(collection);
	char *heads = es_relation_name(layout->heads);

	es_spi_execute(
		psprintf("DELETE FROM %s h WHERE h.last_position >= " INT64_FORMAT
				 " AND NOT EXISTS (SELECT FROM %s e WHERE e.stream = h.stream)",
				 heads, first, events),
		0, NULL, NULL, NULL, false, SPI_OK_DELETE);
	es_spi_execute(
		psprintf(
			"INSERT INTO %s AS h"
			" (stream, version, first_position, last_position, first_at, last_at)"
			" SELECT s.stream, s.version,"
			/* Where it began was truncated: all that is known is "before". */
			" CASE WHEN s.from_version > 1 AND %d > 0 THEN " INT64_FORMAT
			" ELSE s.first END, s.last, f.created_at, l.created_at"
			" FROM (SELECT stream, pg_catalog.max(version) AS version,"
			" pg_catalog.min(version) AS from_version,"
			" pg_catalog.min(\"position\") AS first, pg_catalog.max(\"position\") AS last"
			" FROM %s WHERE stream IS NOT NULL GROUP BY stream) s"
			" JOIN %s f ON f.\"position\" = s.first"
			" JOIN %s l ON l.\"position\" = s.last"
			" ON CONFLICT (stream) DO UPDATE SET version = excluded.version,"
			" last_position = excluded.last_position, last_at = excluded.last_at,"
			/* One that is known to have begun before keeps that. */
			" first_position = CASE WHEN h.first_position < " INT64_FORMAT
			" THEN h.first_position ELSE excluded.first_position END,"
			" first_at = CASE WHEN h.first_position < " INT64_FORMAT
			" THEN h.first_at ELSE excluded.first_at END",
			heads, first > 1, first - 1, events, events, events, first, first),
		0, NULL, NULL, NULL, false, SPI_OK_INSERT);
}

static void
check_repairable(Oid collection)
{
	Relation rel = try_relation_open(collection, NoLock);
	bool	 matches;

	if (rel == NULL)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("relation with OID %u does not exist", collection)));
	matches = es_layout_matches(rel);
	relation_close(rel, NoLock);
	if (!matches)
		ereport(ERROR,
				(errcode(ERRCODE_ES_NOT_A_COLLECTION),
				 errmsg("relation \"%s\" is not a collection", get_rel_name(collection)),
				 errdetail("It does not have the columns of a collection.")));
	if (IsolationUsesXactSnapshot())
		ereport(
			ERROR,
			(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
			 errmsg("repair_collection() must run at isolation level READ COMMITTED"),
			 errdetail("It has to see every event that was committed before its lock.")));
}

/* The incarnation that the catalog has, -1 for none; in SPI, as the extension's owner. */
static int64
noted_incarnation(Oid collection)
{
	EsRoleSwitch saved;
	int64		 incarnation;

	es_role_assume(es_extension_owner(), &saved);
	incarnation =
		query_number(psprintf("SELECT coalesce((SELECT incarnation"
							  " FROM eventstore.collection_catalog"
							  " WHERE collection = '%u'::pg_catalog.regclass), -1)",
							  collection));
	es_role_restore(&saved);
	return incarnation;
}

/*
 * Step 6.  'before' is the incarnation that was repaired: who has another one
 * has been left behind before, and is so still.  Where none was known, none is.
 */
static void
keep_subscriptions(Oid collection, const EsLayout *layout, int64 before)
{
	Oid			 types[] = {REGCLASSOID, INT8OID, INT8OID};
	Datum		 values[] = {ObjectIdGetDatum(collection),
							 Int64GetDatum(es_reservation_read(layout->counter).reserved),
							 Int64GetDatum(before)};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	es_spi_execute("UPDATE eventstore.subscription s SET incarnation = c.incarnation"
				   " FROM eventstore.collection_catalog c"
				   " WHERE c.collection = $1 AND s.collection = $1"
				   " AND ($3 < 0 OR s.incarnation = $3)"
				   " AND NOT EXISTS (SELECT FROM eventstore.subscription_lane l"
				   " WHERE l.subscription = s.name AND l.position > $2)",
				   3, types, values, NULL, false, SPI_OK_UPDATE);
	es_role_restore(&saved);
}

/* Parts, row, counter, heads: in the owner's role, in SPI. */
static void
repair(Oid collection, EsLayout *layout)
{
	int64	   before = noted_incarnation(collection);
	EsPosition first;

	if (es_layout_read(collection, layout, &first))
	{
		es_layout_complete(collection, layout);
		update_row(collection, layout);
	}
	else
	{
		es_layout_complete(collection, layout);
		first = adopt(collection, layout);
	}
	es_work_phase("looking for the last position", 0);
	raise_counter(collection, layout);
	es_work_phase("rebuilding the heads", 0);
	rebuild_heads(collection, layout, first);
	keep_subscriptions(collection, layout, before);
}

/* Step 7, and the segments before it. */
static void
make_ready(Oid collection, const EsLayout *layout)
{
	EsCollection *coll;
	EsPosition	  end;

	es_segments_keep_ahead(collection);
	/* The shared entry, obsolete now, may know of a lower position. */
	end = es_segments_make(collection, es_reservation_read(layout->counter).reserved + 2);

	CommandCounterIncrement();
	coll = es_collection_get(collection);
	es_collection_load_head(coll);
	if (coll->head.head != NULL)
		es_head_set_ready_end(&coll->head, end);
}

Datum
es_repair_collection(PG_FUNCTION_ARGS)
{
	Oid			 collection;
	EsLayout	 layout = {InvalidOid, InvalidOid};
	EsRoleSwitch saved;

	es_require_preloaded();
	PreventCommandIfReadOnly("repair_collection");
	es_require_arg(&fcinfo->args[0], "collection");
	collection = PG_GETARG_OID(0);
	es_collection_check_owner(collection);
	LockRelationOid(collection, AccessExclusiveLock);
	check_repairable(collection);
	if (es_head_joined(collection))
		ereport(ERROR, (errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
						errmsg("cannot repair collection \"%s\" in a transaction that "
							   "has appended to it",
							   get_rel_name(collection))));
	/* It may have changed hands while we waited for the lock. */
	es_collection_check_owner(collection);

	es_role_assume(es_relation_owner(collection), &saved);
	/* Rather an error than a repair from what the policies let through. */
	(void) set_config_option("row_security", "off", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	SPI_connect();
	es_work_begin("repair_collection", collection);
	es_work_phase("making what is missing", 0);
	repair(collection, &layout);
	es_work_end();
	SPI_finish();
	es_role_restore(&saved);

	make_ready(collection, &layout);
	es_wake_maintenance_at_commit();
	PG_RETURN_VOID();
}
