/*
 * position/watch.c
 *		How sessions that wait are woken, and only those that have reason to be.
 *
 * A session that waits for events (wait_for, read with wait, poll) enters what
 * it waits for in a table in shared memory, looks once more, and sleeps on its
 * latch.  Hundreds may wait, so an appender does not go through the table.  At
 * its release (head.c) it only notes what it added, in a short ring that the
 * collection has while somebody watches it, and calls the notifier, which goes
 * through the table:
 *
 *	1.	Who waits for a position is woken when the head has passed it.
 *	2.	Who waits for an event that matches a query is woken when the head
 *		reaches the positions of a transaction whose labels may match.  That may
 *		be long after its commit, another's open position lying below; so the
 *		waiter's entry keeps the range of positions that are worth a look, its
 *		window.  Labels are a Bloom filter: a look in vain costs little, a lost
 *		event everything.
 *	3.	Who waits for a stream is woken by a release that may have an event of
 *		it; a stream has no need of the head.
 *	4.	Where the ring has overwritten what a waiter has not been compared
 *		with, all of that is put into his window.
 *	5.	Who waits for a topic (a lane of a subscription that gets free) is woken
 *		by the transaction that touched it, directly.
 *
 * Why no wake-up is lost.  A waiter enters (step A), then looks (B); a
 * transaction releases (C), then calls the notifier (D), which compares (E).
 * Entering and comparing both hold the table's lock.  If C comes before A, then
 * B, whose head or snapshot is younger, sees what C released, as far as the
 * head lets it: the rest is in the window, which A fills from the ring, or, where
 * nobody kept one before, with everything up to the last position allotted.  If
 * C comes after A, it finds the collection watched, and E finds the waiter.  A
 * look in vain is reported (es_watch_looked) under the same lock, and only
 * positions that it has covered leave the window.
 *
 * A waiter who looks, because he has just entered or was woken, is left alone
 * until he reports; then he is compared with all that came meanwhile.  Whoever
 * else wakes him while he looks (3 has no window to remember it in, nor has 5)
 * makes him look once more.
 *
 * When the notifier ends it wakes everybody, and without one they look for
 * themselves from time to time (feed/wait.c).
 *
 * A collection without a shared entry has no releases.  On a standby the
 * notifier looks at its head as replay advances, for all who wait
 * (es_watch_pass_over); on a logical copy they look for themselves.
 *
 * Locks: WatchControl.lock (tranche EventstoreWatch) for the table; taken
 * before an EsHead's lock, never after it.  Appenders do not take it, except for
 * topics.  A crash resets it all.
 */
#include "postgres.h"

#include "position/watch.h"

#include "access/xact.h"
#include "compat.h"
#include "miscadmin.h"
#include "port/atomics.h"
#include "shmem.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "storage/shmem.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

/* A condition of more words than this is taken as "every event". */
#define WATCH_WORDS_MAX 120

/* Topics that one transaction touches; beyond, everybody with a topic is woken. */
#define TOUCHED_MAX 64

/* No positions: the window is empty. */
#define NOWHERE PG_INT64_MAX

/* What a waiter does, as those who wake see it. */
typedef enum WaiterState
{
	WAITER_ASLEEP,	/* or about to be: he has looked and found nothing */
	WAITER_LOOKING, /* he compares himself when he has looked */
	WAITER_WOKEN	/* there is reason to look (again) */
} WaiterState;

/* One process that waits.  Guarded by the table's lock, but for 'state'. */
typedef struct Waiter
{
	Latch			*latch; /* of a PGPROC, so it is always there; NULL = does not wait */
	pg_atomic_uint32 state; /* WaiterState; others set WOKEN, with the lock */
	Oid				 dbid;
	EsHeadRef		 head; /* 'head' in it: the same address in all processes, or NULL */
	uint64			 seen; /* releases before this number have been compared */
	EsPosition		 looked; /* nothing up to here is of interest */
	EsPosition		 from;	 /* the window: look when the head gets here ... */
	EsPosition		 to;	 /* ... and at each move of it up to here */
	EsLabel			 stream;
	uint64			 topic;
	bool			 everything;
	int				 nitems;
	EsLabel			 words[WATCH_WORDS_MAX];
} Waiter;

typedef struct WatchControl
{
	LWLock			*lock;
	int				 used;	 /* [lock] entries that were ever used lie below */
	pg_atomic_uint32 topics; /* how many wait for a topic */
	Waiter			 waiters[FLEXIBLE_ARRAY_MEMBER]; /* one per process, by its number */
} WatchControl;

/* A look at a collection's entry, shared by the waiters that follow each other. */
typedef struct Glance
{
	EsHeadRef  ref; /* head NULL: none yet */
	bool	   there;
	EsPosition head;
	EsReleases releases;
} Glance;

