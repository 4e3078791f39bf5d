"""Every function of the library, with whatever a caller may pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Connection, Integer, MetaData, Table, Text, select

from leases import (
    AsyncEventLog,
    AsyncLeaseStore,
    ConfigError,
    EventLog,
    Lease,
    LeaseStore,
    advance_watermark,
    fence,
    protect,
    unprotect,
    watermark_table,
)
from tests.conformance.driver import log_of, within_fence
from tests.hostile import surface, values
from tests.hostile.laws import Broken, World, judged
from tests.hostile.values import SQL, Opaque

ON_ONE_WORLD = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OF_THE_CALLERS = (OSError,)
"""What `values.Endless` raises: a caller's own error passes as it is."""


def shown(value: Any) -> str:
    try:
        return repr(value)[:200]
    except ValueError:
        return f"a {type(value).__name__} with a number of thousands of digits"


@dataclass(frozen=True)
class Target:
    """What is called, and the parameters that are given hostile values."""

    name: str
    call: Callable[..., Any]
    parameters: Sequence[str]
    needed: Sequence[str]


def methods(store: LeaseStore) -> Iterator[Target]:
    """The methods of a store and of its log."""
    for target, kind in ((store, LeaseStore), (log_of(store), EventLog)):
        for name, signature in surface.methods(kind).items():
            given = list(signature.parameters.values())[1:]
            needed = [each.name for each in given if each.default is each.empty]
            yield Target(name, getattr(target, name), [each.name for each in given], needed)


def functions(store: LeaseStore) -> Iterator[Target]:
    """The functions of a Connection, each in a transaction of the store."""
    sink = watermark_table(MetaData())

    def on_connection(function: Callable[..., Any], *before: Any, **given: Any) -> Any:
        return store.run(lambda connection: function(connection, *before, **given))

    yield Target("fence", partial(on_connection, fence), ["lease"], ["lease"])
    yield Target("advance_watermark", partial(on_connection, advance_watermark, sink), ["lease"], ["lease"])
    yield Target("fenced", lambda lease: within_fence(store, lease, body=lambda _: None), ["lease"], ["lease"])
    for function in (protect, unprotect):
        yield Target(
            function.__name__,
            partial(on_connection, function),
            list(inspect.signature(function).parameters)[1:],
            ["table"],
        )


def escapes(world: World, targets: Iterable[Target]) -> dict[surface.Escape, str]:
    """Try each value alone, all others good; return what breaks a law, with one story of each."""
    found = {}
    known = values.parameters(world.held)
    for target in targets:
        for parameter in target.parameters:
            for value in known[parameter]:
                arguments = {**{each: known[each][0] for each in target.needed}, parameter: value}
                try:
                    world.attacked(partial(target.call, **arguments), also=OF_THE_CALLERS)
                except Broken as broken:
                    story = f"{target.name}({parameter}={shown(value)}): {broken}"
                    found[target.name, parameter, broken.escaped] = story
    return found


def test_each_value_alone(world: World) -> None:
    with LeaseStore(world.url) as store, tables(store):
        targets = [*methods(store), *functions(store)]
        surface.compare(escapes(world, targets), tried=[target.name for target in targets])


@contextmanager
def tables(store: LeaseStore) -> Iterator[Table]:
    """A table to keep watermarks in, and one to protect."""
    sink = watermark_table(MetaData())
    work = Table("work", sink.metadata, Column("stream_id", Text), Column("fencing_token", Integer))
    store.run(lambda connection: work.metadata.create_all(connection))
    yield sink
    store.run(lambda connection: work.metadata.drop_all(connection))


@pytest.mark.parametrize(
    "made", [LeaseStore, AsyncLeaseStore, EventLog, AsyncEventLog], ids=lambda kind: str(kind.__name__)
)
def test_a_store_is_made(made: Any) -> None:
    """Of nonsense no store is made, and no log of what is no store."""
    good: dict[str, Any] = {"database": "sqlite://"} if made in (LeaseStore, AsyncLeaseStore) else {}
    given = {
        "database": values.NOT_TEXT,
        "schema": (*values.NAMES, "x" * 64, "pg_x"),
        "retry_for": values.TIMEOUTS,
        "store": (None, "sqlite://", 7, Opaque()),
    }
    for parameter in inspect.signature(made).parameters:
        for value in given[parameter]:
            error = judged(partial(made, **{**good, parameter: value}))
            assert error is not None or (parameter, value) in (("schema", None), *(("retry_for", each) for each in FIT))


FIT = values.TIMEOUTS[:2]


def test_values_together(world: World, attacked: LeaseStore) -> None:
    targets = list(methods(attacked))
    known = values.parameters(world.held)

    @ON_ONE_WORLD
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(targets), label="method")
        arguments = {
            each: data.draw(values.drawn(known[each]), label=each)
            for each in target.parameters
            if each in target.needed or data.draw(st.booleans())
        }
        try:
            world.attacked(partial(target.call, **arguments), also=OF_THE_CALLERS)
        except Broken as broken:
            if not tolerated(broken, target.name, *arguments):
                raise

    attack()


