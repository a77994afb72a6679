# A program that runs beside a test, is told a line and answers a line, and ends
# when its input ends: so it does not outlive the test, however that ends.
#
#   my $c = EventstoreTest::Kafka::Channel->new($program, @arguments);
#   my $answer = $c->ask('topic t 4');       # dies when the answer begins with "error"
#   my $answer = $c->try('topic t 4');       # returns it whatever it is
#   $c->tell($line);                         # what has no answer
package EventstoreTest::Kafka::Channel;

use strict;
use warnings;

use Carp;
use IO::Handle;
use IO::Select;
use IPC::Open3;
use PostgreSQL::Test::Utils;

sub new
{
	my ($class, @command) = @_;
	my ($in, $out);

	croak "there is no $command[0]: make test/kafka/" . ($command[0] =~ s/.*\///r) unless -x $command[0];
	my $pid = open3($in, $out, '>&STDERR', @command);
	$in->autoflush(1);
	return bless {
		pid      => $pid,
		in       => $in,
		out      => $out,
		select   => IO::Select->new($out),
		buffer   => '',
		command  => join(' ', @command),
		deadline => $PostgreSQL::Test::Utils::timeout_default,
	}, $class;
}

sub read_line
{
	my ($self) = @_;
	my $end = time + $self->{deadline};

	while (index($self->{buffer}, "\n") < 0)
	{
		croak "no answer from $self->{command}" if time > $end;
		# A signal, such as a child's end, makes it return early, with nothing.
		next unless $self->{select}->can_read(1);
		sysread($self->{out}, $self->{buffer}, 65536, length $self->{buffer})
		  or croak "$self->{command} has ended";
	}
	$self->{buffer} =~ s/^(.*?)\n//s;
	return $1;
}

sub tell
{
	my ($self, $line) = @_;
	local $SIG{PIPE} = 'IGNORE';

	print { $self->{in} } "$line\n";
	return;
}

sub try
{
	my ($self, $line) = @_;

	$self->tell($line);
	return $self->read_line;
}

sub ask
{
	my ($self, $line) = @_;
	my $answer = $self->try($line);

	croak "$line: $answer" if $answer =~ /^error/;
	return $answer;
}

# Its exit status, once it has seen the end of its input.
sub finish
{
	my ($self) = @_;

	return unless defined $self->{in};
	close $self->{in};
	$self->{in} = undef;
	waitpid $self->{pid}, 0;
	return $?;
}

# As a crash would.
sub kill_it
{
	my ($self) = @_;

	kill 'KILL', $self->{pid};
	return $self->finish;
}

sub DESTROY
{
	my ($self) = @_;
	local $?;

	$self->finish;
	return;
}

1;
