"""The connections of the direct way: how the pool gets them back, and the one that is kept."""

from __future__ import annotations

import asyncio
import gc
import os
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import QueuePool

from leases import AsyncLeaseStore, EventLog, Lease, LeaseStore, OutcomeUnknown, StaleToken, StoreUnavailable, direct
from leases.direct import EitherWay, Shortcut
from leases.operations import acquire
from tests.conformance.driver import TTL, take
from tests.postgresql.direct.ways import attempted, in_transactions, pooled
from tests.postgresql.race import Background, Observer
from tests.waiting import until


def test_a_callers_engine_gets_its_connections_back_as_they_were(engine: Engine, postgresql_url: str) -> None:
    own = create_engine(engine.url, pool_size=1, max_overflow=0, isolation_level="REPEATABLE READ")
    with LeaseStore(own) as store:
        lease = take(store)
        with pytest.raises(StaleToken):
            EventLog(store).append(Lease(**{**vars_of(lease), "fencing_token": 7}), {"e": 1})
        assert store.release(lease)
        assert not pooled(store).autocommit
        with own.connect() as connection:
            assert connection.execute(text("SHOW transaction_isolation")).scalar_one() == "repeatable read"
            connection.execute(text("INSERT INTO lease_audit (at, actor, action) VALUES (now(), 'me', 'x')"))
            connection.rollback()
        assert store.audit() == []
    own.dispose()


def test_a_callers_engine_that_commits_by_itself_still_does(engine: Engine, postgresql_url: str) -> None:
    own = create_engine(engine.url, pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT")
    with LeaseStore(own) as store:
        lease = take(store)
        store.renew([lease], owner="one", ttl=TTL)
        assert EventLog(store).append(lease, {"e": 1}).count == 1
    with own.connect() as connection:
        connection.execute(text("CREATE TABLE mine (n integer)"))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT to_regclass('mine')")).scalar_one() is not None
    own.dispose()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, psycopg.OperationalError])
