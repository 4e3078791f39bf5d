"""What a database has for its sessions' defaults changes no answer."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from leases import AsyncEventLog, AsyncLeaseStore, EventLog, Lease, LeaseStore, RecordedEvent
from tests.conformance.driver import TTL
from tests.postgresql.race import Observer

PAYLOAD = {"from": "Zürich", "fee": "3 €"}


def written(url: str) -> tuple[Lease | None, list[RecordedEvent]]:
    with LeaseStore(url) as store:
        for _ in range(2):  # in a transaction, and not
            lease = store.acquire("a", owner="one", ttl=TTL)
            assert lease is not None
            EventLog(store).append(lease, {f"e{lease.fencing_token}": PAYLOAD})
            assert store.release(lease)
        return lease, EventLog(store).read("a")


async def written_async(url: str) -> tuple[Lease | None, list[RecordedEvent]]:
    async with AsyncLeaseStore(url) as store:
        for _ in range(2):
            lease = await store.acquire("a", owner="one", ttl=TTL)
            assert lease is not None
            await AsyncEventLog(store).append(lease, {f"e{lease.fencing_token}": PAYLOAD})
            assert await store.release(lease)
        return lease, await AsyncEventLog(store).read("a")


DEFAULTS = (
    ("DateStyle = German", "client_encoding = LATIN1", "lock_timeout = '1d'", "standard_conforming_strings = off"),
    ("DateStyle = SQL", "client_encoding = SQL_ASCII", "IntervalStyle = sql_standard", "synchronous_commit = off"),
    ("TimeZone = 'Asia/Kathmandu'", "transaction_timeout = '90s'"),
)


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("settings", DEFAULTS)
def test_a_sessions_default_changes_no_answer(
    postgresql_url: str, observer: Observer, settings: tuple[str, ...], how: str
) -> None:
    for setting in settings:
        if setting.startswith("transaction_timeout") and observer.scalar("SHOW server_version_num") < "170000":
            continue  # it came with 17
        observer.set_default(setting)
    lease, events = written(postgresql_url) if how == "sync" else asyncio.run(written_async(postgresql_url))
    assert lease is not None
    assert lease.expires_at - lease.acquired_at == TTL
    assert lease.expires_at.utcoffset() == timedelta(0)
    assert [(event.seq, event.payload) for event in events] == [(1, PAYLOAD), (2, PAYLOAD)]
    assert abs(datetime.now(lease.expires_at.tzinfo) - events[0].recorded_at) < timedelta(minutes=5)
