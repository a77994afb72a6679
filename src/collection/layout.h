/*
 * collection/layout.h
 *		What a collection consists of, and making what is missing of it.
 */
#ifndef ES_LAYOUT_H
#define ES_LAYOUT_H

#include "postgres.h"

#include "collection/collection.h"
#include "datatype/timestamp.h"
#include "utils/relcache.h"

#define ES_SEGMENT_SIZE_DEFAULT INT64CONST(1000000)
/* So that sums of a few hundred of them with a position stay far from overflow. */
#define ES_SEGMENT_SIZE_MAX (INT64CONST(1) << 48)
/* A channel is an identifier to LISTEN. */
#define ES_CHANNEL_MAX_BYTES (NAMEDATALEN - 1)
#define ES_NOTIFY_DEFAULT	 "head"

/* The companions of a collection. */
typedef struct EsLayout
{
	Oid heads;
	Oid counter;
} EsLayout;

/* The options with which a collection is registered; 0, NULL = none. */
typedef struct EsOptions
{
	int64		segment_size;
	int64		retain_events;
	Interval   *retain_for;
	int64		retain_bytes;
	const char *notify;
	const char *channel;
} EsOptions;

/*
 * The functions below run ordinary DDL: between SPI_connect and SPI_finish, in
 * the role of the collection's owner, with a locked search_path.
 */

/* Creates the bare table.  42P07 where the name is taken. */
extern Oid es_layout_create_table(Oid schema, const char *name);

/*
 * Makes what the table lacks of a collection: counter, defaults, indexes, heads
 * table, triggers.  'layout' brings the companions that are known already
 * (InvalidOid: look for them) and takes those that are.
 */
extern void es_layout_complete(Oid collection, EsLayout *layout);

/* Writes the catalog row, with a new incarnation.  In any role. */
extern void es_layout_register(Oid collection, const EsLayout *layout,
							   const EsOptions *options, EsPosition first_position);

/* Reads the catalog row, in any role; false where there is none. */
extern bool es_layout_read(Oid collection, EsLayout *layout, EsPosition *first_position);

/* The name of the channel that a collection has by default. */
extern char *es_layout_default_channel(Oid collection);

/* Has the relation the columns of a collection, in their places? */
extern bool es_layout_matches(Relation rel);

/* 55000, naming the first column that is not where C looks for it. */
extern void es_layout_check(Relation rel);

/* 55000 where a heads table has been altered so that C cannot use it. */
extern void es_layout_check_heads(Relation rel);

/* The same check; its primary key, opened. */
extern Relation es_layout_open_heads_index(Relation rel, LOCKMODE mode);

#endif /* ES_LAYOUT_H */
