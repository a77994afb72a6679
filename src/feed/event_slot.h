/*
 * feed/event_slot.h
 *		A slot that takes its columns from another one when they are asked for.
 */
#ifndef ES_EVENT_SLOT_H
#define ES_EVENT_SLOT_H

#include "postgres.h"

#include "executor/tuptable.h"

extern const TupleTableSlotOps *es_event_slot_ops(void);

/*
 * Shows the first columns of 'event', which must stay as it is for as long as
 * the slot shows it.
 */
extern void es_event_slot_show(TupleTableSlot *slot, TupleTableSlot *event);

#endif /* ES_EVENT_SLOT_H */
