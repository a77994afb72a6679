# Listeners and waiters in a burst of 100,000 appends end at the head, having
# missed nothing and repeated nothing; also when the notifier or one of them ends
# in the middle, by a signal or in a crash.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Listener;
use EventstoreTest::Load;
use EventstoreTest::Session;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('burst', settings => [ 'eventstore.tick_delay = 20ms', 'max_connections = 100', 'restart_after_crash = on', 'fsync = off' ]);

sub value { return $node->safe_psql('postgres', $_[0]); }

# ---- listen, then read from the head that it returned ------------------------------------

value("SELECT eventstore.create_collection('a', segment_size => 2000)");
my $load = EventstoreTest::Load->new($node, collections => ['a'], seed => 5, pause => 0.002);
my @listeners;

sub start_listeners
{
	foreach (1 .. $_[0])
	{
		$load->start_listener('a');
		push @listeners, $load->{workers};
	}
	return;
}

# Some listen before there is anything, others in the middle of it.
start_listeners(2);
$load->start_writer(1500) for 1 .. 4;
foreach my $more (500, 1500, 2500)
{
	await_true($node, "SELECT eventstore.head('a') > $more");
	start_listeners(2);
}
is($load->finish, 0, 'writers and listeners came to their end');
is(join("\n", $load->lines('error')), '', 'none met an error that it should not');
foreach my $n (@listeners)
{
	my ($from) = map { /^a (\d+)$/ } $load->lines('listening', $n);

	is( join(',', $load->positions_of('read', 'a', $n)),
		join(',', positions($node, "SELECT position FROM a WHERE position > $from ORDER BY position")),
		"a listener from $from on: everything once, in order");
}

# ---- a burst ---------------------------------------------------------------------------------

my $events = 100_000;
my $notifier = "SELECT pid FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'notifier' AND database = 'postgres' AND pid IS NOT NULL";

# 80,000 events by append_batch, 20,000 alone.
my @writers = (
	(q{DO $$ BEGIN FOR i IN 1 .. 40 LOOP
		PERFORM eventstore.append_batch('b', (SELECT jsonb_agg(jsonb_build_object('type', 'batch', 'stream', 'b' || n % 10, 'tags', ARRAY['n:' || n])) FROM generate_series(1, 1000) n));
		COMMIT; END LOOP; END $$}) x 2,
	(q{DO $$ BEGIN FOR i IN 1 .. 5000 LOOP
		PERFORM eventstore.append('b', 'alone', stream => 'alone', tags => CASE WHEN i % 100 = 0 THEN ARRAY['rare'] ELSE '{}' END);
		COMMIT; END LOOP; END $$}) x 4);
my $rare = 200;

# Each counts what it is given until it has all of it, and answers with that.
my %waiters = (
	'wait_for' => [ $events, qq{
		DO \$\$ DECLARE cursor_at bigint := 0; head bigint; n bigint := 0; BEGIN
		WHILE n < $events LOOP
			head := eventstore.wait_for('b', cursor_at, NULL);
			n := n + (SELECT count(*) FROM eventstore.read('b', after => cursor_at, before => head + 1));
			cursor_at := head;
			COMMIT;
		END LOOP;
		PERFORM set_config('test.found', n::text, false); END \$\$} ],
	'await' => [ $events, qq{
		DO \$\$ DECLARE cursor_at bigint := 0; head bigint; n bigint := 0; BEGIN
		WHILE n < $events LOOP
			CALL eventstore.await('b', cursor_at, head, NULL);
			n := n + (SELECT count(*) FROM eventstore.read('b', after => cursor_at, before => head + 1));
			cursor_at := head;
		END LOOP;
		PERFORM set_config('test.found', n::text, false); END \$\$} ],
	'read' => [ $events, qq{
		DO \$\$ DECLARE cursor_at bigint := 0; found bigint; last_one bigint; n bigint := 0; BEGIN
		WHILE n < $events LOOP
			SELECT count(*), max(position) INTO found, last_one FROM eventstore.read('b', after => cursor_at, max_count => 700, wait => '1 hour');
			n := n + found;
			cursor_at := last_one;
			COMMIT;
		END LOOP;
		PERFORM set_config('test.found', n::text, false); END \$\$} ],
	'rare' => [ $rare, qq{
		DO \$\$ DECLARE cursor_at bigint := 0; found bigint; last_one bigint; n bigint := 0; BEGIN
		WHILE n < $rare LOOP
			SELECT count(*), max(position) INTO found, last_one FROM eventstore.read('b', after => cursor_at, tags => '{rare}', wait => '1 hour');
			n := n + found;
			cursor_at := last_one;
			COMMIT;
		END LOOP;
		PERFORM set_config('test.found', n::text, false); END \$\$} ],
	'stream' => [ 20_000, qq{
		DO \$\$ DECLARE found bigint; last_one bigint; n bigint := 0; BEGIN
		WHILE n < 20000 LOOP
			SELECT count(*), max(version) INTO found, last_one FROM eventstore.read_stream('b', 'alone', n + 1, wait => '1 hour');
			n := n + found;
			IF n <> last_one THEN RAISE EXCEPTION 'version % after % events', last_one, n; END IF;
			COMMIT;
		END LOOP;
		PERFORM set_config('test.found', n::text, false); END \$\$} ]);

