# What users get out of workers: their code is run as themselves, records and
# functions that they make do no harm, and nobody sees what is not his.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use Test::More;

my $mock = kafka_mock();
my $node = new_server('security', settings => [ 'max_worker_processes = 8', 'eventstore.maintenance_interval = 200ms' ]);
my $address = $mock->address;
my $fast = q(consumer_properties => '{"fetch.wait.max.ms": 5}');

sub query { return $node->safe_psql('postgres', $_[0]); }

sub as { return query("SET ROLE $_[0]; $_[1]"); }

sub refused
{
	my ($role, $sql, $error, $what) = @_;
	my ($result, $out, $err) = $node->psql('postgres', "SET ROLE $role; $sql");
	like($err, $error, $what);
	return;
}

sub await_row
{
	my ($sql, $what) = @_;
	await_true($node, $sql);
	pass($what);
	return;
}

query(qq(CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '$address');
	CREATE ROLE mallory; CREATE ROLE reader; CREATE ROLE writer;
	GRANT USAGE ON FOREIGN SERVER k TO mallory, writer;
	GRANT CREATE ON SCHEMA public TO mallory;
	CREATE TABLE spied (who name, what text);
	GRANT INSERT, SELECT ON spied TO PUBLIC));

# ---- whose rights code of the user's has ---------------------------------------------

# What an index is on is computed while a statement is planned, by whoever plans it.
as('mallory', q(
	CREATE FUNCTION spy(what text) RETURNS int LANGUAGE plpgsql AS
		'BEGIN INSERT INTO public.spied VALUES (current_user, what); RETURN 1; END';
	CREATE FUNCTION fold(what text) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
		'BEGIN RETURN public.spy(what); END';
	SELECT eventstore.create_store('kv', 'text');
	CREATE INDEX ON kv (fold('restore'))));
$mock->create_topic($_, 2) foreach 'src', 'log';
$mock->produce('src', map { [ "k$_", $_, [], { partition => 0 } ] } 1 .. 4);
# A change that claims to come from another partition must not move this one's offset.
$mock->produce('log', [ 'x', 'y', [ 'es-topic' => 'src', 'es-partition' => '1', 'es-offset' => '2' ], { partition => 0 } ]);
as('mallory', "SELECT eventstore.create_source('s', 'k', 'src', 'kv', changelog_topic => 'log', $fast)");
source_caught_up($node, 's');
is(as('mallory', 'SELECT string_agg(key, \' \' ORDER BY key) FROM kv'), 'k1 k2 k3 k4 x', 'no record is passed over for what another partition\'s change says');
as('mallory', q(CREATE INDEX ON kv (fold('resync')); SELECT eventstore.resync('s')));
await_row("SELECT NOT resync FROM eventstore.source WHERE name = 's'", 'resync');
is(query('SELECT string_agg(DISTINCT who, \' \') FROM spied'), 'mallory', 'what an index of his is on is computed as nobody else');
query("SELECT eventstore.drop_source('s')");

# ---- functions made anew -------------------------------------------------------------

