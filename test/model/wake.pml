/*
 * Waking: nobody sleeps on while the head is above what he waits for.
 *
 * A transaction that ends, by commit or by abort, releases its position, which may move the head
 * far: others above it may have committed long ago. Then, if anybody waits, it sets the latch of
 * the waiter (a backend in wait_for, or the notifier). The waiter first says that it waits, and
 * then, each time round: resets its latch, looks at the head, sleeps.
 *
 * Proved: whatever the interleaving, the waiter ends. One that sleeps for ever is an invalid end
 * state. (Spin's memory is sequentially consistent: where the code leaves the lock, a full barrier
 * has to stand between the release and the look at `waiting`, and between the two of the waiter.)
 *
 * README.md lists the macros that select a variant, and what each one shows.
 */

#define APPENDERS		2

byte		inflight[APPENDERS];	/* positions 1 and 2 are allotted */
bool		waiting;				/* the waiter has said that it waits */
bool		latch;

#define HEAD	(inflight[0] == 0 && inflight[1] == 0 -> 2 : (inflight[0] == 1 || inflight[1] == 1 -> 0 : 1))

inline wake()
{
	if
	:: waiting -> latch = true
	:: else
	fi
}

proctype appender(byte me)
{
	bool	wanted;

	if
	:: skip;							/* commit */
#ifdef WAKE_BEFORE_RELEASE
		wake();						/* XACT_EVENT_COMMIT */
		inflight[me] = 0			/* ResourceOwnerRelease, AFTER_LOCKS */
#elif defined(LOOK_BEFORE_RELEASE)
		wanted = waiting;
		inflight[me] = 0;
		if
		:: wanted -> latch = true
		:: else
		fi
#else
		inflight[me] = 0;
		wake()
#endif
	:: skip;							/* abort */
		inflight[me] = 0;
#ifndef NO_WAKE_AT_ABORT
		wake()
#endif
	fi
}

proctype waiter(byte after)
{
#ifndef LOOK_BEFORE_WAITING
	waiting = true;
#endif
	do
#ifdef RESET_AFTER_LOOK
	:: HEAD > after -> break
	:: HEAD <= after ->
		latch = false;
#else
	:: latch = false;				/* ResetLatch */
		if
		:: HEAD > after -> break
		:: else
		fi;
#ifdef LOOK_BEFORE_WAITING
		waiting = true;
#endif
#endif
		latch						/* WaitLatch */
	od;
	waiting = false
}

init
{
	byte	after;

	atomic
	{
		inflight[0] = 1;
		inflight[1] = 2;
		run appender(0);
		run appender(1);
		select(after : 0 .. 1);
		run waiter(after)
	}
}
