"""The stores: what the shells add to the operations."""

from __future__ import annotations

import asyncio
import select
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import InvalidRequestError

from leases import (
    AsyncLeaseStore,
    Event,
    EventLog,
    LeaseStore,
    OutcomeUnknown,
    SessionRegistry,
    StaleToken,
    StoreUnavailable,
    engine,
    fence,
)

TTL = timedelta(seconds=15)


def test_appends_under_one_grant_at_once_all_arrive_and_leave_no_gap(store: LeaseStore) -> None:
    # Two threads of one session take the same `seq`; the schema lets one have it, and the other begins again.
    lease = store.acquire("s", owner="me", ttl=TTL)
    assert lease is not None
    log = EventLog(store)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: log.append(lease, {f"{n}-a": n, f"{n}-b": n}), range(20)))
    events = log.read("s")
    assert [event.seq for event in events] == list(range(1, 41))
    assert {event.event_id for event in events} == {f"{n}-{half}" for n in range(20) for half in "ab"}


def test_an_async_program_fences_and_keeps_its_leases_by_a_thread(url: str) -> None:
    async def work() -> None:
        async with AsyncLeaseStore(url) as store:
            keeping = store.sync_store()
            with SessionRegistry(keeping, owner="me", ttl=TTL) as registry:
                session = await asyncio.to_thread(registry.open, "s")
                async with store.fenced(session.lease) as connection:
                    await connection.execute(text("CREATE TABLE results (n integer)"))
                async with store.engine.begin() as connection:
                    await connection.run_sync(fence, session.lease)
                    await connection.execute(text("INSERT INTO results VALUES (1)"))
                await store.steal("s", to="other", ttl=TTL, actor="operator")
                with pytest.raises(StaleToken):
                    async with store.fenced(session.lease) as connection:
                        await connection.execute(text("INSERT INTO results VALUES (2)"))
                async with store.engine.connect() as connection:
                    assert (await connection.execute(text("SELECT n FROM results"))).scalars().all() == [1]
            keeping.close()

    asyncio.run(work())


