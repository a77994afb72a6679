# Waiting readers: woken when there is something, only then, and always.
#
# Each interleaving is driven step by step; a session is known to sleep by what
# pg_stat_activity says of it.  A lost wake-up would show after five seconds as a
# late one, which the statistics count.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Session;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $node = new_server('wait', settings => [ 'eventstore.tick_delay = 20ms', 'max_connections = 300' ]);
$node->safe_psql('postgres', q{SELECT eventstore.create_collection('w'); SELECT eventstore.create_collection('other')});

my %session = map { $_ => EventstoreTest::Session->new($node, application_name => $_) } qw(one two waiter second);

sub value { return $node->safe_psql('postgres', $_[0]); }

sub start_waiting
{
	my ($name, $sql) = @_;
	$session{$name}->send($sql);
	await_asleep($node, $name);
	return;
}

sub answer_of
{
	my ($name) = @_;
	return $session{$name}->receive;
}

sub wakeups
{
	return value("SELECT wakeups FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'notifier' AND database = 'postgres'");
}

# The notifier has seen what was appended so far: it wakes a waiter of its own.  What it
# did has been counted when it sleeps again.
sub settle
{
	start_waiting('second', "SELECT eventstore.wait_for('w', eventstore.head('w'), '1 hour') > 0");
	value("SELECT position FROM eventstore.append('w', 'settle', tags => '{settle}')");
	is(answer_of('second'), 't', 'another waiter was woken');
	await_true($node, "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE backend_type = 'eventstore notifier' AND datname = 'postgres'");
	return;
}

my $rare = q{SELECT type FROM eventstore.read('w', after => eventstore.head('w'), tags => '{rare}', wait => '1 hour')};

# ---- only those who have reason to ---------------------------------------------------

value("SELECT position FROM eventstore.append('w', 'x')");
start_waiting('waiter', $rare);
await_true($node, "SELECT state = 'running' FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'notifier' AND database = 'postgres'");
settle();
my $before = wakeups();
value("SELECT position FROM eventstore.append('w', 'common', tags => '{common}')") for 1 .. 20;
value("INSERT INTO w (type, tags) SELECT 'common', ARRAY['common'] FROM generate_series(1, 1000)");
settle();
is(wakeups() - $before, 1, 'a waiter for a rare tag is not woken by events without it');
value("SELECT position FROM eventstore.append('other', 'rare', tags => '{rare}')");
settle();
is(wakeups() - $before, 2, 'nor by one in another collection');
value("SELECT position FROM eventstore.append('w', 'it', tags => '{a,rare}')");
is(answer_of('waiter'), 'it', 'and by the one that has it');

start_waiting('waiter', q{SELECT version FROM eventstore.read_stream('w', 's', 1, wait => '1 hour')});
$before = wakeups();
value("SELECT position FROM eventstore.append('w', 'x', stream => 't')") for 1 .. 20;
settle();
is(wakeups() - $before, 1, 'a waiter for a stream is not woken by another stream');
value("INSERT INTO w (type, stream) VALUES ('x', 's')");
is(answer_of('waiter'), '1', 'and by its own');

# ---- events above another's open position -----------------------------------------------

sub appended { return $session{ $_[0] }->run("SELECT type FROM eventstore.append('w', 'x', tags => '{$_[1]}') a, LATERAL (SELECT 'x' AS type) t"); }

foreach my $end (qw(COMMIT ROLLBACK))
{
	$session{one}->run('BEGIN');
	appended('one', 'common');
	start_waiting('waiter', $rare);
	appended('two', 'rare');
	await_asleep($node, 'waiter');
	appended('two', 'common');
	is(value("SELECT state FROM pg_stat_activity WHERE application_name = 'waiter'"), 'active', "$end: an event above an open position is waited for");
	$session{one}->run($end);
	is(answer_of('waiter'), 'x', "$end of the one below lets it through");
}

# Both sides of another's: the first is not what is waited for.
$session{one}->run('BEGIN');
appended('one', 'common');
$session{two}->run('BEGIN');
appended('two', 'common');
appended('one', 'rare');
start_waiting('waiter', $rare);
$session{one}->run('COMMIT');
await_asleep($node, 'waiter');
$session{two}->run('ROLLBACK');
is(answer_of('waiter'), 'x', 'the later event of a transaction that lies around another');

# More commits above an open position than are remembered.
$session{one}->run('BEGIN');
appended('one', 'common');
start_waiting('waiter', $rare);
appended('two', 'rare');
appended('two', 'common') for 1 .. 200;
$session{one}->run('COMMIT');
is(answer_of('waiter'), 'x', 'an event that was committed two hundred commits before the head passed it');

