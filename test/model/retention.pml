/*
 * Retention: a reader that is too late is told so (LG005); it never skips what was dropped.
 *
 * truncate_before moves the first kept position, in a transaction. A worker sees that and drops
 * the segments below, under a lock on the parent that no reader's lock goes with. A reader, whose
 * snapshot may be taken now (READ COMMITTED) or is older than everything (REPEATABLE READ),
 * compares its cursor with the first kept position and reads all above its cursor.
 *
 * Proved: a reader that raises no error returns every event above its cursor. For that it locks
 * the parent first, and after that looks for the first kept position in a new snapshot, whatever
 * snapshot it reads the rows in.
 *
 * README.md lists the macros that select a variant, and what each one shows.
 */

#define READERS			2
#define POSITIONS		4
#define SEGMENT_SIZE	2			/* two segments; the first one goes */
#define UP_TO(p)		((1 << (p)) - 1)

byte		first_kept = 1;			/* in a new snapshot */
bool		dropped;				/* the first segment */
byte		parent_locks;			/* readers that hold AccessShare on the parent */

proctype worker()
{
	first_kept = SEGMENT_SIZE + 1;	/* truncate_before has committed */
	atomic { parent_locks == 0 -> dropped = true }
}

inline lock_parent()
{
	atomic { parent_locks++ }
}

inline find_first_kept()
{
#ifdef KEPT_IN_OLD_SNAPSHOT
	kept = (repeatable_read -> old_kept : first_kept)
#else
	kept = first_kept
#endif
}

proctype reader(byte after; bool repeatable_read)
{
	byte	kept, old_kept, got;

	old_kept = first_kept;			/* what the transaction's snapshot shows */

#if defined(KEPT_BEFORE_LOCK)
	find_first_kept();
	lock_parent();
#elif defined(NO_PARENT_LOCK)
	find_first_kept();
#else
	lock_parent();					/* accepts invalidations: the list of segments is fresh */
	find_first_kept();
#endif
	if
	:: after < kept - 1				/* LG005 */
	:: else ->
		atomic
		{
			got = (dropped -> UP_TO(POSITIONS) & ~UP_TO(SEGMENT_SIZE) : UP_TO(POSITIONS));
			got = got & ~UP_TO(after);
			assert(got == (UP_TO(POSITIONS) & ~UP_TO(after)))	/* none skipped */
		}
	fi;
#ifndef NO_PARENT_LOCK
	atomic { parent_locks-- }
#endif
}

init
{
	byte	r, after;

	atomic
	{
		do
		:: r < READERS ->
			select(after : 0 .. POSITIONS - 1);
			if
			:: run reader(after, true)
			:: run reader(after, false)
			fi;
			r++
		:: else -> break
		od;
		run worker()
	}
}
