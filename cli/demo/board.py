"""What is known of a run while it goes on, from the workers' reports: for people to watch. No part of the proof."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from leases.cli.text import plural


class State(StrEnum):
    """How a worker is."""

    STARTING = "starting"
    RUNNING = "running"
    FROZEN = "frozen"
    KILLED = "killed"
    DONE = "done"


@dataclass(slots=True)
class Seat:
    """One worker."""

    number: int
    owner: str
    state: State = State.STARTING
    held: set[str] = field(default_factory=set)
    events: int = 0
    taken_over: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True)
class Happening:
    """Something worth telling, and when: in seconds from the start."""

    at_s: float
    text: str


class Board:
    """The workers, what each holds and has done, and what has happened."""

    def __init__(self, owners: Sequence[str], *, events: int, streams: int) -> None:
        self.seats = [Seat(number, owner) for number, owner in enumerate(owners, 1)]
        self.events = events
        self.streams = streams
        self.done: set[str] = set()
        self.happenings: list[Happening] = []
        self._began_s = time.monotonic()
        self._holders: dict[str, Seat] = {}

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    @property
    def written(self) -> int:
        return sum(seat.events for seat in self.seats)

    @property
    def refused(self) -> int:
        return sum(seat.refused for seat in self.seats)

    def tell(self, text: str) -> None:
        self.happenings.append(Happening(self.elapsed_s, text))

    def hear(self, seat: Seat, report: Mapping[str, Any]) -> None:
        """Take a worker's report."""
        match report:
            case {"kind": "claimed", "streams": streams}:
                seat.state = State.RUNNING
                self._claimed(seat, [stream_id for stream_id, _ in streams])
            case {"kind": "wrote", "events": events}:
                seat.events += events
            case {"kind": "refused", "stream": stream_id, "token": token, "current": current}:
                seat.refused += 1
                seat.held.discard(stream_id)
                self.tell(f"worker {seat.number}: write to {stream_id} refused: token {token}, current {current}")
            case {"kind": "lost" | "left", "stream": stream_id}:
                seat.held.discard(stream_id)
            case {"kind": "done", "streams": streams}:
                seat.held.difference_update(streams)
                self.done.update(streams)
            case {"kind": "finished"}:
                seat.state = State.DONE

    def struck(self, seat: Seat, state: State, stream_id: str, token: int) -> None:
        """Note that a worker was killed or frozen on the brink of a write."""
        seat.state = state
        self.tell(
            f"worker {seat.number} {state} before a write to {stream_id} (token {token}), "
            f"holding {plural(len(seat.held), 'stream')}"
        )

    def thawed(self, seat: Seat) -> None:
        seat.state = State.RUNNING
        self.tell(f"worker {seat.number} thawed, and goes on with its write")

    def _claimed(self, seat: Seat, streams: Sequence[str]) -> None:
        former: Counter[int] = Counter()
        for stream_id in streams:
            before = self._holders.get(stream_id)
            if before is not None and before is not seat:
                if before.state in (State.FROZEN, State.KILLED) or stream_id not in before.held:
                    former[before.number] += 1
                before.held.discard(stream_id)
            self._holders[stream_id] = seat
            seat.held.add(stream_id)
        for number, count in former.items():
            seat.taken_over += count
            self.tell(f"worker {seat.number} took over {plural(count, 'stream')} of worker {number}")
