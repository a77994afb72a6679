/*
 * collection/label_index.h
 *		The index of types and tags: a B-tree of (label, position).
 *
 * An index access method of our own, eventstore_labels, on (tags, type,
 * position): each event has an entry for its type and one for each distinct
 * tag, and each entry is an ordinary B-tree tuple of (upper half of the label,
 * lower half, position) that points at the event's row.  See label_index.c.
 */
#ifndef ES_LABEL_INDEX_H
#define ES_LABEL_INDEX_H

#include "postgres.h"

#include "access/sdir.h"
#include "collection/event.h"
#include "executor/tuptable.h"
#include "position/head.h"
#include "storage/itemptr.h"
#include "utils/relcache.h"
#include "utils/snapshot.h"

typedef struct EsLabelScan EsLabelScan;

/* The label of a type or a tag. */
extern EsLabel es_label_of_type(const char *type, int length);
extern EsLabel es_label_of_tag(const char *tag, int length);

/* The label of a stream: never 0, and not in the index. */
extern EsLabel es_label_of_stream(const text *stream);

/* Sorts them, and drops those that are there already; returns how many are left. */
extern int es_labels_sort(EsLabel *labels, int n);

/* The access method; InvalidOid where it is missing. */
extern Oid es_label_index_am(void);

/* The OID of a segment's label index, usable and valid; InvalidOid. */
extern Oid es_label_index_of(Relation segment);

/* The entries of many events, whose rows are written. */
extern void es_label_index_insert(Relation index, Relation heap, const EsEvent *events,
								  TupleTableSlot **slots, int n);

/* Has the index an entry for every row that this transaction may see? */
extern bool es_index_is_complete(Relation index);

/*
 * A scan over the entries of one label with positions in [first, last], in
 * the direction given.  Entries of dead rows come too.  A null position (in a
 * table that is no collection) counts as the greatest bigint; walking backward
 * 'last' has to be less than that.  'segment' may be NULL where no row will be
 * fetched.
 */
extern EsLabelScan *es_label_scan_begin(Relation segment, Relation index, EsLabel label,
										EsPosition first, EsPosition last,
										ScanDirection direction, Snapshot snapshot);

/*
 * Moves to the next entry whose position is at or beyond 'at' (forward: >=,
 * backward: <=); false at the end.  Steps over near entries and descends the
 * tree anew for far ones.  May stay where it is when that entry fits already.
 */
extern bool es_label_scan_seek(EsLabelScan *scan, EsPosition at, EsPosition *found);

/* Moves one entry on from where the scan is. */
extern bool es_label_scan_next(EsLabelScan *scan, EsPosition *found);

/* The row that the current entry points at. */
extern ItemPointer es_label_scan_tid(EsLabelScan *scan);

/* Fetches the row of the current entry; false where the snapshot does not see it. */
extern bool es_label_scan_fetch(EsLabelScan *scan, TupleTableSlot *slot);

extern void es_label_scan_end(EsLabelScan *scan);

#endif /* ES_LABEL_INDEX_H */
