"""Worker: real threads and real time, on both engines. What can be decided in virtual time is tried in tests/fleet."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, text

from leases import (
    AsyncLeaseStore,
    AsyncStreamSession,
    Backoff,
    ConfigError,
    Happening,
    Lease,
    LeaseStore,
    Loss,
    OutcomeUnknown,
    SessionRegistry,
    StaleToken,
    StreamSession,
    Worker,
    WorkerEvent,
    fleet,
)
from leases.model import State
from tests.waiting import until

SOON_S = 20.0
QUICK = timedelta(seconds=1)
POLL = timedelta(seconds=0.1)
NO_REST = Backoff(first=timedelta(0), most=timedelta(0))


class Seen:
    """What a worker has told."""

    def __init__(self) -> None:
        self.events: list[WorkerEvent] = []
        self._changed = threading.Condition()

    def __call__(self, happened: WorkerEvent) -> None:
        with self._changed:
            self.events.append(happened)
            self._changed.notify_all()

    def of(self, happening: Happening) -> list[WorkerEvent]:
        return [each for each in self.events if each.happening is happening]

    def wait_for(self, happening: Happening, count: int = 1) -> WorkerEvent:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(happening)) >= count, SOON_S), f"never {happening}"
        return self.of(happening)[count - 1]


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    until(
        lambda: not [each.name for each in threading.enumerate() if each.name.startswith("leases-")],
        f"no thread of a worker is left: {threading.enumerate()}",
    )


def count_up(session: StreamSession) -> timedelta:
    """Write the stream's next number."""
    at = session.checkpoint or 0
    session.append({f"e{at}": at}, checkpoint=at + 1)
    return timedelta(seconds=0.05)


def idle(session: StreamSession) -> timedelta:
    return timedelta(seconds=0.05)


def checkpoint(store: LeaseStore, stream_id: str) -> int:
    found = store.checkpoint(stream_id)
    return 0 if found is None else int(found.checkpoint)


def owners(store: LeaseStore) -> set[str | None]:
    return {info.owner for info in store.list()}


# --- handlers ----------------------------------------------------------------------------------------------------


def test_a_sync_handler_is_called_again_and_again(store: LeaseStore) -> None:
    with Worker(store, count_up, streams=["a", "b"], poll_interval=POLL):
        until(lambda: checkpoint(store, "a") > 3 and checkpoint(store, "b") > 3, "both streams move on")
    assert owners(store) == {None}
    assert store.workers() == []


def test_a_handler_that_wrote_is_called_at_once_and_one_that_did_not_after_the_poll_interval(store: LeaseStore) -> None:
    calls: list[float] = []

    def handle(session: StreamSession) -> None:
        calls.append(time.monotonic())
        if len(calls) <= 5:
            session.append({f"e{len(calls)}": 1})

    with Worker(store, handle, streams=["a"], poll_interval=timedelta(seconds=0.4)):
        until(lambda: len(calls) >= 7, "it is called seven times")
    assert calls[6] - calls[5] >= 0.4


def test_a_sync_handler_may_loop_until_it_is_to_stop(store: LeaseStore) -> None:
    began = threading.Event()
    ended = threading.Event()

    def handle(session: StreamSession) -> None:
        began.set()
        while not session.stopping.wait(0.02):
            count_up(session)
        ended.set()

    with Worker(store, handle, streams=["a"], poll_interval=POLL):
        assert began.wait(SOON_S)
        until(lambda: checkpoint(store, "a") > 3, "it moves on")
        assert not ended.is_set()
    assert ended.is_set()


@pytest.mark.parametrize("kind", ["store", "async store"])
def test_an_async_handler_is_run_as_a_task(url: str, kind: str) -> None:
    loops: set[Any] = set()

    async def handle(session: AsyncStreamSession) -> timedelta:
        loops.add(asyncio.get_running_loop())
        at = await session.checkpoint() or 0
        await session.append({f"e{at}": at}, checkpoint=at + 1)
        await session.save(at + 1)
        return timedelta(seconds=0.02)

    async def main() -> None:
        store: Any = AsyncLeaseStore(url) if kind == "async store" else LeaseStore(url)
        async with Worker(store, handle, streams=["a", "b"], poll_interval=POLL) as worker:
            while not all(session.wrote > 4 for session in worker.sessions.values()) or len(worker.sessions) < 2:
                await asyncio.sleep(0.01)
        assert loops == {asyncio.get_running_loop()}
        closed = store.close()
        if closed is not None:
            await closed

    asyncio.run(asyncio.wait_for(main(), SOON_S))
    with LeaseStore(url) as after:
        assert owners(after) == {None}
        assert checkpoint(after, "a") > 0


