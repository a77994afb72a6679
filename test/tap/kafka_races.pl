# Who else writes: SQL during a restore, dead letters beside the worker, another
# source of the same topic.  An older value never takes the place of a newer one.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use EventstoreTest::Session;
use Test::More;

my $mock = kafka_mock();
my $node = server_beside($mock->address, 'races');
my $address = $mock->address;
my $fast = q(consumer_properties => '{"fetch.wait.max.ms": 5}');

sub query { return $node->safe_psql('postgres', $_[0]); }

sub in_store
{
	my ($store) = @_;
	return query("SELECT string_agg(key || '=' || value, ' ' ORDER BY key) FROM $store");
}

# A process of the server waits for a lock, or has given up waiting.
sub await_in_the_way
{
	my ($name) = @_;
	await_true($node, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted) OR EXISTS (SELECT FROM eventstore.sources WHERE name = '$name' AND state = 'retrying')");
	return;
}

# ---- SQL while the store is restored ---------------------------------------------------

$mock->create_topic('in', 1);
$mock->create_topic('in-changelog', 1);
$mock->produce('in-changelog', map { [ "k$_", '"old"' ] } 1 .. 5);
query("SELECT eventstore.create_store('kv')");
my $writer = EventstoreTest::Session->new($node);
$writer->run("BEGIN; SELECT eventstore.put('kv', 'k3', '\"new\"')");
query("SELECT eventstore.create_source('in', 'k', 'in', 'kv', changelog_topic => 'in-changelog', $fast)");
await_in_the_way('in');
$writer->run('COMMIT');
source_caught_up($node, 'in');
is(in_store('kv'), 'k1="old" k2="old" k3="new" k4="old" k5="old"', 'a value that came by SQL during a restore is newer');
query("SELECT eventstore.drop_source('in'), eventstore.delete('kv', 'k4')");

# A store that is empty, and has a past.
query("SELECT eventstore.create_store('emptied')");
query("SELECT eventstore.put('emptied', 'k1', '1'), eventstore.delete('emptied', 'k1')");
query("SELECT eventstore.create_source('emptied', 'k', 'in', 'emptied', changelog_topic => 'in-changelog', $fast)");
source_caught_up($node, 'emptied');
is(query("SELECT count(*) FROM emptied WHERE key = 'k1'"), '0', 'what was deleted by SQL is not restored');
query("SELECT eventstore.drop_source('emptied')");

# ---- a replica beside who may write ------------------------------------------------------

query("SELECT eventstore.create_store('copy')");
query("SELECT eventstore.create_source('copy', 'k', 'in', 'copy', mode => 'replica', changelog_topic => 'in-changelog', flush_count => 2, $fast)");
source_caught_up($node, 'copy');
$writer->run('BEGIN; LOCK TABLE copy IN ROW EXCLUSIVE MODE');
$mock->produce('in-changelog', map { [ "copied-$_", '1' ] } 1 .. 5);
await_true($node, q{SELECT count(*) = 5 FROM copy WHERE key LIKE 'copied-%'});
pass('a replica that is behind waits for nobody');
$writer->run('COMMIT');
query("SELECT eventstore.drop_source('copy')");

# ---- a crash amid a restore of more than a batch ---------------------------------------------

my $keys = 150_000;
$mock->create_topic($_, 2) foreach qw(big big-changelog);
$mock->produce_grid('big-changelog', 10, 100, $keys / 1000);
query("SELECT eventstore.create_store('big')");
query("SELECT eventstore.create_source('big', 'k', 'big', 'big', changelog_topic => 'big-changelog')");
await_true($node, "SELECT sum(position) > 0 FROM eventstore.source_partitions WHERE topic = 'big-changelog'");
$node->stop('immediate');
$node->start;
note(query("SELECT string_agg(position::text, ' ') FROM eventstore.source_partitions WHERE topic = 'big-changelog'") . ' records were there');
is(query("SELECT eventstore.wait_for_source('big', '3 min')"), 't', 'big has caught up');
is(query("SELECT count(*), count(*) FILTER (WHERE version = 1 AND key = format('1/%s/%s/%s', value->>'tenant', value->>'item', value->>'hash')) FROM big"), "$keys|$keys", 'a restore goes on after a crash');
await_recorded($node, 'big');
is(query("SELECT count(*), count(DISTINCT stream) FROM big_changelog"), "$keys|$keys", 'each key has one event');
is_clean($node, 'big_changelog', 'all is as it should be');
query("SELECT eventstore.drop_source('big'), eventstore.drop_store('big')");
$writer = EventstoreTest::Session->new($node);

