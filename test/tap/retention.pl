# Retention drops whole segments while appends and readers go on, and never
# makes an open transaction wait.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Load;
use Test::More;

my $node = new_server('retention',
	settings => [ 'eventstore.maintenance_interval = 100ms', 'eventstore.tick_delay = 20ms' ]);

sub fill
{
	my ($collection, $n, $age) = @_;
	my $at = defined $age ? ", 'created_at', clock_timestamp() - interval '$age'" : '';

	$node->safe_psql('postgres',
		"SELECT count(*) FROM eventstore.append_batch('$collection', (SELECT jsonb_agg(jsonb_build_object('type', 'e', 'stream', 's' || i % 3, 'data', jsonb_build_object('pad', repeat('x', 100))$at)) FROM generate_series(1, $n) i))");
	return;
}

sub first_kept
{
	my ($collection) = @_;
	return $node->safe_psql('postgres', "SELECT min(first_position) FROM eventstore.segments WHERE collection = '$collection'::regclass");
}

sub segment_tables
{
	my ($collection) = @_;
	return $node->safe_psql('postgres', "SELECT string_agg(relname, ' ' ORDER BY length(relname), relname) FROM pg_class WHERE relname ~ '^${collection}_[0-9]+\$'");
}

# ---- by count ---------------------------------------------------------------------

$node->safe_psql('postgres', "SELECT eventstore.create_collection('counted', segment_size => 100, retain_events => 250)");
fill('counted', 450);
await_gone($node, 'counted_1');
is($node->safe_psql('postgres', "SELECT count(*) >= 250 AND count(*) < 350, min(position) % 100 FROM eventstore.read('counted')"), 't|1', 'by count: at least that many, and whole segments');
is(sqlstate_of($node, "SELECT * FROM eventstore.read('counted', after => 5)"), 'LG005', 'a cursor into what went is told so');
is($node->safe_psql('postgres', "SELECT version FROM eventstore.append('counted', 'e', stream => 's1', expected_version => 150)"), 151, 'versions go on');
is_clean($node, 'counted');

# Rows that were rolled back count for nothing.
$node->safe_psql('postgres', "BEGIN; SELECT count(*) FROM eventstore.append_batch('counted', (SELECT jsonb_agg('{\"type\": \"gone\"}'::jsonb) FROM generate_series(1, 1000))); ROLLBACK");
fill('counted', 1);
is($node->safe_psql('postgres', "SELECT count(*) >= 250 FROM eventstore.read('counted')"), 't', 'positions that came to nothing are not counted as events');

# ---- by age -----------------------------------------------------------------------

$node->safe_psql('postgres', "SELECT eventstore.create_collection('aged', segment_size => 100, retain_for => '1 hour')");
fill('aged', 200, '2 hours');
fill('aged', 150);
await_gone($node, $_) foreach ('aged_1', 'aged_101');
is($node->safe_psql('postgres', "SELECT count(*) FROM eventstore.read('aged')"), 150, 'by age: what is old went, what is young stays');
is_clean($node, 'aged');

# ---- by bytes ---------------------------------------------------------------------

$node->safe_psql('postgres', "SELECT eventstore.create_collection('sized', segment_size => 200, retain_bytes => 200000)");
fill('sized', 2000);
await_gone($node, 'sized_1');
is($node->safe_psql('postgres', "SELECT bytes >= 200000 FROM eventstore.collections WHERE collection = 'sized'::regclass"), 't', 'by bytes: at least as many are kept');
is_clean($node, 'sized');

# ---- the option changes -----------------------------------------------------------

$node->safe_psql('postgres', "SELECT eventstore.create_collection('changed', segment_size => 100)");
fill('changed', 550);
is(first_kept('changed'), 1, 'without an option everything is kept');
$node->safe_psql('postgres', "SELECT eventstore.set_option('changed', 'retain_events', '100')");
await_gone($node, 'changed_301');
$node->safe_psql('postgres', "SELECT eventstore.set_option('changed', 'retain_events', null)");
fill('changed', 500);
is($node->safe_psql('postgres', "SELECT min(position) < 500 FROM eventstore.read('changed')"), 't', 'reset, nothing more goes');

