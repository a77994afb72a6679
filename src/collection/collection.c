/*
 * collection/collection.c
 *		A backend's knowledge of collections, and the view that readers read from.
 *
 * The cache maps a collection's OID to its catalog row and its segments, and
 * a segment's OID to its collection.  Relcache invalidations of either mark the
 * collection as not valid; the next es_collection_get rebuilds it in place.
 * Nothing is kept that would not be in the relcache message's reach: who
 * changes a catalog row sends one for the table.
 *
 * The head that a reader gets depends on what its snapshot can be (design 5.2
 * and 5.3):
 *
 *	READ COMMITTED on a primary		the shared head, then a new snapshot
 *	anything whose snapshot is		the head that travels with the data: the
 *	older than "now", or no			safe_head of the newest event that the
 *	shared memory (standby,			snapshot sees, or the tick that the worker
 *	logical copy, parallel query)	notes in quiet times, whichever is greater
 *
 * Both parts of the second hold for any snapshot that sees them: what lies at
 * or below was committed or gone before they were written.  Rows of the own
 * transaction are the exception (an old snapshot beside a head of today) and
 * do not count.
 */
#include "postgres.h"

#include "collection/collection.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/relscan.h"
#include "access/stratnum.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/partition.h"
#include "catalog/pg_class.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "collection/append.h"
#include "collection/layout.h"
#include "collection/segment.h"
#include "compat.h"
#include "errors.h"
#include "executor/tuptable.h"
#include "miscadmin.h"
#include "partitioning/partbounds.h"
#include "partitioning/partdesc.h"
#include "rewrite/prs2lock.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/snapmgr.h"

/* A segment's way back to its collection. */
typedef struct SegmentEntry
{
	Oid segment; /* hash key */
	Oid collection;
} SegmentEntry;

static HTAB			*collections = NULL;
static HTAB			*segment_owners = NULL;
static MemoryContext cache_context = NULL;

/* ---------------------------------------------------------------------------
 * The cache
 * ------------------------------------------------------------------------- */

static void
invalidate_all(void)
{
	HASH_SEQ_STATUS status;
	EsCollection   *coll;

	hash_seq_init(&status, collections);
	while ((coll = hash_seq_search(&status)) != NULL)
		coll->valid = false;
}

static void
invalidate_relation(Datum arg, Oid relid)
{
	EsCollection *coll;
	SegmentEntry *segment;

	if (!OidIsValid(relid))
	{
		invalidate_all();
		return;
	}
	segment = hash_search(segment_owners, &relid, HASH_FIND, NULL);
	if (segment != NULL)
		relid = segment->collection;
	coll = hash_search(collections, &relid, HASH_FIND, NULL);
	if (coll != NULL)
		coll->valid = false;
}