$session{one}->run('BEGIN');
appended('one', 'common');
appended('two', 'rare');
appended('two', 'common') for 1 .. 200;
start_waiting('waiter', $rare);
$session{one}->run('COMMIT');
is(answer_of('waiter'), 'x', 'and before the waiter came');

# Nobody has waited for anything of this collection before.
value("SELECT eventstore.create_collection('fresh')");
$session{one}->run("BEGIN; SELECT position FROM eventstore.append('fresh', 'common')");
value("SELECT position FROM eventstore.append('fresh', 'rare')");
start_waiting('waiter', q{SELECT type FROM eventstore.read('fresh', types => '{rare}', wait => '1 hour')});
$session{one}->run('COMMIT');
is(answer_of('waiter'), 'rare', 'and before the first waiter of all came');

# ---- what happens during a look -----------------------------------------------------------------

# A policy's function makes looks last as long as it takes.
value(q{
	CREATE ROLE reader LOGIN;
	GRANT USAGE ON SCHEMA eventstore TO reader;
	CREATE SEQUENCE looks;
	CREATE FUNCTION gate(version bigint) RETURNS bool LANGUAGE plpgsql SECURITY DEFINER AS $$
	BEGIN
		IF nextval('looks') = 3 THEN
			PERFORM pg_advisory_xact_lock(42);
		END IF;
		RETURN version > 1;
	END $$;
	CREATE FUNCTION nap() RETURNS bool LANGUAGE sql AS 'SELECT pg_sleep(0.05) IS NULL';
	CREATE FUNCTION nest() RETURNS bool LANGUAGE plpgsql AS $$
	BEGIN
		RETURN eventstore.wait_for('nested', eventstore.head('nested'), '1 ms') < 0;
	END $$;
	SELECT eventstore.create_collection(name) FROM unnest(ARRAY['gated', 'napping', 'nested']) name});
value("ALTER TABLE $_->[0] ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON $_->[0] USING ($_->[1]); GRANT SELECT ON $_->[0] TO reader; SELECT position FROM eventstore.append('$_->[0]', 'x', stream => 's')")
  foreach [ 'gated', 'gate(version)' ], [ 'napping', '(SELECT nap())' ], [ 'nested', 'true' ];
$session{reader} = EventstoreTest::Session->new($node, application_name => 'reader', user => 'reader');

# The first look calls the gate twice; here is the next one, with its snapshot taken.
$session{one}->run('SELECT pg_advisory_lock(42)');
$session{reader}->send(q{SELECT version FROM eventstore.read_stream('gated', 's', wait => '1 hour')});
await_true($node, "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE application_name = 'reader'");
value("SELECT position FROM eventstore.append('gated', 'x', stream => 's')");
settle();
$session{one}->run('SELECT pg_advisory_unlock(42)');
is(answer_of('reader'), '2', 'an event that comes after the snapshot of a look');
is(value("SELECT late_wakeups FROM eventstore.pg_stat_eventstore WHERE collection = 'gated'::regclass"), 0, 'is not found by chance');

# There is always something to look at again, and never to be seen.
$session{one}->send(q{DO $$ BEGIN FOR i IN 1 .. 2000 LOOP PERFORM eventstore.append('napping', 'x'); COMMIT; PERFORM pg_sleep(0.005); END LOOP; END $$});
is($session{reader}->run(q{SELECT count(*) FROM eventstore.read('napping', wait => '300 ms')}), '0', 'the time of a wait is over');
is(value("SELECT state FROM pg_stat_activity WHERE application_name = 'one'"), 'active', 'while events come without end');
value("SELECT pg_cancel_backend(" . $session{one}->backend_pid . ")");
answer_of('one');

value("ALTER POLICY p ON nested USING (nest())");
start_waiting('reader', q{SELECT count(*) FROM eventstore.read('nested', eventstore.head('nested'), wait => '1 hour')});
value("SELECT position FROM eventstore.append('nested', 'x')");
answer_of('reader');
is($session{reader}{state}, '25001', 'what a look calls must not wait itself');

# ---- what ends a wait from outside ----------------------------------------------------------

my $pid = $session{waiter}->backend_pid;

start_waiting('waiter', "SELECT eventstore.wait_for('w', eventstore.head('w'), NULL)");
value("SELECT pg_cancel_backend($pid)");
answer_of('waiter');
is($session{waiter}{state}, '57014', 'a wait can be cancelled');
is($session{waiter}->run("SELECT eventstore.wait_for('w', 1, '1 s') > 1"), 't', 'and the session waits again');

