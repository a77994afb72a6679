# The extension goes, and what it was is left as plain tables; roles and
# schemas go with what is theirs.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use Test::More;

my $node = new_server('drop');

sub answer
{
	my ($sql) = @_;
	return $node->safe_psql('postgres', $sql);
}

sub leftovers
{
	return answer(q{
		SELECT (SELECT count(*) FROM eventstore.collection_catalog), (SELECT count(*) FROM eventstore.collections),
			(SELECT count(*) FROM pg_class WHERE relname LIKE 'gone%')});
}

# ---- DROP SCHEMA, DROP OWNED ----------------------------------------------------------

answer(q{
	CREATE ROLE app;
	CREATE SCHEMA gone_schema;
	GRANT CREATE ON SCHEMA public TO app;
	SELECT eventstore.create_collection('gone_schema.gone_a');
	SELECT position FROM eventstore.append('gone_schema.gone_a', 'x', stream => 's');
	SET ROLE app;
	SELECT eventstore.create_collection('gone_b');
	SELECT position FROM eventstore.append('gone_b', 'x', stream => 's');
});
is(sqlstate_of($node, 'DROP SCHEMA gone_schema'), '2BP01', 'a schema with a collection is not dropped');
is(leftovers(), '2|2|'. answer("SELECT count(*) FROM pg_class WHERE relname LIKE 'gone%'"), 'and it stays');
answer('DROP SCHEMA gone_schema CASCADE');
answer('DROP OWNED BY app CASCADE');
is(leftovers(), '0|0|0', 'DROP SCHEMA CASCADE and DROP OWNED leave nothing behind');
is(sqlstate_of($node, 'DROP ROLE app'), '00000', 'nor a dependency of the role');

# ---- DROP EXTENSION ----------------------------------------------------------------------

answer(q{
	SELECT eventstore.create_collection('kept', segment_size => 100);
	SELECT count(*) FROM eventstore.append_batch('kept', (SELECT jsonb_agg(jsonb_build_object('type', 'e', 'stream', 's' || i % 3, 'tags', '["t"]'::jsonb)) FROM generate_series(1, 1000) i));
});
is(sqlstate_of($node, 'DROP EXTENSION eventstore'), '2BP01', 'DROP EXTENSION is refused while there is a collection');
is(answer('SELECT count(*) FROM kept'), 1000, 'and nothing happens');
is(sqlstate_of($node, 'BEGIN; DROP EXTENSION eventstore CASCADE; ROLLBACK'), '00000', 'a drop that is rolled back');
is(answer("SELECT position FROM eventstore.append('kept', 'x')"), 1001, 'leaves it working');
is_clean($node, 'kept');

answer('DROP EXTENSION eventstore CASCADE');
is(answer('SELECT count(*), max(position), count(DISTINCT stream) FROM kept'), '1001|1001|3', 'CASCADE leaves the table and its events');
is(answer('UPDATE kept SET type = type WHERE position = 5 RETURNING position'), 5, 'a plain table');
is(answer("SELECT count(*) FROM pg_namespace WHERE nspname = 'eventstore'"), 0, 'nothing else stays, not even the schema');
is(answer("SELECT count(*) FROM pg_event_trigger WHERE evtname LIKE 'eventstore%'"), 0, 'nor an event trigger');
answer('CREATE SCHEMA eventstore');
is(sqlstate_of($node, 'CREATE EXTENSION eventstore'), '42P06', "the extension does not move into somebody else's schema");
answer('DROP SCHEMA eventstore');
answer('CREATE EXTENSION eventstore');
is(answer(q{SELECT count(*) FROM pg_depend d, pg_identify_object(d.classid, d.objid, 0) o WHERE d.deptype = 'e' AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'eventstore') AND o.schema = 'pg_catalog'}),
	0, 'nothing of it lies outside its schema');
is(sqlstate_of($node, 'DROP SCHEMA eventstore CASCADE'), '2BP01', 'whose schema is not dropped without it');
is(sqlstate_of($node, "SELECT * FROM eventstore.append('kept', 'x')"), '55000', 'which the extension, created again, knows only by its columns');
answer("SELECT eventstore.repair_collection('kept')");
is(answer("SELECT position > 1001, version FROM eventstore.append('kept', 'x', stream => 's1', expected_version => 334)"), 't|335', 'repaired, appends go on where they were');
is(answer("SELECT count(*) FROM eventstore.read('kept', tags => '{t}')"), 1000, 'and reads');
is(sqlstate_of($node, 'DELETE FROM kept'), 'LG003', 'append-only again');
is(answer("SELECT count(*) FROM eventstore.append_batch('kept', (SELECT jsonb_agg('{\"type\": \"more\"}'::jsonb) FROM generate_series(1, 2000)))"), 2000, 'and segments are made');
is_clean($node, 'kept');

# Sessions that knew the extension before find it anew.
my $session = session($node);
$session->run("SELECT position FROM eventstore.append('kept', 'x')");
answer('DROP TABLE kept; DROP EXTENSION eventstore; CREATE EXTENSION eventstore');
answer("SELECT eventstore.create_collection('kept')");
is($session->run("SELECT position FROM eventstore.append('kept', 'x', stream => 's')"), 1, 'an old session works with the new extension');
is($session->run("SELECT count(*) FROM eventstore.read('kept')"), 1, 'and reads');
$session->quit;

$node->stop;
no_crash($node);
done_testing();
