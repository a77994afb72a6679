/*
 * worker/process.c
 *		How each of a database's workers begins.
 *
 * A worker takes its slot before it connects, so that DROP DATABASE can stop one
 * that is about to start (wake.c), and gives it back after its connection is
 * gone.  Settings of the database or of a role are not meant for it.
 */
#include "postgres.h"

#include "worker/process.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "spi.h"
#include "storage/ipc.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"

static void
fix_settings(void)
{
	static const char *const settings[][2] = {
		{"search_path", ""},
		{"lock_timeout", ES_WORKER_LOCK_TIMEOUT},
		{"statement_timeout", "0"},
		{"idle_in_transaction_session_timeout", "0"},
		/* as a store's keys of bytes are spelt in its changelog */
		{"bytea_output", "hex"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_read_only", "off"},
		{"default_transaction_deferrable", "off"},
		{"session_replication_role", "origin"},
		/* Nothing that a worker commits is owed to anybody. */
		{"synchronous_commit", "off"},
	};

	for (int i = 0; i < lengthof(settings); i++)
		SetConfigOption(settings[i][0], settings[i][1], PGC_SUSET, PGC_S_OVERRIDE);
	/* PostgreSQL 17 and later */
	if (GetConfigOption("transaction_timeout", true, false) != NULL)
		SetConfigOption("transaction_timeout", "0", PGC_SUSET, PGC_S_OVERRIDE);
}

EsWorkerKey
es_process_key(EsWorkerKind kind, Datum arg)
{
	EsWorkerKey key = {DatumGetObjectId(arg), kind, 0};

	memcpy(&key.object, MyBgworkerEntry->bgw_extra, sizeof(key.object));
	return key;
}

void
es_process_begin(EsWorkerKey key)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();

	if (!es_worker_attach(key))
		proc_exit(0);
	BackgroundWorkerInitializeConnectionByOid(key.database, InvalidOid, 0);
	pgstat_report_appname(psprintf("eventstore %s", es_worker_kind_name(key.kind)));
	fix_settings();
}

bool
es_process_has_extension(void)
{
	MemoryContext caller = CurrentMemoryContext;
	bool		  present;

	StartTransactionCommand();
	present = OidIsValid(es_extension_schema());
	CommitTransactionCommand();
	MemoryContextSwitchTo(caller);
	return present;
}

bool
es_process_interrupts(void)
{
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
	return es_worker_take(ES_WAKE_STOP) != 0;
}
