/*
 * collection/sorting.h
 *		Sorting many short keys.
 */
#ifndef ES_SORTING_H
#define ES_SORTING_H

#include "postgres.h"

/* The key of something that has a number. */
typedef struct EsSortKey
{
	uint64 key;
	uint32 number;
} EsSortKey;

extern void es_sort_numbers(uint64 *numbers, size_t n);

/* By key; those of one key by number. */
extern void es_sort_keys(EsSortKey *keys, size_t n);

/*
 * The numbers of the strings, from 0 on, in bytewise order; equal ones in the order
 * in which they were given.
 */
extern uint32 *es_sort_bytes(struct varlena *const *strings, int n);

#endif /* ES_SORTING_H */
