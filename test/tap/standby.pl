# A hot standby reads, and its readers skip nothing; promoted, it goes on with
# positions that no reader of the old primary can have passed.
#
# A standby has no shared memory to tell which positions are in flight, so its
# readers go by the head that travels with the data.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Load;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = new_server('primary',
	streaming => 1,
	settings  => [ 'eventstore.tick_delay = 20ms', 'autovacuum_naptime = 1s' ]);

$primary->safe_psql('postgres', q{
	SELECT eventstore.create_collection('a', segment_size => 2000);
	SELECT eventstore.create_collection('b');
	SELECT count(*) FROM eventstore.append_batch('a', (SELECT jsonb_agg(jsonb_build_object('type', 'old', 'stream', 's' || i % 7)) FROM generate_series(1, 500) i));
});
$primary->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
configure($standby, 'hot_standby_feedback = on', 'max_standby_streaming_delay = -1');
$standby->start;

# ---- read while the primary appends -------------------------------------------

my @collections = ('a', 'b');
my $writing = EventstoreTest::Load->new($primary, collections => \@collections, seed => 2, pause => 0.004);
my $reading = EventstoreTest::Load->new($standby, collections => \@collections, seed => 3);
my @readers = (
	[ 'committed',  'a' ], [ 'committed', 'b' ],
	[ 'repeatable', 'a' ], [ 'pages', 'a' ],
	[ 'cursor',     'b' ], [ 'prepared', 'a' ],
	[ 'tagged',     'a' ]);

$writing->start_writer(600) for 1 .. 6;
$reading->start_reader(@$_) foreach @readers;
$reading->start_stream_reader('a');
is($writing->wait_for($writing->{writers}), 0, 'the writers came to their end');
$primary->wait_for_catchup($standby, 'replay', $primary->lsn('insert'));
is($reading->finish_readers, 0, 'the readers of the standby came to their end');
is(join("\n", $writing->lines('error'), $reading->lines('error')), '', 'no client met an error that it should not');

foreach my $n (1 .. @readers)
{
	my ($kind, $collection) = @{ $readers[ $n - 1 ] };
	my $where = $kind eq 'tagged' ? "WHERE tags @> '{color:red}'" : '';

	is( join(',', $reading->positions_of('read', $collection, $n)),
		join(',', positions($primary, "SELECT position FROM $collection $where ORDER BY position")),
		"reader $kind of $collection: everything once, in order");
}

# ---- wait while the primary appends --------------------------------------------

# The tick behind the last append would end a wait, too.
sub await_head
{
	$standby->poll_query_until('postgres', "SELECT eventstore.head('b')", $primary->safe_psql('postgres', "SELECT eventstore.head('b')"))
	  or BAIL_OUT('the standby does not come to the head of its primary');
	return;
}

# Who waits holds no page and no lock, so replay does not wait for him: by the vacuum it
# would.  A subquery in the waiting statement keeps both, so the version comes as a number.
await_head();
my $waiting = session($standby, application_name => 'waiting');
foreach my $call (
	"SELECT eventstore.wait_for('b', eventstore.head('b'), '1 hour')",
	"SELECT position FROM eventstore.read('b', after => eventstore.head('b'), tags => '{waited}', wait => '1 hour')",
	"SELECT version FROM eventstore.read_stream('b', 'waited', 3, wait => '1 hour')")
{
	$primary->safe_psql('postgres', 'BEGIN; SELECT count(*) FROM eventstore.append_batch(\'b\', (SELECT jsonb_agg(\'{"type": "lost"}\'::jsonb) FROM generate_series(1, 3000))); ROLLBACK');
	$primary->safe_psql('postgres', "SELECT position FROM eventstore.append('b', 'lost before')");
	await_head();
	$waiting->send($call);
	await_asleep($standby, 'waiting');
	$primary->safe_psql('postgres', 'VACUUM b');
	$primary->safe_psql('postgres', "SELECT position FROM eventstore.append('b', 'waited', tags => '{waited}', stream => 'waited')");
	like($waiting->receive, qr/^\d+$/, "on the standby: $call");
}
is($standby->safe_psql('postgres', "SELECT count(*) FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'worker'"), 0, 'a standby has no worker');
await_true($standby, "SELECT state = 'running' FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'notifier'");
is(sqlstate_of($standby, "SELECT * FROM eventstore.listen('b')"), '25006', 'LISTEN is refused there');
$waiting->quit;
is( join(',', sort { $a <=> $b } $reading->positions_of('read', 'a', @readers + 1)),
	join(',', positions($primary, 'SELECT position FROM a WHERE stream IS NOT NULL ORDER BY position')),
	'reader of streams: everything once');

# ---- the same answers ----------------------------------------------------------

