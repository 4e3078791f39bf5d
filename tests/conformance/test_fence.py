"""To fence: a write commits only under the current token, whoever's transaction it is in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.exc import PendingRollbackError, SQLAlchemyError

from leases import ConfigError, Lease, LeaseStore, StaleToken, StoreError, advance_watermark, fence, watermark_table
from tests.clock import Clock
from tests.conformance.driver import TTL, Caller, rows, take, within_fence

pytestmark = pytest.mark.usefixtures("clock", "work")

WRITE = text("INSERT INTO work VALUES ('written')")


def write(lease: Lease) -> Callable[[Connection], None]:
    def body(connection: Connection) -> None:
        fence(connection, lease)
        connection.execute(WRITE)

    return body


def written(store: LeaseStore) -> int:
    return len(rows(store, "SELECT * FROM work"))


def test_the_owner_of_a_live_lease_writes(store: LeaseStore, caller: Caller) -> None:
    caller.run(write(take(store)))
    assert written(store) == 1


def test_a_stale_owner_cannot_write(store: LeaseStore, caller: Caller) -> None:
    stale = take(store)
    store.steal("a", to="two", ttl=TTL, actor="op")
    with pytest.raises(StaleToken) as refused:
        caller.run(write(stale))
    error = refused.value
    assert (error.stream_id, error.fencing_token, error.current_token, error.current_owner) == ("a", 1, 2, "two")
    assert "token 1 " in str(error)
    assert "token is 2" in str(error)
    assert written(store) == 0


def test_at_its_expiry_a_lease_is_stale(store: LeaseStore, caller: Caller, clock: Clock) -> None:
    lease = take(store)
    clock.advance(10)
    caller.run(write(lease))
    clock.advance(5)
    with pytest.raises(StaleToken) as refused:
        caller.run(write(lease))
    assert (refused.value.fencing_token, refused.value.current_token) == (1, 1)
    assert written(store) == 1


def test_what_was_written_before_the_fence_is_not_kept(store: LeaseStore, caller: Caller) -> None:
    stale = take(store)
    store.release(stale)

    def body(connection: Connection) -> None:
        connection.execute(WRITE)
        write(stale)(connection)

    with pytest.raises(StaleToken):
        caller.run(body)
    assert written(store) == 0


def test_nothing_is_kept_although_the_caller_swallows_the_refusal(store: LeaseStore, caller: Caller) -> None:
    stale = take(store)
    store.release(stale)

    def body(connection: Connection) -> None:
        connection.execute(WRITE)
        with suppress(StaleToken):
            fence(connection, stale)
        connection.execute(WRITE)

    with pytest.raises(SQLAlchemyError):
        caller.run(body)
    assert written(store) == 0


def test_nothing_is_kept_although_the_end_of_the_block_is_the_next_thing(store: LeaseStore, caller: Caller) -> None:
    stale = take(store)
    store.release(stale)

    def body(connection: Connection) -> None:
        connection.execute(WRITE)
        with suppress(StaleToken):
            fence(connection, stale)

    with suppress(SQLAlchemyError):
        caller.run(body)
    assert written(store) == 0


def test_who_swallows_the_refusal_cannot_go_on_in_a_transaction_that_begins_by_itself(
    store: LeaseStore, caller: Caller
) -> None:
    stale = take(store)
    store.release(stale)

    def swallow(connection: Connection) -> None:
        with suppress(StaleToken):
            fence(connection, stale)
        with pytest.raises(PendingRollbackError):
            connection.execute(WRITE)
        with pytest.raises(PendingRollbackError):
            connection.commit()
        connection.rollback()
        connection.execute(WRITE)
        connection.commit()

    if caller.loop is None:
        with caller.sync.connect() as connection:
            swallow(connection)
    else:

        async def go() -> None:
            async with caller.asynchronous.connect() as connection:
                await connection.run_sync(swallow)

        caller.loop.wait(go())
    assert written(store) == 1


def test_neither_a_released_nor_a_revoked_nor_a_foreign_nor_an_unknown_lease_passes(
    store: LeaseStore, caller: Caller
) -> None:
    held = take(store, "held")
    released = take(store, "released")
    store.release(released)
    revoked = take(store, "revoked")
    store.expire("revoked", actor="op")
    for stale, token, owner in (
        (released, 1, None),
        (revoked, 2, None),
        (replace(held, owner="two"), 1, "one"),
        (replace(held, fencing_token=2), 1, "one"),
        (replace(held, stream_id="unknown"), None, None),
    ):
        with pytest.raises(StaleToken) as refused:
            caller.run(write(stale))
        assert (refused.value.current_token, refused.value.current_owner) == (token, owner)
    assert written(store) == 0


def test_a_transaction_may_be_fenced_twice_and_for_several_leases(store: LeaseStore, caller: Caller) -> None:
    one, two = take(store, "a"), take(store, "b")

    def body(connection: Connection) -> None:
        for lease in (one, two, one):
            fence(connection, lease)
        connection.execute(WRITE)

    caller.run(body)
    assert written(store) == 1


def test_one_stale_lease_of_several_spoils_the_transaction(store: LeaseStore, caller: Caller) -> None:
    one, two = take(store, "a"), take(store, "b")
    store.release(two)

    def body(connection: Connection) -> None:
        fence(connection, one)
        connection.execute(WRITE)
        fence(connection, two)

    with pytest.raises(StaleToken):
        caller.run(body)
    assert written(store) == 0


def test_fence_refuses_inside_a_savepoint(store: LeaseStore, caller: Caller) -> None:
    lease = take(store)

    def body(connection: Connection) -> None:
        with connection.begin_nested():
            write(lease)(connection)

    with pytest.raises(ConfigError, match="savepoint"):
        caller.run(body)
    assert written(store) == 0


@pytest.mark.parametrize("before", [False, True], ids=["first", "after work"])
def test_fence_refuses_inside_a_savepoint_that_sqlalchemy_does_not_know(
    store: LeaseStore, caller: Caller, before: bool
) -> None:
    if caller.sync.dialect.name == "sqlite":  # there ROLLBACK TO keeps the file's write lock
        return
    lease = take(store)

    def body(connection: Connection) -> None:
        if before:
            connection.execute(WRITE)
        connection.execute(text("SAVEPOINT mine"))
        write(lease)(connection)

    with pytest.raises(ConfigError, match="savepoint"):
        caller.run(body)
    assert written(store) == 0


def test_a_savepoint_after_the_fence_is_the_callers_affair(store: LeaseStore, caller: Caller) -> None:
    lease = take(store)

    def body(connection: Connection) -> None:
        write(lease)(connection)
        nested = connection.begin_nested()
        connection.execute(WRITE)
        nested.rollback()

    caller.run(body)
    assert written(store) == 1


def test_a_savepoint_that_was_released_before_is_none(store: LeaseStore, caller: Caller) -> None:
    lease = take(store)

    def body(connection: Connection) -> None:
        with connection.begin_nested():
            connection.execute(WRITE)
        write(lease)(connection)

    caller.run(body)
    assert written(store) == 2


def test_fence_refuses_in_autocommit_mode(store: LeaseStore, caller: Caller) -> None:
    lease = take(store)
    engine = caller.sync.execution_options(isolation_level="AUTOCOMMIT")
    if caller.loop is None:
        with engine.connect() as connection, pytest.raises(ConfigError, match="autocommit"):
            fence(connection, lease)
        return
    from sqlalchemy.ext.asyncio import AsyncEngine

    async def go() -> None:
        async with AsyncEngine(engine).connect() as connection:
            with pytest.raises(ConfigError, match="autocommit"):
                await connection.run_sync(fence, lease)

    caller.loop.wait(go())


def test_a_heartbeat_does_not_make_a_lease_stale(store: LeaseStore, caller: Caller, clock: Clock) -> None:
    lease = take(store)
    clock.advance(10)
    store.renew([lease], owner="one", ttl=TTL)
    clock.advance(10)
    caller.run(write(lease))
    assert written(store) == 1


def test_a_refusal_inside_the_stores_own_transaction_keeps_nothing(store: LeaseStore) -> None:
    stale = take(store)
    store.release(stale)

    def body(connection: Connection) -> None:
        connection.execute(WRITE)
        with suppress(StaleToken):
            fence(connection, stale)

    with pytest.raises(StoreError):
        store.run(body)
    assert written(store) == 0


def write_only(connection: Connection) -> None:
    connection.execute(WRITE)


def test_what_is_done_within_the_stores_fence_is_kept(store: LeaseStore) -> None:
    leases = [take(store, name) for name in ("b", "a")]
    within_fence(store, *leases, body=write_only)
    assert written(store) == 1


def test_within_the_stores_fence_a_stale_owner_does_not_even_begin(store: LeaseStore) -> None:
    held, stale = take(store, "a"), take(store, "b")
    store.steal("b", to="two", ttl=TTL, actor="op")
    with pytest.raises(StaleToken) as refused:
        within_fence(store, held, stale, body=write_only)
    assert (refused.value.fencing_token, refused.value.current_token) == (1, 2)
    assert written(store) == 0


def test_an_error_within_the_stores_fence_passes_as_it_is_and_keeps_nothing(store: LeaseStore) -> None:
    lease = take(store)

    class Crash(Exception):
        pass

    def crash(connection: Connection) -> None:
        connection.execute(WRITE)
        raise Crash

    with pytest.raises(Crash):
        within_fence(store, lease, body=crash)
    assert written(store) == 0
    assert store.renew([lease], owner="one", ttl=TTL).lost == {}, "and the store goes on"


def test_a_refusal_swallowed_within_the_stores_fence_keeps_nothing(store: LeaseStore) -> None:
    held, stale = take(store, "a"), take(store, "b")
    store.release(stale)

    def swallow(connection: Connection) -> None:
        connection.execute(WRITE)
        with suppress(StaleToken):
            fence(connection, stale)

    with pytest.raises(StoreError):
        within_fence(store, held, body=swallow)
    assert written(store) == 0


# --- a sink in another database --------------------------------------------------------------------------------


def test_a_watermark_lets_no_token_pass_that_is_lower_than_one_before(store: LeaseStore, caller: Caller) -> None:
    watermarks = watermark_table(MetaData())
    store.run(lambda connection: watermarks.drop(connection, checkfirst=True))
    store.run(watermarks.create)
    first = take(store)
    store.release(first)
    second = take(store, owner="two")

    def sink(lease: Lease) -> None:
        def body(connection: Connection) -> None:
            connection.execute(WRITE)
            advance_watermark(connection, watermarks, lease)

        caller.run(body)

    sink(first)
    sink(first)
    sink(second)
    with pytest.raises(StaleToken) as refused:
        sink(first)
    assert (refused.value.fencing_token, refused.value.current_token, refused.value.current_owner) == (1, 2, "two")
    with pytest.raises(StaleToken):
        sink(replace(second, owner="impostor"))
    sink(replace(first, stream_id="another"))
    assert written(store) == 4
    store.run(watermarks.drop)
