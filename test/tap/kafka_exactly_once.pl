# Exactly once: a known sequence is produced while the worker, the server and
# the broker are killed at random.  In the end the database is compared with the
# topic: nothing is lost, nothing is there twice, nothing of an aborted
# transaction is there at all.
#
# A store and a collection are fed from one topic, by two workers: the
# collection has one event for each record, so it shows each one that was
# written twice; the store has the last of each key, and its changelog which
# changes led there.
#
#   EVENTSTORE_CHAOS_SECONDS   how long things are killed (30)
#   EVENTSTORE_CHAOS_SEED      the seed of another run
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

my $seconds = $ENV{EVENTSTORE_CHAOS_SECONDS} // 30;
my $seed    = srand($ENV{EVENTSTORE_CHAOS_SEED} // time ^ $$);
my $keys    = 400;

diag("EVENTSTORE_CHAOS_SEED=$seed");

my $kafka = kafka_broker();
my $node  = new_server('once', settings => [ 'restart_after_crash = on', 'eventstore.maintenance_interval = 500ms' ]);
my $address = $kafka->address;

$kafka->create_topic('t', 4);
$node->safe_psql('postgres', qq{
	CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka
		OPTIONS ("bootstrap.servers" '$address', "reconnect.backoff.max.ms" '500');
	SELECT eventstore.create_store('kv');
	SELECT eventstore.create_collection('log', segment_size => 20000);
	SELECT eventstore.create_source('kv', 'k', 't', 'kv', flush_count => 300, flush_interval => '20 ms');
	SELECT eventstore.create_source('log', 'k', 't', 'log', flush_count => 700, flush_interval => '50 ms');
});

# ---- what is produced ---------------------------------------------------------------

my $produced = 0;
my $producer;

# In the background; a broker that dies meanwhile is waited for.
sub begin_producing
{
	my ($count) = @_;
	my @call = (EventstoreTest::Kafka::Client::program('client'),
		$kafka->options_of({ limit => 120, properties => { 'enable.idempotence' => 'true', 'linger.ms' => 1, 'reconnect.backoff.max.ms' => 500 } }),
		'generate', 't', $count, "first=$produced", "keys=$keys", 'tombstones=7');

	$producer = IPC::Run::start(\@call, '<', \undef);
	$produced += $count;
	return;
}

sub end_producing
{
	$producer->finish or BAIL_OUT('not all could be produced');
	return;
}

# One that aborts leaves its records and a marker in each partition; so does one
# that commits, without the first.
sub run_transaction
{
	my ($i) = @_;
	my $aborts = $i % 2;
	my $transaction = $kafka->producer('t', { properties => { 'transactional.id' => "x$i" } });

	$transaction->send(map { [ "transaction $_", $aborts ? '"aborted"' : qq("committed $i") ] } 1 .. 20);
	$aborts ? $transaction->abort : $transaction->commit;
	$transaction->finish;
	return $aborts ? 0 : 20;
}

# ---- what is killed -------------------------------------------------------------------

sub worker_of
{
	my ($name) = @_;

	return try_query($node, "SELECT pid FROM eventstore.sources WHERE name = '$name'");
}

sub kill_worker
{
	my ($signal) = @_;
	my $pid = worker_of(rand() < 0.5 ? 'kv' : 'log');

	kill $signal, $pid if $pid =~ /^\d+$/;
	return;
}

my %acts = (
	'kill -9 of a worker'         => sub { kill_worker('KILL') },
	'a worker is terminated'      => sub { kill_worker('TERM') },
	'immediate stop of the server' => sub { $node->stop('immediate'); $node->start },
	'fast restart of the server'  => sub { $node->restart },
	'kill -9 of the broker'       => sub { $kafka->kill; $kafka->start },
	'restart of the broker'       => sub { $kafka->restart },
	'both'                        => sub { $kafka->kill; $node->stop('immediate'); $node->start; $kafka->start });
my %done;

sub written
{
	my $sum = try_query($node, 'SELECT sum(position) FROM eventstore.source_partitions');

	return $sum eq '' ? undef : $sum;
}

sub wait_a_little
{
	select undef, undef, undef, rand($_[0]);
	return;
}

my $end       = time + $seconds;
my $committed = 0;
my $round     = 0;

while (time < $end)
{
	my $act = (sort keys %acts)[ rand keys %acts ];
	my $before = written();

	$committed += run_transaction($round++);
	begin_producing(500 + int rand 4000);
	wait_a_little(1);
	$acts{$act}->();
	$done{$act}++;
	end_producing();
	# Now and then it is hit again while it still recovers.
	next if $round % 3 != 0 || !defined $before;
	$kafka->await('the sources go on', sub { (written() // 0) > $before });
}
$committed += run_transaction($round += $round % 2);
run_transaction($round + 1);
note(join ', ', map { "$done{$_} times $_" } sort keys %done);

# ---- what has become of it -------------------------------------------------------------

# The topic as Kafka tells it, beside what PostgreSQL has made of it.  A source does not
# wait for the last transactions' marks, which come when their producers have gone.
my @records = $kafka->consume('t');
foreach my $name ('kv', 'log')
{
	await_true($node, "SELECT eventstore.wait_for_source('$name', '5 s')");
	pass("$name has caught up");
}

my $file = PostgreSQL::Test::Utils::tempdir() . '/topic';
PostgreSQL::Test::Utils::append_to_file($file,
	join '', map { join("\t", @$_{qw(partition offset)}, $_->{key}, $_->{value} // '\N') . "\n" } @records);
$node->safe_psql('postgres', qq{
	CREATE TABLE topic (part int, off bigint, key text, value jsonb, PRIMARY KEY (part, off));
	COPY topic FROM '$file';
	CREATE VIEW written AS SELECT (metadata->>'partition')::int AS part, (metadata->>'offset')::bigint AS off,
		stream AS key, data AS value, position, version FROM eventstore.read('log', max_count => 10000000);
	CREATE VIEW last AS SELECT DISTINCT ON (key) * FROM topic ORDER BY key, part, off DESC;
});
sub answer { return $node->safe_psql('postgres', $_[0]); }

is(scalar(@records), $produced + $committed, 'the topic holds what was produced');
is(answer('SELECT count(*) FROM topic WHERE part IS NULL'), '0', 'which is known');
is(answer('SELECT count(*) FROM written'), scalar(@records), 'the collection has as many events');
is(answer('SELECT count(DISTINCT (part, off)) FROM written'), scalar(@records), 'none is there twice');
is(answer('SELECT count(*) FROM (SELECT part, off, key, value FROM topic EXCEPT SELECT part, off, key, value FROM written) m'), '0', 'none is lost or changed');
is(answer('SELECT count(*) FROM (SELECT off < lag(off) OVER (PARTITION BY part ORDER BY position) AS back FROM written) w WHERE back'),
	'0', 'each partition in its order');
is(answer('SELECT count(*) FROM kv'), answer('SELECT count(*) FROM last WHERE value IS NOT NULL'), 'the store has as many keys as have a value');
is(answer('SELECT count(*) FROM (SELECT key, value FROM last WHERE value IS NOT NULL EXCEPT SELECT key, value FROM kv) m'), '0', 'the last of each');
is(answer(q(SELECT count(*) FROM (SELECT (e.metadata->>'offset')::bigint <= lag((e.metadata->>'offset')::bigint) OVER (PARTITION BY e.stream ORDER BY e.version) AS back FROM eventstore.read('kv_changelog', max_count => 10000000) e) c WHERE back)),
	'0', 'no key has ever gone back');
is(answer(q(SELECT count(*) FROM eventstore.read('log', max_count => 10000000) WHERE data = '"aborted"')) . answer(q(SELECT count(*) FROM kv WHERE value = '"aborted"'))
	  . answer(q(SELECT count(*) FROM eventstore.read('kv_changelog', max_count => 10000000) WHERE data = '"aborted"')),
	'000', 'nothing of an aborted transaction');
is(answer('SELECT count(*) FROM eventstore.dead_letters') . answer('SELECT count(*) FROM eventstore.gaps'), '00', 'no dead letters, no gaps');
is_clean($node, $_) foreach ('log', 'kv_changelog');

my $ends = join "\n", map { $_->[1] } $kafka->watermarks('t');
is(answer("SELECT position FROM eventstore.source_partitions WHERE source = '$_' ORDER BY partition"), $ends, "$_: offsets are at the ends, markers passed") foreach ('kv', 'log');
is(answer('SELECT sum(lag_records), sum(lag_seconds) FROM eventstore.source_partitions'), '0|0', 'no lag');
is(answer('SELECT eventstore.rebuild(\'kv\')'), answer('SELECT count(*) FROM kv'), 'the changelog has it all');
is(answer('SELECT count(*) FROM (SELECT key, value FROM last WHERE value IS NOT NULL EXCEPT SELECT key, value FROM kv) m'), '0', 'as the topic says');

$node->stop;
no_crash($node);
done_testing();
