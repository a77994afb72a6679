/*
 * feed/lease.c
 *		Leases: who is the leader, who is there.
 *
 * A lease is a row of eventstore.lease: a name, who holds it, until when.  It
 * is taken, refreshed and given back by ordinary changes of that row, which
 * hold from the caller's commit on and survive a crash.  The clock ends it, not
 * a backend's life, so it works through a pooler, and a holder that dies is
 * followed when its time is up.
 *
 * One statement decides: INSERT ... ON CONFLICT DO UPDATE ... WHERE it is free or
 * ours.  Two who come at once meet in the unique index; the second waits for the
 * first's commit and then looks at the row, and at the clock, anew.  So a
 * transaction that takes a lease should commit at once: until it does, who else
 * wants it waits.
 *
 * A holder is a name, which anybody could give.  So each lease also has the
 * role that took it, and only who has that role's privileges is its holder.
 *
 * Rows whose time is up are not shown.  Taking a lease, which is rarer than
 * refreshing one, sweeps out a few that have been over for SWEEP_AFTER: names
 * that never come again (presence) do not pile up.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "errors.h"
#include "feed/subscription.h"
#include "miscadmin.h"
#include "spi.h"
#include "tcop/utility.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#define SWEEP_AFTER	  "1 minute"
#define SWEEP_AT_ONCE "10"

PG_FUNCTION_INFO_V1(es_lease);
PG_FUNCTION_INFO_V1(es_release_lease);

/* Somebody who is at one of them just now keeps it, and nobody waits. */
static void
sweep_out(void)
{
	es_spi_execute(
		"DELETE FROM eventstore.lease WHERE name IN"
		" (SELECT name FROM eventstore.lease"
		" WHERE expires_at < pg_catalog.clock_timestamp() - interval '" SWEEP_AFTER "'"
		" LIMIT " SWEEP_AT_ONCE " FOR UPDATE SKIP LOCKED)",
		0, NULL, NULL, NULL, false, SPI_OK_DELETE);
}

/* The row is given back by xmax = 0 where it is new; none where another has it. */
static bool
take_lease(Datum *values, const char *nulls)
{
	Oid	 types[] = {TEXTOID, TEXTOID, INTERVALOID, JSONBOID, OIDOID};
	bool isnull;

	es_spi_execute(
		"INSERT INTO eventstore.lease AS l"
		" (name, holder, metadata, role, expires_at)"
		" VALUES ($1, $2, $4, $5, pg_catalog.clock_timestamp() + $3)"
		" ON CONFLICT (name) DO UPDATE SET holder = excluded.holder,"
		/* Refreshing leaves the role that took it, and metadata unless given. */
		" metadata = CASE WHEN l.expires_at > pg_catalog.clock_timestamp()"
		" THEN coalesce(excluded.metadata, l.metadata) ELSE excluded.metadata END,"
		" role = CASE WHEN l.expires_at > pg_catalog.clock_timestamp()"
		" THEN l.role ELSE excluded.role END,"
		" expires_at = pg_catalog.clock_timestamp() + $3"
		" WHERE l.expires_at <= pg_catalog.clock_timestamp()"
		" OR (l.holder = excluded.holder AND pg_catalog.pg_has_role($5, l.role, 'USAGE'))"
		" RETURNING xmax = 0",
		5, types, values, nulls, false, SPI_OK_INSERT_RETURNING);
	if (SPI_processed == 0)
		return false;
	if (DatumGetBool(
			SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull)))
		sweep_out();
	return true;
}

/* lease(name, holder, ttl, metadata) */
Datum
es_lease(PG_FUNCTION_ARGS)
{
	text		*name = es_name_arg(&fcinfo->args[0], "name");
	text		*holder = es_name_arg(&fcinfo->args[1], "holder");
	Interval	*ttl = es_interval_arg(&fcinfo->args[2], "ttl", true);
	Datum		 values[] = {PointerGetDatum(name), PointerGetDatum(holder),
							 IntervalPGetDatum(ttl), fcinfo->args[3].value,
							 ObjectIdGetDatum(GetUserId())};
	char		 nulls[] = {' ', ' ', ' ', fcinfo->args[3].isnull ? 'n' : ' ', ' ', '\0'};
	EsRoleSwitch saved;
	bool		 taken;

	es_refuse_null(&fcinfo->args[2], "ttl");
	PreventCommandIfReadOnly("lease");
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	taken = take_lease(values, nulls);
	SPI_finish();
	es_role_restore(&saved);
	PG_RETURN_BOOL(taken);
}

/* release_lease(name, holder) */
Datum
es_release_lease(PG_FUNCTION_ARGS)
{
	text		*name = es_name_arg(&fcinfo->args[0], "name");
	text		*holder = es_name_arg(&fcinfo->args[1], "holder");
	Oid			 types[] = {TEXTOID, TEXTOID, OIDOID};
	Datum		 values[] = {PointerGetDatum(name), PointerGetDatum(holder),
							 ObjectIdGetDatum(GetUserId())};
	EsRoleSwitch saved;
	bool		 released;

	PreventCommandIfReadOnly("release_lease");
	es_role_assume(es_extension_owner(), &saved);
	SPI_connect();
	es_spi_execute("DELETE FROM eventstore.lease WHERE name = $1 AND holder = $2"
				   " AND expires_at > pg_catalog.clock_timestamp()"
				   " AND pg_catalog.pg_has_role($3, role, 'USAGE')",
				   3, types, values, NULL, false, SPI_OK_DELETE);
	released = SPI_processed > 0;
	SPI_finish();
	es_role_restore(&saved);
	PG_RETURN_BOOL(released);
}