static void
init_cache(void)
{
	HASHCTL ctl;

	if (collections != NULL)
		return;
	cache_context = AllocSetContextCreate(TopMemoryContext, "eventstore collections",
										  ALLOCSET_DEFAULT_SIZES);
	ctl.hcxt = cache_context;
	ctl.keysize = sizeof(Oid);
	ctl.entrysize = sizeof(SegmentEntry);
	segment_owners = hash_create("eventstore segments", 64, &ctl,
								 HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	ctl.entrysize = sizeof(EsCollection);
	collections = hash_create("eventstore collections", 16, &ctl,
							  HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	CacheRegisterRelcacheCallback(invalidate_relation, (Datum) 0);
}

/* Is the function one of the extension's own triggers? */
static bool
is_own_function(Oid func, Oid schema)
{
	return get_func_namespace(func) == schema;
}

/*
 * May rows be written past the executor?  Triggers other than our own, rules,
 * and columns that get a value by themselves say no.
 */
static bool
is_plain(Relation rel)
{
	Oid		  schema = es_extension_schema();
	TupleDesc desc = RelationGetDescr(rel);

	if (rel->trigdesc != NULL)
		for (int i = 0; i < rel->trigdesc->numtriggers; i++)
		{
			Trigger *trigger = &rel->trigdesc->triggers[i];

			if ((trigger->tgtype & TRIGGER_TYPE_INSERT) != 0 &&
				!is_own_function(trigger->tgfoid, schema))
				return false;
		}
	if (rel->rd_rules != NULL)
		return false;
	for (int i = ES_COLLECTION_NATTS; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (att->attisdropped)
			continue;
		if (att->atthasdef || att->attidentity || att->attgenerated ||
			get_typtype(att->atttypid) == TYPTYPE_DOMAIN)
			return false;
	}
	return true;
}

static void
forget_segments(EsCollection *coll)
{
	for (int i = 0; i < coll->nsegments; i++)
		hash_search(segment_owners, &coll->segments[i].relid, HASH_REMOVE, NULL);
	if (coll->segments != NULL)
		pfree(coll->segments);
	coll->segments = NULL;
	coll->nsegments = 0;
}

/*
 * PostgreSQL builds a relation's list of partitions when it is first asked for,
 * opens relations meanwhile, and so may take the message that there is a new
 * one: the list is thrown away before it is there, and then kept without the
 * new one.  So have it built again here; a message that comes in the middle of
 * that has marked 'coll' before we return, and we are called once more.
 */
static PartitionDesc
build_partition_list(Relation rel)
{
	RelationCacheInvalidateEntry(RelationGetRelid(rel));
	return RelationGetPartitionDesc(rel, false);
}

/* The partitions, by their bounds.  A default partition is not a segment. */
static void
load_segments(EsCollection *coll, Relation rel)
{
	PartitionDesc	   partdesc = build_partition_list(rel);
	PartitionBoundInfo bounds = partdesc->boundinfo;
	EsSegment		  *segments;
	int				   n = 0;

	forget_segments(coll);
	if (partdesc->nparts == 0)
		return;
	segments =
		MemoryContextAllocZero(cache_context, sizeof(EsSegment) * partdesc->nparts);
	coll->segments = segments;

	/* indexes[i] is the partition that ends at the i-th bound, -1 for a hole. */
	for (int i = 1; i < bounds->ndatums; i++)
	{
		SegmentEntry *entry;

		if (bounds->indexes[i] < 0 ||
			bounds->kind[i - 1][0] != PARTITION_RANGE_DATUM_VALUE ||
			bounds->kind[i][0] != PARTITION_RANGE_DATUM_VALUE)
			continue;
		segments[n].first = DatumGetInt64(bounds->datums[i - 1][0]);
		segments[n].end = DatumGetInt64(bounds->datums[i][0]);
		segments[n].relid = partdesc->oids[bounds->indexes[i]];
		segments[n].plain = -1;
		entry = hash_search(segment_owners, &segments[n].relid, HASH_ENTER, NULL);
		entry->collection = coll->relid;
		n++;
		coll->nsegments = n;
	}
}

/* Where appends to it are announced, if they are. */
static EsChannel
channel_of(const Datum *catalog_row)
{
	char	 *notify = TextDatumGetCString(catalog_row[ES_CATALOG_NOTIFY - 1]);
	char	 *channel = TextDatumGetCString(catalog_row[ES_CATALOG_CHANNEL - 1]);
	EsChannel result = strcmp(notify, "none") == 0 ? 0 : es_listeners_channel(channel);

	pfree(notify);
	pfree(channel);
	return result;
}

/* Reads the catalog row; false where there is none. */
static bool
load_row(EsCollection *coll)
{
	Datum	  values[ES_CATALOG_NATTS];
	bool	  nulls[ES_CATALOG_NATTS];
	HeapTuple tuple = es_extension_row("collection_catalog", NULL, ES_CATALOG_COLLECTION,
									   coll->relid, ES_CATALOG_NATTS, values, nulls);

	if (tuple == NULL)
		return false;
	coll->heads = DatumGetObjectId(values[ES_CATALOG_HEADS - 1]);
	coll->counter = DatumGetObjectId(values[ES_CATALOG_COUNTER - 1]);
	coll->head.relid = coll->relid;
	coll->head.incarnation = DatumGetInt64(values[ES_CATALOG_INCARNATION - 1]);
	coll->first_position = DatumGetInt64(values[ES_CATALOG_FIRST_POSITION - 1]);
	coll->segment_size = DatumGetInt64(values[ES_CATALOG_SEGMENT_SIZE - 1]);
	coll->head.channel = channel_of(values);
	heap_freetuple(tuple);
	return true;
}

/* Whose changes it records, by a catalog of (source, changelog, ...); InvalidOid. */
static Oid
find_source(const char *catalog, const char *index, Oid changelog)
{
	Datum	  values[ES_STORE_CATALOG_CHANGELOG];
	bool	  nulls[lengthof(values)];
	HeapTuple tuple =
		es_extension_row(catalog, index, ES_STORE_CATALOG_CHANGELOG, changelog,
						 ES_STORE_CATALOG_CHANGELOG, values, nulls);

	StaticAssertStmt(ES_STORE_CATALOG_STORE == ES_CAPTURE_CATALOG_SOURCE &&
						 ES_STORE_CATALOG_CHANGELOG == ES_CAPTURE_CATALOG_CHANGELOG,
					 "both catalogs begin alike");
	if (tuple == NULL)
		return InvalidOid;
	heap_freetuple(tuple);
	return DatumGetObjectId(values[ES_STORE_CATALOG_STORE - 1]);
}

void
es_collection_report_no_changelog(Oid store)
{
	ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					errmsg("store \"%s\" has no changelog", get_rel_name(store)),
					errhint("It was created with changelog => false.")));
}

