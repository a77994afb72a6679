/*
 * kafka/source.h
 *		What a source is, as its worker and the functions about it see it.
 *
 * The map of this folder: definition.c what a source is told to do (SQL) ·
 * property.c which of librdkafka's properties may be set, where · client.c a
 * librdkafka handle in a worker · codec.c bytes to values · writer.c records
 * into a store or a collection · progress.c offsets, gaps and dead letters ·
 * source.c the worker: its loop · run.c what its parts have in common · batch.c
 * its batches · group.c a consumer group · topic.c the topic and its partitions ·
 * dead_letter.c dead letters tried again.  Only property.c, client.c and what runs
 * in a worker include librdkafka.
 */
#ifndef ES_KAFKA_SOURCE_H
#define ES_KAFKA_SOURCE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"
#include "store/store.h"
#include "utils/jsonb.h"
#include "worker/launcher.h"

/* What is done with a record that cannot be written. */
typedef enum EsPolicy
{
	ES_POLICY_PARK,
	ES_POLICY_SKIP,
	ES_POLICY_STOP
} EsPolicy;

/* Where a source goes on when the records that it wants are gone. */
typedef enum EsGapPolicy
{
	ES_GAP_STOP,
	ES_GAP_EARLIEST,
	ES_GAP_LATEST
} EsGapPolicy;

typedef enum EsSourceMode
{
	ES_SOURCE_PRIMARY,
	ES_SOURCE_REPLICA,
	ES_SOURCE_RELAY
} EsSourceMode;

/* Where to begin with a partition that was not read yet. */
typedef enum EsStart
{
	ES_START_EARLIEST,
	ES_START_LATEST,
	ES_START_TIME,
	ES_START_OFFSETS
} EsStart;

/* A row of eventstore.source, taken apart; palloc'd as a whole. */
typedef struct EsSource
{
	uint32		  id;
	char		 *name;
	Oid			  owner;
	char		 *server_name;
	Oid			  server; /* InvalidOid: it is gone */
	char		 *topic;
	Oid			  target;
	bool		  is_store; /* else a collection */
	EsSourceMode  mode;
	EsStoreFormat value_format;
	Oid			  transform;	  /* InvalidOid: none */
	char		 *transform_name; /* NULL: none; its function may be gone */
	EsPolicy	  on_error;
	EsPolicy	  on_null_key;
	EsGapPolicy	  on_gap;
	int			  flush_count;
	int64		  flush_us;
	EsStart		  start;
	TimestampTz	  start_time;
	Jsonb		 *start_offsets;
	int			  npartitions; /* 0: all */
	int32		 *partitions;
	int			  nreplicas; /* partitions of the changelog topic that are followed */
	int32		 *replicas;
	char		 *topic_id;		   /* of the topic that is followed; NULL: not known */
	int			  partition_count; /* of the topic, as last heard of; 0: not yet */
	char		 *group_id;		   /* NULL: partitions are assigned by hand */
	bool		  key_as_tag;
	Jsonb		 *consumer_properties;
	Jsonb		 *changelog_properties;
	char		 *changelog_topic;
	bool		  resync; /* asked for, and not done yet */
	bool		  paused;
	char		 *failure; /* NULL: none */
	int64		  resumes; /* grows with each resume() */
	bool		  at_home; /* it was told to run in this very database */
} EsSource;

/*
 * The source of that id or name; NULL where there is none.  As the extension's
 * owner, with the active snapshot; between no SPI_connect.
 */
extern EsSource *es_source_load(uint32 id);
extern EsSource *es_source_load_named(const char *name);

/* The source that a function's argument names: LG007, 22004; 42501 for who does not own it. */
extern EsSource *es_source_require_own(const NullableDatum *name);

/* Drops it with all that is its own; quiet where there is none. */
extern void es_source_drop_internal(uint32 id);

/* Parses 'start'; false where it is none of those that there are. */
extern bool es_source_parse_start(EsSource *source, const char *start);

extern EsWorkerKey es_source_key(uint32 id);

#endif /* ES_KAFKA_SOURCE_H */
