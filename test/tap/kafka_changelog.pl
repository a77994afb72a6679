# A store's changelog topic: restored from, followed, published.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use Test::More;

my $mock = kafka_mock();
my $node = new_server('changelog', settings => [ 'max_worker_processes = 24', 'eventstore.maintenance_interval = 200ms' ]);
my $address = $mock->address;
my $fast = q(consumer_properties => '{"fetch.wait.max.ms": 5}');

sub query { return $node->safe_psql('postgres', $_[0]); }

sub caught_up
{
	my ($name) = @_;
	is(query("SELECT eventstore.wait_for_source('$name')"), 't', "$name has caught up");
	return;
}

# What a changelog topic has of a change that a record made.
sub made_by
{
	my ($topic, $partition, $offset) = @_;
	return [ 'es-topic' => $topic, 'es-partition' => $partition, 'es-offset' => $offset ];
}

query(qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address')));

# ---- restored: what the topic has, then the source from where that ends ------------------

$mock->create_topic('in', 2);
$mock->create_topic('in-changelog', 2);
$mock->produce('in', map { [ "p0-$_", "$_", [], { partition => 0 } ] } 0 .. 11);
$mock->produce('in', map { [ "p1-$_", "$_", [], { partition => 1 } ] } 0 .. 2);
$mock->produce('in-changelog',
	[ 'a', '"old"', made_by('in', 0, 3), { partition => 0 } ],
	[ 'b', '1',     made_by('in', 0, 4), { partition => 0 } ],
	[ 'a', '"new"', made_by('in', 0, 6), { partition => 0 } ],
	[ 'b', undef,   made_by('in', 0, 8), { partition => 0 } ],
	[ 'c', '1',     made_by('other', 0, 99), { partition => 0 } ],
	[ 'd', '{"x": 1}', [], { partition => 1 } ]);
query("SELECT eventstore.create_store('kv')");
query("SELECT eventstore.create_source('in', 'k', 'in', 'kv', changelog_topic => 'in-changelog', $fast)");
caught_up('in');
is(query("SELECT string_agg(key || '=' || value, ' ' ORDER BY key) FROM kv"),
	'a="new" c=1 d={"x": 1} p0-10=10 p0-11=11 p0-9=9 p1-0=0 p1-1=1 p1-2=2',
	'the topic\'s last value of each key, then the records behind those that it came from');
is(query("SELECT topic, partition, position FROM eventstore.source_partitions ORDER BY 1, 2"),
	"in|0|12\nin|1|3\nin-changelog|0|5\nin-changelog|1|1", 'offsets of both topics');
is(query("SELECT metadata->>'topic' FROM eventstore.peek('kv_changelog', 'a')"), 'in-changelog', 'what was restored says where it came from');
is_clean($node, 'kv_changelog');

# ---- a store that has something newer ------------------------------------------------------

query("SELECT eventstore.drop_source('in')");
query("SELECT eventstore.put('kv', 'd', '\"by SQL\"')");
$mock->produce('in-changelog', [ 'p0-9', '"old"', made_by('in', 0, 2), { partition => 0 } ], [ 'p0-10', '"newer"', made_by('in', 0, 12), { partition => 0 } ]);
$mock->produce('in', [ 'z', '"skipped: the changelog topic has come past it"', [], { partition => 0 } ], [ 'y', '1', [], { partition => 0 } ]);
query("SELECT eventstore.create_source('in', 'k', 'in', 'kv', changelog_topic => 'in-changelog', $fast)");
caught_up('in');
is(query("SELECT string_agg(key || '=' || value, ' ' ORDER BY key) FROM kv WHERE key IN ('a', 'd', 'p0-9', 'p0-10', 'y', 'z')"),
	'a="new" d="by SQL" p0-10="newer" p0-9=9 y=1', 'keeps it; the rest is restored');

# ---- a replica -------------------------------------------------------------------------------

query("SELECT eventstore.create_store('copy')");
query("SELECT eventstore.create_source('copy', 'k', 'in', 'copy', mode => 'replica', changelog_topic => 'in-changelog', $fast)");
caught_up('copy');
is(query("SELECT string_agg(key || '=' || value, ' ' ORDER BY key) FROM copy"), 'a="new" c=1 d={"x": 1} p0-10="newer" p0-9="old"', 'a replica has what the changelog topic has');
$mock->produce('in-changelog', [ 'e', '1', [], { partition => 1 } ], [ 'd', undef, [], { partition => 1 } ]);
caught_up('copy');
is(query("SELECT string_agg(key, ' ' ORDER BY key) FROM copy"), 'a c e p0-10 p0-9', 'and follows it');

# ---- partitions shared out ---------------------------------------------------------------------

query("SELECT eventstore.create_store('half')");
query("SELECT eventstore.create_source('half', 'k', 'in', 'half', partitions => '{0}', replica_partitions => '{1}', changelog_topic => 'in-changelog', $fast)");
caught_up('half');
is(query("SELECT string_agg(key, ' ' ORDER BY key) FROM half"), 'a c e p0-10 p0-9 y', 'its own partitions restored and read, the others followed');
is(query("SELECT topic, partition FROM eventstore.source_partitions WHERE source = 'half' ORDER BY 1, 2"),
	"in|0\nin-changelog|0\nin-changelog|1", 'of both topics');

$node->stop;
no_crash($node);
done_testing();
