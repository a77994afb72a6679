"""How all of it changes as a collection grows, and what a backend takes.

A collection of each size stands ready, and each is measured in turn.  The small
ones are made anew before each round, because measuring makes them grow.
"""
import re

import psycopg

from lib import options, report, server

SIZES = [10 ** n for n in range(4, 7 + options.LARGE)]
if options.QUICK:
    SIZES = SIZES[:2]
SMALL = 10 ** 5
# As fast as with the smallest size, but for the noise.
FLAT = 0.9
APPENDS = 2_000 if options.QUICK else 100_000

BATCH = f"SELECT count(*) FROM eventstore.append_array('{{name}}', (SELECT rows FROM batch));"
APPEND = (f"{server.PICK_TAGS}\\set s random(0, :streams)\n"
          "SELECT * FROM eventstore.append('{name}', 'order.placed', :data, "
          f"{server.TAGS}, stream => 'stream-' || :s);")
FAIL_IF = ("\\set n :n + 1\n"
           "SELECT * FROM eventstore.append('{name}', 'user.named', :data, "
           "ARRAY['user:' || :run || '-' || :client_id || '-' || :n, :channel], "
           "fail_if => ('[{{\"tags\": [\"user:' || :run || '-' || :client_id || '-' || :n || '\"]}}]')::jsonb);")
READ_STREAM = ("\\set s random(0, :streams)\n"
               "SELECT * FROM eventstore.read_stream('{name}', 'stream-' || :s, max_count => 10);")
PEEK = ("\\set s random(0, :streams)\n"
        "SELECT * FROM eventstore.peek('{name}', 'stream-' || :s);")

# Readers first: they leave the size as it is.
MEASURES = {
    "read_stream() of 10, 1 client": (READ_STREAM, 1, 1),
    "peek(), 1 client": (PEEK, 1, 1),
    "append(), 8 clients": (APPEND, 8, 1),
    "fail_if, 8 clients": (FAIL_IF, 8, 1),
    "append_array() of 1000, 1 client, events/s": (BATCH, 1, 1000),
}


def name_of(size):
    return f"events_{size}"


def make(size):
    server.make_collection(name_of(size))
    server.fill(name_of(size), size, size // 10)
    server.sql(f"VACUUM ANALYZE {name_of(size)};")


def prepare():
    server.sql(f"CREATE TABLE batch AS SELECT {server.ARRAY} AS rows "
               f"FROM {server.rows(0, 1000, 100)};")
    for size in SIZES:
        make(size)


def measure(size, title):
    script, clients, per_call = MEASURES[title]
    if size <= SMALL and script in (APPEND, FAIL_IF, BATCH):
        server.sql(f"SELECT eventstore.drop_collection('{name_of(size)}');")
        make(size)
    server.VARIABLES["streams"] = str(size // 10 - 1)
    seconds = min(options.SECONDS, 2) if size <= SMALL else options.SECONDS
    return per_call * server.pgbench(script.format(name=name_of(size)), clients, seconds)


def private_kib(pid):
    """Resident memory less what is shared: files and PostgreSQL's shared memory."""
    status = open(f"/proc/{pid}/status").read()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def memory_after(statement, arguments, times):
    """Private KiB of a backend, and the sum of its memory contexts."""
    with psycopg.connect("", autocommit=True) as conn:
        pid = conn.info.backend_pid
        for _ in range(times):
            conn.execute(statement, arguments, prepare=True)
        context = conn.execute("SELECT sum(total_bytes) FROM pg_backend_memory_contexts").fetchone()[0]
        return private_kib(pid), int(context) // 1024


def measure_memory():
    largest = name_of(SIZES[-1])
    server.make_plain("plain", largest)
    append = (f"SELECT * FROM eventstore.append('{largest}', 'order.placed', %s::jsonb, "
              "'{customer:1,channel:web}', stream => 'memory')")
    insert = "INSERT INTO plain (type, data, tags) VALUES ('order.placed', %s::jsonb, '{customer:1,channel:web}')"
    read = f"SELECT count(*) FROM eventstore.read('{largest}') WHERE %s <> ''"
    cases = {
        "nothing": ("SELECT %s::text", 1),
        "one plain INSERT": (insert, 1),
        f"{APPENDS:,} plain INSERTs": (insert, APPENDS),
        "one append()": (append, 1),
        f"{APPENDS:,} append()s": (append, APPENDS),
        f"one read() of {SIZES[-1]:,} events": (read, 1),
    }
    return [[title, *map(report.thousands, memory_after(statement, [server.DATA], times))]
            for title, (statement, times) in cases.items()]


def main():
    prepare()
    lines = []
    targets = []
    for title in MEASURES:
        for size in SIZES:
            measure(size, title)
        figures = report.measure({size: lambda size=size: measure(size, title) for size in SIZES})
        change = report.ratio(figures, SIZES[-1], SIZES[0])
        lines.append([title, *(report.median(figures, size) for size in SIZES), f"{change:.2f}"])
        targets.append([f"{title}, {SIZES[-1]:,} events", report.against(figures, SIZES[-1], SIZES[0], FLAT),
                        f"1 × at {SIZES[0]:,} events"])
    memory = measure_memory()
    header = ["", *(f"{size:,} events" for size in SIZES), f"{SIZES[-1]:,} / {SIZES[0]:,}"]
    report.write("growth", "How it changes as a collection grows", [
        "Calls per second (batches: events per second) on collections that hold so many events at "
        "the start of a measurement, ten to a stream.",
        report.table(header, lines),
        "Memory of a backend in KiB: what it has for itself (RssAnon), and the sum of "
        "pg_backend_memory_contexts.",
        report.table(["after", "private", "contexts"], memory)], targets)


main()
