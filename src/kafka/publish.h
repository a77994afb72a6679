/*
 * kafka/publish.h
 *		Stores whose changes are published, and changes of them that are not the
 *		source's own.
 */
#ifndef ES_KAFKA_PUBLISH_H
#define ES_KAFKA_PUBLISH_H

#include "postgres.h"

#include "kafka/codec.h"
#include "store/store.h"

/*
 * Notes the source in column 'follower' or 'publisher' of the store's row of
 * store_catalog.  55000 where another one is there.
 */
extern void es_publish_mark(Oid store, const char *column, uint32 source);
extern void es_publish_unmark(uint32 source);

/* The hook of store.h: how far the source has come, as of now. */
extern Jsonb *es_publish_origin(const EsStore *store);

/*
 * The same, in the metadata of a change, of the partition that the key belongs to:
 * the topic, the partition, and the offset of the last record that the change came
 * after (-1: none).  False where the metadata do not tell.
 */
extern bool es_publish_progress(Jsonb *metadata, const EsRecord *record,
								const char **topic, int32 *partition, int64 *offset);

#endif /* ES_KAFKA_PUBLISH_H */
