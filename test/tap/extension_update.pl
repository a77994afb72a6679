# ALTER EXTENSION ... UPDATE: what it leads to is what CREATE EXTENSION makes, and
# those who work meanwhile (writers, a waiting reader, a listener, the workers)
# go on, and do not keep it from its locks.
#
# Of each released version the install script is kept in test/upgrade, under its
# own name; with the delta scripts beside the Makefile it must lead to this one.
# A version that is made here, with a column more in each of the extension's
# tables and other things new, stands for the next: the library that is loaded
# does not know it, as none does from the update until the restart.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Catalog;
use EventstoreTest::Kafka;
use EventstoreTest::Listener;
use EventstoreTest::Load;
use PostgreSQL::Test::Utils;
use Test::More;

my $next = '99.0';
my $mock = kafka_mock();
my $node = new_server('update',
	install_path => copy_installation(PostgreSQL::Test::Utils::tempdir_short() . '/pg'),
	settings     => [ 'max_worker_processes = 24', 'eventstore.maintenance_interval = 200ms' ]);
my $dir = extension_dir($node);

sub answer
{
	my ($sql, $dbname) = @_;
	return $node->safe_psql($dbname // 'postgres', $sql);
}

# Who else is in a deadlock with an update gives way: a worker in half a second, which is
# less than deadlock_timeout where nobody has set that, as our servers do.
my $patient = "SET deadlock_timeout = '1min'";

my $version = answer("SELECT extversion FROM pg_extension WHERE extname = 'eventstore'");
my $installed = PostgreSQL::Test::Utils::slurp_file("$dir/eventstore--$version.sql");

# ---- from each released version ------------------------------------------------------

answer('CREATE DATABASE fresh');
answer('CREATE EXTENSION eventstore', 'fresh');

my @released = glob "$FindBin::RealBin/../upgrade/eventstore--*.sql";
foreach my $script (@released)
{
	my ($from) = $script =~ /eventstore--(.*)\.sql$/;

	next if $from eq $version;
	system('cp', $script, $dir) == 0 or BAIL_OUT("cannot copy $script");
	answer("CREATE DATABASE released_$from");
	answer("CREATE EXTENSION eventstore VERSION '$from'; $patient; ALTER EXTENSION eventstore UPDATE", "released_$from");
	is(join("\n", catalog_differs($node, "released_$from", 'fresh')), '', "updated from $from: the same as installed");
}

# ---- to the next ---------------------------------------------------------------------------

my @tables = split /\n/, answer(q{
	SELECT c.oid::regclass FROM pg_class c JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
	JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'eventstore' WHERE c.relkind = 'r' ORDER BY 1});
cmp_ok(scalar @tables, '>', 10, 'the extension has tables');
my $delta = join('', map { "ALTER TABLE $_ ADD COLUMN next_thing text;\n" } @tables) . q{
CREATE FUNCTION eventstore.next_function(i int) RETURNS int LANGUAGE sql STABLE AS 'SELECT i';
COMMENT ON FUNCTION eventstore.next_function(int) IS 'The next.';
CREATE VIEW eventstore.next_view AS SELECT eventstore.next_function(1) AS one;
GRANT SELECT ON eventstore.next_view TO PUBLIC;
CREATE OR REPLACE FUNCTION eventstore.head(collection regclass) RETURNS bigint
LANGUAGE c VOLATILE PARALLEL RESTRICTED COST 77 AS 'MODULE_PATHNAME', 'es_head';
};
PostgreSQL::Test::Utils::append_to_file("$dir/eventstore--$version--$next.sql", $delta);
PostgreSQL::Test::Utils::append_to_file("$dir/eventstore--$next.sql", $installed . $delta);

answer('CREATE DATABASE made');
answer('CREATE DATABASE updated');
answer("CREATE EXTENSION eventstore VERSION '$next'", 'made');
answer("CREATE EXTENSION eventstore; $patient; ALTER EXTENSION eventstore UPDATE TO '$next'", 'updated');
is(join("\n", catalog_differs($node, 'updated', 'made')), '', 'updated is the same as installed');
cmp_ok(scalar(catalog_differs($node, 'updated', 'fresh')), '>', @tables, 'and not what it was');

# What a delta may have forgotten, each by itself, is seen.
foreach my $change (
	"CREATE OR REPLACE FUNCTION eventstore.next_function(i int) RETURNS int LANGUAGE sql STABLE AS 'SELECT 1 + i'",
	'ALTER FUNCTION eventstore.next_function(int) VOLATILE',
	'ALTER FUNCTION eventstore.next_function(int) PARALLEL SAFE',
	'REVOKE EXECUTE ON FUNCTION eventstore.next_function(int) FROM PUBLIC',
	"COMMENT ON FUNCTION eventstore.next_function(int) IS 'Other.'",
	'CREATE OR REPLACE VIEW eventstore.next_view AS SELECT 2 AS one',
	'GRANT INSERT ON eventstore.next_view TO PUBLIC',
	'ALTER TABLE eventstore.lease ALTER next_thing SET NOT NULL',
	"ALTER TABLE eventstore.lease ALTER next_thing SET DEFAULT 'x'",
	'ALTER TABLE eventstore.lease ADD CHECK (next_thing IS NULL)',
	'ALTER TABLE eventstore.lease SET (fillfactor = 40)',
	'CREATE INDEX ON eventstore.lease (next_thing)',
	'ALTER SEQUENCE eventstore.incarnation_seq INCREMENT 2',
	'ALTER EVENT TRIGGER eventstore_on_drop DISABLE',
	'ALTER EXTENSION eventstore DROP VIEW eventstore.next_view')
{
	# Stated by the very database, which forgets it again.
	answer('DROP DATABASE IF EXISTS wrong');
	answer('CREATE DATABASE wrong TEMPLATE updated');
	answer($change, 'wrong');
	isnt(scalar(catalog_differs($node, 'wrong', 'made')), 0, "seen: $change");
}

# ---- while all work -------------------------------------------------------------------------

answer(q{
	SELECT eventstore.create_collection('a', segment_size => 2000), eventstore.create_collection('b', segment_size => 100000);
	SELECT eventstore.subscribe('s', 'a', lanes => 2);
	CREATE TABLE stock (id int PRIMARY KEY, amount int);
	SELECT eventstore.capture('stock'), eventstore.create_store('kv', 'text');
});
$mock->create_topic('t', 2);
$mock->create_topic('out', 1);
my $address = $mock->address;
answer(qq{CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address')});
answer(q{SELECT eventstore.create_source('in', 'k', 't', 'kv', consumer_properties => '{"fetch.wait.max.ms": 5}'),
	eventstore.create_sink('out', 'k', 'out', 'stock_changelog')});
$mock->produce('t', map { [ "k$_", '1' ] } 1 .. 50);
is(answer("SELECT eventstore.wait_for_source('in', '2 min')"), 't', 'a source runs');

my $load = EventstoreTest::Load->new($node, collections => [ 'a', 'b' ], seed => 7, pause => 0.002);
$load->start_writer for 1 .. 3;
$load->start_reader('committed', 'a');
$load->start_listener('b');
my $old_session = session($node);
$old_session->run("SELECT count(*) FROM eventstore.poll('s', 1)");
$old_session->run("SELECT eventstore.put_text('kv', 'mine', '1')");
my $waiting = session($node, application_name => 'waiting');
$waiting->send("SELECT position FROM eventstore.read('stock_changelog', wait => '120 s')");
await_asleep($node, 'waiting');
await_true($node, 'SELECT count(*) > 300 FROM a');

# A worker that is amid a transaction may need what the update would lock first.
hold_up($node, 'kv');
my $holder = session($node);
$holder->run('SELECT pg_advisory_lock(42)');
$mock->produce('t', [ 'held', '1' ]);
await_true($node, "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'eventstore source' AND wait_event = 'PgSleep'");
my $administrator = session($node);
$administrator->run($patient);
my $pid = $administrator->backend_pid;
$administrator->run("BEGIN; SET lock_timeout = '20s'");
$administrator->send("ALTER EXTENSION eventstore UPDATE TO '$next'");
await_true($node, "SELECT count(*) = 1 FROM pg_locks WHERE pid = $pid AND NOT granted");
is(answer("SELECT count(*) FROM pg_locks WHERE pid = $pid AND mode = 'AccessExclusiveLock' AND granted"), '0', 'an update that waits for a worker has nothing yet that this one may need');
$holder->run('SELECT pg_advisory_unlock(42)');
$holder->quit;
$administrator->receive;
is($administrator->{state}, '00000', 'an update gets its locks beside writers, readers and workers');
is(answer("SELECT count(*) FROM kv WHERE key = 'held'"), '1', 'and the worker has come to its end');
# It has them now, and nothing goes on, until it is undone.
await_true($node, "SELECT count(*) > 2 FROM pg_stat_activity WHERE wait_event_type = 'Lock'");
$administrator->run('ROLLBACK');
my $count = answer('SELECT count(*) FROM a');
await_true($node, "SELECT count(*) > $count + 100 FROM a");
pass('undone, all go on');
is($administrator->try("SET lock_timeout = '20s'; ALTER EXTENSION eventstore UPDATE TO '$next'"), '00000', 'the update');
$count = answer('SELECT count(*) FROM a');
await_true($node, "SELECT count(*) > $count + 3000 FROM a");
pass('writers go on, into new segments');

answer("INSERT INTO stock VALUES (1, 1)");
is($waiting->receive, 1, 'who waited is woken');
is(answer('SELECT version, type FROM eventstore.read_stream($$stock_changelog$$, $$1$$)'), '1|insert', 'captured tables go on');
is($old_session->run("SELECT eventstore.put_text('kv', 'mine', '2')"), '1', 'so do stores, in sessions that knew the former version');
is($old_session->run("SELECT count(*) FROM eventstore.poll('s', 3)"), 3, 'and subscriptions');
is(answer("SELECT count(*) FROM eventstore.poll('s', 3)"), 3, 'and in new ones');
$mock->produce('t', map { [ "k$_", '2' ] } 1 .. 50);
await_true($node, "SELECT count(*) = 50 FROM kv WHERE value = '2' AND key <> 'mine'");
pass('and the source');
await_true($node, "SELECT lag_events = 0 FROM eventstore.sinks");
pass('and the sink');
is(answer("SELECT eventstore.create_collection('new'), position FROM eventstore.append('a', 'x', stream => 'new', expected_version => 0)") =~ /^new\|\d+$/, 1, 'there are new collections');
answer("SELECT eventstore.truncate_before('a', 2001)");
await_gone($node, 'a_1');
pass('and segments go');

is($load->stop_writers, 0, 'writers come to their end');
is($load->finish_readers, 0, 'and readers');
is(join("\n", $load->lines('error')), '', 'without an error');
is_clean($node, $_) foreach 'a', 'b', 'stock_changelog', 'kv';
$_->quit foreach $old_session, $waiting, $administrator;

# ---- after the restart --------------------------------------------------------------------------

$node->restart;
is(answer("SELECT position > 0 FROM eventstore.append('a', 'restarted')"), 't', 'after the restart it goes on');
$mock->produce('t', [ 'last', '3' ]);
await_true($node, "SELECT count(*) = 1 FROM kv WHERE key = 'last'");
pass('and the source');

$node->stop;
# Those who write the same streams in several appends have to expect a deadlock with each
# other.  An update may take longer than a worker waits for its lock; it tries again.
my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile);
$log =~ s/.*source "in": retrying\n.*DETAIL:  canceling statement due to lock timeout\n//g;
is(join("\n", grep { /deadlock detected|source "in": retrying/ && !/\] load \d+ ERROR/ } split /\n/, $log),
	'', 'nobody was in the way of another for good');
no_crash($node);
done_testing();
