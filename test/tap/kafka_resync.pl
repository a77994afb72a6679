# A compacted topic forgets what deleted a key; resync() finds such keys.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use Test::More;

my $kafka = kafka_broker();
my $node = server_beside($kafka->address, 'resync');

sub query { return $node->safe_psql('postgres', $_[0]); }

sub keys_of { return query("SELECT string_agg(key, ' ' ORDER BY key) FROM $_[0]"); }

$kafka->create_topic('t', 1, 'cleanup.policy' => 'compact', 'segment.ms' => 100, 'min.cleanable.dirty.ratio' => 0.001,
	'max.compaction.lag.ms' => 100, 'delete.retention.ms' => 100);
$kafka->produce('t', map { [ "k$_", $_ ] } 1 .. 9);
foreach my $store ('kv', 'plain')
{
	query("SELECT eventstore.create_store('$store', changelog => " . ($store eq 'kv' ? 'true' : 'false') . ')');
	query("SELECT eventstore.create_source('$store', 'k', 't', '$store')");
	source_caught_up($node, $store);
}
query("SELECT eventstore.put('kv', 'k3', '\"by SQL\"'), eventstore.put('kv', 'mine', '1')");
query("SELECT eventstore.pause('$_')") foreach 'kv', 'plain';

$kafka->produce('t', [ 'k1', undef ], [ 'k2', undef ], [ 'k3', undef ]);
$kafka->await('what deleted them is forgotten', sub {
	$kafka->produce('t', [ 'other', 1 ]);
	return !grep { $_->{key} =~ /^k[123]$/ } $kafka->consume('t');
});
query("SELECT eventstore.resume('$_')") foreach 'kv', 'plain';
source_caught_up($node, $_, "$_ has caught up again") foreach 'kv', 'plain';
is(keys_of('kv'), 'k1 k2 k3 k4 k5 k6 k7 k8 k9 mine other', 'nothing that is there now has deleted them');

query("SELECT eventstore.resync('$_')") foreach 'kv', 'plain';
await_true($node, "SELECT string_agg(key, ' ' ORDER BY key) = 'k3 k4 k5 k6 k7 k8 k9 mine other' FROM kv");
pass('keys of the topic that it does not have are gone, those of SQL stay');
await_true($node, "SELECT string_agg(key, ' ' ORDER BY key) = 'k4 k5 k6 k7 k8 k9 other' FROM plain");
pass('a store without a changelog has what the topic has');
is(query("SELECT type, metadata FROM eventstore.peek('kv_changelog', 'k1')"), 'delete|{"topic": "t", "resync": true}', 'the changelog says why');
is_clean($node, 'kv_changelog');
$kafka->produce('t', [ 'k1', 1 ]);
source_caught_up($node, 'kv', 'the source goes on');
like(keys_of('kv'), qr/^k1 k3/, 'with what comes');
is(sqlstate_of($node, "SELECT eventstore.resync('none')"), 'LG007', 'resync of no source');

$node->stop;
no_crash($node);
done_testing();
