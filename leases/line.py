"""A line to the database: one connection for one thread, kept open from transaction to transaction.

What beats and plans without end has one of its own, so that it neither waits for a pool, nor pays for looking a
connection up, nor loses what it hears. A line that broke is opened anew with the next transaction.

On PostgreSQL a line can listen. A notification is a hint, never the truth: it may be lost (a broken connection, a
pooler), so whoever listens also asks from time to time. On SQLite there is none, and `wait` only waits.
"""

from __future__ import annotations

import os
import select
import socket
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from leases import fork
from leases.dialects import CHANNEL, POSTGRESQL
from leases.engine import BUSY_OPTION, READ_OPTION, dedicated
from leases.store import LeaseStore
from leases.transaction import R, Tables, own, transact, translated
from leases.trust import monotonic


class Line:
    """A connection of a store's database: for one thread, or several in turn. Others may `wake` it, or `cut` a call."""

    def __init__(self, store: LeaseStore, *, listens: bool = False, busy_timeout_s: float | None = None) -> None:
        engine = dedicated(store.base_engine)
        self._owned: Engine | None = engine if engine is not store.base_engine else None
        self._engine = own(engine, store.schema)
        if busy_timeout_s is not None:
            self._engine = self._engine.execution_options(**{BUSY_OPTION: max(1, int(busy_timeout_s * 1000))})
        self._tables = Tables(store.url, store.schema)
        self._listens = listens and self._engine.dialect.name == POSTGRESQL
        self._connection: Connection | None = None
        self._heard: int | None = None
        self._turn = threading.Lock()
        # Guards what other threads do: no call is cut after its end, and no pipe is written to after its.
        self._guard = threading.Lock()
        self._running: Any = None
        self._began_s = 0.0
        self._pipe: tuple[int, int] | None = None
        self._closed = False
        fork.tell(self)

    def run(self, call: Callable[[Connection], R], *, read_only: bool = False) -> R:
        """Run a function in a transaction, once. Raises what the store raises; then the connection is given up."""
        self._tables.check_file()
        with self._turn, translated(self._tables.url):
            connection = self._opened()
            with self._guard:
                self._running, self._began_s = connection.connection.driver_connection, monotonic()
            try:
                return transact(connection, self._tables, lambda own, _: call(own), 1, {READ_OPTION: read_only})
            except BaseException:
                self._give_up()
                raise
            finally:
                with self._guard:
                    self._running = None
                if self._owned is None:  # the one connection of a database in memory is for everybody
                    self._hang_up()

    def cut(self) -> bool:
        """Break the connection if a call is running on it: whoever waits gets an error at once. From any thread."""
        with self._guard:
            running, self._running = self._running, None
            if running is not None:
                _cut(running)
            return running is not None

    @property
    def running_s(self) -> float:
        """How long the call that is running has run; 0 if none is."""
        with self._guard:
            return monotonic() - self._began_s if self._running is not None else 0.0

    def _opened(self) -> Connection:
        if self._connection is None or self._connection.closed:
            connection = self._engine.connect()
            try:
                if self._listens:
                    with connection.begin():
                        connection.exec_driver_sql(f"LISTEN {CHANNEL}")
                    driver: Any = connection.connection.driver_connection
                    self._heard = driver.fileno()
            except BaseException:  # one that does not listen is none
                connection.invalidate()
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def wait(self, timeout_s: float) -> list[str]:
        """Wait until something is heard, `wake` is called, or the time has passed; return what was heard."""
        heard = self._notifications()
        if heard or timeout_s <= 0:
            return heard
        woken = self._woken()
        if woken is None:
            return []
        poller = select.poll()
        poller.register(woken, select.POLLIN)
        if self._heard is not None:
            poller.register(self._heard, select.POLLIN)
        poller.poll(ceil(min(timeout_s, 86_400.0) * 1000))
        with suppress(BlockingIOError):
            os.read(woken, 4096)
        return self._notifications()

    def _notifications(self) -> list[str]:
        with self._turn:
            if self._heard is None or self._connection is None:
                return []
            driver: Any = self._connection.connection.driver_connection
            import psycopg  # there is a connection of it

            try:
                return [notification.payload for notification in driver.notifies(timeout=0)]
            except psycopg.Error:  # it broke: the next transaction begins with a new one
                self._give_up()
                return []

    def wake(self) -> None:
        """End a `wait`, or the next one, at once. From any thread; after `close` it does nothing."""
        if self._woken() is None:
            return
        with self._guard, suppress(BlockingIOError):  # a full pipe wakes as well
            if self._pipe is not None:
                os.write(self._pipe[1], b"!")

    def _woken(self) -> int | None:
        """The end of the pipe that a `wait` watches; made when it is first needed, for a line may never wait."""
        with self._guard:
            if self._pipe is None and not self._closed:
                self._pipe = os.pipe()
                for end in self._pipe:
                    os.set_blocking(end, False)
            return None if self._pipe is None else self._pipe[0]

    def _give_up(self) -> None:
        if self._connection is not None:
            with suppress(SQLAlchemyError):
                self._connection.invalidate()
            self._hang_up()

    def _hang_up(self) -> None:
        connection, self._connection, self._heard = self._connection, None, None
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.close()

    def close(self) -> None:
        """Close the connection. A second call is harmless."""
        with self._turn:
            self._hang_up()
        if self._owned is not None:
            self._owned.dispose()
        with self._guard:
            ends, self._pipe, self._closed = self._pipe or (), None, True
        for end in ends:
            os.close(end)

    def orphan(self) -> None:
        """Let a forked child's copy of the connection lead nowhere; the object is kept, since its end would speak."""
        if self._heard is not None or _is_postgresql(self._running):
            number = self._heard if self._heard is not None else self._running.fileno()
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            os.close(nowhere)


def _is_postgresql(connection: Any) -> bool:
    return hasattr(connection, "pgconn")  # psycopg's, which is not imported where only SQLite is used


def _cut(connection: Any) -> None:
    if isinstance(connection, sqlite3.Connection):
        with suppress(sqlite3.Error):  # closed meanwhile
            connection.interrupt()
    elif _is_postgresql(connection):
        import psycopg

        # By the socket, not by close(): libpq's connection belongs to the thread that waits on it.
        with suppress(OSError, psycopg.Error):
            with socket.socket(fileno=os.dup(connection.fileno())) as copy:
                copy.shutdown(socket.SHUT_RDWR)
