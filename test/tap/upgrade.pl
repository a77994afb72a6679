# pg_upgrade brings collections over, with all that belongs to the extension.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $old = new_server('old');
$old->safe_psql('postgres', q{
	CREATE ROLE app;
	GRANT CREATE ON SCHEMA public TO app;
	SET ROLE app;
	SELECT eventstore.create_collection('orders', segment_size => 100, retain_for => '400 days');
	SELECT count(*) FROM eventstore.append_batch('orders', (SELECT jsonb_agg(jsonb_build_object('type', 'e', 'stream', 's' || i % 3, 'tags', '["t"]'::jsonb)) FROM generate_series(1, 1000) i));
	SELECT eventstore.truncate_before('orders', 301);
});
await_gone($old, 'orders_201');
my $events = "SELECT count(*), min(position), max(position), md5(string_agg(e::text, ',' ORDER BY position)) FROM orders e";
my $before = $old->safe_psql('postgres', $events);
$old->stop;

my $new = new_server('new', extension => 0);
$new->stop;
chdir PostgreSQL::Test::Utils::tempdir();
$new->command_ok([
		'pg_upgrade', '--no-sync', '-d', $old->data_dir, '-D', $new->data_dir,
		'-b', $old->config_data('--bindir'), '-B', $new->config_data('--bindir'),
		'-s', $new->host, '-p', $old->port, '-P', $new->port ],
	'pg_upgrade succeeds');
$new->start;

sub answer
{
	my ($sql) = @_;
	return $new->safe_psql('postgres', $sql);
}

is(answer($events), $before, 'the same events');
is(answer('SELECT collection, segment_size, retain_for FROM eventstore.collections'), 'orders|100|400 days', 'the same options');
cmp_ok(answer("SELECT position FROM eventstore.append('orders', 'x')"), '>', 1000, 'the next position is beyond them');
is(answer("SELECT version FROM eventstore.append('orders', 'x', stream => 's1', expected_version => 334)"), 335, 'versions go on');
is(sqlstate_of($new, "SELECT * FROM eventstore.read('orders', after => 3)"), 'LG005', 'what was truncated stays so');
is(answer("SET ROLE app; SELECT count(*) FROM eventstore.read('orders', tags => '{t}')"), 700, 'others find them by tag');
is(answer(q{SELECT count(*) FROM eventstore.append_batch('orders', (SELECT jsonb_agg('{"type": "more"}'::jsonb) FROM generate_series(1, 1000)))}), 1000, 'segments are made');
is_clean($new, 'orders');
is(answer('DROP TABLE orders; DROP EXTENSION eventstore; SELECT count(*) FROM pg_namespace WHERE nspname = $$eventstore$$'), 0, 'the schema belongs to the extension still');

$new->stop;
no_crash($_) foreach $old, $new;
done_testing();
