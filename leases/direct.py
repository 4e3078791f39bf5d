"""Statements that are each a transaction of their own, run by the driver itself (PostgreSQL).

Most of what a worker does is one statement. In a transaction it costs three round trips, in autocommit mode one. And of
a client's CPU SQLAlchemy's pool, its Connection, its transaction and its Result take more than the driver and the
network do. So here SQLAlchemy opens the connections and writes the SQL (`prepared`); what runs is psycopg.

A `Direct` is to the operations what a `Connection` is, as far as those use one that may stand alone: `dialect`,
`execute`, and of its answer `all`, `one_or_none`, `one`, `scalar_one` and iteration. It is only a first try, on a sound
connection: what may be tried again is, in a transaction, by SQLAlchemy. The transaction is taken at once,

- on an Engine of the caller's: its listeners are to hear of everything, and its settings are to hold;
- where somebody listens to our Engine's statements all the same, or has them logged;
- where a session's default is not READ COMMITTED: only a transaction can say that it is to be (looked up once for each
  connection).

A sync store keeps one connection out of its pool from call to call (`keeps`): to look whether it is sound takes a look
at its socket, as the pool does, and no more. Whoever wants a connection for something else calls `let_go` first.
However a connection comes back to the pool, it begins transactions again: SQLAlchemy undoes the isolation level that
`transaction.own` has it set, and autocommit with it.
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

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, MultipleResultsFound, NoResultFound

from leases.prepared import Statements

R = TypeVar("R")

HEARD = attrgetter(
    "begin", "before_execute", "before_cursor_execute", "after_cursor_execute", "after_execute", "commit", "rollback"
)
"""The events of an Engine by which somebody hears of statements, or of transactions. (Of connections one hears.)"""

DEFAULT_LEVEL = "leases_default_isolation"
"""Where a pool's connection keeps what its session's default isolation level is."""

LARGE = 100
"""So many rows are not kept in memory until the next statement, by the driver's cursor."""

NOTHING: Mapping[str, Any] = {}

_INHERITED: list[Direct] = []
"""What a forked child has of its parent's connections: kept for ever, for their end would be said to the server."""


@dataclass(slots=True)
class EitherWay(Generic[R]):
    """A call that runs in a transaction, and says how to run it where each of its statements is one."""

    within: Callable[[Connection, int], R]
    alone: Callable[[Connection, int], R | NotTaken]

    def __call__(self, connection: Connection, attempt: int) -> R:
        return self.within(connection, attempt)


class NotTaken(Enum):
    """That a call has done nothing, and needs a transaction."""

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
    """A connection in autocommit mode: each statement is a transaction of its own."""

    def __init__(self, statements: Statements, owner: Connection) -> None:
        self.dialect = statements.dialect
        connection: Any = owner.connection
        self.connection = connection
        self._owner = owner
        self._statements = statements
        self._cursor = connection.dbapi_connection.cursor()
        self._poller = select.poll()
        self._poller.register(connection.driver_connection.fileno(), select.POLLIN)

    def give_back(self, *, interrupted: bool = False) -> None:
        """Give the connection back to its pool; one in the middle of something, or lost, is closed."""
        try:
            if interrupted:
                self._owner.invalidate()
        finally:
            self._owner.close()

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
        except self.dialect.loaded_dbapi.Error as error:
            cause: Any = error
            broken = self.dialect.is_disconnect(cause, self.connection.driver_connection, cursor)
            raise DBAPIError(prepared.text, None, cause, hide_parameters=True, connection_invalidated=broken) from None
        if len(answer) > LARGE:
            self._cursor = self.connection.dbapi_connection.cursor()
        return Rows(prepared.rows(answer, cursor.description, self.dialect))


class Shortcut:
    """The way around transactions, on the pool of an Engine as `transaction.own` makes it; `ours` unless a caller's."""

    def __init__(self, engine: Engine, *, ours: bool, keeps: bool = False) -> None:
        self.engine = engine
        self.keeps = keeps and ours
        self._is_for = ours and engine.dialect.name == "postgresql"
        self._statements = Statements(engine)
        self._kept: deque[Direct] = deque()  # whose `append` and `pop` are for threads

    def take(self) -> Direct | None:
        """A connection for `run`; None where there has to be a transaction. Raises what SQLAlchemy's `connect` does."""
        if not self._is_for or self._is_heard():
            return None
        try:
            direct = self._kept.pop()
        except IndexError:
            return self._connected()
        if direct.is_quiet:
            return direct
        direct.give_back()  # the pool asks what it has to say, and replaces it if need be
        return self._connected()

    def run(self, direct: Direct, call: EitherWay[R]) -> R | NotTaken:
        """Run a call's statements, each a transaction, and give the connection back, or keep it for the next call.

        What the database refuses is a `DBAPIError`: after one with `connection_invalidated` nothing is known.
        """
        sound, interrupted = False, True
        try:
            result = call.alone(cast(Connection, direct), 1)
            sound, interrupted = True, False
            return result
        except Exception as error:
            interrupted = isinstance(error, DBAPIError) and error.connection_invalidated
            raise
        finally:
            if sound and self.keeps and not self._kept:
                self._kept.append(direct)
            else:
                direct.give_back(interrupted=interrupted)

    def let_go(self) -> None:
        """Give what is kept back to the pool."""
        while self._kept:
            try:
                direct = self._kept.pop()
            except IndexError:  # another thread was faster
                return
            direct.give_back()

    def orphan(self) -> None:
        """In a forked child: forget what is kept; it is the parent's."""
        _INHERITED.extend(self._kept)
        self._kept.clear()

    def _connected(self) -> Direct | None:
        owner = self.engine.connect()
        usable = False
        try:
            connection: Any = owner.connection.dbapi_connection
            connection.autocommit = True
            usable = _reads_committed(owner)
            return Direct(self._statements, owner) if usable else None
        except self._error:  # the transaction's errors tell why
            owner.invalidate()
            return None
        except BaseException:  # a signal, a cancelled task
            owner.invalidate()
            raise
        finally:
            if not usable:
                owner.close()

    @property
    def _error(self) -> type[Exception]:
        error: type[Exception] = self.engine.dialect.loaded_dbapi.Error
        return error

    def _is_heard(self) -> bool:
        return any(HEARD(self.engine.dispatch)) or self.engine.logger.isEnabledFor(logging.INFO)


def _reads_committed(owner: Connection) -> bool:
    level = owner.info.get(DEFAULT_LEVEL)
    if level is None:
        cursor: Any = owner.connection.cursor()
        cursor.execute("SHOW default_transaction_isolation")
        (level,) = cursor.fetchone()
        owner.info[DEFAULT_LEVEL] = level
    return bool(level == "read committed")