Oid
es_collection_or_changelog(Oid relid)
{
	Datum	  values[ES_STORE_CATALOG_NATTS];
	bool	  nulls[ES_STORE_CATALOG_NATTS];
	HeapTuple tuple;

	if (get_rel_relkind(relid) != RELKIND_RELATION || !OidIsValid(es_extension_schema()))
		return relid;
	tuple = es_extension_row("store_catalog", NULL, ES_STORE_CATALOG_STORE, relid,
							 ES_STORE_CATALOG_NATTS, values, nulls);
	if (tuple == NULL)
		return relid;
	heap_freetuple(tuple);
	if (nulls[ES_STORE_CATALOG_CHANGELOG - 1])
		es_collection_report_no_changelog(relid);
	return DatumGetObjectId(values[ES_STORE_CATALOG_CHANGELOG - 1]);
}

Oid
es_collection_find_store(Oid changelog)
{
	return find_source("store_catalog", "store_catalog_changelog_key", changelog);
}

static void
report_not_collection(Relation rel)
{
	if (es_layout_matches(rel))
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("collection \"%s\" is not registered",
							   RelationGetRelationName(rel)),
						errdetail("It was restored without the extension's own tables, "
								  "or the extension was dropped and created again."),
						errhint("Its owner can call eventstore.repair_collection().")));
	ereport(ERROR, (errcode(ERRCODE_ES_NOT_A_COLLECTION),
					errmsg("relation \"%s\" is not a collection",
						   RelationGetRelationName(rel))));
}

/* Events have to be where C looks for them, and the companions have to exist. */
static void
check_shape(const EsCollection *coll, Relation rel)
{
	es_layout_check(rel);
	if (get_rel_relkind(coll->heads) != RELKIND_RELATION ||
		get_rel_relkind(coll->counter) != RELKIND_SEQUENCE)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("collection \"%s\" has lost its heads table or its counter",
						RelationGetRelationName(rel)),
				 errhint("Its owner can call eventstore.repair_collection().")));
}

static void
load_collection(EsCollection *coll)
{
	Relation rel = relation_open(coll->relid, NoLock);
	int64	 incarnation = coll->head.incarnation;

	/* An invalidation that arrives while we read must mark it again. */
	coll->valid = true;
	PG_TRY();
	{
		if (rel->rd_rel->relkind != RELKIND_PARTITIONED_TABLE || !load_row(coll))
			report_not_collection(rel);
		check_shape(coll, rel);
		load_segments(coll, rel);
		coll->store = es_collection_find_store(coll->relid);
		coll->captured =
			find_source("capture_catalog", "capture_catalog_changelog", coll->relid);
		coll->plain = is_plain(rel);
		if (coll->head.incarnation != incarnation)
		{
			coll->head.head = NULL;
			coll->behind = false;
		}
	}
	PG_CATCH();
	{
		coll->valid = false;
		PG_RE_THROW();
	}
	PG_END_TRY();
	relation_close(rel, NoLock);
}

