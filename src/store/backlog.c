/*
 * store/backlog.c
 *		Keys that are in a store and not in its changelog yet.
 *
 * An empty store that is filled from a changelog topic is to serve as soon as it can.
 * To record a key costs twice what it costs to put it: so it is put first, and
 * recorded later, by the worker that publishes the changelog (kafka/sink.c), while
 * the store is being read and written.  Meanwhile each such row has version 1 and
 * its key no stream; that row, and that stream, is what is missing:
 *
 *	store_catalog.backlog	the topic that it came from; null: the store has no backlog
 *	store_backlog			the keys, some thousand to a row, each with the metadata
 *							that its event is to have
 *
 * A change of such a row.  Whoever makes it finds that the key has no stream, and
 * records first that the row was put, then his change: so a key's history is always
 * whole and in order, and only what nobody has touched is late.  An UPDATE does so before
 * the row is replaced (change.c), since what another trigger does meanwhile has to
 * find it recorded; a DELETE and a batch do it with the change (record.c).
 *
 * Recording.  A row of store_backlog is taken, and each of its keys looked up.  Where
 * the row of the store has version 1 and no stream, it is locked and its event
 * appended: row, then head, like any other change.  Else somebody has recorded it.
 * Where nobody else writes the store just now the whole store is locked instead, which
 * is faster (batch.c).  The newest are taken first: where a key was put twice the later
 * metadata are the right ones.  Keys of rows that are locked by others are put back
 * behind all others, so that one open transaction does not keep the rest waiting.
 *
 * Who drops the source records what is left: nobody else would.
 *
 * It may grow while nothing was ever recorded: then what the store has, the topic has,
 * and no row can be of version 1 with a stream that is to come.  All of it is from one
 * topic, and the store is not unlogged: it would be rebuilt from its changelog.
 *
 * Readers of the changelog see a key when it is recorded.  get_at() looks into the
 * store for one that is not yet; verify() takes it for no fault; rebuild() records all
 * first; SET UNLOGGED is refused (ddl.c).
 *
 * Locks: who adds has ShareRowExclusiveLock on the store, who records
 * RowExclusiveLock; so an empty backlog is known to be one.  A crash: row, key and
 * event are of one transaction, and what was not recorded is still in the table.
 */
#include "postgres.h"

#include "store/backlog.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/heads.h"
#include "collection/key_walk.h"
#include "compat.h"
#include "errors.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "tcop/utility.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/inval.h"
#include "utils/json.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(es_store_record_backlog);

/* Of one row of the table: what is recorded in one transaction. */
#define PORTION_KEYS  10000
#define PORTION_BYTES (8 * 1024 * 1024)

/* ---------------------------------------------------------------------------
 * Adding
 * ------------------------------------------------------------------------- */

/* As committed by now. */
static bool
is_empty(Relation rel)
{
	bool empty;

	PushActiveSnapshot(GetLatestSnapshot());
	empty = es_store_is_empty(rel);
	PopActiveSnapshot();
	return empty;
}

bool
es_store_backlog_may_grow(const EsStore *store, Relation rel, const char *topic)
{
	EsCollection *changelog;

	if (!OidIsValid(store->changelog) ||
		rel->rd_rel->relpersistence != RELPERSISTENCE_PERMANENT || topic[0] == '\0' ||
		strlen(topic) >= ES_BACKLOG_SIZE ||
		!CheckRelationLockedByMe(rel, ShareRowExclusiveLock, true))
		return false;
	changelog = es_collection_open(store->changelog, AccessShareLock);
	if (es_collection_last_allotted(changelog) > 0)
		return false;
	return store->backlog[0] == '\0' ? is_empty(rel) : strcmp(store->backlog, topic) == 0;
}

/*
 * A portion is written beside each restored row, so it is packed.  Keys ascend, and
 * metadata are much alike: of each entry there is what differs from the one before.
 *
 *		int32	length of the key
 *		int32	how many of its first bytes are those of the last key
 *				the rest of it
 *		int32	size of the metadata; 0: none
 *		bits	which of their words differ from those of the last ones
 *				these words
 */
typedef struct Packer
{
	StringInfoData packed; /* a bytea */
	int			   n;
	Size		   value_bytes; /* of the rows */
	const char	  *key;			/* the last one; NULL: none */
	int32		   key_length;
	const Jsonb	  *metadata; /* the last ones; NULL: none */
} Packer;

