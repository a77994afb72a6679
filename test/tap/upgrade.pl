# pg_upgrade brings over collections, stores, captured tables, subscriptions,
# leases, sources and sinks, with all that belongs to the extension, and work
# goes on where it was.
#
# OLD_PG_INSTALL names an older PostgreSQL to come from (test/matrix --upgrade);
# without it both servers are of one version.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use PostgreSQL::Test::Utils;
use Test::More;

# Of 18 on initdb's own default; both servers must agree.
my @init = ('--data-checksums');
my $old = new_server('old', init => \@init, install_path => $ENV{OLD_PG_INSTALL});

$old->safe_psql('postgres', q{
	CREATE ROLE app;
	GRANT CREATE ON SCHEMA public TO app;
	SET ROLE app;
	SELECT eventstore.create_collection('orders', segment_size => 100, retain_for => '400 days');
	SELECT count(*) FROM eventstore.append_batch('orders', (SELECT jsonb_agg(jsonb_build_object('type', 'e', 'stream', 's' || i % 3, 'tags', '["t"]'::jsonb)) FROM generate_series(1, 1000) i));
	SELECT eventstore.truncate_before('orders', 301);

	SELECT eventstore.subscribe('every', 'orders', lanes => 3, max_attempts => 1);
	SELECT count(*) FROM eventstore.poll('every', 20);
	SELECT count(*) FROM eventstore.poll('every', 20, member => 'm', lease => '1 day');
	SELECT eventstore.nack('every', (SELECT min(position) FROM eventstore.poll('every', 5, member => 'n', lease => '1 day')), 'n');
	SELECT eventstore.lease('leader', holder => 'host', ttl => '1 day');

	SELECT eventstore.create_store('kv'), eventstore.create_store('texts', 'text', changelog => false),
		eventstore.create_store('blobs', 'bytes', 'bytes'), eventstore.create_store('feed');
	SELECT eventstore.put('kv', 'k' || i % 7, to_jsonb(i)) FROM generate_series(1, 50) i;
	SELECT eventstore.put_text('texts', 'k', 'v'), eventstore.put_bytes('blobs', '\x00', '\xff'), eventstore.delete('kv', 'k3');

	CREATE TABLE stock (region text, id int, amount int, PRIMARY KEY (region, id));
	SELECT eventstore.capture('stock');
	INSERT INTO stock SELECT 'eu', i, i FROM generate_series(1, 10) i;
	UPDATE stock SET amount = amount + 1 WHERE id < 5;
	RESET ROLE;

	CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" '127.0.0.1:1');
	GRANT USAGE ON FOREIGN SERVER k TO app;
	CREATE USER MAPPING FOR app SERVER k OPTIONS ("sasl.username" 'app');
	SET ROLE app;
	SELECT eventstore.create_source('in', 'k', 't', 'feed'), eventstore.create_sink('out', 'k', 'u', 'orders');
	SELECT eventstore.pause('in');
});
await_gone($old, 'orders_201');
is_clean($old, $_, "before: $_ is consistent") foreach 'orders', 'kv', 'stock_changelog';