EsCollection *
es_collection_get(Oid relid)
{
	EsCollection *coll;
	bool		  found;

	init_cache();
	coll = hash_search(collections, &relid, HASH_ENTER, &found);
	if (!found)
	{
		memset((char *) coll + sizeof(Oid), 0, sizeof(EsCollection) - sizeof(Oid));
		coll->head.incarnation = -1;
	}

	/* Loading opens relations, and so may accept the next invalidation. */
	while (!coll->valid)
		load_collection(coll);
	return coll;
}

EsCollection *
es_collection_open(Oid relid, LOCKMODE mode)
{
	LockRelationOid(relid, mode);
	if (get_rel_relkind(relid) == '\0')
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("relation with OID %u does not exist", relid)));
	return es_collection_get(relid);
}

bool
es_collection_exists(Oid relid)
{
	EsCollection  probe;
	EsCollection *coll;

	init_cache();
	coll = hash_search(collections, &relid, HASH_FIND, NULL);
	if (coll != NULL && coll->valid)
		return true;
	if (!OidIsValid(es_extension_schema()) ||
		get_rel_relkind(relid) != RELKIND_PARTITIONED_TABLE)
		return false;
	memset(&probe, 0, sizeof(probe));
	probe.relid = relid;
	return load_row(&probe);
}

Oid
es_collection_of_segment(Oid segment)
{
	SegmentEntry *entry;
	Oid			  parent;

	init_cache();
	entry = hash_search(segment_owners, &segment, HASH_FIND, NULL);
	if (entry != NULL)
		return entry->collection;
	if (!get_rel_relispartition(segment))
		return InvalidOid;
	parent = get_partition_parent(segment, false);
	return es_collection_exists(parent) ? parent : InvalidOid;
}

bool
es_collection_segment_plain(EsCollection *coll, Relation segment)
{
	Oid	 relid = RelationGetRelid(segment);
	bool plain;

	for (int i = coll->nsegments - 1; i >= 0; i--)
		if (coll->segments[i].relid == relid)
		{
			if (coll->segments[i].plain >= 0)
				return coll->segments[i].plain;
			es_layout_check(segment);
			plain = segment->rd_rel->relkind == RELKIND_RELATION && is_plain(segment);
			coll->segments[i].plain = plain;
			return plain;
		}
	return false;
}

const char *
es_collection_name(const EsCollection *coll)
{
	return es_relation_name(coll->relid);
}

/* ---------------------------------------------------------------------------
 * Rights
 * ------------------------------------------------------------------------- */

void
es_collection_check_acl(const EsCollection *coll, AclMode mode)
{
	AclResult result = pg_class_aclcheck(coll->relid, GetUserId(), mode);

	if (result != ACLCHECK_OK)
		aclcheck_error(result, OBJECT_TABLE, get_rel_name(coll->relid));
}

void
es_collection_check_owner(Oid relid)
{
	if (!es_owns_relation(relid, GetUserId()))
		aclcheck_error(ACLCHECK_NOT_OWNER, OBJECT_TABLE, get_rel_name(relid));
}

void
es_collection_refuse_changelog(const EsCollection *coll)
{
	bool of_store = OidIsValid(coll->store);

	if (!of_store && !OidIsValid(coll->captured))
		return;
	ereport(
		ERROR,
		(errcode(ERRCODE_ES_APPEND_ONLY),
		 errmsg("cannot append to changelog \"%s\"", get_rel_name(coll->relid)),
		 errdetail("It records the changes of %s \"%s\" and nothing else.",
				   of_store ? "store" : "table",
				   get_rel_name(of_store ? coll->store : coll->captured)),
		 errhint("Change the %s: its changelog follows.", of_store ? "store" : "table")));
}

