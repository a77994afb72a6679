# Two servers in one consumer group: they share a topic's partitions out, and each
# takes over those of the other when it stops or dies.  Against a real broker.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use EventstoreTest::Kafka::Group;
use PostgreSQL::Test::Utils;
use Test::More;

my $kafka   = kafka_broker();
my $produced = 0;

start_servers('group', a => $kafka->address, b => $kafka->address);

# A member that died is out of the group soon.
sub properties
{
	my ($strategy) = @_;
	return qq(consumer_properties => '{"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "fetch.wait.max.ms": 20, "partition.assignment.strategy": "$strategy"}');
}

sub produce
{
	my ($topic, $count) = @_;

	$kafka->produce_many($topic, $count, keys => 300, tombstones => 7, first => $produced);
	$produced += $count;
	return;
}

# As when the machine is gone: nobody says goodbye.
sub crash
{
	my ($name) = @_;
	my @workers = split /\n/, $servers{$name}->safe_psql("postgres", "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'eventstore %'");

	kill 'STOP', @workers;
	$servers{$name}->kill9;
	kill 'KILL', @workers;
	return;
}

sub start_again
{
	my ($name) = @_;

	# What is left of the one that died may still hold its memory.
	$kafka->await("$name is up again", sub { $servers{$name}->start(fail_ok => 1) });
	return;
}

# ---- each record, once in each server that has its partition --------------------------------

sub records_in
{
	my ($name, $collection) = @_;
	return map { $_ => 1 }
	  split /\n/, query($name, "SELECT metadata->>'partition' || ':' || (metadata->>'offset') FROM eventstore.read('$collection', max_count => 1000000)");
}

sub all_records
{
	my ($topic) = @_;
	return map { ("$_->{partition}:$_->{offset}" => 1) } $kafka->consume($topic);
}

sub is_once
{
	my ($name, $collection) = @_;
	my %records = records_in($name, $collection);

	is(query($name, "SELECT count(*) FROM $collection"), scalar(keys %records), "$name has no record twice");
	return;
}

foreach my $strategy ('range', 'cooperative-sticky')
{
	my $topic = "in-$strategy";
	my $group = "group of $strategy";
	my $log   = 'log_' . ($strategy =~ s/-.*//r);

	note("---- $strategy");
	$kafka->create_topic($topic, 4);
	produce($topic, 500);
	my $create = "SELECT eventstore.create_collection('$log'); SELECT eventstore.create_source('$log', 'k', '$topic', '$log', value_format => 'json', group_id => '$group', "
	  . properties($strategy) . ')';

	query('a', $create);
	await_assigned('a', $log, 4);
	caught_up($log, 'a');
	is(query('a', "SELECT count(*) FROM $log"), 500, 'alone it reads all');

	query('b', $create);
	await_assigned('b', $log, 2);
	await_assigned('a', $log, 2);
	produce($topic, 500);
	caught_up($log, 'a', 'b');
	my %union = (records_in('a', $log), records_in('b', $log));
	is_deeply(\%union, { all_records($topic) }, 'two have all records between them');
	is_once($_, $log) foreach 'a', 'b';
	$kafka->await('the lag is known in Kafka', sub { !grep { ($_->{committed} // -1) != $_->{end} } $kafka->group_lag($group, $topic) });
	pass('the group\'s offsets are in Kafka, too');

	$servers{a}->stop;
	produce($topic, 500);
	await_assigned('b', $log, 4);
	caught_up($log, 'b');
	is_deeply({ records_in('b', $log) }, { all_records($topic) }, 'one stops, the other takes over; what is new to it is read from the start');

	$servers{a}->start;
	await_assigned($_, $log, 2) foreach 'a', 'b';
	produce($topic, 500);
	caught_up($log, 'a');
	crash('b');
	produce($topic, 500);
	await_assigned('a', $log, 4);
	caught_up($log, 'a');
	is_deeply({ records_in('a', $log) }, { all_records($topic) }, 'one dies, the other goes on where it was, and has all');

	start_again('b');
	await_assigned($_, $log, 2) foreach 'a', 'b';
	query('a', "SELECT eventstore.pause('$log')");
	await_assigned('b', $log, 4);
	caught_up($log, 'b');
	is_deeply({ records_in('b', $log) }, { all_records($topic) }, 'one is paused, the other takes over');
	is_once($_, $log) foreach 'a', 'b';
	query('a', "SELECT eventstore.drop_source('$log')");
	query('b', "SELECT eventstore.drop_source('$log')");
}

# ---- with a changelog topic the survivor has the whole store ---------------------------------

sub last_values
{
	my ($topic) = @_;
	my %last;

	$last{ $_->{key} } = $_->{value} foreach $kafka->consume($topic);
	return join "\n", map { "$_|$last{$_}" } sort grep { defined $last{$_} } keys %last;
}

sub in_store
{
	my ($name) = @_;
	return query($name, 'SELECT key, value FROM kv ORDER BY key COLLATE "C"');
}

$kafka->create_topic('kv',           4);
$kafka->create_topic('kv-changelog', 4, 'cleanup.policy' => 'compact');
produce('kv', 1000);
my $create = "SELECT eventstore.create_store('kv', 'text'); SELECT eventstore.create_source('kv', 'k', 'kv', 'kv', group_id => 'kv', changelog_topic => 'kv-changelog', "
  . properties('range') . ')';
query('a', $create);
await_assigned('a', 'kv', 4);
caught_up('kv', 'a');
query('b', $create);
await_assigned($_, 'kv', 2) foreach 'b', 'a';
produce('kv', 1000);
caught_up('kv', 'a', 'b');

# It dies before it has published all that it has written.
kill 'STOP', query('a', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'eventstore sink'");
produce('kv', 1000);
caught_up('kv', 'a');
crash('a');
produce('kv', 1000);
await_assigned('b', 'kv', 4);
caught_up('kv', 'b');
is(in_store('b'), last_values('kv'), 'one dies: what it had is restored from the changelog topic');

start_again('a');
await_assigned($_, 'kv', 2) foreach 'a', 'b';
foreach my $name ('a', 'b')
{
	caught_up('kv', $name);
	await_true($servers{$name}, "SELECT changelog_lag = 0 FROM eventstore.sources WHERE name = 'kv'");
}
ok(last_values('kv-changelog') eq last_values('kv'), 'back again, it publishes nothing that is out of date');
produce('kv', 1000);
caught_up('kv', 'a', 'b');
$servers{b}->stop;
produce('kv', 1000);
await_assigned('a', 'kv', 4);
caught_up('kv', 'a');
is(in_store('a'), last_values('kv'), 'one stops: so it is');
is_clean($servers{a}, 'kv_changelog');

no_crash($_) foreach values %servers;
$_->stop foreach values %servers;
done_testing();
