/*
 * position/head.c
 *		Why no reader ever skips an event, and why appends do not queue.
 *
 * Positions are handed out before commit, and commits happen in another
 * order.  A reader that goes on from the last position it saw would skip what
 * commits late.  So shared memory holds, for each collection in use, the next
 * position and the first position of each open transaction that took some:
 *
 *	1.	es_head_allot takes positions and puts the transaction on the list of
 *		those in flight, in one step under the collection's lock.  Positions
 *		only grow, so a newcomer belongs at the end and the list stays sorted
 *		by itself: its first member holds the head.
 *	2.	head = first in flight - 1, or next - 1 where nothing is in flight.
 *	3.	A transaction leaves the list when all of its effects can be seen:
 *		rows by every new snapshot (ProcArrayEndTransaction), and invalidation
 *		messages by every backend that accepts them (AtEOXact_Inval).  The
 *		last comes after XACT_EVENT_COMMIT, so we leave in the release
 *		callback of the top-level resource owner, in the phase after locks,
 *		which also runs at abort and at FATAL exit.
 *	4.	A reader takes the head first, accepts invalidations second, takes its
 *		snapshot third and reads up to the head fourth (es_view_open).
 *
 * The same registry carries the conditions of appends ("fail if an event that
 * matches this query was appended after that position").  What must be
 * excluded is that a matching event, or another conditional append, slips in
 * between check and commit.  Each open transaction shows here the labels
 * (types and tags) of what it appends and the conditions it relies on:
 *
 *	5.	es_head_register, under the same lock: where a label of mine fulfils
 *		the announced condition of another open transaction, I wait for its
 *		end and look again, not yet showing anything.  Else I show my labels,
 *		and my condition where I have one, and note all open transactions
 *		whose labels fulfil it; those I wait for before I check.
 *		One of two that matter to each other is always first under the lock,
 *		and the other one sees it.
 *	6.	A transaction whose labels fulfilled a condition already when that was
 *		announced does not wait for it: the condition's owner waits for it.
 *	7.	Waiting is XactLockTableWait, outside the lock, so that PostgreSQL's
 *		deadlock detector knows of it.
 *	8.	A transaction with more labels than fit shows itself as 'coarse':
 *		whatever the condition, it is taken to match.
 *	9.	A position taken before the labels were shown (a column default, by
 *		INSERT or COPY) may lie below that of a conditional append that
 *		committed in between.  es_head_last_conditional tells, and the row's
 *		trigger takes a new position.
 *
 * Savepoints: positions and labels of a subtransaction that aborts stay until
 * the transaction ends (positions become gaps); its conditions go at once.
 * PREPARE TRANSACTION would end the transaction for us but not for others,
 * and is refused.
 *
 * Memory: the entries live in a DSA area of fixed size in the main shared
 * memory segment, so that all of it is mapped in every process; a dshash table leads from (database, relation) to an EsHead,
 * whose memory is recycled but never returned, so that a stale pointer is
 * harmless: each use compares the identity under the lock.
 *
 * Locks: EsHead.lock (LWLock, tranche EventstoreHead) for everything in EsHead
 * and in the EsOpens on its lists; held for a few hundred instructions, never
 * across I/O, a heavyweight lock or anything that may raise an error.
 * Extending the reservation is serialised by a heavyweight lock instead (an
 * advisory lock of a class of our own), so that it can be cancelled.
 *
 * A database's entries go with it.  An OID may come again (a copy made with
 * CREATE DATABASE ... OID has the same tables, too), so they go while DROP
 * DATABASE still has its lock: nobody can be in that database, or get into its
 * successor.
 *
 * A crash loses all of this.  After it nothing is in flight, and the next
 * position is the first one that was not reserved (position.c).
 */
#include "postgres.h"

#include "position/head.h"

#include "access/transam.h"
#include "access/xact.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_database.h"
#include "compat.h"
#include "lib/dshash.h"
#include "miscadmin.h"
#include "position/position.h"
#include "position/watch.h"
#include "port/atomics.h"
#include "shmem.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "utils/dsa.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"
#include "worker/wake.h"

/* Labels that one open transaction can show; with more it is coarse. */
#define OPEN_LABELS_MAX 64

/* A condition of more words than this is taken as "everything". */
#define CONDITION_WORDS_MAX 1024

/* Reserved beyond what is asked for: one flush in so many positions. */
#define RESERVE_AHEAD (4 * ES_POSITION_BLOCK)

/*
 * The area's size, all of it inside the main segment: tens of thousands of
 * collections in use (300 bytes each), and for each backend a hundred that one
 * transaction appends to (700 bytes each), with room for their conditions.
 */
#define AREA_BASE_SIZE		  ((Size) 8 * 1024 * 1024)
#define AREA_SIZE_PER_BACKEND ((Size) 96 * 1024)

/* Class of our advisory locks; PostgreSQL's own functions use 1 and 2. */
#define ADVISORY_CLASS_RESERVE 17

typedef enum OpenList
{
	LIST_OPEN,		/* all open transactions of the collection */
	LIST_IN_FLIGHT, /* those that took positions, by the first one */
	LIST_COUNT
} OpenList;

typedef struct ListLink
{
	dsa_pointer prev;
	dsa_pointer next;
} ListLink;

/* A condition on which an open transaction relies; chained to its EsOpen. */
typedef struct OpenCondition
{
	dsa_pointer		 next;
	SubTransactionId subid; /* goes when this one aborts */
	bool			 everything;
	int				 nitems;
	EsLabel			 words[FLEXIBLE_ARRAY_MEMBER];
} OpenCondition;

/*
 * One open transaction in one collection.  Written by its own backend only,
 * under the EsHead's lock in exclusive mode; read by others under the lock.
 */
typedef struct EsOpen
{
	ListLink	  links[LIST_COUNT];
	int			  pid;
	TransactionId xid;		  /* top level: what others wait for */
	EsPosition	  first;	  /* 0 = no position yet, and not on LIST_IN_FLIGHT */
	TimestampTz	  since;	  /* of the first position */
	dsa_pointer	  conditions; /* chain of OpenCondition */
	bool		  coarse;
	int			  nlabels;
	EsLabel		  labels[OPEN_LABELS_MAX];
} EsOpen;

