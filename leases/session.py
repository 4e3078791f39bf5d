"""`StreamSession`: one owned stream, from its grant until it is closed or lost.

    open ──> open, stopping (paused, retired, shed, or the worker drains) ──> closed: the lease is released
      └───────────────┴──> lost: another has it, it was revoked, it was not extended in time, or its handler stalled

A lost session's writes are refused by the fence, whatever its holder believes. `lost` and `remaining` tell it sooner,
by this process's own clock, so that it stops. Releasing is not losing: `close` is called when the work is done, and
only then may the next owner start. A lease whose session is lost while its work still runs is left to expire.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from sqlalchemy import Connection

from leases.errors import LeaseLost, LeasesError, StaleToken
from leases.model import JSON, Appended, Event, Lease, Loss

if TYPE_CHECKING:
    from leases.registry import SessionRegistry

_UNREAD: Final = object()


class StreamSession:
    """One owned stream. Made by a `SessionRegistry`; a context manager that releases on the way out."""

    def __init__(self, registry: SessionRegistry, lease: Lease) -> None:
        self.lease = lease
        self.loss: Loss | None = None
        """Why the lease was lost, once it is."""
        self.stopping = threading.Event()
        """Set when the session should end: it was lost, its stream paused, retired or shed. Finish, and close."""
        self.granted_at_s = self.moved_at_s = registry.now_s()
        """When its work last moved on, by this process's clock: it wrote something, or called `progress`."""
        self.wrote = 0
        """How often it has written under the fence."""
        self._registry = registry
        self._lost = threading.Event()
        self._closed = False
        self._checkpoint: JSON = _UNREAD
        self._on_stopping: Callable[[], object] | None = None

    @property
    def stream_id(self) -> str:
        return self.lease.stream_id

    @property
    def token(self) -> int:
        """The fencing token, for writes to systems that check it themselves."""
        return self.lease.fencing_token

    @property
    def closed(self) -> bool:
        """Whether it has ended, by `close` or by a loss."""
        return self._closed or self.loss is not None

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

    async def until_stopping(self) -> None:
        """Wait for `stopping`, under asyncio: for a handler that loops. One at a time."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(woken.set)

        self._on_stopping = wake
        try:
            if not self.stopping.is_set():
                await woken.wait()
        finally:
            self._on_stopping = None

    def stop(self) -> None:
        """Ask the session's work to end: sets `stopping`. A second call is harmless."""
        self.stopping.set()
        notify = self._on_stopping
        if notify is not None:
            notify()

    def progress(self) -> None:
        """Say that the work moves on, though it writes nothing: see `Worker`, `stall_timeout`."""
        self.moved_at_s = self._registry.now_s()

    # --- its writes ------------------------------------------------------------------------------------------------

    @contextmanager
    def fenced(self) -> Iterator[Connection]:
        """A transaction of the store's database in which the fence has passed; it commits at the end of the block.

        `LeaseLost` if the lease is known to be lost, `StaleToken` if the fence finds it so: then nothing is kept. On
        PostgreSQL the block must be done within `remaining()`: the server ends the transaction there.
        """
        with self.writing(), self._registry.store.fenced(self.lease) as connection:
            yield connection

    def append(self, events: Iterable[Event] | Mapping[str, JSON], *, checkpoint: JSON = None) -> Appended:
        """Append events to the stream's log, with the checkpoint, in one fenced transaction; see `events.append`."""
        with self.writing():
            appended = self._registry.log.append(self.lease, events, checkpoint=checkpoint)
        if checkpoint is not None:
            self.remember(checkpoint)
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
        with self.writing():
            self._registry.store.write_checkpoint(self.lease, checkpoint)
        self.remember(checkpoint)

    def remember(self, checkpoint: JSON) -> None:
        """Note a checkpoint that has been written."""
        self._checkpoint = checkpoint

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Refuse what is known to be lost; learn from a fence that refuses; note what was written."""
        self.check()
        try:
            yield
        except StaleToken as error:
            if error.stream_id == self.stream_id and error.fencing_token == self.token:
                taken = error.current_token != error.fencing_token and error.current_owner is not None
                self._registry.keeper.lose(self.lease, Loss.TAKEN if taken else Loss.REVOKED)
            raise
        self.wrote += 1
        self.progress()

    # --- its end ---------------------------------------------------------------------------------------------------

    def close(self, *, checkpoint: JSON = None) -> None:
        """Release the lease, with a last checkpoint if it is not None. Harmless the second time, and on a lost lease.

        Call it when the work has stopped: the next owner may start at once.
        """
        self._registry._close(self, checkpoint)

    def mark_lost(self, loss: Loss) -> None:
        """Hear from the registry that the lease is lost."""
        self.loss = loss
        self._lost.set()
        self.stop()

    def orphan(self) -> None:
        """Be lost in a forked child; the events are new, since the parent may have been using the old ones."""
        self.loss = self.loss or Loss.TAKEN
        self._lost, self.stopping = threading.Event(), threading.Event()
        self._lost.set()
        self.stopping.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave(self.close, error)

    def __repr__(self) -> str:
        state = f"lost: {self.loss}" if self.loss else "closed" if self._closed else "open"
        return f"<StreamSession {self.stream_id!r} token {self.token}, {state}>"


def leave(close: Callable[[], None], error: BaseException | None) -> None:
    """Close on the way out of a block; an error that is on its way already is not replaced by one of closing."""
    try:
        close()
    except LeasesError as failure:
        if error is None:
            raise
        error.add_note(f"and not all could be released: {failure}")
