/*
 * kafka/delivery.h
 *		Records on their way to Kafka, and up to where they have arrived.
 */
#ifndef ES_KAFKA_DELIVERY_H
#define ES_KAFKA_DELIVERY_H

#include "postgres.h"

#include "kafka/client.h"
#include "kafka/codec.h"
#include "position/head.h"

#define ES_UUID_TEXT_LEN 36

/* More are not on their way at one time; a power of two. */
#define ES_DELIVERY_MAX (128 * 1024)

typedef struct EsDeliverySlot
{
	EsPosition position;
	bool	   arrived;
} EsDeliverySlot;

/* Plain memory only: librdkafka's callback writes to it. */
typedef struct EsDelivery
{
	uint64				first;	 /* all before this number have arrived */
	uint64				next;	 /* the number of the next record */
	uint64				reports; /* how many have been heard of, arrived or not */
	EsPosition			arrived; /* of the last one before 'first' */
	rd_kafka_resp_err_t error;	 /* of the failed one with the lowest number; 0: none */
	uint64				failed;	 /* its number */

	/* The rest outlives es_delivery_reset. */
	EsDeliverySlot *slots; /* a ring, by number */

	/* The topic whose ends are noted; offsets behind what it has acknowledged. */
	rd_kafka_topic_t *topic;
	int64			 *ends; /* by partition; 0: nothing */
	int				  nends;
	bool			  went_back; /* it has acknowledged a lower one again */

	/*
	 * What this client has put without a failure lies together, unless others write
	 * to the partition as well.
	 */
	int64 *unbroken; /* 'nunbroken' of them, by partition: as ends; 0: not known */
	int	   nunbroken;
	int32  broken_in; /* a partition that others write to; -1: none */
	int64  broken_at; /* the offset of one of theirs */
} EsDelivery;

/* es_kafka_properties for a producer, with our defaults. */
extern List *es_delivery_properties(Oid server, Oid owner, Jsonb *given);

/* Allocates the ring; nothing is on its way. */
extern void es_delivery_init(EsDelivery *delivery);
extern void es_delivery_reset(EsDelivery *delivery);

/* Has the client report to the EsDelivery that it has as 'arg'. */
extern void es_delivery_configure(rd_kafka_conf_t *conf, void *arg);

/*
 * Takes a copy.  Positions ascend; 0 for a record that has none.  'partition'
 * may be RD_KAFKA_PARTITION_UA.  RD_KAFKA_RESP_ERR__QUEUE_FULL: later.
 */
extern rd_kafka_resp_err_t es_delivery_put(EsDelivery *delivery, rd_kafka_t *handle,
										   rd_kafka_topic_t *topic, int32 partition,
										   const EsRecord *record, EsPosition position);

/* All that were put have arrived / have been heard of. */
extern bool es_delivery_is_empty(const EsDelivery *delivery);
extern bool es_delivery_is_settled(const EsDelivery *delivery);

/* The position of the failed one with the lowest number. */
extern EsPosition es_delivery_failed(const EsDelivery *delivery);

#endif /* ES_KAFKA_DELIVERY_H */
