/*
 * collection/ddl.h
 *		Creating collections, for who makes something of which one is a part.
 */
#ifndef ES_DDL_H
#define ES_DDL_H

#include "postgres.h"

/*
 * Where a new "name" or "schema.name" goes: there, or to the first schema of
 * the search_path; the name in it.  'kind' is for the errors: 22023, 3F000,
 * 42501, 0A000 for a temporary schema.
 */
extern Oid es_creation_schema(text *name, const char *kind, char **relname);

/*
 * A collection with the default options; between SPI_connect and SPI_finish, in
 * the role of its owner to be, with a locked search_path.  42P07.
 */
extern Oid es_create_changelog(Oid schema, const char *name);

/* Its first segments; after SPI_finish, in the caller's role. */
extern void es_make_ready_to_append(Oid collection);

#endif /* ES_DDL_H */
