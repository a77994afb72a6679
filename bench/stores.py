"""Stores: get, put and a worker's batches, beside what one would write by hand.

Stores of each size stand ready.  Keys are picked evenly, values have 100 bytes.
"""
from lib import options, report, server

SIZES = [10 ** n for n in range(4, 7 + options.LARGE)]
if options.QUICK:
    SIZES = SIZES[:2]
# The size that the targets of batches are for.
KEYS = 10 ** 5
CHANGES = 10_000
BATCHES = 10
WRITERS = 2
VALUE = "rpad({}, 100, '.')"

PICK = "\\set k random(1, :keys)\n"
GET = PICK + "SELECT eventstore.get_text('{store}', 'key-' || :k);"
SELECT = PICK + "SELECT value FROM plain_{size} WHERE key = 'key-' || :k;"
PUT = (PICK + "\\set n :n + 1\n"
       "SELECT eventstore.put_text('{store}', 'key-' || :k, " + VALUE.format(":run || '/' || :n") + ");")
UPSERT = (PICK + "\\set n :n + 1\n"
          "INSERT INTO plain_{size} AS t VALUES ('key-' || :k, " + VALUE.format(":run || '/' || :n")
          + ", 1, clock_timestamp()) ON CONFLICT (key) DO UPDATE SET value = excluded.value, "
          "version = t.version + 1, updated_at = greatest(t.updated_at, excluded.updated_at);")
# Each writer has keys of its own, as partitions of a topic have.
BATCH = ("\\set b random(1, " + str(BATCHES) + ")\n"
         "\\set writer :client_id % :writers\n"
         "SELECT eventstore.store_apply('{store}', keys, new_values) FROM batches_{size} "
         "WHERE writers = :writers AND writer = :writer AND b = :b;")
UPSERTS = ("\\set b random(1, " + str(BATCHES) + ")\n"
           "\\set writer :client_id % :writers\n"
           "INSERT INTO plain_{size} AS t SELECT DISTINCT ON (key) key, value, 1, clock_timestamp() "
           "FROM batches_{size}, unnest(keys, new_values) WITH ORDINALITY u (key, value, i) "
           "WHERE writers = :writers AND writer = :writer AND b = :b ORDER BY key, i DESC "
           "ON CONFLICT (key) DO UPDATE SET value = excluded.value, "
           "version = t.version + 1, updated_at = greatest(t.updated_at, excluded.updated_at);")

WAYS = {
    "with changelog": ("recorded_{size}", BATCH),
    "without changelog": ("bare_{size}", BATCH),
    "INSERT ... ON CONFLICT": ("plain_{size}", UPSERTS),
}


# In transactions as large as a worker's.
LOAD = f"""
    CREATE PROCEDURE load(store regclass, size int) LANGUAGE plpgsql AS $$
    BEGIN
        FOR f IN 1 .. size BY {CHANGES} LOOP
            PERFORM eventstore.store_apply(store, array_agg('key-' || i), array_agg({VALUE.format("'0'")}))
            FROM generate_series(f, least(f + {CHANGES} - 1, size)) i;
            COMMIT;
        END LOOP;
    END $$;"""


def make(size):
    """A store of each kind, a plain table, and batches of changes of these keys."""
    server.sql(f"""
        SELECT eventstore.create_store('recorded_{size}', format => 'text');
        SELECT eventstore.create_store('bare_{size}', format => 'text', changelog => false);
        CREATE TABLE plain_{size} (key text COLLATE "C" PRIMARY KEY, value text NOT NULL,
            version bigint, updated_at timestamptz);
        CREATE TABLE batches_{size} (writers int, writer int, b int, keys text[], new_values text[]);
        ALTER TABLE batches_{size} ALTER keys SET STORAGE external, ALTER new_values SET STORAGE external;
        INSERT INTO batches_{size} SELECT writers, writer, b,
            array_agg('key-' || 1 + writer + writers * (floor(random() * {size} / writers)::int)),
            array_agg({VALUE.format("b || '/' || i")})
        FROM generate_series(1, {WRITERS}) writers, generate_series(0, writers - 1) writer,
            generate_series(1, {BATCHES}) b, generate_series(1, {CHANGES}) i GROUP BY 1, 2, 3;
        INSERT INTO plain_{size} SELECT 'key-' || i, {VALUE.format("'0'")}, 1, clock_timestamp()
        FROM generate_series(1, {size}) i;""")
    for store in ("recorded", "bare"):
        server.sql(f"CALL load('{store}_{size}', {size});")
    server.sql(f"VACUUM ANALYZE recorded_{size}, bare_{size}, plain_{size}, recorded_{size}_changelog;")


def bench(script, size, clients, store=""):
    server.VARIABLES.update(keys=str(size), writers=str(clients))
    return server.pgbench(script.format(store=store.format(size=size), size=size), clients,
                          options.SECONDS)


def measure(size, variants):
    """variants: name -> (script, clients, store)."""
    for script, clients, store in variants.values():
        bench(script, size, clients, store)
    return report.measure({
        name: lambda script=script, clients=clients, store=store: bench(script, size, clients, store)
        for name, (script, clients, store) in variants.items()})


def single(lines, targets):
    for size in SIZES:
        for clients in (1, 8):
            figures = measure(size, {
                "get": (GET, clients, "recorded_{size}"), "SELECT": (SELECT, clients, ""),
                "put": (PUT, clients, "recorded_{size}"),
                "put, no changelog": (PUT, clients, "bare_{size}"), "upsert": (UPSERT, clients, "")})
            lines.append([f"{size:,}", clients, *(report.median(figures, name) for name in figures),
                          f"{report.ratio(figures, 'get', 'SELECT'):.2f}",
                          f"{report.ratio(figures, 'put', 'upsert'):.2f}"])
            targets += [
                [f"get, {size:,} keys, {clients} clients", report.against(figures, "get", "SELECT", 0.9),
                 "0.9 × SELECT by primary key"],
                [f"put with changelog, {size:,} keys, {clients} clients",
                 report.against(figures, "put", "upsert", 0.6), "0.6 × INSERT ... ON CONFLICT"]]


def batches(lines, targets):
    for size in SIZES:
        for clients in range(1, WRITERS + 1):
            figures = measure(size, {name: (script, clients, store)
                                     for name, (store, script) in WAYS.items()})
            figures = {name: [figure * CHANGES for figure in values] for name, values in figures.items()}
            lines.append([f"{size:,}", clients, *(report.median(figures, name) for name in figures)])
            if size == KEYS:
                targets += [
                    [f"batches, {clients} writers, {name}", report.at_least(figures, name, goal),
                     f"{goal:,} changes/s"]
                    for name, goal in (("without changelog", 150_000), ("with changelog", 100_000))]


def main():
    lines, targets, batch_lines = [], [], []
    server.sql(LOAD)
    for size in SIZES:
        make(size)
    server.sql("CHECKPOINT")
    single(lines, targets)
    batches(batch_lines, targets)
    report.write("stores", "Stores", [
        "Transactions per second, one call each; `pgbench -M prepared`.",
        report.table(["keys", "clients", "get", "SELECT", "put", "put, no changelog",
                      "INSERT ... ON CONFLICT", "get / SELECT", "put / upsert"], lines),
        f"Changes per second, {CHANGES:,} in a transaction, each writer with keys of its own. The "
        "arrays lie in a table, so that the client takes no part.",
        report.table(["keys", "writers", *WAYS], batch_lines)], targets)


main()
