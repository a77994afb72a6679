# What a test asks of a Kafka, mock or real, by test/kafka/client.
#
# A record to produce is [key, value, [name => value, …], {partition, timestamp}];
# key, value and a header's value are bytes, or undef for null.
#
# The last argument of most methods may be a hash: {properties => {…}} are
# librdkafka's own for this one call, {via => 'sasl'} is the way in (Broker.pm),
# {fails => 1} returns what went wrong, or '', where else the test would end.
package EventstoreTest::Kafka::Client;

use strict;
use warnings;

use Carp;
use File::Basename;
use IPC::Run;
use Test::More;

use EventstoreTest::Kafka::Channel;

# Beside test/tap, wherever the tests have been copied to.
my $folder = dirname(__FILE__) . '/../../../../kafka';

sub program
{
	my ($name) = @_;
	return "$folder/$name";
}

# ---- how it is called --------------------------------------------------------------

# Hash to the arguments that all commands take.
sub options_of
{
	my ($self, $options) = @_;
	my %properties = ($self->way_in($options->{via} // 'plaintext'), %{ $options->{properties} // {} });
	my @limit = defined $options->{limit} ? ('-t', $options->{limit}) : ();

	return (@limit, map { ('-X', "$_=$properties{$_}") } sort keys %properties);
}

sub way_in
{
	my ($self) = @_;
	return ('bootstrap.servers' => $self->address);
}

# run($input, @command, {options}): the lines of its output.
sub run
{
	my ($self, $input, @command) = @_;
	my $options = ref $command[-1] eq 'HASH' ? pop @command : {};
	my ($output, $problem) = ('', '');
	my @call = (program('client'), $self->options_of($options), @command);

	croak "there is no $call[0]: make test/kafka/client" unless -x $call[0];
	my $ok = IPC::Run::run(\@call, '<', \$input, '>', \$output, '2>', \$problem);
	chomp $problem;
	return $ok ? '' : $problem || 'failed' if $options->{fails};
	croak "@command: $problem" unless $ok;
	return split /\n/, $output;
}

# ---- records -----------------------------------------------------------------------

sub escape
{
	my ($bytes) = @_;
	return $bytes =~ s/([^ -~]|[\\=])/sprintf '\\x%02x', ord $1/ger;
}

sub unescape
{
	my ($text) = @_;
	return $text =~ s/\\x(..)/chr hex $1/ger;
}

sub line_of
{
	my ($record) = @_;
	my ($key, $value, $headers, $more) = @$record;
	my @fields = map { "$_=$more->{$_}" } sort keys %{ $more // {} };
	my @headers = @{ $headers // [] };

	push @fields, 'key=' . escape($key) if defined $key;
	push @fields, 'value=' . escape($value) if defined $value;
	while (my ($name, $content) = splice @headers, 0, 2)
	{
		push @fields, 'header=' . escape($name) . (defined $content ? '=' . escape($content) : '');
	}
	# An empty line is a record with nothing in it.
	return join "\t", @fields;
}

sub record_of
{
	my ($line) = @_;
	my %record = (key => undef, value => undef, headers => []);

	foreach my $field (split /\t/, $line)
	{
		my ($name, $content) = split /=/, $field, 2;

		if ($name eq 'header')
		{
			my ($header, $bytes) = split /=/, $content, 2;
			push @{ $record{headers} }, unescape($header), defined $bytes ? unescape($bytes) : undef;
			next;
		}
		$record{$name} = $name =~ /^(key|value)$/ ? unescape($content) : $content;
	}
	return \%record;
}

# produce($topic, @records, {options}): returns once all are delivered.
sub produce
{
	my ($self, $topic, @records) = @_;
	my $options = ref $records[-1] eq 'HASH' ? pop @records : {};

	return $self->run(join('', map { line_of($_) . "\n" } @records), 'produce', $topic, $options);
}

# Records by formula, see test/kafka/client.c; words are first, keys, size, tombstones.
sub produce_many
{
	my ($self, $topic, $count, %words) = @_;
	my $options = delete $words{options} // {};

	return $self->run('', 'generate', $topic, $count, (map { "$_=$words{$_}" } sort keys %words), $options);
}

# One for each combination, see there.
sub produce_grid
{
	my ($self, $topic, $tenants, $items, $hashes, $options) = @_;
	return $self->run('', 'grid', $topic, $tenants, $items, $hashes, $options // {});
}

# All records up to the end of each partition, by partition and offset; options
# partition and from, and uncommitted => 1 to see what no transaction has committed.
sub consume
{
	my ($self, $topic, $options) = @_;
	my %options = %{ $options // {} };
	my @where;

	push @where, $options{partition} if defined $options{partition};
	push @where, $options{from} if defined $options{from};
	$options{properties} = { %{ $options{properties} // {} }, 'isolation.level' => 'read_uncommitted' }
	  if $options{uncommitted};
	my @lines = $self->run('', 'consume', $topic, @where, \%options);
	return $lines[0] if $options{fails};
	return sort { $a->{partition} <=> $b->{partition} || $a->{offset} <=> $b->{offset} } map { record_of($_) } @lines;
}

# A producer that stays: see below.
sub producer
{
	my ($self, $topic, $options) = @_;
	return EventstoreTest::Kafka::Producer->new(program('client'), $self->options_of($options // {}), 'produce', $topic);
}

# ---- topics ------------------------------------------------------------------------

sub create_topic
{
	my ($self, $topic, $partitions, %config) = @_;

	$self->run('', 'create', $topic, $partitions // 1, map { "$_=$config{$_}" } sort keys %config);
	return;
}

# Deleting is not at once: until nobody knows it any more.
sub delete_topic
{
	my ($self, $topic) = @_;

	$self->run('', 'delete', $topic);
	$self->await("$topic is gone", sub { !grep { /^topic \Q$topic\E / } $self->run('', 'describe') });
	return;
}

sub add_partitions
{
	my ($self, $topic, $total) = @_;

	$self->run('', 'partitions', $topic, $total);
	$self->await("$topic has $total partitions", sub { $self->partitions($topic) == $total });
	return;
}

sub partitions
{
	my ($self, $topic) = @_;
	return scalar grep { /^partition / } $self->run('', 'describe', $topic);
}

# Records before the offset.
sub delete_records
{
	my ($self, $topic, $partition, $offset) = @_;

	$self->run('', 'delete_records', $topic, $partition, $offset);
	return;
}

# What is not named becomes the default.
sub alter_topic
{
	my ($self, $topic, %config) = @_;

	$self->run('', 'alter', $topic, map { "$_=$config{$_}" } sort keys %config);
	return;
}

# By partition: [first offset, end].
sub watermarks
{
	my ($self, $topic) = @_;
	return map { [ (split)[ 1, 2 ] ] } $self->run('', 'watermarks', $topic);
}

# By partition: {committed, end, lag}; nothing committed is undef.
sub group_lag
{
	my ($self, $group, $topic) = @_;
	my @partitions;

	foreach my $line ($self->run('', 'lag', $group, $topic))
	{
		my (undef, $committed, $end, $lag) = split / /, $line;
		push @partitions, { committed => $committed eq '-' ? undef : $committed, end => $end, lag => $lag };
	}
	return @partitions;
}

# ---- waiting -----------------------------------------------------------------------

# A condition that becomes true by itself, or the test ends.
sub await
{
	my ($self, $what, $is_so) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;

	until ($is_so->())
	{
		BAIL_OUT("never so: $what") if time > $end;
		Time::HiRes::usleep(10_000);
	}
	return;
}

# A producer that holds what it was given until told to go on.
#
#   my $p = $kafka->producer('t', { properties => { 'transactional.id' => 'x' } });
#   $p->send(['k', 'v'], …);    $p->flush;
#   $p->commit;                 # or abort; the next record begins the next transaction
#   $p->finish;                 # what is open stays open;  kill_it: as a crash would
package EventstoreTest::Kafka::Producer;

our @ISA = ('EventstoreTest::Kafka::Channel');

sub send
{
	my ($self, @records) = @_;

	$self->tell(EventstoreTest::Kafka::Client::line_of($_)) foreach @records;
	return;
}

sub flush
{
	my ($self) = @_;
	return $self->ask('!flush');
}

sub commit
{
	my ($self) = @_;
	return $self->ask('!commit');
}

sub abort
{
	my ($self) = @_;
	return $self->ask('!abort');
}

1;
