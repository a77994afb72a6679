# Two servers in one consumer group over one changelog topic: whoever has lost a
# partition publishes nothing for it any more, whatever he believes.  Against a real
# broker, which one of them reaches through a proxy.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use EventstoreTest::Kafka::Group;
use Test::More;

my $kafka = kafka_broker();
my $proxy = $kafka->proxy;

start_servers('fence', a => $kafka->address('proxied'), b => $kafka->address('plaintext'));

# A member that is silent is out of the group soon, and comes back soon.
sub create
{
	my ($name, $store, $more) = @_;
	my $properties = '{"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "fetch.wait.max.ms": 20, "reconnect.backoff.max.ms": 200'
	  . ($more // '') . '}';

	query($name, "SELECT eventstore.create_store('$store', 'text')");
	query($name, "SELECT eventstore.create_source('$store', 'k', '$store', '$store', group_id => '$store', changelog_topic => '$store-changelog', consumer_properties => '$properties')");
	return;
}

sub make_topics
{
	my ($store, $partitions) = @_;

	$kafka->create_topic($store,             $partitions);
	$kafka->create_topic("$store-changelog", $partitions, 'cleanup.policy' => 'compact');
	return;
}

# What who reads what is committed has last of each key.
sub last_values
{
	my ($topic) = @_;
	my %last;

	$last{ $_->{key} } = $_->{value} foreach $kafka->consume($topic);
	return join ' ', map { "$_=$last{$_}" } sort grep { defined $last{$_} } keys %last;
}

# ---- one that was cut off comes back, and what it had sent arrives ----------------------------

make_topics('kv', 1);
create('a', 'kv');
await_assigned('a', 'kv', 1);
$kafka->produce('kv', [ 'k', 'first' ], [ 'other', '1' ]);
caught_up('kv', 'a');
await_published('a', 'kv');
is(last_values('kv-changelog'), 'k=first other=1', 'published');
my ($last) = sort { $b <=> $a } map { $_->{offset} } $kafka->consume('kv-changelog');
is(query('a', "SELECT position FROM eventstore.source_partitions WHERE source = 'kv' AND topic = 'kv-changelog'"),
	$last + 1, 'what it has published it need not restore');

$proxy->ask('hole');
query('a', "SELECT eventstore.put_text('kv', 'k', 'too late')");
create('b', 'kv');
await_assigned('b', 'kv', 1);
is(query('b', "SELECT eventstore.get_text('kv', 'k')"), 'first', 'the next owner restores what was published');
$kafka->produce('kv', [ 'k', 'second' ]);
caught_up('kv', 'b');
await_published('b', 'kv');
$proxy->ask('pass');
await_true($servers{a}, "SELECT changelog_lag = 0 AND state = 'running' FROM eventstore.sources WHERE name = 'kv'");
is(last_values('kv-changelog'), 'k=second other=1', 'what the former owner had sent is not behind it');
my $left = query('a', "SELECT reason FROM eventstore.dead_letters WHERE collection = 'kv_changelog'::regclass");
my $owner = query('a', "SELECT bool_or(assigned) FROM eventstore.source_partitions WHERE source = 'kv'") eq 't' ? 'a' : 'b';
note("the partition is now $owner\'s");
$owner eq 'b' and is($left, "the key's partition is another member's of the group now", 'the change by SQL that nobody else knows of is a dead letter');

$servers{b}->stop;
await_assigned('a', 'kv', 1);
is(query('a', "SELECT eventstore.get_text('kv', 'k')"), 'second', 'back again, it has what the other one published');
$servers{b}->start;

# ---- changes that could not be published, tried again ----------------------------------------------

# A static member's name says who of two has the only partition: b, wherever it is.
make_topics('letters', 1);
create('a', 'letters', ', "group.instance.id": "z"');
await_assigned('a', 'letters', 1);
$proxy->ask('hole');
query('a', "SELECT eventstore.put_text('letters', key, 'too late') FROM unnest('{mine,changed,mended}'::text[]) WITH ORDINALITY k (key, i) ORDER BY i");
create('b', 'letters', ', "group.instance.id": "a"');
await_assigned('b', 'letters', 1);
query('b', "SELECT eventstore.put_text('letters', 'changed', 'since')");
await_published('b', 'letters');
$proxy->ask('pass');
my $letters = "SELECT string_agg(e.stream || ' ' || attempts || ' ' || d.topic, ', ' ORDER BY d.position) FROM eventstore.dead_letters d, eventstore.read('letters_changelog') e WHERE e.position = d.position AND d.source = 'letters' AND d.collection = 'letters_changelog'::regclass";
await_true($servers{a}, "SELECT count(*) = 3 FROM eventstore.dead_letters WHERE source = 'letters'");
is(query('a', $letters), 'mine 1 letters-changelog, changed 1 letters-changelog, mended 1 letters-changelog', 'are dead letters of the source');
is(query('a', "SELECT eventstore.retry_dead_letters('letters')"), '3', 'tried again');
$kafka->await('they are tried', sub { query('a', $letters) eq 'mine 2 letters-changelog, changed 2 letters-changelog, mended 2 letters-changelog' });
is(last_values('letters-changelog'), 'changed=since', 'what is another\'s to publish stays');
query('b', "SELECT eventstore.pause('letters')");
await_assigned('a', 'letters', 1);
my $mine = query('a', "SELECT id FROM eventstore.dead_letters d WHERE source = 'letters' ORDER BY position LIMIT 1");
is(query('a', "SELECT eventstore.retry_dead_letters('letters', '{$mine}')"), '1', 'the one that is named');
$kafka->await('it is published', sub { last_values('letters-changelog') eq 'changed=since mine=too late' });
query('a', "SELECT eventstore.put_text('letters', 'mended', 'here')");
await_true($servers{a}, "SELECT count(*) = 2 FROM eventstore.dead_letters WHERE source = 'letters'");
is(query('a', "SELECT eventstore.retry_dead_letters('letters')"), '2', 'and the others');
await_true($servers{a}, "SELECT count(*) = 0 FROM eventstore.dead_letters WHERE source = 'letters'");
await_published('a', 'letters');
is(last_values('letters-changelog'), 'changed=since mended=here mine=too late', 'which are out of date, and do not come behind what is newer');
is(query('a', "SELECT eventstore.get_text('letters', 'changed')"), 'since', 'here neither');
query($_, "SELECT eventstore.drop_source('letters')") foreach 'a', 'b';

# ---- whose a key is to change ------------------------------------------------------------------

make_topics('shared', 2);
create($_, 'shared') foreach 'a', 'b';
await_assigned($_, 'shared', 1) foreach 'a', 'b';
my %owner;
foreach my $key (map { "k$_" } 1 .. 20)
{
	my %state = map { $_ => sqlstate_of($servers{$_}, "SELECT eventstore.put_text('shared', '$key', '$_')") } 'a', 'b';

	$owner{$key} = join ' ', grep { $state{$_} eq '00000' } sort keys %state;
	fail("$key: $state{a} $state{b}") unless join(' ', sort values %state) eq '00000 55000';
}
is(join(' ', sort keys %{ { reverse %owner } }), 'a b', 'each key can be changed by SQL where its partition is, and nowhere else');
await_published($_, 'shared') foreach 'a', 'b';
is(last_values('shared-changelog'), join(' ', map { "$_=$owner{$_}" } sort keys %owner), 'and is published from there');
my ($key) = grep { $owner{$_} eq 'a' } sort keys %owner;
query('b', "SELECT eventstore.pause('shared')");
is(sqlstate_of($servers{b}, "SELECT eventstore.put_text('shared', '$key', 'b')"), '55000', 'while it is not known, no key can');

# ---- a broker that is far away -----------------------------------------------------------------

make_topics('far', 1);
create('a', 'far');
await_assigned('a', 'far', 1);
make_topics('relayed', 1);
query('a', "SELECT eventstore.create_source('relayed', 'k', 'relayed', NULL, mode => 'relay', value_format => 'text', group_id => 'relayed', changelog_topic => 'relayed-changelog', flush_interval => '10 ms')");
await_assigned('a', 'relayed', 1);
$proxy->ask('delay 300');
query('a', "SELECT eventstore.put_text('far', 'k', 'v')");
await_published('a', 'far');
is(last_values('far-changelog'), 'k=v', 'who waits long for each answer of the broker publishes, too');
$proxy->ask('delay 600');
$kafka->produce('relayed', [ 'k', 'w' ]);
$kafka->await('it is relayed', sub { last_values('relayed-changelog') eq 'k=w' });
pass('or relays');
$proxy->ask('pass');

no_crash($_) foreach values %servers;
$_->stop foreach values %servers;
done_testing();
