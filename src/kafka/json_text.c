/*
 * kafka/json_text.c
 *		JSON as text, the same as PostgreSQL writes it, at a third of the price.
 *
 * PostgreSQL's functions take a copy of each string, and go over it a character at
 * a time.  Most strings have nothing that is to be escaped: these look at eight
 * bytes at once, and copy all up to where there is something.  Bytes will do,
 * because no encoding of a database has ASCII within its other characters.
 */
#include "postgres.h"

#include "kafka/json_text.h"

#include "utils/builtins.h"
#include "utils/fmgrprotos.h"

/* The same byte eight times. */
#define BYTES(c) (UINT64CONST(0x0101010101010101) * (c))

/* Has the word a byte below 'n'?  One below 128; what is above it does not count. */
#define HAS_BELOW(word, n) (((word) -BYTES(n)) & ~(word) &BYTES(0x80))

/* How many bytes from the beginning need no escape. */
static int
plain_length(const char *text, int length)
{
	int n = 0;

	for (; n + (int) sizeof(uint64) <= length; n += sizeof(uint64))
	{
		uint64 word;

		memcpy(&word, text + n, sizeof(word));
		if ((HAS_BELOW(word, ' ') | HAS_BELOW(word ^ BYTES('"'), 1) |
			 HAS_BELOW(word ^ BYTES('\\'), 1)) != 0)
			break;
	}
	while (n < length && (unsigned char) text[n] >= ' ' && text[n] != '"' &&
		   text[n] != '\\')
		n++;
	return n;
}

static void
add_escaped(StringInfo out, unsigned char c)
{
	static const char special[] = "\b\f\n\r\t\"\\";
	static const char letters[] = "bfnrt\"\\";
	const char		 *found = c != '\0' ? strchr(special, c) : NULL;

	if (found == NULL)
		appendStringInfo(out, "\\u%04x", c);
	else
	{
		appendStringInfoChar(out, '\\');
		appendStringInfoChar(out, letters[found - special]);
	}
}

void
es_json_add_string(StringInfo out, const char *text, int length)
{
	enlargeStringInfo(out, length + 2);
	appendStringInfoCharMacro(out, '"');
	for (;;)
	{
		int plain = plain_length(text, length);

		appendBinaryStringInfoNT(out, text, plain);
		if (plain == length)
			break;
		add_escaped(out, (unsigned char) text[plain]);
		text += plain + 1;
		length -= plain + 1;
	}
	appendStringInfoChar(out, '"');
}

static void
add_word(StringInfo out, const char *word)
{
	appendBinaryStringInfo(out, word, (int) strlen(word));
}

static void
add_scalar(StringInfo out, const JsonbValue *value)
{
	switch (value->type)
	{
		case jbvNull:
			add_word(out, "null");
			break;
		case jbvBool:
			add_word(out, value->val.boolean ? "true" : "false");
			break;
		case jbvNumeric:
			add_word(out, DatumGetCString(DirectFunctionCall1(
							  numeric_out, NumericGetDatum(value->val.numeric))));
			break;
		case jbvString:
			es_json_add_string(out, value->val.string.val, value->val.string.len);
			break;
		default:
			elog(ERROR, "unexpected type of a scalar in JSON: %d", (int) value->type);
	}
}

void
es_json_add(StringInfo out, Jsonb *json)
{
	JsonbIterator	  *iterator = JsonbIteratorInit(&json->root);
	bool			   lists = !JB_ROOT_IS_SCALAR(json);
	bool			   first = true; /* in its list, or the value of a key: no comma */
	JsonbValue		   value;
	JsonbIteratorToken token;

	enlargeStringInfo(out, (int) VARSIZE(json));
	while ((token = JsonbIteratorNext(&iterator, &value, false)) != WJB_DONE)
	{
		bool ends = token == WJB_END_ARRAY || token == WJB_END_OBJECT;
		bool array = token == WJB_BEGIN_ARRAY || token == WJB_END_ARRAY;

		if (!first && !ends)
			appendBinaryStringInfo(out, ", ", 2);
		first = token == WJB_KEY || token == WJB_BEGIN_ARRAY || token == WJB_BEGIN_OBJECT;
		if (token == WJB_KEY || token == WJB_VALUE || token == WJB_ELEM)
			add_scalar(out, &value);
		/* A scalar is kept as an array of one element. */
		else if (lists)
			appendStringInfoChar(out, ends ? (array ? ']' : '}') : (array ? '[' : '{'));
		if (token == WJB_KEY)
			appendBinaryStringInfo(out, ": ", 2);
	}
}
