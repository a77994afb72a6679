/*
 * errors.h
 *		The SQLSTATEs of class LG, as a user sees them in the README's table, and
 *		making errors of PostgreSQL's into ours.
 *
 * Classes that begin with A-H or 0-4 belong to the SQL standard; LG is free.
 */
#ifndef ES_ERRORS_H
#define ES_ERRORS_H

#include "postgres.h"

#include "fmgr.h"

#define ERRCODE_ES_VERSION_CONFLICT		MAKE_SQLSTATE('L', 'G', '0', '0', '1')
#define ERRCODE_ES_CONDITION_FAILED		MAKE_SQLSTATE('L', 'G', '0', '0', '2')
#define ERRCODE_ES_APPEND_ONLY			MAKE_SQLSTATE('L', 'G', '0', '0', '3')
#define ERRCODE_ES_CURSOR_AHEAD			MAKE_SQLSTATE('L', 'G', '0', '0', '4')
#define ERRCODE_ES_NOT_RETAINED			MAKE_SQLSTATE('L', 'G', '0', '0', '5')
#define ERRCODE_ES_NOT_PRELOADED		MAKE_SQLSTATE('L', 'G', '0', '0', '6')
#define ERRCODE_ES_NOT_A_COLLECTION		MAKE_SQLSTATE('L', 'G', '0', '0', '7')

/*
 * Calls a function that computes and nothing else (a type's input function):
 * false where the arguments are bad to it (class 22).  Arguments beyond those
 * that it takes are ignored.
 */
extern bool es_convert(PGFunction function, Datum a, Datum b, Datum c, Datum *result);

#endif							/* ES_ERRORS_H */