# ---- dead letters while the worker writes ----------------------------------------------

$mock->create_topic('letters', 1);
query("SELECT eventstore.create_store('lettered')");
query("ALTER TABLE lettered ADD CHECK (value <> '1')");
query("SELECT eventstore.create_source('letters', 'k', 'letters', 'lettered', flush_interval => '10 ms', $fast)");
$mock->produce('letters', [ 'a', '1' ]);
source_caught_up($node, 'letters');
is(query("SELECT count(*) FROM eventstore.dead_letters WHERE source = 'letters'"), '1', 'a dead letter');
query('ALTER TABLE lettered DROP CONSTRAINT lettered_value_check');
query("INSERT INTO lettered VALUES ('z', '0')");
# The worker has written the key, and waits to write another one.
$writer->run("BEGIN; UPDATE lettered SET value = '9' WHERE key = 'z'");
$mock->produce('letters', [ 'a', '2' ], [ 'z', '2' ]);
await_true($node, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)");
my $retrier = EventstoreTest::Session->new($node);
$retrier->send("SELECT eventstore.retry_dead_letters('letters')");
await_true($node, "SELECT query ~ 'retry_dead_letters' AND (wait_event_type = 'Lock' OR state = 'idle') FROM pg_stat_activity WHERE pid = " . $retrier->backend_pid);
$writer->run('COMMIT');
$retrier->receive;
source_caught_up($node, 'letters');
is(in_store('lettered'), 'a=2 z=2', 'a dead letter that is tried again does not overwrite the record behind it');
is_clean($node, 'lettered_changelog');
query("SELECT eventstore.drop_source('letters')");

# ---- dead letters of a changelog topic ----------------------------------------------------

$mock->create_topic('src', 1);
$mock->create_topic('src-changelog', 1);
$mock->produce('src-changelog', [ 'a', '7' ], [ 'b', '7' ]);
query("SELECT eventstore.create_store('made', 'json')");
query("ALTER TABLE made ADD CHECK (value <> '7')");
query("CREATE FUNCTION double(text) RETURNS jsonb LANGUAGE sql RETURN to_jsonb(\$1::int * 2)");
query("SELECT eventstore.create_source('src', 'k', 'src', 'made', transform => 'double(text)', changelog_topic => 'src-changelog', $fast)");
source_caught_up($node, 'src');
is(query("SELECT count(*) FROM eventstore.dead_letters WHERE source = 'src' AND record_offset < 2"), '2', 'records of a changelog topic are parked');
$mock->produce('src', [ 'a', '50' ]);
source_caught_up($node, 'src');
query('ALTER TABLE made DROP CONSTRAINT made_value_check');
is(query("SELECT eventstore.retry_dead_letters('src')"), '1', 'and tried again');
is(in_store('made'), 'a=100 b=7', 'as they are stored, where nothing newer was written');
query("SELECT eventstore.drop_source('src')");

# ---- metadata that are not as we write them --------------------------------------------------

$mock->create_topic($_, 1) foreach 'odd', 'odd-changelog';
query("SELECT eventstore.create_store('odd')");
query("ALTER TABLE odd ADD CHECK (value <> '7')");
query("SELECT eventstore.create_source('odd', 'k', 'odd', 'odd', flush_interval => '10 ms', $fast)");
foreach my $value ('7', '1')
{
	$mock->produce('odd', map { [ "k$_", $value ] } 1 .. 4);
	source_caught_up($node, 'odd');
}
is(query("SELECT count(*) FROM eventstore.dead_letters WHERE source = 'odd'"), '4', 'dead letters');
my %metadata = (k1 => '{"topic": "odd", "partition": "x", "offset": "y"}', k2 => '["topic"]',
	k3 => '{"topic": "odd", "partition": 0, "offset": 1e40}', k4 => '{"topic": "odd", "partition": 1e30, "offset": {}}');
