/*
 * feed/merge_cursor.c
 *		Where a merged reading stands, as jsonb.
 *
 *	{"after":   [1767225600123456, "sales.orders", 17],
 *	 "windows": {"hr.people": [0, 50], "sales.orders": [10, 1000]}}
 *
 * "after" is the sort key of the row that the cursor came with: created_at in
 * microseconds since 1970 (a number that a double holds exactly until the year
 * 2255), collection, position.  Why windows are needed is told in merged.c.
 * Names are schema-qualified; a collection that was renamed is an unknown one.
 *
 * The form that people write, {"sales.orders": 42, "people": null}, says
 * after which position to begin in each collection, null being the oldest event
 * that is kept, like a collection that is not named.
 *
 * The cursor comes back from outside: whatever it says is checked, and nothing
 * in it can make a reader see what it may not.
 */
#include "postgres.h"

#include "feed/merge_cursor.h"

#include "common/int.h"
#include "utils/builtins.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"

/* From 1970, where clients count from, to 2000, where PostgreSQL does. */
#define UNIX_EPOCH_OFFSET_US ((POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * USECS_PER_DAY)

/* ---------------------------------------------------------------------------
 * From jsonb
 * ------------------------------------------------------------------------- */

static void
report_malformed(const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid cursor in argument \"after\""), errdetail("%s", detail),
			 errhint("Give the cursor of a row that read_merged returned, or an object "
					 "such as {\"sales.orders\": 42}.")));
}

static int
find_source(const EsMergeState *state, const JsonbValue *name)
{
	for (int i = 0; i < state->nsources; i++)
	{
		const EsMergeSource *source = &state->sources[i];

		if ((strlen(source->name) == name->val.string.len &&
			 memcmp(source->name, name->val.string.val, name->val.string.len) == 0) ||
			(strlen(source->short_name) == name->val.string.len &&
			 memcmp(source->short_name, name->val.string.val, name->val.string.len) == 0))
			return i;
	}
	report_malformed(psprintf("\"%.*s\" is not among the collections.",
							  name->val.string.len, name->val.string.val));
	return -1;
}

/* A whole number that 64 bits hold. */
static int64
read_integer(const JsonbValue *value)
{
	char *text;
	char *end;
	int64 number;

	if (value->type != jbvNumeric)
		report_malformed("A whole number was expected.");
	text = DatumGetCString(
		DirectFunctionCall1(numeric_out, NumericGetDatum(value->val.numeric)));
	errno = 0;
	number = strtoi64(text, &end, 10);
	if (errno != 0 || *end != '\0')
		report_malformed(psprintf("%s is not a whole number of 64 bits.", text));
	return number;
}

static EsPosition
read_position(const JsonbValue *value)
{
	int64 position = read_integer(value);

	if (position < 0)
		report_malformed("A position must not be negative.");
	return position;
}

/* Infinite times are the ends of the range of int64, in both counts. */
static TimestampTz
time_from_unix(int64 unix_us)
{
	TimestampTz time;

	if (unix_us == DT_NOBEGIN || unix_us == DT_NOEND)
		return unix_us;
	time = (int64) ((uint64) unix_us - (uint64) UNIX_EPOCH_OFFSET_US);
	if (!IS_VALID_TIMESTAMP(time))
		report_malformed("The time in \"after\" is out of range.");
	return time;
}

static int64
time_to_unix(TimestampTz time)
{
	/* The last thirty years of the calendar wrap around, and back. */
	return TIMESTAMP_NOT_FINITE(time)
			   ? time
			   : (int64) ((uint64) time + (uint64) UNIX_EPOCH_OFFSET_US);
}

/* The elements of an array of exactly n; else an error. */
static void
read_array(JsonbContainer *array, int n, JsonbValue **elements)
{
	if (!JsonContainerIsArray(array) || JsonContainerSize(array) != n)
		report_malformed(psprintf("An array of %d elements was expected.", n));
	for (int i = 0; i < n; i++)
		elements[i] = getIthJsonbValueFromContainer(array, i);
}

static void
read_window(const JsonbValue *value, EsMergeSource *source)
{
	JsonbValue *bounds[2];

	if (value->type != jbvBinary)
		report_malformed("A window has to be an array of two positions.");
	read_array(value->val.binary.data, 2, bounds);
	source->low = read_position(bounds[0]);
	source->high = read_position(bounds[1]);
	source->has_window = true;
	if (source->low > source->high)
		report_malformed("A window ends before it begins.");
}

static void
read_windows(JsonbContainer *windows, EsMergeState *state)
{
	JsonbIterator	  *iterator = JsonbIteratorInit(windows);
	JsonbIteratorToken token;
	JsonbValue		   name;
	JsonbValue		   value;

	while ((token = JsonbIteratorNext(&iterator, &name, true)) != WJB_DONE)
	{
		if (token != WJB_KEY)
			continue;
		JsonbIteratorNext(&iterator, &value, true);
		read_window(&value, &state->sources[find_source(state, &name)]);
	}
}

