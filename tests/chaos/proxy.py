"""A TCP proxy between the clients and the server, one link a client, whose faults are ours.

hold      what comes stays here until `heal`, in one direction or both; nothing is lost
drop      what comes is thrown away; at `heal` the connections it was thrown away on are reset
delay     every piece waits before it goes on
swallow   the next commit goes through, its answer does not: the connection is reset instead
reset     every open connection ends with a RST, on both sides

What commits is COMMIT, and whatever else is asked while no transaction is open: that is one of its own.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from random import Random

UP, DOWN = "up", "down"

COMMIT = b"COMMIT\0"
"""The statement, not the end of BEGIN ISOLATION LEVEL READ COMMITTED."""

NOT_COMMITTING = (b"BEGIN", b"SHOW ")

IDLE = b"Z\0\0\0\5I"
"""How the server ends an answer outside of a transaction."""

NOW = struct.pack("ii", 1, 0)
"""SO_LINGER: a close sends a RST."""


class Connection:
    """One client's connection, and ours to the server."""

    def __init__(self, *ends: asyncio.StreamWriter) -> None:
        self.ends = ends
        self.swallow = False
        self.spoilt = False
        self.idle = False

    def commits(self, piece: bytes) -> bool:
        """Whether the answer to this piece, from the client, tells of a commit."""
        return COMMIT in piece or (self.idle and not any(word in piece for word in NOT_COMMITTING))

    def reset(self) -> None:
        for end in self.ends:
            raw = end.get_extra_info("socket")
            if raw is not None:
                with suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
            end.transport.abort()


class Link:
    """What one client connects to. Its faults are set from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: tuple[str, int], random: Random) -> None:
        self._loop = loop
        self.server = server
        self._random = random
        self._open: set[Connection] = set()
        self._passes = {UP: asyncio.Event(), DOWN: asyncio.Event()}
        for event in self._passes.values():
            event.set()
        self._drops = False
        self._delay_s = 0.0
        self._swallows = 0
        self._listener: asyncio.Server | None = None
        self.port = 0
        self.swallowed = 0

    async def listen(self) -> None:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Listen no more, and break what is open. On the loop's thread."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._open):
            connection.reset()

    # --- faults ----------------------------------------------------------------------------------------------------

    def hold(self, *directions: str) -> None:
        for direction in directions:
            self._soon(self._passes[direction].clear)

    def drop(self) -> None:
        self._soon(lambda: setattr(self, "_drops", True))

    def delay(self, seconds: float) -> None:
        self._soon(lambda: setattr(self, "_delay_s", seconds))

    def swallow(self, count: int) -> None:
        self._soon(lambda: setattr(self, "_swallows", count))

    def reset(self) -> None:
        def reset() -> None:
            for connection in list(self._open):
                connection.reset()

        self._soon(reset)

    def heal(self) -> None:
        self._soon(self._heal)

    def _heal(self) -> None:
        self._drops, self._delay_s, self._swallows = False, 0.0, 0
        for connection in list(self._open):
            if connection.spoilt:
                connection.reset()
        for event in self._passes.values():
            event.set()

    def _soon(self, call: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(call)

    # --- traffic ---------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(*self.server)
        except OSError:
            writer.transport.abort()
            return
        connection = Connection(writer, to_server)
        self._open.add(connection)
        try:
            await asyncio.gather(
                self._pump(connection, UP, reader, to_server), self._pump(connection, DOWN, from_server, writer)
            )
        except (OSError, asyncio.CancelledError):
            connection.reset()
        finally:
            self._open.discard(connection)
            for end in connection.ends:
                end.close()

    async def _pump(
        self, connection: Connection, direction: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        while piece := await source.read(65536):
            if self._delay_s:
                await asyncio.sleep(self._delay_s * self._random.random())
            await self._passes[direction].wait()
            if self._drops:
                connection.spoilt = True
                continue
            if direction == UP and self._swallows and connection.commits(piece):
                self._swallows -= 1
                connection.swallow = True
            elif direction == DOWN and connection.swallow:
                self.swallowed += 1
                connection.reset()
                return
            connection.idle = direction == DOWN and piece.endswith(IDLE)
            sink.write(piece)
            await sink.drain()
        await self._passes[direction].wait()
        if not connection.spoilt:
            sink.close()


class Proxy:
    """The links, and the thread that they run on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: tuple[str, int], seed: int) -> None:
        self._loop = loop
        self._server = server
        self._random = Random(seed)
        self.links: list[Link] = []

    def link(self) -> Link:
        made = Link(self._loop, self._server, self._random)
        asyncio.run_coroutine_threadsafe(made.listen(), self._loop).result(10)
        self.links.append(made)
        return made

    def lead_to(self, server: tuple[str, int]) -> None:
        """Lead new connections to another server, and reset those that are open."""
        self._server = server
        for link in self.links:
            link.server = server
            link.reset()


@contextmanager
def running(server: tuple[str, int], seed: int) -> Iterator[Proxy]:
    """Run a proxy on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="chaos-proxy", daemon=True)
    thread.start()

    proxy = Proxy(loop, server, seed)

    async def end() -> None:
        for link in proxy.links:
            link.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
