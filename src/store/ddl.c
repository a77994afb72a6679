/*
 * store/ddl.c
 *		Creating and dropping stores, and what DDL on them, and on captured
 *		tables, takes along.
 *
 * A store "kv" is, all in the owner's schema and the owner's own:
 *
 *		kv					the table
 *		kv_changelog		a collection, if it has one
 *
 * and a row of eventstore.store_catalog.  Made by the SQL that a user would
 * write, so that rights, dump and restore are those of tables.  The changelog
 * is found by OID: it keeps its name when the store is renamed.  OWNER TO and
 * SET SCHEMA of the store take it along (an event trigger).  However the store
 * went, the changelog that is left is a plain collection; a changelog cannot go
 * before its store (collection/ddl.c has both, in its own event trigger).
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type.h"
#include "collection/collection.h"
#include "collection/ddl.h"
#include "commands/defrem.h"
#include "commands/event_trigger.h"
#include "compat.h"
#include "errors.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "shmem.h"
#include "spi.h"
#include "storage/lmgr.h"
#include "store/capture.h"
#include "store/store.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"

PG_FUNCTION_INFO_V1(es_create_store);
PG_FUNCTION_INFO_V1(es_drop_store);
PG_FUNCTION_INFO_V1(es_on_alter_store);

/* ---------------------------------------------------------------------------
 * create_store
 * ------------------------------------------------------------------------- */

typedef struct StoreOptions
{
	EsStoreFormat format;
	EsStoreFormat key_format;
	bool		  changelog;
	bool		  unlogged;
} StoreOptions;

static EsStoreFormat
format_arg(FunctionCallInfo fcinfo, int n, const char *name, EsStoreFormat absent,
		   const char *hint)
{
	EsStoreFormat format = absent;
	char		 *value;

	if (PG_ARGISNULL(n))
		return absent;
	value = text_to_cstring(PG_GETARG_TEXT_PP(n));
	/* Keys are text unless they are bytes. */
	if (!es_store_format_parse(value, &format) ||
		(absent == ES_STORE_TEXT && format == ES_STORE_JSON))
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("invalid value for argument \"%s\": \"%s\"", name, value),
						errhint("%s", hint)));
	return format;
}

/* Arguments 1 to 4 of create_store; null: the default. */
static void
read_options(FunctionCallInfo fcinfo, StoreOptions *options)
{
	options->format =
		format_arg(fcinfo, 1, "format", ES_STORE_JSON, "It is one of json, text, bytes.");
	options->key_format =
		format_arg(fcinfo, 2, "key_format", ES_STORE_TEXT, "It is text or bytes.");
	options->changelog = PG_ARGISNULL(3) || PG_GETARG_BOOL(3);
	options->unlogged = !PG_ARGISNULL(4) && PG_GETARG_BOOL(4);
}

