# Subscriptions beside everything else: many consumers at once, retention,
# crashes, dumps, a standby.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('subscriptions',
	streaming => 1,
	settings  => [ 'eventstore.maintenance_interval = 100ms', 'eventstore.tick_delay = 20ms', 'restart_after_crash = on' ]);
my $dir = PostgreSQL::Test::Utils::tempdir();

sub sql { return $node->safe_psql('postgres', $_[0]) }

sub polled
{
	my ($name, $max_count, $more, $dbname) = @_;
	my $args = "'$name', $max_count" . ($more // '');

	return $node->safe_psql($dbname // 'postgres', "SELECT string_agg(position::text, ' ') FROM eventstore.poll($args)");
}

# ---- many consumers, some of which give up, die or are late -----------------------------
# Each notes what it is done with in the transaction of its poll or its ack, so
# what is done with twice is an error of a unique index, and what is skipped is
# missing in the end.

sql(q{
	SELECT eventstore.create_collection('busy', segment_size => 500);
	SELECT eventstore.subscribe('plain', 'busy', lanes => 4), eventstore.subscribe('leased', 'busy', lanes => 4), eventstore.subscribe('single', 'busy');
	CREATE TABLE done (n bigint GENERATED ALWAYS AS IDENTITY, subscription text, position bigint, stream text, version bigint, PRIMARY KEY (subscription, position));

	CREATE PROCEDURE append_some() LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM FROM generate_series(1, 1 + (random() * 4)::int), LATERAL eventstore.append('busy', 'e', stream => 's' || (random() * 9)::int);
		IF random() < 0.1 THEN ROLLBACK; END IF;
	END $$;

	CREATE PROCEDURE consume(sub text) LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO done (subscription, position, stream, version)
		SELECT sub, position, stream, version FROM eventstore.poll(sub, 1 + (random() * 20)::int);
		IF random() < 0.2 THEN ROLLBACK; END IF;
	END $$;

	CREATE PROCEDURE consume_leased(sub text, who text) LANGUAGE plpgsql AS $$
	DECLARE
		events eventstore.event[];
		up_to bigint;
		fate float := random();
	BEGIN
		events := array(SELECT e FROM eventstore.poll(sub, 1 + (random() * 20)::int, member => who,
			lease => CASE WHEN random() < 0.3 THEN interval '1 ms' ELSE interval '10 s' END) e);
		COMMIT;
		IF cardinality(events) = 0 OR fate < 0.1 THEN
			RETURN;		-- dies: the lease runs out, or the next call gets the same
		END IF;
		up_to := events[1 + (random() * (cardinality(events) - 1))::int].position;
		IF fate < 0.5 THEN
			up_to := events[cardinality(events)].position;
		END IF;
		BEGIN
			IF fate > 0.95 THEN
				PERFORM eventstore.leave(sub, who);
				RETURN;
			ELSIF fate > 0.9 THEN
				PERFORM eventstore.nack(sub, up_to, who, '1 ms');
				up_to := up_to - 1;
			ELSE
				PERFORM eventstore.ack(sub, up_to, who);
			END IF;
			INSERT INTO done (subscription, position, stream, version)
			SELECT sub, position, stream, version FROM unnest(events) WHERE position <= up_to;
		EXCEPTION WHEN object_not_in_prerequisite_state THEN
			NULL;		-- too late: they are another's
		END;
	END $$;
});
my %scripts = (
	append => 'CALL append_some();',
	plain  => "CALL consume('plain');",
	single => "CALL consume('single');",
	leased => "CALL consume_leased('leased', 'member ' || :client_id);");
foreach my $name (keys %scripts)
{
	append_to_file("$dir/$name.sql", "$scripts{$name}\n");
}
$node->command_checks_all(
	[ 'pgbench', '-n', '-c', '10', '-j', '2', '-t', '400', map { ('-f', "$dir/$_.sql") } sort keys %scripts ],
	0, [qr/4000\/4000/], [qr/^(?!.*aborted)/s], 'ten clients append and consume');

# Whoever is left over: leases that nobody will give back are ended.
sql("UPDATE eventstore.subscription_lane SET lease_until = clock_timestamp() WHERE member IS NOT NULL");
sql(q{DO $$ BEGIN
	WHILE EXISTS (SELECT FROM eventstore.subscriptions WHERE lag_events > 0) LOOP
		CALL consume('plain'); CALL consume('single'); CALL consume('leased');
	END LOOP;
END $$});
is(sql(q{SELECT name, (SELECT count(*) FROM busy) - count(*) FROM eventstore.subscriptions s JOIN done d ON d.subscription = s.name GROUP BY name ORDER BY name}),
	"leased|0\nplain|0\nsingle|0", 'each is done with every event, once');
is(sql(q{SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY subscription, stream ORDER BY n) AS expected FROM done) d WHERE version <> expected}),
	0, 'in the order of each stream');
