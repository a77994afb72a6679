/*
 * position/head.h
 *		The head of a collection: shared memory that knows which positions are
 *		in flight, who may append what beside whom, and the next position.
 *
 * The design, with its invariants and locks, is at the top of head.c.
 */
#ifndef ES_HEAD_H
#define ES_HEAD_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "position/position.h"
#include "worker/listeners.h"

typedef struct EsHead EsHead; /* in shared memory; opaque */

/* A 64-bit hash of a type or a tag (collection/label_index.h makes them). */
typedef uint64 EsLabel;

/*
 * A backend's handle.  The shared entry is type-stable memory that may be
 * recycled after a drop, so every call checks that it is still this one.
 */
typedef struct EsHeadRef
{
	EsHead	 *head; /* NULL = not looked up yet */
	Oid		  relid;
	int64	  incarnation;
	EsChannel channel; /* of its notifications; 0 = there are none */
} EsHeadRef;

/* What the entry is made from when no backend has used it since the start. */
typedef struct EsHeadOrigin
{
	Oid		   counter;	  /* the sequence with the reservation */
	EsPosition ready_end; /* the end (exclusive) of the last segment */
	EsPosition
		last_present; /* the highest position in the table, dead rows included; 0 */
	SubTransactionId created_in; /* where this transaction made the table; else invalid */
} EsHeadOrigin;

/*
 * A condition as the registry compares it: items one after the other, each
 * { number of types, number of tags, type labels..., tag labels... }.
 */
typedef struct EsCondition
{
	int		 nitems;
	int		 nwords;
	EsLabel *words;
	bool	 everything; /* matches whatever is appended */
} EsCondition;

/* What an append announces before it may have a position. */
typedef struct EsIntent
{
	const EsLabel	  *labels; /* of the types and tags of its events, any order */
	int				   nlabels;
	const EsCondition *condition; /* fail_if, or NULL */
	const EsLabel *streams; /* labels of its events' streams: for who waits for them */
	int			   nstreams;
} EsIntent;

typedef struct EsAllotment
{
	EsPosition first; /* the first of n consecutive positions */
	EsPosition safe;  /* the head at that moment: noted in each event */
	int64	   left;  /* positions beyond them that are ready */
} EsAllotment;

typedef enum EsHeadStat
{
	ES_STAT_APPENDS, /* append calls and rows of INSERT, COPY */
	ES_STAT_EVENTS,
	ES_STAT_VERSION_CONFLICTS,
	ES_STAT_CONDITION_FAILURES,
	ES_STAT_RETRIES,	   /* recognised as already appended */
	ES_STAT_INTENT_WAITS,  /* waited for another append's condition or event */
	ES_STAT_SEGMENT_WAITS, /* waited for a segment */
	ES_STAT_READS,
	ES_STAT_EVENTS_READ,
	ES_STAT_LATE_WAKEUPS, /* waiters that found something which nobody woke them for */
	ES_STAT_COUNT
} EsHeadStat;

/* One open appending transaction, for the view holders. */
typedef struct EsHolder
{
	Oid			  relid;
	int			  pid;
	TransactionId xid;
	TimestampTz	  since; /* when it took its first position */
	EsPosition	  first; /* which holds the head at first - 1 */
} EsHolder;

extern Size es_head_shmem_size(void);
extern void es_head_shmem_init(void);

/* At server start: has the entries of a database go with it. */
extern void es_head_install(void);

/* Registers the transaction callbacks; once per backend, cheap to call again. */
extern void es_head_attach(void);

/* Finds the shared entry; false where no backend has made it yet. */
extern bool es_head_find(EsHeadRef *ref);

/* Finds or makes it.  Not in recovery. */
extern void es_head_make(EsHeadRef *ref, const EsHeadOrigin *origin);

/*
 * The head that this transaction is shown: its own open positions do not hold
 * it back (unless 'others_view').  Never goes back for the same viewer, except
 * when a transaction ends that saw its own events above another's.
 */
