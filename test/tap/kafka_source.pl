# A topic into a store and into a collection: what becomes of records, batches,
# policies, errands, and of the source itself.  Against the mock cluster.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use PostgreSQL::Test::Utils;
use Test::More;

my $mock = kafka_mock();
my $node = server_beside($mock->address, 'source', 'eventstore.kafka_renew_after = 1s');

# The mock answers a fetch only when its time is over.
my $fast = q('{"fetch.wait.max.ms": 5}');

sub query { return $node->safe_psql('postgres', $_[0]); }

# create($name, $topic, $target, further arguments as SQL)
sub create
{
	my ($name, $topic, $target, @more) = @_;
	return "SELECT eventstore.create_source('$name', 'k', '$topic', '$target', consumer_properties => "
	  . join(', ', $fast, @more) . ')';
}

sub await_state
{
	my ($name, $state) = @_;
	await_true($node, "SELECT state = '$state' FROM eventstore.sources WHERE name = '$name'");
	pass("$name: $state");
	return;
}

# ---- a store: the last record of each key -------------------------------------------

$mock->create_topic('latest', 4);
query("SELECT eventstore.create_store('kv', 'text')");
query(create('latest', 'latest', 'kv'));
$mock->produce('latest',
	[ 'a', '1' ], [ 'b', '1' ], [ 'a', '2' ], [ 'b', undef ], [ 'c', '' ],
	[ 'd', '1' ], [ 'd', undef ], [ 'd', '2' ]);
source_caught_up($node, 'latest');
is(query("SELECT key, '<' || value || '>' FROM kv ORDER BY key"), "a|<2>\nc|<>\nd|<2>", 'the last record of each key; null deletes, empty does not');
is(query("SELECT sum(position) FROM eventstore.source_partitions WHERE source = 'latest'"), '8', 'offsets');
is(query("SELECT sum(lag_records) FROM eventstore.source_partitions WHERE source = 'latest'"), '0', 'no lag');
is(query("SELECT metadata->>'topic', metadata ? 'partition', metadata ? 'offset', metadata ? 'timestamp' FROM eventstore.peek('kv_changelog', 'a')"), 'latest|t|t|t', 'where it came from');
is_clean($node, 'kv_changelog');

# ---- a collection: every record -------------------------------------------------------

$mock->create_topic('every', 2);
query("SELECT eventstore.create_collection('log')");
query(create('every', 'every', 'log', "value_format => 'json'"));
$mock->produce('every',
	[ 'a', '{"n": 1}', [ h => 'x', h => undef, h => "\xff" ], { partition => 0, timestamp => 1_700_000_000_000 } ],
	[ undef, '{"n": 2}', [], { partition => 0 } ],
	[ 'a', undef, [], { partition => 0 } ],
	[ 'a', 'no json', [], { partition => 0 } ]);
source_caught_up($node, 'every');
is(query("SELECT type, stream, version, data->>'n', metadata->'headers', created_at = to_timestamp(1700000000) FROM eventstore.read('log') ORDER BY position"),
	qq(every|a|1|1|[["h", "x"], ["h", null], ["h", {"base64": "/w=="}]]|t\nevery|||2||f\nevery|a|2|||f), 'events');
is(query("SELECT source, topic, partition, record_offset, convert_from(key, 'UTF8'), convert_from(value, 'UTF8'), sqlstate, reason FROM eventstore.dead_letters"),
	'every|every|0|3|a|no json|22P02|the value cannot be taken as json: it is not JSON', 'what does not decode is a dead letter');
is_clean($node, 'log');

# Where they came from: numbers of any length, each record's own
$mock->create_topic('numbered', 2);
query("SELECT eventstore.create_collection('numbered')");
$mock->produce('numbered', map { [ "k$_", $_, $_ % 1000 == 7 ? [ h => 'x' ] : [], { partition => $_ % 2, timestamp => 1_700_000_000_000 + 2500 * $_ } ] } 0 .. 20_099);
query(create('numbered', 'numbered', 'numbered', "value_format => 'json'"));
source_caught_up($node, 'numbered');
is(query(q{SELECT count(*), count(*) FILTER (WHERE metadata <> CASE WHEN n % 1000 = 7 THEN '{"headers": [["h", "x"]]}' ELSE '{}' END::jsonb
		|| jsonb_build_object('topic', 'numbered', 'partition', n % 2, 'offset', n / 2, 'timestamp', 1700000000000 + 2500 * n))
	FROM (SELECT data::bigint AS n, metadata FROM eventstore.read('numbered', max_count => 30000)) r}), '20100|0', 'metadata');
