/*
 * The head: no reader ever skips an event.
 *
 * Appenders take positions from one counter and commit in any order. A reader keeps a cursor
 * (`after`) and moves it up to the head. Proved here, over every interleaving of two appenders,
 * one maker of segments and one reader:
 *
 *   - an event at or below the cursor has been returned, or will never be committed;
 *   - no event is returned twice;
 *   - the head never goes back;
 *   - once all appenders are done, the next full read has everything (the head is not stuck).
 *
 * One `atomic` or `d_step` is one critical section under the collection's lock, or one indivisible
 * act of PostgreSQL (a snapshot, leaving the ProcArray, one look into the invalidation queue).
 * Everything between two of them may be interleaved.
 *
 * README.md lists the macros that select a variant, and what each one shows.
 */

#ifndef APPENDERS
#define APPENDERS		2
#endif
#ifndef POSITIONS
#define POSITIONS		3			/* handed out in all */
#endif
#define SEGMENT_SIZE	2			/* positions in a segment */
#define SEGMENTS		((POSITIONS + SEGMENT_SIZE - 1) / SEGMENT_SIZE)
#define TRANSACTION_EVENTS 2		/* at most, in one transaction */

#ifdef RELEASE_BEFORE_INVAL
#define SELF_ATTACH					/* meaningless where appenders attach nothing */
#endif
#if defined(OWN_SAME_COMMAND) || defined(OWN_CURSOR_LEAKS)
#define OWN_APPEND
#endif

#define BIT(p)			(1 << ((p) - 1))
#define UP_TO(p)		((1 << (p)) - 1)
#define SEGMENT_OF(p)	(((p) - 1) / SEGMENT_SIZE + 1)
#define READER			APPENDERS	/* the reader's own slot, for OWN_APPEND */
#define NOBODY			255

/* Shared memory, under the collection's lock. */
byte		next = 1;				/* the position to hand out next */
byte		inflight[APPENDERS + 1];	/* first position of each open transaction, 0 if none */
byte		ready = 1;				/* positions of segments 1..ready may be allotted */

/* What a new snapshot, a new catalog snapshot and the invalidation queue hold. */
byte		visible;				/* bitmap of committed events */
byte		attached = 1;			/* segments whose maker has committed */
byte		announced = 1;			/* segments whose invalidations were sent */
byte		unlocked = 1;			/* segments whose maker has released its locks */

/* The lock that ATTACH PARTITION takes on the parent, for SELF_ATTACH. */
byte		attacher = NOBODY;

/* The reader's cursor, and what it has returned. */
byte		after;
byte		returned;

byte		finished;				/* appenders that are done */

#ifdef LOSS_ONLY					/* to see that a variant loses events, not only its head's way back */
#define HEAD_GROWS(h)		true
#else
#define HEAD_GROWS(h)		((h) >= greatest_head)
#endif
#define NO_EVENT_SKIPPED	((visible & UP_TO(after) & ~returned) == 0)

/* head = the lowest in-flight position - 1, or next - 1; `except` leaves out one's own slot */
inline read_head(h, except)
{
	d_step
	{
		h = next - 1;
		i = 0;
		do
		:: i <= APPENDERS ->
			if
			:: i != except && inflight[i] != 0 && inflight[i] - 1 < h -> h = inflight[i] - 1
			:: else
			fi;
			i++
		:: else -> break
		od;
		i = 0
	}
}

/* May the next position be allotted? Only in a segment that is fit for it. */
#if defined(SEGMENT_FROM_CATALOG)
#define SEGMENT_IS_READY	(SEGMENT_OF(next) <= attached)	/* seen in pg_inherits */
#elif defined(SEGMENT_BY_LOCK)
#define SEGMENT_IS_READY	(SEGMENT_OF(next) <= unlocked)	/* seen there, and then locked */
#else
#define SEGMENT_IS_READY	(SEGMENT_OF(next) <= ready)		/* said by its maker */
#endif

#ifdef SELF_ATTACH					/* the segment is there, or is the transaction's own, or can be */
#define MAY_ALLOT	(SEGMENT_IS_READY || attacher == me || attacher == NOBODY)
#else
#define MAY_ALLOT	SEGMENT_IS_READY
#endif

inline take_position()
{
	pos = next;
	next++
}

inline register_position(slot)
{
	if
	:: inflight[slot] == 0 -> inflight[slot] = pos
	:: else							/* the first position of the transaction stands */
	fi
}

inline release(slot)
{
	inflight[slot] = 0
}

inline become_visible()
{
	atomic
	{
		visible = visible | rows;
#ifdef SELF_ATTACH
		if
		:: attacher == me -> attached = ready + 1
		:: else
		fi;
#endif
		assert(NO_EVENT_SKIPPED)
	}
}

/* CommitTransaction, in its order. */
inline commit()
{
#ifdef RELEASE_BEFORE_VISIBLE
	release(me);
#endif
	become_visible();				/* ProcArrayEndTransaction */
#ifdef RELEASE_BEFORE_INVAL
	release(me);					/* XACT_EVENT_COMMIT */
#endif
#ifdef SELF_ATTACH
	if
	:: attacher == me ->
		announced = attached;		/* AtEOXact_Inval */
		attacher = NOBODY			/* ResourceOwnerRelease, LOCKS */
	:: else
	fi;
#endif
	release(me)						/* ResourceOwnerRelease, AFTER_LOCKS */
#ifdef SELF_ATTACH
	;
	ready = announced				/* CommitTransactionCommand has returned */
#endif
}

/* AbortTransaction: its rows are never visible, its positions are gaps, its segment is gone. */
inline abort()
{
#ifdef SELF_ATTACH
	if
	:: attacher == me -> attacher = NOBODY
	:: else
	fi;
#endif
	release(me)
}

