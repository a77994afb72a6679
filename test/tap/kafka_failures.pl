# What becomes of a source when its topic or its broker does: down and back,
# records gone, topics deleted, made anew and enlarged.  Each is a state that
# sources shows, and has the outcome that the source was told.  Against the real
# broker.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

# Records of many megabytes are in its memory as a whole.
my $kafka = kafka_broker(heap => '512m');
my $node = new_server('failures', settings => [ 'max_worker_processes = 24', 'eventstore.maintenance_interval = 200ms' ]);
my $address = $kafka->address;

sub query { return $node->safe_psql('postgres', $_[0]); }

# make($name, topic => ..., further arguments as SQL): a store and a source of one name.
sub make
{
	my ($name, $topic, @more) = @_;

	query("SELECT eventstore.create_store('$name', 'text')");
	query("SELECT eventstore.create_source('$name', 'k', '$topic', '$name', flush_interval => '10 ms'" . join('', map { ", $_" } @more) . ')');
	return;
}

sub caught_up
{
	my ($name, $what) = @_;
	await_true($node, "SELECT eventstore.wait_for_source('$name', '10 s')");
	pass($what // "$name has caught up");
	return;
}

# What comes next is not to be seen by it.
sub pause
{
	my ($name) = @_;

	query("SELECT eventstore.pause('$name')");
	await_true($node, "SELECT pid IS NULL FROM eventstore.sources WHERE name = '$name'");
	return;
}

sub await_state
{
	my ($name, $state, $message) = @_;
	await_true($node, "SELECT state = '$state' AND COALESCE(message, '') ~ '" . ($message // '') . "' FROM eventstore.sources WHERE name = '$name'");
	pass("$name: $state");
	return;
}

sub keys_of { return query("SELECT COALESCE(string_agg(key, ' ' ORDER BY key), '') FROM $_[0]"); }

sub positions_of { return query("SELECT string_agg(position::text, ' ' ORDER BY partition) FROM eventstore.source_partitions WHERE source = '$_[0]'"); }

# records('a' .. 'c'): into partition 0.
sub records { return map { [ $_, 'v', [], { partition => 0 } ] } @_; }

query(qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address', "reconnect.backoff.max.ms" '500')));

# ---- records that are gone -----------------------------------------------------------------

$kafka->create_topic('gone', 2);
$kafka->produce('gone', records('a', 'b'));
make($_, 'gone', "on_gap => '$_'") foreach ('stop', 'earliest', 'latest');
foreach my $name ('stop', 'earliest', 'latest')
{
	caught_up($name);
	pause($name);
}
$kafka->produce('gone', records('c' .. 'h'), map { [ $_, 'v', [], { partition => 1 } ] } 'p' .. 't');
$kafka->delete_records('gone', 0, 5);
$kafka->delete_records('gone', 1, 2);
query("SELECT eventstore.resume('$_')") foreach ('stop', 'earliest', 'latest');
caught_up('earliest', 'on_gap earliest: goes on with what there is');
is(keys_of('earliest'), 'a b f g h r s t', 'all of it');
caught_up('latest', 'on_gap latest: goes on at the end');
is(keys_of('latest'), 'a b', 'passing over what there is');
await_state('stop', 'gap', 'partition . begins at offset ., and . was to be read next');
is(sqlstate_of($node, "SELECT eventstore.wait_for_source('stop', '0.5 s')"), 'LG008', 'nothing more is read, and who waits is told so');
is(sqlstate_of($node, "SELECT eventstore.flush('stop', '0.1 s')"), 'LG008', 'flush, too');
is(query("SELECT count(*) FROM eventstore.gaps WHERE source = 'stop'"), '0', 'what is not accepted is not noted');
my $holder = session($node);
$holder->run('BEGIN; LOCK TABLE eventstore.source_gap IN SHARE MODE');
query("SELECT eventstore.resume('stop')");
# A worker waits half a second for a lock, and tries again what has failed for that.
await_true($node, "SELECT wait_event_type = 'Lock' FROM pg_stat_activity a JOIN eventstore.sources s USING (pid) WHERE s.name = 'stop'");
isnt(query("SELECT state FROM eventstore.sources WHERE name = 'stop'"), 'running', 'it is not said to run before the gap is on record');
$holder->run('COMMIT');
$holder->quit;
caught_up('stop', 'resumed: once, for both partitions');
is(keys_of('stop'), 'a b f g h r s t', 'from the first record that there is');
is(query('SELECT source, partition, first_offset, next_offset, reason FROM eventstore.gaps ORDER BY 1, 2'),
	join("\n", map { ("$_|0|2|" . ($_ eq 'latest' ? 8 : 5) . '|retention', "$_|1|0|" . ($_ eq 'latest' ? 5 : 2) . '|retention') } ('earliest', 'latest', 'stop')), 'gaps');
$kafka->produce('gone', records('i'));
caught_up($_) foreach ('stop', 'earliest', 'latest');
is(keys_of('latest'), 'a b i', 'and so on');

# ---- more partitions -------------------------------------------------------------------------

$kafka->create_topic('more', 1);
make('more', 'more', "start => 'latest'");
make('two', 'more', "partitions => '{0, 1}'");
caught_up('more');
$kafka->produce('more', records('a'));
caught_up($_) foreach ('more', 'two');
$kafka->add_partitions('more', 3);
$kafka->produce('more', map { [ "n$_", 'v', [], { partition => $_ } ] } 0 .. 2);
caught_up($_) foreach ('more', 'two');
is(keys_of('more'), 'a n0 n1 n2', 'new partitions are read from their beginning, and waited for');
is(keys_of('two'), 'a n0 n1', 'those that were asked for');
$kafka->add_partitions('more', 40);
caught_up('two');
is(query("SELECT eventstore.wait_for_source('more', '10 s')"), 't', 'the ends of many partitions are asked for at once');
like(slurp_file($node->logfile), qr/source "more": the topic has 3 partitions, and had 1\n.*DETAIL:  Records of a key may be in another partition/, 'the log warns of the order of keys');

# ---- no topic, and another one --------------------------------------------------------------------

make('absent', 'absent');
await_state('absent', 'topic_missing', 'there is no topic .absent.');
$kafka->create_topic('absent', 2);
$kafka->produce('absent', records('a' .. 'c'), [ 'x', 'v', [], { partition => 1 } ]);
caught_up('absent', 'a topic that comes later');
is(keys_of('absent'), 'a b c x', 'is read');

$kafka->delete_topic('absent');
await_state('absent', 'topic_missing');
is(sqlstate_of($node, "SELECT eventstore.wait_for_source('absent', '0.1 s')"), 'LG008', 'a topic that is gone');
is(query("SELECT count(*) FROM absent"), '4', 'what was written stays');
$kafka->create_topic('absent', 2);
$kafka->produce('absent', map { records("new$_") } 1 .. 9);
await_state('absent', 'topic_recreated', 'made anew');
is(sqlstate_of($node, "SELECT eventstore.wait_for_source('absent', '0.1 s')"), 'LG008', 'likewise');
is(query("SELECT count(*) FROM absent WHERE key LIKE 'new%'"), '0', 'nothing is read of another topic');
$holder = session($node);
$holder->run("BEGIN; SELECT FROM eventstore.source_offset WHERE source = (SELECT id FROM eventstore.source WHERE name = 'absent') FOR UPDATE");
query("SELECT eventstore.resume('absent')");
await_state('absent', 'retrying', 'lock timeout');
$holder->run('COMMIT');
$holder->quit;
caught_up('absent', 'resumed');
is(query("SELECT count(*) FROM absent WHERE key LIKE 'new%'"), '9', 'from the beginning');
is(query("SELECT string_agg(format('%s:%s-%s %s', partition, first_offset, next_offset, reason), ', ' ORDER BY partition) FROM eventstore.gaps WHERE source = 'absent'"),
	'0:3-0 the topic was made anew, 1:1-0 the topic was made anew', 'which is noted');

# Nobody has heard of it yet.
$kafka->create_topic('fresh', 1);
$kafka->produce('fresh', records('a' .. 'c'));
make('fresh', 'fresh');
caught_up('fresh');
$kafka->delete_topic('fresh');
$kafka->create_topic('fresh', 1);
$kafka->produce('fresh', records('d'));
isnt(try_query($node, "SELECT eventstore.wait_for_source('fresh', '0.5 s')"), 't', 'of a topic made anew nothing is said to be read');
await_state('fresh', 'topic_recreated');
query("SELECT eventstore.resume('fresh')");
caught_up('fresh');
is(keys_of('fresh'), 'a b c d', 'resumed, it is');

# While nobody looks: it ends earlier, or has other records, or fewer partitions.
$kafka->create_topic($_, 2) foreach ('short', 'long', 'narrow');
foreach my $name ('short', 'long', 'narrow')
{
	$kafka->produce($name, records('a' .. 'e'), [ 'x', 'v', [], { partition => 1 } ]);
	make($name, $name);
	caught_up($name);
	pause($name);
	$kafka->delete_topic($name);
	$kafka->create_topic($name, $name eq 'narrow' ? 1 : 2);
}
$kafka->produce('short', records('s'));
$kafka->produce('long', records(map { "l$_" } 1 .. 20));
$kafka->produce('narrow', records(map { "w$_" } 1 .. 5));
query("SELECT eventstore.resume('$_')") foreach ('short', 'long', 'narrow');
await_state('short', 'topic_recreated');
await_state('long', 'topic_recreated', 'not the record that was read|its id is');
await_state('narrow', 'topic_recreated', 'fewer partitions|its id is');
query("SELECT eventstore.resume('$_')") foreach ('short', 'long', 'narrow');
caught_up($_) foreach ('short', 'long', 'narrow');
is(keys_of('short'), 'a b c d e s x', 'short');
is(query("SELECT count(*) FROM long WHERE key LIKE 'l%'"), '20', 'long');
is(query("SELECT count(*) FROM narrow WHERE key LIKE 'w%'"), '5', 'narrow');

# The same topic is recognised, whatever is gone from it.
foreach my $name ('more', 'earliest')
{
	query("SELECT eventstore.pause('$name'); SELECT eventstore.resume('$name')");
}
$kafka->delete_records('gone', 0, 9);
pause('earliest');
query("SELECT eventstore.resume('earliest')");
caught_up($_, "$_: the same topic") foreach ('more', 'earliest');

# ---- marks of transactions -----------------------------------------------------------------------

$kafka->create_topic('marks');
make('marks', 'marks');
my $producer = $kafka->producer('marks', { properties => { 'transactional.id' => 'one' } });
$producer->send([ 'a', 'kept' ]);
$producer->commit;
$producer->send([ 'b', 'gone' ]);
$producer->abort;
$producer->send([ 'c', 'open' ]);
$producer->flush;
caught_up('marks', 'an open transaction is not waited for');
is(keys_of('marks'), 'a', 'what is committed');
is(positions_of('marks'), '4', 'past marks and aborted records, up to the open ones');
$producer->commit;
$producer->finish;
# Its mark comes when the producer has been told.
$kafka->await('it can be read', sub { grep { $_->{key} eq 'c' } $kafka->consume('marks') });
caught_up('marks');
is(keys_of('marks') . ' ' . positions_of('marks'), 'a c 6', 'and the rest');
is(query("SELECT lag_records FROM eventstore.source_partitions WHERE source = 'marks'"), '0', 'no lag');

# ---- large records -------------------------------------------------------------------------------

$kafka->create_topic('large', 1, 'max.message.bytes' => 60_000_000);
make('large', 'large');
my %large = (properties => { 'message.max.bytes' => 60_000_000, 'compression.codec' => 'none' });
$kafka->produce('large', [ 'twenty', 'x' x 20_000_000 ], [ 'one', 'x' x 1_000_000 ], [ 'k' x 900_000, 'v' ], \%large);
caught_up('large', 'many megabytes');
is(query('SELECT key, length(value) FROM large ORDER BY 2'), "one|1000000\ntwenty|20000000", 'are stored');
$kafka->produce('large', [ 'heads', 'v', [ map { ("h$_", 'x' x 1_000_000) } 1 .. 52 ] ], \%large);
caught_up('large');
is(query("SELECT record_offset, sqlstate, headers IS NULL, reason FROM eventstore.dead_letters WHERE source = 'large' AND record_offset > 2"),
	'3|54000|t|its headers are too many or too large for metadata', 'so are headers that JSON could not hold');
is(query("SELECT record_offset, sqlstate, length(key) FROM eventstore.dead_letters WHERE source = 'large' AND record_offset < 3"), '2|54000|900000', 'a key that no index can hold is a dead letter');

# ---- a log that was cut ----------------------------------------------------------------------------

# As by a leader that had not all of it: what is gone was read already.
foreach my $name ('cut', 'grown')
{
	$kafka->create_topic($name, 1);
	$kafka->produce($name, records('a' .. 'c'));
	my ($segment) = glob "$kafka->{dir}/data/$name-0/*.log";
	my $size = -s $segment;
	$kafka->produce($name, records('d' .. 'f'));
	make($name, $name);
	caught_up($name);
	pause($name);
	$kafka->kill;
	truncate $segment, $size or die "cannot cut $segment: $!";
	unlink glob "$kafka->{dir}/data/$name-0/*index";
	$kafka->start;
}
is(join(' ', map { "@$_" } $kafka->watermarks('cut')), '0 3', 'the end of a topic has gone');
$kafka->produce('grown', records('g' .. 'm'));
query("SELECT eventstore.resume('$_')") foreach 'cut', 'grown';
await_state('cut', 'topic_recreated', 'ends at offset 3, and 6 was to be read next: the topic was truncated');
await_state('grown', 'topic_recreated', 'not the record that was read');
is(keys_of('cut') . ' ' . keys_of('grown'), 'a b c d e f a b c d e f', 'what was written stays, nothing is read');
query("SELECT eventstore.resume('$_')") foreach 'cut', 'grown';
caught_up($_) foreach 'cut', 'grown';
is(keys_of('grown'), join(' ', 'a' .. 'm'), 'resumed: read again from the beginning');
is(query("SELECT string_agg(format('%s %s-%s %s', source, first_offset, next_offset, reason), ', ' ORDER BY source) FROM eventstore.gaps WHERE source IN ('cut', 'grown')"),
	'cut 6-0 the topic was made anew, grown 6-0 the topic was made anew', 'which is noted');

# ---- the end of a worker whose topic is gone -----------------------------------------------------------

sub seconds
{
	my ($what, $do) = @_;
	my $began = time;

	$do->();
	cmp_ok(time - $began, '<', 10, sprintf '%s: within seconds (%.1f)', $what, time - $began);
	return;
}

# At its end; with records fetched ahead that are not taken; and with a batch that cannot be written.
my $locker = session($node);
foreach my $name ('idle', 'halted', 'held')
{
	$kafka->create_topic($name, 4);
	query("SELECT eventstore.create_store('$name', 'text'); ALTER TABLE $name ADD CHECK (value <> 'bad')");
	$kafka->produce_many($name, 20_000) if $name ne 'idle';
	$kafka->produce($name, map { [ $_, 'bad', [], { partition => $_ } ] } 0 .. 3) if $name eq 'halted';
	$locker->run("BEGIN; LOCK TABLE $name IN SHARE MODE") if $name eq 'held';
	query("SELECT eventstore.create_source('$name', 'k', '$name', '$name', flush_count => 100, on_error => 'stop')");
}
await_state('idle', 'running');
await_state('halted', 'stopped');
await_state('held', 'retrying');
$kafka->delete_topic($_) foreach 'idle', 'halted', 'held';
await_state('idle', 'topic_missing');
my $worker = query("SELECT pid FROM eventstore.sources WHERE name = 'idle'");
seconds('pause, with a topic that is gone', sub {
	query("SELECT eventstore.pause('idle')");
	await_true($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $worker");
});
is(query("SELECT count(*) FROM eventstore.sources WHERE name IN ('halted', 'held') AND pid IS NOT NULL"), '2', 'others live');
$locker->run('ROLLBACK');
$locker->quit;
seconds('a fast stop, likewise', sub { $node->stop; });
$node->start;
query("SELECT eventstore.resume('idle')");
await_state('idle', 'topic_missing');
query("SELECT eventstore.drop_source('$_')") foreach 'idle', 'halted', 'held';

# ---- the broker -----------------------------------------------------------------------------------

my $sources = query('SELECT count(*) FROM eventstore.sources');
await_true($node, "SELECT count(*) = $sources FROM eventstore.sources WHERE state = 'running'");
my $processes = query('SELECT name, pid FROM eventstore.sources ORDER BY 1');
$kafka->kill;
await_true($node, "SELECT count(*) = $sources FROM eventstore.sources WHERE state = 'disconnected' AND message <> ''");
pass('down: disconnected');
is(query('SELECT count(*) FROM eventstore.sources WHERE pid IS NULL'), '0', 'the workers live');
is(query("SELECT eventstore.wait_for_source('more', '1 s')"), 'f', 'nothing can be waited for');
$kafka->start;
$kafka->produce('more', records('z'));
caught_up('more', 'up: it goes on by itself');
await_true($node, "SELECT count(*) = $sources FROM eventstore.sources WHERE state = 'running'");
pass('all of them');
is(query('SELECT name, pid FROM eventstore.sources ORDER BY 1'), $processes, 'none has ended for that');

$node->stop;
no_crash($node);
done_testing();
