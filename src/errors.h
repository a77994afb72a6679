/*
 * errors.h
 *		The SQLSTATEs of class LG, as a user sees them in the README's table, what
 *		several functions say alike, and making errors of PostgreSQL's into ours.
 *
 * Classes that begin with A-H or 0-4 belong to the SQL standard; LG is free.
 */
#ifndef ES_ERRORS_H
#define ES_ERRORS_H

#include "postgres.h"

#include "fmgr.h"

#define ERRCODE_ES_VERSION_CONFLICT MAKE_SQLSTATE('L', 'G', '0', '0', '1')
#define ERRCODE_ES_CONDITION_FAILED MAKE_SQLSTATE('L', 'G', '0', '0', '2')
#define ERRCODE_ES_APPEND_ONLY		MAKE_SQLSTATE('L', 'G', '0', '0', '3')
#define ERRCODE_ES_CURSOR_AHEAD		MAKE_SQLSTATE('L', 'G', '0', '0', '4')
#define ERRCODE_ES_NOT_RETAINED		MAKE_SQLSTATE('L', 'G', '0', '0', '5')
#define ERRCODE_ES_NOT_PRELOADED	MAKE_SQLSTATE('L', 'G', '0', '0', '6')
#define ERRCODE_ES_NOT_A_COLLECTION MAKE_SQLSTATE('L', 'G', '0', '0', '7')
#define ERRCODE_ES_CANNOT_GO_ON		MAKE_SQLSTATE('L', 'G', '0', '0', '8')

/*
 * Calls a function that computes and nothing else (a type's input function):
 * false where the arguments are bad to it (class 22; 54: nested too deeply; or
 * larger than PostgreSQL can hold).  Arguments beyond those that it takes are
 * ignored.  The other returns the SQLSTATE, 0 where there is none.
 */
extern int	es_convert_noting(PGFunction function, Datum a, Datum b, Datum c,
							  Datum *result);
extern bool es_convert(PGFunction function, Datum a, Datum b, Datum c, Datum *result);

/* Raises 22004: "name" must not be null. */
extern void es_refuse_null(const NullableDatum *arg, const char *name);

/* The same, but it says: argument "name" must not be null. */
extern void es_require_arg(const NullableDatum *arg, const char *name);

/* Within ereport, the DETAIL about an interval that is refused. */
extern int es_errdetail_interval(Datum interval);

#endif /* ES_ERRORS_H */
