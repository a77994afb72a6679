/*
 * position/position.h
 *		Positions, and their durable reservation in blocks.
 */
#ifndef ES_POSITION_H
#define ES_POSITION_H

#include "postgres.h"

typedef int64 EsPosition; /* from 1; 0 = before the first */

/* The reservation's granule; a power of two, since the low bits hold the timeline. */
#define ES_POSITION_BLOCK 4096

/* How far the next position jumps for each timeline since the reservation. */
#define ES_POSITION_TIMELINE_JUMP (INT64CONST(1) << 32)

/* What the counter (a sequence) says: see position.c for its encoding. */
typedef struct EsReservation
{
	EsPosition reserved; /* every position up to here may have been used */
	uint32	   timeline; /* the timeline that reserved, modulo ES_POSITION_BLOCK */
	bool	   started;	 /* false: a counter that was never written */
} EsReservation;

/*
 * Reads the counter.  Takes AccessShareLock on it; no rights are checked.
 */
extern EsReservation es_reservation_read(Oid counter);

/* Writes a new counter: nothing is reserved, on this timeline. */
extern void es_reservation_start(Oid counter);

/*
 * Makes it durable that positions up to 'upto' (rounded up to a block) may be
 * used, and returns the rounded value.  The record has been flushed when this
 * returns.  Never lowers the counter, nor undoes the jump that a new timeline
 * asks for.  Two callers have to exclude each other; not with an LWLock held.
 */
extern EsPosition es_reservation_extend(Oid counter, EsPosition upto);

/*
 * The first position that nobody can have used: the one after the reservation,
 * or far beyond it where the timeline is another.  Not in recovery.
 */
extern EsPosition es_reservation_next(const EsReservation *reservation);

#endif /* ES_POSITION_H */
