"""A store on the caller's own Engine, as SQLAlchemy makes it by default: it works, and leaves the engine as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from leases import AsyncLeaseStore, LeaseStore, StaleToken, fence
from tests.clock import Clock
from tests.conformance.driver import TTL, Loop, log_of, opened, take


@pytest.fixture
def own(url: str, clock: Clock, loop: Loop | None) -> Iterator[Any]:
    """An Engine or AsyncEngine of the caller's; on PostgreSQL its transactions are SERIALIZABLE."""
    options: dict[str, Any] = {} if url.startswith("sqlite") else {"isolation_level": "SERIALIZABLE"}
    if loop is None:
        engine = create_engine(url, **options)
        yield engine
        engine.dispose()
        return
    asynchronous = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"), **options)
    yield asynchronous
    loop.wait(asynchronous.dispose())


def on(own: Any, loop: Loop | None, body: Any) -> Any:
    """Run a function in a transaction of the caller's own engine."""
    if loop is None:
        with own.begin() as connection:
            return body(connection)

    async def go() -> Any:
        async with own.begin() as connection:
            return await connection.run_sync(body)

    return loop.wait(go())


def settings(connection: Connection) -> list[Any]:
    if connection.dialect.name == "sqlite":
        pragmas = ("synchronous", "foreign_keys", "busy_timeout", "journal_mode")
        return [connection.execute(text(f"PRAGMA {pragma}")).scalar() for pragma in pragmas]
    names = ("transaction_isolation", "statement_timeout", "search_path", "synchronous_commit")
    return [connection.execute(text(f"SHOW {name}")).scalar() for name in names]


def test_the_protocol_runs_on_the_callers_engine(own: Any, loop: Loop | None, clock: Clock) -> None:
    with opened(own, loop) as store:
        lease = take(store)
        assert log_of(store).append(lease, {"e": 1}, checkpoint=1).last_seq == 1
        assert store.renew([lease], owner="one", ttl=TTL).lost == {}
        stolen = store.steal("a", to="two", ttl=TTL, actor="op")
        with pytest.raises(StaleToken):
            store.write_checkpoint(lease, 2)
        on(own, loop, lambda connection: fence(connection, stolen))
        assert store.release(stolen)


def test_the_callers_engine_stays_as_it_is(own: Any, loop: Loop | None, clock: Clock) -> None:
    before = on(own, loop, settings)
    with opened(own, loop) as store:
        lease = take(store)
        store.expire("a", actor="op")
        with pytest.raises(StaleToken):
            store.write_checkpoint(lease, 1)
    assert on(own, loop, settings) == before, "and is open still"


def test_the_protocol_is_at_read_committed_whatever_the_engines_level(
    own: Any, loop: Loop | None, clock: Clock
) -> None:
    with opened(own, loop) as store:
        if store.engine.dialect.name == "sqlite":
            assert store.run(lambda connection: connection.connection.driver_connection is not None)
            return
        level = store.run(lambda connection: connection.execute(text("SHOW transaction_isolation")).scalar())
        assert level == "read committed"


# --- schema= on PostgreSQL -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", ["other", 'we ird"x', "Ünï%c;--", "a:b %(x)s"])
def test_the_tables_of_two_schemas_know_nothing_of_each_other(
    postgresql_url: str, event_loop_thread: Loop, schema: str
) -> None:
    for loop in (None, event_loop_thread):
        with opened(postgresql_url, loop) as plain, opened(postgresql_url, loop, schema=schema) as store:
            assert store.migrate()[1] == "0002"
            assert store.migrate() == ("0002", "0002")
            stream = "sync" if loop is None else "async"
            lease = take(store, stream)
            assert take(plain, stream, owner="two").fencing_token == 1
            assert log_of(store).append(lease, {"e": 1}, checkpoint=[1]).last_seq == 1
            assert plain.checkpoint(stream) is None
            assert store.renew([lease], owner="one", ttl=TTL).lost == {}
            assert store.register([f"{stream}2"], pool=stream) == 1
            assert len(store.claim(owner="one", ttl=TTL, limit=9, pool=stream)) == 1
            assert plain.claim(owner="one", ttl=TTL, limit=9, pool=stream) == []
            stolen = store.steal(stream, to="three", ttl=TTL, actor="op")
            with pytest.raises(StaleToken):
                store.write_checkpoint(lease, [2])
            assert store.release(stolen)
            assert [grant.owner for grant in store.grants(stream)] == ["three", "one"]
            assert [grant.owner for grant in plain.grants(stream)] == ["two"]


def test_sqlite_has_no_schemas(sqlite_url: str) -> None:
    engine: Engine = create_engine(sqlite_url)
    for make in (
        lambda: LeaseStore(sqlite_url, schema="x"),
        lambda: LeaseStore(engine, schema="x"),
        lambda: AsyncLeaseStore(sqlite_url, schema="x"),
    ):
        with pytest.raises(ValueError, match="one schema per file"):
            make()
