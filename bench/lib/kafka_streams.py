"""The latest value of each key as Kafka Streams keeps it: test/kafka/streams/Latest.java."""
import os
import pathlib
import subprocess
import tempfile
import threading

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
BUILD = REPOSITORY / "build/bench/kafka-streams"
LOG = REPOSITORY / "build/bench/kafka-streams.log"


def build():
    subprocess.run([REPOSITORY / "test/kafka/streams/build", BUILD], check=True)


class Program:
    """A new application with an empty store, or one that has a name and restores its own."""

    def __init__(self, topic, expected, last=(), application=None):
        """'expected': how many keys, and the sum of their numbers; 'last': keys and numbers that come late."""
        folder = tempfile.mkdtemp(dir=topic.broker.folder.name)
        environment = dict(os.environ, **({"APPLICATION_ID": application} if application else {}))
        words = ["java", "-Xmx1g", "-XX:+UseParallelGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
                 "-cp", f"{BUILD}/classes:{BUILD}/jars/*", "Latest", topic.broker.address, topic.name,
                 topic.partitions, folder, *expected, *(f"{key}={number}" for key, number in last)]
        with open(LOG, "w") as log:
            self.process = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL,
                                            stdout=subprocess.PIPE, stderr=log, text=True, env=environment)

    def await_line(self, wanted, limit_seconds):
        timer = threading.Timer(limit_seconds, self.process.kill)
        timer.start()
        line = self.process.stdout.readline().strip()
        timer.cancel()
        if line != wanted:
            raise SystemExit(f"Kafka Streams said {line!r}, not {wanted!r}; see build/bench/{LOG.name}")

    def close(self):
        """In good order."""
        self.process.terminate()
        self.process.wait()