def test_an_async_handler_without_a_loop_of_the_callers_has_one_of_the_workers(store: LeaseStore) -> None:
    async def handle(session: AsyncStreamSession) -> None:
        while not session.stopping.is_set():
            await session.append({f"e{session.wrote}": 1})
            with suppress(TimeoutError):
                await asyncio.wait_for(session.until_stopping(), 0.02)

    with Worker(store, handle, streams=["a"], poll_interval=POLL) as worker:
        until(lambda: any(session.wrote > 3 for session in worker.sessions.values()), "it moves on")
    assert owners(store) == {None}


def test_an_async_handler_is_cancelled_when_its_lease_is_lost(store: LeaseStore, seen: Seen) -> None:
    waits, cancelled = threading.Event(), threading.Event()

    async def handle(session: AsyncStreamSession) -> None:
        try:
            waits.set()
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with Worker(store, handle, streams=["a"], poll_interval=POLL, ttl=QUICK, on_event=seen):
        assert waits.wait(SOON_S)
        store.pause("a", actor="op")  # so that it does not come back
        store.expire("a", actor="op")
        assert cancelled.wait(SOON_S)
        # A beat between the operator's two steps finds it expired.
        assert seen.wait_for(Happening.LOST).reason in ("revoked", "expired")


def test_a_blocked_event_loop_costs_no_lease(store: LeaseStore, seen: Seen) -> None:
    blocked = threading.Event()

    async def handle(session: AsyncStreamSession) -> timedelta:
        if session.stream_id == "a" and not blocked.is_set():
            busy_until = time.monotonic() + 3 * QUICK.total_seconds()
            while time.monotonic() < busy_until:  # nothing else on this loop runs meanwhile
                sum(range(1000))
            blocked.set()
        return timedelta(seconds=0.05)

    async def main() -> None:
        async with Worker(store, handle, streams=["a", "b"], poll_interval=POLL, ttl=QUICK, on_event=seen) as worker:
            while not blocked.is_set():
                await asyncio.sleep(0.01)
            assert set(worker.sessions) == {"a", "b"}

    asyncio.run(asyncio.wait_for(main(), SOON_S))
    assert seen.of(Happening.LOST) == []
    assert len(seen.of(Happening.RENEWED)) > 6


def test_a_sync_function_that_returns_a_coroutine_is_told_so(store: LeaseStore, seen: Seen) -> None:
    async def real(session: Any) -> None:
        """Never awaited."""

    def handle(session: StreamSession) -> Any:
        coroutine = real(session)
        coroutine.close()
        return coroutine

    with Worker(store, handle, streams=["a"], poll_interval=POLL, on_event=seen):
        assert "async def" in str(seen.wait_for(Happening.FAILED).reason)


# --- failures ------------------------------------------------------------------------------------------------------


def test_a_failing_handler_rests_its_stream_and_no_other(store: LeaseStore, seen: Seen) -> None:
    def handle(session: StreamSession) -> timedelta:
        if session.stream_id == "bad":
            raise ValueError("poison\0 of line 7")
        return count_up(session)

    backoff = Backoff(first=timedelta(minutes=1), most=timedelta(hours=1))
    with Worker(store, handle, streams=["bad", "good"], poll_interval=POLL, backoff=backoff, on_event=seen):
        assert seen.wait_for(Happening.FAILED).stream_id == "bad"
        until(lambda: checkpoint(store, "good") > 3, "the other stream moves on")
        until(lambda: (info := store.get("bad")) is not None and info.failures == 1, "it is counted")
        info = store.get("bad")
        assert info is not None
        assert (info.owner, info.state, info.last_error) == (None, State.RESTING, "ValueError: poison of line 7")
        assert timedelta(seconds=25) < info.available_at - info.seen_at <= timedelta(minutes=1)
    assert len(seen.of(Happening.FAILED)) == 1