def test_one_interrupted_while_it_is_asked_for_its_default_is_not_used_again(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    with LeaseStore(postgresql_url) as store:
        lease = take(store)  # in a transaction: it has not looked at its tables
        before = pooled(store)

        def interrupted(_: object) -> bool:
            raise error

        monkeypatch.setattr(direct, "_reads_committed", interrupted)
        if issubclass(error, psycopg.Error):
            assert store.release(lease), "in a transaction"
        else:
            with pytest.raises(error):
                store.release(lease)
        assert before.closed
        pool = store.base_engine.pool
        assert isinstance(pool, QueuePool)
        assert pool.checkedout() == 0
        assert not pooled(store).autocommit


def test_a_task_that_is_cancelled_while_it_is_asked_for_its_default_gives_it_back(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled(_: object) -> bool:
        raise asyncio.CancelledError

    async def story() -> int:
        async with AsyncLeaseStore(postgresql_url) as store:
            lease = await store.acquire("a", owner="one", ttl=TTL)
            assert lease is not None
            monkeypatch.setattr(direct, "_reads_committed", cancelled)
            with pytest.raises(asyncio.CancelledError):
                await store.release(lease)
            pool = store.base_engine.pool
            assert isinstance(pool, QueuePool)
            return pool.checkedout()

    assert asyncio.run(story()) == 0


def test_one_that_nobody_gives_back_begins_transactions_again(looked: LeaseStore) -> None:
    taken = looked._shortcut.take()
    assert taken is not None
    driver = taken.connection.driver_connection
    assert driver.autocommit
    del taken
    gc.collect()
    assert pooled(looked) is driver
    assert not driver.autocommit


def test_a_stream_named_as_sqlalchemy_marks_a_schema_is_itself(postgresql_url: str) -> None:
    name = "__[SCHEMA__none]"
    with LeaseStore(postgresql_url, schema="shop") as store:
        store.migrate()
        for other in ('"shop"', "shop"):
            assert store.acquire(other, owner="OTHER", ttl=TTL)
        lease = store.acquire(name, owner="one", ttl=TTL)
        assert lease is not None
        store.expire(name, actor="op")
        for log in (EventLog(store), EventLog(in_transactions(store))):
            with pytest.raises(StaleToken) as refused:
                log.append(lease, {"e": 1})
            assert (refused.value.current_token, refused.value.current_owner) == (2, None)


def vars_of(lease: Lease) -> dict[str, Any]:
    return {name: getattr(lease, name) for name in lease.__dataclass_fields__}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_connection_that_was_interrupted_is_not_used_again(looked: LeaseStore, error: type[BaseException]) -> None:
    before = pooled(looked)

    def interrupted(*_: object) -> None:
        raise error

    direct = looked._shortcut.take()
    assert direct is not None
    with pytest.raises(error):
        looked._shortcut.run(direct, EitherWay(interrupted, interrupted))
    assert before.closed
    assert attempted(looked)


def test_a_connection_that_breaks_meanwhile_is_replaced(looked: LeaseStore) -> None:
    before = pooled(looked)

    def ended(connection: Any, _: int) -> object:
        before.pgconn.finish()
        return acquire(connection, "a", owner="one", ttl=TTL)

    lease = looked._retried(EitherWay(lambda c, _: acquire(c, "a", owner="one", ttl=TTL), ended), {})
    assert isinstance(lease, Lease)
    assert before.closed


def test_an_answer_that_was_lost_is_no_refusal(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url, retry_for=timedelta(0)) as hasty:
        hasty.register(["a"])

        def lost(connection: Any, _: int) -> object:
            lease = acquire(connection, "a", owner="one", ttl=TTL)
            assert lease is not None
            connection.connection.driver_connection.pgconn.finish()
            return acquire(connection, "b", owner="one", ttl=TTL)

        with pytest.raises(OutcomeUnknown):
            hasty._retried(EitherWay(lost, lost), {})


def test_a_server_that_cannot_be_reached_is_told_of_as_in_a_transaction(
    looked: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked.engine.pool.dispose()

    def refuse(*_: object, **__: object) -> None:
        raise psycopg.OperationalError("connection refused")

    monkeypatch.setattr(psycopg, "connect", refuse)
    looked.retry_for = timedelta(0)
    with pytest.raises(StoreUnavailable, match="connection refused"):
        looked.acquire("a", owner="one", ttl=TTL)


# --- the connection that is kept -----------------------------------------------------------------------------------


def kept_pid(store: LeaseStore) -> int:
    (direct,) = store._shortcut._kept
    return int(direct.connection.driver_connection.info.backend_pid)


def test_a_store_of_its_own_keeps_its_connection_from_call_to_call(looked: LeaseStore, observer: Observer) -> None:
    take(looked)
    pid = kept_pid(looked)
    take(looked, "b")
    assert kept_pid(looked) == pid
    looked.get("a")  # in a transaction, on the same connection
    assert not looked._shortcut._kept
    take(looked, "c")
    assert kept_pid(looked) == pid
    looked.close()
    ours = "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"
    until(lambda: observer.scalar(ours, pid=pid) == 0, "it is closed with the store")


def test_one_that_the_server_has_ended_is_replaced_before_anything_is_tried(
    postgresql_url: str, observer: Observer
) -> None:
    with LeaseStore(postgresql_url, retry_for=timedelta(0)) as hasty:
        hasty.register(["a", "b"])
        take(hasty)
        pid = kept_pid(hasty)
        observer.execute(f"SELECT pg_terminate_backend({pid}, 10000)")
        take(hasty, "b")
        assert kept_pid(hasty) != pid


def test_it_is_let_go_where_it_is_the_last_of_its_pool(engine: Engine) -> None:
    own = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.5)
    with LeaseStore(own, retry_for=timedelta(0)) as store:
        store._shortcut = Shortcut(store.engine, ours=True, keeps=True)
        lease = take(store)
        for _ in range(2):
            assert EventLog(store).append(lease, {uuid4().hex: 1}).count == 1
            assert store.get("a") is not None
            assert EventLog(store).append(lease, {uuid4().hex: 1}).count == 1
            with store.fenced(lease) as connection:
                assert connection.execute(text("SELECT 1")).scalar_one() == 1
        store._shortcut.let_go()
    own.dispose()


def test_threads_share_it_one_at_a_time(looked: LeaseStore) -> None:
    def work(name: str) -> int:
        return sum(looked.release(take(looked, name)) for _ in range(50))

    assert [worker.result() for worker in [Background(work, f"{n}") for n in range(8)]] == [50] * 8
    assert len(looked._shortcut._kept) <= 8
    assert {grant.fencing_token for grant in looked.grants("3")} == set(range(1, 51))


def test_a_great_answer_is_not_kept_with_it(looked: LeaseStore) -> None:
    looked.register([f"{n}" for n in range(300)])
    assert len(looked.claim(owner="one", ttl=TTL, limit=300)) == 300
    (direct,) = looked._shortcut._kept
    assert direct._cursor.pgresult is None


def test_a_forked_child_has_one_of_its_own(looked: LeaseStore, observer: Observer) -> None:
    lease = take(looked)
    pid = kept_pid(looked)
    child = os.fork()
    if not child:
        took = False
        try:
            took = looked.acquire("b", owner="child", ttl=TTL) is not None and kept_pid(looked) != pid
            gc.collect()
        finally:
            os._exit(0 if took else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert looked.release(lease)
    assert kept_pid(looked) == pid
