# The worker of a source meets what a server can do to it: other writers, locks,
# rights that come and go, objects that go, no free process, crashes, copies of
# the database, commands that need it gone.  Each is a state that can be read,
# and each ends as it should.  Against the mock cluster.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $mock = kafka_mock();
my $node = new_server('worker', settings => [ 'max_worker_processes = 12', 'eventstore.maintenance_interval = 200ms', 'restart_after_crash = on' ]);
my $address = $mock->address;

sub query { return $node->safe_psql('postgres', $_[0]); }

# create($name, $topic, $target, further arguments as SQL)
sub create
{
	my ($name, $topic, $target, @more) = @_;
	return "SELECT eventstore.create_source('$name', 'k', '$topic', '$target',"
	  . join(', ', q( consumer_properties => '{"fetch.wait.max.ms": 5}'), "flush_interval => '10 ms'", @more) . ')';
}

sub caught_up
{
	my ($name, $what) = @_;
	await_true($node, "SELECT eventstore.wait_for_source('$name', '10 s')");
	pass($what // "$name has caught up");
	return;
}

sub state_of { return query("SELECT state FROM eventstore.sources WHERE name = '$_[0]'"); }

# With a pattern that the message matches.
sub await_state
{
	my ($name, $state, $message) = @_;
	await_true($node, "SELECT state = '$state' AND COALESCE(message, '') ~ '" . ($message // '') . "' FROM eventstore.sources WHERE name = '$name'");
	pass("$name: $state");
	return;
}

sub pid_of { return query("SELECT pid FROM eventstore.sources WHERE name = '$_[0]'"); }

query(qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address')));
query('CREATE ROLE app; CREATE SCHEMA app AUTHORIZATION app; GRANT USAGE ON FOREIGN SERVER k TO app');
query("SET ROLE app; SELECT eventstore.create_store('app.kv', 'text')");
$mock->create_topic('t', 2);
query('SET ROLE app; ' . create('s', 't', 'app.kv'));
my $produced = 0;
sub produce
{
	$mock->produce('t', map { $produced++; [ "k$produced", 'v', [], { partition => $produced % 2 } ] } 1 .. $_[0]);
	return;
}
sub stored { return query('SELECT count(*) FROM app.kv'); }
produce(10);
caught_up('s');

# ---- found by the survey --------------------------------------------------------------------

# Nobody has called its worker, as after COMMIT PREPARED.  By itself the launcher looks once a minute.
query("SELECT eventstore.pause('s')");
await_true($node, "SELECT pid IS NULL FROM eventstore.sources WHERE name = 's'");
query("UPDATE eventstore.source SET paused = false WHERE name = 's'");
my $found = time;
await_true($node, "SELECT pid IS NOT NULL FROM eventstore.sources WHERE name = 's'");
cmp_ok(time - $found, '<', 30, 'found by the survey it is started at once');

# ---- another one who writes ------------------------------------------------------------

query("UPDATE eventstore.source_offset SET next_offset = 0, record_time = NULL");
produce(1);
caught_up('s', 'offsets that somebody moved are read again');
is(stored(), $produced, 'and what they ask for is written again');
like(PostgreSQL::Test::Utils::slurp_file($node->logfile), qr/offsets of source "s" were moved by somebody else/, 'the log tells');
is(query("SELECT count(*) FROM (SELECT eventstore.peek('app.kv_changelog', 'k1')) p"), '1', 'k1');
is(query("SELECT position = 6 AND next_offset = position FROM eventstore.source_partitions JOIN eventstore.source_offset USING (topic, partition) WHERE partition = 1"), 't', 'as they should be');

# ---- locks and rights -------------------------------------------------------------------

my $locker = session($node);
$locker->run('BEGIN; LOCK TABLE app.kv');
produce(1);
await_state('s', 'retrying', 'lock');
is(query("SELECT eventstore.flush('s', '0.2 s')"), 'f', 'flush does not wait for ever');
$locker->run('COMMIT');
caught_up('s', 'a locked target is written once it can be');

is($locker->run("BEGIN; LOCK TABLE app.kv; SELECT eventstore.wait_for_source('s', '30 s')"), 't', 'nothing to do, no lock needed');
produce(1);
is($locker->run("SELECT eventstore.wait_for_source('s', '1 s')"), 'f', 'who waits for himself gets his time-out');
is($locker->run("SELECT eventstore.flush('s', '1 s')"), 'f', 'flush, too');
$locker->run('COMMIT');
caught_up('s');

query('REVOKE INSERT ON app.kv FROM app');
produce(1);
await_state('s', 'retrying', 'permission denied for table kv');
query('GRANT INSERT ON app.kv TO app');
caught_up('s', 'a right that came back');
query('REVOKE USAGE ON FOREIGN SERVER k FROM app');
await_state('s', 'denied', 'foreign server k');
query('GRANT USAGE ON FOREIGN SERVER k TO app');
await_state('s', 'running');

# ---- a pause while a batch runs -----------------------------------------------------------

$locker->run('BEGIN; LOCK TABLE app.kv');
produce(1);
await_true($node, "SELECT count(*) > 0 FROM pg_locks WHERE relation = 'app.kv'::regclass AND NOT granted");
query("SELECT eventstore.pause('s')");
$locker->run('COMMIT');
await_true($node, "SELECT state = 'paused' AND pid IS NULL FROM eventstore.sources WHERE name = 's'");
is(stored(), $produced - 1, 'paused: nothing was written any more');
is(query("SELECT eventstore.wait_for_source('s', '10 s')"), 'f', 'nobody waits for a paused source');
query("SELECT eventstore.resume('s')");
caught_up('s');
is(stored(), $produced, 'resumed: it was');

# ---- who waits ----------------------------------------------------------------------------

$mock->down;
my @waiters = map { session($node, application_name => "waiter$_") } 1 .. 8;
$_->send("SELECT eventstore.wait_for_source('s', '60 s')") foreach @waiters;
await_true($node, "SELECT count(*) = 8 FROM pg_stat_activity WHERE application_name LIKE 'waiter%' AND wait_event_type = 'Extension'");
query("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'waiter1'");
$waiters[0]->receive;
is($waiters[0]{state}, '57014', 'a wait can be cancelled');
await_state('s', 'disconnected');
# Its next process comes when the record is there: it is asked for what there is then.
$locker->run("BEGIN; SELECT FROM eventstore.source WHERE name = 's' FOR UPDATE");
query('SELECT pg_terminate_backend(' . pid_of('s') . ')');
$mock->up;
produce(1);
$locker->run('COMMIT');
is(join('', map { $_->receive } @waiters[ 1 .. 7 ]), 't' x 7, 'who waits outlives the worker and the broker');
is(stored(), $produced, 'and what he waited for is there');
$_->quit foreach @waiters;

# ---- objects that go ---------------------------------------------------------------------

query('CREATE FUNCTION app.up(text) RETURNS text LANGUAGE sql IMMUTABLE RETURN upper($1); ALTER FUNCTION app.up(text) OWNER TO app');
query("SET ROLE app; SELECT eventstore.create_store('app.up', 'text')");
query('SET ROLE app; ' . create('up', 't', 'app.up', "transform => 'app.up(text)'"));
caught_up('up');
is(query("SELECT DISTINCT value FROM app.up"), 'V', 'transformed');
query('DROP FUNCTION app.up(text)');
produce(1);
await_state('up', 'retrying', 'function app.up.* does not exist');
query('CREATE FUNCTION app.up(text) RETURNS text LANGUAGE sql IMMUTABLE RETURN upper($1); ALTER FUNCTION app.up(text) OWNER TO app');
query("SELECT eventstore.resume('up')");
caught_up('up', 'a transform made again');
query('DROP TABLE app.up');
is(query("SELECT count(*) FROM eventstore.sources WHERE name = 'up'") . query('SELECT count(DISTINCT source) FROM eventstore.source_offset'), '01', 'a source goes with its target');
await_true($node, "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'eventstore source'");
pass('and so does its worker');

query('DROP SERVER k');
await_state('s', 'retrying', 'server .k. does not exist');
my $log = -s $node->logfile;
query(qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address'); GRANT USAGE ON FOREIGN SERVER k TO app));
produce(1);
caught_up('s', 'a server made again');
is(query("SELECT starts FROM eventstore.source WHERE name = 's'"), '0', 'that is no crash');
query(qq(ALTER SERVER k OPTIONS (SET "bootstrap.servers" '127.0.0.1:1')));
await_state('s', 'disconnected');
query(qq(ALTER SERVER k OPTIONS (SET "bootstrap.servers" '$address')));
produce(1);
caught_up('s', 'a server that was altered and mended');

# ---- triggers ------------------------------------------------------------------------------

query(q{CREATE FUNCTION app.no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF NEW.key = 'never' THEN RAISE 'never %', NEW.value; END IF; RETURN NEW; END$$;
	CREATE TRIGGER no BEFORE INSERT OR UPDATE ON app.kv FOR EACH ROW EXECUTE FUNCTION app.no()});
$mock->produce('t', map { [ $_, 'v', [], { partition => 0 } ] } ('a', 'never', 'b'));
caught_up('s');
is(query("SELECT string_agg(key, ',' ORDER BY key) FROM app.kv WHERE key < 'k'"), 'a,b', 'a trigger refuses one record');
is(query('SELECT sqlstate, reason FROM eventstore.dead_letters'), 'P0001|never v', 'which is a dead letter');
query('DROP TRIGGER no ON app.kv');
$mock->produce('t', [ 'never', 'later', [], { partition => 0 } ]);
caught_up('s');
is(query("SELECT eventstore.retry_dead_letters('s')"), '0', 'a letter that is out of date is not written');
is(query("SELECT value FROM app.kv WHERE key = 'never'") . query('SELECT count(*) FROM eventstore.dead_letters'), 'later0', 'the later record stays, and the letter goes');

query(q{CREATE FUNCTION app.late() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NULL; END$$;
	CREATE CONSTRAINT TRIGGER late AFTER INSERT ON app.kv DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION app.late()});
produce(1);
await_state('s', 'retrying', 'deferred trigger');
query('DROP TRIGGER late ON app.kv');
caught_up('s', 'a deferred trigger is refused, and no record for it');

# ---- dead letters ---------------------------------------------------------------------------

query("ALTER TABLE app.kv ADD CONSTRAINT small CHECK (value <> 'big')");
$mock->produce('t', [ 'p1', 'big', [ h => 'x', h => undef, b => "\xff", '' => '' ], { partition => 0 } ], [ 'p2', 'big', [], { partition => 1 } ], [ 'p3', "\xff", [], { partition => 1 } ]);
caught_up('s');
is(query('SELECT count(*) FROM eventstore.dead_letters'), '3', 'dead letters');
query('CREATE ROLE other');
is(sqlstate_of($node, "SET ROLE other; SELECT eventstore.retry_dead_letters('s')"), '42501', 'not for others');
is(query("SET ROLE app; SELECT eventstore.retry_dead_letters('s')"), '0', 'still bad');
is(query('SELECT string_agg(DISTINCT attempts::text || sqlstate, $$,$$ ORDER BY attempts::text || sqlstate) FROM eventstore.dead_letters'), '222021,223514', 'one attempt more');
query('ALTER TABLE app.kv DROP CONSTRAINT small');
is(query("SELECT eventstore.retry_dead_letters('s', ARRAY(SELECT id FROM eventstore.dead_letters WHERE partition = 1))"), '1', 'those that are named');
is(query("SELECT eventstore.retry_dead_letters('s')"), '1', 'and the others');
is(query(q(SELECT metadata->'headers' FROM eventstore.peek('app.kv_changelog', 'p1'))), '[["h", "x"], ["h", null], ["b", {"base64": "/w=="}], ["", ""]]', 'with their headers');
is(query("SELECT string_agg(key, ',' ORDER BY key) FROM app.kv WHERE value = 'big'") . query('SELECT reason FROM eventstore.dead_letters'),
	'p1,p2the value cannot be taken as text: it is not UTF-8, or not in the database\'s encoding', 'what cannot be mended stays');

# Many large ones are not held in memory at once.
query("SELECT eventstore.create_store('heavy', 'text', changelog => false); CREATE TABLE used (bytes int8)");
query(q{CREATE FUNCTION weigh() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
	INSERT INTO public.used SELECT sum(total_bytes) FROM pg_backend_memory_contexts; RETURN NEW; END$$;
	CREATE TRIGGER weigh BEFORE INSERT ON heavy FOR EACH ROW EXECUTE FUNCTION weigh()});
$mock->create_topic('heavy', 1);
query(create('heavy', 'heavy', 'heavy'));
query(q{INSERT INTO eventstore.source_dead_letter (source, topic, partition, record_offset, key, value, sqlstate, reason)
	SELECT s.id, 'heavy', 0, i, convert_to('k' || i, 'UTF8'), convert_to(repeat('x', 1000000), 'UTF8'), '23514', '' FROM eventstore.source s, generate_series(1, 150) i WHERE s.name = 'heavy'});
is(query("SELECT eventstore.retry_dead_letters('heavy')"), '150', 'many megabytes of dead letters');
is(query('SELECT max(bytes) < 50000000 FROM used'), 't', 'are not in memory at one time') or note(query('SELECT max(bytes) FROM used'));
query("SELECT eventstore.drop_source('heavy')");

# ---- odd records ------------------------------------------------------------------------------

$mock->create_topic('odd', 1);
query("SELECT eventstore.create_store('odd', 'json'); SELECT eventstore.create_store('raw', 'bytes', key_format => 'bytes')");
query(create('odd', 'odd', 'odd'));
query(create('raw', 'odd', 'raw'));
$mock->produce('odd',
	[ 'k' x 3000, '1' ],    # compressed by the index
	[ join('', map { chr(32 + rand 90) } 1 .. 9000), '1' ],
	[ 'zero', q({"a": "\u0000"}) ],
	[ 'half', q({"a": "\ud800"}) ],
	[ "a\0b", '1' ],
	[ "\xc3\x28", '1' ],
	[ '', '1' ],
	[ 'deep', '[' x 100000 ],
	[ 'number', '1e999999' ],
	[ 'headers', '1', [ map { ("h$_", 'x' x 1000) } 1 .. 60 ] ],
	[ 'null', '1', [ h => undef, '' => '', h => "\0" ] ],
	[ 'large', '"' . 'x' x 900000 . '"' ],
	[ 'good', '1' ]);
caught_up('odd');
caught_up('raw');
is(query('SELECT string_agg(record_offset || sqlstate, $$ $$ ORDER BY record_offset) FROM eventstore.dead_letters WHERE source = $$odd$$'),
	'154000 222P02 322P02 422021 522021 754000 822P02', 'what json cannot hold');
is(query('SELECT string_agg(record_offset || sqlstate, $$ $$ ORDER BY record_offset) FROM eventstore.dead_letters WHERE source = $$raw$$'), '154000', 'what bytes cannot');
is(query(q(SELECT count(*), max(length(key)), max(length(value::text)) FROM odd)), '6|3000|900002', 'the rest is there');
is(query(q(SELECT jsonb_array_length(metadata->'headers') FROM eventstore.peek('odd_changelog', 'headers'))), '60', 'all its headers');
is(query(q(SELECT metadata->'headers' FROM eventstore.peek('odd_changelog', 'null'))), '[["h", null], ["", ""], ["h", {"base64": "AA=="}]]', 'odd headers');

# ---- processes ----------------------------------------------------------------------------------

my $copies = query("SELECT string_agg(eventstore.create_store('c' || i, 'text')::text, ',') FROM generate_series(1, 9) i");
query(create("c$_", 't', "c$_")) foreach 1 .. 9;
await_true($node, "SELECT count(*) FILTER (WHERE state = 'waiting_for_slot') > 0 AND count(*) FILTER (WHERE state NOT IN ('waiting_for_slot', 'running')) = 0 FROM eventstore.sources");
pass('no free process: waiting_for_slot');
my $waiting = query("SELECT name FROM eventstore.sources WHERE state = 'waiting_for_slot' LIMIT 1");
my @running = split /\n/, query("SELECT name FROM eventstore.sources WHERE name LIKE 'c%' AND state = 'running'");
query("SELECT eventstore.drop_source('$_')") foreach @running;
caught_up($waiting, 'a process got free: it goes on');
query("SELECT eventstore.drop_source(name) FROM eventstore.sources WHERE name LIKE 'c%' OR name IN ('odd', 'raw')");

# One that ends again and again before it has come anywhere.
$mock->create_topic('lost', 1);
$mock->down;
query(create('lost', 'lost', 'raw'));
await_state('lost', 'disconnected');
query("UPDATE eventstore.source SET starts = 9 WHERE name = 'lost'");
query('SELECT pg_terminate_backend(' . pid_of('lost') . ')');
await_true($node, "SELECT state = 'disconnected' AND pid IS NOT NULL FROM eventstore.sources WHERE name = 'lost' AND (SELECT starts = 10 FROM eventstore.source WHERE name = 'lost')");
query('SELECT pg_terminate_backend(' . pid_of('lost') . ')');
await_state('lost', 'failed', 'ended 10 times');
$mock->up;
query("SELECT eventstore.resume('lost')");
caught_up('lost', 'failed, and resumed');
await_true($node, "SELECT starts = 0 FROM eventstore.source WHERE name = 'lost'");
query("SELECT eventstore.drop_source('lost')");

# A crash, of which each process is ended.
crash_by($node, pid_of('s'));
produce(1);
caught_up('s', 'after a crash');

# ---- copies and ends -------------------------------------------------------------------------------

sub seconds
{
	my ($what, $do) = @_;
	my $began = time;

	$do->();
	cmp_ok(time - $began, '<', 10, sprintf '%s: within seconds (%.1f)', $what, time - $began);
	return;
}

# A batch that takes long: a trigger that sleeps, for each record.
query(q{CREATE FUNCTION app.slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(0.05); RETURN NEW; END$$});
query('CREATE TRIGGER slow BEFORE INSERT ON app.kv FOR EACH ROW EXECUTE FUNCTION app.slow()');
my $busy = "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'eventstore source' AND wait_event = 'PgSleep'";
produce(2000);
await_true($node, $busy);
seconds('CREATE DATABASE ... TEMPLATE', sub { $node->safe_psql('template1', 'CREATE DATABASE copy TEMPLATE postgres') });
is($node->safe_psql('copy', "SELECT state FROM eventstore.sources WHERE name = 's'"), 'cloned', 'a copy does not run');
is($node->safe_psql('copy', "SELECT count(*) FROM pg_stat_activity WHERE datname = 'copy' AND backend_type = 'eventstore source'"), '0', 'it has no process');
$node->safe_psql('copy', 'DROP TRIGGER slow ON app.kv');
$node->safe_psql('copy', "SELECT eventstore.resume('s')");
await_true($node, "SELECT eventstore.wait_for_source('s', '10 s')", 'copy');
is($node->safe_psql('copy', 'SELECT count(*) > 2000 FROM app.kv'), 't', 'until it is told to');
await_true($node, $busy);
$node->safe_psql('copy', 'CREATE TRIGGER slow BEFORE UPDATE ON app.kv FOR EACH ROW EXECUTE FUNCTION app.slow()');
$mock->produce('t', map { [ "k$_", 'w', [], { partition => $_ % 2 } ] } 1 .. 500);
await_true($node, "SELECT count(*) = 2 FROM pg_stat_activity WHERE backend_type = 'eventstore source' AND wait_event = 'PgSleep'");
seconds('DROP DATABASE', sub { query('DROP DATABASE copy') });
seconds('a fast stop', sub { $node->stop });
$node->start;
await_true($node, $busy);
seconds('pause', sub { query("SELECT pg_terminate_backend(" . pid_of('s') . ")"); query("SELECT eventstore.pause('s')") });
query("SELECT eventstore.resume('s')");
await_true($node, $busy);
seconds('ALTER EXTENSION', sub { query('ALTER EXTENSION eventstore DROP VIEW eventstore.gaps; ALTER EXTENSION eventstore ADD VIEW eventstore.gaps') });
seconds('DROP EXTENSION', sub {
	query('SELECT pg_terminate_backend(' . pid_of('s') . ')');
	query('DROP EXTENSION eventstore CASCADE');
});
await_true($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'eventstore source'");
pass('no process is left');

$node->stop;
no_crash($node);
done_testing();
