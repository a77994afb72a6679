/*
 * store/capture.h
 *		What a backend knows of a captured table: its changelog, and how a key
 *		and a row of it are written.
 *
 * A captured table has a row in eventstore.capture_catalog.  Whoever changes
 * that row must send a relcache invalidation for the table and for the
 * changelog.
 */
#ifndef ES_CAPTURE_H
#define ES_CAPTURE_H

#include "postgres.h"

#include "access/attnum.h"
#include "fmgr.h"
#include "nodes/pg_list.h"
#include "store/row_json.h"
#include "utils/relcache.h"

#define ES_CAPTURE_TRIGGER			"eventstore_capture"
#define ES_CAPTURE_TRUNCATE_TRIGGER "eventstore_capture_truncate"

/* A column of the primary key. */
typedef struct EsCaptureKey
{
	AttrNumber attnum;
	bool	   boolean;
	FmgrInfo   output;
} EsCaptureKey;

/* Of a captured table, or of a partition of one, which may have its columns elsewhere. */
typedef struct EsCapture
{
	Oid			  relid;  /* hash key */
	bool		  valid;  /* cleared by invalidation */
	Oid			  source; /* the captured table */
	Oid			  changelog;
	bool		  shared;  /* the changelog was given: events say which table */
	MemoryContext context; /* of what follows; good until the transaction's end */
	int			  nkeys;
	EsCaptureKey *keys;
	FmgrInfo	  key_array; /* jsonb_build_array over the columns of the key */
	EsRowJson	 *rows;
} EsCapture;

/*
 * 55000: the table is not captured (its trigger stayed behind), or has lost its
 * primary key.  The relation is locked.
 */
extern EsCapture *es_capture_get(Relation rel);

/*
 * The captured table that the relation is, or is a partition of; InvalidOid.
 * With its changelog, where that is asked for.
 */
extern Oid es_capture_source(Oid relid, Oid *changelog, bool *shared);

/* TRUNCATE named these (OIDs), and is done; the locks are held. */
extern void es_capture_truncated(List *relids);

#endif /* ES_CAPTURE_H */
