"""To acquire: one owner at a time, a new token each time, and the same grant for the same attempt."""

from __future__ import annotations

import threading
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from leases import ConfigError, LeaseStore, StoreError
from tests.clock import Clock
from tests.conformance.driver import TTL, execute, take


def test_a_new_stream_is_registered_and_granted_with_token_1(store: LeaseStore, clock: Clock) -> None:
    lease = take(store, "a", owner="one", pool="p")
    assert (lease.stream_id, lease.owner, lease.fencing_token, lease.pool) == ("a", "one", 1, "p")
    assert lease.acquired_at == clock.now()
    assert lease.expires_at == clock.now() + TTL
    assert lease.remaining == TTL


def test_a_live_lease_is_nobody_elses(store: LeaseStore, clock: Clock) -> None:
    take(store, owner="one")
    assert store.acquire("a", owner="two", ttl=TTL) is None
    assert store.acquire("a", owner="one", ttl=TTL) is None, "nor its owner's once more"


def test_the_token_rises_with_every_grant(store: LeaseStore, clock: Clock) -> None:
    tokens = []
    for owner in ("one", "two", "one", "one"):
        lease = take(store, owner=owner)
        tokens.append(lease.fencing_token)
        if owner == "two":
            clock.advance(15)
        else:
            store.release(lease)
    assert tokens == [1, 2, 3, 4]


def test_a_millisecond_before_its_expiry_a_lease_is_live(store: LeaseStore, clock: Clock) -> None:
    take(store)
    clock.advance(14.999)
    assert store.acquire("a", owner="two", ttl=TTL) is None


def test_at_its_expiry_a_lease_has_expired(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    clock.advance(15)
    assert clock.now() == lease.expires_at
    assert take(store, owner="two").fencing_token == 2


def test_an_expiry_further_away_than_any_lease_is_a_clock_set_back(store: LeaseStore, clock: Clock) -> None:
    take(store, ttl=timedelta(hours=24))
    clock.advance(-3600.001)
    assert take(store, owner="two").fencing_token == 2


def test_the_longest_lease_is_not_free_for_a_statement_that_began_before_its_grant(
    store: LeaseStore, clock: Clock
) -> None:
    take(store, ttl=timedelta(hours=24))
    clock.advance(-1)
    assert store.acquire("a", owner="two", ttl=TTL) is None


def test_the_longest_lease_is_no_clock_set_back(store: LeaseStore, clock: Clock) -> None:
    take(store, ttl=timedelta(hours=24))
    assert store.acquire("a", owner="two", ttl=TTL) is None


def test_the_same_attempt_gets_the_same_grant(store: LeaseStore, clock: Clock) -> None:
    attempt = uuid4()
    lease = take(store, claim_id=attempt)
    clock.advance(5)
    again = take(store, claim_id=attempt)
    assert (again.fencing_token, again.expires_at) == (lease.fencing_token, lease.expires_at)
    assert again.remaining == timedelta(seconds=10)
    assert len(store.grants("a")) == 1


def test_the_same_attempt_of_another_owner_gets_nothing(store: LeaseStore, clock: Clock) -> None:
    attempt = uuid4()
    take(store, owner="one", claim_id=attempt)
    assert store.acquire("a", owner="two", ttl=TTL, claim_id=attempt) is None


def test_an_attempt_whose_grant_has_expired_gets_a_new_one(store: LeaseStore, clock: Clock) -> None:
    attempt = uuid4()
    take(store, claim_id=attempt)
    clock.advance(15)
    assert take(store, claim_id=attempt).fencing_token == 2


def test_an_attempt_whose_grant_was_taken_gets_nothing(store: LeaseStore, clock: Clock) -> None:
    attempt = uuid4()
    take(store, claim_id=attempt)
    store.steal("a", to="two", ttl=TTL, actor="op")
    assert store.acquire("a", owner="one", ttl=TTL, claim_id=attempt) is None


@pytest.mark.parametrize("how", ["pause", "retire"])
def test_a_paused_or_retired_stream_is_not_granted(store: LeaseStore, clock: Clock, how: str) -> None:
    store.register(["a"])
    if how == "pause":
        store.pause("a", actor="op")
    else:
        store.retire(["a"])
    assert store.acquire("a", owner="one", ttl=TTL) is None


def test_a_stream_in_backoff_may_be_acquired_by_name(store: LeaseStore, clock: Clock) -> None:
    store.release(take(store), backoff=timedelta(minutes=1))
    assert take(store, owner="two").fencing_token == 2


def test_waiting_gets_the_lease_when_it_is_free(store: LeaseStore, clock: Clock) -> None:
    take(store)
    # The wait is by the process's clock, the expiry by the database's.
    mover = threading.Timer(0.05, clock.advance, [15])
    mover.start()
    lease = store.acquire("a", owner="two", ttl=TTL, wait=timedelta(seconds=20))
    mover.join()
    assert lease is not None
    assert lease.fencing_token == 2


def test_waiting_in_vain_ends_with_none(store: LeaseStore, clock: Clock) -> None:
    take(store)
    assert store.acquire("a", owner="two", ttl=TTL, wait=timedelta(milliseconds=60)) is None


def test_what_can_never_work_is_refused_and_changes_nothing(store: LeaseStore, clock: Clock) -> None:
    bad: tuple[dict[str, object], ...] = (
        {"stream_id": ""},
        {"stream_id": "x" * 256},
        {"stream_id": "a\0"},
        {"stream_id": "a\n"},
        {"stream_id": "\ud800"},
        {"owner": ""},
        {"pool": "\x1b"},
        {"ttl": timedelta(0)},
        {"ttl": timedelta(seconds=-1)},
        {"ttl": timedelta(hours=24, microseconds=1)},
        {"ttl": float("nan")},
        {"wait": timedelta(seconds=-1)},
    )
    for wrong in bad:
        given: dict[str, object] = {"stream_id": "a", "owner": "one", "ttl": TTL, **wrong}
        with pytest.raises(ConfigError):
            store.acquire(**given)  # type: ignore[arg-type]  # the wrong types are what is tried here
    assert store.list() == []


def test_every_odd_name_that_is_allowed_works(store: LeaseStore, clock: Clock) -> None:
    for name in ("%", "_", "*", "it's", '"', "\\", "💜" * 255, "ß", " ", "[a]", ":x", "%(x)s"):
        lease = take(store, name, owner=name, pool=name)
        found = store.get(name)
        assert found is not None
        assert (found.owner, found.pool) == (name, name)
        assert store.release(lease)


def test_the_grant_is_recorded(store: LeaseStore, clock: Clock) -> None:
    take(store)
    (grant,) = store.grants("a")
    assert (grant.fencing_token, grant.owner, grant.granted_at) == (1, "one", clock.now())
    assert (grant.ended_at, grant.end_reason, grant.expires_at) == (None, None, clock.now() + TTL)


def test_a_token_at_its_greatest_is_not_passed(store: LeaseStore, clock: Clock) -> None:
    store.register(["a"])
    execute(store, "UPDATE leases SET fencing_token = 9223372036854775807")
    with pytest.raises(StoreError):
        store.acquire("a", owner="one", ttl=TTL)
    info = store.get("a")
    assert info is not None
    assert (info.owner, info.fencing_token) == (None, 2**63 - 1)


def test_claim_ids_are_uuids_in_the_row(store: LeaseStore, clock: Clock) -> None:
    attempt = UUID("12345678-1234-5678-1234-567812345678")
    take(store, claim_id=attempt)
    info = store.get("a")
    assert info is not None
    assert info.claim_id == attempt
