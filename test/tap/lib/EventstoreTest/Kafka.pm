# Kafka beside the servers of a TAP test.
#
#   use EventstoreTest::Kafka;
#
#   my $mock = kafka_mock(brokers => 3);        # in no time, with no Java; see Kafka/Mock.pm
#   my $kafka = kafka_broker();                 # the real one, some seconds; see Kafka/Broker.pm
#
#   my $node = server_beside($kafka->address, 'name', 'more = settings');    # with a foreign server k
#
#   $kafka->address                             # for bootstrap.servers
#   $kafka->create_topic('t', 4, 'cleanup.policy' => 'compact')
#   $kafka->produce('t', ['k', 'v'], ['k', undef], [undef, 'v'], ['k', 'v', [h => 'x'], { partition => 1 }]);
#   $kafka->produce_many('t', 500_000, keys => 1000, tombstones => 10);
#   $kafka->consume('t')                        # {partition, offset, timestamp, key, value, headers}, …
#   source_caught_up($node, 's');               # a test: it has written what its topic had
#   await_recorded($node, 'kv');                # all that was restored is in the store's changelog
#
# What both can do is in Kafka/Client.pm.  All of them end with the test; only
# processes that the test has started are ended.  What a machine lacks for them
# makes the test fail, never pass it over.
package EventstoreTest::Kafka;

use strict;
use warnings;

use Exporter 'import';

use EventstoreTest;
use EventstoreTest::Kafka::Broker;
use EventstoreTest::Kafka::Mock;
use Test::More;

our @EXPORT = qw(kafka_mock kafka_broker server_beside source_caught_up await_recorded);

sub kafka_mock
{
	return EventstoreTest::Kafka::Mock->new(@_);
}

sub kafka_broker
{
	return EventstoreTest::Kafka::Broker->new(@_);
}

# It sees to its workers five times a second.
sub server_beside
{
	my ($address, $name, @settings) = @_;
	my $node = new_server($name, settings => [ 'max_worker_processes = 24', 'eventstore.maintenance_interval = 200ms', @settings ]);

	$node->safe_psql('postgres', qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address')));
	return $node;
}

# More time than a busy machine needs.
sub source_caught_up
{
	my ($node, $source, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($node->safe_psql('postgres', "SELECT eventstore.wait_for_source('$source', '2 min')"), 't', $what // "$source has caught up");
	return;
}

sub await_recorded
{
	my ($node, $store) = @_;

	await_true($node, "SELECT backlog IS NULL FROM eventstore.store_catalog WHERE store = '$store'::regclass");
	return;
}

1;
