/*
 * collection/segment.c
 *		Making segments, by the worker and by whoever creates a collection.
 *
 * A segment is a partition of the collection, a range of positions.  Appends
 * must not wait for one to be made, nor may a reader miss events because its
 * list of partitions is older than the head (design 5.2).  So:
 *
 *	1.	The worker makes segments ahead of need, and nothing else happens in
 *		that transaction.
 *	2.	The table is made apart, with everything the parent has (LIKE ...
 *		INCLUDING ALL), and attached while it is empty: CREATE TABLE ...
 *		PARTITION OF would lock the parent against appends, ATTACH does not.
 *	3.	When the transaction has returned, its invalidation messages are sent.
 *		Only then is the new end published (es_head_set_ready_end), and only
 *		below the published end are positions handed out.
 *	4.	An append that does not fit says how far it wants to get, wakes the
 *		worker and waits for the published end.
 *	5.	An INSERT or COPY can use only what was ready when it began.  It wakes
 *		the worker when it begins a segment and few are left ahead, and one that
 *		finds little room waits for more before it begins.
 *
 * Where no shared entry says what is published, whoever makes one reads it
 * from the catalogs, and has to know that the list he reads is in everybody's
 * reach by now: he takes the lock of es_segments_lock for a moment, which its
 * maker, and whoever attaches one by hand, gives back only after step 3's
 * messages.  What he has attached himself in this transaction does not count.
 *
 * Ranges are contiguous always.  Where the next position has jumped (a new
 * timeline), the segment that takes it is as wide as the jump.
 *
 * A collection that was created in the current transaction is invisible to the
 * worker, and its appends to everybody else: there the appender makes the
 * segments himself and publishes at once.  Should the subtransaction in which
 * he does so abort, the published end goes back with the segments.
 *
 * Locks, in this order: the relation (ShareUpdateExclusive, which does not
 * stand against reads and appends), then the segments lock (Exclusive); both
 * to the end of the transaction.
 *
 * A crash leaves either the whole segment or nothing.
 */
#include "postgres.h"

#include "collection/segment.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/stratnum.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/partition.h"
#include "catalog/pg_class.h"
#include "catalog/pg_inherits.h"
#include "commands/defrem.h"
#include "commands/tablespace.h"
#include "commands/trigger.h"
#include "compat.h"
#include "guc.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "nodes/primnodes.h"
#include "parser/parse_utilcmd.h"
#include "position/head.h"
#include "position/position.h"
#include "spi.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/relcache.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "worker/launcher.h"
#include "worker/wake.h"

/* The segments lock: an object lock beside the relation's own. */
#define SEGMENTS_LOCK_SUBID 1

/*
 * No transaction makes more than about so many, since each takes a dozen
 * entries of the lock table: where an append wants more, they are wider.
 * Not less than segments_ahead + 1 may ask for.
 */
#define SEGMENTS_AT_ONCE 128

/* Polling for the worker: the shared end has no condition variable. */
#define AWAIT_STEP_MS 5
/* ... and asking again, should the worker have been restarted meanwhile. */
#define AWAIT_ASK_AGAIN_MS 1000

/*
 * An INSERT or COPY waits for a segment where it finds less room than this, or less
 * than a segment's size: enough for statements one behind the other, and little
 * enough that it does not matter where segments are great.
 */
#define PREPARED_ROOM 1000

/* ---------------------------------------------------------------------------
 * The list
 * ------------------------------------------------------------------------- */

/* A bound as a number; false for MINVALUE and MAXVALUE. */
static bool
bound_value(List *datums, EsPosition *value)
{
	PartitionRangeDatum *datum = linitial_node(PartitionRangeDatum, datums);

	if (datum->kind != PARTITION_RANGE_DATUM_VALUE)
		return false;
	*value = DatumGetInt64(castNode(Const, datum->value)->constvalue);
	return true;
}

