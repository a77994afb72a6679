#include "postgres.h"

#include "storage/ipc.h"
#include "worker/process.h"

void
es_sink_main(Datum arg)
{
	es_process_begin(es_process_key(ES_WORKER_SINK, arg));
	es_worker_set_absent();
	proc_exit(0);
}
