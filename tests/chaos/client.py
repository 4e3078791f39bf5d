"""The processes of a run: `python -m tests.chaos.client OPTIONS`, a worker of the product's, or an operator.

A worker's handler appends the stream's next event with its checkpoint. Beside it a rogue thread writes under leases
that the process has or had, straight through the event log, without a look at them: as a process does that was frozen
between its check and its write. On the nemesis's word (a line of stdin) the next call of the handler does worse:

    freeze    SIGSTOP to itself inside a fenced transaction
    copy      the same, inside COPY
    trickle   a statement now and then, until long after the lease that it fenced has ended
    calm      what was said before and is not done yet, is not to be done
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, text

from leases import Backoff, EventLog, Lease, LeasesError, LeaseStore, StoreError, StreamSession, Worker
from tests.chaos import mutants
from tests.chaos.record import OK, Recorder

RETRY_FOR = timedelta(seconds=2)

INSERT = """
INSERT INTO lease_events (stream_id, event_id, seq, fencing_token, recorded_at, payload)
SELECT :stream, :event, coalesce(max(seq), 0) + 1, :token, {now}, {payload} FROM lease_events WHERE stream_id = :stream
"""
NOW = {"postgresql": "statement_timestamp()", "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now')"}
PAYLOAD = {"postgresql": "CAST(:payload AS jsonb)", "sqlite": ":payload"}

COPY = "COPY lease_events (stream_id, event_id, seq, fencing_token, recorded_at, payload) FROM STDIN"


@dataclass(frozen=True)
class Options:
    """What a process is told at its start."""

    role: str
    name: str
    url: str
    record: str
    seed: int
    ttl_s: float
    streams: int

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


def stream_name(number: int) -> str:
    return f"s{number:02}"


def stand_still() -> None:
    """Stop this process, here, until it is continued: a signal to the process may be taken later, by another thread."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def insert(connection: Connection, lease: Lease, event_id: str, request: str) -> None:
    """Write an event by hand, as any program may in a fenced transaction."""
    dialect = connection.dialect.name
    statement = text(INSERT.format(now=NOW[dialect], payload=PAYLOAD[dialect]))
    payload = json.dumps({"ask": request})
    values = {"stream": lease.stream_id, "event": event_id, "token": lease.fencing_token, "payload": payload}
    connection.execute(statement, values)


class Writer:
    """A worker's handler, and its rogue."""

    def __init__(self, options: Options, recorder: Recorder) -> None:
        self.options = options
        self.recorder = recorder
        self.random = Random(options.seed)
        self.had: deque[Lease] = deque(maxlen=40)
        self.words: queue.SimpleQueue[str] = queue.SimpleQueue()

    def handle(self, session: StreamSession) -> timedelta:
        if session.lease not in self.had:
            self.had.append(session.lease)
        try:
            word = self.words.get_nowait()
        except queue.Empty:
            self._next(session)
        else:
            self._worse(session, word)
        return timedelta(seconds=self.random.uniform(0.05, 0.2))

    def _ask(self, what: str, lease: Lease, events: list[str], **details: Any) -> str:
        return self.recorder.ask(
            what, lease.stream_id, token=lease.fencing_token, owner=lease.owner, events=events, **details
        )

    def _next(self, session: StreamSession) -> None:
        position = session.checkpoint or 0
        # The wall's time is read first: if we are frozen between the two, this errs to the safe side.
        now_s, left_s = time.time(), session.remaining().total_seconds()
        until = now_s + left_s if left_s > 0 else None  # at 0 it is not trusted any more
        event_id = f"e{position + 1}"
        request = self._ask("append", session.lease, [event_id], until=until)
        try:
            appended = session.append({event_id: {"ask": request}}, checkpoint=position + 1)
        except Exception as error:
            self.recorder.failed(request, error)
            raise
        self.recorder.told(request, OK, seq=appended.last_seq, duplicates=list(appended.duplicates))

    def _worse(self, session: StreamSession, word: str) -> None:
        lease = session.lease
        key = uuid4().hex[:12]
        names = [f"{word}-{key}-{number}" for number in range(4)]
        request = self._ask(word, lease, names)
        try:
            with session.fenced() as connection:
                if word == "copy":
                    self._copy(connection, lease, names, request)
                else:
                    insert(connection, lease, names[0], request)
                    if word == "freeze":
                        self.recorder.note(frozen=word)
                        stand_still()
                    for name in names[1:]:
                        if word == "trickle":
                            time.sleep(self.options.ttl_s * 0.45)  # the trickle itself
                        insert(connection, lease, name, request)
        except Exception as error:
            self.recorder.failed(request, error)
            raise
        self.recorder.told(request, OK)

    def _copy(self, connection: Connection, lease: Lease, names: list[str], request: str) -> None:
        values = {"stream": lease.stream_id}
        last = "SELECT coalesce(max(seq), 0) FROM lease_events WHERE stream_id = :stream"
        seq = connection.execute(text(last), values).scalar_one()
        driver: Any = connection.connection.driver_connection
        with driver.cursor() as cursor, cursor.copy(COPY) as copy:
            for number, name in enumerate(names, 1):
                copy.write_row(
                    [lease.stream_id, name, seq + number, lease.fencing_token, "now", json.dumps({"ask": request})]
                )
                if number == 2:
                    self.recorder.note(frozen="copy")
                    stand_still()

    def rogue(self, log: EventLog) -> None:
        """Write under what the process has or had, without asking whether it may."""
        random = Random(self.options.seed + 1)
        pause = threading.Event()
        while not pause.wait(random.uniform(0.05, 0.4)):
            if not self.had:
                continue
            lease = random.choice(list(self.had))
            if random.random() < 0.1:
                lease = replace(lease, fencing_token=lease.fencing_token + random.choice([-1, 1]))
            event_id = f"r{uuid4().hex[:12]}"
            request = self._ask("rogue", lease, [event_id])
            try:
                log.append(lease, {event_id: {"ask": request}})
            except LeasesError as error:
                self.recorder.failed(request, error)
            else:
                self.recorder.told(request, OK)

    def listen(self) -> None:
        for line in sys.stdin:
            if line.strip() != "calm":
                self.words.put(line.strip())
                continue
            with suppress(queue.Empty):
                while True:
                    self.words.get_nowait()


