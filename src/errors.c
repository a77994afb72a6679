/*
 * errors.c
 *		What several functions say alike, and making errors of PostgreSQL's into
 *		ours.
 *
 * A user's bad value comes to us as text in JSON or as an option, and the error
 * about it has to say where it stood, which a type's input function cannot
 * know.  PostgreSQL 15 has no input functions that return errors; but those
 * that only compute hold nothing when they raise one, so it may be caught
 * without a subtransaction.
 */
#include "postgres.h"

#include "errors.h"

#include "utils/builtins.h"
#include "utils/fmgrprotos.h"

/* Is such an error about the value, in a function that only computes? */
static bool
is_of_value(int sqlstate)
{
	return ERRCODE_TO_CATEGORY(sqlstate) == ERRCODE_DATA_EXCEPTION ||
		   ERRCODE_TO_CATEGORY(sqlstate) == ERRCODE_PROGRAM_LIMIT_EXCEEDED ||
		   sqlstate == ERRCODE_INTERNAL_ERROR; /* more than palloc gives */
}

int
es_convert_noting(PGFunction function, Datum a, Datum b, Datum c, Datum *result)
{
	MemoryContext context = CurrentMemoryContext;
	volatile int  sqlstate = 0;

	PG_TRY();
	{
		*result = DirectFunctionCall3(function, a, b, c);
	}
	PG_CATCH();
	{
		sqlstate = geterrcode();
		if (!is_of_value(sqlstate))
			PG_RE_THROW();
		MemoryContextSwitchTo(context);
		FlushErrorState();
	}
	PG_END_TRY();
	return sqlstate;
}

bool
es_convert(PGFunction function, Datum a, Datum b, Datum c, Datum *result)
{
	return es_convert_noting(function, a, b, c, result) == 0;
}

void
es_refuse_null(const NullableDatum *arg, const char *name)
{
	if (arg->isnull)
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
						errmsg("\"%s\" must not be null", name)));
}

void
es_require_arg(const NullableDatum *arg, const char *name)
{
	if (arg->isnull)
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
						errmsg("argument \"%s\" must not be null", name)));
}

int
es_errdetail_interval(Datum interval)
{
	return errdetail("It is %s.",
					 DatumGetCString(DirectFunctionCall1(interval_out, interval)));
}
