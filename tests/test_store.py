"""The stores: what the shells add to the operations."""

from __future__ import annotations

from datetime import timedelta

from leases import LeaseStore

TTL = timedelta(seconds=15)


def test_one_stream_has_one_owner(store: LeaseStore) -> None:
    lease = store.acquire("a", owner="one", ttl=TTL)
    assert lease is not None
    assert store.acquire("a", owner="two", ttl=TTL) is None
    assert store.release(lease)
    after = store.acquire("a", owner="two", ttl=TTL)
    assert after is not None
    assert after.fencing_token == lease.fencing_token + 1
