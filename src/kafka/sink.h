/*
 * kafka/sink.h
 *		What a sink is, as its worker and the functions about it see it.
 *
 * sink_definition.c what a sink is told to do (SQL) · sink_record.c events to
 * records · delivery.c records to Kafka, and which were acknowledged ·
 * sink_progress.c how far it has come · sink.c the worker.
 */
#ifndef ES_KAFKA_SINK_H
#define ES_KAFKA_SINK_H

#include "postgres.h"

#include "collection/query.h"
#include "kafka/task.h"
#include "position/head.h"
#include "utils/jsonb.h"

/* What a record's key is. */
typedef enum EsSinkKey
{
	ES_SINK_KEY_STREAM,
	ES_SINK_KEY_ID,
	ES_SINK_KEY_POSITION,
	ES_SINK_KEY_TYPE,
	ES_SINK_KEY_NONE,
	ES_SINK_KEY_TAG, /* what follows the prefix in a tag */
	ES_SINK_KEY_FUNCTION
} EsSinkKey;

/* What is done with an event that cannot be published. */
typedef enum EsSinkPolicy
{
	ES_SINK_STOP,
	ES_SINK_SKIP,
	ES_SINK_PARK
} EsSinkPolicy;

/* A row of eventstore.sink, taken apart; palloc'd as a whole. */
typedef struct EsSink
{
	uint32		 id;
	char		*name; /* of a changelog's: that of its source, or "changelog sink ID" */
	Oid			 owner;
	char		*server_name;
	Oid			 server; /* InvalidOid: it is gone */
	char		*topic;
	Oid			 collection;
	EsQuery		*query; /* NULL: every event */
	EsSinkKey	 key;
	char		*key_text;	 /* as given */
	char		*tag_prefix; /* "NAME:" */
	bool		 exactly_once;
	EsSinkPolicy on_error;
	int			 flush_count;
	int64		 flush_us;
	char *
		progress_topic; /* NULL unless exactly_once, or where a group vouches (share.c) */
	Jsonb	   *producer_properties;
	uint32		changelog_of; /* the source whose store's changelog this publishes; 0 */
	bool		paused;
	char	   *failure; /* NULL: none */
	int64		resumes;
	bool		at_home;
	TimestampTz created_at;
	EsPosition	position; /* all up to there are acknowledged */

	/* The topic, as it was last: offsets behind what it has acknowledged, by partition. */
	int	   nends;
	int64 *ends;
	char  *topic_id; /* NULL: not known */

	/*
	 * Of a changelog: up to there what was restored from the topic is published, too
	 * (sink_topic.c); ES_SINK_UNTIL_RESTORED: nothing is before the source has restored.
	 */
	EsPosition again_to;
	/* ... and of that, what lies up to here for the second time: a former topic had it. */
	EsPosition known_to;
} EsSink;

#define ES_SINK_UNTIL_RESTORED PG_INT64_MAX

/* A sink that is to be; checked by who makes it. */
typedef struct EsSinkDefinition
{
	const char	*name; /* NULL: it is a part of something else, and in no view */
	const char	*server_name;
	Oid			 owner;
	const char	*topic;
	Oid			 collection;
	Jsonb		*query; /* NULL: every event */
	const char	*key;
	EsPosition	 after;	   /* begins behind this */
	EsPosition	 again_to; /* as in EsSink */
	bool		 exactly_once;
	EsSinkPolicy on_error;
	int			 flush_count;
	Datum		 flush_interval; /* an Interval */
	const char	*progress_topic; /* as in EsSink */
	Jsonb		*producer_properties;
	uint32		 changelog_of; /* 0: of no source */
} EsSinkDefinition;

/* A definition with the defaults of create_sink, for who sets the rest. */
extern void es_sink_define(EsSinkDefinition *definition);

/*
 * Makes it, and has its worker started at commit; its id.  Dropping is quiet
 * where there is none.  One of a changelog publishes no event whose metadata
 * say that it came from the topic that it would go to, and its records have the
 * headers es-topic, es-partition and es-offset of the record that made the change.
 */
extern uint32 es_sink_create_internal(const EsSinkDefinition *definition);
extern void	  es_sink_drop_internal(uint32 id);

/* The sink of that id; NULL where there is none.  As the extension's owner, with a snapshot. */
extern EsSink *es_sink_load(uint32 id);

/* Has its topic, as it was last, acknowledged a record? */
extern bool es_sink_has_published(const EsSink *sink);

/* Why a partition that ends there is not the one that had so many offsets; NULL.  palloc'd. */
extern char *es_sink_doubt_end(int32 partition, int64 end, int64 had);

extern EsWorkerKey es_sink_key(uint32 id);

#endif /* ES_KAFKA_SINK_H */