def test_a_connection_that_died_in_the_pool_is_replaced_before_the_fence(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store, LeaseStore(postgresql_url) as other:
        lease = store.acquire("s", owner="me", ttl=TTL)
        assert lease is not None
        other.run(
            lambda connection: connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        )
        with store.fenced(lease) as connection:
            assert connection.execute(text("SELECT 1")).scalar_one() == 1


def end_all_sessions_but_of(store: LeaseStore) -> None:
    """End all other sessions of the store's database, at once."""
    others = (
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    store.run(lambda connection: connection.execute(text(others)).all())


def test_a_connection_that_the_server_has_ended_is_replaced_before_anything_is_tried(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[object] = []
    with LeaseStore(postgresql_url, retry_for=timedelta(0)) as store, LeaseStore(postgresql_url) as other:
        real = store.engine.dialect.do_ping

        def ask(connection: Any) -> bool:
            questions.append(connection)
            return real(connection)

        monkeypatch.setattr(store.engine.dialect, "do_ping", ask)
        lease = store.acquire("s", owner="me", ttl=TTL)
        assert lease is not None
        assert store.get("s") is not None
        assert questions == [], "one that is sound is not asked"
        end_all_sessions_but_of(other)
        assert store.release(lease)
        assert len(questions) == 1


def test_an_async_connection_that_the_server_has_ended_is_replaced_before_anything_is_tried(
    postgresql_url: str,
) -> None:
    async def work() -> None:
        async with AsyncLeaseStore(postgresql_url, retry_for=timedelta(0)) as store:
            lease = await store.acquire("s", owner="me", ttl=TTL)
            assert lease is not None
            with LeaseStore(postgresql_url) as other:
                end_all_sessions_but_of(other)
            assert await store.release(lease)

    asyncio.run(work())


def test_a_connection_on_which_the_server_has_only_said_something_is_kept(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store, LeaseStore(postgresql_url) as other:
        pid = text("SELECT pg_backend_pid()")
        store.run(lambda connection: connection.execute(text("LISTEN gossip")))
        mine = store.run(lambda connection: connection.execute(pid).scalar_one())
        for _ in range(3):
            other.run(lambda connection: connection.execute(text("NOTIFY gossip")))
            assert store.run(lambda connection: connection.execute(pid).scalar_one()) == mine


class Deaf:
    """A poll that hears nothing: the server's last word has not come yet."""

    def register(self, *_: object) -> None:
        pass

    def poll(self, *_: object) -> list[object]:
        return []


def test_a_connection_whose_end_has_not_been_heard_of_costs_a_second_try(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LeaseStore(postgresql_url) as store, LeaseStore(postgresql_url) as other:
        lease = store.acquire("s", owner="me", ttl=TTL)
        assert lease is not None
        with monkeypatch.context() as patched:
            patched.setattr(engine, "select", SimpleNamespace(poll=Deaf, POLLIN=select.POLLIN))
            end_all_sessions_but_of(other)
            assert EventLog(store).append(lease, {"e": 1}).count == 1
            end_all_sessions_but_of(other)
            with store.fenced(lease) as connection:
                assert connection.execute(text("SELECT 1")).scalar_one() == 1
            end_all_sessions_but_of(other)
            assert store.release(lease)


@pytest.mark.parametrize("after_commit", [False, True])
def test_events_from_a_generator_survive_a_second_attempt(
    store: LeaseStore, monkeypatch: pytest.MonkeyPatch, after_commit: bool
) -> None:
    lease = store.acquire("s", owner="me", ttl=TTL)
    assert lease is not None
    real = store._once
    tries: list[int] = []

    def once(call: Any, attempt: int, options: Any) -> Any:
        tries.append(attempt)
        if attempt > 1:
            return real(call, attempt, options)
        if after_commit:
            real(call, attempt, options)
            raise OutcomeUnknown("the answer is lost")

        def broken(connection: Connection, attempt: int) -> None:
            call(connection, attempt)
            raise StoreUnavailable("the connection broke")

        return real(broken, attempt, options)

    monkeypatch.setattr(store, "_once", once)
    EventLog(store).append(lease, (Event(f"e{n}", n) for n in range(3)), checkpoint=3)
    monkeypatch.undo()
    assert tries == [1, 2]
    assert [recorded.event_id for recorded in EventLog(store).read("s")] == ["e0", "e1", "e2"]


def test_an_append_that_may_have_been_accepted_is_not_said_to_be_refused(
    store: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = store.acquire("s", owner="me", ttl=TTL)
    assert lease is not None
    real = store._once
    tries: list[int] = []

    def once(*args: Any) -> Any:
        answer = real(*args)
        if not tries:  # committed, but the answer is lost; and before the next try the lease is stolen
            tries.append(1)
            with monkeypatch.context() as patched:
                patched.setattr(store, "_once", real)
                store.steal("s", to="other", ttl=TTL, actor="operator")
            raise OutcomeUnknown("the answer is lost")
        return answer

    monkeypatch.setattr(store, "_once", once)
    with pytest.raises(OutcomeUnknown):
        EventLog(store).append(lease, {"e": 1})
    monkeypatch.undo()
    assert len(EventLog(store).read("s")) == 1


def test_a_fenced_block_that_commits_itself_can_write_nothing_more(store: LeaseStore) -> None:
    lease = store.acquire("s", owner="me", ttl=TTL)
    assert lease is not None
    store.run(lambda connection: connection.execute(text("CREATE TABLE results (n integer)")))

    def work() -> None:
        with store.fenced(lease) as connection:
            connection.execute(text("INSERT INTO results VALUES (1)"))
            connection.commit()
            connection.execute(text("INSERT INTO results VALUES (2)"))

    with pytest.raises(InvalidRequestError):
        work()
    rows = store.run(lambda connection: connection.execute(text("SELECT n FROM results")).scalars().all())
    assert rows == [1]


def test_an_async_fenced_block_that_commits_itself_can_write_nothing_more(url: str) -> None:
    async def work() -> None:
        async with AsyncLeaseStore(url) as store:
            lease = await store.acquire("s", owner="me", ttl=TTL)
            assert lease is not None
            await store.run(lambda connection: connection.execute(text("CREATE TABLE results (n integer)")))

            async def commit_and_go_on() -> None:
                async with store.fenced(lease) as connection:
                    await connection.commit()
                    await connection.execute(text("INSERT INTO results VALUES (2)"))

            with pytest.raises(InvalidRequestError):
                await commit_and_go_on()
            async with store.fenced(lease) as connection:
                assert (await connection.execute(text("SELECT n FROM results"))).all() == []

    asyncio.run(work())
