# What an extension consists of, by the catalogs: for telling whether two ways to
# a version (installed, or updated to) lead to the same.
#
#   catalog($node, $dbname)          "object: what it is", in bytewise order
#   catalog_differs($node, $a, $b)   the lines that only one of the databases has
package EventstoreTest::Catalog;

use strict;
use warnings;

use Exporter 'import';

our @EXPORT = qw(catalog catalog_differs);

# Members, with all that hangs on them: columns, defaults, constraints, indexes,
# triggers, rules, comments, rights, and which rows a dump takes.
my $query = q{
	WITH extension AS (SELECT * FROM pg_extension WHERE extname = 'eventstore'),
	member AS (
		SELECT d.classid, d.objid FROM pg_depend d, extension e
		WHERE d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'),
	relation AS (
		SELECT c.* FROM pg_class c JOIN member m ON m.classid = 'pg_class'::regclass AND m.objid = c.oid),
	line (object, what) AS (
		SELECT pg_describe_object(classid, objid, 0), 'member' FROM member
		UNION ALL
		SELECT pg_describe_object(d.classoid, d.objoid, d.objsubid), 'comment ' || d.description
		FROM pg_description d JOIN member m ON (m.classid, m.objid) = (d.classoid, d.objoid)
		UNION ALL
		SELECT pg_describe_object(i.classoid, i.objoid, i.objsubid), 'initial rights ' || i.initprivs::text
		FROM pg_init_privs i JOIN member m ON (m.classid, m.objid) = (i.classoid, i.objoid)
		UNION ALL
		SELECT 'function ' || p.oid::regprocedure, CASE p.prokind WHEN 'a' THEN p.prosrc ELSE pg_get_functiondef(p.oid) END
			|| format(' rights %s cost %s rows %s support %s binary %s', p.proacl, p.procost, p.prorows, p.prosupport, p.probin)
		FROM pg_proc p JOIN member m ON m.classid = 'pg_proc'::regclass AND m.objid = p.oid
		UNION ALL
		SELECT 'relation ' || r.oid::regclass, format('kind %s persistence %s options %s rights %s security %s %s replica %s view %s',
			r.relkind, r.relpersistence, r.reloptions, r.relacl, r.relrowsecurity, r.relforcerowsecurity, r.relreplident,
			CASE WHEN r.relkind = 'v' THEN pg_get_viewdef(r.oid) END)
		FROM relation r
		UNION ALL
		SELECT format('column %s.%s', r.oid::regclass, a.attname), format('%s %s type %s collation %s not null %s default %s storage %s rights %s identity %s',
			a.attnum, a.attisdropped, format_type(a.atttypid, a.atttypmod), a.attcollation::regcollation, a.attnotnull,
			pg_get_expr(d.adbin, d.adrelid), a.attstorage, a.attacl, a.attidentity::text || a.attgenerated::text)
		FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0
		LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
		UNION ALL
		SELECT format('attribute %s.%s', t.oid::regtype, a.attname), format('%s type %s collation %s', a.attnum, format_type(a.atttypid, a.atttypmod), a.attcollation::regcollation)
		FROM pg_type t JOIN member m ON m.classid = 'pg_type'::regclass AND m.objid = t.oid
		JOIN pg_attribute a ON a.attrelid = t.typrelid AND a.attnum > 0
		UNION ALL
		SELECT 'constraint ' || pg_describe_object('pg_constraint'::regclass, k.oid, 0), pg_get_constraintdef(k.oid) FROM pg_constraint k JOIN relation r ON r.oid = k.conrelid
		UNION ALL
		SELECT 'index ' || i.indexrelid::regclass, pg_get_indexdef(i.indexrelid) || i.indisclustered::text || i.indisreplident::text FROM pg_index i JOIN relation r ON r.oid = i.indrelid
		UNION ALL
		SELECT format('trigger %s of %s', t.tgname, r.oid::regclass), pg_get_triggerdef(t.oid) || t.tgenabled::text FROM pg_trigger t JOIN relation r ON r.oid = t.tgrelid WHERE NOT t.tgisinternal
		UNION ALL
		SELECT format('rule %s of %s', u.rulename, r.oid::regclass), pg_get_ruledef(u.oid) FROM pg_rewrite u JOIN relation r ON r.oid = u.ev_class
		UNION ALL
		SELECT format('policy %s of %s', y.polname, r.oid::regclass), format('%s %s %s %s', y.polcmd, y.polroles::regrole[], pg_get_expr(y.polqual, y.polrelid), pg_get_expr(y.polwithcheck, y.polrelid)) FROM pg_policy y JOIN relation r ON r.oid = y.polrelid
		UNION ALL
		SELECT 'sequence ' || s.seqrelid::regclass, (to_jsonb(s) - 'seqrelid')::text FROM pg_sequence s JOIN relation r ON r.oid = s.seqrelid
		UNION ALL
		SELECT 'schema ' || n.nspname, format('rights %s', n.nspacl) FROM pg_namespace n JOIN member m ON m.classid = 'pg_namespace'::regclass AND m.objid = n.oid
		UNION ALL
		SELECT 'event trigger ' || v.evtname, format('%s %s %s %s', v.evtevent, v.evtfoid::regproc, v.evtenabled, v.evttags) FROM pg_event_trigger v JOIN member m ON m.classid = 'pg_event_trigger'::regclass AND m.objid = v.oid
		UNION ALL
		SELECT 'wrapper ' || w.fdwname, format('%s %s %s %s', w.fdwhandler::regproc, w.fdwvalidator::regproc, w.fdwacl, w.fdwoptions) FROM pg_foreign_data_wrapper w JOIN member m ON m.classid = 'pg_foreign_data_wrapper'::regclass AND m.objid = w.oid
		UNION ALL
		SELECT 'access method ' || a.amname, format('%s %s', a.amhandler, a.amtype) FROM pg_am a JOIN member m ON m.classid = 'pg_am'::regclass AND m.objid = a.oid
		UNION ALL
		SELECT pg_describe_object('pg_opclass'::regclass, o.oid, 0), format('%s %s %s', o.opcintype::regtype, o.opcdefault, o.opckeytype::regtype) FROM pg_opclass o JOIN member m ON m.classid = 'pg_opclass'::regclass AND m.objid = o.oid
		UNION ALL
		SELECT pg_describe_object('pg_amop'::regclass, o.oid, 0), o.amopstrategy || o.amoppurpose::text FROM pg_amop o JOIN member m ON m.classid = 'pg_opfamily'::regclass AND m.objid = o.amopfamily
		UNION ALL
		SELECT pg_describe_object('pg_amproc'::regclass, o.oid, 0), o.amproc::text FROM pg_amproc o JOIN member m ON m.classid = 'pg_opfamily'::regclass AND m.objid = o.amprocfamily
		UNION ALL
		SELECT 'dumped rows of ' || c.oid::regclass, c.condition FROM extension e, unnest(e.extconfig, e.extcondition) c (oid, condition)
		UNION ALL
		SELECT 'extension', format('version %s relocatable %s schema %s', e.extversion, e.extrelocatable, e.extnamespace::regnamespace) FROM extension e)
	SELECT replace(object || ': ' || coalesce(what, ''), E'\n', ' ') FROM line ORDER BY object COLLATE "C", what COLLATE "C"};

sub catalog
{
	my ($node, $dbname) = @_;
	return split /\n/, $node->safe_psql($dbname, $query);
}

sub catalog_differs
{
	my ($node, $one, $other) = @_;
	my %count;

	$count{$_}++ foreach catalog($node, $one);
	$count{$_}-- foreach catalog($node, $other);
	return map { ($count{$_} > 0 ? "$one: " : "$other: ") . $_ } grep { $count{$_} != 0 } sort keys %count;
}

1;
