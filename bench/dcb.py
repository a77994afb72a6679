"""Appends on condition, beside the recorder of the PyPI package eventsourcing.

That package does a conditional append in one call of an SQL function of its
own, so pgbench can call that as it calls ours, and the package's Python costs
it nothing here.  Its tables and functions are made by the package itself.
"""
import os

from eventsourcing.dcb.postgres_tt import PostgresDCBRecorderTT
from eventsourcing.postgres import PostgresDatastore

from lib import options, report, server

CLIENTS = (1, 32)

# A name that is used once: the condition is that nobody used it.
ONCE = "'user:' || :run || '-' || :client_id || '-' || :n"
# One entity per client: the condition is that nothing happened to it since we looked.
OWN = "'course:' || :run || '-' || :client_id"


def ours(tag, after, tail):
    return (f"{server.PICK_TAGS}\\set n :n + 1\n"
            f"SELECT position AS after FROM eventstore.append('events', 'user.named', :data, "
            f"ARRAY[{tag}, 'country:' || :country, :channel], "
            "fail_if => ('[{\"tags\": [\"' || " + tag + " || '\"]}]')::jsonb"
            f", after => {after}){tail}\n")


def theirs(tag, after, tail):
    return (f"{server.PICK_TAGS}\\set n :n + 1\n"
            "SELECT dcb_conditional_append_tt AS after FROM dcb_conditional_append_tt("
            f"ARRAY[ROW('{{}}', ARRAY[{tag}])::dcb_query_item_tt], {after}, "
            f"ARRAY[ROW('user.named', convert_to(:data, 'UTF8'), "
            f"ARRAY[{tag}, 'country:' || :country, :channel])::dcb_event_tt]){tail}\n")


# Before anything was appended there is no position to look back to.
CASES = {
    "a new tag each, all events are looked at": (ONCE, "NULL", ";"),
    "the client's own tag, after its last event": (OWN, ":after", " \\gset"),
}


def prepare():
    server.make_collection("events")
    datastore = PostgresDatastore(dbname=os.environ["PGDATABASE"], host=os.environ["PGHOST"],
                                  port=os.environ["PGPORT"], user=os.environ["PGUSER"], password="")
    recorder = PostgresDCBRecorderTT(datastore, events_table_name="dcb_events")
    recorder.create_table()
    datastore.close()


def main():
    prepare()
    server.VARIABLES["after"] = "0"
    lines = []
    targets = []
    for clients in CLIENTS:
        for title, case in CASES.items():
            scripts = {"fail_if": ours(*case), "eventsourcing": theirs(*case)}
            for script in scripts.values():
                server.pgbench(script, clients, 1)
            figures = report.measure({
                way: lambda script=script: server.pgbench(script, clients, options.SECONDS)
                for way, script in scripts.items()})
            lines.append([title, clients, report.median(figures, "fail_if"),
                          report.median(figures, "eventsourcing"),
                          f"{report.ratio(figures, 'fail_if', 'eventsourcing'):.1f}"])
            if clients == 32:
                targets.append([f"fail_if, {title}, 32 clients",
                                report.against(figures, "fail_if", "eventsourcing", 10),
                                "10 × eventsourcing"])
    report.write("dcb", "Appends on condition", [
        "Transactions per second, one event each, on disjoint tags, so that every append succeeds. "
        "`pgbench -M prepared` calls both: eventsourcing's recorder does its conditional append "
        "in one SQL function, `dcb_conditional_append_tt`, called here without the package's Python.",
        report.table(["condition", "clients", "fail_if", "eventsourcing", "ratio"], lines)], targets)


main()
