/*
 * collection/append.h
 *		Appending: the functions, and INSERT and COPY through a default and a
 *		trigger.
 */
#ifndef ES_APPEND_H
#define ES_APPEND_H

#include "postgres.h"

#include "collection/collection.h"
#include "collection/event.h"
#include "collection/query.h"

struct EsStreamHead;

/*
 * One call of an append function.
 *
 * 'recording' is for who records changes of something else (a store): he acts
 * for the collection, so neither the caller's rights nor row-level security are
 * asked, and a changelog takes his events as it takes no others.  'settle' runs
 * when the streams are locked and sees how they stand; it may change times and
 * leave events out (from events and nevents), also all of them.
 */
typedef struct EsAppend
{
	EsCollection *coll;
	int			  nevents;
	EsEvent		 *events;			/* as given; completed by es_append_run */
	int64		  expected_version; /* or ES_NO_VERSION */
	EsQuery		 *fail_if;			/* or NULL */
	bool		  after_given;
	EsPosition	  after;
	bool		  recording;
	void (*settle)(struct EsAppend *append, const struct EsStreamHead *streams);
	void *settle_arg;
} EsAppend;

/*
 * Appends the events and fills in position, version and id of each; those of
 * the first append where this one is recognised as its repetition.  The caller
 * has opened the collection with RowExclusiveLock.
 * Errors: as design.md section 4 says for append.
 */
extern void es_append_run(EsAppend *append);

/* Rows of INSERT and COPY, and of the append functions' general way (insert.c). */
extern void es_insert_expect(const EsCollection *coll, const EsEvent *event,
							 EsPosition safe);

/* What is expected beyond the mark is expected no longer (an outer statement's is). */
extern int	es_insert_mark(void);
extern void es_insert_forget_from(int mark);

/*
 * The lowest position that this backend has handed out to a row that is not
 * written yet: whoever reads in between (a trigger of the user's) must not be
 * led past it.  PG_INT64_MAX where there is none.
 */
extern EsPosition es_insert_lowest_pending(const EsCollection *coll);

/* Hooks for what only the executor knows; from _PG_init. */
extern void es_append_install_hooks(void);

#endif /* ES_APPEND_H */
