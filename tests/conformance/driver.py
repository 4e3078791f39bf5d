"""Both colours of the stores behind one face: the async ones are run on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from leases import AsyncEventLog, AsyncLeaseStore, EventLog, Lease, LeaseStore

R = TypeVar("R")

TTL = timedelta(seconds=15)

PATIENCE_S = 30.0


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="event loop")
        self.thread.start()

    def wait(self, awaitable: Any) -> Any:
        async def result() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(result(), self.loop).result(PATIENCE_S)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Blocking:
    """An async object whose methods are called as plain ones."""

    def __init__(self, asynchronous: Any, loop: Loop) -> None:
        self.asynchronous = asynchronous
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.asynchronous, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self._loop.wait(result) if inspect.isawaitable(result) else result

        return call


@contextmanager
def opened(database: Any, loop: Loop | None, **options: Any) -> Iterator[LeaseStore]:
    """A store on a URL or an Engine; with a loop, an async one that is driven like a sync one."""
    if loop is None:
        with LeaseStore(database, **options) as store:
            yield store
        return
    driven = Blocking(AsyncLeaseStore(database, **options), loop)
    yield cast(LeaseStore, driven)
    driven.close()


def log_of(store: LeaseStore) -> EventLog:
    """The event log of a store of either colour."""
    if isinstance(store, Blocking):
        return cast(EventLog, Blocking(AsyncEventLog(store.asynchronous), store._loop))
    return EventLog(store)


def within_fence(store: LeaseStore, *leases: Lease, body: Callable[[Connection], R]) -> R:
    """Run a function in `store.fenced(…)`, of either colour."""
    if not isinstance(store, Blocking):
        with store.fenced(*leases) as connection:
            return body(connection)

    async def go() -> R:
        async with store.asynchronous.fenced(*leases) as connection:
            result: R = await connection.run_sync(body)
            return result

    done: R = store._loop.wait(go())
    return done


def take(store: LeaseStore, stream_id: str = "a", owner: str = "one", ttl: timedelta = TTL, **options: Any) -> Lease:
    """Acquire a lease that must be free."""
    lease = store.acquire(stream_id, owner=owner, ttl=ttl, **options)
    assert lease is not None
    return lease


def execute(store: LeaseStore, statement: str, **values: Any) -> int:
    """Run SQL past the library, as psql would; return how many rows it changed."""
    return store.run(lambda connection: connection.execute(text(statement), values).rowcount)


def rows(store: LeaseStore, statement: str, **values: Any) -> list[tuple[Any, ...]]:
    """Read with SQL past the library."""
    return store.run(lambda connection: [tuple(row) for row in connection.execute(text(statement), values)])


class Caller:
    """A program of the user's own, with its own engine as SQLAlchemy makes it, and its own transactions.

    `session` says whether it uses the ORM's sessions; with a loop it is async.
    """

    def __init__(self, url: str, loop: Loop | None, *, session: bool) -> None:
        self.session = session
        self.loop = loop
        if loop is None:
            self.sync = create_engine(url)
        else:
            self.asynchronous = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"))
            self.sync = self.asynchronous.sync_engine

    def run(self, body: Callable[[Connection], R]) -> R:
        """Run a function in a transaction of the caller's own, which commits unless it raises."""
        if self.loop is not None:
            result: R = self.loop.wait(self._run_async(body))
            return result
        if self.session:
            with Session(self.sync) as session, session.begin():
                return body(session.connection())
        with self.sync.begin() as connection:
            return body(connection)

    async def _run_async(self, body: Callable[[Connection], R]) -> R:
        if self.session:
            async with AsyncSession(self.asynchronous) as session, session.begin():
                return await session.run_sync(lambda sync: body(sync.connection()))
        async with self.asynchronous.begin() as connection:
            return await connection.run_sync(body)

    def close(self) -> None:
        if self.loop is None:
            self.sync.dispose()
        else:
            self.loop.wait(self.asynchronous.dispose())