bool
es_collection_row_security(const EsCollection *coll)
{
	return check_enable_rls(coll->relid, InvalidOid, false) == RLS_ENABLED;
}

/* ---------------------------------------------------------------------------
 * Segments
 * ------------------------------------------------------------------------- */

const EsSegment *
es_collection_segment(const EsCollection *coll, EsPosition position)
{
	int low = 0;
	int high = coll->nsegments - 1;

	/* The newest one or the one before it, nearly always. */
	while (low <= high)
	{
		int				 mid = (low + high) / 2;
		const EsSegment *segment = &coll->segments[mid];

		if (position < segment->first)
			high = mid - 1;
		else if (position >= segment->end)
			low = mid + 1;
		else
			return segment;
	}

	/* A hole between segments is one that was detached or lost. */
	if (coll->nsegments > 0 && position >= coll->first_position &&
		position < coll->segments[coll->nsegments - 1].end)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("a segment of collection \"%s\" is missing",
						get_rel_name(coll->relid)),
				 errdetail("No segment holds position " INT64_FORMAT ".", position),
				 errhint("Attach it again with ALTER TABLE ... ATTACH PARTITION, or give "
						 "up what it held with eventstore.truncate_before().")));
	return NULL;
}

/* ---------------------------------------------------------------------------
 * Heads
 * ------------------------------------------------------------------------- */

/* The highest key of the segment's primary key, whoever can see its row; 0. */
static EsPosition
highest_key(Oid segment)
{
	Relation   rel = try_table_open(segment, AccessShareLock);
	EsPosition highest = 0;
	Oid		   pk;

	if (rel == NULL)
		return 0; /* dropped by retention, after our list was made */
	es_layout_check(rel);
	pk = es_primary_key(rel);
	if (OidIsValid(pk))
	{
		Relation	  index = index_open(pk, AccessShareLock);
		IndexScanDesc scan = es_index_beginscan(rel, index, SnapshotAny, 0);

		scan->xs_want_itup = true;
		index_rescan(scan, NULL, 0, NULL, 0);
		if (index_getnext_tid(scan, BackwardScanDirection) != NULL)
		{
			bool isnull;

			highest = DatumGetInt64(
				index_getattr(scan->xs_itup, 1, scan->xs_itupdesc, &isnull));
		}
		index_endscan(scan);
		index_close(index, AccessShareLock);
	}
	table_close(rel, AccessShareLock);
	return highest;
}

EsPosition
es_collection_highest_present(const EsCollection *coll)
{
	int		   n = coll->nsegments;
	Oid		  *relids = palloc(sizeof(Oid) * (n + 1));
	EsPosition highest = 0;

	for (int i = 0; i < n; i++)
		relids[i] = coll->segments[i].relid;
	for (int i = n - 1; i >= 0 && highest == 0; i--)
		highest = highest_key(relids[i]);
	pfree(relids);
	return highest;
}

static EsPosition
segments_end(const EsCollection *coll)
{
	return coll->nsegments > 0 ? coll->segments[coll->nsegments - 1].end : 1;
}

/*
 * Finds what the entry is made from.  The list of segments must be one that
 * every reader can have by now, so we wait for whoever is making one: his lock
 * goes after his invalidations were sent.  Our own may be rolled back still.
 */
static bool
find_origin(EsCollection *coll, EsHeadOrigin *origin)
{
	Relation rel;

	es_segments_lock(coll->relid, ShareLock);
	es_segments_unlock(coll->relid, ShareLock);
	AcceptInvalidationMessages();
	es_collection_get(coll->relid);

	rel = relation_open(coll->relid, NoLock);
	origin->created_in = rel->rd_createSubid;
	relation_close(rel, NoLock);
	origin->counter = coll->counter;
	/* Nobody else can know of the collection's segments before he knows of it. */
	if (origin->created_in != InvalidSubTransactionId)
		origin->ready_end = segments_end(coll);
	else
		origin->ready_end = es_segments_committed_end(coll);
	origin->last_present = es_collection_highest_present(coll);
	return origin->last_present <= es_reservation_read(coll->counter).reserved;
}