bool
es_segment_bounds(Oid segment, EsPosition *first, EsPosition *end)
{
	HeapTuple tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(segment));
	bool	  isnull = true;
	bool	  found = false;
	Datum	  value = (Datum) 0;

	if (!HeapTupleIsValid(tuple))
		return false;
	value = SysCacheGetAttr(RELOID, tuple, Anum_pg_class_relpartbound, &isnull);
	if (!isnull)
	{
		PartitionBoundSpec *spec;

		spec = castNode(PartitionBoundSpec, stringToNode(TextDatumGetCString(value)));
		found = spec->strategy == PARTITION_STRATEGY_RANGE && !spec->is_default &&
				bound_value(spec->lowerdatums, first) &&
				bound_value(spec->upperdatums, end);
	}
	ReleaseSysCache(tuple);
	return found;
}

static int
compare_segments(const void *a, const void *b)
{
	EsPosition left = ((const EsSegment *) a)->first;
	EsPosition right = ((const EsSegment *) b)->first;

	return left < right ? -1 : left > right;
}

int
es_segments_list(Oid collection, EsSegment **segments)
{
	List	 *children = find_inheritance_children(collection, NoLock);
	ListCell *cell;
	int		  n = 0;

	*segments = palloc(sizeof(EsSegment) * (list_length(children) + 1));
	foreach (cell, children)
	{
		EsSegment *segment = &(*segments)[n];

		segment->relid = lfirst_oid(cell);
		segment->plain = -1;
		if (es_segment_bounds(segment->relid, &segment->first, &segment->end))
			n++;
	}
	qsort(*segments, n, sizeof(EsSegment), compare_segments);
	return n;
}

/* By the row that ATTACH writes, and nobody changes later but DETACH. */
static bool
is_attached_here(Oid segment)
{
	Relation	inherits = table_open(InheritsRelationId, AccessShareLock);
	bool		here = false;
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, Anum_pg_inherits_inhrelid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(segment));
	scan = systable_beginscan(inherits, InheritsRelidSeqnoIndexId, true, NULL, 1, &key);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
		here = TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(tuple->t_data));
	systable_endscan(scan);
	table_close(inherits, AccessShareLock);
	return here;
}

EsPosition
es_segments_committed_end(const EsCollection *coll)
{
	int		   n = coll->nsegments;
	EsSegment *segments = palloc(sizeof(EsSegment) * (n + 1));
	EsPosition end = 1;

	if (n > 0)
		memcpy(segments, coll->segments, sizeof(EsSegment) * n);
	while (n > 0 && is_attached_here(segments[n - 1].relid))
		n--;
	if (n > 0)
		end = segments[n - 1].end;
	pfree(segments);
	return end;
}

void
es_segments_lock(Oid collection, LOCKMODE mode)
{
	LockDatabaseObject(RelationRelationId, collection, SEGMENTS_LOCK_SUBID, mode);
}

void
es_segments_unlock(Oid collection, LOCKMODE mode)
{
	UnlockDatabaseObject(RelationRelationId, collection, SEGMENTS_LOCK_SUBID, mode);
}

/*
 * From the shared entry, or from what that would be made of.  Does not make
 * one: a collection whose creation is rolled back must not leave it behind.
 * Where nobody appends here, events may still come, by replication.
 */
EsPosition
es_segments_next_position(EsCollection *coll)
{
	EsHeadRef	  ref = coll->head;
	EsReservation res;

	if (es_head_find(&ref) && es_head_in_use(&ref))
		return es_head_last_allotted(&ref) + 1;
	if (coll->head.head != NULL || coll->behind)
		return es_collection_last_allotted(coll) + 1;
	res = es_reservation_read(coll->counter);
	return es_reservation_next(&res);
}

/* ---------------------------------------------------------------------------
 * Making them
 * ------------------------------------------------------------------------- */

/* Names are cut to 63 bytes at a character's edge; a taken one gets a number. */
static char *
choose_segment_name(Oid collection, Oid schema, EsPosition first)
{
	char  label[64];
	char *name;

	snprintf(label, sizeof(label), INT64_FORMAT, first);
	for (int attempt = 1;; attempt++)
	{
		name = makeObjectName(get_rel_name(collection), NULL, label);
		if (!OidIsValid(get_relname_relid(name, schema)))
			return name;
		snprintf(label, sizeof(label), INT64_FORMAT "_%d", first, attempt);
	}
}

