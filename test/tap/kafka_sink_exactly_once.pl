# Sinks against a real broker: transactions, fences, and what is killed meanwhile.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use PostgreSQL::Test::Utils;
use Test::More;

my $kafka = kafka_broker();
my $node = new_server('sink', settings => [ 'max_worker_processes = 24', 'fsync = on', 'restart_after_crash = on' ]);
my $address = $kafka->address;

sub query { return $node->safe_psql('postgres', $_[0]); }

sub position_of
{
	my ($record) = @_;
	my %headers = @{ $record->{headers} };
	return $headers{'es-position'};
}

# What the topic has of which positions: position => how often; and whether each key is in order.
sub tally
{
	my ($topic) = @_;
	my (%count, %last);
	my $ordered = 1;

	foreach my $record ($kafka->consume($topic))
	{
		my $position = position_of($record);
		$count{$position}++;
		$ordered = 0 if $position <= ($last{ $record->{key} } // 0);
		$last{ $record->{key} } = $position;
	}
	return (\%count, $ordered);
}

sub appended
{
	return split /\n/, query('SELECT position FROM eventstore.read($$c$$)');
}

query(qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address')));
query("SELECT eventstore.create_collection('c')");
$kafka->create_topic($_, 3) foreach qw(once least fenced);
query("SELECT eventstore.create_sink('once', 'k', 'once', 'c', exactly_once => true, flush_count => 40, flush_interval => '20 ms')");
query("SELECT eventstore.create_sink('least', 'k', 'least', 'c', flush_interval => '50 ms')");

# ---- whatever is killed ----------------------------------------------------------------

sub append_some
{
	my ($n) = @_;
	query("SELECT count(eventstore.append('c', 'x', to_jsonb(i), stream => 'k' || i % 7)) FROM generate_series(1, $n) i");
	return;
}

sub worker_of
{
	my ($name) = @_;
	my $pid = query("SELECT COALESCE(pid, 0) FROM eventstore.sinks WHERE name = '$name'");
	return $pid;
}

append_some(50);
foreach my $round (1 .. 8)
{
	append_some(150);
	my $how = $round % 4;
	if ($how == 0)
	{
		$node->stop('immediate');
		$node->start;
	}
	elsif ($how == 1)
	{
		my $pid = worker_of('once');
		crash_by($node, $pid) if $pid;
	}
	elsif ($how == 2)
	{
		query('SELECT pg_terminate_backend(pid) FROM eventstore.sinks WHERE pid IS NOT NULL');
	}
	else
	{
		$kafka->kill;
		append_some(50);
		$kafka->start;
	}
	await_up($node);
}
append_some(10);
await_true($node, "SELECT bool_and(lag_events = 0) FROM eventstore.sinks");

my @positions = appended();
cmp_ok(scalar @positions, '>', 1000, 'events of a life with interruptions');
my ($once, $ordered) = tally('once');
is_deeply([ grep { ($once->{$_} // 0) != 1 } @positions ], [], 'exactly_once: who reads committed records sees each event once');
is(scalar(keys %$once), scalar @positions, 'and nothing else');
ok($ordered, 'each key in order');
my ($least) = tally('least');
is_deeply([ grep { !$least->{$_} } @positions ], [], 'at least once: none is lost');
is(join(',', map { $_->{value} } grep { $_->{key} =~ /^eventstore-\d+-\d+-\d+-\d+$/ } ($kafka->consume('eventstore-sink-progress'))[-1]),
	$positions[-1], 'the progress topic was made, and has the position');

# ---- a server that has lost its newest commits -----------------------------------------

# Kafka knows better than a table that has gone back.
query("SELECT eventstore.pause('once')");
await_true($node, "SELECT pid IS NULL FROM eventstore.sinks WHERE name = 'once'");
query('UPDATE eventstore.sink_position SET position = position - 100 WHERE sink = (SELECT id FROM eventstore.sink WHERE name = $$once$$)');
query("SELECT eventstore.resume('once')");
append_some(1);
is(query("SELECT eventstore.flush('once')"), 't', 'flush');
($once) = tally('once');
is_deeply([ grep { $once->{$_} != 1 } keys %$once ], [], 'the greater of table and progress topic wins');
is(scalar(keys %$once), scalar(@positions) + 1, 'and it goes on');

# ---- somebody else with the same identity -----------------------------------------------

sub fence
{
	my ($name) = @_;
	my $id = query("SELECT 'eventstore-' || (SELECT system_identifier FROM pg_control_system()) || '-' || (SELECT oid FROM pg_database WHERE datname = 'postgres') || '-' || (SELECT id || '-' || (EXTRACT(EPOCH FROM created_at - '2000-01-01Z') * 1000000)::bigint FROM eventstore.sink WHERE name = '$name')");
	my $other = $kafka->producer('fenced', { properties => { 'transactional.id' => $id } });

	$other->send([ 'k', 'v' ]);
	$other->commit;
	return $other;
}

sub await_fenced
{
	my ($name) = @_;

	await_true($node, "SELECT state = 'fenced' FROM eventstore.sinks WHERE name = '$name'");
	return;
}

my $other = fence('once');
append_some(5);
await_fenced('once');
pass('a sink that is fenced stops');
query("SELECT eventstore.resume('once')");
is(query("SELECT eventstore.flush('once')"), 't', 'resume: it fences the other');
($once) = tally('once');
is_deeply([ grep { $once->{$_} != 1 } keys %$once ], [], 'and each event is there once');

# Refused as it commits: all was acknowledged, and nobody will ever read it.
$kafka->create_topic('late', 1);
query("SELECT eventstore.create_sink('late', 'k', 'late', 'c', exactly_once => true, flush_interval => '1 hour', after => eventstore.head('c'))");
await_true($node, "SELECT state = 'running' FROM eventstore.sinks WHERE name = 'late'");
append_some(5);
$kafka->await('they have arrived', sub { 5 == (() = $kafka->consume('late', { uncommitted => 1 })) });
$other = fence('late');
query("SELECT eventstore.flush('late', '10 ms')");
await_fenced('late');
is(query("SELECT eventstore.flush('late', '0.2 s')"), 'f', 'fenced as it commits: nothing is said to be published');
# It would have begun with another client for that.
query("CREATE ROLE somebody");
query("SELECT eventstore.retry_dead_letters('late')");
is(query("SELECT eventstore.flush('late', '2 s')"), 'f', 'a role that is made is no reason to fence the other');
$other->send([ 'k', 'w' ]);
$other->commit;
query("SELECT eventstore.resume('late')");
is(query("SELECT eventstore.flush('late')"), 't', 'resumed');
is(scalar(my @late = $kafka->consume('late')), 5, 'each event is published, once');
query("SELECT eventstore.drop_sink('late')");

# ---- an open transaction does not keep consumers waiting ----------------------------------

query("SELECT eventstore.drop_sink('once')");
await_true($node, "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'eventstore sink'");
my @read = $kafka->consume('once');
is(scalar @read, scalar(appended()), 'all that was published can be read when the sink is gone');

# ---- the topic goes, and comes again -------------------------------------------------------

$kafka->delete_topic('least');
append_some(5);
await_true($node, "SELECT state = 'topic_missing' FROM eventstore.sinks WHERE name = 'least'");
$kafka->create_topic('least', 1);
await_true($node, "SELECT state = 'topic_recreated' FROM eventstore.sinks WHERE name = 'least'");
is(scalar(my @none = $kafka->consume('least')), 0, 'a topic made anew gets nothing by itself');
query("SELECT eventstore.resume('least')");
await_true($node, "SELECT state = 'running' AND lag_events = 0 FROM eventstore.sinks WHERE name = 'least'");
is(scalar(@none = $kafka->consume('least')), 5, 'resumed: what comes from then on');

# With as many records as there were: only that it was missing tells.
$kafka->create_topic('missing', 1);
query("SELECT eventstore.create_sink('missing', 'k', 'missing', 'c', after => eventstore.head('c') - 1)");
is(query("SELECT eventstore.flush('missing')"), 't', 'missing: published');
$kafka->delete_topic('missing');
append_some(1);
await_true($node, "SELECT state = 'topic_missing' AND message ~ 'there is no' FROM eventstore.sinks WHERE name = 'missing'");
$kafka->create_topic('missing', 1);
$kafka->produce('missing', [ 'k', 'v' ], [ 'k', 'v' ]);
await_true($node, "SELECT state = 'topic_recreated' FROM eventstore.sinks WHERE name = 'missing'");
query("CREATE ROLE somebody_else");
query("SELECT eventstore.retry_dead_letters('missing')");
is(query("SELECT eventstore.flush('missing', '2 s')"), 'f', 'missing: its next client knows, too');
my $canceller = session($node);
$canceller->run('BEGIN; LOCK TABLE eventstore.sink_position IN SHARE MODE');
query("SELECT eventstore.resume('missing')");
await_true($node, "SELECT wait_event_type = 'Lock' FROM pg_stat_activity a JOIN eventstore.sinks s USING (pid) WHERE s.name = 'missing'");
query("SELECT pg_cancel_backend(pid) FROM eventstore.sinks WHERE name = 'missing'");
$canceller->run('COMMIT');
$canceller->quit;
is(query("SELECT eventstore.flush('missing')"), 't', 'missing: resumed, by the next client where the first was held up');
query("SELECT eventstore.drop_sink('missing')");

# Unnoticed: it was made anew while the sink rested, or was idle.
foreach my $way ('idle', 'resting', 'exactly')
{
	my $exactly = $way eq 'exactly' ? 'true' : 'false';

	$kafka->create_topic($way, 2);
	query("SELECT eventstore.create_sink('$way', 'k', '$way', 'c', exactly_once => $exactly, after => eventstore.head('c') - 40)");
	is(query("SELECT eventstore.flush('$way')"), 't', "$way: published");
	query("SELECT eventstore.pause('$way')") if $way eq 'resting';
	await_true($node, "SELECT pid IS NULL FROM eventstore.sinks WHERE name = '$way'") if $way eq 'resting';
	$kafka->delete_topic($way);
	$kafka->create_topic($way, 2);
}
query("SELECT eventstore.resume('resting')");
await_true($node, "SELECT state = 'topic_recreated' AND message ~ 'partition . ends at offset 0, and had|its id is' FROM eventstore.sinks WHERE name = 'resting'");
pass('while it rested');
append_some(20);
await_true($node, "SELECT count(*) = 2 FROM eventstore.sinks WHERE name IN ('idle', 'exactly') AND state = 'topic_recreated'");
pass('while it was idle');

# It had sent some, at offsets that the former topic had; its next process is to see that, too.
sub await_checked
{
	my ($name, $change, $what) = @_;
	my $then = query('SELECT clock_timestamp()');

	query($change);
	await_true($node, "SELECT since > '$then' AND state IN ('running', 'topic_recreated') FROM eventstore.sinks WHERE name = '$name'");
	is(query("SELECT state FROM eventstore.sinks WHERE name = '$name'"), 'topic_recreated', $what);
	return;
}

await_true($node, "SELECT lag_events = 0 FROM eventstore.sinks WHERE name = 'idle'");
await_checked('idle', "SELECT pg_terminate_backend(pid) FROM eventstore.sinks WHERE name = 'idle'", 'it is not forgotten where the worker ends');
is(scalar(@none = $kafka->consume('exactly')), 0, 'nothing of the transaction that noticed it is published');
query("SELECT eventstore.resume('$_')") foreach 'idle', 'resting', 'exactly';
foreach my $way ('idle', 'resting', 'exactly')
{
	is(query("SELECT eventstore.flush('$way')"), 't', "$way: resumed");
	my ($count) = tally($way);
	is(scalar(keys %$count), 20, "$way: what comes from then on");
	query("SELECT eventstore.drop_sink('$way')");
}

# ---- a record that the broker does not take --------------------------------------------------

$kafka->create_topic('small', 1, 'max.message.bytes' => 2000);
query("SELECT eventstore.create_sink('small', 'k', 'small', 'c', on_error => 'park', after => eventstore.head('c'))");
query("SELECT count(eventstore.append('c', 'x', to_jsonb(repeat(i::text, CASE WHEN i = 5 THEN 5000 ELSE 10 END)), stream => 'k')) FROM generate_series(1, 9) i");
is(query("SELECT eventstore.flush('small')"), 't', 'one that is too large for the broker');
is(query("SELECT count(*), min(data #>> '{}') = repeat('5', 5000) FROM eventstore.dead_letters l, eventstore.read('c') e WHERE l.sink = 'small' AND e.position = l.position"), '1|t', 'is found among the others, and parked');
my ($small) = tally('small');
is(scalar(keys %$small), 8, 'all the others arrive');
query("SELECT eventstore.create_sink('small2', 'k', 'small', 'c', exactly_once => true, on_error => 'skip', after => eventstore.head('c') - 9)");
is(query("SELECT eventstore.flush('small2')"), 't', 'the same with transactions');
($small) = tally('small');
is_deeply([ map { $small->{$_} } sort { $a <=> $b } keys %$small ], [ (2) x 8 ], 'each once more');


# ---- dead letters, once each ------------------------------------------------------------------

query(q(CREATE FUNCTION half(eventstore.event) RETURNS text LANGUAGE sql AS $$SELECT (1 / (($1.data #>> '{}')::int % 2))::text$$));
query("SELECT eventstore.create_collection('d')");
$kafka->create_topic('letters', 1);
query("SELECT eventstore.append('d', 'x', to_jsonb(i)) FROM generate_series(1, 6) i");
query("SELECT eventstore.create_sink('letters', 'k', 'letters', 'd', key => 'half(eventstore.event)', exactly_once => true, on_error => 'park')");
is(query("SELECT eventstore.flush('letters')"), 't', 'with dead letters');
is(join(' ', map { position_of($_) } $kafka->consume('letters')), '1 3 5', 'the others are there');
query(q(CREATE OR REPLACE FUNCTION half(eventstore.event) RETURNS text LANGUAGE sql AS $$SELECT 'k'$$));
query("CREATE TABLE last AS SELECT * FROM eventstore.sink_dead_letter WHERE position = 6");
is(query("SELECT eventstore.retry_dead_letters('letters')"), '3', 'tried again');
await_true($node, "SELECT count(*) = 0 FROM eventstore.dead_letters WHERE sink = 'letters'");
is(join(' ', map { position_of($_) } $kafka->consume('letters')), '1 3 5 2 4 6', 'each is published');
# As after a crash between the two commits.
query("SELECT eventstore.pause('letters')");
await_true($node, "SELECT pid IS NULL FROM eventstore.sinks WHERE name = 'letters'");
query("INSERT INTO eventstore.sink_dead_letter SELECT (l).* FROM (SELECT last AS l FROM last) x; UPDATE eventstore.sink_dead_letter SET retry = true");
query("SELECT eventstore.resume('letters')");
await_true($node, "SELECT count(*) = 0 FROM eventstore.dead_letters WHERE sink = 'letters'");
query("SELECT eventstore.append('d', 'x', '7')");
is(query("SELECT eventstore.flush('letters')"), 't', 'and on');
is(join(' ', map { position_of($_) } $kafka->consume('letters')), '1 3 5 2 4 6 7', 'Kafka knows that the last one was published');

done_testing();
