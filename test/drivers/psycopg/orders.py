"""eventstore from Python, with psycopg 3.

Each function below is one thing that an application does.  The connection's
parameters come from PGHOST and the like.
"""
import sys
import threading
import uuid

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

ORDERS = "orders_psycopg"

# psycopg knows the standard SQLSTATEs as classes; those of eventstore go by their code.
VERSION_CONFLICT = "LG001"
CONDITION_FAILED = "LG002"


def append(conn, event_type, data, *, tags=(), stream=None, expected_version=None, event_id=None):
    """One event; returns position, version and id."""
    return conn.execute(
        """SELECT position, version, id FROM eventstore.append(%(collection)s, %(type)s,
               data => %(data)s, tags => %(tags)s, stream => %(stream)s,
               expected_version => %(expected_version)s, id => %(id)s)""",
        {"collection": ORDERS, "type": event_type, "data": Jsonb(data), "tags": list(tags),
         "stream": stream, "expected_version": expected_version, "id": event_id},
    ).fetchone()


def read_stream(conn, stream, **options):
    arguments = sql.SQL("").join(
        sql.SQL(", {} => {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in options)
    return conn.execute(
        sql.SQL("SELECT * FROM eventstore.read_stream(%(collection)s, %(stream)s{})").format(arguments),
        {"collection": ORDERS, "stream": stream, **options},
    ).fetchall()


def append_retrying(conn, stream, decide):
    """Reads the stream, decides, appends; again when another was quicker.  How often it tried."""
    for attempt in range(1, 10):
        events = read_stream(conn, stream)
        event_type, data = decide(events)
        try:
            append(conn, event_type, data, stream=stream, expected_version=len(events))
            return attempt
        except errors.DatabaseError as error:
            if error.sqlstate != VERSION_CONFLICT:
                raise
    raise RuntimeError(f"stream {stream} is never at rest")


def read_pages(conn, page, after=None):
    """All events up to the head of this moment, page by page."""
    head = conn.execute("SELECT eventstore.head(%s)", (ORDERS,)).fetchone()["head"]
    while True:
        events = conn.execute(
            "SELECT * FROM eventstore.read(%s, after => %s, max_count => %s)",
            (ORDERS, after, page)).fetchall()
        yield from events
        if len(events) < page:
            return
        after = events[-1]["position"]
        if after >= head:
            return


# ---- live ------------------------------------------------------------------------

PAGE = 100


def read_on(conn, after):
    """The next page of events after a position, and the position to go on from."""
    head = conn.execute("SELECT eventstore.head(%s)", (ORDERS,)).fetchone()["head"]
    events = conn.execute("SELECT * FROM eventstore.read(%s, after => %s, max_count => %s)",
                          (ORDERS, after, PAGE)).fetchall()
    last = events[-1]["position"] if events else after
    return events, last if len(events) == PAGE else max(head, last)


def follow(conn, after):
    """All events after a position, and then each new one, for ever.  conn is in autocommit."""
    conn.execute("SELECT * FROM eventstore.listen(%s)", (ORDERS,))
    while True:
        events, after = read_on(conn, after)
        yield from events
        if len(events) < PAGE:
            for _ in conn.notifies(stop_after=1):
                pass


def poll(conn, after, **filters):
    """The events after a position that the filters let through, waited for if need be."""
    arguments = sql.SQL("").join(
        sql.SQL(", {} => {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in filters)
    return conn.execute(
        sql.SQL("SELECT * FROM eventstore.read(%(collection)s, %(after)s, wait => '20 s'{})").format(arguments),
        {"collection": ORDERS, "after": after, **filters}).fetchall()


# ---- subscriptions ---------------------------------------------------------------


def process(conn, name, handle):
    """One batch; its place is kept in the transaction of what handle writes.  How many there were."""
    with conn.transaction():
        events = conn.execute("SELECT * FROM eventstore.poll(%s, %s)", (name, PAGE)).fetchall()
        for event in events:
            handle(event)
    return len(events)


def work(conn, name, member, handle):
    """One batch under a lease, for work outside of the database.  What fails comes again."""
    events = conn.execute("SELECT * FROM eventstore.poll(%s, %s, member => %s, lease => '1 min')",
                          (name, PAGE, member)).fetchall()
    for event in events:
        try:
            handle(event)
        except Exception:
            conn.execute("SELECT eventstore.nack(%s, first => %s, member => %s)", (name, event["position"], member))
            raise
    if events:
        conn.execute("SELECT eventstore.ack(%s, up_to => %s, member => %s)", (name, events[-1]["position"], member))
    return len(events)


# ---- the tests: each is a name and what must hold --------------------------------


def append_with_named_arguments(conn):
    event_id = uuid.uuid4()
    first = append(conn, "order.placed", {"total": 12.5}, tags=["customer:7", "country:de"],
                   stream="order-1", expected_version=0, event_id=event_id)
    assert first["version"] == 1 and first["id"] == event_id, first
    again = append(conn, "order.placed", {"total": 12.5}, tags=["customer:7", "country:de"],
                   stream="order-1", expected_version=0, event_id=event_id)
    assert again == first, (first, again)
    event = read_stream(conn, "order-1")[0]
    assert event["data"] == {"total": 12.5}, event
    assert event["tags"] == ["customer:7", "country:de"], event


def append_batch_of_json(conn):
    events = [{"type": "order.placed", "stream": f"batch-{i % 3}", "data": {"i": i, "text": "naïve ☃"},
               "tags": ["customer:8"], "expected_version": i // 3} for i in range(30)]
    rows = conn.execute("SELECT * FROM eventstore.append_batch(%s, %s)", (ORDERS, Jsonb(events))).fetchall()
    positions = [row["position"] for row in rows]
    assert positions == list(range(positions[0], positions[0] + 30)), positions
    assert [row["version"] for row in rows] == [i // 3 + 1 for i in range(30)]
    assert read_stream(conn, "batch-1")[0]["data"] == {"i": 1, "text": "naïve ☃"}


def conflict_is_read_again_and_retried(conn):
    append(conn, "order.placed", {}, stream="order-2")
    disturbed = []

    def decide(events):
        if not disturbed:
            with psycopg.connect(autocommit=True, row_factory=dict_row) as other:
                disturbed.append(append(other, "order.changed", {}, stream="order-2"))
        return "order.paid", {"after": len(events)}

    assert append_retrying(conn, "order-2", decide) == 2
    assert [event["type"] for event in read_stream(conn, "order-2")] == [
        "order.placed", "order.changed", "order.paid"]


def conflict_tells_the_versions(conn):
    try:
        append(conn, "order.paid", {}, stream="order-2", expected_version=1)
    except errors.DatabaseError as error:
        assert error.sqlstate == VERSION_CONFLICT, error.sqlstate
        assert error.diag.message_detail == 'Stream "order-2": expected version 1, actual version 3.'
    else:
        raise AssertionError("no conflict")


def condition_refuses_the_second(conn):
    use = """SELECT position FROM eventstore.append(%(c)s, 'voucher.used', tags => %(tags)s,
                 fail_if => %(query)s, after => %(after)s)"""
    arguments = {"c": ORDERS, "tags": ["voucher:SPRING"], "after": 0,
                 "query": Jsonb([{"types": ["voucher.used"], "tags": ["voucher:SPRING"]}])}
    used = conn.execute(use, arguments).fetchone()["position"]
    try:
        conn.execute(use, arguments)
    except errors.DatabaseError as error:
        assert error.sqlstate == CONDITION_FAILED, error.sqlstate
        assert error.diag.message_detail == f"The event at position {used} matches."
    else:
        raise AssertionError("it was used twice")
    conn.execute(use, {**arguments, "after": used})


def pages_give_every_event_once(conn):
    whole = conn.execute("SELECT * FROM eventstore.read(%s)", (ORDERS,)).fetchall()
    assert len(whole) > 30
    assert list(read_pages(conn, 7)) == whole


def streams_are_read_in_both_directions(conn):
    forward = read_stream(conn, "batch-0", from_version=3, max_count=4)
    assert [event["version"] for event in forward] == [3, 4, 5, 6]
    backward = read_stream(conn, "batch-0", direction="backward", max_count=2)
    assert [event["version"] for event in backward] == [10, 9]


def peek_of_an_unknown_stream_is_null(conn):
    peek = "SELECT * FROM eventstore.peek(%s, %s)"
    assert conn.execute(peek, (ORDERS, "nobody")).fetchone()["position"] is None
    assert conn.execute(peek, (ORDERS, "order-2")).fetchone()["type"] == "order.paid"


def insert_appends_and_returns(conn):
    row = conn.execute(
        sql.SQL("INSERT INTO {} (type, stream, tags, data) VALUES (%s, %s, %s, %s) "
                "RETURNING position, version").format(sql.Identifier(ORDERS)),
        ("order.shipped", "order-2", ["customer:7"], Jsonb({"with": "post"}))).fetchone()
    assert row["version"] == 4, row
    assert conn.execute("SELECT eventstore.head(%s)", (ORDERS,)).fetchone()["head"] == row["position"]


def prepared_statements_are_used_again(conn):
    for i in range(50):
        row = conn.execute(
            "SELECT version FROM eventstore.append(%s, 'order.counted', %s, stream => %s)",
            (ORDERS, Jsonb({"i": i}), "counted"), prepare=True).fetchone()
        assert row["version"] == i + 1, row
        event = conn.execute(
            "SELECT data FROM eventstore.read_stream(%s, %s, from_version => %s)",
            (ORDERS, "counted", i + 1), prepare=True).fetchone()
        assert event["data"] == {"i": i}, event


def transaction_rolls_back(conn):
    try:
        with conn.transaction():
            append(conn, "order.placed", {}, stream="rolled-back")
            raise KeyError("the application gave up")
    except KeyError:
        pass
    assert read_stream(conn, "rolled-back") == []


def copy_appends(conn):
    statement = sql.SQL("COPY {} (type, data, tags, stream) FROM STDIN").format(sql.Identifier(ORDERS))
    with conn.cursor().copy(statement) as copy:
        for i in range(500):
            copy.write_row(("order.imported", Jsonb({"i": i}), ["customer:9"], f"imported-{i % 5}"))
    versions = [event["version"] for event in read_stream(conn, "imported-4")]
    assert versions == list(range(1, 101)), versions


def head_of(conn):
    return conn.execute("SELECT eventstore.head(%s)", (ORDERS,)).fetchone()["head"]


def meanwhile(conn, action):
    """Does something, from a connection of its own, once the session of conn sleeps in a wait."""
    pid = conn.info.backend_pid

    def act():
        with psycopg.connect(autocommit=True, row_factory=dict_row) as other:
            while not other.execute("SELECT wait_event_type = 'Extension' AS asleep FROM pg_stat_activity"
                                    " WHERE pid = %s", (pid,)).fetchone()["asleep"]:
                pass
            action(other)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def listen_returns_where_to_read_from(conn):
    with psycopg.connect(autocommit=True, row_factory=dict_row) as listening:
        row = listening.execute("SELECT * FROM eventstore.listen(%s)", (ORDERS,)).fetchone()
        assert row == {"channel": "public." + ORDERS, "head": head_of(conn)}, row
        append(conn, "order.placed", {})
        note = next(listening.notifies(stop_after=1))
        assert note.channel == row["channel"], note
        assert note.payload == f'{{"collection": "public.{ORDERS}", "head": {row["head"] + 1}, "count": 1}}', note


def follower_misses_and_repeats_nothing(conn):
    after = head_of(conn)
    for _ in range(250):
        append(conn, "order.followed", {})
    with psycopg.connect(autocommit=True, row_factory=dict_row) as listening:
        follower = follow(listening, after)
        found = []
        for i in range(300):
            if i >= 250:
                append(conn, "order.followed", {})
            found.append(next(follower)["position"])
        follower.close()
    assert found == list(range(after + 1, after + 301)), found


def long_poll_is_woken(conn):
    after = head_of(conn)
    other = meanwhile(conn, lambda other: append(other, "order.placed", {}, tags=["rare:1"]))
    assert [event["tags"] for event in poll(conn, after, tags=["rare:1"])] == [["rare:1"]]
    other.join()
    other = meanwhile(conn, lambda other: append(other, "order.placed", {}))
    assert conn.execute("SELECT eventstore.wait_for(%s, %s)", (ORDERS, after + 1)).fetchone() == {"wait_for": after + 2}
    other.join()
    other = meanwhile(conn, lambda other: append(other, "order.placed", {}))
    assert conn.execute("CALL eventstore.await(%s, %s)", (ORDERS, after + 2)).fetchone() == {"head": after + 3}
    other.join()


def long_poll_comes_to_its_timeout(conn):
    head = head_of(conn)
    assert conn.execute("SELECT eventstore.wait_for(%s, %s, '20 ms') AS head", (ORDERS, head)).fetchone()["head"] == head
    with conn.transaction():
        conn.execute("SET LOCAL statement_timeout = '20 ms'")
        try:
            with conn.transaction():
                poll(conn, head)
        except errors.QueryCanceled:
            pass
        else:
            raise AssertionError("it was not ended")


def long_poll_is_cancelled(conn):
    for statement in ("SELECT eventstore.wait_for(%s, %s, NULL)", "CALL eventstore.await(%s, %s, timeout => NULL)"):
        other = meanwhile(conn, lambda other: conn.cancel_safe())
        try:
            conn.execute(statement, (ORDERS, head_of(conn)))
        except errors.QueryCanceled:
            pass
        else:
            raise AssertionError("it was not cancelled")
        other.join()
    assert head_of(conn) > 0


def subscribe_to_bills(conn, name):
    """A subscription to what is tagged with its name, and three events that it will get."""
    conn.execute("SELECT eventstore.subscribe(%s, %s, query => %s)", (name, ORDERS, Jsonb([{"tags": [name]}])))
    return [append(conn, "order.billed", {}, tags=[name])["position"] for _ in range(3)]


def subscription_moves_with_the_transaction(conn):
    name = ORDERS + "_bills"
    positions = subscribe_to_bills(conn, name)
    handled = []

    def fail_at_the_third(event):
        handled.append(event["position"])
        if len(handled) == 3:
            raise KeyError("the application gave up")

    try:
        process(conn, name, fail_at_the_third)
    except KeyError:
        pass
    assert process(conn, name, lambda event: handled.append(event["position"])) == 3
    assert handled == positions + positions, (handled, positions)
    assert process(conn, name, handled.append) == 0


def subscription_leases_work(conn):
    name = ORDERS + "_mails"
    positions = subscribe_to_bills(conn, name)
    handled = []

    def fail_at_the_second(event):
        if len(handled) == 1:
            raise KeyError("the mail server is away")
        handled.append(event["position"])

    try:
        work(conn, name, "host-1", fail_at_the_second)
    except KeyError:
        pass
    assert work(conn, name, "host-2", lambda event: handled.append(event["position"])) == 2
    assert handled == positions, (handled, positions)
    assert work(conn, name, "host-1", handled.append) == 0


TESTS = [
    append_with_named_arguments, append_batch_of_json, conflict_is_read_again_and_retried,
    conflict_tells_the_versions, condition_refuses_the_second, pages_give_every_event_once,
    streams_are_read_in_both_directions, peek_of_an_unknown_stream_is_null,
    insert_appends_and_returns, prepared_statements_are_used_again, transaction_rolls_back, copy_appends,
    listen_returns_where_to_read_from, follower_misses_and_repeats_nothing, long_poll_is_woken,
    long_poll_comes_to_its_timeout, long_poll_is_cancelled,
    subscription_moves_with_the_transaction, subscription_leases_work,
]


def main():
    failed = 0
    print(f"1..{len(TESTS)}")
    with psycopg.connect(autocommit=True, row_factory=dict_row) as conn:
        conn.execute("SELECT eventstore.create_collection(%s)", (ORDERS,))
        for test in TESTS:
            name = test.__name__.replace("_", " ")
            try:
                test(conn)
                print(f"ok {name}")
            except Exception as error:
                failed += 1
                print(f"not ok {name}\n{type(error).__name__}: {error}")
        conn.execute("SELECT eventstore.drop_collection(%s)", (ORDERS,))
    sys.exit(failed > 0)


main()
