"""The planner: what a worker decides to do next, and does. No threads of its own; whoever calls `tick` is its thread.

    tick:  collect   release what has ended, all in one statement, a failed stream with its backoff
           enforce   a handler that stalls, or that was asked to end and does not, loses its session
           discover  ask the source for its streams, now and then
           balance   see the pool at one moment, and claim or shed: `balance.plan`

When nothing has happened, a poll is one statement that reads. A worker's count of leases is written by the planner
alone, in the transactions that change it, so that what the others see adds up: see `balance`.

Nothing is released while its work still runs, with two exceptions, which are told loudly: a handler that makes no
progress for longer than `stall_timeout`, and one that does not end within `drain_timeout`. Their writes are refused by
the fence from then on.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

from sqlalchemy import Connection

from leases import administration, balance, fleet, limits, operations
from leases.backoff import Backoff
from leases.balance import View
from leases.line import Line
from leases.model import Ending, Happening, Loss, WorkerEvent
from leases.registry import SessionRegistry
from leases.runner import Run, Runner
from leases.session import StreamSession

logger = logging.getLogger("leases")

BATCH = 500
"""How many streams one statement claims at the most."""

PATIENCE = 1.5
"""Polls after which a free stream is anybody's: whoever is to have it would have come for it by then."""

RELEASE_AGAIN_S = 0.02
"""How soon a release is tried again whose row was locked: most often by the worker's own heartbeat, for a moment."""

BURY_EVERY_S = 300.0
DEAD_FOR = timedelta(minutes=10)
"""Rows of workers that have been dead for so long, and hold nothing, are deleted from time to time."""

