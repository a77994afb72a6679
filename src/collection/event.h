/*
 * collection/event.h
 *		One event on its way in: what the caller gave, checked and completed.
 */
#ifndef ES_EVENT_H
#define ES_EVENT_H

#include "postgres.h"

#include "access/tupdesc.h"
#include "datatype/timestamp.h"
#include "executor/tuptable.h"
#include "position/head.h"
#include "utils/array.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

#define ES_NO_VERSION (-1) /* no version expected: 0 means "no stream" */

typedef struct EsEvent
{
	/* as given; NULL = absent */
	text	   *type;
	ArrayType  *tags; /* never NULL after es_event_check */
	text	   *stream;
	Jsonb	   *data;
	bytea	   *body;
	Jsonb	   *metadata;
	pg_uuid_t	id;
	bool		id_given;
	bool		created_at_given;
	TimestampTz created_at;
	int64		expected_version; /* or ES_NO_VERSION */
	bool		stream_is_new;	  /* of recorded changes: see EsStreamHead.is_new */

	/* as found by the append */
	int		   stream_index; /* into the append's streams; -1 without a stream */
	int64	   version;
	EsPosition position;
} EsEvent;

/* Walks over the elements of a stored tags array without copying. */
typedef struct EsTagWalk
{
	char		*next;
	int			 index;
	int			 count;
	const bits8 *present; /* NULL where there are no nulls, as there should be */
} EsTagWalk;

extern void es_tags_begin(EsTagWalk *walk, ArrayType *tags);
extern bool es_tags_next(EsTagWalk *walk, const char **tag, int *length);

/*
 * Checks what a caller gave and completes it: 23502 for a missing type, 23514
 * for data with body, a null or empty tag; duplicate tags go; an id and a time
 * are made where none was given.
 */
extern void es_event_check(EsEvent *event);

/* The tags without duplicates, in order; 23514 for null or empty ones. */
extern ArrayType *es_event_clean_tags(ArrayType *tags);

/* One object of append_batch's array; 22023 names what is wrong, LG003. */
extern void es_event_from_json(EsEvent *event, JsonbContainer *object, int index);

/* One eventstore.new_event of append_array's array. */
extern void es_event_from_composite(EsEvent *event, Datum composite);

/* Adds the event's labels to the array (room for 1 + number of tags); returns the count. */
extern int es_event_labels(text *type, ArrayType *tags, EsLabel *labels);

/* How many labels the events have, at most. */
extern int es_events_count_labels(const EsEvent *events, int n);

/* Fills the first ES_COLLECTION_NATTS values of a row; the rest become null. */
extern void es_event_values(const EsEvent *event, EsPosition safe, int natts,
							Datum *values, bool *nulls);

/* Of all that has no fixed size. */
extern Size es_event_bytes(const EsEvent *event);

/* CRC-32C over the event's ten fields, as kept in column checksum. */
extern int32 es_event_checksum(const Datum *values, const bool *nulls);

/* Does a stored row's checksum agree with its fields? */
extern bool es_event_verify_slot(TupleTableSlot *slot);

/* Byte for byte; neither is compressed or stored apart. */
extern bool es_text_equal(const text *a, const text *b);

/* The order of text COLLATE "C" and of bytea. */
extern int es_bytes_compare(const struct varlena *a, const struct varlena *b);

/* A UUID of version 7 (RFC 9562): milliseconds, then random bits. */
extern void es_make_uuid_v7(pg_uuid_t *uuid);

#endif /* ES_EVENT_H */
