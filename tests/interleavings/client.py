"""A client of the schedule: a thread with a connection of its own, which stops before each statement.

It runs the product's functions. What stops it are SQLAlchemy's events for a statement, a COMMIT and a ROLLBACK, until
the explorer lets it go, which it never does with two at once. (BEGIN goes with a transaction's first statement: it is
no step.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError

from leases import Lease
from leases.faults import APPENDING, RETRYABLE_STATES, constraint, sqlstate

R = TypeVar("R")

Rewrite = Callable[[str], str]

ATTEMPTS = 3
"""How often a transaction is begun again that the database refused for another's sake."""


class Abandoned(Exception):
    """The schedule is over, the client is not: it is to leave."""

    # Not a BaseException: SQLAlchemy would close the connection, which is kept.


class Clients:
    """Clients that are kept from one scenario to the next: a new connection costs as much as ten schedules."""

    def __init__(self, engine: Callable[[str], Engine]) -> None:
        self._engine = engine
        self._kept: dict[tuple[int, str], Client] = {}
        self.arrivals: SimpleQueue[Client] = SimpleQueue()
        """Those that have come to stand, or have finished, since they were let go."""

    def lend(self, isolations: Mapping[str, str], rewrite: Rewrite | None) -> dict[str, Client]:
        """Clients of these letters, at these isolation levels."""
        lent = {}
        for nth, (key, isolation) in enumerate(isolations.items()):
            if (nth, isolation) not in self._kept:
                self._kept[nth, isolation] = Client(key, self._engine(isolation), isolation, self.arrivals)
            client = lent[key] = self._kept[nth, isolation]
            client.key, client.rewrite = key, rewrite
        return lent

    def close(self) -> None:
        for client in self._kept.values():
            client.close()
        self._kept.clear()


@dataclass
class Client:
    """One client; `key` is its letter in a schedule."""

    key: str
    engine: Engine
    isolation: str
    arrivals: SimpleQueue[Client]
    rewrite: Rewrite | None = None

    pending: str | None = None
    """The statement before which it stands; None while it runs or waits for a lock, and when it has finished."""
    finished: bool = True
    result: Any = None
    error: BaseException | None = None
    conflicts: list[str] = field(default_factory=list)
    fences: list[tuple[int, Lease]] = field(default_factory=list)
    """The fences that have passed, each with the number of the statement that checked: the client's first is 1."""
    statements: int = 0

    def __post_init__(self) -> None:
        self._go: SimpleQueue[None] = SimpleQueue()
        self._tasks: SimpleQueue[Callable[[Client], Any] | None] = SimpleQueue()
        self._abandoned = False
        event.listen(self.engine, "before_cursor_execute", self._before_statement, retval=True)
        event.listen(self.engine, "commit", lambda _: self._stop("COMMIT"))
        event.listen(self.engine, "rollback", self._before_rollback)
        self._gated = False
        self.connection = self.engine.connect()
        driver: Any = self.connection.connection.driver_connection
        self.pid: int = driver.info.backend_pid
        self._driver = driver
        self._thread = threading.Thread(target=self._work, name="client", daemon=True)
        self._thread.start()

    # --- what a body calls, in the client's thread ---

    def transact(self, call: Callable[[Connection], R], *, commit: bool = True) -> R:
        """Run a call in a transaction; begin again if the database refuses it for the sake of another one."""
        for attempt in range(1, ATTEMPTS + 1):
            transaction = self.connection.begin()
            try:
                result = call(self.connection)
                if commit:
                    transaction.commit()
                else:
                    transaction.rollback()
            except BaseException as error:
                transaction.rollback()  # of one, too, that a refused fence has rolled back already
                if attempt == ATTEMPTS or not self._is_conflict(error):
                    raise
            else:
                return result
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def fencing(self, lease: Lease) -> Iterator[None]:
        """Note that a fence has passed which the block begins with, unless it raises."""
        nth = self.statements + 1
        yield
        self.fences.append((nth, lease))

    def _is_conflict(self, error: BaseException) -> bool:
        state = sqlstate(error)
        if state in RETRYABLE_STATES or (state == "23505" and constraint(error) in APPENDING):
            self.conflicts.append(str(state))
            return True
        return False

    # --- what the explorer calls ---

    def start(self, body: Callable[[Client], Any]) -> None:
        """Begin; it arrives when it stands before its first statement."""
        self.finished, self.result, self.error = False, None, None
        self.conflicts, self.fences, self.statements = [], [], 0
        self._abandoned = False
        self._tasks.put(body)

    def go(self) -> None:
        """Let it run its statement, and whatever follows up to the next one."""
        self.pending = None
        self._go.put(None)

    def abandon(self) -> None:
        """Make it leave, wherever it stands; ends its statement, should it be in one."""
        self._abandoned = True
        if self.pending is not None:
            self._go.put(None)
        elif not self.finished:
            self._driver.cancel_safe()

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join(10)
        self.connection.close()
        self.engine.dispose()

    # --- the thread ---

    def _work(self) -> None:
        while (body := self._tasks.get()) is not None:
            self._gated = True
            try:
                self.result = body(self)
            except Exception as error:  # noqa: BLE001  # an answer, to be judged
                self.error = error
            self._gated = False
            self.connection.rollback()
            if self._driver.info.transaction_status.name != "IDLE":  # it left at its COMMIT
                self._driver.rollback()
            self.finished = True
            self.arrivals.put(self)

    def _stop(self, statement: str) -> None:
        if not self._gated or self._abandoned:
            return
        self.pending = statement
        self.arrivals.put(self)
        self._go.get()
        if self._abandoned:
            raise Abandoned
        self.statements += 1

    def _before_statement(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> tuple[str, Any]:
        if self.rewrite is not None:
            statement = self.rewrite(statement)
        self._stop(statement)
        return statement, parameters

    def _before_rollback(self, _: Connection) -> None:
        # One that an error has ended on the server holds no locks any more: its ROLLBACK changes nothing for anybody.
        if self._driver.info.transaction_status.name == "INTRANS":
            self._stop("ROLLBACK")


def described(error: BaseException) -> str:
    """An error in one line."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
