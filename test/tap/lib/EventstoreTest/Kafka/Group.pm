# Servers that share a consumer group.
#
#   my $kafka = kafka_broker();
#   start_servers('group', a => $kafka->address, b => $kafka->address);
#   query('a', "SELECT eventstore.create_source(...)") ...
#   await_assigned('a', 'source', 2);    # a test: it has so many partitions, and runs
#   caught_up('source', 'a', 'b');       # a test each
#   await_published('a', 'source');      # no test
#
# Each has the database postgres with a foreign server k.
package EventstoreTest::Kafka::Group;

use strict;
use warnings;

use Exporter 'import';

use EventstoreTest;
use EventstoreTest::Kafka;
use Test::More;

our @EXPORT = qw(%servers start_servers query await_assigned await_published caught_up);

# Name => PostgreSQL::Test::Cluster.
our %servers;

sub query
{
	my ($name, $sql) = @_;
	return $servers{$name}->safe_psql('postgres', $sql);
}

sub start_servers
{
	my ($test, %addresses) = @_;

	foreach my $name (sort keys %addresses)
	{
		$servers{$name} = server_beside($addresses{$name}, "${test}_$name");
	}
	return;
}

sub await_assigned
{
	my ($name, $source, $count) = @_;

	await_true($servers{$name},
		"SELECT count(*) = $count AND (SELECT state = 'running' FROM eventstore.sources WHERE name = '$source') FROM eventstore.source_partitions WHERE source = '$source' AND assigned");
	pass("$name has $count partitions of $source");
	return;
}

# The changelog topic has all changes of the source's store.
sub await_published
{
	my ($name, $source) = @_;

	await_true($servers{$name}, "SELECT changelog_lag = 0 AND changelog_state = 'running' FROM eventstore.sources WHERE name = '$source'");
	return;
}

sub caught_up
{
	my ($source, @names) = @_;

	source_caught_up($servers{$_}, $source, "$_ has caught up with $source") foreach @names;
	return;
}

1;
