/*
 * A changelog topic that the members of a consumer group take turns to write.
 *
 * One partition of the source's topic, of one key. Two members; the group's coordinator gives the
 * partition to one of them at a time, each time in a new generation, without asking the other: who
 * had it may stand still anywhere and go on later. A member restores from the changelog topic,
 * goes on in the source's topic behind what it restored, writes to its own table, and publishes
 * that in a transaction of Kafka: its record is acknowledged; the coordinator takes the offsets, if
 * they come by a membership of the present generation; then it is committed, and else aborted.
 *
 * Proved: for who reads what is committed, the key's values never go back.
 *
 * README.md lists the macros that select a variant, and what each one shows.
 */

#define RECORDS		3
#define MEMBERS		2
#define GENERATIONS	3
#define LOG_SIZE	5
#define NOBODY		9

byte	owner = NOBODY, generation;		/* as the group's coordinator has it */

/* The changelog topic: values are offsets of the source's topic, which only grow. */
byte	log_value[LOG_SIZE];
byte	log_writer[LOG_SIZE];			/* of an open transaction; NOBODY: it is over */
bool	log_aborted[LOG_SIZE];
byte	high;							/* the high watermark */

inline end_of_log()
{
#ifdef END_IS_STABLE
	end = 0;
	do
	:: end < high && log_writer[end] == NOBODY -> end++
	:: else -> break
	od
#else
	end = high
#endif
}

/* To the end, as a reader of what is committed: open transactions are waited for. */
inline restore()
{
	at = 0;
	do
	:: at < end ->
		atomic
		{
			log_writer[at] == NOBODY ->
			if
			:: !log_aborted[at] && log_value[at] > value -> value = log_value[at]
			:: else
			fi;
			at++
		}
	:: at >= end -> break
	od
}

/* What a reader of the committed records has seen last must not be newer than this one. */
inline check_order(mine)
{
	at = 0;
	do
	:: at < high ->
		if
		:: log_writer[at] == NOBODY && !log_aborted[at] ->
			if
			:: at < mine -> assert(log_value[at] <= log_value[mine])
			:: at > mine -> assert(log_value[at] >= log_value[mine])
			:: else
			fi
		:: else
		fi;
		at++
	:: else -> break
	od;
	at = 0
}

inline end_transaction(mine, abort)
{
	log_aborted[mine] = abort;
	log_writer[mine] = NOBODY;
	if
	:: !abort -> check_order(mine)
	:: else
	fi
}

inline put_record()
{
	d_step
	{
		slot = high;
		log_value[slot] = value;
		log_writer[slot] = me;
		high++
	}
}

inline ask_group()
{
#ifdef LATER_MEMBERSHIP
	membership = generation;			/* of the same member, and of another partition */
#endif
#ifdef NO_FENCE
	vouched = true
#else
	vouched = membership == generation
#endif
}

proctype member(byte me)
{
	byte	known;						/* the last generation that it has been told of */
	byte	membership;					/* the one that its transaction is committed by */
	byte	end, at, value, slot;
	bool	vouched;

	do
	:: atomic { owner == me && generation != known -> known = generation; membership = known }
		d_step { end_of_log() }
		restore();
		do								/* as long as nobody has told it better */
		:: high < LOG_SIZE && value < RECORDS ->
			value++;					/* a record of the source's topic, written to the table */
#ifdef OFFSETS_FIRST
			ask_group();
			put_record();
#else
			put_record();
			ask_group();
#endif
			d_step { end_transaction(slot, !vouched) }
			if
			:: !vouched -> break
			:: else
			fi
		:: true -> break
		od
	:: generation == GENERATIONS && (owner != me || known == generation) -> break
	od
}

proctype coordinator()
{
	do
	:: generation < GENERATIONS ->
		atomic
		{
			generation++;
			if
			:: owner = 0
			:: owner = 1
			fi
		}
	:: else -> break
	od
}

init
{
	atomic
	{
		run coordinator();
		run member(0);
		run member(1)
	}
}