is(sql(q{SELECT lag_events, lag_seconds FROM eventstore.subscriptions}), "0|0\n0|0\n0|0", 'and has nothing left');
is_clean($node, 'busy');

# ---- retention waits for the slowest lane ----------------------------------------------

sub fill
{
	my ($n, @collections) = @_;

	sql("SELECT count(*) FROM eventstore.append_batch('$_', (SELECT jsonb_agg(jsonb_build_object('type', 'e')) FROM generate_series(1, $n) i))") foreach @collections;
	return;
}

sub first_kept { return sql("SELECT first_position FROM eventstore.collection_catalog WHERE collection = '$_[0]'::regclass") }

# The worker has been through with retention twice since, and so once from its beginning.
my $passes = 0;

sub await_retention
{
	for (1 .. 2)
	{
		my $name = 'pass_' . ++$passes;

		sql("SELECT eventstore.create_collection('$name', segment_size => 10, retain_events => 10)");
		fill(50, $name);
		await_gone($node, "${name}_1");
	}
	return;
}

sql(q{
	SELECT eventstore.create_collection('held', segment_size => 100, retain_events => 100);
	SELECT eventstore.subscribe('slow', 'held'), eventstore.subscribe('fast', 'held', lanes => 2);
});
fill(1000, 'held');
sql("SELECT count(*) FROM eventstore.poll('fast', null)") for 1 .. 2;
await_retention();
is(first_kept('held'), 1, 'nothing goes that a subscription has not passed');
sql("SELECT count(*) FROM eventstore.poll('slow', 450)");
await_gone($node, 'held_301');
await_retention();
is(first_kept('held'), 401, 'what all have passed goes');
is(polled('slow', 1), '451', 'and the slow one goes on');

# For how long it is waited for is a setting.
$node->append_conf('postgresql.conf', "eventstore.subscription_hold = 1h");
$node->reload;
await_retention();
is(first_kept('held'), 401, 'one that polled just now is waited for');
sql("UPDATE eventstore.subscription_lane SET updated_at = now() - interval '2 hours' WHERE subscription = 'slow'");
await_gone($node, 'held_401');
is(sqlstate_of($node, "SELECT * FROM eventstore.poll('slow')"), 'LG005', 'one that nobody has polled for so long is not, and is told');
sql("SELECT eventstore.seek('slow', null)");
is(polled('slow', 1), '901', 'it goes on from what is left when it is told to');

# A poll without work is a sign of life, now and then.
sql("SELECT count(*) FROM eventstore.poll('slow', null)");
sql("UPDATE eventstore.subscription_lane SET updated_at = now() - interval '40 minutes' WHERE subscription = 'slow'");
sql("SELECT count(*) FROM eventstore.poll('slow')");
is(sql("SELECT updated_at > now() - interval '1 minute' FROM eventstore.subscription_lane WHERE subscription = 'slow'"), 't', 'an idle consumer is known to be alive');

$node->append_conf('postgresql.conf', 'eventstore.subscription_hold = 0');
$node->reload;
fill(1000, 'held');
await_gone($node, 'held_1001');
is(sqlstate_of($node, "SELECT * FROM eventstore.poll('slow')"), 'LG005', 'with 0 retention does not wait');
$node->append_conf('postgresql.conf', 'eventstore.subscription_hold = -1');
$node->reload;

