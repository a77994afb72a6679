# Writers and readers that run beside a test, each a process with a psql of its
# own, and each keeping its own record of what the server told it.
#
#   my $load = EventstoreTest::Load->new($node, seed => 1, collections => ['a', 'b']);
#   $load->start_writer(1000) for 1 .. 4;       # events each; without a number: until told
#   $load->start_reader('committed', 'a');
#   ... crash it, dump it, look at it ...
#   $load->finish;                              # or stop_writers and finish_readers
#   $load->positions_of('kept', 'a')            # what the server has acknowledged
#
# A record is a file of lines, one for each thing known, written at once:
#
#   seen COLLECTION POSITION       an append returned it, whatever came of it
#   kept COLLECTION POSITION       its transaction was acknowledged as committed
#   gone COLLECTION POSITION       its transaction (or savepoint) was rolled back
#   read COLLECTION POSITION       a reader was given it (streams: STREAM VERSION too)
#   error SQLSTATE MESSAGE         what no client should meet
#
# A writer does at random what appenders do: append, append_batch, INSERT, COPY,
# with and without streams, expected versions and conditions; alone or several
# in a transaction, with pauses, savepoints and rollbacks.  A reader goes on
# from its last position; how, is told at each kind.  Every choice follows from
# the seed and the worker's number; how they interleave is the system's affair.
package EventstoreTest::Load;

use strict;
use warnings;

use Carp;
use POSIX ();
use PostgreSQL::Test::Utils;
use Time::HiRes qw(time usleep);

use EventstoreTest::Listener;
use EventstoreTest::Session;

# What a client has to expect, and answers by trying again.
my %expected_errors = map { $_ => 1 } (
	'LG001',    # another appended to the stream
	'LG002',    # the condition failed
	'40P01',    # deadlock: a transaction with several appends
	'40001',    # serialization, or an INSERT overtaken at a segment's end
	'55000');   # an INSERT or COPY beyond the segments that were ready

sub new
{
	my ($class, $node, %options) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir();

	return bless {
		node        => $node,
		dbname      => $options{dbname} // 'postgres',
		collections => $options{collections},
		seed        => $options{seed} // 1,
		streams     => $options{streams} // 200,
		pause       => $options{pause} // 0.005,
		batch       => $options{batch} // 10,
		inserts     => $options{inserts} // 1,
		async       => $options{async} // 0,
		dir         => $dir,
		workers     => 0,
		writers     => [],
		readers     => [],
	}, $class;
}

# ---- processes ---------------------------------------------------------------

# Runs a sub in a process of its own; END blocks are the parent's affair.
sub start_worker
{
	my ($self, $list, $sub) = @_;
	my $number = ++$self->{workers};
	my $pid    = fork;

	croak "cannot fork: $!" unless defined $pid;
	if ($pid == 0)
	{
		my $status = 0;

		$self->{number} = $number;
		srand $self->{seed} * 1000 + $number;
		open $self->{record}, '>>', "$self->{dir}/record.$number" or POSIX::_exit(2);
		eval { $sub->(); 1 } or do {
			# The server may have gone before the first statement, too.
			$self->note_line("error died $@")
			  unless $@ =~ /: LOST / || $self->{session} && $self->{session}{state} eq 'LOST';
			$status = 1;
		};
		POSIX::_exit($status);
	}
	push @$list, $pid;
	return $pid;
}

# One write() a line: what is in the file survives whatever becomes of us.
sub note_line
{
	my ($self, @lines) = @_;

	return unless @lines;
	syswrite $self->{record}, join('', map { s/\n/ /gr . "\n" } @lines);
	return;
}

sub flag_file
{
	my ($self, $name) = @_;
	return "$self->{dir}/$name";
}

