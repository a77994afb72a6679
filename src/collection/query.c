/*
 * collection/query.c
 *		Queries: parsing them, and what they match.
 */
#include "postgres.h"

#include "collection/query.h"

#include "catalog/pg_type.h"
#include "collection/event.h"
#include "collection/label_index.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"

/* ---------------------------------------------------------------------------
 * Parsing
 * ------------------------------------------------------------------------- */

static void
report_bad_query(const char *what, const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("\"%s\" is not a query", what), errdetail("%s", detail),
			 errhint("A query is an array of items such as [{\"types\": [\"paid\"], "
					 "\"tags\": [\"order:1\"]}]; [{}] matches every event.")));
}

static text **
parse_list(JsonbValue *list, const char *what, int *n)
{
	JsonbContainer *array;
	text		  **texts;

	*n = 0;
	if (list->type == jbvNull)
		return NULL;
	if (list->type != jbvBinary || !JsonContainerIsArray(list->val.binary.data) ||
		JsonContainerIsScalar(list->val.binary.data))
		report_bad_query(what, "\"types\" and \"tags\" have to be arrays of strings.");
	array = list->val.binary.data;
	texts = palloc(sizeof(text *) * (JsonContainerSize(array) + 1));
	for (int i = 0; i < (int) JsonContainerSize(array); i++)
	{
		JsonbValue *elem = getIthJsonbValueFromContainer(array, i);

		if (elem->type != jbvString)
			report_bad_query(
				what,
				"\"types\" and \"tags\" have to be arrays of strings, without nulls.");
		texts[(*n)++] =
			cstring_to_text_with_len(elem->val.string.val, elem->val.string.len);
	}
	return texts;
}

/* The labels last, so that they stand for the texts as they are. */
static void
complete_item(EsQueryItem *item)
{
	item->type_labels = palloc(sizeof(EsLabel) * (item->ntypes + 1));
	for (int i = 0; i < item->ntypes; i++)
		item->type_labels[i] = es_label_of_type(VARDATA_ANY(item->types[i]),
												VARSIZE_ANY_EXHDR(item->types[i]));
	item->tag_labels = palloc(sizeof(EsLabel) * (item->ntags + 1));
	for (int i = 0; i < item->ntags; i++)
		item->tag_labels[i] =
			es_label_of_tag(VARDATA_ANY(item->tags[i]), VARSIZE_ANY_EXHDR(item->tags[i]));
}

static bool
key_is(const JsonbValue *key, const char *name)
{
	return key->val.string.len == (int) strlen(name) &&
		   memcmp(key->val.string.val, name, key->val.string.len) == 0;
}

static void
parse_item(EsQueryItem *item, JsonbValue *value, const char *what)
{
	JsonbIterator	  *it;
	JsonbIteratorToken token;
	JsonbValue		   part;
	int				   field = 0;

	if (value->type != jbvBinary || !JsonContainerIsObject(value->val.binary.data))
		report_bad_query(what, "Its items have to be objects.");
	memset(item, 0, sizeof(*item));
	it = JsonbIteratorInit(value->val.binary.data);
	while ((token = JsonbIteratorNext(&it, &part, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
		{
			field = key_is(&part, "types") ? 1 : key_is(&part, "tags") ? 2 : 0;
			if (field == 0)
				report_bad_query(
					what, psprintf("An item has the unknown key \"%s\".",
								   pnstrdup(part.val.string.val, part.val.string.len)));
		}
		else if (token == WJB_VALUE && field == 1)
			item->types = parse_list(&part, what, &item->ntypes);
		else if (token == WJB_VALUE && field == 2)
			item->tags = parse_list(&part, what, &item->ntags);
	}
	complete_item(item);
}

static void
complete_query(EsQuery *query)
{
	query->everything = false;
	for (int i = 0; i < query->nitems; i++)
		if (query->items[i].ntypes == 0 && query->items[i].ntags == 0)
			query->everything = true;
}

EsQuery *
es_query_from_jsonb(Jsonb *jsonb, const char *what)
{
	EsQuery *query = palloc0(sizeof(EsQuery));

	if (!JB_ROOT_IS_ARRAY(jsonb) || JB_ROOT_IS_SCALAR(jsonb))
		report_bad_query(what, "It has to be an array of items.");
	if (JB_ROOT_COUNT(jsonb) == 0)
		report_bad_query(what, "It has no items.");
	query->nitems = JB_ROOT_COUNT(jsonb);
	query->items = palloc(sizeof(EsQueryItem) * query->nitems);
	for (int i = 0; i < query->nitems; i++)
		parse_item(&query->items[i], getIthJsonbValueFromContainer(&jsonb->root, i),
				   what);
	complete_query(query);
	return query;
}

static text **
list_from_array(ArrayType *array, const char *what, int *n)
{
	Datum *elems;
	bool  *nulls;
	text **texts;

	if (ARR_NDIM(array) > 1)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("\"%s\" must be a one-dimensional array", what)));
	deconstruct_array(array, TEXTOID, -1, false, TYPALIGN_INT, &elems, &nulls, n);
	texts = palloc(sizeof(text *) * (*n + 1));
	for (int i = 0; i < *n; i++)
	{
		if (nulls[i])
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							errmsg("\"%s\" must not contain nulls", what)));
		texts[i] = DatumGetTextPP(elems[i]);
	}
	return texts;
}