# An owner who truncates does not wait either.
sql("SELECT eventstore.seek('slow', null)");
fill(90, 'held');
is(sql("SELECT eventstore.truncate_before('held', 2050)"), 2001, 'truncate_before does not wait');
is(sqlstate_of($node, "SELECT * FROM eventstore.poll('slow')"), 'LG005', 'and who is left behind is told');

# ---- the holder of a lane dies, the server dies -----------------------------------------

sql(q{
	SELECT eventstore.create_collection('log');
	SELECT eventstore.subscribe('tx', 'log'), eventstore.subscribe('job', 'log', max_attempts => 2);
});
fill(20, 'log');
my $holder = session($node);
$holder->run('BEGIN');
$holder->run("SELECT * FROM eventstore.poll('tx', 5)");
is(polled('tx', 5), '', 'the lane is held');
my $pid = $holder->backend_pid;
is(polled('job', 3, ", member => 'm', lease => '1 hour'"), '1 2 3', 'and another one leased');
sql("SELECT eventstore.lease('leader', 'm', '1 hour')");
sql("SELECT pg_terminate_backend($pid)");
await_true($node, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $pid)");
is(polled('tx', 5), '1 2 3 4 5', 'a holder that is terminated leaves its lane');

$holder = session($node);
$holder->run('BEGIN');
$holder->run("SELECT * FROM eventstore.poll('tx', 5)");
crash_by($node, $holder->backend_pid);
is($holder->try('SELECT 1'), 'LOST', 'the holder of a lane is killed');
is(polled('tx', 5), '6 7 8 9 10', 'after a crash what was committed holds, and no more');
is(polled('job', 3), '', 'a lease outlives it');
is(sql("SELECT holder FROM eventstore.leases"), 'm', 'each kind of it');
sql("SELECT eventstore.ack('job', 2, 'm')");
sql("SELECT eventstore.nack('job', 3, 'm')");
is(polled('job', 1, ", member => 'm', lease => '1 hour'"), '3', 'and its member can go on');
sql("SELECT eventstore.nack('job', 3, 'm')");
is(polled('job', 2, ", member => 'm', lease => '1 hour'"), '4 5', 'past what was given up');

# ---- a dump has all of it ----------------------------------------------------------------

sql("SELECT eventstore.subscribe('query', 'log', query => '[{\"types\": [\"e\"]}]', after => 7, lanes => 3)");
$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-f', "$dir/dump.sql" ], 'dumped');
sql('CREATE DATABASE copied TEMPLATE template0');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('copied'), '-f', "$dir/dump.sql" ], 'restored');
foreach my $what (
	'name, collection, lanes, position, members FROM eventstore.subscriptions ORDER BY name',
	'* FROM eventstore.members ORDER BY 1, 2',
	'* FROM eventstore.dead_letters ORDER BY created_at',
	'* FROM eventstore.leases ORDER BY 1')
{
	is($node->safe_psql('copied', "SELECT $what"), sql("SELECT $what"), "the same: $what");
}
is(polled('tx', 2, '', 'copied'), '11 12', 'the copy goes on where the original was');
is(polled('query', 100, '', 'copied'), polled('query', 100), 'with the same lanes');
$node->safe_psql('copied', "SELECT eventstore.ack('job', 5, 'm')");
is(polled('tx', 2), '11 12', 'and the original does, too');
$node->safe_psql('copied', "SELECT eventstore.repair_collection('log')");
is(polled('tx', 2, '', 'copied'), '13 14', 'a repair does not disturb it');

# ---- a standby shows them ------------------------------------------------------------------

$node->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;
$node->wait_for_catchup($standby, 'replay', $node->lsn('insert'));
is( $standby->safe_psql('postgres', "SELECT name, position, members, lag_seconds > 0 FROM eventstore.subscriptions WHERE name = 'tx'"),
	'tx|12|0|t', 'the view works on a standby');
is(sqlstate_of($standby, "SELECT * FROM eventstore.poll('tx')"), '25006', 'a poll does not');
$standby->promote;
is($standby->safe_psql('postgres', "SELECT string_agg(position::text, ' ') FROM eventstore.poll('tx', 3)"), '13 14 15', 'until it is promoted');

no_crash($node);
no_crash($standby);
done_testing();
