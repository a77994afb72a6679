# A collection that is replicated to another server.
#
# On the subscriber its rows arrive by themselves: nobody registers positions
# there, so readers go by the head that travels with the data, and appends are
# refused, until it is made a collection of its own.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Load;
use Test::More;

my $publisher  = new_server('publisher', streaming => 'logical', settings => ['eventstore.tick_delay = 20ms']);
# The worker looks about once a minute whether what arrives needs segments, so
# there have to be enough for this test beforehand.
my $subscriber = new_server('subscriber',
	settings => [ 'eventstore.tick_delay = 20ms', 'eventstore.segments_ahead = 20' ]);

foreach my $node ($publisher, $subscriber)
{
	$node->safe_psql('postgres', "SELECT eventstore.create_collection('c', segment_size => 2000)");
}
$publisher->safe_psql('postgres', q{
	SELECT count(*) FROM eventstore.append_batch('c', (SELECT jsonb_agg(jsonb_build_object('type', 'old', 'stream', 's' || i % 7, 'tags', '["color:red"]'::jsonb)) FROM generate_series(1, 500) i));
	CREATE PUBLICATION p FOR TABLE c WITH (publish = 'insert', publish_via_partition_root = true);
});
my $connstr = $publisher->connstr('postgres');
$subscriber->safe_psql('postgres', "CREATE SUBSCRIPTION s CONNECTION \$\$$connstr\$\$ PUBLICATION p");
$subscriber->wait_for_subscription_sync($publisher, 's');
is($subscriber->safe_psql('postgres', 'SELECT count(*) FROM c'), 500, 'the first events are there');

# ---- read while the publisher appends -------------------------------------------------

my $writing = EventstoreTest::Load->new($publisher, collections => ['c'], seed => 7, pause => 0.003);
my $reading = EventstoreTest::Load->new($subscriber, collections => ['c'], seed => 8);
my @readers = ('committed', 'repeatable', 'pages', 'tagged');

$writing->start_writer(1000) for 1 .. 4;
$reading->start_reader($_, 'c') foreach @readers;
is($writing->wait_for($writing->{writers}), 0, 'the writers came to their end');
# An event that comes last shows what lies below it; there is nobody to tick here.
$publisher->safe_psql('postgres', "SELECT eventstore.append('c', 'last')");
$publisher->wait_for_catchup('s');
$reading->raise_flag('target.c', $publisher->safe_psql('postgres', "SELECT max(position) FROM c WHERE type <> 'last'"));
is($reading->wait_for($reading->{readers}), 0, 'the readers of the subscriber came to their end');
is(join("\n", $writing->lines('error'), $reading->lines('error')), '', 'no client met an error that it should not');
foreach my $n (1 .. @readers)
{
	my $kind = $readers[ $n - 1 ];
	my $where = $kind eq 'tagged' ? "AND tags @> '{color:red}'" : '';

	is( join(',', grep { defined } $reading->positions_of('read', 'c', $n)),
		join(',', positions($publisher, "SELECT position FROM c WHERE type <> 'last' $where ORDER BY position")),
		"reader $kind: everything once, in order");
}

# ---- it is a copy ------------------------------------------------------------------------

foreach my $sql (
	"SELECT * FROM eventstore.append('c', 'x')",
	"SELECT * FROM eventstore.append_batch('c', '[{\"type\": \"x\", \"stream\": \"s1\"}]')",
	"INSERT INTO c (type) VALUES ('x')")
{
	is(sqlstate_of($subscriber, $sql), '55000', "refused on the subscriber: $sql");
}
my ($result, $stdout, $stderr) = $subscriber->psql('postgres', "SELECT * FROM eventstore.append('c', 'x')");
like($stderr, qr/HINT:.*repair_collection/, 'the hint says what to do');

# ---- made its own ----------------------------------------------------------------------------

$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION s');
$subscriber->safe_psql('postgres', "SELECT eventstore.repair_collection('c')");
my $last    = $publisher->safe_psql('postgres', 'SELECT max(position) FROM c');
my $version = $publisher->safe_psql('postgres', "SELECT (eventstore.peek('c', 's1')).version");
is($subscriber->safe_psql('postgres', "SELECT position > $last, version FROM eventstore.append('c', 'own', stream => 's1', expected_version => $version)"),
	't|' . ($version + 1), 'after a repair appends go on');
is_clean($subscriber, 'c');
is($subscriber->safe_psql('postgres', "SELECT count(*) FROM eventstore.read('c', tags => '{color:red}')"),
	$publisher->safe_psql('postgres', "SELECT count(*) FROM c WHERE tags @> '{color:red}'"), 'tags are found');

# ---- a captured table that changes by replication --------------------------------------------

$_->safe_psql('postgres', 'CREATE TABLE r (id int PRIMARY KEY, v text)') foreach $publisher, $subscriber;
$publisher->safe_psql('postgres', 'CREATE PUBLICATION r FOR TABLE r');
$subscriber->safe_psql('postgres', "SELECT eventstore.capture('r')");
$subscriber->safe_psql('postgres', "CREATE SUBSCRIPTION r CONNECTION \$\$$connstr\$\$ PUBLICATION r");
$subscriber->wait_for_subscription_sync($publisher, 'r');
$publisher->safe_psql('postgres', "INSERT INTO r VALUES (1, 'unseen')");
$publisher->wait_for_catchup('r');
is($subscriber->safe_psql('postgres', 'SELECT (SELECT count(*) FROM r), (SELECT count(*) FROM r_changelog)'), '1|0', 'what comes by replication is not recorded');
$subscriber->safe_psql('postgres', 'ALTER TABLE r ENABLE ALWAYS TRIGGER eventstore_capture, ENABLE ALWAYS TRIGGER eventstore_capture_truncate');
$publisher->safe_psql('postgres', q{
	BEGIN;
	INSERT INTO r VALUES (2, 'two'), (3, 'three');
	UPDATE r SET v = v || '!' WHERE id > 1;
	DELETE FROM r WHERE id = 2;
	COMMIT;
	TRUNCATE r;
});
$publisher->wait_for_catchup('r');
is($subscriber->safe_psql('postgres', q{SELECT string_agg(concat_ws(' ', stream, version, type), ', ' ORDER BY position) FROM r_changelog}),
	'2 1 insert, 3 1 insert, 2 2 update, 3 2 update, 2 3 delete, truncate', 'unless its triggers are to fire always');
$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION r');

$subscriber->stop;
$publisher->stop;
no_crash($subscriber);
no_crash($publisher);
done_testing();