proctype appender(byte me)
{
	byte	pos, rows, events;

	do
	:: next > POSITIONS && events == 0 -> break

	/* Allot and register: one step, under one lock. */
	:: atomic
		{
			next <= POSITIONS && events < TRANSACTION_EVENTS && MAY_ALLOT ->
#ifdef SELF_ATTACH
			if
			:: SEGMENT_IS_READY
			:: else -> attacher = me
			fi;
#endif
			events++;
			take_position();
#ifndef ALLOT_THEN_REGISTER
			register_position(me)
#endif
		};
#ifdef ALLOT_THEN_REGISTER
		atomic { register_position(me) };
#endif
		if
		:: rows = rows | BIT(pos)
		:: skip						/* rolled back to a savepoint: a gap */
		fi

	:: events > 0 ->
		if
		:: commit()
		:: abort()
		fi;
		d_step { rows = 0; events = 0; pos = 0 }
	od;
	finished++
}

/* Makes each segment ahead of need, in a transaction that appends nothing. */
proctype segment_maker()
{
	do
	:: attached < SEGMENTS ->
		attached++;					/* ProcArrayEndTransaction */
#ifdef SEGMENT_TOO_EARLY
		ready = attached;
#endif
		announced = attached;		/* AtEOXact_Inval */
		unlocked = attached;		/* ResourceOwnerRelease, LOCKS */
		ready = attached			/* CommitTransactionCommand has returned */
	:: else -> break
	od
}

/* AcceptInvalidationMessages: a list of segments that was announced stale is built again. */
inline accept_invalidations()
{
	d_step
	{
		if
		:: announced > list -> list = attached
		:: else
		fi
	}
}

#ifdef OWN_SAME_COMMAND
#define OWN_ROWS	0				/* written by the running command: its snapshot does not show them */
#else
#define OWN_ROWS	mine
#endif

inline take_snapshot()
{
	seen = visible | OWN_ROWS
}

/* The rows of the snapshot that are due, in the segments of the list: all, or a page of one. */
inline fetch_rows()
{
	got = seen & UP_TO(head) & ~UP_TO(after) & UP_TO(list * SEGMENT_SIZE);
	assert((got & returned) == 0);
	last = after;
	pos = after + 1;
	do
	:: pos <= head && !(page_full && last > after) ->
		if
		:: got & BIT(pos) -> last = pos
		:: else
		fi;
		pos++
	:: else -> break
	od;
	got = (page_full -> got & UP_TO(last) : got);
	page_full = page_full && last > after;
	pos = 0
}

/*
 * A page that is full says nothing about what lies above its last event. Otherwise all up to the
 * head is read: the reading function's own head, or, for a caller who cannot see that one, what
 * head() had returned in the statement before.
 */
inline move_cursor()
{
	if
#ifndef HEAD_AFTER_FULL_PAGE
	:: page_full -> after = last
	:: !page_full -> after = head
	:: !page_full -> after = (last > early_head -> last : early_head)
#else
	:: after = (last > early_head -> last : early_head)
#endif
	fi;
	returned = returned | got
}

proctype reader()
{
	byte	i, pos, head, early_head, greatest_head, seen, got, last, mine;
	byte	list = 1;				/* cached long ago, in a transaction that holds its locks still */
	bool	page_full, quiet;
	byte	me = READER, rows;

	do
	:: quiet = (finished == APPENDERS);

#ifdef OWN_APPEND
		/* The reader's transaction may append first; its own position does not hold it back. */
		if
		:: atomic
			{
				next <= POSITIONS && SEGMENT_IS_READY ->
				take_position();
				register_position(READER);
				mine = BIT(pos);
				pos = 0
			}
		:: skip
		fi;
#endif
		read_head(early_head, READER);	/* head(), a statement of its own */
		assert(HEAD_GROWS(early_head));
		greatest_head = early_head;

#if defined(SNAPSHOT_BEFORE_HEAD)
		take_snapshot();
		read_head(head, READER);
		accept_invalidations();
#elif defined(STALE_SEGMENTS)
		accept_invalidations();
		read_head(head, READER);
		take_snapshot();
#else
		read_head(head, READER);
		accept_invalidations();
		take_snapshot();
#endif
		assert(HEAD_GROWS(head));
		greatest_head = head;

		/* The rest hangs on what was taken so far, and on the cursor, which is nobody else's. */
#ifdef OWN_CURSOR_LEAKS
		/* ... unless another connection goes on with it, one that does not see this one's row. */
		atomic
		{
			fetch_rows();
			got = got & ~mine;
			move_cursor();
			assert(NO_EVENT_SKIPPED);
			got = 0
		};
#endif
		if
		:: atomic
			{
				if
				:: page_full = false
				:: page_full = true		/* max_count => 1 */
				fi;
				fetch_rows();
				move_cursor();
				/* the cursor moves in the transaction that reads, as poll() without a lease does */
				rows = mine;
				become_visible()
			}
#ifdef OWN_APPEND
		:: mine != 0 -> skip			/* rolled back: the cursor stays, the position is a gap */
#endif
		fi;
		atomic
		{
			release(READER);
			if
			:: quiet && !page_full ->
#ifndef OWN_APPEND
				assert(after == next - 1 && returned == visible);
#endif
				break
			:: else
			fi;
			head = 0; early_head = 0; seen = 0; got = 0; last = 0; mine = 0; rows = 0; page_full = false
		}
	od
}

init
{
	byte	a;

	atomic
	{
		do
		:: a < APPENDERS -> run appender(a); a++
		:: else -> break
		od;
#ifndef SELF_ATTACH
		run segment_maker();
#endif
		run reader()
	}
}
