/*
 * collection/bulk.c
 *		Many new rows of a table that nobody else can be inserting.
 *
 * As COPY writes them: many rows at once, then all their entries, index after
 * index (entries.c).  Where somebody else may be inserting the same keys each row
 * has to be inserted speculatively, which costs four times as much
 * (speculative.c).
 *
 * The caller has seen to it that the keys are not there, and holds a lock that
 * keeps others from inserting them.  The unique index is asked nevertheless: a
 * duplicate is an error and never a second row.
 *
 * A crash in between leaves rows of a transaction that did not commit.
 */
#include "postgres.h"

#include "collection/bulk.h"

#include "access/tableam.h"
#include "access/xact.h"
#include "collection/entries.h"
#include "miscadmin.h"
#include "utils/rel.h"

/* Rows written together: enough to fill many pages, few enough to hold in memory. */
#define BULK_ROWS 1000

struct EsBulk
{
	ResultRelInfo  *rri;
	EState		   *estate;
	TupleDesc		desc;
	int				nslots; /* that have been made */
	int				n;		/* rows that wait */
	TupleTableSlot *slots[BULK_ROWS];
	ItemPointer		places[BULK_ROWS];
};

EsBulk *
es_bulk_begin(ResultRelInfo *rri, EState *estate)
{
	EsBulk *bulk = palloc(sizeof(EsBulk));

	bulk->rri = rri;
	bulk->estate = estate;
	/* A copy is not reference-counted, which a thousand slots would feel. */
	bulk->desc = CreateTupleDescCopy(RelationGetDescr(rri->ri_RelationDesc));
	bulk->nslots = bulk->n = 0;
	return bulk;
}

static void
write_rows(EsBulk *bulk)
{
	Relation rel = bulk->rri->ri_RelationDesc;

	if (bulk->n == 0)
		return;
	CHECK_FOR_INTERRUPTS();
	table_multi_insert(rel, bulk->slots, bulk->n, GetCurrentCommandId(true), 0, NULL);
	es_entries_insert_rows(bulk->rri, bulk->estate, bulk->slots, bulk->n);
	for (int i = 0; i < bulk->n; i++)
	{
		if (bulk->places[i] != NULL)
			*bulk->places[i] = bulk->slots[i]->tts_tid;
		ExecClearTuple(bulk->slots[i]);
	}
	bulk->n = 0;
}

TupleTableSlot *
es_bulk_slot(EsBulk *bulk)
{
	if (bulk->n == BULK_ROWS)
		write_rows(bulk);
	if (bulk->n == bulk->nslots)
		bulk->slots[bulk->nslots++] = MakeSingleTupleTableSlot(
			bulk->desc, table_slot_callbacks(bulk->rri->ri_RelationDesc));
	return bulk->slots[bulk->n];
}

void
es_bulk_add(EsBulk *bulk, ItemPointer place)
{
	bulk->slots[bulk->n]->tts_tableOid = RelationGetRelid(bulk->rri->ri_RelationDesc);
	bulk->places[bulk->n++] = place;
}

void
es_bulk_end(EsBulk *bulk)
{
	write_rows(bulk);
	for (int i = 0; i < bulk->nslots; i++)
		ExecDropSingleTupleTableSlot(bulk->slots[i]);
	FreeTupleDesc(bulk->desc);
	pfree(bulk);
}
