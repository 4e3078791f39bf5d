"""To renew: only the named grants, only while they are live. Expired is lost."""

from __future__ import annotations

from datetime import timedelta

import pytest

from leases import LeaseStore
from leases.model import Loss, Membership
from tests.clock import Clock
from tests.conformance.driver import TTL, rows, take


def test_all_leases_of_a_batch_are_extended(store: LeaseStore, clock: Clock) -> None:
    leases = [take(store, name) for name in ("c", "a", "b")]
    clock.advance(10)
    renewal = store.renew(leases, owner="one", ttl=TTL)
    assert (renewal.lost, renewal.skipped, renewal.ending) == ({}, frozenset(), frozenset())
    assert {info.expires_at for info in store.list()} == {clock.now() + TTL}
    assert [info.fencing_token for info in store.list()] == [1, 1, 1]


def test_an_empty_batch_is_harmless(store: LeaseStore, clock: Clock) -> None:
    renewal = store.renew([], owner="one", ttl=TTL)
    assert (renewal.lost, renewal.skipped, renewal.worker_known) == ({}, frozenset(), False)


def test_a_heartbeat_at_the_expiry_revives_nothing(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    clock.advance(15)
    assert store.renew([lease], owner="one", ttl=TTL).lost == {"a": Loss.EXPIRED}
    info = store.get("a")
    assert info is not None
    assert (info.expires_at, info.live) == (lease.expires_at, False)


def test_a_heartbeat_a_millisecond_before_is_in_time(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    clock.advance(14.999)
    assert store.renew([lease], owner="one", ttl=TTL).lost == {}


def test_one_lost_lease_costs_no_other(store: LeaseStore, clock: Clock) -> None:
    short = take(store, "short")
    other = take(store, "long", ttl=timedelta(seconds=60))
    clock.advance(15)
    renewal = store.renew([short, other], owner="one", ttl=TTL)
    assert renewal.lost == {"short": Loss.EXPIRED}
    info = store.get("long")
    assert info is not None
    assert info.expires_at == clock.now() + TTL


def test_a_heartbeat_says_what_became_of_the_lease(store: LeaseStore, clock: Clock) -> None:
    leases = [take(store, name) for name in ("expired", "revoked", "released", "stolen", "mine")]
    store.expire("revoked", actor="op")
    store.release(leases[2])
    store.steal("stolen", to="two", ttl=TTL, actor="op")
    store.steal("expired", to="one", ttl=timedelta(seconds=1), actor="op")
    leases[0] = store.claim(owner="one", ttl=TTL, limit=0) or leases[0]  # type: ignore[assignment]
    clock.advance(1)
    renewal = store.renew(leases, owner="one", ttl=TTL)
    assert renewal.lost == {
        "expired": Loss.TAKEN,
        "revoked": Loss.REVOKED,
        "released": Loss.RELEASED,
        "stolen": Loss.TAKEN,
    }


def test_a_delayed_heartbeat_of_an_earlier_grant_has_no_effect(store: LeaseStore, clock: Clock) -> None:
    earlier = take(store)
    store.release(earlier)
    later = take(store, ttl=timedelta(seconds=5))
    assert store.renew([earlier], owner="one", ttl=TTL).lost == {"a": Loss.TAKEN}
    info = store.get("a")
    assert info is not None
    assert info.expires_at == later.expires_at


def test_a_heartbeat_in_another_name_has_no_effect(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    clock.advance(1)
    store.renew([lease], owner="two", ttl=TTL)
    info = store.get("a")
    assert info is not None
    assert info.expires_at == lease.expires_at


@pytest.mark.parametrize("how", ["pause", "retire"])
def test_a_paused_or_retired_lease_is_extended_and_told_to_end(store: LeaseStore, clock: Clock, how: str) -> None:
    leases = [take(store, "a"), take(store, "b")]
    if how == "pause":
        store.pause("a", actor="op")
    else:
        store.retire(["a"])
    clock.advance(10)
    renewal = store.renew(leases, owner="one", ttl=TTL)
    assert renewal.ending == {"a"}
    assert (renewal.lost, renewal.skipped) == ({}, frozenset())
    assert {info.expires_at for info in store.list()} == {clock.now() + TTL}


def test_the_workers_own_row_is_extended_with_its_leases(store: LeaseStore, clock: Clock) -> None:
    store.enlist(Membership(worker_id="one", host="h", pid=7, version="1"), ttl=TTL)
    leases = [take(store, "a"), take(store, "b")]
    clock.advance(10)
    assert store.renew(leases, owner="one", ttl=TTL, held=2).worker_known
    (worker,) = store.workers()
    assert (worker.expires_at, worker.lease_count, worker.live) == (clock.now() + TTL, 2, True)


def test_a_worker_that_nobody_knows_is_said_to_be_unknown(store: LeaseStore, clock: Clock) -> None:
    assert not store.renew([take(store)], owner="one", ttl=TTL).worker_known


def test_heartbeats_leave_no_trace_in_the_grants(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    before = rows(store, "SELECT * FROM lease_grants")
    store.renew([lease], owner="one", ttl=TTL)
    assert rows(store, "SELECT * FROM lease_grants") == before


def test_a_lease_that_the_table_does_not_know_is_lost(store: LeaseStore, clock: Clock) -> None:
    from dataclasses import replace

    stranger = replace(take(store), stream_id="elsewhere")
    assert store.renew([stranger], owner="one", ttl=TTL).lost.keys() == {"elsewhere"}
