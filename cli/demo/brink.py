"""The brink: the moment between a worker's last look at its lease and its write, where the supervisor strikes it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

from leases import StreamSession
from leases.cli.demo.wire import Reporter, Words


class Brink:
    """Strikes this process once, between a last look and a write, with its work under way.

    `planned` is how many events the streams of its first share had to go; it strikes when a quarter is written. The
    last look comes right after a heartbeat, so that the stream is taken over when a whole TTL has passed, and not
    sooner. Whoever takes it over lets the frozen worker write first (`Words.spared`): were there no fence, that write
    would be accepted.
    """

    def __init__(self, ttl_s: float, words: Words, report: Reporter) -> None:
        self._ttl_s = ttl_s
        self._words = words
        self._report = report
        self._planned: int | None = None
        self._written = 0
        self._extended = threading.Event()
        self._extended_at_s = time.monotonic()

    def plan(self, count: Callable[[], int]) -> None:
        """Learn, once, how many events there are to write."""
        if self._planned is None:
            self._planned = count()

    def gave_up(self, events: int) -> None:
        """Hear that a stream of so many events is let go, to be another's."""
        if self._planned is not None:
            self._planned -= events

    def wrote(self, events: int) -> None:
        """Hear that events have been written."""
        self._written += events

    def extended(self) -> None:
        """Hear that the leases have been extended."""
        self._extended_at_s = time.monotonic()
        self._extended.set()

    def granted(self) -> None:
        """Hear of a lease that begins: of the first share, all do about now."""
        if self._planned is None:
            self.extended()

    def near(self, size: int) -> bool:
        """Whether the next write, of so many events, is the one; if so, wait for a heartbeat, unless one just was."""
        if self._words.fault is None or self._planned is None or 4 * (self._written + size) <= self._planned:
            return False
        if time.monotonic() - self._extended_at_s > self._ttl_s / 20:
            self._extended.clear()
            self._extended.wait(self._ttl_s / 2)
        return True

    def strike(self, session: StreamSession) -> None:
        """Be killed here, or be frozen and thawed."""
        fault, self._words.fault = self._words.fault, None
        self._report("brink", fault=fault, stream=session.stream_id, token=session.token)
        if fault == "kill":
            threading.Event().wait()  # for the supervisor, who kills
        freeze(self._words.thaw)


def freeze(thaw: threading.Event) -> None:
    """Stop this whole process until the supervisor continues it and says that it was meant.

    One that is continued without a word was caught with a transaction open in another thread, which keeps everybody
    out: it gives that thread a moment to end it, and stops again.
    """
    while True:
        # To this thread: one to the process may be taken by another thread, and stop it later than here.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        if thaw.wait(0.05):
            return