query("SET session_replication_role = replica; UPDATE odd_changelog SET metadata = '$metadata{$_}' WHERE stream = '$_'") foreach sort keys %metadata;
query('ALTER TABLE odd DROP CONSTRAINT odd_value_check');
is(query("SELECT eventstore.retry_dead_letters('odd')"), '3', 'dead letters: an offset that is none proves nothing');
is(in_store('odd'), 'k1=7 k2=7 k3=1 k4=7', 'one beyond all is later');
query("SELECT eventstore.drop_source('odd')");
query("SET session_replication_role = replica; UPDATE odd_changelog SET metadata = '$metadata{$_}' WHERE stream = '$_'") foreach sort keys %metadata;
$mock->produce('odd-changelog', map { [ "k$_", '"restored"', [ 'es-topic' => 'odd', 'es-partition' => '0', 'es-offset' => '7' ] ] } 1 .. 4);
query("SELECT eventstore.create_source('odd', 'k', 'odd', 'odd', start => 'latest', changelog_topic => 'odd-changelog', $fast)");
source_caught_up($node, 'odd');
is(in_store('odd'), 'k1="restored" k2=7 k3=1 k4="restored"', 'a restore, likewise');
query("SELECT eventstore.drop_source('odd')");

# ---- resync beside another source of the topic ----------------------------------------------

$mock->create_topic('shared', 2);
query("SELECT eventstore.create_store('common')");
$mock->produce('shared', map { [ "p$_", '1', [], { partition => $_ } ] } 0, 1);
foreach my $own (0, 1)
{
	query("SELECT eventstore.create_source('both$own', 'k', 'shared', 'common', partitions => '{$own}', $fast)");
	source_caught_up($node, "both$own");
}
query("SELECT eventstore.resync('both0')");
await_true($node, "SELECT NOT bool_or(resync) FROM eventstore.source");
source_caught_up($node, 'both0');
is(in_store('common'), 'p0=1 p1=1', 'keys of partitions that the source does not read stay');

# ---- a database in another encoding --------------------------------------------------------

query("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'");
$node->safe_psql('latin', qq(CREATE EXTENSION eventstore; CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address')));
$mock->create_topic('umlauts', 1);
$mock->produce('umlauts', [ "\xc3\xa4", '1' ], [ 'a', '1' ]);
$node->safe_psql('latin', "SELECT eventstore.create_store('kv')");
$node->safe_psql('latin', "SELECT eventstore.create_source('umlauts', 'k', 'umlauts', 'kv', $fast)");
is($node->safe_psql('latin', "SELECT eventstore.wait_for_source('umlauts', '2 min')"), 't', 'a source in LATIN1');
$node->safe_psql('latin', "SELECT eventstore.resync('umlauts')");
await_true($node, 'SELECT NOT bool_or(resync) FROM eventstore.source', 'latin');
is($node->safe_psql('latin', q{SELECT string_agg(convert_to(key, 'UTF8')::text, ' ' ORDER BY key) FROM kv}), '\x61 \xc3a4', 'resync knows its keys');

# ---- an errand of a source that is not to run here --------------------------------------------

query('CREATE DATABASE clone TEMPLATE latin');
is($node->safe_psql('clone', "SELECT eventstore.flush('umlauts', '100 ms')"), 'f', 'flush of a source that is to run in another database');
await_true($node, "SELECT NOT EXISTS (SELECT FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'source' AND database = 'clone')");
pass('its worker looks once, and is not started again and again');

$_->quit foreach $writer, $retrier;
$node->stop;
no_crash($node);
done_testing();
