# Stores: after a storm of every kind of statement, after a crash, and after a
# dump and restore the changelog, replayed, gives the table.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

my $transactions = $ENV{STORM_TRANSACTIONS} // 150;
my $node = new_server('stores',
	settings => [ 'restart_after_crash = on', 'max_prepared_transactions = 5', 'eventstore.tick_delay = 20ms' ]);
my $dir = PostgreSQL::Test::Utils::tempdir();

$node->safe_psql('postgres', q{
	SELECT eventstore.create_store('kv');
	SELECT eventstore.set_option('kv_changelog', 'segment_size', '500');
	SELECT eventstore.create_store('fast', unlogged => true);
	SELECT eventstore.create_store('words', format => 'text');
	SELECT eventstore.create_store('bytes', format => 'bytes', key_format => 'bytes');
	CREATE SEQUENCE fresh;
	CREATE TABLE replaced (key text, value jsonb, previous jsonb);
	CREATE TABLE removed (key text, value jsonb);
	CREATE TABLE parents (name text COLLATE "C" PRIMARY KEY);
	ALTER TABLE kv ADD COLUMN parent text COLLATE "C" REFERENCES parents ON DELETE CASCADE;
	-- Keys of their own for what a statement may not have twice.
	CREATE FUNCTION value() RETURNS jsonb LANGUAGE sql AS $$ SELECT to_jsonb(nextval('fresh')) $$;
	CREATE FUNCTION some_key() RETURNS text LANGUAGE sql AS $$ SELECT chr(97 + floor(random() * 4)::int) || floor(random() * 6)::int $$;
	CREATE FUNCTION rename(old_key text, new_key text) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		UPDATE kv SET key = new_key, value = value() WHERE key = old_key;
	EXCEPTION WHEN unique_violation THEN
		NULL;
	END $$;
	-- A trigger of the user's that writes the store again
	CREATE FUNCTION echo() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF pg_trigger_depth() = 1 AND NEW.key LIKE 'a%' THEN
			UPDATE kv SET value = value() WHERE key = NEW.key;
		END IF;
		RETURN NULL;
	END $$;
	CREATE TRIGGER echo AFTER INSERT OR UPDATE ON kv FOR EACH ROW EXECUTE FUNCTION echo();
});

my %scripts = (
	put => q{INSERT INTO replaced SELECT k, v, eventstore.put('kv', k, v) FROM (SELECT 'b' || some_key() AS k, value() AS v OFFSET 0) s;},
	delete => q{INSERT INTO removed SELECT k, eventstore.delete('kv', k) FROM (SELECT 'b' || some_key() AS k OFFSET 0) s;},
	upsert => q{INSERT INTO kv (key, value) SELECT DISTINCT ON (k) k, value() FROM (SELECT some_key() AS k FROM generate_series(1, 5)) s ORDER BY k ON CONFLICT (key) DO UPDATE SET value = excluded.value;},
	ignore => q{INSERT INTO kv (key, value) VALUES (some_key(), value()) ON CONFLICT DO NOTHING;},
	update => q{UPDATE kv SET value = value() WHERE key = some_key();},
	same => q{UPDATE kv SET value = value WHERE key IN (SELECT key FROM kv ORDER BY key LIMIT 3);},
	remove => q{DELETE FROM kv WHERE key = some_key();},
	rename => q{SELECT rename(some_key(), some_key());},
	prefix => q{SELECT count(*) FROM eventstore.delete_prefix('kv', 'd');},
	merge => q{SELECT some_key() AS k
\gset
DO $$ BEGIN
	MERGE INTO kv USING (SELECT 'c' || some_key() AS key) s ON kv.key = s.key
		WHEN MATCHED AND random() < 0.3 THEN DELETE WHEN MATCHED THEN UPDATE SET value = value() WHEN NOT MATCHED THEN INSERT (key, value) VALUES (s.key, value());
EXCEPTION WHEN unique_violation THEN NULL; END $$;},
	cascade => q{BEGIN;
INSERT INTO parents VALUES ('p' || :client_id);
INSERT INTO kv (key, value, parent) VALUES ('child' || :client_id, value(), 'p' || :client_id) ON CONFLICT (key) DO UPDATE SET value = excluded.value, parent = excluded.parent;
DELETE FROM parents WHERE name = 'p' || :client_id;
END;},
	savepoint => q{BEGIN;
SELECT eventstore.put('kv', some_key(), value());
SAVEPOINT s;
SELECT eventstore.put('kv', some_key(), value()), eventstore.delete('kv', some_key());
ROLLBACK TO s;
SELECT eventstore.put('kv', some_key(), value());
END;},
	serializable => q{BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT eventstore.get('kv', some_key()), eventstore.put('kv', some_key(), value());
END;},
	fast => q{SELECT eventstore.put('fast', some_key(), value()), eventstore.delete('fast', some_key());},
	batch => q{SELECT eventstore.store_apply('words', array_agg(k), array_agg(CASE WHEN random() < 0.7 THEN some_key() END)) FROM (SELECT some_key() AS k FROM generate_series(1, 12) OFFSET 0) s;
SELECT eventstore.store_apply('fast', array_agg(k), array_agg(CASE WHEN random() < 0.7 THEN value() END)) FROM (SELECT some_key() AS k FROM generate_series(1, 12) OFFSET 0) s;
SELECT eventstore.store_apply('kv', array_agg(k), array_agg(CASE WHEN random() < 0.7 THEN value() END)) FROM (SELECT some_key() AS k FROM generate_series(1, 4) OFFSET 0) s;},
	bytes => q{SELECT eventstore.put_bytes('bytes', '\x' || md5(some_key()), decode(md5(some_key()), 'hex')), eventstore.put_text('words', some_key(), some_key()), eventstore.delete_text('words', some_key());});
