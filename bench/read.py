"""Reading everything, streams, the last event, by tag."""
import re
import time

from lib import options, report, server

EVENTS = 100_000 if options.QUICK else 1_000_000
PER_STREAM = 10
STREAMS = EVENTS // PER_STREAM


def prepare():
    server.make_collection("events")
    server.fill("events", EVENTS, STREAMS)
    server.make_plain("plain", "events")
    server.sql("INSERT INTO plain SELECT * FROM events; "
               "VACUUM ANALYZE events; VACUUM ANALYZE plain; "
               "ALTER DATABASE :\"DBNAME\" SET max_parallel_workers_per_gather = 0;")


def sent(select):
    """Rows per second as they reach the client, in binary."""
    start = time.monotonic()
    server.discard(f"COPY ({select}) TO STDOUT (FORMAT BINARY)")
    return EVENTS / (time.monotonic() - start)


def made(select):
    """Rows per second that the server makes and throws away."""
    plan = server.sql(f"EXPLAIN (ANALYZE, TIMING OFF, COSTS OFF) {select}")
    return EVENTS / float(re.search(r"Execution Time: ([0-9.]+)", plan)[1]) * 1000


def ways(measure, select):
    """The same of read(), the collection and a plain table."""
    return {"read()": lambda: measure(select.format("eventstore.read('events')")),
            SCAN: lambda: measure(select.format("events")),
            "scan of a plain table": lambda: measure(select.format("plain"))}


SCAN = "scan of the collection"
WHOLE = {
    "`SELECT *`, rows sent": ways(sent, "SELECT * FROM {}"),
    "all columns taken apart": ways(made, "SELECT count(metadata), count(created_at) FROM {}"),
    "`SELECT *`, rows made only": ways(made, "SELECT * FROM {}"),
    "`SELECT count(*)`": ways(made, "SELECT count(*) FROM {}"),
}

PICK_STREAM = f"\\set s random(0, {STREAMS - 1})\n"
PICK_POSITION = f"\\set p random(1, {EVENTS - 1000})\n"
LOOKUPS = {
    "primary key of a plain table":
        f"{PICK_POSITION}SELECT * FROM plain WHERE position = :p;",
    "10 events of a stream, plain table":
        f"{PICK_STREAM}SELECT * FROM plain WHERE stream = 'stream-' || :s ORDER BY version LIMIT 10;",
    "read_stream() of 10 events":
        f"{PICK_STREAM}SELECT * FROM eventstore.read_stream('events', 'stream-' || :s);",
    "peek() of a stream":
        f"{PICK_STREAM}SELECT * FROM eventstore.peek('events', 'stream-' || :s);",
    "peek() of the collection":
        "SELECT * FROM eventstore.peek('events');",
    "read() of 100 events after a position":
        f"{PICK_POSITION}SELECT * FROM eventstore.read('events', after => :p, max_count => 100);",
    "read() by a rare tag":
        "\\set customer random(1, 99999)\n"
        "SELECT * FROM eventstore.read('events', tags => ARRAY['customer:' || :customer]);",
    "read() of the first 10 of a frequent tag after a position":
        f"{PICK_POSITION}\\set country random(1, 49)\n"
        "SELECT * FROM eventstore.read('events', after => :p, max_count => 10, "
        "tags => ARRAY['country:' || :country]);",
}


def measure_whole():
    lines = []
    targets = []
    for title, compared in WHOLE.items():
        for way in compared.values():
            way()
        figures = report.measure(compared)
        lines.append([title] + [report.median(figures, way) for way in compared]
                     + [f"{report.ratio(figures, 'read()', SCAN):.2f}"])
        if title.startswith("`SELECT *`"):
            targets.append([f"read() of everything, {title}",
                            report.against(figures, "read()", SCAN, 0.5), "0.5 × sequential scan"])
        else:
            targets.append([f"read() of everything, {title}", report.at_least(figures, "read()", 1_200_000),
                            "1,200,000 events/s"])
    header = ["", *next(iter(WHOLE.values())), f"read() / {SCAN}"]
    return report.table(header, lines), targets


def measure_lookups(clients):
    for script in LOOKUPS.values():
        server.pgbench(script, clients, 1)
    figures = report.measure({
        title: lambda script=script: server.pgbench(script, clients, options.SECONDS)
        for title, script in LOOKUPS.items()})
    base = next(iter(LOOKUPS))
    lines = [[title, clients, report.median(figures, title),
              f"{report.ratio(figures, title, base):.2f}"] for title in LOOKUPS]
    targets = [[f"{title}, {clients} clients", report.against(figures, title, base, 0.7),
                "0.7 × primary-key lookup"]
               for title in ("read_stream() of 10 events", "peek() of a stream", "peek() of the collection")]
    return lines, targets


def main():
    prepare()
    whole, targets = measure_whole()
    lines = []
    for clients in (1, 8):
        more_lines, more_targets = measure_lookups(clients)
        lines += more_lines
        targets += more_targets
    report.write("read", f"Reading a collection of {EVENTS:,} events", [
        "Everything, in events per second, one client, no parallel query. Rows sent: as COPY BINARY, "
        "through a socket, to a client that drops them. Taken apart: by an aggregate over the last "
        "columns. Rows made only: EXPLAIN ANALYZE, where a sequential scan never looks into its rows.",
        whole,
        f"Little at a time, in transactions per second, `pgbench -M prepared`; each stream has "
        f"{PER_STREAM} events.",
        report.table(["", "clients", "tx/s", "/ primary-key lookup"], lines)], targets)


main()
