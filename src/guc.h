/*
 * guc.h
 *		The extension's settings (docs/reference.md has them from guc.c).
 */
#ifndef ES_GUC_H
#define ES_GUC_H

#include "postgres.h"

extern int es_segments_ahead;		   /* empty segments kept ready */
extern int es_segment_timeout_ms;	   /* how long an append waits for one */
extern int es_maintenance_interval_ms; /* retention and segments looked at */
extern int es_tick_delay_ms;		   /* quiet time before a tick is noted */
extern int es_notify_interval_ms;	   /* between two notifications for a collection */
extern int
	es_max_hold_warning_ms; /* WARNING for a transaction that holds a head, 0 = never */
extern int es_max_hold_ms;	/* ... and end it, 0 = never */
extern int es_kafka_renew_after_ms; /* no broker for so long: a new client */
extern int
	es_subscription_hold_ms; /* retention waits for subscriptions; -1 = for ever, 0 = not */

extern void es_guc_define(void);

#endif /* ES_GUC_H */