is_clean($node, 'numbered');

# A queue that is full again and again does not make each time last a second: that
# would be minutes here, since a fetch brings one of the producer's batches
$mock->create_topic('queued', 1);
query("SELECT eventstore.create_collection('queued')");
$mock->produce('queued', (map { [ "k$_", 'x' x 1000, [], { partition => 0 } ] } 1 .. 4000), { properties => { 'batch.num.messages' => 16 } });
foreach my $limit ('"queued.max.messages.kbytes": 8', '"queued.min.messages": 16')
{
	query("SELECT eventstore.drop_source(name) FROM eventstore.sources WHERE name = 'queued'");
	query("SELECT eventstore.create_source('queued', 'k', 'queued', 'queued', value_format => 'text', consumer_properties => "
		  . qq('{"fetch.wait.max.ms": 5, "max.partition.fetch.bytes": 1000, $limit}') . ')');
	source_caught_up($node, 'queued');
}
is(query("SELECT count(*) FROM eventstore.read('queued', max_count => 10000)"), '8000', 'a small queue of fetched messages');

# What there is not enough memory for is written in parts
$mock->create_topic('large', 1);
query("SELECT eventstore.create_store('large', 'text')");
query(q{CREATE FUNCTION count_row() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE n int := 1 + coalesce(nullif(current_setting('test.rows', true), ''), '0')::int; BEGIN
	IF n > 100 THEN RAISE out_of_memory; END IF;
	PERFORM set_config('test.rows', n::text, true);
	RETURN new;
END $$});
query('CREATE TRIGGER count_row BEFORE INSERT ON large FOR EACH ROW EXECUTE FUNCTION count_row()');
$mock->produce('large', map { [ "k$_", $_ ] } 1 .. 1000);
query(create('large', 'large', 'large'));
source_caught_up($node, 'large');
is(query('SELECT count(*) FROM large'), '1000', 'a batch that takes too much memory');
is_clean($node, 'large_changelog');

# ---- batches ---------------------------------------------------------------------------

$mock->create_topic('batches', 1);
query("SELECT eventstore.create_store('held', 'text')");
query(create('held', 'batches', 'held', 'flush_count => 3', "flush_interval => '1 h'"));
await_state('held', 'running');
$mock->produce('batches', [ 'a', '1' ], [ 'b', '1' ], [ 'c', '1' ], [ 'd', '1' ]);
await_true($node, 'SELECT count(*) = 3 FROM held');
pass('a batch is written when it is full');
is(query("SELECT eventstore.flush('held')"), 't', 'flush');
is(query('SELECT count(*) FROM held'), '4', 'writes what was read');
is(query("SELECT batches > 1, records FROM eventstore.sources WHERE name = 'held'"), 't|4', 'and is counted');

# ---- several sources of one topic -----------------------------------------------------------

$mock->create_topic('shared', 4);
query("SELECT eventstore.create_store('shared', 'text')");
query(create("half $_", 'shared', 'shared', "partitions => array[$_, @{[ $_ + 2 ]}]", 'flush_count => 500')) foreach 0, 1;
$mock->produce('shared', map { [ 'k' . $_ % 700, $_ ] } 0 .. 13_999);
source_caught_up($node, "half $_") foreach 0, 1;
is(query("SELECT count(*), sum(value::int), min(value::int), bool_and(key = 'k' || value::int % 700) FROM shared"),
	join('|', 700, 700 * (13_300 + 13_999) / 2, 13_300, 't'), 'two sources with two partitions each: the last of each key');
is(query("SELECT source, array_agg(partition ORDER BY partition), sum(position) > 0 FROM eventstore.source_partitions WHERE source LIKE 'half%' GROUP BY 1 ORDER BY 1"),
	"half 0|{0,2}|t\nhalf 1|{1,3}|t", 'each has its own');
is_clean($node, 'shared_changelog');

# ---- policies ---------------------------------------------------------------------------

