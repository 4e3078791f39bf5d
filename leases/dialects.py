"""Every difference between PostgreSQL and SQLite, in one place.

Most are SQL constructs that compile to each engine's own words, so that `statements.py` reads the same for both:

| construct | PostgreSQL | SQLite |
| --- | --- | --- |
| `now()` | `statement_timestamp()` | `strftime('%Y-%m-%d %H:%M:%f', 'now')` |
| `wall()` | `clock_timestamp()`: moves within a statement | the same as `now()` |
| `later(s)` | now + s seconds | the same, rounded to milliseconds |
| `seconds(a, b)` | a − b | the same |
| `one_of(c, rows)` | `c = ANY (ARRAY(rows))` | `c IN (rows)` |
| `notified(text)` | `pg_notify` of it, heard when the transaction commits | nothing: there they ask in time |
| `durably()` | turns `synchronous_commit` on where it is off | nothing: see the pragmas in `engine` |
| `grants_asked` | two texts, made arrays and unnested | one JSON text, by `json_each` |
| `events_offered` | one JSON text, by `json_array_elements` | one JSON text, by `json_each` |

Why those clocks: `now()` of PostgreSQL freezes at the start of the caller's transaction, which would shorten a
lease by all the time that the transaction took before. `clock_timestamp()` is VOLATILE, which distributed engines
refuse in an UPDATE; it is used only in the fence, which must see an expiry that happened while it waited.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    Connection,
    Double,
    FromClause,
    Select,
    Subquery,
    Text,
    bindparam,
    cast,
    column,
    func,
    literal,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType

from leases import limits
from leases.errors import ConfigError
from leases.model import Ending, Lease
from leases.types import Document, Timestamp

POSTGRESQL = "postgresql"
SQLITE = "sqlite"


def name_of(connection: Connection) -> str:
    """Return the engine's name, POSTGRESQL or SQLITE; any other is a `ConfigError`."""
    return require_supported(connection.dialect.name)


def postgresql_version(connection: Connection) -> int:
    """Return the server's major version; before the first connection has asked, the least that is supported."""
    known = connection.dialect.server_version_info
    return int(known[0]) if known else 13


def require_supported(dialect: str) -> str:
    """Return the name of a dialect that leases runs on, or raise `ConfigError`."""
    if dialect not in (POSTGRESQL, SQLITE):
        raise ConfigError(f"leases runs on PostgreSQL and SQLite, not on {dialect}")
    return dialect


class now(FunctionElement[Any]):
    """The database's clock when the statement began."""

    type = Timestamp()
    inherit_cache = True


class wall(FunctionElement[Any]):
    """The database's clock at the moment of evaluation, also within one statement."""

    type = Timestamp()
    inherit_cache = True


class later(FunctionElement[Any]):
    """The database's clock when the statement began, and so many seconds."""

    type = Timestamp()
    inherit_cache = True


class seconds(FunctionElement[Any]):
    """The seconds from the second instant to the first: positive when the first is later."""

    type = Double()
    inherit_cache = True


class seconds_of(FunctionElement[Any]):
    """The seconds of an interval (PostgreSQL)."""

    type = Double()
    inherit_cache = True


@compiles(seconds_of, POSTGRESQL)
def _(element: seconds_of, compiler: SQLCompiler, **kw: Any) -> str:
    return f"CAST(extract(epoch FROM {compiler.process(element.clauses, **kw)}) AS double precision)"


SQLITE_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"


@compiles(now, POSTGRESQL)
def _(element: now, compiler: SQLCompiler, **kw: Any) -> str:
    return "statement_timestamp()"


@compiles(wall, POSTGRESQL)
def _(element: wall, compiler: SQLCompiler, **kw: Any) -> str:
    return "clock_timestamp()"


@compiles(now, SQLITE)
@compiles(wall, SQLITE)
def _(element: now | wall, compiler: SQLCompiler, **kw: Any) -> str:
    return SQLITE_NOW


@compiles(later, POSTGRESQL)
def _(element: later, compiler: SQLCompiler, **kw: Any) -> str:
    return f"statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)})"


@compiles(later, SQLITE)
def _(element: later, compiler: SQLCompiler, **kw: Any) -> str:
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', {compiler.process(element.clauses, **kw)}))"


@compiles(seconds, POSTGRESQL)
def _(element: seconds, compiler: SQLCompiler, **kw: Any) -> str:
    end, start = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"CAST(extract(epoch FROM {end} - {start}) AS double precision)"


@compiles(seconds, SQLITE)
def _(element: seconds, compiler: SQLCompiler, **kw: Any) -> str:
    end, start = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"round((julianday({end}) - julianday({start})) * 86400.0, 3)"


