"""`SessionRegistry` and `StreamSession`: what a process owns, in place of its in-memory map of sessions.

    with SessionRegistry(store) as registry:
        with registry.open("orders/7") as session:          # LeaseHeld if somebody else has it
            for batch in read_from(session.checkpoint):
                session.append(batch.events, checkpoint=batch.end)

A session is open from its grant until it is closed or lost, whichever is first:

    open ──> open, stopping (its stream was paused or retired) ──> closed: the lease is released
      └───────────────┴──> lost: another has it, it was revoked, or it could not be extended in time

A lost session's writes are refused by the fence, whatever its holder believes. `lost` and `remaining` tell it sooner,
by this process's own clock, so that it stops. Sessions of a process are renewed together, by its `keeper`.

Releasing is not losing: `close` is called when the work is done, and only then may the next owner start. A lease
whose session is lost while its work still runs is left to expire.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from types import MappingProxyType, TracebackType
from typing import Final, Self

from sqlalchemy import Connection

from leases import administration, limits, operations
from leases.errors import ConfigError, LeaseHeld, LeaseLost, LeasesError, OutcomeUnknown, StaleToken, StoreUnavailable
from leases.keeper import Health, Keeper, Told
from leases.model import DEFAULT_POOL, JSON, Appended, Event, Lease, Loss, Worker
from leases.store import EventLog, LeaseStore
from leases.trust import Clock, Window, monotonic

logger = logging.getLogger("leases")

DEFAULT_TTL: Final = timedelta(seconds=15)
_UNREAD: Final = object()


def incarnation() -> str:
    """Name this process, as no other one is or will be named: `host:pid:random`."""
    return f"{socket.gethostname()[:200]}:{os.getpid()}:{secrets.token_hex(4)}"


class StreamSession:
    """One owned stream. Made by a `SessionRegistry`; a context manager that releases on the way out."""

    def __init__(self, registry: SessionRegistry, lease: Lease) -> None:
        self.lease = lease
        self.loss: Loss | None = None
        """Why the lease was lost, once it is."""
        self.stopping = threading.Event()
        """Set when the session should end: it was lost, or its stream was paused or retired. Finish, and close."""
        self._registry = registry
        self._lost = threading.Event()
        self._closed = False
        self._checkpoint: JSON = _UNREAD

    @property
    def stream_id(self) -> str:
        return self.lease.stream_id

    @property
    def token(self) -> int:
        """The fencing token, for writes to systems that check it themselves."""
        return self.lease.fencing_token

    def remaining(self) -> timedelta:
        """How long the lease may still be trusted, by this process's clock: zero when it is lost or closed."""
        return timedelta(seconds=self._registry.keeper.remaining_s(self.lease))

    @property
    def lost(self) -> threading.Event:
        """The event that is set when the lease is lost. Reading it looks at the deadline first, so it is never late."""
        self.remaining()
        return self._lost

    def check(self) -> None:
        """Raise `LeaseLost` if the lease may not be trusted any more. Cheap: no I/O. Not a fence: see `fenced`."""
        if self.remaining() <= timedelta(0):
            raise LeaseLost(self.stream_id, self.token, self.loss or ("closed" if self._closed else Loss.EXPIRED))

    @contextmanager
    def fenced(self) -> Iterator[Connection]:
        """A transaction of the store's database in which the fence has passed; it commits at the end of the block.

        `LeaseLost` if the lease is known to be lost, `StaleToken` if the fence finds it so: then nothing is kept. On
        PostgreSQL the block must be done within `remaining()`: the server ends the transaction there.
        """
        self.check()
        try:
            with self._registry.store.fenced(self.lease) as connection:
                yield connection
        except StaleToken as error:
            self._refused(error)
            raise

    def append(self, events: Iterable[Event] | Mapping[str, JSON], *, checkpoint: JSON = None) -> Appended:
        """Append events to the stream's log, with the checkpoint, in one fenced transaction; see `events.append`."""
        self.check()
        try:
            appended = self._registry.log.append(self.lease, events, checkpoint=checkpoint)
        except StaleToken as error:
            self._refused(error)
            raise
        if checkpoint is not None:
            self._checkpoint = checkpoint
        return appended

    @property
    def checkpoint(self) -> JSON:
        """Where the work has got to: None if nobody has written it. Read once, then what this session wrote."""
        if self._checkpoint is _UNREAD:
            found = self._registry.store.checkpoint(self.stream_id)
            self._checkpoint = None if found is None else found.checkpoint
        return self._checkpoint

    def save(self, checkpoint: JSON) -> None:
        """Write the checkpoint under the fence: `LeaseLost` or `StaleToken` if the lease is not live."""
        self.check()
        try:
            self._registry.store.write_checkpoint(self.lease, checkpoint)
        except StaleToken as error:
            self._refused(error)
            raise
        self._checkpoint = checkpoint

    def close(self, *, checkpoint: JSON = None) -> None:
        """Release the lease, with a last checkpoint if it is not None. Harmless the second time, and on a lost lease.

        Call it when the work has stopped: the next owner may start at once.
        """
        self._registry._close(self, checkpoint)

    def _refused(self, error: StaleToken) -> None:
        taken = error.current_token != error.fencing_token and error.current_owner is not None
        self._registry.keeper.lose(self.lease, Loss.TAKEN if taken else Loss.REVOKED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _leave(self.close, error)

    def __repr__(self) -> str:
        state = f"lost: {self.loss}" if self.loss else "closed" if self._closed else "open"
        return f"<StreamSession {self.stream_id!r} token {self.token}, {state}>"


class SessionRegistry:
    """The sessions of one process. Safe to share between threads; not after a fork.

    `owner` names this incarnation of the process: never the same for two processes, or for one and its successor. `ttl`
    is how long the database keeps a lease without a heartbeat; a heartbeat goes out every third of it. Callbacks get
    the session (`on_lost` also the reason); they run on the keeper's threads, must be quick, and may not raise.
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
        clock: Clock = monotonic,
    ) -> None:
        self.store = store
        self.log = EventLog(store)
        self.owner = limits.owner(incarnation() if owner is None else owner)
        self.ttl = limits.ttl(ttl)
        self.pool = limits.pool(pool)
        self._on_granted = on_granted
        self._on_renewed = on_renewed
        self._on_lost = on_lost
        self._on_released = on_released
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, StreamSession] = {}
        worker = Worker(self.owner, socket.gethostname(), os.getpid(), version("leases"))
        told = Told(self._renewed, self._lost, self._ending)
        self.keeper = Keeper(store, worker, Window.of(self.ttl), told, clock=clock)

    @property
    def sessions(self) -> Mapping[str, StreamSession]:
        """The open sessions by stream_id, as they are now."""
        with self._lock:
            return MappingProxyType(dict(self._sessions))

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
        self.keeper.start()
        sent = _Stamp(self._clock)
        lease = self.store.acquire(
            stream_id, owner=self.owner, ttl=self.ttl, pool=self.pool, wait=wait, before_send=sent
        )
        return None if lease is None else self._opened(lease, sent.at_s)

    def claim(self, limit: int, *, pool: str | None = None) -> list[StreamSession]:
        """Open sessions on up to `limit` streams of the pool that are free or were left behind by a dead owner."""
        self.keeper.start()
        sent = _Stamp(self._clock)
        leases = self.store.claim(owner=self.owner, ttl=self.ttl, limit=limit, pool=pool or self.pool, before_send=sent)
        return [self._opened(lease, sent.at_s) for lease in leases]

    def health(self) -> Health:
        """How the heartbeats are: for a liveness probe, compare `beat_age` with the ttl."""
        return self.keeper.health()

    def close(self) -> None:
        """Release every session and stop the heartbeats. A second call is harmless.

        All are tried, unless the store is not there; the first failure is raised at the end. What could not be released
        expires by itself.
        """
        failures: list[LeasesError] = []
        for session in self.sessions.values():
            try:
                session.close()
            except LeasesError as error:
                failures.append(error)
                if isinstance(error, StoreUnavailable | OutcomeUnknown):
                    break  # it would be so for each of them, and each would try for long
        self.keeper.stop()
        if failures:
            raise failures[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _leave(self.close, error)

    # --- what happens to sessions ------------------------------------------------------------------------------

    def _opened(self, lease: Lease, sent_at_s: float) -> StreamSession:
        session = StreamSession(self, lease)
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
        _log(logging.INFO, "granted", lease)
        self._tell(self._on_granted, session)
        return session

    def _close(self, session: StreamSession, checkpoint: JSON) -> None:
        if self.keeper.inherited:
            return
        if checkpoint is not None:
            limits.document("checkpoint", checkpoint)
        with self._lock:
            if session._closed:
                return
            session._closed = True
            if self._sessions.get(session.stream_id) is session:
                del self._sessions[session.stream_id]
        held = self.keeper.drop(session.lease)
        session.stopping.set()
        # Also when it is lost: our row, if it is still ours, need not wait for its expiry now that the work has ended.
        kept = checkpoint if held else None
        released = self.store.run(lambda connection: self._release(connection, session.lease, kept))
        if released:
            _log(logging.INFO, "released", session.lease)
            self._tell(self._on_released, session)

    def _release(self, connection: Connection, lease: Lease, checkpoint: JSON) -> bool:
        # A row that somebody has locked holds us up no longer than its lease would last.
        administration.bound(connection, self.ttl.total_seconds())
        return operations.release(connection, lease, checkpoint=checkpoint)

    def _renewed(self, leases: Collection[Lease]) -> None:
        if self._on_renewed is not None:
            for session in self._of(lease.stream_id for lease in leases):
                self._tell(self._on_renewed, session)

    def _lost(self, lease: Lease, loss: Loss) -> None:
        with self._lock:
            session = self._sessions.get(lease.stream_id)
            if session is None or session.lease is not lease:
                return
            del self._sessions[lease.stream_id]
        session.loss = loss
        session._lost.set()
        session.stopping.set()
        _log(logging.WARNING, f"lost ({loss})", lease)
        if self._on_lost is not None:
            self._on_lost(session, loss)

    def _ending(self, stream_ids: Collection[str]) -> None:
        for session in self._of(stream_ids):
            session.stopping.set()

    def _of(self, stream_ids: Iterable[str]) -> list[StreamSession]:
        with self._lock:
            return [self._sessions[stream_id] for stream_id in stream_ids if stream_id in self._sessions]

    def _tell(self, callback: Callable[[StreamSession], object] | None, session: StreamSession) -> None:
        if callback is None:
            return
        try:
            callback(session)
        except Exception:
            logger.exception("a callback failed")


def _leave(close: Callable[[], None], error: BaseException | None) -> None:
    """Close on the way out of a block; an error that is on its way already is not replaced by one of closing."""
    try:
        close()
    except LeasesError as failure:
        if error is None:
            raise
        error.add_note(f"and not all could be released: {failure}")


class _Stamp:
    """Notes when a request is about to be sent: the last one, if it is sent again."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.at_s = clock()

    def __call__(self) -> None:
        self.at_s = self._clock()


def _log(level: int, what: str, lease: Lease) -> None:
    logger.log(
        level, "%s: %s, token %d, owner %s", what, lease.stream_id, lease.fencing_token, lease.owner,
        extra={"stream_id": lease.stream_id, "fencing_token": lease.fencing_token, "owner": lease.owner},
    )  # fmt: skip
