# A changelog topic is what Kafka Streams makes of one: an application of it
# reads the topic as a table, and has what the store has.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

my $kafka = kafka_broker();
my $node = new_server('streams');
my $address = $kafka->address;

sub query { return $node->safe_psql('postgres', $_[0]); }

$kafka->create_topic('in', 2);
$kafka->create_topic('changes', 2, 'cleanup.policy' => 'compact');
query(qq{
	CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address');
	SELECT eventstore.create_store('kv');
	SELECT eventstore.create_source('in', 'k', 'in', 'kv', changelog_topic => 'changes', flush_interval => '50 ms')});
$kafka->produce_many('in', 3000, keys => 400, tombstones => 5);
source_caught_up($node, 'in', 'the source has caught up');
query(q(SELECT eventstore.put('kv', 'by SQL', '{"i": 1000000, "of": "SQL"}'), eventstore.delete('kv', (SELECT min(key) FROM kv))));

# It is told what to wait for, and says so when it has it.
my ($keys, $sum) = split /\|/, query(q(SELECT count(*), sum((value->>'i')::bigint) FROM kv));
my $output = '';
my $errors = '';
my $application = IPC::Run::start(
	[ 'java', '-Dorg.slf4j.simpleLogger.defaultLogLevel=warn', '-cp', "$ENV{KAFKA_STREAMS}/classes:$ENV{KAFKA_STREAMS}/jars/*",
		'Latest', $address, 'changes', 1, PostgreSQL::Test::Utils::tempdir(), $keys, $sum ],
	'<', \undef, '>', \$output, '2>', \$errors, IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));

eval { $application->pump until $output =~ /^all$/m || !$application->pumpable; 1 } or note($@);
cmp_ok($keys, '>', 200, 'keys to be read');
like($output, qr/^all$/m, 'Kafka Streams reads the changelog topic as a table: the same keys, the same values') or diag($errors);
$application->kill_kill;

$node->stop;
no_crash($node);
done_testing();
