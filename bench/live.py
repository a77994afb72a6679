"""Notifications, waiting readers and subscriptions, beside the usual ways."""
import selectors
import statistics
import threading
import time

import psycopg
from lib import message_db, options, report, server

LISTENERS = 20 if options.QUICK else 200
CLIENTS = 8 if options.QUICK else 64
WAITERS = (1, 10) if options.QUICK else (1, 100)
WAKES = 20 if options.QUICK else 500
DRAINED = 10_000 if options.QUICK else 200_000
SUBSCRIPTIONS = 100 if options.QUICK else 10_000


def connect(**options_):
    return psycopg.connect("", autocommit=True, **options_)


# ---- what notifications cost who appends ---------------------------------------------

class Listeners:
    """Idle sessions that LISTEN, each to its own channel, or all to one."""

    def __init__(self, count, channel=None):
        self.sessions = [connect() for _ in range(count)]
        for i, session in enumerate(self.sessions):
            session.execute(f'LISTEN "{channel or f"other {i}"}"')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for session in self.sessions:
            session.close()


class Waiters:
    """Sessions that wait for an event that does not come."""

    def __init__(self, count, collection):
        self.sessions = [connect() for _ in range(count)]
        for i, session in enumerate(self.sessions):
            session.pgconn.send_query(
                f"SELECT * FROM eventstore.read('{collection}', tags => '{{rare {i}}}', wait => '1 hour')".encode())
            session.pgconn.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for session in self.sessions:
            session.cancel()
            session.close()


def append_to(collection):
    return (f"{server.PICK_TAGS}SELECT * FROM eventstore.append('{collection}', 'order.placed', "
            f":data, {server.TAGS});")


TRIGGERED = f"{server.PICK_TAGS}INSERT INTO triggered (type, data, tags) VALUES ('order.placed', :data, {server.TAGS});"


def prepare_appends():
    for name in ("quiet", "heard", "listened", "awaited"):
        server.make_collection(name)
    server.sql("SELECT eventstore.set_option('quiet', 'notify', 'none');")
    server.make_plain("triggered", "quiet")
    server.sql("""
        CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_notify('triggered', NEW.position::text); RETURN NULL; END $$;
        CREATE TRIGGER tell AFTER INSERT ON triggered FOR EACH ROW EXECUTE FUNCTION tell();
    """)
    message_db.install()


def measure_appends():
    scripts = {
        "notify none": append_to("quiet"),
        "notify head": append_to("heard"),
        "notify head, and one listens": append_to("listened"),
        f"{LISTENERS} wait, each for a rare tag": append_to("awaited"),
        "a trigger that calls pg_notify": TRIGGERED,
        "message-db": message_db.WRITE,
    }
    with Listeners(LISTENERS), Listeners(1, "public.listened"), Waiters(LISTENERS, "awaited"):
        for script in scripts.values():
            server.pgbench(script, 8, 1)
        figures = report.measure({
            name: lambda script=script: server.pgbench(script, CLIENTS, options.SECONDS)
            for name, script in scripts.items()})
    lines = [[name, report.median(figures, name),
              f"{report.ratio(figures, name, 'notify none'):.2f}"] for name in scripts]
    text = report.table([f"{CLIENTS} clients, {LISTENERS} idle listeners to other channels",
                         "appends/s", "/ notify none"], lines)
    return text, [[f"appends, notify head, {LISTENERS} listeners elsewhere",
                   report.against(figures, "notify head", "notify none", 0.95), "0.95 × notify none"]]


# ---- from commit to wake-up -----------------------------------------------------------------

class Crowd:
    """Sessions that wait side by side; one thread takes the time of each answer."""

    def __init__(self, count):
        self.sessions = [connect() for _ in range(count)]

    def send(self, query):
        for session in self.sessions:
            session.pgconn.send_query(query.encode())
            session.pgconn.flush()

    def answers(self):
        """Per session: when the server gave the answer, as its query says."""
        times = []
        with selectors.DefaultSelector() as selector:
            for session in self.sessions:
                selector.register(session.pgconn.socket, selectors.EVENT_READ, session.pgconn)
            while selector.get_map():
                for key, _ in selector.select(10):
                    pgconn = key.data
                    pgconn.consume_input()
                    while not pgconn.is_busy():
                        result = pgconn.get_result()
                        if result is None:
                            selector.unregister(key.fileobj)
                            break
                        times.append(float(result.get_value(0, 0)))
        return times

    def close(self):
        for session in self.sessions:
            session.close()