extern EsPosition es_head_read(const EsHeadRef *ref, bool others_view);

/* next - 1: after a restart, the last one reserved. */
extern EsPosition es_head_last_allotted(const EsHeadRef *ref);

/* False until a position has been allotted since the server started. */
extern bool es_head_in_use(const EsHeadRef *ref);

/* The same without a lock: false may be out of date. */
extern bool es_head_seems_used(const EsHeadRef *ref);

/*
 * Raises the next position of an entry that nobody has taken or is taking one
 * from, to what its counter was read to say; else nothing.
 */
extern void es_head_renew(const EsHeadRef *ref, EsPosition next);

/* The end (exclusive) of the segments that may be filled; raising and reading. */
extern EsPosition es_head_ready_end(const EsHeadRef *ref);
extern void		  es_head_set_ready_end(const EsHeadRef *ref, EsPosition end);

/*
 * Takes back what a subtransaction that aborts has published for a collection
 * of its own transaction, which nobody else can have used.  Raises no error.
 */
extern void es_head_lower_ready_end(const EsHeadRef *ref, EsPosition end);

/* How far appenders that wait for a segment want to get (exclusive); 0 = none wait. */
extern EsPosition es_head_wanted_end(const EsHeadRef *ref);
extern void		  es_head_want_end(const EsHeadRef *ref, EsPosition end);

/*
 * Makes the intent known and waits until no other open transaction's intent
 * stands against it.  Held to the end of the transaction (a condition: to the
 * end of the subtransaction, where that aborts).  Assigns an xid.
 * Errors: deadlock (40P01), cancel.
 */
extern void es_head_register(const EsHeadRef *ref, const EsIntent *intent);

/*
 * Takes n consecutive positions and registers them as in flight, in one step.
 * 'conditional' notes them as the last of a conditional append.  False, with
 * nothing spent, where they do not fit below the ready end.
 */
extern bool es_head_allot(const EsHeadRef *ref, int64 n, bool conditional,
						  EsAllotment *allotment);

/* The last position taken by a conditional append since the start; 0 = none. */
extern EsPosition es_head_last_conditional(const EsHeadRef *ref);

/* True where this transaction has appended to the collection, or announced to. */
extern bool es_head_joined(Oid relid);

/* True while this transaction has positions in flight in any collection. */
extern bool es_head_holding(void);

/* At the commit of a drop: the entry is free again. */
extern void es_head_forget_at_commit(Oid relid);

/* --- for who waits (watch.c) and who announces (feed/notifier.c) --- */

struct EsReleases;

/*
 * Counts one more, or one less, session that watches: as long as there are any,
 * releases are noted, and the notifier is called.  es_head_watch says false where
 * the entry is gone (and may be out of memory); es_head_unwatch raises no error.
 */
extern bool es_head_watch(const EsHeadRef *ref);
extern void es_head_unwatch(const EsHeadRef *ref);

/* The head and the releases noted; false where the entry is gone.  No error. */
extern bool es_head_glance(const EsHeadRef *ref, EsPosition *head,
						   struct EsReleases *releases);

/* The head that was announced last, and how many events were committed since. */
typedef struct EsAnnounced
{
	EsPosition head;
	uint64	   events; /* those above the head count too, so it is a guide */
} EsAnnounced;

extern void es_head_announced(const EsHeadRef *ref, EsAnnounced *announced);

/* Announced up to here, and that many of those events are told. */
extern void es_head_set_announced(const EsHeadRef *ref, const EsAnnounced *announced);

/*
 * Where it is announced now.  Transactions that were open when the option changed
 * know the old channel only.  No error.
 */
extern void es_head_set_channel(const EsHeadRef *ref, EsChannel channel);

extern void	  es_head_count(const EsHeadRef *ref, EsHeadStat stat, uint64 n);
extern uint64 es_head_stat(const EsHeadRef *ref, EsHeadStat stat);

/* All open transactions with positions in this database; palloc'd. */
extern int es_head_holders(EsHolder **holders);

#endif /* ES_HEAD_H */