Discover = Callable[[], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Terms:
    """How a worker works: durations in seconds."""

    poll_s: float
    drain_s: float
    stall_s: float | None
    discover_s: float
    capacity: int | None
    backoff: Backoff


class Planner:
    """Plans for one worker. `granted` and `lost` may be called from any thread, and so may what a runner tells."""

    def __init__(
        self,
        registry: SessionRegistry,
        line: Line,
        terms: Terms,
        *,
        tell: Callable[[WorkerEvent], object],
        discover: Discover | None = None,
        wake: Callable[[], object] = lambda: None,
        dice: random.Random | None = None,
    ) -> None:
        self.registry = registry
        self.runner: Runner
        self.capacity = terms.capacity
        self.draining = False
        self.view: View | None = None
        self.target = 0
        self._line = line
        self._terms = terms
        self._tell_event = tell
        self._discover = discover
        self._wake = wake
        self._dice = dice or random.Random()
        self._lock = threading.Lock()
        self._runs: dict[StreamSession, Run] = {}
        self._ended: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._owed: dict[StreamSession, Ending] = {}
        self._lingering: set[Run] = set()
        """Runs whose session is lost, and whose call has not returned."""
        self._found: queue.SimpleQueue[set[str] | None] = queue.SimpleQueue()
        self._asking = False
        self._returned = 0
        self._known: set[str] = set()
        self._reported = 0
        self._drain_asked = False
        self._drain_told = False
        now_s = registry.now_s()
        self._plan_at_s = self._discover_at_s = now_s
        self._planned_at_s = now_s - terms.poll_s
        self._spread = self._dice.uniform(0.5, 1.0)
        self._enforce_at_s = math.inf if terms.stall_s is None else now_s
        self._back_at_s = self._awake_since_s = now_s
        self._bury_at_s = now_s + BURY_EVERY_S * self._dice.random()

    # --- what happens elsewhere, on any thread -----------------------------------------------------------------------

    def granted(self, session: StreamSession) -> None:
        """Hear of a new session: its work begins."""
        run = Run(session)
        now_s = self.registry.now_s()
        with self._lock:
            # Of an earlier grant the call may still run: never two at once, and nobody waits for ever.
            if not self.draining:
                run.after = next((old for old in self._lingering if old.session.stream_id == session.stream_id), None)
            if run.after is not None:
                run.stop_by_s = now_s + self._terms.drain_s
                self._enforce_at_s = min(self._enforce_at_s, run.stop_by_s)
            self._runs[session] = run
        self.tell(Happening.GRANTED, session)
        if self.draining:
            session.stop()
        if run.after is None:
            self.runner.begin(run)
        if self.draining:
            self._ask_to_end(run, now_s)

    def stopping(self, session: StreamSession) -> None:
        """Hear that a session is to end in good order: its stream was paused or retired."""
        run = self._runs.get(session)
        if run is not None:
            self._ask_to_end(run, self.registry.now_s())
            self._wake()

    def lost(self, session: StreamSession, loss: Loss) -> None:
        """Hear that a session is lost: its work is to end at once."""
        self.tell(Happening.LOST, session, reason=str(loss))
        run = self._runs.get(session)
        if run is not None:
            with self._lock:
                if not run.ended and loss is not Loss.STALLED:
                    self._lingering.add(run)
            self.runner.abandon(run)
            if run.after is not None:
                self.ended(run)  # it was never begun
        self._wake()

    def ended(self, run: Run) -> None:
        """Hear from the runner that a session's work has ended."""
        next_ones: list[Run] = []
        with self._lock:
            if run in self._lingering:  # seldom; only then may others wait for it
                self._lingering.remove(run)
                next_ones = [each for each in self._runs.values() if each.after is run]
            for each in next_ones:
                each.after = each.stop_by_s = None
        for each in next_ones:
            self.runner.begin(each)
        self._ended.put(run)
        self._wake()

    def hurry(self) -> None:
        """Plan sooner: something has become free. After a random moment, where many hear the same."""
        workers = len(self.view.workers) if self.view is not None else 1
        spread_s = min(self._terms.poll_s, 0.0005 * workers)
        soonest_s = self._planned_at_s + min(self._terms.poll_s / 2, 0.005 * workers)
        at_s = max(soonest_s, self.registry.now_s() + self._dice.uniform(0, spread_s))
        if at_s < self._plan_at_s:
            self._plan_at_s = at_s
            self._wake()

    def look(self) -> None:
        """Plan at once: something concerns this worker itself."""
        self._plan_at_s = self.registry.now_s()
        self._wake()

    def drain(self, *, at_once: bool = False) -> None:
        """Let everything go: in good order, within the drain timeout; or at once."""
        self._drain_asked = True
        if at_once:
            self._terms = replace(self._terms, drain_s=0.0)
            with self._lock:
                for run in self._runs.values():
                    run.stop_by_s = self._enforce_at_s = self.registry.now_s()
        self._wake()

    @property
    def done(self) -> bool:
        """Whether everything has been let go."""
        return self.draining and not self.working and not self._owed

    @property
    def working(self) -> int:
        """How many sessions there are whose work has not ended; without those that are lost."""
        with self._lock:
            return sum(not run.abandoned for run in self._runs.values())

    # --- tick ------------------------------------------------------------------------------------------------------

    def tick(self) -> float:
        """Do what is to be done now; return the seconds until there may be more. Raises what the store raises."""
        now_s = self.registry.now_s()
        if now_s - self._back_at_s > self.registry.ttl.total_seconds() / 2:
            self._awake_since_s = now_s  # the process stood still, and so did all that it would judge
        if self._drain_asked and not self.draining:
            self._begin_drain(now_s)
        self._collect()
        if now_s >= self._enforce_at_s:
            self._enforce(now_s)
            self._release_owed()
        if self.draining:
            if not self._drain_told:
                self._line.run(lambda connection: fleet.drain(connection, self.registry.owner))
                self._drain_told = True
        elif now_s >= self._plan_at_s and self.registry.keeper.enlisted:
            # On schedule, so that the cost of a fleet is known; with a start of its own, so that it is spread out.
            behind = now_s - self._plan_at_s > self._terms.poll_s
            self._planned_at_s = now_s
            self._plan_at_s = (now_s if behind else self._plan_at_s) + self._terms.poll_s * self._spread
            self._spread = 1.0
            self._find_streams(now_s)
            self._mend()
            self._balance(now_s)
        pause_s = self._until_next_s()
        self._back_at_s = self.registry.now_s() + pause_s
        return pause_s

    def _until_next_s(self) -> float:
        now_s = self.registry.now_s()
        plans = not self.draining and self.registry.keeper.enlisted
        moments = [self._plan_at_s if plans else now_s + self._terms.poll_s, self._enforce_at_s]
        if self._owed:
            moments.append(now_s + RELEASE_AGAIN_S)
        return max(0.0, min(moments) - now_s)

    # --- endings ---------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Release what has ended."""
        while True:
            try:
                run = self._ended.get_nowait()
            except queue.Empty:
                break
            with self._lock:
                known = self._runs.pop(run.session, None)
            if known is not None:  # not one that was given up, and has been released
                self._owe(run, run.error)
        self._release_owed()

    def _release_owed(self) -> None:
        if self._owed:
            locked = self.registry.release_on(self._line, self._owed)
            self._owed = {session: self._owed[session] for session in locked}
            self._reported = self.registry.keeper.held

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
        self.tell(Happening.FAILED, session, reason=said)
        logger.error(
            "the handler failed on %s, which rests for %.1f s", session.stream_id, rest.total_seconds(),
            exc_info=error, extra=_fields(session),
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
            extra=_fields(session),
        )  # fmt: skip
        stalled = loss is Loss.STALLED
        if stalled:
            self.tell(Happening.STALLED, session, reason=why)
        rest = self._terms.backoff.after(session.lease.failures, self._dice.random) if stalled else timedelta(0)
        self._owed[session] = Ending(session.lease, rest, f"stalled: {why}" if stalled else None)
        self.registry.keeper.lose(session.lease, loss)
        self.runner.abandon(run)
        with self._lock:
            self._runs.pop(session, None)

    # --- drain -----------------------------------------------------------------------------------------------------

    def _begin_drain(self, now_s: float) -> None:
        self.draining = True
        self.tell(Happening.DRAINING)
        with self._lock:
            runs = list(self._runs.values())
        for run in runs:
            self._ask_to_end(run, now_s)

    def _ask_to_end(self, run: Run, now_s: float) -> None:
        run.session.stop()
        with self._lock:
            if run.stop_by_s is None:
                run.stop_by_s = now_s + self._terms.drain_s
                self._enforce_at_s = min(self._enforce_at_s, run.stop_by_s)
        self.runner.stop(run)
        if run.after is not None:
            self.ended(run)  # it was never begun

    # --- streams ---------------------------------------------------------------------------------------------------

    def _find_streams(self, now_s: float) -> None:
        """Register what the source has that it had not, and retire what it has no more.

        It is asked on a thread of its own: it may take its time, and the worker goes on.
        """
        if self._discover is None:
            return
        if not self._asking and now_s >= self._discover_at_s:
            self._asking = True
            self._discover_at_s = now_s + self._terms.discover_s
            threading.Thread(target=self._ask, args=(self._discover,), name="leases-discover", daemon=True).start()
        with suppress(queue.Empty):
            found = self._found.get_nowait()
            self._asking = False
            if found is not None:
                self._take(found)

    def _ask(self, discover: Discover) -> None:
        found = None
        try:
            found = set(limits.stream_ids(discover()))
        except BaseException:  # whatever it is, also SystemExit: it is the source's
            logger.exception("the source of streams failed; it is asked again in %g s", self._terms.discover_s)
        self._found.put(found)
        self.look()

    def _take(self, found: set[str]) -> None:
        new, gone, pool = found - self._known, self._known - found, self.registry.pool
        if new:
            self._line.run(lambda connection: operations.register(connection, new, pool=pool))
        if gone:
            self._line.run(lambda connection: administration.retire(connection, gone, pool=pool))
            for stream_id in sorted(gone):
                logger.info("retired: %s", stream_id, extra={"stream_id": stream_id, "owner": self.registry.owner})
                self._tell_event(WorkerEvent(Happening.RETIRED, self.registry.owner, stream_id))
        self._known = found

    def _mend(self) -> None:
        """Forget the failures of streams on which the work goes on well; and, seldom, workers that are long dead."""
        with self._lock:
            well = [
                run
                for run in self._runs.values()
                if run.session.lease.failures and run.session.wrote and not (run.recovered or run.abandoned)
            ]
        for run in well:
            run.recovered = self._line.run(partial(operations.recover, lease=run.session.lease))
        now_s = self.registry.now_s()
        if now_s >= self._bury_at_s:
            self._bury_at_s = now_s + BURY_EVERY_S
            self._line.run(lambda connection: fleet.bury(connection, dead_for=DEAD_FOR))

    # --- balance ---------------------------------------------------------------------------------------------------

    def _balance(self, now_s: float) -> None:
        still_s = self.runner.stands_still_s()
        if still_s is None:
            logger.error("the event loop of the handlers of %s has ended: it drains", self.registry.owner)
            with self._lock:
                runs = list(self._runs.values())
            for run in runs:  # nothing runs there any more, and nothing will be told of it
                run.ended = True
                self.ended(run)
            self.drain()
            return
        held = self.registry.keeper.held
        self._limit_to_threads(held)
        view = self.view = self._observe(held)
        own = next((peer for peer in view.workers if peer.worker_id == self.registry.owner), None)
        if own is not None and own.draining:  # an operator has asked for it
            self._drain_asked = True
            self._wake()
            return
        with self._lock:
            staying = [run for run in self._runs.values() if not run.stopping]
        # One that was adopted since `held` was counted is staying, too.
        plan = balance.plan(self.registry.owner, view, held=held, leaving=max(0, held - len(staying)))
        self.target = plan.target
        if plan.shed:
            self._shed(staying, plan.shed, now_s)
        if plan.claim and still_s <= self.registry.ttl.total_seconds() / 2:
            self._claim(plan.claim, view)

    def _limit_to_threads(self, held: int) -> None:
        """Take no more streams than there are threads, if handlers keep them for good: others would never have one."""
        me, ttl_s = self.registry.owner, self.registry.ttl.total_seconds()
        if self.registry.now_s() - self._awake_since_s < 2 * ttl_s:
            return  # what seems to last long may have stood still
        threads = self.runner.starving(ttl_s)
        if threads is None and self.capacity != self._terms.capacity and self.runner.returned > self._returned:
            logger.info("the handlers of %s come to their ends again: it takes as many streams as before", me)
            self._set_capacity(self._terms.capacity)
        if threads is None or (self.capacity is not None and self.capacity <= threads):
            return
        self._returned = self.runner.returned
        logger.warning(
            "the calls of %s last, and there are %d threads for %d streams: its capacity is %d until they end; "
            "give it more with concurrency=",
            me, threads, held, threads, extra={"owner": me},
        )  # fmt: skip
        self._set_capacity(threads)

    def _set_capacity(self, capacity: int | None) -> None:
        self.capacity = capacity
        member = self.registry.keeper.member = replace(self.registry.keeper.member, capacity=capacity)
        self._line.run(lambda connection: fleet.enlist(connection, member, ttl=self.registry.ttl))

    def _observe(self, held: int) -> View:
        up_to = self._count_up_to(held)
        owner, pool, patience_s = self.registry.owner, self.registry.pool, PATIENCE * self._terms.poll_s
        observe = partial(fleet.observe, pool=pool, worker_id=owner, count_up_to=up_to, patience_s=patience_s)
        if held == self._reported:
            return self._line.run(observe, read_only=True)

        def report_and_observe(connection: Connection) -> View:
            operations.report(connection, owner, held=held)
            return observe(connection)

        view = self._line.run(report_and_observe)
        self._reported = held
        return view

    def _count_up_to(self, held: int) -> int:
        """How many available streams are worth counting: what the fleet could take, as far as this one knows."""
        enough = balance.ENOUGH if self.view is None else max(balance.ENOUGH, self.view.total)
        if self.capacity is None:
            return enough
        workers = 1 if self.view is None else len(self.view.workers)
        return min(enough, max(0, self.capacity - held) * workers + 1)

    def _shed(self, staying: list[Run], count: int, now_s: float) -> None:
        """Ask so many sessions to end: those first that are not in a call, and of them the latest.

        What an operator has moved here comes last: it would go back to where it came from.
        """
        staying.sort(key=lambda run: (run.session.moved_here, run.began_s is not None, -run.session.granted_at_s))
        for run in staying[:count]:
            self.tell(Happening.SHED, run.session)
            logger.info("shed: %s", run.session.stream_id, extra=_fields(run.session))
            self._ask_to_end(run, now_s)

    def _claim(self, count: int, view: View) -> None:
        wanted = count
        while wanted > 0 and not self._drain_asked:
            asked = min(wanted, BATCH)
            claimed = len(self.registry.claim_on(self._line, asked))
            self._reported = self.registry.keeper.held
            if claimed < asked:
                return  # others were faster
            wanted -= claimed
        if not view.counted_all:
            self.look()  # there is more than was counted

    # --- tell ------------------------------------------------------------------------------------------------------

    def tell(self, happening: Happening, session: StreamSession | None = None, *, reason: str | None = None) -> None:
        """Tell what has happened to a session, or to the worker."""
        owner = self.registry.owner
        if session is None:
            self._tell_event(WorkerEvent(happening, owner, reason=reason))
        else:
            self._tell_event(WorkerEvent(happening, owner, session.stream_id, session.token, reason))


def _said(error: BaseException) -> str:
    """An error as one line that both engines can store."""
    text = " ".join(f"{type(error).__name__}: {error}".replace("\0", " ").split())
    return text.encode("utf-8", "replace").decode()[:1000]


def _fields(session: StreamSession) -> dict[str, object]:
    lease = session.lease
    return {"stream_id": lease.stream_id, "fencing_token": lease.fencing_token, "owner": lease.owner}
