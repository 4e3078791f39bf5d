"""The fleet: what a worker sees of its pool, what it finds in its own name, and letting many streams go at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from leases import Lease, LeaseStore, fleet, operations
from leases.balance import Peer, View
from leases.model import Ending, Membership, Released, Stray, by_operator
from tests.clock import Clock
from tests.conformance.driver import TTL, execute, rows, take


def enlist(store: LeaseStore, name: str, ttl: timedelta = TTL, **terms: Any) -> None:
    store.enlist(Membership(name, "host", 7, "1", **{"pool": "default", **terms}), ttl=ttl)


def view(store: LeaseStore, me: str = "me", *, up_to: int = 1000, patience_s: float = 1.5) -> View:
    return store.run(
        lambda connection: fleet.observe(connection, "default", me, count_up_to=up_to, patience_s=patience_s)
    )


def found(store: LeaseStore, owner: str) -> list[Stray]:
    names = store.renew([], owner=owner, ttl=TTL).strays
    return store.run(lambda connection: fleet.strays(connection, names, owner=owner)) if names else []


def adopt(store: LeaseStore, stray: Stray, owner: str, claim_id: UUID) -> Lease | None:
    return store.run(lambda connection: fleet.adopt(connection, stray, owner=owner, ttl=TTL, claim_id=claim_id))


# --- what a worker sees --------------------------------------------------------------------------------------------


def test_a_worker_sees_the_live_workers_of_its_pool_and_what_is_available(store: LeaseStore, clock: Clock) -> None:
    store.register(["a", "b", "c", "paused", "retired"])
    store.register(["elsewhere"], pool="other")
    store.pause("paused", actor="op")
    store.retire(["retired"])
    enlist(store, "me", capacity=5, weight=2.0)
    enlist(store, "dead", ttl=timedelta(seconds=1))
    enlist(store, "other", pool="other")
    enlist(store, "no worker", pool=None)
    clock.advance(2)
    take(store, "a", "me")
    assert view(store) == View([Peer("me", 0, 2.0, 5)], available=2, overdue=2)


def test_a_claim_and_a_release_tell_the_new_count_in_the_same_moment(store: LeaseStore) -> None:
    store.register(["a", "b", "c"])
    enlist(store, "me")
    leases = store.claim(owner="me", ttl=TTL, limit=2, held=0)
    assert view(store) == View([Peer("me", 2)], available=1)
    store.release_all([Ending(leases[0])], owner="me", held=1)
    assert view(store) == View([Peer("me", 1)], available=2)


def test_a_count_that_is_told_does_not_extend_the_workers_row(store: LeaseStore, clock: Clock) -> None:
    store.register(["a"])
    enlist(store, "me")
    clock.advance(10)
    store.claim(owner="me", ttl=TTL, limit=1, held=0)
    clock.advance(5)
    assert view(store).workers == []


def test_what_dead_owners_have_left_is_available_once_it_has_expired(store: LeaseStore, clock: Clock) -> None:
    enlist(store, "me")
    enlist(store, "peer", ttl=timedelta(hours=1))
    for stream_id, owner in (("a", "gone"), ("b", "peer"), ("c", "me")):
        take(store, stream_id, owner)
    assert view(store).available == 0
    clock.advance(TTL.total_seconds())
    enlist(store, "me")
    assert (view(store).available, view(store).overdue) == (2, 0)  # not the peer's, which looks after its own
    clock.advance(2)
    assert (view(store).available, view(store).overdue) == (2, 2)


def test_it_is_counted_no_further_than_is_asked(store: LeaseStore) -> None:
    enlist(store, "me")
    store.register(f"s{number}" for number in range(20))
    assert (view(store, up_to=20).available, view(store, up_to=20).counted_all) == (20, False)
    assert (view(store, up_to=21).available, view(store, up_to=21).counted_all) == (20, True)


def test_a_stream_that_rests_is_not_available_yet(store: LeaseStore, clock: Clock) -> None:
    enlist(store, "me")
    store.release_all([Ending(take(store), timedelta(seconds=30), "it failed")], owner="one")
    assert view(store).available == 0
    clock.advance(30)
    enlist(store, "me")
    assert view(store).available == 1


# --- the worker's row ----------------------------------------------------------------------------------------------


def test_a_worker_is_asked_to_drain_in_its_row(store: LeaseStore, clock: Clock) -> None:
    enlist(store, "me")
    assert store.drain("me")
    assert store.drain("me")
    assert view(store).workers == [Peer("me", draining=True)]
    enlist(store, "me")  # the same process again: still asked
    assert view(store).workers == [Peer("me", draining=True)]
    clock.advance(TTL.total_seconds())
    assert not store.drain("me")
    assert not store.drain("nobody")


def test_a_later_process_of_the_name_takes_nothing_over_from_the_row(store: LeaseStore, clock: Clock) -> None:
    enlist(store, "me", capacity=5, incarnation=uuid4())
    store.drain("me")
    clock.advance(60)
    # In a container the next process has the same host and pid.
    store.enlist(Membership("me", "host", 7, "2", "default", incarnation=uuid4()), ttl=TTL)
    assert view(store).workers == [Peer("me")]
    (row,) = store.workers()
    assert (row.version, row.started_at, row.beaten_at) == ("2", clock.now(), clock.now())


def test_a_live_namesake_is_told_apart_from_oneself(store: LeaseStore, clock: Clock) -> None:
    mine, another = uuid4(), uuid4()
    enlist(store, "me", incarnation=mine)

    def namesake(incarnation: UUID) -> object:
        member = Membership("me", "host", 7, "1", incarnation=incarnation)
        return store.run(lambda connection: fleet.namesake(connection, member))

    assert (namesake(mine), namesake(another)) == (None, ("host", 7))
    clock.advance(TTL.total_seconds())
    assert namesake(another) is None


# --- strays --------------------------------------------------------------------------------------------------------


def test_a_heartbeat_finds_what_it_does_not_know_in_its_owners_name(store: LeaseStore, clock: Clock) -> None:
    known = take(store, "known", "me")
    attempt = uuid4()
    take(store, "unknown", "me", claim_id=attempt)
    take(store, "expired", "me", ttl=timedelta(seconds=1))
    take(store, "other", "other")
    clock.advance(1)
    assert store.renew([known], owner="me", ttl=TTL).strays == {"unknown", "expired"}
    strays = {stray.stream_id: stray for stray in found(store, "me")}
    assert strays["unknown"] == Stray("unknown", 1, attempt, live=True)
    assert not strays["expired"].live
    store.run(lambda connection: fleet.let_go_expired(connection, owner="me"))
    assert store.renew([known], owner="me", ttl=TTL).strays == {"unknown"}


def test_what_an_operator_has_moved_is_known_by_its_claim(store: LeaseStore) -> None:
    store.register(["a"])
    store.steal("a", to="me", ttl=TTL, actor="op")
    take(store, "b", "me")
    assert {stray.stream_id: by_operator(stray.claim_id) for stray in found(store, "me")} == {"a": True, "b": False}


def test_of_two_that_adopt_one_has_it(store: LeaseStore, clock: Clock) -> None:
    store.register(["a"])
    stolen = store.steal("a", to="me", ttl=timedelta(hours=1), actor="op")
    (stray,) = found(store, "me")
    clock.advance(1)
    mine = uuid4()
    lease = adopt(store, stray, "me", mine)
    assert lease is not None
    assert (lease.fencing_token, lease.owner, lease.expires_at) == (stolen.fencing_token, "me", clock.now() + TTL)
    assert adopt(store, stray, "me", uuid4()) is None
    assert rows(store, "SELECT claim_id FROM leases")[0][0] in (mine, str(mine))


@pytest.mark.parametrize("change", ["expired", "released", "stolen", "paused", "another's name"])
def test_what_has_changed_since_it_was_found_is_not_adopted(store: LeaseStore, clock: Clock, change: str) -> None:
    store.register(["a"])
    lease = store.steal("a", to="me", ttl=TTL, actor="op")
    (stray,) = found(store, "me")
    match change:
        case "expired":
            clock.advance(TTL.total_seconds())
        case "released":
            store.release(lease)
        case "stolen":
            store.steal("a", to="me", ttl=TTL, actor="op")
        case "paused":
            store.pause("a", actor="op")
    before = rows(store, "SELECT owner, fencing_token, expires_at, claim_id FROM leases")
    assert adopt(store, stray, "you" if change == "another's name" else "me", uuid4()) is None
    assert rows(store, "SELECT owner, fencing_token, expires_at, claim_id FROM leases") == before


# --- letting many go -----------------------------------------------------------------------------------------------


def test_a_batch_is_released_each_in_its_own_way(store: LeaseStore, clock: Clock) -> None:
    well, failed = take(store, "a"), take(store, "b")
    released = store.release_all([Ending(well), Ending(failed, timedelta(seconds=30), "no such feed")], owner="one")
    assert released == Released(frozenset("ab"), frozenset())
    one, two = store.list()
    assert (one.owner, one.available_at, one.failures, one.last_error) == (None, clock.now(), 0, None)
    assert (two.owner, two.available_at, two.failures) == (None, clock.now() + timedelta(seconds=30), 1)
    assert two.last_error == "no such feed"
    assert store.release_all([Ending(well), Ending(failed)], owner="one").released == frozenset()


def test_a_batch_releases_no_later_grant_and_no_other_owners(store: LeaseStore) -> None:
    old = take(store, "a")
    store.release(old)
    new, other = take(store, "a"), take(store, "b", "other")
    assert store.release_all([Ending(old), Ending(other)], owner="one").released == frozenset()
    assert [(info.owner, info.fencing_token) for info in store.list()] == [("one", new.fencing_token), ("other", 1)]


def test_an_empty_batch_is_nothing(store: LeaseStore) -> None:
    assert store.release_all([], owner="one").released == frozenset()


def test_failures_are_counted_over_grants_and_forgotten_when_it_goes_well(store: LeaseStore) -> None:
    def recover(lease: Lease) -> bool:
        return store.run(lambda connection: operations.recover(connection, lease))

    for number in range(3):
        lease = take(store)
        assert lease.failures == number
        store.release_all([Ending(lease, error="again")], owner="one")
    lease = take(store)
    assert recover(lease)
    assert not recover(lease)
    info = store.get("a")
    assert info is not None
    assert (info.failures, info.last_error, info.owner) == (0, None, "one")
    store.release(lease)
    take(store, owner="two")
    execute(store, "UPDATE leases SET failures = 2")
    assert not recover(lease), "a later grant's failures are not its own to forget"
