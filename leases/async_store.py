"""`AsyncLeaseStore`: the same shell as `LeaseStore`, for asyncio, on the same operations through `run_sync`."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Generator
from contextlib import asynccontextmanager, closing, suppress
from datetime import timedelta
from typing import Any, Concatenate, Self

from sqlalchemy import Connection, Transaction
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import greenlet_spawn
from tenacity import AsyncRetrying

from leases import administration, events, fleet, fork, limits, migrate, operations, recipes, views
from leases.direct import NOT_TAKEN, EitherWay, NotTaken, Shortcut
from leases.engine import READ_OPTION, create_async_engine, dedicated, describe
from leases.errors import ConfigError, LeaseHeld, LeaseNotHeld, OutcomeUnknown, StoreUnavailable
from leases.faults import check_file
from leases.model import Lease
from leases.recipes import Do, Sleep, Step, Wait
from leases.store import LeaseStore
from leases.transaction import (
    LOOK_S,
    RETRY_FOR,
    Blocked,
    Call,
    Options,
    P,
    R,
    Recipe,
    Tables,
    Watch,
    amethod,
    as_method,
    attempt_alone,
    begin_fenced,
    committing,
    own,
    retry_options,
    time_left,
    transact,
    translated,
)


def _arecipe(recipe: Recipe[P, R]) -> Callable[Concatenate[AsyncLeaseStore, P], Coroutine[Any, Any, R]]:
    @as_method(recipe)
    async def follow(store: AsyncLeaseStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await store._follow(recipe(time.monotonic, *args, **kwargs))

    return follow


class AsyncLeaseStore:
    """`LeaseStore` for asyncio: the same operations, awaited. From a URL, or an AsyncEngine of the caller's."""

    def __init__(
        self,
        database: str | URL | AsyncEngine,
        *,
        schema: str | None = None,
        retry_for: timedelta = RETRY_FOR,
    ) -> None:
        self.base_engine = database if isinstance(database, AsyncEngine) else create_async_engine(database)
        self.closes_engine = not isinstance(database, AsyncEngine)
        self.retry_for = limits.duration("retry_for", retry_for)
        self.engine = AsyncEngine(own(self.base_engine.sync_engine, schema, retry_for))
        self.url = self.engine.url
        self.schema = schema
        self._tables = Tables(self.url, schema)
        self._shortcut = Shortcut(self.engine.sync_engine, ours=self.closes_engine)
        self._looks: set[asyncio.Task[None]] = set()
        fork.tell(self)

    async def migrate(self) -> tuple[str | None, str]:
        """Bring the tables to this code's version; return the versions before and after. May be repeated."""
        check_file(self.url, create=True)
        while not migrate.TURN.acquire(blocking=False):
            await asyncio.sleep(0.01)
        try:
            with translated(self.url):
                async with self.base_engine.connect() as connection:
                    return await connection.run_sync(migrate.migrate_on, schema=self.schema)
        finally:
            migrate.TURN.release()

    async def run(self, call: Callable[[Connection], R], *, read_only: bool = False) -> R:
        """Run a function of a (sync) Connection in a transaction, through `run_sync`; see `LeaseStore.run`."""
        return await self._retried(lambda connection, _: call(connection), {READ_OPTION: True} if read_only else {})

    async def _run_either_way(self, call: EitherWay[R]) -> R:
        return await self._retried(call, {})

    @asynccontextmanager
    async def fenced(self, *leases: Lease) -> AsyncIterator[AsyncConnection]:
        """A transaction in which the fence of every lease has passed; see `LeaseStore.fenced`."""
        begin = AsyncRetrying(**retry_options(self.retry_for)).wraps(self._begin_fenced)
        connection, transaction = await begin(leases)
        transaction.__enter__()  # no I/O; as in `LeaseStore.fenced`
        try:
            try:
                yield connection
                with committing(self.url):
                    await connection.run_sync(lambda _: transaction.commit())
            except BaseException as error:
                failure = error
                await connection.run_sync(lambda _: transaction.__exit__(type(failure), failure, failure.__traceback__))
                raise
            await connection.run_sync(lambda _: transaction.__exit__(None, None, None))
        finally:
            await connection.close()

    async def _begin_fenced(self, leases: Collection[Lease]) -> tuple[AsyncConnection, Transaction]:
        self._tables.check_file()
        with translated(self.url):
            connection = await self.engine.connect()
            try:
                return connection, await connection.run_sync(begin_fenced, self._tables, leases)
            except BaseException:
                await connection.close()
                raise

    async def _retried(self, call: Call[R], options: Options) -> R:
        began_s = time.monotonic()
        try:
            return await self._once(call, 1, options)
        except (StoreUnavailable, OutcomeUnknown) as error:
            first = error
        unknown: OutcomeUnknown | None = None
        try:
            async for attempt in AsyncRetrying(**retry_options(time_left(self.retry_for, began_s))):
                with attempt:
                    try:
                        if attempt.retry_state.attempt_number == 1:
                            raise first
                        return await self._once(call, attempt.retry_state.attempt_number, options)
                    except OutcomeUnknown as error:
                        unknown = error
                        raise
        except (LeaseNotHeld, StoreUnavailable):
            # This try was refused, or came to nothing; but an earlier one may have been accepted.
            if unknown is not None:
                raise unknown from None
            raise
        raise AssertionError("tenacity returns or raises")

    async def _once(self, call: Call[R], attempt: int, options: Options) -> R:
        self._tables.check_file()
        if attempt == 1 and isinstance(call, EitherWay):
            answer: R | NotTaken = await greenlet_spawn(attempt_alone, self._shortcut, self._tables, call)
            if answer is not NOT_TAKEN:
                return answer
        with translated(self.url):
            async with self.engine.connect() as connection:
                return await connection.run_sync(lambda sync: transact(sync, self._tables, call, attempt, options))

    async def _follow(self, recipe: Generator[Step, Any, R]) -> R:
        with closing(recipe):
            resume: Callable[[], Step] = functools.partial(recipe.send, None)
            while True:
                try:
                    step = resume()
                except StopIteration as done:
                    result: R = done.value
                    return result
                try:
                    resume = functools.partial(recipe.send, await self._act(step))
                except LeaseHeld as error:  # of which the recipe may have more to do
                    resume = functools.partial(recipe.throw, error)

    async def _act(self, step: Step) -> Any:
        match step:
            case Do(call):
                return await self._retried(call, {})
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case Wait():
                watch = Watch(step)
                call = functools.partial(watch.call, look_later=functools.partial(self._look_later, watch.delay_s))
                try:
                    return await self._retried(call, watch.options)
                except Blocked:
                    watch.refuse()

    def _look_later(self, delay_s: float, look: Callable[[Connection], None]) -> Callable[[], Any]:
        async def run() -> None:
            with suppress(SQLAlchemyError):  # who blocks is a hint; what is waited for goes on
                async with self.engine.begin() as connection:
                    await connection.run_sync(look)

        def start() -> None:
            task = asyncio.create_task(run())
            self._looks.add(task)
            task.add_done_callback(self._looks.discard)

        return asyncio.get_running_loop().call_later(delay_s, start).cancel

    def sync_store(self) -> LeaseStore:
        """A `LeaseStore` on the same database, with connections of its own: for a `SessionRegistry` beside asyncio."""
        if self.url.get_backend_name() == "sqlite" and self.url.database in (None, "", ":memory:"):
            raise ConfigError(
                "a database in memory cannot be shared with a thread's store; name a file: sqlite:///FILE"
            )
        store = LeaseStore(dedicated(self.base_engine.sync_engine), schema=self.schema, retry_for=self.retry_for)
        store.closes_engine = True
        return store

    async def close(self) -> None:
        """Close the connections, unless the Engine is the caller's."""
        if self._looks:
            await asyncio.wait(self._looks, timeout=LOOK_S)
        if self.closes_engine:
            await self.base_engine.dispose()

    def orphan(self) -> None:
        """Let a forked child open connections of its own, if the AsyncEngine is ours."""
        if self.closes_engine:
            self.base_engine.sync_engine.dispose(close=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncLeaseStore({describe(self.url)!r})"

    register = amethod(operations.register)
    retire = amethod(administration.retire)
    acquire = _arecipe(recipes.acquire)
    claim = _arecipe(recipes.claim)
    renew = amethod(operations.renew, alone=operations.renew)
    release = amethod(operations.release, alone=operations.release, unless="checkpoint")
    release_all = amethod(operations.release_all, alone=operations.release_all, unless="held")
    enlist = amethod(fleet.enlist)
    dismiss = amethod(fleet.dismiss)
    drain = amethod(fleet.drain)
    expire = _arecipe(recipes.expire)
    steal = _arecipe(recipes.steal)
    pause = amethod(administration.pause)
    resume = amethod(administration.resume)
    get = amethod(views.get, read_only=True)
    list = amethod(views.list_leases, read_only=True)
    grants = amethod(views.grants, read_only=True)
    workers = amethod(views.workers, read_only=True)
    audit = amethod(views.audit, read_only=True)
    checkpoint = amethod(views.read_checkpoint, read_only=True)
    write_checkpoint = amethod(operations.write_checkpoint)
    reset_checkpoint = amethod(administration.reset_checkpoint)
    prune = _arecipe(recipes.prune)
    raise_tokens = amethod(administration.raise_tokens)


class AsyncEventLog:
    """The event log of an `AsyncLeaseStore`."""

    def __init__(self, store: AsyncLeaseStore) -> None:
        if not isinstance(store, AsyncLeaseStore):
            raise ConfigError(f"the store must be an AsyncLeaseStore, not {type(store).__name__}")
        self.run = store.run
        self._run_either_way = store._run_either_way

    append = amethod(events.append, alone=events.append_alone)
    read = amethod(events.read, read_only=True)
