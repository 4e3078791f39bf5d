"""Discovery: a worker's source of streams is asked now and then; what is new is registered, what is gone is retired."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from leases import administration, limits, operations
from leases.line import Line
from leases.model import Happening, WorkerEvent
from leases.registry import SessionRegistry

logger = logging.getLogger("leases")

Discover = Callable[[], Iterable[str]]


class Discovery:
    """Asks one source. `look` is called, on any thread, when it has answered: then `step` is to be called again.

    The source is asked on a thread of its own: it may take its time, and the worker goes on.
    """

    def __init__(
        self,
        registry: SessionRegistry,
        line: Line,
        discover: Discover,
        every_s: float,
        *,
        tell: Callable[[WorkerEvent], object],
        look: Callable[[], object],
    ) -> None:
        self._registry = registry
        self._line = line
        self._discover = discover
        self._every_s = every_s
        self._tell = tell
        self._look = look
        self._found: queue.SimpleQueue[set[str] | None] = queue.SimpleQueue()
        self._asking = False
        self._ask_at_s = registry.now_s()
        self._known: set[str] = set()

    def step(self, now_s: float) -> None:
        """Ask if it is time, and take what was answered."""
        if not self._asking and now_s >= self._ask_at_s:
            self._asking = True
            self._ask_at_s = now_s + self._every_s
            threading.Thread(target=self._ask, name="leases-discover", daemon=True).start()
        with suppress(queue.Empty):
            found = self._found.get_nowait()
            self._asking = False
            if found is not None:
                self._take(found)

    def _ask(self) -> None:
        found = None
        try:
            found = set(limits.stream_ids(self._discover()))
        except BaseException:  # whatever it is, also SystemExit: it is the source's
            logger.exception("the source of streams failed; it is asked again in %g s", self._every_s)
        self._found.put(found)
        self._look()

    def _take(self, found: set[str]) -> None:
        new, gone, pool = found - self._known, self._known - found, self._registry.pool
        if new:
            self._line.run(lambda connection: operations.register(connection, new, pool=pool))
        if gone:
            self._line.run(lambda connection: administration.retire(connection, gone, pool=pool))
            for stream_id in sorted(gone):
                logger.info("retired: %s", stream_id, extra={"stream_id": stream_id, "owner": self._registry.owner})
                self._tell(WorkerEvent(Happening.RETIRED, self._registry.owner, stream_id))
        self._known = found
