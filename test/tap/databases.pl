# Several databases of one server: collections of the same name know nothing of
# each other, and a database with collections can be dropped, renamed and used
# as a template, although a worker is connected to it.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('databases');

sub prepare
{
	my ($dbname) = @_;

	$node->safe_psql('postgres', "CREATE DATABASE $dbname TEMPLATE template0");
	$node->safe_psql($dbname, q{
		CREATE EXTENSION eventstore;
		SELECT eventstore.create_collection('c', segment_size => 50);
		SELECT position FROM eventstore.append('c', 'first', stream => 's');
	});
	return;
}

sub await_worker
{
	my ($dbname, $count) = @_;

	await_true($node, "SELECT count(*) = $count FROM pg_stat_activity WHERE backend_type LIKE 'eventstore worker%' AND datname = '$dbname'");
	return;
}

prepare($_) foreach ('one', 'two');

# ---- apart ------------------------------------------------------------------------

my $holder = session($node, dbname => 'one');
$holder->run('BEGIN');
$holder->run("SELECT position FROM eventstore.append('c', 'open', stream => 's', fail_if => '[{}]', after => 1)");
is($node->safe_psql('two', "SELECT position, version FROM eventstore.append('c', 'x', stream => 's', expected_version => 1)"), '2|2',
	'the other database neither waits nor counts');
is($node->safe_psql('two', "SELECT eventstore.head('c')"), 2, 'nor is its head held');
is($node->safe_psql('one', "SELECT eventstore.head('c')"), 1, 'as this one is');
is($node->safe_psql('one', "SELECT count(*) FROM eventstore.holders"), 1, 'the holder is shown in its database');
is($node->safe_psql('two', "SELECT count(*) FROM eventstore.holders"), 0, 'and in no other');
$holder->run('COMMIT');
$holder->quit;
foreach my $dbname ('one', 'two')
{
	# More than was ready: each has a worker of its own.
	is($node->safe_psql($dbname, q{SELECT count(*) FROM eventstore.append_batch('c', (SELECT jsonb_agg('{"type": "x"}'::jsonb) FROM generate_series(1, 1000)))}),
		1000, "$dbname makes its segments");
	is_clean($node, 'c', "$dbname is consistent", $dbname);
	await_worker($dbname, 1);
}

# ---- commands that need a database without connections ------------------------------

$node->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE one');
is($node->safe_psql('copy', "SELECT position FROM eventstore.append('c', 'copy') EXCEPT SELECT position FROM c"),
	$node->safe_psql('copy', "SELECT max(position) FROM c"), 'a copy by TEMPLATE goes on by itself');
cmp_ok($node->safe_psql('copy', "SELECT max(position) FROM c"), '>', $node->safe_psql('one', "SELECT max(position) FROM c"), 'beyond what it was copied with');
is_clean($node, 'c', 'the copy is consistent', 'copy');
await_worker('one', 1);

$node->safe_psql('postgres', 'ALTER DATABASE two RENAME TO three');
is($node->safe_psql('three', "SELECT position > 1000 FROM eventstore.append('c', 'renamed')"), 't', 'a renamed database goes on');
await_worker('three', 1);

$node->safe_psql('postgres', 'DROP DATABASE one');
$node->safe_psql('postgres', 'DROP DATABASE three');
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_database WHERE datname IN ('one', 'two', 'three')"), 0, 'databases with a worker are dropped');

# One that is used, so that the command fails, keeps its worker.
my $user = session($node, dbname => 'copy');
is(sqlstate_of($node, 'DROP DATABASE copy'), '55006', 'a database in use is not dropped');
await_worker('copy', 1);
$user->quit;

# ---- begun again ---------------------------------------------------------------------

prepare('one');
is($node->safe_psql('one', "SELECT max(position) FROM c"), 1, 'a new database of an old name begins at 1');
$node->safe_psql('one', "SELECT eventstore.drop_collection('c'); SELECT eventstore.create_collection('c')");
is($node->safe_psql('one', "SELECT position, version FROM eventstore.append('c', 'new', stream => 's', expected_version => 0)"), '1|1', 'and so does a new collection');
is(sqlstate_of($node, "SELECT * FROM eventstore.read('c', after => 500)", dbname => 'one'), 'LG004', 'an old cursor is noticed');

# ---- an OID that comes again -----------------------------------------------------------

# Both are copies of one, so that all that identifies a collection is the same.
$node->safe_psql('postgres', 'CREATE DATABASE again TEMPLATE one OID 100001');
my $begun = $node->safe_psql('again', "SELECT eventstore.head('c')");
$node->safe_psql('again', q{SELECT count(*) FROM eventstore.append_batch('c', (SELECT jsonb_agg('{"type": "x"}'::jsonb) FROM generate_series(1, 100)))});
cmp_ok($node->safe_psql('again', "SELECT eventstore.head('c')"), '>', $begun + 50, 'a database is used');
$node->safe_psql('postgres', 'DROP DATABASE again');
$node->safe_psql('postgres', 'CREATE DATABASE again TEMPLATE one OID 100001');
is($node->safe_psql('again', "SELECT eventstore.head('c')"), $begun, 'what was known of it went when it was dropped');
$node->safe_psql('postgres', 'DROP DATABASE again');

# The worker of a database without the extension goes.
$node->safe_psql('one', 'DROP EXTENSION eventstore CASCADE');
await_worker('one', 0);

$node->stop;
no_crash($node);
done_testing();
