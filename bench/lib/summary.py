"""The figures in the project's README: some lines of the results, as they are there.

bench/run calls write() when it has written a result; so does `python3 bench/lib/summary.py`.
test/checks/figures compares the README with the results.
"""
import pathlib
import re

BENCH = pathlib.Path(__file__).parent.parent
START, END = "<!-- figures: written by bench/run -->", "<!-- end of figures -->"

SOURCE = "eventstore, a source into a store"
PAIR = "eventstore, two sources with half of the partitions each"
LARGE_PAIR = PAIR + ", batches of 50,000"


def beside_source(title):
    return [(name, [title, line], "records/s") for name, line in (
        ("a Go program", "Go: franz-go, pgx, COPY and merge"),
        ("Kafka Connect (Debezium)", "Debezium JDBC sink, Kafka Connect"),
        ("Kafka Streams, RocksDB", "Kafka Streams, RocksDB and changelog, exactly once"))]


# What is measured, unit, result, ours, and others': each a line's first cells and a column.
FIGURES = [
    ("One event for each transaction, 32 clients", "/s", "append1",
     (["no stream", "32"], "append()"),
     [("plain `INSERT`", ["no stream", "32"], "plain INSERT"),
      ("PgQ", ["no stream", "32"], "PgQ insert_event()")]),
    ("One event to a new stream each, 32 clients", "/s", "append1",
     (["a new stream each", "32"], "append()"),
     [("emmett", ["a new stream each", "32"], "emmett"), ("message-db", ["a new stream each", "32"], "message-db")]),
    ("Batches of 1000 events, one connection, events", "/s", "batch",
     (["no stream", "append_array()"], "events/s"),
     [("`COPY` into a plain table", ["no stream", "COPY into a plain table"], "events/s")]),
    ("Appends on condition (`fail_if`), 32 clients", "/s", "dcb",
     (["a new tag each, all events are looked at", "32"], "fail_if"),
     [("eventsourcing", ["a new tag each, all events are looked at", "32"], "eventsourcing")]),
    ("The same, where a flush of the disk takes 1 ms more", "/s", "dcb-slow-flush",
     (["a new tag each, all events are looked at", "32"], "fail_if"),
     [("eventsourcing", ["a new tag each, all events are looked at", "32"], "eventsourcing")]),
    ("Appends while 200 listen to other channels, 64 clients", "/s", "live",
     (["notify head"], "appends/s"),
     [("a trigger with `pg_notify`", ["a trigger that calls pg_notify"], "appends/s"),
      ("message-db", ["message-db"], "appends/s")]),
    ("From commit to wake-up, one waiting, median", " ms", "live",
     (["wait_for, 1 waiting"], "median"),
     [("a poll every 100 ms", ["a poll every 100 ms"], "median"),
      ("PgQ", ["PgQ, ticker and poll every 100 ms"], "median")]),
    ("A subscription, 1000 events and their inserts a time, events", "/s", "live",
     (["poll of 1000, 1 lanes"], "events/s"), []),
    ("Reading a million events, sent to the client, events", "/s", "read",
     (["`SELECT *`, rows sent"], "read()"),
     [("a scan of a plain table", ["`SELECT *`, rows sent"], "scan of a plain table")]),
    ("Reading by a rare tag, 8 clients", "/s", "read",
     (["read() by a rare tag", "8"], "tx/s"),
     [("a row by primary key", ["primary key of a plain table", "8"], "tx/s")]),
    ("`get` of 100,000 keys, 8 clients", "/s", "stores",
     (["100,000", "8"], "get"), [("`SELECT` by primary key", ["100,000", "8"], "SELECT")]),
    ("`put` with changelog, the same", "/s", "stores",
     (["100,000", "8"], "put"),
     [("`INSERT … ON CONFLICT`, no history", ["100,000", "8"], "INSERT ... ON CONFLICT")]),
    ("A captured table, `UPDATE` of 1000 rows, a million rows, rows", "/s", "capture",
     (["1,000,000", "UPDATE of 1000 rows"], "capture"),
     [("an audit trigger in plpgsql", ["1,000,000", "UPDATE of 1000 rows"], "plpgsql"),
      ("no trigger", ["1,000,000", "UPDATE of 1000 rows"], "no trigger")]),
    ("A Kafka topic of one partition into a keyed table, records", "/s", "kafka",
     (["500,000 records, 1 partition", SOURCE], "records/s"), beside_source("500,000 records, 1 partition")),
    ("The same, four partitions", "/s", "kafka",
     (["500,000 records, 4 partitions", SOURCE], "records/s"), beside_source("500,000 records, 4 partitions")),
    ("Five million records, four partitions, two sources", "/s", "kafka",
     (["5,000,000 records, 4 partitions", PAIR], "records/s"), beside_source("5,000,000 records, 4 partitions")),
    ("The same, batches of 50,000", "/s", "kafka",
     (["5,000,000 records, 4 partitions", LARGE_PAIR], "records/s"), []),
    ("A collection to a Kafka topic, events", "/s", "kafka_flow",
     (["collection to a topic, at least once"], "records/s"),
     [("exactly once", ["collection to a topic, exactly once"], "records/s")]),
    ("From produced in Kafka to visible, median", " ms", "kafka_flow", (["median"], "ms"), []),
]


def tables(text):
    """The tables of a page: a header, and lines."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield lines[0], lines[2:]


def find(text, key, column):
    """A key is how a line begins, or the table's first title and that."""
    for header, lines in tables(text):
        for line in lines:
            if column in header and key in (line[:len(key)], [header[0], *line][:len(key)]):
                return line[header.index(column)]
    raise KeyError(f"{key}, {column}")


def lines():
    """What only --large measures is left out where that was not run."""
    for what, unit, result, ours, others in FIGURES:
        text = (BENCH / "results" / f"{result}.md").read_text()
        if ours[0][-1].startswith(PAIR) and ours[0][0] not in text:
            continue
        command = re.search(r"^Command: (`.*`)$", text, re.M)[1]
        beside = ", ".join(f"{name} {find(text, key, column)}{unit}" for name, key, column in others)
        yield f"| {what} | {find(text, *ours)}{unit} | {beside} | [{result}](bench/results/{result}.md), {command} |"


def write():
    readme = BENCH.parent / "README.md"
    before, rest = readme.read_text().split(START)
    head = "| | eventstore | beside | result, and its command |\n|---|---|---|---|"
    readme.write_text(f"{before}{START}\n\n{head}\n" + "\n".join(lines()) + f"\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write()
