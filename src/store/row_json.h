/*
 * store/row_json.h
 *		A table's rows as jsonb, as to_jsonb makes them.
 */
#ifndef ES_ROW_JSON_H
#define ES_ROW_JSON_H

#include "postgres.h"

#include "access/htup.h"
#include "access/tupdesc.h"
#include "fmgr.h"
#include "nodes/pg_list.h"
#include "nodes/primnodes.h"
#include "utils/jsonb.h"

typedef struct EsRowJson EsRowJson;

/* What can be known before a row is seen; in the current memory context. */
extern EsRowJson *es_row_json_prepare(TupleDesc desc);

/* {"old": row, "new": row}; NULL is null.  The rows are of the same descriptor. */
extern Jsonb *es_row_json_change(EsRowJson *rows, TupleDesc desc, HeapTuple old,
								 HeapTuple new);

/*
 * Makes a function that takes "any" callable with arguments of these types,
 * given as expressions; in the current memory context.
 */
extern void es_prepare_any_call(FmgrInfo *function, Oid oid, Oid result, List *args);

/* Such an argument. */
extern Expr *es_argument_of_type(Oid type);

#endif /* ES_ROW_JSON_H */
