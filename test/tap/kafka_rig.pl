# The rig that the tests of Kafka stand on does what it says: the mock cluster,
# the real broker, the client, the proxy.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest::Kafka;
use Test::More;
use Time::HiRes qw(time);

# What was consumed, without what differs from run to run.
sub contents
{
	return map { [ @$_{qw(partition offset key value headers)} ] } @_;
}

sub values_of
{
	return join ' ', map { $_->{value} // 'null' } @_;
}

my @odd = (
	[ 'k', 'v', [ h => 'x', h => undef, '=' => '' ], { partition => 1, timestamp => 1_700_000_000_000 } ],
	[ undef, 'v',                      [], { partition => 1 } ],
	[ 'k',   undef,                    [], { partition => 1 } ],
	[ '',    '',                       [], { partition => 1 } ],
	[ undef, undef,                    [], { partition => 1 } ],
	[ "\0\t\n\\=\xff", "\\x41\xc3\xa4", [], { partition => 1 } ]);
my @same = map { [ 1, $_, @{ $odd[$_] }[ 0 .. 2 ] ] } 0 .. $#odd;

# ---- the mock ----------------------------------------------------------------------

my $mock = kafka_mock(brokers => 2);
$mock->create_topic('t', 4);
is($mock->partitions('t'), 4, 'mock: partitions as asked');
$mock->produce('t', @odd);
my @all = $mock->consume('t');
is_deeply([ contents(@all) ], \@same, 'mock: records come back as they were given');
is($all[0]{timestamp}, 1_700_000_000_000, 'mock: with their time');
is_deeply([ contents($mock->consume('t', { partition => 1, from => 4 })) ], [ @same[ 4, 5 ] ], 'mock: from an offset');
is_deeply([ $mock->watermarks('t') ], [ [ 0, 0 ], [ 0, 6 ], [ 0, 0 ], [ 0, 0 ] ], 'mock: first and last offsets');

$mock->produce_many('t', 1000, keys => 50, tombstones => 10, first => 7);
my %last;
$last{ $_->{key} } = $_->{value} foreach grep { ($_->{key} // '') =~ /^key-/ } $mock->consume('t');
my %formula;
$formula{ sprintf 'key-%08d', (31 * $_ * $_ + 17 * $_) % 1000003 % 50 } = $_ % 10 == 9 ? undef : $_ foreach 7 .. 1006;
is_deeply({ map { $_ => defined $last{$_} ? $last{$_} =~ s/^\{"i": (\d+), "pad": "x+"\}$/$1/r : undef } keys %last },
	\%formula, 'generated records are those of the formula');
is(length((grep { defined } values %last)[0]), 100, 'and of the size');

$mock->down;
like($mock->produce('t', [ 'k', 'v' ], { fails => 1, limit => 1 }), qr/_TIMED_OUT/, 'mock: down');
$mock->up;
is($mock->produce('t', [ 'k', 'v' ], { fails => 1 }), '', 'mock: up again');
$mock->inject('Produce', 1, 'TOPIC_AUTHORIZATION_FAILED');
like($mock->produce('t', [ 'k', 'v' ], { fails => 1 }), qr/TOPIC_AUTHORIZATION_FAILED/, 'mock: an error that was asked for');
is($mock->produce('t', [ 'k', 'v' ], { fails => 1 }), '', 'mock: once');
$mock->tell_it('leader', 't', 0, 2);
like(join("\n", $mock->run('', 'describe', 't')), qr/^partition 0 leader 2$/m, 'mock: a partition has moved');
like($mock->{channel}->try('nonsense'), qr/^error no such command: nonsense/, 'mock: what it does not know');
is($mock->stop >> 8, 2, 'and it ends at that');

# ---- the real one ------------------------------------------------------------------

my $began = time;
my $kafka = kafka_broker();
note(sprintf 'started in %.1f s', time - $began);
$kafka->create_topic('t', 2);
$kafka->produce('t', @odd);
is_deeply([ contents($kafka->consume('t')) ], \@same, 'records come back as they were given');
is_deeply([ $kafka->group_lag('g', 't') ],
	[ { committed => undef, end => 0, lag => 0 }, { committed => undef, end => 6, lag => 6 } ], 'the lag of a group');

# Ways in.
is($kafka->produce('t', [ 'k', $_ ], { via => $_, fails => 1 }), '', "admin comes in by $_") foreach qw(scram plain tls);
like($kafka->produce('t', [ 'k', 'v' ], { via => $_, properties => { 'sasl.password' => 'wrong' }, fails => 1 }),
	qr/_AUTHENTICATION/, "$_: not with a wrong password") foreach qw(scram plain);
my %inline = $kafka->inline_properties('tls');
is($kafka->produce('t', [ 'k', 'v' ], { properties => \%inline, fails => 1 }), '', 'a certificate that is no file');
delete @inline{qw(ssl.certificate.pem ssl.key.pem)};
like($kafka->produce('t', [ 'k', 'v' ], { properties => \%inline, limit => 2, fails => 1 }),
	qr/_SSL|_TIMED_OUT/, 'tls: not without a certificate');
foreach my $way ('scram alice', 'tls alice')
{
	$kafka->create_topic($way =~ s/ .*//r);
	my @call = ($way =~ s/ .*//r, [ 'k', 'v' ], { via => $way, fails => 1 });

	like($kafka->produce(@call), qr/TOPIC_AUTHORIZATION_FAILED/, "$way may not write");
	$kafka->allow('alice', 'write', 'topic', $call[0]);
	is($kafka->produce(@call), '', "$way may, once she is allowed to");
}

# Transactions.
$kafka->create_topic('x');
my $producer = $kafka->producer('x', { properties => { 'transactional.id' => 'one' } });
$producer->send([ 'k', 'kept' ]);
$producer->commit;
$producer->send([ 'k', 'gone' ]);
$producer->abort;
$producer->send([ 'k', 'open' ]);
$producer->flush;
is(values_of($kafka->consume('x')), 'kept', 'committed records only');
is(values_of($kafka->consume('x', { uncommitted => 1 })), 'kept gone open', 'or all of them');
$producer->kill_it;
is(values_of($kafka->consume('x')), 'kept', 'what a crash left open is not committed');
$producer = $kafka->producer('x', { properties => { 'transactional.id' => 'one' } });
$producer->send([ 'k', 'next' ]);
$producer->commit;
$producer->finish;
my @kept = $kafka->consume('x');
is(values_of(@kept), 'kept next', 'its successor goes on');
is_deeply([ map { $_->{offset} } @kept ], [ 0, 6 ], 'past the offsets of the others and of the markers');

# Topics.
$kafka->delete_records('t', 1, 4);
is(($kafka->consume('t', { partition => 1 }))[0]{offset}, 4, 'records are deleted');
like($kafka->consume('t', { partition => 1, from => 1, fails => 1 }), qr/_AUTO_OFFSET_RESET/, 'and out of range');
$kafka->add_partitions('t', 5);
$kafka->produce('t', [ 'k', 'v', [], { partition => 4 } ]);
is(scalar($kafka->watermarks('t')), 5, 'there are more partitions');
$kafka->delete_topic('t');
$kafka->create_topic('t', 1, 'retention.ms' => 1000);
is_deeply([ $kafka->watermarks('t') ], [ [ 0, 0 ] ], 'a topic made anew is empty');
$kafka->create_topic('compact', 1, 'cleanup.policy' => 'compact', 'segment.ms' => 100, 'min.cleanable.dirty.ratio' => 0.001,
	'max.compaction.lag.ms' => 100, 'delete.retention.ms' => 100);
$kafka->produce('compact', map { [ 'k', $_ ] } 1 .. 10);
$kafka->await('the topic is compacted', sub {
	$kafka->produce('compact', [ 'other', 'v' ]);
	return (grep { $_->{key} eq 'k' } $kafka->consume('compact')) == 1;
});
pass('compaction');

# A crash.
$kafka->kill;
like($kafka->produce('x', [ 'k', 'v' ], { fails => 1, limit => 1 }), qr/_TIMED_OUT/, 'nobody answers when it has crashed');
$began = time;
$kafka->start;
note(sprintf 'started again in %.1f s', time - $began);
is(values_of($kafka->consume('x')), 'kept next', 'and afterwards all is there');

# ---- the proxy ---------------------------------------------------------------------

my $proxy = $kafka->proxy;
sub through
{
	my (%options) = @_;
	return $kafka->produce('x', [ 'k', 'v' ], { via => 'proxied', fails => 1, %options });
}

is(through(), '', 'through the proxy');
my (undef, $connections) = split / /, $proxy->ask('count');
cmp_ok($connections, '>', 0, 'which has seen it');
$proxy->ask('hole');
like(through(limit => 2), qr/_TIMED_OUT/, 'a black hole');
$proxy->ask('pass');
is(through(), '', 'and out of it');
$proxy->ask('delay 300');
$began = time;
is(through(), '', 'slowly');
cmp_ok(time - $began, '>', 1.2, 'two answers at least took their time');
$proxy->ask('refuse');
like(through(limit => 1), qr/_TIMED_OUT/, 'refused');
$proxy->ask('pass');
my $cut = $kafka->producer('x', { via => 'proxied', properties => { 'reconnect.backoff.max.ms' => 200 } });
$cut->send([ 'k', 'v' ]);
$cut->flush;
$proxy->ask('cut');
$cut->send([ 'k', 'v' ]);
is($cut->flush, 'ok', 'a client whose connection was cut comes back');
$cut->finish;

# ---- the next major version, beside the first ----------------------------------------------

$began = time;
my $four = kafka_broker(version => '4.1.2', properties => 'message.max.bytes=2000');
note(sprintf 'version 4 started in %.1f s', time - $began);
isnt($four->address, $kafka->address, 'two at a time');
$four->create_topic('t');
is($four->produce('t', [ 'k', $_ ], { via => $_, fails => 1 }), '', "4.1: admin comes in by $_") foreach qw(plain tls);
is(values_of($four->consume('t')), 'plain tls', '4.1: records come back');
like($four->produce('t', [ 'k', 'x' x 3000 ], { fails => 1 }), qr/MSG_SIZE_TOO_LARGE/, '4.1: a property of its own');

done_testing();
