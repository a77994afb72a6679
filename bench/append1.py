"""One event per transaction, beside a plain INSERT, PgQ, message-db and emmett."""
from lib import emmett, message_db, options, report, server

# How events find their streams: title -> (lines of the script, the stream)
STREAMS = {
    "no stream": ("", None),
    "10,000 streams": ("\\set s random(1, 10000)\n", "'stream-' || :s"),
    "a new stream each": ("", "'new-' || :run || '-' || :client_id || '-' || :n"),
}
# What a client of the plain table has to know by itself.
VERSION = ":n"


def name_of(kind, way):
    return f"{way}_{list(STREAMS).index(kind)}"


def append(kind, way="append"):
    lines, stream = STREAMS[kind]
    argument = f", stream => {stream}" if stream else ""
    return (f"{server.PICK_TAGS}\\set n :n + 1\n{lines}"
            f"SELECT * FROM eventstore.append('{name_of(kind, way)}', 'order.placed', "
            f":data, {server.TAGS}{argument});")


def insert(kind, way):
    lines, stream = STREAMS[kind]
    columns = "type, data, tags"
    values = f"'order.placed', :data, {server.TAGS}"
    if stream:
        columns += ", stream"
        values += f", {stream}"
        if way == "plain":
            columns += ", version"
            values += f", {VERSION}"
    return (f"{server.PICK_TAGS}\\set n :n + 1\n{lines}"
            f"INSERT INTO {name_of(kind, way)} ({columns}) VALUES ({values});")


PGQ = (f"{server.PICK_TAGS}"
       "SELECT pgq.insert_event('bench', 'order.placed', :data, "
       "'customer:' || :customer || ',country:' || :country || ',' || :channel, "
       "NULL, NULL, NULL);")


def scripts():
    """Column title -> script, for each way of streams."""
    found = {}
    for kind in STREAMS:
        found[kind] = {
            "plain INSERT": insert(kind, "plain"),
            "append()": append(kind),
            "INSERT into the collection": insert(kind, "insert"),
        }
    found["no stream"]["PgQ insert_event()"] = PGQ
    found["a new stream each"]["message-db"] = message_db.WRITE
    found["a new stream each"]["emmett"] = emmett.APPEND
    return found


def prepare():
    for kind in STREAMS:
        for way in ("append", "insert"):
            server.make_collection(name_of(kind, way))
        server.make_plain(name_of(kind, "plain"), name_of(kind, "append"))
    server.sql("CREATE EXTENSION pgq; SELECT pgq.create_queue('bench');")
    message_db.install()
    emmett.install()


TITLES = ("plain INSERT", "append()", "INSERT into the collection", "PgQ insert_event()", "message-db", "emmett")


def row(figures, kind, clients):
    cells = [kind, clients]
    for title in TITLES:
        key = (kind, title)
        cells.append(report.median(figures, key) if key in figures else "")
    cells.append(f"{report.ratio(figures, (kind, 'append()'), (kind, 'plain INSERT')):.2f}")
    return cells


def goals(figures, clients):
    lines = []
    for kind in STREAMS:
        target = 0.95 if kind == "no stream" else 0.85
        reached = report.against(figures, (kind, "append()"), (kind, "plain INSERT"), target)
        lines.append([f"append(), {kind}, {clients} clients", reached, f"{target} × plain INSERT"])
    reached = report.against(figures, ("no stream", "append()"), ("no stream", "PgQ insert_event()"), 1)
    lines.append([f"append(), no stream, {clients} clients", reached, "1 × PgQ"])
    return lines


def main():
    prepare()
    variants = {(kind, title): script
                for kind, titles in scripts().items() for title, script in titles.items()}
    for script in variants.values():
        server.pgbench(script, clients=8, seconds=1)
    lines = []
    targets = []
    for clients in options.CLIENTS:
        server.sql("CHECKPOINT")
        figures = report.measure({
            key: lambda script=script: server.pgbench(script, clients, options.SECONDS)
            for key, script in variants.items()})
        lines += [row(figures, kind, clients) for kind in STREAMS]
        targets += goals(figures, clients)
    header = ["streams", "clients", *TITLES, "append() / plain"]
    report.write("append1", "One event per transaction", [
        "Transactions per second; three tags, about 100 bytes of JSON; `pgbench -M prepared`.",
        report.table(header, lines)], targets)


main()