static WatchControl	   *control = NULL;
static Waiter		   *own = NULL;		  /* this process's, while it waits */
static SubTransactionId own_subid;		  /* where it began to */
static bool				own_kept = false; /* it outlives transactions */

static uint64 touched[TOUCHED_MAX];
static int	  ntouched = 0;
static bool	  touched_many = false;
static bool	  registered = false;

/* ---------------------------------------------------------------------------
 * Sets of labels, and releases
 * ------------------------------------------------------------------------- */

/* Two bits for each label. */
static inline void
bloom_bits(EsLabel label, int *one, int *two)
{
	*one = (int) (label & 0xFF);
	*two = (int) ((label >> 8) & 0xFF);
}

void
es_bloom_add(EsBloom *bloom, EsLabel label)
{
	int one;
	int two;

	bloom_bits(label, &one, &two);
	bloom->words[one / 64] |= UINT64CONST(1) << (one % 64);
	bloom->words[two / 64] |= UINT64CONST(1) << (two % 64);
}

static bool
bloom_has(const EsBloom *bloom, EsLabel label)
{
	int one;
	int two;

	bloom_bits(label, &one, &two);
	return (bloom->words[one / 64] & (UINT64CONST(1) << (one % 64))) != 0 &&
		   (bloom->words[two / 64] & (UINT64CONST(1) << (two % 64))) != 0;
}

void
es_releases_init(EsReleases *releases, EsPosition upto)
{
	/* Not 0: who enters has been compared with nothing, what was lost included. */
	releases->next = releases->oldest = 1;
	releases->lost_last = upto;
}

void
es_releases_put(EsReleases *releases, const EsReleased *released)
{
	EsReleased *entry = &releases->kept[releases->next % ES_RELEASES_KEPT];

	if (releases->next - releases->oldest == ES_RELEASES_KEPT)
	{
		releases->lost_last = Max(releases->lost_last, entry->last);
		releases->oldest++;
	}
	*entry = *released;
	releases->next++;
}

/* Could an event of this release match?  As labels_fulfil in head.c, by sets. */
static bool
may_match(const Waiter *waiter, const EsBloom *labels)
{
	const EsLabel *words = waiter->words;

	if (waiter->everything)
		return true;
	for (int item = 0; item < waiter->nitems; item++)
	{
		int	 ntypes = (int) *words++;
		int	 ntags = (int) *words++;
		bool match = (ntypes == 0);

		for (int i = 0; i < ntypes && !match; i++)
			match = bloom_has(labels, words[i]);
		words += ntypes;
		for (int i = 0; i < ntags && match; i++)
			match = bloom_has(labels, words[i]);
		words += ntags;
		if (match)
			return true;
	}
	return false;
}

/* ---------------------------------------------------------------------------
 * Comparing waiters with what happened.  All with the table's lock.
 * ------------------------------------------------------------------------- */

/* Does he take any event that is above what he has looked at? */
static bool
takes_all(const Waiter *waiter)
{
	return waiter->everything && waiter->stream == 0;
}

static void
widen(Waiter *waiter, EsPosition from, EsPosition to)
{
	if (to <= waiter->looked)
		return;
	waiter->from = Min(waiter->from, Max(from, waiter->looked + 1));
	waiter->to = Max(waiter->to, to);
}

/* What lies up to this head leaves the window. */
static void
narrow(Waiter *waiter, EsPosition head)
{
	waiter->looked = Max(waiter->looked, head);
	if (waiter->to <= waiter->looked)
	{
		waiter->from = NOWHERE;
		waiter->to = 0;
	}
	else
		waiter->from = Max(waiter->from, waiter->looked + 1);
}

/* The releases that this waiter has not been compared with; true: of his stream. */
static bool
compare_releases(Waiter *waiter, const EsReleases *releases)
{
	bool   stream_moved = false;
	uint64 number = waiter->seen;

	if (number < releases->oldest)
	{
		widen(waiter, 1, releases->lost_last);
		stream_moved = true;
		number = releases->oldest;
	}
	for (; number < releases->next; number++)
	{
		const EsReleased *released = &releases->kept[number % ES_RELEASES_KEPT];

		if (waiter->stream != 0)
			stream_moved = stream_moved || bloom_has(&released->labels, waiter->stream);
		else if (may_match(waiter, &released->labels))
			widen(waiter, released->first, released->last);
	}
	waiter->seen = releases->next;
	return stream_moved;
}