/* A collection's entry.  Everything but 'stats' is guarded by 'lock'. */
struct EsHead
{
	LWLock		lock;
	Oid			dbid;
	Oid			relid; /* InvalidOid while free for another */
	int64		incarnation;
	Oid			counter;
	EsPosition	next;		/* the next position to hand out */
	EsPosition	reserved;	/* durably reserved up to here */
	EsPosition	ready_end;	/* segments that may be filled end here (exclusive) */
	EsPosition	wanted_end; /* waiting appenders want them to end here; 0 */
	EsPosition	last_conditional;
	EsAnnounced announced; /* the last one; 'events' counts on since */
	EsChannel channel; /* where the notifier announces it; 0 = nowhere, or not seen yet */
	bool	  in_use;  /* a position was handed out since the start */
	bool	  reserves;	  /* the counter was, or is being, written for this entry */
	int		  watchers;	  /* sessions that wait for something here */
	dsa_pointer releases; /* EsReleases, while there are watchers; or a dropped one's */
	dsa_pointer list_first[LIST_COUNT];
	dsa_pointer list_last[LIST_COUNT];
	dsa_pointer self;	   /* constant */
	dsa_pointer next_free; /* when free: guarded by the control's lock */
	pg_atomic_uint64 stats[ES_STAT_COUNT];
};

typedef struct HeadKey
{
	Oid dbid;
	Oid relid;
} HeadKey;

typedef struct HeadEntry
{
	HeadKey		key;
	dsa_pointer head;
} HeadEntry;

/* In main shared memory; set up by the postmaster. */
typedef struct HeadControl
{
	LWLock				lock;		/* guards first_free */
	dsa_pointer			first_free; /* recycled EsHeads */
	dshash_table_handle table;		/* constant */
									/* the in-place area follows */
} HeadControl;

/* This backend's part in one collection, in the current transaction. */
typedef struct LocalOpen
{
	EsHead	   *head;
	EsOpen	   *open;
	dsa_pointer open_ptr;
	EsPosition	last;	 /* the highest position taken */
	int64		taken;	 /* how many */
	EsChannel	channel; /* as EsHeadRef's */
	EsBloom		streams; /* labels of the streams appended to */
} LocalOpen;

/* When an entry is to be forgotten, seen from the (sub)transaction that asks. */
typedef enum ForgetWhen
{
	FORGET_AT_COMMIT, /* it dropped the collection */
	FORGET_AT_ABORT,  /* it created it */
	FORGET_AT_END	  /* it created it and has aborted already */
} ForgetWhen;

typedef struct PendingForget
{
	Oid				 relid;
	SubTransactionId subid;
	ForgetWhen		 when;
} PendingForget;

static HeadControl	*control = NULL;
static dsa_area		*area = NULL;
static dshash_table *table = NULL;

static LocalOpen *local_opens = NULL; /* TopMemoryContext; empty between transactions */
static int		  nlocal_opens = 0;
static int		  local_opens_size = 0;

static PendingForget *forgets = NULL;
static int			  nforgets = 0;
static int			  forgets_size = 0;

/* The database that this transaction drops; it cannot drop two. */
static Oid					   dropped_database = InvalidOid;
static object_access_hook_type previous_object_access = NULL;

static dshash_parameters table_parameters = {sizeof(HeadKey), sizeof(HeadEntry),
											 ES_DSHASH_MEMORY, 0};

/* ---------------------------------------------------------------------------
 * Shared memory
 * ------------------------------------------------------------------------- */

static Size
area_size(void)
{
	return add_size(AREA_BASE_SIZE, mul_size(AREA_SIZE_PER_BACKEND, MaxBackends));
}

Size
es_head_shmem_size(void)
{
	return add_size(MAXALIGN(sizeof(HeadControl)), area_size());
}

static char *
area_place(void)
{
	return (char *) control + MAXALIGN(sizeof(HeadControl));
}

/* One tranche serves all our locks; its id must be the same in all processes. */
static int
head_tranche(void)
{
	return GetNamedLWLockTranche("EventstoreHead")[0].lock.tranche;
}

void
es_head_shmem_init(void)
{
	bool		  found;
	dsa_area	 *creating;
	dshash_table *creating_table;

	control = ShmemInitStruct("eventstore heads", es_head_shmem_size(), &found);
	if (found)
		return;

	LWLockInitialize(&control->lock, head_tranche());
	control->first_free = InvalidDsaPointer;

	/*
	 * The limit stays: beyond it an append fails cleanly when it begins, where
	 * a DSM segment could fail to be mapped in the midst of a commit.
	 */
	creating = dsa_create_in_place(area_place(), area_size(), head_tranche(), NULL);
	dsa_pin(creating);
	dsa_set_size_limit(creating, area_size());
	table_parameters.tranche_id = head_tranche();
	creating_table = dshash_create(creating, &table_parameters, NULL);
	control->table = dshash_get_hash_table_handle(creating_table);
	dshash_detach(creating_table);
	dsa_detach(creating);
}

static EsOpen *
open_at(dsa_pointer ptr)
{
	return (EsOpen *) dsa_get_address(area, ptr);
}

static EsHead *
head_at(dsa_pointer ptr)
{
	return (EsHead *) dsa_get_address(area, ptr);
}

/* ---------------------------------------------------------------------------
 * The two lists of an EsHead: all need its lock, exclusively to change them
 * ------------------------------------------------------------------------- */

static void
list_append(EsHead *head, OpenList list, EsOpen *open, dsa_pointer open_ptr)
{
	ListLink *link = &open->links[list];

	link->next = InvalidDsaPointer;
	link->prev = head->list_last[list];
	if (DsaPointerIsValid(link->prev))
		open_at(link->prev)->links[list].next = open_ptr;
	else
		head->list_first[list] = open_ptr;
	head->list_last[list] = open_ptr;
}

