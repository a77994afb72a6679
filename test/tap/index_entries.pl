# The index entries of many events at a time are as good as nbtree's own: after
# batches of every kind by several at once, and replayed after a crash, page by
# page against images of what they should be.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $transactions = $ENV{STORM_TRANSACTIONS} // 30;
my $node = new_server('index_entries', settings => [ 'restart_after_crash = on', "wal_consistency_checking = 'all'", 'max_wal_size = 4GB' ]);
my $dir = PostgreSQL::Test::Utils::tempdir();

$node->safe_psql('postgres', q{
	CREATE EXTENSION amcheck;
	SELECT eventstore.create_collection('c', segment_size => 20000);
	SELECT eventstore.create_collection('indexed');
	-- few streams, many, none, and names too long for a leaf to take many of them
	CREATE FUNCTION stream_of(kind int, i int) RETURNS text LANGUAGE sql AS $$
		SELECT CASE kind WHEN 0 THEN 'few-' || i % 3 WHEN 1 THEN md5(random()::text) WHEN 2 THEN repeat(chr(97 + i % 5), 900 + i % 700) WHEN 3 THEN CASE WHEN i % 2 = 0 THEN 'odd' END END $$;
	CREATE FUNCTION batch(collection regclass, kind int, n int) RETURNS void LANGUAGE sql AS $$
		SELECT count(*) FROM eventstore.append_array(collection, (
			SELECT array_agg(ROW ('type-' || i % 3, to_jsonb(i), (SELECT array_agg(format('tag-%s', (random() * 10 ^ k)::int)) FROM generate_series(0, i % 5) k), stream_of(kind, i), NULL, NULL, NULL, NULL, NULL)::eventstore.new_event)
			FROM generate_series(1, n) i)) $$;
});

PostgreSQL::Test::Utils::append_to_file("$dir/batch.sql", q{\set kind random(0, 4)
\set n random(1, 3000)
SELECT batch('c', :kind, :n);
});

sub trees_are_whole
{
	my ($collection, $name) = @_;

	cmp_ok($node->safe_psql('postgres', qq{
		SELECT count(*) FROM (SELECT bt_index_check(i.indexrelid, true)
			FROM pg_inherits JOIN pg_index i ON i.indrelid = inhrelid JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = relam
			WHERE inhparent = '$collection'::regclass AND amname = 'btree') x}), '>', 1, "$name: each row of $collection has its entries in the trees, in order");
	return;
}

sub entries_are_whole
{
	my ($name) = @_;

	trees_are_whole('c', $name);
	is($node->safe_psql('postgres', q{
		SELECT tag, n FROM (SELECT tag, count(*) AS n FROM c, unnest(tags) tag GROUP BY tag) t
		WHERE random() < 0.05 AND n <> (SELECT count(*) FROM eventstore.read('c', tags => ARRAY[tag])) LIMIT 3}), '', "$name: and of its tags");
	is($node->safe_psql('postgres', q{
		SELECT type FROM (SELECT type, count(*) AS n FROM c GROUP BY type) t WHERE n <> (SELECT count(*) FROM eventstore.read('c', types => ARRAY[type]))}), '', "$name: and of its type");
	is($node->safe_psql('postgres', q{
		SELECT stream FROM (SELECT stream, count(*) AS n FROM c WHERE stream IS NOT NULL GROUP BY stream) t
		WHERE random() < 0.05 AND n <> (SELECT count(*) FROM eventstore.read_stream('c', stream)) LIMIT 3}), '', "$name: and of its stream");
	is_clean($node, 'c', "$name: verify finds nothing");
	return;
}

$node->command_ok([ 'pgbench', '-n', '-c', '4', '-j', '2', '-t', $transactions, '-f', "$dir/batch.sql", '-h', $node->host, '-p', $node->port, 'postgres' ], 'batches by four at once');
entries_are_whole('written');

# More than are written together, and larger ones
$node->safe_psql('postgres', q{
	SELECT batch('c', 0, 23000);
	SELECT count(*) FROM eventstore.append_array('c', (
		SELECT array_agg(ROW ('large', NULL, ARRAY['large-' || i], NULL, NULL, convert_to(repeat(md5(i::text), 40000), 'UTF8'), NULL, NULL, NULL)::eventstore.new_event)
		FROM generate_series(1, 30) i))});
