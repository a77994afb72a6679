/*
 * feed/verify.h
 *		Looking for what should not be in a collection.
 */
#ifndef ES_VERIFY_H
#define ES_VERIFY_H

#include "postgres.h"

#include "nodes/execnodes.h"
#include "position/head.h"

/*
 * Puts a row (position, stream, version, problem) into the result for each
 * fault of the events at after < position < before.  Errors: LG007; 42501 no
 * SELECT right, or row-level security applies.
 */
extern void es_verify_collection(ReturnSetInfo *result, Oid collection, EsPosition after,
								 EsPosition before);

#endif /* ES_VERIFY_H */
