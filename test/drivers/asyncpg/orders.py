"""eventstore from Python, with asyncpg.

Each function below is one thing that an application does.  The connection's
parameters come from PGHOST and the like.
"""
import asyncio
import json
import sys
import uuid

import asyncpg

ORDERS = "orders_asyncpg"

# asyncpg knows the standard SQLSTATEs as classes; those of eventstore go by their code.
VERSION_CONFLICT = "LG001"
CONDITION_FAILED = "LG002"


async def connect():
    """A connection on which jsonb is a Python value.  Binary, so that COPY can use it, too."""
    conn = await asyncpg.connect()
    await conn.set_type_codec("jsonb", schema="pg_catalog", format="binary",
                              encoder=lambda value: b"\x01" + json.dumps(value).encode(),
                              decoder=lambda value: json.loads(value[1:]))
    return conn


async def append(conn, event_type, data, *, tags=(), stream=None, expected_version=None, event_id=None):
    """One event; returns position, version and id."""
    return await conn.fetchrow(
        """SELECT position, version, id FROM eventstore.append($1, $2, data => $3, tags => $4,
               stream => $5, expected_version => $6, id => $7)""",
        ORDERS, event_type, data, tags, stream, expected_version, event_id)


async def append_batch(conn, events):
    return await conn.fetch("SELECT position, version, id FROM eventstore.append_batch($1, $2)", ORDERS, events)


async def read_stream(conn, stream, *, from_version=None, max_count=None, direction="forward"):
    return await conn.fetch(
        """SELECT * FROM eventstore.read_stream($1, $2, from_version => $3, max_count => $4,
               direction => $5)""",
        ORDERS, stream, from_version, max_count, direction)


async def append_retrying(conn, stream, decide):
    """Reads the stream, decides, appends; again when another was quicker.  How often it tried."""
    for attempt in range(1, 10):
        events = await read_stream(conn, stream)
        event_type, data = await decide(events)
        try:
            await append(conn, event_type, data, stream=stream, expected_version=len(events))
            return attempt
        except asyncpg.PostgresError as error:
            if error.sqlstate != VERSION_CONFLICT:
                raise
    raise RuntimeError(f"stream {stream} is never at rest")


async def head_of(conn):
    return await conn.fetchval("SELECT eventstore.head($1)", ORDERS)


async def read_pages(conn, page, after=None):
    """All events up to the head of this moment, page by page."""
    head = await head_of(conn)
    while True:
        events = await conn.fetch(
            "SELECT * FROM eventstore.read($1, after => $2, max_count => $3)", ORDERS, after, page)
        for event in events:
            yield event
        if len(events) < page:
            return
        after = events[-1]["position"]
        if after >= head:
            return


# ---- live ------------------------------------------------------------------------

PAGE = 100


async def read_on(conn, after):
    """The next page of events after a position, and the position to go on from."""
    head = await head_of(conn)
    events = await conn.fetch(
        "SELECT * FROM eventstore.read($1, after => $2, max_count => $3)", ORDERS, after, PAGE)
    last = events[-1]["position"] if events else after
    return events, last if len(events) == PAGE else max(head, last)


async def follow(conn, after):
    """All events after a position, and then each new one, for ever.  conn is for this alone."""
    told = asyncio.Event()
    conn.add_termination_listener(lambda *_: told.set())
    channel = await conn.fetchval("SELECT channel FROM eventstore.listen($1)", ORDERS)
    await conn.add_listener(channel, lambda *_: told.set())
    while True:
        told.clear()
        events, after = await read_on(conn, after)
        for event in events:
            yield event
        if len(events) < PAGE:
            await told.wait()


async def poll(conn, after, tags=()):
    """The events after a position with all of the tags, waited for if need be."""
    return await conn.fetch(
        "SELECT * FROM eventstore.read($1, after => $2, tags => $3, wait => '20 s')", ORDERS, after, tags)


# ---- subscriptions ---------------------------------------------------------------


