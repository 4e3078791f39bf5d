"""A worker's handlers, on threads and as tasks."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from leases import AsyncLeaseStore, AsyncStreamSession, Happening, LeaseStore, StreamSession, Worker
from tests.waiting import until
from tests.worker.helpers import POLL, QUICK, SOON_S, Seen, checkpoint, count_up, owners


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
