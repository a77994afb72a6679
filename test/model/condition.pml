/*
 * Conditional appends: an append with `fail_if` decides on the whole log.
 *
 * Every transaction of this model makes up to CALLS appends. Each is plain (append without
 * `fail_if`: the locks first, the position second), a row of INSERT or COPY (the position first,
 * from the column's default; the locks second, in the trigger) or conditional. Labels stand for
 * types and tags: an event carries a set of them, a condition matches an event that shares one.
 * `after` is 0 in all calls, the hardest case. Proved here:
 *
 *   - the log never holds a committed conditional append and, below its position, a committed
 *     event that its condition matches, whenever either of the two commits. Two conditional
 *     appends of which each one's event matches the other's condition therefore never both
 *     commit: one of the two has the greater position;
 *   - transactions of one call never deadlock (an invalid end state; checked where CALLS is 1).
 *     In those of several calls PostgreSQL's deadlock detector ends one of them: here whoever
 *     waits may also give up.
 *
 * The registry of a collection is under one lock; each `atomic` that touches `labels` or
 * `condition` is one critical section under it.
 *
 * README.md lists the macros that select a variant, and what each one shows.
 */

#ifndef TRANSACTIONS
#define TRANSACTIONS	3
#endif
#ifndef CALLS
#define CALLS			1
#endif
#define POSITIONS		8			/* no fewer than can be handed out: a call allots twice at most */
#ifndef SEGMENT_SIZE
#define SEGMENT_SIZE	1			/* positions in the first segment; the second has the rest */
#endif
#ifndef LABEL_SETS
#define LABEL_SETS		2			/* {1} and {2}; 3 adds {1, 2} */
#endif

/* Calls by number: plain appends, rows of INSERT or COPY, conditional appends; all sets of labels. */
#define CALL_KINDS		(2 * LABEL_SETS + LABEL_SETS * LABEL_SETS)
#define IS_PLAIN(c)		((c) < LABEL_SETS)
#define IS_ROW(c)		((c) >= LABEL_SETS && (c) < 2 * LABEL_SETS)
#define IS_CONDITIONAL(c)	((c) >= 2 * LABEL_SETS)
#define EVENT(c)		((c) % LABEL_SETS + 1)
#define QUERY(c)		(IS_CONDITIONAL(c) -> (c) / LABEL_SETS - 1 : 0)

#define BIT(p)			(1 << ((p) - 1))
#define SET(t)			(1 << (t))

/* The registry: what each open transaction has appended or is about to, and what it forbids. */
byte		labels[TRANSACTIONS];
byte		condition[TRANSACTIONS];

/* The collection's counter, under its own lock. */
byte		next = 1;
byte		last_conditional;		/* the position that a conditional append was allotted last */

byte		segments = 1;			/* made, and their invalidations sent */

byte		visible;				/* bitmap of events that a new snapshot shows */
byte		ended;					/* bitmap of transactions that have left the ProcArray */

/* The log. `promise` is the condition under which the event was appended, 0 if none. */
byte		label[POSITIONS + 1];
byte		promise[POSITIONS + 1];

/* No committed promise is broken by a committed event below it. */
inline check_promises()
{
	i = 2;
	do
	:: i <= POSITIONS ->
		if
		:: promise[i] != 0 && (visible & BIT(i)) ->
			j = 1;
			do
			:: j < i -> assert(!(visible & BIT(j)) || (label[j] & promise[i]) == 0); j++
			:: else -> break
			od
		:: else
		fi;
		i++
	:: else -> break
	od;
	i = 0;
	j = 0
}

/*
 * Looks for the other transactions of which an announced condition matches this call's event
 * (blockers), and of which a registered label matches its condition (holders). A condition that an
 * earlier event of this transaction matches already is no blocker: it found that event in the
 * registry, and waits for this transaction's end.
 */
inline look_into_registry()
{
	blockers = 0;
	holders = 0;
	i = 0;
	do
	:: i < TRANSACTIONS ->
		blockers = (i != me && (condition[i] & event) && !(condition[i] & labels[me]) ->
					blockers | SET(i) : blockers);
		holders = (i != me && (labels[i] & query) -> holders | SET(i) : holders);
		i++
	:: else -> break
	od;
	i = 0
}

#ifdef QUEUED						/* never tries again: registers, then waits for who came before */
#define MAY_REGISTER	true
#else
#define MAY_REGISTER	(blockers == 0)
#endif

#ifdef ANNOUNCE_AFTER_CHECK
#define ANNOUNCED		0
#else
#define ANNOUNCED		query
#endif

/*
 * Registers the labels of this call's event, and announces its condition if it has one; the
 * transactions that it then has to wait for are in `holders`. While a condition is in its way, it
 * waits unregistered until one of those has ended, and tries again. XactLockTableWait returns once
 * the other is visible to new snapshots; that one's entries may stay a moment longer.
 */