class durably(FunctionElement[Any]):
    """Evaluated, makes the transaction's commit wait for the disk, on a server whose commits do not (PostgreSQL)."""

    type = Text()
    inherit_cache = True


@compiles(durably, POSTGRESQL)
def _(element: durably, compiler: SQLCompiler, **kw: Any) -> str:
    return (
        "CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', true) END"
    )


@compiles(durably, SQLITE)
def _(element: durably, compiler: SQLCompiler, **kw: Any) -> str:
    return "NULL"


CHANNEL = "leases"
"""The channel of all notifications; a payload is what `freed` or `concerns` makes."""


def freed(pool: Any) -> notified:
    """Tell those who wait for streams of a pool that there may be one."""
    return notified(literal("free:", Text).concat(pool))


def concerns(owner: Any) -> notified:
    """Tell an owner to look at once at what has become of its leases, or of itself."""
    return notified(literal("look:", Text).concat(func.coalesce(owner, "")))


def notify(connection: Connection, *notices: notified) -> None:
    """Send notifications when the transaction commits; where there are none (SQLite), do nothing."""
    if name_of(connection) == POSTGRESQL:
        connection.execute(select(*notices))


class notified(FunctionElement[Any]):
    """Evaluated, sends a notification at the transaction's commit (PostgreSQL). A hint: who is to know, also asks."""

    type = Text()
    inherit_cache = True


@compiles(notified, POSTGRESQL)
def _(element: notified, compiler: SQLCompiler, **kw: Any) -> str:
    return f"CAST(pg_notify('{CHANNEL}', {compiler.process(element.clauses, **kw)}) AS text)"


@compiles(notified, SQLITE)
def _(element: notified, compiler: SQLCompiler, **kw: Any) -> str:
    return "NULL"


class one_of(FunctionElement[Any]):
    """`one_of(column, select)`: the column's value is among the rows, of which there are few.

    PostgreSQL's planner takes `= ANY (ARRAY(…))` for ten rows, and so uses the index on the column; an `IN` over a
    batch of unknown size may scan the whole table. No Boolean: SQLAlchemy would ask SQLite for `(c IN (rows)) = 1`, for
    which no index is used.
    """

    type = NullType()
    inherit_cache = True


@compiles(one_of, POSTGRESQL)
def _(element: one_of, compiler: SQLCompiler, **kw: Any) -> str:
    value, rows = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"{value} = ANY (ARRAY{rows})"


@compiles(one_of, SQLITE)
def _(element: one_of, compiler: SQLCompiler, **kw: Any) -> str:
    value, rows = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"{value} IN {rows}"


# --- batches ---------------------------------------------------------------------------------------------------


@cache
def grants_asked(dialect: str) -> FromClause:
    """A batch of grants as rows `(stream_id, fencing_token)`; its parameters come from `grants_given`."""
    if dialect == POSTGRESQL:
        # Two texts, not two arrays: psycopg escapes an array's elements in Python, one by one.
        stream_ids = func.string_to_array(bindparam("stream_ids", type_=Text), literal_column("chr(31)"))
        return (
            func.unnest(stream_ids, cast(bindparam("tokens", type_=Text), ARRAY(BigInteger)))
            .table_valued(column("stream_id", Text), column("fencing_token", BigInteger), name="asked")
            .render_derived()
        )
    each = func.json_each(bindparam("grants", type_=Text)).table_valued("value", name="each")
    return (
        select(
            func.json_extract(each.c.value, "$[0]").label("stream_id"),
            func.json_extract(each.c.value, "$[1]").label("fencing_token"),
        )
        .select_from(each)
        .subquery("asked")
    )


SEPARATOR = chr(31)


def grants_given(dialect: str, leases: Iterable[Lease]) -> Mapping[str, Any]:
    """The parameters of `grants_asked`, in the order of stream_id, so that no two batches lock in opposite orders."""
    ordered = sorted((lease.stream_id, lease.fencing_token) for lease in leases)
    if dialect == POSTGRESQL:
        # No name holds the separator, which is a control character.
        tokens = ",".join(str(pair[1]) for pair in ordered)
        return {"stream_ids": SEPARATOR.join(pair[0] for pair in ordered), "tokens": f"{{{tokens}}}"}
    return {"grants": json.dumps(ordered)}


