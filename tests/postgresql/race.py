"""Races on a real server, without sleeping: threads that start, and conditions that are polled with a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, Engine, text

from leases import Lease, fence
from tests.waiting import until

R = TypeVar("R")

PATIENCE_S = 15.0


class Background(Generic[R]):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., R], *args: Any, **kwargs: Any) -> None:
        self.future: Future[R] = Future()

        def run() -> None:
            try:
                self.future.set_result(call(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001  # handed to whoever asks for the result
                self.future.set_exception(error)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def done(self) -> bool:
        return self.future.done()

    def result(self, patience_s: float = PATIENCE_S) -> R:
        return self.future.result(patience_s)


class Observer:
    """Looks at the server from outside."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    def scalar(self, query: str, **values: Any) -> Any:
        with self.engine.connect() as connection:
            return connection.execute(text(query), values).scalar()

    def execute(self, statement: str, **values: Any) -> None:
        with self.engine.connect() as connection:
            connection.execute(text(statement), values)

    def set_default(self, setting: str) -> None:
        """Change what the database has for its new sessions' default: `name = value`, as SET takes it."""
        self.execute(f"ALTER DATABASE {self.engine.url.database} SET {setting}")

    def waiting(self) -> int:
        """How many sessions of this database wait for another's lock."""
        return int(
            self.scalar(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"
            )
        )

    def wait_for(self, sessions: int) -> None:
        """Wait until so many sessions wait for locks."""
        until(lambda: self.waiting() >= sessions, f"{sessions} sessions wait for a lock")

    def wait_for_expiry(self, stream_id: str = "a") -> None:
        """Wait until a lease has expired by the server's clock."""
        query = "SELECT expires_at <= clock_timestamp() FROM leases WHERE stream_id = :stream_id"
        until(lambda: self.scalar(query, stream_id=stream_id), f"{stream_id} has expired")


@contextmanager
def writing(engine: Engine, *leases: Lease, isolation: str | None = None) -> Iterator[Connection]:
    """A transaction of the user's own, fenced and in flight; rolled back at the end unless it was committed."""
    with engine.connect() as connection:
        if isolation is not None:
            connection = connection.execution_options(isolation_level=isolation)
        with connection.begin() as transaction:
            for lease in leases:
                fence(connection, lease)
            yield connection
            if transaction.is_active:
                transaction.rollback()


@contextmanager
def locking(engine: Engine, stream_id: str = "a", how: str = "FOR UPDATE") -> Iterator[Connection]:
    """A transaction that holds a row's lock; rolled back at the end."""
    with engine.connect() as connection, connection.begin() as transaction:
        connection.execute(text(f"SELECT 1 FROM leases WHERE stream_id = :stream_id {how}"), {"stream_id": stream_id})
        yield connection
        transaction.rollback()
