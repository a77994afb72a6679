/*
 * feed/stream_walk.c
 *		The events of one stream in the order of their versions.
 *
 *	1.	The heads table has one row per stream: its last version and the
 *		positions of its first and last event.  No row, no stream.
 *	2.	Order of versions is order of positions, so only the segments between
 *		those two positions are of interest, and each is walked by its index on
 *		(stream, version), one after the other.  A stream of ten events opens
 *		one segment, most of the time.
 *		Where only the last event is asked for, its position is known and the
 *		primary key leads to it.
 *		A collection with no more than two segments in use is not worth the
 *		question: its segments are walked at once (find_all_segments).
 *	3.	A version to start from lies in one segment, found by bisection: the
 *		last version in a segment says whether to look at older or newer ones.
 *		Segments without an event of the stream cost a probe each.
 *
 * All of it in one snapshot, in which the heads row and the events agree, since
 * they were written by the same transactions.  The segments were listed after
 * the snapshot was taken (es_read_snapshot): there may be newer ones than it
 * knows of, and they hold nothing for it.
 *
 * A segment that is missing, or that retention drops in the middle of a walk, is
 * 55000; events that were dropped before are LG005 where they were asked for by
 * version.
 */
#include "postgres.h"

#include "feed/stream_walk.h"

#include "access/stratnum.h"
#include "access/xact.h"
#include "collection/event.h"
#include "errors.h"
#include "feed/lookup.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"

/* Columns of the index on (stream, version). */
#define VERSIONS_STREAM	 1
#define VERSIONS_VERSION 2

/* A look into one segment too many costs about what the heads table would. */
#define UNASKED_SEGMENTS_MAX 2

struct EsStreamWalk
{
	const text	  *stream;
	Snapshot	   snapshot;
	ScanDirection  direction;
	const EsQuery *query;
	int64		   low; /* versions, inclusive */
	int64		   high;

	/* Those that may hold events of the stream, ascending. */
	EsSegment *segments;
	int		   nsegments;
	int		   current;
	EsLookup  *lookup;	 /* in segments[current]; NULL: not begun */
	bool	   complete; /* the last version was reached: look no further */
	EsPosition only;	 /* where the one event wanted is; 0: not known */
};

static void
report_missing(const EsStreamWalk *walk, const EsCollection *coll, EsPosition position)
{
	ereport(
		ERROR,
		(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
		 errmsg("a segment of collection \"%s\" is missing that stream \"%s\" may lie in",
				get_rel_name(coll->relid), text_to_cstring(walk->stream)),
		 errdetail("No segment holds position " INT64_FORMAT ".", position),
		 errhint("Attach it again with ALTER TABLE ... ATTACH PARTITION, or give up what "
				 "it held with eventstore.truncate_before().")));
}

/*
 * Copies the part of the collection's list (which may be rebuilt) that lies
 * between two positions.  Returns the first position there that no segment
 * holds, 0 where all are held.
 */
static EsPosition
copy_segments(EsStreamWalk *walk, const EsCollection *coll, EsPosition first,
			  EsPosition last)
{
	EsPosition expected = first;
	int		   begin = 0;
	int		   end = coll->nsegments;

	while (end > 0 && coll->segments[end - 1].first > last)
		end--;
	while (begin < end && coll->segments[begin].end <= expected)
		begin++;
	for (int i = begin; i < end && coll->segments[i].first <= expected; i++)
		expected = coll->segments[i].end;
	walk->nsegments = end - begin;
	walk->segments = palloc(sizeof(EsSegment) * Max(walk->nsegments, 1));
	memcpy(walk->segments, &coll->segments[begin], sizeof(EsSegment) * walk->nsegments);
	return expected <= last ? expected : 0;
}

/*
 * The segments between the stream's first event that is kept and its last.  A
 * hole there would be skipped events, so it is an error.
 */
static void
find_stream_segments(EsStreamWalk *walk, const EsCollection *coll,
					 const EsStreamHead *head)
{
	EsPosition missing = copy_segments(
		walk, coll, Max(head->first_position, coll->first_position), head->last_position);

	if (missing != 0)
		report_missing(walk, coll, missing);
}

/*
 * All segments in use, where they are few and hold every position up to the
 * last one handed out, which is at or above all that the snapshot sees; else
 * false.  A version to start from, where events have been dropped, needs the
 * heads row, to tell what was dropped from what never was.  A serializable
 * transaction reads that row because every append to the stream writes it:
 * the segments that it would walk do not tell of an append to the next one.
 */
