/*
 * feed/read.h
 *		A reader's way to events: one state for each kind of reading.
 *
 * eventstore.read and read_stream are a thin shell over EsRead, once as
 * ordinary set-returning functions (read.c) and once as a scan node that
 * streams (read_scan.c); read_merged opens several.  EsRead hides whether the
 * events come from an index walk, a sequential one, or, where row-level
 * security applies, from a query of the user's own.
 */
#ifndef ES_READ_H
#define ES_READ_H

#include "postgres.h"

#include "access/sdir.h"
#include "collection/collection.h"
#include "collection/query.h"
#include "datatype/timestamp.h"
#include "executor/tuptable.h"
#include "fmgr.h"

#define ES_READ_ALL PG_INT64_MAX /* no max_count */
#define ES_READ_END PG_INT64_MAX /* no upper bound of positions, versions */

/* What to read.  Checked when made, so whoever has one need not look again. */
typedef struct EsReadArgs
{
	Oid			  collection;
	ScanDirection direction;
	int64		  max_count;  /* matching events; ES_READ_ALL */
	EsQuery		 *query;	  /* NULL: every event */
	TimestampTz	  wait_until; /* how long to wait for the first event; 0 = not at all */

	/* Of positions (read): */
	bool		has_after; /* else from the oldest that is kept */
	EsPosition	after;	   /* exclusive */
	EsPosition	before;	   /* exclusive; ES_READ_END */
	bool		has_since;
	bool		has_until;
	TimestampTz since; /* inclusive */
	TimestampTz until; /* exclusive */
	int			lanes; /* 0: all events, else those of one of so many lanes */
	int			lane;  /* this one, from 0 */

	/* Of a stream (read_stream); NULL for a read of positions: */
	text *stream;
	bool  has_from;		/* else from the first (backward: the last) */
	bool  has_to;		/* else to the last (backward: the first) */
	int64 from_version; /* inclusive */
	int64 to_version;	/* inclusive */
} EsReadArgs;

/* Which function's arguments they are: read or read_stream. */
typedef enum EsReadKind
{
	ES_READ_POSITIONS,
	ES_READ_STREAM
} EsReadKind;

#define ES_READ_NARGS(kind) ((kind) == ES_READ_STREAM ? 8 : 11)

/* Argument numbers that the planner looks at, from 0; see read.sql. */
#define ES_READ_ARG_MAX_COUNT(kind) ((kind) == ES_READ_STREAM ? 3 : 2)
#define ES_READ_ARG_DIRECTION(kind) ((kind) == ES_READ_STREAM ? 4 : 9)

typedef struct EsRead EsRead;

/*
 * The SQL arguments, checked (22004, 22023, 25001 for wait).  What the result
 * points to is allocated in the current memory context, or is the caller's.
 */
extern void es_read_make_args(EsReadKind kind, NullableDatum *values, EsReadArgs *args);

/*
 * Locks the collection, checks rights, takes the view (head, then snapshot)
 * and begins.  What it needs is allocated in a context of its own beneath the
 * current one; the snapshot belongs to the current resource owner.
 * Errors: LG007, 42501, LG004, LG005.
 */
extern EsRead *es_read_begin(const EsReadArgs *args);

/*
 * The same in a view that the caller has opened and keeps open, on a
 * collection whose rights and cursor he has checked: positions only.
 */
extern EsRead *es_read_begin_in(const EsReadArgs *args, const EsView *view);

/* Ends the walk, after which the arguments it began with may go. */
extern void es_read_stop(EsRead *read);

/*
 * Begins again, with other arguments perhaps (of the same function).  The same collection is read in
 * the same view as before, so that one statement sees one state of it.
 */
extern void es_read_restart(EsRead *read, const EsReadArgs *args);

/*
 * The next event, or NULL at the end.  The slot is the reader's and its values
 * are good until the next call.  Attributes 1 to ES_EVENT_NATTS are the event;
 * there may be more.
 */
extern TupleTableSlot *es_read_next(EsRead *read);

/* Closes everything, with the resource owner of es_read_begin. */
extern void es_read_end(EsRead *read);

/*
 * A registered snapshot for what needs no head (streams), newer than which the
 * refreshed collection's list of segments is.  Close it with UnregisterSnapshot.
 */
extern Snapshot es_read_snapshot(EsCollection *coll);

/* Opens a collection for reading: lock, SELECT right. */
extern EsCollection *es_read_open_collection(Oid collection);

/* Argument checks that several functions share. */
extern Oid		  es_read_collection_arg(const NullableDatum *value);
extern int64	  es_read_max_count_arg(const NullableDatum *value);
extern EsPosition es_read_position_arg(const NullableDatum *value, const char *name,
									   EsPosition absent);
extern EsQuery	 *es_read_query_arg(const NullableDatum *types, const NullableDatum *tags,
									const NullableDatum *query);

/* The event in the slot as a datum of the composite type eventstore.event. */
extern Datum es_read_event_datum(TupleTableSlot *slot, TupleDesc event_desc);

/* Installs the planner hook that lets reads stream; from _PG_init. */
extern void es_read_install(void);

#endif /* ES_READ_H */
