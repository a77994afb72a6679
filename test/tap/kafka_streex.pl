# Many keys, against the real Kafka: 100 tenants of 20 items each, with so many
# hashes, and every key must be found with its value: from the topic, from the
# changelog topic alone, and on two servers that share the partitions.
#
# STREEX_HASHES says how many (100, that is 200,000 keys; 2,000 are 4,000,000).
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use Test::More;
use Time::HiRes qw(time);

my ($tenants, $items) = (100, 20);
my $hashes = $ENV{STREEX_HASHES} // 100;
my $keys = $tenants * $items * $hashes;
# A thousand keys a second is slower than anything that works.
my $patience = 60 + int($keys / 1000);
my @settings = ('max_worker_processes = 24', 'shared_buffers = 256MB', 'max_wal_size = 4GB', 'checkpoint_timeout = 30min', 'autovacuum = off');

my $kafka = kafka_broker();
my $node = new_server('first', settings => \@settings);
my $began = time;

sub query { my ($sql, $where) = @_; return ($where // $node)->safe_psql('postgres', $sql); }

# What took how long is in the log: it is no benchmark, but says when something is slow.
sub lap
{
	my ($what) = @_;
	my $seconds = time - $began;

	note(sprintf '%s: %.1f s, %d keys/s', $what, $seconds, $keys / $seconds);
	$began = time;
	return;
}

sub await_query
{
	my ($what, $sql, $where) = @_;
	my $end = time + $patience;

	until (query($sql, $where) eq 't')
	{
		BAIL_OUT("never so: $what") if time > $end;
		Time::HiRes::usleep(50_000);
	}
	return;
}

sub connect_to_kafka
{
	my ($where) = @_;
	my $address = $kafka->address;

	query(qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address')), $where);
	return;
}

# source($name, further arguments as SQL): of a store of that name, made with it
sub source
{
	my ($name, $more, $where) = @_;

	query("SELECT eventstore.create_store('$name')", $where);
	query("SELECT eventstore.create_source('$name', 'k', 'in', '$name', $more)", $where);
	return;
}

sub caught_up
{
	my ($name) = @_;
	is(query("SELECT eventstore.wait_for_source('$name', timeout => '$patience s')"), 't', "$name has caught up");
	return;
}

# All that must be there, each with the value of its key, and nothing else.
sub has_every_key
{
	my ($store, $name, $where) = @_;

	is( query(
			qq(SELECT count(*), count(*) FILTER (WHERE value = jsonb_build_object('tenant', split_part(key, '/', 2)::int,
				'item', split_part(key, '/', 3)::int, 'hash', split_part(key, '/', 4)::int)),
				count(*) FILTER (WHERE split_part(key, '/', 2)::int < $tenants AND split_part(key, '/', 3)::int < $items
					AND split_part(key, '/', 4)::int < $hashes AND key ~ '^1/')
			FROM $store), $where),
		"$keys|$keys|$keys", $name);
	# By the interface, as a client would ask: those of one tenant.
	is( query(
			qq(SELECT count(*) FROM generate_series(0, $items - 1) item, generate_series(0, $hashes - 1) hash
			WHERE eventstore.get('$store', format('1/7/%s/%s', item, hash)) = jsonb_build_object('tenant', 7, 'item', item, 'hash', hash)),
			$where),
		$items * $hashes,
		"$name, by get()");
	return;
}

sub published
{
	my ($name, $where) = @_;

	await_query("$name is published", "SELECT changelog_state = 'running' AND changelog_lag = 0 FROM eventstore.sources WHERE name = '$name'", $where);
	return;
}

$kafka->create_topic('in', 4);
$kafka->create_topic("$_-changelog", 4, 'cleanup.policy' => 'compact') foreach qw(all half);
connect_to_kafka($node);

# ---- from the topic ------------------------------------------------------------------------

is(($kafka->produce_grid('in', $tenants, $items, $hashes, { properties => { partitioner => 'murmur2_random' }, limit => $patience }))[0], $keys, 'produced');
lap('produced');
source('everything', "changelog_topic => 'all-changelog'");
caught_up('everything');
lap('read from the topic');
has_every_key('everything', 'every key is found');
published('everything');
lap('published to the changelog topic');

# ---- from the changelog topic ----------------------------------------------------------------

query("SELECT eventstore.drop_source('everything'), eventstore.drop_store('everything')");
$began = time;
source('everything', "changelog_topic => 'all-changelog'");
caught_up('everything');
lap('restored');
has_every_key('everything', 'every key is found in a new store');
is(query("SELECT sum(position) FILTER (WHERE topic = 'in'), sum(position) FILTER (WHERE topic <> 'in') >= $keys FROM eventstore.source_partitions"),
	"$keys|t", 'it goes on behind the last record that was restored');
is(query("SELECT DISTINCT metadata->>'topic' FROM everything_changelog"), 'all-changelog', 'nothing came from the topic itself');
# Read again it would change nothing, and not be seen in the store.  The last batch
# of each partition is: it may have been published in part (restore.c).
cmp_ok(query("SELECT records - (SELECT sum(position) FROM eventstore.source_partitions WHERE topic <> 'in') FROM eventstore.sources"),
	'<=', 10_000 * query("SELECT count(*) FROM eventstore.source_partitions WHERE topic = 'in'"), 'nor was it read again, but for a batch');
query("SELECT eventstore.drop_source('everything'), eventstore.drop_store('everything')");

# ---- two servers, half of the partitions each --------------------------------------------------

my $other = new_server('second', settings => \@settings);
connect_to_kafka($other);
$began = time;
source('half', "partitions => '{0,1}', replica_partitions => '{2,3}', changelog_topic => 'half-changelog'");
source('half', "partitions => '{2,3}', replica_partitions => '{0,1}', changelog_topic => 'half-changelog'", $other);
foreach my $where ($node, $other)
{
	await_query($where->name . ' has all', "SELECT count(*) = $keys FROM half", $where);
}
lap('shared by two servers');
has_every_key('half', 'the first server has every key', $node);
has_every_key('half', 'so has the second', $other);
is(query("SELECT string_agg(topic || ' ' || partition, ', ' ORDER BY topic, partition) FROM eventstore.source_partitions WHERE topic = 'in' OR partition > 1"),
	'half-changelog 2, half-changelog 3, in 0, in 1', 'each reads its own partitions, and follows the other\'s');
published('half', $_) foreach $node, $other;
# A change at one is seen at the other; only its own server takes it.
my $owned = query("SELECT key FROM half WHERE key IN (SELECT stream FROM half_changelog WHERE metadata->>'topic' = 'in') LIMIT 1");
query("SELECT eventstore.put('half', '$owned', '\"by SQL\"')");
await_query('the second server follows', "SELECT value = '\"by SQL\"' FROM half WHERE key = '$owned'", $other);
is(sqlstate_of($other, "SELECT eventstore.put('half', '$owned', '1')"), '55000', 'a key of the other server is not changed here');
is(query("SELECT value FROM half WHERE key = '$owned'", $other), '"by SQL"', 'and has the value of its own server');

# ---- a value of another type -----------------------------------------------------------------------

$kafka->create_topic('typed', 4);
$kafka->produce_grid('typed', $tenants, $items, 1);
query(q(CREATE FUNCTION pack(value jsonb) RETURNS bytea LANGUAGE sql IMMUTABLE
	AS $$ SELECT int4send((value->>'tenant')::int) || int2send((value->>'item')::int2) || int8send((value->>'hash')::bigint) $$));
query("SELECT eventstore.create_store('packed', format => 'bytes')");
query("SELECT eventstore.create_source('packed', 'k', 'typed', 'packed', transform => 'pack(jsonb)')");
caught_up('packed');
is( query("SELECT count(*) FROM generate_series(0, $tenants - 1) t, generate_series(0, $items - 1) i WHERE eventstore.get_bytes('packed', format('1/%s/%s/0', t, i)) = int4send(t) || int2send(i::int2) || int8send(0)"),
	$tenants * $items, 'stored as the transform has made it');

is(query('SELECT count(*) FROM eventstore.dead_letters', $_), 0, $_->name . ': no dead letters') foreach $node, $other;
no_crash($_) foreach $node, $other;
done_testing();
