"""From a URL to an `Engine`: drivers, pragmas, time limits. And from a driver's error to one of ours.

What the engines made here guarantee:

- SQLite: `synchronous=FULL` (a token that somebody was told survives a power cut), a busy timeout, and every
  transaction begins with BEGIN IMMEDIATE: one that turned to writing later would fail at once, whatever the timeout.
- PostgreSQL: the psycopg driver, a connect timeout, keepalives and `tcp_user_timeout`, so that a dead server is found.
- No output ever shows a password: `describe` names a database without one, and statements' values are hidden.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakKeyDictionary

import psycopg
from sqlalchemy import Connection, Dialect, Engine, event
from sqlalchemy import create_engine as sqlalchemy_create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.asyncio import create_async_engine as sqlalchemy_create_async_engine
from sqlalchemy.pool import QueuePool

from leases.errors import ConfigError, LeasesError, SchemaOutdated, StoreError, StoreUnavailable

BUSY_TIMEOUT_MS = 5000
"""How long a SQLite transaction waits for another one to end."""

SQLITE_OPTIONS = frozenset(
    {"cached_statements", "check_same_thread", "detect_types", "isolation_level", "timeout", "uri"}
)
"""What a SQLite URL may ask of the driver."""

BUSY_OPTION = "leases_busy_timeout_ms"
"""The execution option that sets another busy timeout for one connection."""

READ_OPTION = "leases_read_only"
"""The execution option of a connection that only reads: on SQLite it waits for no writer."""

DRIVERS = {
    "sqlite": ("sqlite+pysqlite", "sqlite+aiosqlite"),
    "sqlite+pysqlite": ("sqlite+pysqlite", "sqlite+aiosqlite"),
    "sqlite+aiosqlite": ("sqlite+pysqlite", "sqlite+aiosqlite"),
    "postgres": ("postgresql+psycopg", "postgresql+psycopg"),
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg"),
    "postgresql+psycopg": ("postgresql+psycopg", "postgresql+psycopg"),
    "postgresql+psycopg_async": ("postgresql+psycopg", "postgresql+psycopg"),
}
"""The schemes that a URL may have, with the drivers for sync and for async."""


_URLS: WeakKeyDictionary[Dialect, URL] = WeakKeyDictionary()
"""What an AsyncEngine was made from: its own URL lacks what is not for SQLAlchemy."""


def parse(url: str | URL) -> URL:
    """Read a database URL; `ConfigError` says what one looks like, and never repeats what it was given."""
    example = "use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError, TypeError):
        raise ConfigError(f"this is no database URL; {example}") from None
    if parsed.drivername not in DRIVERS:
        raise ConfigError(f"no driver for the URL scheme {parsed.drivername!r}; {example}")
    parts = (parsed.username, parsed.password, parsed.host, parsed.database, *parsed.normalized_query.values())
    if any("\0" in part for part in parts if part is not None):
        raise ConfigError(f"the database URL holds a NUL character; {example}")
    if parsed.get_backend_name() == "sqlite":
        if parsed.host or parsed.username:
            raise ConfigError("a SQLite URL names no host; use sqlite:///FILE, with a fourth / for an absolute path")
        return parsed
    if "@" in (parsed.host or ""):  # the rest of a password, which would be taken for a host, and printed
        raise ConfigError("the database URL has more than one @; write one in a user name or password as %40")
    try:
        (parsed.host or "").encode("idna")
    except UnicodeError:
        raise ConfigError(f"the database URL's host cannot be a host's name; {example}") from None
    password = parsed.query.get("password")
    if isinstance(password, tuple):
        raise ConfigError("the database URL gives the password twice; give it once")
    if password is not None:  # SQLAlchemy would print one that stands here
        parsed = parsed.set(password=password).difference_update_query(["password"])
    return parsed


def sqlite_file(url: URL) -> Path | None:
    """The file of a SQLite database, or None if it is in memory."""
    name = url.database or ""
    if name.startswith("file:"):
        if url.query.get("mode") == "memory":
            return None
        name = unquote(urlsplit(name).path)
    return None if name in ("", ":memory:") else Path(name)


def describe(url: URL) -> str:
    """Name a database for people: no password, no options."""
    if url.get_backend_name() == "sqlite":
        return f"sqlite:///{url.database or ':memory:'}"
    place = f"{url.host or 'localhost'}:{url.port}" if url.port else (url.host or "localhost")
    return f"postgresql://{url.username + '@' if url.username else ''}{place}/{url.database or ''}"


def create_engine(url: str | URL, **options: Any) -> Engine:
    """Make an Engine for the protocol from a URL; `options` are SQLAlchemy's."""
    own, options = _arguments(parse(url), 0, options)
    with _refused():
        engine = sqlalchemy_create_engine(own, **options)
    _prepare(engine)
    return engine


def create_async_engine(url: str | URL, **options: Any) -> AsyncEngine:
    """Make an AsyncEngine for the protocol from a URL: psycopg's async mode, or aiosqlite."""
    own, options = _arguments(parse(url), 1, options)
    with _refused():
        engine = sqlalchemy_create_async_engine(own, **options)
    _prepare(engine.sync_engine)
    _URLS[engine.dialect] = parse(url)
    return engine


@contextmanager
def _refused() -> Iterator[None]:
    """Say that a URL's options are wrong; SQLAlchemy's own message may repeat the URL."""
    try:
        yield
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(f"the options of the database URL cannot be used ({type(error).__name__})") from None


