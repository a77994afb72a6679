# What a consumer group may be made of: static members, other beginnings, a topic
# that grows, stores that a crash empties.  Against a real broker.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use EventstoreTest::Kafka::Group;
use EventstoreTest::Session;
use Test::More;

my $kafka   = kafka_broker();
my $soon    = '"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "fetch.wait.max.ms": 20';
my $produced = 0;

start_servers('members', a => $kafka->address, b => $kafka->address);

sub create
{
	my ($name, $source, $make, %more) = @_;
	my $properties = delete $more{properties} // $soon;
	my $rest = join '', map { ", $_ => '$more{$_}'" } sort keys %more;

	query($name, "SELECT eventstore.$make");
	query($name, "SELECT eventstore.create_source('$source', 'k', '$source', '$source', group_id => '$source', consumer_properties => '{$properties}' $rest)");
	return;
}

sub create_log
{
	my ($name, $source, %more) = @_;

	create($name, $source, "create_collection('$source')", value_format => 'text', %more);
	return;
}

# Each with a key of its own, over all partitions, or to one.
sub produce
{
	my ($topic, $count, %where) = @_;

	$kafka->produce($topic, map { [ 'k' . $produced++, '1', [], \%where ] } 1 .. $count);
	return;
}

# Keys in a collection or store, which may be one's or the other's or both's.
sub keys_in
{
	my ($source, @names) = @_;
	my %found;

	foreach my $name (@names)
	{
		$found{$_} = 1 foreach split /\n/, query($name, "SELECT stream FROM eventstore.read('$source', max_count => 100000)");
	}
	return [ sort keys %found ];
}

sub keys_from { return [ sort map { "k$_" } $_[0] .. $produced - 1 ]; }

# ---- 'latest' is where the group stands ---------------------------------------------------------

