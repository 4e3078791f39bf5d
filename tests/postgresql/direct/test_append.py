"""An append that is one statement: its fence, and how long it may last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text

from leases import EventLog, LeaseHeld, LeaseStore, StaleToken, StoreUnavailable
from leases.direct import NOT_TAKEN, Direct
from leases.events import append_alone
from tests.conformance.driver import TTL, take
from tests.postgresql.direct.ways import in_transactions
from tests.postgresql.race import Background, Observer, locking
from tests.waiting import until

SHORT = timedelta(milliseconds=500)

Version = int | None
OF_ANY_VERSION = pytest.mark.parametrize("version", [16, None])
"""The server's, or as if it were 16, which has no transaction_timeout."""


def as_version(engine: Engine, version: Version) -> int:
    """Have an Engine's server taken for one of an earlier version; return what it is taken for."""
    of_server = engine.dialect.server_version_info or (0,)
    taken_for = int(of_server[0]) if version is None else version
    engine.dialect.server_version_info = (taken_for, 0)
    return taken_for


def test_an_append_that_waits_for_its_lock_sees_what_was_granted_meanwhile(
    looked: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(looked)
    with engine.connect() as connection, connection.begin() as granting:
        connection.execute(text("UPDATE leases SET fencing_token = 2, owner = 'two' WHERE stream_id = 'a'"))
        append = Background(EventLog(looked).append, lease, {"e": 1}, checkpoint=1)
        observer.wait_for(1)
        granting.commit()
    with pytest.raises(StaleToken) as refused:
        append.result()
    assert (refused.value.current_token, refused.value.current_owner) == (2, "two")
    assert EventLog(looked).read("a") == []
    assert looked.checkpoint("a") is None


def test_an_append_sees_an_expiry_that_happened_while_it_waited(
    looked: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(looked, ttl=SHORT)
    with locking(engine):  # a grant, which then rolls back
        append = Background(EventLog(looked).append, lease, {"e": 1}, checkpoint=1)
        observer.wait_for(1)
        observer.wait_for_expiry()
    with pytest.raises(StaleToken):
        append.result()
    assert EventLog(looked).read("a") == []
    assert looked.checkpoint("a") is None


@contextmanager
def in_its_way(engine: Engine, event_id: str = "e") -> Iterator[None]:
    """A transaction of somebody else's that has written an event of this name, and is not over."""
    insert = text(
        "INSERT INTO lease_events (stream_id, event_id, seq, fencing_token, recorded_at, payload) "
        "VALUES ('a', :event_id, 99, 1, now(), '1')"
    )
    with engine.connect() as connection, connection.begin() as transaction:
        connection.execute(insert, {"event_id": event_id})
        yield
        transaction.rollback()


@pytest.mark.parametrize("events", [{"e": 1}, {"d": 0, "e": 1}])
def test_nobody_is_granted_the_stream_while_an_append_is_in_flight(
    looked: LeaseStore, engine: Engine, observer: Observer, events: dict[str, int]
) -> None:
    lease = take(looked)
    with in_its_way(engine):
        append = Background(EventLog(looked).append, lease, events, checkpoint=1)
        observer.wait_for(1)
        with pytest.raises(LeaseHeld, match="not yet fenced"):
            looked.steal("a", to="two", ttl=TTL, actor="op", timeout=timedelta(seconds=0.3))
        assert not append.done()
    assert append.result().count == len(events)
    assert looked.steal("a", to="two", ttl=TTL, actor="op").fencing_token == 2
    assert [recorded.fencing_token for recorded in EventLog(looked).read("a")] == [1] * len(events)


@pytest.mark.parametrize("events", [{"e": 1}, {"d": 0, "e": 1}])
@OF_ANY_VERSION
def test_an_append_that_hangs_is_ended_at_its_leases_end(
    postgresql_url: str, engine: Engine, caplog: pytest.LogCaptureFixture, events: dict[str, int], version: Version
) -> None:
    with LeaseStore(postgresql_url, retry_for=timedelta(0)) as hasty, LeaseStore(postgresql_url) as other:
        lease = take(hasty, ttl=SHORT)
        words = "nothing of it is kept" if as_version(hasty.engine, version) >= 17 else "lock timeout"
        with in_its_way(engine):
            append = Background(EventLog(hasty).append, lease, events)
            until(lambda: other.acquire("a", owner="two", ttl=TTL), "the takeover")
            with pytest.raises(StoreUnavailable, match=words):
                append.result()
    assert not caplog.records, "nobody is told of a connection that is lost, but who used it"


@OF_ANY_VERSION
def test_a_batch_that_outlasts_its_lease_is_kept_as_a_whole_or_not_at_all(
    postgresql_url: str, version: Version
) -> None:
    many = {f"{n}": n for n in range(20_000)}
    with LeaseStore(postgresql_url, retry_for=timedelta(0)) as store:
        lease = take(store, ttl=timedelta(milliseconds=150))
        as_version(store.engine, version)
        try:
            assert EventLog(store).append(lease, many, checkpoint="all").count == len(many)
        except (StaleToken, StoreUnavailable):
            assert EventLog(store).read("a", limit=1) == []
            assert store.checkpoint("a") is None


@pytest.mark.parametrize(("its_own", "least_s", "most_s"), [("0", 50, 60), ("2min", 50, 60), ("30s", 30, 30)])
@OF_ANY_VERSION
@pytest.mark.parametrize("events", [{"e": 1}, {"d": 0, "e": 1}])
def test_an_appends_limit_is_its_leases_end_or_the_sessions_own_if_that_is_shorter(
    looked: LeaseStore,
    events: dict[str, int],
    version: Version,
    its_own: str,
    least_s: int,
    most_s: int,
) -> None:
    lease = take(looked, ttl=timedelta(seconds=60))
    with looked.engine.connect() as owner, owner.begin():
        setting = "transaction_timeout" if as_version(looked.engine, version) >= 17 else "lock_timeout"
        owner.exec_driver_sql(f"SET LOCAL {setting} = '{its_own}'")
        assert append_alone(cast(Any, Direct(looked._shortcut._statements, owner)), lease, events) is not NOT_TAKEN
        milliseconds = owner.scalar(text("SELECT setting::int FROM pg_settings WHERE name = :n"), {"n": setting})
        assert least_s * 1000 <= milliseconds <= most_s * 1000


@pytest.mark.parametrize("end", ["now() + interval '30 days'", "'infinity'"])
def test_a_lease_that_ends_beyond_all_that_can_be_counted_is_fenced_alike(
    looked: LeaseStore, observer: Observer, end: str
) -> None:
    """Its grant was made before the clock was set back. Its token is current all the same."""
    lease = take(looked)
    observer.execute(
        f"SET session_replication_role = replica; UPDATE leases SET expires_at = {end} WHERE stream_id = 'a'"
    )
    for store in (looked, in_transactions(looked)):
        assert EventLog(store).append(lease, {uuid4().hex: 1}).count == 1
        assert EventLog(store).append(lease, {uuid4().hex: 1, uuid4().hex: 2}, checkpoint=1).count == 2