def asleep(session, count):
    while session.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Extension'"
                          " AND query LIKE '%wait_for%' AND pid <> pg_backend_pid()").fetchone()[0] < count:
        time.sleep(0.001)


def wake_waiters(count):
    """Milliseconds from the appender's answer to the return of each wait_for."""
    appender = connect()
    monitor = connect()
    crowd = Crowd(count)
    delays = []
    for _ in range(max(10, WAKES // count)):
        head = appender.execute("SELECT eventstore.head('woken')").fetchone()[0]
        crowd.send(f"SELECT extract(epoch FROM clock_timestamp()) FROM eventstore.wait_for('woken', {head})")
        asleep(monitor, count)
        appender.execute("SELECT eventstore.append('woken', 'x')", prepare=True)
        committed = time.time()
        delays += [(t - committed) * 1000 for t in crowd.answers()]
    crowd.close()
    appender.close()
    monitor.close()
    return delays


def wake_listeners(count):
    """The same for LISTEN: until the notification has come to the client."""
    appender = connect()
    sessions = [connect() for _ in range(count)]
    for session in sessions:
        session.execute("SELECT * FROM eventstore.listen('woken')")
    delays = []
    with selectors.DefaultSelector() as selector:
        for session in sessions:
            selector.register(session.pgconn.socket, selectors.EVENT_READ, session.pgconn)
        for _ in range(max(10, WAKES // count)):
            time.sleep(0.02 + 0.0002 * count)
            appender.execute("SELECT eventstore.append('woken', 'x')", prepare=True)
            committed = time.time()
            heard = 0
            while heard < count:
                for key, _ in selector.select(10):
                    key.data.consume_input()
                    while key.data.notifies() is not None:
                        delays.append((time.time() - committed) * 1000)
                        heard += 1
    for session in sessions:
        session.close()
    appender.close()
    return delays


def poll_every(seconds, query, tick=None):
    """The same for a client that asks again and again; another calls the ticker."""
    appender = connect()
    asker = connect()
    delays = []
    stop = threading.Event()

    def run_ticker():
        with connect() as session:
            while not stop.wait(seconds):
                session.execute(tick)

    ticker = threading.Thread(target=run_ticker) if tick else None
    if ticker:
        ticker.start()
    for i in range(20 if options.QUICK else 50):
        committed = query(appender, asker, None)
        # How long it is to the next poll, when something comes: anything up to all of it.
        time.sleep(seconds * ((i * 0.37) % 1))
        while not query(appender, asker, committed):
            time.sleep(seconds)
        delays.append((time.time() - committed) * 1000)
    stop.set()
    if ticker:
        ticker.join()
    appender.close()
    asker.close()
    return delays


def ask_head(appender, asker, committed):
    if committed is None:
        ask_head.cursor = appender.execute("SELECT eventstore.head('woken')").fetchone()[0]
        appender.execute("SELECT eventstore.append('woken', 'x')")
        return time.time()
    return asker.execute("SELECT eventstore.head('woken')").fetchone()[0] > ask_head.cursor


def ask_pgq(appender, asker, committed):
    if committed is None:
        appender.execute("SELECT pgq.insert_event('woken', 'x', 'y')")
        return time.time()
    batch = asker.execute("SELECT pgq.next_batch('woken', 'asker')").fetchone()[0]
    if batch is None:
        return False
    events = asker.execute("SELECT count(*) FROM pgq.get_batch_events(%s)", (batch,)).fetchone()[0]
    asker.execute("SELECT pgq.finish_batch(%s)", (batch,))
    return events > 0


def prepare_wakes():
    server.make_collection("woken")
    server.sql("""
        SELECT eventstore.append('woken', 'x');
        CREATE EXTENSION pgq;
        SELECT pgq.create_queue('woken'), pgq.register_consumer('woken', 'asker');
        UPDATE pgq.queue SET queue_ticker_max_lag = '0', queue_ticker_idle_period = '0', queue_ticker_max_count = 1;
    """)


def percentile(delays, part):
    ordered = sorted(delays)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def measure_wakes():
    ways = {}
    for count in WAITERS:
        ways[f"wait_for, {count} waiting"] = (wake_waiters(count), 0.5, 2)
        ways[f"LISTEN, {count} listening"] = (wake_listeners(count), None, 3)
    ways["a poll every 100 ms"] = (poll_every(0.1, ask_head), None, None)
    ways["PgQ, ticker and poll every 100 ms"] = (poll_every(0.1, ask_pgq, "SELECT pgq.ticker()"), None, None)
    lines = []
    targets = []
    for name, (delays, median_ms, p99_ms) in ways.items():
        median = statistics.median(delays)
        p99 = percentile(delays, 0.99)
        lines.append([name, f"{median:.2f}", f"{p99:.2f}"])
        if p99_ms:
            missed = (median_ms and median > median_ms) or p99 > p99_ms
            wanted = f"p99 below {p99_ms} ms" + (f", median below {median_ms} ms" if median_ms else "")
            targets.append([name, report.verdict(f"p99 {p99:.2f} ms, median {median:.2f} ms", not missed), wanted])
    return report.table(["from the appender's answer to the wake-up, ms", "median", "p99"], lines), targets


# ---- subscriptions --------------------------------------------------------------------------

def drain(name, lanes):
    """Events per second that as many consumers as there are lanes write to a table."""
    server.sql(f"""
        TRUNCATE target;
        SELECT eventstore.subscribe('{name}', 'drained', lanes => {lanes}, after => 0);
    """)
    began = time.time()

    def consume():
        with connect() as session:
            while session.execute(
                    f"INSERT INTO target SELECT position, type FROM eventstore.poll('{name}', 1000)").rowcount:
                pass

    threads = [threading.Thread(target=consume) for _ in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = DRAINED / (time.time() - began)
    done = int(server.sql("SELECT count(*) FROM target"))
    server.sql(f"SELECT eventstore.unsubscribe('{name}')")
    if done != DRAINED:
        raise SystemExit(f"{name}: {done} of {DRAINED} events")
    return rate


def measure_subscriptions():
    server.make_collection("drained")
    server.fill("drained", DRAINED, 1000)
    server.sql("CREATE UNLOGGED TABLE target (position bigint, type text)")
    figures = report.measure({f"poll of 1000, {lanes} lanes": lambda lanes=lanes: drain(f"d{lanes}", lanes)
                              for lanes in (1, 4)})
    lines = [[name, report.median(figures, name)] for name in figures]
    text = report.table(["an insert for each event, in the same transaction", "events/s"], lines)

    server.make_collection("alone")
    server.make_collection("followed")
    server.sql(f"SELECT count(*) FROM generate_series(1, {SUBSCRIPTIONS}) i,"
               " LATERAL (SELECT eventstore.subscribe('many ' || i, 'followed')) s")
    figures = report.measure({
        name: lambda name=name: server.pgbench(append_to(name), 8, options.SECONDS)
        for name in ("alone", "followed")})
    lines = [["no subscription", report.median(figures, "alone")],
             [f"{SUBSCRIPTIONS:,} subscriptions", report.median(figures, "followed")]]
    return [text, report.table(["8 clients", "appends/s"], lines)], [
        [f"appends with {SUBSCRIPTIONS:,} subscriptions",
         report.against(figures, "followed", "alone", 0.95), "unchanged (0.95 ×)"]]


def main():
    prepare_appends()
    prepare_wakes()
    wakes, wake_targets = measure_wakes()
    appends, append_targets = measure_appends()
    subscriptions, subscription_targets = measure_subscriptions()
    report.write("live", "Notifications, waiting, subscriptions", [
        appends, wakes, *subscriptions], append_targets + wake_targets + subscription_targets)


main()