$kafka->create_topic('late', 4);
produce('late', 100);
my $first = $produced;
create_log('a', 'late', start => 'latest');
await_assigned('a', 'late', 4);
produce('late', 100);
caught_up('late', 'a');
is_deeply(keys_in('late', 'a'), keys_from($first), 'latest: what comes from then on');
$kafka->await('the group\'s offsets are in Kafka', sub { !grep { ($_->{committed} // -1) != $_->{end} } $kafka->group_lag('late', 'late') });
create_log('b', 'late', start => 'latest');
await_assigned($_, 'late', 2) foreach 'a', 'b';
produce('late', 100);
caught_up('late', 'a', 'b');
is_deeply(keys_in('late', 'a', 'b'), keys_from($first), 'one that joins begins where the group stands');
my $joined = keys_in('late', 'b');
query('a', "SELECT eventstore.pause('late')");
produce('late', 100);
await_assigned('b', 'late', 4);
caught_up('late', 'b');
is_deeply(keys_in('late', 'a', 'b'), keys_from($first), 'and so it does with what it takes over');
cmp_ok(scalar(@{ keys_in('late', 'b') }) - scalar(@$joined), '<', 200, 'not from the beginning');
query($_, "SELECT eventstore.drop_source('late')") foreach 'a', 'b';

# ---- a time is a time for each ---------------------------------------------------------------------

$kafka->create_topic('timed', 4);
produce('timed', 20, partition => $_, timestamp => 1_000_000_000_000) foreach 0 .. 3;
$first = $produced;
produce('timed', 20, partition => $_, timestamp => 1_700_000_000_000) foreach 0 .. 3;
create_log($_, 'timed', start => '2015-01-01 00:00:00+00') foreach 'a', 'b';
await_assigned($_, 'timed', 2) foreach 'a', 'b';
caught_up('timed', 'a', 'b');
is_deeply(keys_in('timed', 'a', 'b'), keys_from($first), 'from a time on');
query('a', "SELECT eventstore.drop_source('timed')");
await_assigned('b', 'timed', 4);
caught_up('timed', 'b');
is_deeply(keys_in('timed', 'b'), keys_from($first), 'also of what is taken over');
query('b', "SELECT eventstore.drop_source('timed')");

# ---- a static member is away for a moment --------------------------------------------------------------

$kafka->create_topic('static', 4);
create_log($_, 'static', properties => qq("session.timeout.ms": 30000, "fetch.wait.max.ms": 20, "group.instance.id": "$_")) foreach 'a', 'b';
await_assigned($_, 'static', 2) foreach 'a', 'b';
my $assigned = q(SELECT array_to_string(ARRAY(SELECT unnest(assigned) ORDER BY 1), ' ') FROM eventstore.source WHERE name = 'static');
my $noted = "SELECT assigned_as FROM eventstore.source WHERE name = 'static'";
my ($of_a, $of_b) = (query('a', $assigned), query('b', $noted));
$servers{a}->restart;
await_assigned('a', 'static', 2);
is(query('a', $assigned), $of_a, 'it has its partitions again');
is(query('b', $noted), $of_b, 'and the other one has not noticed');
my $before = $produced;
produce('static', 100);
caught_up('static', 'a', 'b');
is_deeply(keys_in('static', 'a', 'b'), keys_from($before), 'all is read');
query($_, "SELECT eventstore.drop_source('static')") foreach 'a', 'b';

# ---- two that say they are the same one ------------------------------------------------------------------

# The later one has the name; the other one comes again after a pause, and says so.
$kafka->create_topic('same', 2);
create_log($_, 'same', properties => qq("session.timeout.ms": 30000, "fetch.wait.max.ms": 20, "group.instance.id": "the one")) foreach 'a', 'b';
$kafka->await('one is fenced', sub { grep { query($_, "SELECT state = 'disconnected' AND message ~* 'fenced' FROM eventstore.sources WHERE name = 'same'") eq 't' } 'a', 'b' });
pass('of two members of one name one is fenced, and its state says so');
my $process = query('a', "SELECT pid FROM eventstore.sources WHERE name = 'same'");
$before = $produced;
produce('same', 100);
query('b', "SELECT eventstore.pause('same')");
await_assigned('a', 'same', 2);
caught_up('same', 'a');
is_deeply(keys_in('same', 'a'), keys_from($before), 'alone again it reads all, by itself');
is(query('a', "SELECT count(*) FROM same"), 100, 'each once');
is(query('a', "SELECT pid FROM eventstore.sources WHERE name = 'same'"), $process, 'no process has ended for that');
query($_, "SELECT eventstore.drop_source('same')") foreach 'a', 'b';

# ---- who waits while nobody knows whose the partition is ---------------------------------------------------

$kafka->create_topic('waited', 1);
my @patient = (properties => '"session.timeout.ms": 30000, "heartbeat.interval.ms": 300, "fetch.wait.max.ms": 20');
create_log($_, 'waited', @patient) foreach 'a', 'b';
$kafka->await('one has it', sub { join('', sort map { query($_, "SELECT count(*) FROM eventstore.source_partitions WHERE source = 'waited' AND assigned") } 'a', 'b') eq '01' });
await_true($servers{$_}, "SELECT state = 'running' FROM eventstore.sources WHERE name = 'waited'") foreach 'a', 'b';
my ($owner) = grep { query($_, "SELECT count(*) FROM eventstore.source_partitions WHERE source = 'waited' AND assigned") } 'a', 'b';
my $idle = $owner eq 'a' ? 'b' : 'a';
caught_up('waited', 'a', 'b');
my $stopped = query($owner, "SELECT pid FROM eventstore.sources WHERE name = 'waited'");
kill 'STOP', $stopped;
produce('waited', 10);
# A third one joins: the partition may go to anybody, once its owner has been heard.
query($idle, "SELECT eventstore.create_collection('third')");
query($idle, "SELECT eventstore.create_source('third', 'k', 'waited', 'third', group_id => 'waited', value_format => 'text', consumer_properties => '{$patient[1]}')");
await_true($servers{$idle}, "SELECT state = 'joining' FROM eventstore.sources WHERE name = 'waited'");
is(query($idle, "SELECT eventstore.wait_for_source('waited', '0.3 s')"), 'f', 'who has no partition, and may get one, has not all that there is');
kill 'CONT', $stopped;
await_true($servers{$_}, "SELECT bool_and(state = 'running') FROM eventstore.sources") foreach 'a', 'b';
caught_up('waited', 'a', 'b');
caught_up('third', $idle);
cmp_ok(query('a', 'SELECT count(*) FROM waited') + query('b', 'SELECT count(*) FROM waited') + query($idle, 'SELECT count(*) FROM third'), '>=', 10, 'when that is known whoever got it has all');
query($idle, "SELECT eventstore.drop_source('third')");
query($_, "SELECT eventstore.drop_source('waited')") foreach 'a', 'b';

# ---- a batch that takes longer than the group waits --------------------------------------------------------

# partition:offset of each change that a record of the source's topic made, in their order.
sub records_written
{
	my ($name, $store) = @_;
	return split /\n/, query($name,
		"SELECT metadata->>'partition' || ':' || (metadata->>'offset') FROM eventstore.read('${store}_changelog', max_count => 100000) WHERE metadata->>'topic' = '$store'");
}

foreach my $store ('slow', 'slow_published')
{
	my @changelog = $store eq 'slow' ? () : (changelog_topic => "$store-changelog");

	$kafka->create_topic($store, 4);
	$kafka->create_topic("$store-changelog", 4, 'cleanup.policy' => 'compact') if @changelog;
	create($_, $store, "create_store('$store', 'text')", @changelog, properties => qq($soon, "max.poll.interval.ms": 2500)) foreach 'a', 'b';
	await_assigned($_, $store, 2) foreach 'a', 'b';
	hold_up($servers{a}, $store);
	my $since = -s $servers{a}->logfile;
	my $holder = EventstoreTest::Session->new($servers{a});
	$holder->run('SELECT pg_advisory_lock(42)');
	$before = $produced;
	produce($store, 100);
	await_true($servers{a}, "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'eventstore source' AND wait_event = 'PgSleep'");
	await_assigned('b', $store, 4);
	pass('the group goes on without one that does not come back');
	produce($store, 100);
	caught_up($store, 'b');
	is(query('a', "SELECT count(*) FROM $store"), 0, 'which is at its batch still');
	$holder->run('SELECT pg_advisory_unlock(42)');
	$holder->quit;
	await_assigned($_, $store, 2) foreach 'a', 'b';
	$servers{a}->wait_for_log(qr/source "$store" has left group "$store": a batch took longer than max.poll.interval.ms/, $since);
	pass('it hears of it, says so, and joins again');
	produce($store, 100);
	caught_up($store, 'a', 'b');
	my %found;
	foreach my $name ('a', 'b')
	{
		my @written = records_written($name, $store);
		my %once = map { $_ => 1 } @written;
		is(scalar(@written), scalar(keys %once), "$name has no record twice");
		$found{$_} = 1 foreach @written;
	}
	if (@changelog)
	{
		await_true($servers{$_}, "SELECT changelog_lag = 0 FROM eventstore.sources WHERE name = '$store'") foreach 'a', 'b';
		my %published = map { ($_->{key} => 1) } $kafka->consume("$store-changelog");
		is_deeply([ sort keys %published ], keys_from($before), 'all is published');
	}
	else
	{
		is(scalar(keys %found), 300, 'between them they have all');
	}
	query($_, "SELECT eventstore.drop_source('$store')") foreach 'a', 'b';
}

# ---- the topic grows, and its changelog topic after it ----------------------------------------------------

$kafka->create_topic('grown',           2);
$kafka->create_topic('grown-changelog', 2, 'cleanup.policy' => 'compact');
$first = $produced;
foreach my $name ('a', 'b')
{
	create($name, 'grown', "create_store('grown', 'text')", changelog_topic => 'grown-changelog');
}
await_assigned($_, 'grown', 1) foreach 'a', 'b';
produce('grown', 100);
caught_up('grown', 'a', 'b');
$kafka->add_partitions('grown', 4);
produce('grown', 20, partition => $_) foreach 2, 3;
$kafka->await('partitions of the changelog topic are missed',
	sub { grep { query($_, "SELECT message FROM eventstore.sources WHERE name = 'grown' AND state = 'topic_missing'") =~ /has no partition/ } 'a', 'b' });
$kafka->add_partitions('grown-changelog', 4);
await_assigned($_, 'grown', 2) foreach 'a', 'b';
caught_up('grown', 'a', 'b');
await_true($servers{$_}, "SELECT changelog_lag = 0 FROM eventstore.sources WHERE name = 'grown'") foreach 'a', 'b';
my %published = map { ($_->{key} => 1) } $kafka->consume('grown-changelog');
is_deeply([ sort keys %published ], keys_from($first), 'what is in the new ones is read and published');
query($_, "SELECT eventstore.drop_source('grown')") foreach 'a', 'b';

# ---- a relay: each record once, whoever publishes it -----------------------------------------------------

# Where each record of the changelog topic came from, in its order.
sub origins
{
	my @origins;

	foreach my $record ($kafka->consume('raw-changelog'))
	{
		my %headers = @{ $record->{headers} };
		push @origins, "$headers{'es-partition'}:$headers{'es-offset'}";
	}
	return @origins;
}

sub is_relayed_once
{
	my ($what) = @_;

	caught_up('raw', grep { query($_, "SELECT count(*) FROM eventstore.source_partitions WHERE source = 'raw' AND assigned") > 0 } $_[1] // ('a', 'b'));
	is_deeply([ origins() ], [ map { "$_->{partition}:$_->{offset}" } $kafka->consume('raw') ], $what);
	return;
}

$kafka->create_topic('raw',           4);
$kafka->create_topic('raw-changelog', 4);
query($_, "SELECT eventstore.create_source('raw', 'k', 'raw', NULL, mode => 'relay', value_format => 'text', group_id => 'raw', changelog_topic => 'raw-changelog', flush_interval => '10 ms', consumer_properties => '{$soon}')")
  foreach 'a', 'b';
await_assigned($_, 'raw', 2) foreach 'a', 'b';
produce('raw', 100);
is_relayed_once('two share a relay');

# Published, and not noted here: neither who tries again to note it publishes it again ...
my %of_a = map { $_ => 1 } split / /, query('a', "SELECT array_to_string(assigned, ' ') FROM eventstore.source WHERE name = 'raw'");
sub published_by_a { return scalar grep { /^(\d+):/ && $of_a{$1} } origins(); }
my $published = published_by_a();
my $locker = EventstoreTest::Session->new($servers{a});
$locker->run("BEGIN; SELECT FROM eventstore.source WHERE name = 'raw' FOR UPDATE");
produce('raw', 100);
$kafka->await('its part is published', sub { published_by_a() > $published });
await_true($servers{a}, "SELECT state = 'retrying' AND message ~ 'lock timeout' FROM eventstore.sources WHERE name = 'raw'");
# ... nor who comes after it.
query('a', "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'eventstore source'");
$locker->run('COMMIT');
$locker->quit;
await_assigned($_, 'raw', 2) foreach 'a', 'b';
is_relayed_once('what was published and not noted is not published again');

query('a', "SELECT eventstore.pause('raw')");
produce('raw', 100);
await_assigned('b', 'raw', 4);
is_relayed_once('one takes over from the other', 'b');
query($_, "SELECT eventstore.drop_source('raw')") foreach 'a', 'b';

# ---- a crash empties an unlogged store --------------------------------------------------------------------

sub keys_stored
{
	my ($name, $store) = @_;
	return [ split /\n/, query($name, "SELECT key FROM $store ORDER BY key COLLATE \"C\"") ];
}

$kafka->create_topic('fast', 4);
$first = $produced;
produce('fast', 100);
create('a', 'fast', "create_store('fast', 'text', changelog => false, unlogged => true)");
await_assigned('a', 'fast', 4);
caught_up('fast', 'a');
create('b', 'fast', "create_store('fast', 'text', changelog => false, unlogged => true)");
await_assigned($_, 'fast', 2) foreach 'a', 'b';
$servers{a}->stop('immediate');
$servers{a}->start;
await_assigned('a', 'fast', 2);
caught_up('fast', 'a');
$servers{b}->stop;
await_assigned('a', 'fast', 4);
caught_up('fast', 'a');
is_deeply(keys_stored('a', 'fast'), keys_from($first), 'filled again, with what comes back later, too');

no_crash($_) foreach values %servers;
$servers{a}->stop;
done_testing();
