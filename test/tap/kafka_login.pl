# Sources that have to log in: TLS, SASL, passwords and rights that are wrong and
# become right.  What is secret is in no view and no log.
use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/lib";

use EventstoreTest;
use EventstoreTest::Kafka;
use PostgreSQL::Test::Utils;
use Test::More;

my $kafka = kafka_broker();
my $node = new_server('login', settings => [ 'max_worker_processes = 24', 'eventstore.maintenance_interval = 200ms' ]);

sub query { return $node->safe_psql('postgres', $_[0]); }

# The options of a server or of a user mapping, of those that are its own.
sub options
{
	my ($wanted, %properties) = @_;
	my @own = grep { /password|ssl\.key|username|certificate\.pem/ xor $wanted eq 'server' } sort keys %properties;
	return join ', ', map { qq("$_" ') . ($properties{$_} =~ s/'/''/gr) . q(') } @own;
}

sub make_server
{
	my ($name, $way, $user) = @_;
	my %properties = $kafka->inline_properties($way, $user);

	query("CREATE SERVER $name FOREIGN DATA WRAPPER eventstore_kafka OPTIONS (" . options('server', %properties) . ')');
	query("CREATE USER MAPPING FOR CURRENT_USER SERVER $name OPTIONS (" . options('mapping', %properties) . ')');
	return;
}

sub make_source
{
	my ($name) = @_;

	query("SELECT eventstore.create_store('$name', 'text')");
	query("SELECT eventstore.create_source('$name', '$name', 't', '$name')");
	return;
}

sub await_state
{
	my ($name, $state) = @_;

	await_true($node, "SELECT state = '$state' FROM eventstore.sources WHERE name = '$name'");
	pass("$name: $state");
	return;
}

sub reads
{
	my ($name, $key) = @_;

	await_true($node, "SELECT count(*) = 1 FROM $name WHERE key = '$key'");
	pass("$name reads");
	return;
}

$kafka->create_topic('t', 1);
$kafka->produce('t', [ 'a', '1' ]);

# ---- each way in ------------------------------------------------------------------------

foreach my $way ('scram', 'plain', 'tls')
{
	make_server($way, $way, 'admin');
	make_source($way);
	reads($way, 'a');
}

# ---- a wrong password, and the right one ----------------------------------------------------

query("ALTER USER MAPPING FOR CURRENT_USER SERVER plain OPTIONS (SET \"sasl.password\" 'not-the-secret')");
await_state('plain', 'denied');
query("ALTER USER MAPPING FOR CURRENT_USER SERVER plain OPTIONS (SET \"sasl.password\" 'admin-secret')");
await_state('plain', 'running');
$kafka->produce('t', [ 'b', '1' ]);
reads('plain', 'b');

# ---- rights on the topic; none are needed on a group ------------------------------------------

make_server('alice', 'plain', 'alice');
make_source('alice');
await_state('alice', 'denied');
$kafka->allow('alice', 'describe', 'topic', 't');
$kafka->allow('alice', 'read',     'topic', 't');
reads('alice', 'b');
await_state('alice', 'running');

# ---- but by a member of one, and by who publishes for it ---------------------------------------

$kafka->create_topic('t-changelog', 1);
query("SELECT eventstore.create_store('member', 'text')");
query("SELECT eventstore.create_source('member', 'alice', 't', 'member', group_id => 'g', changelog_topic => 't-changelog')");
await_state('member', 'denied');
$kafka->allow('alice', $_, 'topic', 't-changelog') foreach 'describe', 'read', 'write';
$kafka->allow('alice', 'read', 'group', 'g');
reads('member', 'b');
await_state('member', 'running');
await_true($node, "SELECT changelog_state = 'denied' AND changelog_message ~* 'transactional' FROM eventstore.sources WHERE name = 'member'");
pass('its changes cannot be published');
query("ALTER USER MAPPING FOR CURRENT_USER SERVER alice OPTIONS (SET \"sasl.username\" 'admin', SET \"sasl.password\" 'admin-secret')");
await_true($node, "SELECT changelog_state = 'running' AND changelog_lag = 0 FROM eventstore.sources WHERE name = 'member'");
is(scalar(grep { $_->{key} eq 'b' } $kafka->consume('t-changelog')), 1, 'with the right to the transactional id they are');

# ---- a client that the broker does not know ------------------------------------------------------

query("ALTER USER MAPPING FOR CURRENT_USER SERVER tls OPTIONS (DROP \"ssl.key.pem\", DROP \"ssl.certificate.pem\")");
await_true($node, "SELECT state IN ('disconnected', 'denied') FROM eventstore.sources WHERE name = 'tls'");
pass('no certificate: not connected');

# ---- nothing secret is to be seen --------------------------------------------------------------------

my $log = slurp_file($node->logfile);
unlike($log, qr/FATAL|PANIC|signal/, 'no process fails because of all that');
is(query("SELECT count(*) FROM eventstore.kafka_log WHERE message ~ 'admin-secret|not-the-secret|alice-secret|PRIVATE KEY'"), '0', 'no secret in kafka_log');
unlike($log, qr/^.*(?:LOG|DETAIL|WARNING|ERROR):.*(?:admin-secret|not-the-secret|alice-secret|PRIVATE KEY)/m, 'nor in the log');
is(query("SELECT count(*) FROM eventstore.sources WHERE message ~ 'secret'"), '0', 'nor in a message');

$node->stop;
no_crash($node);
done_testing();
