"""Runners: how a worker's handler is called, on threads or as tasks. They know of sessions, and of no database.

A handler is called with its session again and again, one call at a time, until the session is to stop:

                    ┌──── returned: after a pause ────┐
    begin ──> waiting ──> in a call ─────────────────┘──> ended (`ended` is told, once)
                 └─ stop ─────┴─ stop: when the call has returned; or it raised ──> ended

One that loops until `session.stopping` is a handler whose one call lasts. `abandon` gives a call up that does not end:
a task is cancelled, a thread cannot be; another one takes its place, and it ends when its call does.

The pause: none if the call has written something, `idle_s` if not; or what the handler returns, a `timedelta`.
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
import itertools
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from leases.session import StreamSession
from leases.trust import Clock, monotonic

logger = logging.getLogger("leases")

Handler = Callable[[Any], Any]
"""`def` or `async def`, of a `StreamSession` or an `AsyncStreamSession`."""


@dataclass(eq=False, slots=True)
class Run:
    """The work on one session. `began_s` is when the call that is running began, None between two calls."""

    session: StreamSession
    began_s: float | None = None
    calls: int = 0
    ended: bool = False
    abandoned: bool = False
    error: BaseException | None = None
    stop_by_s: float | None = None
    recovered: bool = False
    task: asyncio.Task[None] | None = None
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def stopping(self) -> bool:
        return self.session.stopping.is_set()


class Runner(Protocol):
    """What a worker asks of a runner. From any thread; none of these waits for a handler."""

    def begin(self, run: Run) -> None: ...
    def stop(self, run: Run) -> None: ...
    def abandon(self, run: Run) -> None: ...
    def starving(self, after_s: float) -> int | None: ...
    def close(self) -> None: ...


Ended = Callable[[Run], object]


def is_async(handler: Handler) -> bool:
    """Whether a handler is to be run as tasks."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)


def pause_s(answer: object, wrote: bool, idle_s: float) -> float:
    """How long to wait until the next call."""
    if isinstance(answer, timedelta):
        return max(0.0, answer.total_seconds())
    return 0.0 if wrote else idle_s


class ThreadRunner:
    """Calls a sync handler on up to `threads` threads: those sessions first that have waited longest."""

    def __init__(
        self, handler: Handler, ended: Ended, *, threads: int, idle_s: float, clock: Clock = monotonic
    ) -> None:
        self._handler = handler
        self._tell_ended = ended
        self._idle_s = idle_s
        self._clock = clock
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Run]] = []
        self._number = itertools.count()
        self._limit = threads
        self._threads = 0
        self._waiting = 0
        self._in_call: dict[Run, float] = {}
        self._closed = False

    def begin(self, run: Run) -> None:
        with self._changed:
            self._queue(run, 0.0)
            if not self._waiting and self._threads < self._limit:
                self._start_thread()

    def stop(self, run: Run) -> None:
        """End a run: now if it waits, else when its call has returned."""
        with self._changed:
            if run.ended or run.began_s is not None:
                return
            run.ended = True
        self._tell_ended(run)

    def abandon(self, run: Run) -> None:
        """Give up a call that does not end: its thread is not counted any more."""
        with self._changed:
            if run.ended or run.abandoned:
                return
            run.abandoned = True
            if run.began_s is None:
                run.ended = True
            elif self._in_call.pop(run, None) is not None:
                self._threads -= 1
                if self._due and not self._waiting and self._threads < self._limit:
                    self._start_thread()

    def starving(self, after_s: float) -> int | None:
        """How many threads there are, if each has been in one call for so long, and others have waited as long."""
        with self._changed:
            then_s = self._clock() - after_s
            waits = any(due_s <= then_s and not run.ended for due_s, _, run in self._due)
            busy = len(self._in_call) >= self._limit and all(began_s <= then_s for began_s in self._in_call.values())
            return self._limit if waits and busy else None

    def close(self) -> None:
        """Call nobody any more; threads end when their calls do."""
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify_all()

    def _queue(self, run: Run, after_s: float) -> None:
        heapq.heappush(self._due, (self._clock() + after_s, next(self._number), run))
        self._changed.notify()

    def _start_thread(self) -> None:
        self._threads += 1
        threading.Thread(target=self._serve, name="leases-handler", daemon=True).start()

    def _serve(self) -> None:
        while (run := self._next()) is not None:
            after_s = self._call(run)
            with self._changed:
                run.began_s = None
                mine = self._in_call.pop(run, None) is not None
                if run.abandoned or after_s is None or run.stopping or self._closed:
                    over, run.ended = not run.ended, True
                else:
                    over = False
                    self._queue(run, after_s)
            if over:
                self._tell_ended(run)
            if not mine:  # another thread has taken this one's place
                return

    def _next(self) -> Run | None:
        """Wait for a run whose time has come, and begin its call; None when this thread is to end."""
        with self._changed:
            while not self._closed:
                while self._due and self._due[0][2].ended:
                    heapq.heappop(self._due)
                left_s = self._due[0][0] - self._clock() if self._due else None
                if left_s is not None and left_s <= 0:
                    run = heapq.heappop(self._due)[2]
                    run.began_s = self._in_call[run] = self._clock()
                    run.calls += 1
                    if self._due and not self._waiting and self._threads < self._limit:
                        self._start_thread()
                    return run
                self._waiting += 1
                self._changed.wait(left_s)
                self._waiting -= 1
            self._threads -= 1
            return None

    def _call(self, run: Run) -> float | None:
        """Call the handler; return the pause until the next call, or None if it has raised."""
        wrote = run.session.wrote
        try:
            if run.stopping:
                return 0.0
            answer = self._handler(run.session)
            if inspect.isawaitable(answer):
                raise TypeError("the handler returned an awaitable; write it as `async def`")
            return pause_s(answer, run.session.wrote > wrote, self._idle_s)
        except BaseException as error:  # noqa: BLE001  # also SystemExit: it ends this run, and no other
            run.error = error
            return None


