"""The keeper: what a process has, until when it may believe so, and the heartbeat that extends it. No threads: `heart`.

A lease that is kept, and how it ends:

                     beat: extended
                       ┌──────┐
    hold ──────────> kept ────┘ ── beat: the row says it is another's ──> lost (taken, revoked, released, expired)
                       │ ├──────── the deadline has passed ─────────────> lost (expired)
                       │ └──────── lose ──> lost (refused, stalled, overdue)
                       └────────── drop ──> leaving ── gone ──> (its owner has released it)

Whatever happens to the beats, a lease ends at its deadline, which is before the database's expiry (see `trust`). A
beat that fails is tried again, sooner than the next would be; what it did not extend keeps the deadline it had. A row
that somebody else has locked is skipped, and keeps its deadline too: the others are extended.

A beat also finds rows in this owner's name that nobody here knows of: *strays*. What has expired is let go. What is
live is *adopted*, if the registry says so: an operator moved it here, or a claim granted it and the answer was lost. A
compare-and-swap on its claim_id comes first, so that no other process, not even one of the same name, has it too. A
grant that was ever kept here is never adopted: its work may still be running.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from uuid import UUID, uuid4

from leases import fleet, operations
from leases.errors import ConfigError, LeasesError
from leases.line import Line
from leases.model import Lease, Loss, Membership, Renewal, Stray
from leases.trust import Clock, Window, monotonic

logger = logging.getLogger("leases")


@dataclass(frozen=True, slots=True)
class Health:
    """How the heartbeats are: for a probe. `beat_age` is None before the first good beat."""

    beat_age: timedelta | None
    failures: int
    last_error: str | None
    leases: int


@dataclass(frozen=True, slots=True)
class Told:
    """Whom the keeper tells. Called without its lock, on the thread of whoever found out; errors are logged."""

    renewed: Callable[[Collection[Lease]], object]
    lost: Callable[[Lease, Loss], object]
    ending: Callable[[Collection[str]], object]
    adopts: Callable[[Stray], bool] = lambda _: False
    adopted: Callable[[Lease, float], object] = lambda _lease, _sent_at_s: None
    unanswered: Callable[[UUID], object] = lambda _: None


@dataclass(slots=True)
class _Kept:
    lease: Lease
    deadline_s: float


class Keeper:
    """Keeps leases until they are dropped or lost. `clock` is this process's monotonic one.

    With `counts`, each beat also tells in the worker's row how many leases there are; a worker that plans does so by
    itself, in the transactions that change it. After a fork the child's copy keeps nothing.
    """

    def __init__(
        self, member: Membership, window: Window, told: Told, *, counts: bool = True, clock: Clock = monotonic
    ) -> None:
        self.window = window
        self.member = member
        self._told = told
        self._counts = counts
        self._clock = clock
        self._pid = os.getpid()
        self._kept: dict[str, _Kept] = {}
        self._leaving: set[tuple[str, int]] = set()
        self._has_row = False
        self._beaten_at_s: float | None = None
        self._failures = 0
        self._last_error: str | None = None
        self._closed = False
        self._lock = threading.Lock()
        self.changed = threading.Condition(self._lock)
        """Notified when a deadline has come or gone."""

    # --- what the registry asks for ----------------------------------------------------------------------------

    def hold(self, lease: Lease, sent_at_s: float) -> None:
        """Keep a lease alive whose request was sent at `sent_at_s`, by this keeper's clock. Not after `close`."""
        kept = _Kept(lease, self.window.deadline(sent_at_s, lease.remaining.total_seconds()))
        with self.changed:
            self.refuse_if_closed()
            self._kept[lease.stream_id] = kept
            self.changed.notify_all()

    def drop(self, lease: Lease) -> bool:
        """Keep a lease no longer, since it is about to be released; False if it was not kept. `gone` follows."""
        with self._lock:
            self._leaving.add(_key(lease))
            return self._take_out(lease) is not None

    def gone(self, lease: Lease) -> None:
        """Hear that a lease which was dropped has been released, or is left to expire."""
        with self._lock:
            self._leaving.discard(_key(lease))

    def lose(self, lease: Lease, loss: Loss) -> None:
        """End a lease that somebody else has found to be lost: a fence has refused it, its handler stalls."""
        with self._lock:
            taken = self._take_out(lease)
        if taken is not None:
            self._tell(self._told.lost, lease, loss)

    def remaining_s(self, lease: Lease) -> float:
        """How long the lease may still be trusted; 0 when it may not. Ends it, if it is past its deadline.

        So a process that has just been thawed learns at once what its watch will tell it in a moment.
        """
        if self.inherited:
            return 0.0
        with self._lock:
            kept = self._kept.get(lease.stream_id)
            if kept is None or kept.lease.fencing_token != lease.fencing_token:
                return 0.0
            left = kept.deadline_s - self._clock()
        if left <= 0:
            self.lose(lease, Loss.EXPIRED)
            return 0.0
        return left

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy: the leases are the parent's, and so is their release."""
        return os.getpid() != self._pid

    @property
    def held(self) -> int:
        """How many leases the database knows to be this process's: those that are leaving are among them."""
        with self._lock:
            return len(self._kept) + len(self._leaving)

    def held_but(self, leases: Iterable[Lease]) -> int:
        """How many these are, without the given ones, of which none is kept any more."""
        with self._lock:
            return len(self._kept) + len(self._leaving.difference(map(_key, leases)))

    @property
    def enlisted(self) -> bool:
        """Whether a beat has ever been good. The worker's row may be gone since; the next beat puts it back."""
        return self._beaten_at_s is not None

    def health(self) -> Health:
        """How the heartbeats are."""
        with self._lock:
            age = None if self._beaten_at_s is None else timedelta(seconds=self._clock() - self._beaten_at_s)
            return Health(age, self._failures, self._last_error, len(self._kept))

    def refuse_if_closed(self) -> None:
        if self.inherited:
            raise ConfigError("this registry is the parent process's; make a store and a registry after the fork")
        if self._closed:
            raise ConfigError("this registry is closed; make a new one")

    def close(self) -> None:
        """Keep nothing new. What is kept is not extended any more, and expires by itself."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def _take_out(self, lease: Lease) -> _Kept | None:
        kept = self._kept.get(lease.stream_id)
        if kept is None or kept.lease.fencing_token != lease.fencing_token:
            return None
        return self._kept.pop(lease.stream_id)

    # --- deadlines ---------------------------------------------------------------------------------------------

    def end_overdue(self) -> None:
        """End every lease whose deadline has passed."""
        now_s = self._clock()
        with self._lock:
            overdue = [kept.lease for kept in self._kept.values() if kept.deadline_s <= now_s]
            for lease in overdue:
                del self._kept[lease.stream_id]
        for lease in overdue:
            self._tell(self._told.lost, lease, Loss.EXPIRED)

    def until_deadline_s(self) -> float:
        """How long until the next deadline; within `changed`."""
        nearest = min((kept.deadline_s for kept in self._kept.values()), default=self._clock() + 60)
        return max(0.0, nearest - self._clock())

    # --- beat --------------------------------------------------------------------------------------------------

    def beat(self, line: Line) -> None:
        """Renew everything once. Raises what the store raises; then nothing is known to have been extended."""
        with self._lock:
            leases = [kept.lease for kept in self._kept.values()]
        owner, ttl = self.member.worker_id, timedelta(seconds=self.window.ttl_s)
        if not self._has_row:  # waits for nobody, whoever has locked the row
            line.run(lambda connection: fleet.enlist(connection, self.member, ttl=ttl))
        held = len(leases) if self._counts else None
        sent_at_s = self._clock()
        renewal = line.run(lambda connection: operations.renew(connection, leases, owner=owner, ttl=ttl, held=held))
        self._has_row = renewal.worker_known  # or somebody had it locked; then to ask for it once more is harmless
        self._apply(renewal, {lease.stream_id: lease for lease in leases}, sent_at_s)
        if renewal.strays:
            self._look_after(renewal.strays, line, ttl)

    def failed(self, error: BaseException) -> int:
        """Note that a beat has failed; return how many have in a row."""
        with self._lock:
            self._failures += 1
            self._last_error = str(error)
            return self._failures

    def _apply(self, renewal: Renewal, asked: Mapping[str, Lease], sent_at_s: float) -> None:
        deadline_s = self.window.deadline(sent_at_s)
        renewed = []
        lost = []
        with self.changed:
            self._beaten_at_s = sent_at_s
            self._failures, self._last_error = 0, None
            for stream_id, lease in asked.items():
                kept = self._kept.get(stream_id)
                if kept is None or kept.lease.fencing_token != lease.fencing_token:
                    continue  # dropped or lost while the beat was on its way
                if stream_id in renewal.lost:
                    del self._kept[stream_id]
                    lost.append(lease)
                elif stream_id not in renewal.skipped:
                    kept.deadline_s = max(kept.deadline_s, deadline_s)
                    renewed.append(lease)
            self.changed.notify_all()
        for lease in lost:
            self._tell(self._told.lost, lease, renewal.lost[lease.stream_id])
        self._tell(self._told.renewed, renewed)
        if renewal.ending:
            self._tell(self._told.ending, renewal.ending)

    def _look_after(self, names: Collection[str], line: Line, ttl: timedelta) -> None:
        owner = self.member.worker_id
        found = line.run(lambda connection: fleet.strays(connection, names, owner=owner), read_only=True)
        # One that is known came while the beat was on its way: the next one names it, and learns what became of it.
        if any(not stray.live and not self._knows(stray) for stray in found):
            line.run(lambda connection: fleet.let_go_expired(connection, owner=owner))
        for stray in found:
            if not stray.live or self._knows(stray) or not self._told.adopts(stray):
                continue
            sent_at_s = self._clock()
            claim_id = uuid4()
            try:
                lease = line.run(partial(fleet.adopt, stray=stray, owner=owner, ttl=ttl, claim_id=claim_id))
            except LeasesError:
                self._told.unanswered(claim_id)
                raise
            if lease is not None:
                self._tell(self._told.adopted, lease, sent_at_s)

    def _knows(self, stray: Stray) -> bool:
        with self._lock:
            kept = self._kept.get(stray.stream_id)
            held = kept is not None and kept.lease.fencing_token == stray.fencing_token
            return held or (stray.stream_id, stray.fencing_token) in self._leaving

    # --- tell --------------------------------------------------------------------------------------------------

    def _tell(self, callback: Callable[..., object], *args: object) -> None:
        try:
            callback(*args)
        except BaseException:  # a caller's mistake, or its sys.exit(), must not end the heartbeats
            logger.exception("a callback of %s failed", self.member.worker_id)


def _key(lease: Lease) -> tuple[str, int]:
    return lease.stream_id, lease.fencing_token
