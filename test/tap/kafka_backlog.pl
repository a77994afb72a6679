# What was restored into an empty store serves at once, and is recorded in its changelog
# later: whatever is killed, changed, dropped or made anew in between.  Against a real
# broker.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use Digest::MD5 qw(md5_hex);
use EventstoreTest;
use EventstoreTest::Kafka;
use EventstoreTest::Session;
use Test::More;

# More than two portions (backlog.c).
my $keys = 24_000;
my $kafka = kafka_broker();
my $node = server_beside($kafka->address, 'backlog');

sub query { return $node->safe_psql('postgres', $_[0]); }

# A topic, and a changelog topic that has the keys of a former server.
sub make_topics
{
	my ($name) = @_;

	note("---- $name");
	$kafka->create_topic($name, 2);
	$kafka->create_topic("$name-changelog", 2, 'cleanup.policy' => 'compact');
	# As Kafka's own producers do: a key changed by SQL is in the partition of its record.
	$kafka->produce_grid("$name-changelog", 10, 100, $keys / 1000, { properties => { partitioner => 'murmur2_random' } });
	return;
}

# Restored, while what is to record it rests.
sub restore
{
	my ($name, $more) = @_;

	query("BEGIN; SELECT eventstore.create_source('$name', 'k', '$name', '$name', changelog_topic => '$name-changelog' " . ($more // '') . ");
		UPDATE eventstore.sink SET paused = true WHERE changelog_of = (SELECT id FROM eventstore.source WHERE name = '$name'); COMMIT");
	source_caught_up($node, $name);
	return;
}

sub backlog
{
	my ($name) = @_;
	return query("SELECT coalesce(sum(key_count), 0) FROM eventstore.store_backlog WHERE store = '$name'::regclass");
}

sub in_store
{
	my ($name) = @_;
	return query("SELECT count(*) || ' ' || md5(string_agg(key || '=' || (value->>'hash'), ' ' ORDER BY key)) FROM $name");
}

# The last value of each key in the changelog topic, as in_store() tells those of the store.
sub published
{
	my ($name) = @_;
	my %last;

	$last{ $_->{key} } = $_->{value} foreach $kafka->consume("$name-changelog");
	my @there = sort grep { defined $last{$_} } keys %last;
	return @there . ' ' . md5_hex(join ' ', map { "$_=" . ($last{$_} =~ /"hash": ?(\d+)/)[0] } @there);
}

sub await_published
{
	my ($name) = @_;

	await_true($node, "SELECT changelog_lag = 0 AND changelog_state = 'running' FROM eventstore.sources WHERE name = '$name'");
	return;
}

# As a row of the grid.
sub value { return "'{\"hash\": $_[0]}'"; }

# ---- a crash, and changes, before it is recorded -----------------------------------------

make_topics('kv');
query("SELECT eventstore.create_store('kv')");
restore('kv');
is(query('SELECT count(*), count(*) FILTER (WHERE version = 1) FROM kv'), "$keys|$keys", 'all is there');
is(backlog('kv') . '|' . query('SELECT count(*) FROM kv_changelog'), "$keys|0", 'and nothing is recorded');
is_clean($node, 'kv', 'which is no fault');
is(query("SELECT eventstore.get_at('kv', '1/0/0/3', now())->>'hash'"), '3', 'a value of that time');
query("SELECT eventstore.put('kv', '1/0/0/1', " . value(1001) . "), eventstore.delete('kv', '1/0/0/2'), eventstore.put('kv', 'new', " . value(7) . ')');
query("UPDATE kv SET value = " . value(1005) . " WHERE key BETWEEN '1/5/5/' AND '1/5/6/'");
$kafka->produce('kv', [ '1/0/0/4', '{"hash": 1004}' ], [ '1/0/0/5', undef ]);
source_caught_up($node, 'kv');
is(query(q{SELECT string_agg(version || type || coalesce(metadata->>'topic', ''), ' ' ORDER BY position) FROM kv_changelog WHERE stream = '1/0/0/4'}),
	'1putkv-changelog 2putkv', 'a change has what was restored before it');
$node->stop('immediate');
$node->start;
is(backlog('kv'), $keys, 'a crash forgets nothing of it');
is_clean($node, 'kv');
my @before = $kafka->consume('kv-changelog');
query("SELECT eventstore.resume('kv')");
await_recorded($node, 'kv');
is(query("SELECT count(*) FROM kv k JOIN kv_changelog e ON e.stream = k.key AND e.version = 1 AND e.type = 'put' AND e.metadata->>'topic' = 'kv-changelog'"),
	$keys - 2, 'each key that was restored has that as its first event');
is_clean($node, 'kv');
await_published('kv');
is(published('kv'), in_store('kv'), 'the topic has what the store has');
my @after = $kafka->consume('kv-changelog');
is(@after - @before, query('SELECT count(*) FROM kv_changelog') - $keys, 'and what was restored is not published again');
my %offset = map { ($_->{key} => "$_->{partition}|$_->{offset}") } @before;
is(query("SELECT metadata->>'partition', metadata->>'offset' FROM eventstore.peek('kv_changelog', '1/3/3/3')"), $offset{'1/3/3/3'}, 'with the place that it has there');
query("SELECT eventstore.drop_source('kv')");

# ---- killed while it records --------------------------------------------------------------

make_topics('killed');
query("SELECT eventstore.create_store('killed')");
restore('killed');
# Somebody changes one key the whole time, and another is locked.
my $holder = EventstoreTest::Session->new($node);
$holder->run("BEGIN; SELECT FROM killed WHERE key = '1/9/99/9' FOR UPDATE; UPDATE killed SET value = " . value(1) . " WHERE key = '1/0/0/9'");
query("SELECT eventstore.resume('killed')");
foreach my $round (1 .. 4)
{
	query("SELECT pg_terminate_backend(pid) FROM eventstore.kafka_workers('sink') WHERE pid IS NOT NULL");
	query("SELECT eventstore.put('killed', '1/1/1/1', " . value($round) . ')');
	await_true($node, "SELECT EXISTS (SELECT FROM eventstore.kafka_workers('sink') WHERE pid IS NOT NULL)");
}
await_true($node, "SELECT sum(key_count) = 2 FROM eventstore.store_backlog WHERE store = 'killed'::regclass");
pass('what somebody has locked keeps nothing else from being recorded');
$holder->run('ROLLBACK');
await_recorded($node, 'killed');
is(query("SELECT count(DISTINCT stream), count(*) FROM killed_changelog WHERE metadata->>'topic' = 'killed-changelog'"), "$keys|$keys", 'each is recorded once');
is_clean($node, 'killed');
await_published('killed');
is(published('killed'), in_store('killed'), 'the topic has what the store has');
query("SELECT eventstore.drop_source('killed')");

# ---- the topic is made anew meanwhile --------------------------------------------------------

make_topics('anew');
query("SELECT eventstore.create_store('anew')");
restore('anew');
query("SELECT eventstore.put('anew', '1/0/0/1', " . value(1001) . ')');
$kafka->delete_topic('anew-changelog');
$kafka->create_topic('anew-changelog', 2, 'cleanup.policy' => 'compact');
# One row is locked when it is accepted.
$holder = EventstoreTest::Session->new($node);
$holder->run("BEGIN; SELECT FROM anew WHERE key = '1/9/99/9' FOR UPDATE; UPDATE anew SET value = " . value(1) . " WHERE key = '1/0/0/9'");
query("SELECT eventstore.resume('anew')");
await_true($node, "SELECT changelog_state = 'topic_recreated' FROM eventstore.sources WHERE name = 'anew'");
query("SELECT eventstore.resume('anew')");
await_true($node, "SELECT changelog_state <> 'topic_recreated' OR EXISTS (SELECT FROM pg_locks WHERE NOT granted) FROM eventstore.sources WHERE name = 'anew'");
$holder->run('ROLLBACK');
await_published('anew');
is(backlog('anew'), '0', 'before a topic made anew is accepted all is recorded');
is(published('anew'), in_store('anew'), 'and it gets all of it');
query("SELECT eventstore.drop_source('anew')");

# ---- the source is dropped meanwhile ------------------------------------------------------------

make_topics('dropped');
query("SELECT eventstore.create_store('dropped')");
restore('dropped');
$node->psql('postgres', "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT eventstore.drop_source('dropped'); COMMIT");
is(backlog('dropped'), $keys, 'a source is not dropped by who does not see all that is to be recorded');
query("SELECT eventstore.drop_source('dropped')");
is(backlog('dropped') . '|' . query('SELECT count(*) FROM dropped_changelog'), "0|$keys", 'who drops a source records what is left');
is_clean($node, 'dropped');

# Its store as another one's: all of it goes to the other topic.
$kafka->create_topic('other-changelog', 2, 'cleanup.policy' => 'compact');
query("SELECT eventstore.create_source('other', 'k', 'dropped', 'dropped', changelog_topic => 'other-changelog')");
source_caught_up($node, 'other');
await_published('other');
is(published('other'), in_store('dropped'), 'a second topic gets what was restored from the first');

no_crash($node);
done_testing();
