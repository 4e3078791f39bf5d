"""What a run is to be: how many workers, what is to become of which, and how fast."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

BATCHES: Final = 1000
"""About how many batches the file is cut into: a short one has small batches, so that there is something to see."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the run is to be: so many workers, of which some are struck and some asked to leave; and some come later."""

    workers: int
    ttl_s: float
    kill: int
    freeze: int
    join: int = 0
    drain: int = 0

    @property
    def poll_s(self) -> float:
        """How often a worker looks for streams that were left behind."""
        return min(0.5, max(0.05, self.ttl_s / 20))

    @property
    def struck(self) -> int:
        return self.kill + self.freeze

    def fault(self, number: int) -> str | None:
        """What is to happen to a worker, by its number from 1. Of few streams the first have some: to be refused."""
        if number <= self.freeze:
            return "freeze"
        return "kill" if number <= self.struck else None

    def leaves(self, number: int) -> bool:
        """Whether a worker is to be asked to leave."""
        return self.struck < number <= self.struck + self.drain

    def joins(self, number: int) -> bool:
        """Whether a worker comes later."""
        return number > self.workers


def batch_size(events: int) -> int:
    """How many events a worker writes at once: more of a longer file, so that the run ends in reasonable time."""
    return max(5, min(500, events // BATCHES))


def owners(workers: int) -> list[str]:
    """Names for the workers of a run, which no other run has. Of few streams, those whose names come first get one."""
    run = secrets.token_hex(3)
    return [f"demo-{run}-worker-{number:02}" for number in range(1, workers + 1)]
