"""What an operator does: each raises the token where it must, leaves a line in the audit, and may be repeated."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from leases import ConfigError, EventLog, LeaseHeld, LeaseNotHeld, LeaseStore, StaleToken
from leases.administration import end_now, revoke
from leases.model import EndReason
from tests.clock import Clock
from tests.conformance.driver import TTL, rows, take

# --- register, retire ------------------------------------------------------------------------------------------


def test_registering_counts_what_is_new(store: LeaseStore, clock: Clock) -> None:
    assert store.register(["a", "b", "a"]) == 2
    assert store.register(["b", "c"]) == 1
    assert store.register([]) == 0


def test_registering_what_is_known_changes_nothing(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    before = store.get("a")
    assert store.register(["a"], pool="other") == 0
    assert store.get("a") == before
    assert store.renew([lease], owner="one", ttl=TTL).lost == {}


def test_thousands_of_streams_are_registered_in_one_call(store: LeaseStore, clock: Clock) -> None:
    assert store.register(f"s{number}" for number in range(3000)) == 3000


def test_the_token_goes_on_after_retire_and_register(store: LeaseStore, clock: Clock) -> None:
    store.release(take(store))
    assert store.retire(["a"]) == 1
    assert store.retire(["a", "unknown"]) == 0
    assert store.register(["a"], pool="other") == 1
    lease = take(store)
    assert (lease.fencing_token, lease.pool) == (2, "other")


def test_acquiring_does_not_bring_back_a_retired_stream(store: LeaseStore, clock: Clock) -> None:
    store.register(["a"])
    store.retire(["a"])
    assert store.acquire("a", owner="one", ttl=TTL) is None
    info = store.get("a")
    assert info is not None
    assert info.retired_at == clock.now()


def test_a_retired_stream_keeps_its_owner_until_it_ends(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    store.retire(["a"])
    assert store.renew([lease], owner="one", ttl=TTL).ending == {"a"}
    assert store.release(lease)


# --- expire ----------------------------------------------------------------------------------------------------


def test_expire_ends_the_lease_and_raises_the_token(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    clock.advance(1)
    assert store.expire("a", actor="op", reason="why") == 2
    info = store.get("a")
    assert info is not None
    assert (info.owner, info.fencing_token, info.available_at) == (None, 2, clock.now())
    (grant,) = store.grants("a")
    assert (grant.ended_at, grant.end_reason) == (clock.now(), EndReason.REVOKED)
    with pytest.raises(StaleToken):
        store.write_checkpoint(lease, 1)


def test_after_expire_the_next_grant_is_above_the_revoked_token(store: LeaseStore, clock: Clock) -> None:
    take(store)
    store.expire("a", actor="op")
    assert take(store, owner="two").fencing_token == 3


def test_an_expired_lease_may_be_expired(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    clock.advance(20)
    assert store.expire("a", actor="op") == 2
    (grant,) = store.grants("a")
    assert grant.ended_at == lease.expires_at


def test_nothing_to_expire_is_an_error(store: LeaseStore, clock: Clock) -> None:
    with pytest.raises(LeaseNotHeld):
        store.expire("unknown", actor="op")
    store.register(["a"])
    with pytest.raises(LeaseNotHeld):
        store.expire("a", actor="op")


@pytest.mark.parametrize("action", ["expire", "steal"])
def test_a_grant_that_was_named_must_be_the_current_one(store: LeaseStore, clock: Clock, action: str) -> None:
    store.release(take(store))
    lease = take(store, owner="two")
    more: dict[str, Any] = {} if action == "expire" else {"to": "three", "ttl": TTL}
    with pytest.raises(LeaseNotHeld):
        getattr(store, action)("a", actor="op", fencing_token=1, **more)
    assert store.renew([lease], owner="two", ttl=TTL).lost == {}
    store.expire("a", actor="op", fencing_token=2)


def test_a_grant_made_between_the_two_steps_of_an_expire_is_left_alone(store: LeaseStore, clock: Clock) -> None:
    take(store)
    observed = store.run(lambda connection: end_now(connection, "a"))
    successor = take(store, owner="two")
    assert store.run(lambda connection: revoke(connection, observed, actor="op")) == successor.fencing_token
    assert store.renew([successor], owner="two", ttl=TTL).lost == {}


# --- steal -----------------------------------------------------------------------------------------------------


def test_steal_grants_to_the_named_owner(store: LeaseStore, clock: Clock) -> None:
    old = take(store)
    clock.advance(1)
    new = store.steal("a", to="two", ttl=timedelta(seconds=30), actor="op")
    assert (new.owner, new.fencing_token) == ("two", 2)
    assert new.expires_at == clock.now() + timedelta(seconds=30)
    with pytest.raises(StaleToken):
        store.write_checkpoint(old, 1)
    store.write_checkpoint(new, 2)
    latest, earlier = store.grants("a")
    assert (latest.owner, latest.end_reason) == ("two", None)
    assert (earlier.ended_at, earlier.end_reason) == (clock.now(), EndReason.STOLEN)


def test_a_free_stream_may_be_stolen(store: LeaseStore, clock: Clock) -> None:
    store.register(["a"])
    assert store.steal("a", to="two", ttl=TTL, actor="op").fencing_token == 1


def test_what_is_stolen_after_its_expiry_had_expired(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    clock.advance(20)
    store.steal("a", to="two", ttl=TTL, actor="op")
    _, earlier = store.grants("a")
    assert (earlier.ended_at, earlier.end_reason) == (lease.expires_at, EndReason.EXPIRED)


def test_a_steal_from_oneself_is_a_new_grant(store: LeaseStore, clock: Clock) -> None:
    old = take(store)
    assert store.steal("a", to="one", ttl=TTL, actor="op").fencing_token == 2
    with pytest.raises(StaleToken):
        store.write_checkpoint(old, 1)


def test_an_unknown_stream_is_not_stolen(store: LeaseStore, clock: Clock) -> None:
    with pytest.raises(LeaseNotHeld):
        store.steal("a", to="two", ttl=TTL, actor="op")
    assert store.list() == []


@pytest.mark.parametrize("how", ["pause", "retire"])
def test_a_paused_or_retired_stream_is_not_stolen_and_its_owner_keeps_it(
    store: LeaseStore, clock: Clock, how: str
) -> None:
    lease = take(store)
    if how == "pause":
        store.pause("a", actor="op")
    else:
        store.retire(["a"])
    with pytest.raises(LeaseHeld):
        store.steal("a", to="two", ttl=TTL, actor="op")
    info = store.get("a")
    assert info is not None
    assert (info.owner, info.fencing_token, info.expires_at) == ("one", 1, lease.expires_at)


def test_a_wrong_timeout_is_refused(store: LeaseStore, clock: Clock) -> None:
    take(store)
    for timeout in (timedelta(0), 1):
        with pytest.raises(ConfigError):
            store.expire("a", actor="op", timeout=timeout)  # type: ignore[arg-type]  # that is what is tried


@pytest.mark.parametrize("action", ["expire", "steal"])
def test_a_reason_that_cannot_be_stored_is_refused_before_anything_is_changed(
    store: LeaseStore, clock: Clock, action: str
) -> None:
    lease = take(store)
    more: dict[str, Any] = {} if action == "expire" else {"to": "two", "ttl": TTL}
    with pytest.raises(ConfigError):
        getattr(store, action)("a", actor="op", reason="a\0b", **more)
    assert store.renew([lease], owner="one", ttl=TTL).lost == {}


# --- pause, resume ---------------------------------------------------------------------------------------------


def test_pause_and_resume(store: LeaseStore, clock: Clock) -> None:
    store.register(["a"])
    store.pause("a", actor="op", reason="first")
    since = clock.now()
    clock.advance(1)
    store.pause("a", actor="other", reason="second")
    info = store.get("a")
    assert info is not None
    assert (info.paused_at, info.paused_by, info.pause_reason) == (since, "other", "second")
    assert store.resume("a", actor="op")
    assert not store.resume("a", actor="op")
    info = store.get("a")
    assert info is not None
    assert (info.paused_at, info.paused_by, info.pause_reason) == (None, None, None)
    assert take(store).fencing_token == 1


def test_a_paused_stream_keeps_its_owner(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    store.pause("a", actor="op")
    store.write_checkpoint(lease, 1)
    clock.advance(15)
    assert store.acquire("a", owner="two", ttl=TTL) is None


def test_unknown_streams_are_not_paused(store: LeaseStore, clock: Clock) -> None:
    for action in (store.pause, store.resume):
        with pytest.raises(LeaseNotHeld):
            action("a", actor="op")


# --- repairs ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_not_reset_under_a_live_owner(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    store.write_checkpoint(lease, {"at": 1})
    with pytest.raises(LeaseHeld) as held:
        store.reset_checkpoint("a", {"at": 0}, actor="op")
    assert held.value.owner == "one"
    found = store.checkpoint("a")
    assert found is not None
    assert found.checkpoint == {"at": 1}


def test_a_checkpoint_that_was_reset_is_the_next_owners(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    store.write_checkpoint(lease, {"at": 1})
    store.release(lease)
    store.reset_checkpoint("a", None, actor="op")
    found = store.checkpoint("a")
    assert found is not None
    assert found.checkpoint is None
    store.write_checkpoint(take(store), {"at": 2})
    found = store.checkpoint("a")
    assert found is not None
    assert (found.checkpoint, found.fencing_token) == ({"at": 2}, 2)


def test_raising_tokens_ends_every_lease_and_passes_every_old_token(store: LeaseStore, clock: Clock) -> None:
    lease = take(store, "a")
    store.register(["b"])
    assert store.raise_tokens(by=1000, actor="op", reason="restored") == 2
    assert [(info.owner, info.fencing_token) for info in store.list()] == [(None, 1001), (None, 1000)]
    with pytest.raises(StaleToken) as stale:
        store.write_checkpoint(lease, 1)
    assert (stale.value.fencing_token, stale.value.current_token) == (1, 1001)
    (grant,) = store.grants("a")
    assert grant.end_reason == EndReason.REVOKED


def test_pruning_never_takes_the_row_with_the_token(store: LeaseStore, clock: Clock) -> None:
    lease = take(store, "gone")
    store.write_checkpoint(lease, 1)
    store.release(lease)
    store.retire(["gone"], actor="op")
    store.release(take(store, "kept"))
    live = take(store, "kept")
    clock.advance(3600)
    pruned = store.prune(before=clock.now())
    assert (pruned.grants, pruned.audit, pruned.checkpoints) == (2, 1, 1)
    assert [(info.stream_id, info.fencing_token) for info in store.list()] == [("gone", 1), ("kept", 2)]
    assert [grant.fencing_token for grant in store.grants("kept")] == [live.fencing_token], "it has not ended"
    store.register(["gone"])
    assert take(store, "gone").fencing_token == 2


def test_pruning_leaves_what_is_younger(store: LeaseStore, log: EventLog, clock: Clock) -> None:
    lease = take(store)
    log.append(lease, {"e1": 1})
    store.release(lease)
    store.retire(["a"], actor="op")
    pruned = store.prune(before=clock.now())
    assert (pruned.grants, pruned.events, pruned.audit, pruned.checkpoints) == (0, 0, 0, 0)


def test_pruning_everything_in_batches(store: LeaseStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        store.release(take(store))
    clock.advance(1)
    monkeypatch.setattr("leases.administration.prune.__kwdefaults__", {"limit": 2})
    assert store.prune(before=clock.now()).grants == 5


def test_the_number_of_an_event_is_not_given_out_again_after_a_prune(
    store: LeaseStore, log: EventLog, clock: Clock
) -> None:
    lease = take(store, ttl=timedelta(hours=2))
    log.append(lease, {"e1": 1, "e2": 2, "e3": 3})
    clock.advance(3600)
    store.prune(before=clock.now())
    log.append(lease, {"e4": 4})
    assert [event.seq for event in log.read("a", after_seq=3)] == [4], "a reader at 3 finds it"


def test_prune_needs_a_time_zone(store: LeaseStore, clock: Clock) -> None:
    with pytest.raises(ConfigError):
        store.prune(before=clock.now().replace(tzinfo=None))


# --- the audit -------------------------------------------------------------------------------------------------


def test_every_action_leaves_a_line(store: LeaseStore, clock: Clock) -> None:
    take(store, "a")
    store.expire("a", actor="op", reason="r1")
    store.steal("a", to="two", ttl=TTL, actor="op", reason="r2")
    store.pause("a", actor="op", reason="r3")
    store.resume("a", actor="op", reason="r4")
    store.expire("a", actor="op")
    store.reset_checkpoint("a", 1, actor="op", reason="r5")
    store.retire(["a"], actor="op", reason="r6")
    store.raise_tokens(by=10, actor="op", reason="r7")
    lines = store.audit()
    assert [(line.action, line.token_before, line.token_after, line.reason) for line in reversed(lines)] == [
        ("expire", 1, 2, "r1"),
        ("steal", 2, 3, "r2"),
        ("pause", 3, 3, "r3"),
        ("resume", 3, 3, "r4"),
        ("expire", 3, 4, None),
        ("reset-checkpoint", 4, 4, "r5"),
        ("retire", 4, 4, "r6"),
        ("raise-tokens", None, None, "by 10: r7"),
    ]
    assert {line.actor for line in lines} == {"op"}
    assert {line.at for line in lines} == {clock.now()}
    assert len(store.audit(stream_id="a")) == 7
    assert len(store.audit(limit=2)) == 2
    assert len(rows(store, "SELECT DISTINCT audit_id FROM lease_audit")) == 8