/* In SPI, here and below. */
static Oid
create_table(Oid schema, const char *name, const StoreOptions *options)
{
	static const char *const types[] = {"pg_catalog.jsonb", "pg_catalog.text",
										"pg_catalog.bytea"};
	char *qualified = quote_qualified_identifier(get_namespace_name(schema), name);

	es_spi_execute(
		psprintf("CREATE %sTABLE %s (key %s PRIMARY KEY, value %s NOT NULL,"
				 " version pg_catalog.int8, updated_at pg_catalog.timestamptz)",
				 options->unlogged ? "UNLOGGED " : "", qualified,
				 options->key_format == ES_STORE_BYTES
					 ? "pg_catalog.bytea"
					 : "pg_catalog.text COLLATE pg_catalog.\"C\"",
				 types[options->format]),
		0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
	return get_relname_relid(name, schema);
}

static void
create_trigger(Oid store, const char *name, const char *event, const char *function)
{
	es_spi_execute(
		psprintf("CREATE TRIGGER %s %s ON %s %s EXECUTE FUNCTION eventstore.%s()",
				 quote_identifier(name), event, es_relation_name(store),
				 strstr(event, "TRUNCATE") != NULL ? "FOR EACH STATEMENT"
												   : "FOR EACH ROW",
				 function),
		0, NULL, NULL, NULL, false, SPI_OK_UTILITY);
}

static void
create_triggers(Oid store, const StoreOptions *options)
{
	create_trigger(store, ES_STORE_VERSION_TRIGGER, "BEFORE INSERT OR UPDATE",
				   "store_version");
	if (options->changelog)
		create_trigger(store, ES_STORE_RECORD_TRIGGER, "AFTER INSERT OR UPDATE OR DELETE",
					   "store_record");
	create_trigger(store, ES_STORE_GUARD_TRIGGER, "BEFORE TRUNCATE", "store_guard");
}

static void
register_store(Oid store, Oid changelog, const StoreOptions *options)
{
	Oid			 types[] = {REGCLASSOID, REGCLASSOID, TEXTOID, TEXTOID};
	Datum		 values[] = {ObjectIdGetDatum(store), ObjectIdGetDatum(changelog),
							 CStringGetTextDatum(es_store_format_name(options->format)),
							 CStringGetTextDatum(es_store_format_name(options->key_format))};
	EsRoleSwitch saved;

	es_role_assume(es_extension_owner(), &saved);
	es_spi_execute(
		"INSERT INTO eventstore.store_catalog (store, changelog, format, key_format)"
		" VALUES ($1, $2, $3, $4)",
		lengthof(types), types, values, OidIsValid(changelog) ? "    " : " n  ", false,
		SPI_OK_INSERT);
	es_role_restore(&saved);
	CacheInvalidateRelcacheByRelid(store);
	if (OidIsValid(changelog))
		CacheInvalidateRelcacheByRelid(changelog);
}

Datum
es_create_store(PG_FUNCTION_ARGS)
{
	StoreOptions options;
	EsRoleSwitch saved;
	char		*name;
	Oid			 schema;
	Oid			 store;
	Oid			 changelog = InvalidOid;

	es_require_preloaded();
	PreventCommandIfReadOnly("create_store");
	es_require_arg(&fcinfo->args[0], "name");
	read_options(fcinfo, &options);
	schema = es_creation_schema(PG_GETARG_TEXT_PP(0), "store", &name);

	/* The caller's own role: what this adds is the locked search_path. */
	es_role_assume(GetUserId(), &saved);
	SPI_connect();
	store = create_table(schema, name, &options);
	create_triggers(store, &options);
	if (options.changelog)
		changelog = es_create_changelog(schema, makeObjectName(name, NULL, "changelog"));
	register_store(store, changelog, &options);
	SPI_finish();
	es_role_restore(&saved);

	if (OidIsValid(changelog))
		es_make_ready_to_append(changelog);
	PG_RETURN_OID(store);
}

/* ---------------------------------------------------------------------------
 * drop_store
 * ------------------------------------------------------------------------- */

Datum
es_drop_store(PG_FUNCTION_ARGS)
{
	char *tables;
	Oid	  relid;
	Oid	  changelog;

	PreventCommandIfReadOnly("drop_store");
	es_require_arg(&fcinfo->args[0], "store");
	relid = PG_GETARG_OID(0);
	/* Asked before the strong lock, and again with it; whatever its columns are by now. */
	es_store_require(relid);
	es_collection_check_owner(relid);
	LockRelationOid(relid, AccessExclusiveLock);
	if (!es_store_exists(relid, &changelog))
		es_store_require(relid);
	es_collection_check_owner(relid);

	tables = es_relation_name(relid);
	if (OidIsValid(changelog))
		tables = psprintf("%s, %s", tables, es_relation_name(changelog));
	SPI_connect();
	es_spi_execute(psprintf("DROP TABLE %s", tables), 0, NULL, NULL, NULL, false,
				   SPI_OK_UTILITY);
	SPI_finish();
	PG_RETURN_VOID();
}

/* ---------------------------------------------------------------------------
 * What ALTER TABLE of a store takes along
 * ------------------------------------------------------------------------- */

static void
alter_changelog(Oid changelog, const char *what)
{
	/* Who was given the store alone leaves the changelog where it is. */
	if (!es_owns_relation(changelog, GetUserId()))
		return;
	SPI_connect();
	es_spi_execute(psprintf("ALTER TABLE %s %s", es_relation_name(changelog), what), 0,
				   NULL, NULL, NULL, false, SPI_OK_UTILITY);
	SPI_finish();
}

static bool
has_command(Node *stmt, AlterTableType type)
{
	ListCell *cell;

	if (!IsA(stmt, AlterTableStmt))
		return false;
	foreach (cell, ((AlterTableStmt *) stmt)->cmds)
		if (lfirst_node(AlterTableCmd, cell)->subtype == type)
			return true;
	return false;
}

/* The changelog of the altered store or captured table, locked by now; InvalidOid. */
static Oid
changelog_of(Oid relid)
{
	Oid	 changelog;
	bool shared;

	if (!OidIsValid(relid))
		return InvalidOid;
	if (es_store_exists(relid, &changelog))
		return changelog;
	/* A collection that the owner named stays where he has it. */
	if (es_capture_source(relid, &changelog, &shared) == relid && !shared)
		return changelog;
	return InvalidOid;
}

static void
follow_owner(AlterTableStmt *stmt)
{
	Oid relid = RangeVarGetRelid(stmt->relation, NoLock, true);
	Oid changelog = changelog_of(relid);
	Oid owner;

	if (!OidIsValid(changelog))
		return;
	owner = es_relation_owner(relid);
	if (es_relation_owner(changelog) != owner)
		alter_changelog(
			changelog,
			psprintf("OWNER TO %s", quote_identifier(GetUserNameFromId(owner, false))));
}

static void
follow_schema(AlterObjectSchemaStmt *stmt)
{
	Oid schema = get_namespace_oid(stmt->newschema, true);
	Oid changelog = changelog_of(get_relname_relid(stmt->relation->relname, schema));

	if (OidIsValid(changelog) && get_rel_namespace(changelog) != schema)
		alter_changelog(changelog,
						psprintf("SET SCHEMA %s", quote_identifier(stmt->newschema)));
}

/* It would be rebuilt from its changelog, in which these keys are not yet. */
static void
refuse_unlogged(AlterTableStmt *stmt)
{
	Oid relid = RangeVarGetRelid(stmt->relation, NoLock, true);

	if (OidIsValid(relid) && es_store_exists(relid, NULL) &&
		get_rel_persistence(relid) == RELPERSISTENCE_UNLOGGED &&
		es_store_get(relid)->backlog[0] != '\0')
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("store \"%s\" cannot become unlogged now", get_rel_name(relid)),
				 errdetail("Not all that was restored is in its changelog yet.")));
}

/* Runs after every ALTER TABLE, so it looks at the statement first. */
Datum
es_on_alter_store(PG_FUNCTION_ARGS)
{
	Node *stmt;

	if (!CALLED_AS_EVENT_TRIGGER(fcinfo))
		ereport(ERROR, (errcode(ERRCODE_E_R_I_E_EVENT_TRIGGER_PROTOCOL_VIOLATED),
						errmsg("function \"%s\" was not called as an event trigger",
							   "eventstore.on_alter_store")));
	stmt = ((EventTriggerData *) fcinfo->context)->parsetree;
	if (has_command(stmt, AT_SetUnLogged))
		refuse_unlogged((AlterTableStmt *) stmt);
	if (has_command(stmt, AT_ChangeOwner))
		follow_owner((AlterTableStmt *) stmt);
	else if (IsA(stmt, AlterObjectSchemaStmt) &&
			 ((AlterObjectSchemaStmt *) stmt)->relation != NULL)
		follow_schema((AlterObjectSchemaStmt *) stmt);
	PG_RETURN_NULL();
}
