/*
 * kafka/resync.h
 *		Keys that a store has, and its topic has no more.
 */
#ifndef ES_KAFKA_RESYNC_H
#define ES_KAFKA_RESYNC_H

#include "kafka/run.h"

/*
 * Reads the partitions of the run from their beginning to where they are written,
 * and removes the keys that are not there, where the source asks for it.  The
 * caller assigns the partitions anew.  False, with run->leave, where it was
 * called away: it begins again the next time.
 */
extern bool es_resync(EsSourceRun *run);

#endif /* ES_KAFKA_RESYNC_H */
