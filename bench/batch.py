"""A thousand events per call, beside COPY BINARY.

What is sent was encoded before: each call sends bytes that lie ready, through
libpq, and takes the whole answer.  One call is one transaction.
"""
import itertools
import time

import psycopg
from psycopg import pq

from lib import options, report, server

SIZE = 1000
# Different ones, sent again and again.
BATCHES = 20
STREAMS = {"no stream": 0, "100 streams": 100}


def name_of(kind, way):
    return f"{way}_{STREAMS[kind]}"


def check(result, status):
    if result.status != status:
        raise SystemExit(result.error_message.decode())
    return result


def copied(conn, select):
    """The bytes of COPY BINARY."""
    with conn.cursor().copy(f"COPY ({select}) TO STDOUT (FORMAT BINARY)") as copy:
        return b"".join(bytes(part) for part in copy)


def value(conn, select):
    return bytes(conn.pgconn.exec_params(select.encode(), [], result_format=1).get_value(0, 0))


class Copy:
    """COPY of the same rows into a table; a plain one is given the versions too."""

    def __init__(self, conn, kind, way):
        versions = ", n" if way == "plain" and STREAMS[kind] else ""
        columns = "type, data, tags, stream" + (", version" if versions else "")
        self.pgconn = conn.pgconn
        self.statement = f"COPY {name_of(kind, way)} ({columns}) FROM STDIN (FORMAT BINARY)".encode()
        self.batches = itertools.cycle([
            copied(conn, f"SELECT type, data, tags, stream{versions} "
                         f"FROM {server.rows(b, SIZE, STREAMS[kind])} ORDER BY i")
            for b in range(BATCHES)])

    def send(self):
        check(self.pgconn.exec_(self.statement), pq.ExecStatus.COPY_IN)
        self.pgconn.put_copy_data(next(self.batches))
        self.pgconn.put_copy_end()
        check(self.pgconn.get_result(), pq.ExecStatus.COMMAND_OK)
        while self.pgconn.get_result():
            pass


class Call:
    """A function whose one argument is the batch, in binary."""

    def __init__(self, conn, kind, function, batch):
        self.pgconn = conn.pgconn
        self.name = name_of(kind, function).encode()
        self.batches = itertools.cycle([
            value(conn, f"SELECT {batch} FROM {server.rows(b, SIZE, STREAMS[kind])}")
            for b in range(BATCHES)])
        statement = f"SELECT * FROM eventstore.{function}('{name_of(kind, function)}', $1)"
        check(self.pgconn.prepare(self.name, statement.encode()), pq.ExecStatus.COMMAND_OK)

    def send(self):
        check(self.pgconn.exec_prepared(self.name, [next(self.batches)], [1], 1),
              pq.ExecStatus.TUPLES_OK)


JSON = ("jsonb_agg(jsonb_strip_nulls(jsonb_build_object('type', type, 'data', data, "
        "'tags', tags, 'stream', stream)) ORDER BY i)")
WAYS = {
    "COPY into a plain table": lambda conn, kind: Copy(conn, kind, "plain"),
    "COPY into the collection": lambda conn, kind: Copy(conn, kind, "copy"),
    "append_array()": lambda conn, kind: Call(conn, kind, "append_array", server.ARRAY),
    "append_batch()": lambda conn, kind: Call(conn, kind, "append_batch", JSON),
}


def rate(way, seconds):
    """Events per second."""
    start = time.monotonic()
    calls = 0
    while time.monotonic() - start < seconds:
        way.send()
        calls += 1
    return calls * SIZE / (time.monotonic() - start)


def prepare():
    for kind in STREAMS:
        for way in ("append_array", "append_batch", "copy"):
            server.make_collection(name_of(kind, way))
        server.make_plain(name_of(kind, "plain"), name_of(kind, "copy"))


def main():
    prepare()
    lines = []
    targets = []
    with psycopg.connect("", autocommit=True) as conn:
        for kind in STREAMS:
            ways = {title: make(conn, kind) for title, make in WAYS.items()}
            for way in ways.values():
                rate(way, 1)
            server.sql("CHECKPOINT")
            figures = report.measure({title: lambda way=way: rate(way, options.SECONDS)
                                      for title, way in ways.items()})
            base = "COPY into a plain table"
            lines += [[kind, title, report.median(figures, title),
                       f"{report.ratio(figures, title, base):.2f}"] for title in ways]
            targets += [[f"{title}, {kind}", report.against(figures, title, base, 0.9),
                         "0.9 × COPY BINARY"] for title in ("append_array()", "append_batch()")]
    report.write("batch", "A thousand events per call", [
        "Events per second over one connection; one call is one transaction. The bytes sent were "
        "encoded beforehand, all in binary; the functions' rows are fetched.",
        report.table(["streams", "way", "events/s", "/ COPY into a plain table"], lines)], targets)


main()
