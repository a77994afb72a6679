/*
 * collection/inventory.h
 *		What may be shown of a collection, and to whom.
 */
#ifndef ES_INVENTORY_H
#define ES_INVENTORY_H

#include "postgres.h"

#include "collection/collection.h"

/* Does the collection exist, and may the current user SELECT from it or does he own it? */
extern bool es_may_see(Oid collection);

/* The head as a reader gets it; false where the collection is broken. */
extern bool es_try_head(Oid collection, EsPosition *head);

#endif /* ES_INVENTORY_H */
