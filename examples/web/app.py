"""A web page over eventstore: events as they come, who lags, what is in the stores.

It only reads, with the rights of the role that it connects as: a collection or a
store that this role may not SELECT from is not shown.  The database's address comes
from PGHOST, PGDATABASE and the like.

A browser that watches holds no connection of the database, only a cursor in this
process.  One connection listens for all of them (Hub); whoever it wakes borrows one
from the pool for a page of events, gives it back, and then sends that page.  So a
browser that is slow or gone delays nobody, and what it has not seen yet is not kept
here but in the collection.  The cursor goes with each event as its id; a browser
that comes back says it (Last-Event-ID), to whichever process it finds.
"""
import argparse
import asyncio
import contextlib
import json
import logging
import pathlib

import asyncpg
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

STATIC = pathlib.Path(__file__).parent / "static"
log = logging.getLogger("eventstore.web")

PAGE = 100  # events of one answer
KEYS = 100
WATCHERS = 200  # browsers that follow at the same time
IDLE_SECONDS = 15  # how long a watcher waits before it looks for itself
STANDBY_SECONDS = 1  # the same where nobody can listen
PACE_SECONDS = 0.1  # between two turns of a watcher, however often there is something new
PREVIEW = 300  # characters of data in a list
WHOLE = 200_000  # characters of data where one event or value is shown

SETTINGS = {
    "application_name": "eventstore web",
    "default_transaction_read_only": "on",
    "statement_timeout": "5s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "10s",
}

# What is the caller's fault, or says something to him; all else is 500 and goes to the log.
HTTP_STATUS = {"42501": 403, "42P01": 404, "3F000": 404, "42602": 404, "LG007": 404,
               "LG004": 410, "LG005": 410, "57014": 503, "53300": 503}
AHEAD_OF_THE_LOG, NO_LONGER_KEPT = "LG004", "LG005"
TRANSIENT = ("08", "40", "53", "55", "57")  # classes of SQLSTATE: the browser tries again
UNREACHABLE = (OSError, asyncpg.InterfaceError, TimeoutError)


# ---- who wakes the watchers ------------------------------------------------------


class Hub:
    """One connection that listens to what is watched, and wakes the watchers.

    A notification that is lost with its connection costs a watcher nothing but time:
    each looks for itself every IDLE_SECONDS.
    """

    def __init__(self):
        self.conn = None
        self.watchers = {}  # collection → the events to set
        self.channels = {}  # collection → channel that this connection listens to
        self.lock = asyncio.Lock()
        self.ending = False

    @contextlib.asynccontextmanager
    async def watch(self, collection):
        told = asyncio.Event()
        self.watchers.setdefault(collection, set()).add(told)
        try:
            yield told
        finally:
            self.watchers[collection].discard(told)
            if not self.watchers[collection]:
                del self.watchers[collection]

    def count(self):
        return sum(map(len, self.watchers.values()))

    def tell(self, collection):
        for told in self.watchers.get(collection, ()):
            told.set()

    async def ensure_listening(self, collection):
        """Listens; again after the connection was lost.  How long to wait for a notification."""
        try:
            await self.listen(collection)
            return IDLE_SECONDS
        except asyncpg.ReadOnlySQLTransactionError:  # a hot standby
            return STANDBY_SECONDS

    async def listen(self, collection):
        async with self.lock:
            if self.conn is None or self.conn.is_closed():
                self.channels = {}
                self.conn = await asyncpg.connect(server_settings=SETTINGS, timeout=5, command_timeout=10)
                self.conn.add_termination_listener(self.lost)
            for idle in self.channels.keys() - self.watchers.keys():
                channel = self.channels.pop(idle)
                if channel not in self.channels.values():
                    await self.conn.remove_listener(channel, self.heard)
            if collection not in self.channels:
                channel = await self.conn.fetchval(
                    "SELECT channel FROM eventstore.listen($1::text::regclass)", collection)
                await self.conn.add_listener(channel, self.heard)
                self.channels[collection] = channel

    def heard(self, _conn, _pid, channel, _payload):
        for collection, its_channel in self.channels.items():
            if its_channel == channel:
                self.tell(collection)

    def lost(self, _conn):
        for collection in self.watchers:
            self.tell(collection)

    def end(self):
        """Sends the watchers home; they would keep the server from ending."""
        self.ending = True
        self.lost(None)

    async def close(self):
        if self.conn is not None:
            await self.conn.close(timeout=5)


