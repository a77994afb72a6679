# A psql that stays open: what a client is to the server, for tests that need
# several at a time.
#
# A statement is sent and its answer fetched separately, so that a session can
# be left waiting for a lock while another one goes on:
#
#   my $s = EventstoreTest::Session->new($node);
#   my $n = $s->run("SELECT 1");           # dies on an error
#   my $state = $s->try("SELECT 1/0");     # 22012; the text is in $s->{message}
#   $s->send("LOCK TABLE t"); ...; my $rows = $s->receive;
#
# An answer is the rows, joined by newlines, columns by "|".  A statement that
# was answered without an error has been committed, if it was not within a
# transaction block: psql prints nothing before the server said so.
#
# A server that goes away is no failure here: the state is then "LOST".  An error
# whose code psql does not tell is "?????".
package EventstoreTest::Session;

use strict;
use warnings;

use Carp;
use File::Spec;
use IO::Handle;
use IO::Select;
use IPC::Open3;
use PostgreSQL::Test::Utils;

my $error_mark = '==error==';
my $end_mark   = '==end==';

sub new
{
	my ($class, $node, %options) = @_;
	my $dbname = $options{dbname} // 'postgres';
	my $connstr = $node->connstr($dbname);
	my ($in, $out);

	foreach my $word (qw(user application_name options))
	{
		next unless defined $options{$word};
		$connstr .= " $word='$options{$word}'";
	}
	open my $null, '>', File::Spec->devnull or croak "cannot open the null device: $!";
	my $pid = open3($in, $out, '>&' . fileno($null),
		$node->installed_command('psql'), '-XAtq', '-d', $connstr, '-f', '-');
	close $null;
	$in->autoflush(1);

	my $self = bless {
		pid      => $pid,
		in       => $in,
		out      => $out,
		select   => IO::Select->new($out),
		buffer   => '',
		name     => $options{application_name} // $dbname,
		state    => '00000',
		message  => '',
		deadline => $options{timeout} // $PostgreSQL::Test::Utils::timeout_default,
	}, $class;
	$self->{backend_pid} = $self->run('SELECT pg_backend_pid()');
	return $self;
}

# Only sends.  The statement may be several; the state is that of the last.
sub send
{
	my ($self, $sql) = @_;
	local $SIG{PIPE} = 'IGNORE';

	$self->{sql} = $sql;
	print { $self->{in} } "$sql\n;\n"
	  . "\\echo $error_mark :ERROR :SQLSTATE\n"
	  . "\\echo :LAST_ERROR_MESSAGE\n"
	  . "\\echo $end_mark\n";
	return;
}

# A signal ends a select, too.
sub await_more
{
	my ($self) = @_;
	my $end = time + $self->{deadline};

	until ($self->{select}->can_read(1))
	{
		croak "$self->{name}: no answer to: $self->{sql}" if time > $end;
	}
	return;
}

sub read_line
{
	my ($self) = @_;

	while ((my $end = index($self->{buffer}, "\n")) < 0)
	{
		$self->await_more;
		return undef unless sysread($self->{out}, $self->{buffer}, 65536, length $self->{buffer});
	}
	$self->{buffer} =~ s/^(.*?)\n//s;
	return $1;
}

# Waits for the answer to what was sent; returns the rows.
sub receive
{
	my ($self) = @_;
	my (@rows, @message, $error);

	$self->{state}   = 'LOST';
	$self->{message} = '';
	while (defined(my $line = $self->read_line))
	{
		if (defined $error)
		{
			if ($line eq $end_mark)
			{
				$self->{state}   = $error ne '' ? $error : $self->is_there ? '?????' : 'LOST';
				$self->{message} = join "\n", @message if $error ne '00000';
				last;
			}
			push @message, $line;
		}
		elsif ($line =~ /^$error_mark \S+ (\S*)$/)
		{
			$error = $1;
		}
		elsif ($line ne '')
		{
			push @rows, $line;
		}
	}
	$self->{rows} = \@rows;
	return join "\n", @rows;
}

# An error without a code: the server is gone, or a COPY failed amid its rows, of which
# psql 17 and later keep nothing.
sub is_there
{
	my ($self) = @_;

	return $self->try('SELECT') ne 'LOST';
}

# Runs what may fail; returns the SQLSTATE, 00000 if it went well.
sub try
{
	my ($self, $sql) = @_;

	$self->send($sql);
	$self->receive;
	return $self->{state};
}

# Runs what must not fail; returns the rows.
sub run
{
	my ($self, $sql) = @_;

	$self->send($sql);
	my $rows = $self->receive;
	croak "$self->{name}: $self->{state} $self->{message}\nin: $sql"
	  if $self->{state} ne '00000';
	return $rows;
}

sub rows
{
	my ($self) = @_;
	return @{ $self->{rows} };
}

# Of the server process.
sub backend_pid
{
	my ($self) = @_;
	return $self->{backend_pid};
}

# True once the session waits for a heavyweight lock.
sub wait_until_blocked
{
	my ($self, $node) = @_;

	return $node->poll_query_until('postgres',
		    "SELECT wait_event_type IS NOT DISTINCT FROM 'Lock' FROM pg_stat_activity"
		  . " WHERE pid = $self->{backend_pid}");
}

sub quit
{
	my ($self) = @_;

	return unless defined $self->{in};
	close $self->{in};
	waitpid $self->{pid}, 0;
	$self->{in} = undef;
	return;
}

1;