$mock->create_topic('poison', 1);
query("SELECT eventstore.create_store('strict', 'json')");
query("ALTER TABLE strict ADD CHECK (value <> '13'), ADD CHECK (key <> 'bad')");
query(create('strict', 'poison', 'strict'));
$mock->produce('poison', map { [ "k$_", $_ ] } 1 .. 40);
$mock->produce('poison', [ 'bad', '1' ], [ undef, '1' ], [ "\xff", '1' ], [ 'z', '' ], [ 'end', '1' ]);
source_caught_up($node, 'strict');
is(query("SELECT count(*), count(*) FILTER (WHERE key IN ('k13', 'bad')) FROM strict"), '40|0', 'good records are written');
is(query("SELECT record_offset, sqlstate FROM eventstore.dead_letters WHERE source = 'strict' ORDER BY 1"),
	"12|23514\n40|23514\n41|22004\n42|22021\n43|22P02", 'bad ones are parked, each for its reason');

query("SELECT eventstore.create_store('skipping', 'json')");
query("ALTER TABLE skipping ADD CHECK (value <> '13')");
query(create('skipping', 'poison', 'skipping', "on_error => 'skip'", "on_null_key => 'skip'"));
source_caught_up($node, 'skipping');
is(query('SELECT count(*) FROM skipping'), '41', 'or passed over');
is(query("SELECT skipped, parked FROM eventstore.sources WHERE name = 'skipping'"), '4|0', 'and counted');

query("SELECT eventstore.create_store('stopping', 'json')");
query("ALTER TABLE stopping ADD CONSTRAINT no_13 CHECK (value <> '13')");
query(create('stopping', 'poison', 'stopping', "on_error => 'stop'"));
await_state('stopping', 'stopped');
is(query('SELECT count(*) FROM stopping'), '12', 'or the source stops, behind what is good');
like(query("SELECT message FROM eventstore.sources WHERE name = 'stopping'"), qr/^partition 0, offset 12: .*no_13.*23514/, 'and says why');
is(query("SELECT eventstore.wait_for_source('stopping', '0.1 s')"), 'f', 'wait_for_source ends at its time');
query('ALTER TABLE stopping DROP CONSTRAINT no_13');
query("SELECT eventstore.resume('stopping')");
await_true($node, 'SELECT count(*) = 41 FROM stopping');
await_state('stopping', 'stopped');

# More headers than librdkafka can read.
$mock->create_topic('headers', 1);
foreach my $policy ('park', 'skip', 'stop')
{
	query("SELECT eventstore.create_collection('headers_$policy')");
	query(create("headers_$policy", 'headers', "headers_$policy", "on_error => '$policy'"));
}
query("SELECT eventstore.create_store('headless', 'text', changelog => false)");
query(create('headless', 'headers', 'headless'));
$mock->produce('headers', [ 'a', '1' ], [ 'b', '2', [], { nulls => 100_001 } ], [ 'c', '3' ]);
source_caught_up($node, 'headers_park');
is(query('SELECT string_agg(stream, $$ $$) FROM headers_park'), 'a c', 'headers that are too many: the others are written');
is(query("SELECT record_offset, sqlstate, reason, convert_from(value, 'UTF8'), headers IS NULL FROM eventstore.dead_letters WHERE source = 'headers_park'"),
	'1|54000|its headers are too many or too large for metadata|2|t', 'the record is parked, without them');
source_caught_up($node, 'headers_skip');
is(query('SELECT string_agg(stream, $$ $$) FROM headers_skip'), 'a c', 'or skipped');
await_state('headers_stop', 'stopped');
source_caught_up($node, 'headless');
is(query('SELECT string_agg(key, $$ $$ ORDER BY key) FROM headless'), 'a b c', 'where nothing keeps headers they do not matter');
query("SELECT eventstore.drop_source('headless')");
query("SELECT eventstore.drop_source('headers_$_')") foreach 'park', 'skip', 'stop';

# ---- transform ---------------------------------------------------------------------------

