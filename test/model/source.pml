/*
 * A Kafka source: each record has its effect once, and who restores the store from its changelog
 * topic has what the store has.
 *
 * Two workers (one of them a zombie whose end nobody has noticed) read a topic of one key. Each
 * takes a batch from the offset that the table tells, and commits rows and offset in one
 * transaction, which holds only if the offset is where the worker left it; else it reads the table
 * again. Each may crash once, anywhere. Somebody changes the key by SQL. What changes the key is
 * recorded with it, in one transaction; a publisher sends that to the changelog topic, in order,
 * after the commit. With each change goes the offset that the source had come to.
 *
 * Proved: no record is written twice, none is lost; the changelog topic ends with the store's
 * value; and who takes that value and goes on in the source's topic at the greatest offset that
 * came with a change ends with it as well.
 *
 * The last record says what the one before it said: it changes nothing, and is in no change.
 *
 * README.md lists the macros that select a variant, and what each one shows.
 */

#define RECORDS			3
#define BY_SQL			9
#define LOG_SIZE		5

#define RECORD(i)		((i) == 0 -> 1 : 2)

byte		next;					/* the offset in the table */
byte		times[RECORDS];			/* how often each record was written */
byte		value;					/* of the key, in the table */

byte		log_value[LOG_SIZE];	/* the store's changelog */
byte		log_offset[LOG_SIZE];	/* where the source's topic goes on after the change */
bool		log_sent[LOG_SIZE];
byte		logged, published;

byte		topic_value, topic_offset;	/* the changelog topic: last value, greatest offset */

inline record_change(new, offset)
{
	log_value[logged] = new;
	log_offset[logged] = offset;
#ifdef PUBLISH_BEFORE_COMMIT
	log_sent[logged] = new != BY_SQL;
#endif
	logged++
}

inline write_rows()
{
	i = from;
	do
	:: i < upto ->
		times[i]++;
		assert(times[i] == 1);			/* once */
		if
		:: value != RECORD(i) ->
			value = RECORD(i);
			record_change(value, i + 1)
		:: else
		fi;
		i++
	:: else -> break
	od
}

inline publish_batch()
{
#ifdef PUBLISH_BEFORE_COMMIT
	topic_value = RECORD(upto - 1);
	topic_offset = (topic_offset > upto -> topic_offset : upto)
#else
	skip
#endif
}

inline may_crash()
{
	if
	:: !crashed -> crashed = true; goto start
	:: true
	fi
}

proctype worker()
{
	byte	written, from, upto, i;
	bool	crashed, again;

start:
	written = next;
	do
	:: written >= RECORDS -> break
	:: else ->
		from = written;
		if
		:: upto = written + 1
		:: written + 2 <= RECORDS -> upto = written + 2
		fi;
#ifdef NO_DROP
		if								/* handed out once more after a reconnect */
		:: from > 0 && !again -> from--; again = true
		:: true
		fi;
#endif
		publish_batch();
		may_crash();
#if defined(OFFSET_FIRST)
		atomic { if :: next == written -> next = upto :: else -> goto start fi }
		may_crash();
		atomic { write_rows() }
#elif defined(ROWS_FIRST)
		atomic { if :: next == written -> write_rows() :: else -> goto start fi }
		may_crash();
		next = upto;
#elif defined(NO_COMPARE)
		atomic { write_rows(); next = upto }
#else
		atomic { if :: next == written -> write_rows(); next = upto :: else -> goto start fi }
#endif
		written = upto
	od
}

proctype by_sql()
{
	atomic
	{
		value = BY_SQL;
#ifdef NO_PROGRESS
		record_change(BY_SQL, 0)
#else
		record_change(BY_SQL, next)
#endif
	}
}

proctype publisher()
{
	do
	:: atomic
		{
			published < logged ->
			if
			:: !log_sent[published] ->
				topic_value = log_value[published];
				topic_offset = (topic_offset > log_offset[published] -> topic_offset : log_offset[published])
			:: else
			fi;
			published++
		}
	:: atomic { _nr_pr == 2 && published == logged -> break }	/* init and we are left */
	od
}

init
{
	byte	i, restored;

	atomic
	{
		run publisher();
		run worker();
		run worker();
		run by_sql()
	}
	_nr_pr == 1 ->
	d_step
	{
		assert(next == RECORDS);
		i = 0;
		do
		:: i < RECORDS -> assert(times[i] == 1); i++		/* none lost */
		:: else -> break
		od;
		assert(topic_value == value);
		restored = topic_value;
		i = topic_offset;
		do
		:: i < RECORDS -> restored = RECORD(i); i++
		:: else -> break
		od;
		assert(restored == value)
	}
}