def work(options: Options, recorder: Recorder) -> None:
    writer = Writer(options, recorder)
    ttl = timedelta(seconds=options.ttl_s)
    with LeaseStore(options.url, retry_for=RETRY_FOR) as store, LeaseStore(options.url, retry_for=RETRY_FOR) as other:
        worker = Worker(
            store,
            writer.handle,
            name=options.name,
            ttl=ttl,
            poll_interval=ttl / 15,
            drain_timeout=ttl,
            backoff=Backoff(first=ttl / 60, most=ttl / 10),
        )
        for target in (writer.listen, lambda: writer.rogue(EventLog(other))):
            threading.Thread(target=target, daemon=True).start()
        recorder.note(started=options.name)
        worker.run()
    os._exit(0)  # the rogue writes to the end


class Operator:
    """Somebody at a terminal who does one thing after another."""

    def __init__(self, options: Options, recorder: Recorder) -> None:
        self.options = options
        self.recorder = recorder
        self.random = Random(options.seed)
        self.ttl = timedelta(seconds=options.ttl_s)
        self.store = LeaseStore(options.url, retry_for=RETRY_FOR)

    def run(self) -> None:
        actions = [self.steal] * 5 + [self.expire] * 5 + [self.pause] * 2 + [self.resume] * 4 + [self.acquire] * 3
        actions += [self.drain, self.retire]
        pause = threading.Event()
        while not pause.wait(self.random.uniform(0.1, 0.7)):
            with suppress(LeasesError):
                self.random.choice(actions)(stream_name(self.random.randrange(self.options.streams)))

    def _ask(self, what: str, stream_id: str | None, call: Any, **details: Any) -> Any:
        request = self.recorder.ask(what, stream_id, **details)
        try:
            result = call()
        except LeasesError as error:
            self.recorder.failed(request, error)
            raise
        token = result if what == "expire" else getattr(result, "fencing_token", None)
        self.recorder.told(request, OK, **({} if token is None else {"token": token}))
        return result

    @property
    def _patience(self) -> dict[str, Any]:
        return {"timeout": timedelta(seconds=self.random.choice([0.3, 1, 5])), "force": self.random.random() < 0.3}

    def steal(self, stream_id: str) -> None:
        to = self.random.choice([*(worker.worker_id for worker in self.store.workers()), "a-stranger"])
        name = self.options.name
        self._ask(
            "steal", stream_id,
            lambda: self.store.steal(stream_id, to=to, ttl=self.ttl, actor=name, **self._patience), owner=to,
        )  # fmt: skip

    def expire(self, stream_id: str) -> None:
        self._ask("expire", stream_id, lambda: self.store.expire(stream_id, actor=self.options.name, **self._patience))

    def pause(self, stream_id: str) -> None:
        self._ask("pause", stream_id, lambda: self.store.pause(stream_id, actor=self.options.name))

    def resume(self, _: str) -> None:
        for info in self.store.list():
            if info.paused_at is not None:
                paused = info.stream_id
                self._ask("resume", paused, lambda paused=paused: self.store.resume(paused, actor=self.options.name))

    def retire(self, stream_id: str) -> None:
        self._ask("retire", stream_id, lambda: self.store.retire([stream_id]))
        self._ask("register", stream_id, lambda: self.store.register([stream_id]))

    def drain(self, _: str) -> None:
        workers = [worker.worker_id for worker in self.store.workers()]
        if workers:
            name = self.random.choice(workers)
            self._ask("drain", None, lambda: self.store.drain(name), worker=name)

    def acquire(self, stream_id: str) -> None:
        """Ask until it is told, always by the same claim; then once more, and let go."""
        claim, name = uuid4(), self.options.name
        lease = None
        for _ in range(5):
            try:
                lease = self._ask(
                    "acquire", stream_id,
                    lambda: self.store.acquire(stream_id, owner=name, ttl=self.ttl, claim_id=claim), owner=name,
                )  # fmt: skip
            except StoreError:
                continue
            break
        if lease is not None:
            self._ask(
                "acquire", stream_id,
                lambda: self.store.acquire(stream_id, owner=name, ttl=self.ttl, claim_id=claim), owner=name,
            )  # fmt: skip
            self._ask("release", stream_id, lambda: self.store.release(lease))


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    mutants.break_product()
    recorder = Recorder(Path(options.record), options.name)
    if options.role == "worker":
        work(options, recorder)
    else:
        recorder.note(started=options.name)
        Operator(options, recorder).run()


if __name__ == "__main__":
    main()
