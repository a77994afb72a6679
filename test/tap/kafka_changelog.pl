# A store's changelog topic: restored from, followed, published.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use Test::More;

my $mock = kafka_mock();
my $node = server_beside($mock->address, 'changelog');
my $fast = q(consumer_properties => '{"fetch.wait.max.ms": 5}');

sub query { return $node->safe_psql('postgres', $_[0]); }

# What a changelog topic has of a change that a record made.
sub made_by
{
	my ($topic, $partition, $offset) = @_;
	return [ 'es-topic' => $topic, 'es-partition' => $partition, 'es-offset' => $offset ];
}

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
source_caught_up($node, 'in');
is(query("SELECT string_agg(key || '=' || value, ' ' ORDER BY key) FROM kv"),
	'a="new" c=1 d={"x": 1} p0-10=10 p0-11=11 p0-9=9 p1-0=0 p1-1=1 p1-2=2',
	'the topic\'s last value of each key, then the records behind those that it came from');
is(query("SELECT topic, partition, position FROM eventstore.source_partitions ORDER BY 1, 2"),
	"in|0|12\nin|1|3\nin-changelog|0|5\nin-changelog|1|1", 'offsets of both topics');
is(query("SELECT metadata->>'topic' FROM eventstore.peek('kv_changelog', 'a')"), 'in-changelog', 'what was restored says where it came from');
is_clean($node, 'kv_changelog');

# ---- published: what the store has, wherever it came from -----------------------------------

query("SELECT eventstore.put('kv', 'by SQL', '1')");
query("DELETE FROM kv WHERE key = 'a'");
$mock->produce('in', [ 'p1-0', undef, [], { partition => 1 } ]);

sub published
{
	my ($topic) = @_;
	my %values;

	$values{ $_->{key} } = $_->{value} foreach $mock->consume($topic);
	return join ' ', map { "$_=$values{$_}" } sort grep { defined $values{$_} } keys %values;
}

sub in_store
{
	my ($store) = @_;
	return query("SELECT string_agg(key || '=' || value, ' ' ORDER BY key) FROM $store");
}

source_caught_up($node, 'in');
$mock->await('all of the store is in the changelog topic', sub { published('in-changelog') eq in_store('kv') });
pass('the changelog topic has what the store has');
is(query("SELECT changelog_state FROM eventstore.sources WHERE name = 'in'"), 'running', 'and the view says so');
await_true($node, "SELECT changelog_lag = 0 FROM eventstore.sources WHERE name = 'in'");
my ($made) = grep { $_->{key} eq 'p0-11' } $mock->consume('in-changelog');
my %headers = @{ $made->{headers} };
is_deeply([ @headers{qw(es-topic es-partition es-offset)}, $made->{partition} ], [ 'in', 0, 11, 0 ], 'where it came from, in the partition of the same number');
is(scalar(grep { $_->{key} eq 'c' } $mock->consume('in-changelog')), 1, 'what was restored is not published again');

# What publishes it is resumed with the source.
query('UPDATE eventstore.sink SET failure = $$made to$$ WHERE changelog_of = (SELECT id FROM eventstore.source WHERE name = $$in$$)');
query("SELECT pg_terminate_backend(pid) FROM eventstore.kafka_workers('sink') WHERE pid IS NOT NULL");
await_true($node, "SELECT changelog_state = 'failed' FROM eventstore.sources WHERE name = 'in'");
query("SELECT eventstore.resume('in')");
await_true($node, "SELECT changelog_state = 'running' FROM eventstore.sources WHERE name = 'in'");
pass('resume() of the source: so is what publishes its changelog');

# ---- half published ---------------------------------------------------------------------------

# A batch of the records 2 to 6, whose changes are recorded in the order of keys: c, d and e are missing.
$mock->create_topic('torn', 1);
$mock->create_topic('torn-changelog', 1);
$mock->produce('torn', map { [ $_, '1' ] } qw(a b e d c b a));
$mock->produce('torn-changelog',
	[ 'a', '0', made_by('torn', 0, 0) ],
	[ 'b', '0', made_by('torn', 0, 1) ],
	[ 'a', '1', [ @{ made_by('torn', 0, 6) }, 'es-since' => '2' ] ],
	[ 'b', '1', [ @{ made_by('torn', 0, 5) }, 'es-since' => '2' ] ]);
