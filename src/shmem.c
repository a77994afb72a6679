/*
 * shmem.c
 *		Reserving and laying out the extension's shared memory at server start.
 *
 * Wiring only: what lies there, and under which locks, is told where it is
 * declared (position/head.h and watch.c, worker/wake.c and listeners.c, feed/key_reads.c,
 * kafka/log.c, stats/work.c).  A crash of any backend makes the postmaster lay it all out anew.
 */
#include "postgres.h"

#include "shmem.h"

#include "errors.h"
#include "feed/key_reads.h"
#include "kafka/log.h"
#include "miscadmin.h"
#include "position/head.h"
#include "position/watch.h"
#include "stats/work.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "worker/listeners.h"
#include "worker/wake.h"

static bool					   preloaded = false;
static shmem_request_hook_type prev_shmem_request = NULL;
static shmem_startup_hook_type prev_shmem_startup = NULL;

static void
request_shmem(void)
{
	if (prev_shmem_request != NULL)
		prev_shmem_request();
	RequestAddinShmemSpace(es_head_shmem_size());
	RequestAddinShmemSpace(es_watch_shmem_size());
	RequestAddinShmemSpace(es_wake_shmem_size());
	RequestAddinShmemSpace(es_listeners_shmem_size());
	RequestAddinShmemSpace(es_key_reads_shmem_size());
	RequestAddinShmemSpace(es_kafka_log_shmem_size());
	RequestAddinShmemSpace(es_work_shmem_size());
	RequestNamedLWLockTranche("EventstoreHead", 1);
	RequestNamedLWLockTranche("EventstoreWatch", 1);
	RequestNamedLWLockTranche("EventstoreWake", 1);
	RequestNamedLWLockTranche("EventstoreKeyReads", 1);
	RequestNamedLWLockTranche("EventstoreKafkaLog", 1);
	RequestNamedLWLockTranche("EventstoreWork", 1);
}

static void
startup_shmem(void)
{
	if (prev_shmem_startup != NULL)
		prev_shmem_startup();
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	es_head_shmem_init();
	es_watch_shmem_init();
	es_wake_shmem_init();
	es_listeners_shmem_init();
	es_key_reads_shmem_init();
	es_kafka_log_shmem_init();
	es_work_shmem_init();
	LWLockRelease(AddinShmemInitLock);
}

void
es_shmem_install(void)
{
	prev_shmem_request = shmem_request_hook;
	shmem_request_hook = request_shmem;
	prev_shmem_startup = shmem_startup_hook;
	shmem_startup_hook = startup_shmem;
	preloaded = true;
}

bool
es_preloaded(void)
{
	return preloaded;
}

void
es_require_preloaded(void)
{
	if (!preloaded)
		ereport(ERROR, (errcode(ERRCODE_ES_NOT_PRELOADED),
						errmsg("eventstore was not loaded at server start"),
						errhint("Add shared_preload_libraries = 'eventstore' to "
								"postgresql.conf and restart the server.")));
}
