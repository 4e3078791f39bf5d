"""One worker process of the demo: a `Worker`, whose handler appends a batch of a stream's events under the fence.

Started by the supervisor as `python -m leases.cli.demo.worker`; `wire` says how the two talk. When its standard input
ends, its supervisor is dead, and it ends at once. Which streams it has, how it shares them, and how it leaves is the
business of `Worker`.

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
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from io import RawIOBase
from pathlib import Path
from typing import Final

from leases import Event, EventLog, LeasesError, LeaseStore, StaleToken, StreamSession, Worker, WorkerEvent
from leases.cli.demo import ground
from leases.cli.demo.brink import Brink
from leases.cli.demo.source import Feed
from leases.cli.demo.wire import Orders, Reporter, Words
from leases.model import Happening

REST_S: Final = 0.05
"""How long the handler's one thread waits, at a time, for the word to work."""


class Writer:
    """What this process does with its streams, and what it tells of them."""

    def __init__(self, orders: Orders, store: LeaseStore, feed: Feed, words: Words, report: Reporter) -> None:
        self.store = store
        self.log = EventLog(store)
        self.feed = feed
        self.batch = orders.batch
        self.words = words
        self.report = report
        self.poll = timedelta(seconds=orders.poll_s)
        self.brink = Brink(orders.ttl_s, words, report)
        self.enlisted = False
        self.finished: dict[str, StreamSession] = {}
        self.worker = Worker(
            store,
            self.write_on,
            pool=ground.POOL,
            name=orders.owner,
            ttl=timedelta(seconds=orders.ttl_s),
            poll_interval=self.poll,
            concurrency=1,  # so that none of this process's writes is under way when it is struck at the brink
            on_event=self.hear,
        )

    def write_on(self, session: StreamSession) -> timedelta | None:
        """Write the next batch of a stream; when it is done, retire it with others. The worker's handler."""
        if not self.words.work.wait(REST_S):
            return timedelta(0)
        if session.stream_id in self.words.spared:
            return self.poll
        if session.stream_id in self.finished:
            self.retire()
            return None
        self.brink.plan(lambda: sum(self.feed.length(stream_id) for stream_id in self.worker.sessions))
        position = _position(session)
        batch = self.feed.read(session.stream_id, after=position, limit=self.batch)
        if batch and not self.step(session, batch, position + len(batch)):
            return None
        if len(batch) < self.batch:  # there are no more
            self.finished[session.stream_id] = session
            return self.poll
        return None

    def retire(self) -> None:
        """Let nobody have what is finished any more, and let the worker release it."""
        finished, self.finished = self.finished, {}
        self.store.retire(finished)
        self.report("done", streams=list(finished))
        for session in finished.values():
            session.stop()

    def step(self, session: StreamSession, batch: Sequence[Event], position: int) -> bool:
        """Write a batch: the last look, the brink, the write. False if the stream is no longer this worker's."""
        struck = self.brink.near(len(batch))
        if session.remaining() <= timedelta(0):
            return False
        if struck:
            self.brink.strike(session)
        checkpoint = {"position": position}
        try:
            # Straight to the log, not by `session.append`, which would look once more.
            appended = self.log.append(session.lease, batch, checkpoint=checkpoint)
        except StaleToken as refusal:
            self.report("refused", stream=session.stream_id, token=session.token, current=refusal.current_token)
            session.stop()
            return False
        # What `session.append` would have noted.
        session.remember(checkpoint)
        session.wrote += 1
        session.progress()
        self.brink.wrote(len(batch))
        self.report("wrote", stream=session.stream_id, events=appended.count, thawed=struck)
        return True

    def hear(self, event: WorkerEvent) -> None:
        """Hear what happens to the worker, and report what is worth it."""
        match event.happening:
            case Happening.RENEWED:
                self.brink.extended()
                if not self.enlisted:
                    self.enlisted = True
                    self.report("enlisted")
            case Happening.GRANTED:
                self.brink.granted()
                self.report("granted", stream=event.stream_id, token=event.fencing_token)
            case Happening.SHED:
                self.brink.gave_up(self.feed.length(event.stream_id or ""))
                self.report("shed", stream=event.stream_id)
            case Happening.RELEASED | Happening.LOST | Happening.FAILED as happening:
                self.report(str(happening), stream=event.stream_id, reason=event.reason)


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
    retry_for = max(timedelta(seconds=10), 3 * timedelta(seconds=orders.ttl_s))
    try:
        with LeaseStore(orders.url, retry_for=retry_for) as store, Feed.open(Path(orders.feed)) as feed:
            store.run(ground.unfinished, read_only=True)
            worker = Writer(orders, store, feed, words, report).worker
            report("ready")
            words.begin.wait()
            threading.Thread(target=_stop, args=(words, worker), daemon=True).start()
            worker.run()
        report("finished")
        return 0
    except LeasesError as error:
        report("gave up", error=str(error), of=type(error).__name__)
        return 1


def _stop(words: Words, worker: Worker) -> None:
    words.stop.wait()
    worker.stop()


def _listen(heard: RawIOBase, words: Words) -> None:
    """Hear what the supervisor says; when it is gone, go too."""
    while line := heard.readline():
        words.hear(line)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
