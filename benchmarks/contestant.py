"""What a benchmark asks of a contestant, and of one client of it.

A `Contestant` lives in the benchmark's own process: it has its server started, and says how durable it is. A `Client`
may live in any process: what `opener` returns can be sent there. A workload that makes no sense for a contestant is
named in `not_for`, with the reason, which the table shows.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from benchmarks.servers import Servers

TTL_S = 600
"""How long a lease lives where its end is not what is measured: no round is as long."""


AT_ITS_DEFAULT = {f"takeover ttl {ttl_s} s": "measured at its own default" for ttl_s in (1, 5, 15)}
"""For `not_for`: peers have one default each."""


class Absent(Exception):
    """A contestant cannot take part; the message says why, and what to install."""


class Client(ABC):
    """One client, with a connection of its own, used by one thread.

    `take` answers with whatever the others of its methods need to name what was taken.
    """

    def __init__(self) -> None:
        self.taken_over: dict[str, Any] = {}

    @abstractmethod
    def take(self, streams: Sequence[str]) -> Any:
        """Own all these streams, which are free."""

    @abstractmethod
    def renew(self, held: Any) -> None:
        """Extend each of them once; fail if one is lost."""

    @abstractmethod
    def let_go(self, held: Any) -> None:
        """Free all of them."""

    @abstractmethod
    def acquire(self, stream: str) -> Any:
        """Own one stream; None if somebody else does."""

    @abstractmethod
    def release(self, grant: Any) -> None:
        """Free what `acquire` answered with."""

    def write(self, grant: Any, events: Mapping[str, Any]) -> None:
        """Commit these events in one transaction, under the fence if there is one."""
        raise NotImplementedError

    def reown(self, streams: Sequence[str], share: Sequence[str], batch: int) -> int:
        """Own as many of these streams, all left behind, as others leave; return how many, when none is left.

        One that has no list of what is free is told its share, and tries no other: that flatters it.
        """
        del streams, batch
        return sum(self.acquire(stream) is not None for stream in share)

    def hold(self, streams: Sequence[str]) -> Any:
        """Own these streams as a worker does, for long: heartbeats included, where they come with the contestant."""
        return self.take(streams)

    def take_over(self, streams: Sequence[str]) -> int:
        """Look once for these streams, left behind by a killed owner; return how many this client owns by now."""
        for stream in streams:
            if stream not in self.taken_over:
                grant = self.acquire(stream)
                if grant is not None:
                    self.taken_over[stream] = grant
        return len(self.taken_over.keys() & set(streams))

    @abstractmethod
    def close(self) -> None: ...


Opener = Callable[[], Client]
"""Opens a client, in whatever process it was sent to."""


class Contestant(ABC):
    """One way of owning streams."""

    name: ClassVar[str]
    """As `--contestants` takes it."""
    title: ClassVar[str]
    """As tables and charts show it."""
    not_for: ClassVar[Mapping[str, str]] = {}
    """Workloads, or `workload variant`s, that make no sense for it, and why."""

    server: str = ""
    """What it runs on, with its version; known once it is started."""
    durability: str = ""
    """What survives a power cut; known once it is started."""

    @abstractmethod
    def start(self, servers: Servers) -> None:
        """Have the servers started that this needs; `Absent` if that cannot be."""

    @abstractmethod
    def opener(self, ttl_s: float | None = None) -> Opener:
        """What opens a client, whose leases live so long; None stands for the contestant's own default."""

    def register(self, streams: Sequence[str]) -> None:  # noqa: B027  # most need not
        """Make streams known, where they must be; done once in a stream's life, and not timed."""

    @abstractmethod
    def abandon(self, streams: Sequence[str]) -> None:
        """Leave registered streams as an owner does that died: held in its name, and all expired by now. Not timed."""

    def complaints(self) -> list[str]:
        """What the server wrote to its log that should not be there, such as a deadlock."""
        return []


def pool_of(streams: Sequence[str]) -> str:
    """The pool of a workload's streams: what stands before the slash in their names."""
    return streams[0].partition("/")[0]


def needed(module: str, package: str) -> Any:
    """Import a peer's package, or say that it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"the Python package {package} is not installed (pip install -e '.[bench]'): {error}") from None
