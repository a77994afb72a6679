/*
 * feed/key_reads.h
 *		Reads of keys, on their way to who listens to a store (option feed_reads).
 */
#ifndef ES_KEY_READS_H
#define ES_KEY_READS_H

#include "postgres.h"

/* Longer keys are not reported. */
#define ES_READ_KEY_MAX_BYTES 128

/* A key of a changelog, and how often it was read. */
typedef struct EsKeyReads
{
	Oid	   changelog;
	uint32 count;
	int	   length;
	char   key[ES_READ_KEY_MAX_BYTES];
} EsKeyReads;

extern Size es_key_reads_shmem_size(void);
extern void es_key_reads_shmem_init(void);

/*
 * Notes that a key was read; no error, no wait.  It is dropped where others note
 * just then, or there is no room.
 */
extern void es_key_reads_note(Oid changelog, const text *key);

/* Is there anything of this database? */
extern bool es_key_reads_any(void);

/* Takes what there is of this database; palloc'd. */
extern int es_key_reads_take(EsKeyReads **reads);

#endif /* ES_KEY_READS_H */