#define WORD		   ((int) sizeof(uint64))
#define WORDS_OF(size) (((size) + WORD - 1) / WORD)
#define BITS_FOR(n)	   (((n) + BITS_PER_BYTE - 1) / BITS_PER_BYTE)

static void
begin_portion(Packer *packer)
{
	static const char header[VARHDRSZ] = {0};

	resetStringInfo(&packer->packed);
	appendBinaryStringInfo(&packer->packed, header, VARHDRSZ);
	packer->n = 0;
	packer->value_bytes = 0;
	packer->key = NULL;
	packer->key_length = 0;
	packer->metadata = NULL;
}

/* The word of that number, filled up with zeros where the data end. */
static uint64
word_of(const void *data, int size, int number)
{
	uint64 word = 0;

	if (number * WORD < size)
		memcpy(&word, (const char *) data + number * WORD,
			   Min(WORD, size - number * WORD));
	return word;
}

static void
pack_key(Packer *packer, const struct varlena *key)
{
	const char *bytes = VARDATA_ANY(key);
	int32		length = VARSIZE_ANY_EXHDR(key);
	int32		same = 0;

	while (same < Min(length, packer->key_length) && bytes[same] == packer->key[same])
		same++;
	appendBinaryStringInfo(&packer->packed, (const char *) &length, sizeof(length));
	appendBinaryStringInfo(&packer->packed, (const char *) &same, sizeof(same));
	appendBinaryStringInfo(&packer->packed, bytes + same, length - same);
	packer->key = bytes;
	packer->key_length = length;
}

static void
pack_metadata(Packer *packer, const Jsonb *metadata)
{
	StringInfo packed = &packer->packed;
	int32	   size = metadata == NULL ? 0 : VARSIZE(metadata);
	int32	   last = packer->metadata == NULL ? 0 : VARSIZE(packer->metadata);
	int		   nbits = BITS_FOR(WORDS_OF(size));
	uint8	  *bits;
	char	  *words;

	appendBinaryStringInfo(packed, (const char *) &size, sizeof(size));
	if (size == 0)
		return;
	enlargeStringInfo(packed, nbits + WORDS_OF(size) * WORD);
	bits = (uint8 *) packed->data + packed->len;
	memset(bits, 0, nbits);
	words = (char *) bits + nbits;
	for (int i = 0; i < WORDS_OF(size); i++)
	{
		uint64 word = word_of(metadata, size, i);

		if (word == word_of(packer->metadata, last, i))
			continue;
		bits[i / BITS_PER_BYTE] |= 1 << i % BITS_PER_BYTE;
		memcpy(words, &word, WORD);
		words += WORD;
	}
	packed->len = words - packed->data;
	packer->metadata = metadata;
}

/* In SPI, as the extension's owner; to be taken before all others, or behind them. */
static void
insert_portion(const EsStore *store, Packer *packer, bool behind)
{
	static const char sql[] =
		"INSERT INTO eventstore.store_backlog (store, id, key_count, keys)"
		" SELECT $1, COALESCE(CASE WHEN $4 THEN min(b.id) - 1 ELSE max(b.id) + 1 END, 0),"
		" $2, $3 FROM eventstore.store_backlog b WHERE b.store = $1";
	Oid	  types[4] = {REGCLASSOID, INT4OID, BYTEAOID, BOOLOID};
	Datum values[4] = {ObjectIdGetDatum(store->relid), Int32GetDatum(packer->n),
					   PointerGetDatum(packer->packed.data), BoolGetDatum(behind)};

	SET_VARSIZE(packer->packed.data, packer->packed.len);
	es_spi_execute(sql, lengthof(types), types, values, NULL, false, SPI_OK_INSERT);
}

static void
mark(const EsStore *store, const char *topic)
{
	Oid	  types[2] = {REGCLASSOID, TEXTOID};
	Datum values[2] = {ObjectIdGetDatum(store->relid), CStringGetTextDatum(topic)};

	if (store->backlog[0] != '\0')
		return;
	(void) es_spi_execute_as_owner(
		"UPDATE eventstore.store_catalog"
		" SET backlog = $2, backlog_due = false WHERE store = $1",
		lengthof(types), types, values, NULL, SPI_OK_UPDATE);
	CacheInvalidateRelcacheByRelid(store->relid);
}

