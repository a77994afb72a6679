/*
 * Watching: nobody sleeps for ever while an event that he waits for can be read.
 *
 * wake.pml shows the two orders on which any wake-up hangs.  This is the rest of
 * position/watch.c: the appender only notes its release, in a ring that the collection has while it
 * is watched, raises a flag and sets the notifier's latch; the notifier goes through the waiters,
 * and wakes the one whose events may lie at or below the head.
 *
 * Positions 1 .. APPENDERS are allotted in any order (each appender takes the next when it starts),
 * and released in any order, by commit or abort. An event matches what the waiter waits for, or it
 * does not; the labels of one that does not may say that it does (a Bloom filter). The waiter waits
 * for such an event at or below the head (read, poll) or, as ON_STREAM, for one that has been
 * committed, whatever the head. He may begin before, between and after the appenders.
 *
 * The ring holds one release, the latest: the second one is a loss.
 *
 * One who sleeps for ever is an invalid end state, provided that there is something to be read:
 * else he may sleep, which his end label tells. (Spin's memory is sequentially consistent. An
 * atomic is a hold of the table's lock, within which the collection's is held, or of the latter.)
 *
 * README.md lists the macros that select a variant, and what each one shows.
 */

#ifndef APPENDERS
#define APPENDERS		2
#endif

#define NOWHERE			9			/* an empty window begins there */
#define BIT(pos)		(1 << (pos))

mtype = { ASLEEP, LOOKING, WOKEN };	/* a waiter's state in the table */

/* The collection's entry. */
byte		next = 1;
byte		inflight;				/* bitmap of positions */
bool		watched;				/* somebody watches: releases are noted */
bool		ring_full;				/* it holds one ... */
byte		ring_pos;				/* ... with this position ... */
bool		ring_may_match;			/* ... and these labels */
byte		ring_next = 1;			/* number of the next release */
byte		lost_last;				/* what the ring has lost lies at or below this */

/* The rows. */
byte		matching;				/* bitmap of committed events that match */

/* The waiter's entry in the table. */
bool		entered;
mtype		state;
byte		seen;					/* releases before this number have been compared */
byte		looked;
byte		from;					/* the window */
byte		to;

/* Processes. */
bool		waiter_latch;
bool		notifier_latch;
bool		flag;
byte		ended;					/* appenders */

#define HEAD \
	((inflight & BIT(1)) -> 0 : ((inflight & BIT(2)) -> 1 : ((inflight & BIT(3)) -> 2 : next - 1)))

#ifdef ON_STREAM
#define READABLE	matching
#else
/* What lies at or below the head. */
#define READABLE	(matching & (BIT(HEAD + 1) - 1))
#endif

/* ---------------------------------------------------------------------------
 * Comparing: with the table's lock
 * ------------------------------------------------------------------------- */

inline widen(first, last)
{
	if
	:: last > looked ->
		from = (from < (first > looked + 1 -> first : looked + 1) -> from :
				(first > looked + 1 -> first : looked + 1));
		to = (to > last -> to : last)
	:: else
	fi
}

/* What he has not been compared with: into the window, or, of a stream, 'moved'. */
inline compare(moved)
{
	if
	:: seen < (ring_full -> ring_next - 1 : ring_next) ->	/* lost, or released before all this */
#ifndef RING_LOSS_IGNORED
		widen(1, lost_last);
		moved = true
#endif
	:: else
	fi;
	if
	:: ring_full && seen < ring_next && ring_may_match ->
		widen(ring_pos, ring_pos);
		moved = true
	:: else
	fi;
	seen = ring_next
}

inline narrow(upto)
{
	looked = (upto > looked -> upto : looked);
	if
	:: to <= looked -> from = NOWHERE; to = 0
	:: else -> from = (from > looked + 1 -> from : looked + 1)
	fi
}

inline is_due(due)
{
	due = false;
	compare(due);
#ifndef ON_STREAM
	due = HEAD >= from
#endif
}

/* ---------------------------------------------------------------------------
 * The processes
 * ------------------------------------------------------------------------- */

inline wake()
{
	state = WOKEN;
	waiter_latch = true
}