@cache
def endings_asked(dialect: str) -> FromClause:
    """A batch of grants to let go, as rows `(stream_id, fencing_token, backoff, error)`; see `endings_given`."""
    if dialect == POSTGRESQL:
        return (
            func.unnest(
                bindparam("stream_ids", type_=ARRAY(Text)),
                bindparam("tokens", type_=ARRAY(BigInteger)),
                bindparam("backoffs", type_=ARRAY(Double)),
                bindparam("errors", type_=ARRAY(Text)),
            )
            .table_valued(
                column("stream_id", Text),
                column("fencing_token", BigInteger),
                column("backoff", Double),
                column("error", Text),
                name="ending",
            )
            .render_derived()
        )
    each = func.json_each(bindparam("grants", type_=Text)).table_valued("value", name="each")
    names = ("stream_id", "fencing_token", "backoff", "error")
    fields = [func.json_extract(each.c.value, f"$[{place}]").label(name) for place, name in enumerate(names)]
    return select(*fields).select_from(each).subquery("ending")


def endings_given(dialect: str, endings: Iterable[Ending]) -> Mapping[str, Any]:
    """The parameters of `endings_asked`, in the order of stream_id."""
    ordered = [
        (ending.lease.stream_id, ending.lease.fencing_token, limits.backoff_s(ending.backoff), ending.error)
        for ending in sorted(endings, key=lambda ending: ending.lease.stream_id)
    ]
    if dialect == POSTGRESQL:
        columns: list[list[Any]] = [list(values) for values in zip(*ordered, strict=True)] or [[], [], [], []]
        return dict(zip(("stream_ids", "tokens", "backoffs", "errors"), columns, strict=True))
    return {"grants": json.dumps(ordered)}


@cache
def events_offered(dialect: str) -> Subquery:
    """A batch of events as rows `(event_id, payload, position)`; its parameters come from `events_given`."""
    if dialect == POSTGRESQL:
        # One text, not an array of texts: psycopg escapes an array's elements in Python, one by one. And json, whose
        # elements may be as long as any: a whole jsonb array has at most 256 MiB.
        given = (
            func.json_array_elements(cast(bindparam("events", type_=Text), JSON))
            .table_valued(column("pair", JSON), with_ordinality="position", name="given")
            .render_derived()
        )
        rows: Select[Any] = select(
            given.c.pair.op("->>", return_type=Text())(literal_column("0")).label("event_id"),
            cast(given.c.pair.op("->")(literal_column("1")), Document).label("payload"),
            given.c.position,
        )
    else:
        each = func.json_each(bindparam("events", type_=Text)).table_valued("key", "value", name="each")
        rows = select(
            func.json_extract(each.c.value, "$[0]").label("event_id"),
            func.json_extract(each.c.value, "$[1]").label("payload"),
            each.c.key.label("position"),
        ).select_from(each)
    return rows.subquery("offered")


@cache
def event_offered() -> Subquery:
    """One event as such a row, of the parameters `event_id` and `payload`: without a batch's cost (PostgreSQL)."""
    payload = cast(bindparam("payload", type_=Text), Document)
    return select(
        cast(bindparam("event_id"), Text).label("event_id"),
        payload.label("payload"),
        literal_column("1").label("position"),
    ).subquery("one")


def events_given(dialect: str, events: Sequence[tuple[str, Any]]) -> Mapping[str, Any]:
    """The parameters of `events_offered`, from pairs of event_id and payload; `ConfigError` if one cannot be stored."""
    if dialect == POSTGRESQL:
        return {"events": limits.payloads(events)}
    return {"events": json.dumps([(event_id, limits.payload(event_id, payload)) for event_id, payload in events])}


@cache
def names_given(dialect: str, parameter: str) -> Select[Any]:
    """A batch of names as rows of one column; its parameter is what `names` makes of them."""
    if dialect == POSTGRESQL:
        unnested = func.unnest(bindparam(parameter, type_=ARRAY(Text))).table_valued(column("name", Text), name="names")
        return select(unnested.render_derived().c.name)
    return select(func.json_each(bindparam(parameter, type_=Text)).table_valued("value", name="names").c.value)


def names(dialect: str, values: Sequence[str]) -> Any:
    """The parameter of `names_given`."""
    return list(values) if dialect == POSTGRESQL else json.dumps(values)


def matches_glob(dialect: str, value: ColumnElement[str], pattern: str) -> ColumnElement[bool]:
    """Compare with a glob: `*` is any text, `?` any character, all else itself; case counts on both engines."""
    if dialect == POSTGRESQL:
        for character in "\\%_":
            pattern = pattern.replace(character, "\\" + character)
        return value.like(pattern.replace("*", "%").replace("?", "_"))
    return value.op("GLOB")(pattern.replace("[", "[[]"))


def in_transaction(connection: Connection) -> bool:
    """Say whether the driver has a transaction open, whatever SQLAlchemy thinks: not so in autocommit mode."""
    driver = connection.connection.driver_connection
    if driver is None:
        return False
    if name_of(connection) == SQLITE:
        return bool(driver.in_transaction)
    return bool(driver.info.transaction_status.name == "INTRANS")
