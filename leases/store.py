"""`LeaseStore` and `AsyncLeaseStore`: thin shells over the operations, a transaction each.

A shell adds four things, and no rule of the protocol: the transaction, at READ COMMITTED whatever the server's default;
the check, once, that the tables are of this version; retries of what is worth one (a broken connection, a deadlock, a
serialization failure, a busy SQLite file), bounded by `retry_for`; and our errors in place of the driver's.

Every operation may be repeated without harm, which is what makes the retries right: an acquire is recognised by its
`claim_id`, an event by its `event_id`, a steal or an expire by the token that it supersedes. If the last try ends
without an answer, `OutcomeUnknown` says so; nothing is guessed.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, Self, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from leases import administration, events, migrate, operations, recipes, views
from leases.dialects import POSTGRESQL, SQLITE, require_supported
from leases.engine import (
    BUSY_OPTION,
    TIMED_OUT_STATES,
    begin_immediate,
    create_async_engine,
    create_engine,
    dedicated,
    describe,
    is_busy,
    is_disconnect,
    sqlstate,
    translate,
)
from leases.errors import ConfigError, LeaseHeld, OutcomeUnknown, SchemaOutdated, StoreUnavailable
from leases.fencing import fence
from leases.model import Blocker, Lease
from leases.recipes import Do, Sleep, Step, Wait

P = ParamSpec("P")
R = TypeVar("R")

Call = Callable[[Connection, int], R]
"""What runs in a transaction: with the connection, and the number of the attempt, from 1."""

RETRY_FOR = timedelta(seconds=10)


# --- what both shells share ------------------------------------------------------------------------------------


def _own(engine: Engine, schema: str | None) -> Engine:
    """The engine as the protocol needs it, on the same pool; the caller's own use of it stays as it is."""
    require_supported(engine.dialect.name)
    if engine.dialect.name == SQLITE:
        if schema is not None:
            raise ConfigError("schema= is for PostgreSQL; SQLite has one schema per file")
        own = engine.execution_options()
        event.listen(own, "begin", begin_immediate)
        return own
    return engine.execution_options(
        isolation_level="READ COMMITTED", schema_translate_map=None if schema is None else {None: schema}
    )


def _retry_options(retry_for: timedelta) -> dict[str, Any]:
    return {
        "retry": retry_if_exception_type((StoreUnavailable, OutcomeUnknown)),
        "wait": wait_random_exponential(multiplier=0.02, max=1),
        "stop": stop_after_delay(retry_for),
        "reraise": True,
    }


@contextmanager
def _translated(url: URL) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise translate(error, url) from None


class _Blocked(Exception):
    """A `Wait` was cut short: by the server's statement_timeout, or by SQLite's busy timeout."""


def _transact(connection: Connection, url: URL, call: Callable[[Connection], R], busy_ms: int | None, /) -> R:
    """Run a call in a transaction, and commit it."""
    if busy_ms is not None:
        connection = connection.execution_options(**{BUSY_OPTION: busy_ms})
    try:
        transaction = connection.begin()
        try:
            result = call(connection)
        except BaseException:
            transaction.rollback()
            raise
    except SQLAlchemyError as error:
        if busy_ms is not None and (is_busy(error) or sqlstate(error) in TIMED_OUT_STATES):
            raise _Blocked from None
        raise translate(error, url) from None
    with _committing(url):
        transaction.commit()
    return result


@contextmanager
def _committing(url: URL) -> Iterator[None]:
    """Tell a COMMIT that failed from one whose answer was lost."""
    try:
        yield
    except SQLAlchemyError as error:
        if is_disconnect(error):
            raise OutcomeUnknown(
                f"the connection to {describe(url)} broke during COMMIT: it may or may not have happened; "
                "ask again with the same key, or look"
            ) from None
        raise translate(error, url) from None


class _Schema:
    """The check, once per store, that the tables are of this code's version."""

    def __init__(self, url: URL, schema: str | None) -> None:
        self._url = url
        self._schema = schema
        self._checked = False

    def check_file(self) -> None:
        """Refuse a SQLite file that is not there: to connect would create it."""
        name = self._url.database
        if self._checked or self._url.get_backend_name() != SQLITE or name in (None, "", ":memory:"):
            return
        if not str(name).startswith("file:") and not Path(str(name)).exists():
            raise SchemaOutdated(f"there is no database at {describe(self._url)}; run `leases migrate`")

    def check(self, connection: Connection) -> None:
        if not self._checked:
            migrate.check(connection, self._schema)
            self._checked = True


