/*
 * kafka/argument.c
 *		Arguments that the functions about sources and sinks have in common.
 *
 * Whatever can be checked is checked in the session of who gives it: a worker
 * could only complain.  Computes, and takes no locks.
 */
#include "postgres.h"

#include "kafka/argument.h"

#include "catalog/pg_proc.h"
#include "compat.h"
#include "feed/subscription.h"
#include "lib/stringinfo.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#define FLUSH_COUNT_MAX 1000000
#define TOPIC_MAX_BYTES 249 /* Kafka's own limit */

void
es_kafka_refuse(const char *name, const char *detail)
{
	ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					errmsg("invalid value for argument \"%s\"", name),
					errdetail_internal("%s", detail)));
}

int
es_kafka_word_index(const char *const *words, const char *word)
{
	for (int i = 0; words[i] != NULL; i++)
		if (strcmp(words[i], word) == 0)
			return i;
	return -1;
}

int
es_kafka_word_arg(const NullableDatum *arg, const char *name, const char *const *words)
{
	char		  *given;
	int			   index;
	StringInfoData list;

	if (arg->isnull)
		return 0;
	given = TextDatumGetCString(arg->value);
	index = es_kafka_word_index(words, given);
	if (index >= 0)
		return index;
	initStringInfo(&list);
	for (int i = 0; words[i] != NULL; i++)
		appendStringInfo(&list, "%s\"%s\"", i > 0 ? ", " : "", words[i]);
	es_kafka_refuse(name, psprintf("It is \"%s\"; there are %s.", given, list.data));
}

char *
es_kafka_topic_arg(const NullableDatum *arg, const char *name)
{
	char  *topic = TextDatumGetCString(arg->value);
	size_t length = strlen(topic);

	if (length == 0 || length > TOPIC_MAX_BYTES || strcmp(topic, ".") == 0 ||
		strcmp(topic, "..") == 0 ||
		strspn(topic,
			   "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") !=
			length)
		es_kafka_refuse(name, psprintf("\"%s\" is no name of a topic: 1 to %d letters, "
									   "digits, dots, hyphens and underscores.",
									   topic, TOPIC_MAX_BYTES));
	return topic;
}

int
es_kafka_flush_count_arg(const NullableDatum *arg, int absent)
{
	int count = arg->isnull ? absent : DatumGetInt32(arg->value);

	if (count < 1 || count > FLUSH_COUNT_MAX)
		es_kafka_refuse("flush_count",
						psprintf("It is %d; it can be 1 to %d.", count, FLUSH_COUNT_MAX));
	return count;
}

void
es_kafka_flush_interval_arg(NullableDatum *arg, const char *absent)
{
	if (arg->isnull)
		arg->value =
			DirectFunctionCall3(interval_in, CStringGetDatum(absent), InvalidOid, -1);
	arg->isnull = false;
	(void) es_interval_arg(arg, "flush_interval", false);
}

bool
es_kafka_function_types(Oid function, Oid *argument, Oid *result)
{
	Oid *argtypes;
	int	 nargs;

	if (!SearchSysCacheExists1(PROCOID, ObjectIdGetDatum(function)))
		return false;
	*result = get_func_signature(function, &argtypes, &nargs);
	if (nargs != 1 || get_func_retset(function) ||
		get_func_prokind(function) != PROKIND_FUNCTION)
		return false;
	*argument = argtypes[0];
	return true;
}

void
es_kafka_check_execute(Oid function, Oid role)
{
	AclResult allowed = es_function_aclcheck(function, role, ACL_EXECUTE);

	if (allowed != ACLCHECK_OK)
		aclcheck_error(allowed, OBJECT_FUNCTION, get_func_name(function));
}

int64
es_kafka_interval_us(Datum interval)
{
	Interval *value = DatumGetIntervalP(interval);

	return value->time +
		   (value->day + (int64) value->month * DAYS_PER_MONTH) * USECS_PER_DAY;
}

void
es_kafka_properties_arg(NullableDatum *arg, EsKafkaPropertyPlace place, const char *name)
{
	if (arg->isnull)
		arg->value = DirectFunctionCall1(jsonb_in, CStringGetDatum("{}"));
	arg->isnull = false;
	es_kafka_check_properties(DatumGetJsonbP(arg->value), place, name);
}