static void
list_remove(EsHead *head, OpenList list, EsOpen *open)
{
	ListLink *link = &open->links[list];

	if (DsaPointerIsValid(link->prev))
		open_at(link->prev)->links[list].next = link->next;
	else
		head->list_first[list] = link->next;
	if (DsaPointerIsValid(link->next))
		open_at(link->next)->links[list].prev = link->prev;
	else
		head->list_last[list] = link->prev;
}

static EsOpen *
list_start(EsHead *head, OpenList list)
{
	dsa_pointer ptr = head->list_first[list];

	return DsaPointerIsValid(ptr) ? open_at(ptr) : NULL;
}

static EsOpen *
list_after(EsOpen *open, OpenList list)
{
	dsa_pointer ptr = open->links[list].next;

	return DsaPointerIsValid(ptr) ? open_at(ptr) : NULL;
}

/* The lowest position in flight - 1, or next - 1; without one's own if asked. */
static EsPosition
head_of(EsHead *head, bool without_own)
{
	EsOpen *open = list_start(head, LIST_IN_FLIGHT);

	if (open != NULL && without_own && open->pid == MyProcPid)
		open = list_after(open, LIST_IN_FLIGHT);
	return (open != NULL ? open->first : head->next) - 1;
}

/* ---------------------------------------------------------------------------
 * Transaction end
 * ------------------------------------------------------------------------- */

static void
free_conditions(dsa_pointer ptr)
{
	while (DsaPointerIsValid(ptr))
	{
		OpenCondition *cond = (OpenCondition *) dsa_get_address(area, ptr);
		dsa_pointer	   next = cond->next;

		dsa_free(area, ptr);
		ptr = next;
	}
}

/* Lays the memory of an entry aside for another. */
static void
recycle_head(EsHead *head)
{
	LWLockAcquire(&control->lock, LW_EXCLUSIVE);
	head->next_free = control->first_free;
	control->first_free = head->self;
	LWLockRelease(&control->lock);
}

/* Under its lock: belongs to no collection and is on nobody's mind any more. */
static bool
is_deserted(const EsHead *head)
{
	return !OidIsValid(head->relid) && !DsaPointerIsValid(head->list_first[LIST_OPEN]);
}

/*
 * An entry that was taken out of the table.  A transaction gives its heavyweight
 * locks back before it leaves our lists, so the one who dropped the collection
 * may come here first; then the last one to leave recycles.  Who waits is to find
 * out: a repaired collection has another entry, which does not know of him.
 */
static void
retire_head(EsHead *head)
{
	Oid	 relid;
	bool watched;
	bool deserted;

	LWLockAcquire(&head->lock, LW_EXCLUSIVE);
	relid = head->relid;
	watched = head->watchers > 0;
	head->relid = InvalidOid;
	deserted = is_deserted(head);
	LWLockRelease(&head->lock);
	if (deserted)
		recycle_head(head);
	if (watched)
		es_watch_wake_collection(relid);
}

static EsReleases *
releases_at(dsa_pointer ptr)
{
	return (EsReleases *) dsa_get_address(area, ptr);
}

/* Notes what this transaction has added, for those who watch.  With the head's lock. */
static void
note_release(EsHead *head, const LocalOpen *local)
{
	const EsOpen *open = local->open;
	EsReleased	  released = {open->first, local->last, local->streams};

	for (int i = 0; i < open->nlabels; i++)
		es_bloom_add(&released.labels, open->labels[i]);
	if (open->coarse || open->nlabels == 0)
		memset(&released.labels, 0xFF, sizeof(EsBloom));
	es_releases_put(releases_at(head->releases), &released);
}

/* True where the head may have moved and somebody watches: the notifier is to know. */
static bool
release_open(LocalOpen *local, bool committed)
{
	EsHead	   *head = local->head;
	EsOpen	   *open = local->open;
	bool		moved = open->first != 0;
	dsa_pointer conditions;
	EsChannel	channel;
	bool		watched;
	bool		deserted;

	LWLockAcquire(&head->lock, LW_EXCLUSIVE);
	list_remove(head, LIST_OPEN, open);
	if (moved)
		list_remove(head, LIST_IN_FLIGHT, open);
	if (committed)
		head->announced.events += local->taken;
	watched = moved && head->watchers > 0;
	if (watched && committed)
		note_release(head, local);
	conditions = open->conditions;
	channel = head->channel;
	deserted = is_deserted(head);
	LWLockRelease(&head->lock);

	if (deserted)
		recycle_head(head);
	free_conditions(conditions);
	dsa_free(area, local->open_ptr);
	/* Two of them where the option was changed while we were open. */
	return watched ||
		   (moved && (es_listeners_any(local->channel) || es_listeners_any(channel)));
}

static void
forget_entry(Oid relid)
{
	HeadKey		key = {MyDatabaseId, relid};
	HeadEntry  *entry = dshash_find(table, &key, true);
	dsa_pointer ptr;

	if (entry == NULL)
		return;
	ptr = entry->head;
	dshash_delete_entry(table, entry);
	retire_head(head_at(ptr));
}

/*
 * Runs for every resource owner; ours is the top-level one's last phase.  Must
 * not raise an error: only LWLocks and memory that is mapped already.
 */
static void
release_at_end(ResourceReleasePhase phase, bool isCommit, bool isTopLevel, void *arg)
{
	if (phase != RESOURCE_RELEASE_AFTER_LOCKS || !isTopLevel)
		return;
	if (nlocal_opens > 0)
	{
		bool watched = false;

		while (nlocal_opens > 0)
			if (release_open(&local_opens[--nlocal_opens], isCommit))
				watched = true;
		es_wake_activity();
		if (watched)
			es_wake_notifier();
	}
	if (nforgets > 0)
	{
		while (nforgets > 0)
		{
			nforgets--;
			if (forgets[nforgets].when == FORGET_AT_END ||
				(forgets[nforgets].when == FORGET_AT_COMMIT) == isCommit)
				forget_entry(forgets[nforgets].relid);
		}
	}
}

static void
refuse_prepare(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_PRE_PREPARE && nlocal_opens > 0)
		ereport(
			ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("cannot PREPARE a transaction that has appended to a collection")));
}