query("SELECT eventstore.create_store('torn')");
query("SELECT eventstore.create_source('torn', 'k', 'torn', 'torn', changelog_topic => 'torn-changelog', $fast)");
source_caught_up($node, 'torn');
is(in_store('torn'), 'a=1 b=1 c=1 d=1 e=1', 'a transaction that is there in part is read from the source once more');
$mock->await('all of it is published', sub { published('torn-changelog') eq in_store('torn') });
my %since = map { my %h = @{ $_->{headers} }; ($_->{key} => $h{'es-since'}) } $mock->consume('torn-changelog');
is_deeply(\%since, { a => 2, b => 2, c => 2, d => 2, e => undef }, 'each change says where its transaction begins');

# ---- a store that has something newer ------------------------------------------------------

$mock->create_topic('new', 1);
$mock->create_topic('new-changelog', 1);
$mock->produce('new', map { [ "k$_", $_ ] } 0 .. 5);
query("SELECT eventstore.create_store('newer')");
query("SELECT eventstore.create_source('newer', 'k', 'new', 'newer', $fast)");
source_caught_up($node, 'newer');
query("SELECT eventstore.drop_source('newer'), eventstore.put('newer', 'k0', '\"by SQL\"')");
$mock->produce('new-changelog',
	[ 'k0', '"old"',   made_by('new', 0, 0) ],
	[ 'k1', '"old"',   made_by('new', 0, 0) ],
	[ 'k2', '"newer"', made_by('new', 0, 6) ]);
$mock->produce('new', [ 'k6', '"the changelog topic has come past it"' ], [ 'k7', 7 ]);
query("SELECT eventstore.create_source('newer', 'k', 'new', 'newer', changelog_topic => 'new-changelog', $fast)");
source_caught_up($node, 'newer');
is(in_store('newer'), 'k0="by SQL" k1=1 k2="newer" k3=3 k4=4 k5=5 k7=7', 'keeps it; the rest is restored');

# ---- a change by SQL that an older record must not undo ------------------------------------------

$mock->create_topic('same', 1);
$mock->create_topic('same-changelog', 1);
query("SELECT eventstore.create_store('same')");
query("SELECT eventstore.create_source('same', 'k', 'same', 'same', changelog_topic => 'same-changelog', $fast)");
$mock->produce('same', [ 'k', 1 ]);
source_caught_up($node, 'same');
$mock->produce('same', [ 'k', 1 ]);
source_caught_up($node, 'same');
query("SELECT eventstore.put('same', 'k', '2')");
$mock->await('it is published', sub { published('same-changelog') eq 'k=2' });
query("SELECT eventstore.create_store('again')");
query("SELECT eventstore.drop_source('same')");
query("SELECT eventstore.create_source('again', 'k', 'same', 'again', changelog_topic => 'same-changelog', $fast)");
source_caught_up($node, 'again');
is(in_store('again'), 'k=2', 'the record that changed nothing is not read again');

# Another server has read on, and this one is back.
query("SELECT eventstore.drop_source('again'), eventstore.put('again', 'mine', '1')");
query("SELECT eventstore.create_source('again', 'k', 'same', 'again', changelog_topic => 'same-changelog', $fast)");
source_caught_up($node, 'again');
query("SELECT eventstore.put('again', 'k', '3'), eventstore.put('again', 'mine', '2')");
await_true($node, "SELECT changelog_lag = 0 FROM eventstore.sources WHERE name = 'again'");
query("SELECT eventstore.drop_source('again')");
$mock->produce('same', [ 'k', 4 ]);
$mock->produce('same-changelog', [ 'k', '4', made_by('same', 0, 2) ], [ 'mine', '0', made_by('same', 0, 1) ]);
# What publishes is there before the source, and must leave it the first word: k=3 would be restored behind k=4.
query("SELECT eventstore.create_source('again', 'k', 'same', 'again', changelog_topic => 'same-changelog', $fast), eventstore.pause('again')");
await_true($node, "SELECT changelog_state = 'running' FROM eventstore.sources WHERE name = 'again'");
query("SELECT eventstore.resume('again')");
source_caught_up($node, 'again');
is(in_store('again'), 'k=4 mine=2', 'a change by SQL is older than that of a record that the source had not read then');
$mock->await('the changelog topic ends with what the store has', sub { published('same-changelog') eq in_store('again') });