static void
glance_at(Glance *glance, const EsHeadRef *ref)
{
	if (glance->ref.head == ref->head && glance->ref.incarnation == ref->incarnation)
		return;
	glance->ref = *ref;
	glance->there = es_head_glance(ref, &glance->head, &glance->releases);
}

/* Has he reason to look? */
static bool
is_due(Waiter *waiter, Glance *glance)
{
	bool stream_moved;

	if (waiter->head.head == NULL)
		return false; /* looks for himself */
	glance_at(glance, &waiter->head);
	if (!glance->there)
		return true; /* dropped or repaired: he is to find out */
	if (takes_all(waiter))
		return glance->head > waiter->looked;
	stream_moved = compare_releases(waiter, &glance->releases);
	if (waiter->stream != 0)
		return stream_moved;
	return glance->head >= waiter->from;
}

static void
wake(Waiter *waiter)
{
	pg_atomic_write_u32(&waiter->state, WAITER_WOKEN);
	SetLatch(waiter->latch);
}

static bool
is_waiting_here(const Waiter *waiter)
{
	return waiter->latch != NULL && waiter->dbid == MyDatabaseId;
}

/* ---------------------------------------------------------------------------
 * Shared memory
 * ------------------------------------------------------------------------- */

Size
es_watch_shmem_size(void)
{
	return add_size(offsetof(WatchControl, waiters),
					mul_size(sizeof(Waiter), MaxBackends));
}

void
es_watch_shmem_init(void)
{
	bool found;

	control = ShmemInitStruct("eventstore watch", es_watch_shmem_size(), &found);
	if (found)
		return;
	memset(control, 0, es_watch_shmem_size());
	control->lock = &GetNamedLWLockTranche("EventstoreWatch")[0].lock;
	pg_atomic_init_u32(&control->topics, 0);
	for (int i = 0; i < MaxBackends; i++)
		pg_atomic_init_u32(&control->waiters[i].state, WAITER_ASLEEP);
}

/* ---------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------- */

/* Must not raise an error. */
static void
end_at_release(ResourceReleasePhase phase, bool isCommit, bool isTopLevel, void *arg)
{
	if (phase != RESOURCE_RELEASE_AFTER_LOCKS || !isTopLevel)
		return;
	if (own != NULL && !own_kept)
		es_watch_end();
	if (ntouched == 0 && !touched_many)
		return;

	/* What was touched can be seen; who enters after we looked looks himself. */
	pg_memory_barrier();
	if (pg_atomic_read_u32(&control->topics) > 0)
	{
		LWLockAcquire(control->lock, LW_EXCLUSIVE);
		for (int i = 0; i < control->used; i++)
		{
			Waiter *waiter = &control->waiters[i];
			bool	hit = touched_many && waiter->topic != 0;

			for (int j = 0; j < ntouched && !hit; j++)
				hit = waiter->topic == touched[j];
			if (hit && is_waiting_here(waiter))
				wake(waiter);
		}
		LWLockRelease(control->lock);
	}
	ntouched = 0;
	touched_many = false;
}

/* One that outlives transactions. */
static void
end_at_exit(int code, Datum arg)
{
	es_watch_end();
}

static void
register_callback(void)
{
	if (registered)
		return;
	es_require_preloaded();
	RegisterResourceReleaseCallback(end_at_release, NULL);
	before_shmem_exit(end_at_exit, (Datum) 0);
	registered = true;
}

static void
fill_waiter(Waiter *waiter, const EsWatch *watch)
{
	const EsCondition *condition = watch->condition;

	waiter->dbid = MyDatabaseId;
	waiter->head = watch->head;
	waiter->stream = watch->stream;
	waiter->topic = watch->topic;
	waiter->seen = 0;
	waiter->everything =
		condition == NULL || condition->everything || condition->nwords > WATCH_WORDS_MAX;
	waiter->nitems = waiter->everything ? 0 : condition->nitems;
	if (!waiter->everything)
		memcpy(waiter->words, condition->words, sizeof(EsLabel) * condition->nwords);
	waiter->looked = watch->looked;
	waiter->from = NOWHERE;
	waiter->to = 0;
}

void
es_watch_begin(const EsWatch *watch)
{
	Waiter	 *waiter = &control->waiters[es_process_number()];
	EsHeadRef ref = watch->head;
	Glance	  glance = {0};

	Assert(own == NULL);
	register_callback();
	if (ref.head != NULL && !es_head_watch(&ref))
		ref.head = NULL;

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	own = waiter;
	own_subid = GetCurrentSubTransactionId();
	own_kept = watch->kept;
	fill_waiter(waiter, watch);
	waiter->head = ref;
	pg_atomic_write_u32(&waiter->state, WAITER_LOOKING);
	waiter->latch = MyLatch;
	control->used = Max(control->used, es_process_number() + 1);
	if (waiter->topic != 0)
		pg_atomic_fetch_add_u32(&control->topics, 1);
	/* What was released before and lies above the head.  The look comes next. */
	(void) is_due(waiter, &glance);
	LWLockRelease(control->lock);
}