inline register_call()
{
	do
	:: atomic
		{
			look_into_registry();
			if
			:: MAY_REGISTER ->
				holders = holders | blockers;
				blockers = 0;
				labels[me] = labels[me] | event;
				condition[me] = condition[me] | ANNOUNCED;
				break
			:: else -> holders = 0
			fi
		};
		if
		:: atomic { (blockers & ended) != 0 -> blockers = 0 }
#if CALLS > 1
		:: atomic { (blockers & ~ended) != 0 -> goto abort }
#endif
		fi
	od
}

inline wait_for_holders()
{
	if
	:: atomic { (holders & ~ended) == 0 -> holders = 0 }
#if CALLS > 1
	:: atomic { (holders & ~ended) != 0 -> goto abort }
#endif
	fi
}

inline allot()
{
	(next <= SEGMENT_SIZE || segments > 1) ->
	pos = next;
	next++;
	last_conditional = (query != 0 -> pos : last_conditional)
}

/* Nobody sees it before the end, so it may as well be written in the step that gives its position. */
inline write_row()
{
	label[pos] = event;
	promise[pos] = query;
	rows = rows | BIT(pos);
	pos = 0
}

/* The trigger, its locks held: a position below the last conditional append's is given up. */
inline allot_again_if_overtaken()
{
	if
	:: last_conditional > pos -> allot()
	:: else
	fi
}

inline take_snapshot()
{
	seen = visible | rows
}

inline accept_invalidations()
{
	list = segments
}

/* LG002, if an event in the snapshot and in a segment of the list matches */
inline check_rows()
{
	atomic
	{
		i = 1;
		do
		:: i < next && (i <= SEGMENT_SIZE || list > 1) ->
			if
			:: (seen & BIT(i)) && (label[i] & query) -> i = 0; goto abort
			:: else
			fi;
			i++
		:: else -> break
		od;
		i = 0;
		seen = 0
	}
}

inline append_conditionally()
{
#ifdef STALE_SEGMENTS
	accept_invalidations();
#endif
	register_call();
#if defined(CHECK_BEFORE_WAIT)
	accept_invalidations();
	take_snapshot();
	check_rows();
	wait_for_holders();
#elif defined(SNAPSHOT_BEFORE_WAIT)
	take_snapshot();
	wait_for_holders();
	accept_invalidations();
	check_rows();
#else
	wait_for_holders();
#ifndef STALE_SEGMENTS
	accept_invalidations();
#endif
	take_snapshot();
	check_rows();
#endif
#ifdef ANNOUNCE_AFTER_CHECK
	atomic { condition[me] = condition[me] | query };
#endif
	atomic { allot(); write_row() }
}

inline append_plainly()
{
	register_call();
	wait_for_holders();				/* none, unless QUEUED */
	atomic { allot(); write_row() }
}

inline insert_row()
{
	atomic { allot() };				/* the default */
#ifdef REALLOT_BEFORE_REGISTER
	atomic { allot_again_if_overtaken() };
#endif
	register_call();				/* the trigger */
	wait_for_holders();				/* none, unless QUEUED */
	atomic
	{
#if !defined(NO_REALLOT) && !defined(REALLOT_BEFORE_REGISTER)
		allot_again_if_overtaken();
#endif
		write_row()
	}
}

inline leave_registry()
{
	d_step { labels[me] = 0; condition[me] = 0 }
}

inline become_visible()
{
	visible = visible | rows;
	ended = ended | SET(me);
	check_promises()
}

proctype transaction(byte me; byte call)
{
	byte	calls, event, query, pos, rows, holders, blockers, seen, i, j;
	byte	list = 1;				/* of segments, cached long ago */

	do
	:: calls < CALLS ->
		atomic
		{
			calls++;
			if
			:: calls > 1 -> select(call : 0 .. CALL_KINDS - 1); list = 1
			:: else
			fi;
			event = EVENT(call);
			query = QUERY(call)
		};
		if
		:: IS_PLAIN(call) -> append_plainly()
		:: IS_ROW(call) -> insert_row()
		:: IS_CONDITIONAL(call) -> append_conditionally()
		fi

	:: calls > 0 -> goto abort

#ifdef UNREGISTER_BEFORE_VISIBLE
	:: calls > 0 ->
		leave_registry();
		atomic { become_visible(); break }
#else
	:: atomic { calls > 0 -> become_visible(); break }	/* ProcArrayEndTransaction */
#endif
	od;
	goto done;

abort:
	atomic
	{
		ended = ended | SET(me);
		call = 0; event = 0; query = 0; pos = 0; rows = 0; holders = 0; blockers = 0; seen = 0
	};
done:
	leave_registry()				/* ResourceOwnerRelease, AFTER_LOCKS */
}

/* The second segment, made at any moment by a transaction of its own. */
proctype segment_maker()
{
	segments = 2
}

init
{
	byte	t, call;

	atomic
	{
		/* The transactions are alike, so their first calls may as well ascend. */
		do
		:: t < TRANSACTIONS ->
			select(call : call .. CALL_KINDS - 1);
			run transaction(t, call);
			t++
		:: else -> break
		od;
		t = 0; call = 0;
#if SEGMENT_SIZE < POSITIONS
		run segment_maker()
#endif
	}
}
