# Captured tables: after a storm of every kind of statement, after a crash, and
# after a dump and restore the changelog, replayed, gives the table, and each
# event begins with the row that the one before it left.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;

my $transactions = $ENV{STORM_TRANSACTIONS} // 150;
my $node = new_server('capture', settings => [ 'restart_after_crash = on', 'eventstore.tick_delay = 20ms' ]);
my $dir = PostgreSQL::Test::Utils::tempdir();
my @tables = qw(account entry "Part");

$node->safe_psql('postgres', q{
	CREATE TABLE account (id int PRIMARY KEY, amount numeric, twice numeric GENERATED ALWAYS AS (amount * 2) STORED, note text);
	CREATE TABLE entry (account int REFERENCES account ON DELETE CASCADE ON UPDATE CASCADE, n int, at timestamptz DEFAULT clock_timestamp(), PRIMARY KEY (account, n));
	CREATE TABLE "Part" (region text, id int, big text, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
	CREATE TABLE part_a PARTITION OF "Part" FOR VALUES IN ('a');
	CREATE TABLE part_b (id int NOT NULL, big text, gone int, region text NOT NULL);
	ALTER TABLE part_b DROP COLUMN gone;
	ALTER TABLE "Part" ATTACH PARTITION part_b FOR VALUES IN ('b');
	SELECT eventstore.capture('account'), eventstore.capture('"Part"');
	SELECT eventstore.set_option('account_changelog', 'segment_size', '500');
	SELECT eventstore.create_collection('entry_changelog');
	SELECT eventstore.capture('entry', 'entry_changelog');
	-- A trigger of the user's that writes captured tables again
	CREATE FUNCTION echo() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF pg_trigger_depth() = 1 AND NEW.id % 3 = 0 THEN
			UPDATE account SET amount = amount + 1 WHERE id IN (NEW.id, NEW.id + 1);
			INSERT INTO entry VALUES (NEW.id, floor(random() * 5)) ON CONFLICT (account, n) DO UPDATE SET at = clock_timestamp();
		END IF;
		RETURN NULL;
	END $$;
	CREATE TRIGGER echo AFTER INSERT OR UPDATE ON account FOR EACH ROW EXECUTE FUNCTION echo();
	CREATE FUNCTION some_id() RETURNS int LANGUAGE sql AS $$ SELECT floor(random() * 20)::int $$;
	CREATE FUNCTION try(statement text) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN EXECUTE statement; EXCEPTION WHEN unique_violation OR foreign_key_violation THEN NULL; END $$;
});

my %scripts = (
	upsert => q{INSERT INTO account SELECT DISTINCT some_id(), 1 FROM generate_series(1, 5) ON CONFLICT (id) DO UPDATE SET amount = account.amount + excluded.amount;},
	update => q{UPDATE account SET note = repeat(md5(random()::text), (random() * 100)::int) WHERE id = (SELECT some_id());},
	many => q{UPDATE account SET amount = amount + 1 WHERE id IN (SELECT id FROM account ORDER BY id LIMIT 5);},
	remove => q{DELETE FROM account WHERE id = (SELECT some_id());},
	rename => q{SELECT try(format('UPDATE account SET id = %s WHERE id = %s', some_id(), some_id()));},
	entries => q{SELECT try('INSERT INTO entry SELECT id, 9 FROM account WHERE id > 10');},
	merge => q{SELECT try('MERGE INTO "Part" p USING (SELECT some_id() AS id, (ARRAY[''a'', ''b''])[1 + some_id() % 2] AS region) s ON p.id = s.id AND p.region = s.region WHEN MATCHED AND random() < 0.3 THEN DELETE WHEN MATCHED THEN UPDATE SET big = repeat(md5(random()::text), 200) WHEN NOT MATCHED THEN INSERT VALUES (s.region, s.id)');},
	across => q{SELECT try('UPDATE "Part" SET region = CASE region WHEN ''a'' THEN ''b'' ELSE ''a'' END WHERE id = ' || some_id());},
	leaf => q{SELECT try('INSERT INTO part_b (region, id) SELECT ''b'', some_id()');},
	truncate => q{SELECT some_id() > 17 AS now
\gset
\if :now
TRUNCATE "Part";
\endif},
	savepoint => q{BEGIN;
UPDATE account SET amount = 0 WHERE id = 1;
SAVEPOINT s;
DELETE FROM account WHERE id < 3;
ROLLBACK TO s;
INSERT INTO account VALUES (2, 2) ON CONFLICT (id) DO UPDATE SET amount = 2;
END;});
foreach my $name (keys %scripts)
{
	PostgreSQL::Test::Utils::append_to_file("$dir/$name.sql", "$scripts{$name}\n");
}
# Deadlocks are part of it: another try.
my @storm = ('pgbench', '-n', '-c', '8', '-j', '2', '--max-tries=100', map { ('-f', "$dir/$_.sql") } sort keys %scripts);

sub replays
{
	my ($table, $name, $dbname) = @_;
	my $changelog = $table eq '"Part"' ? '"Part_changelog"' : "${table}_changelog";

	is($node->safe_psql($dbname // 'postgres', qq{
		SET timezone = 'UTC';
		WITH truncated AS (SELECT coalesce(max(position), 0) AS at FROM $changelog WHERE type = 'truncate'),
			replayed AS (SELECT DISTINCT ON (stream) data->'new' AS row FROM $changelog, truncated WHERE stream IS NOT NULL AND position > at ORDER BY stream, position DESC),
			expected AS (SELECT row FROM replayed WHERE row <> 'null'), actual AS (SELECT to_jsonb(t) AS row FROM $table t)
		(SELECT '-', row FROM (TABLE expected EXCEPT ALL TABLE actual) e) UNION ALL (SELECT '+', row FROM (TABLE actual EXCEPT ALL TABLE expected) a) LIMIT 5}),
		'', "$name: the changelog of $table, replayed, is the table");
	is($node->safe_psql($dbname // 'postgres', qq{
		SELECT stream, version, type FROM (
			SELECT *, row_number() OVER w AS n, lag(data->'new') OVER w AS before, lag(position) OVER w AS position_before FROM $changelog WHERE stream IS NOT NULL WINDOW w AS (PARTITION BY stream ORDER BY position)) c
		WHERE version <> n OR data->'old' IS DISTINCT FROM coalesce(before, 'null') AND NOT EXISTS (SELECT FROM $changelog t WHERE t.type = 'truncate' AND t.position BETWEEN position_before AND c.position)
		LIMIT 5}), '', "$name: each event of $table begins where the one before it ended");
	is_clean($node, $changelog, "$name: verify finds nothing in the changelog of $table", $dbname);
	return;
}

