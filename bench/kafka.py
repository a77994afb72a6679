"""A topic's latest value of each key in PostgreSQL: a source into a store, beside what one would use instead."""
import os
import pathlib
import subprocess
import tempfile
import time

import psycopg
from lib import cpu, kafka_streams, options, report, server
from lib.kafka_topic import KEYS, SIZE_BYTES, Broker, Topic

HERE = pathlib.Path(__file__).parent
BUILD = HERE.parent / "build/bench"
RECORDS = [200_000] if options.QUICK else [500_000, 5_000_000] if options.LARGE else [500_000]
PARTITIONS = [1, 4]
LIMIT_SECONDS = 120 if options.QUICK else 900


# ---- the contenders --------------------------------------------------------------------

class Contender:
    """Keeps table `kept` (key, value), with a program of its own or without."""
    name = None
    number = "(value->>'i')::bigint"
    process = None
    least_partitions = 1

    def build(self):
        """Once, before all."""

    def start(self, topic):
        raise NotImplementedError

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None
        server.sql("DROP TABLE IF EXISTS kept, kept_offsets")

    def run(self, *command):
        with open(BUILD / f"kafka-{type(self).__name__.lower()}.log", "w") as log:
            self.process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL, text=True)

    def await_first(self, session, topic):
        """Until it shows something; when it was."""
        return self.await_answer(session, "SELECT 1 FROM kept LIMIT 1")

    def done(self, session):
        """How many records have come; 0 where that is not known, which is in the contender's favour."""
        return 0

    def await_all(self, session, topic):
        """The last record of each partition first, because that is cheap to ask for."""
        for key, number in topic.last:
            self.await_answer(session, f"SELECT 1 FROM kept WHERE key = '{key}' AND {self.number} = {number}")
        return self.await_answer(session, f"SELECT count(*), sum({self.number})::bigint FROM kept",
                                 topic.expected)

    def await_answer(self, session, query, wanted=None):
        """Until it has a row, or the row wanted; when it was asked."""
        end = time.time() + LIMIT_SECONDS
        found = None
        while time.time() < end:
            asked = time.time()
            try:
                found = session.execute(query).fetchone()
            except psycopg.errors.UndefinedTable:
                pass
            if found is not None and wanted in (None, found):
                return asked
            self.check()
            time.sleep(0.01)
        raise SystemExit(f"{self.name}: not done after {LIMIT_SECONDS} s: {query} is {found}, not {wanted}")

    def pid(self):
        return self.process.pid if self.process else None

    def check(self):
        if self.process and self.process.poll() is not None:
            raise SystemExit(f"{self.name} has ended; see build/bench/kafka-{type(self).__name__.lower()}.log")


class Eventstore(Contender):
    name = "eventstore, a source into a store"
    remark = ""
    # A batch is as large as the Go program's, and what is less than one waits as long.
    batch = 10_000

    def options(self):
        return f"flush_count => {self.batch}, flush_interval => '100 ms'"

    def start(self, topic):
        server.sql(f"""
            SELECT eventstore.create_store('kept', changelog => false);
            CREATE SERVER kept_server FOREIGN DATA WRAPPER eventstore_kafka
                OPTIONS ("bootstrap.servers" '{topic.broker.address}');
        """)
        self.create_sources(topic)

    def create_sources(self, topic):
        server.sql(f"SELECT eventstore.create_source('kept_source', 'kept_server', '{topic.name}', 'kept', {self.options()})")

    def done(self, session):
        return int(session.execute("SELECT sum(position) FROM eventstore.source_partitions").fetchone()[0])

    def stop(self):
        server.sql("""
            SELECT eventstore.drop_source(name) FROM eventstore.sources;
            DROP SERVER kept_server;
            SELECT eventstore.drop_store('kept');
        """)


class Pair(Eventstore):
    name = "eventstore, two sources with half of the partitions each"
    remark = ", two sources"
    least_partitions = 2

    def create_sources(self, topic):
        server.sql(f"""
            SELECT eventstore.create_source('kept_source_' || n, 'kept_server', '{topic.name}', 'kept', {self.options()},
                partitions => (SELECT array_agg(p) FROM generate_series(n, {topic.partitions - 1}, 2) p))
            FROM generate_series(0, 1) n
        """)


class Large(Eventstore):
    name = "eventstore, batches of 50,000"
    remark = ", batches of 50,000"
    batch = 50_000


class LargePair(Pair):
    name = "eventstore, two sources with half of the partitions each, batches of 50,000"
    remark = ", two sources, batches of 50,000"
    batch = 50_000


class Go(Contender):
    name = "Go: franz-go, pgx, COPY and merge"

    def build(self):
        subprocess.run(["go", "build", "-o", BUILD / "kafka-go", "."], cwd=HERE / "kafka/go", check=True,
                       env=dict(os.environ, GOTOOLCHAIN="local", GOFLAGS="-mod=readonly"))

    def start(self, topic):
        server.sql("CREATE TABLE kept (key text COLLATE \"C\" PRIMARY KEY, value jsonb NOT NULL);"
                   "CREATE TABLE kept_offsets (part int PRIMARY KEY, next bigint)")
        self.run(BUILD / "kafka-go", topic.broker.address, topic.name, topic.partitions, "kept")

    def done(self, session):
        return int(session.execute("SELECT sum(next) FROM kept_offsets").fetchone()[0])


