/*
 * guc.c
 *		The extension's settings.
 *
 * docs/reference.md is made from the descriptions below.  What only the worker
 * reads can be set by a superuser: in postgresql.conf, or for one database by
 * ALTER DATABASE ... SET (which its worker sees when it starts the next time).
 * What a backend obeys while it appends is the user's own to set.
 */
#include "postgres.h"

#include "guc.h"

#include <limits.h>

#include "utils/guc.h"

int es_segments_ahead = 3;
int es_segment_timeout_ms = 30 * 1000;
int es_maintenance_interval_ms = 10 * 1000;
int es_tick_delay_ms = 100;
int es_notify_interval_ms = 1;
int es_max_hold_warning_ms = 0;
int es_max_hold_ms = 0;
int es_subscription_hold_ms = -1;
int es_kafka_renew_after_ms = 2 * 60 * 1000;

/* All of ours are whole numbers; 'flags' carries the unit. */
static void
define_int(const char *name, const char *summary, const char *details, int *variable,
		   int min, int max, GucContext context, int flags)
{
	DefineCustomIntVariable(name, summary, details, variable, *variable, min, max,
							context, flags, NULL, NULL, NULL);
}

void
es_guc_define(void)
{
	define_int("eventstore.segments_ahead",
			   "Empty segments that are kept ready beyond the one being filled.",
			   "One INSERT or COPY can fill those that were ready when it began; the "
			   "append functions make the next one.",
			   &es_segments_ahead, 1, 100, PGC_SUSET, 0);
	define_int("eventstore.segment_timeout",
			   "How long an append waits for the worker to make a segment.",
			   "The append fails after that (55000). An INSERT or COPY that begins with "
			   "less room than one segment, or 1,000 positions, waits as long, then goes "
			   "on with what there is.",
			   &es_segment_timeout_ms, 1, INT_MAX, PGC_USERSET, GUC_UNIT_MS);
	define_int(
		"eventstore.maintenance_interval",
		"How often the worker looks at segments and retention without being asked.", NULL,
		&es_maintenance_interval_ms, 100, INT_MAX, PGC_SUSET, GUC_UNIT_MS);
	define_int("eventstore.tick_delay",
			   "Quiet time after which a collection's head is noted in a table.",
			   "Readers at REPEATABLE READ and above, and on a standby, see the last "
			   "events of a burst after this time.",
			   &es_tick_delay_ms, 10, INT_MAX, PGC_SUSET, GUC_UNIT_MS);
	define_int("eventstore.notify_interval",
			   "Time between two notifications for one collection.",
			   "What becomes readable meanwhile is announced together. Where many "
			   "sessions listen it is longer: 0.1 ms for each, up to 50 ms.",
			   &es_notify_interval_ms, 0, 60 * 1000, PGC_SUSET, GUC_UNIT_MS);
	define_int("eventstore.hold_warning",
			   "Age from which a transaction that holds back the head of a collection is "
			   "reported in the log.",
			   "0 turns this off.", &es_max_hold_warning_ms, 0, INT_MAX, PGC_SUSET,
			   GUC_UNIT_MS);
	define_int("eventstore.max_hold",
			   "Age from which a session whose transaction holds back the head of a "
			   "collection is terminated.",
			   "0 turns this off.", &es_max_hold_ms, 0, INT_MAX, PGC_SUSET, GUC_UNIT_MS);
	define_int(
		"eventstore.subscription_hold",
		"How long retention waits for a subscription that nobody polls, or a sink that "
		"publishes nothing.",
		"It keeps what the slowest lane has not passed, until the subscription was not "
		"polled or acknowledged (the sink's position not saved) for so long. -1 waits "
		"without limit, 0 does not wait; truncate_before never waits.",
		&es_subscription_hold_ms, -1, INT_MAX, PGC_SUSET, GUC_UNIT_MS);
	define_int(
		"eventstore.kafka_renew_after",
		"How long a source or sink may find no broker until it begins with a new client.",
		"A new one looks the addresses up anew; librdkafka keeps to those that it has "
		"learned.",
		&es_kafka_renew_after_ms, 1000, INT_MAX, PGC_SUSET, GUC_UNIT_MS);
	MarkGUCPrefixReserved("eventstore");
}
