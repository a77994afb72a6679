# The mock cluster of librdkafka, as a process of its own (test/kafka/mock_broker.c,
# whose head says what it can and cannot do).
#
#   my $mock = kafka_mock(brokers => 3);
#   $mock->down(1);  $mock->up(1);
#   $mock->inject('Produce', 3, 'NOT_LEADER_FOR_PARTITION');
#   $mock->tell_it('leader', 't', 0, 2);        # any of its commands
package EventstoreTest::Kafka::Mock;

use strict;
use warnings;

use EventstoreTest::Kafka::Channel;
use EventstoreTest::Kafka::Client;

our @ISA = ('EventstoreTest::Kafka::Client');

sub new
{
	my ($class, %options) = @_;
	my $channel = EventstoreTest::Kafka::Channel->new(
		EventstoreTest::Kafka::Client::program('mock_broker'), $options{brokers} // 1);

	return bless { channel => $channel, address => $channel->read_line }, $class;
}

sub address
{
	my ($self) = @_;
	return $self->{address};
}

sub tell_it
{
	my ($self, @words) = @_;
	return $self->{channel}->ask(join ' ', @words);
}

# It has no configuration of topics.
sub create_topic
{
	my ($self, $topic, $partitions) = @_;

	$self->tell_it('topic', $topic, $partitions // 1);
	return;
}

# Of all brokers where none is named.
sub brokers_of
{
	my ($self, @brokers) = @_;
	return @brokers ? @brokers : (1 .. scalar split /,/, $self->{address});
}

sub down
{
	my ($self, @brokers) = @_;

	$self->tell_it('down', $_) foreach $self->brokers_of(@brokers);
	return;
}

sub up
{
	my ($self, @brokers) = @_;

	$self->tell_it('up', $_) foreach $self->brokers_of(@brokers);
	return;
}

# The next so many requests of that kind fail.
sub inject
{
	my ($self, $api, $count, $error) = @_;

	$self->tell_it('error', $api, $count, $error);
	return;
}

sub stop
{
	my ($self) = @_;
	return $self->{channel}->finish;
}

1;
