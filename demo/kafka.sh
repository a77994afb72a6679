# shellcheck shell=bash
# shellcheck disable=SC2154  # repo and work are of test/bin/cluster.sh
# The part of the demo that needs a Kafka; sourced by demo/run.
#
#   run_kafka   the flights go through a topic into a store of the latest state of
#               each aircraft, while a second psql watches.  In the middle the
#               worker is killed; at the end the store is dropped, and restored
#               from its changelog topic.  Each time its counts must be the CSV's.
#   end_kafka   ends what that has started
#
# The Kafka is the real one where there is a Java to run it, and its jars are
# there or Maven fetches them; else, or with DEMO_MOCK=1, librdkafka's mock, in a
# process of its own.

partitions=4
kafka_limit_seconds=120
kafka_folder=
watcher=
address=

kafka_client()
{
	"$repo/test/kafka/client" -b "$address" -t "$kafka_limit_seconds" "$@"
}

# It ends when the script does, which holds the other end of its input.
start_mock()
{
	coproc mock { exec "$repo/test/kafka/mock_broker"; }
	read -r -u "${mock[0]}" address
}

create_topic()
{
	local answer
	if [ -n "$kafka_folder" ]; then
		kafka_client create "$1" "$partitions"
	else
		echo "topic $1 $partitions" >&"${mock[1]}"
		read -r -u "${mock[0]}" answer
		[ "$answer" = ok ] || die "the mock broker: $answer"
	fi
}

start_kafka()
{
	local broker=$repo/test/kafka/broker version
	version=$(sed -n 's/^versions=(\([^ )]*\).*/\1/p' "$broker")
	build test/kafka/mock_broker test/kafka/client
	if [ "${DEMO_MOCK:-0}" != 1 ] && command -v java >/dev/null &&
		"$broker" jars "$version" >"$work/broker.log" 2>&1; then
		kafka_folder=$work/kafka
		address=$("$broker" start "$kafka_folder" 2>>"$work/broker.log") || kafka_folder=
	fi
	if [ -n "$kafka_folder" ]; then
		say "Apache Kafka $version at $address"
	else
		start_mock
		say "librdkafka's mock of a Kafka at $address"
	fi
	create_topic flights
	create_topic aircraft-changelog
}

end_watch()
{
	[ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
	watcher=
}

end_kafka()
{
	end_watch
	[ -z "$kafka_folder" ] || "$repo/test/kafka/broker" kill "$kafka_folder" || true
}

ask()
{
	psql -XAtq -d demo -c "$1"
}

# await_success COMMAND...: tried until it succeeds.
await_success()
{
	local limit=$((SECONDS + kafka_limit_seconds))
	until "$@"; do
		[ "$SECONDS" -lt "$limit" ] || die "this did not become true: $*" \
			"$(cat "$work/refused" 2>/dev/null)" "the listener was told this:" "$(tail "$work/watched" 2>/dev/null)"
		sleep 0.05
	done
}

# A server that is starting again says nothing yet.
is_true()
{
	[ "$(ask "$1" 2>"$work/refused")" = t ]
}

# Listens to the store, and again when the server has been away.  psql shows what
# it was told after each command, so it is kept busy.
watch_store()
{
	local psql=
	trap 'kill "$psql" 2>/dev/null; exit' TERM
	while :; do
		psql -XAt -v ON_ERROR_STOP=1 -d demo -f <(
			echo "SELECT channel, head FROM eventstore.listen('aircraft');"
			yes 'SELECT pg_sleep(0.1) \g /dev/null'
		) >>"$work/watched" 2>/dev/null &
		psql=$!
		wait "$psql" || sleep 0.2
	done
}

# The head in the last notification, or in the last answer of listen().
last_heard()
{
	sed -n 's/.*"head": \([0-9]*\).*/\1/p; s/^[^|]*|\([0-9]*\)$/\1/p' "$work/watched" | tail -n 1
}

# has_heard PATTERN: the listener was told something like it.
has_heard()
{
	grep -q "$1" "$work/watched" 2>/dev/null
}

has_heard_last()
{
	[ "$(last_heard)" = "$1" ]
}

show_watched()
{
	local head
	head=$(ask "SELECT eventstore.head('aircraft_changelog')")
	await_success has_heard_last "$head"
	say "the second psql was notified $(grep -c '^Asynchronous' "$work/watched") times; the last time:"
	grep '^Asynchronous' "$work/watched" | tail -n 1
}

# The worker goes without a word, once the listener has heard of what it does:
# PostgreSQL then restarts all of its processes.
kill_worker()
{
	local pid
	await_success has_heard '^Asynchronous'
	await_success is_true "SELECT pid IS NOT NULL FROM eventstore.sources"
	pid=$(ask "SELECT pid FROM eventstore.sources")
	say "kill -9 $pid: the worker, at $(ask 'SELECT sum(position) FROM eventstore.source_partitions') records"
	kill -9 "$pid"
	await_success is_true "SELECT pid IS NOT NULL AND pid <> $pid FROM eventstore.sources"
	say "the server is back; the worker goes on at $(ask 'SELECT sum(position) FROM eventstore.source_partitions')"
}

# What was published when the worker was killed may be there twice.
await_changelog_topic()
{
	await_success is_true "SELECT changelog_lag = 0 FROM eventstore.sources"
	say "the store's changelog has $(ask 'SELECT count(*) FROM aircraft_changelog') events," \
		"the changelog topic $(kafka_client watermarks aircraft-changelog | awk '{ sum += $3 } END { print sum }') records"
}

run_kafka()
{
	echo
	echo '### 8. The same flights through Kafka: the latest state of each aircraft'
	echo
	start_kafka
	run_sql demo/kafka_setup.sql -v address="$address" -v topic_file="$work/records"
	say "producing $(wc -l <"$work/records") flights to the topic, keyed by tail number"
	kafka_client -X compression.type=zstd -X partitioner=murmur2_random -X linger.ms=20 \
		produce flights <"$work/records"
	run_sql demo/kafka_store.sql
	watch_store &
	watcher=$!
	await_success has_heard '|[0-9]*$'
	run_sql demo/kafka_source.sql
	kill_worker
	run_sql demo/kafka_check.sql
	show_watched
	end_watch
	await_changelog_topic
	say "the store is dropped, with its source; then both anew"
	run_sql demo/kafka_drop.sql
	run_sql demo/kafka_store.sql
	run_sql demo/kafka_source.sql
	run_sql demo/kafka_check.sql
	ask "SELECT 'restored: ' || sum(position) || ' records of the changelog topic, and ' || records - sum(position) || ' of the topic' FROM eventstore.source_partitions p JOIN eventstore.sources s ON s.name = p.source WHERE p.topic = s.changelog_topic GROUP BY records"
}
