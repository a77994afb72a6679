# Without shared_preload_libraries there is no shared memory to tell positions
# from.  Whoever would need it is told the line to add; plain tables stay what
# they are, and nothing keeps the server or a session from starting.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use Test::More;

my $node = new_server('preloaded');

$node->safe_psql('postgres', q{
	SELECT eventstore.create_collection('c');
	INSERT INTO c (type, stream) VALUES ('a', 's'), ('b', 's'), ('c', null);
	CREATE TABLE plain (i int PRIMARY KEY);
	CREATE TABLE captured (i int PRIMARY KEY);
	SELECT eventstore.capture('captured');
});
configure($node, "shared_preload_libraries = ''");
$node->restart;

foreach my $sql (
	"SELECT * FROM eventstore.append('c', 'x')",
	"SELECT * FROM eventstore.append_batch('c', '[{\"type\": \"x\"}]')",
	"SELECT * FROM eventstore.append_array('c', '{}')",
	"INSERT INTO c (type) VALUES ('x')",
	"COPY c (type) FROM PROGRAM 'echo x'",
	"SELECT eventstore.create_collection('d')",
	"SELECT eventstore.repair_collection('c')",
	"SELECT eventstore.truncate_before('c', 1)",
	"SELECT eventstore.head('c')",
	"SELECT * FROM eventstore.read('c')",
	"SELECT * FROM eventstore.peek('c')",
	"SELECT * FROM eventstore.read_merged('{c}')",
	"SELECT eventstore.capture('plain')",
	'INSERT INTO captured VALUES (1)',
	'TRUNCATE captured')
{
	my $session = session($node);
	is($session->try($sql), 'LG006', "refused: $sql");
	$session->quit;
}

my ($result, $stdout, $stderr) = $node->psql('postgres', "SELECT * FROM eventstore.append('c', 'x')");
like($stderr, qr/shared_preload_libraries = 'eventstore'/, 'the line to add is in the hint');
like($stderr, qr/not loaded at server start/, 'and the reason in the message');

is($node->safe_psql('postgres', 'SELECT position, type FROM c ORDER BY position'), "1|a\n2|b\n3|c", 'plain SQL reads the table');
is($node->safe_psql('postgres', 'INSERT INTO plain VALUES (1) RETURNING i'), 1, 'other tables are written');
is(sqlstate_of($node, "SELECT eventstore.release('captured'); INSERT INTO captured VALUES (1)"), '00000', 'a capture can be ended');
is($node->safe_psql('postgres', "SELECT version FROM eventstore.read_stream('c', 's')"), "1\n2", 'what needs no head is read');
is_clean($node, 'c');
is(sqlstate_of($node, 'UPDATE c SET type = type'), 'LG003', 'append-only still');
is(sqlstate_of($node, "LOAD 'eventstore'; SELECT 1"), '00000', 'loading it later does no harm');
is($node->safe_psql('postgres', "SELECT ok, advice LIKE '%shared_preload_libraries%' FROM eventstore.doctor() WHERE NOT ok"), 'f|t', 'doctor() says so');
is(sqlstate_of($node, 'SELECT collection, segment_size FROM eventstore.collections'), '00000', 'the view of collections answers');

is($node->safe_psql('postgres', 'SELECT count(*) FROM eventstore.holders'), 0, 'nobody holds a head');

# A dump needs no library.
$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-f', '/dev/null' ], 'it can be dumped');

# In a session of its own it is too late, and no reason not to connect.
configure($node, "session_preload_libraries = 'eventstore'");
$node->reload;
is(sqlstate_of($node, "SELECT * FROM eventstore.append('c', 'x')"), 'LG006', 'session_preload_libraries is not enough');

is($node->safe_psql('postgres', 'DROP TABLE c, captured_changelog; SELECT count(*) FROM eventstore.collection_catalog'), 0, 'collections can be dropped');
is(sqlstate_of($node, 'DROP EXTENSION eventstore'), '00000', 'and the extension');
is(sqlstate_of($node, 'CREATE EXTENSION eventstore'), '00000', 'which can be created again');

configure($node, "session_preload_libraries = ''", "shared_preload_libraries = 'eventstore'");
$node->restart;
is($node->safe_psql('postgres', "SELECT eventstore.create_collection('c'); SELECT position FROM eventstore.append('c', 'x')"), "c\n1", 'with the line all is well');

$node->stop;
no_crash($node);
done_testing();
