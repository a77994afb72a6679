# Every SQL function with hostile values in every state of a transaction, at
# random, by several sessions at once, as a superuser and as one who may little:
# errors of a defined kind, no internal error, no crash, and nothing left behind.
#
# The values are those of sql/bad_input.sql, which tries them one by one.
#
#   EVENTSTORE_FUZZ_SECONDS   how long (10; 300 where EVENTSTORE_SLOW is set)
#   EVENTSTORE_FUZZ_SEED      the seed of another run
#
# What each session sent is kept in the log folder (fuzz.N.sql), the last
# statement at its end: who crashed the server is found there.  Each choice
# follows from the seed and the session's number, how they meet does not.
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
my @roles   = qw(postgres postgres someone someone);

# Internal errors, memory, and the operating system's.  (A key that no index can
# take is 54000, and its own fault.)
my $is_bug = qr/^(XX|53200|58)/;

diag("EVENTSTORE_FUZZ_SEED=$seed");

my $node = new_server('fuzz', settings => [
	'max_prepared_transactions = 10',
	'max_worker_processes = 16',
	'restart_after_crash = off',
	'eventstore.maintenance_interval = 100ms' ]);
my $superuser = $node->safe_psql('postgres', 'SELECT current_user');

# ---- what there is ------------------------------------------------------------------

my $values = PostgreSQL::Test::Utils::slurp_file("$FindBin::RealBin/../../sql/bad_input.sql");
$values =~ s/^-- The outcome of a call.*//ms or BAIL_OUT('sql/bad_input.sql has changed its shape');
$node->safe_psql('postgres', $values);
$node->safe_psql('postgres', q{
	CREATE ROLE someone LOGIN;
	GRANT USAGE, CREATE ON SCHEMA bad TO someone;
	GRANT SELECT, INSERT ON bad.c, bad.kv TO someone;
	GRANT SELECT ON bad.bad_values, bad.good_values, bad.arguments TO someone;
	CREATE TABLE bad.hit (i int PRIMARY KEY, note text);
	INSERT INTO bad.hit VALUES (1), (2), (3);
	GRANT ALL ON bad.hit TO someone;
});

my %arguments;    # function's oid => [ {name, type, required}, … ]
my %name_of;
foreach my $row (positions($node, q{SELECT a.oid, p.proname, p.prokind, a.name, a.type, a.required FROM bad.arguments a JOIN pg_proc p USING (oid) ORDER BY a.oid, a.n}))
{
	my ($oid, $function, $kind, $name, $type, $required) = split /\|/, $row;

	$name_of{$oid} = [ $function, $kind ];
	push @{ $arguments{$oid} }, { name => $name, type => $type, required => $required eq 't' };
}
my @functions = sort { $a <=> $b } keys %arguments;

my (%bad, %large, %good);
foreach my $row (split /\x01/, $node->safe_psql('postgres', q{SELECT string_agg(type::text || E'\x02' || label || E'\x02' || value, E'\x01') FROM bad.bad_values}))
{
	my ($type, $label, $value) = split /\x02/, $row;

	push @{ ($label =~ /^(many|long|megabytes|same|deep)$/ ? \%large : \%bad)->{$type} }, $value;
}
foreach my $row (split /\x01/, $node->safe_psql('postgres', q{SELECT string_agg(argument || E'\x02' || value, E'\x01') FROM bad.good_values}))
{
	my ($argument, $value) = split /\x02/, $row;

	push @{ $good{$argument} }, $value;
}
cmp_ok(scalar @functions, '>', 60, 'functions to call');

# ---- what is asked --------------------------------------------------------------------

sub pick { return $_[ int rand @_ ]; }

sub value_of
{
	my ($argument) = @_;
	my ($name, $type) = @$argument{qw(name type)};

	return pick(@{ $good{$name} }) if $good{$name} && rand() < 0.6;
	return q('{"(x,,,,,,,,)"}') if $type eq 'eventstore.new_event[]' && rand() < 0.5;
	return pick(@{ $large{$type} }) if $large{$type} && rand() < 0.03;
	return pick(@{ $bad{$type} }) if $bad{$type};
	return pick('true', 'false', 'NULL') if $type eq 'boolean';
	return 'NULL';
}

