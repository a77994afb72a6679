# What the TAP tests share: servers with the extension, and the questions that
# every one of them asks at its end.
package EventstoreTest;

use strict;
use warnings;

use Exporter 'import';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

use EventstoreTest::Session;

our @EXPORT = qw(
  new_server
  copy_installation
  extension_dir
  configure
  session
  sqlstate_of
  positions
  is_clean
  await_true
  await_gone
  await_asleep
  try_query
  await_up
  crash_by
  hold_up
  no_crash
);

# What every server here has.  Statements are not logged: some tests send many.
my @settings = (
	"shared_preload_libraries = 'eventstore'",
	"log_statement = none",
	"deadlock_timeout = 100ms",
	"max_connections = 50",
	"timezone = 'UTC'");

# configure($node, @lines): a later line overrides.
sub configure
{
	my ($node, @lines) = @_;

	$node->append_conf('postgresql.conf', join("\n", @lines) . "\n");
	return;
}

# new_server($name, streaming => 1 | 'logical', settings => [lines], extension => 0,
# init => [options of initdb], install_path => where another PostgreSQL lies):
# started, with the extension in database postgres.
sub new_server
{
	my ($name, %options) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name, install_path => $options{install_path});

	$node->init(
		allows_streaming => $options{streaming} // 0,
		extra            => [ '--no-locale', '-E', 'UTF8', @{ $options{init} // [] } ]);
	configure($node, @settings, @{ $options{settings} // [] });
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION eventstore') if $options{extension} // 1;
	return $node;
}

# A copy of the PostgreSQL under test in a folder, for tests that change what is
# installed; its install_path.  Programs find the rest by where they lie.
sub copy_installation
{
	my ($dir) = @_;
	my %folder = map { chomp(my $path = `pg_config --$_`); $_ => $path } qw(bindir pkglibdir sharedir);

	system('mkdir', '-p', map { "$dir$_" } values %folder) == 0 or BAIL_OUT('cannot make folders');
	system("cp -L $folder{bindir}/* $dir$folder{bindir}/") == 0 or BAIL_OUT('cannot copy the programs');
	foreach my $path (@folder{qw(pkglibdir sharedir)})
	{
		system('cp', '-rs', "$path/.", "$dir$path/") == 0 or BAIL_OUT("cannot copy $path");
	}
	return "$dir$folder{bindir}" =~ s,/bin$,,r;
}

# Where the server's extensions' scripts lie.
sub extension_dir
{
	my ($node) = @_;
	return $node->config_data('--sharedir') . '/extension';
}

sub session
{
	my ($node, %options) = @_;
	return EventstoreTest::Session->new($node, %options);
}

# The state of the last of some statements, in a session of their own.
sub sqlstate_of
{
	my ($node, $sql, %options) = @_;
	my $session = session($node, %options);
	my $state   = $session->try($sql);

	note("$state $session->{message}") if $state ne '00000';
	$session->quit;
	return $state;
}

# The positions that a query gives, as an array.
sub positions
{
	my ($node, $sql, $dbname) = @_;
	return split /\n/, $node->safe_psql($dbname // 'postgres', $sql);
}

# Versions dense, heads right, checksums right: nothing that verify() finds.
sub is_clean
{
	my ($node, $collection, $name, $dbname) = @_;

	is( $node->safe_psql(
			$dbname // 'postgres',
			"SELECT position, stream, version, problem FROM eventstore.verify('$collection') LIMIT 10"),
		'',
		$name // "$collection: verify finds nothing");
	return;
}

# What sources and sinks are at, a line each, for the log of a test that broke off.
sub tell_of_kafka
{
	my ($node, $dbname) = @_;
	my (undef, $told) = $node->psql($dbname, q{
		SELECT concat_ws(' ', 'source', name, state, message, 'changelog', changelog_state, changelog_message,
			(SELECT string_agg(concat_ws('@', topic, partition, position) || CASE WHEN assigned THEN '' ELSE ' not' END, ', ')
				FROM eventstore.source_partitions p WHERE p.source = name))
		FROM eventstore.sources
		UNION ALL SELECT concat_ws(' ', 'sink', name, state, message, position) FROM eventstore.sinks
		UNION ALL (SELECT concat_ws(' ', 'log', at, worker, message) FROM eventstore.kafka_log ORDER BY at DESC LIMIT 3)});

	diag($told // 'no answer');
	return;
}

# A condition that becomes true by itself, or the test ends.
sub await_true
{
	my ($node, $sql, $dbname) = @_;

	return if $node->poll_query_until($dbname // 'postgres', $sql);
	tell_of_kafka($node, $dbname // 'postgres');
	BAIL_OUT("never became true: $sql");
}

# Who inserts into the table is held up while a session has the advisory lock 42; by
# a loop, since a wait for a lock might come to a time-out.
sub hold_up
{
	my ($node, $table) = @_;

	$node->safe_psql('postgres', q{CREATE OR REPLACE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
		LOOP EXIT WHEN pg_catalog.pg_try_advisory_xact_lock_shared(42); PERFORM pg_catalog.pg_sleep(0.02); END LOOP;
		RETURN NEW; END$$;} . "CREATE TRIGGER hold_up BEFORE INSERT ON $table FOR EACH ROW EXECUTE FUNCTION hold_up()");
	return;
}

# No process of the server died of its own accord; what a test killed itself
# (by signal 9) is not meant.
sub no_crash
{
	my ($node) = @_;
	my @lines = grep { /TRAP:|PANIC:|terminated by signal (?!9:)/ }
	  split /\n/, PostgreSQL::Test::Utils::slurp_file($node->logfile);

	is(join("\n", @lines), '', $node->name . ': no process crashed');
	return;
}

# Until a session sleeps in a wait for events.
sub await_asleep
{
	my ($node, $name) = @_;
	await_true($node, "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE application_name = '$name'");
	return;
}

# The answer, or nothing while the server takes no connections.  The query is not
# written to psql, which may have been turned away by then: whoever writes gets SIGPIPE.
sub try_query
{
	my ($node, $sql) = @_;
	my @command = ($node->installed_command('psql'), '-XAtq', '-d', $node->connstr('postgres'), '-c', $sql);
	my $came = IPC::Run::run(\@command, '>', \my $out, '2>', \my $err);

	chomp $out;
	return $came ? $out : '';
}

# Until a server that crashed takes connections, and the query gives something else.
sub await_up
{
	my ($node, $sql, $before) = @_;

	foreach (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		my $answer = try_query($node, $sql // 'SELECT 1');

		return if $answer ne '' && $answer ne ($before // '');
		usleep(100_000);
	}
	BAIL_OUT($node->name . ' does not come back');
}

# Kills a process of the server, and waits until the server has ended all the
# others too and is there again.
sub crash_by
{
	my ($node, $pid) = @_;
	my $checkpointer = q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'};
	my $before = try_query($node, $checkpointer);

	kill 'KILL', $pid or return;
	await_up($node, $checkpointer, $before);
	return;
}

# Until a relation (a segment that was let go) is gone.
sub await_gone
{
	my ($node, $relation, $dbname) = @_;

	await_true($node, "SELECT to_regclass('$relation') IS NULL", $dbname);
	return;
}

1;