$mock->create_topic('changed', 1);
as('mallory', q(
	CREATE FUNCTION turn(text) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE held text := (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory');
	BEGIN PERFORM pg_advisory_unlock_all(); RETURN held; END$$;
	SELECT eventstore.create_store('turned', 'text')));
as('mallory', "SELECT eventstore.create_source('t', 'k', 'changed', 'turned', transform => 'turn(text)', $fast)");
foreach my $key ('a', 'b')
{
	$mock->produce('changed', [ $key, 'v' ]);
	source_caught_up($node, 't', "$key has come");
}
is(query('SELECT key, value FROM turned ORDER BY key'), "a|1\nb|1", 'the source is the worker\'s again after a function gave its lock back');
as('mallory', 'DROP FUNCTION turn(text); CREATE FUNCTION turn(text) RETURNS bigint LANGUAGE sql AS \'SELECT 4711::bigint\'');
$mock->produce('changed', [ 'c', 'v' ]);
await_row("SELECT message LIKE '%transform public.turn(pg_catalog.text) does not fit%' FROM eventstore.sources WHERE name = 't'",
	'a transform that returns another type now');
refused('mallory', "SELECT eventstore.retry_dead_letters('t')", qr/does not fit/, 'is not called by retry_dead_letters either');
as('mallory', 'DROP FUNCTION turn(text); CREATE FUNCTION turn(text) RETURNS text LANGUAGE sql AS \'SELECT $1\'');
await_row("SELECT count(*) = 3 FROM turned", 'one that fits again is used');
as('mallory', 'CREATE OR REPLACE FUNCTION turn(text) RETURNS text LANGUAGE sql AS \'SELECT $1\'; REVOKE EXECUTE ON FUNCTION turn(text) FROM PUBLIC');
query('ALTER FUNCTION turn(text) OWNER TO reader');
$mock->produce('changed', [ 'd', 'v' ]);
await_row("SELECT message LIKE '%permission denied for function turn%' FROM eventstore.sources WHERE name = 't'", 'nor one that the owner may not call');
query("SELECT eventstore.drop_source('t')");

# A producer would have the mock make it, of other partitions.
$mock->create_topic('out', 1);
as('mallory', q(
	CREATE FUNCTION key_of(eventstore.event) RETURNS text LANGUAGE sql AS 'SELECT $1.type';
	SELECT eventstore.create_collection('c');
	SELECT eventstore.create_sink('out', 'k', 'out', 'c', key => 'key_of(eventstore.event)')));
as('mallory', q(SELECT eventstore.pause('out');
	DROP FUNCTION key_of; CREATE FUNCTION key_of(eventstore.event) RETURNS bigint LANGUAGE sql AS 'SELECT 4711::bigint';
	SELECT eventstore.append('c', 'a'); SELECT eventstore.resume('out')));
await_row("SELECT message LIKE '%returns neither text nor bytea%' FROM eventstore.sinks WHERE name = 'out'", 'a key function that returns another type now');
query("SELECT eventstore.drop_sink('out')");

# ---- records -------------------------------------------------------------------------

$mock->create_topic('deep', 1);
as('mallory', q(SELECT eventstore.create_store('deep', 'json')));
$mock->produce('deep', [ 'a', '1' ], [ 'deep', '[' x 100_000 ], [ 'b', '2' ]);
as('mallory', "SELECT eventstore.create_source('deep', 'k', 'deep', 'deep', $fast)");
source_caught_up($node, 'deep', 'JSON nested too deeply does not hold up its topic');
is(query('SELECT key FROM deep ORDER BY key'), "a\nb", 'the others are written');
is(query("SELECT sqlstate, reason FROM eventstore.dead_letters WHERE source = 'deep'"),
	'54000|the value cannot be taken as json: it is nested too deeply, or too large', 'it is parked');

# ---- who sees what -------------------------------------------------------------------

query('GRANT SELECT ON deep TO reader');
is(as('reader', "SELECT count(*) FROM eventstore.dead_letters WHERE source = 'deep'"), '1', 'dead letters of whose target one may SELECT');
as('mallory', 'ALTER TABLE deep ENABLE ROW LEVEL SECURITY; CREATE POLICY none ON deep TO reader USING (false)');
is(as('reader', "SELECT count(*) FROM eventstore.dead_letters WHERE source = 'deep'"), '0', 'not where rows are hidden from him');
is(as('reader', "SELECT count(*) FROM eventstore.sources WHERE name = 'deep'"), '0', 'nor the source and its messages');
is(as('reader', "SELECT count(*) FROM eventstore.kafka_workers('source')"), '0', 'nor what its worker says');
refused('reader', "SELECT eventstore.flush('deep')", qr/permission denied for source/, 'and does not ask it for anything');
is(as('mallory', "SELECT count(*) FROM eventstore.dead_letters WHERE source = 'deep'"), '1', 'its owner sees it');

# ---- whose a store is ----------------------------------------------------------------

query('GRANT SELECT, INSERT, UPDATE, DELETE ON kv, kv_changelog TO writer');
refused('writer', "SELECT eventstore.create_source('mine', 'k', 'src', 'kv', mode => 'replica', changelog_topic => 'log')",
	qr/must be owner of table kv/, 'who may write a store cannot keep others from it');
refused('writer', "SELECT eventstore.create_source('mine', 'k', 'src', 'kv', partitions => '{0}', replica_partitions => '{1}', changelog_topic => 'log')",
	qr/must be owner of table kv/, 'nor from some of its keys');

# Who may not write it does not come as far as its lock.
my $locker = session($node);
$locker->run('BEGIN; LOCK TABLE turned, c');
is(sqlstate_of($node, "SET statement_timeout = '5s'; SET ROLE writer; SELECT eventstore.create_source('mine', 'k', 'src', '$_')"), '42501', "$_, which is locked: refused at once")
  foreach 'turned', 'c';
$locker->run('COMMIT');
$locker->quit;

# ---- an owner that leaves ------------------------------------------------------------

query(q(CREATE ROLE leaving; CREATE ROLE heir; GRANT USAGE ON FOREIGN SERVER k TO PUBLIC;
	SELECT eventstore.create_store('open', 'text'); GRANT ALL ON open TO PUBLIC;
	SELECT eventstore.create_collection('openly'); GRANT ALL ON openly TO PUBLIC));
$mock->create_topic($_, 1) foreach 'leaving', 'leaving_out';
as('leaving', "SELECT eventstore.create_source('leaving', 'k', 'leaving', 'open', $fast)");
as('leaving', "SELECT eventstore.create_sink('leaving_out', 'k', 'leaving_out', 'openly')");
source_caught_up($node, 'leaving', 'a source that needs nothing but what PUBLIC has');
is(sqlstate_of($node, 'DROP ROLE leaving'), '2BP01', 'its owner cannot be dropped');
my ($status, $out, $err) = $node->psql('postgres', 'DROP ROLE leaving');
like($err, qr/column owner of view eventstore\.sources.*column owner of view eventstore\.sinks/s, 'and is told where to look');
($status, $out, $err) = $node->psql('template1', 'DROP ROLE leaving');
like($err, qr/objects in database postgres/, 'nor from another database');
is(sqlstate_of($node, 'SET ROLE mallory; REASSIGN OWNED BY leaving TO mallory'), '42501', 'nobody else gives them away');
is(query("SELECT DISTINCT owner FROM eventstore.sources WHERE name = 'leaving'"), 'leaving', 'nor are they gone then');
is(sqlstate_of($node, 'SET ROLE mallory; DROP OWNED BY leaving'), '42501', 'or drops them');
query('REASSIGN OWNED BY leaving TO heir');
is(query("SELECT owner FROM eventstore.sources WHERE name = 'leaving' UNION ALL SELECT owner FROM eventstore.sinks WHERE name = 'leaving_out'"), "heir\nheir", 'REASSIGN OWNED gives them to another');
query('DROP ROLE leaving');
query(q(CREATE FUNCTION whose() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.value := current_user; RETURN NEW; END';
	CREATE TRIGGER whose BEFORE INSERT ON open FOR EACH ROW EXECUTE FUNCTION whose()));
$mock->produce('leaving', [ 'a', '1' ]);
source_caught_up($node, 'leaving', 'who can then be dropped, and it goes on');
is(query('SELECT key, value FROM open'), 'a|heir', 'as the heir');
query("SELECT eventstore.append('openly', 'x')");
is(query("SELECT eventstore.flush('leaving_out')"), 't', 'the sink, too');

# What pg_upgrade brings, or came past triggers, is noticed by the database's worker.
query("SET allow_system_table_mods = on; DELETE FROM pg_shdepend WHERE refobjid = 'heir'::regrole");
$node->restart;
await_row("SELECT count(*) = 2 FROM pg_shdepend WHERE refobjid = 'heir'::regrole", 'a role that owns some is known to PostgreSQL after a restart');
query("SET ROLE heir; DROP OWNED BY heir");
is(query("SELECT count(*) FROM eventstore.sources WHERE name LIKE 'leaving%'") . query("SELECT count(*) FROM eventstore.sinks WHERE name LIKE 'leaving%'"), '00', 'DROP OWNED drops them');
query('DROP ROLE heir');

# One whose owner is gone all the same.
query('CREATE ROLE gone');
as('gone', "SELECT eventstore.create_source('orphan', 'k', 'leaving', 'open', $fast)");
query("SET allow_system_table_mods = on; DELETE FROM pg_shdepend WHERE refobjid = 'gone'::regrole; DROP ROLE gone");
await_row("SELECT state = 'denied' AND message LIKE '%does not exist%' FROM eventstore.sources WHERE name = 'orphan'", 'without an owner it stops');
query("SELECT eventstore.drop_source('orphan')");

# ---- processes -----------------------------------------------------------------------

as('mallory', "SELECT eventstore.create_source('many$_', 'k', 'deep', 'deep', $fast)") foreach 1 .. 8;
await_row("SELECT count(*) > 0 FROM eventstore.sources WHERE state = 'waiting_for_slot'", 'not all sources get a process');
query("SELECT eventstore.wait_for('c', eventstore.head('c'), '0.1 s')");
await_row("SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'eventstore notifier'", 'the notifier does');

$node->stop;
no_crash($node);
done_testing();
