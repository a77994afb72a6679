# Notifications: what they say, when they come, and when none is sent.
#
# That nothing was sent is known by a fence: a notification of another
# collection, which the notifier sends in the same or a later turn.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Listener;
use EventstoreTest::Session;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('notify', settings => [ 'eventstore.tick_delay = 20ms', 'client_min_messages = error', 'eventstore.maintenance_interval = 1h' ]);

sub value { return $node->safe_psql('postgres', $_[0]); }

sub listener { return EventstoreTest::Listener->new($node, application_name => $_[0]); }

# As options of create_collection.
sub create { value("SELECT eventstore.create_collection(" . join(', ', "'$_[0]'", @_[ 1 .. $#_ ]) . ")"); return; }

sub append { return value("SELECT position FROM eventstore.append($_[0])"); }

sub append_batch { return value("SELECT max(position) FROM eventstore.append_batch('$_[0]', '$_[1]')"); }

# The payloads up to the one that tells of this head.
sub payloads
{
	my ($listener, $channel, $head) = @_;
	return join "\n", map { $_->{payload} } $listener->await_head($channel, $head);
}

create('fence');
my $fence = listener('fence');
$fence->listen('fence');

my $notifier = "SELECT pid FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'notifier' AND database = 'postgres' AND pid IS NOT NULL";

# The notifier has been through all that was to be sent before, and sleeps.
sub settle
{
	$fence->await_head('public.fence', append("'fence', 'x'"));
	await_true($node, "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = ($notifier)");
	return;
}

# How many notifications it sent meanwhile, but for the fence's.
sub sent_by
{
	my ($code) = @_;
	my $count = "SELECT notifications FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'notifier' AND database = 'postgres'";
	my $before;

	settle();
	$before = value($count);
	$code->();
	settle();
	return value($count) - $before - 1;
}

# ---- what they say --------------------------------------------------------------------

my $one = listener('one');

create('h');
is(join('|', $one->listen('h')), 'public.h|0', 'listen returns the channel and the head');
append("'h', 'a'");
is(payloads($one, 'public.h', 1), '{"collection": "public.h", "head": 1, "count": 1}', 'head: one event');
append_batch('h', '[{"type": "a"}, {"type": "b"}, {"type": "c"}]');
is(payloads($one, 'public.h', 4), '{"collection": "public.h", "head": 4, "count": 3}', 'head: a batch is told at once');
value("INSERT INTO h (type) VALUES ('i'), ('j')");
is(payloads($one, 'public.h', 6), '{"collection": "public.h", "head": 6, "count": 2}', 'head: an INSERT');

value('CREATE SCHEMA "Sales"');
create('"Sales"."Or ""d"""');
is(join('|', $one->listen('"Sales"."Or ""d"""')), 'Sales.Or "d"|0', 'the channel of a name that needs quotes');
append(q{'"Sales"."Or ""d"""', 'a'});
is((map { $_->{said}{collection} } $one->await_head('Sales.Or "d"', 1))[0], '"Sales"."Or ""d"""', 'the collection is qualified and quoted');

create('e', "notify => 'events'");
$one->listen('e');
my $id = '0196b2a4-0000-7000-8000-000000000001';
my $at = '2026-01-02 03:04:05.678901+00';
append(qq{'e', 'a"b', '{"x": [1, null, "ü\\n"]}', '{t:2,t:1}', stream => 's"', metadata => '{"m": true}', id => '$id', created_at => '$at'});
is(payloads($one, 'public.e', 1),
	qq({"collection": "public.e", "head": 1, "count": 1, "events": [{"position": 1, "stream": "s\\"", "version": 1, "id": "$id", )
	  . qq("type": "a\\"b", "tags": ["t:2", "t:1"], "data": {"x": [1, null, "ü\\n"]}, "metadata": {"m": true}, "created_at": "2026-01-02T03:04:05.678901+00:00"}]}),
	'events: every field');
append(qq{'e', 'a', body => '\\x00ff10', created_at => '$at', id => '$id'});
is(payloads($one, 'public.e', 2),
	qq({"collection": "public.e", "head": 2, "count": 1, "events": [{"position": 2, "id": "$id", "type": "a", "tags": [], "body": "AP8Q", "created_at": "2026-01-02T03:04:05.678901+00:00"}]}),
	'events: a body as base64, nulls are absent');
append_batch('e', '[{"type": "a"}, {"type": "b"}]');
my ($note) = $one->await_head('public.e', 4);
is(join(',', map { "$_->{position}$_->{type}" } @{ $note->{said}{events} }), '3a,4b', 'events: several');
append(q{'e', 'a', 'null'});
($note) = $one->await_head('public.e', 5);
ok(exists $note->{said}{events}[0]{data} && !defined $note->{said}{events}[0]{data}, 'events: a JSON null is there');

# To the byte, with positions of one figure.
sub payload_of_body
{
	my ($bytes) = @_;
	my $head = append("'e', repeat('t', $bytes), created_at => '$at'");
	my ($padded) = $one->await_head('public.e', $head);

	return $padded;
}
my $other_bytes = length(payload_of_body(10)->{payload}) - 10;
$note = payload_of_body(7999 - $other_bytes);
is(length $note->{payload}, 7999, 'events: 7,999 bytes are sent');
$note = payload_of_body(8000 - $other_bytes);
is($note->{payload}, '{"collection": "public.e", "head": 8, "count": 1}', 'events: one byte more is left out');
append_batch('e', '[' . join(', ', map { qq({"type": "x", "data": "@{[ 'y' x 3000 ]}"}) } 1 .. 3) . ']');
is(payloads($one, 'public.e', 11), '{"collection": "public.e", "head": 11, "count": 3}', 'events: left out as a whole');
append("'e', 'small', id => '$id', created_at => '$at'");
like(payloads($one, 'public.e', 12), qr/"events": \[\{"position": 12, /, 'events: and back with the next that fit');

value('ALTER TABLE e ENABLE ROW LEVEL SECURITY');
append("'e', 'secret'");
is(payloads($one, 'public.e', 13), '{"collection": "public.e", "head": 13, "count": 1}', 'events: withheld while row-level security is on');
is(sqlstate_of($node, "SELECT eventstore.set_option('e', 'notify', 'streams')"), '42501', 'and the mode cannot be chosen');
value('ALTER TABLE e DISABLE ROW LEVEL SECURITY');

create('s', "notify => 'streams'");
$one->listen('s');
append_batch('s', '[{"type": "x", "stream": "a"}, {"type": "x", "stream": "b\"ü"}, {"type": "x"}, {"type": "x", "stream": "a"}]');
is(payloads($one, 'public.s', 4), '{"collection": "public.s", "head": 4, "count": 4, "streams": {"a": 2, "b\"ü": 1}}', 'streams: the last version of each');
append("'s', 'x'");
is(payloads($one, 'public.s', 5), '{"collection": "public.s", "head": 5, "count": 1, "streams": {}}', 'streams: none');
append_batch('s', '[' . join(', ', map { qq({"type": "x", "stream": "@{[ 'n' x 100 ]}$_"}) } 1 .. 80) . ']');
is(payloads($one, 'public.s', 85), '{"collection": "public.s", "head": 85, "count": 80}', 'streams: left out as a whole');
value("SELECT count(*) FROM eventstore.append_batch('s', (SELECT jsonb_agg(jsonb_build_object('type', 'x', 'stream', i::text)) FROM generate_series(1, 2000) i))");
is(payloads($one, 'public.s', 2085), '{"collection": "public.s", "head": 2085, "count": 2000}', 'streams: too many');

# ---- a position that another holds ------------------------------------------------------

my $holder = session($node);
foreach my $end (qw(COMMIT ROLLBACK))
{
	my $head = value("SELECT eventstore.head('h')");
	my $count = $end eq 'COMMIT' ? 2 : 1;

	$holder->run('BEGIN');
	$holder->run("SELECT position FROM eventstore.append('h', 'open')");
	is(sent_by(sub { append("'h', 'above'") }), 0, "$end: nothing is told of what cannot be read yet");
	$holder->run($end);
	is(payloads($one, 'public.h', $head + 2), qq({"collection": "public.h", "head": @{[ $head + 2 ]}, "count": $count}), "$end: it is told then");
}

# ---- several at once ------------------------------------------------------------------------

my $two = listener('two');
$two->listen('h');
settle();
$_->notes foreach $one, $two;
my $head = value("SELECT eventstore.head('h')");
my @writers = map { session($node) } 1 .. 4;
$_->send("DO \$\$ BEGIN FOR i IN 1 .. 500 LOOP PERFORM eventstore.append('h', 'x'); COMMIT; END LOOP; END \$\$") foreach @writers;
foreach my $writer (@writers)
{
	$writer->receive;
	is($writer->{state}, '00000', 'a writer came to its end');
	$writer->quit;
}
my %told;
foreach my $listener ($one, $two)
{
	my @notes = $listener->await_head('public.h', $head + 2000);
	my ($sum, $last, $disorder) = (0, $head, 0);

	foreach my $said (map { $_->{said} } @notes)
	{
		$sum += $said->{count};
		$disorder++ if $said->{head} <= $last || $said->{head} - $last != $said->{count};
		$last = $said->{head};
	}
	is($sum, 2000, 'the counts of a burst are its events');
	is($last, $head + 2000, 'and the last head is the head');
	is($disorder, 0, 'each goes on where the one before ended');
	cmp_ok(@notes, '<', 2000, 'in fewer notifications than there were commits');
	$told{ join "\n", map { $_->{payload} } @notes } = 1;
}
is(keys %told, 1, 'two listeners hear the same');
$two->quit;

# ---- options, while somebody listens --------------------------------------------------------

create('o');
$one->listen('o');
$one->run('LISTEN "other"; LISTEN "third"');
value("SELECT eventstore.set_option('o', 'channel', 'other')");
append("'o', 'x'");
is(payloads($one, 'other', 1), '{"collection": "public.o", "head": 1, "count": 1}', 'a new channel is taken at once');
value("SELECT eventstore.set_option('o', 'notify', 'streams')");
append("'o', 'x', stream => 's'");
is(payloads($one, 'other', 2), '{"collection": "public.o", "head": 2, "count": 1, "streams": {"s": 1}}', 'and so is a mode');
value("BEGIN; SELECT eventstore.set_option('o', 'channel', 'third'); SELECT eventstore.append('o', 'x'); ROLLBACK");
append("'o', 'x'");
is((map { $_->{payload} } $one->await_head('other', 4))[-1], '{"collection": "public.o", "head": 4, "count": 1, "streams": {}}', 'but not one that was rolled back');
value("SELECT eventstore.set_option('o', 'notify', 'none')");
is(sent_by(sub { append("'o', 'x'") }), 0, 'none: nothing is sent');
value("SELECT eventstore.set_option('o', 'notify', NULL)");
like(payloads($one, 'other', 5), qr/"head": 5,/, 'what was left unsaid is told once the mode changes');
value("SELECT eventstore.set_option('o', 'channel', NULL)");
append("'o', 'x'");
is(payloads($one, 'public.o', 6), '{"collection": "public.o", "head": 6, "count": 1}', 'back to the first channel');

foreach my $option ([ 'notify', 'none' ], [ 'channel', 'elsewhere' ])
{
	value("SELECT eventstore.set_option('o', '$option->[0]', '$option->[1]')");
	$head = value("SELECT eventstore.head('o')");
	$holder->run('BEGIN');
	$holder->run("SELECT position FROM eventstore.append('o', 'x')");
	value("SELECT eventstore.set_option('o', '$option->[0]', NULL)");
	settle();
	$holder->run('COMMIT');
	$one->await_head('public.o', $head + 1);
	pass("$option->[0] was changed while an append was open: it is told");
}

value('ALTER TABLE o RENAME TO p');
append("'p', 'x'");
is(payloads($one, 'public.o', 9), '{"collection": "public.p", "head": 9, "count": 1}', 'RENAME: the channel stays');
value('ALTER TABLE p SET SCHEMA "Sales"');
append(q{'"Sales".p', 'x'});
is(payloads($one, 'public.o', 10), '{"collection": "\"Sales\".p", "head": 10, "count": 1}', 'SET SCHEMA: the channel stays');
is(join('|', $one->listen('"Sales".p')), 'public.o|10', 'and listen knows it');
value(q{SELECT eventstore.drop_collection('"Sales".p')});
create('o');
append("'o', 'x'");
is(payloads($one, 'public.o', 1), '{"collection": "public.o", "head": 1, "count": 1}', 'a new collection of the old channel');

# ---- heartbeat -------------------------------------------------------------------------------------

create('b');
$one->listen('b');
append("'b', 'x'");
$one->await_head('public.b', 1);
is(sent_by(sub { }), 0, 'no heartbeat unless asked for');
value("SELECT eventstore.set_option('b', 'heartbeat', '20 ms')");
foreach (1 .. 2)
{
	$one->await_note(sub { $_[0]{payload} eq '{"collection": "public.b", "head": 1, "count": 0}' }, 'of the heartbeat');
	pass('a heartbeat in idle times');
}
create('never_used');
value("SELECT eventstore.set_option('never_used', 'heartbeat', '20 ms')");
$one->listen('never_used');
$one->await_note(sub { $_[0]{payload} eq '{"collection": "public.never_used", "head": 0, "count": 0}' }, 'of the heartbeat');
pass('a heartbeat of an empty collection');
value("SELECT eventstore.set_option('$_', 'heartbeat', NULL)") foreach 'b', 'never_used';

# ---- who listens -------------------------------------------------------------------------------------

create('l');
sub is_sent { return sent_by(sub { append("'l', 'x'") }); }

is(is_sent(), 0, 'nobody listens: nothing is sent');
my $l = listener('l');
$l->run('LISTEN "public.L"');
is(is_sent(), 0, 'somebody listens to another channel: nothing is sent');
is($l->run('UNLISTEN *; SELECT count(*) FROM pg_listening_channels()'), 0, 'UNLISTEN');

# What leaves the session listening or not, and what it does to the count.
foreach my $case (
	[ 1, 'LISTEN "public.l"' ],
	[ 1, 'LISTEN "public.l"; LISTEN "public.l"' ],
	[ 0, 'LISTEN "public.l"; LISTEN "public.l"', 'UNLISTEN "public.l"' ],
	[ 0, 'LISTEN "public.l"', 'UNLISTEN *' ],
	[ 0, 'LISTEN "public.l"', 'DISCARD ALL' ],
	[ 1, 'LISTEN "public.l"', 'UNLISTEN "public.L"' ],
	[ 1, q{DO $$ BEGIN EXECUTE 'LISTEN "public.l"'; END $$} ],
	[ 1, q{SELECT FROM eventstore.listen('l')} ],
	[ 1, 'LISTEN "public.l"', 'BEGIN', 'UNLISTEN "public.l"', 'ROLLBACK' ],
	[ 1, 'LISTEN "public.l"', 'BEGIN', 'UNLISTEN *', 'SELECT 1/0', 'COMMIT' ],
	[ 1, 'LISTEN "public.l"', 'BEGIN', 'SAVEPOINT s', 'UNLISTEN "public.l"', 'ROLLBACK TO s', 'COMMIT' ],
	[ 0, 'LISTEN "public.l"', 'BEGIN', 'SAVEPOINT s', 'UNLISTEN "public.l"', 'RELEASE s', 'COMMIT' ],
	[ 1, 'LISTEN "public.l"', 'BEGIN', 'UNLISTEN "public.l"', 'LISTEN "public.l"', 'COMMIT' ],
	[ 0, 'BEGIN', 'LISTEN "public.l"', 'UNLISTEN "public.l"', 'COMMIT' ],
	[ 1, 'BEGIN', 'SAVEPOINT s', 'LISTEN "public.l"', 'RELEASE s', 'COMMIT' ],
	[ 1, 'BEGIN', 'LISTEN "public.l"', 'SAVEPOINT s', 'UNLISTEN "public.l"', 'LISTEN "public.l"', 'ROLLBACK TO s', 'COMMIT' ])
{
	my ($listens, @steps) = @$case;
	my $name = join '; ', @steps;

	$l->try($_) foreach @steps;
	is($l->run("SELECT count(*) FROM pg_listening_channels() c WHERE c = 'public.l'"), $listens, "$name: as PostgreSQL has it");
	if ($listens)
	{
		$l->await_head('public.l', append("'l', 'x'"));
		pass("$name: it is told");
	}
	else
	{
		is(is_sent(), 0, "$name: nothing is sent");
	}
	$l->run('UNLISTEN *');
	is(is_sent(), 0, "$name: nothing is sent once it has ended");
}

# Counted too often does no harm, and is over with the next UNLISTEN.
$l->run('BEGIN; LISTEN "public.l"; ROLLBACK');
append("'l', 'x'");
is(scalar($l->notes), 0, 'LISTEN rolled back: nothing is heard');
$l->run('UNLISTEN *');
is(is_sent(), 0, 'nor sent after an UNLISTEN');

my $m = listener('m');
$_->listen('l') foreach $l, $m;
$m->run('DISCARD ALL');
$l->await_head('public.l', append("'l', 'x'"));
pass('one of two listeners ends: the other is told');
$l->quit;
$m->quit;
await_true($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name IN ('l', 'm')");
is(is_sent(), 0, 'they are gone: nothing is sent');

$l = listener('l');
$l->listen('l');
value("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'l'");
await_true($node, "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'l'");
is(is_sent(), 0, 'terminated: nothing is sent');

# ---- what must not disturb others ------------------------------------------------------------------------

# An exclusive lock on one collection: its notifications wait, no others.
create('locked');
$one->listen('locked');
append("'locked', 'x'");
$one->await_head('public.locked', 1);
value("SELECT eventstore.set_option('locked', 'heartbeat', '20 ms')");
$one->await_note(sub { $_[0]{channel} eq 'public.locked' && $_[0]{said}{count} == 0 }, 'of the heartbeat');
$holder->run('BEGIN; LOCK TABLE locked');
my $waiter = session($node, application_name => 'waiter');
foreach my $round (1 .. 20)
{
	$waiter->send("SELECT eventstore.wait_for('h', eventstore.head('h'), NULL) > 0");
	await_true($node, "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE application_name = 'waiter'");
	$one->await_head('public.h', append("'h', 'x'"));
	$waiter->receive;
}
is(value("SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = ($notifier)"), 0, 'the notifier waits for nobody\'s lock');
is(value("SELECT late_wakeups FROM eventstore.pg_stat_eventstore WHERE collection = 'h'::regclass"), 0, 'nor does who waits for another collection');
$one->notes;
$holder->run('COMMIT');
$one->await_note(sub { $_[0]{channel} eq 'public.locked' }, 'of the heartbeat');
pass('the locked one is told of afterwards');
value("SELECT eventstore.set_option('locked', 'heartbeat', NULL)");

# A listener that does not read: the queue grows, and nobody minds.
my $slow = listener('slow');
$slow->listen('e');
$slow->run('BEGIN; SELECT 1');
my $before = value("SELECT eventstore.head('e')");
foreach my $i (1 .. 40)
{
	append("'e', repeat('t', 7000)");
	$one->await_head('public.e', $before + $i);
}
cmp_ok(value('SELECT pg_notification_queue_usage()'), '>', 0, 'a listener in an open transaction does not read its notifications');
is(scalar($slow->notes), 0, 'and is given none');
$slow->run('COMMIT');
is(join(',', map { $_->{said}{head} } $slow->await_head('public.e', $before + 40)), join(',', $before + 1 .. $before + 40), 'it gets all of them when it ends, in order');

# What the queue cannot take: here because its files cannot be written.
sub errors { return value("SELECT errors FROM eventstore.pg_stat_eventstore_workers WHERE worker = 'notifier' AND database = 'postgres'"); }

my $errors = errors();
my $queue = $node->data_dir . '/pg_notify';
my $due = 0;
$before = value("SELECT eventstore.head('e')");
sub append_large { append("'e', repeat('t', 7000)"); $due++; return; }

# PostgreSQL cuts the queue's tail after a commit, and could not do so then: let
# the tail come to where it stays, before.
$slow->run('BEGIN; SELECT 1');
foreach (1 .. 10)
{
	append_large();
	$one->await_head('public.e', $before + $due);
}
my $heard = $due;
chmod(0400, glob "$queue/*") && chmod(0500, $queue) or die "cannot chmod: $!";
append_large() until errors() > $errors;
append("'e', 'after'"), $due++ for 1 .. 20;
is(value("SELECT eventstore.head('e')"), $before + $due, 'appends go on while notifications cannot be sent');
$waiter->send("SELECT eventstore.wait_for('h', eventstore.head('h'), NULL) > 0");
await_true($node, "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE application_name = 'waiter'");
append("'h', 'x'");
is($waiter->receive, 't', 'and who waits is woken');
is(value("SELECT late_wakeups FROM eventstore.pg_stat_eventstore WHERE collection = 'h'::regclass"), 0, 'in time');
chmod(0700, $queue) && chmod(0600, glob "$queue/*") or die "cannot chmod: $!";
$slow->run('COMMIT');
my $sum = 0;
$sum += $_->{said}{count} foreach $slow->await_head('public.e', $before + $due);
is($sum, $due, 'afterwards all that was due is told');
$sum = $heard;
$sum += $_->{said}{count} foreach $one->await_head('public.e', $before + $due);
is($sum, $due, 'to each');

# ---- another notifier, another database ------------------------------------------------------------------

my $old = value($notifier);
$before = value("SELECT eventstore.head('h')");
$one->notes;
value("SELECT pg_terminate_backend($old)");
append("'h', 'x'") for 1 .. 10;
$sum = 0;
$sum += $_->{said}{count} foreach $one->await_head('public.h', $before + 10);
is($sum, 10, 'another notifier goes on where the last one ended');
isnt(value($notifier), $old, 'it is another one');

value('CREATE DATABASE elsewhere');
$node->safe_psql('elsewhere', "CREATE EXTENSION eventstore; SELECT eventstore.create_collection('h')");
my $elsewhere = EventstoreTest::Listener->new($node, dbname => 'elsewhere');
$elsewhere->listen('h');
is(sent_by(sub { $node->safe_psql('elsewhere', "SELECT eventstore.append('h', 'x')") for 1 .. 5 }), 0, 'one database does not tell of another');
is($elsewhere->await_head('public.h', 5) > 0, 1, 'but of its own');
is((grep { $_->{channel} eq 'public.h' } $one->notes), 0, 'nor is it heard there');
append("'h', 'x'");
$one->await_head('public.h', $before + 11);
is(scalar($elsewhere->notes), 0, 'the other way round likewise');

$_->quit foreach $one, $slow, $fence, $elsewhere;
is(value("SELECT late_wakeups FROM eventstore.pg_stat_eventstore WHERE collection = 'h'::regclass"), 0, 'nobody was woken late');
$node->stop('fast');
no_crash($node);
done_testing();
