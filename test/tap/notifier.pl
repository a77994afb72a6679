# The notifier goes on: where one collection cannot be read, where the listeners
# go, where the extension goes.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Session;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('notifier', settings => [ 'log_min_messages = debug1', 'eventstore.tick_delay = 20ms' ]);

sub value { return $node->safe_psql('postgres', $_[0]); }

value("SELECT eventstore.create_collection(c) FROM unnest(ARRAY['good', 'locked', 'broken']) c");
value("SELECT eventstore.append(c, 'x') FROM unnest(ARRAY['good', 'locked', 'broken']::regclass[]) c");

my $listener = session($node);
my $owner    = session($node);

sub notifier { return value("SELECT pid FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'notifier' AND database = 'postgres'"); }

# Until the listener has a notification that the pattern fits.
sub is_notified
{
	my ($pattern, $name) = @_;
	my $heard = '';
	my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;

	while (time < $deadline)
	{
		$heard .= $listener->run('SELECT pg_sleep(0.02)');
		return pass($name) if $heard =~ $pattern;
	}
	return is($heard, $pattern, $name);
}

# Stops it where it holds nothing that others need: asleep, with nothing to send.
sub stop_notifier
{
	my ($pid) = @_;

	await_true($node, "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = $pid");
	kill 'STOP', $pid;
	return;
}

$listener->run("SELECT eventstore.listen(c) FROM unnest(ARRAY['good', 'locked', 'broken']::regclass[]) c");
value("SELECT position FROM eventstore.append('good', 'x')");
is_notified(qr/good.*"count": 1/, 'a notification');

# ---- a collection that cannot be read ---------------------------------------------------

$owner->run('BEGIN; LOCK TABLE locked');
value("SELECT eventstore.set_option('good', 'heartbeat', '20 ms')");
is_notified(qr/good.*"count": 0/, 'a heartbeat, from when it is asked for');
value("SELECT eventstore.set_option('good', 'heartbeat', NULL)");
$owner->run('COMMIT');

# Its owner has a heartbeat sent from a table that nobody can read.
value("SELECT eventstore.set_option('locked', 'heartbeat', '1 ms')");
is_notified(qr/locked.*"count": 0/, 'the heartbeat of another');
$owner->run('BEGIN; LOCK TABLE locked');
my $notifier = notifier();
value("SELECT position FROM eventstore.append('good', 'x')");
is_notified(qr/good.*"count": 1/, 'no other is held up by a collection that is locked');
is(value("SELECT count(*) FROM pg_locks WHERE pid = $notifier AND NOT granted"), 0, 'nobody waits for its lock');
$owner->run('COMMIT');
is_notified(qr/locked.*"count": 0/, 'which is notified of again');
value("SELECT eventstore.set_option('locked', 'heartbeat', NULL)");

my $segment = value("SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'broken'::regclass ORDER BY inhrelid LIMIT 1");
value("SELECT position FROM eventstore.append('good', 'x')");
is_notified(qr/good.*"count": 1/, 'a notification that is sent when the heartbeat has ended');
stop_notifier($notifier);
value("SELECT position FROM eventstore.append('broken', 'x')");
$owner->run("BEGIN; LOCK TABLE $segment");
kill 'CONT', $notifier;
value("SELECT position FROM eventstore.append('good', 'x')");
is_notified(qr/good.*"count": 1/, 'nor by one that fails');
$owner->run('COMMIT');
is_notified(qr/broken.*"count": 1/, 'which is notified of in the end');
is(notifier(), $notifier, 'it is the same process all the time');

# ---- DROP EXTENSION ----------------------------------------------------------------------

sub starts
{
	my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile);
	return scalar(() = $log =~ /starting background worker process "eventstore notifier"/g);
}

# Called for while it does not run, and then there is nothing to run for.
my $before = starts();
value("SELECT pg_terminate_backend($notifier); SELECT position FROM eventstore.append('good', 'x')");
value('DROP EXTENSION eventstore CASCADE');
for (1 .. 200)
{
	last if starts() > $before;
	value('SELECT pg_sleep(0.02)');
}
value('CREATE EXTENSION eventstore; DROP TABLE good, locked, broken');
value("SELECT eventstore.create_collection('good')");
await_true($node, "SELECT count(*) = 2 FROM eventstore.pg_stat_eventstore_workers WHERE database = 'postgres' AND state = 'running'");
cmp_ok(starts() - $before, '<=', 3, 'it is not started again and again');
value("SELECT position FROM eventstore.append('good', 'x')");
is_notified(qr/good.*"count": 1/, 'who listened before goes on listening');

# ---- more collections than locks -----------------------------------------------------------

# One transaction for all of them might need more locks than there are.
$listener->run('UNLISTEN *');
value("SELECT eventstore.create_collection('many_' || i, channel => 'many') FROM generate_series(" . (100 * $_ + 1) . ', ' . (100 * $_ + 100) . ') i') for 0 .. 6;
$listener->run('LISTEN many');
$notifier = notifier();
stop_notifier($notifier);
value("SELECT eventstore.append(('many_' || i)::regclass, 'x') FROM generate_series(" . (100 * $_ + 1) . ', ' . (100 * $_ + 100) . ') i') for 0 .. 6;
kill 'CONT', $notifier;
my %heard;
my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;
while (time < $deadline)
{
	my $text = $listener->run('SELECT pg_sleep(0.02)');
	$heard{$1} = 1 while $text =~ /"collection": "(?:public\.)?many_(\d+)"/g;
	last if keys %heard == 700;
}
is(scalar(keys %heard), 700, 'all of many collections are notified of');

no_crash($node);
done_testing();