static void
write_portion(const EsStore *store, Packer *packer, bool behind)
{
	EsRoleSwitch saved;

	if (packer->n > 0)
	{
		es_role_assume(es_extension_owner(), &saved);
		SPI_connect();
		insert_portion(store, packer, behind);
		SPI_finish();
		es_role_restore(&saved);
	}
	begin_portion(packer);
}

static void
add_to_portion(Packer *packer, Datum key, const Jsonb *metadata)
{
	pack_key(packer, (struct varlena *) DatumGetPointer(key));
	pack_metadata(packer, metadata);
	packer->n++;
}

struct EsBacklogWriter
{
	const EsStore *store;
	Packer		   packer;
};

EsBacklogWriter *
es_store_backlog_begin(const EsStore *store, const char *topic)
{
	EsBacklogWriter *writer = palloc(sizeof(EsBacklogWriter));

	writer->store = store;
	mark(store, topic);
	initStringInfo(&writer->packer.packed);
	begin_portion(&writer->packer);
	return writer;
}

void
es_store_backlog_add(EsBacklogWriter *writer, Datum key, Datum value,
					 const Jsonb *metadata)
{
	Packer *packer = &writer->packer;

	add_to_portion(packer, key, metadata);
	/* What is recorded together is in memory together, with its values. */
	packer->value_bytes += VARSIZE_ANY(DatumGetPointer(value));
	if (packer->n >= PORTION_KEYS ||
		packer->packed.len + packer->value_bytes >= PORTION_BYTES)
		write_portion(writer->store, packer, false);
}

void
es_store_backlog_finish(EsBacklogWriter *writer)
{
	write_portion(writer->store, &writer->packer, false);
	pfree(writer->packer.packed.data);
	pfree(writer);
}

void
es_store_backlog_end(Oid store)
{
	Oid	  types[1] = {REGCLASSOID};
	Datum values[1] = {ObjectIdGetDatum(store)};

	if (es_spi_execute_as_owner("UPDATE eventstore.store_catalog SET backlog_due = true"
								" WHERE store = $1 AND backlog IS NOT NULL",
								1, types, values, NULL, SPI_OK_UPDATE) > 0)
		CacheInvalidateRelcacheByRelid(store);
}

/* ---------------------------------------------------------------------------
 * Recording
 * ------------------------------------------------------------------------- */

/* A key of the backlog. */
typedef struct Entry
{
	Datum  key;
	Jsonb *metadata; /* or NULL */
} Entry;

typedef struct Recorder
{
	EsStore		*store;
	Relation	 rel;
	bool		 alone; /* nobody else writes the store */
	Snapshot	 snapshot;
	EsHeads		*heads;
	bool		 wait;
	EsRowChange *changes;
	int			 nchanges;
	int			*locked; /* the entries whose rows others have locked */
	int			 nlocked;
} Recorder;

static const char *
read_length(const char *from, int32 *length)
{
	memcpy(length, from, sizeof(*length));
	return from + sizeof(*length);
}

/* The key of the next entry; 'last' is the one before, or NULL. */
static const char *
unpack_key(const char *from, const Entry *last, Entry *entry)
{
	int32 length;
	int32 same;
	text *key;

	from = read_length(read_length(from, &length), &same);
	key = palloc(VARHDRSZ + length);
	SET_VARSIZE(key, VARHDRSZ + length);
	if (same > 0)
		memcpy(VARDATA(key), VARDATA(DatumGetPointer(last->key)), same);
	memcpy(VARDATA(key) + same, from, length - same);
	entry->key = PointerGetDatum(key);
	return from + (length - same);
}

/* Its metadata; 'last' are those before, or NULL. */
static const char *
unpack_metadata(const char *from, const Jsonb *last, Entry *entry)
{
	int32		 size;
	const uint8 *bits;
	char		*data;

	from = read_length(from, &size);
	entry->metadata = NULL;
	if (size == 0)
		return from;
	bits = (const uint8 *) from;
	from += BITS_FOR(WORDS_OF(size));
	data = palloc(WORDS_OF(size) * WORD);
	for (int i = 0; i < WORDS_OF(size); i++)
	{
		uint64 word = last == NULL ? 0 : word_of(last, VARSIZE(last), i);

		if (bits[i / BITS_PER_BYTE] & (1 << i % BITS_PER_BYTE))
		{
			memcpy(&word, from, WORD);
			from += WORD;
		}
		memcpy(data + i * WORD, &word, WORD);
	}
	entry->metadata = (Jsonb *) data;
	return from;
}

