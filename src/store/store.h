/*
 * store/store.h
 *		What a backend knows of a store: formats, changelog, prepared plans.
 *
 * A store is a table that the user owns, with a row in
 * eventstore.store_catalog.  Whoever changes that row must send a relcache
 * invalidation for the table and for the changelog.
 */
#ifndef ES_STORE_H
#define ES_STORE_H

#include "postgres.h"

#include "executor/spi.h"
#include "executor/tuptable.h"
#include "storage/lock.h"
#include "utils/jsonb.h"
#include "utils/relcache.h"
#include "worker/listeners.h"
#include "utils/snapshot.h"

/* Attribute numbers of a store; the owner may add columns behind them. */
#define ES_STORE_KEY		1 /* text COLLATE "C" or bytea, primary key */
#define ES_STORE_VALUE		2 /* jsonb, text or bytea */
#define ES_STORE_VERSION	3 /* bigint */
#define ES_STORE_UPDATED_AT 4 /* timestamptz */
#define ES_STORE_NATTS		4

/* Named to run after the user's triggers BEFORE, and before them AFTER. */
#define ES_STORE_VERSION_TRIGGER "~eventstore_version"
#define ES_STORE_RECORD_TRIGGER	 "!eventstore_record"
#define ES_STORE_GUARD_TRIGGER	 "eventstore_guard"

/* Of a topic's name: Kafka allows 249 bytes. */
#define ES_BACKLOG_SIZE 256

typedef enum EsStoreFormat
{
	ES_STORE_JSON,
	ES_STORE_TEXT,
	ES_STORE_BYTES
} EsStoreFormat;

typedef enum EsStoreStatement
{
	ES_STORE_PUT,	 /* key, value */
	ES_STORE_DELETE, /* key; returns the value */
	ES_STORE_SELECT, /* key; returns the value */
	ES_STORE_NSTATEMENTS
} EsStoreStatement;

/* The address is good for the backend's life, the contents as EsCollection's are. */
typedef struct EsStore
{
	Oid			  relid;  /* hash key */
	bool		  valid;  /* cleared by invalidation */
	bool		  filled; /* no crash has emptied it, as far as this backend lives */
	EsStoreFormat format;
	EsStoreFormat key_format; /* text or bytes */
	Oid			  changelog;  /* InvalidOid without one */
	uint32		  follower;	  /* the Kafka source by which it follows another store; 0 */
	uint32		  publisher;  /* the one that has its changes published; 0 */
	char		  backlog
		[ES_BACKLOG_SIZE];	  /* where its unrecorded keys came from; '' = it has none */
	bool	   backlog_due;	  /* they may be recorded now */
	EsChannel  reads_channel; /* who listens to it hears of reads; 0 = nobody does */
	int		   running;		  /* executions of the plans, which may be nested */
	SPIPlanPtr plans[ES_STORE_NSTATEMENTS]; /* NULL until needed */
} EsStore;

extern const char *es_store_format_name(EsStoreFormat format);

/* False where it is none. */
extern bool es_store_format_parse(const char *name, EsStoreFormat *format);

extern Oid es_store_type(EsStoreFormat format);

/*
 * Locks the table until the end of the transaction.  Errors: 42P01, LG007 (no
 * store), 55000 (its columns were changed).
 */
extern EsStore *es_store_open(Oid relid, LOCKMODE mode);

/* The same with the lock already held. */
extern EsStore *es_store_get(Oid relid);

/* Is it a store?  No lock, no error.  With its changelog, where that is asked for. */
extern bool es_store_exists(Oid relid, Oid *changelog);

/* Is it a store of which keys are to be recorded (backlog.h), now?  Likewise. */
extern bool es_store_has_backlog(Oid relid, bool *due);

/* LG007 or 42P01 where it is none. */
extern void es_store_require(Oid relid);

/* Of a store that is open: has it no row, by the active snapshot? */
extern bool es_store_is_empty(Relation rel);

/*
 * 55000 where a crash has emptied an unlogged store: its changelog has keys, and
 * the table none, by the active snapshot.
 */
extern void es_store_check_filled(EsStore *store, Relation rel);

/* The key as text, as functions take it and as the changelog's stream. */
extern text *es_store_key_to_text(const EsStore *store, Datum key);
extern Datum es_store_key_from_text(const EsStore *store, text *key);

/* The same in SQL, of column s.key. */
extern const char *es_store_stream_sql(const EsStore *store);

/* 55000 where it has none. */
extern void es_store_require_changelog(const EsStore *store);

/* The row of a key, by the primary key, whoever asks; it stays in the slot. */
extern bool es_store_find(const EsStore *store, Relation rel, Datum key,
						  Snapshot snapshot, TupleTableSlot *slot);

/*
 * A store that follows another one is changed only by who follows (he sets
 * es_store_following to the follower's id); all others' changes are checked by the hook, which raises
 * an error for a key that is not theirs.
 */
typedef void (*EsStoreFollowHook)(const EsStore *store, Datum key);
extern EsStoreFollowHook es_store_follow_hook;
extern uint32			 es_store_following;

/* The metadata of a change that is not such a worker's, of a store that is published. */
typedef Jsonb *(*EsStoreOriginHook)(const EsStore *store);
extern EsStoreOriginHook es_store_origin_hook;

/* Runs a prepared statement; between SPI_connect and SPI_finish. */
extern void es_store_execute(EsStore *store, EsStoreStatement statement, Datum *values,
							 bool read_only);

#endif /* ES_STORE_H */
