/*
 * collection/query.h
 *		Queries: which types and tags an event has to have.
 *
 * A query is a list of items; an item matches an event whose type is among its
 * types and whose tags include all of its tags (an empty list: any); a query
 * matches where one of its items does.
 */
#ifndef ES_QUERY_H
#define ES_QUERY_H

#include "postgres.h"

#include "position/head.h"
#include "utils/array.h"
#include "utils/jsonb.h"

typedef struct EsQueryItem
{
	int		 ntypes;
	text   **types;
	EsLabel *type_labels;
	int		 ntags;
	text   **tags;
	EsLabel *tag_labels;
} EsQueryItem;

typedef struct EsQuery
{
	int			 nitems; /* at least one */
	EsQueryItem *items;
	bool		 everything; /* some item has neither types nor tags */
} EsQuery;

/* 22023 with the offending part in the DETAIL; 'what' names the argument. */
extern EsQuery *es_query_from_jsonb(Jsonb *query, const char *what);

/*
 * The arguments types, tags and query of a reading function together; NULL
 * where none is given.  Both a list and a query, null elements: 22023.
 */
extern EsQuery *es_query_from_args(ArrayType *types, ArrayType *tags, Jsonb *query);

/* Does it match?  'tags' as stored: detoasted, one-dimensional, no nulls. */
extern bool es_query_matches(const EsQuery *query, const text *type, ArrayType *tags);

/* A boolean SQL expression over the columns type and tags, for the SPI path. */
extern char *es_query_to_sql(const EsQuery *query);

/* As the registry of intents compares it; palloc'd. */
extern void es_query_to_condition(const EsQuery *query, EsCondition *condition);

#endif /* ES_QUERY_H */