/* The conditions of an aborted subtransaction no longer stand in anyone's way. */
static void
drop_conditions(LocalOpen *local, SubTransactionId subid)
{
	dsa_pointer *link;
	dsa_pointer	 dropped = InvalidDsaPointer;

	LWLockAcquire(&local->head->lock, LW_EXCLUSIVE);
	link = &local->open->conditions;
	while (DsaPointerIsValid(*link))
	{
		dsa_pointer	   ptr = *link;
		OpenCondition *cond = (OpenCondition *) dsa_get_address(area, ptr);

		if (cond->subid == subid)
		{
			*link = cond->next;
			cond->next = dropped;
			dropped = ptr;
		}
		else
			link = &cond->next;
	}
	LWLockRelease(&local->head->lock);
	free_conditions(dropped);
}

/* Only the owner reads 'subid', so no lock is needed to change it. */
static void
reparent_conditions(LocalOpen *local, SubTransactionId subid, SubTransactionId parent)
{
	dsa_pointer ptr = local->open->conditions;

	while (DsaPointerIsValid(ptr))
	{
		OpenCondition *cond = (OpenCondition *) dsa_get_address(area, ptr);

		if (cond->subid == subid)
			cond->subid = parent;
		ptr = cond->next;
	}
}

static void
settle_forgets(bool commit, SubTransactionId subid, SubTransactionId parent)
{
	int kept = 0;

	for (int i = 0; i < nforgets; i++)
	{
		if (forgets[i].subid == subid)
		{
			if (!commit && forgets[i].when == FORGET_AT_COMMIT)
				continue;
			/* Its memory is in use until the transaction has left the lists. */
			if (!commit)
				forgets[i].when = FORGET_AT_END;
			forgets[i].subid = parent;
		}
		forgets[kept++] = forgets[i];
	}
	nforgets = kept;
}

static void
settle_subtransaction(SubXactEvent event, SubTransactionId subid, SubTransactionId parent,
					  void *arg)
{
	if (event != SUBXACT_EVENT_ABORT_SUB && event != SUBXACT_EVENT_COMMIT_SUB)
		return;
	for (int i = 0; i < nlocal_opens; i++)
	{
		if (event == SUBXACT_EVENT_ABORT_SUB)
			drop_conditions(&local_opens[i], subid);
		else
			reparent_conditions(&local_opens[i], subid, parent);
	}
	if (nforgets > 0)
		settle_forgets(event == SUBXACT_EVENT_COMMIT_SUB, subid, parent);
}

void
es_head_attach(void)
{
	MemoryContext old;

	if (area != NULL)
		return;
	es_require_preloaded();

	old = MemoryContextSwitchTo(TopMemoryContext);
	table_parameters.tranche_id = head_tranche();
	area = dsa_attach_in_place(area_place(), NULL);
	dsa_pin_mapping(area);
	table = dshash_attach(area, &table_parameters, control->table, NULL);
	local_opens_size = 8;
	local_opens = palloc(sizeof(LocalOpen) * local_opens_size);
	forgets_size = 8;
	forgets = palloc(sizeof(PendingForget) * forgets_size);
	MemoryContextSwitchTo(old);

	RegisterResourceReleaseCallback(release_at_end, NULL);
	RegisterXactCallback(refuse_prepare, NULL);
	RegisterSubXactCallback(settle_subtransaction, NULL);
}

/* ---------------------------------------------------------------------------
 * Dropped databases
 * ------------------------------------------------------------------------- */

static void
forget_database(Oid database)
{
	dshash_seq_status status;
	HeadEntry		 *entry;

	dshash_seq_init(&status, table, true);
	while ((entry = dshash_seq_next(&status)) != NULL)
	{
		dsa_pointer ptr = entry->head;

		if (entry->key.dbid != database)
			continue;
		dshash_delete_current(&status);
		retire_head(head_at(ptr));
	}
	dshash_seq_term(&status);
}

/* At commit heavyweight locks are held still, and nothing may fail any more. */
static void
settle_database(XactEvent event, void *arg)
{
	if (!OidIsValid(dropped_database))
		return;
	if (event == XACT_EVENT_COMMIT)
		forget_database(dropped_database);
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT)
		dropped_database = InvalidOid;
}

/* Called by DROP DATABASE under its lock, some checks before the deed. */
static void
note_drop(ObjectAccessType access, Oid classId, Oid objectId, int subId, void *arg)
{
	if (previous_object_access != NULL)
		previous_object_access(access, classId, objectId, subId, arg);
	if (access != OAT_DROP || classId != DatabaseRelationId)
		return;
	es_head_attach();
	dropped_database = objectId;
}

void
es_head_install(void)
{
	previous_object_access = object_access_hook;
	object_access_hook = note_drop;
	RegisterXactCallback(settle_database, NULL);
}

/* ---------------------------------------------------------------------------
 * Entries
 * ------------------------------------------------------------------------- */

/*
 * Locks the entry and makes sure that it is still that of the collection.  If
 * not, the handle forgets it, so that the next one to use it looks it up anew.
 */
static EsHead *
lock_head(const EsHeadRef *ref, LWLockMode mode)
{
	EsHead *head = ref->head;

	Assert(head != NULL);
	LWLockAcquire(&head->lock, mode);
	if (unlikely(head->relid != ref->relid || head->incarnation != ref->incarnation ||
				 head->dbid != MyDatabaseId))
	{
		LWLockRelease(&head->lock);
		((EsHeadRef *) ref)->head = NULL;
		ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
						errmsg("collection with OID %u was dropped or repaired meanwhile",
							   ref->relid)));
	}
	return head;
}

bool
es_head_find(EsHeadRef *ref)
{
	HeadKey	   key = {MyDatabaseId, ref->relid};
	HeadEntry *entry;
	EsHead	  *head;

	es_head_attach();
	ref->head = NULL;
	entry = dshash_find(table, &key, false);
	if (entry == NULL)
		return false;
	head = head_at(entry->head);
	/* The identity is set while the entry is locked, so it may be read so. */
	if (head->incarnation == ref->incarnation)
		ref->head = head;
	dshash_release_lock(table, entry);
	return ref->head != NULL;
}

