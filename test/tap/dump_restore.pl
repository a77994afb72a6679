# pg_dump and a restore need no help, also while appends go on.
#
# What a dump must bring over: events with their positions, versions of streams,
# options, the first kept position, and a counter that never hands out a
# position again.  What is dumped in part says so, and can be repaired.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Load;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('dump', settings => ['eventstore.tick_delay = 20ms', 'eventstore.maintenance_interval = 100ms']);
my $dir  = PostgreSQL::Test::Utils::tempdir();

$node->safe_psql('postgres', q{
	CREATE ROLE owner;
	CREATE SCHEMA sales AUTHORIZATION owner;
	SELECT eventstore.create_collection('live', segment_size => 2000);
	SELECT eventstore.create_collection('cut', segment_size => 100);
	SELECT eventstore.create_collection('empty');
	SET ROLE owner;
	SELECT eventstore.create_collection('sales.orders', segment_size => 5000, retain_events => 100000,
		retain_for => '400 days', retain_bytes => 1000000000, notify => 'streams', channel => 'Orders!');
	SELECT eventstore.set_option('sales.orders', 'heartbeat', '10 s');
	SELECT eventstore.create_collection('sales."We ird"');
	GRANT SELECT ON sales.orders TO PUBLIC;
	RESET ROLE;
	SELECT count(*) FROM eventstore.append_batch('cut', (SELECT jsonb_agg(jsonb_build_object('type', 'e', 'stream', 's' || i % 3)) FROM generate_series(1, 1000) i));
	SELECT eventstore.truncate_before('cut', 650);
	SELECT count(*) FROM eventstore.append_batch('sales.orders', (SELECT jsonb_agg(jsonb_build_object('type', 't' || i % 5,
		'tags', jsonb_build_array('customer:' || i % 50), 'stream', 'order-' || i % 100, 'data', jsonb_build_object('i', i), 'metadata', '{"by": "me"}'::jsonb)) FROM generate_series(1, 3000) i));
	INSERT INTO sales."We ird" (type, body, stream) VALUES ('binary', '\x00ff', 'ünï'), ('empty', '', null);
	ALTER TABLE sales."We ird" ADD COLUMN extra text;
	INSERT INTO sales."We ird" (type, extra) VALUES ('more', 'column');
	CREATE INDEX ON sales."We ird" (extra);
});
my @collections = ('live', 'cut', 'empty', 'sales.orders', 'sales."We ird"');
await_gone($node, 'cut_501');

sub restore_sql
{
	my ($file, $dbname, @options) = @_;

	$node->safe_psql('postgres', "CREATE DATABASE $dbname TEMPLATE template0");
	$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr($dbname), '-f', $file ],
		"restored into $dbname without an error");
	return;
}

# ---- a dump while appends go on -----------------------------------------------------

my $load = EventstoreTest::Load->new($node, collections => ['live'], seed => 4, pause => 0.002);
$load->start_writer for 1 .. 4;
await_true($node, 'SELECT count(*) > 500 FROM live');
$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-f', "$dir/plain.sql" ], 'dumped as SQL');
$node->command_ok([ 'pg_dump', '-Fc', '-d', $node->connstr('postgres'), '-f', "$dir/custom.dump" ], 'dumped as an archive');
is($load->stop_writers, 0, 'the writers were not disturbed');
is(join("\n", $load->lines('error')), '', 'and met no error');

restore_sql("$dir/plain.sql", 'copied');
$node->safe_psql('postgres', 'CREATE DATABASE archived TEMPLATE template0');
$node->command_ok([ 'pg_restore', '-j', '2', '-e', '-d', $node->connstr('archived'), "$dir/custom.dump" ],
	'restored from the archive in parallel');

sub same
{
	my ($dbname, $sql, $name) = @_;

	is($node->safe_psql($dbname, $sql), $node->safe_psql('postgres', $sql), "$dbname: $name");
	return;
}