def test_a_call_of_the_wrong_shape_is_a_type_error(world: World, attacked: LeaseStore) -> None:
    for target in methods(attacked):
        for arguments in ({"nonsense": 1}, {}):
            if arguments or target.needed:
                with pytest.raises(TypeError, match="argument"):
                    target.call(**arguments)
                assert world.look() == world.rows, target.name


def tolerated(broken: Broken, name: str, *parameters: str) -> bool:
    """Whether it is known that this breaks a law."""
    return any((name, each, broken.escaped) in surface.ACCEPTED for each in parameters)


def attack_all(world: World, name: str, parameter: str, attempts: Iterable[Callable[[], Any]]) -> int:
    """Make the attempts; return how many were accepted."""
    accepted = 0
    for attempt in attempts:
        try:
            accepted += world.attacked(attempt) is None
        except Broken as broken:
            if not tolerated(broken, name, parameter):
                raise
    return accepted


def test_a_fenced_block(world: World, attacked: LeaseStore) -> None:
    """Whatever a lease is made of: only the one that is held gets into the block."""
    passed = []

    def work(lease: Any) -> None:
        within_fence(attacked, lease, body=lambda _: passed.append(lease))

    attempts = (partial(work, lease) for lease in values.leases(world.held))
    attack_all(world, "fenced", "lease", attempts)
    assert passed
    assert all(named(lease) == named(world.held) for lease in passed)


def test_a_fence(world: World) -> None:
    passed = []

    def work(connection: Connection, lease: Any) -> None:
        fence(connection, lease)
        passed.append(lease)

    with LeaseStore(world.url) as store:
        attempts = (
            partial(store.run, partial(work, lease=lease)) for lease in (*values.leases(world.held), [], b"held")
        )
        attack_all(world, "fence", "lease", attempts)
    assert passed
    assert all(named(lease) == named(world.held) for lease in passed)


def test_a_watermark(world: World) -> None:
    """What is refused has not moved the mark."""
    with LeaseStore(world.url) as store, tables(store) as sink:
        store.run(lambda connection: advance_watermark(connection, sink, replace(world.held, fencing_token=5)))
        marks = partial(store.run, lambda connection: connection.execute(select(sink)).all())
        for lease in values.leases(replace(world.held, fencing_token=4)):
            (before,) = [row for row in marks() if row.stream_id == "held"]
            attempt = partial(store.run, partial(advance_watermark, watermarks=sink, lease=lease))
            accepted = attack_all(world, "advance_watermark", "lease", [attempt])
            (mark,) = [row for row in marks() if row.stream_id == "held"]
            assert mark == before or (accepted and mark.fencing_token > before.fencing_token)
        for name in ("", "a\0", SQL, "x" * 300, '"'):
            table = watermark_table(MetaData(), name)
            attempt = partial(store.run, partial(advance_watermark, watermarks=table, lease=world.held))
            assert not attack_all(world, "advance_watermark", "watermarks", [attempt])


@pytest.mark.parametrize("name", [SQL, ':x "', "\u202e", "%s", "{x}%(y)s%%"])
def test_a_trigger(world: World, name: str) -> None:
    """The names of tables and columns are quoted: what is in them does not run."""
    quoted = name.replace('"', '""')
    if world.url.startswith("postgresql"):
        quoted = quoted.replace("%", "%%")  # for the driver, which makes one of it again
    with LeaseStore(world.url) as store, closing(store.engine.connect()) as connection:
        connection.exec_driver_sql(f'CREATE TABLE "{quoted}" (stream_id text, "{quoted}" int)')
        connection.commit()
        assert world.attacked(partial(store.run, partial(protect, table=name, fencing_token=name))) is None
        for token, passes in ((world.held.fencing_token, True), (world.held.fencing_token + 1, False)):
            write = f"INSERT INTO \"{quoted}\" VALUES ('held', {token})"
            error = world.attacked(partial(store.run, partial(Connection.exec_driver_sql, statement=write)))
            assert (error is None) == passes
        store.run(partial(unprotect, table=name))
        connection.exec_driver_sql(f'DROP TABLE "{quoted}"')
        connection.commit()


def test_what_would_end_the_text_of_a_trigger_is_refused(world: World) -> None:
    with LeaseStore(world.url) as store:
        for parameter in ("table", "stream_id", "fencing_token"):
            given = {"table": "work", parameter: '"; END $leases$; DROP TABLE leases; --'}
            assert isinstance(world.attacked(partial(store.run, partial(protect, **given))), ConfigError)  # type: ignore[arg-type]


def named(lease: Lease) -> tuple[Any, ...]:
    return lease.stream_id, lease.owner, int(lease.fencing_token)  # the text "1" is the token 1
