"""The planner: what a worker decides to do next, and does. No threads of its own; whoever calls `tick` is its thread.

    tick:  settle    release what has ended, or has to be given up, all in one statement: see `runs`
           discover  ask the source for its streams, now and then: see `discovery`
           balance   see the pool at one moment, and claim or shed: `balance.plan`

When nothing has happened, a poll is one statement that reads. A worker's count of leases is written by the planner
alone, in the transactions that change it, so that what the others see adds up: see `balance`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial

from sqlalchemy import Connection

from leases import balance, fleet, operations
from leases.balance import View
from leases.discovery import Discover, Discovery
from leases.line import Line
from leases.model import Happening, WorkerEvent
from leases.registry import SessionRegistry, fields
from leases.runner import Run
from leases.runs import Runs, Terms
from leases.session import StreamSession

logger = logging.getLogger("leases")

BATCH = 500
"""How many streams one statement claims at the most."""

PATIENCE = 1.5
"""Polls after which a free stream is anybody's: whoever is to have it would have come for it by then."""

BURY_EVERY_S = 300.0
DEAD_FOR = timedelta(minutes=10)
"""Rows of workers that have been dead for so long, and hold nothing, are deleted from time to time."""


class Planner:
    """Plans for one worker. `hurry`, `look` and `drain` may be called from any thread; `tick` from one at a time."""

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
        self.capacity = terms.capacity
        self.view: View | None = None
        self.target = 0
        self._line = line
        self._terms = terms
        self._tell_event = tell
        self._wake = wake
        self._dice = dice or random.Random()
        self.runs = Runs(registry, line, terms, tell=self.tell, wake=wake, dice=self._dice)
        self._discovery = (
            Discovery(registry, line, discover, terms.discover_s, tell=tell, look=self.look) if discover else None
        )
        self._returned = 0
        self._reported = 0
        self._drain_asked = False
        self._drain_told = False
        now_s = self._plan_at_s = registry.now_s()
        self._planned_at_s = now_s - terms.poll_s
        self._spread = self._dice.uniform(0.5, 1.0)
        self._back_at_s = self._awake_since_s = now_s
        self._bury_at_s = now_s + BURY_EVERY_S * self._dice.random()

    # --- what happens elsewhere, on any thread -----------------------------------------------------------------------

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
            self.runs.give_up_all(self.registry.now_s())
        self._wake()

    @property
    def draining(self) -> bool:
        """Whether it lets everything go."""
        return self.runs.draining

    @property
    def done(self) -> bool:
        """Whether everything has been let go."""
        return self.draining and self.runs.done

    # --- tick ------------------------------------------------------------------------------------------------------

    def tick(self) -> float:
        """Do what is to be done now; return the seconds until there may be more. Raises what the store raises."""
        now_s = self.registry.now_s()
        if now_s - self._back_at_s > self.registry.ttl.total_seconds() / 2:
            self._awake_since_s = now_s  # the process stood still, and so did all that it would judge
        if self._drain_asked and not self.draining:
            self.tell(Happening.DRAINING)
            self.runs.drain(now_s)
        if self.runs.settle(now_s):
            self._reported = self.registry.keeper.held
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
            if self._discovery is not None:
                self._discovery.step(now_s)
            self._mend()
            self._balance(now_s)
        pause_s = self._until_next_s()
        self._back_at_s = self.registry.now_s() + pause_s
        return pause_s

    def _until_next_s(self) -> float:
        now_s = self.registry.now_s()
        plans = not self.draining and self.registry.keeper.enlisted
        plan_at_s = self._plan_at_s if plans else now_s + self._terms.poll_s
        return max(0.0, min(plan_at_s, self.runs.next_at_s(now_s)) - now_s)

    def _mend(self) -> None:
        """Forget the failures of streams on which the work goes on well; and, seldom, workers that are long dead."""
        for run in self.runs.all():
            if run.session.lease.failures and run.session.wrote and not (run.recovered or run.abandoned):
                run.recovered = self._line.run(partial(operations.recover, lease=run.session.lease))
        now_s = self.registry.now_s()
        if now_s >= self._bury_at_s:
            self._bury_at_s = now_s + BURY_EVERY_S
            self._line.run(lambda connection: fleet.bury(connection, dead_for=DEAD_FOR))

    # --- balance ---------------------------------------------------------------------------------------------------

    def _balance(self, now_s: float) -> None:
        still_s = self.runs.runner.stands_still_s()
        if still_s is None:
            logger.error("the event loop of the handlers of %s has ended: it drains", self.registry.owner)
            for run in self.runs.all():  # nothing runs there any more, and nothing will be told of it
                run.ended = True
                self.runs.ended(run)
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
        staying = [run for run in self.runs.all() if not run.stopping]
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
        threads = self.runs.runner.starving(ttl_s)
        if threads is None and self.capacity != self._terms.capacity and self.runs.runner.returned > self._returned:
            logger.info("the handlers of %s come to their ends again: it takes as many streams as before", me)
            self._set_capacity(self._terms.capacity)
        if threads is None or (self.capacity is not None and self.capacity <= threads):
            return
        self._returned = self.runs.runner.returned
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
            logger.info("shed: %s", run.session.stream_id, extra=fields(run.session.lease))
            self.runs.ask_to_end(run, now_s)

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