def test_failures_in_a_row_are_counted_and_forgotten_when_the_work_goes_on_well(store: LeaseStore, seen: Seen) -> None:
    calls = 0

    def handle(session: StreamSession) -> timedelta:
        nonlocal calls
        calls += 1
        if calls <= 3:
            raise RuntimeError(f"call {calls}")
        return count_up(session)

    with Worker(store, handle, streams=["a"], poll_interval=POLL, backoff=NO_REST, on_event=seen):
        seen.wait_for(Happening.FAILED, 3)
        until(lambda: checkpoint(store, "a") > 0, "it works")
        until(lambda: (info := store.get("a")) is not None and info.failures == 0, "the failures are forgotten")
        info = store.get("a")
        assert info is not None
        assert info.last_error is None
        assert info.owner is not None


def test_a_handler_that_exits_the_interpreter_ends_only_its_own_run(store: LeaseStore, seen: Seen) -> None:
    def handle(session: StreamSession) -> timedelta:
        if session.stream_id == "a":
            raise SystemExit(3)
        return count_up(session)

    with Worker(store, handle, streams=["a", "b"], poll_interval=POLL, on_event=seen):
        assert "SystemExit" in str(seen.wait_for(Happening.FAILED).reason)
        until(lambda: checkpoint(store, "b") > 3, "the other stream moves on")


