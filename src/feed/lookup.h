/*
 * feed/lookup.h
 *		Walking a B-tree index of a known shape, whatever it is called.
 *
 * A reader that knows its key (a stream's row in the heads table, an event by
 * position, a stream's versions in a segment) goes to the index itself: no
 * plan, no rights (the caller has checked those of the collection), no OID of
 * an index that is kept from one call to the next (REINDEX changes it).
 */
#ifndef ES_LOOKUP_H
#define ES_LOOKUP_H

#include "postgres.h"

#include "access/attnum.h"
#include "access/sdir.h"
#include "access/skey.h"
#include "executor/tuptable.h"
#include "utils/snapshot.h"

#define ES_LOOKUP_MAX_KEYS 3

typedef struct EsLookup EsLookup;

/* Which index: its key columns, all of them, as attribute numbers of the table. */
typedef struct EsIndexShape
{
	int		   ncolumns;
	AttrNumber columns[2];
} EsIndexShape;

extern const EsIndexShape es_index_of_positions; /* a segment's (position) */
extern const EsIndexShape es_index_of_versions;	 /* a segment's (stream, version) */
extern const EsIndexShape es_index_of_streams;	 /* a heads table's (stream) */

/*
 * Locks the table (AccessShare, until es_lookup_end: the caller's lock on the
 * collection keeps it from being dropped) and begins a walk over the rows that
 * satisfy the keys, in the index's order or against it.  sk_attno of a key is
 * the number of the index column; the keys are copied, what they point at is
 * not.  NULL where the table is gone.
 * Errors: XX002 where there is no such index.
 */
extern EsLookup *es_lookup_begin(Oid relid, const EsIndexShape *shape,
								 const ScanKeyData *keys, int nkeys,
								 ScanDirection direction, Snapshot snapshot);

/* The next row, or NULL at the end; the slot is the walk's own. */
extern TupleTableSlot *es_lookup_next(EsLookup *lookup);

extern void es_lookup_end(EsLookup *lookup);

/* A key on a text column (bytewise) and one on a bigint column. */
extern void es_lookup_text_key(ScanKey key, AttrNumber column, StrategyNumber strategy,
							   const text *value);
extern void es_lookup_int_key(ScanKey key, AttrNumber column, StrategyNumber strategy,
							  int64 value);

#endif /* ES_LOOKUP_H */
