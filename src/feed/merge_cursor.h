/*
 * feed/merge_cursor.h
 *		Where a merged reading stands, as jsonb that a client keeps.
 */
#ifndef ES_MERGE_CURSOR_H
#define ES_MERGE_CURSOR_H

#include "postgres.h"

#include "collection/collection.h"
#include "datatype/timestamp.h"
#include "utils/jsonb.h"

/* One of the collections that are merged. */
typedef struct EsMergeSource
{
	Oid			  relid;
	EsCollection *coll;
	bool		  row_security;
	char		 *name;		  /* schema-qualified */
	char		 *short_name; /* as regclass prints it */
	EsPosition	  head;		  /* of this call's view */

	/* The window that is being read: positions in (low, high]. */
	EsPosition low;
	EsPosition high;
	bool	   has_window; /* else from the oldest, in the next window */
} EsMergeSource;

/* The sort key of a row: where the window was left. */
typedef struct EsMergeKey
{
	bool		valid; /* false: before the first row */
	TimestampTz created_at;
	int			source; /* index into the sources */
	EsPosition	position;
} EsMergeKey;

/* All of them, in the bytewise order of their names, which is part of the sort key. */
typedef struct EsMergeState
{
	int			   nsources;
	EsMergeSource *sources;
	EsMergeKey	   key;
} EsMergeState;

/*
 * Sets windows and key from argument "after": a cursor, or an object of
 * positions by collection.  The latter give windows up to each head.
 * Errors: 22023 for what is neither, LG004, LG005.
 */
extern void es_merge_cursor_parse(Jsonb *cursor, EsMergeState *state);

/* The cursor of the row with that key, in the windows as they are. */
extern Jsonb *es_merge_cursor_make(const EsMergeState *state, const EsMergeKey *key);

#endif /* ES_MERGE_CURSOR_H */