sub raise_flag
{
	my ($self, $name, $text) = @_;

	PostgreSQL::Test::Utils::append_to_file($self->flag_file("$name.new"), $text // '');
	rename $self->flag_file("$name.new"), $self->flag_file($name) or croak "cannot rename: $!";
	return;
}

sub connect
{
	my ($self) = @_;

	$self->{session} = EventstoreTest::Session->new($self->{node}, dbname => $self->{dbname},
		application_name => "load $self->{number}");
	return $self->{session};
}

# Runs it; true if it went well.  Dies where the server is gone.
sub attempt
{
	my ($self, $sql) = @_;
	my $session = $self->{session};
	my $state   = $session->try($sql);

	return 1 if $state eq '00000';
	die "lost the server\n" if $state eq 'LOST';
	$self->note_line("error $state $session->{message} in: $sql") unless $expected_errors{$state};
	$self->{errors}{$state}++;
	return 0;
}

# ---- writers -----------------------------------------------------------------

sub pick
{
	return $_[ int rand @_ ];
}

sub random_stream
{
	my ($self) = @_;
	# A few are hot, so that writers meet.
	return 's' . (rand() < 0.3 ? int rand 4 : int rand $self->{streams});
}

sub random_tags
{
	my %tags;

	$tags{ 'color:' . pick(qw(red green blue)) } = 1;
	$tags{ 'n:' . int rand 50 } = 1 if rand() < 0.7;
	return sort keys %tags;
}

sub random_event
{
	my ($self) = @_;
	my $tags = join ',', map { "\"$_\"" } random_tags();
	my $stream = rand() < 0.5 ? ', "stream": "' . $self->random_stream . '"' : '';

	return sprintf '{"type": "%s", "tags": [%s], "data": {"by": %d}%s}',
	  pick(qw(t1 t2 t3)), $tags, $self->{number}, $stream;
}

sub append_sql
{
	my ($self, $collection, @more) = @_;
	my $tags = join ',', random_tags();

	return sprintf
	  "SELECT position FROM eventstore.append('%s', '%s', '{\"by\": %d}', tags => '{%s}'%s)",
	  $collection, pick(qw(t1 t2 t3)), $self->{number}, $tags, join('', map { ", $_" } @more);
}

sub batch_sql
{
	my ($self, $collection, $n) = @_;
	my $events = join ', ', map { $self->random_event } 1 .. $n;

	return "SELECT position FROM eventstore.append_batch('$collection', '[$events]')";
}

sub array_sql
{
	my ($self, $collection, $n) = @_;
	my $stream = rand() < 0.5 ? "'" . $self->random_stream . "'" : 'NULL';

	return "SELECT position FROM eventstore.append_array('$collection', ARRAY(SELECT"
	  . " ROW('t1', NULL, '{color:red}', $stream, NULL, NULL, NULL, NULL, NULL)::eventstore.new_event"
	  . " FROM generate_series(1, $n)))";
}

sub insert_sql
{
	my ($self, $collection, $n) = @_;
	my $stream = rand() < 0.5 ? "'" . $self->random_stream . "'" : 'NULL';

	return "INSERT INTO $collection (type, stream, tags) SELECT 't2', $stream, '{color:blue}'"
	  . " FROM generate_series(1, $n) RETURNING position";
}

# Of one append at random: its SQL, or undef where what it builds on cannot be read.
sub random_append
{
	my ($self, $collection) = @_;
	my $kind = rand;
	my $n    = 1 + int rand $self->{batch};

	return $self->append_sql($collection) if $kind < 0.15;
	return $self->append_sql($collection, "stream => '" . $self->random_stream . "'") if $kind < 0.35;
	return $self->batch_sql($collection, $n) if $kind < 0.55;
	return $self->array_sql($collection, $n) if $kind < 0.65;
	return $self->insert_sql($collection, $n) if $kind < 0.8 && $self->{inserts};
	return $self->conditional_append($collection) if $kind < 0.9;
	return $self->expecting_append($collection);
}

# The decision is made on what was read before; it may be out of date by then.
sub conditional_append
{
	my ($self, $collection) = @_;
	my $tag = 'n:' . int rand 50;

	return undef unless $self->attempt("SELECT eventstore.head('$collection')");
	my $head = $self->{session}{rows}[0];
	return sprintf
	  "SELECT position FROM eventstore.append('%s', 't3', tags => '{%s}', fail_if => '[{\"tags\": [\"%s\"]}]', after => %s)",
	  $collection, $tag, $tag, $head;
}

sub expecting_append
{
	my ($self, $collection) = @_;
	my $stream = $self->random_stream;

	return undef
	  unless $self->attempt("SELECT coalesce((eventstore.peek('$collection', '$stream')).version, 0)");
	return $self->append_sql($collection, "stream => '$stream'",
		"expected_version => $self->{session}{rows}[0]");
}

# Appends at random; the positions, or undef where it failed.
sub append_something
{
	my ($self, $collection) = @_;
	my $sql = $self->random_append($collection);

	return undef unless defined $sql && $self->attempt($sql);
	return [ map { "$collection $_" } $self->{session}->rows ];
}

sub short_pause
{
	my ($self) = @_;

	usleep(rand(2 * $self->{pause}) * 1_000_000) if $self->{pause} > 0;
	return;
}

sub write_alone
{
	my ($self) = @_;
	my $positions = $self->append_something(pick(@{ $self->{collections} }));

	return unless $positions;
	$self->note_line(map { ("seen $_", "kept $_") } @$positions);
	$self->{written} += @$positions;
	return;
}

# The steps within a transaction; undef as soon as one of them failed.
sub write_steps
{
	my ($self, $steps) = @_;
	my @kept;

	foreach my $step (1 .. $steps)
	{
		my $savepoint = rand() < 0.3;
		my $positions;

		return undef if $savepoint && !$self->attempt('SAVEPOINT s');
		$positions = $self->append_something(pick(@{ $self->{collections} }));
		$self->note_line(map { "seen $_" } @$positions) if $positions;
		$self->short_pause if rand() < 0.5;
		if ($savepoint && (!$positions || rand() < 0.5))
		{
			return undef unless $self->attempt('ROLLBACK TO s');
			$self->note_line(map { "gone $_" } @{ $positions // [] });
			next;
		}
		return undef unless $positions;
		push @kept, @$positions;
	}
	return \@kept;
}

sub write_transaction
{
	my ($self) = @_;
	my $kept;

	# What is not flushed at commit may be lost with the server: no ack then.
	my $async = rand() < $self->{async};
	my $level = rand() < 0.9 ? 'READ COMMITTED' : pick('REPEATABLE READ', 'SERIALIZABLE');

	$self->attempt("BEGIN ISOLATION LEVEL $level");
	$self->attempt('SET LOCAL synchronous_commit = off') if $async;
	$kept = $self->write_steps(1 + int rand 4);
	if (!$kept || rand() < 0.15)
	{
		$self->attempt('ROLLBACK');
		$self->note_line(map { "gone $_" } @{ $kept // [] });
		return;
	}
	if (!$self->attempt('COMMIT'))
	{
		$self->note_line(map { "gone $_" } @$kept);
		return;
	}
	return if $async;
	$self->note_line(map { "kept $_" } @$kept);
	$self->{written} += @$kept;
	return;
}

# A writer: until it has written so many events, or writing is over.
sub start_writer
{
	my ($self, $events) = @_;

	return $self->start_worker($self->{writers}, sub {
		my $flag = $self->flag_file('stop_writing');

		$self->connect;
		$self->{written} = 0;
		while (!-e $flag && (!defined $events || $self->{written} < $events))
		{
			rand() < 0.5 ? $self->write_alone : $self->write_transaction;
		}
	});
}

# ---- readers -----------------------------------------------------------------

# Each kind: how the next positions are asked for, after a cursor.  The answer's
# rows are positions, in order; a row "head N" says where to go on at least.
my %readers = (
	# What the documentation tells a reader to do: the head first, then read.
	committed => sub {
		my ($self, $collection, $after) = @_;
		$self->attempt("SELECT 'head', eventstore.head('$collection')") or return;
		my @head = $self->{session}->rows;
		$self->attempt("SELECT position FROM eventstore.read('$collection', $after)") or return;
		return ($self->{session}->rows, @head);
	},
	# One snapshot for the whole transaction.
	repeatable => sub {
		my ($self, $collection, $after) = @_;
		return $self->read_in('REPEATABLE READ', $collection, $after);
	},
	serializable => sub {
		my ($self, $collection, $after) = @_;
		return $self->read_in('SERIALIZABLE', $collection, $after);
	},
	# Pages of a scan that stops early.
	pages => sub {
		my ($self, $collection, $after) = @_;
		$self->attempt("SELECT position FROM eventstore.read('$collection', after => $after) LIMIT 100") or return;
		return $self->{session}->rows;
	},
	# A function call that is no scan, with max_count.
	counted => sub {
		my ($self, $collection, $after) = @_;
		$self->attempt("SELECT (eventstore.read('$collection', $after, 100)).position") or return;
		return $self->{session}->rows;
	},
	# A cursor left open while others append: it shows one state.
	cursor => sub {
		my ($self, $collection, $after) = @_;
		my @rows;
		$self->attempt('BEGIN') or return;
		$self->attempt("DECLARE c CURSOR FOR SELECT position FROM eventstore.read('$collection', $after)");
		foreach my $fetch (1 .. 4)
		{
			$self->attempt('FETCH 200 FROM c');
			push @rows, $self->{session}->rows;
		}
		$self->attempt('COMMIT') or return;
		return @rows;
	},
	# One prepared statement for ever, in transactions that are kept open a while.
	prepared => sub {
		my ($self, $collection, $after) = @_;
		my @rows;
		$self->attempt("PREPARE r (bigint) AS SELECT position FROM eventstore.read('$collection', \$1)")
		  unless $self->{prepared}++;
		$self->attempt('BEGIN') or return;
		foreach my $round (1 .. 3)
		{
			$self->attempt("EXECUTE r ($after)");
			push @rows, $self->{session}->rows;
			$after = $rows[-1] if @rows;
		}
		$self->attempt('COMMIT') or return;
		return @rows;
	},
	# Some of the events; the head says how far the others may be passed.
	tagged => sub {
		my ($self, $collection, $after) = @_;
		$self->attempt("SELECT 'head', eventstore.head('$collection')") or return;
		my @head = $self->{session}->rows;
		$self->attempt("SELECT position FROM eventstore.read('$collection', $after, tags => '{color:red}')") or return;
		return ($self->{session}->rows, @head);
	},
);

sub read_in
{
	my ($self, $level, $collection, $after) = @_;

	my @rows;

	$self->attempt("BEGIN ISOLATION LEVEL $level READ ONLY") or return;
	foreach my $sql ("SELECT position FROM eventstore.read('$collection', $after)",
		"SELECT 'head', eventstore.head('$collection')")
	{
		if (!$self->attempt($sql))
		{
			$self->attempt('ROLLBACK');
			return;
		}
		push @rows, $self->{session}->rows;
	}
	# What a serializable transaction read counts once it has committed.
	$self->attempt('COMMIT') or return;
	return @rows;
}

# The position up to which readers have to come before they may end.
sub read_target
{
	my ($self, $collection) = @_;
	my $file = $self->flag_file("target.$collection");

	return undef unless -e $file;
	return PostgreSQL::Test::Utils::slurp_file($file);
}

# Reads in a loop until told that writing is over, and all has been read.
sub start_reader
{
	my ($self, $kind, $collection, %options) = @_;
	my $read = $readers{$kind} or croak "no reader is called $kind";
	my $after = $options{after} // 0;

	return $self->start_worker($self->{readers}, sub {
		$self->connect;
		while (1)
		{
			my $target = $self->read_target($collection);
			my @lines;

			foreach my $row ($read->($self, $collection, $after))
			{
				if ($row =~ /^head\|(\d+)$/)
				{
					$after = $1 if $1 > $after;
					next;
				}
				push @lines, "read $collection $row";
				push @lines, "error order $collection: $row after $after" if $row <= $after;
				$after = $row;
			}
			$self->note_line(@lines, "cursor $collection $after");
			last if defined $target && $after >= $target;
			usleep(2000) if !@lines;
		}
	});
}

# Follows each stream by its versions.
sub start_stream_reader
{
	my ($self, $collection) = @_;

	return $self->start_worker($self->{readers}, sub {
		my %version;

		$self->connect;
		while (1)
		{
			my $target = $self->read_target($collection);

			$self->attempt("SELECT stream, version FROM eventstore.streams('$collection')") or next;
			foreach my $row ($self->{session}->rows)
			{
				my ($stream, $newest) = split /\|/, $row;
				my $from = ($version{$stream} // 0) + 1;

				next if $newest < $from;
				$self->attempt("SELECT version, position FROM eventstore.read_stream('$collection', '$stream', $from)") or next;
				foreach my $event ($self->{session}->rows)
				{
					my ($n, $position) = split /\|/, $event;
					$self->note_line("error version $collection $stream: $n, expected $from") if $n != $from;
					$self->note_line("read $collection $position");
					$from = $n + 1;
				}
				$version{$stream} = $from - 1;
			}
			last if defined $target;
		}
	});
}

# Listens, and reads from the head that listen() returned, or from a cursor that
# was kept; then only when told that there is more, so that a notification which
# is lost is missed.
sub start_listener
{
	my ($self, $collection, %options) = @_;

	return $self->start_worker($self->{readers}, sub {
		my ($channel, $told, $after);

		$self->{session} = EventstoreTest::Listener->new($self->{node}, dbname => $self->{dbname},
			application_name => "load $self->{number}");
		($channel, $told) = $self->{session}->listen($collection);
		$after = $options{after} // $told;
		$self->note_line("listening $collection $after");
		while (1)
		{
			my $target = $self->read_target($collection);

			foreach my $note ($self->{session}->notes)
			{
				$told = $note->{said}{head} if $note->{said}{head} > $told;
			}
			if ($told > $after)
			{
				my @rows;

				$self->attempt("SELECT position FROM eventstore.read('$collection', $after)") or next;
				@rows = $self->{session}->rows;
				$after = $_ > $after ? $_ : $after foreach $told, @rows;
				$self->note_line((map { "read $collection $_" } @rows), "cursor $collection $after");
			}
			last if defined $target && $after >= $target;
			usleep(1000);
		}
	});
}

# Reads in a loop on the server, without a pause and without a client between
# two reads: what can go wrong between taking the head and the snapshot, in a
# microsecond, it meets soonest.  What it read it leaves in a table.
sub start_follower
{
	my ($self, $collection) = @_;
	my $number = $self->{workers} + 1;

	$self->{node}->safe_psql($self->{dbname}, q{
		CREATE UNLOGGED TABLE IF NOT EXISTS load_followed (follower int, n bigint, position bigint);
		CREATE UNLOGGED TABLE IF NOT EXISTS load_target (collection text, position bigint);
	});
	return $self->start_worker($self->{readers}, sub {
		$self->connect;
		# One statement as long as all the others together.
		$self->{session}{deadline} *= 10;
		$self->attempt(qq{
			DO \$\$
			DECLARE
				target bigint;
				cursor_at bigint := 0;
				n bigint := 0;
				event bigint;
			BEGIN
				LOOP
					SELECT position INTO target FROM load_target WHERE collection = '$collection';
					FOR round IN 1 .. 100 LOOP
						FOR event IN SELECT position FROM eventstore.read('$collection', after => cursor_at) LOOP
							n := n + 1;
							INSERT INTO load_followed VALUES ($number, n, event);
							cursor_at := event;
						END LOOP;
					END LOOP;
					COMMIT;
					EXIT WHEN cursor_at >= target;
				END LOOP;
			END \$\$});
		$self->attempt("SELECT position FROM load_followed WHERE follower = $number ORDER BY n");
		$self->note_line(map { "read $collection $_" } $self->{session}->rows);
	});
}

# ---- the end, and the records ------------------------------------------------

# Waits for processes; how many of them did not end well.
sub wait_for
{
	my ($self, $list) = @_;
	my $failed = 0;

	foreach my $pid (@$list)
	{
		waitpid $pid, 0;
		$failed++ if $? != 0;
	}
	@$list = ();
	return $failed;
}

# For writers that write until they are told.
sub stop_writers
{
	my ($self) = @_;

	$self->raise_flag('stop_writing');
	return $self->wait_for($self->{writers});
}

# Waits for the writers, which know how much they are to write; then the readers
# may end as soon as they have read everything.
sub finish
{
	my ($self) = @_;
	my $failed = $self->wait_for($self->{writers});

	return $failed + $self->finish_readers;
}

sub finish_readers
{
	my ($self) = @_;

	foreach my $collection (@{ $self->{collections} })
	{
		my $target = $self->{node}->safe_psql($self->{dbname}, "SELECT coalesce(max(position), 0) FROM $collection");

		$self->raise_flag("target.$collection", $target);
		$self->{node}->psql($self->{dbname}, "INSERT INTO load_target VALUES ('$collection', $target)");
	}
	return $self->wait_for($self->{readers});
}

# The server is gone, and so will they be; what they knew is in the records.
sub wait_for_all
{
	my ($self) = @_;

	$self->wait_for($self->{writers});
	$self->wait_for($self->{readers});
	return;
}

# The lines of one kind of all records, or of one worker's.
sub lines
{
	my ($self, $word, $number) = @_;
	my @lines;

	foreach my $n (defined $number ? $number : 1 .. $self->{workers})
	{
		my $file = "$self->{dir}/record.$n";

		next unless -e $file;
		push @lines, map { /^$word (.*)$/ ? $1 : () } split /\n/, PostgreSQL::Test::Utils::slurp_file($file);
	}
	return @lines;
}

sub positions_of
{
	my ($self, $word, $collection, $number) = @_;
	return map { /^$collection (\d+)$/ ? $1 : () } $self->lines($word, $number);
}

1;