static bool
find_head(EsCollection *coll)
{
	if (coll->head.head == NULL && es_head_find(&coll->head))
		coll->behind = false; /* repaired, if it was */
	return coll->head.head != NULL;
}

static void
find_or_make_head(EsCollection *coll)
{
	EsHeadOrigin origin;

	if (find_head(coll))
		return;
	coll->behind = !find_origin(coll, &origin);
	if (!coll->behind)
		es_head_make(&coll->head, &origin);
}

/*
 * An entry that was never used may have been made in the middle of a restore,
 * before the counter got its value.
 */
static void
renew_head(EsCollection *coll)
{
	EsReservation reservation = es_reservation_read(coll->counter);

	es_head_renew(&coll->head, es_reservation_next(&reservation));
}

void
es_collection_load_head(EsCollection *coll)
{
	if (RecoveryInProgress())
		return;
	find_or_make_head(coll);
	if (coll->head.head != NULL && !es_head_seems_used(&coll->head))
		renew_head(coll);
}

void
es_collection_load_head_for_append(EsCollection *coll)
{
	bool behind;

	PreventCommandDuringRecovery("append");
	es_collection_load_head(coll);
	behind = coll->behind;

	/* Rows that came by replication after the entry was made do not register. */
	if (coll->head.head != NULL && !es_head_in_use(&coll->head) &&
		es_collection_highest_present(coll) > es_head_last_allotted(&coll->head))
		behind = true;
	if (behind)
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("collection \"%s\" has events that its counter does not know of",
					get_rel_name(coll->relid)),
			 errdetail(
				 "They came by logical replication, or by a restore of the data alone."),
			 errhint("Once nothing else writes them, its owner can call "
					 "eventstore.repair_collection().")));
}

/* The tick that this snapshot sees; 0. */
EsPosition
es_collection_tick(Oid collection, Snapshot snapshot)
{
	Relation	rel = table_open(es_extension_relation("tick"), AccessShareLock);
	Oid			pk = es_primary_key(rel);
	EsPosition	head = 0;
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, 1, BTEqualStrategyNumber, F_OIDEQ, ObjectIdGetDatum(collection));
	scan = systable_beginscan(rel, pk, OidIsValid(pk), snapshot, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		bool isnull;

		head = DatumGetInt64(heap_getattr(tuple, 2, RelationGetDescr(rel), &isnull));
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return head;
}

/* The safe_head of the newest event in the segment that counts; -1 for none. */
static EsPosition
newest_safe_head(Oid segment, Snapshot snapshot)
{
	Relation   rel = try_table_open(segment, AccessShareLock);
	EsPosition safe = -1;
	Oid		   pk;

	if (rel == NULL)
		return -1;
	es_layout_check(rel);
	pk = es_primary_key(rel);
	if (OidIsValid(pk))
	{
		Relation		index = index_open(pk, AccessShareLock);
		TupleTableSlot *slot = table_slot_create(rel, NULL);
		IndexScanDesc	scan = es_index_beginscan(rel, index, snapshot, 0);

		index_rescan(scan, NULL, 0, NULL, 0);
		while (safe < 0 && index_getnext_slot(scan, BackwardScanDirection, slot))
		{
			bool		  isnull;
			TransactionId xmin;
			Datum		  value;

			CHECK_FOR_INTERRUPTS();
			xmin = DatumGetTransactionId(
				slot_getsysattr(slot, MinTransactionIdAttributeNumber, &isnull));
			if (TransactionIdIsCurrentTransactionId(xmin))
				continue;
			value = slot_getattr(slot, ES_ATT_SAFE_HEAD, &isnull);
			safe = isnull ? 0 : DatumGetInt64(value);
		}
		index_endscan(scan);
		ExecDropSingleTupleTableSlot(slot);
		index_close(index, AccessShareLock);
	}
	table_close(rel, AccessShareLock);
	return safe;
}

