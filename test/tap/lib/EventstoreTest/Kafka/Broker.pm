# A real Kafka (test/kafka/broker, whose head says how it is set up).
#
#   my $kafka = kafka_broker(version => '4.1.2', properties => "a=b\nc=d", heap => '512m');
#   $kafka->kill;  $kafka->start;               # a crash, and the same data again
#   $kafka->stop;
#   $kafka->allow('alice', 'read', 'topic', 't');
#
# The ways in, for {via => …} and for properties(…): plaintext, where one may do
# anything; sasl (also scram; plain), tls, both as admin, and as alice with
# properties('tls', 'alice'); proxied, through the proxy, which says when:
#
#   my $proxy = $kafka->proxy;                  # test/kafka/proxy
#   $proxy->ask('cut');
package EventstoreTest::Kafka::Broker;

use strict;
use warnings;

use Carp;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

use EventstoreTest::Kafka::Channel;
use EventstoreTest::Kafka::Client;

our @ISA = ('EventstoreTest::Kafka::Client');

my %mechanisms = (sasl => 'SCRAM-SHA-256', scram => 'SCRAM-SHA-256', plain => 'PLAIN');
my @running;

sub new
{
	my ($class, %options) = @_;
	my $self = bless { dir => PostgreSQL::Test::Utils::tempdir(), options => \%options }, $class;

	$self->start;
	foreach my $line (split /\n/, PostgreSQL::Test::Utils::slurp_file("$self->{dir}/ports"))
	{
		my ($name, $port) = split /=/, $line;
		$self->{ports}{$name} = $port;
	}
	return $self;
}

# To the broker's script; what goes wrong there ends the test.
sub call
{
	my ($self, $command) = @_;
	my %options = %{ $self->{options} };
	my ($output, $problem) = ('', '');

	local $ENV{KAFKA_VERSION}    = $options{version}    if $options{version};
	local $ENV{KAFKA_HEAP}       = $options{heap}       if $options{heap};
	local $ENV{KAFKA_PROPERTIES} = $options{properties} if $options{properties};
	my @call = (EventstoreTest::Kafka::Client::program('broker'), $command, $self->{dir});
	return $output if IPC::Run::run(\@call, '<', \undef, '>', \$output, '2>', \$problem);
	BAIL_OUT("there is no Kafka for this test: $problem") if $command eq 'start';
	croak "$command: $problem";
}

sub start
{
	my ($self) = @_;

	push @running, $self unless grep { $_ == $self } @running;
	$self->call('start');
	return;
}

sub stop
{
	my ($self) = @_;

	$self->call('stop');
	@running = grep { $_ != $self } @running;
	return;
}

# As a crash would.
sub kill
{
	my ($self) = @_;

	$self->call('kill');
	@running = grep { $_ != $self } @running;
	return;
}

sub restart
{
	my ($self) = @_;

	$self->stop;
	$self->start;
	return;
}

# The address of a way in.
sub address
{
	my ($self, $way) = @_;
	my %port_of = (scram => 'sasl', plain => 'sasl', proxied => 'behind');

	$way //= 'plaintext';
	return '127.0.0.1:' . $self->{ports}{ $port_of{$way} // $way };
}

# librdkafka's properties for a way in, files by their names.
sub properties
{
	my ($self, $way, $user) = @_;
	my $tls = "$self->{dir}/tls";
	my %properties = ('bootstrap.servers' => $self->address($way));

	$user //= 'admin';
	if ($mechanisms{$way})
	{
		%properties = (
			%properties,
			'security.protocol' => 'SASL_SSL',
			'sasl.mechanisms'   => $mechanisms{$way},
			'sasl.username'     => $user,
			'sasl.password'     => "$user-secret",
			'ssl.ca.location'   => "$tls/ca.pem");
	}
	elsif ($way eq 'tls')
	{
		%properties = (
			%properties,
			'security.protocol'        => 'SSL',
			'ssl.ca.location'          => "$tls/ca.pem",
			'ssl.certificate.location' => "$tls/$user.pem",
			'ssl.key.location'         => "$tls/$user.key");
	}
	return %properties;
}

# The same with the contents of the files: ssl.ca.pem, ssl.certificate.pem, ssl.key.pem.
sub inline_properties
{
	my ($self, $way, $user) = @_;
	my %properties = $self->properties($way, $user);

	foreach my $name (grep { /\.location$/ } keys %properties)
	{
		$properties{ $name =~ s/location$/pem/r } = PostgreSQL::Test::Utils::slurp_file(delete $properties{$name});
	}
	return %properties;
}

# 'tls', or 'tls alice'.
sub way_in
{
	my ($self, $way) = @_;
	return $self->properties(split / /, $way);
}

sub allow
{
	my ($self, $user, $operation, $kind, $name) = @_;

	$self->run('', 'allow', "User:$user", $operation, $kind, $name);
	return;
}

# In front of the port "behind"; there may be one at a time.
sub proxy
{
	my ($self) = @_;
	my $proxy = EventstoreTest::Kafka::Channel->new(
		EventstoreTest::Kafka::Client::program('proxy'),
		$self->{ports}{proxy}, $self->{ports}{behind});

	$proxy->read_line;
	return $proxy;
}

# What it had to complain of, for who has to find out why a test failed.
sub complain
{
	my ($self) = @_;
	my $log = "$self->{dir}/broker.log";
	my @lines = grep { / (ERROR|FATAL) / } split /\n/, -f $log ? PostgreSQL::Test::Utils::slurp_file($log) : '';

	diag("Kafka: $_") foreach @lines > 3 ? @lines[ -3 .. -1 ] : @lines;
	return;
}

# Not stop: nothing of it is needed any more.
END
{
	my $status = $?;

	foreach my $broker (@running)
	{
		$broker->complain if $status != 0 || !Test::More->builder->is_passing;
		$broker->call('kill');
	}
	$? = $status;
}

1;
