/*
 * kafka/sink_record.h
 *		An event as a record of Kafka's.
 */
#ifndef ES_KAFKA_SINK_RECORD_H
#define ES_KAFKA_SINK_RECORD_H

#include "postgres.h"

#include "collection/collection.h"
#include "executor/tuptable.h"
#include "kafka/codec.h"
#include "kafka/share.h"
#include "kafka/sink.h"

/* The partition of a record that the partitioner chooses one for. */
#define ES_SINK_ANY_PARTITION (-1)

typedef struct EsSinkWriter EsSinkWriter;

/*
 * In the current memory context, for one transaction, as the sink's owner.
 * 42883 where the function for the key is gone.  'share': of a changelog's sink.
 */
extern EsSinkWriter *es_sink_record_begin(const EsSink *sink, const EsCollection *coll,
										  const EsShare *share);

/*
 * The record of the event in the slot, with its partition, which it points into; the rest is in the
 * current memory context, and the headers are good until the next call.  False
 * where the event is not to be published.  Errors: those of the key's function.
 */
extern bool es_sink_record_make(EsSinkWriter *writer, TupleTableSlot *slot,
								EsRecord *record);

/* The last one is not, and nobody else will publish it. */
extern bool es_sink_record_is_lost(const EsSinkWriter *writer);

#endif /* ES_KAFKA_SINK_RECORD_H */
