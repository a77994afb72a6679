/*
 * collection/retention.c
 *		Letting go of old segments, by count, age and size.
 *
 * Events go by whole segments, never by rows, and in three steps that each
 * leave things in order should the server die in between:
 *
 *	1.	The first kept position moves on (collection_catalog), in an ordinary
 *		transaction: the owner's (truncate_before) or the worker's.  From its
 *		commit on no reader goes below it.
 *	2.	The worker puts the segments wholly below it on a list
 *		(segment_disposal).  Once detached, a segment is a table like any
 *		other; the list tells that it is ours to drop.
 *	3.	It detaches each with DETACH PARTITION ... CONCURRENTLY and drops it.
 *		A plain DROP would lock the parent against all appends while it waits
 *		for the oldest open one.  DETACH CONCURRENTLY is two transactions: the
 *		first marks the segment as being detached, the second waits until
 *		nobody has a lock on the parent that was taken before.  Where that
 *		takes longer than the worker's lock_timeout it is left so, and taken up
 *		with FINALIZE the next time.
 *
 * A limit says how much is kept at least: a segment may go when what is newer
 * satisfies the limit by itself.  With several limits, each lets segments go.
 * Only segments below the head are looked at (nothing in them will change any
 * more, so their events are counted once), and never the one that takes the
 * next position, nor the last one there is.
 *
 * Retention waits for subscriptions and sinks: what the slowest lane has not
 * passed stays, for as long as eventstore.subscription_hold says.  truncate_before does not
 * wait; who is left behind by it is told (LG005).
 *
 * What a user could have planted (an index expression, a trigger) is run as
 * the collection's owner.  DETACH, which is several transactions and so cannot
 * be run in another role, evaluates nothing of his.
 */
#include "postgres.h"

#include "collection/retention.h"

#include "access/relation.h"
#include "access/xact.h"
#include "catalog/partition.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_type.h"
#include "collection/segment.h"
#include "guc.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "nodes/plannodes.h"
#include "position/head.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "tcop/dest.h"
#include "tcop/tcopprot.h"
#include "tcop/utility.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* What a segment has that will not change any more. */
typedef struct CountEntry
{
	Oid			segment; /* hash key */
	int64		events;
	TimestampTz newest; /* the latest finite created_at, in whatever position */
} CountEntry;

/* In the worker's memory; a segment's OID is not soon used again. */
static HTAB *counts = NULL;

/* The segments up to the one that takes the next position, which is the last. */
typedef struct Candidates
{
	EsSegment *segments;
	int		   nsegments; /* all, of which the last is never dropped */
	EsPosition next;
} Candidates;

/* ---------------------------------------------------------------------------
 * How far it may go
 * ------------------------------------------------------------------------- */

EsPosition
es_retention_boundary(EsCollection *coll, EsPosition before)
{
	EsPosition next = es_segments_next_position(coll);
	EsPosition boundary = coll->first_position;
	EsSegment *segments;
	int		   n = es_segments_list(coll->relid, &segments);

	for (int i = 1; i < n; i++)
		if (segments[i].first <= before && segments[i].first <= next)
			boundary = Max(boundary, segments[i].first);
	pfree(segments);
	return boundary;
}

