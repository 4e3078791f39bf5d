"""The runs of a worker: the work on each of its sessions, from its grant to its release. No threads of its own.

    granted ──> begun ─────────────────────────> ended ──> owed ──> released
                  ├─ asked to end (shed, drained, paused) ─┘ │
                  ├─ lost: given up at once ───────────────┘ │
                  └─ stalls, or does not end when asked ─────┘  told loudly; its writes are refused by the fence

Nothing is released while its work still runs, with two exceptions: a handler that makes no progress for longer than
`stall_timeout`, and one that does not end within `drain_timeout`. Of a stream that comes back while an older call of it
still runs, the work begins when that call has returned: never two at once.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

from leases.backoff import Backoff
from leases.line import Line
from leases.model import Ending, Happening, Loss
from leases.registry import SessionRegistry, fields
from leases.runner import Run, Runner
from leases.session import StreamSession

logger = logging.getLogger("leases")

RELEASE_AGAIN_S = 0.02
"""How soon a release is tried again whose row was locked: most often by the worker's own heartbeat, for a moment."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a worker works: durations in seconds."""

    poll_s: float
    drain_s: float
    stall_s: float | None
    discover_s: float
    capacity: int | None
    backoff: Backoff


class Tell(Protocol):
    """Told what has happened to a session."""

    def __call__(self, happening: Happening, session: StreamSession, *, reason: str | None = None) -> None: ...


