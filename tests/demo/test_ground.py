"""The ground: the demo keeps to its own, and can be run again."""

from __future__ import annotations

from datetime import timedelta

import pytest

from leases import Event, EventLog, LeaseStore
from leases.cli.demo import ground
from leases.model import State

TTL = timedelta(seconds=15)


def take(store: LeaseStore, *stream_ids: str) -> ground.Ground:
    return store.run(lambda connection: ground.take(connection, stream_ids))


def test_a_stream_of_another_pool_is_refused_and_nothing_changed(store: LeaseStore) -> None:
    store.register(["mine"])
    with pytest.raises(ground.Refused, match=r"'mine' is there already, in pool 'default'; use another database"):
        take(store, "new", "mine")
    assert store.get("new") is None
    assert store.get("mine") is not None


def test_a_demo_that_is_running_is_refused(store: LeaseStore) -> None:
    take(store, "a", "b")
    assert store.acquire("a", owner="somebody", ttl=TTL) is not None
    with pytest.raises(ground.Refused, match=r"another demo is running here \(somebody\)"):
        take(store, "b")


def test_a_paused_stream_is_refused(store: LeaseStore) -> None:
    take(store, "a")
    store.pause("a", actor="me")
    with pytest.raises(ground.Refused, match="leases resume a"):
        take(store, "a")


def test_the_next_run_begins_anew_and_tokens_go_on(store: LeaseStore) -> None:
    take(store, "a", "b")
    lease = store.acquire("a", owner="one", ttl=TTL)
    assert lease is not None
    EventLog(store).append(lease, [Event("1", {}), Event("2", {})], checkpoint={"position": 2})
    store.release(lease)
    store.retire(["a"])
    again = take(store, "a", "c")
    assert again == ground.Ground({"a": 1, "c": 0}, cleared=2)
    assert store.checkpoint("a") is None
    assert EventLog(store).read("a") == []
    states = {stream_id: info.state for stream_id in "abc" if (info := store.get(stream_id)) is not None}
    assert states == {"a": State.FREE, "b": State.RETIRED, "c": State.FREE}


def test_what_is_held_back_nobody_has_until_it_is_offered(store: LeaseStore) -> None:
    take(store, "a", "b")
    store.run(lambda connection: ground.hold_back(connection, ["a", "b"]))
    assert store.claim(owner="one", ttl=TTL, limit=2, pool=ground.POOL) == []
    store.run(lambda connection: ground.offer(connection, ["a", "b"]))
    assert len(store.claim(owner="one", ttl=TTL, limit=2, pool=ground.POOL)) == 2


def test_what_dead_workers_hold_is_given_back(store: LeaseStore) -> None:
    take(store, "a", "b")
    assert store.acquire("a", owner="dead", ttl=TTL) is not None
    assert store.acquire("b", owner="other", ttl=TTL) is not None
    store.run(lambda connection: ground.give_back(connection, ["dead"]))
    assert [info.owner for info in (store.get("a"), store.get("b")) if info is not None] == [None, "other"]
