/*
 * feed/visible.h
 *		Reading through the planner and the executor, where row-level security
 *		has a say in which rows there are.
 */
#ifndef ES_VISIBLE_H
#define ES_VISIBLE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "executor/tuptable.h"
#include "utils/snapshot.h"

#define ES_VISIBLE_MAX_PARAMS 2

typedef struct EsVisible EsVisible;

/* A SELECT with parameters $1, $2 that are never null. */
typedef struct EsVisibleQuery
{
	const char *sql;
	int			nparams;
	Oid			types[ES_VISIBLE_MAX_PARAMS];
	Datum		values[ES_VISIBLE_MAX_PARAMS];
} EsVisibleQuery;

/* The columns of an event, in the order of eventstore.event. */
#define ES_VISIBLE_COLUMNS                                                               \
	"position, stream, version, id, type, tags, data, body, metadata, created_at"

/*
 * Begins to run the query as the current user, as of the snapshot (registered
 * for as long as the walk lasts).  Everything it needs is allocated in the
 * current memory context, which must live as long as the walk.
 */
extern EsVisible *es_visible_begin(const EsVisibleQuery *query, Snapshot snapshot);

/* The next row, good until the next call; NULL at the end. */
extern TupleTableSlot *es_visible_next(EsVisible *visible);

extern void es_visible_end(EsVisible *visible);

#endif /* ES_VISIBLE_H */