foreach my $name (keys %scripts)
{
	PostgreSQL::Test::Utils::append_to_file("$dir/$name.sql", "$scripts{$name}\n");
}
# Deadlocks and serialization failures are part of it: another try.
my @storm = ('pgbench', '-n', '-c', '8', '-j', '2', '--max-tries=100', map { ('-f', "$dir/$_.sql") } sort keys %scripts);

# Where the changelog, replayed, is not the table; where versions have a hole, or time goes back.
sub replays
{
	my ($store, $name, $dbname) = @_;
	my %value = (words => q{convert_from(r.body, 'UTF8')}, bytes => 'r.body');
	my $value = $value{$store} // 'r.data';

	is($node->safe_psql($dbname // 'postgres', qq{
		SELECT coalesce(s.key::text, r.stream)
		FROM (SELECT * FROM (SELECT DISTINCT ON (stream) * FROM ${store}_changelog ORDER BY stream, position DESC) l WHERE type = 'put') r
			FULL JOIN $store s ON s.key::text = r.stream
		WHERE (s.value, s.version, s.updated_at) IS DISTINCT FROM ($value, r.version, r.created_at)
		LIMIT 5}), '', "$name: the changelog of $store, replayed, is the table");
	is($node->safe_psql($dbname // 'postgres', qq{
		SELECT stream, version FROM (
			SELECT stream, version, type, row_number() OVER w AS n, created_at, lag(created_at) OVER w AS before, lag(type) OVER w AS type_before
			FROM ${store}_changelog WINDOW w AS (PARTITION BY stream ORDER BY position)) c
		WHERE version <> n OR created_at < before OR (type = 'delete' AND type_before IS DISTINCT FROM 'put')
		LIMIT 5}), '', "$name: versions of $store are dense, and its times in order");
	is_clean($node, "${store}_changelog", "$name: verify finds nothing in the changelog of $store", $dbname);
	return;
}

# ---- a storm ------------------------------------------------------------------------

$node->command_ok([ @storm, '-t', $transactions, '-h', $node->host, '-p', $node->port, 'postgres' ], 'a storm of every kind of statement');
replays($_, 'after the storm') foreach qw(kv fast words bytes);
cmp_ok($node->safe_psql('postgres', 'SELECT count(*) FROM kv_changelog'), '>', $transactions, 'there was something to record');
is($node->safe_psql('postgres', q{
	SELECT r.key, r.value, r.previous, c.before
	FROM replaced r LEFT JOIN (SELECT stream, data, type, lag(data) OVER (PARTITION BY stream ORDER BY version) AS before FROM kv_changelog) c
		ON c.stream = r.key AND c.data = r.value AND c.type = 'put'
	WHERE c.stream IS NULL OR c.before IS DISTINCT FROM r.previous LIMIT 5}), '', 'put returned exactly what it replaced');
