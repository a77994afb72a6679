# Segments come as they are needed: a batch runs over many of them, one INSERT
# only over those that were ready, and one that is missing is said to be.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('segments');

sub batch
{
	my ($collection, $n) = @_;
	return "SELECT min(position), max(position), count(*) FROM eventstore.append_batch('$collection', (SELECT jsonb_agg(jsonb_build_object('type', 'e', 'stream', 's' || i % 5, 'tags', jsonb_build_array('n:' || i % 10))) FROM generate_series(1, $n) i))";
}

sub scalar_of
{
	my ($sql) = @_;
	return $node->safe_psql('postgres', $sql);
}

# ---- the smallest there are ------------------------------------------------------------

scalar_of("SELECT eventstore.create_collection('tiny', segment_size => 1)");
is(scalar_of("SELECT position FROM eventstore.append('tiny', 'e', stream => 's0')"), 1, 'a segment for one event');
is(scalar_of(batch('tiny', 40)), '2|41|40', 'a batch over forty segments');
is(scalar_of("SELECT string_agg(position::text, ' ') FROM eventstore.read('tiny', max_count => 5)"), '1 2 3 4 5', 'read in order');
is(scalar_of("SELECT string_agg(position::text, ' ') FROM eventstore.read('tiny', tags => '{n:3}')"), '4 14 24 34', 'by tag');
is(scalar_of("SELECT string_agg(position::text, ' ') FROM eventstore.read('tiny', tags => '{n:3}', direction => 'backward')"), '34 24 14 4', 'backward');
is(scalar_of("SELECT string_agg(version::text, ' ') FROM eventstore.read_stream('tiny', 's1')"), '1 2 3 4 5 6 7 8', 'by stream');
is_clean($node, 'tiny');

# ---- a batch much greater than what is ready -------------------------------------------

scalar_of("SELECT eventstore.create_collection('many', segment_size => 100)");
is(scalar_of(batch('many', 20000)), '1|20000|20000', 'twenty thousand events in segments of a hundred');
is(scalar_of("SELECT count(*) FROM eventstore.read('many')"), 20000, 'all can be read');
is(scalar_of("SELECT count(DISTINCT tableoid) > 20 FROM many"), 't', 'they lie in many segments');
is(scalar_of("SELECT count(*) FROM (SELECT first_position, lag(last_position) OVER (ORDER BY first_position) AS before FROM eventstore.segments WHERE collection = 'many'::regclass) s WHERE first_position <> before + 1"), 0, 'without a hole between them');
is_clean($node, 'many');

# In one transaction with its creation, where no worker can help.
is(scalar_of("BEGIN; SELECT eventstore.create_collection('at_once', segment_size => 10); " . batch('at_once', 500) . '; COMMIT'), "at_once\n1|500|500", 'appended in the transaction that created it');
is(scalar_of(batch('at_once', 500)), '501|1000|500', 'and goes on after it');
is_clean($node, 'at_once');

# ---- INSERT and COPY end where the segments end that were ready ---------------------------

scalar_of("SELECT eventstore.create_collection('inserted', segment_size => 100)");
my $before = scalar_of("SELECT eventstore.head('inserted')");
is(sqlstate_of($node, "INSERT INTO inserted (type, stream) SELECT 'x', 's' || i % 3 FROM generate_series(1, 5000) i"), '55000', 'an INSERT beyond them is refused');
is(sqlstate_of($node, "COPY inserted (type) FROM PROGRAM 'yes x | head -5000'"), '55000', 'a COPY too');
is(scalar_of('SELECT count(*) FROM inserted'), 0, 'and leaves nothing half done');
is(scalar_of("SELECT count(*) FROM eventstore.streams('inserted')"), 0, 'nor a stream');
await_true($node, "SELECT sum(last_position - first_position + 1) >= 100 FROM eventstore.segments WHERE collection = 'inserted'::regclass AND first_position > (SELECT eventstore.head('inserted'))");
is(scalar_of("INSERT INTO inserted (type, stream) SELECT 'y', 's' FROM generate_series(1, 60) RETURNING version") =~ /\n60$/ ? 1 : 0, 1, 'one that fits goes on');
is(scalar_of(batch('inserted', 5000)) =~ /\|5000$/ ? 1 : 0, 1, 'append_batch awaits what it needs');
is_clean($node, 'inserted');
my ($result, $stdout, $stderr) = $node->psql('postgres', "INSERT INTO inserted (type) SELECT 'x' FROM generate_series(1, 5000)");
like($stderr, qr/HINT:.*append_batch/, 'the hint says what to do');

