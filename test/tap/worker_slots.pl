# Fewer processes than the extension needs: appends go on as long as there are
# segments, then say what is missing; doctor() says it before.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use Test::More;

# Room for the launcher of this extension and that of logical replication.
my $node = new_server('slots',
	settings => [ 'max_worker_processes = 2', 'eventstore.segment_timeout = 300ms' ]);
my $batch = q{SELECT count(*) FROM eventstore.append_batch('c', (SELECT jsonb_agg('{"type": "x"}'::jsonb) FROM generate_series(1, 50)))};

$node->safe_psql('postgres', "SELECT eventstore.create_collection('c', segment_size => 100)");
await_true($node, "SELECT count(*) > 0 FROM eventstore.doctor() WHERE NOT ok AND advice LIKE '%max_worker_processes%'");
pass('doctor() names max_worker_processes');

my $done = 0;
while ((my $state = sqlstate_of($node, $batch)) eq '00000' || $done == 0)
{
	$done++;
	BAIL_OUT("appends never ended: $state") if $done > 100;
}
cmp_ok($done, '>=', 4, 'appends go on within the segments that are ready');
my ($result, $stdout, $stderr) = $node->psql('postgres', "\\set VERBOSITY verbose\n$batch");
like($stderr, qr/55000/, 'then they are refused');
like($stderr, qr/max_worker_processes|doctor/, 'with a hint');
is(sqlstate_of($node, "INSERT INTO c (type) SELECT 'x' FROM generate_series(1, 1000)"), '55000', 'as is an INSERT');
is($node->safe_psql('postgres', "SELECT count(*) FROM eventstore.read('c')"), 50 * $done, 'what is there can be read');
is_clean($node, 'c');
is($node->safe_psql('postgres', "SELECT eventstore.create_collection('d'); SELECT position FROM eventstore.append('d', 'x')"), "d\n1", 'a new collection has its first segments');

# ---- a segment that is not committed ---------------------------------------------------

# After a restart the first to append says what is ready, and nobody helps.  He
# must not count what he has attached himself.
sub state_and_message
{
	my $session = session($node);
	my $state = $session->try("SELECT position FROM eventstore.append_batch('own', (SELECT jsonb_agg('{\"type\": \"x\"}'::jsonb) FROM generate_series(1, 15)))");
	my $message = $session->{message} // '';

	$session->quit;
	return "$state $message";
}

$node->safe_psql('postgres', "SELECT eventstore.create_collection('own', segment_size => 10)");
my $end = $node->safe_psql('postgres', "SELECT max(last_position) + 1 FROM eventstore.segments WHERE collection = 'own'::regclass");
$node->restart;
my $attaching = session($node);
$attaching->run('BEGIN');
$attaching->run('CREATE TABLE own_more (LIKE own INCLUDING ALL)');
$attaching->run("ALTER TABLE own ATTACH PARTITION own_more FOR VALUES FROM ($end) TO (" . ($end + 1000) . ')');
is($attaching->run("SELECT position FROM eventstore.append('own', 'x')"), 1, 'the one who attached a segment is the first to append');
my $state = '';
for (1 .. 10)
{
	last if ($state = state_and_message()) !~ /^00000/;
}
like($state, qr/^55000 .*no segment .* is ready/s, 'others do not get into the segment that he attached');
is($attaching->try("SELECT position FROM eventstore.append_batch('own', (SELECT jsonb_agg('{\"type\": \"x\"}'::jsonb) FROM generate_series(1, 100)))"), '55000', 'nor does he');
$attaching->try('ROLLBACK');
like(state_and_message(), qr/^55000 .*no segment .* is ready/s, 'nor anybody when it is gone');

# A second database is no worse off for the one worker that there is room for.  From
# here on there is somebody to wait for.
configure($node, 'max_worker_processes = 3', 'eventstore.segment_timeout = 30s');
$node->restart;
is($node->safe_psql('postgres', $batch), 50, 'with room for a worker they go on');
$node->safe_psql('postgres', 'CREATE DATABASE other TEMPLATE template0');
$node->safe_psql('other', "CREATE EXTENSION eventstore; SELECT eventstore.create_collection('c', segment_size => 100)");
is($node->safe_psql('other', $batch), 50, 'appends in a database that gets no worker');
await_true($node, "SELECT count(*) > 0 FROM eventstore.doctor() WHERE NOT ok AND advice LIKE '%max_worker_processes%'", 'other');
pass('doctor() says so there');

configure($node, 'max_worker_processes = 8');
$node->restart;
is($node->safe_psql('other', "SELECT count(*) FROM generate_series(1, 20) i, LATERAL ($batch) b"), 20, 'with room for both all goes on');
await_true($node, "SELECT count(*) = 0 FROM eventstore.doctor() WHERE NOT ok AND advice LIKE '%max_worker_processes%'", 'other');
is_clean($node, 'c', 'the other database is consistent', 'other');

$node->stop;
no_crash($node);
done_testing();
