"""A real broker, and topics filled with records whose values are known."""
import atexit
import os
import pathlib
import subprocess
import tempfile

RIG = pathlib.Path(__file__).parent.parent.parent / "test/kafka"
KEYS = 100_000
SIZE_BYTES = 100


class Broker:
    """A real one, with a JVM set for throughput; removed at the end."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="eventstore-bench-kafka.")
        environment = dict(os.environ, KAFKA_HEAP="1g", KAFKA_JVM="-XX:TieredStopAtLevel=4 -XX:+UseParallelGC -XX:-UseSerialGC")
        atexit.register(self.stop)
        self.address = subprocess.run([RIG / "broker", "start", self.folder.name], env=environment,
                                      check=True, text=True, stdout=subprocess.PIPE).stdout.strip()

    def client(self, *arguments):
        done = subprocess.run([RIG / "client", "-b", self.address, *map(str, arguments)],
                              check=True, text=True, stdout=subprocess.PIPE)
        return done.stdout

    def stop(self):
        subprocess.run([RIG / "broker", "kill", self.folder.name], check=False)
        self.folder.cleanup()


class Topic:
    """Filled before anything is measured; knows what is to come of it."""

    def __init__(self, broker, partitions, records, keys=KEYS):
        self.broker = broker
        self.partitions = partitions
        self.records = records
        self.name = f"bench_{partitions}_{records}_{keys}"
        broker.client("create", self.name, partitions)
        broker.client("generate", self.name, records, f"keys={keys}", f"size={SIZE_BYTES}")
        # Who does not show these need not be asked for more.
        self.last = [self.last_of(partition) for partition in range(partitions)]
        last = {(31 * i * i + 17 * i) % 1000003 % keys: i for i in range(records)}
        # How many keys, and the sum of their last values.
        self.expected = (len(last), sum(last.values()))

    def last_of(self, partition):
        end = self.broker.client("watermarks", self.name).splitlines()[partition].split()[2]
        line = self.broker.client("consume", self.name, partition, int(end) - 1)
        fields = dict(field.split("=", 1) for field in line.strip().split("\t"))
        return fields["key"], int(fields["value"].split()[1].rstrip(","))


class Grid:
    """Filled with records each of which has a key of its own."""

    TENANTS, ITEMS = 100, 20

    def __init__(self, broker, partitions, records):
        self.broker = broker
        self.partitions = partitions
        self.records = records
        self.name = f"grid_{records}"
        broker.client("create", self.name, partitions)
        broker.client("grid", self.name, self.TENANTS, self.ITEMS, records // (self.TENANTS * self.ITEMS))
        # How many keys, and the sum of their tenants, which are numbered from 0.
        self.expected = (records, records * (self.TENANTS - 1) // 2)
