/*
 * The head that travels with the data: for readers whose snapshot is older than the head in shared
 * memory (REPEATABLE READ and above) or who have no shared memory to ask (a hot standby).
 *
 * Each event notes the head of the moment of its allotment, and in quiet times a worker commits
 * ticks, rows that note the head alone. A reader takes its snapshot first; the greatest head noted
 * in what that snapshot shows is a head that is valid for it: all at or below was visible when the
 * note was made. The rows of the reader's own transaction say nothing about its snapshot.
 *
 * The reader is on the primary, in a transaction whose snapshot may be of any age and which may
 * append before it reads, or on a standby, which replays commits in the order of their WAL
 * records. That order is not always the one in which they became visible on the primary.
 * Proved for both: no event is skipped, none is returned twice, the head never goes back, and
 * once all is quiet and a tick has come, the next read has everything.
 *
 * README.md lists the macros that select a variant, and what each one shows.
 */

#define APPENDERS		2
#ifdef SEGMENTS_APART
#define ON_STANDBY
#endif
#ifndef POSITIONS
#define POSITIONS		2
#endif
#ifndef SEGMENT_SIZE
#define SEGMENT_SIZE	1
#endif
#ifndef TICKS
#define TICKS			1			/* committed in all */
#endif
#define SEGMENTS		((POSITIONS + SEGMENT_SIZE - 1) / SEGMENT_SIZE)
#define READER			APPENDERS	/* the reader's own slot */
#define PRIMARY			0
#define STANDBY			1
#ifdef ON_STANDBY
#define SERVER			STANDBY		/* where the reader is */
#define SEND(what, value)	wal[LANE_OF(value, what)] ! what, value
#else
#define SERVER			PRIMARY
#define SEND(what, value)	skip
#endif

#define BIT(p)			(1 << ((p) - 1))
#define UP_TO(p)		((1 << (p)) - 1)
#define SEGMENT_OF(p)	(((p) - 1) / SEGMENT_SIZE + 1)

/* Shared memory of the primary, under the collection's lock. */
byte		next = 1;
byte		inflight[APPENDERS + 1];
byte		ready = 1;

/* The rows. */
byte		noted[POSITIONS + 1];	/* the head that each event notes */

/* What a new snapshot, a new catalog snapshot and the invalidation queue hold, on each server. */
byte		visible[2];				/* bitmap of committed events */
byte		tick[2];				/* the newest committed tick */
byte		attached[2];			/* segments */
byte		announced[2];

/* WAL: commit records on their way to the standby. */
#define EVENTS			0			/* kinds of records */
#define TICK			1
#define SEGMENT			2
#ifdef SEGMENTS_APART
#define LANES			2			/* a subscriber copies each segment by a worker of its own */
#define LANE_OF(value, what)	((what) == EVENTS && (value) > UP_TO(SEGMENT_SIZE) -> 1 : 0)
#else
#define LANES			1
#define LANE_OF(value, what)	0
#endif
chan		wal[LANES] = [2 * POSITIONS + SEGMENTS] of { byte, byte };

byte		after;
byte		returned;
byte		committed;				/* events with a commit record, on their way or replayed */
byte		finished;				/* appenders that are done */
byte		ticks;

inline read_head(h)
{
	h = next - 1;
	i = 0;
	do
	:: i <= APPENDERS ->
		if
		:: inflight[i] != 0 && inflight[i] - 1 < h -> h = inflight[i] - 1
		:: else
		fi;
		i++
	:: else -> break
	od;
	i = 0
}

/* Allot, register, and note the head: one step, under one lock. */
inline allot(slot)
{
	pos = next;
	next++;
	inflight[slot] = pos;
#ifdef NOTE_POSITION
	noted[pos] = pos - 1;
#else
	read_head(noted[pos]);
#endif
	rows = BIT(pos);
	pos = 0
}

#ifdef LOSS_ONLY					/* to see that a variant loses events, not only its head's way back */
#define HEAD_GROWS			true
#else
#define HEAD_GROWS			(head >= greatest_head)
#endif
#define NO_EVENT_SKIPPED	((committed & UP_TO(after) & ~returned) == 0)

/* Its cursor, if it has one, moves in the same transaction: see the reader. */
inline commit(slot)
{
	/* RecordTransactionCommit */
	atomic
	{
		SEND(EVENTS, rows);
		committed = committed | rows;
		assert(NO_EVENT_SKIPPED)
	};
#ifndef ON_STANDBY
	visible[PRIMARY] = visible[PRIMARY] | rows;	/* ProcArrayEndTransaction */
#endif
	atomic { inflight[slot] = 0; rows = 0 }	/* ResourceOwnerRelease, AFTER_LOCKS */
}