# Many small ones right behind each other use up segments faster than the worker
# looks at them by itself: it is woken as each segment begins, and waited for.
scalar_of("SELECT eventstore.create_collection('rapid', segment_size => 10)");
my $rapid = session($node);
my @states = map { $rapid->try("INSERT INTO rapid (type, stream) SELECT 'x', 's' FROM generate_series(1, 8)") } 1 .. 200;
is(scalar(grep { $_ ne '00000' } @states), 0, 'INSERTs one behind the other find room');
$rapid->quit;
scalar_of("COPY rapid (type) FROM PROGRAM 'yes x | head -10'");
is(scalar_of('SELECT count(*), max(version) FROM rapid'), '1610|1600', 'and COPY');
is_clean($node, 'rapid');

# A list of partitions that PostgreSQL built while the message of a new one came
# lacks it for good.  Catalog rows taken away without a message give such a list.
scalar_of("SELECT eventstore.create_collection('stale', segment_size => 10)");
my $stale = session($node);
$stale->run('SET allow_system_table_mods = on');

sub keep_old_list
{
	$stale->run('CREATE TEMP TABLE kept ON COMMIT DROP AS SELECT * FROM pg_inherits WHERE inhrelid = \'stale_11\'::regclass');
	$stale->run("DELETE FROM pg_inherits WHERE inhrelid = 'stale_11'::regclass");
	$stale->run("UPDATE pg_class SET relname = relname WHERE oid = 'stale'::regclass");
	$stale->run('SELECT count(*) FROM stale');
	$stale->run('INSERT INTO pg_inherits SELECT * FROM kept');
}

$stale->run('BEGIN');
keep_old_list();
is($stale->try("INSERT INTO stale (type) SELECT 'x' FROM generate_series(1, 15)"), '00000', 'an INSERT goes on where PostgreSQL keeps an old list of segments');
is($stale->try('COMMIT'), '00000', 'and is there');
$stale->run('BEGIN');
keep_old_list();
is($stale->run("SELECT count(*) FROM eventstore.read('stale')"), 15, 'a read finds all');
is($stale->run("SELECT version FROM eventstore.append('stale', 'x', stream => 's')"), 1, 'an append its segment');
$stale->run('COMMIT');
$stale->quit;
is_clean($node, 'stale');

# One that begins a segment has the worker make the next, at once.
scalar_of("SELECT eventstore.create_collection('awake', segment_size => 100)");
$node->append_conf('postgresql.conf', "eventstore.tick_delay = '1 h'\neventstore.maintenance_interval = '1 h'");
$node->reload;
scalar_of("INSERT INTO awake (type) SELECT 'x' FROM generate_series(1, 101)");
await_true($node, "SELECT max(last_position) >= 500 FROM eventstore.segments WHERE collection = 'awake'::regclass");
pass('an INSERT that begins a segment wakes the worker');
scalar_of("COPY awake (type) FROM PROGRAM 'yes x | head -100'");
await_true($node, "SELECT max(last_position) >= 600 FROM eventstore.segments WHERE collection = 'awake'::regclass");
pass('a COPY too');
is($node->safe_psql('postgres', "SELECT segment_waits FROM eventstore.pg_stat_eventstore WHERE collection = 'awake'::regclass"), 0, 'nobody had to wait for it');

