"""What the stores share: one transaction, its errors, its retries, and how a method is made of an operation.

The parts are plain functions of a sync `Connection`; an async store runs them through `run_sync`.
"""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar

from sqlalchemy import Connection, Engine, Transaction
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from tenacity import retry_if_exception_type, stop_after_delay, wait_random_exponential

from leases import administration, limits, migrate, recipes, views
from leases.dialects import POSTGRESQL, SQLITE, require_supported
from leases.direct import NOT_TAKEN, EitherWay, NotTaken, Shortcut
from leases.engine import BUSY_OPTION, BUSY_TIMEOUT_MS, PATIENCE_OPTION, as_writer, describe
from leases.errors import ConfigError, LeaseHeld, LeasesError, OutcomeUnknown, StoreUnavailable
from leases.faults import ENDED_STATES, TIMED_OUT_STATES, check_file, is_busy, is_disconnect, sqlstate, translate
from leases.fencing import fence
from leases.model import Blocker, Lease
from leases.recipes import Step, Wait

P = ParamSpec("P")
R = TypeVar("R")

Call = Callable[[Connection, int], R]
"""What runs in a transaction: with the connection, and the number of the attempt, from 1."""

Options = Mapping[str, Any]
"""Execution options for one transaction: how SQLite is to begin it."""

RETRY_FOR = timedelta(seconds=10)


def own(engine: Engine, schema: str | None, retry_for: timedelta = RETRY_FOR) -> Engine:
    """The engine as the protocol needs it, on the same pool; the caller's own use of it stays as it is.

    Of an operation that is tried again for `retry_for`, no try waits for longer.
    """
    require_supported(engine.dialect.name)
    if schema is not None:
        limits.schema(schema)
    if engine.dialect.name == SQLITE:
        if schema is not None:
            raise ConfigError("schema= is for PostgreSQL; SQLite has one schema per file")
        patience_ms = min(BUSY_TIMEOUT_MS, int(retry_for.total_seconds() * 1000))
        return as_writer(engine).execution_options(**{PATIENCE_OPTION: patience_ms})
    return engine.execution_options(
        isolation_level="READ COMMITTED", schema_translate_map=None if schema is None else {None: schema}
    )


def retry_options(retry_for: timedelta) -> dict[str, Any]:
    return {
        "retry": retry_if_exception_type((StoreUnavailable, OutcomeUnknown)),
        "wait": wait_random_exponential(multiplier=0.02, max=1),
        "stop": stop_after_delay(retry_for),
        "reraise": True,
    }


@contextmanager
def translated(url: URL) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise translate(error, url) from None


class Blocked(Exception):
    """A `Wait` was cut short: by the server's statement_timeout, or by SQLite's busy timeout."""


def transact(connection: Connection, tables: Tables, call: Call[R], attempt: int, options: Options, /) -> R:
    """Run a call in a transaction, and commit it; `Blocked` if it has a busy timeout and others were in the way."""
    if options:
        connection = connection.execution_options(**options)
    try:
        transaction = connection.begin()
        try:
            tables.check(connection)
            result = call(connection, attempt)
        except BaseException:
            roll_back(transaction)
            raise
    except SQLAlchemyError as error:
        if BUSY_OPTION in options and (is_busy(error) or sqlstate(error) in TIMED_OUT_STATES):
            raise Blocked from None
        raise translate(error, tables.url) from None
    with committing(tables.url):
        transaction.commit()
    return result


def begin_fenced(connection: Connection, tables: Tables, leases: Iterable[Lease]) -> Transaction:
    """Begin a transaction in which the fence of every lease has passed, in the order of stream_id."""
    transaction = connection.begin()
    try:
        tables.check(connection)
        for lease in sorted(limits.leases(leases), key=lambda lease: lease.stream_id):
            fence(connection, lease)
    except BaseException:
        roll_back(transaction)
        raise
    return transaction


def roll_back(transaction: Transaction) -> None:
    """Roll back, unless a refused fence has done so already."""
    if transaction.is_active:
        transaction.rollback()


@contextmanager
def committing(url: URL) -> Iterator[None]:
    """Tell a COMMIT that failed from one whose answer was lost."""
    try:
        yield
    except SQLAlchemyError as error:
        raise committed_or_not(error, url) from None


def committed_or_not(error: SQLAlchemyError, url: URL) -> LeasesError:
    """Make one of our errors of what came in place of an answer to a COMMIT, or to a statement that is one."""
    if sqlstate(error) in ENDED_STATES:
        return StoreUnavailable(
            f"{describe(url)} has ended the transaction at its time limit, before COMMIT: nothing of it is kept"
        )
    if is_disconnect(error):
        return OutcomeUnknown(
            f"the connection to {describe(url)} broke during COMMIT: it may or may not have happened; "
            "ask again with the same key, or look"
        )
    return translate(error, url)


def attempt_alone(shortcut: Shortcut, tables: Tables, call: EitherWay[R]) -> R | NotTaken:
    """Run a call without a transaction around its statements, unless one has to be."""
    if not tables.checked:
        return NOT_TAKEN
    with translated(tables.url):
        direct = shortcut.take()
    if direct is None:
        return NOT_TAKEN
    try:
        return shortcut.run(direct, call)
    except SQLAlchemyError as error:
        raise committed_or_not(error, tables.url) from None


