"""`SessionRegistry`: what a process owns, in place of its in-memory map of sessions.

    with SessionRegistry(store) as registry:
        with registry.open("orders/7") as session:          # LeaseHeld if somebody else has it
            for batch in read_from(session.checkpoint):
                session.append(batch.events, checkpoint=batch.end)

Sessions of a process are renewed together, by its `keeper`, on the threads of its `heart`. What becomes of each is told
to whoever listens. A registry whose process ends in an orderly way, be it without `close`, releases what it holds.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import version
from types import MappingProxyType, TracebackType
from typing import Final, Self
from uuid import UUID, uuid4
from weakref import WeakMethod

from sqlalchemy import Connection

from leases import administration, fleet, fork, limits, operations
from leases.errors import ConfigError, LeaseHeld, LeasesError, OutcomeUnknown, StoreUnavailable
from leases.heart import Heart
from leases.keeper import Health, Keeper, Told
from leases.line import Line
from leases.model import DEFAULT_POOL, JSON, Ending, Lease, Loss, Membership, Released, Stray, by_operator
from leases.session import StreamSession, leave
from leases.store import EventLog, LeaseStore
from leases.trust import Clock, Window, monotonic

logger = logging.getLogger("leases")

DEFAULT_TTL: Final = timedelta(seconds=15)


def incarnation() -> str:
    """Name this process, as no other one is or will be named: `host:pid:random`."""
    return f"{socket.gethostname()[:200]}:{os.getpid()}:{secrets.token_hex(4)}"


class SessionRegistry:
    """The sessions of one process. Safe to share between threads; not after a fork.

    `owner` names this incarnation of the process: never the same for two processes, or for one and its successor. `ttl`
    is how long the database keeps a lease without a heartbeat; a heartbeat goes out every third of it. Callbacks get
    the session (`on_lost` also the reason, `on_beat` nothing); they run on the heart's threads, must be quick, and may
    not raise. `heard` is told of notifications (PostgreSQL). `competes` is for workers: the pool's others see this
    process with its `capacity` and `weight`, and what an operator moves to it becomes a session of its own accord.
    Without `threads` nothing happens by itself: whoever made it beats, as tests in virtual time do.
    """

    def __init__(
        self,
        store: LeaseStore,
        *,
        owner: str | None = None,
        ttl: timedelta = DEFAULT_TTL,
        pool: str = DEFAULT_POOL,
        on_granted: Callable[[StreamSession], object] | None = None,
        on_renewed: Callable[[StreamSession], object] | None = None,
        on_lost: Callable[[StreamSession, Loss], object] | None = None,
        on_released: Callable[[StreamSession], object] | None = None,
        on_stopping: Callable[[StreamSession], object] | None = None,
        on_beat: Callable[[int], object] | None = None,
        heard: Callable[[str], object] = lambda _: None,
        competes: bool = False,
        capacity: int | None = None,
        weight: float = 1.0,
        clock: Clock = monotonic,
        threads: bool = True,
    ) -> None:
        self.store = store
        self.log = EventLog(store)
        self.owner = limits.owner(incarnation() if owner is None else owner)
        self.ttl = limits.ttl(ttl)
        self.pool = limits.pool(pool)
        self.now_s = clock
        self._on_granted = on_granted
        self._on_renewed = on_renewed
        self._on_lost = on_lost
        self._on_released = on_released
        self._on_stopping = on_stopping
        self._on_beat = on_beat
        self._adopts = competes
        self._lock = threading.Lock()
        self._sessions: dict[str, StreamSession] = {}
        self._unanswered: deque[UUID] = deque(maxlen=1000)
        host, pid = socket.gethostname(), os.getpid()
        member = Membership(
            self.owner, host, pid, version("leases"), self.pool if competes else None, capacity, weight, uuid4()
        )
        told = Told(self._renewed, self._lost, self._ending, self._may_adopt, self._adopted, self._unanswered.append)
        self.keeper = Keeper(member, Window.of(self.ttl), told, counts=not competes, clock=clock)
        self.heart = Heart(store, self.keeper, heard=heard) if threads else None
        fork.tell(self)

    @property
    def sessions(self) -> Mapping[str, StreamSession]:
        """The open sessions by stream_id, as they are now."""
        with self._lock:
            return MappingProxyType(dict(self._sessions))

    def start(self) -> None:
        """Begin to beat, which `open` and `claim` also do. A second call is harmless; `ConfigError` after `close`."""
        if self.heart is not None and self.heart.start():
            atexit.register(_close_at_exit, WeakMethod(self._close_with_interpreter))

    def open(self, stream_id: str, *, wait: timedelta = timedelta(0)) -> StreamSession:
        """Acquire the stream's lease and open a session; `LeaseHeld` if that cannot be had within `wait`."""
        session = self.try_open(stream_id, wait=wait)
        if session is not None:
            return session
        info = self.store.get(stream_id)
        if info is None or (info.live and info.owner == self.owner):
            what = "open in this process already"
        else:
            what = f"held by {info.owner}" if info.live else str(info.state)
        raise LeaseHeld(
            f"{stream_id!r} is {what}; try again later, or wait for it",
            stream_id=stream_id,
            owner=None if info is None else info.owner,
        )

    def try_open(self, stream_id: str, *, wait: timedelta = timedelta(0)) -> StreamSession | None:
        """Acquire the stream's lease and open a session; None if that cannot be had within `wait`."""
        self.start()
        sent = _Stamp(self.now_s)
        lease = self.store.acquire(
            stream_id, owner=self.owner, ttl=self.ttl, pool=self.pool, wait=wait, before_send=sent
        )
        return None if lease is None else self._opened(lease, sent.at_s)

    def claim(self, limit: int, *, pool: str | None = None) -> list[StreamSession]:
        """Open sessions on up to `limit` streams of the pool that are free or were left behind by a dead owner."""
        self.start()
        sent = _Stamp(self.now_s)
        leases = self.store.claim(owner=self.owner, ttl=self.ttl, limit=limit, pool=pool or self.pool, before_send=sent)
        return [self._opened(lease, sent.at_s) for lease in leases]

    def claim_on(self, line: Line, limit: int) -> list[StreamSession]:
        """`claim`, once, on a worker's own line: its row tells the new count in the same moment.

        Where the answer is lost, what was granted all the same is found by a heartbeat, and adopted.
        """
        held, claim_id, sent_at_s = self.keeper.held, uuid4(), self.now_s()
        try:
            leases = line.run(
                lambda connection: operations.claim(
                    connection,
                    owner=self.owner,
                    ttl=self.ttl,
                    limit=limit,
                    pool=self.pool,
                    claim_id=claim_id,
                    held=held,
                )
            )
        except LeasesError:
            self._unanswered.append(claim_id)
            raise
        return [self._opened(lease, sent_at_s) for lease in leases]

    def health(self) -> Health:
        """How the heartbeats are: for a liveness probe, compare `beat_age` with the ttl."""
        return self.keeper.health()

    def close(self) -> None:
        """Release every session and stop the heartbeats. A second call is harmless.

        All are released together. Those whose row somebody has locked are waited for after that, each no longer than
        its lease would last. What went wrong is raised at the end; what could not be released expires by itself.
        """
        try:
            if not self.keeper.inherited:
                self._close_all()
        finally:
            if self.heart is None:
                self.keeper.close()
            else:
                self.heart.stop()

    def _close_with_interpreter(self) -> None:
        """Release what an interpreter that ends still holds, on the heart's line: it is cut, should it hang."""
        if self.heart is None or self.keeper.inherited or self.heart.stopped:
            return
        endings = [Ending(session.lease) for session in self._end(self.sessions.values())]

        def leave_all(connection: Connection) -> None:
            operations.release_all(connection, endings, owner=self.owner)
            fleet.dismiss(connection, self.owner)

        self.heart.watched.append(self.heart.line)
        with suppress(LeasesError):  # what cannot be released expires by itself
            self.heart.line.run(leave_all)
        self.heart.stop(dismiss=False)

    def orphan(self) -> None:
        """Hear that this is a forked child's copy: none of the sessions is its own."""
        for session in self._sessions.values():
            session.orphan()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave(self.close, error)

    # --- releasing -------------------------------------------------------------------------------------------------

    def release_on(self, line: Line, endings: Mapping[StreamSession, Ending]) -> list[StreamSession]:
        """Release sessions whose work has ended, together, on a worker's own line; their count changes with them.

        Return those whose row was locked, and so is not released; a second call may be luckier. Raises what the store
        raises: then they have ended all the same, and a second call releases them.
        """
        self._end(endings)
        held = self.keeper.held_but(session.lease for session in endings)
        answer = line.run(
            lambda connection: operations.release_all(connection, endings.values(), owner=self.owner, held=held)
        )
        locked = [session for session in endings if session.stream_id in answer.locked]
        for session in endings.keys() - set(locked):
            self.keeper.gone(session.lease)
            if session.stream_id in answer.released:
                self._released(session)
        return locked

    def _close(self, session: StreamSession, checkpoint: JSON) -> None:
        if self.keeper.inherited:
            return
        if checkpoint is not None:
            limits.document("checkpoint", checkpoint)
        held = self._end([session]).get(session)
        if held is None:
            return
        # Also when it is lost: our row, if it is still ours, need not wait for its expiry now that the work has ended.
        kept = checkpoint if held else None
        try:
            released = self.store.run(lambda connection: self._release(connection, session.lease, kept))
        finally:
            self.keeper.gone(session.lease)
        if released:
            self._released(session)

    def _close_all(self) -> None:
        ended = list(self._end(self.sessions.values()))
        failures: list[LeasesError] = []
        left = ended
        try:
            while left:
                left = self._release_together(left)
                if left:
                    # Whoever has locked one row often has others, as our own last beat has: wait for one, then try all.
                    failures += self._release_alone(left.pop(0))
        finally:
            for session in ended:
                self.keeper.gone(session.lease)
        if failures:
            raise failures[0]

    def _release_together(self, sessions: Sequence[StreamSession]) -> list[StreamSession]:
        """Release sessions in one statement; return those whose row was locked."""

        def release(connection: Connection) -> Released:
            administration.bound(connection, self.ttl.total_seconds())
            endings = [Ending(session.lease) for session in sessions]
            return operations.release_all(connection, endings, owner=self.owner)

        answer = self.store.run(release)
        for session in sessions:
            if session.stream_id in answer.released:
                self._released(session)
        return [session for session in sessions if session.stream_id in answer.locked]

    def _release_alone(self, session: StreamSession) -> list[LeasesError]:
        """Release a session whose row was locked; return what went wrong, or raise it if it would be so for others."""
        try:
            if self.store.run(lambda connection: self._release(connection, session.lease, None)):
                self._released(session)
        except (StoreUnavailable, OutcomeUnknown):
            raise
        except LeasesError as failure:
            return [failure]
        return []

    def _end(self, sessions: Iterable[StreamSession]) -> Mapping[StreamSession, bool]:
        """End sessions in this process, before the database hears of it: those that had not, and if each was held."""
        held = {}
        with self._lock:
            for session in sessions:
                if not session._closed:
                    session._closed = True
                    if self._sessions.get(session.stream_id) is session:
                        del self._sessions[session.stream_id]
                    held[session] = self.keeper.drop(session.lease)
        for session in held:
            session.stop()
        return held

    def _release(self, connection: Connection, lease: Lease, checkpoint: JSON) -> bool:
        # A row that somebody has locked holds us up no longer than its lease would last.
        administration.bound(connection, self.ttl.total_seconds())
        return operations.release(connection, lease, checkpoint=checkpoint)

    def _released(self, session: StreamSession) -> None:
        log(logging.INFO, "released", session.lease)
        self._tell(self._on_released, session)

    # --- what happens to sessions ----------------------------------------------------------------------------------

    def _opened(self, lease: Lease, sent_at_s: float, *, moved_here: bool = False) -> StreamSession:
        session = StreamSession(self, lease)
        session.moved_here = moved_here
        displaced = self.sessions.get(lease.stream_id)
        if displaced is not None:  # its lease had ended, and we are the first to know
            self.keeper.lose(displaced.lease, Loss.TAKEN)
        with self._lock:
            self._sessions[lease.stream_id] = session
        try:
            self.keeper.hold(lease, sent_at_s)
        except ConfigError:  # closed while we waited for the lease
            with self._lock:
                self._sessions.pop(lease.stream_id, None)
            self.store.release(lease)
            raise
        log(logging.INFO, "granted", lease)
        self._tell(self._on_granted, session)
        return session

    def _may_adopt(self, stray: Stray) -> bool:
        return self._adopts and (by_operator(stray.claim_id) or stray.claim_id in self._unanswered)

    def _adopted(self, lease: Lease, sent_at_s: float) -> None:
        with suppress(ConfigError):  # closed meanwhile
            self._opened(lease, sent_at_s, moved_here=True)

    def _renewed(self, leases: Collection[Lease]) -> None:
        if self._on_renewed is not None:
            for session in self._of(lease.stream_id for lease in leases):
                self._tell(self._on_renewed, session)
        if self._on_beat is not None:
            self._on_beat(len(leases))

    def _lost(self, lease: Lease, loss: Loss) -> None:
        with self._lock:
            session = self._sessions.get(lease.stream_id)
            if session is None or session.lease is not lease:
                return
            del self._sessions[lease.stream_id]
        session.mark_lost(loss)
        log(logging.WARNING, f"lost ({loss})", lease)
        if self._on_lost is not None:
            self._on_lost(session, loss)

    def _ending(self, stream_ids: Collection[str]) -> None:
        for session in self._of(stream_ids):
            if not session.stopping.is_set():
                session.stop()
                self._tell(self._on_stopping, session)

    def _of(self, stream_ids: Iterable[str]) -> Sequence[StreamSession]:
        with self._lock:
            return [self._sessions[stream_id] for stream_id in stream_ids if stream_id in self._sessions]

    def _tell(self, callback: Callable[[StreamSession], object] | None, session: StreamSession) -> None:
        if callback is None:
            return
        try:
            callback(session)
        except Exception:
            logger.exception("a callback failed")


def _close_at_exit(close: WeakMethod[Callable[[], None]]) -> None:
    still = close()
    if still is not None:
        still()


class _Stamp:
    """Notes when a request is about to be sent: the last one, if it is sent again."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.at_s = clock()

    def __call__(self) -> None:
        self.at_s = self._clock()


def log(level: int, what: str, lease: Lease) -> None:
    """Log what has happened to a lease, with its parts as fields."""
    logger.log(
        level, "%s: %s, token %d, owner %s", what, lease.stream_id, lease.fencing_token, lease.owner,
        extra=fields(lease),
    )  # fmt: skip


def fields(lease: Lease) -> dict[str, object]:
    """The parts of a lease as the fields of a log line."""
    return {"stream_id": lease.stream_id, "fencing_token": lease.fencing_token, "owner": lease.owner}
