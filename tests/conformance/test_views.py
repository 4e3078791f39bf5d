"""What only looks: streams, grants, the fleet."""

from __future__ import annotations

from datetime import timedelta

import pytest

from leases import ConfigError, LeaseStore
from leases.model import Membership, State
from tests.clock import Clock
from tests.conformance.driver import TTL, take


def names(store: LeaseStore, **filters: object) -> list[str]:
    return [info.stream_id for info in store.list(**filters)]  # type: ignore[arg-type]  # as each test gives them


def test_a_stream_as_it_stands(store: LeaseStore, clock: Clock) -> None:
    assert store.get("a") is None
    registered = clock.now()
    store.register(["a"], pool="p")
    clock.advance(1)
    lease = take(store)
    clock.advance(5)
    info = store.get("a")
    assert info is not None
    assert (info.owner, info.fencing_token, info.pool) == ("one", 1, "p")
    assert (info.registered_at, info.acquired_at, info.expires_at) == (registered, lease.acquired_at, lease.expires_at)
    assert (info.seen_at, info.remaining, info.live) == (clock.now(), timedelta(seconds=10), True)
    assert (info.failures, info.last_error, info.retired_at, info.paused_at) == (0, None, None, None)


def test_every_state_is_told_and_found(store: LeaseStore, clock: Clock) -> None:
    store.register(["free"])
    for name in ("expired", "paused", "retired"):
        take(store, name)
    store.pause("paused", actor="op")
    store.retire(["retired"])
    clock.advance(15)
    take(store, "held")
    store.release(take(store, "resting"), backoff=timedelta(seconds=1), error="no such order")
    assert {info.stream_id: info.state for info in store.list()} == {str(state): state for state in State}
    for state in State:
        assert names(store, state=state) == [state]
        assert names(store, state=str(state)) == [state]


def test_a_list_by_owner_and_pool(store: LeaseStore, clock: Clock) -> None:
    take(store, "a", owner="one", pool="p")
    take(store, "b", owner="two", pool="p")
    take(store, "c", owner="one", pool="q")
    assert names(store, owner="one") == ["a", "c"]
    assert names(store, pool="p") == ["a", "b"]
    assert names(store, owner="one", pool="p") == ["a"]
    assert names(store, owner="nobody") == []


def test_a_list_goes_on_after_a_key_in_the_order_of_bytes(store: LeaseStore, clock: Clock) -> None:
    everything = ["", " ", "A", "B", "a", "b", "b b", "z", "Ä", "ß", "é", "💜"][1:]
    store.register(reversed(everything))
    paged: list[str] = []
    while page := names(store, limit=4, after=paged[-1] if paged else None):
        paged += page
    assert paged == everything


PATTERNS = {
    "*": ["%", "*", "?", "A", "[a]", "\\", "_", "a", "a%b", "a\\b", "a_b", "aab", "]", "^a"],
    "?": ["%", "*", "?", "A", "\\", "_", "a", "]"],
    "a*": ["a", "a%b", "a\\b", "a_b", "aab"],
    "a?b": ["a%b", "a\\b", "a_b", "aab"],
    "a_b": ["a_b"],
    "a%b": ["a%b"],
    "a\\b": ["a\\b"],
    "\\": ["\\"],
    "[a]": ["[a]"],
    "[*": ["[a]"],
    "*]": ["[a]", "]"],
    "[^a]": [],
    "^a": ["^a"],
    "A": ["A"],
    "%": ["%"],
    "_": ["_"],
    "*a*": ["[a]", "a", "a%b", "a\\b", "a_b", "aab", "^a"],
}


def test_a_glob_means_the_same_on_both_engines(store: LeaseStore, clock: Clock) -> None:
    store.register(PATTERNS["*"])
    for pattern, expected in PATTERNS.items():
        assert names(store, glob=pattern) == sorted(expected), pattern


def test_a_filter_that_can_never_work_is_refused(store: LeaseStore, clock: Clock) -> None:
    for bad in ({"state": "sleeping"}, {"limit": 0}, {"limit": True}, {"owner": ""}, {"glob": "a\0"}, {"pool": "\n"}):
        with pytest.raises(ValueError, match=r".+"):
            store.list(**bad)


def test_the_history_of_a_stream_the_latest_first(store: LeaseStore, clock: Clock) -> None:
    for owner in ("one", "two", "three"):
        store.release(take(store, owner=owner))
        clock.advance(1)
    assert [grant.owner for grant in store.grants("a")] == ["three", "two", "one"]
    assert [grant.owner for grant in store.grants("a", limit=2)] == ["three", "two"]
    assert [grant.owner for grant in store.grants("a", before=2)] == ["one"]
    assert store.grants("unknown") == []


def test_who_owned_a_stream_at_a_time(store: LeaseStore, clock: Clock) -> None:
    began = clock.now()
    lease = take(store, owner="one")
    clock.advance(10)
    store.release(lease)
    clock.advance(10)
    take(store, owner="two")

    def owner(after_s: float) -> list[str]:
        return [grant.owner for grant in store.grants("a", at=began + timedelta(seconds=after_s))]

    assert owner(-0.001) == []
    assert owner(0) == ["one"]
    assert owner(9.999) == ["one"]
    assert owner(10) == [], "its end is not its own"
    assert owner(20) == ["two"]
    assert owner(34.999) == ["two"]
    assert owner(35) == [], "expired, though nobody has ended it"
    with pytest.raises(ConfigError):
        store.grants("a", at=began.replace(tzinfo=None))


def test_the_fleet(store: LeaseStore, clock: Clock) -> None:
    one = Membership(worker_id="one", host="h1", pid=1, version="0.1", pool="p", capacity=4, weight=2.5)
    store.enlist(one, ttl=TTL)
    store.enlist(Membership(worker_id="two", host="h2", pid=2, version="0.1"), ttl=timedelta(seconds=30))
    began = clock.now()
    clock.advance(15)
    first, second = store.workers()
    assert (first.worker_id, first.host, first.pid, first.version, first.pool, first.capacity, first.weight) == (
        "one", "h1", 1, "0.1", "p", 4, 2.5,
    )  # fmt: skip
    assert (first.started_at, first.state, first.live) == (began, "active", False)
    assert (second.pool, second.capacity, second.weight, second.live) == (None, None, 1.0, True)
    assert [worker.worker_id for worker in store.workers(pool="p")] == ["one"]
    store.enlist(one, ttl=TTL)
    assert store.workers(pool="p")[0].live
    store.dismiss("one")
    store.dismiss("one")
    assert [worker.worker_id for worker in store.workers()] == ["two"]


def test_dead_workers_are_pruned(store: LeaseStore, clock: Clock) -> None:
    store.enlist(Membership(worker_id="one", host="h", pid=1, version="0"), ttl=TTL)
    clock.advance(3600)
    assert store.prune(before=clock.now()).workers == 1
    assert store.workers() == []