static Entry *
unpack(const bytea *packed, int n)
{
	Entry	   *entries = palloc(sizeof(Entry) * n);
	const char *from = VARDATA(packed);
	Jsonb	   *last = NULL;

	for (int i = 0; i < n; i++)
	{
		from = unpack_key(from, i == 0 ? NULL : &entries[i - 1], &entries[i]);
		from = unpack_metadata(from, last, &entries[i]);
		if (entries[i].metadata != NULL)
			last = entries[i].metadata;
	}
	return entries;
}

/* Takes the newest row away; NULL where there is none, or somebody else takes it just now. */
static Entry *
try_take_portion(Oid store, int *n, bool wait)
{
	static const char format[] =
		"DELETE FROM eventstore.store_backlog b WHERE b.store = $1 AND b.id ="
		" (SELECT m.id FROM eventstore.store_backlog m WHERE m.store = $1"
		" ORDER BY m.id DESC LIMIT 1 FOR UPDATE%s) RETURNING b.key_count, b.keys";
	MemoryContext caller = CurrentMemoryContext;
	Oid			  types[1] = {REGCLASSOID};
	Datum		  values[1] = {ObjectIdGetDatum(store)};
	EsRoleSwitch  saved;
	bytea		 *packed = NULL;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(psprintf(format, wait ? "" : " SKIP LOCKED"), 1, types, values, NULL,
				   false, SPI_OK_DELETE_RETURNING);
	if (SPI_processed > 0)
	{
		HeapTuple	  row = SPI_tuptable->vals[0];
		MemoryContext spi = MemoryContextSwitchTo(caller);
		bool		  isnull;

		*n = DatumGetInt32(SPI_getbinval(row, SPI_tuptable->tupdesc, 1, &isnull));
		packed =
			DatumGetByteaPCopy(SPI_getbinval(row, SPI_tuptable->tupdesc, 2, &isnull));
		MemoryContextSwitchTo(spi);
	}
	SPI_finish();
	es_role_restore(&saved);
	return packed == NULL ? NULL : unpack(packed, *n);
}

static bool
has_portion(Oid store)
{
	Oid	  types[1] = {REGCLASSOID};
	Datum values[1] = {ObjectIdGetDatum(store)};

	return es_spi_execute_as_owner("SELECT FROM eventstore.store_backlog"
								   " WHERE store = $1 LIMIT 1",
								   1, types, values, NULL, SPI_OK_SELECT) > 0;
}

