-- docs/bin/reference runs this: the text of docs/reference.md.  :objects has a
-- number, a section and a name for each object of the install script.
SET search_path = pg_catalog;
SET client_min_messages = warning;

CREATE TEMPORARY TABLE object (number int, section text, name text);
INSERT INTO object VALUES :objects;

-- Type names, and defaults without their casts, as somebody would write them.
CREATE FUNCTION pg_temp.plain(sql text) RETURNS text LANGUAGE sql RETURN
	replace(replace(regexp_replace(sql, '::[a-z ]+(\[\])?', '', 'g'),
		'timestamp with time zone', 'timestamptz'), ' DEFAULT ', ' = ');

CREATE FUNCTION pg_temp.paragraph(comment text) RETURNS text LANGUAGE sql RETURN
	replace(regexp_replace(comment, '([*<])', '\\\1', 'g'), E'\n', E'  \n');

-- name(arguments) → result; an argument a line where it would be long.
CREATE FUNCTION pg_temp.signature(p oid) RETURNS text LANGUAGE sql BEGIN ATOMIC
	SELECT CASE WHEN length(s.arguments) + length(s.result) < 100
			THEN format('%s(%s)%s', s.name, s.arguments, s.result)
			ELSE format(E'%s(\n\t%s\n)%s', s.name, replace(s.arguments, ', ', E',\n\t'), s.result) END
	FROM (SELECT f.proname AS name,
			(SELECT coalesce(string_agg(pg_temp.plain(regexp_replace(a, '^IN ', '')), ', ' ORDER BY n) FILTER (WHERE a NOT LIKE 'OUT %'), '')
				FROM string_to_table(pg_get_function_arguments(f.oid), ', ') WITH ORDINALITY AS a (a, n)) AS arguments,
			CASE WHEN f.prokind = 'p' THEN ''
				WHEN f.prorettype = 'record'::regtype THEN ' → ' || CASE WHEN f.proretset THEN 'setof ' ELSE '' END || '('
					|| (SELECT string_agg(f.proargnames[i] || ' ' || pg_temp.plain(format_type(f.proallargtypes[i], NULL)), ', ' ORDER BY i)
						FROM generate_subscripts(f.proallargtypes, 1) i WHERE f.proargmodes[i] IN ('o', 't')) || ')'
				ELSE ' → ' || pg_temp.plain(replace(pg_get_function_result(f.oid), 'SETOF', 'setof')) END AS result
		FROM pg_proc f WHERE f.oid = p) s;
END;

CREATE FUNCTION pg_temp.columns(r oid) RETURNS text LANGUAGE sql BEGIN ATOMIC
	SELECT string_agg(format('`%s` %s', attname, pg_temp.plain(format_type(atttypid, NULL))), ', ' ORDER BY attnum)
	FROM pg_attribute WHERE attrelid = r AND attnum > 0 AND NOT attisdropped;
END;

-- What nobody calls: triggers, handlers, what views and foreign servers stand on.
CREATE FUNCTION pg_temp.is_internal(f pg_proc) RETURNS boolean LANGUAGE sql RETURN
	f.prorettype IN ('trigger'::regtype, 'event_trigger'::regtype, 'index_am_handler'::regtype)
	OR f.proname IN ('next_position', 'store_apply', 'store_record_backlog')
	OR EXISTS (SELECT FROM pg_depend d WHERE d.refclassid = 'pg_proc'::regclass AND d.refobjid = f.oid
		AND d.classid IN ('pg_rewrite'::regclass, 'pg_foreign_data_wrapper'::regclass));

CREATE TEMPORARY TABLE entry AS
SELECT o.number, o.section, f.oid AS id, f.proname AS name, pg_temp.is_internal(f) AS internal,
	format(E'```\n%s\n```\n\n', pg_temp.signature(f.oid)) AS body, obj_description(f.oid, 'pg_proc') AS comment
FROM pg_proc f LEFT JOIN object o ON o.name = f.proname
WHERE f.pronamespace = 'eventstore'::regnamespace
UNION ALL
SELECT o.number, o.section, c.oid, c.relname, false,
	format(E'%s with the columns %s\n\n', CASE c.relkind WHEN 'v' THEN 'A view' ELSE 'A type' END, pg_temp.columns(c.oid)),
	coalesce(obj_description(c.oid, 'pg_class'), obj_description(c.reltype, 'pg_type'))
FROM pg_class c LEFT JOIN object o ON o.name = c.relname
WHERE c.relnamespace = 'eventstore'::regnamespace AND c.relkind IN ('v', 'c');

-- Nothing is left out, and nothing is without its comment.
DO $$
DECLARE
	missing text := (SELECT string_agg(name, ', ') FROM entry
		WHERE (section IS NULL AND NOT internal) OR coalesce(comment, '') = '');
BEGIN
	IF missing IS NOT NULL THEN
		RAISE 'in no section, or without a comment: %', missing;
	END IF;
END $$;

\qecho '# Reference'
\qecho
\qecho '<!-- Made by docs/bin/reference from the comments in a database; test/checks/reference says when it is out of date. -->'
\qecho
\qecho 'Everything is in schema `eventstore`. Arguments are meant to be used by name; null means absent. The README has the [error codes](../README.md#errors).'
\qecho

SELECT string_agg(format('[%s](#%s)', s.section, lower(replace(s.section, ' ', '-'))), ' · ' ORDER BY s.first) || ' · [Settings](#settings) · [Behind the scenes](#behind-the-scenes)'
FROM (SELECT section, min(number) AS first FROM entry WHERE NOT internal GROUP BY section) s;

SELECT CASE WHEN first THEN format(E'\n## %s\n', section) ELSE '' END
	|| format(E'\n### %s\n\n%s%s', name, body, pg_temp.paragraph(comment))
FROM (SELECT *, row_number() OVER (PARTITION BY section ORDER BY number, id) = 1 AS first FROM entry WHERE NOT internal) e
ORDER BY number, id;

\qecho
\qecho '## Settings'
\qecho
\qecho 'In `postgresql.conf`, or by `ALTER DATABASE … SET`; those of *user* in a session, too.'
\qecho
\qecho '| setting | default | from | to | who | meaning |'
\qecho '|---|---|---|---|---|---|'
SELECT format('| `%s` | %s | %s | %s | %s | %s |', name, concat_ws(' ', boot_val, unit), min_val,
	nullif(max_val, '2147483647'), context, concat_ws(' ', short_desc, extra_desc))
FROM pg_settings WHERE name LIKE 'eventstore.%' ORDER BY name COLLATE "C";
\qecho
\qecho '[PostgreSQL''s own](../README.md#settings) that matter are in the README.'
\qecho
\qecho '## Behind the scenes'
\qecho
\qecho 'Nobody has to call these: triggers, what views are made of, what stores and collections have as defaults.'
\qecho
\qecho '| function | |'
\qecho '|---|---|'
SELECT format('| `%s` | %s |', name, replace(replace(comment, '|', '\|'), E'\n', ' ')) FROM entry WHERE internal ORDER BY name COLLATE "C";
