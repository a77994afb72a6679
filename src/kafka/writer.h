/*
 * kafka/writer.h
 *		Records into a store or a collection.
 */
#ifndef ES_KAFKA_WRITER_H
#define ES_KAFKA_WRITER_H

#include "postgres.h"

#include "fmgr.h"
#include "kafka/codec.h"
#include "kafka/source.h"

/* What is the same for all records of a source; good for as long as the source is. */
typedef struct EsWriter
{
	const EsSource *source;
	EsStoreFormat	key_format;
	EsStoreFormat	stored_format; /* of a store: what its changelog topic has */
	bool			keeps_headers; /* in the metadata of events */
	text		   *event_type;	   /* of a collection's events: the topic */
	FmgrInfo		transform;
	Oid				result_type; /* of the transform */
	bool			restoring;	 /* records of the changelog topic, in a restore */
} EsWriter;

/* What the policies and the transform made of records; in the current context. */
typedef struct EsWritten
{
	int64 written; /* into the target; several of a key count */
	int64 dropped; /* the transform gave null */
} EsWritten;

/* In a transaction.  42883 where the transform is gone. */
extern EsWriter *es_writer_begin(const EsSource *source);

/*
 * Decodes the records; problems[i].sqlstate tells for each whether it can be
 * written.  No rights, no tables.  'values' has room for one of each.
 */
typedef struct EsDecoded EsDecoded;
extern EsDecoded *es_writer_decode(const EsWriter *writer, const EsRecord *records, int n,
								   EsProblem *problems);

/*
 * Into the record, what the transform makes of its value; false where that is
 * nothing.  As the current user; in the current context.
 */
extern bool es_writer_value(EsWriter *writer, EsDecoded *decoded, int number,
							EsRecord *record);

/*
 * Writes those of the records that have no problem, as the current user.
 * Errors: whatever the target's constraints, triggers and the transform raise.
 */
extern void es_writer_write(EsWriter *writer, const EsRecord *records, EsDecoded *decoded,
							int n, const EsProblem *problems, EsWritten *written);

#endif /* ES_KAFKA_WRITER_H */
