"""Statements that are each a transaction of their own, run by the driver itself (PostgreSQL).

Most of what a worker does is one statement. In a transaction it costs three round trips, in autocommit mode one. And of
a client's CPU SQLAlchemy's pool, its Connection, its transaction and its Result take more than the driver and the
network do. So here SQLAlchemy opens the connections and writes the SQL (`prepared`); what runs is psycopg.

A `Direct` is to the operations what a `Connection` is, as far as those use one that may stand alone: `dialect`,
`execute`, and of its answer `all`, `one_or_none`, `one`, `scalar_one` and iteration. It is only a first try, on a sound
connection: whatever fails is tried again in a transaction, by SQLAlchemy. None is opened, and the transaction is taken,

- where a session's default is not READ COMMITTED: only a transaction can say that it is to be (looked up once for each
  connection);
- where somebody listens to the Engine's statements, or has them logged: they are to be heard of.

A store whose pool is its own keeps one connection out of it from call to call (`keeps`): to look whether it is sound
takes a look at its socket, as the pool does, and no more. Whoever wants a connection of the pool for something else
calls `let_go` first. An Engine of the caller's gets each connection back after each call, as it was.
"""

from __future__ import annotations

import logging
import select
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar, cast

import psycopg
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, MultipleResultsFound, NoResultFound

from leases.prepared import Statements

R = TypeVar("R")

HEARD = attrgetter("before_execute", "before_cursor_execute", "after_cursor_execute", "begin", "commit")
"""The events of an Engine by which somebody hears of statements, or of transactions."""

DEFAULT_LEVEL = "leases_default_isolation"
"""Where a pool's connection keeps what its session's default isolation level is."""

LARGE = 100
"""So many rows are not kept in memory until the next statement, by the driver's cursor."""

NOTHING: Mapping[str, Any] = {}

_INHERITED: list[Direct] = []
"""What a forked child has of its parent's connections: kept for ever, for their end would be said to the server."""


@dataclass(frozen=True, slots=True)
class EitherWay(Generic[R]):
    """A call that runs in a transaction, and says how to run it where each of its statements is one."""

    within: Callable[[Connection, int], R]
    alone: Callable[[Connection, int], R]

    def __call__(self, connection: Connection, attempt: int) -> R:
        return self.within(connection, attempt)


class NotTaken(Enum):
    """That a call was not run at all."""

    NOT_TAKEN = auto()


NOT_TAKEN: Final = NotTaken.NOT_TAKEN


class Rows:
    """The answer: rows with names, as SQLAlchemy's are."""

    __slots__ = ("_rows",)

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def all(self) -> list[Any]:
        return self._rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def one_or_none(self) -> Any:
        if len(self._rows) > 1:
            raise MultipleResultsFound("more than one row where one was expected")
        return self._rows[0] if self._rows else None

    def one(self) -> Any:
        if not self._rows:
            raise NoResultFound("no row where one was expected")
        return self.one_or_none()

    def scalar_one(self) -> Any:
        return self.one()[0]


class Direct:
    """A connection of the pool in autocommit mode: each statement is a transaction of its own."""

    def __init__(self, statements: Statements, connection: Any) -> None:
        self.dialect = statements.dialect
        self.connection = connection
        self._statements = statements
        self._cursor = connection.dbapi_connection.cursor()
        self._poller = select.poll()
        self._poller.register(connection.driver_connection.fileno(), select.POLLIN)

    @property
    def is_quiet(self) -> bool:
        """Whether the server has said nothing since the last answer: neither goodbye, nor anything else."""
        return not self._poller.poll(0)

    def execute(self, statement: Any, values: Mapping[str, Any] = NOTHING) -> Rows:
        """Run a statement; what the driver raises comes as SQLAlchemy's `DBAPIError`."""
        prepared = self._statements.prepared(statement)
        cursor = self._cursor
        try:
            cursor.execute(prepared.text, prepared.given(values))
            answer = cursor.fetchall()
        except psycopg.Error as error:
            cause: Any = error
            broken = self.dialect.is_disconnect(cause, self.connection.driver_connection, cursor)
            raise DBAPIError(prepared.text, None, cause, hide_parameters=True, connection_invalidated=broken) from None
        if len(answer) > LARGE:
            self._cursor = self.connection.dbapi_connection.cursor()
        return Rows(prepared.rows(answer, cursor.description, self.dialect))


class Shortcut:
    """The way around transactions, on an Engine's pool: an Engine as `transaction.own` makes it."""

    def __init__(self, engine: Engine, *, keeps: bool = False) -> None:
        self.engine = engine
        self.keeps = keeps
        self._is_for = engine.dialect.name == "postgresql"
        self._statements = Statements(engine)
        self._kept: deque[Direct] = deque()  # whose `append` and `pop` are for threads

    def attempt(self, call: EitherWay[R]) -> R | NotTaken:
        """Run a call's statements, each a transaction; `NOT_TAKEN` where there has to be one around them.

        What the database refuses is a `DBAPIError`: after one with `connection_invalidated` nothing is known.
        """
        direct = self._taken()
        if direct is None:
            return NOT_TAKEN
        sound, interrupted = False, True
        try:
            result = call.alone(cast(Connection, direct), 1)
            sound, interrupted = True, False
            return result
        except Exception:
            interrupted = False
            raise
        finally:
            if sound and self.keeps and not self._kept:
                self._kept.append(direct)
            else:
                _give_back(direct.connection, interrupted)

    def let_go(self) -> None:
        """Give what is kept back to the pool."""
        while self._kept:
            try:
                direct = self._kept.pop()
            except IndexError:  # another thread was faster
                return
            _give_back(direct.connection)

    def orphan(self) -> None:
        """In a forked child: forget what is kept; it is the parent's."""
        _INHERITED.extend(self._kept)
        self._kept.clear()

    def _taken(self) -> Direct | None:
        if not self._is_for or self._is_heard():
            return None
        try:
            direct = self._kept.pop()
        except IndexError:
            pass
        else:
            if direct.is_quiet:
                return direct
            _give_back(direct.connection)  # which the pool asks what it has to say, and replaces if need be
        connection = self._connected()
        return None if connection is None else Direct(self._statements, connection)

    def _connected(self) -> Any:
        """A connection in autocommit mode; None where that cannot be: the transaction's errors tell why."""
        try:
            connection = self.engine.raw_connection()
        except psycopg.Error:
            return None
        try:
            driver: Any = connection.dbapi_connection
            driver.autocommit = True
            if _reads_committed(connection):
                return connection
        except psycopg.Error as error:
            connection.invalidate(error)
        _give_back(connection)
        return None

    def _is_heard(self) -> bool:
        return any(HEARD(self.engine.dispatch)) or self.engine.logger.isEnabledFor(logging.INFO)


def _reads_committed(connection: Any) -> bool:
    level = connection.info.get(DEFAULT_LEVEL)
    if level is None:
        cursor = connection.cursor()
        cursor.execute("SHOW default_transaction_isolation")
        (level,) = cursor.fetchone()
        connection.info[DEFAULT_LEVEL] = level
    return bool(level == "read committed")


def _give_back(connection: Any, interrupted: bool = False) -> None:
    """Give a connection back to the pool as it was; one that is of no use, or in the middle of something, is closed."""
    try:
        if interrupted:
            connection.invalidate()
        elif connection.is_valid:
            connection.dbapi_connection.autocommit = False
    except psycopg.Error as error:
        connection.invalidate(error)
    finally:
        connection.close()
