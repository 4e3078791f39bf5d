"""A worker whose handlers fail, stall, exit, or stand in each other's way."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import timedelta

import pytest
from sqlalchemy import text

from leases import AsyncStreamSession, Backoff, Happening, LeaseStore, StaleToken, StreamSession, Worker, WorkerEvent
from leases.model import State
from leases.runner import Run
from tests.waiting import until
from tests.worker.helpers import NO_REST, POLL, QUICK, SOON_S, Seen, checkpoint, count_up, owners


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


def test_nor_is_it_where_the_stream_is_had_again_before_its_loss_is_known(store: LeaseStore, seen: Seen) -> None:
    inside, most, let_go, again = 0, 0, threading.Event(), threading.Event()
    lock = threading.Lock()

    def handle(session: StreamSession) -> timedelta:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        let_go.wait(SOON_S)
        with lock:
            inside -= 1
        return timedelta(seconds=0.05)

    def hear(event: WorkerEvent) -> None:
        seen(event)
        if event.happening is Happening.GRANTED and len(seen.of(Happening.GRANTED)) == 2:
            again.set()
        if event.happening is Happening.LOST and threading.current_thread().name != "leases-plan":
            assert again.wait(SOON_S)  # the heartbeat has found it, and the planner is faster

    with Worker(store, handle, streams=["a"], poll_interval=POLL, ttl=QUICK, on_event=hear) as worker:
        until(lambda: inside == 1, "it is called")
        store.expire("a", actor="op")
        assert again.wait(SOON_S)
        seen.wait_for(Happening.LOST)
        seen.wait_for(Happening.RENEWED, len(seen.of(Happening.RENEWED)) + 2)
        assert most == 1
        let_go.set()
        until(lambda: worker.sessions, "it has it")
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


class Starving:
    """A runner that says of its one thread that it has been in one call for long, while others wait."""

    returned = 0

    def begin(self, run: Run) -> None: ...
    def stop(self, run: Run) -> None: ...
    def abandon(self, run: Run) -> None: ...
    def close(self) -> None: ...

    def starving(self, after_s: float) -> int | None:
        return 1

    def stands_still_s(self) -> float | None:
        return 0.0

    def owns_this_thread(self) -> bool:
        return False


@pytest.mark.parametrize(("step_s", "capacity"), [(0.2, 1), (4.0, None)], ids=["awake", "stood still"])
def test_a_worker_that_stood_still_does_not_take_the_pause_for_calls_that_last(
    store: LeaseStore, monkeypatch: pytest.MonkeyPatch, step_s: float, capacity: int | None
) -> None:
    worker = Worker(store, print, poll_interval=POLL, ttl=QUICK)
    planner, now_s = worker._planner, worker.registry.now_s()
    monkeypatch.setattr(worker.registry, "now_s", lambda: now_s)
    planner.runs.runner = Starving()
    worker.registry.keeper.beat(worker._line)
    for _ in range(int(4.0 / step_s)):  # four TTLs, with a look at each step
        planner.tick()
        now_s += step_s
    planner.tick()
    assert planner.capacity == capacity
    worker._line.close()
