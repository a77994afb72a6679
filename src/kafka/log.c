/*
 * kafka/log.c
 *		The last things that librdkafka said, in shared memory.
 *
 * A ring of lines for the whole server, so that somebody who may not read the
 * server's log, and finds a source standing still, can see why.  Each line
 * belongs to a database, and only its sessions are shown it.  Writers blot out
 * secrets before a line comes here (client.c).
 *
 * One LWLock, held for copying a line or, by a reader, the whole ring.  A crash
 * empties it.
 */
#include "postgres.h"

#include "kafka/log.h"

#include "catalog/pg_authid.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "shmem.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(es_stat_kafka_log);

#define RING_LINES 200

typedef struct LogLine
{
	TimestampTz at;
	Oid			database;
	Oid			owner;
	int			level; /* syslog's */
	char		worker[NAMEDATALEN];
	char		facility[32];
	char		message[512];
} LogLine;

/* All under the lock. */
typedef struct LogRing
{
	uint64	written; /* since the start; the next goes to this modulo RING_LINES */
	LogLine lines[RING_LINES];
} LogRing;

static LogRing *ring = NULL;
static LWLock  *ring_lock = NULL;

Size
es_kafka_log_shmem_size(void)
{
	return sizeof(LogRing);
}

void
es_kafka_log_shmem_init(void)
{
	bool found;

	ring = ShmemInitStruct("eventstore kafka log", sizeof(LogRing), &found);
	if (!found)
		memset(ring, 0, sizeof(LogRing));
	ring_lock = &GetNamedLWLockTranche("EventstoreKafkaLog")->lock;
}

/* A broker's words may be in any encoding, and must not look like lines of a log. */
void
es_kafka_clean_text(char *to, Size size, const char *from)
{
	Size length = strlen(from);
	bool valid;

	while (length > 0 && (from[length - 1] == '\n' || from[length - 1] == ' '))
		length--;
	valid = pg_verifymbstr(from, length, true);
	if (length >= size)
		length = valid ? pg_mbcliplen(from, length, size - 1) : size - 1;
	for (Size i = 0; i < length; i++)
	{
		unsigned char c = from[i];

		if (c < ' ' || c == 0x7f)
			to[i] = ' ';
		else
			to[i] = (c < 0x80 || valid) ? c : '?';
	}
	to[length] = '\0';
}

void
es_kafka_log_add(Oid owner, const char *worker, int level, const char *facility,
				 const char *message)
{
	LogLine line = {0};

	if (ring == NULL)
		return;
	line.at = GetCurrentTimestamp();
	line.database = MyDatabaseId;
	line.owner = owner;
	line.level = level;
	es_kafka_clean_text(line.worker, sizeof(line.worker), worker);
	es_kafka_clean_text(line.facility, sizeof(line.facility), facility);
	es_kafka_clean_text(line.message, sizeof(line.message), message);

	LWLockAcquire(ring_lock, LW_EXCLUSIVE);
	ring->lines[ring->written++ % RING_LINES] = line;
	LWLockRelease(ring_lock);
}

static const char *
level_name(int level)
{
	static const char *const names[] = {"emergency", "alert",  "critical", "error",
										"warning",	 "notice", "info",	   "debug"};

	return names[Max(0, Min(level, (int) lengthof(names) - 1))];
}

static void
put_line(FunctionCallInfo fcinfo, const LogLine *line)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	Datum		   values[5];
	bool		   nulls[5] = {false};

	values[0] = TimestampTzGetDatum(line->at);
	values[1] = CStringGetTextDatum(line->worker);
	values[2] = CStringGetTextDatum(level_name(line->level));
	values[3] = CStringGetTextDatum(line->facility);
	values[4] = CStringGetTextDatum(line->message);
	tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
}

static bool
may_see_line(const LogLine *line, bool monitor)
{
	return line->database == MyDatabaseId &&
		   (monitor ||
			(OidIsValid(line->owner) && has_privs_of_role(GetUserId(), line->owner)));
}

Datum
es_stat_kafka_log(PG_FUNCTION_ARGS)
{
	bool	 monitor = has_privs_of_role(GetUserId(), ROLE_PG_MONITOR);
	LogRing *copy;
	uint64	 first;

	InitMaterializedSRF(fcinfo, 0);
	if (!es_preloaded())
		PG_RETURN_NULL();

	copy = palloc(sizeof(LogRing));
	LWLockAcquire(ring_lock, LW_SHARED);
	memcpy(copy, ring, sizeof(LogRing));
	LWLockRelease(ring_lock);

	first = copy->written > RING_LINES ? copy->written - RING_LINES : 0;
	for (uint64 i = first; i < copy->written; i++)
	{
		const LogLine *line = &copy->lines[i % RING_LINES];

		if (may_see_line(line, monitor))
			put_line(fcinfo, line);
	}
	PG_RETURN_NULL();
}