class Debezium(Contender):
    """It stores text: a topic of JSON without its schema it does not take apart."""
    name = "Debezium JDBC sink, Kafka Connect"
    number = "(value::jsonb->>'i')::bigint"

    def build(self):
        self.jars = BUILD / "kafka-debezium/jars"
        subprocess.run(["mvn", "--batch-mode", "--quiet", "--file", HERE / "kafka/debezium/pom.xml",
                        "dependency:copy-dependencies", "-DincludeScope=runtime",
                        f"-DoutputDirectory={self.jars}"], check=True)

    def start(self, topic):
        server.sql("CREATE TABLE kept (key text COLLATE \"C\" PRIMARY KEY, value text NOT NULL)")
        folder = pathlib.Path(tempfile.mkdtemp(dir=topic.broker.folder.name))
        self.run(HERE / "kafka/debezium/run", self.jars, folder, topic.broker.address, topic.name,
                 topic.partitions, "kept")


class Streams(Contender):
    """Not in PostgreSQL: a program with the table in it.  It says itself what it shows."""
    name = "Kafka Streams, RocksDB and changelog, exactly once"

    def build(self):
        kafka_streams.build()

    def start(self, topic):
        self.program = kafka_streams.Program(topic, topic.expected, topic.last)
        self.process = self.program.process

    def await_line(self, wanted):
        self.program.await_line(wanted, LIMIT_SECONDS)
        return time.time()

    def await_first(self, session, topic):
        return self.await_line("first")

    def await_all(self, session, topic):
        return self.await_line("all")


CONTENDERS = [Eventstore(), Large(), Pair(), LargePair(), Go(), Debezium(), Streams()]


# ---- measuring -------------------------------------------------------------------------

def run_once(contender, topic, postmaster):
    """Records per second, CPU seconds per million of them, and the client's MB.

    From the first row that is seen on: how long a JVM takes to start is not the question.
    What had come by then does not count.
    """
    with psycopg.connect("", autocommit=True) as session:
        # Not the last run's flushes and vacuums.
        session.execute("CHECKPOINT")
        contender.start(topic)
        try:
            contender.await_first(session, topic)
            began = time.time()
            counted = topic.records - contender.done(session)
            used = cpu.seconds(postmaster) + cpu.seconds(contender.pid())
            ended = contender.await_all(session, topic)
            used = cpu.seconds(postmaster) + cpu.seconds(contender.pid()) - used
            memory = cpu.peak_memory_mb(contender.pid()) if contender.pid() else None
        finally:
            contender.stop()
    return counted / max(ended - began, 0.001), used / max(counted, 1) * 1e6, memory


def measure(topic, contenders, postmaster):
    contenders = [contender for contender in contenders if topic.partitions >= contender.least_partitions]
    costs = {contender.name: [] for contender in contenders}

    def once(contender):
        rate, used, memory = run_once(contender, topic, postmaster)
        costs[contender.name].append((used, memory))
        return rate

    figures = report.measure({contender.name: lambda contender=contender: once(contender)
                              for contender in contenders})
    lines, middle = [], {}
    for name in figures:
        used, memory = sorted(costs[name])[len(costs[name]) // 2]
        middle[name] = used
        lines.append([name, report.median(figures, name), f"{used:.1f}",
                      "in the server" if memory is None else f"{memory:.0f}"])
    title = f"{topic.records:,} records, {topic.partitions} partition{'s' if topic.partitions > 1 else ''}"
    text = report.table([title, "records/s", "CPU seconds per million", "client's MB"], lines)
    return text, [target for ours in (Eventstore, Large, Pair, LargePair) for target in targets_of(ours, topic, figures, middle)]


def targets_of(ours, topic, figures, costs):
    if ours.name not in figures:
        return []
    title = f"{topic.records:,} records, {topic.partitions} partitions{ours.remark}"
    targets = [[title, report.against(figures, ours.name, peer.name, factor), f"{factor} × {peer.__name__}"]
               for peer, factor in [(Go, 1.5), (Debezium, 3), (Streams, 3)] if peer.name in figures]
    if costs.get(Go.name):
        ratio = costs[ours.name] / costs[Go.name]
        targets.append([f"{title}, CPU", report.verdict(f"{ratio:.2f} ×", ratio <= 0.6), "at most 0.6 × Go's"])
    return targets


def main():
    wanted = os.environ.get("BENCH_CONTENDERS", "").split()
    contenders = [c for c in CONTENDERS if not wanted or type(c).__name__.lower() in wanted]
    for contender in contenders:
        contender.build()
    postmaster = int(server.sql("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)"))
    broker = Broker()
    parts = [f"Records of {SIZE_BYTES} bytes over {KEYS:,} keys, JSON, in a topic that was filled before."
             " Batches are of 10,000 records, unless others are named; what is less waits for 100 ms."
             " CPU is that of the contender and of PostgreSQL, without the broker's."]
    targets = []
    for records in RECORDS:
        for partitions in PARTITIONS:
            topic = Topic(broker, partitions, records)
            text, reached = measure(topic, contenders, postmaster)
            parts.append(text)
            targets += reached
    report.write("kafka", "A topic into a keyed table", parts, targets)


main()
