/*
 * collection/sorting.c
 *		Sorting many short keys.
 *
 * A batch is sorted several times: by stream, by label, by key.  With qsort and a
 * function that follows pointers that was a tenth of the work of writing it.  So
 * what is sorted here are numbers, compared in line.
 *
 * Strings are sorted by their first eight bytes behind those that all of them have
 * in common, which tell most apart; who has the same ones is compared as a whole.
 */
#include "postgres.h"

#include "collection/sorting.h"

#include "collection/event.h"
#include "port/pg_bswap.h"
#include "utils/memutils.h"

#define ST_SORT			 es_sort_numbers
#define ST_ELEMENT_TYPE	 uint64
#define ST_COMPARE(a, b) ((*(a) > *(b)) - (*(a) < *(b)))
#define ST_SCOPE		 extern
#define ST_DEFINE
#include "lib/sort_template.h"

#define ST_SORT			es_sort_keys
#define ST_ELEMENT_TYPE EsSortKey
#define ST_COMPARE(a, b)                                                                 \
	((a)->key != (b)->key ? ((a)->key > (b)->key ? 1 : -1)                               \
						  : ((a)->number > (b)->number) - ((a)->number < (b)->number))
#define ST_SCOPE extern
#define ST_DEFINE
#include "lib/sort_template.h"

static int
compare_strings(const void *a, const void *b, void *arg)
{
	struct varlena *const *strings = arg;
	uint32				   left = ((const EsSortKey *) a)->number;
	uint32				   right = ((const EsSortKey *) b)->number;
	int					   order = es_bytes_compare(strings[left], strings[right]);

	return order != 0 ? order : (left > right) - (left < right);
}

/* How many bytes all of them begin with. */
static int
common_length(struct varlena *const *strings, int n)
{
	const char *first = VARDATA_ANY(strings[0]);
	int			common = VARSIZE_ANY_EXHDR(strings[0]);

	for (int i = 1; i < n && common > 0; i++)
	{
		const char *other = VARDATA_ANY(strings[i]);
		int			length = Min(common, (int) VARSIZE_ANY_EXHDR(strings[i]));

		for (common = 0; common < length && first[common] == other[common]; common++)
			;
	}
	return common;
}

/* Eight bytes as a number that sorts as they do; what is missing counts as zeros. */
static uint64
bytes_from(const struct varlena *string, int start)
{
	int	   length = VARSIZE_ANY_EXHDR(string) - start;
	uint64 bytes = 0;

	memcpy(&bytes, VARDATA_ANY(string) + start, Min(length, (int) sizeof(bytes)));
	return pg_ntoh64(bytes);
}

uint32 *
es_sort_bytes(struct varlena *const *strings, int n)
{
	EsSortKey *keys = palloc_extended(sizeof(EsSortKey) * (n + 1), MCXT_ALLOC_HUGE);
	uint32	  *order = palloc_extended(sizeof(uint32) * (n + 1), MCXT_ALLOC_HUGE);
	int		   common = n > 0 ? common_length(strings, n) : 0;
	int		   end;

	for (int i = 0; i < n; i++)
	{
		keys[i].key = bytes_from(strings[i], common);
		keys[i].number = i;
	}
	es_sort_keys(keys, n);
	for (int start = 0; start < n; start = end)
	{
		for (end = start + 1; end < n && keys[end].key == keys[start].key; end++)
			;
		if (end > start + 1)
			qsort_arg(&keys[start], end - start, sizeof(EsSortKey), compare_strings,
					  (void *) strings);
	}
	for (int i = 0; i < n; i++)
		order[i] = keys[i].number;
	pfree(keys);
	return order;
}
