"""What the tests of the worker share."""

from __future__ import annotations

import threading
from datetime import timedelta

from leases import Backoff, Happening, LeaseStore, StreamSession, WorkerEvent

SOON_S = 20.0
QUICK = timedelta(seconds=1)
POLL = timedelta(seconds=0.1)
NO_REST = Backoff(first=timedelta(0), most=timedelta(0))


class Seen:
    """What a worker has told."""

    def __init__(self) -> None:
        self.events: list[WorkerEvent] = []
        self._changed = threading.Condition()

    def __call__(self, happened: WorkerEvent) -> None:
        with self._changed:
            self.events.append(happened)
            self._changed.notify_all()

    def of(self, happening: Happening) -> list[WorkerEvent]:
        return [each for each in self.events if each.happening is happening]

    def wait_for(self, happening: Happening, count: int = 1) -> WorkerEvent:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(happening)) >= count, SOON_S), f"never {happening}"
        return self.of(happening)[count - 1]


def count_up(session: StreamSession) -> timedelta:
    """Write the stream's next number."""
    at = session.checkpoint or 0
    session.append({f"e{at}": at}, checkpoint=at + 1)
    return timedelta(seconds=0.05)


def idle(session: StreamSession) -> timedelta:
    return timedelta(seconds=0.05)


def checkpoint(store: LeaseStore, stream_id: str) -> int:
    found = store.checkpoint(stream_id)
    return 0 if found is None else int(found.checkpoint)


def owners(store: LeaseStore) -> set[str | None]:
    return {info.owner for info in store.list()}
