"""The heart: the two threads of a process that keeps leases, and the connection of its own on which it beats.

For sync and async users alike. An event loop starved by CPU work, or an exhausted connection pool, must not cost
leases, so nothing here uses the caller's loop or pool. Two threads, because one of them does I/O and I/O hangs:

    beat    every interval: one statement renews all leases of the process and its row in `lease_workers`; between
            two beats it listens, on the same connection, for what is released, moved or asked of this process
    watch   no I/O: ends what is past its deadline, and cuts the connection of a beat that takes longer than an interval
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from contextlib import suppress

from sqlalchemy import Connection

from leases import administration, fleet
from leases.errors import LeasesError, SchemaOutdated
from leases.keeper import Keeper
from leases.line import Line
from leases.store import LeaseStore
from leases.trust import monotonic

logger = logging.getLogger("leases")

CLOSING_S = 5.0
"""How long `stop` waits for each of what it cannot do by itself: a beat on its way, the database."""

FIRST_RETRY_S = 0.05
"""How soon after a failed beat the next one is tried; each further failure doubles it, up to an interval."""

SPACING_S = 0.02
"""How much time there is between two beats at the least, however often one is asked for."""


class Heart:
    """Beats for a keeper. `heard` is told each notification that is not for this owner alone, on the beat's thread."""

    def __init__(
        self,
        store: LeaseStore,
        keeper: Keeper,
        *,
        heard: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.line = Line(store, listens=True, busy_timeout_s=keeper.window.interval_s)
        self._store = store
        self._keeper = keeper
        self._heard = heard
        self._for_us = f"look:{keeper.member.worker_id}"
        self._turn = threading.Lock()
        self._stopping = threading.Event()
        self._asked = threading.Event()
        self._began_s: float | None = None
        self.watched: list[Line] = []
        """Other lines, on which no call may take longer than a TTL."""
        self._threads: tuple[threading.Thread, ...] = ()

    def start(self) -> bool:
        """Begin to beat; enlists the process. False if it beats already; `ConfigError` after `stop`.

        Looks first whether the store is there, in the caller's thread: what is wrong with it is raised here. (And
        SQLAlchemy's dialect, which both pools share, is complete only after the first connection of one of them.)
        """
        self._keeper.refuse_if_closed()
        if self._threads:
            return False
        self._store.run(lambda _: None, read_only=True)
        with self._turn:
            self._keeper.refuse_if_closed()
            if self._threads:
                return False
            threads = tuple(
                threading.Thread(target=target, name=f"leases-{name}", daemon=True)
                for name, target in (("beat", self._beat_on), ("watch", self._watch_on))
            )
            self._threads = threads  # first: a signal may end this thread's work at any line
            for thread in threads:
                thread.start()
            return True

    @property
    def stopped(self) -> bool:
        """Whether `stop` has been called."""
        return self._stopping.is_set()

    def beat_soon(self) -> None:
        """Beat at once, not when it is time. From any thread."""
        self._asked.set()
        self.line.wake()

    def stop(self, *, dismiss: bool = True) -> None:
        """End the threads, and take the process off the list. Leases that are still kept expire by themselves."""
        if not self._keeper.inherited:
            self._stopping.set()
        self._keeper.close()  # and wakes the watch, which looks whether it is to end
        if self._keeper.inherited:
            return
        self.line.wake()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(min(self._keeper.window.interval_s, CLOSING_S))
                self.line.cut()  # the watch, which would have done so, may have ended first
                thread.join(1)
        hangs = any(thread.is_alive() and thread is not threading.current_thread() for thread in self._threads)
        with suppress(LeasesError):  # its row expires by itself
            if dismiss and self._threads and not hangs:  # also where no beat has told yet that it is enlisted
                self.line.run(self._dismiss)
        if not hangs:
            self.line.close()

    def _dismiss(self, connection: Connection) -> None:
        administration.bound(connection, CLOSING_S)
        fleet.dismiss(connection, self._keeper.member.worker_id)

    # --- beat --------------------------------------------------------------------------------------------------

    def _beat_on(self) -> None:
        # The first interval is shorter by a random part: the beats of a fleet that started together spread out.
        spread = random.uniform(0.2, 1.0)
        while not self._stopping.is_set():
            began_s = monotonic()
            self._asked.clear()
            try:
                self._beat(began_s)
                next_s, spread = began_s + self._keeper.window.interval_s * spread, 1.0
            except Exception as error:  # noqa: BLE001  # logged; no error of a beat may be the last one
                next_s = monotonic() + self._after_failure(error)
            self._listen(next_s, began_s + SPACING_S)

    def _beat(self, began_s: float) -> None:
        with self._keeper.changed:
            self._began_s = began_s
            self._keeper.changed.notify_all()
        try:
            self._keeper.beat(self.line)
        finally:
            self._began_s = None

    def _after_failure(self, error: Exception) -> float:
        """Note a beat that failed; return how long to wait for the next one."""
        owner = self._keeper.member.worker_id
        if not isinstance(error, LeasesError):
            logger.exception("a heartbeat of %s failed in a way that is not foreseen", owner)
        failures = self._keeper.failed(error)
        logger.warning(
            "heartbeat %d of %s in a row failed, %d leases at stake: %s",
            failures, owner, self._keeper.health().leases, error, extra={"owner": owner},
        )  # fmt: skip
        interval_s = self._keeper.window.interval_s
        if isinstance(error, SchemaOutdated):
            return interval_s
        longest_s: float = min(FIRST_RETRY_S * 2 ** min(failures - 1, 16), interval_s)
        return longest_s * random.uniform(0.5, 1.0)

    def _listen(self, until_s: float, not_before_s: float) -> None:
        """Wait for the next beat's time, or for a reason to beat sooner; pass on what is heard meanwhile."""
        while not self._stopping.is_set():
            if self._asked.is_set():
                until_s = min(until_s, not_before_s)
            left_s = until_s - monotonic()
            if left_s <= 0:
                return
            for payload in self.line.wait(left_s):
                if payload == self._for_us:
                    self._asked.set()
                if payload == self._for_us or not payload.startswith("look:"):
                    try:
                        self._heard(payload)
                    except Exception:
                        logger.exception("a listener of %s failed", self._keeper.member.worker_id)

    # --- watch -------------------------------------------------------------------------------------------------

    def _watch_on(self) -> None:
        interval_s = self._keeper.window.interval_s
        while not self._stopping.is_set():
            self._keeper.end_overdue()
            began_s = self._began_s
            if began_s is not None and monotonic() - began_s >= interval_s and self.line.cut():
                logger.warning("a heartbeat of %s hangs; its connection is cut", self._keeper.member.worker_id)
            for line in self.watched:
                if line.running_s >= self._keeper.window.ttl_s and line.cut():
                    logger.warning("a transaction of %s hangs; its connection is cut", self._keeper.member.worker_id)
            with self._keeper.changed:
                if not self._stopping.is_set():
                    self._keeper.changed.wait(self._until_next_look_s(interval_s))

    def _until_next_look_s(self, interval_s: float) -> float:
        until_s = self._keeper.until_deadline_s()
        if self.watched:
            until_s = min(until_s, interval_s)
        if self._began_s is not None:
            # Where it hangs before it has a connection, there is nothing to cut yet: look again.
            until_s = min(until_s, max(interval_s / 10, self._began_s + interval_s - monotonic()))
        return until_s
