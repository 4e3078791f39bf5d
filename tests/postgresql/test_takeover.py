"""A takeover and a fenced write in flight: claimers pass by, operators wait, nothing stale commits."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from leases import AsyncLeaseStore, Lease, LeaseHeld, LeaseStore, StaleToken, fence, operations, views
from leases.administration import end_now
from leases.model import Blocker
from tests.conformance.driver import TTL, take
from tests.postgresql.race import Background, Observer, locking, writing
from tests.waiting import until

WRITE = text("INSERT INTO work VALUES (:token, 'written')")

LONG = timedelta(seconds=60)

MORE: dict[str, dict[str, Any]] = {"expire": {}, "steal": {"to": "two", "ttl": LONG}}
"""What an operator's action takes beside the stream."""


def acquire(store: LeaseStore) -> Background[Lease | None]:
    return Background(store.acquire, "a", owner="two", ttl=TTL)


def test_an_acquire_is_declined_at_once_while_a_fenced_write_is_in_flight(
    store: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(store)
    with writing(engine, lease) as connection:
        store.run(lambda own: end_now(own, "a"))  # expired, and the write goes on
        assert acquire(store).result() is None
        connection.execute(WRITE, {"token": 1})
        connection.commit()
    found = acquire(store).result()
    assert found is not None
    assert found.fencing_token == 2


def test_a_claim_passes_by_a_fenced_write_in_flight(store: LeaseStore, engine: Engine, observer: Observer) -> None:
    lease = take(store)
    take(store, "b")
    with writing(engine, lease):
        store.run(lambda own: [end_now(own, name) for name in ("a", "b")])
        claimed = Background(store.claim, owner="two", ttl=TTL, limit=5).result()
    assert [lease.stream_id for lease in claimed] == ["b"]


def test_an_acquire_is_declined_at_once_while_anybody_has_the_row(store: LeaseStore, engine: Engine) -> None:
    store.register(["a"])
    with locking(engine):
        assert acquire(store).result() is None
    assert acquire(store).result() is not None


def test_a_declined_acquire_leaves_no_lock_on_the_owners_row(store: LeaseStore, engine: Engine) -> None:
    lease = take(store)
    with engine.begin() as connection:
        assert operations.acquire(connection, "a", owner="two", ttl=TTL) is None
        assert store.renew([lease], owner="one", ttl=TTL).skipped == frozenset()


@pytest.mark.parametrize("action", ["expire", "steal"])
def test_an_operator_waits_for_the_fenced_write_and_then_succeeds(
    store: LeaseStore, engine: Engine, observer: Observer, action: str
) -> None:
    lease = take(store)
    with writing(engine, lease) as connection:
        connection.execute(WRITE, {"token": 1})
        operator: Background[Any] = Background(getattr(store, action), "a", actor="op", **MORE[action])
        observer.wait_for(1)
        info = store.get("a")
        assert info is not None
        assert (info.live, info.fencing_token) == (False, 1), "the first step is done, the second waits"
        with pytest.raises(StaleToken):
            store.write_checkpoint(lease, 1)
        assert not operator.done()
        connection.commit()
    operator.result()
    assert observer.scalar("SELECT count(*) FROM work") == 1
    assert observer.scalar("SELECT fencing_token FROM leases") == 2


def test_a_grant_by_raw_sql_waits_for_the_fenced_write_too(
    store: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(store)
    with writing(engine, lease) as connection:
        raw = Background(observer.execute, "UPDATE leases SET owner = 'psql', fencing_token = fencing_token + 1")
        observer.wait_for(1)
        connection.execute(WRITE, {"token": 1})
        connection.commit()
    raw.result()
    with pytest.raises(StaleToken):
        store.write_checkpoint(lease, 1)


@pytest.mark.parametrize("action", ["expire", "steal"])
def test_an_operator_that_waits_too_long_is_told_who_blocks(
    store: LeaseStore, engine: Engine, observer: Observer, action: str
) -> None:
    lease = take(store)
    with writing(engine, lease) as connection:
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar()
        with pytest.raises(LeaseHeld) as held:
            getattr(store, action)("a", actor="op", reason="x", timeout=timedelta(seconds=1), **MORE[action])
        connection.execute(WRITE, {"token": 1})
        connection.commit()
    (line,) = store.audit()
    assert (line.action, line.stream_id, line.reason, line.token_after) == ("end", "a", "x", 1), (
        "it is not live any more"
    )
    (blocker,) = held.value.blockers
    assert (blocker.pid, blocker.application, blocker.state) == (pid, "billing", "idle in transaction")
    for said in ("expired, not yet fenced", f"pid {pid}", "billing"):
        assert said in str(held.value)
    assert store.expire("a", actor="op") == 2, "what was begun can be finished"


def test_an_async_operator_that_waits_in_vain_leaves_a_line_in_the_audit_too(
    store: LeaseStore, engine: Engine, postgresql_url: str
) -> None:
    lease = take(store)

    async def expire() -> None:
        async with AsyncLeaseStore(postgresql_url) as other:
            await other.expire("a", actor="op", timeout=timedelta(seconds=0.3))

    with writing(engine, lease), pytest.raises(LeaseHeld):
        asyncio.run(expire())
    assert [line.action for line in store.audit()] == ["end"]
    assert store.expire("a", actor="op") == 2
    assert [line.action for line in store.audit()] == ["expire", "end"]


def test_a_slow_look_at_who_blocks_has_given_its_connection_back_when_the_operator_is_told(
    store: LeaseStore, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, began = views.blockers, threading.Event()

    def slowly(connection: Connection, pid: int) -> list[Blocker]:
        began.set()
        threading.Event().wait(0.5)  # it is slow
        return look(connection, pid)

    monkeypatch.setattr(views, "blockers", slowly)
    lease = take(store)
    with writing(engine, lease):
        with pytest.raises(LeaseHeld):
            store.expire("a", actor="op", timeout=timedelta(seconds=0.4))
        assert began.is_set()
        pool = store.base_engine.pool
        assert isinstance(pool, QueuePool)
        assert pool.checkedout() == 0


def test_writers_that_follow_each_other_do_not_hold_an_operator_up_beyond_its_timeout(
    store: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(store)
    with ExitStack() as stack:
        writers = [stack.enter_context(writing(engine, lease)) for _ in range(4)]
        operator = Background(store.expire, "a", actor="op", timeout=timedelta(milliseconds=400))
        began = time.monotonic()
        for number, writer in enumerate(writers, start=1):  # each ends before the timeout would have come to its end
            until(
                lambda number=number: operator.done() or time.monotonic() > began + number * 0.3,  # type: ignore[misc]
                "the next writer's time has come",
            )
            writer.commit()
        with pytest.raises(LeaseHeld):
            operator.result()


def test_a_stolen_lease_lasts_for_its_ttl_from_after_the_wait(
    store: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(store)
    with writing(engine, lease) as connection:
        operator = Background(store.steal, "a", to="two", ttl=LONG, actor="op")
        observer.wait_for(1)
        committed_at = observer.scalar("SELECT clock_timestamp()")
        connection.commit()
    assert operator.result().expires_at >= committed_at + LONG


@pytest.mark.parametrize("action", ["expire", "steal"])
def test_force_ends_the_session_that_blocks(store: LeaseStore, engine: Engine, observer: Observer, action: str) -> None:
    lease = take(store)
    with writing(engine, lease) as connection:
        connection.execute(WRITE, {"token": 1})
        getattr(store, action)("a", actor="op", timeout=timedelta(seconds=5), force=True, **MORE[action])
        with pytest.raises(DBAPIError):
            connection.commit()
    assert observer.scalar("SELECT fencing_token FROM leases") == 2
    assert observer.scalar("SELECT count(*) FROM work") == 0


def test_once_expire_is_back_nothing_stale_commits(store: LeaseStore, engine: Engine, observer: Observer) -> None:
    for _ in range(6):
        lease = take(store)
        go = threading.Barrier(4)

        def write(lease: Lease = lease, go: threading.Barrier = go) -> int:
            with engine.connect() as connection:
                for count in range(10_000):
                    try:
                        with connection.begin():
                            fence(connection, lease)
                            connection.execute(WRITE, {"token": lease.fencing_token})
                    except StaleToken:
                        return count
                    if count == 1:
                        go.wait(10)
            raise AssertionError("nobody stopped the writer")

        writers = [Background(write) for _ in range(3)]
        go.wait(10)
        store.expire("a", actor="op")
        count = observer.scalar("SELECT count(*) FROM work WHERE token = :token", token=lease.fencing_token)
        assert sum(writer.result() for writer in writers) == count, "none was committed after"


def test_eight_that_claim_at_once_never_get_the_same_stream(store: LeaseStore, observer: Observer) -> None:
    store.register(f"s{number:03}" for number in range(160))
    start = threading.Barrier(8)

    def claim(name: str) -> list[Lease]:
        start.wait(10)
        mine: list[Lease] = []
        while granted := store.claim(owner=name, ttl=TTL, limit=7):
            mine += granted
        return mine

    claimers = [Background(claim, f"worker{number}") for number in range(8)]
    granted = [lease.stream_id for claimer in claimers for lease in claimer.result()]
    assert len(granted) == len(set(granted))
    rest = store.claim(owner="rest", ttl=TTL, limit=160)
    assert len(granted) + len(rest) == 160
    assert observer.scalar("SELECT count(*) FROM lease_grants WHERE fencing_token = 1") == 160
    assert observer.scalar("SELECT count(*) FROM lease_grants") == 160


def test_of_eight_that_acquire_at_once_one_has_the_lease(store: LeaseStore, observer: Observer) -> None:
    for round_number in range(5):
        start = threading.Barrier(8)
        stream = f"new{round_number}"

        def acquire(name: str, start: threading.Barrier = start, stream: str = stream) -> Lease | None:
            start.wait(10)
            return store.acquire(stream, owner=name, ttl=TTL)

        racers = [Background(acquire, f"worker{number}") for number in range(8)]
        winners = [lease for racer in racers if (lease := racer.result())]
        assert [lease.fencing_token for lease in winners] == [1]


def test_registering_at_once_counts_each_stream_once(store: LeaseStore, observer: Observer) -> None:
    start = threading.Barrier(4)

    def register(reverse: bool) -> int:
        start.wait(10)
        names = [f"s{number:03}" for number in range(300)]
        return store.register(reversed(names) if reverse else names)

    counts = [Background(register, bool(number % 2)) for number in range(4)]
    assert sum(count.result() for count in counts) == 300


def test_a_frozen_operator_blocks_nobody_for_long(store: LeaseStore, engine: Engine, observer: Observer) -> None:
    lease = take(store)
    with locking(engine):
        renewal = Background(store.renew, [lease], owner="one", ttl=TTL).result()
        assert renewal.skipped == {"a"}
        with pytest.raises(LeaseHeld, match="nothing was changed"):
            store.expire("a", actor="op", timeout=timedelta(milliseconds=200))
    assert store.renew([lease], owner="one", ttl=TTL).lost == {}
    until(lambda: observer.waiting() == 0, "nobody waits any more")
