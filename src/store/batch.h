/*
 * store/batch.h
 *		Many changes of a store in one go, for workers.
 */
#ifndef ES_STORE_BATCH_H
#define ES_STORE_BATCH_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "utils/jsonb.h"

/* One change; what it points to lies in the caller's memory. */
typedef struct EsStoreChange
{
	Datum		key;   /* text or bytea, as the store's key_format; detoasted */
	Datum		value; /* of the store's type, detoasted; of a delete: not looked at */
	bool		is_delete;
	bool		created_at_given; /* else the clock; never before the key's last time */
	TimestampTz created_at;
	Jsonb	   *metadata; /* of the event in the changelog, if there is one; or NULL */
} EsStoreChange;

/* What became of the keys, of each of which only the last change counts. */
typedef struct EsStoreBatchResult
{
	int64 inserted;
	int64 updated;
	int64 deleted;
	int64 unchanged; /* had that very value; or was to go, and was not there */
} EsStoreBatchResult;

/*
 * Applies the changes; of several of a key the last one is written and
 * recorded, the others are as if they had never been.  What fills a store from a
 * changelog topic may be recorded later (backlog.h): 'topic' is that, else NULL.  Opens the store with
 * RowExclusiveLock.  The current user needs the rights of INSERT ... ON CONFLICT
 * and DELETE.  All is done, or an error is raised and the caller's
 * (sub)transaction undoes it.  Memory is taken from the current context, about
 * half a kilobyte for each change beside the values: reset it after each batch.
 * Errors: as put() and delete(); 40P01 beside others who change many keys in
 * another order than bytewise.
 */
extern void es_store_apply(Oid store, const EsStoreChange *changes, int nchanges,
						   const char *topic, EsStoreBatchResult *result);

#endif /* ES_STORE_BATCH_H */
