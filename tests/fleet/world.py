"""A fleet in virtual time: no threads, no sleeps, one seed. Real SQL on SQLite in memory, with a clock of the test's.

Each member is what a `Worker` is made of (registry, keeper, line, planner), but that the world beats and ticks for it,
but its handlers take as many rounds as the dice say. What happens to processes happens to them: they crash,
stand still and thaw in the middle of a write, join, drain, and lose answers after the commit; operators move, end
and pause leases. After every round the tables and what each member believes are held against the promises.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.pool import Pool

from leases import EventLog, LeasesError, LeaseStore, OutcomeUnknown, SessionRegistry, StaleToken, WorkerEvent
from leases.backoff import Backoff
from leases.line import Line
from leases.planner import Planner
from leases.runner import Run
from leases.runs import Terms
from leases.session import StreamSession
from leases.transaction import R
from tests.clock import START

ROUND_S = 1.0
POLL_S = 3.0
TTL = timedelta(seconds=15)
BEAT_S = 5.0


class Time:
    """Everybody's time: the database's clock reads it, and so does each member's monotonic one, from its own zero."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._text = ""
        self.move(0.0)

    def move(self, seconds: float) -> None:
        self.now_s += seconds
        self._text = self.text(0.0)

    def text(self, later_s: float) -> str:
        at = self.at(later_s)
        return at.strftime("%Y-%m-%d %H:%M:%S.") + f"{at.microsecond // 1000:03}"

    def at(self, later_s: float = 0.0) -> datetime:
        return START + timedelta(seconds=self.now_s + later_s)

    def strftime(self, form: str, when: str, *modifiers: str) -> str:
        """SQLite's `strftime`, as the product uses it."""
        assert (form, when) == ("%Y-%m-%d %H:%M:%f", "now")
        if not modifiers:
            return self._text
        (modifier,) = modifiers
        return self.text(float(modifier.removesuffix(" seconds")))

    @contextmanager
    def standing(self) -> Iterator[None]:
        def connected(connection: Any, _record: Any) -> None:
            # Deterministic: so it is for as long as a statement runs, and SQLite need not ask for each row.
            connection.create_function("strftime", -1, self.strftime, deterministic=True)

        event.listen(Pool, "connect", connected)
        try:
            yield
        finally:
            event.remove(Pool, "connect", connected)


class LossyLine(Line):
    """A line that now and then loses the answer of what has been committed."""

    def __init__(self, store: LeaseStore, loses: Callable[[], bool]) -> None:
        super().__init__(store)
        self._loses = loses

    def run(self, call: Callable[[Connection], R], *, read_only: bool = False) -> R:
        result = super().run(call, read_only=read_only)
        if not read_only and self._loses():
            raise OutcomeUnknown("the answer was lost")
        return result


