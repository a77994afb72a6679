# The feed of reads: who listens to a store with option feed_reads hears of each
# get, and the read stays a read.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Listener;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('store_reads', settings => [ 'client_min_messages = error' ]);

sub value { return $node->safe_psql('postgres', $_[0]); }

value(q{
	SELECT eventstore.create_store('kv');
	SELECT eventstore.create_store('blobs', format => 'bytes', key_format => 'bytes');
	SELECT eventstore.create_store('quiet');
	SELECT eventstore.put('kv', 'k' || i, '1') FROM generate_series(1, 3) i;
	SELECT eventstore.set_option('kv', 'feed_reads', 'true'), eventstore.set_option('blobs_changelog', 'feed_reads', 'on');
	CREATE ROLE reader LOGIN;
	GRANT SELECT ON kv TO reader;
	CREATE DATABASE other;
});

my $listener = EventstoreTest::Listener->new($node);
my ($channel) = $listener->listen('kv');
is($channel, 'public.kv_changelog', 'who listens to a store listens to its changelog');
$listener->listen('blobs');
$listener->listen('quiet');

# What is told up to a read that comes now: how often each key was read.
my $fences = 0;

sub told_so_far
{
	my $fence = 'fence ' . ++$fences;
	my $deadline = time + $PostgreSQL::Test::Utils::timeout_default;
	my %told;

	until (exists $told{$fence})
	{
		BAIL_OUT("never told of $fence") if time > $deadline;
		value("SELECT eventstore.get('kv', '$fence')");
		foreach my $said (map { $_->{said} } $listener->notes)
		{
			$told{$_} += $said->{get}{$_} foreach keys %{ $said->{get} // {} };
		}
	}
	delete @told{ grep { /^fence / } keys %told };
	return \%told;
}

# How often each key was told of by what reads it.  A read that meets the notifier at
# their table is passed over (key_reads.c), so where one is missing they are read again.
sub told
{
	my ($read, %wanted) = @_;
	my $told;

	foreach (1 .. 3)
	{
		$read->();
		$told = told_so_far();
		last unless grep { ($told->{$_} // 0) < $wanted{$_} } keys %wanted;
	}
	return $told;
}

# ---- what is told ---------------------------------------------------------------------

my $reader = session($node, user => 'reader');
my @answers;
my $told = told(sub { @answers = map { $reader->run($_) } 'BEGIN READ ONLY', q{SELECT eventstore.get('kv', 'k1'), eventstore.get('kv', 'k1'), eventstore.get('kv', 'none')}, 'SELECT pg_current_xact_id_if_assigned() IS NULL', 'ROLLBACK' }, k1 => 2, none => 1);
is_deeply(\@answers, [ '', '1|1|', 't', '' ], 'read by one who may only read, without a transaction id');
is_deeply($told, { k1 => 2, none => 1 }, 'each read is told of, those of no value and of a transaction rolled back too');

# What it reads, and what is told of that.
sub tells
{
	my ($sql, $wanted, $name) = @_;
	return is_deeply(told(sub { value($sql) }, %$wanted), $wanted, $name);
}

tells(q{SELECT * FROM eventstore.get_many('kv', '{k2,k3,k2}')}, { k2 => 2, k3 => 1 }, 'get_many reads each of its keys');
tells(q{SELECT eventstore.get_bytes('blobs', '\x0001'); SELECT eventstore.get('kv', E'quoted " \\\\ \\n')},
	{ '\x0001' => 1, qq{quoted " \\ \n} => 1 }, 'keys of bytes, and of any characters');

# ---- what is not ------------------------------------------------------------------------

$node->safe_psql('postgres', 'CREATE ROLE stranger LOGIN');
is(sqlstate_of($node, q{SELECT eventstore.get('kv', 'secret')}, user => 'stranger'), '42501', 'who may not read is refused');
tells(q{SELECT eventstore.get('quiet', 'quiet'); SELECT eventstore.get('kv', repeat('x', 129))}, {}, 'nor what is refused, not asked for, or too long');
tells(q{ALTER TABLE kv ENABLE ROW LEVEL SECURITY; SELECT eventstore.get('kv', 'secured'); ALTER TABLE kv DISABLE ROW LEVEL SECURITY}, {}, 'nor what policies are about');
tells(q{SELECT eventstore.set_option('kv', 'feed_reads', NULL); SELECT eventstore.get('kv', 'off'); SELECT eventstore.set_option('kv', 'feed_reads', 'true')}, {}, 'nor what was read while it was off');
is(sqlstate_of($node, $_->[0]), $_->[1], "$_->[0]: $_->[1]")
  foreach [ q{SELECT eventstore.set_option('kv', 'feed_reads', 'perhaps')}, '22023' ],
	[ q{SELECT eventstore.create_collection('plain'); SELECT eventstore.set_option('plain', 'feed_reads', 'true')}, '22023' ],
	[ q{ALTER TABLE kv_changelog ENABLE ROW LEVEL SECURITY; SELECT eventstore.set_option('kv', 'feed_reads', 'true')}, '42501' ],
	[ q{ALTER TABLE kv_changelog DISABLE ROW LEVEL SECURITY}, '00000' ],
	[ q{SELECT eventstore.create_store('bare', changelog => false); SELECT eventstore.set_option('bare', 'feed_reads', 'true')}, '55000' ];

# ---- under pressure -----------------------------------------------------------------------

value(q{SELECT count(eventstore.get('kv', repeat(chr(1), 100) || i)) FROM generate_series(1, 20000) i; SELECT eventstore.put('kv', 'k1', '2')});
ok(exists told(sub { value(q{SELECT eventstore.get('kv', 'after') FROM generate_series(1, 5)}) }, after => 1)->{after}, 'after more keys than there is room for, the next are told of');

$listener->quit;
no_crash($node);
$node->stop;
done_testing();
