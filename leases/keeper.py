"""The keeper: the heartbeats of a process, on a thread and a connection of their own.

For sync and async users alike. An event loop starved by CPU work, or an exhausted connection pool, must not cost
leases, so nothing here uses the caller's loop or pool.

Two threads, because one of them does I/O and I/O hangs:

    beat    every interval: one statement renews all leases of the process and its row in `lease_workers`
    watch   no I/O: ends what is past its deadline, and cuts the connection of a beat that takes longer than an interval

A lease that is kept, and how it ends:

                     beat: extended
                       ┌──────┐
    hold ──────────> kept ────┘ ── beat: the row says it is another's ──> lost (taken, revoked, released, expired)
                       │ └──────── watch: the deadline has passed ──────> lost (expired)
                       └────────── drop ──> no longer kept (its owner releases it)

Whatever happens to the beats, the watch ends a lease at its deadline, which is before the database's expiry (see
`trust`). A beat that fails is tried again, sooner than the next would be; what it did not extend keeps the deadline
it had. A row that somebody else has locked is skipped, and keeps its deadline too: the others are extended.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import sqlite3
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
from sqlalchemy import Connection

from leases import administration, operations
from leases.engine import BUSY_OPTION, dedicated
from leases.errors import ConfigError, LeasesError, SchemaOutdated
from leases.model import Lease, Loss, Renewal, Worker
from leases.store import LeaseStore
from leases.trust import Clock, Window, monotonic

logger = logging.getLogger("leases")

CLOSING_S = 5.0
"""How long `stop` waits for each of what it cannot do by itself: a beat on its way, the database."""

STRAYS_EVERY = 3
"""How many beats from one look for rows in our name that have expired unnoticed to the next: about one a TTL."""

FIRST_RETRY_S = 0.05
"""How soon after a failed beat the next one is tried; each further failure doubles it, up to an interval."""


@dataclass(frozen=True, slots=True)
class Health:
    """How the heartbeats are: for a probe. `beat_age` is None before the first good beat."""

    beat_age: timedelta | None
    failures: int
    last_error: str | None
    leases: int


@dataclass(frozen=True, slots=True)
class Told:
    """Whom the keeper tells. Called on its threads, without its lock; what they raise is logged, and ends nothing."""

    renewed: Callable[[Collection[Lease]], object]
    lost: Callable[[Lease, Loss], object]
    ending: Callable[[Collection[str]], object]


@dataclass(slots=True)
class _Kept:
    lease: Lease
    deadline_s: float


class Keeper:
    """Keeps leases alive until they are dropped or lost. `start` before the first `hold`; `stop` ends the threads.

    `clock` is this process's monotonic one. After a fork the child's keeper keeps nothing.
    """

    def __init__(
        self, store: LeaseStore, worker: Worker, window: Window, told: Told, *, clock: Clock = monotonic
    ) -> None:
        self.window = window
        self._store_given = store
        self._worker = worker
        self._told = told
        self._clock = clock
        self._pid = os.getpid()
        engine = dedicated(store.base_engine)
        busy = {BUSY_OPTION: max(1, int(window.interval_s * 1000))}
        self._store = LeaseStore(engine.execution_options(**busy), schema=store.schema, retry_for=timedelta(0))
        self._store.closes_engine = engine is not store.base_engine
        self._kept: dict[str, _Kept] = {}
        self._enlisted = False
        self._beats = 0
        self._beaten_at_s: float | None = None
        self._failures = 0
        self._last_error: str | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._stopping = threading.Event()
        self._threads: tuple[threading.Thread, ...] = ()
        # What the beat is doing, for the watch: guarded by `_cutting`, so that no connection is cut after its beat.
        self._cutting = threading.Lock()
        self._in_flight: tuple[float, Any] | None = None

    # --- what the registry asks for ----------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to beat; enlists the process. A second call is harmless; `ConfigError` after `stop`.

        Looks first whether the store is there, in the caller's thread: what is wrong with it is raised here. (And
        SQLAlchemy's dialect, which both pools share, is complete only after the first connection of one of them.)
        """
        if self.inherited:
            raise ConfigError("this registry is the parent process's; make a store and a registry after the fork")
        if not self._threads:
            self._store_given.run(lambda _: None, read_only=True)
        with self._lock:
            self._refuse_if_closed()
            if self._threads:
                return
            threads = tuple(
                threading.Thread(target=target, name=f"leases-{name}", daemon=True)
                for name, target in (("beat", self._beat_on), ("watch", self._watch_on))
            )
            for thread in threads:
                thread.start()
            self._threads = threads

    def stop(self) -> None:
        """End the threads, and take the process off the list. Leases that are still kept expire by themselves."""
        if self.inherited:
            return
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(min(self.window.interval_s, CLOSING_S))
                self._cut_beat()  # the watch, which would have done so, may have ended first
                thread.join(1)
        with suppress(LeasesError):  # its row expires by itself
            if self._enlisted:
                self._store.run(self._dismiss)
        self._store.close()

    def _dismiss(self, connection: Connection) -> None:
        administration.bound(connection, CLOSING_S)
        operations.dismiss(connection, self._worker.worker_id)

    def hold(self, lease: Lease, sent_at_s: float) -> None:
        """Keep a lease alive whose request was sent at `sent_at_s`, by this keeper's clock."""
        kept = _Kept(lease, self.window.deadline(sent_at_s, lease.remaining.total_seconds()))
        with self._changed:
            self._refuse_if_closed()
            self._kept[lease.stream_id] = kept
            self._changed.notify_all()

    def _refuse_if_closed(self) -> None:
        if self._stopping.is_set():
            raise ConfigError("this registry is closed; make a new one")

    def drop(self, lease: Lease) -> bool:
        """Keep a lease no longer; False if it was not kept any more."""
        with self._lock:
            return self._take_out(lease) is not None

    def lose(self, lease: Lease, loss: Loss) -> None:
        """End a lease of which somebody else has learnt that it is lost: a fence has refused it."""
        with self._lock:
            taken = self._take_out(lease)
        if taken is not None:
            self._tell_lost(lease, loss)

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

    def health(self) -> Health:
        """How the heartbeats are."""
        with self._lock:
            age = None if self._beaten_at_s is None else timedelta(seconds=self._clock() - self._beaten_at_s)
            return Health(age, self._failures, self._last_error, len(self._kept))

    def _take_out(self, lease: Lease) -> _Kept | None:
        kept = self._kept.get(lease.stream_id)
        if kept is None or kept.lease.fencing_token != lease.fencing_token:
            return None
        return self._kept.pop(lease.stream_id)

    # --- beat --------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Renew everything once. Raises what the store raises; then nothing is known to have been extended."""
        with self._lock:
            leases = [kept.lease for kept in self._kept.values()]
        owner = self._worker.worker_id
        if not self._enlisted:  # waits for nobody, whoever has locked the row
            self._send(lambda connection: operations.enlist(connection, self._worker, ttl=self._ttl))
        sent_at_s = self._clock()
        renewal = self._send(lambda connection: operations.renew(connection, leases, owner=owner, ttl=self._ttl))
        self._enlisted = renewal.worker_known
        self._apply(renewal, {lease.stream_id: lease for lease in leases}, sent_at_s)
        if self._beats % STRAYS_EVERY == 0:
            self._send(lambda connection: operations.let_go_expired(connection, owner=owner))
        self._beats += 1

    @property
    def _ttl(self) -> timedelta:
        return timedelta(seconds=self.window.ttl_s)

    def _send(self, call: Callable[[Connection], Any]) -> Any:
        def run(connection: Connection) -> Any:
            with self._cutting:
                self._in_flight = (self._clock(), connection.connection.driver_connection)
            with self._changed:
                self._changed.notify_all()
            return call(connection)

        try:
            return self._store.run(run)
        finally:
            with self._cutting:
                self._in_flight = None

    def _apply(self, renewal: Renewal, asked: Mapping[str, Lease], sent_at_s: float) -> None:
        deadline_s = self.window.deadline(sent_at_s)
        renewed = []
        lost = []
        with self._changed:
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
            self._changed.notify_all()
        for lease in lost:
            self._tell_lost(lease, renewal.lost[lease.stream_id])
        self._tell(self._told.renewed, renewed)
        if renewal.ending:
            self._tell(self._told.ending, renewal.ending)

    def _beat_on(self) -> None:
        pause_s = 0.0
        while not self._stopping.wait(pause_s):
            began_s = self._clock()
            try:
                self.beat()
                # Early by a little, and never the same: the beats of a fleet that started together spread out.
                pause_s = max(0.0, self.window.interval_s * random.uniform(0.9, 1.0) - (self._clock() - began_s))
            except Exception as error:
                if not isinstance(error, LeasesError):
                    logger.exception("a heartbeat of %s failed in a way that is not foreseen", self._worker.worker_id)
                with self._lock:
                    self._failures += 1
                    self._last_error = str(error)
                    failures, leases = self._failures, len(self._kept)
                logger.warning(
                    "heartbeat %d of %s in a row failed, %d leases at stake: %s",
                    failures, self._worker.worker_id, leases, error,
                    extra={"owner": self._worker.worker_id},
                )  # fmt: skip
                if isinstance(error, SchemaOutdated):
                    pause_s = self.window.interval_s
                else:
                    pause_s = min(FIRST_RETRY_S * 2 ** min(failures - 1, 16), self.window.interval_s) * (
                        0.5 + random.random() / 2
                    )

    # --- watch -------------------------------------------------------------------------------------------------

    def _watch_on(self) -> None:
        while not self._stopping.is_set():
            self.end_overdue()
            self._cut_hung_beat()
            with self._changed:
                if not self._stopping.is_set():
                    self._changed.wait(self._until_next_look_s())

    def end_overdue(self) -> None:
        """End every lease whose deadline has passed."""
        now_s = self._clock()
        with self._lock:
            overdue = [kept.lease for kept in self._kept.values() if kept.deadline_s <= now_s]
            for lease in overdue:
                del self._kept[lease.stream_id]
        for lease in overdue:
            self._tell_lost(lease, Loss.EXPIRED)

    def _until_next_look_s(self) -> float:
        moments = [kept.deadline_s for kept in self._kept.values()]
        in_flight = self._in_flight
        if in_flight is not None:
            moments.append(in_flight[0] + self.window.interval_s)
        return max(0.0, min(moments, default=self._clock() + 60) - self._clock())

    def _cut_hung_beat(self) -> None:
        in_flight = self._in_flight
        if in_flight is not None and self._clock() - in_flight[0] >= self.window.interval_s:
            self._cut_beat()

    def _cut_beat(self) -> None:
        with self._cutting:
            if self._in_flight is None:
                return
            connection = self._in_flight[1]
            self._in_flight = None
            logger.warning("a heartbeat of %s hangs; its connection is cut", self._worker.worker_id)
            cut(connection)

    # --- tell --------------------------------------------------------------------------------------------------

    def _tell_lost(self, lease: Lease, loss: Loss) -> None:
        self._tell(self._told.lost, lease, loss)

    def _tell(self, callback: Callable[..., object], *args: Any) -> None:
        try:
            callback(*args)
        except BaseException:  # a caller's mistake, or its sys.exit(), must not end the heartbeats
            logger.exception("a callback of %s failed", self._worker.worker_id)


def cut(connection: Any) -> None:
    """Break a driver's connection from another thread: whoever waits on it gets an error at once."""
    if isinstance(connection, sqlite3.Connection):
        with suppress(sqlite3.Error):  # closed meanwhile
            connection.interrupt()
    elif isinstance(connection, psycopg.Connection):
        # By the socket, not by close(): libpq's connection belongs to the thread that waits on it.
        with suppress(OSError, psycopg.Error):
            with socket.socket(fileno=os.dup(connection.fileno())) as copy:
                copy.shutdown(socket.SHUT_RDWR)
