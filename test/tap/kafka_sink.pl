# A collection to a topic: records, keys, order, states, errands, and what is
# refused.  Against the mock cluster.
use strict;
use warnings;

use Digest::MD5 qw(md5_hex);
use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use PostgreSQL::Test::Utils;
use Test::More;

my $mock = kafka_mock();
my $node = server_beside($mock->address, 'sink', 'eventstore.kafka_renew_after = 1s', 'max_prepared_transactions = 2');

sub query { return $node->safe_psql('postgres', $_[0]); }

# create($name, $topic, $collection, further arguments as SQL)
sub create
{
	my ($name, $topic, $collection, @more) = @_;
	query("SELECT eventstore.create_sink(" . join(', ', "'$name', 'k', '$topic', '$collection'", @more) . ')');
	return;
}

sub flushed
{
	my ($name) = @_;
	is(query("SELECT eventstore.flush('$name')"), 't', "$name is flushed");
	return;
}

sub await_state
{
	my ($name, $state) = @_;
	await_true($node, "SELECT state = '$state' FROM eventstore.sinks WHERE name = '$name'");
	pass("$name: $state");
	return;
}

# The records of a topic, in the order of partition and offset.
sub records
{
	my ($topic) = @_;
	return sort { $a->{partition} <=> $b->{partition} || $a->{offset} <=> $b->{offset} } $mock->consume($topic);
}

sub header
{
	my ($record, $name) = @_;
	my @headers = @{ $record->{headers} };
	while (my ($n, $v) = splice(@headers, 0, 2))
	{
		return $v if $n eq $name;
	}
	return undef;
}

# ---- records ---------------------------------------------------------------------------

$mock->create_topic('all', 1);
query("SELECT eventstore.create_collection('c')");
query(q(SELECT eventstore.append('c', 'made', '{"n": 1}', stream => 's', tags => '{a:1,"b\"2"}', metadata => '{"m": true}',
	created_at => '2024-01-02 03:04:05.678+00', id => '01234567-89ab-4def-8123-456789abcdef')));
query(q(SELECT eventstore.append('c', 'raw', body => '\x00ff')));
query(q(SELECT eventstore.append('c', 'none', stream => 's')));
create('all', 'all', 'c');
flushed('all');
my @records = records('all');
is(scalar @records, 3, 'each event is a record');
is($records[0]{key}, 's', 'its key the stream');
is($records[0]{value}, '{"n": 1}', 'its value the data');
is($records[0]{timestamp}, 1704164645678, 'its time created_at');
is_deeply($records[0]{headers},
	[ 'es-position' => '1', 'es-id' => '01234567-89ab-4def-8123-456789abcdef', 'es-type' => 'made', 'es-tags' => '["a:1", "b\"2"]',
		'es-version' => '1', 'es-metadata' => '{"m": true}' ], 'all else in headers');
is_deeply([ $records[1]{key}, $records[1]{value} ], [ undef, "\x00\xff" ], 'no stream: no key; a body as it is');
is_deeply([ $records[2]{key}, $records[2]{value} ], [ 's', undef ], 'neither data nor body: no value');

query(q(SELECT eventstore.append('c', 'later', to_jsonb(i)) FROM generate_series(1, 100) i));
await_true($node, "SELECT position = 103 AND lag_events = 0 FROM eventstore.sinks WHERE name = 'all'");
is(join(',', map { header($_, 'es-position') } records('all')), join(',', 1 .. 103), 'what comes later follows by itself, in order');

# ---- JSON: what PostgreSQL would write ------------------------------------------------------

$mock->create_topic('json', 1);
query("SELECT eventstore.create_collection('json')");
query(q(SELECT count(eventstore.append('json', 'x', j::jsonb, tags => '{one:1}', metadata => j::jsonb)) FROM unnest(ARRAY[
	'null', 'true', 'false', '"s"', '""', '0', '-1.50', '1e20', '12345678901234567890123456789.1234567890', '[]', '{}', '[null]', '[[]]', '[{}]', '[[1, 2], [], [3]]',
	'{"a": {"b": [1, {"c": null}, "d"], "e": {}}, "f": [], "": ""}', '["a", 1, true, null, {"k": [false]}]', '"\u00e4\u20ac\ud83d\ude00"', '{"\\"k\\\\": "\b\f\n\r\t\/"}',
	'"\u0001\u001f \u007f\u0080"']) j));