# ---- a storm ------------------------------------------------------------------------

$node->command_ok([ @storm, '-t', $transactions, '-h', $node->host, '-p', $node->port, 'postgres' ], 'a storm of every kind of statement');
replays($_, 'after the storm') foreach @tables;
cmp_ok($node->safe_psql('postgres', "SELECT count(*) FROM $_"), '>', $transactions, "there was something to record: $_") foreach qw(account_changelog entry_changelog "Part_changelog");

# ---- a dump and restore --------------------------------------------------------------

$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-f', "$dir/dump.sql" ], 'dumped');
$node->safe_psql('postgres', 'CREATE DATABASE copied TEMPLATE template0');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('copied'), '-f', "$dir/dump.sql" ], 'restored without an error');
foreach my $sql ('SELECT * FROM eventstore.capture_catalog ORDER BY source::text', 'SELECT * FROM account ORDER BY id', 'SELECT count(*), max(position) FROM account_changelog', 'SELECT count(*) FROM "Part_changelog"')
{
	is($node->safe_psql('copied', $sql), $node->safe_psql('postgres', $sql), "restored: $sql");
}
replays($_, 'restored', 'copied') foreach @tables;
$node->safe_psql('copied', q{
	INSERT INTO account VALUES (1000, 1);
	UPDATE account SET amount = amount + 1;
	INSERT INTO part_b (region, id) VALUES ('b', 1000);
	UPDATE "Part" SET region = 'a' WHERE id = 1000;
	DELETE FROM account WHERE id < 5;});
replays($_, 'restored and written', 'copied') foreach @tables;
is(sqlstate_of($node, q{INSERT INTO account_changelog (type) VALUES ('insert')}, dbname => 'copied'), 'LG003', 'a restored changelog is nobody else\'s to write');
is(sqlstate_of($node, 'DROP TABLE account_changelog', dbname => 'copied'), '2BP01', 'nor to drop');
$node->safe_psql('copied', q{SELECT eventstore.release('"Part"')});
is(sqlstate_of($node, q{INSERT INTO "Part_changelog" (type) VALUES ('by hand')}, dbname => 'copied'), '00000', 'until it is released');

$node->safe_psql('copied', q{SET client_min_messages = error; DROP EXTENSION eventstore CASCADE; UPDATE account SET note = 'free';});
is($node->safe_psql('copied', q{SELECT count(*) FROM account WHERE note = 'free'}), $node->safe_psql('copied', 'SELECT count(*) FROM account'), 'without the extension a table is as it was');

# ---- a crash -----------------------------------------------------------------------------

my ($in, $out) = ('', '');
my $bench = IPC::Run::start([ @storm, '-T', '60', '-h', $node->host, '-p', $node->port, 'postgres' ], \$in, '>&', \$out);
my $before = $node->safe_psql('postgres', 'SELECT count(*) FROM account_changelog');
await_true($node, "SELECT count(*) > $before + 300 FROM account_changelog");
$node->stop('immediate');
$bench->finish;
$node->start;
replays($_, 'after a crash') foreach @tables;
$node->safe_psql('postgres', 'UPDATE account SET amount = 1');
replays('account', 'after a crash, and written');

no_crash($node);
$node->stop;
done_testing();
