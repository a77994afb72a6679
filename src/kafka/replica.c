/*
 * kafka/replica.c
 *		Whose a key is to change: stores that follow the changelog topic of another
 *		one, and stores that share a topic with others.
 *
 * A key belongs to a partition, and a partition to one server: its changes reach
 * the changelog topic from there, in their order.  A change that was made
 * elsewhere would be in one copy and in no other.  So a replica takes none, and a
 * store with replica partitions none of keys in these.  In a consumer group with
 * a changelog topic which partitions are ours changes: it is asked at a
 * transaction's first change, and while nobody knows, no key is ours.  A partition
 * that is lost before the transaction commits makes a dead letter of the change (share.c).
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

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "kafka/codec.h"
#include "kafka/share.h"
#include "kafka/source.h"
#include "storage/proc.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"

/* ---------------------------------------------------------------------------
 * Whose is a key?
 * ------------------------------------------------------------------------- */

typedef struct Follower
{
	LocalTransactionId known_in;
	uint32			   id;
	const EsSource	  *source; /* NULL: it is gone */
	const EsShare	  *share;  /* of a group's member, else NULL */
} Follower;

/* For the length of a transaction: a statement may change many keys. */
static const Follower *
load_follower(uint32 id)
{
	static Follower known = {InvalidLocalTransactionId};
	MemoryContext	old;

	if (known.known_in == es_local_xid() && known.id == id)
		return &known;
	known.known_in = InvalidLocalTransactionId;
	old = MemoryContextSwitchTo(TopTransactionContext);
	known.source = es_source_load(id);
	known.share =
		known.source != NULL && known.source->group_id != NULL ? es_share_load(id) : NULL;
	MemoryContextSwitchTo(old);
	known.id = id;
	known.known_in = es_local_xid();
	return &known;
}

static const char *
reason_against_member(const Follower *follower, int32 partition)
{
	if (!es_share_is_settled(follower->share))
		return psprintf(
			"Which partitions are this server's is not known now (source \"%s\").",
			follower->source->name);
	if (es_share_has(follower->share, partition))
		return NULL;
	return psprintf("The key is in partition %d, which is not this server's (source "
					"\"%s\", group \"%s\").",
					partition, follower->source->name, follower->source->group_id);
}

/* Why the key must not be changed here; NULL: it may. */
static const char *
reason_against(const EsStore *store, const Follower *follower, Datum key)
{
	const EsSource *source = follower->source;
	const char	   *bytes;
	size_t			length;
	int32			partition;

	if (source->mode == ES_SOURCE_REPLICA)
		return psprintf("It follows changelog topic \"%s\" (source \"%s\").",
						source->changelog_topic, source->name);
	if (source->partition_count == 0)
		return psprintf(
			"How many partitions topic \"%s\" has is not known yet (source \"%s\").",
			source->topic, source->name);
	bytes = es_codec_bytes(store->key_format, key, &length);
	partition = es_codec_partition(bytes, length, source->partition_count);
	if (follower->share != NULL)
		return reason_against_member(follower, partition);
	for (int i = 0; i < source->nreplicas; i++)
		if (source->replicas[i] == partition)
			return psprintf(
				"The key is in partition %d, which is a replica (source \"%s\").",
				partition, source->name);
	return NULL;
}

void
es_replica_check(const EsStore *store, Datum key)
{
	const Follower *follower = load_follower(store->follower);
	const char	   *reason =
		follower->source != NULL ? reason_against(store, follower, key) : NULL;

	if (reason != NULL)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("this key of store \"%s\" cannot be changed here",
							   get_rel_name(store->relid)),
						errdetail_internal("%s", reason),
						errhint("Change it on the server that reads the partition from "
								"the source's topic.")));
}
