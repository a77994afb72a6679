"""message-db, an event store in SQL that comes as an npm package."""
import os
import subprocess

from lib import npm
from lib.server import sql

# Each event to a stream of its own, all of one category.
WRITE = ("\\set n :n + 1\n"
         "SELECT write_message(gen_random_uuid()::varchar, ('order-' || :run || '-' || :client_id || '-' || :n)::varchar, "
         "'order.placed', :data::jsonb);")


def install():
    folder = npm.install("message-db", "@eventide/message-db@1.3.1")
    database = os.environ["PGDATABASE"]
    subprocess.run([folder / "node_modules/@eventide/message-db/database/install.sh"], check=True,
                   stdout=subprocess.DEVNULL,
                   env=dict(os.environ, DATABASE_NAME=database, CREATE_DATABASE="off",
                            PGOPTIONS="-c client_min_messages=warning"))
    sql(f"ALTER DATABASE {database} SET search_path = public, message_store")
