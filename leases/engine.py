"""From a URL to an `Engine`: drivers, pragmas, time limits. And from a driver's error to one of ours.

What the engines made here guarantee:

- SQLite: `synchronous=FULL` (a token that somebody was told survives a power cut), a busy timeout, and every
  transaction begins with BEGIN IMMEDIATE: one that turned to writing later would fail at once, whatever the timeout.
- PostgreSQL: the psycopg driver, a connect timeout, keepalives and `tcp_user_timeout`, so that a dead server is found.
- No output ever shows a password: `describe` names a database without one, and statements' values are hidden.
"""

from __future__ import annotations

import sqlite3
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, event
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


def parse(url: str | URL) -> URL:
    """Read a database URL; `ConfigError` says what one looks like, and never repeats what it was given."""
    example = "use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError, TypeError):
        raise ConfigError(f"this is no database URL; {example}") from None
    if parsed.drivername not in DRIVERS:
        raise ConfigError(f"no driver for the URL scheme {parsed.drivername!r}; {example}")
    password = parsed.query.get("password")
    if isinstance(password, str):  # SQLAlchemy would print one that stands here
        parsed = parsed.set(password=password).difference_update_query(["password"])
    return parsed


def describe(url: URL) -> str:
    """Name a database for people: no password, no options."""
    if url.get_backend_name() == "sqlite":
        return f"sqlite:///{url.database or ':memory:'}"
    place = f"{url.host or 'localhost'}:{url.port}" if url.port else (url.host or "localhost")
    return f"postgresql://{url.username + '@' if url.username else ''}{place}/{url.database or ''}"


def create_engine(url: str | URL, **options: Any) -> Engine:
    """Make an Engine for the protocol from a URL; `options` are SQLAlchemy's."""
    parsed = parse(url)
    engine = sqlalchemy_create_engine(*_arguments(parsed, 0, options), **options)
    _prepare(engine)
    return engine


def create_async_engine(url: str | URL, **options: Any) -> AsyncEngine:
    """Make an AsyncEngine for the protocol from a URL: psycopg's async mode, or aiosqlite."""
    parsed = parse(url)
    engine = sqlalchemy_create_async_engine(*_arguments(parsed, 1, options), **options)
    _prepare(engine.sync_engine)
    return engine


def dedicated(engine: Engine) -> Engine:
    """Make an Engine like this one whose connections are its own: an exhausted pool of the caller's does not matter.

    A SQLite database in memory is its one connection; then it is the same Engine.
    """
    if engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
        return engine
    if engine.dialect.is_async:
        return create_engine(engine.url)
    return Engine(engine.pool.recreate(), engine.dialect, engine.url, hide_parameters=engine.hide_parameters)


def _arguments(url: URL, colour: int, options: dict[str, Any]) -> tuple[URL]:
    """The URL with the driver's name; fills in the options that were not given."""
    url = url.set(drivername=DRIVERS[url.drivername][colour])
    connect: dict[str, Any] = {}
    if url.get_backend_name() == "sqlite":
        if sqlite3.sqlite_version_info < (3, 37):
            raise ConfigError(f"leases needs SQLite 3.37 or later, this Python has {sqlite3.sqlite_version}")
        if url.database in (None, "", ":memory:"):
            # One connection is one database: whoever wants it waits for its turn.
            connect["check_same_thread"] = False
            if not colour:
                options.setdefault("poolclass", QueuePool)
                options.setdefault("pool_size", 1)
                options.setdefault("max_overflow", 0)
    else:
        connect = {
            "connect_timeout": 10,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            "fallback_application_name": "leases",
        }
        threshold = url.query.get("prepare_threshold")
        if isinstance(threshold, str):  # psycopg's own, not libpq's: the URL gives it as text
            if not (threshold.isdigit() or threshold.lower() == "none"):
                raise ConfigError("prepare_threshold in the URL is a number, or none (for PgBouncer)")
            connect["prepare_threshold"] = int(threshold) if threshold.isdigit() else None
            url = url.difference_update_query(["prepare_threshold"])
        options.setdefault("isolation_level", "READ COMMITTED")
        options.setdefault("pool_pre_ping", True)
        connect = {name: value for name, value in connect.items() if name not in url.query}
    options["connect_args"] = {**connect, **options.get("connect_args", {})}
    options.setdefault("hide_parameters", True)
    return (url,)


def _prepare(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_pragmas)
        event.listen(engine, "begin", begin_immediate)


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
        return  # an engine made of another one inherits its listeners
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


def translate(error: SQLAlchemyError, url: URL) -> LeasesError:
    """Make one of our errors of the driver's. Its text never has a password in it."""
    where = describe(url)
    cause = error.orig if isinstance(error, DBAPIError) else error
    said = " ".join(str(cause).split()) or type(cause).__name__
    if url.password:
        said = said.replace(url.password, "***")
    state = sqlstate(error) or ""
    if state in MISSING_STATES or (isinstance(cause, sqlite3.OperationalError) and "no such" in said):
        return SchemaOutdated(f"{where} has not the tables of this version; run `leases migrate`")
    if state == "23505" and constraint(error) in APPENDING:
        return StoreUnavailable(f"{where}: another append to the same stream was faster; try again")
    if is_busy(error):
        return StoreUnavailable(f"{where} is locked by another process's transaction; try again")
    if isinstance(error, PoolTimeout):
        return StoreUnavailable(f"no free connection to {where}: {said}")
    if (
        state in RETRYABLE_STATES
        or is_disconnect(error)
        or (isinstance(cause, psycopg.OperationalError) and not state)
        or (isinstance(cause, sqlite3.OperationalError) and "unable to open" in said)
    ):
        return StoreUnavailable(f"cannot use {where}: {said}")
    return StoreError(f"{where} refused: {said}")