# $disturb is called in the middle.
sub burst
{
	my ($name, $disturb) = @_;
	my (@writing, %waiting);
	my @listening = map { EventstoreTest::Listener->new($node, application_name => "listener $_") } 1 .. 2;
	my @sums = (0, 0);

	value("SELECT eventstore.drop_collection(c.collection) FROM eventstore.collections c WHERE c.collection = to_regclass('b')");
	value("SELECT eventstore.create_collection('b', segment_size => 30000)");
	$_->listen('b') foreach @listening;
	foreach my $kind (sort keys %waiters)
	{
		$waiting{$kind} = session($node, application_name => $kind, timeout => 400);
		$waiting{$kind}->send("$waiters{$kind}[1]; SELECT current_setting('test.found')");
	}
	foreach my $sql (@writers)
	{
		push @writing, session($node, timeout => 400);
		$writing[-1]->send($sql);
	}
	await_true($node, "SELECT eventstore.head('b') > $events / 3");
	$disturb->(\%waiting) if $disturb;

	foreach my $writer (@writing)
	{
		$writer->receive;
		is($writer->{state}, '00000', "$name: a writer came to its end") or diag($writer->{message});
		$writer->quit;
	}
	foreach my $kind (sort keys %waiting)
	{
		is($waiting{$kind}->receive, $waiters{$kind}[0], "$name: $kind was given everything") or diag($waiting{$kind}{message});
		$waiting{$kind}->quit;
	}
	foreach my $listener (@listening)
	{
		my $sum = 0;
		my @notes = $listener->await_head('public.b', $events);

		is($notes[-1]{said}{head}, $events, "$name: a listener ends at the head");
		$sum += $_->{said}{count} foreach @notes;
		# What was sent and not noted yet is sent again.
		cmp_ok($sum, $name =~ /notifier/ ? '>=' : '==', $events, "$name: it was told of all events");
		cmp_ok(@notes, '<', 21_000, "$name: in " . @notes . ' notifications');
		$listener->quit;
	}
	is(value("SELECT late_wakeups FROM eventstore.pg_stat_eventstore WHERE collection = 'b'::regclass"), 0, "$name: nobody was woken late");
	return;
}

burst('a burst');

burst('the notifier ends', sub {
	my $old = value($notifier);

	value("SELECT pg_terminate_backend($old)");
	await_true($node, "SELECT count(*) = 1 FROM ($notifier) n WHERE pid <> $old");
});

