"""The keeper and the sessions: heartbeats, trust, loss. Where a test waits, it waits for an event, with a deadline."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import NullPool, QueuePool

from leases import (
    ConfigError,
    LeaseHeld,
    LeaseLost,
    LeaseStore,
    Loss,
    SchemaOutdated,
    SessionRegistry,
    StaleToken,
    StoreError,
    StreamSession,
    administration,
)
from leases import engine as engines
from leases.line import Line

SOON_S = 10
"""How long a test waits for what must come, before it fails."""

QUICK = timedelta(seconds=1)
TTL = timedelta(seconds=60)
"""So long that nothing happens by itself: the beats of a test are those that it makes."""


class Clock:
    """A worker's clock in the test's hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Seen:
    """What the callbacks were told."""

    def __init__(self) -> None:
        self.lost: list[tuple[str, Loss]] = []
        self.was_lost = threading.Event()
        self.renewals = 0
        self.renewed_thrice = threading.Event()

    def on_lost(self, session: StreamSession, loss: Loss) -> None:
        self.lost.append((session.stream_id, loss))
        self.was_lost.set()

    def on_renewed(self, session: StreamSession) -> None:
        self.renewals += 1
        if self.renewals >= 3:
            self.renewed_thrice.set()


def beat(registry: SessionRegistry) -> None:
    """Send a heartbeat now."""
    assert registry.heart is not None
    registry.keeper.beat(registry.heart.line)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def registry(store: LeaseStore, clock: Clock, seen: Seen) -> Iterator[SessionRegistry]:
    """A registry whose clock stands still, and whose leases are long: nothing happens unless the test makes it."""
    with SessionRegistry(store, owner="me", ttl=TTL, clock=clock, on_lost=seen.on_lost) as opened:
        opened.start()
        assert wait_for(lambda: opened.health().beat_age is not None)  # the next beat by itself is far away
        yield opened


# --- sessions --------------------------------------------------------------------------------------------------


def test_a_session_releases_its_lease_on_the_way_out(registry: SessionRegistry, store: LeaseStore) -> None:
    with registry.open("s") as session:
        held = store.get("s")
        assert held is not None
        assert (held.owner, held.fencing_token) == ("me", session.token)
    after = store.get("s")
    assert after is not None
    assert after.owner is None
    assert registry.sessions == {}


def test_a_session_releases_its_lease_when_the_body_raises(registry: SessionRegistry, store: LeaseStore) -> None:
    def work(session: StreamSession) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), registry.open("s") as session:
        work(session)
    after = store.get("s")
    assert after is not None
    assert after.owner is None


def test_a_stream_is_open_in_one_process_only(registry: SessionRegistry, store: LeaseStore) -> None:
    with SessionRegistry(store, owner="other", ttl=TTL) as other, registry.open("s"):
        assert other.try_open("s") is None
        with pytest.raises(LeaseHeld, match="held by me") as refusal:
            other.open("s")
        assert refusal.value.owner == "me"
        with pytest.raises(LeaseHeld, match="open in this process already"):
            registry.open("s")


def test_waiting_gets_the_stream_when_it_is_released(registry: SessionRegistry, store: LeaseStore) -> None:
    held = registry.open("s")
    with SessionRegistry(store, owner="other", ttl=TTL) as other:
        opened: list[StreamSession] = []
        waiting = threading.Thread(target=lambda: opened.append(other.open("s", wait=timedelta(seconds=SOON_S))))
        waiting.start()
        held.close()
        waiting.join(SOON_S)
        assert opened[0].token == held.token + 1


def test_claiming_opens_sessions_on_what_is_free(registry: SessionRegistry, store: LeaseStore) -> None:
    store.register(["a", "b", "c"])
    claimed = registry.claim(2)
    assert [session.stream_id for session in claimed] == ["a", "b"]
    assert set(registry.sessions) == {"a", "b"}


