"""Statements that are each a transaction of their own, run by the driver itself (PostgreSQL).

Most of what a worker does is one statement. In a transaction it costs three round trips, in autocommit mode one. And of
a client's CPU SQLAlchemy's Connection, its transaction and its Result take more than the driver and the network do. So
here SQLAlchemy writes the SQL, once for each statement, converts the values as its types say, and keeps the pool. What
runs is psycopg.

A `Direct` is to the operations what a `Connection` is, as far as those use one that may stand alone: `dialect`,
`execute`, and of its answer `all`, `one_or_none`, `one`, `scalar_one` and iteration. It is only a first try, on a sound
connection: whatever fails is tried again in a transaction, by SQLAlchemy. None is opened, and the transaction is taken,

- where a session's default is not READ COMMITTED: only a transaction can say that it is to be (looked up once for each
  connection of the pool);
- where somebody listens to the Engine's statements, or has them logged: they are to be heard of.
"""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import psycopg
from sqlalchemy import BindParameter, Connection, Dialect, Engine, literal_column
from sqlalchemy.exc import DBAPIError, MultipleResultsFound, NoResultFound
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import replacement_traverse
from sqlalchemy.types import TypeEngine

R = TypeVar("R")
Processor = Callable[[Any], Any]

HEARD = attrgetter("before_execute", "before_cursor_execute", "after_cursor_execute", "begin", "commit")
"""The events of an Engine by which somebody hears of statements, or of transactions."""

NOTHING: Mapping[str, Any] = {}

DEFAULT_LEVEL = "leases_default_isolation"
"""Where a pool's connection keeps what its session's default isolation level is."""


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


@dataclass(slots=True)
class Prepared:
    """A statement as the driver takes it."""

    text: str
    names: Sequence[str]
    """The parameters that a call gives."""
    constants: Mapping[str, Any]
    """Those that the statement itself gives, as far as they do not stand in its text."""
    into: Sequence[tuple[str, Processor]]
    kinds: Sequence[TypeEngine[Any]]
    make: Callable[[Sequence[Any]], Any]
    outof: Sequence[tuple[int, Processor]] | None = None
    """How the answer's values are converted; known from the first answer on."""


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

    __slots__ = ("_cursor", "_shortcut", "connection", "dialect")

    def __init__(self, shortcut: Shortcut, connection: Any) -> None:
        self.dialect = shortcut.engine.dialect
        self.connection = connection
        self._shortcut = shortcut
        self._cursor = connection.dbapi_connection.cursor()

    def execute(self, statement: Any, values: Mapping[str, Any] = NOTHING) -> Rows:
        """Run a statement; what the driver raises comes as SQLAlchemy's `DBAPIError`."""
        prepared = self._shortcut.prepared(statement)
        given = {**prepared.constants, **{name: values[name] for name in prepared.names}}
        for name, process in prepared.into:
            given[name] = process(given[name])
        try:
            self._cursor.execute(prepared.text, given)
            rows = self._cursor.fetchall()
        except psycopg.Error as error:
            cause: Any = error
            broken = self.dialect.is_disconnect(cause, self.connection.driver_connection, self._cursor)
            raise DBAPIError(prepared.text, None, cause, hide_parameters=True, connection_invalidated=broken) from None
        outof = prepared.outof
        if outof is None:
            outof = prepared.outof = _outof(prepared.kinds, self._cursor.description, self.dialect)
        return Rows([_converted(row, outof, prepared.make) for row in rows])


def _outof(kinds: Sequence[TypeEngine[Any]], description: Any, dialect: Dialect) -> Sequence[tuple[int, Processor]]:
    processors = (
        kind.dialect_impl(dialect).result_processor(dialect, column.type_code)
        for kind, column in zip(kinds, description, strict=True)
    )
    return [(place, process) for place, process in enumerate(processors) if process is not None]


def _converted(row: Sequence[Any], outof: Sequence[tuple[int, Processor]], make: Callable[[Any], Any]) -> Any:
    if not outof:
        return make(row)
    values = list(row)
    for place, process in outof:
        values[place] = process(values[place])
    return make(values)


class Shortcut:
    """The way around transactions, on an Engine's pool: an Engine as `transaction.own` makes it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._is_for = engine.dialect.name == "postgresql"
        self._prepared: WeakKeyDictionary[Any, Prepared] = WeakKeyDictionary()

    def attempt(self, call: EitherWay[R]) -> R | NotTaken:
        """Run a call's statements, each a transaction; `NOT_TAKEN` where there has to be one around them.

        What the database refuses is a `DBAPIError`: after one with `connection_invalidated` nothing is known.
        """
        connection = self._connected() if self._is_for and not self._is_heard() else None
        if connection is None:
            return NOT_TAKEN
        interrupted = True
        try:
            result = call.alone(cast(Connection, Direct(self, connection)), 1)
            interrupted = False
            return result
        except Exception:
            interrupted = False
            raise
        finally:
            _give_back(connection, interrupted)

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

    def prepared(self, statement: Any) -> Prepared:
        """The statement as the driver takes it; made when it is first asked for."""
        found = self._prepared.get(statement)
        if found is None:
            found = self._prepared[statement] = self._prepare(statement)
        return found

    def _prepare(self, statement: Any) -> Prepared:
        dialect, schemas = self.engine.dialect, self.engine.get_execution_options().get("schema_translate_map")
        compiled: SQLCompiler = replacement_traverse(statement, {}, partial(_inline, dialect)).compile(
            dialect=dialect, schema_translate_map=schemas, render_schema_translate=bool(schemas)
        )
        into = []
        for bound, name in compiled.bind_names.items():
            process = bound.type.dialect_impl(dialect).bind_processor(dialect)
            if process is not None:
                into.append((name, process))
        columns = compiled._result_columns
        row = namedtuple("Row", [column.keyname for column in columns], rename=True)  # type: ignore[misc]
        given = {name: bound.required for bound, name in compiled.bind_names.items()}
        return Prepared(
            text=compiled.string,
            names=[name for name, required in given.items() if required],
            constants={name: compiled.params[name] for name, required in given.items() if not required},
            into=into,
            kinds=[column.type for column in columns],
            make=row._make,
        )


def _inline(dialect: Dialect, element: Any, **_: Any) -> Any:
    """A value that the statement itself gives, to be written into its text; None leaves all else as it is."""
    if not isinstance(element, BindParameter) or element.required:
        return None
    written = str(element.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    return literal_column(written.replace("%%", "%"), element.type)  # which doubles it again


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