# ... and what was restored before is of the same topic, so what is behind it there is newer.
query("SELECT eventstore.drop_source('again')");
$mock->produce('same-changelog', [ 'k', '5', made_by('same', 0, 2) ], [ 'l', '1' ]);
query("SELECT eventstore.create_source('again', 'k', 'same', 'again', changelog_topic => 'same-changelog', $fast)");
source_caught_up($node, 'again');
is(in_store('again'), 'k=5 l=1 mine=2', 'what another server has changed by SQL since is restored');
$mock->await('the topic ends with what the store has again', sub { published('same-changelog') eq in_store('again') });

# ---- a replica -------------------------------------------------------------------------------

query("SELECT eventstore.create_store('copy')");
query("SELECT eventstore.create_source('copy', 'k', 'in', 'copy', mode => 'replica', changelog_topic => 'in-changelog', $fast)");
source_caught_up($node, 'copy');
is(in_store('copy'), in_store('kv'), 'a replica has what the store has');
query("SELECT eventstore.put('kv', 'later', '1'), eventstore.delete('kv', 'd')");
$mock->await('the replica follows', sub { in_store('copy') eq in_store('kv') });
pass('and follows it');

# ---- partitions shared out ---------------------------------------------------------------------

$mock->create_topic('parts', 2);
$mock->create_topic('parts-changelog', 2);
$mock->produce('parts', map { [ "k$_", $_ ] } 1 .. 50);
foreach my $own (0, 1)
{
	my $other = 1 - $own;
	query("SELECT eventstore.create_store('half$own')");
	query("SELECT eventstore.create_source('half$own', 'k', 'parts', 'half$own', partitions => '{$own}', replica_partitions => '{$other}', changelog_topic => 'parts-changelog', $fast)");
}
foreach my $own (0, 1)
{
	my $other = 1 - $own;
	$mock->await("half$own has all keys", sub { query("SELECT count(*) FROM half$own") == 50 });
	is(query("SELECT string_agg(topic || ' ' || partition, ', ' ORDER BY topic) FROM (SELECT topic, partition FROM eventstore.source_partitions WHERE source = 'half$own' AND (topic = 'parts' OR partition <> $own)) p"),
		"parts $own, parts-changelog $other", "half$own: its own partition, and the other one followed");
}
is(in_store('half0'), in_store('half1'), 'both have the same');

# The other's partition is taken over: restored to its end, then read from where the other was.
query("SELECT eventstore.drop_source('half0'), eventstore.drop_source('half1')");
$mock->produce('parts', map { [ "k$_", 1000 + $_ ] } 1 .. 50);
query("SELECT eventstore.create_store('whole')");
query("SELECT eventstore.create_source('whole', 'k', 'parts', 'whole', changelog_topic => 'parts-changelog', $fast)");
source_caught_up($node, 'whole');
is(query("SELECT count(*), sum((value)::int) FROM whole"), '50|51275', 'another node restores all, and goes on');

# ---- relay: one does the work, others have the result --------------------------------------------

$mock->create_topic('raw', 2);
$mock->create_topic('raw-changelog', 2);
$mock->produce('raw', [ 'a', '1' ], [ 'b', '2' ], [ 'c', 'bad' ], [ undef, '3' ], [ 'd', '0' ], [ 'a', undef ], [ 'e', '5' ]);
query("CREATE FUNCTION doubled(text) RETURNS jsonb LANGUAGE sql AS \$\$ SELECT pg_catalog.to_jsonb(2 * \$1::int) WHERE \$1 <> '0' \$\$");
query("SELECT eventstore.create_source('relay', 'k', 'raw', NULL, mode => 'relay', changelog_topic => 'raw-changelog', transform => 'doubled(text)', $fast)");
query("SELECT eventstore.create_store('result')");
query("SELECT eventstore.create_source('result', 'k', 'raw', 'result', mode => 'replica', changelog_topic => 'raw-changelog', $fast)");
source_caught_up($node, 'relay');
source_caught_up($node, 'result');
is(in_store('result'), 'b=4 e=10', 'what was relayed, in a replica');
is(query("SELECT string_agg(sqlstate, ' ' ORDER BY sqlstate) FROM eventstore.dead_letters WHERE source = 'relay'"), '22004 22P02', 'what could not be is parked');
is(sqlstate_of($node, "SELECT eventstore.create_source('r2', 'k', 'raw', 'result', mode => 'relay', changelog_topic => 'raw-changelog')"), '22023', 'a relay has no table');