static dsa_pointer
take_free_head(void)
{
	dsa_pointer ptr;

	LWLockAcquire(&control->lock, LW_EXCLUSIVE);
	ptr = control->first_free;
	if (DsaPointerIsValid(ptr))
		control->first_free = head_at(ptr)->next_free;
	LWLockRelease(&control->lock);
	return ptr;
}

static void
init_head(EsHead *head, const EsHeadRef *ref, const EsHeadOrigin *origin, EsPosition next)
{
	head->dbid = MyDatabaseId;
	head->incarnation = ref->incarnation;
	head->counter = origin->counter;
	head->next = next;
	head->reserved = next - 1;
	head->ready_end = origin->ready_end;
	head->wanted_end = 0;
	head->last_conditional = 0;
	head->announced.head = next - 1;
	head->announced.events = 0;
	head->channel = 0;
	head->in_use = false;
	head->reserves = false;
	head->watchers = 0;
	for (int i = 0; i < LIST_COUNT; i++)
	{
		head->list_first[i] = InvalidDsaPointer;
		head->list_last[i] = InvalidDsaPointer;
	}
	for (int i = 0; i < ES_STAT_COUNT; i++)
		pg_atomic_write_u64(&head->stats[i], 0);
	head->relid = ref->relid;
}

static dsa_pointer
new_head(void)
{
	dsa_pointer ptr = take_free_head();

	if (!DsaPointerIsValid(ptr))
	{
		EsHead *head;

		ptr = dsa_allocate0(area, sizeof(EsHead));
		head = head_at(ptr);
		head->self = ptr;
		LWLockInitialize(&head->lock, head_tranche());
		for (int i = 0; i < ES_STAT_COUNT; i++)
			pg_atomic_init_u64(&head->stats[i], 0);
	}
	return ptr;
}

static void
forget_later(Oid relid, SubTransactionId subid, ForgetWhen when)
{
	if (nforgets == forgets_size)
	{
		forgets_size *= 2;
		forgets = repalloc(forgets, sizeof(PendingForget) * forgets_size);
	}
	forgets[nforgets].relid = relid;
	forgets[nforgets].subid = subid;
	forgets[nforgets].when = when;
	nforgets++;
}

/*
 * All catalog access comes before the table is touched: two backends may read
 * the counter at once, the one that inserts first wins, and what the other
 * read is not used.
 *
 * An entry of another incarnation is one that a repair has made obsolete, or
 * that was made in a transaction which then aborted: the caller holds a lock on
 * the collection, so the incarnation that he has read is the one that counts.
 */
void
es_head_make(EsHeadRef *ref, const EsHeadOrigin *origin)
{
	HeadKey		  key = {MyDatabaseId, ref->relid};
	EsReservation reservation = es_reservation_read(origin->counter);
	EsPosition	  next = es_reservation_next(&reservation);
	HeadEntry	 *entry;
	EsHead		 *made;
	EsHead		 *unused = NULL;
	bool		  found;

	es_head_attach();
	made = head_at(new_head());

	entry = dshash_find_or_insert(table, &key, &found);
	if (found)
		unused = head_at(entry->head);
	if (found && unused->incarnation == ref->incarnation)
	{
		ref->head = unused;
		unused = made;
	}
	else
	{
		LWLockAcquire(&made->lock, LW_EXCLUSIVE);
		init_head(made, ref, origin, next);
		LWLockRelease(&made->lock);
		entry->head = made->self;
		ref->head = made;
	}
	dshash_release_lock(table, entry);

	if (ref->head == made && origin->created_in != InvalidSubTransactionId)
		forget_later(ref->relid, origin->created_in, FORGET_AT_ABORT);
	if (unused == made)
		recycle_head(made);
	else if (unused != NULL)
		retire_head(unused);
}

void
es_head_forget_at_commit(Oid relid)
{
	es_head_attach();
	forget_later(relid, GetCurrentSubTransactionId(), FORGET_AT_COMMIT);
}

/* ---------------------------------------------------------------------------
 * Questions
 * ------------------------------------------------------------------------- */

EsPosition
es_head_read(const EsHeadRef *ref, bool others_view)
{
	EsHead	  *head = lock_head(ref, LW_SHARED);
	EsPosition result = head_of(head, !others_view);

	LWLockRelease(&head->lock);
	return result;
}

EsPosition
es_head_last_allotted(const EsHeadRef *ref)
{
	EsHead	  *head = lock_head(ref, LW_SHARED);
	EsPosition result = head->next - 1;

	LWLockRelease(&head->lock);
	return result;
}

bool
es_head_in_use(const EsHeadRef *ref)
{
	EsHead *head = lock_head(ref, LW_SHARED);
	bool	result = head->in_use;

	LWLockRelease(&head->lock);
	return result;
}

bool
es_head_seems_used(const EsHeadRef *ref)
{
	return ref->head->in_use;
}

void
es_head_renew(const EsHeadRef *ref, EsPosition next)
{
	EsHead *head;

	/* Mostly there is nothing to do. */
	if (es_head_last_allotted(ref) + 1 >= next)
		return;
	head = lock_head(ref, LW_EXCLUSIVE);
	if (!head->in_use && !head->reserves && head->next < next)
	{
		head->next = next;
		head->reserved = next - 1;
		head->announced.head = next - 1;
	}
	LWLockRelease(&head->lock);
}

EsPosition
es_head_ready_end(const EsHeadRef *ref)
{
	EsHead	  *head = lock_head(ref, LW_SHARED);
	EsPosition result = head->ready_end;

	LWLockRelease(&head->lock);
	return result;
}

void
es_head_set_ready_end(const EsHeadRef *ref, EsPosition end)
{
	EsHead *head = lock_head(ref, LW_EXCLUSIVE);

	if (end > head->ready_end)
		head->ready_end = end;
	if (head->wanted_end <= head->ready_end)
		head->wanted_end = 0;
	LWLockRelease(&head->lock);
}

