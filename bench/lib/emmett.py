"""emmett, an event store whose functions in PostgreSQL come with an npm package."""
import subprocess

from lib import npm
from lib.server import sql

# The statement that its client sends, for one event to a new stream.
APPEND = ("\\set n :n + 1\n"
          "SELECT * FROM emt_append_to_stream(ARRAY[gen_random_uuid()]::text[], ARRAY[:data]::jsonb[], "
          "ARRAY['{}']::jsonb[], ARRAY['1']::text[], ARRAY['order.placed']::text[], ARRAY['E']::text[], "
          "('order-' || :run || '-' || :client_id || '-' || :n)::text, 'order', 0::bigint, 'emt' || ':' || 'default');")

# It asks for a server's name only to answer later calls.
PRINT_SCHEMA = """
import { getPostgreSQLEventStore } from '@event-driven-io/emmett-postgresql';
const store = getPostgreSQLEventStore('postgresql://localhost/none');
process.stdout.write(store.schema.sql());
await store.close();
"""


def install():
    folder = npm.install("emmett", "@event-driven-io/emmett-postgresql@0.42.0")
    (folder / "schema.mjs").write_text(PRINT_SCHEMA)
    schema = subprocess.run(["node", "schema.mjs"], cwd=folder, check=True, text=True, stdout=subprocess.PIPE)
    sql(f"SET client_min_messages = error; {schema.stdout}")
