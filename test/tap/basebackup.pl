# pg_basebackup while appends go on: the copy, started as a server of its own,
# has every event that was acknowledged before the backup began, and goes on.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Load;
use PostgreSQL::Test::Cluster;
use Test::More;

my $node = new_server('original', streaming => 1, settings => ['eventstore.tick_delay = 20ms']);

$node->safe_psql('postgres', q{
	SELECT eventstore.create_collection('a', segment_size => 1000);
	SELECT eventstore.create_collection('b');
});

my $load = EventstoreTest::Load->new($node, collections => [ 'a', 'b' ], seed => 5, pause => 0.002);
$load->start_writer for 1 .. 5;
await_true($node, 'SELECT count(*) > 1000 FROM a');
my %kept = map { $_ => [ $load->positions_of('kept', $_) ] } ('a', 'b');
$node->backup('while_appending');
is($load->stop_writers, 0, 'the writers were not disturbed');
is(join("\n", $load->lines('error')), '', 'and met no error');

my $copy = PostgreSQL::Test::Cluster->new('copy');
$copy->init_from_backup($node, 'while_appending');
$copy->start;

foreach my $collection ('a', 'b')
{
	my @present  = positions($copy, "SELECT position FROM $collection ORDER BY position");
	my %present  = map { $_ => 1 } @present;
	my %original = map { $_ => 1 } positions($node, "SELECT position FROM $collection");

	is(scalar(grep { !$present{$_} } @{ $kept{$collection} }), 0, "all of " . @{ $kept{$collection} } . " acknowledged events of $collection are in the copy");
	is(scalar(grep { !$original{$_} } @present), 0, "and none that is not in the original");
	is_clean($copy, $collection, "$collection of the copy is consistent");
	is($copy->safe_psql('postgres', "SELECT count(*) FROM eventstore.read('$collection')"), scalar(@present), "read shows all of $collection");
	cmp_ok($copy->safe_psql('postgres', "SELECT position FROM eventstore.append('$collection', 'copy', stream => 's1')"), '>', $present[-1], "appends to $collection go on");
	is($copy->safe_psql('postgres', "SELECT count(*) FROM eventstore.append_batch('$collection', (SELECT jsonb_agg('{\"type\": \"more\", \"stream\": \"s2\"}'::jsonb) FROM generate_series(1, 5000)))"),
		5000, "and need segments, which are made");
	is_clean($copy, $collection, "$collection of the copy is still consistent");
}

$copy->stop;
$node->stop;
no_crash($copy);
no_crash($node);
done_testing();