/* How the table is stored is not part of LIKE: the parent's way. */
static void
append_storage(StringInfo sql, Oid collection)
{
	Relation rel = relation_open(collection, NoLock);

	if (OidIsValid(rel->rd_rel->relam))
		appendStringInfo(sql, " USING %s",
						 quote_identifier(get_am_name(rel->rd_rel->relam)));
	if (OidIsValid(rel->rd_rel->reltablespace))
		appendStringInfo(
			sql, " TABLESPACE %s",
			quote_identifier(get_tablespace_name(rel->rd_rel->reltablespace)));
	relation_close(rel, NoLock);
}

void
es_segment_guard(Oid relid)
{
	StringInfoData sql;

	initStringInfo(&sql);
	appendStringInfo(&sql,
					 "CREATE TRIGGER " ES_GUARD_TRIGGER
					 " BEFORE UPDATE OR DELETE OR TRUNCATE ON %s"
					 " FOR EACH STATEMENT EXECUTE FUNCTION eventstore.append_only()",
					 es_relation_name(relid));
	es_spi_execute(sql.data, 0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
	pfree(sql.data);
}

/* As the owner, in SPI. */
static void
make_segment(Oid collection, EsPosition first, EsPosition end)
{
	Oid	  schema = get_rel_namespace(collection);
	char *name = choose_segment_name(collection, schema, first);
	char *parent = es_relation_name(collection);
	char *qualified = quote_qualified_identifier(get_namespace_name(schema), name);
	StringInfoData sql;

	initStringInfo(&sql);
	appendStringInfo(&sql, "CREATE TABLE %s (LIKE %s INCLUDING ALL)", qualified, parent);
	append_storage(&sql, collection);
	es_spi_execute(sql.data, 0, NULL, NULL, NULL, false, SPI_OK_UTILITY);

	/* It names the collection, which could not be dropped while a detached segment did so. */
	resetStringInfo(&sql);
	appendStringInfo(&sql, "ALTER TABLE %s ALTER COLUMN \"position\" DROP DEFAULT",
					 qualified);
	es_spi_execute(sql.data, 0, NULL, NULL, NULL, false, SPI_OK_UTILITY);

	es_segment_guard(get_relname_relid(name, schema));

	resetStringInfo(&sql);
	appendStringInfo(&sql,
					 "ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (" INT64_FORMAT
					 ") TO (" INT64_FORMAT ")",
					 parent, qualified, first, end);
	es_spi_execute(sql.data, 0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
	es_worker_count(ES_WORKER_SEGMENTS_MADE, 1);
	pfree(sql.data);
}

/* The first regular boundary with at least one segment's size from 'next' on. */
static EsPosition
end_beyond(EsPosition next, int64 size)
{
	int64 whole = (next - 1 + size + size - 1) / size;

	return whole * size + 1;
}

/* Where the next segment has to start. */
static EsPosition
segments_end(const EsCollection *coll, const EsSegment *segments, int n)
{
	return n > 0 ? segments[n - 1].end : coll->first_position;
}

EsPosition
es_segments_make(Oid collection, EsPosition wanted_end)
{
	EsCollection *coll;
	EsSegment	 *segments;
	EsRoleSwitch  saved;
	EsPosition	  end;
	EsPosition	  next;
	int64		  size;
	int64		  width;
	int			  n;

	LockRelationOid(collection, ShareUpdateExclusiveLock);
	es_segments_lock(collection, ExclusiveLock);
	coll = es_collection_get(collection);
	size = coll->segment_size;
	n = es_segments_list(collection, &segments);
	end = segments_end(coll, segments, n);
	if (end >= wanted_end)
		return end;
	next = es_segments_next_position(coll);

	es_role_assume(es_relation_owner(collection), &saved);
	SPI_connect();
	if (next > end)
	{
		EsPosition first = end;

		end = end_beyond(next, size);
		make_segment(collection, first, end);
	}
	width = size;
	if (wanted_end > end)
		width = size * ((wanted_end - end - 1) / size / SEGMENTS_AT_ONCE + 1);
	while (end < wanted_end)
	{
		make_segment(collection, end, end + width);
		end += width;
	}
	SPI_finish();
	es_role_restore(&saved);
	return end;
}

/*
 * While a restore is under way a collection may lack its indexes still; one
 * made from it now would keep the parent's from becoming valid.  Triggers come
 * last.
 */
static bool
is_whole(Oid collection)
{
	Relation  rel = relation_open(collection, NoLock);
	List	 *indexes = RelationGetIndexList(rel);
	bool	  whole = OidIsValid(get_trigger_oid(collection, ES_APPEND_TRIGGER, true));
	ListCell *cell;

	foreach (cell, indexes)
		whole = whole && get_index_isvalid(lfirst_oid(cell));
	list_free(indexes);
	relation_close(rel, NoLock);
	return whole;
}

/* The end up to which there should be segments, whatever appenders wait for. */
static EsPosition
target_end(const EsSegment *segments, int n, EsPosition end, EsPosition next, int64 size)
{
	int beyond = 0;

	if (next > end)
		return end_beyond(next, size) + size * es_segments_ahead;
	if (next == end)
		return end + size * (es_segments_ahead + 1);
	for (int i = n - 1; i >= 0 && segments[i].first > next; i--)
		beyond++;
	return end + size * Max(es_segments_ahead - beyond, 0);
}

/* The same for the moment when an appender has taken positions up to 'wanted'. */
static EsPosition
wanted_target(EsPosition end, EsPosition wanted, int64 size)
{
	if (wanted < end)
		return end;
	return end + size * ((wanted - end) / size + 1 + es_segments_ahead);
}

EsPosition
es_segments_keep_ahead(Oid collection)
{
	EsCollection *coll;
	EsHeadRef	  ref;
	EsSegment	 *segments;
	EsPosition	  end;
	EsPosition	  target;
	int			  n;

	LockRelationOid(collection, AccessShareLock);
	if (!es_collection_exists(collection) || !is_whole(collection))
		return 0;
	LockRelationOid(collection, ShareUpdateExclusiveLock);

	/* Under this lock, what is listed may be published. */
	es_segments_lock(collection, ExclusiveLock);
	coll = es_collection_get(collection);
	n = es_segments_list(collection, &segments);
	end = segments_end(coll, segments, n);
	target =
		target_end(segments, n, end, es_segments_next_position(coll), coll->segment_size);
	ref = coll->head;
	if (es_head_find(&ref) && es_head_wanted_end(&ref) != 0)
		target =
			Max(target, wanted_target(end, es_head_wanted_end(&ref), coll->segment_size));
	return es_segments_make(collection, target);
}

/* ---------------------------------------------------------------------------
 * Waiting for them
 * ------------------------------------------------------------------------- */

/* What a subtransaction has published at once, and the end before that. */
typedef struct Published
{
	EsHeadRef		 head;
	EsPosition		 before;
	SubTransactionId subid;
} Published;

static List *published = NIL; /* of Published, in TopTransactionContext */

static void
settle_published(SubXactEvent event, SubTransactionId subid, SubTransactionId parent,
				 void *arg)
{
	ListCell *cell;

	/* The newest come first, so the oldest end has the last word. */
	foreach (cell, published)
	{
		Published *entry = lfirst(cell);

		if (entry->subid != subid)
			continue;
		if (event == SUBXACT_EVENT_COMMIT_SUB)
			entry->subid = parent;
		else if (event == SUBXACT_EVENT_ABORT_SUB)
		{
			es_head_lower_ready_end(&entry->head, entry->before);
			entry->subid = InvalidSubTransactionId;
		}
	}
}

/* The list's memory goes with the transaction. */
static void
forget_published(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT ||
		event == XACT_EVENT_PREPARE)
		published = NIL;
}

static void
remember_published(const EsHeadRef *head, EsPosition before)
{
	static bool	  registered = false;
	MemoryContext old = MemoryContextSwitchTo(TopTransactionContext);
	Published	 *entry = palloc(sizeof(Published));

	if (!registered)
	{
		RegisterXactCallback(forget_published, NULL);
		RegisterSubXactCallback(settle_published, NULL);
		registered = true;
	}
	entry->head = *head;
	entry->before = before;
	entry->subid = GetCurrentSubTransactionId();
	published = lcons(entry, published);
	MemoryContextSwitchTo(old);
}

/* In a transaction that made the collection itself. */
static void
make_and_publish(EsCollection *coll, EsPosition wanted_end)
{
	EsPosition end;

	remember_published(&coll->head, es_head_ready_end(&coll->head));
	end = es_segments_make(coll->relid, wanted_end);
	CommandCounterIncrement();
	es_head_set_ready_end(&coll->head, end);
}

/* Looks at how the relation stands to this transaction. */
static void
examine_relation(Oid relid, bool *created_here, bool *locked_here)
{
	Relation rel = relation_open(relid, NoLock);

	*created_here = rel->rd_createSubid != InvalidSubTransactionId;
	*locked_here = CheckRelationLockedByMe(rel, ShareUpdateExclusiveLock, true);
	relation_close(rel, NoLock);
}

static void
report_no_segment(const EsCollection *coll, const char *detail, const char *hint)
{
	ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					errmsg("no segment of collection \"%s\" is ready to append to",
						   get_rel_name(coll->relid)),
					errdetail_internal("%s", detail), errhint("%s", hint)));
}