# A call of any function; those that leave things behind for good only where it is undone.
sub call
{
	my ($undone) = @_;

	while (1)
	{
		my $oid = pick(@functions);
		my ($function, $kind) = @{ $name_of{$oid} };
		my @given = grep { $_->{required} || rand() < 0.4 } @{ $arguments{$oid} };

		next if !$undone && $function =~ /^(drop|clear|truncate|release|unsubscribe|set_option|delete)/;
		next if $kind eq 'p' && $undone;
		return ($kind eq 'p' ? 'CALL ' : '') . "eventstore.$function(" . join(', ', map { "$_->{name} => " . value_of($_) . "::$_->{type}" } @given) . ')';
	}
}

# One statement around a call.
sub statement
{
	my ($undone) = @_;
	my $call = call($undone);

	return $call if $call =~ /^CALL/;
	return pick(
		"SELECT * FROM $call", "SELECT * FROM $call",
		"SELECT $call",
		"SELECT * FROM $call LIMIT 1",
		"SELECT count(*) FROM generate_series(1, 3), LATERAL (SELECT * FROM $call OFFSET 0) f",
		"WITH w AS MATERIALIZED (SELECT * FROM $call) SELECT 1 FROM w, w v LIMIT 2",
		"UPDATE bad.hit SET note = (SELECT f::text FROM $call f LIMIT 1) WHERE i = 1",
		"EXPLAIN (ANALYZE, COSTS off) SELECT * FROM $call",
		"COPY (SELECT * FROM $call) TO STDOUT",
		"DO \$do\$ BEGIN PERFORM * FROM $call; EXCEPTION WHEN division_by_zero THEN NULL; END \$do\$",
		"DO \$do\$ BEGIN PERFORM * FROM $call; EXCEPTION WHEN OTHERS THEN PERFORM * FROM " . call(1) . "; END \$do\$",
		"DO \$do\$ DECLARE r record; BEGIN FOR r IN SELECT * FROM $call LOOP EXIT; END LOOP; END \$do\$",
		"SELECT $call, " . (call(1) =~ s/^CALL //r));
}

my @statements_between = (
	'SAVEPOINT s', 'ROLLBACK TO s', 'RELEASE s', 'SELECT 1/0',
	'SET LOCAL search_path = pg_catalog', 'SET LOCAL enable_indexscan = off', 'SET LOCAL work_mem = 64',
	'ALTER TABLE bad.c RENAME TO d', 'DROP TABLE bad.c CASCADE', 'LOCK TABLE bad.c IN SHARE MODE NOWAIT', 'TRUNCATE bad.c',
	"INSERT INTO bad.c (type) VALUES ('x')", "INSERT INTO bad.kv (key, value) VALUES ('z', '1')", 'DELETE FROM bad.kv', 'DISCARD TEMP',
	'CREATE TEMP TABLE hidden (i int) ON COMMIT DROP', 'DECLARE one CURSOR FOR SELECT * FROM bad.c', 'FETCH 2 FROM one', 'CLOSE one',
	'SET CONSTRAINTS ALL IMMEDIATE', 'SET ROLE someone', 'RESET ROLE', 'LISTEN x', 'DROP EXTENSION eventstore CASCADE');

# A transaction: statements, and how it ends.
sub transaction
{
	my ($number) = @_;
	my @sql = 'BEGIN' . pick('', '', ' READ ONLY', ' ISOLATION LEVEL REPEATABLE READ', ' ISOLATION LEVEL SERIALIZABLE', ' ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE');

	# A snapshot first: PostgreSQL itself does not survive a deferrable one (15: an
	# assertion in predicate.c) whose wait is cancelled in a subtransaction.
	push @sql, 'SELECT 1', 'SAVEPOINT s';
	for (1 .. 1 + int rand 5)
	{
		push @sql, pick(@statements_between) if rand() < 0.5;
		push @sql, statement(1);
		push @sql, 'DECLARE c' . scalar(@sql) . pick('', ' SCROLL', ' NO SCROLL') . ' CURSOR' . pick('', ' WITH HOLD') . ' FOR SELECT * FROM ' . (call(1) =~ s/^CALL //r),
		  pick('FETCH 3', 'MOVE BACKWARD 1', 'FETCH ALL', 'FETCH LAST') . ' FROM c' . scalar(@sql) if rand() < 0.2;
	}
	push @sql, pick('ROLLBACK', 'ROLLBACK', 'ROLLBACK', "PREPARE TRANSACTION 'fuzz $number'");
	push @sql, "ROLLBACK PREPARED 'fuzz $number'" if $sql[-1] =~ /^PREPARE/;
	return (@sql, 'ROLLBACK');
}

sub some_statements
{
	my ($number) = @_;
	my $kind = rand;

	return (pick('SET', 'RESET') eq 'RESET' ? 'RESET ALL' : pick('SET enable_seqscan = off', 'SET jit = off', 'SET row_security = off', "SET search_path = ''", 'SET plan_cache_mode = force_generic_plan', 'SET default_transaction_isolation = serializable'), settings()) if $kind < 0.03;
	return statement(0) if $kind < 0.4;
	return transaction($number);
}

# What waits is ended; psql's rollback on error is not wanted.
sub settings
{
	return 'SET statement_timeout = 400; SET lock_timeout = 200; SET client_min_messages = error; SET search_path = bad, public';
}

sub run_session
{
	my ($number, $role) = @_;
	my $end = time + $seconds;
	my $session = session($node, username => $role eq 'postgres' ? $superuser : $role, application_name => "fuzz $number");
	my $log = "$PostgreSQL::Test::Utils::log_path/fuzz.$number.sql";
	my $bugs = "$PostgreSQL::Test::Utils::log_path/fuzz.$number.bugs";
	my %states;

	srand($seed * 100 + $number);
	open my $sent, '>', $log or die "cannot open $log: $!";
	$sent->autoflush(1);
	$session->run(settings());
	while (time < $end)
	{
		foreach my $sql (some_statements($number))
		{
			print $sent "$sql;\n";
			my $state = $session->try($sql);

			$states{$state}++;
			PostgreSQL::Test::Utils::append_to_file($bugs, "$state $session->{message}\n\tin: $sql\n") if $state =~ $is_bug;
			return 1 if $state eq 'LOST';
			# Else most of a transaction would be passed over.
			$session->try('ROLLBACK TO s') if $state ne '00000' && rand() < 0.9;
		}
	}
	PostgreSQL::Test::Utils::append_to_file("$PostgreSQL::Test::Utils::log_path/fuzz.$number.states", join(' ', map { "$_ $states{$_}" } sort keys %states) . "\n");
	$session->quit;
	return 0;
}

my @pids;
foreach my $number (1 .. @roles)
{
	my $pid = fork;

	if ($pid == 0)
	{
		my $status = eval { run_session($number, $roles[ $number - 1 ]) };

		print STDERR $@ if $@;
		POSIX::_exit($status // 2);
	}
	push @pids, $pid;
}

# ---- what has become of it ------------------------------------------------------------

my $lost = 0;
foreach my $pid (@pids)
{
	waitpid $pid, 0;
	$lost++ if $? != 0;
}
is($lost, 0, 'no session was lost');
my @found = map { -e $_ ? PostgreSQL::Test::Utils::slurp_file($_) : () } map { "$PostgreSQL::Test::Utils::log_path/fuzz.$_.bugs" } 1 .. @roles;
is(join('', @found), '', 'no internal error');
note($_) foreach map { -e $_ ? PostgreSQL::Test::Utils::slurp_file($_) : () } map { "$PostgreSQL::Test::Utils::log_path/fuzz.$_.states" } 1 .. @roles;

is($node->safe_psql('postgres', 'SELECT count(*) FROM eventstore.holders'), '0', 'nobody holds up readers any more');
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE backend_type = 'client backend' AND locktype = 'advisory'"), '0', 'no lock is left');
is($node->safe_psql('postgres', 'SELECT count(*) FROM pg_prepared_xacts'), '0', 'no prepared transaction');
is($node->safe_psql('postgres', "SELECT count(*) FROM eventstore.collections c, LATERAL eventstore.verify(c.collection)"), '0', 'every collection is sound');

$node->stop;
no_crash($node);
done_testing();
