# Everything together, for as long as one likes: appenders, readers, consumers
# of a subscription, a store, a captured table, retention, a source and sinks,
# while processes, the server and the broker are killed at random.  In the end
# each is compared with what it was told, and with its neighbours.
#
#   EVENTSTORE_SOAK_SECONDS   how long (20; 600 where EVENTSTORE_SLOW is set)
#   EVENTSTORE_SOAK_SEED      the seed of another run
#
# In the first three fifths things are killed.  In the rest nothing is: then the
# memory of the server's long-lived processes and the size of what is only
# updated must not grow.  A short run is over before that could be told, so only
# one of five minutes or more is held to it; what was seen is in the notes.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use EventstoreTest::Load;
use POSIX ();
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $seconds = $ENV{EVENTSTORE_SOAK_SECONDS} // ($ENV{EVENTSTORE_SLOW} ? 600 : 20);
my $seed    = srand($ENV{EVENTSTORE_SOAK_SEED} // time ^ $$);

# A run that is long enough to see growth, and what may come of caches that fill.
my $judged_from_seconds = 300;
my $allowed_growth      = 1.3;
my $allowed_kb          = 8192;

diag("EVENTSTORE_SOAK_SEED=$seed, $seconds s");

my $kafka = kafka_broker();
my $node = new_server('soak', settings => [
	'restart_after_crash = on',
	'max_worker_processes = 24',
	'autovacuum_naptime = 2s',
	'eventstore.maintenance_interval = 200ms',
	'eventstore.tick_delay = 20ms' ]);
my $address = $kafka->address;

sub sql { return $node->safe_psql('postgres', $_[0]); }

# ---- what there is ------------------------------------------------------------------

$kafka->create_topic('in', 4);
$kafka->create_topic($_, 2) foreach qw(once least);
sql(qq{
	CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka
		OPTIONS ("bootstrap.servers" '$address', "reconnect.backoff.max.ms" '500');
	SELECT eventstore.create_collection('a', segment_size => 5000);
	SELECT eventstore.create_collection('b', segment_size => 3000);
	SELECT eventstore.create_collection('short', segment_size => 1000, retain_events => 5000);
	SELECT eventstore.create_collection('arrived', segment_size => 20000);
	SELECT eventstore.create_store('kv');
	SELECT eventstore.create_store('state');
	SELECT eventstore.subscribe('direct', 'a', lanes => 2), eventstore.subscribe('leased', 'a', lanes => 2);
	SELECT eventstore.create_source('state', 'k', 'in', 'state', flush_count => 300, flush_interval => '20 ms');
	SELECT eventstore.create_source('arrived', 'k', 'in', 'arrived', flush_count => 700, flush_interval => '50 ms');
	SELECT eventstore.create_sink('once', 'k', 'once', 'a', exactly_once => true, flush_interval => '50 ms');
	SELECT eventstore.create_sink('least', 'k', 'least', 'a', flush_interval => '50 ms');
});
sql(q{
	CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
	SELECT eventstore.capture('account');
	INSERT INTO account SELECT i, 0 FROM generate_series(1, 50) i;
	CREATE TABLE done (subscription text, position bigint, PRIMARY KEY (subscription, position));

	CREATE PROCEDURE fill_short() LANGUAGE sql AS $$
		SELECT count(*) FROM eventstore.append_batch('short', (SELECT jsonb_agg(jsonb_build_object('type', 'e', 'stream', 's' || i % 5)) FROM generate_series(1, 20) i));
	$$;

	CREATE PROCEDURE change_store() LANGUAGE plpgsql AS $$
	DECLARE k text := 'k' || (random() * 300)::int;
	BEGIN
		CASE (random() * 5)::int
			WHEN 0 THEN PERFORM eventstore.delete('kv', k);
			WHEN 1 THEN INSERT INTO kv (key, value) VALUES (k, '0') ON CONFLICT (key) DO UPDATE SET value = to_jsonb((random() * 100)::int);
			WHEN 2 THEN UPDATE kv SET value = to_jsonb((random() * 100)::int) WHERE key = k;
			ELSE PERFORM eventstore.put('kv', k, to_jsonb((random() * 1000)::int));
		END CASE;
		IF random() < 0.1 THEN ROLLBACK; END IF;
	END $$;

	-- Money only moves: the sum stays.
	CREATE PROCEDURE move_money() LANGUAGE plpgsql AS $$
	DECLARE
		one int := 1 + random() * 24;
		other int := 26 + random() * 24;
		amount int := random() * 100;
	BEGIN
		UPDATE account SET balance = balance + CASE id WHEN one THEN -amount ELSE amount END WHERE id IN (one, other);
		IF random() < 0.1 THEN ROLLBACK; END IF;
	END $$;

	CREATE PROCEDURE consume() LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO done SELECT 'direct', position FROM eventstore.poll('direct', 1 + (random() * 200)::int);
		IF random() < 0.1 THEN ROLLBACK; END IF;
	END $$;

	CREATE PROCEDURE consume_leased() LANGUAGE plpgsql AS $$
	DECLARE
		events eventstore.event[];
		up_to bigint;
	BEGIN
		events := array(SELECT e FROM eventstore.poll('leased', 1 + (random() * 200)::int, member => pg_backend_pid()::text, lease => '1 s') e);
		COMMIT;
		IF cardinality(events) = 0 OR random() < 0.1 THEN
			RETURN;
		END IF;
		up_to := events[cardinality(events)].position;
		BEGIN
			PERFORM eventstore.ack('leased', up_to, member => pg_backend_pid()::text);
			INSERT INTO done SELECT 'leased', e.position FROM unnest(events) e;
		EXCEPTION WHEN object_not_in_prerequisite_state THEN
			NULL;		-- too late: they are another's
		END;
	END $$;
});

# ---- who uses it --------------------------------------------------------------------

my $load = EventstoreTest::Load->new($node, collections => [ 'a', 'b' ], seed => $seed, pause => 0.02, inserts => 0);

# Calls a procedure until told to stop.
sub start_caller
{
	my ($procedure) = @_;

	return $load->start_worker($load->{writers}, sub {
		$load->connect;
		while (!-e $load->flag_file('stop_writing'))
		{
			$load->attempt("CALL $procedure()");
			usleep(5_000);
		}
	});
}

# Goes on where the last one of its line was.
sub start_reader
{
	my ($line) = @_;
	my @cursors = map { $load->positions_of('cursor', $line->{collection}, $_) } @{ $line->{numbers} // [] };
	my $pid = $load->start_reader($line->{kind}, $line->{collection}, after => $cursors[-1] // 0);

	push @{ $line->{numbers} }, $load->{workers};
	return $pid;
}

my @lines = (
	{ kind => 'committed', collection => 'a' },
	{ kind => 'tagged',    collection => 'b' });
my @clients = (
	(map { { name => 'writer', start => sub { $load->start_writer } } } 1 .. 2),
	(map { my $line = $_; { name => "reader $line->{kind}", start => sub { start_reader($line) } } } @lines),
	(map { my $p = $_; { name => $p, start => sub { start_caller($p) } } } qw(fill_short change_store change_store move_money consume consume_leased)));

# Whoever lost the server begins anew once it answers.
sub keep_clients_alive
{
	foreach my $client (@clients)
	{
		next if $client->{pid} && waitpid($client->{pid}, POSIX::WNOHANG()) == 0;
		$client->{pid} = $client->{start}->();
	}
	return;
}

my $produced = 0;

sub produce
{
	my $count = 200 + int rand 1000;

	$kafka->produce_many('in', $count, first => $produced, keys => 300, tombstones => 7);
	$produced += $count;
	return;
}

# ---- what is killed, and what is looked at --------------------------------------------

sub kill_one
{
	my ($where) = @_;
	my ($pid) = positions($node, "SELECT pid FROM pg_stat_activity WHERE $where ORDER BY random() LIMIT 1");

	crash_by($node, $pid) if $pid;
	return;
}

my %acts = (
	'a backend'               => sub { kill_one("application_name LIKE 'load %'") },
	'one of our processes'    => sub { kill_one("backend_type LIKE 'eventstore %'") },
	'a worker, politely'      => sub { $node->psql('postgres', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'eventstore %' ORDER BY random() LIMIT 1") },
	'the server, immediately' => sub { $node->stop('immediate'); $node->start },
	'the server, fast'        => sub { $node->restart },
	'the broker'              => sub { $kafka->kill; $kafka->start });
my %done;

# Kilobytes of the processes that live long, and of what is only updated.
sub look
{
	my %kb;

	foreach my $row (positions($node, "SELECT pid || ' ' || backend_type || coalesce(' ' || datname, '') || ' ' || application_name FROM pg_stat_activity WHERE backend_type LIKE 'eventstore %'"))
	{
		my ($pid, $name) = split / /, $row, 2;
		my $status = eval { PostgreSQL::Test::Utils::slurp_file("/proc/$pid/status") } // '';

		$kb{"memory of $name ($pid)"} = $1 if $status =~ /^RssAnon:\s+(\d+)/m;
	}
	$kb{"size of $_->[0]"} = $_->[1] foreach map { [ split /\|/ ] }
	  positions($node, "SELECT r, pg_total_relation_size(r) / 1024 FROM unnest(ARRAY['kv', 'state', 'account', 'eventstore.subscription_lane', 'eventstore.source_partition', 'eventstore.sink_position']::text[]) n, LATERAL (SELECT to_regclass(n) r) c WHERE r IS NOT NULL");
	return \%kb;
}

my $began = time;

while (time < $began + 0.6 * $seconds)
{
	my $act = (sort keys %acts)[ rand keys %acts ];

	await_up($node);
	keep_clients_alive();
	produce();
	usleep(500_000 + rand 1_000_000);
	$acts{$act}->();
	$done{$act}++;
}
note('killed: ' . join ', ', map { "$_ $done{$_} times" } sort keys %done);

# Caches fill at first: growth is what comes after half of the calm.
my ($middle, $last);

while (time < $began + $seconds)
{
	await_up($node);
	keep_clients_alive();
	produce();
	$last = look();
	$middle = $last if time < $began + 0.8 * $seconds;
	usleep(200_000);
}

# ---- the end --------------------------------------------------------------------------

keep_clients_alive();
$load->stop_writers;
$load->finish_readers;
note("$_: $middle->{$_} kB, then " . ($last->{$_} // 'gone')) foreach sort keys %$middle;
if ($seconds >= $judged_from_seconds)
{
	my @grown = grep { defined $last->{$_} && $last->{$_} > $middle->{$_} * $allowed_growth + $allowed_kb } sort keys %$middle;
	is(join(', ', @grown), '', 'what lives long has not grown');
}

# The server may go away under a client in the middle of a connect.
is(join("\n", grep { !/^died .*(connection to server|the database system|no answer to|closed the connection)/s } $load->lines('error')),
	'', 'no client met an error that it should not');

foreach my $collection ('a', 'b')
{
	my %present = map { $_ => 1 } positions($node, "SELECT position FROM $collection");
	my @kept = $load->positions_of('kept', $collection);

	cmp_ok(scalar @kept, '>', 0, "$collection has been written to");
	is(scalar(grep { !$present{$_} } @kept), 0, "$collection: all acknowledged events are there");
	is(scalar(grep { $present{$_} } $load->positions_of('gone', $collection)), 0, "$collection: nothing that was rolled back");
}
foreach my $line (@lines)
{
	my ($kind, $collection) = @$line{qw(kind collection)};
	my $where = $kind eq 'tagged' ? "WHERE tags @> '{color:red}'" : '';
	my %read;

	$read{$_}++ foreach map { $load->positions_of('read', $collection, $_) } @{ $line->{numbers} };
	is(scalar(grep { !$read{$_} } positions($node, "SELECT position FROM $collection $where")), 0, "reader $kind of $collection skipped none");
	is(scalar(grep { $_ > 1 } values %read), 0, "reader $kind of $collection had none twice");
}

sql(q{UPDATE eventstore.subscription_lane SET lease_until = clock_timestamp() WHERE member IS NOT NULL});
sql(q{DO $$ BEGIN WHILE EXISTS (SELECT FROM eventstore.subscriptions WHERE lag_events > 0) LOOP CALL consume(); CALL consume_leased(); END LOOP; END $$});
is(sql("SELECT count(*) FROM a LEFT JOIN done d ON d.position = a.position AND d.subscription = '$_' WHERE d.position IS NULL"), '0', "subscription $_: each event was done with once") foreach ('direct', 'leased');

is(sql('SELECT sum(balance) FROM account'), '0', 'the captured table is whole');
is(sql(q{SELECT count(*) FROM account FULL JOIN (
		SELECT DISTINCT ON (stream) (data->'new'->>'id')::int AS id, (data->'new'->>'balance')::int AS balance
		FROM eventstore.read('account_changelog', max_count => 100000000) ORDER BY stream, version DESC) e USING (id)
	WHERE account.balance IS DISTINCT FROM e.balance}), '0', 'and its events end with what it has');
is(sql("SELECT count(*) FROM eventstore.verify('$_')"), '0', "store $_: table and changelog agree") foreach ('kv', 'state');

foreach my $name ('state', 'arrived')
{
	await_true($node, "SELECT eventstore.wait_for_source('$name', '5 s')");
}
is(sql("SELECT count(*), count(DISTINCT (metadata->>'partition', metadata->>'offset')) FROM eventstore.read('arrived', max_count => 100000000)"), "$produced|$produced", 'the source: each record once');
{
	my %last;

	$last{ $_->{key} } = $_->{value} foreach $kafka->consume('in');
	delete @last{ grep { !defined $last{$_} } keys %last };
	is(sql('SELECT count(*) FROM state'), scalar(keys %last), 'the store of a source has a value of each key that has one');
	my %have = map { split /\t/, $_, 2 } positions($node, q{SELECT key || E'\t' || (value->>'i') FROM state});
	is(scalar(grep { ($last{$_} =~ /"i": (\d+)/)[0] != ($have{$_} // -1) } keys %last), 0, 'the last one');
}

await_true($node, 'SELECT bool_and(lag_events = 0) FROM eventstore.sinks');
my @positions = positions($node, q{SELECT position FROM eventstore.read('a', max_count => 100000000)});
my %published;

foreach my $topic ('once', 'least')
{
	foreach my $record ($kafka->consume($topic))
	{
		my %headers = @{ $record->{headers} };
		$published{$topic}{ $headers{'es-position'} }++;
	}
}
is(scalar(grep { ($published{once}{$_} // 0) != 1 } @positions), 0, 'sink, exactly once: who reads committed records has each event once');
is(scalar(grep { !$published{least}{$_} } @positions), 0, 'sink, at least once: none is missing');

is_clean($node, $_) foreach qw(a b short arrived kv_changelog state_changelog account_changelog);
is(sql('SELECT count(*) FROM eventstore.dead_letters') . sql('SELECT count(*) FROM eventstore.gaps'), '00', 'no dead letters, no gaps');
cmp_ok(sql('SELECT count(*) FROM short'), '<', 8000, 'retention has kept up');

$node->stop;
no_crash($node);
done_testing();