int64
es_store_backlog_left(Oid store)
{
	Oid			 types[1] = {REGCLASSOID};
	Datum		 values[1] = {ObjectIdGetDatum(store)};
	EsRoleSwitch saved;
	int64		 left;
	bool		 isnull;

	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute(
		"SELECT COALESCE(sum(key_count), 0)::int8 FROM eventstore.store_backlog"
		" WHERE store = $1",
		1, types, values, NULL, true, SPI_OK_SELECT);
	left = DatumGetInt64(
		SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	SPI_finish();
	es_role_restore(&saved);
	return left;
}

/* What could not be recorded now. */
static void
put_back(const EsStore *store, const Entry *entries, const int *numbers, int n)
{
	Packer packer;

	initStringInfo(&packer.packed);
	begin_portion(&packer);
	for (int i = 0; i < n; i++)
		add_to_portion(&packer, entries[numbers[i]].key, entries[numbers[i]].metadata);
	write_portion(store, &packer, true);
}

static void
unmark(const EsStore *store)
{
	Oid	  types[1] = {REGCLASSOID};
	Datum values[1] = {ObjectIdGetDatum(store->relid)};

	(void) es_spi_execute_as_owner("UPDATE eventstore.store_catalog"
								   " SET backlog = NULL, backlog_due = false"
								   " WHERE store = $1",
								   1, types, values, NULL, SPI_OK_UPDATE);
	CacheInvalidateRelcacheByRelid(store->relid);
}

/* The row, detoasted, so that it needs the slot no more. */
static void
read_row(TupleTableSlot *slot, EsStoreRow *row)
{
	bool isnull;

	row->key =
		PointerGetDatum(PG_DETOAST_DATUM_COPY(slot_getattr(slot, ES_STORE_KEY, &isnull)));
	row->value = PointerGetDatum(
		PG_DETOAST_DATUM_COPY(slot_getattr(slot, ES_STORE_VALUE, &isnull)));
	row->complete = true;
	row->version = 1;
	row->updated_at =
		DatumGetTimestampTz(slot_getattr(slot, ES_STORE_UPDATED_AT, &isnull));
	row->has_time = !isnull;
}

static bool
is_first_version(TupleTableSlot *slot)
{
	bool  isnull;
	Datum version = slot_getattr(slot, ES_STORE_VERSION, &isnull);

	return !isnull && DatumGetInt64(version) == 1;
}

static TM_Result
lock_row(Recorder *recorder, TupleTableSlot *slot, Snapshot snapshot)
{
	TM_FailureData	failure;
	ItemPointerData tid = slot->tts_tid;

	return table_tuple_lock(recorder->rel, &tid, snapshot, slot,
							GetCurrentCommandId(false), LockTupleNoKeyExclusive,
							recorder->wait ? LockWaitBlock : LockWaitSkip, 0, &failure);
}

/*
 * Locks the row that was found, unless nobody else writes the store.  TM_Ok: it is of
 * the backlog; TM_WouldBlock: perhaps.  One that was found may have been replaced since,
 * by a row that is: of the same value.
 */
static TM_Result
lock_found(Recorder *recorder, Datum key, TupleTableSlot *slot)
{
	Snapshot  snapshot = recorder->snapshot;
	bool	  found = is_first_version(slot);
	TM_Result result = TM_Ok;

	if (recorder->alone || !found)
		return found ? TM_Ok : TM_Deleted;
	RegisterSnapshot(snapshot);
	while (found && (result = lock_row(recorder, slot, snapshot)) != TM_Ok &&
		   result != TM_WouldBlock)
	{
		CHECK_FOR_INTERRUPTS();
		UnregisterSnapshot(snapshot);
		snapshot = RegisterSnapshot(GetLatestSnapshot());
		found = es_store_find(recorder->store, recorder->rel, key, snapshot, slot) &&
				is_first_version(slot);
	}
	UnregisterSnapshot(snapshot);
	return found ? result : TM_Deleted;
}

/* Those of the keys that have a row and no event yet. */
static void
collect(Recorder *recorder, const Entry *entries, int n)
{
	Relation		index = index_open(es_primary_key(recorder->rel), AccessShareLock);
	TupleTableSlot *slot = table_slot_create(recorder->rel, NULL);
	EsKeyWalk	   *rows = es_key_walk_begin(recorder->rel, index, recorder->snapshot, n);
	EsKeyWalk	   *streams = es_heads_walk(recorder->heads, recorder->snapshot, n);

	for (int i = 0; i < n; i++)
	{
		EsRowChange *change = &recorder->changes[recorder->nchanges];
		EsStreamHead head;
		TM_Result	 result;
		text		*stream = es_store_key_to_text(recorder->store, entries[i].key);
		bool		 begun = es_heads_look(recorder->heads, streams, stream, &head);

		CHECK_FOR_INTERRUPTS();
		if ((begun && head.version > 0) ||
			!es_key_walk_find(rows, (struct varlena *) DatumGetPointer(entries[i].key),
							  slot))
			continue;
		result = lock_found(recorder, entries[i].key, slot);
		if (result == TM_WouldBlock)
			recorder->locked[recorder->nlocked++] = i;
		if (result != TM_Ok)
			continue;
		memset(change, 0, sizeof(*change));
		change->has_old = change->old_in_backlog = change->only_backlog = true;
		change->stream_is_new = recorder->alone && !begun;
		change->metadata = entries[i].metadata;
		read_row(slot, &change->old);
		recorder->nchanges++;
	}
	es_key_walk_end(streams);
	es_key_walk_end(rows);
	ExecDropSingleTupleTableSlot(slot);
	index_close(index, AccessShareLock);
}

/* How many could not be recorded, because others have locked their rows. */
static int
record(EsStore *store, const Entry *entries, int n, bool wait)
{
	Recorder	  recorder = {store};
	EsCollection *changelog = es_collection_open(store->changelog, RowExclusiveLock);

	recorder.rel = table_open(store->relid, NoLock);
	recorder.alone = ConditionalLockRelationOid(store->relid, ShareRowExclusiveLock);
	recorder.wait = wait;
	/* What was committed before the lock is to be seen. */
	recorder.snapshot = RegisterSnapshot(GetLatestSnapshot());
	recorder.heads = es_heads_begin(changelog);
	recorder.changes =
		MemoryContextAllocHuge(CurrentMemoryContext, sizeof(EsRowChange) * n);
	recorder.locked = palloc(sizeof(int) * n);
	collect(&recorder, entries, n);
	es_heads_end(recorder.heads);
	UnregisterSnapshot(recorder.snapshot);
	put_back(store, entries, recorder.locked, recorder.nlocked);
	es_store_record_rows(store, recorder.rel, recorder.changes, recorder.nchanges);
	table_close(recorder.rel, NoLock);
	return recorder.nlocked;
}

EsBacklogResult
es_store_backlog_record(Oid relid, bool wait)
{
	EsStore		*store;
	Entry		*entries;
	EsRoleSwitch saved;
	int			 n;
	int			 nlocked;

	if (!wait && !ConditionalLockRelationOid(relid, RowExclusiveLock))
		return ES_BACKLOG_LOCKED;
	store = es_store_open(relid, RowExclusiveLock);
	if (store->backlog[0] == '\0')
		return ES_BACKLOG_EMPTY;
	while ((entries = try_take_portion(relid, &n, wait)) == NULL)
	{
		CHECK_FOR_INTERRUPTS();
		if (!has_portion(relid))
		{
			unmark(store);
			return ES_BACKLOG_EMPTY;
		}
		if (!wait)
			return ES_BACKLOG_LOCKED;
	}
	/* Code of the owner's may run: a trigger of the changelog. */
	es_role_assume(es_relation_owner(relid), &saved);
	nlocked = record(store, entries, n, wait);
	es_role_restore(&saved);
	return nlocked == n ? ES_BACKLOG_LOCKED : ES_BACKLOG_RECORDED;
}

static void
check_isolation(Oid store)
{
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("what was restored into store \"%s\" must be recorded first, at "
						"isolation level READ COMMITTED",
						get_rel_name(store)),
				 errhint("Do this in a transaction of that level, or some time later.")));
}

