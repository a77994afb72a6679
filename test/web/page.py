"""examples/web, as somebody sees it: the application with the rights of a role that may
read some of what there is, and a browser.

Prints "ok NAME" or "not ok NAME" for each test.  They follow each other on one page.
"""
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request

from webdriver import Browser, until

APP = pathlib.Path(__file__).parents[2] / "examples" / "web" / "app.py"
DATABASE, ROLE = "web_page", "web_viewer"
HOSTILE = "<img src=x onerror=\"window.pwned = 1\"><script>window.pwned = 1</script>"

POSITIONS = "[...document.querySelectorAll('#log .event')].map((row) => Number(row.dataset.position))"


def sql(text, database=DATABASE, **variables):
    """Runs SQL as its superuser; :'name' is a variable."""
    options = [f"--set={name}={value}" for name, value in variables.items()]
    return subprocess.run(["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, *options], check=True,
                          input=text, stdout=subprocess.PIPE, text=True).stdout.strip()


def append(collection, event_type="order.placed", tags="{}", data="{}", stream=""):
    return int(sql("""SELECT position FROM eventstore.append(:'collection', :'type', :'data', tags => :'tags',
                          stream => nullif(:'stream', ''))""",
                   collection=collection, type=event_type, tags=tags, data=data, stream=stream))


def prepare():
    sql(f"DROP DATABASE IF EXISTS {DATABASE}; DROP ROLE IF EXISTS {ROLE}; CREATE DATABASE {DATABASE};"
        f" CREATE ROLE {ROLE} LOGIN", "postgres")
    sql(f"""
        CREATE EXTENSION eventstore;
        SELECT eventstore.create_collection('orders'), eventstore.create_collection('secret'),
            eventstore.create_collection('many'), eventstore.create_collection('short', segment_size => 100),
            eventstore.create_store('settings');
        SELECT count(*) FROM eventstore.append_batch('orders', (SELECT jsonb_agg(jsonb_build_object('type',
            'order.placed', 'tags', jsonb_build_array('customer:' || i % 9))) FROM generate_series(1, 150) i));
        SELECT count(eventstore.put('settings', 'user/' || i, jsonb_build_object('size', i))) FROM generate_series(1, 250) i;
        SELECT eventstore.put('settings', 'user/7', '{{"size": 70}}');
        GRANT SELECT ON orders, many, short, settings, settings_changelog TO {ROLE};
    """)


class Application:
    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.process = subprocess.Popen([sys.executable, APP, "--port", str(self.port)],
                                        env={**os.environ, "PGDATABASE": DATABASE, "PGUSER": ROLE})
        until(self.answers, "the application answers")

    def answers(self):
        try:
            return self.get("/api/overview")
        except urllib.error.URLError:
            assert self.process.poll() is None, "the application ended"
            return None

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def stop(self):
        self.process.terminate()
        self.process.wait()

    @contextlib.contextmanager
    def following(self, collection, header=""):
        """A browser that follows from the first event, as a socket; it reads when somebody reads."""
        with socket.socket() as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            browser.connect(("127.0.0.1", self.port))
            browser.sendall(f"GET /api/live?collection={collection} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode())
            yield browser


# ---- the tests: each is a name and what must hold --------------------------------


def only_what_the_role_may_read_is_shown(app, browser):
    browser.open(app.url)
    browser.until("document.querySelector('#state').dataset.state === 'live'")
    assert browser.run("return [...document.querySelectorAll('#collection option')].map((o) => o.value)") == [
        "many", "orders", "settings_changelog", "short"]
    try:
        app.get("/api/events?collection=secret")
    except urllib.error.HTTPError as error:
        assert error.code == 403, error
    else:
        raise AssertionError("it was shown")


def a_live_event_shows_up_without_reload(app, browser):
    browser.open(app.url + "/#/events?collection=orders")
    browser.until("document.querySelector('#state').dataset.state === 'live' && document.querySelector('#log .event')")
    assert browser.run("return " + POSITIONS) == list(range(150, 50, -1))
    browser.run("window.loaded = 1")
    began = time.monotonic()
    for _ in range(3):
        position = append("orders", stream="order-1")
        browser.until("document.querySelector('#log .event').dataset.position == arguments[0]", position)
    assert time.monotonic() - began < 15, "nobody heard, somebody looked"
    browser.click("#older")
    browser.until(POSITIONS + ".at(-1) === 1")
    assert browser.run("return " + POSITIONS) == list(range(153, 0, -1))
    browser.run("document.querySelector('#log .event').click()")
    browser.until("document.querySelector('#log .detail')?.textContent.includes('order-1')")
    assert browser.run("return window.loaded") == 1


def the_tag_filter_shows_what_has_all_tags(app, browser):
    browser.type("#tag", "customer:7\ue007")  # Enter
    browser.until("document.querySelectorAll('#log .event').length === 16")
    browser.type("#tag", "paid\ue007")
    browser.until("document.querySelector('#tags').children.length === 2 && " + POSITIONS + ".length === 0"
                  " && document.querySelector('#state').dataset.state === 'live'")
    append("orders", tags="{customer:7}")
    append("orders", tags="{paid}")
    position = append("orders", tags="{paid,customer:7}")
    browser.until(POSITIONS + ".length")
    assert browser.run("return " + POSITIONS) == [position]
    browser.click("#tags .tag")
    browser.until(POSITIONS + ".length === 2")


def what_events_hold_stays_text(app, browser):
    browser.open(app.url + "/#/events?collection=orders")
    browser.until("document.querySelector('#state').dataset.state === 'live'")
    position = append("orders", HOSTILE, "{" + json.dumps(HOSTILE) + "}", json.dumps({"<b>": HOSTILE}), HOSTILE)
    browser.until("document.querySelector('#log .event')?.dataset.position == arguments[0]", position)
    browser.run("document.querySelector('#log .event').click()")
    browser.until("document.querySelector('#log .detail')")
    sql("SELECT eventstore.put('settings', :'hostile', to_jsonb(:'hostile'::text))", hostile=HOSTILE)
    shown = browser.run("return document.querySelector('#log tbody').textContent")
    assert shown.count("<img src=x") >= 6, shown
    browser.run("location.hash = '/stores?' + new URLSearchParams({store: 'settings', key: arguments[0]})", HOSTILE)
    browser.until("document.querySelector('#history')?.textContent.includes('<img')")
    browser.open(app.url + "/#/events?" + "collection=%3Cimg%20src=x%20onerror=%22window.pwned=1%22%3E")
    browser.until("!document.querySelector('#notice').hidden")
    assert browser.run("return document.querySelectorAll('main img, main script, main b').length") == 0
    assert browser.run("return window.pwned ?? null") is None


def the_store_browser_finds_keys_and_their_history(app, browser):
    browser.open(app.url + "/#/stores?store=settings")
    browser.until("document.querySelectorAll('#keys li').length === 100")
    browser.click("#more")
    browser.until("document.querySelectorAll('#keys li').length === 200")
    browser.type("#prefix", "user/7")
    browser.until("document.querySelectorAll('#keys li').length === 11")
    browser.click("[data-key='user/7']")
    browser.until("document.querySelector('#value h2')?.textContent === 'user/7'")
    assert json.loads(browser.run("return document.querySelector('#value pre').textContent")) == {"size": 70}
    assert browser.run("return [...document.querySelectorAll('#history tr')].map((row) => row.cells[3].textContent)") == [
        '{"size": 70}', '{"size": 7}']


def a_browser_that_comes_back_misses_nothing(app, browser):
    browser.open(app.url + "/#/events?collection=short")
    browser.until("document.querySelector('#state').dataset.state === 'live'")
    browser.run("window.loaded = 1")
    append("short")
    browser.until(POSITIONS + ".length === 1")
    app.stop()
    for _ in range(3):
        append("short")
    browser.until("document.querySelector('#state').dataset.state === 'waiting'")
    app.start()
    append("short")
    browser.until(POSITIONS + ".length === 5")
    assert browser.run("return " + POSITIONS) == [5, 4, 3, 2, 1]
    assert browser.run("return window.loaded") == 1
    with app.following("short", "Last-Event-ID: 3\r\n") as again, again.makefile("rb") as lines:
        assert next(line for line in lines if line.startswith(b"id: ")) == b"id: 4\n"


def a_listening_connection_that_is_lost_is_made_again(app, browser):
    sql("""SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
           WHERE application_name = 'eventstore web' AND datname = current_database()""")
    browser.until(POSITIONS + ".length === 5")
    append("short")
    browser.until(POSITIONS + ".length === 6")


def events_that_are_gone_are_said_to_be(app, browser):
    app.stop()
    sql("""SELECT count(*) FROM eventstore.append_batch('short', (SELECT jsonb_agg('{"type": "x"}'::jsonb)
               FROM generate_series(1, 300)));
           SELECT eventstore.truncate_before('short', 250)""")
    app.start()
    browser.until("document.querySelector('#notice').textContent.includes('first kept 201')")
    browser.until(POSITIONS + ".length === 106")
    assert browser.run("return " + POSITIONS) == list(range(306, 200, -1))


def the_overview_shows_who_lags(app, browser):
    sql("SELECT eventstore.subscribe('invoices', 'short')")
    browser.open(app.url + "/#/overview")
    browser.run("window.loaded = 1")
    browser.until("document.querySelector('[data-name=invoices]')?.textContent.includes('106')")
    sql("SELECT count(*) FROM eventstore.poll('invoices', 100)")
    browser.until("/\\b6\\b/.test(document.querySelector('[data-name=invoices] td:nth-child(3)').textContent)")
    assert browser.run("return window.loaded") == 1


def connections():
    return int(sql("""SELECT count(*) FROM pg_stat_activity
                      WHERE application_name = 'eventstore web' AND datname = current_database()"""))


def nobody_watches(app):
    return app.get("/api/overview")["watchers"] == 0


def a_browser_that_left_is_forgotten(app, browser):
    for left in ("/#/overview", "about:blank"):
        browser.open(app.url + "/#/events?collection=short")
        browser.until("document.querySelector('#state').dataset.state === 'live'")
        assert not nobody_watches(app)
        browser.open(left if ":" in left else app.url + left)
        until(lambda: nobody_watches(app), "nobody watches")


def a_slow_browser_holds_nothing_up(app, _browser):
    total = int(sql("""SELECT count(*) FROM eventstore.append_batch('many', (SELECT jsonb_agg(jsonb_build_object('type',
        repeat('x', 1000), 'stream', repeat('y', 1000))) FROM generate_series(1, 4000)))"""))
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(app.following("many")) for _ in range(8)]
        fast = stack.enter_context(stack.enter_context(app.following("many")).makefile("rb"))
        while not fast.readline().startswith(b"id: %d" % total):
            pass
        read = int(sql("SELECT events_read FROM eventstore.pg_stat_eventstore WHERE collection = 'many'::regclass"))
        assert read < total * len(slow), read  # the slow ones have not been read for
        assert connections() <= 6, connections()
    until(lambda: nobody_watches(app), "those who left are forgotten")


def other_sites_are_refused(app, _browser):
    for header, value, status in (("Host", "evil.example", 400), ("Sec-Fetch-Site", "cross-site", 403)):
        try:
            urllib.request.urlopen(urllib.request.Request(app.url + "/api/overview", headers={header: value}))
        except urllib.error.HTTPError as error:
            assert error.code == status, error
        else:
            raise AssertionError(f"{header}: {value} was answered")


def the_browser_found_no_fault(_app, browser):
    faults = [line for line in browser.log() if "ERR_" not in line and "status of 404" not in line]
    assert faults == [], faults


TESTS = [
    only_what_the_role_may_read_is_shown, a_live_event_shows_up_without_reload,
    the_tag_filter_shows_what_has_all_tags, what_events_hold_stays_text,
    the_store_browser_finds_keys_and_their_history, a_browser_that_comes_back_misses_nothing,
    a_listening_connection_that_is_lost_is_made_again, events_that_are_gone_are_said_to_be,
    the_overview_shows_who_lags, a_browser_that_left_is_forgotten, a_slow_browser_holds_nothing_up,
    other_sites_are_refused, the_browser_found_no_fault,
]


def main():
    failed = 0
    prepare()
    app, browser = Application(), Browser()
    try:
        for test in TESTS:
            name = test.__name__.replace("_", " ")
            try:
                test(app, browser)
                print(f"ok {name}", flush=True)
            except Exception:
                failed += 1
                print(f"not ok {name}\n{traceback.format_exc()}", flush=True)
    finally:
        browser.close()
        app.stop()
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