def test_closing_the_registry_releases_all_and_takes_the_process_off_the_list(store: LeaseStore) -> None:
    registry = SessionRegistry(store, owner="me", ttl=TTL)
    for stream_id in ("a", "b"):
        registry.open(stream_id)
    beat(registry)
    assert [worker.worker_id for worker in store.workers()] == ["me"]
    registry.close()
    registry.close()
    assert [info.owner for info in store.list()] == [None, None]
    assert store.workers() == []
    with pytest.raises(ConfigError, match="closed"):
        registry.open("a")


def test_closing_the_registry_releases_all_in_one_statement(url: str) -> None:
    released: list[str] = []
    updates: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "UPDATE leases" in statement and "last_error" in statement:
            updates.append(statement)

    with LeaseStore(url) as store:
        registry = SessionRegistry(store, ttl=TTL, on_released=lambda session: released.append(session.stream_id))
        store.register(f"s{number}" for number in range(100))
        sessions = registry.claim(100)
        event.listen(store.engine, "before_cursor_execute", note)
        registry.close()
        assert all(session.closed for session in sessions)
        assert {info.owner for info in store.list()} == {None}
    assert len(updates) == 1
    assert sorted(released) == sorted(session.stream_id for session in sessions)


def test_closing_waits_for_locked_rows_when_all_others_are_released(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store, SessionRegistry(store, ttl=TTL) as registry:
        store.register(f"s{number}" for number in range(10))
        sessions = registry.claim(10)
        beat(registry)
        closing = threading.Thread(target=registry.close)
        with store.engine.begin() as connection:
            connection.execute(text("SELECT 1 FROM leases WHERE stream_id IN ('s3', 's7') FOR UPDATE"))
            closing.start()
            assert wait_for(lambda: len([info for info in store.list() if info.owner is None]) == 8)
            assert closing.is_alive()
        closing.join(SOON_S)
        assert not closing.is_alive()
        assert {info.owner for info in store.list()} == {None}
        assert all(session.closed for session in sessions)


def test_closing_waits_for_a_locked_row_no_longer_than_its_lease_lasts(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store:
        registry = SessionRegistry(store, ttl=QUICK)
        store.register(["free", "locked"])
        registry.claim(2)
        with store.engine.begin() as connection:
            connection.execute(text("SELECT 1 FROM leases WHERE stream_id = 'locked' FOR UPDATE"))
            with pytest.raises(StoreError, match="statement timeout"):
                registry.close()
        assert {info.stream_id: info.owner is None for info in store.list()} == {"free": True, "locked": False}
        assert registry.sessions == {}


def test_a_session_appends_and_resumes_at_its_checkpoint(registry: SessionRegistry) -> None:
    with registry.open("s") as session:
        nothing = session.checkpoint
        assert nothing is None
        assert session.append({"e1": 1, "e2": 2}, checkpoint={"position": 2}).count == 2
        assert session.checkpoint == {"position": 2}
    with registry.open("s") as session:
        assert session.checkpoint == {"position": 2}
        session.save({"position": 3})
    with registry.open("s") as session:
        assert session.checkpoint == {"position": 3}


def test_a_fenced_block_commits_as_one_and_is_rolled_back_as_one(registry: SessionRegistry, store: LeaseStore) -> None:
    store.run(lambda connection: connection.execute(text("CREATE TABLE results (n integer PRIMARY KEY)")))

    def count() -> Any:
        return store.run(lambda connection: connection.execute(text("SELECT count(*) FROM results")).scalar_one())

    with registry.open("s") as session:
        with session.fenced() as connection:
            connection.execute(text("INSERT INTO results VALUES (1)"))
        assert count() == 1
        with pytest.raises(IntegrityError), session.fenced() as connection:
            connection.execute(text("INSERT INTO results VALUES (2), (1)"))
        assert count() == 1


def test_a_refused_write_ends_the_session(registry: SessionRegistry, store: LeaseStore, seen: Seen) -> None:
    session = registry.open("s")
    stolen = store.steal("s", to="other", ttl=TTL, actor="operator")
    with pytest.raises(StaleToken) as refusal:
        session.append({"e": 1})
    assert (refusal.value.fencing_token, refusal.value.current_token) == (session.token, stolen.fencing_token)
    assert session.lost.is_set()
    assert seen.was_lost.wait(SOON_S)  # perhaps by a heartbeat: the owner is notified of a steal
    assert seen.lost == [("s", Loss.TAKEN)]
    with pytest.raises(LeaseLost, match="taken"):
        session.append({"e": 1})


def test_a_lost_session_cannot_harm_the_next_grant_of_the_same_owner(
    registry: SessionRegistry, store: LeaseStore
) -> None:
    first = registry.open("s")
    store.expire("s", actor="operator")
    beat(registry)
    second = registry.open("s")
    first.close()
    assert registry.sessions == {"s": second}
    info = store.get("s")
    assert info is not None
    assert (info.owner, info.fencing_token) == ("me", second.token)


# --- heartbeats ------------------------------------------------------------------------------------------------


def expiry(store: LeaseStore, stream_id: str) -> Any:
    info = store.get(stream_id)
    assert info is not None
    return info.expires_at


def test_a_beat_extends_every_lease_and_the_process_itself(registry: SessionRegistry, store: LeaseStore) -> None:
    for stream_id in ("a", "b"):
        registry.open(stream_id)
    beat(registry)
    before = [expiry(store, "a"), expiry(store, "b"), store.workers()[0].expires_at]
    beat(registry)
    after = [expiry(store, "a"), expiry(store, "b"), store.workers()[0].expires_at]
    assert all(later >= earlier for earlier, later in zip(before, after, strict=True))
    assert after != before
    assert store.workers()[0].lease_count == 2


def test_trust_counts_from_before_the_send(
    registry: SessionRegistry, store: LeaseStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = registry.open("s")
    trusted = session.remaining()
    assert trusted < TTL
    assert registry.heart is not None
    run = registry.heart.line.run

    def slow(call: Callable[..., Any], **options: Any) -> Any:
        clock.now_s += 20  # on the way there …
        answer = run(call, **options)
        clock.now_s += 20  # … and back
        return answer

    monkeypatch.setattr(registry.heart.line, "run", slow)
    monkeypatch.setattr(registry.keeper, "_has_row", True)
    beat(registry)
    assert session.remaining() == trusted - timedelta(seconds=40)


def test_a_thawed_process_learns_of_its_loss_at_once(registry: SessionRegistry, clock: Clock, seen: Seen) -> None:
    session = registry.open("s")
    clock.now_s += TTL.total_seconds()
    # No thread has told it yet: it is the look itself that finds out.
    assert session.lost.is_set()
    assert session.remaining() == timedelta(0)
    assert seen.lost == [("s", Loss.EXPIRED)]
    with pytest.raises(LeaseLost, match="expired"):
        session.check()


def test_a_beat_does_not_bring_back_a_session_that_was_lost(registry: SessionRegistry, clock: Clock) -> None:
    session = registry.open("s")
    clock.now_s += TTL.total_seconds()
    registry.keeper.end_overdue()
    beat(registry)
    assert session.loss == Loss.EXPIRED
    assert session.remaining() == timedelta(0)


@pytest.mark.parametrize("loss", [Loss.TAKEN, Loss.REVOKED, Loss.RELEASED])
def test_a_beat_finds_out_why_a_lease_was_lost(
    registry: SessionRegistry, store: LeaseStore, seen: Seen, loss: Loss
) -> None:
    session = registry.open("s")
    if loss == Loss.TAKEN:
        store.steal("s", to="other", ttl=TTL, actor="operator")
    elif loss == Loss.REVOKED:
        store.expire("s", actor="operator")
    else:
        store.release(session.lease)
    beat(registry)
    assert session.lost.is_set()
    assert session.stopping.is_set()
    assert seen.lost == [("s", loss)]


@pytest.mark.parametrize("action", ["pause", "retire"])
def test_a_paused_or_retired_stream_asks_its_session_to_finish(
    registry: SessionRegistry, store: LeaseStore, action: str
) -> None:
    session, other = registry.open("s"), registry.open("t")
    if action == "pause":
        store.pause("s", actor="operator")
    else:
        store.retire(["s"])
    beat(registry)
    assert session.stopping.is_set()
    assert not session.lost.is_set()
    assert session.append({"last": 1}).count == 1
    assert not other.stopping.is_set()


def test_a_locked_row_costs_no_other_lease(postgresql_url: str, clock: Clock) -> None:
    with LeaseStore(postgresql_url) as store, SessionRegistry(store, owner="me", ttl=TTL, clock=clock) as registry:
        locked, free = registry.open("locked"), registry.open("free")
        with store.engine.begin() as connection:
            connection.execute(text("SELECT 1 FROM leases WHERE stream_id = 'locked' FOR UPDATE"))
            before = locked.remaining(), free.remaining()
            clock.now_s += 1
            beat(registry)
            assert locked.remaining() == before[0] - timedelta(seconds=1)
            assert free.remaining() == before[1]
        assert not locked.lost.is_set()
        beat(registry)
        assert locked.remaining() == before[0]


def test_a_child_process_holds_nothing(registry: SessionRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    session = registry.open("s")
    parent = os.getpid()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: parent + 1)
        assert session.remaining() == timedelta(0)
        with pytest.raises(LeaseLost):
            session.append({"e": 1})
        registry.close()  # as it would on the child's way out: the parent's leases stay
    assert session.remaining() > timedelta(0)
    assert session.append({"e": 1}).count == 1


def test_a_session_that_is_opened_anew_before_it_was_lost_is_told(
    registry: SessionRegistry, store: LeaseStore, seen: Seen
) -> None:
    first = registry.open("s")
    store.expire("s", actor="operator")
    second = registry.open("s")  # most often before the heartbeat for which the operator's action asks (PostgreSQL)
    assert first.lost.wait(SOON_S)
    assert first.stopping.wait(SOON_S)
    assert seen.was_lost.wait(SOON_S)
    assert seen.lost in ([("s", Loss.TAKEN)], [("s", Loss.REVOKED)])
    assert registry.sessions == {"s": second}
    assert not second.lost.is_set()


def test_a_locked_worker_row_costs_no_lease(postgresql_url: str, clock: Clock) -> None:
    with LeaseStore(postgresql_url) as store, SessionRegistry(store, owner="me", ttl=TTL, clock=clock) as registry:
        session = registry.open("s")
        assert wait_for(lambda: bool(store.workers()))
        with store.engine.begin() as connection:
            connection.execute(text("SELECT 1 FROM lease_workers FOR UPDATE"))
            before = session.remaining()
            for _ in range(3):
                clock.now_s += 1
                beat(registry)
                assert session.remaining() == before


def test_what_expired_in_a_live_workers_name_returns_to_the_fleet(registry: SessionRegistry, store: LeaseStore) -> None:
    # It was granted in this name, and this process never knew: nobody else may claim a live owner's rows.
    lease = store.acquire("stray", owner="me", ttl=timedelta(milliseconds=10))
    assert lease is not None
    assert wait_for(lambda: not store.get("stray").live)  # type: ignore[union-attr]
    assert store.claim(owner="other", ttl=TTL, limit=1) == []
    for _ in range(3):
        beat(registry)
    claimed = store.claim(owner="other", ttl=TTL, limit=1)
    assert [grant.fencing_token for grant in claimed] == [lease.fencing_token + 1]


def test_a_session_that_is_opened_and_ended_while_a_beat_is_on_its_way_learns_why(
    registry: SessionRegistry, store: LeaseStore, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    def meanwhile() -> float:
        """The beat has listed what it renews, and not yet asked; then it finds the session's row as one it has not."""
        monkeypatch.undo()
        registry.open("s")
        store.run(lambda connection: administration.end_now(connection, "s", must_be_held=True))
        return registry.keeper._clock()

    monkeypatch.setattr(registry.keeper, "_clock", meanwhile)
    beat(registry)
    beat(registry)
    assert seen.lost == [("s", Loss.EXPIRED)]


def test_a_checkpoint_that_cannot_be_stored_leaves_the_session_open(registry: SessionRegistry) -> None:
    session = registry.open("s")
    with pytest.raises(ConfigError, match="checkpoint"):
        session.close(checkpoint={1, 2})
    assert not session.lost.is_set()
    session.close(checkpoint=5)


def test_a_lease_that_comes_after_the_close_is_let_go(registry: SessionRegistry, store: LeaseStore) -> None:
    lease = store.acquire("s", owner="me", ttl=TTL)
    assert lease is not None
    registry.close()
    with pytest.raises(ConfigError, match="closed"):
        registry._opened(lease, 0.0)
    info = store.get("s")
    assert info is not None
    assert info.owner is None


# --- with threads and real time --------------------------------------------------------------------------------


def test_heartbeats_go_on_by_themselves(store: LeaseStore, seen: Seen) -> None:
    with SessionRegistry(store, ttl=QUICK, on_renewed=seen.on_renewed) as registry:
        session = registry.open("s")
        assert seen.renewed_thrice.wait(SOON_S)
        assert not session.lost.is_set()
        age = registry.health().beat_age
        assert age is not None
        assert age < QUICK


def test_an_exhausted_pool_costs_no_lease(url: str, seen: Seen) -> None:
    engine = engines.create_engine(url, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.05)
    store = LeaseStore(engine)
    with SessionRegistry(store, ttl=QUICK, on_renewed=seen.on_renewed, on_lost=seen.on_lost) as registry:
        session = registry.open("s")
        with engine.connect():  # the only one
            assert seen.renewed_thrice.wait(SOON_S)
        assert not session.lost.is_set()
    engine.dispose()


@contextmanager
def everything_locked(url: str) -> Iterator[None]:
    """Another session's transaction, in which no heartbeat can pass."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.execute(text("LOCK TABLE leases IN EXCLUSIVE MODE"))
        yield
        connection.rollback()


def test_a_session_is_lost_in_time_while_the_heartbeat_hangs(store: LeaseStore, url: str, seen: Seen) -> None:
    with SessionRegistry(store, ttl=QUICK, on_lost=seen.on_lost) as registry:
        session = registry.open("s")
        with everything_locked(url):
            assert seen.was_lost.wait(SOON_S)
            assert session.loss == Loss.EXPIRED
            assert registry.health().leases == 0
        renewed = registry.open("s", wait=timedelta(seconds=SOON_S))
        assert renewed.token > session.token


def test_the_deadline_needs_no_heartbeat_that_comes_back(
    store: LeaseStore, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()

    def hangs(*_: object, **__: object) -> object:
        let_go.wait(SOON_S)
        raise StoreError("it was let go")

    with SessionRegistry(store, ttl=QUICK, on_lost=seen.on_lost) as registry:
        session = registry.open("s")
        assert registry.heart is not None
        monkeypatch.setattr(registry.heart.line, "run", hangs)  # and nothing can be cut
        try:
            assert seen.was_lost.wait(SOON_S - 2)
            assert session.loss == Loss.EXPIRED
        finally:
            let_go.set()


def test_a_heartbeat_that_hangs_is_cut_and_the_next_one_passes(postgresql_url: str, seen: Seen) -> None:
    with LeaseStore(postgresql_url) as store, SessionRegistry(store, ttl=QUICK, on_lost=seen.on_lost) as registry:
        registry.open("s")
        with everything_locked(postgresql_url):
            # Nobody lets it through; that it has an end at all is the watch's work.
            assert wait_for(lambda: registry.health().failures >= 1)
            assert seen.was_lost.wait(SOON_S)
        session = registry.open("s", wait=timedelta(seconds=SOON_S))
        assert wait_for(lambda: registry.health().failures == 0 and session.remaining() > QUICK / 2)


def test_the_heartbeat_survives_the_end_of_its_connection(postgresql_url: str, seen: Seen) -> None:
    with LeaseStore(postgresql_url) as store:
        with SessionRegistry(store, ttl=QUICK, on_renewed=seen.on_renewed, on_lost=seen.on_lost) as registry:
            registry.open("s")
            assert wait_for(lambda: registry.health().beat_age is not None)
            with store.engine.begin() as connection:
                connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
            seen.renewals = 0
            seen.renewed_thrice.clear()
            assert seen.renewed_thrice.wait(SOON_S)
            assert seen.lost == []


def test_a_callback_that_raises_ends_no_heartbeat(store: LeaseStore, seen: Seen) -> None:
    def raises(session: StreamSession) -> None:
        seen.on_renewed(session)
        raise ZeroDivisionError

    with SessionRegistry(store, ttl=QUICK, on_renewed=raises) as registry:
        session = registry.open("s")
        assert seen.renewed_thrice.wait(SOON_S)
        assert not session.lost.is_set()


def wait_for(condition: Callable[[], bool]) -> bool:
    """Poll until a condition holds; False if it does not within SOON_S."""
    pause = threading.Event()
    for _ in range(SOON_S * 50):
        if condition():
            return True
        pause.wait(0.02)
    return False


def test_a_heartbeat_that_fails_in_an_unforeseen_way_is_followed_by_the_next(
    store: LeaseStore, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SessionRegistry(store, ttl=QUICK, on_renewed=seen.on_renewed) as registry:
        keep_on, failed = registry.keeper.beat, threading.Event()

        def fails_once(line: Line) -> None:
            if not failed.is_set():
                failed.set()
                raise RuntimeError("can't start new thread")
            keep_on(line)

        monkeypatch.setattr(registry.keeper, "beat", fails_once)
        registry.open("s")
        assert failed.wait(SOON_S)
        assert seen.renewed_thrice.wait(SOON_S)


def test_the_heartbeat_connects_only_when_the_dialect_is_complete(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The keeper's pool shares the dialect with the caller's, and SQLAlchemy completes it with the first connection.
    with LeaseStore(postgresql_url) as store:
        dialect = store.engine.dialect
        initialize = dialect.initialize
        beside: list[str] = []

        def watched(connection: Any) -> None:
            beside.extend(thread.name for thread in threading.enumerate())
            initialize(connection)

        monkeypatch.setattr(dialect, "initialize", watched)
        with SessionRegistry(store, ttl=QUICK) as registry:
            registry.open("s")
        assert beside
        assert "leases-beat" not in beside


def test_a_registry_on_a_database_without_tables_says_so_at_once(empty_postgresql_url: str) -> None:
    with LeaseStore(empty_postgresql_url) as store, SessionRegistry(store) as registry:
        with pytest.raises(SchemaOutdated, match="leases migrate"):
            registry.open("s")


def test_a_registry_closes_also_when_nothing_can_be_written(postgresql_url: str, seen: Seen) -> None:
    with LeaseStore(postgresql_url) as store:
        registry = SessionRegistry(store, ttl=3 * QUICK, on_renewed=seen.on_renewed)
        failures: list[str] = []

        def close() -> None:
            try:
                registry.close()
            except StoreError as error:
                failures.append(str(error))

        closing = threading.Thread(target=close)
        try:
            registry.open("s")
            with everything_locked(postgresql_url):
                closing.start()
                closing.join(SOON_S)
                assert not closing.is_alive()
        finally:
            registry.close()  # else its threads are with the tests that follow
        assert "statement timeout" in failures[0]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("leases-")]