# ---- while others use it ------------------------------------------------------------

$node->safe_psql('postgres', "SELECT eventstore.create_collection('busy', segment_size => 100)");
fill('busy', 1000);
# With a snapshot older than the read the head is what the collection itself says,
# and that is written after a moment of quiet.
my $all = $node->poll_query_until('postgres', "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM eventstore.read('busy'); COMMIT", "BEGIN\n1000\nCOMMIT");
is($all, 1, 'at REPEATABLE READ, too, all is seen soon');
my $appender = session($node);
my $reader   = session($node);
$appender->run('BEGIN');
$appender->run("SELECT position FROM eventstore.append('busy', 'open', stream => 'mine')");
$reader->run('BEGIN ISOLATION LEVEL REPEATABLE READ');
is($reader->run("SELECT count(*) FROM eventstore.read('busy')") > 0, 1, 'a reader with a snapshot');
is($node->safe_psql('postgres', "SELECT eventstore.truncate_before('busy', 750)"), 701, 'truncate_before tells the start of the oldest segment left');
is(first_kept('busy'), 701, 'at once for the view');
is($node->safe_psql('postgres', "SELECT min(position) FROM eventstore.read('busy')"), 701, 'and for read');

# The worker is at it by now; nobody else may notice.
await_true($node, "SELECT count(*) > 0 FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted AND a.backend_type LIKE 'eventstore worker%'");
is($appender->try("SELECT position FROM eventstore.append('busy', 'open', stream => 'mine')"), '00000', 'the open transaction goes on appending');
my $other = session($node, options => '-c lock_timeout=20s');
is($other->try("SELECT position FROM eventstore.append('busy', 'other')"), '00000', 'others append');
is($other->try("INSERT INTO busy (type) VALUES ('other')"), '00000', 'and insert');
is($other->try("SELECT count(*) FROM eventstore.append_batch('busy', (SELECT jsonb_agg('{\"type\": \"e\"}'::jsonb) FROM generate_series(1, 1000)))"), '00000', 'into segments that are still made');
is($other->try("SELECT count(*) FROM eventstore.read('busy')"), '00000', 'and read');
$appender->run('COMMIT');
$reader->run('COMMIT');
await_gone($node, 'busy_601');
is(segment_tables('busy') =~ /^busy_701 / ? 1 : 0, 1, 'the segments are dropped once those have ended');
is_clean($node, 'busy');
$_->quit foreach ($appender, $reader, $other);

# ---- bounds -------------------------------------------------------------------------

is($node->safe_psql('postgres', "SELECT eventstore.truncate_before('busy', 100)"), 701, 'what is gone already stays gone');
my $last = $node->safe_psql('postgres', "SELECT max(position) FROM busy");
my $kept = $node->safe_psql('postgres', "SELECT eventstore.truncate_before('busy', 9000000000000000000)");
cmp_ok($kept, '<=', $last + 1, 'the segment that takes the next position is never dropped');
cmp_ok($kept, '>', $last - 100, 'but everything before it');
is($node->safe_psql('postgres', "SELECT position > $last, version FROM eventstore.append('busy', 'next', stream => 's0')"), 't|334', 'appends and versions go on');
is_clean($node, 'busy');

# ---- under load ----------------------------------------------------------------------

$node->safe_psql('postgres', "SELECT eventstore.create_collection('flow', segment_size => 300, retain_events => 1000)");
my $load = EventstoreTest::Load->new($node, collections => ['flow'], seed => 6, pause => 0.002, inserts => 0, streams => 20);
$load->start_writer(1500) for 1 .. 4;
is($load->finish, 0, 'the writers came to their end');
is(join("\n", $load->lines('error')), '', 'and met no error');
await_true($node, 'SELECT count(*) < 1700 FROM flow');
cmp_ok($node->safe_psql('postgres', 'SELECT count(*) FROM flow'), '>=', 1000, 'under load too, at least that many are kept');
is_clean($node, 'flow');

$node->stop;
no_crash($node);
done_testing();