def dedicated(engine: Engine) -> Engine:
    """Make an Engine like this one whose connections are its own: an exhausted pool of the caller's does not matter.

    A SQLite database in memory is its one connection; then it is the same Engine.
    """
    if engine.dialect.name == "sqlite" and sqlite_file(engine.url) is None:
        return engine
    if engine.dialect.is_async:
        return create_engine(_URLS.get(engine.dialect, engine.url))
    return Engine(engine.pool.recreate(), engine.dialect, engine.url, hide_parameters=engine.hide_parameters)


def _arguments(url: URL, colour: int, options: dict[str, Any]) -> tuple[URL, dict[str, Any]]:
    """The URL with the driver's name, and the options with those filled in that were not given."""
    url = url.set(drivername=DRIVERS[url.drivername][colour])
    options = {"hide_parameters": True, **options}
    if url.get_backend_name() == "sqlite":
        url, connect = _for_sqlite(url)
        if "check_same_thread" in connect and not colour:
            options = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, **options}
    else:
        url, connect = _for_postgresql(url)
        options = {"isolation_level": "READ COMMITTED", "pool_pre_ping": True, **options}
    return url, {**options, "connect_args": {**connect, **options.get("connect_args", {})}}


def _for_sqlite(url: URL) -> tuple[URL, dict[str, Any]]:
    if sqlite3.sqlite_version_info < (3, 37):
        raise ConfigError(f"leases needs SQLite 3.37 or later, this Python has {sqlite3.sqlite_version}")
    if url.query.get("uri") == "true":
        if url.database and not url.database.startswith("file:"):  # else a file of the name "FILE?mode=ro" is made
            url = url.set(database="file:" + quote(url.database))
    elif unknown := sorted(url.query.keys() - SQLITE_OPTIONS):
        raise ConfigError(f"unknown option in the SQLite URL: {unknown[0]!r} (SQLite's own also need uri=true)")
    # One connection is one database: whoever wants it waits for its turn.
    return url, ({"check_same_thread": False} if sqlite_file(url) is None else {})


def _for_postgresql(url: URL) -> tuple[URL, dict[str, Any]]:
    connect: dict[str, Any] = {
        "connect_timeout": 10,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
        "fallback_application_name": "leases",
    }
    connect = {name: value for name, value in connect.items() if name not in url.query}
    threshold = url.query.get("prepare_threshold")
    if threshold is not None:  # psycopg's own, not libpq's: the URL gives it as text
        if not (isinstance(threshold, str) and re.fullmatch("[0-9]{1,9}|none", threshold, re.IGNORECASE)):
            raise ConfigError("prepare_threshold in the URL is a number, or none (for PgBouncer)")
        connect["prepare_threshold"] = int(threshold) if threshold.isdigit() else None
    secret = url.query.get("sslpassword")
    if secret is not None:  # SQLAlchemy prints a URL's options
        connect["sslpassword"] = secret
    return url.difference_update_query(["prepare_threshold", "sslpassword"]), connect


def _prepare(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_pragmas)
        event.listen(engine, "begin", begin_immediate)


def as_writer(engine: Engine) -> Engine:
    """The same SQLite engine, on the same pool, each of whose transactions begins as a writer."""
    listeners = list(engine.dispatch.begin)
    if begin_immediate in listeners:
        return engine.execution_options()
    if listeners:  # one that says BEGIN, as SQLAlchemy's own pages advise, would come after ours
        own = Engine(engine.pool, engine.dialect, engine.url, hide_parameters=True)
    else:
        own = engine.execution_options()
    event.listen(own, "begin", begin_immediate)
    return own


def _set_pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself
    cursor = connection.cursor()
    for pragma in (f"busy_timeout = {BUSY_TIMEOUT_MS}", "synchronous = FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def begin_immediate(connection: Connection) -> None:
    """Begin a SQLite transaction as a writer, so that nobody else writes to the file; unless it only reads."""
    driver = connection.connection.driver_connection
    if driver is not None and driver.in_transaction:
        # Somebody has said BEGIN: that would turn to writing late, and fail at once if somebody else wrote meanwhile.
        # Nothing was done in it yet.
        connection.exec_driver_sql("ROLLBACK")
    options = connection.get_execution_options()
    if options.get(READ_OPTION):
        connection.exec_driver_sql("BEGIN")
        return
    busy_ms = options.get(BUSY_OPTION)
    if busy_ms is not None:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(busy_ms)}")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        if busy_ms is not None:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")


# --- errors ----------------------------------------------------------------------------------------------------

RETRYABLE_STATES = frozenset({"40001", "40P01", "57P01", "57P02", "57P03", "53300"})
"""Serialization failure, deadlock, shutdown, crash, starting up, too many connections."""

MISSING_STATES = frozenset({"42P01", "42703", "3F000"})
"""No such table, column or schema."""

APPENDING = frozenset({"lease_events_seq", "lease_events_pkey"})
"""What two appends under one grant may both take, when they run at once: one of them must begin again."""

TIMED_OUT_STATES = frozenset({"57014", "55P03"})
"""Cancelled by statement_timeout, lock not available."""

BUSY_CODES = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


def sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's five-character code for an error, or None."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return cause.sqlstate if isinstance(cause, psycopg.Error) else None


def constraint(error: BaseException) -> str | None:
    """The name of the constraint that PostgreSQL says was violated, or None."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return cause.diag.constraint_name if isinstance(cause, psycopg.Error) else None


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
    state = sqlstate(error) or ""
    if state in MISSING_STATES:
        return SchemaOutdated(f"{where} has not the tables of this version; run `leases migrate`")
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
