/*
 * collection/page_fetch.h
 *		The rows of an index scan, fetched a heap page at a time.
 */
#ifndef ES_PAGE_FETCH_H
#define ES_PAGE_FETCH_H

#include "postgres.h"

#include "access/genam.h"
#include "access/sdir.h"
#include "executor/tuptable.h"

typedef struct EsPageFetch EsPageFetch;

/*
 * 'scan' is a started one with an MVCC snapshot; nobody else may move it.
 * Allocates in the current memory context.
 */
extern EsPageFetch *es_page_fetch_begin(IndexScanDesc scan, ScanDirection direction);

/*
 * The next row into 'slot', a slot of the table's own kind; false at the end.
 * The row is good until the next call.
 */
extern bool es_page_fetch_next(EsPageFetch *fetch, TupleTableSlot *slot);

/* Before the scan is ended. */
extern void es_page_fetch_end(EsPageFetch *fetch);

#endif /* ES_PAGE_FETCH_H */
