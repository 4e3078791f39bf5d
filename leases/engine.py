"""From a URL to an `Engine`: drivers, pragmas, time limits.

What the engines made here guarantee:

- SQLite: `synchronous=FULL` (a token that somebody was told survives a power cut), and every transaction waits for
  its turn and begins with BEGIN IMMEDIATE: one that turned to writing later would fail at once, however it waits.
- PostgreSQL: the psycopg driver, a connect timeout, keepalives and `tcp_user_timeout`, so that a dead server is found.
- No output ever shows a password: `describe` names a database without one, and statements' values are hidden.
"""

from __future__ import annotations

import functools
import re
import select
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Dialect, Engine, event
from sqlalchemy import create_engine as sqlalchemy_create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, InvalidatePoolError, OperationalError
from sqlalchemy.pool import QueuePool

from leases.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

BUSY_TIMEOUT_MS = 5000
"""How long a SQLite transaction waits for another one to end."""

POLL_MS = 20
"""How long SQLite itself waits, before `begin_immediate` begins to wait anew.

SQLite looks again after 1 ms, then less and less often: after a tenth of a second only ten times in each. Among many
writers, those who have waited longest so wait on, while whoever comes or has just been finds the file free. Who begins
anew every so often looks as often as all others.
"""

_POLLS = "leases_polls"
"""Marks a SQLite connection whose busy timeout is POLL_MS: one of an Engine that was made here."""

SQLITE_OPTIONS = frozenset(
    {"cached_statements", "check_same_thread", "detect_types", "isolation_level", "timeout", "uri"}
)
"""What a SQLite URL may ask of the driver."""

BUSY_OPTION = "leases_busy_timeout_ms"
"""The execution option that sets for one connection how long it waits: not BUSY_TIMEOUT_MS."""

PATIENCE_OPTION = "leases_patience_ms"
"""The execution option of an Engine made here: how long its transactions wait where BUSY_OPTION does not say it."""

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
    # Here, since it brings asyncio and the ORM, which take a tenth of a second to import.
    from sqlalchemy.ext.asyncio import create_async_engine as sqlalchemy_create_async_engine

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
        options = {"isolation_level": "READ COMMITTED", **options}
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
        "client_encoding": "utf8",
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
    else:
        event.listen(engine, "connect", _set_datestyle)
        event.listen(engine, "checkout", functools.partial(_replace_closed, engine.dialect))


def _set_datestyle(connection: Any, record: Any) -> None:
    """Have times told as the driver can read them, whatever the role or the database has for a default."""
    if not record.driver_connection.info.parameter_status("DateStyle").startswith("ISO"):
        cursor = connection.cursor()
        cursor.execute("SET DateStyle = ISO")
        cursor.close()
        connection.commit()


def _replace_closed(dialect: Dialect, connection: Any, record: Any, _proxy: object) -> None:
    """Have the pool replace a connection whose session the server has ended.

    Asks the socket, which costs no round trip: a server that has ended a session has said so. If it has said anything,
    it is asked. One that vanished without a word is found by the next statement, as it would be by the question that
    `pool_pre_ping` asks each time.
    """
    import psycopg  # there is a connection of it

    try:
        poller = select.poll()
        poller.register(record.driver_connection.fileno(), select.POLLIN)
        if poller.poll(0):
            dialect.do_ping(connection)
    except (psycopg.Error, OSError) as error:
        raise InvalidatePoolError(f"this connection is of no use: {error}") from None


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


def _set_pragmas(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself
    cursor = connection.cursor()
    for pragma in (f"busy_timeout = {POLL_MS}", "synchronous = FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
    record.info[_POLLS] = True


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
    if connection.info.get(_POLLS):
        patience_ms = options.get(PATIENCE_OPTION, BUSY_TIMEOUT_MS) if busy_ms is None else busy_ms
        _begin_in_turn(connection, patience_ms / 1000)
        return
    if busy_ms is not None:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(busy_ms)}")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        if busy_ms is not None:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")


def _begin_in_turn(connection: Connection, patience_s: float) -> None:
    give_up_at_s = time.monotonic() + patience_s
    while True:
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except OperationalError as error:
            # Only BUSY is waited for by SQLite: all else, asked again, would fail as fast.
            busy = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() >= give_up_at_s:
                raise
        else:
            return
