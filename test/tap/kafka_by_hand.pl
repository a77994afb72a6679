# Partitions that two servers take by hand: nothing fences one of them, but who
# publishes to a partition of the changelog topic that another one publishes to as
# well says so.  Against the mock cluster.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use EventstoreTest::Kafka::Group;
use PostgreSQL::Test::Utils;
use Test::More;

my $mock = kafka_mock();

start_servers('by_hand', a => $mock->address, b => $mock->address);

# Who comes next finds what it has published, and publishes none of that.
sub create
{
	my ($name, $source, $more) = @_;

	query($name, "SELECT eventstore.create_store('$source', 'text')");
	query($name, "SELECT eventstore.create_source('$source', 'k', '$source', '$source', changelog_topic => '$source-changelog', consumer_properties => '{\"fetch.wait.max.ms\": 5}', $more)");
	caught_up($source, $name);
	await_published($name, $source);
	return;
}

# Another value each time, or there is nothing to publish.
my $puts = 0;

sub put
{
	my ($name, $source, $key) = @_;

	$puts++;
	query($name, "SELECT eventstore.put_text('$source', '$key', '$name$puts')");
	await_published($name, $source);
	return;
}

sub said
{
	my ($name, $source) = @_;
	return query($name, "SELECT COALESCE(changelog_message, '') FROM eventstore.sources WHERE name = '$source'");
}

sub doctor
{
	my ($name, $source) = @_;
	return query($name, "SELECT ok FROM eventstore.doctor() WHERE item = 'source $source: changelog topic without another writer'");
}

# ---- each has its own ------------------------------------------------------------------

foreach my $source ('half', 'same')
{
	$mock->create_topic($source, 2);
	$mock->create_topic("$source-changelog", 2);
	$mock->produce($source, map { [ "p$_", 'v', [], { partition => $_ } ] } 0, 1);
}
create('a', 'half', "partitions => '{0}', replica_partitions => '{1}'");
create('b', 'half', "partitions => '{1}', replica_partitions => '{0}'");
my %owner;
foreach my $key (map { "k$_" } 1 .. 6)
{
	my ($owner) = grep { sqlstate_of($servers{$_}, "SELECT eventstore.put_text('half', '$key', '1')") eq '00000' } 'a', 'b';
	$owner{$owner} = $key;
}
is(join(' ', sort keys %owner), 'a b', 'each has keys of its own');
foreach my $name ('a', 'b', 'a', 'b')
{
	put($name, 'half', $owner{$name});
}
is(join(' ', map { said($_, 'half') . doctor($_, 'half') } 'a', 'b'), 't t', 'who publish each to its own partitions have nothing to say');

# ---- both have all -------------------------------------------------------------------------

create($_, 'same', "partitions => '{0, 1}'") foreach 'a', 'b';
put('a', 'same', 'k');
put('b', 'same', 'k');
is(said('a', 'same'), '', 'what others write is seen');
put('a', 'same', 'k');
like(said('a', 'same'), qr/^somebody else writes to partition \d of the changelog topic: the record at offset \d+ is not of this server$/, 'when one writes again');
is(doctor('a', 'same'), 'f', 'the doctor knows');
is(doctor('a', 'half'), 't', 'whose it is');
like(slurp_file($servers{a}->logfile), qr/WARNING:  source "same": somebody else writes to partition/, 'so does the log');
put('b', 'same', 'k');
like(said('b', 'same'), qr/^somebody else/, 'and the other one');
is(query('a', "SELECT left(value, 1) FROM same WHERE key = 'k'") . query('b', "SELECT left(value, 1) FROM same WHERE key = 'k'"), 'ab', 'each store is as its own server was told');

query('b', "SELECT eventstore.drop_source('same')");
query('a', "SELECT eventstore.resume('same')");
await_true($servers{a}, "SELECT changelog_message IS NULL FROM eventstore.sources WHERE name = 'same'");
put('a', 'same', 'k');
put('a', 'same', 'k2');
# The first one after the other's last is the last that finds it.
query('a', "SELECT eventstore.resume('same')");
await_true($servers{a}, "SELECT changelog_message IS NULL FROM eventstore.sources WHERE name = 'same'");
put('a', 'same', 'k');
put('a', 'same', 'k2');
is(said('a', 'same') . doctor('a', 'same'), 't', 'alone again, it has nothing to say');

no_crash($_) foreach values %servers;
$_->stop foreach values %servers;
done_testing();
