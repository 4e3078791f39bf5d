"""To claim: free streams in order, then what dead owners have left; never a live lease."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest

from leases import ConfigError, Lease, LeaseStore
from leases.model import Membership
from tests.clock import Clock
from tests.conformance.driver import TTL, take


def names(leases: list[Lease]) -> list[str]:
    return [lease.stream_id for lease in leases]


def worker(name: str) -> Membership:
    return Membership(worker_id=name, host="h", pid=1, version="0")


def test_what_is_free_longest_comes_first(store: LeaseStore, clock: Clock) -> None:
    for name in ("c", "a", "b"):
        store.register([name])
        clock.advance(1)
    assert names(store.claim(owner="one", ttl=TTL, limit=2)) == ["a", "c"]
    assert names(store.claim(owner="one", ttl=TTL, limit=2)) == ["b"]


def test_equally_old_streams_come_by_name(store: LeaseStore, clock: Clock) -> None:
    store.register(["c", "a", "b"])
    assert names(store.claim(owner="one", ttl=TTL, limit=2)) == ["a", "b"]


def test_a_claim_is_a_grant_as_any_other(store: LeaseStore, clock: Clock) -> None:
    store.release(take(store, "a"))
    (lease,) = store.claim(owner="two", ttl=TTL, limit=5)
    assert (lease.owner, lease.fencing_token, lease.expires_at) == ("two", 2, clock.now() + TTL)
    assert lease.remaining == TTL
    assert store.renew([lease], owner="two", ttl=TTL).lost == {}
    assert [grant.fencing_token for grant in store.grants("a")] == [2, 1]


def test_live_leases_are_never_claimed(store: LeaseStore, clock: Clock) -> None:
    take(store, "a", owner="one")
    clock.advance(14.999)
    assert store.claim(owner="two", ttl=TTL, limit=5) == []
    assert store.claim(owner="one", ttl=TTL, limit=5) == [], "nor one's own"


def test_expired_leases_of_a_dead_owner_are_claimed(store: LeaseStore, clock: Clock) -> None:
    take(store, "a", owner="one")
    clock.advance(15)
    (lease,) = store.claim(owner="two", ttl=TTL, limit=5)
    assert (lease.stream_id, lease.fencing_token) == ("a", 2)


def test_each_lease_of_a_dead_owner_waits_for_its_own_expiry(store: LeaseStore, clock: Clock) -> None:
    take(store, "short", owner="one")
    take(store, "long", owner="one", ttl=timedelta(seconds=60))
    clock.advance(15)
    assert names(store.claim(owner="two", ttl=TTL, limit=5)) == ["short"]


def test_every_dead_owner_is_found(store: LeaseStore, clock: Clock) -> None:
    for number in range(20):
        take(store, f"s{number:02}", owner=f"o{number}")
    clock.advance(15)
    assert len(store.claim(owner="two", ttl=TTL, limit=100)) == 20


def test_expired_leases_of_a_live_worker_are_left_to_it(store: LeaseStore, clock: Clock) -> None:
    store.enlist(worker("one"), ttl=timedelta(minutes=1))
    take(store, "a", owner="one")
    clock.advance(15)
    assert store.claim(owner="two", ttl=TTL, limit=5) == []
    assert names(store.claim(owner="one", ttl=TTL, limit=5)) == ["a"], "it finds them itself"


def test_a_worker_whose_row_expired_is_dead(store: LeaseStore, clock: Clock) -> None:
    store.enlist(worker("one"), ttl=TTL)
    take(store, "a", owner="one")
    clock.advance(15)
    assert names(store.claim(owner="two", ttl=TTL, limit=5)) == ["a"]


def test_a_dismissed_worker_is_dead(store: LeaseStore, clock: Clock) -> None:
    store.enlist(worker("one"), ttl=timedelta(minutes=1))
    take(store, "a", owner="one")
    clock.advance(15)
    store.dismiss("one")
    assert names(store.claim(owner="two", ttl=TTL, limit=5)) == ["a"]


def test_free_streams_come_before_those_of_the_dead(store: LeaseStore, clock: Clock) -> None:
    take(store, "a", owner="one")
    clock.advance(15)
    store.register(["b"])
    assert names(store.claim(owner="two", ttl=TTL, limit=1)) == ["b"]
    assert names(store.claim(owner="two", ttl=TTL, limit=1)) == ["a"]


def test_no_more_than_the_limit_is_claimed(store: LeaseStore, clock: Clock) -> None:
    for number in range(3):
        take(store, f"dead{number}", owner="one")
    clock.advance(15)
    store.register([f"free{number}" for number in range(3)])
    assert store.claim(owner="two", ttl=TTL, limit=0) == []
    assert len(store.claim(owner="two", ttl=TTL, limit=4)) == 4
    assert len(store.claim(owner="two", ttl=TTL, limit=4)) == 2


def test_only_streams_of_the_pool_are_claimed(store: LeaseStore, clock: Clock) -> None:
    take(store, "dead", owner="one", pool="other")
    clock.advance(15)
    store.register(["free"], pool="other")
    assert store.claim(owner="two", ttl=TTL, limit=5) == []
    assert names(store.claim(owner="two", ttl=TTL, limit=5, pool="other")) == ["dead", "free"]


@pytest.mark.parametrize("held", [False, True], ids=["free", "expired"])
def test_paused_and_retired_streams_are_not_claimed(store: LeaseStore, clock: Clock, held: bool) -> None:
    store.register(["paused", "retired"])
    if held:
        take(store, "paused")
        take(store, "retired")
        clock.advance(15)
    store.pause("paused", actor="op")
    store.retire(["retired"])
    assert store.claim(owner="two", ttl=TTL, limit=5) == []
    store.resume("paused", actor="op")
    assert names(store.claim(owner="two", ttl=TTL, limit=5)) == ["paused"]


def test_a_stream_in_backoff_is_not_claimed_before_its_end(store: LeaseStore, clock: Clock) -> None:
    store.release(take(store), backoff=timedelta(seconds=10))
    clock.advance(9.999)
    assert store.claim(owner="two", ttl=TTL, limit=5) == []
    clock.advance(0.001)
    assert names(store.claim(owner="two", ttl=TTL, limit=5)) == ["a"]


def test_a_clock_set_back_frees_what_a_dead_owner_held(store: LeaseStore, clock: Clock) -> None:
    take(store, "a", owner="one", ttl=timedelta(hours=24))
    store.register(["free"])
    clock.advance(-3601)
    assert names(store.claim(owner="two", ttl=TTL, limit=5)) == ["a"]


def test_a_worker_from_before_the_clock_was_set_back_is_dead(store: LeaseStore, clock: Clock) -> None:
    store.enlist(worker("one"), ttl=timedelta(hours=24))
    take(store, "a", owner="one", ttl=timedelta(hours=24))
    clock.advance(-3601)
    assert names(store.claim(owner="two", ttl=TTL, limit=5)) == ["a"]


def test_a_repeated_claim_gets_the_same_grants(store: LeaseStore, clock: Clock) -> None:
    store.register(["a", "b", "c"])
    attempt = uuid4()
    first = store.claim(owner="one", ttl=TTL, limit=2, claim_id=attempt)
    again = store.claim(owner="one", ttl=TTL, limit=2, claim_id=attempt)
    assert again == first
    assert len(store.claim(owner="one", ttl=TTL, limit=2)) == 1


def test_a_repeated_claim_leaves_out_what_it_lost_since(store: LeaseStore, clock: Clock) -> None:
    store.register(["a", "b"])
    attempt = uuid4()
    store.claim(owner="one", ttl=TTL, limit=2, claim_id=attempt)
    store.expire("a", actor="op")
    assert names(store.claim(owner="one", ttl=TTL, limit=2, claim_id=attempt)) == ["b"]


def test_a_wrong_limit_is_refused(store: LeaseStore, clock: Clock) -> None:
    for limit in (-1, 1.5, True, "1"):
        with pytest.raises(ConfigError):
            store.claim(owner="one", ttl=TTL, limit=limit)  # type: ignore[arg-type]  # that is what is tried
