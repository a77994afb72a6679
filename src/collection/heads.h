/*
 * collection/heads.h
 *		The heads table: the last version of each stream, and its lock.
 */
#ifndef ES_HEADS_H
#define ES_HEADS_H

#include "postgres.h"

#include "collection/collection.h"
#include "collection/key_walk.h"
#include "storage/itemptr.h"

/* A stream as this transaction knows it, once locked. */
typedef struct EsStreamHead
{
	text		   *stream;
	bool			is_new;	 /* the caller knows that it has no row, nor can get one */
	int64			version; /* the last one; 0 = no event yet */
	EsPosition		first_position; /* of the stream's first event ever; 0 = none */
	EsPosition		last_position;
	TimestampTz		first_at;
	TimestampTz		last_at;
	ItemPointerData tid; /* the row's newest version; of this transaction once saved */
} EsStreamHead;

typedef struct EsHeads EsHeads; /* the table, opened for reading and writing */

extern EsHeads *es_heads_begin(const EsCollection *coll);

/*
 * Locks head->stream until the end of the transaction and fills in the rest as
 * last committed (or as this transaction left it), whatever the transaction's
 * snapshot says.  A stream that does not exist gets a row of version 0, which
 * must be saved, or undone by an abort, before the transaction commits.
 * Errors: deadlock (40P01), cancel.
 */
extern void es_heads_lock(EsHeads *heads, EsStreamHead *head);

/*
 * The same for many, which are in bytewise order.  One that is new gets its row
 * when it is saved.
 */
extern void es_heads_lock_all(EsHeads *heads, EsStreamHead *streams, int nstreams);

/*
 * Looks at many without a lock, in bytewise order: as es_heads_peek does at one, but
 * a row of version 0 is one, too.
 */
extern EsKeyWalk *es_heads_walk(EsHeads *heads, Snapshot snapshot, int nstreams);
extern bool		  es_heads_look(EsHeads *heads, EsKeyWalk *walk, text *stream,
								EsStreamHead *head);

/* Writes it back.  Between lock and save the command counter must have moved. */
extern void es_heads_save(EsHeads *heads, EsStreamHead *head);

/* The same for those that es_heads_lock_all has locked. */
extern void es_heads_save_all(EsHeads *heads, EsStreamHead *streams, int nstreams);

extern void es_heads_end(EsHeads *heads);

/*
 * A look without a lock: the stream as 'snapshot' sees it; false where it does
 * not exist.
 */
extern bool es_heads_peek(const EsCollection *coll, const text *stream, Snapshot snapshot,
						  EsStreamHead *head);

#endif /* ES_HEADS_H */
