"""Fencing by trigger: a table of the user's that refuses stale writes, whoever writes: any language, psql, COPY.

    with engine.begin() as connection:
        protect(connection, "results")      # it has columns stream_id and fencing_token

From then on every row that is inserted, or updated, must carry the token of a live grant of its stream. The check takes
the same lock as `fence` does, and holds it to the end of the transaction, so that the promises are the same but for
one: a row names no owner, so the trigger compares stream and token only, which no two grants share.

What it does not see: DELETE, and TRUNCATE, for what is deleted carries the token of its own time.

On PostgreSQL the trigger runs once a statement, over all its rows; on SQLite once a row.
"""

from __future__ import annotations

from hashlib import sha256

from sqlalchemy import Connection, text

from leases import dialects, limits
from leases.dialects import SQLITE_NOW

LONGEST_NAME = 63
"""Of a PostgreSQL identifier, in bytes."""

STALE_STATE = "LS001"
"""The SQLSTATE of the refusal on PostgreSQL."""


def protect(
    connection: Connection,
    table: str,
    *,
    schema: str | None = None,
    stream_id: str = "stream_id",
    fencing_token: str = "fencing_token",
    lease_schema: str | None = None,
) -> None:
    """Install the trigger on a table, in the caller's transaction. A second call is harmless: it replaces it.

    `stream_id` and `fencing_token` name the table's columns. On PostgreSQL `schema` is the table's and `lease_schema`
    that of the lease tables; without them the connection's search_path finds both, now.
    """
    quote = connection.dialect.identifier_preparer.quote_identifier  # on PostgreSQL it doubles a %, for the driver
    for what, name in (("table", table), ("stream_id", stream_id), ("fencing_token", fencing_token)):
        limits.identifier(what, name)
    for place in (schema, lease_schema):
        if place is not None:
            limits.schema(place)
    if dialects.name_of(connection) == dialects.SQLITE:
        refuse = (
            "SELECT RAISE(ABORT, 'leases: a stale write: its token is not that of a live lease') WHERE NOT EXISTS ("
            f"SELECT 1 FROM leases WHERE stream_id = NEW.{quote(stream_id)} "
            f"AND fencing_token = NEW.{quote(fencing_token)} AND expires_at > {SQLITE_NOW})"
        )
        unprotect(connection, table)
        for event in ("INSERT", "UPDATE"):
            name = quote(f"leases_protect_{table}_{event.lower()}")
            connection.exec_driver_sql(f"CREATE TRIGGER {name} BEFORE {event} ON {quote(table)} BEGIN {refuse}; END")
        return
    function, target = _names(connection, table, schema)
    leases = f"{quote(lease_schema) if lease_schema else _current_schema(connection)}.leases"
    given = {"leases": leases, "stream_id": quote(stream_id), "fencing_token": quote(fencing_token)}
    unprotect(connection, table, schema=schema)
    body = _FUNCTION.replace("%", "%%").format(**given)
    connection.exec_driver_sql(f"CREATE FUNCTION {function}() {body}")
    for event in ("INSERT", "UPDATE"):
        connection.exec_driver_sql(
            f"CREATE TRIGGER leases_protect_{event.lower()} AFTER {event} ON {target} "
            f"REFERENCING NEW TABLE AS written FOR EACH STATEMENT EXECUTE FUNCTION {function}()"
        )


def unprotect(connection: Connection, table: str, *, schema: str | None = None) -> None:
    """Remove the trigger of `protect`, in the caller's transaction. A second call is harmless."""
    limits.identifier("table", table)
    if schema is not None:
        limits.schema(schema)
    quote = connection.dialect.identifier_preparer.quote_identifier
    if dialects.name_of(connection) == dialects.SQLITE:
        for event in ("insert", "update"):
            connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {quote(f'leases_protect_{table}_{event}')}")
        return
    function, target = _names(connection, table, schema)
    for event in ("insert", "update"):
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS leases_protect_{event} ON {target}")
    connection.exec_driver_sql(f"DROP FUNCTION IF EXISTS {function}()")


def _names(connection: Connection, table: str, schema: str | None) -> tuple[str, str]:
    """The function that serves a table, and the table itself: qualified and quoted."""
    quote = connection.dialect.identifier_preparer.quote_identifier
    place = quote(schema) if schema else _current_schema(connection)
    function = f"leases_protect_{table}"
    if len(function.encode()) > LONGEST_NAME:  # PostgreSQL would cut it, and two long tables have one function
        function = f"leases_protect_{sha256(table.encode()).hexdigest()[:32]}"
    return f"{place}.{quote(function)}", f"{place}.{quote(table)}"


def _current_schema(connection: Connection) -> str:
    found: str = connection.execute(text("SELECT quote_ident(current_schema())")).scalar_one()
    return found.replace("%", "%%")


_FUNCTION = """RETURNS trigger LANGUAGE plpgsql AS $leases$
DECLARE
    write record;
    held record;
    left_s double precision;
    caller_s double precision;
BEGIN
    FOR write IN
        SELECT DISTINCT {stream_id} AS stream_id, {fencing_token} AS fencing_token FROM written ORDER BY 1, 2
    LOOP
        SELECT l.fencing_token, l.owner, l.expires_at INTO held
        FROM {leases} AS l WHERE l.stream_id = write.stream_id FOR KEY SHARE;
        left_s := extract(epoch FROM held.expires_at - clock_timestamp());
        IF held.fencing_token IS DISTINCT FROM write.fencing_token OR coalesce(left_s, 0) <= 0 THEN
            RAISE EXCEPTION USING ERRCODE = 'LS001', MESSAGE = format(
                'leases: write on %L under token %s refused: the current token is %s, owner %s',
                write.stream_id, write.fencing_token, held.fencing_token, coalesce(held.owner, 'nobody'));
        END IF;
        caller_s := extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval);
        IF caller_s = 0 OR caller_s > left_s THEN
            PERFORM set_config(
                'idle_in_transaction_session_timeout', greatest(1, floor(left_s * 1000))::int || 'ms', true);
        END IF;
    END LOOP;
    RETURN NULL;
END $leases$"""