static void
report_await_timeout(const EsCollection *coll)
{
	char *detail =
		psprintf("Waited %d ms for the worker to make one.", es_segment_timeout_ms);

	report_no_segment(coll, detail,
					  es_wake_slots_exhausted()
						  ? "The worker finds no free process slot: you might need to "
							"increase max_worker_processes."
						  : "See what is wrong with SELECT * FROM eventstore.doctor().");
}

static void
sleep_a_step(void)
{
	static uint32 wait_event = 0;

	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
					 AWAIT_STEP_MS, es_wait_event(wait_event, "EventstoreSegmentWait"));
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}

/* False where it took longer than eventstore.segment_timeout. */
static bool
await_worker(EsHeadRef *head, EsPosition wanted_end)
{
	TimestampTz start = GetCurrentTimestamp();
	TimestampTz asked = 0;

	while (es_head_ready_end(head) < wanted_end)
	{
		TimestampTz now = GetCurrentTimestamp();

		if (TimestampDifferenceExceeds(start, now, es_segment_timeout_ms))
			return false;
		if (asked == 0 || TimestampDifferenceExceeds(asked, now, AWAIT_ASK_AGAIN_MS))
		{
			es_head_want_end(head, wanted_end);
			es_wake_maintenance();
			asked = now;
		}
		sleep_a_step();
	}
	return true;
}