class _Watch:
    """Looks, while an operator's action waits, at who blocks it; and ends those sessions if it is forced."""

    def __init__(self, step: Wait) -> None:
        self.step = step
        self.blockers: list[Blocker] = []
        # Late enough to find those who block for long, early enough to be back in time.
        self.delay_s = min(0.3, step.timeout_s / 4) if step.force else step.timeout_s * 0.75

    def call(
        self,
        connection: Connection,
        attempt: int,
        look_later: Callable[[Callable[[Connection], None]], Callable[[], Any]],
    ) -> Any:
        """Run the step's call; meanwhile `look_later` has another connection look, unless it is cancelled before."""
        if connection.dialect.name != POSTGRESQL:
            return self.step.call(connection, attempt)
        administration.bound(connection, self.step.timeout_s)
        cancel = look_later(functools.partial(self._look, pid=administration.backend_pid(connection)))
        try:
            return self.step.call(connection, attempt)
        finally:
            cancel()

    def _look(self, connection: Connection, pid: int) -> None:
        self.blockers = views.blockers(connection, pid)
        if self.step.force:
            administration.terminate(connection, [blocker.pid for blocker in self.blockers])

    @property
    def busy_ms(self) -> int:
        return max(1, int(self.step.timeout_s * 1000))

    def refuse(self) -> NoReturn:
        who = "; ".join(
            f"pid {b.pid} ({b.application or 'no application name'}, {b.user}@{b.address}, {b.state}) "
            f"since {b.since:%Y-%m-%d %H:%M:%S} UTC"
            for b in self.blockers
        )
        raise LeaseHeld(
            f"{self.step.stream_id!r}: {self.step.refusal}; held after {self.step.timeout_s:g} s by "
            f"{who or 'another transaction'}; wait and try again, or end that session",
            stream_id=self.step.stream_id,
            blockers=self.blockers,
        )


# --- how a method is made of an operation ----------------------------------------------------------------------


class _Runs(Protocol):
    def run(self, call: Callable[[Connection], R]) -> R: ...


class _RunsAsync(Protocol):
    async def run(self, call: Callable[[Connection], R]) -> R: ...


