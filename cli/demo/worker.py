"""One worker process of the demo: claims streams, appends their events under the fence, takes over what others leave.

Started by the supervisor as `python -m leases.cli.demo.worker`. Its orders come as JSON on standard input, one line
(never as arguments: the URL may hold a password), then words, a line each; what it does it reports as JSON
lines on standard output. When its standard input ends, its supervisor is dead, and it ends at once.

How it writes is the point of the demo:

    1  the last look    `session.remaining() > 0`: by all that this process can know, the lease is its own
    2  the brink        here the supervisor kills it, or it stops itself until long after its lease has ended
    3  the write        `EventLog.append`, straight to the store, without another look

A worker that is thawed at the brink goes on with its write, as a process after any pause would. Only the fence, in the
database, stops it. It is then told `StaleToken`, drops the stream, and goes on as a living worker.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from io import RawIOBase
from pathlib import Path
from typing import Any, TextIO

from leases import Event, EventLog, LeasesError, LeaseStore, Loss, SessionRegistry, StaleToken, StreamSession
from leases.cli.demo import ground
from leases.cli.demo.source import Feed
from leases.model import Appended


@dataclass(frozen=True, slots=True)
class Orders:
    """What the supervisor tells a worker at its start."""

    url: str
    owner: str
    ttl_s: float
    feed: str
    batch: int
    share: int
    poll_s: float
    fault: str | None

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Words:
    """What the supervisor says to a worker during the run, one word a line, each once."""

    begin: threading.Event = field(default_factory=threading.Event)
    all_claimed: threading.Event = field(default_factory=threading.Event)
    thaw: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class Held:
    """A stream that this worker holds, and how far it is with it."""

    session: StreamSession
    position: int
    length: int


class Brink:
    """Strikes this process once, between a last look and a write: with its work under way, at a round's last stream.

    `planned` is how many events the streams of its first claim had to go; it strikes when a quarter is written. The
    last stream of a round is the one that whoever takes over comes to last; and the last look comes right after a
    heartbeat, so that the stream is taken over when a whole TTL has passed, and not sooner. So a thawed worker's write
    comes before the new owner's, and would be accepted if there were no fence.
    """

    def __init__(self, fault: str | None, ttl_s: float, thaw: threading.Event, report: Reporter) -> None:
        self.fault = fault
        self.planned: int | None = None
        self.written = 0
        self._extended = threading.Event()
        self._extended_at_s = 0.0
        self._ttl_s = ttl_s
        self._thaw = thaw
        self._report = report

    def plan(self, events: int) -> None:
        """Hear how many events the first claim has brought; with none, there is nobody to be struck."""
        self.planned = events
        self._extended_at_s = time.monotonic()
        if not events:
            self.fault = None

    def extended(self, _: StreamSession) -> None:
        """Hear that the leases have been extended."""
        self._extended_at_s = time.monotonic()
        self._extended.set()

    def near(self, size: int) -> bool:
        """Whether the next write, of so many events, is the one; if so, wait for a heartbeat, unless one just was."""
        if self.fault is None or self.planned is None or 4 * (self.written + size) <= self.planned:
            return False
        if time.monotonic() - self._extended_at_s > self._ttl_s / 100:
            self._extended.clear()
            self._extended.wait(self._ttl_s / 2)
        return True

    def strike(self, session: StreamSession) -> None:
        """Be killed here, or be frozen and thawed."""
        fault, self.fault = self.fault, None
        self._report("brink", fault=fault, stream=session.stream_id, token=session.token)
        if fault == "kill":
            threading.Event().wait()  # for the supervisor, who kills
        freeze(self._thaw)


def freeze(thaw: threading.Event) -> None:
    """Stop this whole process until the supervisor continues it and says that it was meant.

    One that is continued without a word was caught with a transaction open in another thread, which keeps everybody
    out: it gives that thread a moment to end it, and stops again.
    """
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)
        if thaw.wait(0.05):
            return


class Reporter:
    """Writes reports, a line each, whole, from any thread."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def __call__(self, kind: str, **fields: Any) -> None:
        with self._lock:
            self._out.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._out.flush()


