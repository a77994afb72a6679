# A refused statement leaves no secret in the server's log, and a dump brings
# servers and user mappings over.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('kafka', settings => ['log_statement = none', 'log_min_error_statement = error']);
my $dir  = PostgreSQL::Test::Utils::tempdir();

$node->safe_psql('postgres', q{
	CREATE ROLE app;
	CREATE SERVER k FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("bootstrap.servers" 'h:1', "ssl.ca.location" '/etc/ca.pem', "fetch.wait.max.ms" '5');
	CREATE USER MAPPING FOR app SERVER k OPTIONS ("sasl.username" 'me', "sasl.password" E'it\'s-hushed "\\=,');
	GRANT USAGE ON FOREIGN SERVER k TO app;
});

# ---- the log --------------------------------------------------------------------------

for my $statement (
	q{CREATE USER MAPPING FOR PUBLIC SERVER k OPTIONS ("sasl.password" E'very-hushed\x01')},
	q{CREATE USER MAPPING FOR PUBLIC SERVER k OPTIONS ("ssl.key.pem" 'very-hushed')},
	q{CREATE USER MAPPING FOR PUBLIC SERVER k OPTIONS ("sasl.password" 'very-hushed', "no.such" 'x')},
	q{CREATE USER MAPPING FOR PUBLIC SERVER k OPTIONS ("sasl.pasword" 'very-hushed')},
	q{ALTER USER MAPPING FOR app SERVER k OPTIONS (SET "sasl.password" ' very-hushed')},
	q{ALTER SERVER k OPTIONS (ADD "sasl.password" 'very-hushed')},
	q{CREATE SERVER k2 FOREIGN DATA WRAPPER eventstore_kafka OPTIONS ("sasl.password" 'very-hushed')},
	q{DO $$BEGIN ALTER SERVER k OPTIONS (ADD "sasl.password" 'very-hushed'); END$$})
{
	my ($status, $out, $err) = $node->psql('postgres', $statement);
	isnt($status, 0, "refused: $statement");
	$err =~ s/^.*CONTEXT:.*$//mg;
	unlike($err, qr/hushed/, 'without its secret in the message');
}
my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile);
like($log, qr/invalid value for Kafka property/, 'the log has what was wrong');
unlike($log, qr/hushed/, 'and no secret');

# ---- a dump ---------------------------------------------------------------------------

$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), '-f', "$dir/dump.sql" ], 'dumped');
$node->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE template0');
$node->command_ok([ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('copy'), '-f', "$dir/dump.sql" ], 'restored');
my $options = q{SELECT (SELECT array_agg(o ORDER BY o) FROM unnest(s.srvoptions) o), m.usename, (SELECT array_agg(o ORDER BY o) FROM unnest(m.umoptions) o), s.srvacl FROM pg_user_mappings m JOIN pg_foreign_server s ON s.oid = m.srvid};
my $before  = $node->safe_psql('postgres', $options);
like($before, qr/it's-hushed/, 'there is something to bring over');
is($node->safe_psql('copy', $options), $before, 'as it was');

done_testing();
