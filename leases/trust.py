"""How long a worker may believe that a lease is its own: pure arithmetic, no clock read, no I/O.

    sent                        answer             deadline         expires_at
     |--- request, on its way ---|                    |                  |
     |                                                |                  |
     |<------------ trust window: TTL − margin ------>|<---- margin ---->|

The database sets `expires_at` to its own now + TTL, and that now is *after* the request was sent. So a worker that
counts the TTL by its own monotonic clock from **before the send**, and takes a margin off, always stops before the
database lets anybody else in, however long the request or its answer were on the way.

Assumed of clocks: only that this machine's monotonic clock and the database's run at the same rate, to within margin
/ TTL (a tenth, by default). Nothing is assumed of what they show. On Linux the monotonic clock used is
CLOCK_BOOTTIME, which also counts the time that a suspended machine slept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from leases import limits
from leases.errors import ConfigError

Clock = Callable[[], float]
"""Seconds from some beginning; never goes back."""


def monotonic() -> float:
    """This machine's monotonic clock in seconds, counting suspended time where the system can."""
    return time.clock_gettime(_CLOCK) if _CLOCK is not None else time.monotonic()


_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", None)


@dataclass(frozen=True, slots=True)
class Window:
    """The durations of a keeper, in seconds, checked against each other: interval < trust < ttl."""

    ttl_s: float
    interval_s: float
    margin_s: float

    def __post_init__(self) -> None:
        if not 0 < self.interval_s < self.trust_s < self.ttl_s:
            raise ConfigError(
                f"the durations must be 0 < interval < ttl − margin < ttl, not interval {self.interval_s:g} s, "
                f"ttl {self.ttl_s:g} s, margin {self.margin_s:g} s"
            )

    @classmethod
    def of(cls, ttl: timedelta, interval: timedelta | None = None) -> Window:
        """The window of a TTL: a beat every third of it unless told otherwise, a margin of a tenth."""
        ttl_s = limits.ttl(ttl).total_seconds()
        return cls(ttl_s, ttl_s / 3 if interval is None else interval.total_seconds(), ttl_s / 10)

    @property
    def trust_s(self) -> float:
        return self.ttl_s - self.margin_s

    def deadline(self, sent_at_s: float, remaining_s: float | None = None) -> float:
        """The moment, by the worker's clock, from which a lease is not to be trusted any more.

        `sent_at_s` was read before the request was sent. `remaining_s` is what the lease had to live when the database
        answered, which is the TTL for a lease just granted or renewed.
        """
        return sent_at_s + (self.ttl_s if remaining_s is None else remaining_s) - self.margin_s