def method(operation: Callable[Concatenate[Connection, P], R]) -> Callable[Concatenate[_Runs, P], R]:
    """Make a method of an operation: the same arguments, in a transaction of its own."""

    @functools.wraps(operation)
    def run(store: _Runs, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return store.run(lambda connection: operation(connection, *args, **kwargs))

    return run


def amethod(
    operation: Callable[Concatenate[Connection, P], R],
) -> Callable[Concatenate[_RunsAsync, P], Coroutine[Any, Any, R]]:
    """Make a coroutine method of an operation: the same arguments, in a transaction of its own."""

    @functools.wraps(operation)
    async def run(store: _RunsAsync, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await store.run(lambda connection: operation(connection, *args, **kwargs))

    return run


Recipe = Callable[Concatenate[recipes.Clock, P], Generator[Step, Any, R]]


def _recipe(recipe: Recipe[P, R]) -> Callable[Concatenate[LeaseStore, P], R]:
    @functools.wraps(recipe)
    def follow(store: LeaseStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return store._follow(recipe(time.monotonic, *args, **kwargs))

    return follow


def _arecipe(recipe: Recipe[P, R]) -> Callable[Concatenate[AsyncLeaseStore, P], Coroutine[Any, Any, R]]:
    @functools.wraps(recipe)
    async def follow(store: AsyncLeaseStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await store._follow(recipe(time.monotonic, *args, **kwargs))

    return follow


# --- the shells ------------------------------------------------------------------------------------------------


class LeaseStore:
    """The lease tables of one database.

    `database` is a URL (`sqlite:///FILE`, `postgresql://…`) or an Engine of the caller's, whose pool is then used and
    whose settings stay as they are. On PostgreSQL `schema` names the schema that the tables are in. `retry_for` is
    how long an operation is tried again. Safe to share between threads; not between processes: make one after a fork.

    >>> store = LeaseStore("sqlite://")
    >>> store.migrate()
    (None, '0001')
    >>> lease = store.acquire("orders/7", owner="worker-1", ttl=timedelta(seconds=15))
    >>> lease.fencing_token
    1
    >>> store.acquire("orders/7", owner="worker-2", ttl=timedelta(seconds=15)) is None
    True
    >>> store.release(lease)
    True
    """

    def __init__(
        self, database: str | URL | Engine, *, schema: str | None = None, retry_for: timedelta = RETRY_FOR
    ) -> None:
        self._given = database if isinstance(database, Engine) else None
        self.base_engine = self._given or create_engine(database)  # type: ignore[arg-type]
        self.engine = _own(self.base_engine, schema)
        self.url = self.engine.url
        self.schema = schema
        self.retry_for = retry_for
        self._tables = _Schema(self.url, schema)

    def migrate(self) -> tuple[str | None, str]:
        """Bring the tables to this code's version; return the versions before and after. May be repeated."""
        with _translated(self.url):
            return migrate.migrate(self.base_engine, schema=self.schema)

    def run(self, call: Callable[[Connection], R]) -> R:
        """Run a function of a Connection in a transaction: for operations of your own, or several in one.

        It is run again if the connection breaks, so it must bear repetition.
        """
        return self._retried(lambda connection, _: call(connection))

    @contextmanager
    def fenced(self, *leases: Lease) -> Iterator[Connection]:
        """A transaction in which the fence of every lease has passed; it commits at the end of the block.

        `StaleToken` if one has not, and nothing is kept. What the block itself raises passes as it is.
        """
        self._tables.check_file()
        with ExitStack() as stack:
            with _translated(self.url):
                connection = stack.enter_context(self.engine.connect())
                transaction = connection.begin()
                self._tables.check(connection)
                for lease in sorted(leases, key=lambda lease: lease.stream_id):
                    fence(connection, lease)
            try:
                yield connection
            except BaseException:
                transaction.rollback()
                raise
            with _committing(self.url):
                transaction.commit()

    def _retried(self, call: Call[R], watch: _Watch | None = None) -> R:
        for attempt in Retrying(**_retry_options(self.retry_for)):
            with attempt:
                return self._once(functools.partial(_numbered, call, attempt.retry_state.attempt_number), watch)
        raise AssertionError("tenacity returns or raises")

    def _once(self, call: Callable[[Connection], R], watch: _Watch | None) -> R:
        self._tables.check_file()
        with _translated(self.url), self.engine.connect() as connection:
            return _transact(
                connection,
                self.url,
                functools.partial(_checked, self._tables, call),
                None if watch is None else watch.busy_ms,
            )

    def _follow(self, recipe: Generator[Step, Any, R]) -> R:
        with closing(recipe):
            answer: Any = None
            while True:
                try:
                    step = recipe.send(answer)
                except StopIteration as done:
                    result: R = done.value
                    return result
                answer = self._act(step)

    def _act(self, step: Step) -> Any:
        match step:
            case Do(call):
                return self._retried(call)
            case Sleep(seconds):
                return time.sleep(seconds)
            case Wait():
                watch = _Watch(step)
                call = functools.partial(watch.call, look_later=functools.partial(self._look_later, watch.delay_s))
                try:
                    return self._retried(call, watch)
                except _Blocked:
                    watch.refuse()

    def _look_later(self, delay_s: float, look: Callable[[Connection], None]) -> Callable[[], Any]:
        def run() -> None:
            with suppress(SQLAlchemyError):  # who blocks is a hint; what is waited for goes on
                with self.engine.begin() as connection:
                    look(connection)

        timer = threading.Timer(delay_s, run)
        timer.daemon = True
        timer.start()
        return timer.cancel

    def close(self) -> None:
        """Close the connections, unless the Engine is the caller's."""
        if self._given is None:
            self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LeaseStore({describe(self.url)!r})"

    register = method(operations.register)
    retire = method(administration.retire)
    acquire = _recipe(recipes.acquire)
    claim = _recipe(recipes.claim)
    renew = method(operations.renew)
    release = method(operations.release)
    enlist = method(operations.enlist)
    dismiss = method(operations.dismiss)
    expire = _recipe(recipes.expire)
    steal = _recipe(recipes.steal)
    pause = method(administration.pause)
    resume = method(administration.resume)
    get = method(views.get)
    list = method(views.list_leases)
    grants = method(views.grants)
    workers = method(views.workers)
    audit = method(views.audit)
    checkpoint = method(views.read_checkpoint)
    write_checkpoint = method(operations.write_checkpoint)
    reset_checkpoint = method(administration.reset_checkpoint)
    prune = _recipe(recipes.prune)
    raise_tokens = method(administration.raise_tokens)


class EventLog:
    """The event log of a store: `append` under the fence, `read` in commit order."""

    def __init__(self, store: LeaseStore) -> None:
        self.run = store.run

    append = method(events.append)
    read = method(events.read)


class AsyncLeaseStore:
    """`LeaseStore` for asyncio: the same operations, awaited. From a URL, or an AsyncEngine of the caller's."""

    def __init__(
        self,
        database: str | URL | AsyncEngine,
        *,
        schema: str | None = None,
        retry_for: timedelta = RETRY_FOR,
    ) -> None:
        self._given = database if isinstance(database, AsyncEngine) else None
        self.base_engine = self._given or create_async_engine(database)  # type: ignore[arg-type]
        self.engine = AsyncEngine(_own(self.base_engine.sync_engine, schema))
        self.url = self.engine.url
        self.schema = schema
        self.retry_for = retry_for
        self._tables = _Schema(self.url, schema)
        self._looks: set[asyncio.Task[None]] = set()

    async def migrate(self) -> tuple[str | None, str]:
        """Bring the tables to this code's version; return the versions before and after. May be repeated."""
        with _translated(self.url):
            async with self.base_engine.connect() as connection:
                return await connection.run_sync(migrate.migrate_on, schema=self.schema)

    async def run(self, call: Callable[[Connection], R]) -> R:
        """Run a function of a (sync) Connection in a transaction, through `run_sync`; see `LeaseStore.run`."""
        return await self._retried(lambda connection, _: call(connection))

    async def _retried(self, call: Call[R], watch: _Watch | None = None) -> R:
        async for attempt in AsyncRetrying(**_retry_options(self.retry_for)):
            with attempt:
                return await self._once(functools.partial(_numbered, call, attempt.retry_state.attempt_number), watch)
        raise AssertionError("tenacity returns or raises")

    async def _once(self, call: Callable[[Connection], R], watch: _Watch | None) -> R:
        self._tables.check_file()
        with _translated(self.url):
            async with self.engine.connect() as connection:
                checked = functools.partial(_checked, self._tables, call)
                busy_ms = None if watch is None else watch.busy_ms
                return await connection.run_sync(lambda sync: _transact(sync, self.url, checked, busy_ms))

    async def _follow(self, recipe: Generator[Step, Any, R]) -> R:
        with closing(recipe):
            answer: Any = None
            while True:
                try:
                    step = recipe.send(answer)
                except StopIteration as done:
                    result: R = done.value
                    return result
                answer = await self._act(step)

    async def _act(self, step: Step) -> Any:
        match step:
            case Do(call):
                return await self._retried(call)
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case Wait():
                watch = _Watch(step)
                call = functools.partial(watch.call, look_later=functools.partial(self._look_later, watch.delay_s))
                try:
                    return await self._retried(call, watch)
                except _Blocked:
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
        return LeaseStore(dedicated(self.base_engine.sync_engine), schema=self.schema, retry_for=self.retry_for)

    async def close(self) -> None:
        """Close the connections, unless the Engine is the caller's."""
        if self._given is None:
            await self.engine.dispose()

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
    renew = amethod(operations.renew)
    release = amethod(operations.release)
    enlist = amethod(operations.enlist)
    dismiss = amethod(operations.dismiss)
    expire = _arecipe(recipes.expire)
    steal = _arecipe(recipes.steal)
    pause = amethod(administration.pause)
    resume = amethod(administration.resume)
    get = amethod(views.get)
    list = amethod(views.list_leases)
    grants = amethod(views.grants)
    workers = amethod(views.workers)
    audit = amethod(views.audit)
    checkpoint = amethod(views.read_checkpoint)
    write_checkpoint = amethod(operations.write_checkpoint)
    reset_checkpoint = amethod(administration.reset_checkpoint)
    prune = _arecipe(recipes.prune)
    raise_tokens = amethod(administration.raise_tokens)


class AsyncEventLog:
    """The event log of an `AsyncLeaseStore`."""

    def __init__(self, store: AsyncLeaseStore) -> None:
        self.run = store.run

    append = amethod(events.append)
    read = amethod(events.read)


def _numbered(call: Call[R], attempt: int, connection: Connection) -> R:
    return call(connection, attempt)


def _checked(tables: _Schema, call: Callable[[Connection], R], connection: Connection) -> R:
    tables.check(connection)
    return call(connection)
