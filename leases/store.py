"""`LeaseStore` and `AsyncLeaseStore`: thin shells over the operations, a transaction each.

A shell adds four things, and no rule of the protocol: the transaction, at READ COMMITTED whatever the server's default;
the check, once, that the tables are of this version; retries of what is worth one (a broken connection, a deadlock, a
serialization failure, a busy SQLite file), bounded by `retry_for`; and our errors in place of the driver's.

Every operation may be repeated without harm, which is what makes the retries right: an acquire is recognised by its
`claim_id`, an event by its `event_id`, a steal or an expire by the token that it supersedes. If the last try ends
without an answer, `OutcomeUnknown` says so; nothing is guessed.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from typing import Any, Concatenate, Self

from sqlalchemy import Connection, Engine, Transaction
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from tenacity import Retrying

from leases import administration, events, fleet, fork, limits, migrate, operations, recipes, views
from leases.direct import NOT_TAKEN, EitherWay, NotTaken, Shortcut
from leases.engine import READ_OPTION, create_engine, describe
from leases.errors import ConfigError, LeaseHeld, LeaseNotHeld, OutcomeUnknown, StoreUnavailable
from leases.faults import check_file
from leases.model import Lease
from leases.recipes import Do, Sleep, Step, Wait
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
    as_method,
    attempt_alone,
    begin_fenced,
    committing,
    method,
    own,
    retry_options,
    time_left,
    transact,
    translated,
)


def _recipe(recipe: Recipe[P, R]) -> Callable[Concatenate[LeaseStore, P], R]:
    @as_method(recipe)
    def follow(store: LeaseStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return store._follow(recipe(time.monotonic, *args, **kwargs))

    return follow


class LeaseStore:
    """The lease tables of one database.

    `database` is a URL (`sqlite:///FILE`, `postgresql://…`) or an Engine of the caller's, whose pool is then used and
    whose settings stay as they are. On PostgreSQL `schema` names the schema that the tables are in. `retry_for` is
    how long an operation is tried again. Safe to share between threads; not between processes: make one after a fork.

    >>> store = LeaseStore("sqlite://")
    >>> store.migrate()
    (None, '0002')
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
        self.base_engine = database if isinstance(database, Engine) else create_engine(database)
        self.closes_engine = not isinstance(database, Engine)
        self.retry_for = limits.duration("retry_for", retry_for)
        self.engine = own(self.base_engine, schema, retry_for)
        self.url = self.engine.url
        self.schema = schema
        self._tables = Tables(self.url, schema)
        self._shortcut = Shortcut(self.engine, ours=self.closes_engine, keeps=True)
        fork.tell(self)

    def migrate(self) -> tuple[str | None, str]:
        """Bring the tables to this code's version; return the versions before and after. May be repeated."""
        check_file(self.url, create=True)
        with translated(self.url):
            return migrate.migrate(self.base_engine, schema=self.schema)

    def run(self, call: Callable[[Connection], R], *, read_only: bool = False) -> R:
        """Run a function of a Connection in a transaction: for operations of your own, or several in one.

        It is run again if the connection breaks, so it must bear repetition. On SQLite the transaction writes from its
        beginning, unless it is `read_only`: then it waits for nobody.
        """
        return self._retried(lambda connection, _: call(connection), {READ_OPTION: True} if read_only else {})

    def _run_either_way(self, call: EitherWay[R]) -> R:
        return self._retried(call, {})

    @contextmanager
    def fenced(self, *leases: Lease) -> Iterator[Connection]:
        """A transaction in which the fence of every lease has passed; it commits at the end of the block.

        `StaleToken` if one has not, and nothing is kept. What the block itself raises passes as it is.
        """
        begin = Retrying(**retry_options(self.retry_for)).wraps(self._begin_fenced)
        connection, transaction = begin(leases)
        # Within `with transaction` a commit or rollback of the block's own ends all that it may do: no statement
        # begins another transaction, which nobody would have fenced.
        with connection, transaction:
            yield connection
            with committing(self.url):
                transaction.commit()

    def _begin_fenced(self, leases: Collection[Lease]) -> tuple[Connection, Transaction]:
        self._tables.check_file()
        self._shortcut.let_go()
        with translated(self.url):
            connection = self.engine.connect()
            try:
                return connection, begin_fenced(connection, self._tables, leases)
            except BaseException:
                connection.close()
                raise

    def _retried(self, call: Call[R], options: Options) -> R:
        began_s = time.monotonic()
        try:
            return self._once(call, 1, options)
        except (StoreUnavailable, OutcomeUnknown) as error:
            first = error
        unknown: OutcomeUnknown | None = None
        try:
            for attempt in Retrying(**retry_options(time_left(self.retry_for, began_s))):
                with attempt:
                    try:
                        if attempt.retry_state.attempt_number == 1:
                            raise first
                        return self._once(call, attempt.retry_state.attempt_number, options)
                    except OutcomeUnknown as error:
                        unknown = error
                        raise
        except (LeaseNotHeld, StoreUnavailable):
            # This try was refused, or came to nothing; but an earlier one may have been accepted.
            if unknown is not None:
                raise unknown from None
            raise
        raise AssertionError("tenacity returns or raises")

    def _once(self, call: Call[R], attempt: int, options: Options) -> R:
        self._tables.check_file()
        if attempt == 1 and isinstance(call, EitherWay):
            answer: R | NotTaken = attempt_alone(self._shortcut, self._tables, call)
            if answer is not NOT_TAKEN:
                return answer
        self._shortcut.let_go()
        with translated(self.url), self.engine.connect() as connection:
            return transact(connection, self._tables, call, attempt, options)

    def _follow(self, recipe: Generator[Step, Any, R]) -> R:
        with closing(recipe):
            resume: Callable[[], Step] = functools.partial(recipe.send, None)
            while True:
                try:
                    step = resume()
                except StopIteration as done:
                    result: R = done.value
                    return result
                try:
                    resume = functools.partial(recipe.send, self._act(step))
                except LeaseHeld as error:  # of which the recipe may have more to do
                    resume = functools.partial(recipe.throw, error)

    def _act(self, step: Step) -> Any:
        match step:
            case Do(call):
                return self._retried(call, {})
            case Sleep(seconds):
                return time.sleep(seconds)
            case Wait():
                watch = Watch(step)
                call = functools.partial(watch.call, look_later=functools.partial(self._look_later, watch.delay_s))
                try:
                    return self._retried(call, watch.options)
                except Blocked:
                    watch.refuse()

    def _look_later(self, delay_s: float, look: Callable[[Connection], None]) -> Callable[[], Any]:
        def run() -> None:
            with suppress(SQLAlchemyError):  # who blocks is a hint; what is waited for goes on
                with self.engine.begin() as connection:
                    look(connection)

        timer = threading.Timer(delay_s, run)
        timer.daemon = True
        timer.start()

        def end() -> None:
            timer.cancel()
            timer.join(LOOK_S)  # one that has begun gives its connection back before the store may be closed

        return end

    def close(self) -> None:
        """Close the connections, unless the Engine is the caller's."""
        if self.closes_engine:
            self._shortcut.keeps = False
            self._shortcut.let_go()
            self.base_engine.dispose()

    def orphan(self) -> None:
        """Let a forked child open connections of its own, if the Engine is ours: those in the pool are the parent's."""
        if self.closes_engine:
            self._shortcut.orphan()
            self.base_engine.dispose(close=False)

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
    renew = method(operations.renew, alone=operations.renew)
    release = method(operations.release, alone=operations.release, unless="checkpoint")
    release_all = method(operations.release_all, alone=operations.release_all, unless="held")
    enlist = method(fleet.enlist)
    dismiss = method(fleet.dismiss)
    drain = method(fleet.drain)
    expire = _recipe(recipes.expire)
    steal = _recipe(recipes.steal)
    pause = method(administration.pause)
    resume = method(administration.resume)
    get = method(views.get, read_only=True)
    list = method(views.list_leases, read_only=True)
    grants = method(views.grants, read_only=True)
    workers = method(views.workers, read_only=True)
    audit = method(views.audit, read_only=True)
    checkpoint = method(views.read_checkpoint, read_only=True)
    write_checkpoint = method(operations.write_checkpoint)
    reset_checkpoint = method(administration.reset_checkpoint)
    prune = _recipe(recipes.prune)
    raise_tokens = method(administration.raise_tokens)


class EventLog:
    """The event log of a store: `append` under the fence, `read` in commit order."""

    def __init__(self, store: LeaseStore) -> None:
        if not isinstance(store, LeaseStore):
            raise ConfigError(f"the store must be a LeaseStore, not {type(store).__name__}")
        self.run = store.run
        self._run_either_way = store._run_either_way

    append = method(events.append, alone=events.append_alone)
    read = method(events.read, read_only=True)
