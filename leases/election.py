"""`LeaderElection`: one leader of a name, on one lease of the same table, with a token to fence its writes with.

    election = LeaderElection(LeaseStore(url), "billing")
    with election.leading() as leadership:              # waits until it is elected; resigns on the way out
        while not leadership.stopping.is_set():
            with leadership.fenced() as connection: ...  # refused, if another leads by now

    candidate ──> leading ──> stopped leading (lost, revoked, or it resigned) ──> candidate, or out

At most one candidate leads at any time, by the database's clock; and each by its own clock stops to believe so before
another can begin. What it writes under the fence is refused from the moment that another leads, whatever it believes.
All this is what the leases promise; an election adds only who is told, and when it is asked again.

Elections have a pool of their own, so that no worker claims their leases.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Final

from leases import limits
from leases.errors import ConfigError, LeasesError
from leases.model import Loss
from leases.registry import DEFAULT_TTL, SessionRegistry
from leases.session import StreamSession
from leases.store import LeaseStore
from leases.trust import monotonic

logger = logging.getLogger("leases")

POOL: Final = "election"
"""The pool of all elections' leases."""

MIN_POLL = timedelta(milliseconds=1)
MOST_RETRY_S = 5.0


class LeaderElection:
    """One candidate for the leadership of `name`. Safe to share between threads; one campaign at a time.

    `candidate` names this process, uniquely; others see it as the leader's name. `ttl` is how long nobody leads when a
    leader dies; `poll_interval` how soon a candidate sees that a leader has resigned where no notification tells it.
    """

    def __init__(
        self,
        store: LeaseStore,
        name: str,
        *,
        candidate: str | None = None,
        ttl: timedelta = DEFAULT_TTL,
        poll_interval: timedelta = timedelta(seconds=1),
    ) -> None:
        self.name = limits.stream_id(name)
        self._poll_s = limits.duration("poll_interval", poll_interval, least=MIN_POLL).total_seconds()
        self._changed = threading.Event()
        self._out = threading.Event()
        self._campaign = threading.Lock()
        self._leadership: StreamSession | None = None
        self._leader: str | None = None
        self._store = store
        self._registry = SessionRegistry(
            store, owner=candidate, ttl=ttl, pool=POOL, on_lost=self._lost, heard=self._heard
        )

    @property
    def candidate(self) -> str:
        """What this candidate is called."""
        return self._registry.owner

    @property
    def is_leader(self) -> bool:
        """Whether this candidate leads, as far as it may believe so by its own clock. Cheap: no I/O."""
        leadership = self._leadership
        return leadership is not None and leadership.remaining() > timedelta(0)

    @property
    def leadership(self) -> StreamSession | None:
        """The session of the leader, if this candidate leads: its `token`, and `fenced` for its writes."""
        return self._leadership if self.is_leader else None

    def leader(self) -> str | None:
        """Who leads now, by the database's clock; None if nobody does. Of any process, a candidate or not."""
        info = self._store.get(self.name)
        return info.owner if info is not None and info.live else None

    # --- to lead ---------------------------------------------------------------------------------------------------

    @contextmanager
    def leading(self, *, wait: timedelta | None = None) -> Iterator[StreamSession]:
        """Wait until elected, lead during the block, and resign. `LeaseHeld` if that is not within `wait`.

        The block has to look at `stopping`: it is set when the leadership is lost. `LeasesError` after `stop`.
        """
        with self._campaigning():
            wait_s = None if wait is None else limits.duration("wait", wait).total_seconds()
            leadership = self._elected(wait_s, lambda _: None)
            if leadership is None:
                if self._out.is_set():
                    raise ConfigError("this candidate has been stopped; make a new one")
                leadership = self._registry.open(self.name)  # says who leads; or has it after all
                self._leadership = leadership
            try:
                with leadership:
                    yield leadership
            finally:
                self._leadership = None

    def run(
        self,
        on_started_leading: Callable[[StreamSession], object],
        on_stopped_leading: Callable[[], object] = lambda: None,
        on_new_leader: Callable[[str], object] = lambda _: None,
    ) -> None:
        """Campaign, lead, and campaign again, until `stop` is called from elsewhere.

        `on_started_leading` is called with the leadership, on a thread of its own: it may return, or do the leader's
        work until `leadership.stopping`. The leadership lasts until it is lost or `stop` is called; a callback that
        raises resigns it. On `stop` the lease is released when the callback has returned. `on_stopped_leading` is
        called each time the leadership has ended; if it was lost, at once, while the work may still be running.
        `on_new_leader` is told each new leader that is seen, also when it is this candidate.
        """
        with self._campaigning():
            while (leadership := self._elected(None, on_new_leader)) is not None:
                self._lead(leadership, on_started_leading, on_stopped_leading)

    def stop(self) -> None:
        """Stop to lead and to campaign: resigns. A second call is harmless. Waits for nothing."""
        self._out.set()
        leadership = self._leadership
        if leadership is not None:
            leadership.stop()
        self._changed.set()

    def close(self) -> None:
        """`stop`, and let go of the store's connections and the heartbeats."""
        self.stop()
        with suppress(LeasesError):  # a leadership that cannot be released expires by itself
            self._registry.close()

    def __enter__(self) -> LeaderElection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LeaderElection {self.name!r}, {self.candidate} {'leads' if self.is_leader else 'does not lead'}>"

    # --- how -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _campaigning(self) -> Iterator[None]:
        if not self._campaign.acquire(blocking=False):
            raise ConfigError("this candidate campaigns already; make another LeaderElection")
        try:
            yield
        finally:
            self._leadership = None
            self._campaign.release()

    def _elected(self, wait_s: float | None, on_new_leader: Callable[[str], object]) -> StreamSession | None:
        """Ask until elected; None if stopped, or not within `wait_s`."""
        self._registry.start()
        give_up_at_s = None if wait_s is None else monotonic() + wait_s
        failures = 0
        while not self._out.is_set():
            self._changed.clear()
            try:
                pause_s = self._ask(on_new_leader)
                failures = 0
            except LeasesError as error:
                failures += 1
                pause_s = min(0.1 * 2 ** min(failures, 10), MOST_RETRY_S) * random.uniform(0.5, 1.0)
                logger.warning("the election of %s could not be held: %s", self.name, error)
            if self._leadership is not None:
                return self._leadership
            if give_up_at_s is not None:
                pause_s = min(pause_s, give_up_at_s - monotonic())
                if pause_s <= 0:
                    return None
            if self._changed.wait(pause_s):
                # Others have heard the same: the one that wakes first has it, and the others need not ask at once.
                self._out.wait(random.uniform(0.0, 0.01))
        return None

    def _ask(self, on_new_leader: Callable[[str], object]) -> float:
        """Look who leads, and take the leadership if nobody does; return how long to wait before asking again."""
        info = self._store.get(self.name)
        if info is not None and info.live and info.owner is not None and info.owner != self.candidate:
            self._see(info.owner, on_new_leader)
            remaining_s = info.remaining.total_seconds() if info.remaining is not None else self._poll_s
            return min(self._poll_s, max(0.001, remaining_s))
        self._leadership = self._registry.try_open(self.name)
        if self._leadership is not None:
            self._see(self.candidate, on_new_leader)
        return self._poll_s

    def _see(self, leader: str, on_new_leader: Callable[[str], object]) -> None:
        if leader != self._leader:
            self._leader = leader
            _call(on_new_leader, leader)

    def _lead(
        self,
        leadership: StreamSession,
        on_started_leading: Callable[[StreamSession], object],
        on_stopped_leading: Callable[[], object],
    ) -> None:
        failed: list[BaseException] = []

        def work() -> None:
            try:
                on_started_leading(leadership)
            except BaseException as error:  # noqa: BLE001  # handed to whoever runs the election
                failed.append(error)
                leadership.stop()

        worker = threading.Thread(target=work, name="leases-leader", daemon=True)
        worker.start()
        try:
            leadership.stopping.wait()
            if leadership.loss is None:
                worker.join()  # never release while the work still runs
            self._leadership = None
            _call(on_stopped_leading)
            worker.join()  # nor lead again while it does
            leadership.close()
        except BaseException:  # Ctrl-C: the work may still run, so that nobody may be let in yet
            self._leadership = None
            leadership.stop()
            self._registry.keeper.lose(leadership.lease, Loss.OVERDUE)  # not extended any more, it expires
            raise
        if failed:
            raise failed[0]

    def _lost(self, _session: StreamSession, _loss: Loss) -> None:
        self._changed.set()

    def _heard(self, payload: str) -> None:
        if payload == f"free:{POOL}":
            self._changed.set()


def _call(callback: Callable[..., object], *args: object) -> None:
    """Tell somebody whose errors must not end the election."""
    try:
        callback(*args)
    except Exception:
        logger.exception("a callback of an election failed")
