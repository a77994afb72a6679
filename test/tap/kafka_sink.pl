# A collection to a topic: records, keys, order, states, errands, and what is
# refused.  Against the mock cluster.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use PostgreSQL::Test::Utils;
use Test::More;

my $mock = kafka_mock();
my $node = new_server('sink', settings => [ 'max_worker_processes = 24', 'eventstore.maintenance_interval = 200ms' ]);
my $address = $mock->address;

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

query(qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address')));

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
		'es-stream' => 's', 'es-version' => '1', 'es-metadata' => '{"m": true}' ], 'all else in headers');
is_deeply([ $records[1]{key}, $records[1]{value} ], [ undef, "\x00\xff" ], 'no stream: no key; a body as it is');
is_deeply([ $records[2]{key}, $records[2]{value} ], [ 's', undef ], 'neither data nor body: no value');

query(q(SELECT eventstore.append('c', 'later', to_jsonb(i)) FROM generate_series(1, 100) i));
await_true($node, "SELECT position = 103 AND lag_events = 0 FROM eventstore.sinks WHERE name = 'all'");
is(join(',', map { header($_, 'es-position') } records('all')), join(',', 1 .. 103), 'what comes later follows by itself, in order');

done_testing();