class Hand:
    """A runner in the world's hand: calls end when the dice say so."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.runs: dict[Run, None] = {}

    def begin(self, run: Run) -> None:
        self.runs[run] = None

    def stop(self, run: Run) -> None:
        if run.began_s is None:
            self.end(run)

    def abandon(self, run: Run) -> None:
        run.abandoned = True
        if run.began_s is None:
            self.end(run)

    def end(self, run: Run) -> None:
        if not run.ended:
            run.ended = True
            self.runs.pop(run, None)
            self.member.planner.runs.ended(run)

    returned = 0

    def starving(self, after_s: float) -> int | None:
        return None

    def stands_still_s(self) -> float | None:
        return 0.0

    def owns_this_thread(self) -> bool:
        return False

    def close(self) -> None:
        self.runs.clear()


@dataclass(eq=False)
class Member:
    """A process of the fleet."""

    name: str
    registry: SessionRegistry
    line: LossyLine
    beats_on: LossyLine
    planner: Planner = field(init=False)
    hand: Hand = field(init=False)
    beat_at_s: float = 0.0
    frozen_until_s: float = 0.0
    brink: StreamSession | None = None
    """The session to which it was about to write when it was frozen."""


class World:
    """The fleet, its database and its dice."""

    def __init__(self, seed: int, *, streams: int) -> None:
        self.random = Random(seed)
        self.time = Time()
        self._standing = self.time.standing()
        self._standing.__enter__()
        self.store = LeaseStore("sqlite://")
        self.store.migrate()
        self.log = EventLog(self.store)
        self.streams = [f"s{number:04}" for number in range(streams)]
        self.store.register(self.streams)
        with self.store.engine.connect() as connection:
            driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        self.raw = driver
        self.members: dict[str, Member] = {}
        self.events: Counter[str] = Counter()
        self.happened: Counter[str] = Counter()
        self.loses = 0.0
        self._names = itertools.count()

    def close(self) -> None:
        for member in self.members.values():
            self._close(member)
        self.store.close()
        self._standing.__exit__(None, None, None)

    def _close(self, member: Member) -> None:
        member.line.close()
        member.beats_on.close()

    # --- what happens to processes -----------------------------------------------------------------------------------

    def join(self, *, weight: float = 1.0) -> Member:
        name = f"w{next(self._names):04}"
        zero_s = self.random.uniform(0, 1e6)  # nobody's monotonic clock shows what another's does

        def clock() -> float:
            return self.time.now_s + zero_s

        def loses() -> bool:
            return self.random.random() < self.loses

        registry = SessionRegistry(
            self.store,
            owner=name,
            ttl=TTL,
            on_granted=lambda session: member.planner.runs.granted(session),
            on_lost=lambda session, loss: member.planner.runs.lost(session, loss),
            on_stopping=lambda session: member.planner.runs.stopping(session),
            competes=True,
            weight=weight,
            clock=clock,
            threads=False,
        )
        member = Member(name, registry, LossyLine(self.store, loses), LossyLine(self.store, loses))
        terms = Terms(poll_s=POLL_S, drain_s=20.0, stall_s=None, discover_s=60.0, capacity=None, backoff=Backoff())
        member.planner = Planner(registry, member.line, terms, tell=self._tell, dice=Random(self.random.random()))
        member.hand = member.planner.runs.runner = Hand(member)
        member.beat_at_s = self.time.now_s
        self.members[name] = member
        self.happened["join"] += 1
        return member

    def crash(self, member: Member) -> None:
        """Kill a process: nothing is released."""
        del self.members[member.name]
        self._close(member)
        self.happened["crash"] += 1

    def freeze(self, member: Member, seconds: float) -> None:
        """Stop a process on the brink of a write."""
        sessions = list(member.registry.sessions.values())
        member.brink = self.random.choice(sessions) if sessions else None
        member.frozen_until_s = self.time.now_s + seconds
        self.happened["freeze"] += 1

    def _tell(self, happened: WorkerEvent) -> None:
        self.events[happened.happening] += 1

    # --- a round -----------------------------------------------------------------------------------------------------

    def round(self) -> None:
        """Let a second pass in which every process that is not frozen beats, plans and works, in any order."""
        members = list(self.members.values())
        self.random.shuffle(members)
        step_s = ROUND_S / max(1, len(members))
        for member in members:
            self.time.move(step_s)
            if self.time.now_s >= member.frozen_until_s:
                self._let_live(member)
        if not members:
            self.time.move(ROUND_S)

    def _let_live(self, member: Member) -> None:
        if member.brink is not None:
            session, member.brink = member.brink, None
            self.write(session)  # without another look: as a process after any pause would
        member.registry.keeper.end_overdue()
        with suppress(LeasesError):
            if self.time.now_s >= member.beat_at_s:
                member.registry.keeper.beat(member.beats_on)
                member.beat_at_s = self.time.now_s + BEAT_S
        with suppress(LeasesError):
            member.planner.tick()
        self._work(member)
        with suppress(LeasesError):
            member.planner.tick()  # what has ended is released, as the runner's word would wake it
        if member.planner.done:
            member.registry.close()
            self.store.dismiss(member.name)
            self.crash(member)
            self.happened["crash"] -= 1

    def _work(self, member: Member) -> None:
        runs = list(member.hand.runs)
        for run in runs:
            if run.began_s is not None and self.random.random() < 0.5:
                run.began_s = None
                if run.stopping or run.abandoned:
                    member.hand.end(run)
        if runs and self.random.random() < 0.05:
            run = self.random.choice(runs)
            if run.began_s is None and not run.stopping:
                run.began_s = self.time.now_s
                run.calls += 1
                if run.session.remaining() > timedelta(0):
                    self.write(run.session)

    def write(self, session: StreamSession) -> bool:
        """Write the stream's next event; False if it was refused."""
        found = self.store.checkpoint(session.stream_id)
        position = 0 if found is None else found.checkpoint
        try:
            appended = self.log.append(session.lease, {f"e{position}": position}, checkpoint=position + 1)
        except StaleToken:
            self.happened["refused"] += 1
            return False
        assert appended.count == 1, "an event is written twice"
        row = self.raw.execute(
            "SELECT owner, fencing_token, expires_at FROM leases WHERE stream_id = ?", (session.stream_id,)
        ).fetchone()
        assert row[:2] == (session.lease.owner, session.token), "a write under a stale token was accepted"
        assert row[2] > self.time.text(0.0), "a write under an expired lease was accepted"
        self.happened["write"] += 1
        return True
