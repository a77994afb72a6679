/*
 * utility.h
 *		What every hook on utility statements says again: its arguments, and how
 *		the next one is called.
 */
#ifndef ES_UTILITY_H
#define ES_UTILITY_H

#include "postgres.h"

#include "tcop/utility.h"

#define ES_UTILITY_PARAMETERS                                                            \
	PlannedStmt *pstmt, const char *queryString, bool readOnlyTree,                      \
		ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *queryEnv, \
		DestReceiver *dest, QueryCompletion *qc

#define ES_UTILITY_ARGUMENTS                                                             \
	pstmt, queryString, readOnlyTree, context, params, queryEnv, dest, qc

/* The hook that was there before ours; NULL: PostgreSQL itself. */
static inline void
es_next_utility(ProcessUtility_hook_type next, ES_UTILITY_PARAMETERS)
{
	if (next != NULL)
		next(ES_UTILITY_ARGUMENTS);
	else
		standard_ProcessUtility(ES_UTILITY_ARGUMENTS);
}

#endif /* ES_UTILITY_H */
