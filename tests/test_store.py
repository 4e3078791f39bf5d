"""The stores: what the shells add to the operations."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import text

from leases import AsyncLeaseStore, EventLog, LeaseStore, SessionRegistry, StaleToken, fence

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
