/*
 * store/backlog.h
 *		Keys that are in a store and not in its changelog yet.
 */
#ifndef ES_STORE_BACKLOG_H
#define ES_STORE_BACKLOG_H

#include "postgres.h"

#include "store/record.h"
#include "store/store.h"
#include "utils/relcache.h"

/*
 * May what is put into the store now, by a transaction that keeps all others from
 * writing it (ShareRowExclusiveLock), be recorded later?  It comes from 'topic'.
 */
extern bool es_store_backlog_may_grow(const EsStore *store, Relation rel,
									  const char *topic);

/* Notes rows of one batch as not recorded; they have version 1. */
typedef struct EsBacklogWriter EsBacklogWriter;
extern EsBacklogWriter *es_store_backlog_begin(const EsStore *store, const char *topic);

/* In bytewise order of the keys. */
extern void es_store_backlog_add(EsBacklogWriter *writer, Datum key, Datum value,
								 const Jsonb *metadata);
extern void es_store_backlog_finish(EsBacklogWriter *writer);

/* All that was to be added was: it may be recorded from now on. */
extern void es_store_backlog_end(Oid store);

typedef enum EsBacklogResult
{
	ES_BACKLOG_EMPTY,	 /* there was nothing left */
	ES_BACKLOG_RECORDED, /* there may be more */
	ES_BACKLOG_LOCKED	 /* what is left is being changed by others */
} EsBacklogResult;

/*
 * Records some thousand keys in the changelog.  At READ COMMITTED; takes
 * RowExclusiveLock, or ShareRowExclusiveLock where nobody is in the way, else the rows'
 * locks.  Rows that others have locked are waited for, or left for later.  Who goes on
 * in the same transaction moves the command counter.  Rights: none are asked for.
 * Errors: 40P01, and 55P03 by lock_timeout.
 */
extern EsBacklogResult es_store_backlog_record(Oid store, bool wait);

/* How many keys are left, some of which may be recorded by now. */
extern int64 es_store_backlog_left(Oid store);

/* All of it, in this transaction, which nobody else writes the store beside.  25001 where there is some, at another level. */
extern void es_store_backlog_record_all(Oid store);

/* A row of the backlog that is about to be changed, and locked for it. */
extern void es_store_backlog_record_row(const EsStore *store, Relation rel,
										const EsStoreRow *row);

/* Of an event by which such a key is recorded; what else is known of it is not at hand. */
extern Jsonb *es_store_backlog_metadata(const EsStore *store);

#endif /* ES_STORE_BACKLOG_H */
