/*
 * compat.h
 *		The one place that knows which PostgreSQL it is built against.
 *
 * Everything else is written for the newest interface; this file lends it to
 * the older servers.  Dropping a version means deleting lines here.
 */
#ifndef ES_COMPAT_H
#define ES_COMPAT_H

#include "postgres.h"

#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_class.h"
#include "executor/executor.h"
#include "utils/wait_event.h"

#if PG_VERSION_NUM < 150000
#error "eventstore needs PostgreSQL 15 or newer"
#endif

/* VARDATA_ANY and its like have a header of their own since 16 (d952373a9). */
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

/*
 * Wait events of our own have names since 17 (c8e318b1b); before, every
 * extension shares one event.
 */
#if PG_VERSION_NUM >= 170000
#define es_wait_event(cache, name)                                                       \
	((cache) != 0 ? (cache) : ((cache) = WaitEventExtensionNew(name)))
#else
#define es_wait_event(cache, name) ((void) (cache), (uint32) PG_WAIT_EXTENSION)
#endif

/* One function for all kinds of objects since 16 (afbfc0298). */
#if PG_VERSION_NUM >= 160000
#include "catalog/pg_database.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_namespace.h"
#include "catalog/pg_proc.h"

#define es_owns_relation(relid, roleid)                                                  \
	object_ownercheck(RelationRelationId, (relid), (roleid))
#define es_owns_database(dbid, roleid)                                                   \
	object_ownercheck(DatabaseRelationId, (dbid), (roleid))
#define es_owns_extension(extension, roleid)                                             \
	object_ownercheck(ExtensionRelationId, (extension), (roleid))
#define es_schema_aclcheck(schema, roleid, mode)                                         \
	object_aclcheck(NamespaceRelationId, (schema), (roleid), (mode))
#define es_server_aclcheck(server, roleid, mode)                                         \
	object_aclcheck(ForeignServerRelationId, (server), (roleid), (mode))
#else
#define es_owns_relation(relid, roleid) pg_class_ownercheck((relid), (roleid))
#define es_owns_database(dbid, roleid)	pg_database_ownercheck((dbid), (roleid))
#define es_owns_extension(extension, roleid)                                             \
	pg_extension_ownercheck((extension), (roleid))
#define es_schema_aclcheck(schema, roleid, mode)                                         \
	pg_namespace_aclcheck((schema), (roleid), (mode))
#define es_server_aclcheck(server, roleid, mode)                                         \
	pg_foreign_server_aclcheck((server), (roleid), (mode))
#endif

/* A process's virtual transaction id is a struct of its own since 17 (ab355e3a88). */
#if PG_VERSION_NUM >= 170000
#define es_local_xid() (MyProc->vxid.lxid)
#else
#define es_local_xid() (MyProc->lxid)
#endif

/* The helpers of EXPLAIN have headers of their own since 18. */
#if PG_VERSION_NUM >= 180000
#include "commands/explain_format.h"
#include "commands/explain_state.h"
#endif

/* Executor and planner entry points that took another shape. */
#if PG_VERSION_NUM >= 180000
#define es_index_beginscan(rel, index, snapshot, nkeys)                                  \
	index_beginscan((rel), (index), (snapshot), NULL, (nkeys), 0)
#define es_executor_run(desc, count) ExecutorRun((desc), ForwardScanDirection, (count))
#else
#define es_index_beginscan(rel, index, snapshot, nkeys)                                  \
	index_beginscan((rel), (index), (snapshot), (nkeys), 0)
#define es_executor_run(desc, count)                                                     \
	ExecutorRun((desc), ForwardScanDirection, (count), false)
#endif

#if PG_VERSION_NUM >= 160000
#define es_expression_pathkey(root, expr, opno, relids)                                  \
	build_expression_pathkey((root), (expr), (opno), (relids), false)
#define es_function_aclcheck(func, roleid, mode)                                         \
	object_aclcheck(ProcedureRelationId, (func), (roleid), (mode))
#else
#define es_expression_pathkey(root, expr, opno, relids)                                  \
	build_expression_pathkey((root), (expr), NULL, (opno), (relids), false)
#define es_function_aclcheck(func, roleid, mode)                                         \
	pg_proc_aclcheck((func), (roleid), (mode))
#endif

/* May be asked for stronger locks as well since 17 (a00a70a1f). */
#if PG_VERSION_NUM >= 170000
#define es_lock_held_by_me(tag, mode) LockHeldByMe((tag), (mode), false)
#else
#define es_lock_held_by_me(tag, mode) LockHeldByMe((tag), (mode))
#endif

/* The relation's file, which changes when the table is rewritten. */
#if PG_VERSION_NUM >= 160000
#define es_relation_file(rel) ((rel)->rd_locator.relNumber)
#else
#define es_relation_file(rel) ((rel)->rd_node.relNode)
#endif

/* Summarizing indexes are told apart since 16 (19d8e2308). */
#if PG_VERSION_NUM >= 160000
#define es_insert_index_tuples(rri, slot, estate, conflict, arbiters)                    \
	ExecInsertIndexTuples((rri), (slot), (estate), false, (conflict) != NULL,            \
						  (conflict), (arbiters), false)
#else
#define es_insert_index_tuples(rri, slot, estate, conflict, arbiters)                    \
	ExecInsertIndexTuples((rri), (slot), (estate), false, (conflict) != NULL,            \
						  (conflict), (arbiters))
#endif