$mock->create_topic('raw', 1);
query("CREATE FUNCTION parse(text) RETURNS jsonb LANGUAGE sql IMMUTABLE AS \$\$SELECT CASE WHEN \$1 <> 'skip' THEN pg_catalog.jsonb_build_object('n', \$1::int) END\$\$");
query("SELECT eventstore.create_store('parsed', 'json')");
query(create('parsed', 'raw', 'parsed', "transform => 'parse(text)'"));
$mock->produce('raw', [ 'a', '1' ], [ 'b', 'skip' ], [ 'c', 'x' ], [ 'd', '4' ], [ 'd', undef ], [ 'e', '5' ]);
source_caught_up($node, 'parsed');
is(query('SELECT key, value FROM parsed ORDER BY key'), qq(a|{"n": 1}\ne|{"n": 5}), 'transform');
is(query("SELECT record_offset, sqlstate FROM eventstore.dead_letters WHERE source = 'parsed'"), '2|22P02', 'its error is the record\'s');

# ---- a start that is a time ---------------------------------------------------------------

$mock->create_topic('times', 1);
query("SELECT eventstore.create_collection('timed')");
query("SET datestyle = 'German, DMY'; SET timezone = 'Asia/Tokyo'; " . create('timed', 'times', 'timed', "start => '01.02.2026 10:00:00'"));
like(query("SELECT start FROM eventstore.sources WHERE name = 'timed'"), qr{^2026-02-01 01:00:00(\+00| UTC)}, 'a start that is a time means the same to the worker');

# ---- pause, resume, drop -----------------------------------------------------------------

query("SELECT eventstore.pause('latest')");
$mock->produce('latest', [ 'p', '1' ]);
is(query("SELECT state FROM eventstore.sources WHERE name = 'latest'"), 'paused', 'paused');
await_true($node, "SELECT count(*) = 0 FROM eventstore.sources WHERE name = 'latest' AND pid IS NOT NULL");
is(query("SELECT count(*) FROM kv WHERE key = 'p'"), '0', 'nothing is written');
query("SELECT eventstore.resume('latest')");
source_caught_up($node, 'latest');
is(query("SELECT count(*) FROM kv WHERE key = 'p'"), '1', 'resumed');
query("SELECT eventstore.drop_source('latest')");
is(query("SELECT count(*) FROM eventstore.source_partitions WHERE source = 'latest'"), '0', 'dropped');
is(query('SELECT count(*) FROM kv'), '4', 'what was written stays');

# ---- the broker goes and comes -------------------------------------------------------------

$mock->down;
await_state('held', 'disconnected');
await_true($node, "SELECT count(*) > 1 FROM eventstore.kafka_log WHERE worker = 'held' AND message LIKE 'no broker for long%'");
pass('where none comes back it begins with a new client, again and again');
is(query("SELECT state FROM eventstore.sources WHERE name = 'held'"), 'disconnected', 'and says so all the time');
$mock->up;
$mock->produce('batches', [ 'e', '1' ], [ 'f', '1' ], [ 'g', '1' ]);
await_true($node, 'SELECT count(*) = 7 FROM held');
await_state('held', 'running');

# ---- processes ------------------------------------------------------------------------------

my $pid = query("SELECT pid FROM eventstore.sources WHERE name = 'held'");
my $holder = session($node);
my $state;
$holder->run("BEGIN; SELECT FROM eventstore.source WHERE name = 'held' FOR UPDATE");
query("SELECT pg_terminate_backend($pid)");
# It notes its start first, and waits half a second for that, again and again.
$mock->await('another process', sub { ($state = query("SELECT s.state FROM eventstore.sources s JOIN eventstore.kafka_workers('source') w USING (pid) WHERE s.name = 'held' AND pid <> $pid AND w.process = 'running'")) ne '' });
is($state, 'starting', 'what the last process did is not what the next one does');
$holder->run('COMMIT');
$holder->quit;
await_true($node, "SELECT pid <> $pid AND state = 'running' FROM eventstore.sources WHERE name = 'held'");
pass('a worker that ended is started again');
$node->restart;
$mock->produce('batches', [ 'h', '1' ], [ 'i', '1' ], [ 'j', '1' ]);
await_true($node, 'SELECT count(*) = 10 FROM held');
pass('so are all after a restart');
query('DROP EXTENSION eventstore CASCADE');
await_true($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'eventstore source'");
pass('none is left without the extension');

$node->stop;
no_crash($node);
done_testing();
