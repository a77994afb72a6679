"""What goes through a source or a sink, how fast, and how late."""
import statistics
import subprocess
import time

import psycopg
from lib import cpu, kafka_streams, options, report, server
from lib.kafka_topic import KEYS, RIG, SIZE_BYTES, Broker, Grid, Topic

RECORDS = 200_000 if options.QUICK else 500_000
RESTORED_KEYS = [200_000] if options.QUICK else [1_000_000, 4_000_000] if options.LARGE else [1_000_000]
PINGS = 20 if options.QUICK else 300
LIMIT_SECONDS = 600


def await_answer(session, query, least):
    """Until the answer is so much; when it was asked, and the answer."""
    end = time.time() + LIMIT_SECONDS
    while time.time() < end:
        asked = time.time()
        answer = session.execute(query).fetchone()[0]
        if answer is not None and answer >= least:
            return asked, int(answer)
        time.sleep(0.005)
    raise SystemExit(f"not {least} after {LIMIT_SECONDS} s: {query}")


def connect():
    return psycopg.connect("", autocommit=True)


class Flow:
    """Records go from somewhere to somewhere; 'done' asks how many have.

    The clock starts with the first that are seen, and those do not count.  'later' asks
    whether all is done that is left to be done behind that.
    """

    def __init__(self, name, records, begin, done, end, later=None):
        self.name, self.records = name, records
        self.begin, self.done, self.end, self.later = begin, done, end, later
        self.cpu = self.seconds = self.later_seconds = None

    def run(self, postmaster):
        with connect() as session:
            session.execute("CHECKPOINT")
            created = time.time()
            session.execute(self.begin)
            began, first = await_answer(session, self.done, 1)
            used = cpu.seconds(postmaster)
            ended, last = await_answer(session, self.done, self.records)
            self.cpu = (cpu.seconds(postmaster) - used) / max(last - first, 1) * 1e6
            self.seconds = ended - created
            if self.later:
                await_answer(session, self.later, 1)
                self.later_seconds = time.time() - created
            for statement in self.end:
                session.execute(statement)
        return (last - first) / max(ended - began, 0.001)


def source(topic, target, **options_):
    """The last records are less than a batch: one does not want to measure how long they wait."""
    options_["flush_interval"] = "'100 ms'"
    more = "".join(f", {name} => {value}" for name, value in options_.items())
    return f"SELECT eventstore.create_source('s', 'bench', '{topic.name}', '{target}'{more});"


def into_collection(topic, title, **options_):
    return Flow(f"topic into a collection, {title}", topic.records,
                "SELECT eventstore.create_collection('log'); " + source(topic, "log", **options_),
                "SELECT eventstore.head('log')",
                ["SELECT eventstore.drop_source('s')", "SELECT eventstore.drop_collection('log')"])


def into_store(topic, title, changelog):
    return Flow(f"topic into a store, {title}", topic.records,
                f"SELECT eventstore.create_store('kv', changelog => {changelog}); " + source(topic, "kv"),
                "SELECT sum(position) FROM eventstore.source_partitions",
                ["SELECT eventstore.drop_source('s')", "SELECT eventstore.drop_store('kv')"])


def out_of_collection(topic, title, events, exactly_once):
    return Flow(f"collection to a topic, {title}", events,
                f"SELECT eventstore.create_sink('k', 'bench', '{topic}', 'events', exactly_once => {exactly_once})",
                "SELECT position FROM eventstore.sinks WHERE name = 'k'",
                ["SELECT eventstore.drop_sink('k')"])


def restore(grid, changelog):
    """A store without a changelog has no changelog topic, and reads it as its own, in batches as large."""
    read, more = ("nothing", f"changelog_topic => '{grid.name}'") if changelog else (grid.name, "flush_count => 100000")
    return Flow(f"restore of {grid.records:,} keys from a changelog topic" if changelog else
                f"the same {grid.records:,} records into a store without changelog", grid.records,
                f"SELECT eventstore.create_store('restored', changelog => {changelog}); "
                f"SELECT eventstore.create_source('r', 'bench', '{read}', 'restored', flush_interval => '100 ms', {more})",
                f"SELECT sum(position) FROM eventstore.source_partitions WHERE source = 'r' AND topic = '{grid.name}'",
                ["SELECT eventstore.drop_source('r')", "SELECT eventstore.drop_store('restored')"],
                "SELECT (backlog IS NULL)::int FROM eventstore.store_catalog WHERE store = 'restored'::regclass")


def streams_restore(grid):
    """Seconds from the start of a Kafka Streams program, whose store was filled and is gone, until it serves all.

    It was closed in good order, and its group waits for the session's time-out all the same.
    """
    for _ in ("filled", "restored"):
        began = time.time()
        program = kafka_streams.Program(grid, grid.expected, application=f"restored-{grid.records}")
        program.await_line("first", LIMIT_SECONDS)
        program.await_line("all", LIMIT_SECONDS)
        seconds = time.time() - began
        program.close()
    return seconds


