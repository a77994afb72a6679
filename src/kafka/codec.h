/*
 * kafka/codec.h
 *		Between a record's bytes and values of PostgreSQL.
 */
#ifndef ES_KAFKA_CODEC_H
#define ES_KAFKA_CODEC_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "store/store.h"
#include "utils/jsonb.h"

/* Headers of a changelog topic's record: which record of the source it came from. */
#define ES_HEADER_TOPIC		"es-topic"
#define ES_HEADER_PARTITION "es-partition"
#define ES_HEADER_OFFSET	"es-offset"
/* ... and where the transaction began that wrote it, in that partition; it may not be there as a whole. */
#define ES_HEADER_SINCE "es-since"

typedef struct EsHeader
{
	const char *name;
	const char *value; /* NULL: none */
	size_t		length;
} EsHeader;

/* A record as it came.  The bytes belong to whoever has the message. */
typedef struct EsRecord
{
	const char *topic;
	bool		from_changelog; /* the topic is the source's changelog topic */
	int32		partition;
	int64		offset;
	const char *key; /* NULL: none */
	size_t		key_length;
	const char *value; /* NULL: none, which deletes the key */
	size_t		value_length;
	bool		has_time;
	TimestampTz time;
	int			nheaders;
	EsHeader   *headers;
	bool		headers_lost; /* librdkafka cannot read them */
	bool		has_since;
	int64		since; /* the first record of its partition that is written with it */
} EsRecord;

/* The problem of a record that need not be taken any more. */
#define ES_PROBLEM_OUT_OF_DATE ERRCODE_NO_DATA

/* Why a record cannot be taken; sqlstate 0: it can. */
typedef struct EsProblem
{
	int			sqlstate;
	const char *reason;
} EsProblem;

/*
 * The bytes as jsonb, text or bytea; false, with the problem, where they are
 * none.  Kafka's text is UTF-8.
 */
extern bool es_codec_decode(EsStoreFormat format, const char *bytes, size_t length,
							Datum *value, EsProblem *problem);

/* The bytes that Kafka has of a value: text is UTF-8 there. */
extern const char *es_codec_bytes(EsStoreFormat format, Datum value, size_t *length);

/* The partition, of so many, that Kafka's own partitioner gives a key. */
extern int32 es_codec_partition(const char *key, size_t length, int32 count);

/* False for headers that are too many or too large to be kept as JSON. */
extern bool es_codec_headers_fit(const EsRecord *record);

/* [[name, value], ...] in their order; a value that is no text is {"base64": "..."}.  NULL: none. */
extern Jsonb *es_codec_headers(const EsRecord *record);

/* The reverse, into the record; in the current context. */
extern void es_codec_read_headers(Jsonb *headers, EsRecord *record);

/* The first header of that name that has a value; NULL. */
extern const EsHeader *es_codec_header(const EsRecord *record, const char *name);

/* The members of an event's metadata, which say where it came from. */
#define ES_ORIGIN_TOPIC		"topic"
#define ES_ORIGIN_PARTITION "partition"
#define ES_ORIGIN_OFFSET	"offset"
#define ES_ORIGIN_SINCE		"since"
#define ES_ORIGIN_TIMESTAMP "timestamp"
#define ES_ORIGIN_HEADERS	"headers"

/* The numbers in metadata that differ from record to record. */
enum
{
	ES_METADATA_OFFSET_AT,
	ES_METADATA_SINCE_AT,
	ES_METADATA_TIMESTAMP_AT,
	ES_METADATA_NUMBERS
};

/*
 * The metadata of one record, to make those of the next one from, at a third of the
 * price; zeros: none yet.
 */
typedef struct EsMetadataPattern
{
	Jsonb	   *metadata;
	const char *topic;
	int32		partition;
	int			at[ES_METADATA_NUMBERS]; /* in bytes from the beginning; 0: it has none */
} EsMetadataPattern;

/*
 * {"topic", "partition", "offset", "since", "timestamp", "headers"}, those that there
 * are.  The pattern is good for as long as the current context is.
 */
extern Jsonb *es_codec_metadata(const EsRecord *record, EsMetadataPattern *pattern);

/*
 * The offset in an event's metadata, in SQL, as numeric; null where it is none.
 * Metadata may be whatever its writer has made of them.
 */
#define ES_METADATA_OFFSET                                                               \
	"CASE WHEN jsonb_typeof(e.metadata->'" ES_ORIGIN_OFFSET "') = 'number'"              \
	" THEN (e.metadata->'" ES_ORIGIN_OFFSET "')::numeric END"

/* Milliseconds since 1970; false for one that PostgreSQL cannot hold. */
extern int64 es_codec_kafka_time(TimestampTz time);
extern bool	 es_codec_time(int64 kafka_time, TimestampTz *time);

#endif /* ES_KAFKA_CODEC_H */
