"""Runners: how a worker's handler is called, here on threads, in `tasks` as tasks. They know of no database.

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
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
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
    after: Run | None = None
    """An older run of the same stream, whose call has not returned: this one begins when it has."""
    task: asyncio.Task[None] | None = None
    woken: asyncio.Event | None = None
    """Ends a task's pause. A thread's run has none."""

    @property
    def stopping(self) -> bool:
        return self.session.stopping.is_set()


class Runner(Protocol):
    """What a worker asks of a runner. From any thread; none of these waits for a handler."""

    returned: int
    """How many calls have come to their end by themselves: those of handlers that loop do not."""

    def begin(self, run: Run) -> None: ...
    def stop(self, run: Run) -> None: ...
    def abandon(self, run: Run) -> None: ...
    def starving(self, after_s: float) -> int | None: ...
    def stands_still_s(self) -> float | None: ...
    def owns_this_thread(self) -> bool: ...
    def close(self) -> None: ...


Ended = Callable[[Run], object]


HANDLER_THREAD = "leases-handler"

LONGEST_WAIT_S = 3600.0
"""Threads look again at least so often; a longer wait than the system can count would be an error."""


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
        self._pid = os.getpid()
        self.returned = 0

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
            waited = run.began_s is None
            run.ended = waited
            if self._in_call.pop(run, None) is not None:
                self._threads -= 1
                if self._due and not self._waiting and self._threads < self._limit:
                    self._start_thread()
        if waited:
            self._tell_ended(run)

    def starving(self, after_s: float) -> int | None:
        """How many threads there are, if each has been in one call for so long, and others have waited as long."""
        with self._changed:
            then_s = self._clock() - after_s
            waits = any(due_s <= then_s and not run.ended for due_s, _, run in self._due)
            busy = len(self._in_call) >= self._limit and all(began_s <= then_s for began_s in self._in_call.values())
            return self._limit if waits and busy else None

    def stands_still_s(self) -> float | None:
        return 0.0  # a thread that stands still is seen by its call

    def owns_this_thread(self) -> bool:
        return threading.current_thread().name == HANDLER_THREAD

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
        try:
            threading.Thread(target=self._serve, name=HANDLER_THREAD, daemon=True).start()
        except RuntimeError as error:  # no more to be had now: with the next run it is tried again
            logger.warning("no thread for a handler: %s", error)
        else:
            self._threads += 1

    def _serve(self) -> None:
        while (run := self._next()) is not None:
            after_s = self._call(run)
            with self._changed:
                run.began_s = None
                self.returned += not (run.stopping or run.abandoned)
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
                try:
                    self._changed.wait(None if left_s is None else min(left_s, LONGEST_WAIT_S))
                finally:
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
            if os.getpid() != self._pid:  # a child that the handler has forked: nothing here is its own
                os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
            run.error = error
            return None