def time_left(retry_for: timedelta, began_s: float) -> timedelta:
    """What is left of the time in which an operation is tried again, after its first try."""
    return max(timedelta(0), retry_for - timedelta(seconds=time.monotonic() - began_s))


class Tables:
    """The check, once per store, that the tables are of this code's version."""

    def __init__(self, url: URL, schema: str | None) -> None:
        self.url = url
        self._schema = schema
        self.checked = False

    def check_file(self) -> None:
        """Refuse a SQLite file that is not there: to connect would create it."""
        if not self.checked:
            check_file(self.url, create=False)

    def check(self, connection: Connection) -> None:
        if not self.checked:
            migrate.check(connection, self._schema)
            self.checked = True


LOOK_S = 2.0
"""How long is waited at the most for a look that has begun, to give its connection back."""


class Watch:
    """Looks, while an operator's action waits, at who blocks it; and ends those sessions if it is forced."""

    def __init__(self, step: Wait) -> None:
        self.step = step
        self.blockers: list[Blocker] = []
        self.over = False
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
            self.over = True
            cancel()

    def _look(self, connection: Connection, pid: int) -> None:
        self.blockers = views.blockers(connection, pid)
        if self.step.force and not self.over:
            administration.terminate(connection, [blocker.pid for blocker in self.blockers])

    @property
    def options(self) -> Options:
        return {BUSY_OPTION: max(1, int(self.step.timeout_s * 1000))}

    def refuse(self) -> NoReturn:
        who = "; ".join(
            f"pid {b.pid} ({b.application or 'no application name'}, {b.user}@{b.address}, {b.state}) "
            f"since {b.since:%Y-%m-%d %H:%M:%S} UTC"
            for b in self.blockers
        )
        raise LeaseHeld(
            f"{self.step.stream_id!r}: {self.step.refusal}; held after {self.step.timeout_s:g} s by "
            f"{who or 'another transaction'}; wait and try again, or force that session to end",
            stream_id=self.step.stream_id,
            blockers=self.blockers,
        )


# --- how a method is made of an operation ----------------------------------------------------------------------


class Runs(Protocol):
    def run(self, call: Callable[[Connection], R], *, read_only: bool = False) -> R: ...

    def _run_either_way(self, call: EitherWay[R]) -> R: ...


class RunsAsync(Protocol):
    async def run(self, call: Callable[[Connection], R], *, read_only: bool = False) -> R: ...

    async def _run_either_way(self, call: EitherWay[R]) -> R: ...


F = TypeVar("F", bound=Callable[..., Any])


def repeatable(value: Any) -> Any:
    """An argument that a second attempt finds as the first one did: an iterator is read once, before both."""
    return list(value) if isinstance(value, Iterator) else value


def as_method(function: Callable[..., Any]) -> Callable[[F], F]:
    """Do what `functools.wraps` does, but show the signature that a caller sees.

    That is with `self` for the connection, or for a recipe's clock, and with what a recipe returns for its steps.
    """
    signature = inspect.signature(function)
    others = list(signature.parameters.values())[1:]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    returns = re.sub(r"^Generator\[Step, Any, (.*)\]$", r"\1", str(signature.return_annotation))

    def decorate(wrapper: F) -> F:
        functools.update_wrapper(wrapper, function)
        del wrapper.__dict__["__wrapped__"]
        shown = signature.replace(parameters=[itself, *others], return_annotation=returns)
        wrapper.__dict__["__signature__"] = shown
        return wrapper

    return decorate


Operation = Callable[Concatenate[Connection, P], R]


def method(
    operation: Operation[P, R],
    *,
    read_only: bool = False,
    alone: Operation[P, R | NotTaken] | None = None,
    unless: str = "",
) -> Callable[Concatenate[Runs, P], R]:
    """Make a method of an operation: the same arguments, in a transaction of its own.

    `alone` is the operation for where each of its statements may be a transaction, `unless` the argument with which
    they may not.
    """

    @as_method(operation)
    def run(store: Runs, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = [repeatable(value) for value in args]
        named: Any = {name: repeatable(value) for name, value in kwargs.items()}
        if alone is not None and named.get(unless) is None:
            return store._run_either_way(either_way(operation, alone, given, named))
        return store.run(lambda connection: operation(connection, *given, **named), read_only=read_only)

    return run


def amethod(
    operation: Operation[P, R],
    *,
    read_only: bool = False,
    alone: Operation[P, R | NotTaken] | None = None,
    unless: str = "",
) -> Callable[Concatenate[RunsAsync, P], Coroutine[Any, Any, R]]:
    """Make a coroutine method of an operation, as `method` does."""

    @as_method(operation)
    async def run(store: RunsAsync, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = [repeatable(value) for value in args]
        named: Any = {name: repeatable(value) for name, value in kwargs.items()}
        if alone is not None and named.get(unless) is None:
            return await store._run_either_way(either_way(operation, alone, given, named))
        return await store.run(lambda connection: operation(connection, *given, **named), read_only=read_only)

    return run


def either_way(within: Callable[..., R], alone: Callable[..., R | NotTaken], given: Any, named: Any) -> EitherWay[R]:
    return EitherWay(
        lambda connection, _: within(connection, *given, **named),
        lambda connection, _: alone(connection, *given, **named),
    )


Recipe = Callable[Concatenate[recipes.Clock, P], Generator[Step, Any, R]]
