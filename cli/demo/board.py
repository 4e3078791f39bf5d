"""What is known of a run while it goes on, from the workers' reports: for people to watch. No part of the proof."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from leases.cli.text import plural

SUM_UP_S: Final = 1.0
"""Of streams that move one by one it is told together, once so much time has passed."""


class State(StrEnum):
    """How a worker is."""

    WAITING = "waiting"
    """It is to join later."""
    STARTING = "starting"
    RUNNING = "running"
    FROZEN = "frozen"
    KILLED = "killed"
    DRAINING = "draining"
    DRAINED = "drained"
    DONE = "done"


@dataclass(slots=True)
class Seat:
    """One worker."""

    number: int
    owner: str
    state: State = State.STARTING
    held: set[str] = field(default_factory=set)
    outlived: set[str] = field(default_factory=set)
    """What it held when it was struck, or has lost since: whoever gets one of them takes it over."""
    events: int = 0
    taken_over: int = 0
    shed: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True)
class Happening:
    """Something worth telling, and when: in seconds from the start."""

    at_s: float
    text: str


class Board:
    """The workers, what each holds and has done, and what has happened. The last `joiners` of them come later."""

    def __init__(self, owners: Sequence[str], *, joiners: int, events: int, streams: int) -> None:
        self.seats = [Seat(number, owner) for number, owner in enumerate(owners, 1)]
        for seat in self.seats[len(owners) - joiners :]:
            seat.state = State.WAITING
        self.events = events
        self.streams = streams
        self.joined = 0
        self.drained = 0
        self.done: set[str] = set()
        self.happenings: list[Happening] = []
        self._began_s = time.monotonic()
        self._holders: dict[str, Seat] = {}
        self._taken: Counter[tuple[int, int]] = Counter()
        self._moved: Counter[int] = Counter()
        self._sum_up_at_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    @property
    def written(self) -> int:
        return sum(seat.events for seat in self.seats)

    @property
    def refused(self) -> int:
        return sum(seat.refused for seat in self.seats)

    @property
    def shared(self) -> bool:
        """Whether every stream has an owner, and of the workers that run none holds two more than another."""
        held = [len(seat.held) for seat in self.seats if seat.state is State.RUNNING]
        return sum(held) == self.streams and max(held) - min(held) <= 1

    def tell(self, text: str) -> None:
        self.sum_up(at_once=True)
        self.happenings.append(Happening(self.elapsed_s, text))

    def sum_up(self, *, at_once: bool = False) -> None:
        """Tell of what has changed hands, when it is time."""
        if not (self._taken or self._moved) or not (at_once or self.elapsed_s >= self._sum_up_at_s):
            return
        texts = [
            f"worker {taker} took over {plural(count, 'stream')} of worker {former}"
            for (taker, former), count in self._taken.items()
        ]
        if self._moved:
            shares = ", ".join(f"{count:,} to worker {number}" for number, count in sorted(self._moved.items()))
            texts.append(f"moved in good order: {shares}")
        self.happenings += [Happening(self.elapsed_s, text) for text in texts]
        self._taken.clear()
        self._moved.clear()

    def hear(self, seat: Seat, report: Mapping[str, Any]) -> None:
        """Take a worker's report."""
        match report:
            case {"kind": "enlisted"}:
                if seat.state is State.WAITING:
                    self.joined += 1
                    self.tell(f"worker {seat.number} has joined")
                seat.state = State.RUNNING
            case {"kind": "granted", "stream": stream_id}:
                self._granted(seat, stream_id)
            case {"kind": "wrote", "events": events}:
                seat.events += events
            case {"kind": "refused", "stream": stream_id, "token": token, "current": current}:
                seat.refused += 1
                seat.held.discard(stream_id)
                self.tell(f"worker {seat.number}: write to {stream_id} refused: token {token}, current {current}")
            case {"kind": "shed"}:
                seat.shed += 1
            case {"kind": "failed", "stream": stream_id, "reason": reason}:
                self.tell(f"worker {seat.number} failed on {stream_id}, and tries again: {reason}")
            case {"kind": "lost", "stream": stream_id}:
                if stream_id in seat.held:
                    seat.held.discard(stream_id)
                    seat.outlived.add(stream_id)
            case {"kind": "released", "stream": stream_id}:
                seat.held.discard(stream_id)
            case {"kind": "done", "streams": streams}:
                seat.held.difference_update(streams)
                self.done.update(streams)

    def struck(self, seat: Seat, state: State, stream_id: str, token: int) -> None:
        """Note that a worker was killed or frozen on the brink of a write."""
        seat.state = state
        seat.outlived = set(seat.held)
        self.tell(
            f"worker {seat.number} {state} before a write to {stream_id} (token {token}), "
            f"holding {plural(len(seat.held), 'stream')}"
        )

    def thawed(self, seat: Seat) -> None:
        seat.state = State.RUNNING
        self.tell(f"worker {seat.number} thawed, and goes on with its write")

    def asked_to_leave(self, seat: Seat) -> None:
        seat.state = State.DRAINING
        self.tell(f"worker {seat.number} is asked to leave, holding {plural(len(seat.held), 'stream')}")

    def ended(self, seat: Seat) -> None:
        """Note that a worker's process has ended, in good order."""
        if seat.state is State.DRAINING:
            seat.state = State.DRAINED
            self.drained += 1
            self.tell(f"worker {seat.number} has finished what it had in hand, and left")
        else:
            seat.state = State.DONE

    def _granted(self, seat: Seat, stream_id: str) -> None:
        before = self._holders.get(stream_id)
        if before is not None and before is not seat:
            if not (self._taken or self._moved):
                self._sum_up_at_s = self.elapsed_s + SUM_UP_S
            if stream_id in before.outlived:
                before.outlived.discard(stream_id)
                seat.taken_over += 1
                self._taken[seat.number, before.number] += 1
            else:
                self._moved[seat.number] += 1
            before.held.discard(stream_id)
        self._holders[stream_id] = seat
        seat.held.add(stream_id)