void
es_store_backlog_record_all(Oid store)
{
	MemoryContext portion;
	MemoryContext old;

	if (!es_store_has_backlog(store, NULL))
		return;
	check_isolation(store);
	/* Row by row, portion by portion, we and another who writes many would deadlock. */
	LockRelationOid(store, ShareRowExclusiveLock);
	portion = AllocSetContextCreate(CurrentMemoryContext, "eventstore backlog",
									ALLOCSET_DEFAULT_SIZES);
	old = MemoryContextSwitchTo(portion);
	while (es_store_backlog_record(store, true) != ES_BACKLOG_EMPTY)
	{
		CHECK_FOR_INTERRUPTS();
		CommandCounterIncrement();
		MemoryContextReset(portion);
	}
	CommandCounterIncrement();
	MemoryContextSwitchTo(old);
	MemoryContextDelete(portion);
}

Datum
es_store_record_backlog(PG_FUNCTION_ARGS)
{
	static const char *const names[] = {[ES_BACKLOG_EMPTY] = "empty",
										[ES_BACKLOG_RECORDED] = "recorded",
										[ES_BACKLOG_LOCKED] = "locked"};
	Oid						 store;

	es_require_preloaded();
	PreventCommandIfReadOnly("store_record_backlog");
	es_require_arg(&fcinfo->args[0], "store");
	store = PG_GETARG_OID(0);
	es_store_require(store);
	check_isolation(store);
	PG_RETURN_TEXT_P(cstring_to_text(
		names[es_store_backlog_record(store, !PG_ARGISNULL(1) && PG_GETARG_BOOL(1))]));
}

/* ---------------------------------------------------------------------------
 * One row
 * ------------------------------------------------------------------------- */

void
es_store_backlog_record_row(const EsStore *store, Relation rel, const EsStoreRow *row)
{
	EsRowChange change = {0};

	change.has_old = change.old_in_backlog = change.only_backlog = true;
	change.old = *row;
	change.metadata = es_store_backlog_metadata(store);
	es_store_record_rows(store, rel, &change, 1);
}

Jsonb *
es_store_backlog_metadata(const EsStore *store)
{
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfoString(&json, "{\"topic\": ");
	escape_json(&json, store->backlog);
	appendStringInfoChar(&json, '}');
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data)));
}
