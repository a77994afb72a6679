# Queries that sqlsmith makes up of all relations, functions and operators that
# there are, by two roles who may little: no crash, and no internal error in
# which we had a part.
#
#   EVENTSTORE_FUZZ_SECONDS   how long (10; 300 where EVENTSTORE_SLOW is set)
#   EVENTSTORE_FUZZ_SEED      the seed of another run
#
# It knows functions of one value only; those of rows are called by fuzz.pl.
# PostgreSQL has internal errors of its own, for random OIDs above all; what counts
# is one that was raised in a file of ours, or called from a function of ours.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use POSIX ();
use PostgreSQL::Test::Utils;
use Test::More;

my $seconds = $ENV{EVENTSTORE_FUZZ_SECONDS} // ($ENV{EVENTSTORE_SLOW} ? 300 : 10);
my $seed    = $ENV{EVENTSTORE_FUZZ_SEED} // time ^ $$;
my @roles   = qw(reader writer);

plan(skip_all => 'sqlsmith is not here') if system('sqlsmith --version >/dev/null 2>&1') != 0;
diag("EVENTSTORE_FUZZ_SEED=$seed");

my $node = new_server('sqlsmith', settings => [
	'restart_after_crash = off',
	"log_line_prefix = '%m [%p] %q%u %e '",
	'log_error_verbosity = verbose',
	'log_min_error_statement = error',
	'eventstore.maintenance_interval = 100ms' ]);
$node->safe_psql('postgres', q{
	CREATE SCHEMA smith;
	SET search_path = smith, public;
	SELECT eventstore.create_collection('c', segment_size => 100), eventstore.create_collection('d');
	SELECT eventstore.create_store('kv'), eventstore.create_store('texts', 'text'), eventstore.create_store('blobs', 'bytes', 'bytes');
	SELECT eventstore.put('kv', 'k' || i, to_jsonb(i)), eventstore.put_text('texts', 'k' || i, 't') FROM generate_series(1, 20) i;
	SELECT count(*) FROM eventstore.append_batch('c', (SELECT jsonb_agg(jsonb_build_object('type', 'a', 'stream', 's' || i % 7)) FROM generate_series(1, 250) i));
	CREATE TABLE account (id int PRIMARY KEY, owner text, balance numeric);
	SELECT eventstore.capture('account', 'd');
	INSERT INTO account SELECT i, 'o' || i, i FROM generate_series(1, 10) i;
	SELECT eventstore.subscribe('s', 'c');
	CREATE ROLE reader LOGIN;
	CREATE ROLE writer LOGIN;
	GRANT USAGE ON SCHEMA smith TO reader, writer;
	GRANT SELECT ON ALL TABLES IN SCHEMA smith TO reader, writer;
	GRANT INSERT ON smith.c, smith.d TO writer;
	GRANT INSERT, UPDATE, DELETE ON smith.kv, smith.texts, smith.blobs, smith.account TO writer;
});

# sqlsmith asks for tables before it writes anything.
my @pids;
foreach my $number (1 .. @roles)
{
	my $role   = $roles[ $number - 1 ];
	my $target = $node->connstr('postgres') . " user=$role options='-c statement_timeout=1000 -c search_path=smith,public'";
	my $log    = "$PostgreSQL::Test::Utils::log_path/sqlsmith.$role.log";
	my $pid    = fork;

	if ($pid == 0)
	{
		open STDOUT, '>', $log;
		open STDERR, '>&', \*STDOUT;
		exec 'timeout', '--signal=INT', '--kill-after=10', $seconds, 'sqlsmith', '--verbose', "--seed=" . ($seed % 1_000_000 + $number), "--target=$target"
		  or POSIX::_exit(2);
	}
	push @pids, $pid;
}
waitpid $_, 0 foreach @pids;

# ---- what has become of it ------------------------------------------------------------

is($node->safe_psql('postgres', 'SELECT 1'), '1', 'the server lives');
cmp_ok($node->safe_psql('postgres', q{SELECT sum(xact_commit + xact_rollback) FROM pg_stat_database WHERE datname = 'postgres'}), '>', 100, 'queries were sent');

# The library knows its source files' names, for messages as these.
my $library = PostgreSQL::Test::Utils::slurp_file(qx(pg_config --pkglibdir) =~ s/\n//r . '/eventstore.so');
my %ours = map { $_ => 1 } $library =~ m{\bsrc/(?:\w+/)?(\w+\.c)\b}g;
cmp_ok(scalar keys %ours, '>', 50, 'source files of ours');

# An entry of the log: the message, and lines that begin with a tab or a word of their own.
my @found;
my %foreign;
foreach my $entry (split /^(?=.* (?:reader|writer) \w{5} (?:ERROR|FATAL|PANIC): )/m, PostgreSQL::Test::Utils::slurp_file($node->logfile))
{
	my ($message) = $entry =~ /^.* (?:reader|writer) (?:XX|58)\w{3} \w+: +(.*)/ or next;
	my ($file) = $entry =~ /LOCATION: +\w+, (\w+\.c):/;

	if ($message =~ /eventstore/ || $entry =~ /CONTEXT:.*eventstore/ || ($file && $ours{$file}))
	{
		push @found, substr($entry, 0, 4000);
	}
	else
	{
		$foreign{ $file // '?' }++;
	}
}
note("internal errors of PostgreSQL's own, by file: ", join(' ', map { "$_ $foreign{$_}" } sort keys %foreign));
is(join('', @found[ 0 .. ($#found < 4 ? $#found : 4) ]), '', 'no internal error of ours');
is_clean($node, "smith.$_") foreach qw(c d);
is($node->safe_psql('postgres', 'SELECT count(*) FROM eventstore.holders'), '0', 'nobody holds up readers any more');

$node->stop;
no_crash($node);
done_testing();
