/*
 * store/record.h
 *		Changed rows of a store, and the events that they are.
 */
#ifndef ES_STORE_RECORD_H
#define ES_STORE_RECORD_H

#include "postgres.h"

#include "access/htup.h"
#include "access/tupdesc.h"
#include "datatype/timestamp.h"
#include "storage/itemptr.h"
#include "store/store.h"
#include "utils/jsonb.h"

/* A row's own columns. */
typedef struct EsStoreRow
{
	Datum		key;
	Datum		value;
	bool		complete; /* neither key nor value is null */
	int64		version;  /* 0 for null */
	bool		has_time;
	TimestampTz updated_at;
} EsStoreRow;

/* A row that has been changed: it is written, and ours. */
typedef struct EsRowChange
{
	bool has_old;
	bool old_is_ours;	 /* of this transaction: its own event may be queued still */
	bool old_in_backlog; /* perhaps; that it was put is recorded first (backlog.h) */
	bool has_new;
	bool moved;			/* the new row has another key */
	bool only_backlog;	/* no change: of the old row it is recorded that it was put */
	bool stream_is_new; /* nobody has begun the row's stream, nor can */
	EsStoreRow old;		/* its value is needed where old_is_ours, old_in_backlog */
	EsStoreRow new;		/* version and time as foreseen */
	ItemPointerData new_tid;
	TimestampTz		time;	  /* of a delete, and of a row without one */
	Jsonb		   *metadata; /* or NULL */
} EsRowChange;

/* May the row, which this transaction has not written, be of the store's backlog? */
extern bool es_store_row_in_backlog(const EsStore *store, const EsStoreRow *row);

/* The fields point into the tuple. */
extern void es_store_read_row(EsStoreRow *row, HeapTuple tuple, TupleDesc desc);

/* Byte for byte. */
extern bool es_store_same_bytes(Datum a, Datum b);

/* The tuple with another version and time. */
extern HeapTuple es_store_with_version(HeapTuple tuple, TupleDesc desc, int64 version,
									   bool has_time, TimestampTz time);

/* The greater of a time and the one of the key's previous version. */
extern TimestampTz es_store_not_before(TimestampTz time, const EsStoreRow *previous);

/*
 * Appends the events of the changes, in their order, to the changelog, which
 * the store has.  Keys may not be twice among them but for one change alone.
 * A row whose version or time is another than foreseen is corrected.
 */
extern void es_store_record_rows(const EsStore *store, Relation rel, EsRowChange *changes,
								 int nchanges);

#endif /* ES_STORE_RECORD_H */
