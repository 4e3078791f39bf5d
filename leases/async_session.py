"""`AsyncStreamSession`: a `StreamSession` for an async handler. What does I/O is awaited, all else is the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from leases.async_store import AsyncEventLog, AsyncLeaseStore
from leases.errors import ConfigError
from leases.model import JSON, Appended, Event
from leases.session import StreamSession


class AsyncStreamSession:
    """One owned stream, under asyncio. Made by a `Worker` whose handler is `async def`.

    Its writes go through the worker's AsyncLeaseStore. Of a worker that has a LeaseStore they are made on threads, by
    `asyncio.to_thread`; `fenced` then is not to be had. What is not here is the session's own (`stream_id`, `token`,
    `lease`, `stopping`, `lost`, `remaining`, `check`, `progress`, `until_stopping`).
    """

    def __init__(self, session: StreamSession, store: AsyncLeaseStore | None = None) -> None:
        self.session = session
        self._store = store
        self._log = None if store is None else AsyncEventLog(store)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    async def append(self, events: Iterable[Event] | Mapping[str, JSON], *, checkpoint: JSON = None) -> Appended:
        """Append events to the stream's log, with the checkpoint, in one fenced transaction; see `events.append`."""
        if self._log is None:
            return await asyncio.to_thread(self.session.append, events, checkpoint=checkpoint)
        with self.session.writing():
            appended = await self._log.append(self.session.lease, events, checkpoint=checkpoint)
        if checkpoint is not None:
            self.session.remember(checkpoint)
        return appended

    async def save(self, checkpoint: JSON) -> None:
        """Write the checkpoint under the fence: `LeaseLost` or `StaleToken` if the lease is not live."""
        if self._store is None:
            await asyncio.to_thread(self.session.save, checkpoint)
            return
        with self.session.writing():
            await self._store.write_checkpoint(self.session.lease, checkpoint)
        self.session.remember(checkpoint)

    async def checkpoint(self) -> JSON:
        """Where the work has got to: None if nobody has written it. Read once, then what this session wrote."""
        return await asyncio.to_thread(lambda: self.session.checkpoint)

    async def close(self) -> None:
        """Release the lease: the work on the stream is done. See `StreamSession.close`."""
        await asyncio.to_thread(self.session.close)

    @asynccontextmanager
    async def fenced(self) -> AsyncIterator[AsyncConnection]:
        """A transaction of the store's database in which the fence has passed; see `StreamSession.fenced`."""
        if self._store is None:
            raise ConfigError("give the worker an AsyncLeaseStore: fenced() of an async handler needs one")
        with self.session.writing():
            async with self._store.fenced(self.session.lease) as connection:
                yield connection

    def __repr__(self) -> str:
        return f"<Async{repr(self.session)[1:]}"
