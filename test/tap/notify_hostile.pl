# Notifications where the owner of a collection means harm, or is careless: what
# he does to his own does not reach the others', and publishes no more than he
# may.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Session;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('notify_hostile');

sub sql { return $node->safe_psql('postgres', $_[0]) }

sql(q{
	CREATE ROLE mallory LOGIN;
	CREATE SCHEMA m AUTHORIZATION mallory;
	SET ROLE mallory;
	SELECT eventstore.create_collection('m.first'), eventstore.create_collection('m.second');
	RESET ROLE;
	SELECT eventstore.create_collection('good', notify => 'events');
	GRANT SELECT, INSERT ON good TO mallory;
});

my $owner    = EventstoreTest::Session->new($node, user => 'mallory');
my $listener = EventstoreTest::Session->new($node);
$listener->run("SELECT FROM eventstore.listen('$_')") for qw(m.first m.second good);

# The first payload of a channel that matches, '' where none comes in time.
sub heard
{
	my ($channel, $like) = @_;
	my $until = time + $PostgreSQL::Test::Utils::timeout_default;

	while (time < $until)
	{
		# psql tells of notifications behind the answer of a statement.
		foreach my $line (split /\n/, $listener->run('SELECT'))
		{
			next unless $line =~ /^Asynchronous notification "\Q$channel\E" with payload "(.*)" received/;
			my $payload = $1;
			return $payload if $payload =~ $like;
		}
		sleep 0.02;
	}
	return '';
}

sub append { return sql("SELECT position FROM eventstore.append('$_[0]', '" . ($_[1] // 'x') . "')") }

# ---- locks are not waited for ----------------------------------------------------------------

append('m.first');
isnt(heard('m.first', qr/"head": 1,/), '', 'notified');
my $other = EventstoreTest::Session->new($node, user => 'mallory');
$owner->run(q{SELECT eventstore.append('m.first', 'x')});
$other->run('BEGIN; LOCK TABLE m.first IN ACCESS EXCLUSIVE MODE');
for my $n (1 .. 3)
{
	append('good', "locked$n");
	like(heard('public.good', qr/"head": $n,/), qr/locked$n/, "a locked collection holds no other up, $n");
}
$other->run('COMMIT');

$other->run('BEGIN; LOCK TABLE m.second_1 IN ACCESS EXCLUSIVE MODE');
$owner->send(q{SELECT eventstore.append('m.second', 'x')});
for my $n (4 .. 6)
{
	append('good');
	isnt(heard('public.good', qr/"head": $n,/), '', "nor does a locked segment, $n");
}
$other->run('COMMIT');
$owner->receive;
isnt(heard('m.second', qr/"head": 1, "count": 1/), '', 'and it is told when it is free');

# ---- row-level security that comes after the choice --------------------------------------------

sql(q{ALTER TABLE good ENABLE ROW LEVEL SECURITY});
append('good', 'secret');
my $payload = heard('public.good', qr/"head": 7,/);
like($payload, qr/"count": 1\}$/, 'where row-level security was enabled later, the head alone is told');
unlike($payload, qr/secret/, 'and no event');
sql(q{ALTER TABLE good DISABLE ROW LEVEL SECURITY});
append('good', 'open');
like(heard('public.good', qr/"head": 8,/), qr/open/, 'until it is disabled again');

# ---- events of any size -------------------------------------------------------------------

sql(q{SELECT eventstore.append('good', 'huge', body => decode(repeat('00', 2000000), 'hex'))});
like(heard('public.good', qr/"head": 9,/), qr/"count": 1\}$/, 'a huge event is left out');
sql(q{SELECT eventstore.append('good', 'many', (SELECT jsonb_agg(1) FROM generate_series(1, 2000)))});
like(heard('public.good', qr/"head": 10,/), qr/"data": \[1, 1/, 'one that fits as text is not, however large its jsonb');

# ---- heartbeats are no storm ---------------------------------------------------------------

# One in 20 ms; how long it is that we hear them, the clock says.
my $began = time;
sql(q{SELECT eventstore.set_option('m.first', 'heartbeat', '1 us')});
append('m.first');
isnt(heard('m.first', qr/"count": 0/), '', 'a heartbeat');
my ($count, $until) = (0, time + 2);
while (time < $until || $count < 3 && time < $until + $PostgreSQL::Test::Utils::timeout_default)
{
	$count += () = $listener->run('SELECT') =~ /"count": 0/g;
	sleep 0.05;
}
cmp_ok($count, '<=', (time - $began) / 0.02 + 1, 'the fastest heartbeat is no storm');
cmp_ok($count, '>=', 3, 'and beats');

no_crash($node);
done_testing();
