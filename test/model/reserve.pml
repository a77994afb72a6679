/*
 * Positions survive a crash: none is handed out twice.
 *
 * The counter lives in shared memory. What survives is a reservation: a WAL record that says "all
 * up to here may have been used", together with the timeline that wrote it. After a start the
 * counter goes on behind the last reservation that recovery found. Crashes come at any moment, and
 * keep any prefix of the WAL that holds what was flushed. A failover or a restore to an earlier
 * point keeps any prefix at all, and opens a new timeline.
 *
 * Proved: each position is greater than all that were handed out before, over all crashes and all
 * timelines. So none is handed out twice, and a cursor into a timeline that was lost skips nothing.
 *
 * README.md lists the macros that select a variant, and what each one shows.
 */

#define BACKENDS		2
#ifndef RECORDS
#define RECORDS			3			/* reservations written in one run, at most */
#endif
#define BLOCK			2			/* positions in a reservation */
#ifndef CRASHES
#define CRASHES			1
#endif
#ifndef FAILOVERS
#define FAILOVERS		2
#endif
#define JUMP			(BLOCK * RECORDS)	/* no timeline hands out as many; 2^32 in the extension */
#define NOBODY			255

#if defined(NO_JUMP)
#define JUMP_FROM(old)	0
#elif defined(JUMP_ONCE)
#define JUMP_FROM(old)	(timeline != (old) -> JUMP : 0)
#else
#define JUMP_FROM(old)	((timeline - (old)) * JUMP)
#endif

/* Shared memory. */
byte		next;					/* under the allotting lock, with limit */
byte		limit;					/* positions up to here may be handed out */
byte		reserver = NOBODY;		/* the reservation lock: never held while allotting */

/* WAL: record 0 stands for an empty collection. */
byte		upto[RECORDS + 1];		/* what each record reserves */
byte		written_by[RECORDS + 1];	/* its timeline */
byte		inserted, flushed;		/* the last record that is in the WAL, and that is on disk */
byte		timeline = 1;

byte		run_number;				/* one more with each start: backends of earlier runs are dead */
byte		begun;					/* reservations of all runs, a bound on the search */

int			handed_out;				/* bitmap of positions */

inline hand_out()
{
	assert(handed_out < (1 << next));	/* above all that were ever handed out */
	handed_out = handed_out | (1 << next);
	next++
}

inline insert_record()
{
	atomic
	{
		inserted++;
		upto[inserted] = target;
		written_by[inserted] = timeline;
		lsn = inserted
	}
}

inline flush_record()
{
	atomic { flushed = (flushed < lsn -> lsn : flushed) }
}

inline raise_limit()
{
	atomic { limit = (limit < target -> target : limit) }
}

inline choose_target()
{
	next > limit && begun < RECORDS ->
	begun++;
	target = limit + BLOCK
}

inline reserve_block()
{
	insert_record();
#ifdef USE_BEFORE_FLUSH
	raise_limit();
	flush_record()
#else
	flush_record();
	raise_limit()
#endif
}

/* A crash ends it between any two steps; then one of the next run takes its place. */
proctype backend(byte me)
{
	byte	target, lsn, mine;

again:
	{
		do
		:: atomic { next <= limit -> hand_out() }
#ifdef RESERVE_WITHOUT_LOCK
		:: atomic { choose_target() }; reserve_block()
#else
		:: atomic { next > limit && reserver == NOBODY -> reserver = me };
			if
			:: atomic { choose_target() }; reserve_block()
			:: next <= limit			/* somebody was faster */
			:: begun == RECORDS
			fi;
			reserver = NOBODY
#endif
		:: next > limit && begun == RECORDS -> break
		od
	}
	unless
	{
		atomic { run_number != mine -> mine = run_number; target = 0; lsn = 0; goto again }
	}
}

/* The first allotment after a start: behind the reservation, and behind all of the lost timelines. */
inline recover(last)
{
	do
	:: inserted > last -> upto[inserted] = 0; written_by[inserted] = 0; inserted--
	:: else -> break
	od;
	flushed = last;
	limit = upto[last] + JUMP_FROM(written_by[last]);
	next = limit + 1;
	last = 0;
	reserver = NOBODY;
	run_number++
}

init
{
	byte	crashes, failovers, last;

	atomic
	{
		written_by[0] = timeline;
		next = 1;
		run backend(0);
		run backend(1)
	};
	do
	:: atomic
		{
			crashes < CRASHES ->
			crashes++;
			select(last : flushed .. inserted);
			recover(last)
		}
	:: atomic
		{
			failovers < FAILOVERS ->
			failovers++;
			select(last : 0 .. flushed);
			timeline++;
			recover(last)
		}
	:: crashes == CRASHES && failovers == FAILOVERS -> break
	:: break
	od
}
