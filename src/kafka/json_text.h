/*
 * kafka/json_text.h
 *		JSON as text, the same as PostgreSQL writes it, at a third of the price.
 */
#ifndef ES_KAFKA_JSON_TEXT_H
#define ES_KAFKA_JSON_TEXT_H

#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/jsonb.h"

/* In quotes, escaped; the text is in the database's encoding. */
extern void es_json_add_string(StringInfo out, const char *text, int length);

/* What jsonb's output function makes of it. */
extern void es_json_add(StringInfo out, Jsonb *json);

#endif /* ES_KAFKA_JSON_TEXT_H */
