/*
 * kafka/replica.c
 *		Stores that follow the changelog topic of another one.
 *
 * A key belongs to a partition, and a partition to one server: its changes reach
 * the changelog topic from there, in their order.  A change that was made
 * elsewhere would be in one copy and in no other.  So a replica takes none, and a
 * store with replica partitions none of keys in these.
 *
 * Which partition a key is in: the one that Kafka's own partitioner gives it
 * (murmur2), of as many as the topic had when the worker last looked.  Who writes
 * the topic with another partitioner has keys elsewhere; of those that the
 * store has, the changelog knows better, but asking it for each change would
 * cost more than it is worth: the documentation says so.
 *
 * The mark is in store_catalog, so that a store that follows nobody pays
 * nothing.  Locks: none of its own.
 */
#include "postgres.h"

#include "kafka/replica.h"

#include <librdkafka/rdkafka.h>

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "kafka/codec.h"
#include "kafka/source.h"
#include "storage/proc.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"

/* ---------------------------------------------------------------------------
 * Whose is a key?
 * ------------------------------------------------------------------------- */

/* For the length of a transaction: a statement may change many keys. */
static const EsSource *
load_follower(uint32 id)
{
	static const EsSource *known = NULL;
	static LocalTransactionId known_in = InvalidLocalTransactionId;
	static uint32 known_id = 0;
	MemoryContext old;

	if (known_in == es_local_xid() && known_id == id)
		return known;
	known_in = InvalidLocalTransactionId;
	old = MemoryContextSwitchTo(TopTransactionContext);
	known = es_source_load(id);
	MemoryContextSwitchTo(old);
	known_in = es_local_xid();
	known_id = id;
	return known;
}

/* Why the key must not be changed here; NULL: it may. */
static const char *
reason_against(const EsStore *store, const EsSource *source, Datum key)
{
	const char *bytes;
	size_t		length;
	int32		partition;

	if (source->mode == ES_SOURCE_REPLICA)
		return psprintf("It follows changelog topic \"%s\" (source \"%s\").",
						source->changelog_topic, source->name);
	if (source->partition_count == 0)
		return psprintf("How many partitions topic \"%s\" has is not known yet (source \"%s\").",
						source->topic, source->name);
	bytes = es_codec_bytes(store->key_format, key, &length);
	partition = rd_kafka_msg_partitioner_murmur2(NULL, bytes, length, source->partition_count,
												 NULL, NULL);
	for (int i = 0; i < source->nreplicas; i++)
		if (source->replicas[i] == partition)
			return psprintf("The key is in partition %d, which is a replica (source \"%s\").",
							partition, source->name);
	return NULL;
}

void
es_replica_check(const EsStore *store, Datum key)
{
	const EsSource *source = load_follower(store->follower);
	const char *reason = source != NULL ? reason_against(store, source, key) : NULL;

	if (reason != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("this key of store \"%s\" cannot be changed here",
						get_rel_name(store->relid)),
				 errdetail_internal("%s", reason),
				 errhint("Change it on the server that reads the partition from the source's topic.")));
}
