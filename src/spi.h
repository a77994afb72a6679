/*
 * spi.h
 *		SPI and role switching in one place.
 */
#ifndef ES_SPI_H
#define ES_SPI_H

#include "postgres.h"

#include "executor/spi.h"

typedef struct EsRoleSwitch
{
	Oid user;
	int context;
	int guc_level;
} EsRoleSwitch;

/*
 * Acts as 'role' in a security-restricted operation with a locked search_path
 * until es_role_restore.  An error restores by itself (transaction abort).
 */
extern void es_role_assume(Oid role, EsRoleSwitch *saved);
extern void es_role_restore(const EsRoleSwitch *saved);

/* The owner of schema eventstore: who may write the extension's own tables. */
extern Oid es_extension_owner(void);

/* The OID of schema eventstore; InvalidOid where the extension is not there. */
extern Oid es_extension_schema(void);

/*
 * Keeps the extension from being dropped until the end of the transaction.
 * False where it is not there or is just being dropped.
 */
extern bool es_extension_pin(void);

/*
 * The same for who can wait, up to lock_timeout, for who updates or drops it; to
 * be called before a transaction takes other locks.  Nothing where it is not there.
 */
extern void es_extension_share(void);

/*
 * Before ALTER EXTENSION of that name: where it is this one, and the caller's, waits
 * for all who have pinned it, and keeps others from it until the end of the
 * transaction.
 */
extern void es_extension_lock(const char *name);

/* The OID of a relation of schema eventstore; an error where it is missing. */
extern Oid es_extension_relation(const char *name);

/*
 * A copy (heap_freetuple) of the row of such a table that has this OID in this
 * column, and its first 'natts' fields; NULL where there is none.  Found by the
 * named index, or by the primary key; without rights, with a catalog snapshot.
 * The table may have more columns, or fewer, than this library knows: between
 * ALTER EXTENSION ... UPDATE and the restart, or the other way round.
 */
extern HeapTuple es_extension_row(const char *table, const char *index, AttrNumber column,
								  Oid key, int natts, Datum *values, bool *nulls);

/*
 * SPI_execute_with_args, nulls as in SPI; expects 'expected' (an SPI_OK_ code)
 * and raises XX000 otherwise.  Between SPI_connect and SPI_finish.
 */
extern void es_spi_execute(const char *sql, int nargs, Oid *types, Datum *values,
						   const char *nulls, bool read_only, int expected);

/* The same without arguments, with a snapshot of now whatever the transaction's is. */
extern void es_spi_execute_now(const char *sql, int expected);

/*
 * One statement as the extension's owner, with SPI opened and closed around it;
 * how many rows.  Otherwise as es_spi_execute, not read-only.
 */
extern uint64 es_spi_execute_as_owner(const char *sql, int nargs, Oid *types,
									  Datum *values, const char *nulls, int expected);

/* An array to be a statement's value; nulls as flags, NULL: there are none. */
extern Datum es_spi_array(Datum *elements, bool *nulls, int n, Oid type);

/* The schema-qualified, quoted name of a relation; an error when it is gone. */
extern char *es_relation_name(Oid relid);

/* The owner of a relation that exists. */
extern Oid es_relation_owner(Oid relid);

#endif /* ES_SPI_H */
