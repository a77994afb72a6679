# Through PgBouncer in transaction mode: whoever waits needs no session of his
# own, no LISTEN, and no two statements on one connection.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Session;
use PostgreSQL::Test::Cluster;
use POSIX ();
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $node = new_server('pooled', settings => [ 'eventstore.tick_delay = 20ms', 'client_connection_check_interval = 50ms' ]);

$node->safe_psql('postgres', "SELECT eventstore.create_collection('c')");

# ---- a PgBouncer beside the server ---------------------------------------------------------

# What Session and the helpers ask of a server, of the pooler.
package Pooler;

sub new
{
	my ($class, $node, %options) = @_;
	my $self = bless { node => $node, dir => PostgreSQL::Test::Utils::tempdir(), port => PostgreSQL::Test::Cluster::get_free_port() }, $class;
	my $file = "$self->{dir}/pgbouncer.ini";

	PostgreSQL::Test::Utils::append_to_file($file, join("\n",
		'[databases]',
		'postgres = host=' . $node->host . ' port=' . $node->port . " user=" . (getpwuid $<)[0] . " pool_size=$options{pool_size}",
		'[pgbouncer]',
		'listen_addr =',
		"listen_port = $self->{port}",
		'unix_socket_dir = ' . $node->host,
		'auth_type = any',
		'pool_mode = transaction',
		'ignore_startup_parameters = extra_float_digits',
		"logfile = $self->{dir}/pgbouncer.log",
		"pidfile = $self->{dir}/pgbouncer.pid",
		'[users]', ''));
	my ($program) = grep { -x } map { "$_/pgbouncer" } split(/:/, $ENV{PATH}), '/usr/sbin', '/usr/local/sbin';
	main::BAIL_OUT('there is no pgbouncer') unless $program;
	$self->{pid} = fork // die "cannot fork: $!";
	if ($self->{pid} == 0)
	{
		open STDOUT, '>', "$self->{dir}/output";
		open STDERR, '>&', \*STDOUT;
		exec $program, '-q', $file or POSIX::_exit(127);
	}
	return $self;
}

sub connstr { return 'host=' . $_[0]{node}->host . " port=$_[0]{port} user=" . (getpwuid $<)[0] . " dbname='$_[1]'"; }

sub installed_command { return $_[0]{node}->installed_command($_[1]); }

sub stop
{
	my ($self) = @_;

	kill 'QUIT', $self->{pid};
	return waitpid $self->{pid}, 0;
}

package main;

my $pooler = Pooler->new($node, pool_size => 4);
END { $pooler->stop if $pooler; }

my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;
until (system_log($node->installed_command('psql'), '-XAtq', '-d', $pooler->connstr('postgres'), '-c', 'SELECT 1') == 0)
{
	BAIL_OUT('PgBouncer does not answer: ' . slurp_file("$pooler->{dir}/output")) if time > $deadline;
	usleep(20_000);
}

sub waiting_is
{
	my ($n) = @_;
	await_true($node, "SELECT count(*) = $n FROM pg_stat_activity WHERE wait_event_type = 'Extension' AND backend_type = 'client backend'");
	return;
}

# ---- each wait, from a client of the pooler ----------------------------------------------------

my %waits = (
	wait_for    => "SELECT eventstore.wait_for('c', %d, NULL)",
	read        => "SELECT position FROM eventstore.read('c', after => %d, tags => '{t}', wait => '1 hour')",
	read_stream => "SELECT position FROM eventstore.read_stream('c', 's', %d + 1, wait => '1 hour')",
	await       => "CALL eventstore.await('c', %d, timeout => NULL)");
my %client = map { $_ => EventstoreTest::Session->new($pooler) } keys %waits;
my $head = 0;

foreach my $round (1 .. 5)
{
	foreach my $name (sort keys %waits)
	{
		$client{$name}->send(sprintf $waits{$name}, $head);
	}
	waiting_is(4);
	$head = $node->safe_psql('postgres', "SELECT position FROM eventstore.append('c', 'x', stream => 's', tags => '{t}')");
	is($client{$_}->receive, $head, "$_, round $round") foreach sort keys %waits;
}

# The writer may be a client of the pooler, too, while there is room in it.
$client{read}->send(sprintf $waits{read}, $head);
waiting_is(1);
$head = $client{wait_for}->run("SELECT position FROM eventstore.append('c', 'x', stream => 's', tags => '{t}')");
is($client{read}->receive, $head, 'woken by another client of the pool');

# ---- subscriptions ------------------------------------------------------------------------------------

$client{read}->run("SELECT eventstore.subscribe('s', 'c', after => $head)");
$client{read}->send("SELECT position FROM eventstore.poll('s', wait => '1 hour')");
waiting_is(1);
$head = $client{wait_for}->run("SELECT position FROM eventstore.append('c', 'x', stream => 's', tags => '{t}')");
is($client{read}->receive, $head, 'poll is woken');
$client{read}->send("SELECT position FROM eventstore.poll('s', wait => '1 hour', member => 'm', lease => '1 min')");
waiting_is(1);
$head = $client{wait_for}->run("SELECT position FROM eventstore.append('c', 'x', stream => 's', tags => '{t}')");
is($client{read}->receive, $head, 'and with a lease');
$client{await}->run("SELECT eventstore.ack('s', $head, 'm')");
is($client{wait_for}->run("SELECT count(*) FROM eventstore.poll('s')"), 0, 'which another connection of the pool acknowledges');

# ---- the ends of a wait ------------------------------------------------------------------------------

is($client{wait_for}->run("SELECT eventstore.wait_for('c', $head, '20 ms')"), $head, 'a time-out');
$client{wait_for}->run("BEGIN; SET LOCAL statement_timeout = '20 ms'");
is($client{wait_for}->try("SELECT eventstore.wait_for('c', $head, NULL)"), '57014', 'a statement_timeout');
$client{wait_for}->run('ROLLBACK');

$client{wait_for}->send(sprintf $waits{wait_for}, $head);
waiting_is(1);
kill 'INT', $client{wait_for}{pid};
waiting_is(0);
# The server writes its log before it tells the client, which ends then.
$client{wait_for}->quit;
like(slurp_file($node->logfile), qr/canceling statement due to user request/, 'a cancel by the client');
$client{wait_for} = EventstoreTest::Session->new($pooler);

# A client that goes away is noticed, and its connection is free again.
$client{$_}->send(sprintf $waits{$_}, $head) foreach keys %waits;
waiting_is(4);
foreach my $name (keys %waits)
{
	kill 'KILL', $client{$name}{pid};
	waitpid $client{$name}{pid}, 0;
}
waiting_is(0);
my $last = EventstoreTest::Session->new($pooler);
is($last->run("SELECT position FROM eventstore.append('c', 'x')"), $head + 1, 'the pool has room again after its clients went away');
is(scalar($node->safe_psql('postgres', "SELECT late_wakeups FROM eventstore.pg_stat_eventstore WHERE collection = 'c'::regclass")), 0, 'nobody was woken late');

$last->quit;
$pooler->stop;
$pooler = undef;
$node->stop('fast');
no_crash($node);
done_testing();
