# A session that listens: a psql that keeps the notifications it is given.
#
#   my $l = EventstoreTest::Listener->new($node);
#   my ($channel, $head) = $l->listen('orders');    # eventstore.listen
#   ... append ...
#   my @notes = $l->await_head('public.orders', 7); # those that came until one said 7 or more
#
# A note is {channel, payload, pid}, and what its payload says once decoded: {said}.
# psql fetches notifications together with the answer to a statement, so who
# waits for one asks for nothing, again and again.
package EventstoreTest::Listener;

use strict;
use warnings;

use Carp;
use EventstoreTest::Session;
use JSON::PP;
use Time::HiRes qw(time usleep);

our @ISA = ('EventstoreTest::Session');

my $json = JSON::PP->new->utf8;

sub new
{
	my ($class, @arguments) = @_;
	my $self = $class->SUPER::new(@arguments);

	$self->{notes} = [];
	return $self;
}

sub receive
{
	my ($self) = @_;
	my @rows;

	$self->SUPER::receive;
	foreach my $row ($self->rows)
	{
		if ($row =~ /^Asynchronous notification "(.*?)" with payload "(.*)" received from server process with PID (\d+)\.$/)
		{
			push @{ $self->{notes} }, { channel => $1, payload => $2, pid => $3, said => eval { $json->decode($2) } };
			next;
		}
		push @rows, $row;
	}
	$self->{rows} = \@rows;
	return join "\n", @rows;
}

sub listen
{
	my ($self, $collection) = @_;
	my $row = $self->run("SELECT channel, head FROM eventstore.listen('$collection')");

	return split /\|/, $row;
}

# What has come so far, and was not asked for yet.
sub notes
{
	my ($self) = @_;
	my @notes;

	$self->run('SELECT');
	@notes = @{ $self->{notes} };
	$self->{notes} = [];
	return @notes;
}

# Until a note passes the test; all that came until then.
sub await_note
{
	my ($self, $is_it, $what) = @_;
	my $deadline = time + $self->{deadline};
	my @notes;

	while (1)
	{
		my @new = $self->notes;

		push @notes, @new;
		return @notes if grep { $is_it->($_) } @new;
		croak "$self->{name}: no notification $what" if time > $deadline;
		usleep(1000);
	}
}

# The notes of this channel, up to the first that tells of this head.
sub await_head
{
	my ($self, $channel, $head) = @_;

	return grep { $_->{channel} eq $channel } $self->await_note(
		sub { $_[0]{channel} eq $channel && $_[0]{said} && $_[0]{said}{head} >= $head },
		"of head $head on $channel");
}

1;