/* Replaces a row that the caller has locked; true where indexes need entries. */
static inline bool
es_update_tuple(Relation rel, ItemPointer tid, TupleTableSlot *slot)
{
#if PG_VERSION_NUM >= 160000
	TU_UpdateIndexes update_indexes;

	simple_table_tuple_update(rel, tid, slot, InvalidSnapshot, &update_indexes);
	return update_indexes != TU_None;
#else
	bool update_indexes;

	simple_table_tuple_update(rel, tid, slot, InvalidSnapshot, &update_indexes);
	return update_indexes;
#endif
}

/* table_tuple_update at the newest command; true in 'needs_indexes' as above. */
static inline TM_Result
es_try_update_tuple(Relation rel, ItemPointer tid, TupleTableSlot *slot,
					Snapshot snapshot, TM_FailureData *failure, bool *needs_indexes)
{
	CommandId	  cid = GetCurrentCommandId(true);
	LockTupleMode mode;
	TM_Result	  result;
#if PG_VERSION_NUM >= 160000
	TU_UpdateIndexes update_indexes = TU_None;
#else
	bool update_indexes = false;
#endif

	result = table_tuple_update(rel, tid, slot, cid, snapshot, InvalidSnapshot, true,
								failure, &mode, &update_indexes);
#if PG_VERSION_NUM >= 160000
	*needs_indexes = update_indexes != TU_None;
#else
	*needs_indexes = update_indexes;
#endif
	return result;
}

/* nbtree's search took the heap in 16 and lost its "snapshot too old" in 17. */
#if PG_VERSION_NUM >= 170000
#define es_bt_search(index, key, buffer, snapshot)                                       \
	_bt_search((index), NULL, (key), (buffer), BT_READ)
#define es_bt_search_to_write(index, heap, key, buffer)                                  \
	_bt_search((index), (heap), (key), (buffer), BT_WRITE)
#define es_test_for_old_snapshot(snapshot, rel, page) ((void) 0)
#elif PG_VERSION_NUM >= 160000
#define es_bt_search(index, key, buffer, snapshot)                                       \
	_bt_search((index), NULL, (key), (buffer), BT_READ, (snapshot))
#define es_bt_search_to_write(index, heap, key, buffer)                                  \
	_bt_search((index), (heap), (key), (buffer), BT_WRITE, NULL)
#define es_test_for_old_snapshot(snapshot, rel, page)                                    \
	TestForOldSnapshot((snapshot), (rel), (page))
#else
#define es_bt_search(index, key, buffer, snapshot)                                       \
	_bt_search((index), (key), (buffer), BT_READ, (snapshot))
#define es_bt_search_to_write(index, heap, key, buffer)                                  \
	_bt_search((index), (key), (buffer), BT_WRITE, NULL)
#define es_test_for_old_snapshot(snapshot, rel, page)                                    \
	TestForOldSnapshot((snapshot), (rel), (page))
#endif

/* A process's number, from 0, among MaxBackends; backend ids went in 17 (024c52111). */
#if PG_VERSION_NUM >= 170000
#define es_process_number() (MyProcNumber)
#else
#define es_process_number() (MyBackendId - 1)
#endif

/* What a hook of ExecutorRun takes; it is told no more since 18 that it is run once. */
#if PG_VERSION_NUM >= 180000
#define ES_EXECUTOR_RUN_PARAMETERS QueryDesc *query, ScanDirection direction, uint64 count
#define ES_EXECUTOR_RUN_ARGUMENTS  query, direction, count
#else
#define ES_EXECUTOR_RUN_PARAMETERS                                                       \
	QueryDesc *query, ScanDirection direction, uint64 count, bool once
#define ES_EXECUTOR_RUN_ARGUMENTS query, direction, count, once
#endif

/* A slot's copy as a minimal tuple can have room in front since 18. */
#if PG_VERSION_NUM >= 180000
#define ES_COPY_MINIMAL_ARGS(slot) slot, Size extra
#define ES_COPY_MINIMAL_PASS(slot) (slot), extra
#else
#define ES_COPY_MINIMAL_ARGS(slot) slot
#define ES_COPY_MINIMAL_PASS(slot) (slot)
#endif

/* What owns a set of events that lives as long as the process; a resource owner since 17. */
#if PG_VERSION_NUM >= 170000
#define es_create_wait_set(events) CreateWaitEventSet(NULL, (events))
#else
#define es_create_wait_set(events) CreateWaitEventSet(TopMemoryContext, (events))
#endif

/* A deferrable one may be asked for since 18 (it is not meant). */
#if PG_VERSION_NUM >= 180000
#define es_primary_key(rel) RelationGetPrimaryKeyIndex((rel), false)
#else
#define es_primary_key(rel) RelationGetPrimaryKeyIndex(rel)
#endif

/* How keys that are plain memory are compared, hashed and, since 17, copied. */
#if PG_VERSION_NUM >= 170000
#define ES_DSHASH_MEMORY dshash_memcmp, dshash_memhash, dshash_memcpy
#else
#define ES_DSHASH_MEMORY dshash_memcmp, dshash_memhash
#endif

/* Goes before the type since 18, where it was allowed before as well. */
#if PG_VERSION_NUM >= 180000
#define es_noreturn pg_noreturn
#else
#define es_noreturn pg_attribute_noreturn()
#endif

/* PostgreSQL 15 exports everything; later servers need the mark on worker mains. */
#ifndef PGDLLEXPORT
#define PGDLLEXPORT
#endif

#endif /* ES_COMPAT_H */
