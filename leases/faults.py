"""From a driver's error to one of ours: what it means, if it is worth a retry, what to do. Never a password."""

from __future__ import annotations

import sqlite3
from urllib.parse import quote

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from leases.engine import describe, sqlite_file
from leases.errors import LeasesError, SchemaOutdated, StoreError, StoreUnavailable

RETRYABLE_STATES = frozenset({"40001", "40P01", "55P03", "57P01", "57P02", "57P03", "53300"})
"""Serialization failure, deadlock, lock timeout, shutdown, crash, starting up, too many connections."""

UNPREPARED_STATES = frozenset({"42P05", "26000"})
"""A prepared statement that is there already, or is not: its connection is not one session."""

MISSING_STATES = frozenset({"42P01", "42703", "3F000"})
"""No such table, column or schema."""

APPENDING = frozenset({"lease_events_seq", "lease_events_pkey"})
"""What two appends under one grant may both take, when they run at once: one of them must begin again."""

TIMED_OUT_STATES = frozenset({"57014", "55P03"})
"""Cancelled by statement_timeout, lock not available."""

ENDED_STATES = frozenset({"25P03", "25P04"})
"""Ended by idle_in_transaction_session_timeout, by transaction_timeout: certainly not committed."""

BUSY_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


def sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's five-character code for an error, or None."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(cause, "sqlstate", None)  # psycopg's, which is not imported where only SQLite is used
    return state if isinstance(state, str) else None


def constraint(error: BaseException) -> str | None:
    """The name of the constraint that PostgreSQL says was violated, or None."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    name = getattr(getattr(cause, "diag", None), "constraint_name", None)
    return name if isinstance(name, str) else None


def is_busy(error: BaseException) -> bool:
    """Whether SQLite gave up waiting for another writer."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", 0) if isinstance(cause, sqlite3.Error) else 0
    return (code & 0xFF) in BUSY_CODES


def is_disconnect(error: BaseException) -> bool:
    """Whether the connection broke, so that nothing is known of what was being done."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    state = sqlstate(error) or ""
    return state.startswith("08") or state in ("57P01", "57P02")


REFUSED_CONNECTIONS = (
    ("password authentication failed", "check the user and the password in the URL"),
    ("no password supplied", "give the password in the URL, in PGPASSWORD, or in a passfile"),
    ("no pg_hba.conf entry", "let the server's pg_hba.conf admit this user"),
    ('database "', "check the database's name in the URL, or create it"),
    ('role "', "check the user's name in the URL, or create the role"),
)
"""What of a server's refusal of a connection is for good, and what to do. libpq gives no code, only English."""

FILE_ADVICE = {
    sqlite3.SQLITE_CANTOPEN: "check that its directory exists, that it is a file, and that this user may write both",
    sqlite3.SQLITE_READONLY: "let this user write the file and its directory; open it without mode=ro",
    sqlite3.SQLITE_PERM: "let this user write the file and its directory",
    sqlite3.SQLITE_NOTADB: "name another file, or a new one",
    sqlite3.SQLITE_CORRUPT: "restore it from a backup",
    sqlite3.SQLITE_FULL: "make room on its disk",
}
"""What to do about SQLite's errors of a file."""


def check_file(url: URL, *, create: bool) -> None:
    """Refuse a SQLite file that cannot be opened, before anything is.

    To open a file makes it, which only a migration is to do. And aiosqlite's thread for a connection that failed may
    end after the event loop, with a traceback on stderr.
    """
    file = sqlite_file(url) if url.get_backend_name() == "sqlite" else None
    if file is None:
        return
    if file.is_dir() or (create and not file.parent.is_dir()):
        advice = FILE_ADVICE[sqlite3.SQLITE_CANTOPEN]
        raise StoreError(f"{describe(url)} refused: unable to open database file; {advice}")
    if not create and not file.exists():
        raise SchemaOutdated(f"there is no database at {describe(url)}; run `leases migrate`")


def translate(error: SQLAlchemyError, url: URL) -> LeasesError:
    """Make one of our errors of the driver's. Its text is one line, and never has a password in it."""
    where = describe(url)
    cause = error.orig if isinstance(error, DBAPIError) else error
    said = " ".join(str(cause).split()) or type(cause).__name__
    for secret in filter(None, (url.password, quote(url.password or ""))):
        said = said.replace(secret, "***")
    if isinstance(error, PoolTimeout):
        return StoreUnavailable(
            f"no free connection to {where}: all of the pool are in use; end transactions sooner, or enlarge the pool"
        )
    if isinstance(cause, sqlite3.Error):
        return _translate_sqlite(cause, where, said)
    import psycopg  # only now: where only SQLite is used it is not imported

    state = sqlstate(error) or ""
    if state in MISSING_STATES:
        return SchemaOutdated(f"{where} has not the tables of this version; run `leases migrate`")
    if state in UNPREPARED_STATES:
        return StoreError(f"{where} refused: {said}; behind a pooler append ?prepare_threshold=none to the URL")
    if state == "23505" and constraint(error) in APPENDING:
        return StoreUnavailable(f"{where}: another append to the same stream was faster; try again")
    if isinstance(cause, psycopg.OperationalError) and not state:
        for words, advice in REFUSED_CONNECTIONS:
            if words in said and (not words.endswith('"') or "does not exist" in said):
                return StoreError(f"{where} refused: {said}; {advice}")
        return StoreUnavailable(f"cannot use {where}: {said}")
    if state in RETRYABLE_STATES or is_disconnect(error):
        return StoreUnavailable(f"cannot use {where}: {said}")
    return StoreError(f"{where} refused: {said}")


def _translate_sqlite(cause: sqlite3.Error, where: str, said: str) -> LeasesError:
    if is_busy(cause):
        return StoreUnavailable(f"{where} is locked by another process's transaction; try again")
    if isinstance(cause, sqlite3.OperationalError) and "no such" in said:
        return SchemaOutdated(f"{where} has not the tables of this version; run `leases migrate`")
    advice = FILE_ADVICE.get(getattr(cause, "sqlite_errorcode", 0) & 0xFF)
    return StoreError(f"{where} refused: {said}{f'; {advice}' if advice else ''}")
