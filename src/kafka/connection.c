/*
 * kafka/connection.c
 *		What a server and a user mapping say about how to reach Kafka.
 *
 * The connection is PostgreSQL's own: a foreign server and its user mappings,
 * with librdkafka's properties as options.  So rights, dumps and the hiding of
 * secrets are what everybody knows: a mapping's options are shown to the role
 * itself, where it has USAGE on the server, and to the server's owner for that
 * of PUBLIC.  The wrapper has no handler, so there are no foreign tables.
 *
 * Whoever has USAGE on the wrapper can make servers, and so have a worker
 * connect to any host that the database server reaches.  As with postgres_fdw,
 * the grant is the guard: none is made.  USAGE on a server lets a role use its
 * address, its certificates and PUBLIC's mapping, even where a superuser has
 * named files there.
 *
 * Options are checked when they are set.  A worker that reads them does not
 * check rights on files again (as ALTER ROLE would not break a dump that is
 * restored), but only servers of our wrapper are taken.
 */
#include "postgres.h"

#include "kafka/connection.h"

#include "access/htup_details.h"
#include "access/reloptions.h"
#include "catalog/pg_attribute.h"
#include "catalog/pg_class.h"
#include "catalog/pg_foreign_data_wrapper.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_foreign_table.h"
#include "catalog/pg_user_mapping.h"
#include "commands/defrem.h"
#include "compat.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/syscache.h"

#define WRAPPER_NAME "eventstore_kafka"

PG_FUNCTION_INFO_V1(es_kafka_options);

/* ---------------------------------------------------------------------------
 * Setting options
 * ------------------------------------------------------------------------- */

static List *
list_options(List *options)
{
	List	 *list = NIL;
	ListCell *cell;

	foreach (cell, options)
	{
		DefElem			*option = lfirst(cell);
		EsKafkaProperty *property = palloc(sizeof(EsKafkaProperty));

		property->name = option->defname;
		property->value = defGetString(option);
		list = lappend(list, property);
	}
	return list;
}

/* What one option alone does not tell. */
static void
check_server(List *list)
{
	List	   *known = NIL;
	const char *protocol;
	ListCell   *cell;

	foreach (cell, list)
	{
		EsKafkaProperty *property = lfirst(cell);

		known = es_kafka_set_property(known, property->name, property->value);
	}
	if (es_kafka_get_property(known, "bootstrap.servers") == NULL)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("option \"bootstrap.servers\" is required for a server of "
							   "wrapper \"%s\"",
							   WRAPPER_NAME),
						errhint("OPTIONS (\"bootstrap.servers\" 'host:9092')")));
	protocol = es_kafka_get_property(known, "security.protocol");
	if (protocol != NULL && pg_strncasecmp(protocol, "sasl", 4) == 0 &&
		es_kafka_get_property(known, "sasl.mechanism") == NULL)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("option \"sasl.mechanism\" is required where "
							   "\"security.protocol\" is %s",
							   protocol),
						errhint("It is one of PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512.")));
}

Datum
es_kafka_options(PG_FUNCTION_ARGS)
{
	List *list = list_options(untransformRelOptions(PG_GETARG_DATUM(0)));
	Oid	  catalog = PG_GETARG_OID(1);

	switch (catalog)
	{
		case ForeignServerRelationId:
			es_kafka_check_list(list, ES_KAFKA_SERVER, "a server's options");
			check_server(list);
			break;
		case UserMappingRelationId:
			es_kafka_check_list(list, ES_KAFKA_MAPPING, "a user mapping's options");
			break;
		default:
			if (list == NIL)
				break;
			ereport(
				ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("wrapper \"%s\" has options for servers and user mappings only",
						WRAPPER_NAME),
				 KEEP_OUT_OF_LOG));
	}
	PG_RETURN_VOID();
}

/* ---------------------------------------------------------------------------
 * Reading them
 * ------------------------------------------------------------------------- */

static void
require_our_wrapper(const ForeignServer *server)
{
	if (server->fdwid == get_foreign_data_wrapper_oid(WRAPPER_NAME, true))
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("server \"%s\" is not a Kafka server", server->servername),
			 errhint("Use CREATE SERVER ... FOREIGN DATA WRAPPER %s.", WRAPPER_NAME)));
}

Oid
es_kafka_server(const char *name)
{
	ForeignServer *server = GetForeignServerByName(name, false);

	require_our_wrapper(server);
	return server->serverid;
}

/* The role's own mapping, else PUBLIC's, else none. */
static List *
mapping_options(Oid server, Oid role)
{
	HeapTuple tuple = SearchSysCache2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(role),
									  ObjectIdGetDatum(server));
	List	 *options = NIL;
	Datum	  value;
	bool	  isnull;

	if (!HeapTupleIsValid(tuple))
		tuple = SearchSysCache2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(InvalidOid),
								ObjectIdGetDatum(server));
	if (!HeapTupleIsValid(tuple))
		return NIL;
	value = SysCacheGetAttr(USERMAPPINGUSERSERVER, tuple, Anum_pg_user_mapping_umoptions,
							&isnull);
	if (!isnull)
		options = untransformRelOptions(value);
	ReleaseSysCache(tuple);
	return list_options(options);
}

static List *
overlay(List *list, List *with)
{
	ListCell *cell;

	foreach (cell, with)
	{
		EsKafkaProperty *property = lfirst(cell);

		list = es_kafka_set_property(list, property->name, property->value);
	}
	return list;
}

List *
es_kafka_properties(Oid serverid, Oid role, Jsonb *given)
{
	ForeignServer *server = GetForeignServer(serverid);
	AclResult	   right = es_server_aclcheck(serverid, role, ACL_USAGE);
	List		  *list = NIL;

	/* A right of PUBLIC's would do for a role that is gone. */
	if (!SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(role)))
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
						errmsg("the owner, role with OID %u, does not exist", role)));
	if (right != ACLCHECK_OK)
		aclcheck_error(right, OBJECT_FOREIGN_SERVER, server->servername);
	require_our_wrapper(server);
	list = overlay(list, list_options(server->options));
	list = overlay(list, mapping_options(serverid, role));
	return overlay(list, es_kafka_list_properties(given, "Kafka properties"));
}