class Runs:
    """The runs of one worker. `granted`, `stopping`, `lost` and `ended` may be called from any thread."""

    def __init__(
        self,
        registry: SessionRegistry,
        line: Line,
        terms: Terms,
        *,
        tell: Tell,
        wake: Callable[[], object],
        dice: random.Random,
    ) -> None:
        self.runner: Runner
        self.draining = False
        self._registry = registry
        self._line = line
        self._terms = terms
        self._tell = tell
        self._wake = wake
        self._dice = dice
        self._lock = threading.Lock()
        self._runs: dict[StreamSession, Run] = {}
        self._ended: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._owed: dict[StreamSession, Ending] = {}
        self._latest: dict[str, Run] = {}
        """Of each stream the run that was granted last, until its work has ended: it may outlast its session."""
        self._enforce_at_s = math.inf if terms.stall_s is None else registry.now_s()

    # --- what there is ---------------------------------------------------------------------------------------------

    @property
    def working(self) -> int:
        """How many sessions there are whose work has not ended; without those that are lost."""
        with self._lock:
            return sum(not run.abandoned for run in self._runs.values())

    @property
    def done(self) -> bool:
        """Whether everything has been let go."""
        return not self.working and not self._owed

    def all(self) -> list[Run]:
        """The runs that have not been collected."""
        with self._lock:
            return list(self._runs.values())

    def next_at_s(self, now_s: float) -> float:
        """When there is something to settle, if nothing happens."""
        return min(self._enforce_at_s, now_s + RELEASE_AGAIN_S) if self._owed else self._enforce_at_s

    # --- what happens elsewhere, on any thread -----------------------------------------------------------------------

    def granted(self, session: StreamSession) -> None:
        """Hear of a new session: its work begins."""
        run = Run(session)
        now_s = self._registry.now_s()
        with self._lock:
            # Of an earlier grant the call may still run, be it that its loss is not known yet: never two at once.
            older = self._latest.get(session.stream_id)
            if older is not None and not older.ended and not self.draining:
                run.after = older
                run.stop_by_s = now_s + self._terms.drain_s  # nobody waits for ever
                self._enforce_at_s = min(self._enforce_at_s, run.stop_by_s)
            self._runs[session] = self._latest[session.stream_id] = run
            begins = run.after is None
        self._tell(Happening.GRANTED, session)
        if self.draining:
            session.stop()
        if begins:
            self.runner.begin(run)
        if self.draining:
            self.ask_to_end(run, now_s)

    def stopping(self, session: StreamSession) -> None:
        """Hear that a session is to end in good order: its stream was paused or retired."""
        run = self._runs.get(session)
        if run is not None:
            self.ask_to_end(run, self._registry.now_s())
            self._wake()

    def lost(self, session: StreamSession, loss: Loss) -> None:
        """Hear that a session is lost: its work is to end at once."""
        self._tell(Happening.LOST, session, reason=str(loss))
        run = self._runs.get(session)
        if run is not None:
            if loss is Loss.STALLED:  # nobody waits for that one
                with self._lock:
                    self._forget(run)
            self.runner.abandon(run)
            if run.after is not None:
                self.ended(run)  # it was never begun
        self._wake()

    def ended(self, run: Run) -> None:
        """Hear from the runner that a session's work has ended."""
        with self._lock:
            waiting = self._latest.get(run.session.stream_id)
            if waiting is None or waiting.after is not run:
                waiting = None
                self._forget(run)
            elif run.after is not None and not run.after.ended:  # this one was never begun
                waiting.after, waiting = run.after, None
            else:
                waiting.after = waiting.stop_by_s = None
        if waiting is not None:
            self.runner.begin(waiting)
        self._ended.put(run)
        self._wake()

    def _forget(self, run: Run) -> None:
        if self._latest.get(run.session.stream_id) is run:
            del self._latest[run.session.stream_id]

    # --- settle ----------------------------------------------------------------------------------------------------

    def settle(self, now_s: float) -> bool:
        """Release what has ended, and what is to be given up; whether anything was to be released."""
        self._collect()
        if now_s >= self._enforce_at_s:
            self._enforce(now_s)
        if not self._owed:
            return False
        locked = self._registry.release_on(self._line, self._owed)
        self._owed = {session: self._owed[session] for session in locked}
        return True

    def _collect(self) -> None:
        """Owe a release to what has ended."""
        while True:
            try:
                run = self._ended.get_nowait()
            except queue.Empty:
                break
            with self._lock:
                known = self._runs.pop(run.session, None)
            if known is not None:  # not one that was given up, and has been released
                self._owe(run, run.error)

    def _owe(self, run: Run, error: BaseException | None) -> None:
        session = run.session
        if error is None or session.loss is not None:
            # Of a session that is lost, an error is what was to be expected.
            self._owed.setdefault(session, Ending(session.lease))
            return
        failures = 0 if run.recovered else session.lease.failures
        said = _said(error)
        rest = self._terms.backoff.after(failures, self._dice.random)
        self._owed.setdefault(session, Ending(session.lease, rest, said))
        self._tell(Happening.FAILED, session, reason=said)
        logger.error(
            "the handler failed on %s, which rests for %.1f s", session.stream_id, rest.total_seconds(),
            exc_info=error, extra=fields(session.lease),
        )  # fmt: skip

    def _enforce(self, now_s: float) -> None:
        """End the sessions of handlers that stall, or that were asked to end and have not."""
        with self._lock:
            runs = [run for run in self._runs.values() if not (run.abandoned or run.ended)]
            asked = [run.stop_by_s for run in runs if run.stop_by_s is not None and run.stop_by_s > now_s]
            stall_s = self._terms.stall_s
            self._enforce_at_s = min([math.inf if stall_s is None else now_s + stall_s / 4, *asked])
        for run in runs:
            if run.stop_by_s is not None and now_s >= run.stop_by_s:
                self._give_up(run, Loss.OVERDUE, f"did not end within {self._terms.drain_s:g} s")
            elif self._stalls(run, now_s):
                self._give_up(run, Loss.STALLED, f"made no progress for {self._terms.stall_s:g} s")

    def _stalls(self, run: Run, now_s: float) -> bool:
        if self._terms.stall_s is None:
            return False
        began_s = run.began_s
        if began_s is None:  # it waits; for ever, if the loop that is to run it stands still
            return min(now_s - run.session.moved_at_s, self.runner.stands_still_s() or 0.0) > self._terms.stall_s
        return now_s - max(began_s, run.session.moved_at_s) > self._terms.stall_s

    def _give_up(self, run: Run, loss: Loss, why: str) -> None:
        session = run.session
        logger.error(
            "the handler of %s %s: its session is lost, and its lease released", session.stream_id, why,
            extra=fields(session.lease),
        )  # fmt: skip
        stalled = loss is Loss.STALLED
        if stalled:
            self._tell(Happening.STALLED, session, reason=why)
        rest = self._terms.backoff.after(session.lease.failures, self._dice.random) if stalled else timedelta(0)
        self._owed[session] = Ending(session.lease, rest, f"stalled: {why}" if stalled else None)
        self._registry.keeper.lose(session.lease, loss)
        self.runner.abandon(run)
        with self._lock:
            self._runs.pop(session, None)

    # --- asked to end ------------------------------------------------------------------------------------------------

    def ask_to_end(self, run: Run, now_s: float) -> None:
        """Let a run end in good order, within the drain timeout. A second call is harmless."""
        run.session.stop()
        with self._lock:
            if run.stop_by_s is None:
                run.stop_by_s = now_s + self._terms.drain_s
                self._enforce_at_s = min(self._enforce_at_s, run.stop_by_s)
        self.runner.stop(run)
        if run.after is not None:
            self.ended(run)  # it was never begun

    def drain(self, now_s: float) -> None:
        """Ask all to end, and whatever comes from now on."""
        self.draining = True
        for run in self.all():
            self.ask_to_end(run, now_s)

    def give_up_all(self, now_s: float) -> None:
        """Wait for nothing any more."""
        self._terms = replace(self._terms, drain_s=0.0)
        with self._lock:
            for run in self._runs.values():
                run.stop_by_s = self._enforce_at_s = now_s


def _said(error: BaseException) -> str:
    """An error as one line that both engines can store."""
    text = " ".join(f"{type(error).__name__}: {error}".replace("\0", " ").split())
    return text.encode("utf-8", "replace").decode()[:1000]