async def process(conn, name, handle):
    """One batch; its place is kept in the transaction of what handle writes.  How many there were."""
    async with conn.transaction():
        events = await conn.fetch("SELECT * FROM eventstore.poll($1, $2)", name, PAGE)
        for event in events:
            await handle(event)
    return len(events)


async def work(conn, name, member, handle):
    """One batch under a lease, for work outside of the database.  What fails comes again."""
    events = await conn.fetch("SELECT * FROM eventstore.poll($1, $2, member => $3, lease => '1 min')",
                              name, PAGE, member)
    for event in events:
        try:
            await handle(event)
        except Exception:
            await conn.execute("SELECT eventstore.nack($1, first => $2, member => $3)",
                               name, event["position"], member)
            raise
    if events:
        await conn.execute("SELECT eventstore.ack($1, up_to => $2, member => $3)",
                           name, events[-1]["position"], member)
    return len(events)


# ---- the tests: each is a name and what must hold --------------------------------


async def append_with_named_arguments(conn):
    event_id = uuid.uuid4()
    options = {"tags": ["customer:7", "country:de"], "stream": "order-1", "expected_version": 0,
               "event_id": event_id}
    first = await append(conn, "order.placed", {"total": 12.5}, **options)
    assert first["version"] == 1 and first["id"] == event_id, first
    again = await append(conn, "order.placed", {"total": 12.5}, **options)
    assert again == first, (first, again)
    event = (await read_stream(conn, "order-1"))[0]
    assert event["data"] == {"total": 12.5}, event
    assert event["tags"] == ["customer:7", "country:de"], event


