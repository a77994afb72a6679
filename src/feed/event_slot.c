/*
 * feed/event_slot.c
 *		A slot that takes its columns from another one when they are asked for.
 *
 * The rows of a segment have more columns than an event (checksum, safe_head,
 * the user's own), so a scan node cannot hand out the segment's slot itself.
 * Copying all columns beforehand means to take every row apart, whether or not
 * anybody looks into it.  So this is a virtual slot, but for who fills it, and
 * when: getsomeattrs, and all that needs the row as a whole.
 */
#include "postgres.h"

#include "feed/event_slot.h"

#include "compat.h"

typedef struct EventSlot
{
	VirtualTupleTableSlot base;
	TupleTableSlot		 *event;
} EventSlot;

static TupleTableSlotOps event_slot_ops;

static void
get_columns(TupleTableSlot *slot, int natts)
{
	TupleTableSlot *event = ((EventSlot *) slot)->event;
	int				have = slot->tts_nvalid;

	slot_getsomeattrs(event, natts);
	memcpy(slot->tts_values + have, event->tts_values + have,
		   sizeof(Datum) * (natts - have));
	memcpy(slot->tts_isnull + have, event->tts_isnull + have,
		   sizeof(bool) * (natts - have));
	slot->tts_nvalid = natts;
}

static void
materialize(TupleTableSlot *slot)
{
	slot_getallattrs(slot);
	TTSOpsVirtual.materialize(slot);
}

static HeapTuple
copy_heap_tuple(TupleTableSlot *slot)
{
	slot_getallattrs(slot);
	return TTSOpsVirtual.copy_heap_tuple(slot);
}

static MinimalTuple
copy_minimal_tuple(ES_COPY_MINIMAL_ARGS(TupleTableSlot *slot))
{
	slot_getallattrs(slot);
	return TTSOpsVirtual.copy_minimal_tuple(ES_COPY_MINIMAL_PASS(slot));
}

const TupleTableSlotOps *
es_event_slot_ops(void)
{
	if (event_slot_ops.base_slot_size == 0)
	{
		event_slot_ops = TTSOpsVirtual;
		event_slot_ops.base_slot_size = sizeof(EventSlot);
		event_slot_ops.getsomeattrs = get_columns;
		event_slot_ops.materialize = materialize;
		event_slot_ops.copy_heap_tuple = copy_heap_tuple;
		event_slot_ops.copy_minimal_tuple = copy_minimal_tuple;
	}
	return &event_slot_ops;
}

void
es_event_slot_show(TupleTableSlot *slot, TupleTableSlot *event)
{
	Assert(TTS_EMPTY(slot));
	((EventSlot *) slot)->event = event;
	slot->tts_flags &= ~TTS_FLAG_EMPTY;
	Assert(slot->tts_nvalid == 0);
}