foreach my $sql (
	"SELECT eventstore.head('a')",
	"SELECT position, stream, version, id, type, tags, data FROM eventstore.read('a')",
	"SELECT position FROM eventstore.read('a', direction => 'backward', max_count => 10)",
	"SELECT position FROM eventstore.read('a', query => '[{\"types\": [\"t1\"], \"tags\": [\"n:1\"]}, {\"tags\": [\"n:2\"]}]')",
	"SELECT position, version FROM eventstore.read_stream('a', 's1')",
	"SELECT position, version FROM eventstore.peek('a', 's1')",
	"SELECT position FROM eventstore.peek('a')",
	"SELECT stream, version, first_position, last_position FROM eventstore.streams('a')",
	"SELECT collection, cursor, (event).position FROM eventstore.read_merged('{a,b}')",
	"SELECT * FROM eventstore.verify('a')",
	"SELECT collection, segment_size, head, events FROM eventstore.collections ORDER BY 1")
{
	# The tick may take a moment.
	my $wanted = $primary->safe_psql('postgres', $sql);
	ok($standby->poll_query_until('postgres', $sql, $wanted), "the standby answers as the primary: $sql");
}

# ---- it is read only --------------------------------------------------------------

foreach my $sql (
	"SELECT * FROM eventstore.append('a', 'x')",
	"SELECT * FROM eventstore.append('a', 'x', stream => 's', fail_if => '[{}]')",
	"SELECT * FROM eventstore.append_batch('a', '[{\"type\": \"x\"}]')",
	"INSERT INTO a (type) VALUES ('x')",
	"SELECT eventstore.create_collection('c')",
	"SELECT eventstore.truncate_before('a', 10)",
	"SELECT eventstore.set_option('a', 'notify', 'none')",
	"SELECT eventstore.repair_collection('a')",
	"SELECT eventstore.drop_collection('a')")
{
	is(sqlstate_of($standby, $sql), '25006', "refused on the standby: $sql");
}
is(sqlstate_of($standby, "SELECT * FROM eventstore.read('a', after => 4000000000000)"), 'LG004', 'a cursor ahead of the log is noticed on a standby');
is(sqlstate_of($standby, 'SELECT * FROM eventstore.doctor()'), '00000', 'doctor() answers on a standby');
is(sqlstate_of($standby, 'SELECT * FROM eventstore.pg_stat_eventstore'), '00000', 'the statistics answer on a standby');

# ---- failover, with some events that never came over ----------------------------

$standby->stop;
my $lost_to = $primary->safe_psql('postgres', q{
	SELECT max(position) FROM eventstore.append_batch('a', (SELECT jsonb_agg('{"type": "lost", "stream": "s1"}'::jsonb) FROM generate_series(1, 30000)));
});
my $known = $primary->safe_psql('postgres', "SELECT max(position) FROM a WHERE type <> 'lost'");
$primary->kill9;
$standby->start;
$standby->promote;

is(sqlstate_of($standby, "SELECT * FROM eventstore.read('a', after => $lost_to)"), '00000',
	'a cursor into what was lost is taken');
my $next = $standby->safe_psql('postgres', "SELECT position FROM eventstore.append('a', 'new life', stream => 's1')");
cmp_ok($next, '>', $lost_to, 'the next position is beyond what was lost');
cmp_ok($next - $known, '>=', 2**32, 'by 2^32');
is($standby->safe_psql('postgres', "SELECT position, type FROM eventstore.read('a', after => $lost_to)"), "$next|new life",
	'a reader with that cursor misses nothing of what comes after');
is(sqlstate_of($standby, "SELECT * FROM eventstore.read('a', after => $next + 1000000)"), 'LG004',
	'a cursor beyond that is refused');
$standby->safe_psql('postgres', "INSERT INTO a (type, stream) SELECT 'new life', 's2' FROM generate_series(1, 10)");
$standby->safe_psql('postgres', "SELECT count(*) FROM eventstore.append_batch('b', (SELECT jsonb_agg('{\"type\": \"new life\"}'::jsonb) FROM generate_series(1, 5000)))");
is($standby->safe_psql('postgres', "SELECT count(*) FROM eventstore.read('a', after => $lost_to)"), 11, 'appends go on');
is_clean($standby, $_) foreach @collections;

# Once promoted it has a worker, and who waits is woken by appends.
await_true($standby, "SELECT state = 'running' FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'worker' AND database = 'postgres'");
$waiting = session($standby, application_name => 'waiting');
$waiting->send("SELECT eventstore.wait_for('b', eventstore.head('b'), '1 hour')");
await_asleep($standby, 'waiting');
$standby->safe_psql('postgres', "SELECT position FROM eventstore.append('b', 'new life')");
like($waiting->receive, qr/^\d+$/, 'a wait on what was promoted');
$waiting->quit;

# A restart on the same timeline does not jump again.
$standby->restart;
my $after = $standby->safe_psql('postgres', "SELECT position FROM eventstore.append('a', 'restarted')");
cmp_ok($after - $next, '<', 100_000, 'a restart does not jump');

$standby->stop;
no_crash($standby);
done_testing();