/* In a subtransaction's abort: no error, whatever became of the entry. */
void
es_head_lower_ready_end(const EsHeadRef *ref, EsPosition end)
{
	EsHead *head = ref->head;

	LWLockAcquire(&head->lock, LW_EXCLUSIVE);
	if (head->relid == ref->relid && head->incarnation == ref->incarnation &&
		head->dbid == MyDatabaseId && end < head->ready_end)
		head->ready_end = end;
	LWLockRelease(&head->lock);
}

EsPosition
es_head_wanted_end(const EsHeadRef *ref)
{
	EsHead	  *head = lock_head(ref, LW_SHARED);
	EsPosition result = head->wanted_end;

	LWLockRelease(&head->lock);
	return result;
}

void
es_head_want_end(const EsHeadRef *ref, EsPosition end)
{
	EsHead *head = lock_head(ref, LW_EXCLUSIVE);

	if (end > head->ready_end && end > head->wanted_end)
		head->wanted_end = end;
	LWLockRelease(&head->lock);
}

EsPosition
es_head_last_conditional(const EsHeadRef *ref)
{
	EsHead	  *head = lock_head(ref, LW_SHARED);
	EsPosition result = head->last_conditional;

	LWLockRelease(&head->lock);
	return result;
}

bool
es_head_joined(Oid relid)
{
	for (int i = 0; i < nlocal_opens; i++)
		if (local_opens[i].head->relid == relid)
			return true;
	return false;
}

bool
es_head_holding(void)
{
	for (int i = 0; i < nlocal_opens; i++)
		if (local_opens[i].open->first != 0)
			return true;
	return false;
}

/* ---------------------------------------------------------------------------
 * For who waits, and who announces
 * ------------------------------------------------------------------------- */

/* With its lock: is it still the collection's? */
static bool
is_same(const EsHead *head, const EsHeadRef *ref)
{
	return head->relid == ref->relid && head->incarnation == ref->incarnation &&
		   head->dbid == MyDatabaseId;
}

bool
es_head_watch(const EsHeadRef *ref)
{
	EsHead	   *head = ref->head;
	dsa_pointer ring = InvalidDsaPointer;
	bool		there;
	bool		lacks_ring;

	do
	{
		LWLockAcquire(&head->lock, LW_EXCLUSIVE);
		there = is_same(head, ref);
		/* It may be there: of other watchers, or left by those of one that was dropped. */
		if (there && !DsaPointerIsValid(head->releases))
		{
			head->releases = ring;
			ring = InvalidDsaPointer;
		}
		lacks_ring = there && !DsaPointerIsValid(head->releases);
		if (there && !lacks_ring && head->watchers++ == 0)
			es_releases_init(releases_at(head->releases), head->next - 1);
		LWLockRelease(&head->lock);

		/* Memory is not asked for under the lock. */
		if (lacks_ring)
			ring = dsa_allocate(area, sizeof(EsReleases));
	} while (lacks_ring);
	if (DsaPointerIsValid(ring))
		dsa_free(area, ring);
	return there;
}

void
es_head_unwatch(const EsHeadRef *ref)
{
	EsHead	   *head = ref->head;
	dsa_pointer unused = InvalidDsaPointer;

	LWLockAcquire(&head->lock, LW_EXCLUSIVE);
	if (is_same(head, ref) && --head->watchers == 0)
	{
		unused = head->releases;
		head->releases = InvalidDsaPointer;
	}
	LWLockRelease(&head->lock);
	if (DsaPointerIsValid(unused))
		dsa_free(area, unused);
}

bool
es_head_glance(const EsHeadRef *ref, EsPosition *head, EsReleases *releases)
{
	bool there;

	LWLockAcquire(&ref->head->lock, LW_SHARED);
	there = is_same(ref->head, ref) && ref->head->watchers > 0;
	if (there)
	{
		*head = head_of(ref->head, false);
		*releases = *releases_at(ref->head->releases);
	}
	LWLockRelease(&ref->head->lock);
	return there;
}

void
es_head_announced(const EsHeadRef *ref, EsAnnounced *announced)
{
	EsHead *head = lock_head(ref, LW_SHARED);

	*announced = head->announced;
	LWLockRelease(&head->lock);
}

void
es_head_set_announced(const EsHeadRef *ref, const EsAnnounced *announced)
{
	EsHead *head = lock_head(ref, LW_EXCLUSIVE);

	head->announced.head = Max(head->announced.head, announced->head);
	head->announced.events -= Min(head->announced.events, announced->events);
	LWLockRelease(&head->lock);
}

void
es_head_set_channel(const EsHeadRef *ref, EsChannel channel)
{
	LWLockAcquire(&ref->head->lock, LW_EXCLUSIVE);
	if (is_same(ref->head, ref))
		ref->head->channel = channel;
	LWLockRelease(&ref->head->lock);
}

void
es_head_count(const EsHeadRef *ref, EsHeadStat stat, uint64 n)
{
	if (ref->head != NULL)
		pg_atomic_fetch_add_u64(&ref->head->stats[stat], n);
}

uint64
es_head_stat(const EsHeadRef *ref, EsHeadStat stat)
{
	return ref->head != NULL ? pg_atomic_read_u64(&ref->head->stats[stat]) : 0;
}

/* Under its lock: adds the holders of one entry to the array. */
static void
collect_holders(EsHead *head, EsHolder **holders, int *n, int *size)
{
	EsOpen *open;

	for (open = list_start(head, LIST_IN_FLIGHT); open != NULL;
		 open = list_after(open, LIST_IN_FLIGHT))
	{
		EsHolder *holder;

		if (*n == *size)
			return;
		holder = &(*holders)[(*n)++];
		holder->relid = head->relid;
		holder->pid = open->pid;
		holder->xid = open->xid;
		holder->since = open->since;
		holder->first = open->first;
	}
}

/*
 * The array cannot grow under a lock, so it is sized beforehand: twice what
 * there can ordinarily be.  A list that is longer still is cut.
 */