static bool
find_all_segments(EsStreamWalk *walk, EsCollection *coll, const EsReadArgs *args)
{
	EsPosition last;

	if (IsolationIsSerializable() || (args->has_from && coll->first_position > 1) ||
		!es_collection_last_known(coll, &last))
		return false;
	if (copy_segments(walk, coll, coll->first_position, last) == 0 &&
		walk->nsegments <= UNASKED_SEGMENTS_MAX)
		return true;
	pfree(walk->segments);
	walk->segments = NULL;
	walk->nsegments = 0;
	return false;
}

static EsLookup *
begin_lookup(const EsStreamWalk *walk, const EsSegment *segment,
			 const EsIndexShape *shape, const ScanKeyData *keys, int nkeys,
			 ScanDirection direction)
{
	EsLookup *lookup =
		es_lookup_begin(segment->relid, shape, keys, nkeys, direction, walk->snapshot);

	if (lookup == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("a segment was dropped while stream \"%s\" was read",
						text_to_cstring(walk->stream)),
				 errdetail("It held positions " INT64_FORMAT " to " INT64_FORMAT ".",
						   segment->first, segment->end - 1),
				 errhint("Read again.")));
	return lookup;
}

/* The stream's first (or last) version in one segment; false where it has none. */
static bool
probe_segment(const EsStreamWalk *walk, int segment, ScanDirection direction,
			  int64 *version)
{
	ScanKeyData		key;
	EsLookup	   *lookup;
	TupleTableSlot *slot;

	es_lookup_text_key(&key, VERSIONS_STREAM, BTEqualStrategyNumber, walk->stream);
	lookup = begin_lookup(walk, &walk->segments[segment], &es_index_of_versions, &key, 1,
						  direction);
	slot = es_lookup_next(lookup);
	if (slot != NULL)
	{
		bool isnull;

		*version = DatumGetInt64(slot_getattr(slot, ES_ATT_VERSION, &isnull));
	}
	es_lookup_end(lookup);
	return slot != NULL;
}

/*
 * The first segment whose last version is at least this one; the caller knows
 * that the last segment's is.
 */
static int
find_segment(const EsStreamWalk *walk, int64 version)
{
	int low = 0;
	int high = walk->nsegments - 1;

	while (low < high)
	{
		int	  middle = low + (high - low) / 2;
		int	  probe = middle;
		int64 last = 0;

		/* An empty segment says nothing: the one before it may. */
		while (probe >= low && !probe_segment(walk, probe, BackwardScanDirection, &last))
			probe--;
		if (probe >= low && last >= version)
			high = probe;
		else
			low = middle + 1;
	}
	return low;
}

/* The version of the oldest event that is kept; one more than the last for none. */
static int64
find_first_kept(const EsCollection *coll, const text *stream, const EsStreamHead *head,
				Snapshot snapshot)
{
	EsStreamWalk walk = {.stream = stream, .snapshot = snapshot};
	int64		 version = head->version + 1;

	if (head->first_position >= coll->first_position)
		return 1;
	find_stream_segments(&walk, coll, head);
	for (int i = 0; i < walk.nsegments; i++)
		if (probe_segment(&walk, i, ForwardScanDirection, &version))
			break;
	pfree(walk.segments);
	return version;
}

void
es_stream_check_kept(const EsCollection *coll, const EsReadArgs *args,
					 const EsStreamHead *head, Snapshot snapshot)
{
	int64 first_kept;

	if (!args->has_from || args->from_version > head->version)
		return;
	first_kept = find_first_kept(coll, args->stream, head, snapshot);
	if (args->from_version >= first_kept)
		return;

	/* Version 0 was never there to be lost, unless the way leads up from it. */
	if (args->from_version == 0 &&
		(first_kept == 1 || !ScanDirectionIsForward(args->direction)))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_ES_NOT_RETAINED),
			 errmsg("version " INT64_FORMAT
					" of stream \"%s\" of collection \"%s\" is no longer retained",
					args->from_version, text_to_cstring(args->stream),
					get_rel_name(coll->relid)),
			 errdetail("Requested " INT64_FORMAT ", first kept " INT64_FORMAT ".",
					   args->from_version, first_kept),
			 errhint("Read from the oldest that is kept with a null from_version.")));
}

/* What from_version and to_version select, as an interval. */
static void
set_versions(EsStreamWalk *walk, const EsReadArgs *args, int64 last)
{
	walk->low = 1;
	walk->high = last;
	if (ScanDirectionIsForward(args->direction))
	{
		if (args->has_from)
			walk->low = Max(walk->low, args->from_version);
		if (args->has_to)
			walk->high = Min(walk->high, args->to_version);
	}
	else
	{
		if (args->has_from)
			walk->high = Min(walk->high, args->from_version);
		if (args->has_to)
			walk->low = Max(walk->low, args->to_version);
	}
}

