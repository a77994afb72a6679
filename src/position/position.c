/*
 * position/position.c
 *		The durable reservation of positions.
 *
 * A position that anybody has seen, even a transaction that died, is never
 * handed out again.  Shared memory forgets at a restart, so positions are
 * reserved in blocks, and the record of a reservation is flushed before the
 * first position of the block is used.  What a crash loses is the unused rest
 * of the last reservation: a gap, never a repetition.
 *
 * The record is a sequence beside each collection (OWNED BY its column
 * position), because a sequence is the one ordinary object that is written
 * outside of transactions, WAL-logged, replicated, dumped with its value, and
 * follows its table's owner, schema and drop.
 *
 * Its value holds two things.  Reservations are multiples of
 * ES_POSITION_BLOCK, so the low bits are free, and they keep the timeline on
 * which the reservation was made:
 *
 *		last_value = reserved | (timeline modulo ES_POSITION_BLOCK)
 *
 * After a failover or a point-in-time recovery the replayed reservation may
 * lie below positions that were handed out and lost with the old primary, and
 * a consumer may come back with one of those as its cursor.  So on another
 * timeline the next position jumps far beyond them, by 2^32 for each timeline
 * in between: two servers that were promoted one after the other from the same
 * old reservation do not land on the same positions.  (Two that take the same
 * timeline without knowing of each other would; PostgreSQL's own archive rules
 * forbid that.)
 *
 * A new counter is written at once, with nothing reserved: it must know its
 * timeline.  One that was never called (is_called false) has reserved nothing.
 */
#include "postgres.h"

#include "position/position.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_class.h"
#include "commands/sequence.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "storage/bufpage.h"
#include "utils/fmgrprotos.h"
#include "utils/rel.h"

#define TIMELINE_MASK ((int64) ES_POSITION_BLOCK - 1)

/*
 * Reads the sequence's only row as nextval() does, without its rights: which
 * positions are taken is no secret to whoever may use the collection.
 */
static void
read_counter_row(Relation rel, int64 *last_value, bool *is_called)
{
	Buffer				  buf = ReadBuffer(rel, 0);
	HeapTupleData		  tuple;
	Form_pg_sequence_data seq;
	ItemId				  item;

	LockBuffer(buf, BUFFER_LOCK_SHARE);
	item = PageGetItemId(BufferGetPage(buf), FirstOffsetNumber);
	tuple.t_data = (HeapTupleHeader) PageGetItem(BufferGetPage(buf), item);
	tuple.t_len = ItemIdGetLength(item);
	seq = (Form_pg_sequence_data) GETSTRUCT(&tuple);
	*last_value = seq->last_value;
	*is_called = seq->is_called;
	UnlockReleaseBuffer(buf);
}

EsReservation
es_reservation_read(Oid counter)
{
	Relation	  rel = relation_open(counter, AccessShareLock);
	EsReservation res = {0, 0, false};
	int64		  value;
	bool		  is_called;

	if (rel->rd_rel->relkind != RELKIND_SEQUENCE)
		ereport(ERROR, (errcode(ERRCODE_WRONG_OBJECT_TYPE),
						errmsg("relation \"%s\" is not a sequence",
							   RelationGetRelationName(rel)),
						errdetail("It should be the counter of a collection.")));
	read_counter_row(rel, &value, &is_called);
	relation_close(rel, AccessShareLock);

	res.started = is_called;
	if (is_called)
	{
		res.reserved = value & ~TIMELINE_MASK;
		res.timeline = (uint32) (value & TIMELINE_MASK);
	}
	return res;
}

static int64
current_timeline(void)
{
	return (int64) GetWALInsertionTimeLine() & TIMELINE_MASK;
}

EsPosition
es_reservation_next(const EsReservation *reservation)
{
	int64 timelines;

	if (!reservation->started)
		return 1;
	timelines = (current_timeline() - (int64) reservation->timeline) & TIMELINE_MASK;
	return reservation->reserved + timelines * ES_POSITION_TIMELINE_JUMP + 1;
}

/*
 * setval() writes its record at once, but leaves it to the commit to flush it;
 * here it is flushed by hand, since the positions may be seen (by a reader of
 * their own transaction, who passes them on) before that commit, or without it.
 */
static void
write_counter(Oid counter, int64 value)
{
	Relation rel = relation_open(counter, AccessShareLock);
	Oid		 owner = rel->rd_rel->relowner;
	Oid		 user;
	int		 context;

	relation_close(rel, NoLock);

	/* An appender needs no right on the counter; setval() wants the owner's. */
	GetUserIdAndSecContext(&user, &context);
	SetUserIdAndSecContext(owner, context | SECURITY_LOCAL_USERID_CHANGE);
	DirectFunctionCall3(setval3_oid, ObjectIdGetDatum(counter), Int64GetDatum(value),
						BoolGetDatum(true));
	SetUserIdAndSecContext(user, context);

	XLogFlush(XactLastRecEnd);
}

void
es_reservation_start(Oid counter)
{
	write_counter(counter, current_timeline());
}

EsPosition
es_reservation_extend(Oid counter, EsPosition upto)
{
	EsReservation have = es_reservation_read(counter);
	EsPosition	  reserved;

	Assert(upto > 0);
	reserved =
		(Max(upto, es_reservation_next(&have) - 1) + TIMELINE_MASK) & ~TIMELINE_MASK;
	write_counter(counter, reserved | current_timeline());
	return reserved;
}