EsPosition
es_collection_head_in(EsCollection *coll, Snapshot snapshot)
{
	int		   n = coll->nsegments;
	Oid		  *relids = palloc(sizeof(Oid) * (n + 1));
	EsPosition safe = -1;

	for (int i = 0; i < n; i++)
		relids[i] = coll->segments[i].relid;
	for (int i = n - 1; i >= 0 && safe < 0; i--)
		safe = newest_safe_head(relids[i], snapshot);
	pfree(relids);
	return Max(safe, es_collection_tick(coll->relid, snapshot));
}

EsPosition
es_collection_last_allotted(EsCollection *coll)
{
	EsPosition last;

	es_collection_load_head(coll);
	if (coll->head.head == NULL)
		return Max(es_reservation_read(coll->counter).reserved,
				   es_collection_highest_present(coll));
	last = es_head_last_allotted(&coll->head);
	if (!es_head_in_use(&coll->head))
		last = Max(last, es_collection_highest_present(coll));
	return last;
}

bool
es_collection_last_known(EsCollection *coll, EsPosition *last)
{
	if (!es_preloaded() || RecoveryInProgress() || !find_head(coll) ||
		!es_head_in_use(&coll->head))
		return false;
	*last = es_head_last_allotted(&coll->head);
	return true;
}

void
es_collection_check_cursor(EsCollection *coll, EsPosition after)
{
	/* First, since it may learn of a truncation. */
	EsPosition last = es_collection_last_allotted(coll);

	if (after < coll->first_position - 1)
		ereport(ERROR,
				(errcode(ERRCODE_ES_NOT_RETAINED),
				 errmsg("events of collection \"%s\" after position " INT64_FORMAT
						" are no longer retained",
						get_rel_name(coll->relid), after),
				 errdetail("Requested " INT64_FORMAT ", first kept " INT64_FORMAT ".",
						   after, coll->first_position),
				 errhint("Read from the oldest that is kept with a null position.")));
	if (after > last)
		ereport(ERROR,
				(errcode(ERRCODE_ES_CURSOR_AHEAD),
				 errmsg("position " INT64_FORMAT " is ahead of collection \"%s\"", after,
						get_rel_name(coll->relid)),
				 errdetail("Requested " INT64_FORMAT ", last allotted " INT64_FORMAT ".",
						   after, last),
				 errhint("The cursor may be from a collection that was dropped and "
						 "created again, or from another database.")));
}

/* ---------------------------------------------------------------------------
 * Views
 * ------------------------------------------------------------------------- */

void
es_view_open(EsCollection *coll, EsView *view)
{
	bool	   fixed = IsolationUsesXactSnapshot() || IsInParallelMode();
	EsPosition head = 0;
	bool	   shared = false;
	bool	   data = true;

	if (!fixed)
	{
		es_collection_load_head(coll);
		shared = coll->head.head != NULL;
		if (shared)
		{
			head = es_head_read(&coll->head, false);
			/* Unused here since the start: events may come by replication. */
			data = !es_head_in_use(&coll->head);
		}
	}

	AcceptInvalidationMessages();
	es_collection_get(coll->relid);

	if (IsInParallelMode())
		view->snapshot = RegisterSnapshot(GetActiveSnapshot());
	else if (fixed)
		view->snapshot = RegisterSnapshot(GetTransactionSnapshot());
	else
		view->snapshot = RegisterSnapshot(GetLatestSnapshot());

	view->head = head;
	if (data)
	{
		view->head = Max(head, es_collection_head_in(coll, view->snapshot));

		/* The tick may speak of a segment that we had not heard of before. */
		AcceptInvalidationMessages();
		es_collection_get(coll->relid);
	}
	view->head = Min(view->head, es_insert_lowest_pending(coll) - 1);
}

void
es_view_close(EsView *view)
{
	UnregisterSnapshot(view->snapshot);
	view->snapshot = NULL;
}

EsPosition
es_view_head(EsCollection *coll)
{
	EsView view;

	es_view_open(coll, &view);
	es_view_close(&view);
	return view.head;
}
