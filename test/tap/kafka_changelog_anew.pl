# The changelog topic of a store that is full is deleted and made anew: nothing goes
# on with a part of it.  It is noticed, whatever librdkafka knows of topics; and once
# that is accepted the topic gets all of the store.  Against a real broker.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use EventstoreTest::Session;
use Test::More;

my $kafka = kafka_broker();
my $node = server_beside($kafka->address, 'anew');

sub query { return $node->safe_psql('postgres', $_[0]); }

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

# Topics of two partitions, and the store filled from one of them.
sub fill
{
	my ($name, $more) = @_;

	note("---- $name");
	$kafka->create_topic($name, 2);
	make_changelog_topic($name);
	create($name, $more);
	# As Kafka's own producers do: a key changed by SQL is in the partition of its records.
	$kafka->produce($name, (map { [ $_, "1$_" ] } 'a' .. 'f'), { properties => { partitioner => 'murmur2_random' } });
	source_caught_up($node, $name);
	return;
}

# Other processes take their place.
sub end_sinks
{
	query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'eventstore sink'");
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

# Who looks while that is on its way must not take it for done.  A worker waits half a
# second for a lock, and what has failed for that is tried again by itself.
sub resume
{
	my ($name, $fails) = @_;
	my $holder = EventstoreTest::Session->new($node);
	my $waits = "EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'eventstore sink' AND wait_event_type = 'Lock')";
	my $failed = "EXISTS (SELECT FROM eventstore.sources WHERE name = '$name' AND changelog_message ~ 'lock timeout')";

	$holder->run("BEGIN; SELECT FROM eventstore.sink_position p WHERE sink = (SELECT k.id FROM eventstore.sink k JOIN eventstore.source s ON s.id = k.changelog_of WHERE s.name = '$name') FOR UPDATE");
	query("SELECT eventstore.resume('$name')");
	await_true($node, $fails ? "SELECT $failed" : "SELECT $waits OR $failed");
	isnt(query("SELECT changelog_state FROM eventstore.sources WHERE name = '$name'"), 'running', "$name: is not said to run before the topic is accepted");
	$holder->run('COMMIT');
	$holder->quit;
	return;
}

# resume(): the topic gets all, and who restores from it has all.
sub is_complete
{
	my ($name, $more) = @_;

	resume($name);
	await_published($name);
	is(last_values("$name-changelog"), in_store($name), "$name: resumed, the topic has all of the store");
	query("SELECT eventstore.put_text('$name', 'z', 'last')");
	await_published($name);
	is(query("SELECT changelog_state FROM eventstore.sources WHERE name = '$name'"), 'running', 'and goes on');
	my $stored = in_store($name);
	query("SELECT eventstore.drop_source('$name')");
	query("SELECT eventstore.drop_store('$name')");
	create($name, $more);
	source_caught_up($node, $name);
	is(in_store($name), $stored, 'who restores from it has it, too');
	return;
}

my $group = q(, group_id => 'anew', consumer_properties => '{"session.timeout.ms": 20000, "heartbeat.interval.ms": 300, "fetch.wait.max.ms": 20}');
foreach my $name ('alone', 'shared')
{
	my $more = $name eq 'shared' ? $group : '';

	fill($name, $more);
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
	end_sinks();
	await_true($node, "SELECT changelog_state = 'paused' AND pid IS NULL FROM eventstore.sources WHERE name = '$name'");
	$kafka->delete_topic("$name-changelog");
	# A member restores what it is given: it misses the topic, which is not the one that it reads.
	if ($name eq 'shared')
	{
		query("SELECT eventstore.resume('$name')");
		await_true($node, "SELECT state = 'topic_missing' AND message ~ '$name-changelog' FROM eventstore.sources WHERE name = '$name'");
	}
	make_changelog_topic($name);
	query("SELECT eventstore.resume('$name')") if $name eq 'alone';
	await_noticed($name, 'ends at offset|its id is|deleted', 'made anew while it rested');
	# One that has to restore waits for that, too; to another source it is nothing.
	my $state = $name eq 'alone' ? 'running' : 'topic_recreated';
	await_true($node, "SELECT state IN ('running', 'topic_recreated') FROM eventstore.sources WHERE name = '$name'");
	is(query("SELECT state FROM eventstore.sources WHERE name = '$name'"), $state, "its source is $state");
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

# A member is given its partition again before the topic has all of it again: what
# others have published there is older than what it has from the former topic.
{
	my $name = 'again';
	my $sink = "(SELECT k.id FROM eventstore.sink k JOIN eventstore.source s ON s.id = k.changelog_of WHERE s.name = '$name')";

	# It counts from the sink's next client on.
	sub set_flush_count
	{
		my ($sink, $count) = @_;
		query("UPDATE eventstore.sink SET flush_count = $count WHERE id = $sink");
		return;
	}

	sub pause
	{
		my ($name) = @_;

		query("SELECT eventstore.pause('$name')");
		await_true($node, "SELECT pid IS NULL FROM eventstore.sources WHERE name = '$name'");
		return;
	}

	# As a member does that had the partition meanwhile.
	sub publish_elsewhere
	{
		my ($name, @records) = @_;

		pause($name);
		$kafka->produce("$name-changelog", map { [ $_->[0], $_->[1], [ 'es-topic' => $name, 'es-partition' => 0, 'es-offset' => $_->[2] ] ] } @records);
		query("SELECT eventstore.resume('$name')");
		source_caught_up($node, $name);
		return;
	}

	note("---- $name");
	$kafka->create_topic($name, 1);
	make_changelog_topic($name, 1);
	create($name, $group);
	$kafka->produce($name, map { [ 'x', $_ ] } 0 .. 9);
	source_caught_up($node, $name);
	publish_elsewhere($name, [ 'k', '1', 3 ], [ 'm', '1', 4 ]);
	query("SELECT count(eventstore.put_text('$name', 'n', i::text)) FROM generate_series(1, 3000) i");
	publish_elsewhere($name, [ 'k', undef, 5 ], [ 'm', '2', 6 ]);
	await_published($name);
	is(in_store($name), 'm=2 n=3000 x=9', 'the last of each key is restored, k is deleted');

	$kafka->delete_topic("$name-changelog");
	make_changelog_topic($name, 1);
	query("SELECT eventstore.put_text('$name', 'n', 'last')");
	await_noticed($name, 'made anew', 'made anew');
	# Each is published by itself, so that it can be stopped in the middle.
	set_flush_count($sink, 1);
	query("SELECT eventstore.resume('$name')");
	$kafka->await('some of it is published', sub { last_values("$name-changelog") =~ /n=/ });
	pause($name);
	is(query("SELECT position < again_to FROM eventstore.sink_position WHERE sink = $sink"), 't', 'and not yet all');
	# Thousands of transactions of one record each would take minutes.
	set_flush_count($sink, 10000);
	end_sinks();
	publish_elsewhere($name, [ 'k', '1', 3 ], [ 'm', '1', 4 ]);
	is(in_store($name), 'm=2 n=last x=9', 'what is older than it has is not restored, what was deleted does not come back');
	await_published($name);
	is(last_values("$name-changelog"), 'm=2 n=last x=9', 'nor in the topic');
	query("SELECT eventstore.drop_source('$name')");
}

# It loses a partition before the topic has a change by SQL for the first time.
{
	my $name = 'loses';

	fill($name, $group);
	await_published($name);
	$kafka->delete_topic("$name-changelog");
	query("SELECT eventstore.put_text('$name', chr(i), 'by SQL') FROM generate_series(97, 102) i");
	await_true($node, "SELECT changelog_state = 'topic_missing' FROM eventstore.sources WHERE name = '$name'");
	make_changelog_topic($name);
	await_noticed($name, 'made anew', 'made anew');
	# Others may have published to it as much as the former one had.
	$kafka->produce("$name-changelog", (map { [ $_, 'old' ] } ('a' .. 'f') x 3), { properties => { partitioner => 'murmur2_random' } });
	query("SELECT eventstore.create_store('other', 'text')");
	query("SELECT eventstore.create_source('other', 'k', '$name', 'other', changelog_topic => '$name-changelog' $group)");
	await_true($node, "SELECT count(*) = 1 FROM eventstore.source_partitions WHERE source = 'other' AND assigned");
	await_true($node, "SELECT state = 'topic_recreated' FROM eventstore.sources WHERE name = '$name'");
	query("SELECT eventstore.resume('$name')");
	await_published($name);
	is(query("SELECT count(*) FROM eventstore.source_partitions WHERE source = '$name' AND assigned"), 1, 'one partition is its own');
	my @lost = split /\n/, query("SELECT c.stream FROM eventstore.dead_letters l JOIN ${name}_changelog c USING (position) WHERE l.source = '$name'");
	my @published = map { $_->{key} } grep { ($_->{value} // '') eq 'by SQL' } $kafka->consume("$name-changelog");
	cmp_ok(scalar(@lost), '>', 0, 'what the topic never had, and is another member\'s to publish now, is a dead letter');
	is(join(' ', sort @lost, @published), 'a b c d e f', 'all other changes are published');
	is(in_store($name), join(' ', map { "$_=by SQL" } 'a' .. 'f'), 'and none is undone by what the others had');
	query("SELECT eventstore.drop_source('$_')") foreach 'other', $name;
}

# It was idle, and its source notices first, since it is to restore a partition.
{
	my $name = 'idle';

	fill($name, $group);
	await_published($name);
	$kafka->delete_topic("$name-changelog");
	make_changelog_topic($name);
	query("SELECT eventstore.create_store('joins', 'text')");
	query("SELECT eventstore.create_source('joins', 'k', '$name', 'joins', changelog_topic => '$name-changelog' $group)");
	await_true($node, "SELECT state = 'topic_recreated' AND message ~ 'made anew' FROM eventstore.sources WHERE name = '$name'");
	is(query("SELECT changelog_state FROM eventstore.sources WHERE name = '$name'"), 'running', 'what publishes to it does not know yet');
	query("SELECT eventstore.resume('$name')");
	await_true($node, "SELECT state = 'running' FROM eventstore.sources WHERE name = '$name'");
	await_published($name);
	source_caught_up($node, 'joins');
	await_published('joins');
	is(last_values("$name-changelog"), in_store($name), 'resumed, the two have published all of it');
	query("SELECT eventstore.drop_source('$_')") foreach 'joins', $name;
}

# Who follows it stops as well, and has the same when it goes on.
{
	my $name = 'followed';

	sub follows
	{
		my ($name, $what) = @_;

		$kafka->await($what, sub { in_store('copy') eq in_store($name) });
		pass($what);
		return;
	}

	note("---- $name");
	$kafka->create_topic($name, 1);
	make_changelog_topic($name, 1);
	create($name, '');
	query("SELECT eventstore.create_store('copy', 'text')");
	query("SELECT eventstore.create_source('copy', 'k', '$name', 'copy', mode => 'replica', changelog_topic => '$name-changelog')");
	$kafka->produce($name, map { [ $_, "1$_" ] } 'a' .. 'f');
	source_caught_up($node, $name);
	follows($name, 'a replica');
	$kafka->delete_topic("$name-changelog");
	query("SELECT eventstore.put_text('$name', 'g', 'y'), eventstore.delete_text('$name', 'b')");
	await_true($node, "SELECT changelog_state = 'topic_missing' FROM eventstore.sources WHERE name = '$name'");
	make_changelog_topic($name, 1);
	await_noticed($name, 'made anew', 'made anew');
	await_true($node, "SELECT state = 'topic_recreated' FROM eventstore.sources WHERE name = 'copy'");
	like(in_store('copy'), qr/a=1a b=1b/, 'the replica keeps what it has');
	resume($name, 'fails at first');
	await_published($name);
	query("SELECT eventstore.resume('copy')");
	follows($name, 'resumed, it has what the store has, and not what was deleted');
	query("SELECT eventstore.put_text('$name', 'a', 'later')");
	follows($name, 'and follows on');
	query("SELECT eventstore.drop_source('$_')") foreach 'copy', $name;
}

$node->stop;
no_crash($node);
done_testing();
