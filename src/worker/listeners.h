/*
 * worker/listeners.h
 *		Does anybody LISTEN to a channel?
 *
 * A channel has a counter, which it may share with others: zero means that
 * nobody listens, anything else that somebody may.  PostgreSQL itself does not
 * tell, and a notification wakes every listener of the database (before
 * PostgreSQL 19), whatever he listens to.
 */
#ifndef ES_LISTENERS_H
#define ES_LISTENERS_H

#include "postgres.h"

/* A counter's number, from 1; 0 in a structure means none. */
typedef int EsChannel;

extern Size es_listeners_shmem_size(void);
extern void es_listeners_shmem_init(void);

/* The hook that sees LISTEN and UNLISTEN; from _PG_init. */
extern void es_listeners_install(void);

/* The counter of a channel of this database. */
extern EsChannel es_listeners_channel(const char *name);

/*
 * May anybody be listening?  Cheap, no error.  Whoever asks after his event can
 * be seen, and is told no, may count on a later listener to find the event.
 */
extern bool es_listeners_any(EsChannel channel);

/* This session is about to LISTEN to the channel; true where surely nobody did so yet. */
extern bool es_listeners_add(const char *name);

/* How many sessions of this database listen to something. */
extern uint32 es_listeners_in_database(void);

/*
 * What collections announce, and where, may have changed: the notifier is to look
 * again.  For commit callbacks, when the change can be seen.
 */
extern void es_listeners_survey(void);

/* Changes whenever a counter of any database does, or with the above. */
extern uint32 es_listeners_generation(void);

#endif /* ES_LISTENERS_H */