start_waiting('waiter', "SELECT eventstore.wait_for('other', eventstore.head('other'), NULL)");
$session{one}->run("SELECT eventstore.drop_collection('other')");
answer_of('waiter');
is($session{waiter}{state}, '42P01', 'DROP goes through, and ends the wait');

start_waiting('waiter', "SELECT eventstore.wait_for('w', eventstore.head('w'), NULL)");
$session{one}->run("SELECT eventstore.truncate_before('w', eventstore.head('w'))");
appended('one', 'common');
like(answer_of('waiter'), qr/^\d+$/, 'a truncation does not');

start_waiting('waiter', "SELECT eventstore.wait_for('w', eventstore.head('w'), NULL)");
$session{one}->run("SELECT eventstore.repair_collection('w')");
my $began = time;
appended('one', 'common');
like(answer_of('waiter'), qr/^\d+$/, 'nor does a repair');
cmp_ok(time - $began, '<', 4, 'after which a waiter is woken as before');

# ---- what is held while waiting ---------------------------------------------------------------

sub has_snapshot { return value("SELECT backend_xmin IS NOT NULL FROM pg_stat_activity WHERE application_name = '$_[0]'"); }

start_waiting('waiter', "CALL eventstore.await('w', eventstore.head('w'), timeout => NULL)");
is(has_snapshot('waiter'), 'f', 'await holds no snapshot');
is(value("SELECT count(*) FROM pg_locks WHERE pid = $pid AND relation = 'w'::regclass"), 0, 'and no lock on the collection');
appended('one', 'common');
like(answer_of('waiter'), qr/^\d+$/, 'await returns the head');
start_waiting('waiter', "DO \$\$ DECLARE h bigint; BEGIN CALL eventstore.await('w', eventstore.head('w'), h, NULL); PERFORM 1 / (h > 0)::int; END \$\$");
is(has_snapshot('waiter'), 'f', 'nor in a DO block');
appended('one', 'common');
answer_of('waiter');
is($session{waiter}{state}, '00000', 'and SQL goes on after it');

# ---- without a notifier --------------------------------------------------------------------------

start_waiting('waiter', $rare);
my $notifier = "SELECT pid FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'notifier' AND database = 'postgres' AND pid IS NOT NULL";
my $old = value($notifier);
value("SELECT pg_terminate_backend($old)");
appended('one', 'rare');
is(answer_of('waiter'), 'x', 'a wait ends though the notifier has gone');
start_waiting('waiter', "SELECT eventstore.wait_for('w', eventstore.head('w'), NULL)");
await_true($node, "SELECT count(*) = 1 FROM ($notifier) n WHERE pid <> $old");
appended('one', 'common');
like(answer_of('waiter'), qr/^\d+$/, 'another notifier is started');

# ---- hundreds ----------------------------------------------------------------------------------------

my @crowd = map { EventstoreTest::Session->new($node, application_name => "crowd $_") } 1 .. 60;
my $head = value("SELECT eventstore.head('w')");
$_->send("SELECT eventstore.wait_for('w', $head, NULL)") foreach @crowd;
await_true($node, "SELECT count(*) = 60 FROM pg_stat_activity WHERE application_name LIKE 'crowd%' AND wait_event_type = 'Extension'");
appended('one', 'common');
is(scalar(grep { $_->receive > $head } @crowd), 60, 'all of a crowd are woken');
$_->quit foreach @crowd;

my $late = "SELECT late_wakeups FROM eventstore.pg_stat_eventstore WHERE collection = 'w'::regclass";
is(value($late), 0, 'nobody was woken late');

# ---- a notifier that does not come -----------------------------------------------------------------

# It is asleep, with no lock that others need; five seconds, and one more since it was called.
settle();
my $stopped = value($notifier);
$began = time;
kill 'STOP', $stopped;
start_waiting('waiter', "SELECT eventstore.wait_for('w', eventstore.head('w'), NULL)");
appended('one', 'common');
like(answer_of('waiter'), qr/^\d+$/, 'a wait ends though the notifier stands still');
cmp_ok(time - $began, '>=', 6, 'which is given time to come');
is(value($late), 1, 'and is counted as late');
kill 'CONT', $stopped;

start_waiting('waiter', "SELECT eventstore.wait_for('w', eventstore.head('w'), NULL)");
$node->stop('fast');
pass('a waiter does not stand in the way of a shutdown');
no_crash($node);
done_testing();