# ---- events ----------------------------------------------------------------------

LISTED = """position, stream, version, type, tags, created_at,
    left(data::text, $1) AS data, length(data::text) > $1 AS cut, octet_length(body) AS body_bytes"""


def listed(row):
    return {**row, "created_at": row["created_at"].isoformat()}


def lists(request):
    """The filters of a request: tags (an event has all) and types (any)."""
    return (request.query_params.getlist("tag") or None, request.query_params.getlist("type") or None)


def integer(value, name):
    if value in (None, ""):
        return None
    if not value.isascii() or not value.isdigit() or int(value) >= 2**63:
        raise HTTPException(400, f"{name} is no position")
    return int(value)


def required(request, name):
    value = request.query_params.get(name)
    if not value:
        raise HTTPException(400, f"which {name}?")
    return value


async def recent_events(request):
    """The newest events, or those before a position; and where to follow from."""
    collection, (tags, types) = required(request, "collection"), lists(request)
    before = integer(request.query_params.get("before"), "before")
    async with request.app.state.pool.acquire(timeout=5) as conn:
        head = await conn.fetchval("SELECT eventstore.head($1::text::regclass)", collection)
        rows = await conn.fetch(
            f"SELECT {LISTED} FROM eventstore.read($2::text::regclass, before => $3, max_count => $4,"
            " tags => $5, types => $6, direction => 'backward')",
            PREVIEW, collection, before, PAGE, tags, types)
    return JSONResponse({"after": max(head, *(row["position"] for row in rows[:1]), 0),
                         "events": [listed(row) for row in rows], "more": len(rows) == PAGE})


async def one_event(request):
    """All of one event."""
    position = integer(request.path_params["position"], "position")
    async with request.app.state.pool.acquire(timeout=5) as conn:
        row = await conn.fetchrow(
            """SELECT position, stream, version, id::text, type, tags, left(jsonb_pretty(data), $1) AS data,
                   left(jsonb_pretty(metadata), $1) AS metadata, substr(body, 1, $1) AS body, created_at
               FROM eventstore.read($2::text::regclass, after => $3::bigint - 1, max_count => 1)
               WHERE position = $3""",
            WHOLE, required(request, "collection"), position)
    if row is None:
        raise HTTPException(404, f"there is no event at position {position}")
    return JSONResponse({**listed(row), "body": text_of(row["body"])})


def text_of(body):
    """Bytes, as the text that they are, or in hexadecimal."""
    if body is None:
        return None
    try:
        return body.decode()
    except UnicodeDecodeError:
        return "\\x" + body.hex()


async def read_on(pool, collection, after, tags, types):
    """The next page of events after a position, and the position to go on from."""
    async with pool.acquire(timeout=10) as conn:
        head = await conn.fetchval("SELECT eventstore.head($1::text::regclass)", collection)
        rows = await conn.fetch(
            f"SELECT {LISTED} FROM eventstore.read($2::text::regclass, after => $3, max_count => $4,"
            " tags => $5, types => $6)",
            PREVIEW, collection, after, PAGE, tags, types)
    if len(rows) == PAGE:
        return rows, rows[-1]["position"]
    return rows, max(head, after or 0, *(row["position"] for row in rows[-1:]))


def message(data, event=None, position=None):
    """One message of text/event-stream.  Without data it only moves the browser's cursor."""
    lines = []
    if position is not None:
        lines.append(f"id: {position}")
    if event is not None:
        lines.append(f"event: {event}")
    if data is not None:
        lines.append("data: " + json.dumps(data))
    return "\n".join(lines) + "\n\n"


async def follow(app, collection, after, tags, types):
    """All that comes after a position, for ever."""
    yield "retry: 1000\n\n"
    async with app.state.hub.watch(collection) as told:
        while not app.state.hub.ending:
            told.clear()
            try:
                seconds = await app.state.hub.ensure_listening(collection)
                rows, after = await read_on(app.state.pool, collection, after, tags, types)
            except asyncpg.PostgresError as error:
                if error.sqlstate in (AHEAD_OF_THE_LOG, NO_LONGER_KEPT):
                    # The browser missed what is gone, and is told so: from the oldest that is kept.
                    yield message(explain(error), event="lost")
                    after = None
                    continue
                if error.sqlstate[:2] not in TRANSIENT:
                    yield message(explain(error), event="refused")
                return
            except UNREACHABLE as error:
                log.warning("a live view ends, its browser will come back: %r", error)
                return
            for row in rows:
                yield message(listed(row), position=row["position"])
            if len(rows) < PAGE:
                yield message(None, position=after)
                await asyncio.sleep(PACE_SECONDS)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await told.wait()


