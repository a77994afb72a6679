# Batches of changes of a store: a crash in the middle of one leaves nothing half
# done, and a large store, loaded in batches, has every key.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $keys = $ENV{STORE_KEYS} // 4_000_000;
my $node = new_server('stores_batch',
	settings => [ 'restart_after_crash = on', 'shared_buffers = 512MB', 'max_wal_size = 8GB', 'autovacuum = off' ]);

$node->safe_psql('postgres', q{
	SELECT eventstore.create_store('kv', format => 'text');
	SELECT eventstore.create_store('bare', format => 'text', changelog => false);
	CREATE PROCEDURE load(store regclass, first int, last int, size int, value text, alone boolean = false) LANGUAGE plpgsql AS $$
	BEGIN
		FOR f IN first .. last BY size LOOP
			IF alone THEN
				EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', store);
			END IF;
			PERFORM eventstore.store_apply(store, array_agg('key-' || i), array_agg(value || i)) FROM generate_series(f, least(f + size - 1, last)) i;
			COMMIT;
		END LOOP;
	END $$;
});

# ---- a crash in the middle ------------------------------------------------------------

$node->safe_psql('postgres', q{CALL load('kv', 1, 20000, 10000, 'old'); CALL load('bare', 1, 20000, 10000, 'old'); CHECKPOINT;});

# Half of it new keys, so that the table grows, and half another value.
my $batch = q{SELECT eventstore.store_apply('%s', array_agg('key-' || i), array_agg('new' || i)) FROM generate_series(10001, 160000) i};

foreach my $case ([ 'kv', '' ], [ 'bare', '' ], [ 'kv', 'alone' ], [ 'bare', 'alone' ])
{
	my ($store, $alone) = @$case;

	foreach my $end ('kill', 'immediate', 'late')
	{
		my $watched = $end eq 'late' && $store eq 'kv' ? 'kv_changelog_1' : $store;
		my $session = session($node);
		my $before;

		# What crashed batches left is room that the next one would take first.
		$node->safe_psql('postgres', "VACUUM $watched");
		$before = $node->safe_psql('postgres', "SELECT pg_relation_size('$watched')");

		# Left open: a batch that comes to its end before we have seen it grow is not committed either.
		$session->send('BEGIN; ' . ($alone ? "LOCK TABLE $store IN SHARE ROW EXCLUSIVE MODE; " : '') . sprintf($batch, $store));
		await_true($node, "SELECT pg_relation_size('$watched') > $before + 200000 AND count(*) = " . ($alone ? 1 : 0)
			  . " FROM pg_locks WHERE relation = '$store'::regclass AND mode = 'ShareRowExclusiveLock'");
		if ($end eq 'immediate')
		{
			$node->stop('immediate');
			$node->start;
		}
		else
		{
			crash_by($node, $session->backend_pid);
		}
		# The batch may have been answered before.
		$session->receive;
		is($session->try('SELECT'), 'LOST', "$store $alone, $end: the session is gone");
		is($node->safe_psql('postgres', "SELECT count(*), count(*) FILTER (WHERE value = 'old' || substr(key, 5) AND version = 1) FROM $store"),
			'20000|20000', "$store $alone, $end: nothing of the batch is there");
		is($node->safe_psql('postgres', 'SELECT count(*) FROM kv_changelog'), 20000, "$store $alone, $end: nor of its events");
	}
}
is($node->safe_psql('postgres', sprintf($batch, 'kv')), '(140000,10000,0,0)', 'the same batch afterwards');
is_clean($node, 'kv_changelog', 'all is as it should be');

# ---- a large store ------------------------------------------------------------------------

# Each key with its value; and where nobody else may write meanwhile.
foreach my $alone ('false', 'true')
{
	my $begun = time;

	$node->safe_psql('postgres', "SELECT eventstore.create_store('big', format => 'text'); CALL load('big', 1, $keys, 10000, 'value ', $alone)");
	note(sprintf('%d keys loaded in %d s', $keys, time - $begun));
	is($node->safe_psql('postgres', "SELECT count(*) FROM generate_series(1, $keys) i WHERE eventstore.get_text('big', 'key-' || i) = 'value ' || i"), $keys, "alone $alone: get finds each key");
	is($node->safe_psql('postgres', 'SELECT count(*), count(*) FILTER (WHERE version = 1) FROM big'), "$keys|$keys", 'and there are no others');
	is($node->safe_psql('postgres', "SELECT count(*) FROM big s JOIN big_changelog e ON e.stream = s.key AND e.body = convert_to(s.value, 'UTF8') AND e.created_at = s.updated_at AND e.version = s.version"), $keys, 'each with its event');
	note(sprintf('loaded and checked in %d s', time - $begun));
	$node->safe_psql('postgres', q{SELECT eventstore.drop_store('big')});
}

$node->stop;
done_testing();
