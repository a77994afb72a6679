/*
 * feed/key_reads.c
 *		Reads of keys, on their way to who listens to a store (option feed_reads).
 *
 * A read writes nothing, takes no transaction id, may run in a read-only
 * transaction, and must not become slower for being told of.  So it only counts
 * itself in a small table in shared memory, and the notifier, which sends what
 * the table holds with its next notifications, empties it (notifier.c):
 *
 *	1.	es_key_reads_note finds the place of the key by a hash, among a few, and
 *		counts.  Where the lock is held, or all these places are taken, the read is
 *		not told of: this feed loses some under pressure, and says so.
 *	2.	It calls the notifier where the table had nothing of the database; else the
 *		notifier knows, and comes when the next notification is due.
 *	3.	es_key_reads_take empties the database's places.
 *
 * Nothing here is transactional: a read was a read, whatever becomes of the
 * transaction around it.
 *
 * Locks: KeyReads.lock, an LWLock; a reader takes it only if it is free, and
 * nothing is taken under it.  A crash loses what the table holds.
 */
#include "postgres.h"

#include "feed/key_reads.h"

#include "common/hashfn.h"
#include "compat.h"
#include "miscadmin.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "worker/wake.h"

/* Places, of all databases; a power of two. */
#define PLACES 1024
/* How many of them a key may take one of. */
#define PROBES 8
/* Databases at a time; reads of more are not told of. */
#define SHARES 32

typedef struct Place
{
	Oid		   database; /* InvalidOid = free */
	EsKeyReads reads;
} Place;

/* How many places a database has. */
typedef struct Share
{
	Oid database;
	int used; /* 0 = free */
} Share;

typedef struct KeyReads
{
	LWLock *lock; /* for all below */
	Share	shares[SHARES];
	Place	places[PLACES];
} KeyReads;

static KeyReads *key_reads = NULL;

Size
es_key_reads_shmem_size(void)
{
	return sizeof(KeyReads);
}

void
es_key_reads_shmem_init(void)
{
	bool found;

	key_reads = ShmemInitStruct("eventstore key reads", sizeof(KeyReads), &found);
	if (found)
		return;
	memset(key_reads, 0, sizeof(KeyReads));
	key_reads->lock = &(GetNamedLWLockTranche("EventstoreKeyReads"))->lock;
}

static bool
is_place_of(const Place *place, Oid changelog, const char *key, int length)
{
	return place->database == MyDatabaseId && place->reads.changelog == changelog &&
		   place->reads.length == length && memcmp(place->reads.key, key, length) == 0;
}

/* What this database has, or a free one; NULL. */
static Share *
find_share(void)
{
	Share *free_share = NULL;

	for (int i = 0; i < SHARES; i++)
	{
		Share *share = &key_reads->shares[i];

		if (share->used > 0 && share->database == MyDatabaseId)
			return share;
		if (share->used == 0)
			free_share = share;
	}
	return free_share;
}

/* The key's place, or a free one that it may have; NULL. */
static Place *
find_place(Oid changelog, const char *key, int length)
{
	uint32 hash = hash_combine(hash_bytes((const unsigned char *) key, length),
							   hash_bytes_uint32(changelog));
	Place *free_place = NULL;

	for (int i = 0; i < PROBES; i++)
	{
		Place *place = &key_reads->places[(hash + i) % PLACES];

		if (is_place_of(place, changelog, key, length))
			return place;
		if (free_place == NULL && place->database == InvalidOid)
			free_place = place;
	}
	return free_place;
}

/* Under the lock.  True where this is the database's first. */
static bool
count_read(Oid changelog, const char *key, int length)
{
	Place *place = find_place(changelog, key, length);
	Share *share = find_share();
	bool   first = false;

	if (place == NULL || share == NULL)
		return false;
	if (place->database == InvalidOid)
	{
		place->database = MyDatabaseId;
		place->reads.changelog = changelog;
		place->reads.count = 0;
		place->reads.length = length;
		memcpy(place->reads.key, key, length);
		share->database = MyDatabaseId;
		first = share->used++ == 0;
	}
	place->reads.count++;
	return first;
}

void
es_key_reads_note(Oid changelog, const text *key)
{
	int	 length = VARSIZE_ANY_EXHDR(key);
	bool first;

	if (key_reads == NULL || length > ES_READ_KEY_MAX_BYTES ||
		!LWLockConditionalAcquire(key_reads->lock, LW_EXCLUSIVE))
		return;
	first = count_read(changelog, VARDATA_ANY(key), length);
	LWLockRelease(key_reads->lock);
	if (first)
		es_wake_notifier();
}

bool
es_key_reads_any(void)
{
	Share *share;
	bool   any;

	LWLockAcquire(key_reads->lock, LW_SHARED);
	share = find_share();
	any = share != NULL && share->used > 0;
	LWLockRelease(key_reads->lock);
	return any;
}

int
es_key_reads_take(EsKeyReads **reads)
{
	Share *share;
	int	   n = 0;

	*reads = palloc(sizeof(EsKeyReads) * PLACES);
	LWLockAcquire(key_reads->lock, LW_EXCLUSIVE);
	for (int i = 0; i < PLACES; i++)
	{
		Place *place = &key_reads->places[i];

		if (place->database != MyDatabaseId)
			continue;
		(*reads)[n++] = place->reads;
		place->database = InvalidOid;
	}
	share = find_share();
	if (share != NULL)
		share->used = 0;
	LWLockRelease(key_reads->lock);
	return n;
}