static void
read_key(JsonbContainer *cursor, EsMergeState *state)
{
	JsonbValue *parts[3];
	JsonbValue	buffer;
	JsonbValue *after = getKeyJsonValueFromContainer(cursor, "after", 5, &buffer);

	if (after == NULL || after->type != jbvBinary)
		report_malformed("The cursor has no array \"after\".");
	read_array(after->val.binary.data, 3, parts);
	if (parts[1]->type != jbvString)
		report_malformed("The collection in \"after\" has to be a string.");
	state->key.created_at = time_from_unix(read_integer(parts[0]));
	state->key.source = find_source(state, parts[1]);
	state->key.position = read_position(parts[2]);
	state->key.valid = true;
}

/* What was handed out and kept, as for any other cursor. */
static void
check_windows(const EsMergeState *state)
{
	for (int i = 0; i < state->nsources; i++)
	{
		const EsMergeSource *source = &state->sources[i];

		if (!source->has_window)
			continue;
		es_collection_check_cursor(source->coll, source->high);
		es_collection_check_cursor(source->coll, source->low);
	}
}

static void
read_plain(JsonbContainer *object, EsMergeState *state)
{
	JsonbIterator	  *iterator = JsonbIteratorInit(object);
	JsonbIteratorToken token;
	JsonbValue		   name;
	JsonbValue		   value;

	while ((token = JsonbIteratorNext(&iterator, &name, true)) != WJB_DONE)
	{
		EsMergeSource *source;

		if (token != WJB_KEY)
			continue;
		JsonbIteratorNext(&iterator, &value, true);
		source = &state->sources[find_source(state, &name)];
		if (source->has_window)
			report_malformed(psprintf("\"%s\" is there twice.", source->name));
		if (value.type == jbvNull)
			continue;
		source->low = read_position(&value);
		source->high = Max(source->low, source->head);
		source->has_window = true;
		es_collection_check_cursor(source->coll, source->low);
	}
}

void
es_merge_cursor_parse(Jsonb *cursor, EsMergeState *state)
{
	JsonbValue	buffer;
	JsonbValue *windows;

	if (!JB_ROOT_IS_OBJECT(cursor))
		report_malformed("It is not an object.");
	windows = getKeyJsonValueFromContainer(&cursor->root, "windows", 7, &buffer);
	if (windows == NULL || windows->type != jbvBinary ||
		!JsonContainerIsObject(windows->val.binary.data))
	{
		read_plain(&cursor->root, state);
		return;
	}
	if (JsonContainerSize(&cursor->root) != 2)
		report_malformed("It has other keys than \"after\" and \"windows\".");
	read_windows(windows->val.binary.data, state);
	read_key(&cursor->root, state);
	check_windows(state);
}

/* ---------------------------------------------------------------------------
 * To jsonb
 * ------------------------------------------------------------------------- */

static void
push_string(JsonbParseState **out, JsonbIteratorToken token, const char *text)
{
	JsonbValue value;

	value.type = jbvString;
	value.val.string.val = unconstify(char *, text);
	value.val.string.len = strlen(text);
	pushJsonbValue(out, token, &value);
}

static void
push_integer(JsonbParseState **out, int64 number)
{
	JsonbValue value;

	value.type = jbvNumeric;
	value.val.numeric = int64_to_numeric(number);
	pushJsonbValue(out, WJB_ELEM, &value);
}

static void
push_windows(JsonbParseState **out, const EsMergeState *state)
{
	pushJsonbValue(out, WJB_BEGIN_OBJECT, NULL);
	for (int i = 0; i < state->nsources; i++)
	{
		push_string(out, WJB_KEY, state->sources[i].name);
		pushJsonbValue(out, WJB_BEGIN_ARRAY, NULL);
		push_integer(out, state->sources[i].low);
		push_integer(out, state->sources[i].high);
		pushJsonbValue(out, WJB_END_ARRAY, NULL);
	}
	pushJsonbValue(out, WJB_END_OBJECT, NULL);
}

Jsonb *
es_merge_cursor_make(const EsMergeState *state, const EsMergeKey *key)
{
	JsonbParseState *out = NULL;

	pushJsonbValue(&out, WJB_BEGIN_OBJECT, NULL);
	push_string(&out, WJB_KEY, "after");
	pushJsonbValue(&out, WJB_BEGIN_ARRAY, NULL);
	push_integer(&out, time_to_unix(key->created_at));
	push_string(&out, WJB_ELEM, state->sources[key->source].name);
	push_integer(&out, key->position);
	pushJsonbValue(&out, WJB_END_ARRAY, NULL);
	push_string(&out, WJB_KEY, "windows");
	push_windows(&out, state);
	return JsonbValueToJsonb(pushJsonbValue(&out, WJB_END_OBJECT, NULL));
}