int
es_head_holders(EsHolder **holders)
{
	int				  size = 2 * MaxBackends + 1024;
	int				  n = 0;
	dshash_seq_status status;
	HeadEntry		 *entry;

	es_head_attach();
	*holders = palloc(sizeof(EsHolder) * size);
	dshash_seq_init(&status, table, false);
	while ((entry = dshash_seq_next(&status)) != NULL)
	{
		EsHead *head;

		if (entry->key.dbid != MyDatabaseId)
			continue;
		head = head_at(entry->head);
		LWLockAcquire(&head->lock, LW_SHARED);
		collect_holders(head, holders, &n, &size);
		LWLockRelease(&head->lock);
	}
	dshash_seq_term(&status);
	return n;
}

/* ---------------------------------------------------------------------------
 * Taking part: labels, conditions, positions
 * ------------------------------------------------------------------------- */

static LocalOpen *
find_local(const EsHead *head)
{
	/* The newest first: a transaction mostly stays with one collection. */
	for (int i = nlocal_opens - 1; i >= 0; i--)
		if (local_opens[i].head == head)
			return &local_opens[i];
	return NULL;
}

/*
 * This transaction's EsOpen, made at its first append.  Everything that may
 * fail comes before the lock; from list_append on, release_at_end undoes it.
 */
static LocalOpen *
join(const EsHeadRef *ref)
{
	LocalOpen	 *local = find_local(ref->head);
	TransactionId xid;
	dsa_pointer	  ptr;
	EsOpen		 *open;
	EsHead		 *head;

	if (local != NULL)
		return local;

	xid = GetTopTransactionId();
	if (nlocal_opens == local_opens_size)
	{
		local_opens = repalloc(local_opens, sizeof(LocalOpen) * local_opens_size * 2);
		local_opens_size *= 2;
	}
	ptr = dsa_allocate(area, sizeof(EsOpen));
	open = open_at(ptr);
	open->pid = MyProcPid;
	open->xid = xid;
	open->first = 0;
	open->since = 0;
	open->conditions = InvalidDsaPointer;
	open->coarse = false;
	open->nlabels = 0;

	PG_TRY();
	{
		head = lock_head(ref, LW_EXCLUSIVE);
	}
	PG_CATCH();
	{
		dsa_free(area, ptr);
		PG_RE_THROW();
	}
	PG_END_TRY();
	list_append(head, LIST_OPEN, open, ptr);
	local = &local_opens[nlocal_opens++];
	local->head = head;
	local->open = open;
	local->open_ptr = ptr;
	local->last = 0;
	local->taken = 0;
	local->channel = ref->channel;
	memset(&local->streams, 0, sizeof(EsBloom));
	LWLockRelease(&head->lock);
	return local;
}

static bool
has_label(const EsLabel *labels, int nlabels, EsLabel label)
{
	for (int i = 0; i < nlabels; i++)
		if (labels[i] == label)
			return true;
	return false;
}

/* Could events with (some of) these labels match the condition? */
static bool
labels_fulfil(const EsLabel *labels, int nlabels, bool everything, int nitems,
			  const EsLabel *words)
{
	if (everything)
		return true;
	for (int item = 0; item < nitems; item++)
	{
		int	 ntypes = (int) *words++;
		int	 ntags = (int) *words++;
		bool match = (ntypes == 0);

		for (int i = 0; i < ntypes && !match; i++)
			match = has_label(labels, nlabels, words[i]);
		words += ntypes;
		for (int i = 0; i < ntags && match; i++)
			match = has_label(labels, nlabels, words[i]);
		words += ntags;
		if (match)
			return true;
	}
	return false;
}

static bool
open_fulfils(const EsOpen *open, bool everything, int nitems, const EsLabel *words)
{
	if (open->coarse)
		return true;
	if (open->nlabels == 0)
		return false; /* it has shown nothing of what it appends */
	return labels_fulfil(open->labels, open->nlabels, everything, nitems, words);
}

/*
 * Would what I am about to show fulfil a condition of 'other'?  Not where what
 * I showed before does already: then 'other' waits for me.
 */
static bool
stands_against(const EsOpen *other, const EsOpen *mine, const EsIntent *intent,
			   bool coarse)
{
	dsa_pointer ptr = other->conditions;

	while (DsaPointerIsValid(ptr))
	{
		OpenCondition *cond = (OpenCondition *) dsa_get_address(area, ptr);

		ptr = cond->next;
		if (open_fulfils(mine, cond->everything, cond->nitems, cond->words))
			continue;
		if (coarse || labels_fulfil(intent->labels, intent->nlabels, cond->everything,
									cond->nitems, cond->words))
			return true;
	}
	return false;
}

static bool
xid_listed(const TransactionId *xids, int n, TransactionId xid)
{
	for (int i = 0; i < n; i++)
		if (xids[i] == xid)
			return true;
	return false;
}

/* The transaction whose condition my labels fulfil; invalid where there is none. */
static TransactionId
find_obstacle(EsHead *head, const EsOpen *mine, const EsIntent *intent, bool coarse,
			  const TransactionId *ended, int nended)
{
	EsOpen *other;

	if (intent->nlabels == 0)
		return InvalidTransactionId;
	for (other = list_start(head, LIST_OPEN); other != NULL;
		 other = list_after(other, LIST_OPEN))
	{
		if (other == mine || !DsaPointerIsValid(other->conditions))
			continue;
		if (xid_listed(ended, nended, other->xid))
			continue;
		if (stands_against(other, mine, intent, coarse))
			return other->xid;
	}
	return InvalidTransactionId;
}

static void
show_labels(EsOpen *mine, const EsIntent *intent)
{
	for (int i = 0; i < intent->nlabels && !mine->coarse; i++)
	{
		if (has_label(mine->labels, mine->nlabels, intent->labels[i]))
			continue;
		if (mine->nlabels == OPEN_LABELS_MAX)
			mine->coarse = true;
		else
			mine->labels[mine->nlabels++] = intent->labels[i];
	}
}

/* Those whose events may fulfil my condition; 'xids' has room for 'max'. */
static int
list_fulfillers(EsHead *head, const EsOpen *mine, const OpenCondition *cond,
				TransactionId *xids, int max)
{
	EsOpen *other;
	int		n = 0;

	for (other = list_start(head, LIST_OPEN); other != NULL && n < max;
		 other = list_after(other, LIST_OPEN))
		if (other != mine &&
			open_fulfils(other, cond->everything, cond->nitems, cond->words))
			xids[n++] = other->xid;
	return n;
}