# A pause comes between the two transactions of a batch.
my $pauser = session($node);
$pauser->run("BEGIN; SELECT eventstore.pause('relay')");
$mock->produce('raw', [ 'p', '7' ]);
await_true($node, "SELECT wait_event_type = 'Lock' FROM pg_stat_activity a JOIN eventstore.sources s USING (pid) WHERE s.name = 'relay'");
$pauser->run('COMMIT');
$pauser->quit;
await_true($node, "SELECT state = 'paused' AND pid IS NULL FROM eventstore.sources WHERE name = 'relay'");
query("SELECT eventstore.resume('relay')");
source_caught_up($node, 'relay');
is(join(' ', map { $_->{value} } grep { ($_->{key} // '') eq 'p' } $mock->consume('raw-changelog')), '14', 'paused amid a batch: what was published is not published again');

# ---- whose a key is to change ----------------------------------------------------------------------

is(sqlstate_of($node, "SELECT eventstore.put('copy', 'a', '1')"), '55000', 'a replica takes no change by SQL');
is(sqlstate_of($node, 'DELETE FROM copy'), '55000', 'of no kind');
query("SELECT eventstore.create_store('half')");
query("SELECT eventstore.create_source('half', 'k', 'parts', 'half', partitions => '{0}', replica_partitions => '{1}', changelog_topic => 'parts-changelog', $fast)");
source_caught_up($node, 'half');
my %states = map { my $key = "own-$_"; sqlstate_of($node, "SELECT eventstore.put('half', '$key', '1')") => $key } 1 .. 20;
is(join(' ', sort keys %states), '00000 55000', 'one with replica partitions takes those of its own keys');
query("SELECT eventstore.drop_source('copy')");
query("SELECT eventstore.put('copy', 'a', '1')");
pass('a store that follows no more takes all');
is_clean($node, $_ . '_changelog') foreach 'kv', 'newer', 'copy', 'whole';

# ---- a crash empties an unlogged store ----------------------------------------------------------------

$mock->create_topic('fast', 1);
$mock->produce('fast', [ 'a', '1' ], [ 'b', '2' ], [ 'a', '3' ]);
foreach my $changelog ('true', 'false')
{
	query("SELECT eventstore.create_store('unlogged_$changelog', unlogged => true, changelog => $changelog)");
	query("SELECT eventstore.create_source('unlogged_$changelog', 'k', 'fast', 'unlogged_$changelog', $fast)");
	source_caught_up($node, "unlogged_$changelog");
}
query("SELECT eventstore.put('unlogged_true', 'c', '4')");
$mock->create_topic('halves', 2);
$mock->produce('halves', map { [ "h$_", "$_", [], { partition => $_ % 2 } ] } 1 .. 4);
query("SELECT eventstore.create_store('halves', unlogged => true, changelog => false)");
foreach my $half (0, 1)
{
	query("SELECT eventstore.create_source('half $half', 'k', 'halves', 'halves', partitions => '{$half}', $fast)");
	source_caught_up($node, "half $half");
}
query("SELECT eventstore.pause('half 1')");
$node->stop('immediate');
$node->start;
await_true($node, "SELECT string_agg(key || value, ' ' ORDER BY key) = 'a3 b2 c4' FROM unlogged_true");
pass('it is rebuilt from its changelog');
await_true($node, "SELECT string_agg(key || value, ' ' ORDER BY key) = 'a3 b2' FROM unlogged_false");
pass('or filled again from the topic');
await_true($node, "SELECT string_agg(key, ' ' ORDER BY key) = 'h2 h4' FROM halves");
query("SELECT eventstore.resume('half 1')");
await_true($node, "SELECT string_agg(key, ' ' ORDER BY key) = 'h1 h2 h3 h4' FROM halves");
pass('by each of its sources, also one that finds it filled by another');

$node->stop;
no_crash($node);
done_testing();
