"""The runner of async handlers: each session's work is a task, on the caller's event loop or on the worker's own.

A loop that a handler blocks costs no lease, for heartbeats have a thread of their own. It is found out all the same:
the worker asks it for an answer now and then. A loop that has ended ends the worker.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from leases.runner import Ended, Handler, Run, pause_s
from leases.session import StreamSession
from leases.trust import Clock, monotonic


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
        self._waiting: dict[Run, float] = {}
        self._asked_at_s: float | None = None
        self._over = False
        self.returned = 0
        self._thread: threading.Thread | None = None
        if loop is None:
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=loop.run_forever, name="leases-loop", daemon=True)
            self._thread.start()
        self._loop = loop

    def begin(self, run: Run) -> None:
        run.woken = asyncio.Event()
        if not self._soon(lambda: self._start(run)):
            self._finish(run, RuntimeError("the event loop of the handlers has ended"))

    def stop(self, run: Run) -> None:
        """End a run: now if it waits, else when its call has returned."""
        if run.woken is not None:
            self._soon(run.woken.set)

    def abandon(self, run: Run) -> None:
        """Cancel a run's call."""
        run.abandoned = True

        def cancel() -> None:
            if run.task is not None:
                run.task.cancel()

        self._soon(cancel)

    def starving(self, after_s: float) -> int | None:
        """How many calls there may be, if each has lasted for so long, and others have waited as long."""
        then_s = self._clock() - after_s
        lasting = sum(began_s <= then_s for began_s in list(self._in_call.values()))
        waits = any(since_s <= then_s for since_s in list(self._waiting.values()))
        return self._calls if waits and self._calls is not None and lasting >= self._calls else None

    def stands_still_s(self) -> float | None:
        """How long the loop has not answered; None if it has ended. Asks once more, where it has answered."""
        if self._over or self._loop.is_closed():
            return None
        asked_at_s = self._asked_at_s
        if asked_at_s is not None:
            return self._clock() - asked_at_s
        self._asked_at_s = self._clock()
        self._soon(self._answer)
        return 0.0

    def _answer(self) -> None:
        self._asked_at_s = None

    def owns_this_thread(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

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

    def _soon(self, call: Callable[[], object]) -> bool:
        """Call something on the loop; False if the loop has ended, and with it all that ran on it."""
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            self._over = True
        return not self._over

    def _start(self, run: Run) -> None:
        assert run.woken is not None
        run.task = self._loop.create_task(self._drive(run, run.woken), name=f"leases {run.session.stream_id}")
        # Told by the task's end, not by its last line: one that is cancelled before its first has none.
        run.task.add_done_callback(lambda task: self._finish(run, None if task.cancelled() else task.exception()))

    def _finish(self, run: Run, error: BaseException | None) -> None:
        run.error = run.error or error
        run.began_s, run.ended = None, True
        self._tell_ended(run)

    async def _drive(self, run: Run, woken: asyncio.Event) -> None:
        given = self._wrap(run.session)
        try:
            while not (run.stopping or run.abandoned):
                after_s = await self._call_in_turn(run, given)
                if after_s > 0 and not run.stopping:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(woken.wait(), after_s)
                else:
                    await asyncio.sleep(0)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if not (run.abandoned or run.stopping or (task is not None and task.cancelling())):
                run.error = error  # of something that the handler awaited: a failure as any other
        except BaseException as error:  # noqa: BLE001  # it ends this run, and no other
            run.error = error

    async def _call_in_turn(self, run: Run, given: object) -> float:
        if self._turns is None:
            return await self._call(run, given)
        self._waiting[run] = self._clock()
        try:
            await self._turns.acquire()
        finally:
            del self._waiting[run]
        try:
            return await self._call(run, given)
        finally:
            self._turns.release()

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
        self.returned += not run.stopping
        return pause_s(answer, run.session.wrote > wrote, self._idle_s)