# What must read the same.  Positions go on beyond what was reserved, so there are more
# segments ahead, and lags, which are in positions, are greater.
my @questions = (
	(map { "SELECT count(*), min(position), max(position), md5(string_agg(e::text, ',' ORDER BY position)) FROM $_ e" }
		  qw(orders kv_changelog blobs_changelog feed_changelog stock_changelog)),
	(map { "SELECT count(*), md5(string_agg(s::text, ',')) FROM eventstore.streams('$_') s" } qw(orders kv_changelog stock_changelog)),
	(map { "SELECT count(*), md5(string_agg(s::text, ',' ORDER BY s)) FROM $_ s" } qw(kv texts blobs stock)),
	'SELECT md5(string_agg(c::text, chr(10) ORDER BY c.collection::text COLLATE "C")) FROM (SELECT collection, notify, channel, segment_size, retain_events, retain_for, retain_bytes, heartbeat, incarnation FROM eventstore.collections) c',
	'SELECT tableoid::regclass, count(*), min(position), max(position) FROM orders GROUP BY 1 ORDER BY 3',
	"SELECT to_jsonb(s) - '{lag_seconds,lag_events}'::text[] FROM eventstore.subscriptions s",
	'SELECT * FROM eventstore.members ORDER BY lane',
	'SELECT * FROM eventstore.dead_letters',
	'SELECT * FROM eventstore.leases',
	"SELECT name, server, topic, target FROM eventstore.sources UNION ALL SELECT name, server, topic, collection FROM eventstore.sinks ORDER BY 1",
	"SELECT position, type FROM eventstore.read('orders', tags => '{t}', max_count => 20)",
	"SELECT eventstore.get('kv', 'k1'), eventstore.get_at('kv', 'k1', 'infinity'), eventstore.get_bytes('blobs', '\\x00')",
	# Rights that are the owner's anyway are dumped as none, and 17 has MAINTAIN.
	q{SELECT c.relname, c.relkind, c.relowner::regrole, (SELECT string_agg(replace(a::text, 'm/', '/'), ',' ORDER BY a::text) FROM unnest(coalesce(c.relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", relowner))) a) FROM pg_class c WHERE relnamespace IN ('eventstore'::regnamespace, 'public'::regnamespace) AND relkind IN ('r', 'p', 'v', 'S', 'c') AND NOT relispartition ORDER BY relname},
	"SELECT p.oid::regprocedure, p.proacl, obj_description(p.oid, 'pg_proc') FROM pg_proc p WHERE pronamespace = 'eventstore'::regnamespace ORDER BY p.oid::regprocedure::text");
my %before = map { $_ => $old->safe_psql('postgres', $_) } @questions;

$old->stop;

my $new = new_server('new', extension => 0, init => \@init);
$new->stop;
chdir PostgreSQL::Test::Utils::tempdir();
$new->command_ok([
		'pg_upgrade', '--no-sync', '-d', $old->data_dir, '-D', $new->data_dir,
		'-b', $old->config_data('--bindir'), '-B', $new->config_data('--bindir'),
		'-s', $new->host, '-p', $old->port, '-P', $new->port ],
	'pg_upgrade succeeds');
$new->start;

sub answer
{
	my ($sql) = @_;
	return $new->safe_psql('postgres', $sql);
}

note(answer('SELECT version()'));
# Its planner knows nothing yet; what it is asked here need not be fast.
is(answer($_), $before{$_}, "the same answer to: " . substr($_, 0, 100)) foreach @questions;

# ---- work goes on --------------------------------------------------------------------

cmp_ok(answer("SELECT position FROM eventstore.append('orders', 'x')"), '>', 1000, 'the next position is beyond them');
is(answer("SELECT version FROM eventstore.append('orders', 'x', stream => 's1', expected_version => 334)"), 335, 'versions go on');
is(sqlstate_of($new, "SELECT * FROM eventstore.append('orders', 'x', stream => 's1', expected_version => 334)"), 'LG001', 'and are checked');
is(sqlstate_of($new, q(SELECT * FROM eventstore.append('orders', 'x', fail_if => '[{"tags": ["t"]}]'))), 'LG002', 'conditions see the events');
is(sqlstate_of($new, "SELECT * FROM eventstore.read('orders', after => 3)"), 'LG005', 'what was truncated stays so');
is(sqlstate_of($new, 'DELETE FROM orders'), 'LG003', 'append-only still');
is(answer("SET ROLE app; SELECT count(*) FROM eventstore.read('orders', tags => '{t}')"), 700, 'others find them by tag');
is(answer(q{SELECT count(*) FROM eventstore.append_batch('orders', (SELECT jsonb_agg('{"type": "more"}'::jsonb) FROM generate_series(1, 1000)))}), 1000, 'segments are made');

is(answer("SET ROLE app; SELECT eventstore.put('kv', 'k1', '0')"), '50', 'a store goes on');
is(answer("SELECT version, type FROM eventstore.peek('kv_changelog', 'k1')"), '9|put', 'and its changelog');
is(sqlstate_of($new, 'TRUNCATE kv'), 'LG003', 'and its refusals');
is(answer("SET ROLE app; SELECT eventstore.rebuild('kv')"), 6, 'it is the same from its changelog');
answer("SET ROLE app; UPDATE stock SET amount = 0 WHERE id = 1");
is(answer(q{SELECT version, type FROM eventstore.peek('stock_changelog', '["eu", 1]')}), '3|update', 'a captured table goes on');

is(answer("SET ROLE app; SELECT count(*) FROM eventstore.poll('every', 20, member => 'm')"), 20, 'a member goes on with its lease');
is(sqlstate_of($new, "SET ROLE app; SELECT eventstore.ack('every', (SELECT position FROM eventstore.dead_letters) - 1, 'o')"), '55000', 'others have none');
is(answer("SELECT eventstore.lease('leader', holder => 'another', ttl => '1 day')"), 'f', 'a lease is held still');

# It is a server of its own, so a copy of the old one may be running: they wait to be told.
is(answer('SELECT state, (SELECT state FROM eventstore.sinks) FROM eventstore.sources'), 'paused|cloned', 'a source is paused still, and a sink waits to be told');
answer("SET ROLE app; SELECT eventstore.resume('in'), eventstore.resume('out')");
await_true($new, "SELECT state NOT IN ('cloned', 'paused') AND (SELECT state NOT IN ('cloned', 'paused') FROM eventstore.sinks) FROM eventstore.sources");
pass('and then run');
answer("SET ROLE app; SELECT eventstore.drop_source('in'), eventstore.drop_sink('out')");

is_clean($new, $_) foreach 'orders', 'kv', 'stock_changelog';
is(answer('DROP OWNED BY app CASCADE; DROP EXTENSION eventstore CASCADE; SELECT count(*) FROM pg_namespace WHERE nspname = $$eventstore$$'), 0, 'the schema belongs to the extension still');

$new->stop;
no_crash($_) foreach $old, $new;
done_testing();