static dsa_pointer
make_condition(const EsCondition *condition)
{
	bool everything = condition->everything || condition->nwords > CONDITION_WORDS_MAX;
	int	 nwords = everything ? 0 : condition->nwords;
	dsa_pointer ptr =
		dsa_allocate(area, offsetof(OpenCondition, words) + sizeof(EsLabel) * nwords);
	OpenCondition *cond = (OpenCondition *) dsa_get_address(area, ptr);

	cond->subid = GetCurrentSubTransactionId();
	cond->everything = everything;
	cond->nitems = everything ? 0 : condition->nitems;
	memcpy(cond->words, condition->words, sizeof(EsLabel) * nwords);
	return ptr;
}

/*
 * Shows the labels as soon as nobody's condition stands against them.  With a
 * condition, shows that in the same step, and lists who must end before it can
 * be checked.
 */
static int
show_intent(const EsHeadRef *ref, LocalOpen *local, const EsIntent *intent,
			dsa_pointer condition, TransactionId *waits, int max_waits)
{
	bool		   coarse = intent->nlabels > OPEN_LABELS_MAX;
	TransactionId *ended = NULL;
	int			   nended = 0;
	int			   nwaits = 0;

	for (;;)
	{
		EsHead		 *head = lock_head(ref, LW_EXCLUSIVE);
		TransactionId obstacle =
			find_obstacle(head, local->open, intent, coarse, ended, nended);

		if (!TransactionIdIsValid(obstacle))
		{
			show_labels(local->open, intent);
			if (DsaPointerIsValid(condition))
			{
				OpenCondition *cond = (OpenCondition *) dsa_get_address(area, condition);

				cond->next = local->open->conditions;
				local->open->conditions = condition;
				nwaits = list_fulfillers(head, local->open, cond, waits, max_waits);
			}
			LWLockRelease(&head->lock);
			break;
		}
		LWLockRelease(&head->lock);

		es_head_count(ref, ES_STAT_INTENT_WAITS, 1);
		XactLockTableWait(obstacle, NULL, NULL, XLTW_None);
		/* It is on the list until its locks are gone: do not ask it again. */
		if (ended == NULL)
			ended = palloc(sizeof(TransactionId) * 64);
		ended[nended % 64] = obstacle;
		if (nended < 63)
			nended++;
	}
	if (ended != NULL)
		pfree(ended);
	return nwaits;
}

void
es_head_register(const EsHeadRef *ref, const EsIntent *intent)
{
	LocalOpen			*local = join(ref);
	volatile dsa_pointer condition = InvalidDsaPointer;
	TransactionId		*waits = NULL;
	int					 max_waits = 0;
	int					 nwaits = 0;

	for (int i = 0; i < intent->nstreams; i++)
		es_bloom_add(&local->streams, intent->streams[i]);
	if (intent->nlabels == 0 && intent->condition == NULL)
		return;

	if (intent->condition != NULL)
	{
		/* One transaction per backend, and a margin for those at their end. */
		max_waits = 2 * MaxBackends;
		waits = palloc(sizeof(TransactionId) * max_waits);
		condition = make_condition(intent->condition);
	}

	/* A cancel or a deadlock while waiting: the condition was not shown yet. */
	PG_TRY();
	{
		nwaits = show_intent(ref, local, intent, condition, waits, max_waits);
	}
	PG_CATCH();
	{
		if (DsaPointerIsValid(condition))
			dsa_free(area, condition);
		PG_RE_THROW();
	}
	PG_END_TRY();

	for (int i = 0; i < nwaits; i++)
	{
		es_head_count(ref, ES_STAT_INTENT_WAITS, 1);
		XactLockTableWait(waits[i], NULL, NULL, XLTW_None);
	}
	if (waits != NULL)
		pfree(waits);
}

/* Reserves durably at least up to 'upto', unless another has done so meanwhile. */
static void
extend_reservation(const EsHeadRef *ref, Oid counter, EsPosition upto)
{
	LOCKTAG	   tag;
	EsHead	  *head;
	EsPosition reserved;

	SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, counter, 0, ADVISORY_CLASS_RESERVE);
	(void) LockAcquire(&tag, ExclusiveLock, false, false);

	head = lock_head(ref, LW_SHARED);
	reserved = head->reserved;
	LWLockRelease(&head->lock);
	if (reserved < upto)
	{
		reserved = es_reservation_extend(counter, upto + RESERVE_AHEAD);
		head = lock_head(ref, LW_EXCLUSIVE);
		if (reserved > head->reserved)
			head->reserved = reserved;
		LWLockRelease(&head->lock);
	}
	LockRelease(&tag, ExclusiveLock, false);
}

bool
es_head_allot(const EsHeadRef *ref, int64 n, bool conditional, EsAllotment *allotment)
{
	LocalOpen  *local = join(ref);
	TimestampTz now = 0;
	EsHead	   *head;

	Assert(n > 0);
	if (local->open->first == 0)
		now = GetCurrentTimestamp();

	for (;;)
	{
		EsPosition last;
		Oid		   counter;

		head = lock_head(ref, LW_EXCLUSIVE);
		last = head->next + n - 1;
		counter = head->counter;
		if (last >= head->ready_end)
		{
			LWLockRelease(&head->lock);
			return false;
		}
		if (last <= head->reserved)
			break;
		/* What the counter says from now on is our own doing: see es_head_renew. */
		head->reserves = true;
		LWLockRelease(&head->lock);
		extend_reservation(ref, counter, last);
	}

	allotment->safe = head_of(head, false);
	allotment->first = head->next;
	head->next += n;
	allotment->left = head->ready_end - head->next;
	head->in_use = true;
	if (conditional)
		head->last_conditional = head->next - 1;
	if (local->open->first == 0)
	{
		local->open->first = allotment->first;
		local->open->since = now;
		list_append(head, LIST_IN_FLIGHT, local->open, local->open_ptr);
	}
	LWLockRelease(&head->lock);
	local->last = allotment->first + n - 1;
	local->taken += n;
	return true;
}