void
es_segments_await(EsCollection *coll, EsPosition wanted_end)
{
	bool created_here;
	bool locked_here;

	examine_relation(coll->relid, &created_here, &locked_here);
	es_head_count(&coll->head, ES_STAT_SEGMENT_WAITS, 1);
	if (created_here)
		make_and_publish(coll, wanted_end);
	else
	{
		if (locked_here)
			report_no_segment(coll,
							  "This transaction has itself locked the collection, so "
							  "that the worker cannot make one.",
							  "Append in a transaction of its own.");
		if (!await_worker(&coll->head, wanted_end))
			report_await_timeout(coll);
		AcceptInvalidationMessages();
	}
	es_collection_get(coll->relid);
}

EsPosition
es_segments_prepare(Oid collection, bool wait)
{
	EsCollection *coll = es_collection_get(collection);
	EsHeadRef	 *head = &coll->head;
	int64		  room = Min(coll->segment_size, PREPARED_ROOM);
	EsPosition	  end;
	bool		  created_here;
	bool		  locked_here;

	/* After a restart positions may go on beyond all segments. */
	es_collection_load_head(coll);
	if (head->head == NULL)
		return 0;
	end = es_head_ready_end(head);
	if (!wait || end - es_head_last_allotted(head) > room)
		return end;
	examine_relation(collection, &created_here, &locked_here);
	if (created_here || locked_here)
		return end;
	es_head_count(head, ES_STAT_SEGMENT_WAITS, 1);
	(void) await_worker(head, es_head_last_allotted(head) + 1 + room);
	return es_head_ready_end(head);
}