# No head is noted of a collection that is on its way out, for nobody would delete it.
scalar_of("SELECT eventstore.create_collection('going')");
scalar_of("SELECT eventstore.append('going', 'x')");
my $dropping = session($node);
$dropping->run("BEGIN; SELECT eventstore.drop_collection('going')");
$node->append_conf('postgresql.conf', "eventstore.tick_delay = '100 ms'\neventstore.maintenance_interval = '10 s'");
$node->reload;
await_true($node, "SELECT count(*) = 1 FROM eventstore.tick WHERE collection = 'awake'::regclass AND head = eventstore.head('awake')");
$dropping->run('COMMIT');
is(scalar_of('SELECT count(*) FROM eventstore.tick t WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = t.collection)'), 0, 'a dropped collection leaves no tick');
scalar_of("SELECT eventstore.create_collection('staying')");
scalar_of("SELECT eventstore.append('staying', 'x')");
$dropping->run("BEGIN; SELECT eventstore.drop_collection('staying')");
$dropping->run('ROLLBACK');
await_true($node, "SELECT count(*) = 1 FROM eventstore.tick WHERE collection = 'staying'::regclass");
pass('one that stays after all has its own');

# Who drops one may have a snapshot that is older than what is noted of it, or than it.
sub left_of_dropped
{
	return scalar_of(q{SELECT (SELECT count(*) FROM eventstore.tick t WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = t.collection))
		+ (SELECT count(*) FROM eventstore.collection_catalog c WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = c.collection))
		+ (SELECT count(*) FROM pg_class WHERE oid IN (} . $_[0] . '))');
}
scalar_of("SELECT eventstore.create_collection('older')");
$dropping->run('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1');
scalar_of("SELECT eventstore.create_collection('younger')");
foreach my $name ('older', 'younger')
{
	scalar_of("SELECT eventstore.append('$name', 'x')");
	await_true($node, "SELECT count(*) = 1 FROM eventstore.tick WHERE collection = '$name'::regclass");
}
my $heads = join ',', map { scalar_of("SELECT heads::oid FROM eventstore.collection_catalog WHERE collection = '$_'::regclass") } 'older', 'younger';
$dropping->run('DROP TABLE older, younger; COMMIT');
is(left_of_dropped($heads), 0, 'dropped at REPEATABLE READ, with all that is noted of it, however young');
$dropping->quit;

# One whose first row comes late is bound to what was ready when it began.
scalar_of("SELECT eventstore.create_collection('late', segment_size => 10)");
my ($gate, $late) = (session($node), session($node));
$gate->run('SELECT pg_advisory_lock(1)');
$late->send("INSERT INTO late (type) SELECT 'x' FROM (SELECT pg_advisory_lock(1) OFFSET 0) l, generate_series(1, 30)");
$late->wait_until_blocked($node);
scalar_of(batch('late', 30));
await_true($node, "SELECT max(last_position) >= 70 FROM eventstore.segments WHERE collection = 'late'::regclass");
$gate->run('SELECT pg_advisory_unlock(1)');
$late->receive;
is($late->{state}, '55000', 'an INSERT does not run into segments that came after its begin');
scalar_of("SELECT eventstore.create_collection('later', segment_size => 10)");
my $signal = $node->data_dir . '/signal';
$late->send("COPY later (type) FROM PROGRAM 'until [ -e $signal ]; do sleep 0.02; done; yes x | head -30'");
await_true($node, "SELECT count(*) = 1 FROM pg_stat_progress_copy WHERE relid = 'later'::regclass");
scalar_of(batch('later', 30));
await_true($node, "SELECT max(last_position) >= 70 FROM eventstore.segments WHERE collection = 'later'::regclass");
PostgreSQL::Test::Utils::append_to_file($signal, '');
$late->receive;
is($late->{state}, '55000', 'nor does a COPY');
is(scalar_of("SELECT count(*) FROM late") + scalar_of("SELECT count(*) FROM later"), 60, 'and nothing of them stays');
$_->quit foreach $gate, $late;

# A greater setting makes more ready.
$node->append_conf('postgresql.conf', 'eventstore.segments_ahead = 30');
$node->reload;
scalar_of(batch('inserted', 1));
await_true($node, "SELECT max(last_position) - (SELECT eventstore.head('inserted')) >= 2900 FROM eventstore.segments WHERE collection = 'inserted'::regclass");
is(sqlstate_of($node, "INSERT INTO inserted (type) SELECT 'z' FROM generate_series(1, 2500)"), '00000', 'segments_ahead makes room for more');

# ---- another size --------------------------------------------------------------------------

