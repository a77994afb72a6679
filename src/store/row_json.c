/*
 * store/row_json.c
 *		A table's rows as jsonb, as to_jsonb makes them, but faster.
 *
 * to_jsonb looks up the type of the row and of each column for every row, turns
 * numbers into text and back, and sorts the names.  All that depends only on the
 * table is done once here; numbers, booleans and strings go into the jsonb as
 * they are.  Types that have more to them (arrays, composites, json, those that
 * users have made, which may have a cast to json) still go through to_jsonb,
 * each value for itself, so the result is the same.
 *
 * Text of a value depends on settings; the caller has them fixed.  What is made
 * refers to the rows and to memory of the current context.  A cast may run
 * anything, even change the same table again: nothing is kept between calls.
 */
#include "postgres.h"

#include "store/row_json.h"

#include "access/htup_details.h"
#include "access/transam.h"
#include "catalog/pg_type.h"
#include "nodes/makefuncs.h"
#include "utils/builtins.h"
#include "utils/date.h"
#include "utils/fmgroids.h"
#include "utils/json.h"
#include "utils/lsyscache.h"
#include "utils/numeric.h"

typedef enum ColumnKind
{
	COLUMN_BOOL,
	COLUMN_INT2,
	COLUMN_INT4,
	COLUMN_INT8,
	COLUMN_NUMERIC,
	COLUMN_STRING,
	COLUMN_TIME,   /* a date, with or without a time */
	COLUMN_OUTPUT, /* a string by its output function */
	COLUMN_ANY	   /* to_jsonb knows */
} ColumnKind;

/* In the order of their names that jsonb has. */
typedef struct Column
{
	int		   attribute; /* from 0 */
	ColumnKind kind;
	Oid		   type;	 /* below domains */
	FmgrInfo   function; /* of COLUMN_OUTPUT and COLUMN_ANY */
	JsonbPair  pair;	 /* its name, and no value */
} Column;

struct EsRowJson
{
	int	   ncolumns;
	Column columns[FLEXIBLE_ARRAY_MEMBER];
};

/* ---------------------------------------------------------------------------
 * Preparing
 * ------------------------------------------------------------------------- */

Expr *
es_argument_of_type(Oid type)
{
	return (Expr *) makeNullConst(type, -1, InvalidOid);
}

void
es_prepare_any_call(FmgrInfo *function, Oid oid, Oid result, List *args)
{
	fmgr_info_cxt(oid, function, CurrentMemoryContext);
	fmgr_info_set_expr((Node *) makeFuncExpr(oid, result, args, InvalidOid, InvalidOid,
											 COERCE_EXPLICIT_CALL),
					   function);
}

static bool
has_plain_output(Oid type)
{
	return type < FirstGenbkiObjectId && get_typtype(type) == TYPTYPE_BASE &&
		   !OidIsValid(get_element_type(type)) && type != JSONOID && type != JSONBOID &&
		   type != FLOAT4OID && type != FLOAT8OID;
}

static ColumnKind
kind_of(Oid type)
{
	switch (type)
	{
		case BOOLOID:
			return COLUMN_BOOL;
		case INT2OID:
			return COLUMN_INT2;
		case INT4OID:
			return COLUMN_INT4;
		case INT8OID:
			return COLUMN_INT8;
		case NUMERICOID:
			return COLUMN_NUMERIC;
		case TEXTOID:
		case VARCHAROID:
		case BPCHAROID:
			return COLUMN_STRING;
		case DATEOID:
		case TIMESTAMPOID:
		case TIMESTAMPTZOID:
			return COLUMN_TIME;
		default:
			return has_plain_output(type) ? COLUMN_OUTPUT : COLUMN_ANY;
	}
}

static void
prepare_column(Column *column, Form_pg_attribute att)
{
	Oid	 output;
	bool is_varlena;

	column->attribute = att->attnum - 1;
	column->type = getBaseType(att->atttypid);
	column->kind = kind_of(column->type);
	column->pair.key.type = jbvString;
	column->pair.key.val.string.val = pstrdup(NameStr(att->attname));
	column->pair.key.val.string.len = strlen(NameStr(att->attname));
	if (column->kind == COLUMN_OUTPUT)
	{
		getTypeOutputInfo(column->type, &output, &is_varlena);
		fmgr_info_cxt(output, &column->function, CurrentMemoryContext);
	}
	else if (column->kind == COLUMN_ANY)
		es_prepare_any_call(&column->function, F_TO_JSONB, JSONBOID,
							list_make1(es_argument_of_type(att->atttypid)));
}

/* Shorter names first: jsonb's order. */
static int
compare_columns(const void *a, const void *b)
{
	const JsonbValue *left = &((const Column *) a)->pair.key;
	const JsonbValue *right = &((const Column *) b)->pair.key;

	if (left->val.string.len != right->val.string.len)
		return left->val.string.len < right->val.string.len ? -1 : 1;
	return memcmp(left->val.string.val, right->val.string.val, left->val.string.len);
}