is($node->safe_psql('postgres', q{SELECT count(*), count(DISTINCT body) FROM eventstore.read('c', types => '{large}')}), '30|30', 'large events, more than fit into memory together');
entries_are_whole('more at once');

# Vacuum, which leaves pages half dead and deleted, with holes to be filled
$node->psql('postgres', q{BEGIN; SELECT batch('c', 1, 20000); ROLLBACK;});
$node->safe_psql('postgres', q{VACUUM c; SELECT batch('c', 1, 5000);});
entries_are_whole('after a vacuum');

$node->stop('immediate');
$node->start;
entries_are_whole('replayed');

# Indexes of the user's: one that is filled in the same way, one that is not
foreach my $columns ('(created_at, type) WHERE stream IS NOT NULL', '(lower(type))')
{
	$node->safe_psql('postgres', "CREATE INDEX ON indexed $columns");
	$node->safe_psql('postgres', q{SELECT batch('indexed', 3, 700)});
	trees_are_whole('indexed', "with an index $columns");
}

# What is there already is found, also amid a batch
$node->safe_psql('postgres', q{
	SET session_replication_role = replica;
	INSERT INTO indexed (position, type) SELECT max(position) + 5, 'ahead' FROM indexed;});
is(sqlstate_of($node, q{SELECT batch('indexed', 0, 10)}), '23505', 'a position that is taken');
trees_are_whole('indexed', 'after that');

# Rows of a store that nobody else writes, and the last versions of its streams
$node->safe_psql('postgres', q{
	SELECT eventstore.create_store('kv', 'text');
	CREATE PROCEDURE fill(rounds int) LANGUAGE plpgsql AS $$
	BEGIN
		FOR round IN 1 .. rounds LOOP
			LOCK TABLE kv IN SHARE ROW EXCLUSIVE MODE;
			PERFORM eventstore.store_apply('kv', array_agg(CASE WHEN i % 10 = 0 THEN repeat(chr(97 + i % 5), 800 + i % 900) || i ELSE md5(random()::text) END), array_agg('value ' || i)) FROM generate_series(1, 3000) i;
			COMMIT;
		END LOOP;
	END $$;
	CALL fill(10);
});

sub store_is_whole
{
	my ($name) = @_;

	is($node->safe_psql('postgres', q{
		SELECT count(*) FROM (SELECT bt_index_check(i.indexrelid, true) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
			WHERE i.indrelid = 'kv'::regclass OR i.indrelid = (SELECT heads FROM eventstore.collection_catalog WHERE collection = 'kv_changelog'::regclass)) x}), 2, "$name: each row of the store and of the heads has its entry");
	is($node->safe_psql('postgres', q{
		SELECT count(*) FROM kv s WHERE (SELECT version FROM eventstore.peek('kv_changelog', s.key)) IS DISTINCT FROM s.version}), 0, "$name: and each key its stream");
	trees_are_whole('kv_changelog', $name);
	is_clean($node, 'kv_changelog', "$name: verify finds nothing");
	return;
}

store_is_whole('a store, written');
$node->psql('postgres', q{BEGIN; LOCK TABLE kv IN SHARE ROW EXCLUSIVE MODE; SELECT eventstore.store_apply('kv', array_agg('x' || i), array_agg('')) FROM generate_series(1, 20000) i; ROLLBACK;});
$node->safe_psql('postgres', 'VACUUM kv; CALL fill(2);');
$node->stop('immediate');
$node->start;
store_is_whole('a store, replayed');

# A stream that was begun past all locks
is(sqlstate_of($node, q{
	BEGIN;
	LOCK TABLE kv IN SHARE ROW EXCLUSIVE MODE;
	SELECT eventstore.store_apply('kv', '{new-1,new-2}', '{1,2}'::text[]);
	SELECT eventstore.store_apply('kv', '{new-1,new-3}', '{null,3}'::text[]);
	SELECT eventstore.store_apply('kv', '{new-1,new-4}', '{4,4}'::text[]);
	COMMIT;}), '00000', 'keys that come and go in one transaction');
store_is_whole('after that');

no_crash($node);
$node->stop;
done_testing();