def test_a_handler_that_stalls_loses_its_session_and_others_have_the_stream(
    store: LeaseStore, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, let_go = threading.Event(), threading.Event()
    refused: list[StaleToken] = []

    def stalls(session: StreamSession) -> timedelta:
        if session.stream_id != "a":
            return count_up(session)
        stuck.set()
        let_go.wait(SOON_S)
        try:
            store.run(lambda _: None)
            session._registry.log.append(session.lease, {"late": 1})
        except StaleToken as error:
            refused.append(error)
        return timedelta(0)

    backoff = Backoff(first=timedelta(seconds=60), most=timedelta(seconds=60))
    with Worker(
        store, stalls, streams=["a", "b", "c"], poll_interval=POLL, concurrency=1, backoff=backoff,
        stall_timeout=timedelta(seconds=0.3), on_event=seen,
    ):  # fmt: skip
        assert stuck.wait(SOON_S)
        assert seen.wait_for(Happening.STALLED).stream_id == "a"
        assert seen.wait_for(Happening.LOST).reason == "stalled"
        until(lambda: (info := store.get("a")) is not None and info.owner is None, "its lease is released")
        info = store.get("a")
        assert info is not None
        assert info.failures == 1
        assert "stalled" in str(info.last_error)
        # Its thread still hangs; another has taken its place.
        until(lambda: checkpoint(store, "b") > 3 and checkpoint(store, "c") > 3, "the others move on")
        taken = store.acquire("a", owner="other", ttl=QUICK)
        assert taken is not None
        let_go.set()
        until(lambda: refused, "its late write is refused")
    assert any(
        "made no progress for 0.3 s" in record.message and record.levelno >= logging.ERROR for record in caplog.records
    )


def test_progress_is_no_stall(store: LeaseStore, seen: Seen) -> None:
    done = threading.Event()

    def slow(session: StreamSession) -> timedelta:
        if not done.is_set():
            for _ in range(20):
                session.stopping.wait(0.05)
                session.progress()
            done.set()
        return timedelta(seconds=0.05)

    with Worker(store, slow, streams=["a"], poll_interval=POLL, stall_timeout=timedelta(seconds=0.5), on_event=seen):
        assert done.wait(SOON_S)
    assert seen.of(Happening.STALLED) == []


def test_a_handler_is_never_called_twice_at_once_for_one_stream(store: LeaseStore, seen: Seen) -> None:
    inside, most, let_go = 0, 0, threading.Event()
    began = threading.Semaphore(0)
    lock = threading.Lock()

    def handle(session: StreamSession) -> timedelta:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        began.release()
        let_go.wait(SOON_S)
        with lock:
            inside -= 1
        return timedelta(seconds=0.05)

    with Worker(store, handle, streams=["a"], poll_interval=POLL, ttl=QUICK, on_event=seen) as worker:
        assert began.acquire(timeout=SOON_S)
        store.expire("a", actor="op")
        seen.wait_for(Happening.GRANTED, 2)  # it has the stream again, and its older call still runs
        seen.wait_for(Happening.RENEWED, len(seen.of(Happening.RENEWED)) + 2)
        assert most == 1
        let_go.set()
        until(lambda: worker.sessions and most == 1 and began.acquire(timeout=0), "it is called anew")
    assert most == 1


def test_slow_calls_cost_a_worker_its_streams_only_while_they_last(store: LeaseStore) -> None:
    slow = threading.Event()
    slow.set()
    let_go = threading.Event()

    def handle(session: StreamSession) -> timedelta:
        if slow.is_set():
            let_go.wait(SOON_S)
        return timedelta(seconds=0.05)

    streams = [f"s{number}" for number in range(6)]
    with Worker(store, handle, streams=streams, poll_interval=POLL, ttl=QUICK, concurrency=2) as worker:
        until(lambda: worker._planner.capacity == 2, "it takes no more than it can serve")
        slow.clear()
        let_go.set()
        until(lambda: worker._planner.capacity is None and len(worker.sessions) == 6, "it has them all again")


def test_a_loop_that_has_ended_ends_the_worker(store: LeaseStore) -> None:
    async def handle(session: AsyncStreamSession) -> timedelta:
        return timedelta(seconds=0.05)

    async def main() -> Worker:
        worker = Worker(store, handle, streams=["a", "b"], poll_interval=POLL)
        await asyncio.to_thread(lambda: worker.start(loop=loop))
        while len(worker.sessions) < 2:
            await asyncio.sleep(0.01)
        return worker

    loop = asyncio.new_event_loop()
    worker = loop.run_until_complete(main())
    loop.close()
    assert worker.wait(timedelta(seconds=SOON_S))
    assert owners(store) == {None}
    worker.stop()


def test_an_async_handler_may_stop_its_own_worker_without_waiting_for_itself(store: LeaseStore) -> None:
    workers: list[Worker] = []

    async def handle(session: AsyncStreamSession) -> timedelta:
        workers[0].stop()
        return timedelta(0)

    async def main() -> None:
        async with Worker(store, handle, streams=["a"], poll_interval=POLL) as worker:
            workers.append(worker)
            assert await asyncio.to_thread(lambda: worker.wait(timedelta(seconds=SOON_S)))

    asyncio.run(main())
    assert owners(store) == {None}


def test_a_cancellation_of_something_that_a_handler_awaits_is_a_failure_as_any_other(
    store: LeaseStore, seen: Seen
) -> None:
    async def handle(session: AsyncStreamSession) -> timedelta:
        inner = asyncio.ensure_future(asyncio.sleep(1000))
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner
        return timedelta(0)

    backoff = Backoff(first=timedelta(minutes=1), most=timedelta(hours=1))
    with Worker(store, handle, streams=["a"], poll_interval=POLL, backoff=backoff, on_event=seen):
        assert "CancelledError" in str(seen.wait_for(Happening.FAILED).reason)
        until(lambda: (info := store.get("a")) is not None and info.failures == 1, "it is counted")


def test_a_pause_without_end_costs_no_other_stream_its_thread(store: LeaseStore) -> None:
    def handle(session: StreamSession) -> timedelta:
        return timedelta.max if session.stream_id == "a" else count_up(session)

    with Worker(store, handle, streams=["a", "b"], poll_interval=POLL, concurrency=1):
        until(lambda: checkpoint(store, "b") > 3, "the other stream moves on")


def test_a_row_that_somebody_has_locked_does_not_stop_the_planner(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store:
        calls = 0

        def handle(session: StreamSession) -> timedelta:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise ValueError("once")
            return count_up(session)

        with Worker(store, handle, streams=["a"], poll_interval=POLL, backoff=NO_REST) as worker:
            until(lambda: checkpoint(store, "a") > 0 and "a" in worker.sessions, "it works again")
            with store.engine.connect() as connection, connection.begin():
                connection.execute(text("SELECT 1 FROM leases WHERE stream_id = 'a' FOR NO KEY UPDATE"))
                store.register(["b", "c"])
                until(lambda: {"b", "c"} <= set(worker.sessions), "it takes what is free")


# --- the end -------------------------------------------------------------------------------------------------------


def test_draining_lets_each_handler_finish_what_it_has_in_hand(store: LeaseStore) -> None:
    begun = threading.Event()
    finished: list[str] = []

    def handle(session: StreamSession) -> timedelta:
        begun.set()
        session.stopping.wait(SOON_S)
        count_up(session)
        finished.append(session.stream_id)
        return timedelta(0)

    worker = Worker(store, handle, streams=["a", "b"], poll_interval=POLL).start()
    until(lambda: len(worker.sessions) == 2, "it has both")
    until(begun.is_set, "it works")
    worker.stop()
    assert finished
    assert all(checkpoint(store, stream_id) == 1 for stream_id in finished)
    assert owners(store) == {None}


def test_what_does_not_end_in_time_is_let_go(store: LeaseStore, seen: Seen) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def handle(session: StreamSession) -> None:
        begun.set()
        let_go.wait(SOON_S)

    worker = Worker(
        store, handle, streams=["a"], poll_interval=POLL, drain_timeout=timedelta(seconds=0.2), on_event=seen
    ).start()
    assert begun.wait(SOON_S)
    worker.stop()
    assert seen.wait_for(Happening.LOST).reason == "overdue"
    assert owners(store) == {None}
    let_go.set()


def test_stopping_without_drain_waits_for_nobody(store: LeaseStore, seen: Seen) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def handle(session: StreamSession) -> None:
        begun.set()
        let_go.wait(SOON_S)

    worker = Worker(store, handle, streams=["a"], poll_interval=POLL, on_event=seen).start()
    assert begun.wait(SOON_S)
    worker.stop(drain=False)
    assert owners(store) == {None}
    assert store.workers() == []
    let_go.set()


def test_a_handler_may_stop_its_own_worker(store: LeaseStore) -> None:
    workers: list[Worker] = []

    def handle(session: StreamSession) -> timedelta:
        workers[0].stop()
        return timedelta(0)

    worker = Worker(store, handle, streams=["a"], poll_interval=POLL)
    workers.append(worker)
    worker.start()
    assert worker.wait(timedelta(seconds=SOON_S))
    assert owners(store) == {None}


def test_an_operator_drains_a_worker_by_its_row(store: LeaseStore, seen: Seen) -> None:
    with Worker(store, idle, streams=["a", "b"], name="w1", poll_interval=POLL, on_event=seen) as worker:
        until(lambda: len(worker.sessions) == 2, "it has both")
        assert store.drain("w1")
        assert worker.wait(timedelta(seconds=SOON_S))
        assert worker.draining
    assert owners(store) == {None}
    assert not store.drain("w1")
    assert [each.happening for each in seen.events][-1] is Happening.STOPPED


def test_two_workers_of_one_name_are_refused(store: LeaseStore) -> None:
    member = Worker(store, idle, name="w1").registry.keeper.member
    store.enlist(type(member)("w1", "elsewhere", 7, "1", "default"), ttl=timedelta(seconds=60))
    with pytest.raises(ConfigError, match="a worker named 'w1' is alive, pid 7 on elsewhere"):
        Worker(store, idle, name="w1").start()


def test_a_worker_that_has_stopped_is_not_started_again(store: LeaseStore) -> None:
    worker = Worker(store, idle, poll_interval=POLL)
    worker.start()
    worker.start()
    worker.stop()
    worker.stop()
    with pytest.raises(ConfigError, match="has stopped"):
        worker.start()


def test_a_stream_whose_row_is_locked_is_released_as_soon_as_it_is_not(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store:
        worker = Worker(store, idle, streams=["a", "b"], poll_interval=POLL).start()
        until(lambda: len(worker.sessions) == 2, "it has both")
        with store.engine.connect() as connection, connection.begin():
            connection.execute(text("SELECT 1 FROM leases WHERE stream_id = 'a' FOR UPDATE"))
            stopping = threading.Thread(target=worker.stop)
            stopping.start()
            until(lambda: (info := store.get("b")) is not None and info.owner is None, "the other is released")
            assert (info := store.get("a")) is not None
            assert info.owner == worker.name
        stopping.join(SOON_S)
        assert owners(store) == {None}


def test_an_adoption_whose_answer_was_lost_is_made_once_more(
    store: LeaseStore, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.register(["moved"], pool="elsewhere")
    worker = Worker(store, count_up, name="w1", poll_interval=POLL, ttl=QUICK, on_event=seen)
    assert worker.registry.heart is not None
    line = worker.registry.heart.line
    run, lost = line.run, threading.Event()

    def loses(call: Any, **options: Any) -> Any:
        result = run(call, **options)
        if isinstance(result, Lease) and not lost.is_set():
            lost.set()
            raise OutcomeUnknown("the answer to the adoption was lost")
        return result

    monkeypatch.setattr(line, "run", loses)
    with worker:
        until(lambda: worker.health().beat_age is not None, "it beats")
        lease = store.steal("moved", to="w1", ttl=timedelta(minutes=5), actor="op")
        assert seen.wait_for(Happening.GRANTED).fencing_token == lease.fencing_token
        assert lost.is_set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"handler": "not a function"}, "handler"),
        ({"capacity": -1}, "capacity"),
        ({"capacity": True}, "capacity"),
        ({"concurrency": 0}, "concurrency"),
        ({"weight": 0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"poll_interval": timedelta(0)}, "poll_interval"),
        ({"poll_interval": 1}, "poll_interval"),
        ({"stall_timeout": timedelta(seconds=-1)}, "stall_timeout"),
        ({"drain_timeout": timedelta(days=1000)}, "drain_timeout"),
        ({"ttl": timedelta(0)}, "ttl"),
        ({"pool": ""}, "pool"),
        ({"name": "a\0b"}, "owner"),
        ({"streams": "abc"}, "list of texts"),
        ({"streams": ["ok", "not\nok"]}, "stream_id"),
    ],
)
def test_nonsense_is_refused_before_anything_is_sent(sqlite_url: str, options: dict[str, Any], said: str) -> None:
    with LeaseStore(sqlite_url) as store, pytest.raises(ConfigError, match=said):
        Worker(store, options.pop("handler", idle), **options)