def latency(broker):
    """Milliseconds from the call that produces a record to the first look that shows its value."""
    broker.client("create", "pings", 1)
    times = []
    with connect() as session:
        session.execute("SELECT eventstore.create_store('pinged', 'text')")
        session.execute("SELECT eventstore.create_source('p', 'bench', 'pings', 'pinged', flush_interval => '1 ms')")
        session.execute("SELECT eventstore.wait_for_source('p')")
        producer = subprocess.Popen([RIG / "client", "-b", broker.address, "-X", "linger.ms=0", "produce", "pings"],
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(PINGS):
            began = time.time()
            producer.stdin.write(f"key=k\tvalue={number}\n!flush\n")
            producer.stdin.flush()
            producer.stdout.readline()
            while session.execute("SELECT eventstore.get_text('pinged', 'k')").fetchone()[0] != str(number):
                pass
            times.append((time.time() - began) * 1000)
        producer.stdin.close()
        producer.wait()
        memory = cpu.peak_memory_mb(session.execute("SELECT pid FROM eventstore.sources WHERE name = 'p'").fetchone()[0])
        session.execute("SELECT eventstore.drop_source('p')")
        session.execute("SELECT eventstore.drop_store('pinged')")
    times.sort()
    return statistics.median(times), times[int(len(times) * 0.99)], memory


def restart(broker):
    """Seconds from the end of a worker to the first new record that the next one shows.

    Once: of several in a row each waits twice as long as the one before.
    """
    broker.client("create", "restarts", 1)
    with connect() as session:
        session.execute("SELECT eventstore.create_store('restarted', 'text')")
        session.execute("SELECT eventstore.create_source('again', 'bench', 'restarts', 'restarted', flush_interval => '1 ms')")
        session.execute("SELECT eventstore.wait_for_source('again')")
        began = time.time()
        session.execute("SELECT pg_terminate_backend(pid) FROM eventstore.sources WHERE name = 'again'")
        subprocess.run([RIG / "client", "-b", broker.address, "produce", "restarts"], check=True,
                       input="key=k\tvalue=1\n", stdout=subprocess.DEVNULL, text=True)
        ended, _ = await_answer(session, "SELECT length(eventstore.get_text('restarted', 'k'))", 1)
        session.execute("SELECT eventstore.drop_source('again')")
        session.execute("SELECT eventstore.drop_store('restarted')")
    return ended - began


def main():
    postmaster = int(server.sql("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)"))
    broker = Broker()
    server.sql(f"""CREATE SERVER bench FOREIGN DATA WRAPPER eventstore_kafka
        OPTIONS ("bootstrap.servers" '{broker.address}')""")
    topic = Topic(broker, 4, RECORDS)
    grids = [Grid(broker, 4, keys) for keys in RESTORED_KEYS]
    broker.client("create", "nothing", 4)
    broker.client("create", "out", 4)
    server.make_collection("events")
    server.fill("events", RECORDS, 10_000)

    as_tags = into_collection(topic, "the key as tag", key_as="'tag'")
    out = out_of_collection("out", "at least once", RECORDS, "false")
    restores = [restore(grid, True) for grid in grids]
    flows = [into_collection(topic, "the key as stream"),
             as_tags,
             into_collection(topic, "the same, batches of 50,000", key_as="'tag'", flush_count=50_000),
             into_store(topic, "with changelog", "true"),
             into_store(topic, "without changelog", "false"),
             out,
             out_of_collection("out", "exactly once", RECORDS, "true"),
             *[flow for grid, whole in zip(grids, restores) for flow in (whole, restore(grid, False))]]
    figures = report.measure({flow.name: lambda flow=flow: flow.run(postmaster) for flow in flows})
    lines = [[flow.name, report.median(figures, flow.name), f"{flow.cpu:.1f}", f"{flow.seconds:.1f}"] for flow in flows]
    kafka_streams.build()
    ready = [[f"{grid.records:,} keys", flow.seconds, streams_restore(grid), flow.later_seconds] for grid, flow in zip(grids, restores)]
    middle, late, memory = latency(broker)
    again = restart(broker)
    report.write("kafka_flow", "Kafka: what goes through", [
        f"Records of {SIZE_BYTES} bytes, JSON, {KEYS:,} keys, 4 partitions; events of 100 bytes with three tags in"
        " 10,000 streams. CPU is PostgreSQL's, without the broker's; it and the seconds, from the"
        " call that creates the source or sink, are of the last round.",
        report.table(["flow", "records/s", "CPU seconds per million", "seconds in all"], lines),
        report.table(["from the start until a restored store serves all, seconds", "eventstore", "Kafka Streams, RocksDB",
                      "eventstore, recorded in its changelog, too"],
                     [[keys, f"{ours:.1f}", f"{streams:.1f}", f"{later:.1f}"] for keys, ours, streams, later in ready]),
        report.table(["produced to visible, one record at a time, flush_interval 1 ms", "ms"],
                     [["median", f"{middle:.1f}"], ["99 %", f"{late:.1f}"],
                      ["worker's peak memory, MB, shared memory included", f"{memory:.0f}"],
                      ["from the end of a worker to a new record, no restore", f"{again * 1000:.0f}"]])],
        [["topic into a collection", report.at_least(figures, as_tags.name, 250_000), "250,000/s"],
         ["collection to a topic", report.at_least(figures, out.name, 200_000), "200,000/s"],
         *[[f"restore, {grid.records:,} keys", report.at_least(figures, flow.name, 400_000), "400,000/s"]
           for grid, flow in zip(grids, restores)],
         *[[f"{keys} restored, ready", report.verdict(f"{ours:.1f} s", ours < streams),
            f"before Kafka Streams, {streams:.1f} s"] for keys, ours, streams, _ in ready],
         ["a worker's restart", report.verdict(f"{again:.2f} s", again < 1), "1 s"],
         ["produced to visible", report.verdict(f"{middle:.1f} ms", middle < 15), "15 ms"]])


main()
