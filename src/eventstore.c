/*
 * eventstore.c
 *		What happens when the library is loaded.
 *
 * Loaded by shared_preload_libraries, it registers everything that has to be
 * there from the start: shared memory, the launcher, the hooks.  Loaded later
 * (a function is called on a server that does not preload it), it only defines
 * the settings and must not fail: plain tables stay readable, and what needs
 * shared memory says so itself (LG006).
 */
#include "postgres.h"

#include "collection/append.h"
#include "feed/read.h"
#include "fmgr.h"
#include "guc.h"
#include "kafka/owner.h"
#include "kafka/publish.h"
#include "kafka/replica.h"
#include "miscadmin.h"
#include "position/head.h"
#include "shmem.h"
#include "stats/work.h"
#include "store/store.h"
#include "store/statement.h"
#include "worker/launcher.h"
#include "worker/listeners.h"

PG_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

void
_PG_init(void)
{
	es_guc_define();
	if (!process_shared_preload_libraries_in_progress)
		return;

	es_shmem_install();
	es_head_install();
	es_launcher_install();
	es_listeners_install();
	es_append_install_hooks();
	es_statement_install();
	es_owner_install();
	es_read_install();
	es_work_install();
	es_store_follow_hook = es_replica_check;
	es_store_origin_hook = es_publish_origin;
}