burst('a waiter ends', sub {
	my ($waiting) = @_;

	value("SELECT pg_terminate_backend($waiting->{$_}{backend_pid})") foreach 'wait_for', 'stream';
	$waiting->{$_}->receive foreach 'wait_for', 'stream';
	is($waiting->{wait_for}{state}, 'LOST', 'it has gone');
	foreach my $kind ('wait_for', 'stream')
	{
		$waiting->{$kind}->quit;
		$waiting->{$kind} = session($node, application_name => $kind, timeout => 400);
		$waiting->{$kind}->send("$waiters{$kind}[1]; SELECT current_setting('test.found')");
	}
});
is_clean($node, 'b');

# ---- a crash, of the notifier or of one who waits ------------------------------------------------

foreach my $victim ('notifier', 'waiter')
{
	my $waiter = session($node, application_name => 'waiter');
	my $listener = EventstoreTest::Listener->new($node);
	my ($head, $pid, $channel);

	($channel, $head) = $listener->listen('a');
	$waiter->send("SELECT eventstore.wait_for('a', $head, NULL)");
	await_true($node, "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE application_name = 'waiter'");
	await_true($node, "SELECT count(*) = 1 FROM ($notifier) n");
	$pid = $victim eq 'waiter' ? $waiter->backend_pid : value($notifier);
	value("SELECT position FROM eventstore.append('b', 'x')");
	crash_by($node, $pid);
	$waiter->receive;
	is($waiter->{state}, 'LOST', "$victim killed: who waits loses his session");
	$_->quit foreach $waiter, $listener;

	$waiter = session($node, application_name => 'waiter');
	$listener = EventstoreTest::Listener->new($node);
	# Positions that were only reserved are gaps now.
	cmp_ok(($listener->listen('a'))[1], '>=', $head, "$victim killed: one listens again");
	$waiter->send("SELECT type FROM eventstore.read('a', after => $head, tags => '{after}', wait => '1 hour')");
	value("SELECT position FROM eventstore.append('a', 'after the crash', tags => '{after}')");
	is($waiter->receive, 'after the crash', "$victim killed: and one waits again");
	$listener->await_note(sub { $_[0]{said}{head} > $head && $_[0]{said}{count} == 1 }, 'after the crash');
	pass("$victim killed: a listener is told again");
	$_->quit foreach $waiter, $listener;
}

# The same in the middle of it: listeners go on from the cursors that they kept.
value("SELECT eventstore.create_collection('k')");
$load = EventstoreTest::Load->new($node, collections => ['k'], seed => 6, pause => 0.002);
my @lines = map { { numbers => [], after => 0 } } 1 .. 3;

sub start_lines
{
	foreach my $line (@lines)
	{
		$load->start_listener('k', after => $line->{after});
		push @{ $line->{numbers} }, $load->{workers};
	}
	return;
}

foreach my $victim ('notifier', 'waiter')
{
	my $waiter = session($node, application_name => 'waiter');
	my $before = value("SELECT eventstore.head('k')");

	$load->start_writer for 1 .. 4;
	start_lines();
	$waiter->send("SELECT eventstore.wait_for('b', eventstore.head('b'), NULL)");
	await_true($node, "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE application_name = 'waiter'");
	await_true($node, "SELECT count(*) = 1 FROM ($notifier) n");
	await_true($node, "SELECT eventstore.head('k') > $before + 1000");
	crash_by($node, $victim eq 'waiter' ? $waiter->backend_pid : value($notifier));
	$load->wait_for_all;
	$waiter->quit;
	foreach my $line (@lines)
	{
		my @cursors = map { $load->positions_of('cursor', 'k', $_) } @{ $line->{numbers} };

		$line->{after} = $cursors[-1] // 0;
	}
}
start_lines();
$load->start_writer(500) for 1 .. 2;
is($load->finish, 0, 'crashes in the middle: writers and listeners came to their end');
is(join("\n", $load->lines('error')), '', 'none met an error that it should not');
foreach my $line (@lines)
{
	is( join(',', map { $load->positions_of('read', 'k', $_) } @{ $line->{numbers} }),
		join(',', positions($node, "SELECT position FROM k ORDER BY position")),
		'a listener through two crashes: everything once, in order');
}
is_clean($node, 'k');

$node->stop('fast');
no_crash($node);
done_testing();