class Worker:
    """The work: claim, go round the streams a batch at a time, retire those that are done, until all are."""

    def __init__(
        self, orders: Orders, registry: SessionRegistry, feed: Feed, brink: Brink, words: Words, report: Reporter
    ) -> None:
        self.orders = orders
        self.words = words
        self.registry = registry
        self.store = registry.store
        self.log = EventLog(registry.store)
        self.feed = feed
        self.brink = brink
        self.report = report
        self.held: dict[str, Held] = {}
        self._claim_at_s = 0.0

    def run(self) -> None:
        """Work until every stream of the demo is done, by whomever."""
        while True:
            self.claim()
            if self.held:
                self.go_round()
            elif self.store.run(ground.unfinished, read_only=True):
                time.sleep(self.orders.poll_s * random.uniform(0.5, 1.0))
            else:
                return

    def claim(self) -> None:
        """Take a fair share at first; when all have theirs, with every poll what is free or was left behind."""
        first = self.brink.planned is None
        if not first and not (self.words.all_claimed.is_set() and time.monotonic() >= self._claim_at_s):
            return
        sessions = self.registry.claim(self.orders.share)
        self._claim_at_s = time.monotonic() + self.orders.poll_s
        if sessions or first:
            self.report("claimed", streams=[[session.stream_id, session.token] for session in sessions])
        claimed = [Held(session, _position(session), self.feed.length(session.stream_id)) for session in sessions]
        self.held.update((held.session.stream_id, held) for held in claimed)
        if first:
            self.brink.plan(sum(held.length - held.position for held in claimed))

    def go_round(self) -> None:
        """Append a batch of each stream; then retire and release those that are done."""
        done = []
        round_of = list(self.held.values())
        for held in round_of:
            self.step(held, last=held is round_of[-1])
            if held.position >= held.length and self.held.get(held.session.stream_id) is held:
                done.append(held)
            self.claim()
        if done:
            self.store.retire([held.session.stream_id for held in done])
            for held in done:
                self.leave(held)
            self.report("done", streams=[held.session.stream_id for held in done])

    def step(self, held: Held, *, last: bool) -> None:
        """Write the next batch of a stream: the last look, the brink, the write."""
        session = held.session
        batch = self.feed.read(session.stream_id, after=held.position, limit=self.orders.batch)
        if not batch:
            return
        struck = last and self.brink.near(len(batch))
        if session.remaining() <= timedelta(0):
            self.leave(held)
            self.report("left", stream=session.stream_id)
            return
        if struck:
            self.brink.strike(session)
        try:
            appended = self.write(session, batch, held.position + len(batch))
        except StaleToken as refusal:
            self.report("refused", stream=session.stream_id, token=session.token, current=refusal.current_token)
            self.leave(held)
            return
        held.position += len(batch)
        self.brink.written += len(batch)
        self.report("wrote", stream=session.stream_id, events=appended.count, thawed=struck)

    def write(self, session: StreamSession, batch: Sequence[Event], position: int) -> Appended:
        """Append straight to the log, not by `session.append`, which would look once more."""
        return self.log.append(session.lease, batch, checkpoint={"position": position})

    def leave(self, held: Held) -> None:
        """Close a session: the stream is done, or no longer ours."""
        del self.held[held.session.stream_id]
        held.session.close()


def _position(session: StreamSession) -> int:
    """How many events of the stream have been written, by whomever."""
    checkpoint = session.checkpoint
    return 0 if checkpoint is None else int(checkpoint["position"])


def main() -> int:
    """Take orders, work, report; return the exit code."""
    # Unbuffered, and not sys.stdin, whose lock a thread that reads would hold at the interpreter's end.
    heard = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 (closed by the end of the process)
    orders = Orders(**json.loads(heard.readline()))
    report = Reporter(sys.stdout)
    words = Words()
    threading.Thread(target=_listen, args=(heard, words), daemon=True).start()
    ttl = timedelta(seconds=orders.ttl_s)
    brink = Brink(orders.fault, orders.ttl_s, words.thaw, report)

    def lost(session: StreamSession, loss: Loss) -> None:
        report("lost", stream=session.stream_id, loss=str(loss))

    try:
        with (
            LeaseStore(orders.url, retry_for=max(timedelta(seconds=10), 3 * ttl)) as store,
            Feed.open(Path(orders.feed)) as feed,
            SessionRegistry(
                store, owner=orders.owner, ttl=ttl, pool=ground.POOL, on_renewed=brink.extended, on_lost=lost
            ) as registry,
        ):
            store.run(ground.unfinished, read_only=True)
            report("ready")
            words.begin.wait()
            Worker(orders, registry, feed, brink, words, report).run()
        report("finished")
        return 0
    except LeasesError as error:
        report("failed", error=str(error), of=type(error).__name__)
        return 1


def _listen(heard: RawIOBase, words: Words) -> None:
    """Hear what the supervisor says; when it is gone, go too."""
    while line := heard.readline():
        getattr(words, line.strip().decode()).set()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