EsRowJson *
es_row_json_prepare(TupleDesc desc)
{
	EsRowJson *rows =
		palloc0(offsetof(EsRowJson, columns) + sizeof(Column) * desc->natts);

	for (int i = 0; i < desc->natts; i++)
		if (!TupleDescAttr(desc, i)->attisdropped)
			prepare_column(&rows->columns[rows->ncolumns++], TupleDescAttr(desc, i));
	qsort(rows->columns, rows->ncolumns, sizeof(Column), compare_columns);
	return rows;
}

/* ---------------------------------------------------------------------------
 * A row
 * ------------------------------------------------------------------------- */

static void
set_string(JsonbValue *json, char *bytes, int length)
{
	json->type = jbvString;
	json->val.string.val = bytes;
	json->val.string.len = length;
}

static void
set_number(JsonbValue *json, Numeric number)
{
	json->type = jbvNumeric;
	json->val.numeric = number;
}

static void
set_numeric(JsonbValue *json, Datum value)
{
	Numeric number = DatumGetNumeric(value);
	char   *text;

	if (!numeric_is_nan(number) && !numeric_is_inf(number))
	{
		set_number(json, number);
		return;
	}
	text = DatumGetCString(DirectFunctionCall1(numeric_out, value));
	set_string(json, text, strlen(text));
}

/* As a tree again, which is what it becomes part of. */
static void
set_tree(JsonbValue *json, Jsonb *value)
{
	JsonbParseState	  *state = NULL;
	JsonbValue		  *tree = NULL;
	JsonbIterator	  *it;
	JsonbIteratorToken token;
	JsonbValue		   part;

	if (JB_ROOT_IS_SCALAR(value))
	{
		JsonbExtractScalar(&value->root, json);
		return;
	}
	it = JsonbIteratorInit(&value->root);
	while ((token = JsonbIteratorNext(&it, &part, false)) != WJB_DONE)
		tree = pushJsonbValue(&state, token, token < WJB_BEGIN_ARRAY ? &part : NULL);
	*json = *tree;
}

static void
set_value(JsonbValue *json, Column *column, Datum value)
{
	struct varlena *bytes;
	char		   *text;

	switch (column->kind)
	{
		case COLUMN_BOOL:
			json->type = jbvBool;
			json->val.boolean = DatumGetBool(value);
			break;
		case COLUMN_INT2:
			set_number(json, int64_to_numeric(DatumGetInt16(value)));
			break;
		case COLUMN_INT4:
			set_number(json, int64_to_numeric(DatumGetInt32(value)));
			break;
		case COLUMN_INT8:
			set_number(json, int64_to_numeric(DatumGetInt64(value)));
			break;
		case COLUMN_NUMERIC:
			set_numeric(json, value);
			break;
		case COLUMN_STRING:
			bytes = PG_DETOAST_DATUM_PACKED(value);
			set_string(json, VARDATA_ANY(bytes), VARSIZE_ANY_EXHDR(bytes));
			break;
		case COLUMN_TIME:
			text = JsonEncodeDateTime(NULL, value, column->type, NULL);
			set_string(json, text, strlen(text));
			break;
		case COLUMN_OUTPUT:
			text = OutputFunctionCall(&column->function, value);
			set_string(json, text, strlen(text));
			break;
		case COLUMN_ANY:
			set_tree(json, DatumGetJsonbP(FunctionCall1(&column->function, value)));
			break;
	}
}

static void
set_row(JsonbValue *json, EsRowJson *rows, TupleDesc desc, HeapTuple tuple)
{
	Datum	  *values;
	bool	  *nulls;
	JsonbPair *pairs;

	json->type = jbvNull;
	if (tuple == NULL)
		return;
	values = palloc(sizeof(Datum) * desc->natts);
	nulls = palloc(sizeof(bool) * desc->natts);
	pairs = palloc(sizeof(JsonbPair) * rows->ncolumns);
	heap_deform_tuple(tuple, desc, values, nulls);
	for (int i = 0; i < rows->ncolumns; i++)
	{
		Column *column = &rows->columns[i];

		pairs[i] = column->pair;
		pairs[i].value.type = jbvNull;
		if (!nulls[column->attribute])
			set_value(&pairs[i].value, column, values[column->attribute]);
	}
	json->type = jbvObject;
	json->val.object.nPairs = rows->ncolumns;
	json->val.object.pairs = pairs;
}

Jsonb *
es_row_json_change(EsRowJson *rows, TupleDesc desc, HeapTuple old, HeapTuple new)
{
	JsonbPair  pairs[2];
	JsonbValue change;

	memset(pairs, 0, sizeof(pairs));
	set_string(&pairs[0].key, "new", 3);
	set_string(&pairs[1].key, "old", 3);
	set_row(&pairs[0].value, rows, desc, new);
	set_row(&pairs[1].value, rows, desc, old);
	change.type = jbvObject;
	change.val.object.nPairs = 2;
	change.val.object.pairs = pairs;
	return JsonbValueToJsonb(&change);
}