async def append_batch_of_json(conn):
    rows = await append_batch(conn, [
        {"type": "order.placed", "stream": f"batch-{i % 3}", "data": {"i": i, "text": "naïve ☃"},
         "tags": ["customer:8"], "expected_version": i // 3} for i in range(30)])
    positions = [row["position"] for row in rows]
    assert positions == list(range(positions[0], positions[0] + 30)), positions
    assert [row["version"] for row in rows] == [i // 3 + 1 for i in range(30)]
    assert (await read_stream(conn, "batch-1"))[0]["data"] == {"i": 1, "text": "naïve ☃"}


async def conflict_is_read_again_and_retried(conn):
    await append(conn, "order.placed", {}, stream="order-2")
    disturbed = []

    async def decide(events):
        if not disturbed:
            other = await connect()
            disturbed.append(await append(other, "order.changed", {}, stream="order-2"))
            await other.close()
        return "order.paid", {"after": len(events)}

    assert await append_retrying(conn, "order-2", decide) == 2
    assert [event["type"] for event in await read_stream(conn, "order-2")] == [
        "order.placed", "order.changed", "order.paid"]


async def conflict_tells_the_versions(conn):
    try:
        await append(conn, "order.paid", {}, stream="order-2", expected_version=1)
    except asyncpg.PostgresError as error:
        assert error.sqlstate == VERSION_CONFLICT, error.sqlstate
        assert error.detail == 'Stream "order-2": expected version 1, actual version 3.'
    else:
        raise AssertionError("no conflict")


async def condition_refuses_the_second(conn):
    async def use(after):
        return await conn.fetchval(
            """SELECT position FROM eventstore.append($1, 'voucher.used', tags => $2,
                   fail_if => $3, after => $4)""",
            ORDERS, ["voucher:SPRING"], [{"types": ["voucher.used"], "tags": ["voucher:SPRING"]}], after)

    used = await use(0)
    try:
        await use(0)
    except asyncpg.PostgresError as error:
        assert error.sqlstate == CONDITION_FAILED, error.sqlstate
        assert error.detail == f"The event at position {used} matches."
    else:
        raise AssertionError("it was used twice")
    await use(used)


async def pages_give_every_event_once(conn):
    whole = await conn.fetch("SELECT * FROM eventstore.read($1)", ORDERS)
    assert len(whole) > 30
    assert [event async for event in read_pages(conn, 7)] == whole


async def streams_are_read_in_both_directions(conn):
    forward = await read_stream(conn, "batch-0", from_version=3, max_count=4)
    assert [event["version"] for event in forward] == [3, 4, 5, 6]
    backward = await read_stream(conn, "batch-0", direction="backward", max_count=2)
    assert [event["version"] for event in backward] == [10, 9]


async def peek_of_an_unknown_stream_is_null(conn):
    peek = "SELECT * FROM eventstore.peek($1, $2)"
    assert (await conn.fetchrow(peek, ORDERS, "nobody"))["position"] is None
    assert (await conn.fetchrow(peek, ORDERS, "order-2"))["type"] == "order.paid"


async def insert_appends_and_returns(conn):
    row = await conn.fetchrow(
        f"INSERT INTO {ORDERS} (type, stream, tags, data) VALUES ($1, $2, $3, $4) RETURNING position, version",
        "order.shipped", "order-2", ["customer:7"], {"with": "post"})
    assert row["version"] == 4, row
    assert await head_of(conn) == row["position"]


async def prepared_statements_are_used_again(conn):
    counted = await conn.prepare("SELECT version FROM eventstore.append($1, 'order.counted', $2, stream => $3)")
    read = await conn.prepare("SELECT data FROM eventstore.read_stream($1, $2, from_version => $3)")
    for i in range(50):
        assert await counted.fetchval(ORDERS, {"i": i}, "counted") == i + 1
        assert await read.fetchval(ORDERS, "counted", i + 1) == {"i": i}


async def transaction_rolls_back(conn):
    try:
        async with conn.transaction():
            await append(conn, "order.placed", {}, stream="rolled-back")
            raise KeyError("the application gave up")
    except KeyError:
        pass
    assert await read_stream(conn, "rolled-back") == []


async def copy_appends(conn):
    await conn.copy_records_to_table(ORDERS, columns=["type", "data", "tags", "stream"], records=[
        ("order.imported", {"i": i}, ["customer:9"], f"imported-{i % 5}") for i in range(500)])
    versions = [event["version"] for event in await read_stream(conn, "imported-4")]
    assert versions == list(range(1, 101)), versions


async def meanwhile(conn, action):
    """Does something, from a connection of its own, once the session of conn sleeps in a wait."""
    other = await connect()
    while not await other.fetchval("SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = $1",
                                   conn.get_server_pid()):
        pass
    await action(other)
    await other.close()


async def listen_returns_where_to_read_from(conn):
    listening = await connect()
    row = await listening.fetchrow("SELECT * FROM eventstore.listen($1)", ORDERS)
    assert tuple(row) == ("public." + ORDERS, await head_of(conn)), row
    note = asyncio.get_running_loop().create_future()
    await listening.add_listener(row["channel"], lambda *arguments: note.set_result(arguments))
    await append(conn, "order.placed", {})
    _, _, channel, payload = await note
    assert channel == row["channel"], channel
    assert payload == f'{{"collection": "public.{ORDERS}", "head": {row["head"] + 1}, "count": 1}}', payload
    await listening.close()


async def follower_misses_and_repeats_nothing(conn):
    after = await head_of(conn)
    for _ in range(250):
        await append(conn, "order.followed", {})
    listening = await connect()
    follower = follow(listening, after)
    found = []
    for i in range(300):
        if i >= 250:
            await append(conn, "order.followed", {})
        found.append((await anext(follower))["position"])
    await follower.aclose()
    await listening.close()
    assert found == list(range(after + 1, after + 301)), found


async def long_poll_is_woken(conn):
    def placed(*tags):
        return meanwhile(conn, lambda other: append(other, "order.placed", {}, tags=tags))

    after = await head_of(conn)
    events, _ = await asyncio.gather(poll(conn, after, ["rare:1"]), placed("rare:1"))
    assert [event["tags"] for event in events] == [["rare:1"]]
    for statement in ("SELECT eventstore.wait_for($1, $2)", "CALL eventstore.await($1, $2)"):
        after += 1
        head, _ = await asyncio.gather(conn.fetchval(statement, ORDERS, after), placed())
        assert head == after + 1, head


async def long_poll_comes_to_its_timeout(conn):
    head = await head_of(conn)
    assert await conn.fetchval("SELECT eventstore.wait_for($1, $2, '20 ms')", ORDERS, head) == head
    try:
        async with conn.transaction():
            await conn.execute("SET LOCAL statement_timeout = '20 ms'")
            await poll(conn, head)
    except asyncpg.QueryCanceledError:
        pass
    else:
        raise AssertionError("it was not ended")


async def long_poll_is_cancelled(conn):
    """asyncpg cancels the statement of a task that is cancelled, as by asyncio.timeout."""
    for statement in ("SELECT eventstore.wait_for($1, $2, NULL)", "CALL eventstore.await($1, $2, timeout => NULL)"):
        waiting = asyncio.create_task(conn.fetchval(statement, ORDERS, await head_of(conn)))

        async def cancel(_):
            waiting.cancel()

        await meanwhile(conn, cancel)
        try:
            await waiting
        except asyncio.CancelledError:
            pass
        else:
            raise AssertionError("it was not cancelled")
    assert await head_of(conn) > 0


async def subscribe_to_bills(conn, name):
    """A subscription to what is tagged with its name, and three events that it will get."""
    await conn.execute("SELECT eventstore.subscribe($1, $2, query => $3)", name, ORDERS, [{"tags": [name]}])
    return [(await append(conn, "order.billed", {}, tags=[name]))["position"] for _ in range(3)]


async def subscription_moves_with_the_transaction(conn):
    name = ORDERS + "_bills"
    positions = await subscribe_to_bills(conn, name)
    handled = []

    async def handle(event):
        handled.append(event["position"])
        if len(handled) == 3:
            raise KeyError("the application gave up")

    try:
        await process(conn, name, handle)
    except KeyError:
        pass
    assert await process(conn, name, handle) == 3
    assert handled == positions + positions, (handled, positions)
    assert await process(conn, name, handle) == 0


async def subscription_leases_work(conn):
    name = ORDERS + "_mails"
    positions = await subscribe_to_bills(conn, name)
    handled = []
    away = [False, True, False, False]

    async def handle(event):
        if away.pop(0):
            raise KeyError("the mail server is away")
        handled.append(event["position"])

    try:
        await work(conn, name, "host-1", handle)
    except KeyError:
        pass
    assert await work(conn, name, "host-2", handle) == 2
    assert handled == positions, (handled, positions)
    assert await work(conn, name, "host-1", handle) == 0


TESTS = [
    append_with_named_arguments, append_batch_of_json, conflict_is_read_again_and_retried,
    conflict_tells_the_versions, condition_refuses_the_second, pages_give_every_event_once,
    streams_are_read_in_both_directions, peek_of_an_unknown_stream_is_null,
    insert_appends_and_returns, prepared_statements_are_used_again, transaction_rolls_back, copy_appends,
    listen_returns_where_to_read_from, follower_misses_and_repeats_nothing, long_poll_is_woken,
    long_poll_comes_to_its_timeout, long_poll_is_cancelled,
    subscription_moves_with_the_transaction, subscription_leases_work,
]


async def main():
    failed = 0
    print(f"1..{len(TESTS)}")
    conn = await connect()
    await conn.execute("SELECT eventstore.create_collection($1)", ORDERS)
    for test in TESTS:
        name = test.__name__.replace("_", " ")
        try:
            await test(conn)
            print(f"ok {name}")
        except Exception as error:
            failed += 1
            print(f"not ok {name}\n{type(error).__name__}: {error}")
    await conn.execute("SELECT eventstore.drop_collection($1)", ORDERS)
    await conn.close()
    return failed > 0


sys.exit(asyncio.run(main()))