bool
es_watch_underway(void)
{
	return own != NULL && (own_kept || SubTransactionIsActive(own_subid));
}

bool
es_watch_woken(void)
{
	return pg_atomic_read_u32(&own->state) == WAITER_WOKEN;
}

void
es_watch_looking(void)
{
	/* A full barrier: whatever he was woken for he will see. */
	(void) pg_atomic_exchange_u32(&own->state, WAITER_LOOKING);
}

bool
es_watch_looked(EsPosition head)
{
	Glance glance = {0};
	bool   due;

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	narrow(own, head);
	due = is_due(own, &glance);
	/* Woken while he looked: perhaps for what his snapshot was too old to show. */
	if (pg_atomic_read_u32(&own->state) == WAITER_WOKEN)
		due = true;
	pg_atomic_write_u32(&own->state, due ? WAITER_LOOKING : WAITER_ASLEEP);
	LWLockRelease(control->lock);
	return due;
}

void
es_watch_end(void)
{
	EsHeadRef ref;

	if (own == NULL)
		return;
	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	own->latch = NULL;
	ref = own->head;
	if (own->topic != 0)
		pg_atomic_fetch_sub_u32(&control->topics, 1);
	own->topic = 0;
	own = NULL;
	LWLockRelease(control->lock);
	if (ref.head != NULL)
		es_head_unwatch(&ref);
}

/* ---------------------------------------------------------------------------
 * Waking
 * ------------------------------------------------------------------------- */

int
es_watch_pass(void)
{
	Glance glance = {0};
	int	   woken = 0;

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < control->used; i++)
	{
		Waiter *waiter = &control->waiters[i];

		if (!is_waiting_here(waiter) ||
			pg_atomic_read_u32(&waiter->state) != WAITER_ASLEEP)
			continue;
		if (is_due(waiter, &glance))
		{
			wake(waiter);
			woken++;
		}
	}
	LWLockRelease(control->lock);
	return woken;
}

static bool
is_unshared(const Waiter *waiter)
{
	return is_waiting_here(waiter) && waiter->head.head == NULL;
}

/* There is no telling which events are new, so it is the head alone; a stream goes before it. */
int
es_watch_pass_over(Oid relid, EsPosition head)
{
	int woken = 0;

	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < control->used; i++)
	{
		Waiter *waiter = &control->waiters[i];

		if (is_unshared(waiter) && waiter->head.relid == relid &&
			(waiter->stream != 0 || waiter->looked < head))
		{
			wake(waiter);
			woken++;
		}
	}
	LWLockRelease(control->lock);
	return woken;
}

int
es_watch_list_unshared(Oid **relids)
{
	int n = 0;

	*relids = palloc(sizeof(Oid) * MaxBackends);
	LWLockAcquire(control->lock, LW_SHARED);
	for (int i = 0; i < control->used; i++)
	{
		bool listed = !is_unshared(&control->waiters[i]);

		for (int j = 0; j < n && !listed; j++)
			listed = (*relids)[j] == control->waiters[i].head.relid;
		if (!listed)
			(*relids)[n++] = control->waiters[i].head.relid;
	}
	LWLockRelease(control->lock);
	return n;
}

/* InvalidOid: of all collections. */
static void
wake_those_of(Oid relid)
{
	LWLockAcquire(control->lock, LW_EXCLUSIVE);
	for (int i = 0; i < control->used; i++)
		if (is_waiting_here(&control->waiters[i]) &&
			(!OidIsValid(relid) || control->waiters[i].head.relid == relid))
			wake(&control->waiters[i]);
	LWLockRelease(control->lock);
}

void
es_watch_wake_all(void)
{
	wake_those_of(InvalidOid);
}

void
es_watch_wake_collection(Oid relid)
{
	wake_those_of(relid);
}

void
es_watch_touch(uint64 topic)
{
	register_callback();
	for (int i = 0; i < ntouched; i++)
		if (touched[i] == topic)
			return;
	if (ntouched == TOUCHED_MAX)
		touched_many = true;
	else
		touched[ntouched++] = topic;
}

int
es_watch_count(void)
{
	int n = 0;

	if (control == NULL)
		return 0;
	LWLockAcquire(control->lock, LW_SHARED);
	for (int i = 0; i < control->used; i++)
		if (is_waiting_here(&control->waiters[i]))
			n++;
	LWLockRelease(control->lock);
	return n;
}
