# Waiting on a hot standby: as replay advances, and through a promotion.  To
# LISTEN is for the primary.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Listener;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = new_server('primary', streaming => 1, settings => [ 'eventstore.tick_delay = 20ms' ]);

$primary->safe_psql('postgres', "SELECT eventstore.create_collection('c'); SELECT position FROM eventstore.append('c', 'first', stream => 's')");
$primary->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
$standby->start;

my %session = map { $_ => session($standby, application_name => $_) } qw(one two three four);

sub start_waiting
{
	my ($name, $sql) = @_;

	$session{$name}->send($sql);
	await_true($standby, "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE application_name = '$name'");
	return;
}

sub append { return $primary->safe_psql('postgres', "SELECT position FROM eventstore.append($_[0])"); }

my %waits = (
	one   => "SELECT eventstore.wait_for('c', %d, NULL)",
	two   => "SELECT position FROM eventstore.read('c', after => %d, tags => '{t}', wait => '1 hour')",
	three => "SELECT position FROM eventstore.read_stream('c', 's', 2, wait => '1 hour')",
	four  => "CALL eventstore.await('c', %d, timeout => NULL)");

# ---- as replay advances --------------------------------------------------------------------

$standby->poll_query_until('postgres', "SELECT eventstore.head('c')", '1') or BAIL_OUT('the standby has no head');
start_waiting($_, sprintf $waits{$_}, 1) foreach sort keys %waits;
$standby->safe_psql('postgres', 'SELECT pg_wal_replay_pause()');
await_true($standby, "SELECT pg_get_wal_replay_pause_state() = 'paused'");
my $position = append("'c', 'second', stream => 's', tags => '{t}'");
$primary->wait_for_catchup($standby, 'write', $primary->lsn('flush'));
is($standby->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE application_name IN ('one', 'two', 'three', 'four') AND state = 'active'"),
	4, 'nobody is woken by what was not replayed');
$standby->safe_psql('postgres', 'SELECT pg_wal_replay_resume()');
is($session{$_}->receive, $position, "woken by replay: $waits{$_}") foreach sort keys %waits;

start_waiting('two', sprintf $waits{two}, $position);
append("'c', 'other'") for 1 .. 5;
$position = append("'c', 'it', tags => '{t}'");
is($session{two}->receive, $position, 'what does not match is passed over');

is($session{one}->run("SELECT eventstore.wait_for('c', $position, '50 ms')"), $position, 'a wait that comes to its time-out');
start_waiting('one', sprintf $waits{one}, $position);
$standby->safe_psql('postgres', "SELECT pg_cancel_backend($session{one}{backend_pid})");
$session{one}->receive;
is($session{one}{state}, '57014', 'and one that is cancelled');
is($session{one}->try("SELECT eventstore.wait_for('c', 4000000000000)"), 'LG004', 'a cursor ahead of the log is refused');

# ---- one collection that cannot be read -----------------------------------------------------

$primary->safe_psql('postgres', "SELECT eventstore.create_collection('d')");
$standby->poll_query_until('postgres', "SELECT eventstore.head('d')", '0') or BAIL_OUT('the standby does not know of the other collection');
start_waiting('one', sprintf $waits{one}, $position);
my $logged = -s $standby->logfile;
my $holder = session($primary, application_name => 'holder');
$holder->run('BEGIN');
$holder->run("LOCK TABLE $_ IN ACCESS EXCLUSIVE MODE")
	foreach split /\n/, $primary->safe_psql('postgres', "SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'c'::regclass");
foreach my $n (1 .. 5)
{
	start_waiting('two', sprintf "SELECT eventstore.wait_for('d', %d, NULL)", $n - 1);
	$primary->safe_psql('postgres', "SELECT position FROM eventstore.append('d', 'x')");
	is($session{two}->receive, $n, "others go on beside it: event $n");
}
is(scalar(() = slurp_file($standby->logfile, $logged) =~ /canceling statement due to lock timeout/g), 1, 'and it is logged once');
$holder->run('COMMIT');
$position = append("'c', 'later', tags => '{t}'");
is($session{one}->receive, $position, 'it is waited for still');

# ---- LISTEN ------------------------------------------------------------------------------------

is(sqlstate_of($standby, 'LISTEN "public.c"'), '25006', 'LISTEN is refused on a standby');
is(sqlstate_of($standby, "SELECT eventstore.listen('c')"), '25006', 'and so is eventstore.listen');

# ---- promotion -----------------------------------------------------------------------------------

start_waiting('one', sprintf $waits{one}, $position);
start_waiting('two', sprintf $waits{two}, $position);
$primary->stop('immediate');
$standby->promote;
my $listener = EventstoreTest::Listener->new($standby);
my ($channel, $head) = $listener->listen('c');
my $next = $standby->safe_psql('postgres', "SELECT position FROM eventstore.append('c', 'after', tags => '{t}')");
is($session{two}->receive, $next, 'a wait goes on through a promotion');
cmp_ok($session{one}->receive, '>', $position, 'wait_for, too');
$listener->await_head($channel, $next);
pass('one can listen there then');

$standby->stop('fast');
no_crash($standby);
done_testing();