# --- streams -------------------------------------------------------------------------------------------------------


def test_a_source_is_asked_again_and_what_it_has_no_more_is_retired(store: LeaseStore, seen: Seen) -> None:
    streams = {"a", "b"}
    with Worker(
        store, idle, streams=lambda: sorted(streams), poll_interval=POLL, discover_every=POLL, on_event=seen
    ) as worker:
        until(lambda: set(worker.sessions) == {"a", "b"}, "it has what there is")
        streams.add("c")
        streams.discard("a")
        until(lambda: set(worker.sessions) == {"b", "c"}, "it has what there is now")
        assert seen.wait_for(Happening.RETIRED).stream_id == "a"
    info = store.get("a")
    assert info is not None
    assert info.state is State.RETIRED


def test_a_source_that_fails_is_asked_again(store: LeaseStore) -> None:
    calls = 0

    def source() -> list[str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError("not there yet")
        return ["a"]

    with Worker(store, idle, streams=source, poll_interval=POLL, discover_every=POLL) as worker:
        until(lambda: set(worker.sessions) == {"a"}, "it has what there is")


def test_a_handler_ends_a_stream_by_retiring_it(store: LeaseStore) -> None:
    def handle(session: StreamSession) -> timedelta:
        count_up(session)
        store.retire([session.stream_id])
        session.close()
        return timedelta(0)

    with Worker(store, handle, streams=["a", "b", "c"], poll_interval=POLL) as worker:
        until(lambda: {info.state for info in store.list()} == {State.RETIRED}, "all are done")
        until(lambda: not worker.sessions, "it has nothing")
    assert [checkpoint(store, each) for each in "abc"] == [1, 1, 1]


def test_a_paused_stream_is_let_go_in_good_order(store: LeaseStore, seen: Seen) -> None:
    with Worker(store, count_up, streams=["a"], poll_interval=POLL, ttl=QUICK, on_event=seen) as worker:
        until(lambda: checkpoint(store, "a") > 0, "it works")
        store.pause("a", actor="op")
        until(lambda: not worker.sessions and owners(store) == {None}, "it has let it go")
        assert seen.of(Happening.LOST) == []
        store.resume("a", actor="op")
        until(lambda: "a" in worker.sessions, "it has it again")


# --- shares --------------------------------------------------------------------------------------------------------


def test_workers_share_by_weight_and_capacity(store: LeaseStore) -> None:
    streams = [f"s{number:02}" for number in range(30)]
    with (
        Worker(store, idle, streams=streams, name="one", poll_interval=POLL) as one,
        Worker(store, idle, name="two", poll_interval=POLL, weight=2) as two,
        Worker(store, idle, name="few", poll_interval=POLL, capacity=3) as few,
    ):
        until(
            lambda: [len(each.sessions) for each in (one, two, few)] == [9, 18, 3],
            "each has its share",
        )
    assert owners(store) == {None}


def test_handlers_that_loop_are_given_no_more_streams_than_there_are_threads(
    store: LeaseStore, caplog: pytest.LogCaptureFixture
) -> None:
    def loops(session: StreamSession) -> None:
        while not session.stopping.wait(0.02):
            session.progress()

    streams = [f"s{number}" for number in range(6)]
    with Worker(store, loops, streams=streams, poll_interval=POLL, ttl=QUICK, concurrency=2) as worker:
        until(lambda: len(worker.sessions) == 2, "it keeps what it can serve")
        with Worker(store, idle, poll_interval=POLL) as other:
            until(lambda: len(other.sessions) == 4, "another has the rest")
    assert any("its capacity is 2 until they end" in record.message for record in caplog.records)


# --- adoption and wake-ups -----------------------------------------------------------------------------------------


def test_a_lease_that_an_operator_moves_to_a_worker_is_adopted(store: LeaseStore, seen: Seen) -> None:
    store.register(["moved"], pool="elsewhere")
    with Worker(store, count_up, name="w1", poll_interval=POLL, ttl=QUICK, on_event=seen) as worker:
        until(lambda: worker.health().beat_age is not None, "it beats")
        lease = store.steal("moved", to="w1", ttl=timedelta(minutes=5), actor="op")
        granted = seen.wait_for(Happening.GRANTED)
        assert (granted.stream_id, granted.fencing_token) == ("moved", lease.fencing_token)
        until(lambda: checkpoint(store, "moved") > 1, "it works on it")
        info = store.get("moved")
        assert info is not None
        assert info.remaining is not None
        assert info.remaining <= QUICK  # renewed first, by the worker's own TTL


def test_a_claim_whose_answer_was_lost_is_adopted(
    store: LeaseStore, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(store, count_up, streams=["a", "b"], name="w1", poll_interval=POLL, ttl=QUICK, on_event=seen)
    run = worker._line.run
    lost: list[int] = []

    def loses(call: Any, **options: Any) -> Any:
        result = run(call, **options)
        if isinstance(result, list) and result and not lost:
            lost.append(len(result))
            raise OutcomeUnknown("the answer to the claim was lost")
        return result

    monkeypatch.setattr(worker._line, "run", loses)
    with worker:
        until(lambda: lost and set(worker.sessions) == {"a", "b"}, "what was granted is found")
        assert {session.token for session in worker.sessions.values()} == {1}


def test_what_an_operator_moves_to_a_worker_stays_there_though_it_has_its_share(store: LeaseStore, seen: Seen) -> None:
    streams = [f"s{number}" for number in range(6)]
    with (
        Worker(store, idle, streams=streams, name="one", poll_interval=POLL, on_event=seen) as one,
        Worker(store, idle, name="two", poll_interval=POLL) as two,
    ):
        until(lambda: len(one.sessions) == len(two.sessions) == 3, "they share")
        moved = next(iter(one.sessions))
        token = store.steal(moved, to="two", ttl=timedelta(seconds=60), actor="op").fencing_token
        until(lambda: len(one.sessions) == len(two.sessions) == 3 and moved in two.sessions, "they share again")
        assert two.sessions[moved].token == token


def test_what_was_lost_is_not_adopted(store: LeaseStore) -> None:
    with Worker(store, idle, streams=["a"], name="w1", poll_interval=POLL) as worker:
        until(lambda: "a" in worker.sessions, "it has it")
        session = worker.sessions["a"]
        token = session.token
        worker.registry.keeper.lose(session.lease, Loss.EXPIRED)
        assert worker.registry.heart is not None
        worker.registry.heart.beat_soon()
        until(lambda: "a" in worker.sessions, "it has it again")
        assert worker.sessions["a"].token == token + 1


def test_a_release_is_picked_up_at_once_where_there_are_notifications(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store:
        store.register(["a"])
        with SessionRegistry(store, owner="first") as registry:
            session = registry.open("a")
            with Worker(store, idle, name="second", poll_interval=timedelta(minutes=10)) as worker:
                until(lambda: worker._planner.view is not None, "it has looked, and found nothing")
                session.close()  # its next poll is minutes away
                until(lambda: "a" in worker.sessions, "it was woken")


def test_when_nothing_happens_a_poll_is_one_statement_and_a_beat_is_one(store: LeaseStore, seen: Seen) -> None:
    statements: list[str] = []
    streams = [f"s{number}" for number in range(5)]

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith(("BEGIN", "PRAGMA", "COMMIT", "LISTEN")):
            statements.append(statement)

    worker = Worker(
        store, lambda _: timedelta(minutes=1), streams=streams, poll_interval=POLL, ttl=QUICK, on_event=seen
    )
    with worker:
        until(lambda: len(worker.sessions) == 5, "it has all")
        beats = len(seen.of(Happening.RENEWED))
        seen.wait_for(Happening.RENEWED, beats + 2)  # what happened has been told by now
        assert worker.registry.heart is not None
        for line in (worker._line, worker.registry.heart.line):
            event.listen(line._engine, "before_cursor_execute", note)
        first = len(seen.of(Happening.RENEWED))
        seen.wait_for(Happening.RENEWED, first + 5)
        counted = list(statements)
        beats = sum("UPDATE leases" in each for each in counted)
        polls = sum("lease_workers JOIN" in each for each in counted)
        assert beats >= 4
        assert polls >= 10
        extra = 2 * beats + 1 if store.url.get_backend_name() == "sqlite" else 0  # one cannot update two tables
        assert len(counted) <= beats + polls + extra


# --- signals, forks, the end of the interpreter: see tests/test_process.py ------------------------------------------


def test_events_tell_all_that_metrics_need(store: LeaseStore, seen: Seen) -> None:
    with Worker(store, count_up, streams=["a"], name="w1", poll_interval=POLL, ttl=QUICK, on_event=seen):
        seen.wait_for(Happening.RENEWED, 2)
        granted = seen.wait_for(Happening.GRANTED)
        assert granted == WorkerEvent(Happening.GRANTED, "w1", "a", 1)
    happened = [each.happening for each in seen.events if each.happening is not Happening.RENEWED]
    assert happened == [
        Happening.STARTED, Happening.GRANTED, Happening.DRAINING, Happening.RELEASED, Happening.STOPPED,
    ]  # fmt: skip


def test_a_listener_that_raises_ends_nothing(store: LeaseStore) -> None:
    def raises(_: WorkerEvent) -> None:
        raise ZeroDivisionError

    with Worker(store, count_up, streams=["a"], poll_interval=POLL, on_event=raises):
        until(lambda: checkpoint(store, "a") > 2, "it works")


def test_what_is_logged_has_its_parts_as_fields(store: LeaseStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leases")
    with Worker(store, idle, streams=["a"], name="w1", poll_interval=POLL) as worker:
        until(lambda: "a" in worker.sessions, "it has it")
    granted = next(record for record in caplog.records if record.message.startswith("granted"))
    assert (granted.__dict__["stream_id"], granted.__dict__["fencing_token"], granted.__dict__["owner"]) == (
        "a",
        1,
        "w1",
    )


def test_rows_of_workers_that_are_long_dead_are_forgotten(store: LeaseStore) -> None:
    def enlist(name: str) -> None:
        member = Worker(store, idle, name=name).registry.keeper.member
        store.enlist(member, ttl=timedelta(milliseconds=10))

    enlist("dead")
    enlist("holds")
    lease = store.acquire("a", owner="holds", ttl=timedelta(milliseconds=10))
    assert lease is not None
    until(lambda: not any(info.live for info in store.workers()), "both are dead")
    store.run(lambda connection: connection.execute(text("UPDATE lease_workers SET lease_count = 0")))
    until(lambda: store.run(lambda connection: fleet.bury(connection, dead_for=timedelta(0))) == 1, "one is forgotten")
    assert [info.worker_id for info in store.workers()] == ["holds"]