# Each character at each place of a word, and at its end.
query(q(SELECT count(eventstore.append('json', 'x', to_jsonb(t), tags => ARRAY['t:' || t], metadata => jsonb_build_object(t, t)))
	FROM generate_series(0, 20) n, generate_series(0, 3) m, unnest(ARRAY[1, 9, 10, 31, 32, 33, 34, 35, 91, 92, 93, 126, 127, 128, 255, 8364, 128512]) c, LATERAL (SELECT repeat('x', n) || chr(c) || repeat('y', m * 3) t) t));
create('json', 'json', 'json');
flushed('json');
is(join(' ', map { md5_hex($_->{value}) . md5_hex(header($_, 'es-tags')) . md5_hex(header($_, 'es-metadata')) } records('json')),
	query(q(SELECT string_agg(md5(data::text) || md5(to_jsonb(tags)::text) || md5(metadata::text), ' ' ORDER BY position) FROM json)), 'data, tags and metadata as they are in SQL');

# ---- keys ---------------------------------------------------------------------------------

sub keys_of
{
	my ($key) = @_;
	my $topic = 'key' . ++our $topics;
	$mock->create_topic($topic, 1);
	create($topic, $topic, 'keyed', "key => '$key'");
	flushed($topic);
	my @keys = map { $_->{key} // 'null' } records($topic);
	query("SELECT eventstore.drop_sink('$topic')");
	return join ' ', @keys;
}

query("SELECT eventstore.create_collection('keyed')");
query(q(SELECT eventstore.append('keyed', 'a', '{"c": "x"}', tags => '{one:1,user:7,user:8}', id => '01234567-89ab-4def-8123-456789abcdef'), eventstore.append('keyed', 'b', '1', stream => 's', id => 'ffffffff-89ab-4def-8123-456789abcdef')));
query(q(CREATE FUNCTION my_key(eventstore.event) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT $1.data->>'c'$$));
query(q(CREATE FUNCTION my_bytes(eventstore.event) RETURNS bytea LANGUAGE sql IMMUTABLE AS $$SELECT decode(lpad(to_hex($1.position), 4, '0'), 'hex')$$));
is(keys_of('stream'), 'null s', 'key: stream');
is(keys_of('id'), '01234567-89ab-4def-8123-456789abcdef ffffffff-89ab-4def-8123-456789abcdef', 'id');
is(keys_of('position'), '1 2', 'position');
is(keys_of('type'), 'a b', 'type');
is(keys_of('none'), 'null null', 'none');
is(keys_of('tag:user'), '7 null', 'tag');
is(keys_of('my_key(eventstore.event)'), 'x null', 'a function');
is(keys_of('public.my_bytes(eventstore.event)'), "\0\1 \0\2", 'one that makes bytes');

# As Java's producers: murmur2 of the key; these are partitions that they choose.
$mock->create_topic('spread', 10);
query("SELECT eventstore.create_collection('spread')");
query("SELECT eventstore.append('spread', 'x', stream => k) FROM unnest('{foobar,21,a-little-bit-long-string}'::text[]) k");
create('spread', 'spread', 'spread');
flushed('spread');
my %murmur2 = (foobar => -790332482, 21 => -973932308, 'a-little-bit-long-string' => -985981536);
is_deeply({ map { $_->{key} => $_->{partition} } records('spread') },
	{ map { $_ => ($murmur2{$_} & 0x7fffffff) % 10 } keys %murmur2 }, 'keys are spread as by Java');

# ---- a store's changelog --------------------------------------------------------------------

$mock->create_topic($_, 1) foreach qw(kv bytes);
query("SELECT eventstore.create_store('kv', 'json'); SELECT eventstore.create_store('blobs', 'bytes', 'bytes')");
query(q(SELECT eventstore.put('kv', 'a', 'null'); SELECT eventstore.put('kv', 'b', '1'); SELECT eventstore.delete('kv', 'b')));
query(q(INSERT INTO blobs (key, value) VALUES ('\x00ff', '\xfe')));
create('kv', 'kv', 'kv');
create('blobs', 'bytes', 'blobs');
flushed($_) foreach qw(kv blobs);
is(join(' ', map { "$_->{key}=" . ($_->{value} // '(none)') } records('kv')), 'a=null b=1 b=(none)', 'a store: put, and delete without a value');
is(join(' ', map { "$_->{key}=$_->{value}" } records('bytes')), "\0\xff=\xfe", 'keys that are bytes are those bytes');

# ---- queries, after, rights ------------------------------------------------------------------

$mock->create_topic($_, 1) foreach qw(query after rls);
create('query', 'query', 'c', q(query => '[{"types": ["raw"]}, {"tags": ["a:1"]}]'));
create('after', 'after', 'c', 'after => 101');
flushed($_) foreach qw(query after);
is(join(' ', map { header($_, 'es-position') } records('query')), '1 2', 'a query');
is(query("SELECT position, lag_events FROM eventstore.sinks WHERE name = 'query'"), '103|0', 'what does not match is passed');
is(join(' ', map { header($_, 'es-position') } records('after')), '102 103', 'after');

query(q(CREATE ROLE app LOGIN; GRANT USAGE ON FOREIGN SERVER k TO app; GRANT SELECT ON c, kv_changelog TO app));
query(q(CREATE POLICY p ON c TO app USING (type <> 'later'); ALTER TABLE c ENABLE ROW LEVEL SECURITY));
query(q(SET ROLE app; SELECT eventstore.create_sink('rls', 'k', 'rls', 'c')));
flushed('rls');
is(join(' ', map { header($_, 'es-position') } records('rls')), '1 2 3', 'row-level security of the owner holds');
is(query("SELECT position FROM eventstore.sinks WHERE name = 'rls'"), 103, 'and what he does not see is passed');
query('REVOKE SELECT ON c FROM app');
query(q(SELECT eventstore.append('c', 'secret')));
await_state('rls', 'retrying');
like(query("SELECT message FROM eventstore.sinks WHERE name = 'rls'"), qr/permission denied/, 'without the right nothing is published');
is(scalar(my @none = records('rls')), 3, 'indeed');
query('GRANT SELECT ON c TO app');
await_state('rls', 'running');

sub refused
{
	my ($state, $call, $what) = @_;
	is(sqlstate_of($node, "SET ROLE app; SELECT eventstore.$call"), $state, $what);
	return;
}
refused('42710', "create_sink('rls', 'k', 'rls', 'c')", 'a name that is taken');
query("SELECT eventstore.create_source('a source', 'k', 'all', 'kv')");
refused('42710', "create_sink('a source', 'k', 'rls', 'c')", 'by a source, too');
is(sqlstate_of($node, "SELECT eventstore.create_source('rls', 'k', 'all', 'kv')"), '42710', 'and the reverse');
refused('LG007', "drop_sink('a source')", 'a source is no sink');
refused('LG007', "wait_for_source('rls')", 'nor the reverse');
refused('42501', "$_", "not the owner's: $_") foreach map { "$_('all')" } qw(drop_sink pause resume);
refused('42501', "create_sink('x', 'k', 'x', 'keyed')", 'no right to read it');
refused('LG007', "create_sink('x', 'k', 'x', 'pg_class')", 'no collection');
refused('LG004', "create_sink('x', 'k', 'x', 'c', after => 1000)", 'a position that there is not');
refused('22023', "create_sink('x', 'k', 'x', 'c', $_)", $_) foreach (
	"key => 'nothing'", "key => 'tag:'", "key => 'eventstore.head(regclass)'", "on_error => 'x'", 'flush_count => 0', "flush_interval => '-1 s'", "query => '1'",
	'after => -1', "progress_topic => 'x'", "exactly_once => true, progress_topic => 'x'", q(producer_properties => '{"acks": "1"}'),
	q(producer_properties => '{"transactional.id": "x"}'));
refused('42883', "create_sink('x', 'k', 'x', 'c', key => 'eventstore.such(eventstore.event)')", 'no such function');
refused('22023', "create_sink('x', 'k', 'a b', 'c')", 'a bad topic');
query('CREATE ROLE stranger');
is(query('SET ROLE stranger; SELECT count(*) FROM eventstore.sinks'), '0', 'who may not read the collection does not see its sinks');

# ---- an event that cannot be published --------------------------------------------------------

query(q(CREATE FUNCTION divide(eventstore.event) RETURNS text LANGUAGE sql AS $$SELECT (100 / ($1.data #>> '{}')::int)::text$$));
query("SELECT eventstore.create_collection('risky')");
query("SELECT eventstore.append('risky', 'x', to_jsonb(i % 5)) FROM generate_series(1, 12) i");
foreach my $policy (qw(skip park stop))
{
	$mock->create_topic($policy, 1);
	create($policy, $policy, 'risky', "key => 'divide(eventstore.event)'", "on_error => '$policy'");
}
flushed($_) foreach qw(skip park);
is(join(' ', map { header($_, 'es-position') } records($_)), '1 2 3 4 6 7 8 9 11 12', "$_: the others arrive") foreach qw(skip park);
is(query("SELECT skipped, parked, (SELECT sum(parked) FROM eventstore.sinks WHERE name = 'park') FROM eventstore.sinks WHERE name = 'skip'"), '2|0|2', 'and are counted');
is(query("SELECT position, sqlstate, collection, sink IS NOT NULL FROM eventstore.dead_letters WHERE sink = 'park' ORDER BY 1"), "5|22012|risky|t\n10|22012|risky|t", 'dead letters');
# Those before it may still be on their way.
await_true($node, "SELECT state = 'stopped' AND position = 4 FROM eventstore.sinks WHERE name = 'stop'");
like(query("SELECT message FROM eventstore.sinks WHERE name = 'stop'"), qr/^position 5: division by zero \(22012\)/, 'stop: it says at which');
is(query("SELECT eventstore.flush('stop', '0.1 s')"), 'f', 'flush ends at its time');
query(q(CREATE OR REPLACE FUNCTION divide(eventstore.event) RETURNS text LANGUAGE sql AS $$SELECT 'k'$$));
query("SELECT eventstore.resume('stop')");
flushed('stop');
is(join(' ', map { header($_, 'es-position') } records('stop')), join(' ', 1 .. 12), 'and goes on when that was mended');

is(query("SELECT eventstore.retry_dead_letters('park', ARRAY(SELECT id FROM eventstore.dead_letters WHERE sink = 'park' AND position = 10))"), '1', 'a dead letter is tried again: the one that is named');
await_true($node, "SELECT string_agg(position::text, ' ') = '5' FROM eventstore.dead_letters WHERE sink = 'park'");
is(join(' ', map { header($_, 'es-position') } records('park')), '1 2 3 4 6 7 8 9 11 12 10', 'it is published');
query(q(CREATE OR REPLACE FUNCTION divide(eventstore.event) RETURNS text LANGUAGE sql AS $$SELECT (1 / ($1.position - 5))::text$$));
is(query("SELECT eventstore.retry_dead_letters('park')"), '1', 'the other');
await_true($node, "SELECT attempts = 2 FROM eventstore.dead_letters WHERE sink = 'park'");
is(query("SELECT sqlstate FROM eventstore.dead_letters WHERE sink = 'park'"), '22012', 'which fails again: one attempt more');
query(q(CREATE OR REPLACE FUNCTION divide(eventstore.event) RETURNS text LANGUAGE sql AS $$SELECT 'k'$$));
query("SELECT eventstore.pause('park'), eventstore.retry_dead_letters('park')");
await_true($node, "SELECT pid IS NULL FROM eventstore.sinks WHERE name = 'park'");
query("SELECT eventstore.append('risky', 'x', '1')");
query("SELECT eventstore.resume('park')");
await_true($node, "SELECT count(*) = 0 FROM eventstore.dead_letters WHERE sink = 'park'");
flushed('park');
is(join(' ', map { header($_, 'es-position') } records('park')), '1 2 3 4 6 7 8 9 11 12 10 5 13', 'mended: both are there, and what came later');
is(sqlstate_of($node, "SET ROLE app; SELECT eventstore.retry_dead_letters('park')"), '42501', 'not for others');

$mock->create_topic('big', 1);
create('big', 'big', 'risky', "on_error => 'park'", q(producer_properties => '{"message.max.bytes": 2000}'), "after => 13");
query("SELECT eventstore.append('risky', 'x', to_jsonb(repeat('x', n))) FROM unnest('{1,5000,2}'::int[]) n");
flushed('big');
is(join(' ', map { header($_, 'es-position') } records('big')), '14 16', 'too large: the others arrive');
is(query("SELECT position, sqlstate FROM eventstore.dead_letters WHERE sink = 'big'"), '15|54000', 'and it is parked');
query("SELECT eventstore.retry_dead_letters('big')");
await_true($node, "SELECT attempts = 2 AND sqlstate = '54000' FROM eventstore.dead_letters WHERE sink = 'big'");
query("SELECT eventstore.drop_sink('big')");
is(query("SELECT count(*) FROM eventstore.sink_dead_letter WHERE position = 15"), '0', 'dropped with its dead letters');

# ---- pause, resume, restart, the broker -----------------------------------------------------------

query("SELECT eventstore.pause('all')");
await_true($node, "SELECT state = 'paused' AND pid IS NULL FROM eventstore.sinks WHERE name = 'all'");
query(q(SELECT eventstore.append('c', 'paused')));
is(query("SELECT eventstore.flush('all')"), 'f', 'paused');
query("SELECT eventstore.resume('all')");
flushed('all');
# Nobody calls the worker.
query("BEGIN; SELECT eventstore.pause('all'); PREPARE TRANSACTION 'p'");
query("COMMIT PREPARED 'p'");
await_true($node, "SELECT state = 'paused' AND pid IS NULL FROM eventstore.sinks WHERE name = 'all'");
pass('paused by a transaction that was prepared');
query("SELECT eventstore.resume('all')");
flushed('all');
# whose position is saved, or it would come again
await_true($node, "SELECT lag_events = 0 FROM eventstore.sinks WHERE name = 'all'");
$node->restart;
query(q(SELECT eventstore.append('c', 'restarted')));
flushed('all');
$mock->down;
query(q(SELECT eventstore.append('c', 'down')));
await_state('all', 'disconnected');
await_true($node, "SELECT count(*) > 1 FROM eventstore.kafka_log WHERE worker = 'all' AND message LIKE 'no broker for long%'");
pass('where none comes back it begins with a new client, again and again');
is(query("SELECT state FROM eventstore.sinks WHERE name = 'all'"), 'disconnected', 'and says so all the time');
$mock->up;
await_state('all', 'running');
flushed('all');
is(join("\n", map { header($_, 'es-position') } records('all')), query("SELECT position FROM eventstore.read('c')"), 'each once, in order, where nothing was killed');

# Nobody else is there to take an error.
my @sinks = split /\n/, query('SELECT name FROM eventstore.sinks WHERE NOT paused');
query("SELECT eventstore.pause('$_')") foreach @sinks;
await_true($node, 'SELECT count(pid) = 0 FROM eventstore.sinks');
query("SELECT eventstore.resume('all')");
await_state('all', 'running');
$mock->inject('Produce', 1, 'TOPIC_AUTHORIZATION_FAILED');
query(q(SELECT eventstore.append('c', 'denied')));
flushed('all');
is(header((records('all'))[-1], 'es-position'), query("SELECT eventstore.head('c')"), 'an error of the broker is tried again');

# What a client cannot recover from ends it, and another one goes on.
query("SELECT eventstore.pause('all')");
await_true($node, 'SELECT count(pid) = 0 FROM eventstore.sinks');
$mock->inject('InitProducerId', 1, 'CLUSTER_AUTHORIZATION_FAILED');
query(q(SELECT eventstore.append('c', 'fatal')));
query("SELECT eventstore.resume('all')");
flushed('all');
is(header((records('all'))[-1], 'es-position'), query("SELECT eventstore.head('c')"), 'a fatal error: published by another client');
is(query("SELECT count(*) > 0 FROM eventstore.kafka_log WHERE worker = 'all' AND message LIKE 'failed for good%'"), 't', 'it was one');
query("SELECT eventstore.resume('$_')") foreach @sinks;

# Fenced as it commits: all of the transaction was acknowledged.
query("SELECT eventstore.create_collection('f')");
# Its progress topic is there: not every mock has a controller to make one.
$mock->create_topic($_, 1) foreach 'fenced', 'eventstore-sink-progress';
create('fenced', 'fenced', 'f', 'exactly_once => true', "flush_interval => '1 hour'");
await_state('fenced', 'running');
query("SELECT eventstore.append('f', 'x') FROM generate_series(1, 5)");
$mock->await('they have arrived', sub { 5 == (() = $mock->consume('fenced')) });
$mock->inject('EndTxn', 1, 'PRODUCER_FENCED');
query("SELECT eventstore.flush('fenced', '10 ms')");
await_state('fenced', 'fenced');
is(query("SELECT eventstore.flush('fenced', '0.2 s')"), 'f', 'nothing of it is said to be published');
is(query("SELECT lag_events FROM eventstore.sinks WHERE name = 'fenced'"), '5', 'nor passed over');
query("SELECT eventstore.drop_sink('fenced')");

query('REVOKE USAGE ON FOREIGN SERVER k FROM app');
await_state('rls', 'denied');
query('GRANT USAGE ON FOREIGN SERVER k TO app');
await_state('rls', 'running');

# ---- what is retained ---------------------------------------------------------------------------

query("SELECT eventstore.create_collection('short', segment_size => 1000)");
$mock->create_topic('short', 1);
create('short', 'short', 'short');
flushed('short');
query("SELECT eventstore.pause('short')");
query("SELECT eventstore.set_option('short', 'retain_events', '10')");
query("INSERT INTO short (type) SELECT 'x' FROM generate_series(1, 900)") foreach 1 .. 5;
query("SELECT eventstore.create_collection('other', segment_size => 1000); SELECT eventstore.set_option('other', 'retain_events', '10')");
query("INSERT INTO other (type) SELECT 'x' FROM generate_series(1, 900)") foreach 1 .. 5;
await_true($node, "SELECT min(position) > 1000 FROM other");
is(query("SELECT min(position) FROM short"), '1', 'retention waits for a sink');
query("SELECT eventstore.truncate_before('short', 3000)");
query("SELECT eventstore.resume('short')");
await_state('short', 'gap');
query("SELECT eventstore.resume('short')");
flushed('short');
my @rest = records('short');
my $last_lost = header($rest[0], 'es-position') - 1;
is(query("SELECT position || ': ' || reason FROM eventstore.dead_letters WHERE sink = 'short'"), "1: events up to position $last_lost are no longer retained", 'after a gap it goes on with what is left, and the gap is on record');

# ---- a copy, and the end --------------------------------------------------------------------------

query("SELECT eventstore.pause('short')");
query('UPDATE eventstore.sink SET system_identifier = 1, paused = false WHERE name = $$short$$');
is(query("SELECT state FROM eventstore.sinks WHERE name = 'short'"), 'cloned', 'a copy of the server publishes nothing');
query("SELECT eventstore.resume('short')");
flushed('short');
query('DROP EXTENSION eventstore CASCADE');
await_true($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'eventstore sink'");
pass('workers leave with the extension');
no_crash($node);

done_testing();
