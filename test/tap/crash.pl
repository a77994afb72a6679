# Nothing acknowledged is lost in a crash, no position comes twice, and a
# reader goes on from its cursor without skipping.
#
# Clients append and read while the server is killed under them, in each way in
# which it can die.  What they were told is in their own records, outside of
# the server: the events whose commit was acknowledged, and every position that
# anybody has seen, even one of a transaction that came to nothing.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Load;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $node = new_server('crash',
	settings => [ 'restart_after_crash = on', 'eventstore.tick_delay = 20ms' ]);

$node->safe_psql('postgres', q{
	SELECT eventstore.create_collection('a', segment_size => 3000);
	SELECT eventstore.create_collection('b');
});

my @collections = ('a', 'b');
my $load = EventstoreTest::Load->new($node,
	collections => \@collections, seed => 1, async => 0.2, pause => 0.002);

# Each line of readers: kind, collection, and the numbers of those in the line.
my @lines = (
	{ kind => 'committed', collection => 'a' },
	{ kind => 'pages',     collection => 'a' },
	{ kind => 'committed', collection => 'b' },
	{ kind => 'tagged',    collection => 'b' });

sub start_readers
{
	foreach my $line (@lines)
	{
		my @cursors = map { $load->positions_of('cursor', $line->{collection}, $_) } @{ $line->{numbers} // [] };

		$load->start_reader($line->{kind}, $line->{collection}, after => $cursors[-1] // 0);
		push @{ $line->{numbers} }, $load->{workers};
	}
	return;
}

sub await_progress
{
	my ($more) = @_;
	my $before = () = $load->lines('kept');
	my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;

	while ((() = $load->lines('kept')) < $before + $more)
	{
		BAIL_OUT('the writers stand still') if time > $deadline;
		usleep(20_000);
	}
	return;
}

# A session in the middle of an append, so far as one can be caught.
sub kill_appender
{
	my $killed = 0;

	while (!$killed)
	{
		my ($pid) = positions($node, 'SELECT pid FROM eventstore.holders ORDER BY since LIMIT 1');
		$killed = kill 9, $pid if $pid;
	}
	return;
}

sub kill_worker
{
	my ($pid) = positions($node, "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'eventstore worker%'");

	kill 9, $pid or BAIL_OUT('there is no worker');
	return;
}

# The postmaster's children go when they notice; until then it cannot start.
sub start_again
{
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return if $node->start(fail_ok => 1);
		usleep(100_000);
		$node->stop('fast', fail_ok => 1);
	}
	BAIL_OUT('the server did not start again');
}

my @crashes = (
	{ name => 'kill -9 of a session that appends', by => \&kill_appender },
	{ name => 'kill -9 of the postmaster', by => sub { $node->kill9; start_again() } },
	{ name => 'immediate shutdown', by => sub { $node->stop('immediate'); $node->start } },
	{ name => 'kill -9 of the worker', by => \&kill_worker });

foreach my $crash (@crashes)
{
	my $name = $crash->{name};

	$load->start_writer for 1 .. 6;
	start_readers();
	await_progress(1000);
	$crash->{by}->();
	$load->wait_for_all;
	await_up($node);

	foreach my $collection (@collections)
	{
		my @seen = $load->positions_of('seen', $collection);
		my @kept = $load->positions_of('kept', $collection);
		my %seen;
		my ($highest) = sort { $b <=> $a } @seen;
		my %present = map { $_ => 1 } positions($node, "SELECT position FROM $collection");

		is(scalar(grep { !$present{$_} } @kept), 0, "$name: all of " . @kept . " acknowledged events of $collection are there");
		is(scalar(grep { $seen{$_}++ } @seen), 0, "$name: no position of $collection was given out twice");
		is(scalar(grep { $present{$_} } $load->positions_of('gone', $collection)), 0, "$name: nothing that was rolled back is in $collection");
		cmp_ok($node->safe_psql('postgres', "SELECT position FROM eventstore.append('$collection', 'after crash', tags => '{color:red}')"),
			'>', $highest, "$name: the next position of $collection is beyond all that were seen");
		is_clean($node, $collection, "$name: $collection is consistent");
	}
}

# The readers go on to the end.
$load->start_writer(500) for 1 .. 2;
start_readers();
is($load->finish, 0, 'all clients came to their end');
is(join("\n", $load->lines('error')), '', 'no client met an error that it should not');
foreach my $line (@lines)
{
	my ($kind, $collection) = @$line{qw(kind collection)};
	my $where = $kind eq 'tagged' ? "WHERE tags @> '{color:red}'" : '';
	my @read = map { $load->positions_of('read', $collection, $_) } @{ $line->{numbers} };
	my %read = map { $_ => 1 } @read;
	my @present = positions($node, "SELECT position FROM $collection $where");

	is(scalar(grep { !$read{$_} } @present), 0, "reader $kind of $collection skipped none of " . @present);
	is(scalar(@read), scalar(keys %read), "reader $kind of $collection had none twice");
}

$node->stop;
no_crash($node);
done_testing();
