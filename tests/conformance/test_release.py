"""To release: only the named grant, once; the token stays."""

from __future__ import annotations

from datetime import timedelta

import pytest

from leases import ConfigError, LeaseStore, StaleToken
from leases.model import EndReason
from tests.clock import Clock
from tests.conformance.driver import TTL, take


def test_a_released_stream_is_free_at_once_and_keeps_its_token(store: LeaseStore, clock: Clock) -> None:
    assert store.release(take(store))
    info = store.get("a")
    assert info is not None
    assert (info.owner, info.expires_at, info.fencing_token, info.state) == (None, None, 1, "free")
    (grant,) = store.grants("a")
    assert (grant.ended_at, grant.end_reason) == (clock.now(), EndReason.RELEASED)


def test_a_second_release_is_harmless(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    assert store.release(lease)
    assert not store.release(lease)


def test_a_delayed_release_of_an_earlier_grant_has_no_effect(store: LeaseStore, clock: Clock) -> None:
    earlier = take(store)
    store.release(earlier)
    later = take(store)
    assert not store.release(earlier)
    info = store.get("a")
    assert info is not None
    assert (info.owner, info.fencing_token) == ("one", later.fencing_token)


def test_nobody_releases_in_another_name(store: LeaseStore, clock: Clock) -> None:
    from dataclasses import replace

    lease = take(store)
    assert not store.release(replace(lease, owner="two"))


def test_an_expired_lease_that_is_released_ended_when_it_expired(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    clock.advance(20)
    assert store.release(lease)
    (grant,) = store.grants("a")
    assert (grant.ended_at, grant.end_reason) == (lease.expires_at, EndReason.EXPIRED)


def test_a_release_may_carry_the_checkpoint(store: LeaseStore, clock: Clock) -> None:
    assert store.release(take(store), checkpoint={"at": 7})
    found = store.checkpoint("a")
    assert found is not None
    assert (found.checkpoint, found.fencing_token) == ({"at": 7}, 1)


def test_a_release_with_a_checkpoint_under_a_stale_token_does_neither(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    clock.advance(15)
    with pytest.raises(StaleToken):
        store.release(lease, checkpoint={"at": 7})
    assert store.checkpoint("a") is None
    info = store.get("a")
    assert info is not None
    assert info.owner == "one"


def test_failures_are_counted_until_a_release_without_error(store: LeaseStore, clock: Clock) -> None:
    seen = []
    for error in ("first", "second", None):
        store.release(take(store), error=error)
        info = store.get("a")
        assert info is not None
        seen.append((info.failures, info.last_error))
    assert seen == [(1, "first"), (2, "second"), (0, None)]


def test_a_backoff_is_kept_by_the_databases_clock(store: LeaseStore, clock: Clock) -> None:
    store.release(take(store), backoff=timedelta(seconds=90))
    info = store.get("a")
    assert info is not None
    assert info.available_at == clock.now() + timedelta(seconds=90)
    store.release(take(store), backoff=timedelta(seconds=-5))
    info = store.get("a")
    assert info is not None
    assert info.available_at == clock.now(), "a negative one is none"


def test_an_error_that_cannot_be_stored_is_refused(store: LeaseStore, clock: Clock) -> None:
    lease = take(store)
    for error in ("a\0b", "\udc00", "x" * 2001):
        with pytest.raises(ConfigError):
            store.release(lease, error=error)
    assert store.renew([lease], owner="one", ttl=TTL).lost == {}
