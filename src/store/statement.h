/*
 * store/statement.h
 *		When the events of a statement are appended: at its end.
 */
#ifndef ES_STATEMENT_H
#define ES_STATEMENT_H

#include "postgres.h"

#include "collection/event.h"

/* Takes a copy of the event (type, stream, tags and data of it). */
extern void es_statement_add(Oid changelog, const EsEvent *event);

/* The trigger function whose tables are those that are recorded. */
extern void es_statement_learn_trigger(Oid function);

/* Hooks; from _PG_init. */
extern void es_statement_install(void);

#endif /* ES_STATEMENT_H */