is($node->safe_psql('postgres', q{
	SELECT r.key, r.value FROM removed r LEFT JOIN (SELECT stream, type, lag(data) OVER (PARTITION BY stream ORDER BY version) AS before FROM kv_changelog) c
		ON c.stream = r.key AND c.before = r.value AND c.type = 'delete'
	WHERE r.value IS NOT NULL AND c.stream IS NULL LIMIT 5}), '', 'delete returned exactly what it removed');

# ---- a dump and restore --------------------------------------------------------------

$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-f', "$dir/dump.sql" ], 'dumped');
$node->safe_psql('postgres', 'CREATE DATABASE copied TEMPLATE template0');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('copied'), '-f', "$dir/dump.sql" ], 'restored without an error');
foreach my $sql ('SELECT * FROM eventstore.store_catalog ORDER BY store::text', 'SELECT * FROM kv ORDER BY key', 'SELECT count(*), max(position) FROM kv_changelog')
{
	is($node->safe_psql('copied', $sql), $node->safe_psql('postgres', $sql), "restored: $sql");
}
replays($_, 'restored', 'copied') foreach qw(kv fast words bytes);
is($node->safe_psql('copied', q{
	SELECT (SELECT max(version) FROM kv_changelog WHERE stream = 'restored') IS NULL, eventstore.put('kv', 'restored', '1') IS NULL;
	UPDATE kv SET value = value();
	SELECT eventstore.clear('kv') = (SELECT count(*) FROM kv)}),
	"t|t\nt", 'a restored store goes on');
replays('kv', 'restored and written', 'copied');
is(sqlstate_of($node, q{INSERT INTO kv_changelog (type) VALUES ('put')}, dbname => 'copied'), 'LG003', 'a restored changelog is nobody else\'s to write');
is(sqlstate_of($node, 'TRUNCATE kv', dbname => 'copied'), 'LG003', 'and TRUNCATE is refused');

# ---- crashes ---------------------------------------------------------------------------

my ($in, $out) = ('', '');
my $bench = IPC::Run::start([ @storm, '-T', '60', '-h', $node->host, '-p', $node->port, 'postgres' ], \$in, '>&', \$out);
my $before = $node->safe_psql('postgres', 'SELECT count(*) FROM kv_changelog');
await_true($node, "SELECT count(*) > $before + 300 FROM kv_changelog");
$node->stop('immediate');
$bench->finish;
$node->start;
replays($_, 'after a crash') foreach qw(kv words bytes);

is(sqlstate_of($node, $_), '55000', "an unlogged store says that it was emptied: $_")
  foreach q{SELECT eventstore.get('fast', 'a1')}, q{SELECT eventstore.keys('fast')}, q{SELECT eventstore.put('fast', 'a1', '1')},
	q{SELECT eventstore.delete('fast', 'a1')}, q{SELECT eventstore.clear('fast')}, q{INSERT INTO fast (key, value) VALUES ('a1', '1')};
is($node->safe_psql('postgres', 'SELECT count(*) FROM fast'), 0, 'and so it was');
$node->safe_psql('postgres', q{BEGIN; SELECT eventstore.rebuild('fast'); ROLLBACK});
is(sqlstate_of($node, $_), '55000', "so it is where a rebuild was rolled back: $_")
  foreach q{SELECT eventstore.get('fast', 'a1')}, q{SELECT eventstore.put('fast', 'a1', '1')};
cmp_ok($node->safe_psql('postgres', q{SELECT eventstore.rebuild('fast')}), '>', 0, 'it is made again');
replays('fast', 'rebuilt');
is(sqlstate_of($node, q{SELECT eventstore.put('fast', 'a1', '"after"')}), '00000', 'and written again');
replays('fast', 'rebuilt and written');

# Empty because its keys were deleted, which is no loss.
$node->safe_psql('postgres', q{SELECT eventstore.clear('fast')});
my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;
my $size;
# A snapshot from before (an autovacuum's) may keep the rows for a while.
do
{
	$node->safe_psql('postgres', 'VACUUM fast');
	$size = $node->safe_psql('postgres', q{SELECT pg_relation_size('fast')});
} until ($size == 0 || time > $deadline);
is($size . $node->safe_psql('postgres', q{SELECT eventstore.get('fast', 'a1') IS NULL}), '0t', 'one that was cleared is not taken for lost');
$node->stop('immediate');
$node->start;
is($node->safe_psql('postgres', q{SELECT eventstore.put('fast', 'a1', '1') IS NULL}), 't', 'nor after a crash');
replays('fast', 'cleared and written');

no_crash($node);
$node->stop;
done_testing();
