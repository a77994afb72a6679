"""The temporary cluster: statements by psql, loads by pgbench."""
import os
import re
import subprocess
import tempfile

# About 100 bytes, as a client sends it: parsed in every transaction.
DATA = ('{"order": 184467, "currency": "EUR", "total": 129.95, "items": 3, '
        '"note": "leave it with the neighbour"}')

# Three tags, of which one has many values, one few and one a single one.  A
# colon before a letter would be a variable to pgbench, so it stands apart.
PICK_TAGS = "\\set customer random(1, 100000)\n\\set country random(1, 50)\n"
TAGS = "ARRAY['customer:' || :customer, 'country:' || :country, :channel]"

VARIABLES = {"data": DATA, "channel": "channel:web", "n": "0"}

# No two runs of pgbench make the same stream or tag.
runs = 0


def sql(statement, **variables):
    """Runs statements with psql; the output without decoration."""
    command = ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
    for name, value in variables.items():
        command += ["-v", f"{name}={value}"]
    done = subprocess.run(command, input=statement, text=True, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"{statement}\n{done.stderr}")
    return done.stdout.strip()


def discard(statement):
    """Runs a statement whose output goes to /dev/null."""
    subprocess.run(["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", statement],
                   stdout=subprocess.DEVNULL, check=True)


def pgbench(script, clients=1, seconds=1):
    """Transactions per second of prepared statements."""
    global runs
    runs += 1
    variables = dict(VARIABLES, run=str(runs))
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        command = ["pgbench", "-n", "-M", "prepared", "-f", file.name, "-T", str(seconds),
                   "-c", str(clients), "-j", str(min(clients, os.cpu_count()))]
        for name, value in variables.items():
            command += ["-D", f"{name}={value}"]
        done = subprocess.run(command, text=True, capture_output=True)
    rate = re.search(r"^tps = ([0-9.]+)", done.stdout, re.M)
    if done.returncode != 0 or rate is None or float(rate[1]) == 0:
        raise SystemExit(f"{script}\n{done.stdout}\n{done.stderr}")
    return float(rate[1])


def make_collection(name):
    sql(f"SELECT eventstore.create_collection('{name}');")


def make_plain(name, like):
    """An ordinary table with a collection's columns and indexes."""
    sql(f"""
        CREATE TABLE {name} (LIKE {like});
        CREATE SEQUENCE {name}_position;
        ALTER TABLE {name}
            ALTER position SET DEFAULT nextval('{name}_position'),
            ALTER id SET DEFAULT gen_random_uuid(),
            ALTER created_at SET DEFAULT clock_timestamp(),
            ALTER checksum DROP NOT NULL,
            ALTER safe_head DROP NOT NULL,
            ADD PRIMARY KEY (position);
        CREATE INDEX ON {name} (stream, version) WHERE stream IS NOT NULL;
        CREATE INDEX ON {name} USING eventstore_labels (tags, type, position);
    """)


# Rows of a batch, as a FROM item: number i of batch b, of :streams streams or none.
ROWS = """
    generate_series(1, {size}) i,
    LATERAL (SELECT 'order.placed'::text AS type,
        '{data}'::jsonb AS data,
        ARRAY['customer:' || hashint8(({batch})::bigint * 1000000 + i) % 100000,
              'country:' || i % 50, 'channel:web'] AS tags,
        CASE WHEN {streams} > 0
             THEN 'stream-' || (({batch})::bigint * {size} + i) % greatest({streams}, 1) END AS stream,
        (({batch})::bigint * {size} + i) / greatest({streams}, 1) + 1 AS n) row"""


def rows(batch, size=1000, streams=0):
    return ROWS.format(batch=batch, size=size, streams=streams, data=DATA)


ARRAY = "array_agg(ROW(type, data, tags, stream, NULL, NULL, NULL, NULL, NULL)::eventstore.new_event ORDER BY i)"


def fill(collection, events, streams):
    """Appends events, spread evenly over the streams, in transactions of 50,000."""
    size = min(events, 1000)
    step = 50
    for first in range(0, events // size, step):
        last = min(first + step, events // size) - 1
        sql(f"""SELECT count(*) FROM generate_series({first}, {last}) b,
                LATERAL eventstore.append_array('{collection}',
                    (SELECT {ARRAY} FROM {rows('b', size, streams)}));""")
