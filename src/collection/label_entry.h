/*
 * collection/label_entry.h
 *		What a tuple of the label index holds; for label_index.c and label_scan.c.
 */
#ifndef ES_LABEL_ENTRY_H
#define ES_LABEL_ENTRY_H

#include "postgres.h"

#include "access/itup.h"
#include "position/head.h"

/* The index's columns, as declared and as stored (label_index.sql). */
#define ES_LABEL_ATT_TAGS	  1 /* text[], stored: upper half of the label */
#define ES_LABEL_ATT_TYPE	  2 /* text, stored: lower half of the label */
#define ES_LABEL_ATT_POSITION 3 /* bigint, stored as it is */
#define ES_LABEL_NATTS		  3

/* Nulls sort last, so this is how a null position reads. */
#define ES_LABEL_NULL_POSITION PG_INT64_MAX

/*
 * The data of a stored tuple.  A null position (in a table that is no
 * collection) is left out at the end.
 */
typedef struct EsLabelEntry
{
	int32 high;
	int32 low;
	int64 position;
} EsLabelEntry;

/* B-tree order is by signed halves, so that is how they are compared everywhere. */
static inline int32
es_label_high(EsLabel label)
{
	return (int32) (label >> 32);
}

static inline int32
es_label_low(EsLabel label)
{
	return (int32) (label & 0xFFFFFFFF);
}

static inline const EsLabelEntry *
es_label_entry(const IndexTupleData *itup)
{
	return (const EsLabelEntry *) ((const char *) itup +
								   IndexInfoFindDataOffset(itup->t_info));
}

static inline int64
es_label_entry_position(const IndexTupleData *itup)
{
	if (itup->t_info & INDEX_NULL_MASK)
		return ES_LABEL_NULL_POSITION;
	return es_label_entry(itup)->position;
}

#endif /* ES_LABEL_ENTRY_H */