scalar_of("SELECT eventstore.set_option('many', 'segment_size', '5000')");
is(scalar_of(batch('many', 20000)), '20001|40000|20000', 'the size may change');
await_true($node, "SELECT max(last_position - first_position + 1) = 5000 FROM eventstore.segments WHERE collection = 'many'::regclass");
is_clean($node, 'many');

# ---- one that is missing ---------------------------------------------------------------------

scalar_of("ALTER TABLE many DETACH PARTITION many_201");
is(sqlstate_of($node, "SELECT count(*) FROM eventstore.read('many')"), '55000', 'a read over a detached segment is refused');
is(sqlstate_of($node, "SELECT count(*) FROM eventstore.read('many', after => 300)"), '00000', 'one beyond it is not');
is(sqlstate_of($node, "SELECT * FROM eventstore.append('many', 'x', fail_if => '[{\"types\": [\"none\"]}]', after => 150)"), '55000', 'a condition over it is refused');
is(sqlstate_of($node, "SELECT * FROM eventstore.append('many', 'x')"), '00000', 'appends go on');
($result, $stdout, $stderr) = $node->psql('postgres', "SELECT count(*) FROM eventstore.read('many')");
like($stderr, qr/No segment holds positions 201 to 300\./, 'the detail says which');
like($stderr, qr/ATTACH PARTITION/, 'the hint says what to do');
scalar_of("ALTER TABLE many ATTACH PARTITION many_201 FOR VALUES FROM (201) TO (301)");
is(scalar_of("SELECT count(*) FROM eventstore.read('many', before => 1000)"), 999, 'attached again it is read');
is_clean($node, 'many');
scalar_of("DROP TABLE many_301");
is(sqlstate_of($node, "SELECT count(*) FROM eventstore.read('many')"), '55000', 'a dropped one is missing for good');
scalar_of("SELECT eventstore.truncate_before('many', 401)");
is(sqlstate_of($node, "SELECT count(*) FROM eventstore.read('many')"), '00000', 'until it is given up');

# The last one, into which appends go.
scalar_of("SELECT eventstore.create_collection('lost', segment_size => 1000)");
scalar_of(batch('lost', 10));
scalar_of("ALTER TABLE lost DETACH PARTITION lost_1");
is(sqlstate_of($node, "SELECT * FROM eventstore.append('lost', 'x')"), '55000', 'an append into a detached segment is refused');
is(sqlstate_of($node, "INSERT INTO lost (type) VALUES ('x')"), '23514', 'an INSERT too');
scalar_of("ALTER TABLE lost ATTACH PARTITION lost_1 FOR VALUES FROM (1) TO (1001)");
is(sqlstate_of($node, "SELECT * FROM eventstore.append('lost', 'x', stream => 's1', expected_version => 2)"), '00000', 'attached again it takes appends');
is_clean($node, 'lost');

# ---- damage ------------------------------------------------------------------------------------

scalar_of("SELECT eventstore.create_collection('damaged')");
scalar_of(batch('damaged', 20));
scalar_of(q{SET session_replication_role = replica; UPDATE damaged_1 SET data = '{"forged": true}' WHERE position = 7; DELETE FROM damaged_1 WHERE position = 12});
is(scalar_of("SELECT count(*) > 0 FROM eventstore.verify('damaged') WHERE position = 7"), 't', 'verify finds a forged event');
is(scalar_of("SELECT count(*) > 0 FROM eventstore.verify('damaged') WHERE stream = 's2'"), 't', 'and a missing one');

# ---- a restart --------------------------------------------------------------------------------

# Positions that were reserved and not used lie beyond all segments.
$node->restart;
is(sqlstate_of($node, "INSERT INTO rapid (type, stream) SELECT 'x', 's' FROM generate_series(1, 8)"), '00000', 'an INSERT right after a restart finds room');
is_clean($node, 'rapid');

# ---- the first position ---------------------------------------------------------

# The worker looks at a new collection while its first append reserves positions.
my @firsts = map { positions($node, "SELECT eventstore.create_collection('first_$_') IS NULL; SELECT position FROM eventstore.append('first_$_', 'x')") } 1 .. 60;
is(join(' ', grep { $_ ne 'f' } @firsts), join(' ', (1) x 60), 'the first position of a new collection is 1');

$node->stop;
no_crash($node);
done_testing();