EsQuery *
es_query_from_args(ArrayType *types, ArrayType *tags, Jsonb *jsonb)
{
	EsQuery		*query;
	EsQueryItem *item;

	if (jsonb != NULL)
	{
		if (types != NULL || tags != NULL)
			ereport(
				ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("\"query\" cannot be given together with \"types\" or \"tags\""),
				 errhint("Put them into an item of the query.")));
		return es_query_from_jsonb(jsonb, "query");
	}
	if (types == NULL && tags == NULL)
		return NULL;

	query = palloc0(sizeof(EsQuery));
	item = palloc0(sizeof(EsQueryItem));
	if (types != NULL)
		item->types = list_from_array(types, "types", &item->ntypes);
	if (tags != NULL)
		item->tags = list_from_array(tags, "tags", &item->ntags);
	complete_item(item);
	query->nitems = 1;
	query->items = item;
	complete_query(query);
	return query;
}

/* ---------------------------------------------------------------------------
 * Matching
 * ------------------------------------------------------------------------- */

static bool
has_tag(ArrayType *tags, const text *wanted)
{
	EsTagWalk	walk;
	const char *tag;
	int			length;

	es_tags_begin(&walk, tags);
	while (es_tags_next(&walk, &tag, &length))
		if (length == (int) VARSIZE_ANY_EXHDR(wanted) &&
			memcmp(tag, VARDATA_ANY(wanted), length) == 0)
			return true;
	return false;
}

static bool
item_matches(const EsQueryItem *item, const text *type, ArrayType *tags)
{
	bool match = (item->ntypes == 0);

	for (int i = 0; i < item->ntypes && !match; i++)
		match = es_text_equal(item->types[i], type);
	for (int i = 0; i < item->ntags && match; i++)
		match = has_tag(tags, item->tags[i]);
	return match;
}

bool
es_query_matches(const EsQuery *query, const text *type, ArrayType *tags)
{
	if (query->everything)
		return true;
	for (int i = 0; i < query->nitems; i++)
		if (item_matches(&query->items[i], type, tags))
			return true;
	return false;
}

/* ---------------------------------------------------------------------------
 * Other forms
 * ------------------------------------------------------------------------- */

static void
append_text_array(StringInfo buf, text **texts, int n)
{
	appendStringInfoString(buf, "ARRAY[");
	for (int i = 0; i < n; i++)
		appendStringInfo(buf, "%s%s", i > 0 ? ", " : "",
						 quote_literal_cstr(text_to_cstring(texts[i])));
	appendStringInfoString(buf, "]::pg_catalog.text[]");
}

char *
es_query_to_sql(const EsQuery *query)
{
	StringInfoData buf;

	initStringInfo(&buf);
	appendStringInfoChar(&buf, '(');
	for (int i = 0; i < query->nitems; i++)
	{
		const EsQueryItem *item = &query->items[i];

		appendStringInfo(&buf, "%s(true", i > 0 ? " OR " : "");
		if (item->ntypes > 0)
		{
			appendStringInfoString(&buf, " AND type OPERATOR(pg_catalog.=) ANY (");
			append_text_array(&buf, item->types, item->ntypes);
			appendStringInfoChar(&buf, ')');
		}
		if (item->ntags > 0)
		{
			appendStringInfoString(&buf, " AND tags OPERATOR(pg_catalog.@>) ");
			append_text_array(&buf, item->tags, item->ntags);
		}
		appendStringInfoChar(&buf, ')');
	}
	appendStringInfoChar(&buf, ')');
	return buf.data;
}

void
es_query_to_condition(const EsQuery *query, EsCondition *condition)
{
	EsLabel *word;

	condition->everything = query->everything;
	condition->nitems = query->nitems;
	condition->nwords = 0;
	for (int i = 0; i < query->nitems; i++)
		condition->nwords += 2 + query->items[i].ntypes + query->items[i].ntags;
	condition->words = palloc(sizeof(EsLabel) * condition->nwords);
	word = condition->words;
	for (int i = 0; i < query->nitems; i++)
	{
		const EsQueryItem *item = &query->items[i];

		*word++ = item->ntypes;
		*word++ = item->ntags;
		memcpy(word, item->type_labels, sizeof(EsLabel) * item->ntypes);
		word += item->ntypes;
		memcpy(word, item->tag_labels, sizeof(EsLabel) * item->ntags);
		word += item->ntags;
	}
}