/* A single value, by a query over one segment, in SPI; null is 'otherwise'. */
static int64
query_segment(Oid segment, const char *format, int64 otherwise)
{
	char *sql = psprintf(format, es_relation_name(segment));
	bool  isnull;
	Datum value;

	es_spi_execute(sql, 0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	if (SPI_processed == 0)
		return otherwise;
	value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	return isnull ? otherwise : DatumGetInt64(value);
}

static int64
count_events(Oid segment)
{
	return query_segment(segment, "SELECT pg_catalog.count(*) FROM %s", 0);
}

/* The same for one that will not change, which is counted once. */
static const CountEntry *
settled(Oid segment)
{
	CountEntry *entry;

	if (counts == NULL)
	{
		HASHCTL ctl;

		ctl.keysize = sizeof(Oid);
		ctl.entrysize = sizeof(CountEntry);
		ctl.hcxt = TopMemoryContext;
		counts = hash_create("eventstore segment counts", 64, &ctl,
							 HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	entry = hash_search(counts, &segment, HASH_FIND, NULL);
	if (entry == NULL)
	{
		int64		events = count_events(segment);
		TimestampTz newest =
			query_segment(segment,
						  "SELECT pg_catalog.max(created_at)"
						  " FILTER (WHERE pg_catalog.isfinite(created_at)) FROM %s",
						  DT_NOBEGIN);

		entry = hash_search(counts, &segment, HASH_ENTER, NULL);
		entry->events = events;
		entry->newest = newest;
	}
	return entry;
}

/*
 * How many of the oldest segments may go, where 'newest' events are in the
 * segment being filled.  Stops at the first that is not needed.
 */
static int
excess_by_events(const Candidates *cand, int64 retain, int64 newest)
{
	int64 kept = newest;

	for (int i = cand->nsegments - 2; i >= 0; i--)
	{
		if (kept >= retain)
			return i + 1;
		kept += settled(cand->segments[i].relid)->events;
	}
	return 0;
}

static int
limit_by_events(const Candidates *cand, int64 retain)
{
	EsSegment *last = &cand->segments[cand->nsegments - 1];
	int64	   most = Max(cand->next - last->first, 0);
	int		   low;

	/* Positions without an event are rare: often they tell already. */
	if (cand->next - cand->segments[0].end < retain)
		return 0;
	low = excess_by_events(cand, retain, 0);
	if (low == excess_by_events(cand, retain, most))
		return low;
	return excess_by_events(cand, retain, count_events(last->relid));
}

static int
limit_by_age(const Candidates *cand, Interval *age)
{
	TimestampTz limit;
	int			n = 0;

	limit = DatumGetTimestampTz(DirectFunctionCall2(
		timestamptz_mi_interval, TimestampTzGetDatum(GetCurrentTimestamp()),
		IntervalPGetDatum(age)));
	while (n < cand->nsegments - 1)
	{
		/*
		 * Callers may give any time to an event, so all of the segment's count.
		 * Without any event it is old enough.
		 */
		if (settled(cand->segments[n].relid)->newest >= limit)
			break;
		n++;
	}
	return n;
}

static int64
segment_bytes(Oid segment)
{
	return DatumGetInt64(
		DirectFunctionCall1(pg_total_relation_size, ObjectIdGetDatum(segment)));
}

static int
limit_by_bytes(const Candidates *cand, int64 retain)
{
	int64 kept = segment_bytes(cand->segments[cand->nsegments - 1].relid);

	for (int i = cand->nsegments - 2; i >= 0; i--)
	{
		if (kept >= retain)
			return i + 1;
		kept += segment_bytes(cand->segments[i].relid);
	}
	return 0;
}

/* Kept segments that are full and below the head, and one more. */
static void
find_candidates(EsCollection *coll, Candidates *cand)
{
	EsHeadRef  ref = coll->head;
	EsPosition head;
	EsSegment *segments;
	int		   n = es_segments_list(coll->relid, &segments);
	int		   skip = 0;

	cand->next = es_segments_next_position(coll);
	head = es_head_find(&ref) ? es_head_read(&ref, true) : cand->next - 1;
	while (skip < n && segments[skip].end <= coll->first_position)
		skip++;
	cand->segments = segments + skip;
	cand->nsegments = 0;
	while (skip + cand->nsegments < n)
		if (cand->segments[cand->nsegments++].end > head + 1)
			break;
}

static EsPosition
first_to_keep(const Candidates *cand, const EsRetention *retention)
{
	int excess = 0;

	if (retention->events > 0)
		excess = Max(excess, limit_by_events(cand, retention->events));
	if (retention->age != NULL)
		excess = Max(excess, limit_by_age(cand, retention->age));
	if (retention->bytes > 0)
		excess = Max(excess, limit_by_bytes(cand, retention->bytes));
	return cand->segments[excess].first;
}

/*
 * The lowest cursor of the subscriptions and sinks that retention waits for; in SPI, as
 * the extension's owner.  Beyond every position where there is none.
 */
static EsPosition
lowest_cursor(Oid collection)
{
	Oid	  types[] = {REGCLASSOID, INT8OID};
	Datum values[] = {ObjectIdGetDatum(collection),
					  Int64GetDatum(es_subscription_hold_ms)};
	bool  isnull;
	Datum value;

	es_spi_execute(
		"SELECT pg_catalog.min(l.position) FROM"
		" (SELECT pg_catalog.min(position) AS position,"
		" pg_catalog.max(updated_at) AS updated_at"
		" FROM eventstore.subscription_lane WHERE subscription IN"
		" (SELECT name FROM eventstore.subscription WHERE collection = $1)"
		" GROUP BY subscription"
		" UNION ALL SELECT p.position, p.updated_at"
		" FROM eventstore.sink s JOIN eventstore.sink_position p ON p.sink = s.id"
		" WHERE s.collection = $1) l"
		" WHERE $2 < 0 OR l.updated_at > pg_catalog.clock_timestamp()"
		" - pg_catalog.make_interval(secs => $2 / 1000.0)",
		2, types, values, NULL, true, SPI_OK_SELECT);
	value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	return isnull ? PG_INT64_MAX - 1 : DatumGetInt64(value);
}

/* The start of the segment that 'first', or what a subscription waits for, is in. */
static EsPosition
wait_for_subscriptions(Oid collection, const Candidates *cand, EsPosition first)
{
	EsPosition cursor;
	int		   n = cand->nsegments - 1;

	if (es_subscription_hold_ms == 0)
		return first;
	cursor = lowest_cursor(collection);
	while (n > 0 &&
		   (cand->segments[n].first > first || cand->segments[n].first > cursor + 1))
		n--;
	return cand->segments[n].first;
}

void
es_retention_set_first(Oid collection, EsPosition first)
{
	Oid	  types[] = {REGCLASSOID, INT8OID};
	Datum values[] = {ObjectIdGetDatum(collection), Int64GetDatum(first)};

	es_spi_execute("UPDATE eventstore.collection_catalog SET first_position = $2"
				   " WHERE collection = $1 AND first_position < $2",
				   2, types, values, NULL, false, SPI_OK_UPDATE);
	CacheInvalidateRelcacheByRelid(collection);
}

void
es_retention_apply(Oid collection, const EsRetention *retention)
{
	EsCollection *coll;
	Candidates	  cand;
	EsRoleSwitch  saved;
	EsPosition	  first;

	LockRelationOid(collection, AccessShareLock);
	if (!es_collection_exists(collection))
		return;
	coll = es_collection_get(collection);
	find_candidates(coll, &cand);
	if (cand.nsegments < 2)
		return;

	/* Newer than the head: a segment below it must not look empty that is not. */
	PushActiveSnapshot(GetLatestSnapshot());
	es_role_assume(es_relation_owner(collection), &saved);
	SPI_connect();
	first = first_to_keep(&cand, retention);
	SPI_finish();
	es_role_restore(&saved);
	PopActiveSnapshot();

	if (first > coll->first_position)
	{
		es_role_assume(es_extension_owner(), &saved);
		SPI_connect();
		first = wait_for_subscriptions(collection, &cand, first);
		if (first > coll->first_position)
			es_retention_set_first(collection, first);
		SPI_finish();
		es_role_restore(&saved);
	}
}

/* ---------------------------------------------------------------------------
 * The list of those to go
 * ------------------------------------------------------------------------- */

void
es_retention_condemn(Oid collection)
{
	EsCollection *coll;
	EsSegment	 *segments;
	int			  n;

	LockRelationOid(collection, AccessShareLock);
	if (!es_collection_exists(collection))
		return;
	coll = es_collection_get(collection);
	n = es_segments_list(collection, &segments);

	SPI_connect();
	for (int i = 0; i < n - 1 && segments[i].end <= coll->first_position; i++)
	{
		Oid	  types[] = {REGCLASSOID, REGCLASSOID};
		Datum values[] = {ObjectIdGetDatum(segments[i].relid),
						  ObjectIdGetDatum(collection)};

		es_spi_execute("INSERT INTO eventstore.segment_disposal (segment, collection)"
					   " VALUES ($1, $2) ON CONFLICT DO NOTHING",
					   2, types, values, NULL, false, SPI_OK_INSERT);
	}
	SPI_finish();
}

int
es_retention_list(EsDisposal **disposals)
{
	MemoryContext caller = CurrentMemoryContext;
	int			  n;

	SPI_connect();
	es_spi_execute("SELECT d.segment::pg_catalog.oid, d.collection::pg_catalog.oid"
				   " FROM eventstore.segment_disposal d ORDER BY d.segment",
				   0, NULL, NULL, NULL, true, SPI_OK_SELECT);
	n = (int) SPI_processed;
	*disposals = MemoryContextAlloc(caller, sizeof(EsDisposal) * (n + 1));
	for (int i = 0; i < n; i++)
	{
		HeapTuple row = SPI_tuptable->vals[i];
		TupleDesc desc = SPI_tuptable->tupdesc;
		bool	  isnull;

		(*disposals)[i].segment = DatumGetObjectId(SPI_getbinval(row, desc, 1, &isnull));
		(*disposals)[i].collection =
			DatumGetObjectId(SPI_getbinval(row, desc, 2, &isnull));
	}
	SPI_finish();
	return n;
}

static void
strike_off(Oid segment)
{
	Oid	  types[] = {REGCLASSOID};
	Datum values[] = {ObjectIdGetDatum(segment)};

	SPI_connect();
	es_spi_execute("DELETE FROM eventstore.segment_disposal WHERE segment = $1", 1, types,
				   values, NULL, false, SPI_OK_DELETE);
	SPI_finish();
	if (counts != NULL)
		hash_search(counts, &segment, HASH_REMOVE, NULL);
}

/* ---------------------------------------------------------------------------
 * Detaching and dropping
 * ------------------------------------------------------------------------- */

static void
begin_step(void)
{
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
}

static void
end_step(void)
{
	/* Some utility commands take the snapshot away with them. */
	if (ActiveSnapshotSet())
		PopActiveSnapshot();
	CommitTransactionCommand();
}

/*
 * A utility statement that commits half-way, as if a client had sent it.  What
 * it keeps over that commit it keeps in the portal's memory, so there has to be
 * one.
 */
static void
run_at_top_level(const char *sql)
{
	RawStmt		*raw = linitial_node(RawStmt, pg_parse_query(sql));
	PlannedStmt *statement = makeNode(PlannedStmt);

	statement->commandType = CMD_UTILITY;
	statement->canSetTag = true;
	statement->utilityStmt = raw->stmt;
	statement->stmt_location = raw->stmt_location;
	statement->stmt_len = raw->stmt_len;
	ProcessUtility(statement, sql, false, PROCESS_UTILITY_TOPLEVEL, NULL, NULL,
				   None_Receiver, NULL);
}

/* Is the segment marked as being detached? */
static bool
is_detach_pending(Oid segment)
{
	return OidIsValid(get_partition_parent(segment, true)) &&
		   PartitionHasPendingDetach(segment);
}

/*
 * Nothing is done on the word of the list alone: a segment that is no longer
 * below the first kept position (a restored catalog) is left where it is.
 */
static bool
is_due(const EsDisposal *disposal)
{
	EsCollection *coll;
	EsPosition	  first;
	EsPosition	  end;

	if (get_partition_parent(disposal->segment, true) != disposal->collection ||
		!es_collection_exists(disposal->collection))
		return false;
	coll = es_collection_get(disposal->collection);
	return es_segment_bounds(disposal->segment, &first, &end) &&
		   end <= coll->first_position;
}

/* True when it need not be dropped: it is gone, or not to go, or not now. */
static bool
detach(const EsDisposal *disposal)
{
	begin_step();
	if (!es_extension_pin())
	{
		end_step();
		return true;
	}
	LockRelationOid(disposal->collection, ShareUpdateExclusiveLock);
	if (get_rel_relkind(disposal->segment) == '\0' ||
		(get_rel_relispartition(disposal->segment) && !is_due(disposal)))
	{
		strike_off(disposal->segment);
		end_step();
		return true;
	}
	if (get_rel_relispartition(disposal->segment))
	{
		MemoryContextSwitchTo(PortalContext);
		run_at_top_level(psprintf(
			"ALTER TABLE %s DETACH PARTITION %s %s",
			es_relation_name(disposal->collection), es_relation_name(disposal->segment),
			is_detach_pending(disposal->segment) ? "FINALIZE" : "CONCURRENTLY"));
	}
	end_step();
	return false;
}

static void
drop(const EsDisposal *disposal)
{
	EsRoleSwitch saved;
	char		*sql;

	begin_step();
	if (!es_extension_pin())
	{
		end_step();
		return;
	}
	LockRelationOid(disposal->segment, AccessExclusiveLock);
	if (get_rel_relkind(disposal->segment) == RELKIND_RELATION &&
		!get_rel_relispartition(disposal->segment))
	{
		sql = psprintf("DROP TABLE %s", es_relation_name(disposal->segment));
		es_role_assume(es_relation_owner(disposal->segment), &saved);
		SPI_connect();
		es_spi_execute(sql, 0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
		SPI_finish();
		es_role_restore(&saved);
		pfree(sql);
	}
	strike_off(disposal->segment);
	end_step();
}

bool
es_retention_dispose(const EsDisposal *disposal)
{
	static MemoryContext portal_context = NULL;
	MemoryContext		 caller = CurrentMemoryContext;
	bool				 gone;

	/* Until the next time, so that an error's clean-up still finds it. */
	if (portal_context == NULL)
		portal_context = AllocSetContextCreate(TopMemoryContext, "eventstore detach",
											   ALLOCSET_DEFAULT_SIZES);
	MemoryContextReset(portal_context);
	PortalContext = portal_context;

	gone = detach(disposal);
	if (!gone)
		drop(disposal);
	MemoryContextSwitchTo(caller);
	return !gone;
}