class TaskRunner:
    """Runs an async handler's calls as tasks: on the loop of the caller's program, or on one of its own."""

    def __init__(
        self,
        handler: Handler,
        ended: Ended,
        *,
        wrap: Callable[[StreamSession], object],
        calls: int | None,
        idle_s: float,
        loop: asyncio.AbstractEventLoop | None = None,
        clock: Clock = monotonic,
    ) -> None:
        self._handler: Callable[[Any], Awaitable[object]] = handler
        self._tell_ended = ended
        self._wrap = wrap
        self._calls = calls
        self._idle_s = idle_s
        self._clock = clock
        self._turns = asyncio.Semaphore(calls) if calls is not None else None
        self._in_call: dict[Run, float] = {}
        self._thread: threading.Thread | None = None
        if loop is None:
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=loop.run_forever, name="leases-loop", daemon=True)
            self._thread.start()
        self._loop = loop

    def begin(self, run: Run) -> None:
        self._soon(lambda: self._start(run))

    def stop(self, run: Run) -> None:
        """End a run: now if it waits, else when its call has returned."""
        self._soon(run.woken.set)

    def abandon(self, run: Run) -> None:
        """Cancel a run's call."""
        run.abandoned = True

        def cancel() -> None:
            if run.task is not None:
                run.task.cancel()

        self._soon(cancel)

    def starving(self, after_s: float) -> int | None:
        """How many calls there may be, if each has lasted for so long."""
        then_s = self._clock() - after_s
        lasting = [began_s for began_s in list(self._in_call.values()) if began_s <= then_s]
        return self._calls if self._calls is not None and len(lasting) >= self._calls else None

    def close(self) -> None:
        """Cancel what still runs; end the loop, if it is ours. One that is blocked is left alone."""
        if self._thread is None:
            return

        async def end() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._loop.stop()

        self._soon(lambda: setattr(self, "_end", self._loop.create_task(end())))
        if self._thread is not threading.current_thread():
            self._thread.join(1)
            if not self._thread.is_alive():
                self._loop.close()

    def _soon(self, call: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it all that ran on it
            self._loop.call_soon_threadsafe(call)

    def _start(self, run: Run) -> None:
        run.task = self._loop.create_task(self._drive(run), name=f"leases {run.session.stream_id}")

    async def _drive(self, run: Run) -> None:
        given = self._wrap(run.session)
        try:
            while not (run.stopping or run.abandoned):
                after_s = await self._call_in_turn(run, given)
                if after_s > 0 and not run.stopping:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(run.woken.wait(), after_s)
                else:
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            pass  # abandoned, or the loop ends
        except BaseException as error:  # noqa: BLE001  # it ends this run, and no other
            run.error = error
        finally:
            run.began_s, run.ended = None, True
            self._tell_ended(run)

    async def _call_in_turn(self, run: Run, given: object) -> float:
        if self._turns is None:
            return await self._call(run, given)
        async with self._turns:
            return await self._call(run, given)

    async def _call(self, run: Run, given: object) -> float:
        if run.stopping:
            return 0.0
        wrote = run.session.wrote
        run.began_s = self._in_call[run] = self._clock()
        run.calls += 1
        try:
            answer = await self._handler(given)
        finally:
            run.began_s = None
            del self._in_call[run]
        return pause_s(answer, run.session.wrote > wrote, self._idle_s)
