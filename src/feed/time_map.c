/*
 * feed/time_map.c
 *		When the events of a collection were created, roughly.
 *
 * Time is no order in a collection: whoever wants the oldest events by
 * created_at has to look at all of them.  He need not do so again, though.
 * What lies below a head never changes, so for each run of some thousand
 * events the least and the greatest created_at are facts, and a backend keeps
 * those that it has come across.  Times mostly grow with positions; then a
 * reader by time that knows them reads one run or two for a page of its
 * result, where it would have read everything, each time.
 *
 * Per collection the runs begin after one position and follow each other
 * without a gap, 32 bytes for 4,096 events.  They go when the collection does
 * (the incarnation tells) or when a reader comes that begins further down.
 *
 * What makes the facts final, and so what has to hold where they are learnt:
 * the head is one of this server's own (where events come by logical
 * replication nobody promises their order), and this transaction holds no
 * positions itself (its head passes over rows that its snapshot may not see).
 *
 * No locks, no shared memory.  After an error the map is what it was: a run
 * is added when it is complete.
 */
#include "postgres.h"

#include "feed/time_map.h"

#include "access/xlog.h"
#include "collection/match.h"
#include "miscadmin.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"

/* So many events that a run is found in a millisecond, and few runs are needed. */
#define RUN_EVENTS 4096

typedef struct TimeMap
{
	Oid		   relid; /* hash key */
	int64	   incarnation;
	EsPosition after; /* where the first run begins, exclusive */
	int		   nruns;
	int		   room;
	EsTimeRun *runs;
} TimeMap;

static HTAB			*maps = NULL;
static MemoryContext map_context = NULL;

static TimeMap *
find_map(const EsCollection *coll, bool make)
{
	TimeMap *map;
	bool	 found;

	if (maps == NULL)
	{
		HASHCTL ctl;

		if (!make)
			return NULL;
		map_context = AllocSetContextCreate(TopMemoryContext, "eventstore time maps",
											ALLOCSET_DEFAULT_SIZES);
		ctl.hcxt = map_context;
		ctl.keysize = sizeof(Oid);
		ctl.entrysize = sizeof(TimeMap);
		maps = hash_create("eventstore time maps", 16, &ctl,
						   HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	map = hash_search(maps, &coll->relid, make ? HASH_ENTER : HASH_FIND, &found);
	if (map == NULL)
		return NULL;
	if (!found)
	{
		map->incarnation = coll->head.incarnation;
		map->after = 0;
		map->nruns = 0;
		map->room = 0;
		map->runs = NULL;
	}
	if (map->incarnation != coll->head.incarnation)
	{
		map->incarnation = coll->head.incarnation;
		map->nruns = 0;
	}
	return map;
}

static EsPosition
map_end(const TimeMap *map)
{
	return map->nruns > 0 ? map->runs[map->nruns - 1].last : map->after;
}

int
es_time_map_runs(const EsCollection *coll, const EsTimeRun **runs)
{
	TimeMap *map = find_map(coll, false);

	*runs = map != NULL ? map->runs : NULL;
	return map != NULL ? map->nruns : 0;
}

static void
add_run(TimeMap *map, const EsTimeRun *run)
{
	if (map->nruns == map->room)
	{
		int room = Max(map->room * 2, 64);

		if (map->runs == NULL)
			map->runs = MemoryContextAlloc(map_context, sizeof(EsTimeRun) * room);
		else
			map->runs = repalloc_huge(map->runs, sizeof(EsTimeRun) * (Size) room);
		map->room = room;
	}
	map->runs[map->nruns++] = *run;
}

static void
learn_runs(TimeMap *map, EsCollection *coll, const EsView *view)
{
	EsMatch		   *match = es_match_begin(coll, NULL, map_end(map), view->head + 1,
										   ForwardScanDirection, view->snapshot);
	EsTimeRun		run = {0};
	int				nevents = 0;
	TupleTableSlot *slot;

	while ((slot = es_match_next(match)) != NULL)
	{
		bool	   isnull;
		EsPosition position = DatumGetInt64(slot_getattr(slot, ES_ATT_POSITION, &isnull));
		TimestampTz created_at =
			DatumGetTimestampTz(slot_getattr(slot, ES_ATT_CREATED_AT, &isnull));

		CHECK_FOR_INTERRUPTS();
		if (nevents++ == 0)
		{
			run.first = map_end(map) + 1;
			run.least = created_at;
			run.greatest = created_at;
		}
		run.least = Min(run.least, created_at);
		run.greatest = Max(run.greatest, created_at);
		if (nevents == RUN_EVENTS)
		{
			run.last = position;
			add_run(map, &run);
			nevents = 0;
		}
	}
	es_match_end(match);
}

void
es_time_map_extend(EsCollection *coll, EsPosition after, const EsView *view)
{
	TimeMap *map;

	if (es_head_holding() || (coll->head.head == NULL && !RecoveryInProgress()))
		return;
	map = find_map(coll, true);
	if (after < map->after || after > map_end(map))
	{
		map->nruns = 0;
		map->after = after;
	}
	if (map_end(map) < view->head)
		learn_runs(map, coll, view);
}
