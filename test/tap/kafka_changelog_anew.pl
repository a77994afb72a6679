# The changelog topic of a store that is full is deleted and made anew: nothing goes
# on with a part of it.  It is noticed, whatever librdkafka knows of topics; and once
# that is accepted the topic gets all of the store.  Against a real broker.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use Test::More;

my $kafka   = kafka_broker();
my $node    = new_server('anew', settings => [ 'max_worker_processes = 24', 'eventstore.maintenance_interval = 200ms' ]);
my $address = $kafka->address;

sub query { return $node->safe_psql('postgres', $_[0]); }

query(qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address')));

sub make_changelog_topic
{
	my ($name, $partitions) = @_;

	$kafka->create_topic("$name-changelog", $partitions // 2, 'cleanup.policy' => 'compact');
	return;
}

sub create
{
	my ($name, $more) = @_;

	query("SELECT eventstore.create_store('$name', 'text')");
	query("SELECT eventstore.create_source('$name', 'k', '$name', '$name', changelog_topic => '$name-changelog' $more)");
	return;
}

sub caught_up
{
	my ($name) = @_;

	is(query("SELECT eventstore.wait_for_source('$name')"), 't', "$name has caught up");
	return;
}

sub await_published
{
	my ($name) = @_;

	await_true($node, "SELECT changelog_lag = 0 AND changelog_state = 'running' FROM eventstore.sources WHERE name = '$name'");
	return;
}

sub await_noticed
{
	my ($name, $message, $what) = @_;

	await_true($node, "SELECT changelog_state = 'topic_recreated' AND changelog_message ~ '$message' FROM eventstore.sources WHERE name = '$name'");
	pass("$name: $what");
	return;
}

sub last_values
{
	my ($topic) = @_;
	my %last;

	$last{ $_->{key} } = $_->{value} foreach $kafka->consume($topic);
	return join ' ', map { "$_=$last{$_}" } sort grep { defined $last{$_} } keys %last;
}

sub in_store { return query("SELECT string_agg(key || '=' || value, ' ' ORDER BY key COLLATE \"C\") FROM $_[0]"); }

# resume(): the topic gets all, and who restores from it has all.
sub is_complete
{
	my ($name, $more) = @_;

	query("SELECT eventstore.resume('$name')");
	await_published($name);
	is(last_values("$name-changelog"), in_store($name), "$name: resumed, the topic has all of the store");
	query("SELECT eventstore.put_text('$name', 'z', 'last')");
	await_published($name);
	is(query("SELECT changelog_state FROM eventstore.sources WHERE name = '$name'"), 'running', 'and goes on');
	my $stored = in_store($name);
	query("SELECT eventstore.drop_source('$name')");
	query("SELECT eventstore.drop_store('$name')");
	create($name, $more);
	caught_up($name);
	is(in_store($name), $stored, 'who restores from it has it, too');
	return;
}

my $group = q(, group_id => 'anew', consumer_properties => '{"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "fetch.wait.max.ms": 20}');
foreach my $name ('alone', 'shared')
{
	my $more = $name eq 'shared' ? $group : '';

	note("---- $name");
	$kafka->create_topic($name, 2);
	make_changelog_topic($name);
	create($name, $more);
	# As Kafka's own producers do: a key changed by SQL is in the partition of its records.
	$kafka->produce($name, (map { [ $_, "1$_" ] } 'a' .. 'f'), { properties => { partitioner => 'murmur2_random' } });
	caught_up($name);
	query("SELECT eventstore.put_text('$name', 'by SQL', 'x')");
	await_published($name);

	# While it is published to.
	$kafka->delete_topic("$name-changelog");
	query("SELECT eventstore.put_text('$name', 'g', 'y'), eventstore.delete_text('$name', 'b')");
	await_true($node, "SELECT changelog_state = 'topic_missing' FROM eventstore.sources WHERE name = '$name'");
	make_changelog_topic($name);
	await_noticed($name, 'made anew', 'made anew while it was published to');
	is(scalar(my @none = $kafka->consume("$name-changelog")), 0, 'nothing goes there by itself');
	is_complete($name, $more);

	# While it rested; the store is restored, and nothing was published since.
	query("SELECT eventstore.pause('$name')");
	query("UPDATE eventstore.sink SET paused = true");
	query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'eventstore sink'");
	await_true($node, "SELECT changelog_state = 'paused' AND pid IS NULL FROM eventstore.sources WHERE name = '$name'");
	$kafka->delete_topic("$name-changelog");
	make_changelog_topic($name);
	query("UPDATE eventstore.sink SET paused = false");
	query("SELECT eventstore.resume('$name')");
	await_noticed($name, 'ends at offset|its id is', 'made anew while it rested');
	is_complete($name, $more);

	# While it was idle: seen when it is published to.
	await_published($name);
	$kafka->delete_topic("$name-changelog");
	make_changelog_topic($name);
	query("SELECT eventstore.put_text('$name', 'h', 'z')");
	await_noticed($name, 'made anew', 'made anew while it was idle');
	is_complete($name, $more);
	query("SELECT eventstore.drop_source('$name')");
}

$node->stop;
no_crash($node);
done_testing();