foreach my $dbname ('copied', 'archived')
{
	same($dbname, 'SELECT collection, notify, channel, segment_size, retain_events, retain_for, retain_bytes, heartbeat FROM eventstore.collections ORDER BY collection::text COLLATE "C"',
		'the same collections and options');
	foreach my $collection (grep { $_ ne 'live' } @collections)
	{
		same($dbname, "SELECT count(*), min(position), max(position), md5(string_agg(e::text, ',' ORDER BY position)) FROM $collection e", "the same events in $collection");
		same($dbname, "SELECT count(*), md5(string_agg(s::text, ',')) FROM eventstore.streams('$collection') s", "the same streams in $collection");
	}
	is_clean($node, $_, "$dbname: $_ is consistent", $dbname) foreach @collections;

	# Of the one that was being written to: a state that once was.
	my $upto = $node->safe_psql($dbname, 'SELECT max(position) FROM live');
	is( $node->safe_psql($dbname, 'SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY stream ORDER BY position) n FROM live WHERE stream IS NOT NULL) v WHERE version <> n'),
		0, "$dbname: dense versions in live");
	cmp_ok($node->safe_psql($dbname, 'SELECT count(*) FROM live'), '>', 400, "$dbname: live has its events");

	is($node->safe_psql($dbname, "SELECT position FROM eventstore.read('sales.orders', tags => '{customer:7}', types => '{t2}')"),
		$node->safe_psql('postgres', "SELECT position FROM sales.orders WHERE 'customer:7' = ANY (tags) AND type = 't2' ORDER BY position"),
		"$dbname: found by tag");
	is(sqlstate_of($node, "SELECT * FROM eventstore.read('cut', after => 3)", dbname => $dbname), 'LG005', "$dbname: what was truncated stays so");
	is($node->safe_psql($dbname, "SELECT min(position) FROM eventstore.read('cut')"), 601, "$dbname: and the rest is read from its first position");

	foreach my $collection (@collections)
	{
		my $last = $node->safe_psql('postgres', "SELECT coalesce(max(position), 0) FROM $collection");
		cmp_ok($node->safe_psql($dbname, "SELECT position FROM eventstore.append('$collection', 'restored')"), '>', $upto,
			"$dbname: the next position of live is beyond its events") if $collection eq 'live';
		cmp_ok($node->safe_psql($dbname, "SELECT position FROM eventstore.append('$collection', 'restored', stream => 'order-1')"), '>', $last,
			"$dbname: the next position of $collection is beyond its events") if $collection ne 'live';
	}
	is($node->safe_psql($dbname, "SELECT version FROM eventstore.append('sales.orders', 'restored', stream => 'order-1', expected_version => 31)"), 32,
		"$dbname: versions go on");
	is($node->safe_psql($dbname, "SELECT version FROM eventstore.append('cut', 'restored', stream => 's1')"), 335,
		"$dbname: versions of a truncated collection go on");
	is(sqlstate_of($node, "SELECT * FROM eventstore.append('sales.orders', 'x', fail_if => '[{\"tags\": [\"customer:7\"]}]')", dbname => $dbname),
		'LG002', "$dbname: conditions see what was restored");
	is(sqlstate_of($node, 'DELETE FROM sales.orders', dbname => $dbname), 'LG003', "$dbname: append-only still");
	is(sqlstate_of($node, 'SET ROLE owner; SELECT * FROM eventstore.append($$sales.orders$$, $$x$$)', dbname => $dbname), '00000', "$dbname: the owner is the owner");

	# The worker of the new database takes over: more than the segments that were there.
	is($node->safe_psql($dbname, q{SELECT count(*) FROM eventstore.append_batch('cut', (SELECT jsonb_agg('{"type": "more"}'::jsonb) FROM generate_series(1, 1000)))}),
		1000, "$dbname: segments are made");
	is_clean($node, $_, "$dbname: $_ is still consistent", $dbname) foreach @collections;
}

# The restored one can be dumped and restored again.
$node->command_ok([ 'pg_dump', '-d', $node->connstr('copied'), '-f', "$dir/again.sql" ], 'dumped again');
restore_sql("$dir/again.sql", 'again');
is_clean($node, 'sales.orders', 'again: consistent', 'again');

# ---- one collection alone ---------------------------------------------------------------

$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-t', 'sales.orders*', '-f', "$dir/one.sql" ], 'dumped one collection alone');
$node->safe_psql('postgres', 'CREATE DATABASE partial TEMPLATE template0');
$node->safe_psql('partial', 'CREATE EXTENSION eventstore; CREATE SCHEMA sales AUTHORIZATION owner');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('partial'), '-f', "$dir/one.sql" ], 'restored it');
is($node->safe_psql('partial', 'SELECT count(*), max(position) FROM sales.orders'), '3000|3000', 'plain SQL reads it');
is(sqlstate_of($node, "SELECT * FROM eventstore.append('sales.orders', 'x')", dbname => 'partial'), '55000', 'append asks for a repair');
is(sqlstate_of($node, "SELECT * FROM eventstore.read('sales.orders')", dbname => 'partial'), '55000', 'read asks for a repair');
is(sqlstate_of($node, "INSERT INTO sales.orders (type) VALUES ('x')", dbname => 'partial'), '55000', 'INSERT asks for a repair');
$node->safe_psql('partial', "SELECT eventstore.repair_collection('sales.orders')");
is($node->safe_psql('partial', "SELECT version, position > 3000 FROM eventstore.append('sales.orders', 'x', stream => 'order-1', expected_version => 30)"), '31|t', 'after that appends go on');
is($node->safe_psql('partial', "SELECT count(*) FROM eventstore.read('sales.orders')"), 3001, 'and reads');
is($node->safe_psql('partial', "SELECT count(*) FROM eventstore.read('sales.orders', tags => '{customer:7}')"), 60, 'by tag too');
is_clean($node, 'sales.orders', 'the repaired collection is consistent', 'partial');

# ---- the data alone, into a collection that exists -----------------------------------

$node->command_ok([ 'pg_dump', '-Fc', '--data-only', '-t', 'sales.orders*', '-d', $node->connstr('postgres'), '-f', "$dir/data.dump" ], 'dumped the data alone');
$node->command_ok([ 'pg_dump', '--schema-only', '-d', $node->connstr('postgres'), '-f', "$dir/schema.sql" ], 'dumped the schema alone');
restore_sql("$dir/schema.sql", 'filled');
$node->command_ok([ 'pg_restore', '--data-only', '--disable-triggers', '-e', '-d', $node->connstr('filled'), "$dir/data.dump" ], 'restored the data');
$node->safe_psql('filled', "SELECT eventstore.repair_collection('sales.orders')");
is($node->safe_psql('filled', "SELECT count(*), max(position) FROM eventstore.read('sales.orders')"), '3000|3000', 'the data is there');
cmp_ok($node->safe_psql('filled', "SELECT position FROM eventstore.append('sales.orders', 'x')"), '>', 3000, 'and appends go on');
is_clean($node, 'sales.orders', 'the filled collection is consistent', 'filled');

$node->stop;
no_crash($node);
done_testing();
