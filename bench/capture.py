"""Changes of a captured table, beside audit triggers: in plpgsql, and with hstore."""
from lib import options, report, server

SIZES = [10_000] if options.QUICK else [10_000, 100_000, 1_000_000]
if options.LARGE:
    SIZES.append(10_000_000)
MANY = 1000

WAYS = ["no trigger", "plpgsql", "hstore", "capture"]

# A row as jsonb, before and after, with what finds the history of a key.
PLPGSQL = """
CREATE TABLE audit_row (id bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    relation text NOT NULL, operation text NOT NULL, key text NOT NULL, old jsonb, new jsonb);
CREATE INDEX ON audit_row (relation, key);
CREATE FUNCTION audit_row() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO audit_row (relation, operation, key, new)
        VALUES (TG_TABLE_NAME, TG_OP, NEW.id::text, to_jsonb(NEW));
    ELSIF TG_OP = 'UPDATE' THEN
        INSERT INTO audit_row (relation, operation, key, old, new)
        VALUES (TG_TABLE_NAME, TG_OP, NEW.id::text, to_jsonb(OLD), to_jsonb(NEW));
    ELSE
        INSERT INTO audit_row (relation, operation, key, old)
        VALUES (TG_TABLE_NAME, TG_OP, OLD.id::text, to_jsonb(OLD));
    END IF;
    RETURN NULL;
END $$;
"""

# What the audit triggers of this kind keep: who, when, from where, and what changed.
HSTORE = """
CREATE EXTENSION hstore;
CREATE TABLE audit_action (id bigserial PRIMARY KEY, schema_name text NOT NULL,
    table_name text NOT NULL, relid oid NOT NULL, user_name text, transaction_at timestamptz NOT NULL,
    statement_at timestamptz NOT NULL, at timestamptz NOT NULL, transaction_id bigint,
    application text, client inet, port int, query text, action text NOT NULL,
    row_data hstore, changed hstore);
CREATE INDEX ON audit_action (relid);
CREATE INDEX ON audit_action (statement_at);
CREATE INDEX ON audit_action (action);
CREATE FUNCTION audit_action() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = public, pg_catalog AS $$
DECLARE
    entry audit_action;
BEGIN
    entry := ROW (nextval('audit_action_id_seq'), TG_TABLE_SCHEMA, TG_TABLE_NAME, TG_RELID,
        session_user, current_timestamp, statement_timestamp(), clock_timestamp(), txid_current(),
        current_setting('application_name'), inet_client_addr(), inet_client_port(),
        current_query(), left(TG_OP, 1), NULL, NULL);
    IF TG_OP = 'INSERT' THEN
        entry.row_data := hstore(NEW);
    ELSE
        entry.row_data := hstore(OLD);
    END IF;
    IF TG_OP = 'UPDATE' THEN
        entry.changed := hstore(NEW) - entry.row_data;
        IF entry.changed = hstore('') THEN
            RETURN NULL;
        END IF;
    END IF;
    INSERT INTO audit_action VALUES (entry.*);
    RETURN NULL;
END $$;
"""

TRIGGERS = {
    "no trigger": "",
    "plpgsql": "CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON {table} "
               "FOR EACH ROW EXECUTE FUNCTION audit_row();",
    "hstore": "CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON {table} "
              "FOR EACH ROW EXECUTE FUNCTION audit_action();",
    "capture": "SELECT eventstore.capture('{table}');",
}

# Title -> (script, rows that it changes)
CHANGES = {
    "one row per transaction": (
        "\\set i random(1, {size})\n"
        "UPDATE {table} SET total = total + 1 WHERE id = :i;", 1),
    f"one row per statement, {MANY} in a transaction": (
        "SELECT one_by_one('{table}', {size}, " + str(MANY) + ");", MANY),
    f"UPDATE of {MANY} rows": (
        "\\set i random(1, {size} - " + str(MANY) + ")\n"
        "UPDATE {table} SET total = total + 1 WHERE id BETWEEN :i AND :i + " + str(MANY - 1) + ";", MANY),
    f"INSERT of {MANY} rows, and DELETE": (
        "BEGIN;\n"
        "INSERT INTO {table} SELECT {size} + i, i % 1000, 'open', i, now(), 'leave it with the neighbour' "
        "FROM generate_series(1, " + str(MANY) + ") i;\n"
        "DELETE FROM {table} WHERE id > {size};\n"
        "COMMIT;", 2 * MANY),
}


def name_of(way, size):
    return f"{way.replace(' ', '_')}_{size}"


def prepare():
    server.sql(PLPGSQL + HSTORE + """
        CREATE FUNCTION one_by_one(source regclass, size int, n int) RETURNS void LANGUAGE plpgsql AS $$
        DECLARE
            first int := 1 + random() * (size - n);
        BEGIN
            FOR i IN first .. first + n - 1 LOOP
                EXECUTE format('UPDATE %s SET total = total + 1 WHERE id = $1', source) USING i;
            END LOOP;
        END $$;""")
    for size in SIZES:
        for way in WAYS:
            table = name_of(way, size)
            server.sql(f"""
                CREATE TABLE {table} (id bigint PRIMARY KEY, customer int NOT NULL, status text NOT NULL,
                    total numeric(12, 2) NOT NULL, placed_at timestamptz NOT NULL, note text);
                INSERT INTO {table} SELECT i, i % 1000, 'open', i % 500, now(), 'leave it with the neighbour'
                    FROM generate_series(1, {size}) i;
                VACUUM ANALYZE {table};""")
            server.sql(TRIGGERS[way].format(table=table))


def measure(size):
    figures = {}
    for title, (script, rows) in CHANGES.items():
        server.sql("CHECKPOINT")
        figures.update(report.measure({
            (title, way): lambda way=way: rows * server.pgbench(
                script.format(table=name_of(way, size), size=size), 1, options.SECONDS)
            for way in WAYS}))
    return figures


def main():
    prepare()
    lines = []
    targets = []
    for size in SIZES:
        figures = measure(size)
        for title in CHANGES:
            cells = [f"{size:,}", title] + [report.median(figures, (title, way)) for way in WAYS]
            for peer in ("plpgsql", "hstore"):
                ratio = (figures, (title, "capture"), (title, peer))
                cells.append(f"{report.ratio(*ratio):.2f}")
                if size == SIZES[-1]:
                    targets.append([f"capture(), {title}, {size:,} rows", report.against(*ratio, 3),
                                    f"3 × the audit trigger ({peer})"])
            lines.append(cells)
    report.write("capture", "Changes of a captured table", [
        "Changed rows per second, by one client, in tables of so many rows; `pgbench -M prepared`.",
        report.table(["rows in the table", "changes"] + WAYS +
                     ["capture / plpgsql", "capture / hstore"], lines)], targets)


main()