async def live(request):
    collection, (tags, types) = required(request, "collection"), lists(request)
    after = request.headers.get("last-event-id") or request.query_params.get("after")
    if request.app.state.hub.count() >= WATCHERS:
        raise HTTPException(503, "too many browsers are watching")
    stream = follow(request.app, collection, integer(after, "after"), tags, types)
    return StreamingResponse(stream, media_type="text/event-stream",
                             headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


# ---- collections and lag ---------------------------------------------------------

# Without the number of events, for which they would all be counted.
OVERVIEW = {
    "collections": """SELECT collection::text, head, bytes, segments, notify, retain_events,
            retain_for::text, retain_bytes FROM eventstore.collections ORDER BY 1 LIMIT 500""",
    "subscriptions": """SELECT name, collection::text, lanes, position, lag_events, lag_seconds, members
        FROM eventstore.subscriptions ORDER BY lag_events DESC NULLS LAST, name LIMIT 500""",
    "sources": """SELECT s.name, s.topic, s.target::text, s.state, s.message,
            (SELECT sum(p.lag_records)::bigint FROM eventstore.source_partitions p WHERE p.source = s.name)
                AS lag_records
        FROM eventstore.sources s ORDER BY s.name LIMIT 500""",
    "sinks": """SELECT name, topic, collection::text, state, message, position, lag_events
        FROM eventstore.sinks ORDER BY name LIMIT 500""",
    "stores": """SELECT store::text, changelog::text, format, key_format
        FROM eventstore.stores ORDER BY 1 LIMIT 500""",
}


async def overview(request):
    async with request.app.state.pool.acquire(timeout=5) as conn:
        answer = {name: [dict(row) for row in await conn.fetch(sql)] for name, sql in OVERVIEW.items()}
        answer["session"] = dict(await conn.fetchrow(
            "SELECT current_database() AS database, current_user::text AS role, now()::text AS now"))
    return JSONResponse({**answer, "watchers": request.app.state.hub.count()})


# ---- stores ----------------------------------------------------------------------

PREVIEWED = {"json": "value::text", "text": "value", "bytes": "encode(value, 'hex')"}
SHOWN = {**PREVIEWED, "json": "jsonb_pretty(value)"}


async def find_store(conn, name):
    """The store's row; its name comes as the server writes and quotes it, to stand in a query."""
    store = await conn.fetchrow(
        """SELECT store::text AS name, changelog::text, format, key_format
           FROM eventstore.stores WHERE store = $1::text::regclass""", name)
    if store is None:
        raise HTTPException(404, f"there is no store {name}")
    return store


def key_of(store, text):
    if store["key_format"] == "text":
        return text
    try:
        return bytes.fromhex(text.removeprefix("\\x"))
    except ValueError:
        raise HTTPException(400, "a key of this store is written in hexadecimal, like \\x0aff") from None


def above(prefix):
    """The least key that is above all with this prefix; None where there is none."""
    units, top = (list(prefix), 0xFF) if isinstance(prefix, bytes) else (list(map(ord, prefix)), 0x10FFFF)
    while units:
        unit = units.pop() + 1
        if unit <= top:
            units.append(0xE000 if unit == 0xD800 and top > 0xFF else unit)
            return bytes(units) if isinstance(prefix, bytes) else "".join(map(chr, units))
    return None


async def keys(request):
    """The keys that begin with a prefix, a page of them."""
    async with request.app.state.pool.acquire(timeout=5) as conn:
        store = await find_store(conn, required(request, "store"))
        prefix = key_of(store, request.query_params.get("prefix", ""))
        after, limit = request.query_params.get("after"), above(prefix)
        rows = await conn.fetch(
            f"""SELECT key, version, left({PREVIEWED[store["format"]]}, $1) AS value FROM {store["name"]}
                WHERE key {">" if after else ">="} $2 {"" if limit is None else "AND key < $4"}
                ORDER BY key LIMIT $3""",
            PREVIEW, key_of(store, after) if after else prefix, KEYS + 1, *([] if limit is None else [limit]))
    return JSONResponse({"more": len(rows) > KEYS, "keys": [
        {**row, "key": text_of_key(row["key"])} for row in rows[:KEYS]]})


def text_of_key(key):
    return "\\x" + key.hex() if isinstance(key, bytes) else key


async def one_key(request):
    """What a key holds, and what it held."""
    async with request.app.state.pool.acquire(timeout=5) as conn:
        store = await find_store(conn, required(request, "store"))
        key = request.query_params.get("key", "")
        row = await conn.fetchrow(
            f"""SELECT left({SHOWN[store["format"]]}, $1) AS value, version, updated_at
                FROM {store["name"]} WHERE key = $2""", WHOLE, key_of(store, key))
        history, refused = [], None
        if store["changelog"] is not None:
            try:
                history = await conn.fetch(
                    """SELECT position, version, type, created_at, left(data::text, $1) AS data,
                           substr(body, 1, $1) AS body
                       FROM eventstore.read_stream($2::text::regclass, $3, direction => 'backward', max_count => $4)""",
                    PREVIEW, store["changelog"], key, PAGE)
            except asyncpg.InsufficientPrivilegeError as error:
                refused = explain(error)["message"]
    return JSONResponse({
        "key": key, "changelog": store["changelog"], "refused": refused,
        "current": row and {**row, "updated_at": row["updated_at"].isoformat()},
        "history": [{**listed(event), "body": text_of(event["body"])} for event in history]})


# ---- errors ----------------------------------------------------------------------


def explain(error):
    return {"sqlstate": error.sqlstate, "message": str(error.args[0] if error.args else error),
            "detail": getattr(error, "detail", None), "hint": getattr(error, "hint", None)}


async def refused_by_postgres(_request, error):
    status = HTTP_STATUS.get(error.sqlstate) or (400 if (error.sqlstate or "").startswith("22") else 500)
    if status == 500:
        log.error("%s: %s", error.sqlstate, error)
        return JSONResponse({"message": "the database refused"}, status)
    return JSONResponse(explain(error), status)


async def refused_here(_request, error):
    return JSONResponse({"message": error.detail}, error.status_code)


async def unreachable(_request, error):
    log.error("no answer of the database: %r", error)
    return JSONResponse({"message": "the database does not answer"}, 503)


# ---- the application -------------------------------------------------------------

HEADERS = [
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
                                 b" img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """Scripts and styles from here only, in the page; questions from the page only, here."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        elsewhere = dict(scope["headers"]).get(b"sec-fetch-site") in (b"cross-site", b"same-site")
        if elsewhere and scope["path"].startswith("/api/"):
            return await JSONResponse({"message": "not from there"}, 403)(scope, receive, send)

        async def send_with_headers(part):
            if part["type"] == "http.response.start":
                part = {**part, "headers": [*part["headers"], *HEADERS]}
            await send(part)

        await self.app(scope, receive, send_with_headers)


class Server(uvicorn.Server):
    async def shutdown(self, sockets=None):
        self.config.app.state.hub.end()
        await super().shutdown(sockets)


@contextlib.asynccontextmanager
async def lifespan(app):
    app.state.hub = Hub()
    async with asyncpg.create_pool(min_size=1, max_size=5, server_settings=SETTINGS, timeout=5,
                                   command_timeout=10, max_inactive_connection_lifetime=60) as app.state.pool:
        yield
        await app.state.hub.close()


def make_app(allowed_hosts):
    return Starlette(
        routes=[
            Route("/", lambda _request: FileResponse(STATIC / "index.html")),
            Route("/api/overview", overview),
            Route("/api/events", recent_events),
            Route("/api/events/{position}", one_event),
            Route("/api/live", live),
            Route("/api/keys", keys),
            Route("/api/key", one_key),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        # Of the host by its name, lest another site have its own name point here.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts), Middleware(Guard)],
        exception_handlers={asyncpg.PostgresError: refused_by_postgres, HTTPException: refused_here,
                            **dict.fromkeys(UNREACHABLE, unreachable)},
        lifespan=lifespan)


def main():
    parser = argparse.ArgumentParser(description="A web page over eventstore.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--allow-host", action="append", default=[],
                        help="further name by which browsers may ask for it")
    options = parser.parse_args()
    app = make_app(["127.0.0.1", "localhost", *options.allow_host])
    Server(uvicorn.Config(app, host=options.host, port=options.port, log_level="warning",
                          timeout_graceful_shutdown=2)).run()


if __name__ == "__main__":
    main()
