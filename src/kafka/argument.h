/*
 * kafka/argument.h
 *		Arguments that the functions about sources and sinks have in common.
 */
#ifndef ES_KAFKA_ARGUMENT_H
#define ES_KAFKA_ARGUMENT_H

#include "postgres.h"

#include "compat.h"
#include "fmgr.h"
#include "kafka/property.h"

/* 22023: invalid value for argument "name", with that DETAIL. */
es_noreturn extern void es_kafka_refuse(const char *name, const char *detail);

/* Which of the words (the last is NULL) it is; -1: none. */
extern int es_kafka_word_index(const char *const *words, const char *word);

/* Which of the words the argument is; null is the first.  22023. */
extern int es_kafka_word_arg(const NullableDatum *arg, const char *name,
							 const char *const *words);

/* The name of a topic: 22023 where it cannot be one. */
extern char *es_kafka_topic_arg(const NullableDatum *arg, const char *name);

/* flush_count: null is the default; 22023 outside of 1 to a million. */
extern int es_kafka_flush_count_arg(const NullableDatum *arg, int absent);

/* flush_interval: null becomes the default.  22023 for a negative one. */
extern void es_kafka_flush_interval_arg(NullableDatum *arg, const char *absent);

/*
 * A user's function, as of now: it may have been made anew under its name since,
 * with other types.  False where there is none, or it is not a plain function of
 * one argument with one result.
 */
extern bool es_kafka_function_types(Oid function, Oid *argument, Oid *result);

/* 42501 where the role may not call it. */
extern void es_kafka_check_execute(Oid function, Oid role);

/* In microseconds. */
extern int64 es_kafka_interval_us(Datum interval);

/* Properties of librdkafka: null becomes {}.  22023, 42501. */
extern void es_kafka_properties_arg(NullableDatum *arg, EsKafkaPropertyPlace place,
									const char *name);

#endif /* ES_KAFKA_ARGUMENT_H */