inline call_notifier()
{
	if
	:: flag						/* whoever raised it sets the latch */
	:: else -> flag = true; notifier_latch = true
	fi
}

proctype appender()
{
	byte	pos;
	bool	matches;
	bool	may_match;
	bool	call;

	atomic
	{
		pos = next;
		next++;
		inflight = inflight | BIT(pos);
		if
		:: matches = true; may_match = true
		:: may_match = true
		:: skip
		fi
	};

	if
	:: matching = matching | (matches -> BIT(pos) : 0);		/* commit: rows are visible */
		atomic												/* ... and then the release */
		{
			inflight = inflight & ~BIT(pos);
			call = watched;
			if
			:: watched ->
				if
				:: ring_full -> lost_last = (lost_last > ring_pos -> lost_last : ring_pos)
				:: else
				fi;
				ring_full = true;
				ring_pos = pos;
				ring_may_match = may_match;
				ring_next++
			:: else
			fi
		}
	:: !matches && !may_match ->							/* abort: notes nothing, but the head moves */
		atomic
		{
			inflight = inflight & ~BIT(pos);
			call = watched;
#ifdef NO_CALL_AT_ABORT
			call = false
#endif
		}
	fi;
	if
	:: call -> call_notifier()
	:: else
	fi;
	ended++
}

proctype notifier()
{
	bool	due;

end_idle:
	do
	:: notifier_latch ->
		notifier_latch = false;
#ifndef FLAG_CLEARED_AFTER_PASS
		flag = false;
#endif
		atomic
		{
			if
			:: entered && state == ASLEEP ->
				is_due(due);
				if
				:: due -> wake()
				:: else
				fi
			:: else
			fi;
			due = false
		}
#ifdef FLAG_CLEARED_AFTER_PASS
		flag = false
#endif
	od
}

byte	view_head;					/* the head that the look takes first ... */
byte	view_rows;					/* ... and the snapshot that it takes then */

#ifdef ON_STREAM
#define FOUND	(view_rows != 0)
#else
#define FOUND	((view_rows & (BIT(view_head + 1) - 1)) != 0)
#endif

inline look()
{
	view_head = HEAD;
	view_rows = matching
}

inline enter()
{
	atomic								/* es_head_watch */
	{
		watched = true;
#ifdef RING_FROM_ZERO
		ring_next = 0;
#endif
		lost_last = next - 1
	};
	atomic								/* es_watch_begin */
	{
		entered = true;
#ifdef WOKEN_CLEARED_AFTER_LOOK
		state = ASLEEP;
#else
		state = LOOKING;
#endif
		from = NOWHERE;
		looked = view_head;
#ifdef WINDOW_NOT_FILLED
		seen = ring_next
#else
		is_due(due)
#endif
	}
}

proctype waiter()
{
	bool	due;

	look();
	if
	:: FOUND -> goto found
	:: else
	fi;
#ifndef ENTER_AFTER_LOOK
	enter();
#endif
	do
	:: look();
		if
		:: FOUND -> break
		:: else
		fi;
#ifdef ENTER_AFTER_LOOK
		if
		:: !entered -> enter()
		:: else
		fi;
#endif
		atomic							/* es_watch_looked */
		{
#ifdef NARROW_BY_HEAD_NOW
			narrow(HEAD);
#elif !defined(ON_STREAM)
			narrow(view_head);
#endif
			is_due(due);
#ifndef WOKEN_CLEARED_AFTER_LOOK
			due = due || state == WOKEN;
#endif
			state = (due -> LOOKING : ASLEEP);
			if
			:: due -> due = false; goto again
			:: else
			fi
		};
sleep:
		if
		:: waiter_latch
		/* With nothing to read, and nobody left to bring anything, he may. */
		:: ended == APPENDERS && READABLE == 0 -> goto found
		fi;
		waiter_latch = false;			/* ResetLatch */
		if
		:: state == WOKEN -> skip
		:: else -> goto sleep
		fi;
		state = LOOKING;
again:	skip
	od;
found:
	entered = false
}

init
{
	byte	a;

	atomic
	{
		do
		:: a < APPENDERS -> run appender(); a++
		:: else -> break
		od;
		run notifier();
		run waiter()
	}
}
