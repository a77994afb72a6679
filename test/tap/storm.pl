# Everything at once: sixteen writers that do at random what writers do, and
# readers of every kind.  None of the readers may skip an event, or be given
# one twice, or out of order.
#
# STORM_SEED repeats a run's choices, STORM_EVENTS changes how many are written.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Load;
use Test::More;

my $seed    = $ENV{STORM_SEED} // time;
my $events  = $ENV{STORM_EVENTS} // 100_000;
my $writers = 16;

diag("seed $seed");
my $node = new_server('storm',
	settings => [ 'eventstore.tick_delay = 20ms', 'deadlock_timeout = 20ms', 'shared_buffers = 256MB', 'max_wal_size = 2GB',
		'synchronous_commit = off', 'autovacuum_naptime = 5s', 'max_connections = 60' ]);

# Small segments, so that they are made all the time; one that never ends.
$node->safe_psql('postgres', q{
	SELECT eventstore.create_collection('small', segment_size => 2000);
	SELECT eventstore.create_collection('large');
	SELECT eventstore.create_collection('decorated', segment_size => 20000);
	ALTER TABLE decorated ADD COLUMN region text DEFAULT 'eu';
	CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		NEW.metadata := '{"stamped": true}';
		RETURN NEW;
	END $$;
	CREATE TRIGGER stamp BEFORE INSERT ON decorated FOR EACH ROW EXECUTE FUNCTION stamp();
});
my @collections = ('small', 'large', 'decorated');
my $load = EventstoreTest::Load->new($node,
	collections => \@collections, seed => $seed, pause => 0.003, batch => 40);

my @readers = (
	(map { [ 'committed', $_ ] } @collections),
	(map { [ 'repeatable', $_ ] } @collections),
	[ 'serializable', 'small' ],
	[ 'pages', 'small' ], [ 'pages', 'large' ],
	[ 'counted',  'decorated' ],
	[ 'cursor',   'small' ],
	[ 'prepared', 'small' ],
	[ 'tagged',   'small' ], [ 'tagged', 'large' ]);

$load->start_reader(@$_) foreach @readers;
$load->start_stream_reader('small');
my @followed = ('small', 'large');
$load->start_follower($_) foreach @followed;
$load->start_writer($events / $writers) for 1 .. $writers;
is($load->wait_for($load->{writers}), 0, 'the writers came to their end');
is($load->finish_readers, 0, 'the readers came to their end');
is(join("\n", ($load->lines('error'))[ 0 .. 9 ]) =~ s/\n+$//r, '', 'no client met an error that it should not');

# ---- what was written is there, and nothing else --------------------------------------

my $total = 0;
my %present;
foreach my $collection (@collections)
{
	my @present = positions($node, "SELECT position FROM $collection ORDER BY position");
	my %there   = map { $_ => 1 } @present;
	my @seen    = $load->positions_of('seen', $collection);
	my %seen;

	$present{$collection} = \@present;
	$total += @present;
	is(scalar(grep { $seen{$_}++ } @seen), 0, "$collection: none of " . @seen . ' positions was given out twice');
	is(join(',', sort { $a <=> $b } $load->positions_of('kept', $collection)), join(',', @present), "$collection: the events there are those whose commit was acknowledged");
	is(scalar(grep { $there{$_} } $load->positions_of('gone', $collection)), 0, "$collection: nothing that was rolled back is there");
	is( $node->safe_psql('postgres', "SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY stream ORDER BY position) AS n FROM $collection WHERE stream IS NOT NULL) v WHERE version <> n"),
		0, "$collection: versions are dense and in the order of positions");
	is_clean($node, $collection);
}
cmp_ok($total, '>=', $events, "$total events");

# ---- what was read is what was written -------------------------------------------------

sub compare
{
	my ($name, $read, $wanted) = @_;
	my %wanted = map { $_ => 1 } @$wanted;
	my %read;
	my $twice   = grep { $read{$_}++ } @$read;
	my $skipped = grep { !$read{$_} } @$wanted;
	my $extra   = grep { !$wanted{$_} } @$read;
	my $previous = 0;
	my $disorder = 0;

	foreach my $position (@$read)
	{
		$disorder++ if $position <= $previous;
		$previous = $position;
	}
	is("$skipped skipped, $twice twice, $extra not committed, $disorder out of order",
		'0 skipped, 0 twice, 0 not committed, 0 out of order', "$name: " . @$wanted . ' events');
	return;
}

foreach my $n (1 .. @readers)
{
	my ($kind, $collection) = @{ $readers[ $n - 1 ] };
	my @wanted = $kind eq 'tagged'
	  ? positions($node, "SELECT position FROM $collection WHERE tags @> '{color:red}' ORDER BY position")
	  : @{ $present{$collection} };

	compare("reader $kind of $collection", [ $load->positions_of('read', $collection, $n) ], \@wanted);
}
foreach my $n (0 .. $#followed)
{
	compare("follower of $followed[$n]", [ $load->positions_of('read', $followed[$n], @readers + 2 + $n) ], $present{ $followed[$n] });
}
compare('reader of streams of small',
	[ sort { $a <=> $b } $load->positions_of('read', 'small', @readers + 1) ],
	[ positions($node, 'SELECT position FROM small WHERE stream IS NOT NULL ORDER BY position') ]);

$node->stop;
no_crash($node);
done_testing();
