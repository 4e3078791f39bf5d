"""How long a stream rests after its handler failed on it: pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from leases import limits


@dataclass(frozen=True, slots=True)
class Backoff:
    """Twice as long after each failure in a row, from `first` up to `most`.

    A random part of up to a half is taken off, so that streams that failed together do not come back together.

    >>> [Backoff().after(failures, lambda: 0.0).total_seconds() for failures in (0, 1, 2, 3, 60)]
    [1.0, 2.0, 4.0, 8.0, 300.0]
    """

    first: timedelta = timedelta(seconds=1)
    most: timedelta = timedelta(minutes=5)

    def __post_init__(self) -> None:
        limits.duration("most", self.most, least=limits.duration("first", self.first))

    def after(self, failures: int, random: Callable[[], float]) -> timedelta:
        """The rest after one more failure, when there were `failures` in a row before it."""
        longest = min(self.first * 2 ** min(failures, 40), self.most) if failures < 40 else self.most
        return longest * (1 - random() / 2)