/* The segments from what the heads table knows, and the one to start in. */
static void
begin_by_head(EsStreamWalk *walk, const EsCollection *coll, const EsReadArgs *args)
{
	bool		 forward = ScanDirectionIsForward(walk->direction);
	EsStreamHead head;
	int64		 start;

	if (!es_heads_peek(coll, walk->stream, walk->snapshot, &head))
		return; /* nsegments = 0: nothing comes */
	es_stream_check_kept(coll, args, &head, walk->snapshot);
	set_versions(walk, args, head.version);
	if (walk->low > walk->high)
		return;

	find_stream_segments(walk, coll, &head);
	start = forward ? walk->low : walk->high;
	if (start == 1 || walk->nsegments == 0)
		walk->current = 0;
	else if (start == head.version)
	{
		walk->current = walk->nsegments - 1;
		if (!forward && args->max_count == 1 && walk->query == NULL)
			walk->only = head.last_position;
	}
	else
		walk->current = find_segment(walk, start);
}

EsStreamWalk *
es_stream_walk_begin(EsCollection *coll, const EsReadArgs *args, Snapshot snapshot)
{
	EsStreamWalk *walk = palloc0(sizeof(EsStreamWalk));

	walk->stream = args->stream;
	walk->snapshot = snapshot;
	walk->direction = args->direction;
	walk->query = args->query;
	if (!find_all_segments(walk, coll, args))
	{
		begin_by_head(walk, coll, args);
		return walk;
	}
	set_versions(walk, args, PG_INT64_MAX);
	if (!ScanDirectionIsForward(walk->direction))
		walk->current = walk->nsegments - 1;
	walk->complete = walk->low > walk->high;
	return walk;
}

static void
begin_segment(EsStreamWalk *walk)
{
	ScanKeyData keys[3];

	if (walk->only != 0)
	{
		es_lookup_int_key(&keys[0], 1, BTEqualStrategyNumber, walk->only);
		walk->lookup = begin_lookup(walk, &walk->segments[walk->current],
									&es_index_of_positions, keys, 1, walk->direction);
		return;
	}
	es_lookup_text_key(&keys[0], VERSIONS_STREAM, BTEqualStrategyNumber, walk->stream);
	es_lookup_int_key(&keys[1], VERSIONS_VERSION, BTGreaterEqualStrategyNumber,
					  walk->low);
	es_lookup_int_key(&keys[2], VERSIONS_VERSION, BTLessEqualStrategyNumber, walk->high);
	walk->lookup = begin_lookup(walk, &walk->segments[walk->current],
								&es_index_of_versions, keys, 3, walk->direction);
}

/* Is its type one of those asked for?  The only filter that a stream knows. */
static bool
is_wanted(const EsQuery *query, TupleTableSlot *slot)
{
	const EsQueryItem *item;
	bool			   isnull;
	Datum			   value;
	text			  *type;

	if (query == NULL || query->everything)
		return true;
	item = &query->items[0];
	value = slot_getattr(slot, ES_ATT_TYPE, &isnull);
	if (isnull)
		return false;
	type = DatumGetTextPP(value);
	for (int i = 0; i < item->ntypes; i++)
		if (es_text_equal(type, item->types[i]))
			return true;
	return false;
}

/* The row at which the walk ends need not be followed by a look for another. */
static bool
is_last(const EsStreamWalk *walk, TupleTableSlot *slot)
{
	bool  isnull;
	int64 version = DatumGetInt64(slot_getattr(slot, ES_ATT_VERSION, &isnull));

	return version == (ScanDirectionIsForward(walk->direction) ? walk->high : walk->low);
}

TupleTableSlot *
es_stream_walk_next(EsStreamWalk *walk)
{
	int step = ScanDirectionIsForward(walk->direction) ? 1 : -1;

	while (!walk->complete && walk->current >= 0 && walk->current < walk->nsegments)
	{
		TupleTableSlot *slot;

		CHECK_FOR_INTERRUPTS();
		if (walk->lookup == NULL)
			begin_segment(walk);
		slot = es_lookup_next(walk->lookup);
		if (slot == NULL)
		{
			es_lookup_end(walk->lookup);
			walk->lookup = NULL;
			walk->current += step;
			continue;
		}
		walk->complete = is_last(walk, slot);
		if (is_wanted(walk->query, slot))
			return slot;
	}
	return NULL;
}

void
es_stream_walk_end(EsStreamWalk *walk)
{
	if (walk->lookup != NULL)
		es_lookup_end(walk->lookup);
	if (walk->segments != NULL)
		pfree(walk->segments);
	pfree(walk);
}