proctype appender(byte me)
{
	byte	i, pos, rows;

	do
	:: atomic { next <= POSITIONS && SEGMENT_OF(next) <= ready -> allot(me) };
		if
		:: commit(me)
		:: inflight[me] = 0			/* abort: a gap */
		fi
	:: next > POSITIONS -> break
	od;
	finished++
}

proctype segment_maker()
{
	do
	:: ready < SEGMENTS ->
		atomic { SEND(SEGMENT, 0); attached[PRIMARY]++ };
		announced[PRIMARY] = attached[PRIMARY];
		ready = attached[PRIMARY]
	:: else -> break
	od
}

proctype ticker()
{
	byte	i, head;

	do
	:: ticks < TICKS ->
		atomic { read_head(head) };
		atomic
		{
			if
			:: head > tick[PRIMARY] -> SEND(TICK, head); tick[PRIMARY] = head; ticks++
			:: else
			fi;
			head = 0
		}
	:: else -> break
	od
}

/* Recovery on the standby: visible first, then the invalidations, as on the primary. */
proctype replay(byte lane)
{
	byte	what;

end:
	do
	:: atomic { wal[lane] ? EVENTS, what -> visible[STANDBY] = visible[STANDBY] | what; what = 0 }
	:: atomic { wal[lane] ? TICK, what -> tick[STANDBY] = what; what = 0 }
	:: atomic { wal[lane] ? SEGMENT, what -> attached[STANDBY]++ };
		announced[STANDBY] = attached[STANDBY]
	od
}

inline accept_invalidations()
{
	list = (announced[SERVER] > list -> attached[SERVER] : list)
}

/* The greatest head noted in the tick and in the events that the snapshot and the list show. */
inline find_head()
{
	d_step
	{
		head = seen_tick;
		i = 1;
		do
		:: i <= POSITIONS && i <= list * SEGMENT_SIZE ->
			if
#ifdef OWN_ROWS_COUNT
			:: ((seen | rows) & BIT(i)) && noted[i] > head -> head = noted[i]
#else
			:: (seen & BIT(i)) && noted[i] > head -> head = noted[i]
#endif
			:: else
			fi;
			i++
		:: else -> break
		od;
		i = 0
	}
}

proctype reader()
{
	byte	i, pos, rows, head, greatest_head, seen, seen_tick, got;
	byte	list = 1;				/* of segments, cached long ago */
	bool	quiet;

	do
	:: quiet = (finished == APPENDERS && tick[SERVER] == next - 1 && SEGMENTS == announced[SERVER]
				&& visible[SERVER] == committed);
#ifdef STALE_SEGMENTS
		atomic { accept_invalidations() };
#endif
		d_step { seen = visible[SERVER]; seen_tick = tick[SERVER] };
		atomic
		{
			if
			:: skip
#ifndef ON_STANDBY
			:: next <= POSITIONS && SEGMENT_OF(next) <= ready -> allot(READER)
#endif
			fi;
			find_head();
			assert(HEAD_GROWS);
			greatest_head = head
		};
#ifndef STALE_SEGMENTS
		atomic { accept_invalidations() };
#endif
		atomic
		{
			got = seen & UP_TO(head) & ~UP_TO(after) & UP_TO(list * SEGMENT_SIZE);
			assert((got & returned) == 0);
			returned = returned | got;
			after = (head > after -> head : after);
			assert(NO_EVENT_SKIPPED);
			head = 0; seen = 0; seen_tick = 0; got = 0
		};
#ifndef ON_STANDBY
		if
		:: rows != 0 -> commit(READER)
		:: atomic { inflight[READER] = 0; rows = 0 }
		fi;
#endif
		if
		:: quiet && next > POSITIONS -> assert(after == next - 1 && returned == committed); break
		:: else
		fi
	od
}

init
{
	byte	lane;

	atomic
	{
		attached[PRIMARY] = 1;
		attached[STANDBY] = 1;
		announced[PRIMARY] = 1;
		announced[STANDBY] = 1;
		run appender(0);
		run appender(1);
		run segment_maker();
		run ticker();
		run reader();
#ifdef ON_STANDBY
		do
		:: lane < LANES -> run replay(lane); lane++
		:: else -> break
		od
#endif
	}
}
