"""What a benchmark asks of a contestant, and of one client of it.

A `Contestant` lives in the benchmark's own process: it has its server started, and says how durable it is. A `Client`
may live in any process: what `opener` returns can be sent there. A workload that makes no sense for a contestant is
named in `not_for`, with the reason, which the table shows.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from benchmarks.servers import Servers

TTL_S = 600
"""How long a lease lives where its end is not what is measured: no round is as long."""


POLL_S = 1.0
"""How often the heir of a takeover looks; each contestant's the same, also where waiting would be its own way."""

OF_LEASES = {
    "plan": "it plans nothing: nobody shares streams out between workers",
    "crowd": "beside the others in `cycle`",
}
"""For `not_for`: what is asked of leases alone."""

AT_ITS_DEFAULT = {f"takeover ttl {ttl_s} s": "measured at its own default" for ttl_s in (1, 5, 15)}
"""For `not_for`: peers have one default each."""


class Absent(Exception):
    """A contestant cannot take part; the message says why, and what to install."""


class Client(ABC):
    """One client, with a connection of its own, used by one thread.

    `take` answers with whatever the others of its methods need to name what was taken.
    """

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

    # For `takeover`: one process serves streams, another stands by; the first is killed after a heartbeat.

    def serve(self, streams: Sequence[str]) -> Any:
        """Own the streams, and keep them by heartbeats, until it is killed."""
        return self.hold(streams)

    def stand_by(self, streams: Sequence[str]) -> None:  # noqa: B027  # most have nothing to do before
        """Be ready to own what the other process leaves behind."""

    def beaten(self) -> None:  # noqa: B027  # where there are no heartbeats, the grant was the last one
        """Wait until the streams that it serves have just been extended: the worst moment to be killed."""

    def take_over(self, streams: Sequence[str], poll_s: float) -> None:
        """Own all these streams, left behind by a killed owner; look for them every so often."""
        began_s = time.monotonic()
        left, looks = set(streams), 0
        while left := {stream for stream in left if self.acquire(stream) is None}:
            looks += 1
            time.sleep(max(0.0, began_s + looks * poll_s - time.monotonic()))

    @abstractmethod
    def close(self) -> None: ...


class LockClient(Client):
    """One client of a library that has an object for each lock, and no call for several of them."""

    def take(self, streams: Sequence[str]) -> list[Any]:
        held = [self.acquire(stream) for stream in streams]
        assert None not in held
        return held

    def let_go(self, held: list[Any]) -> None:
        for lock in held:
            lock.release()

    def release(self, grant: Any) -> None:
        grant.release()


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

    serving: ClassVar[int] = 1
    """How many processes share the streams before one of them is killed: the heir is one, where it is a worker."""

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

    def planning(self, streams: Sequence[str], workers: int) -> AbstractContextManager[Callable[[], None]]:
        """So many workers hold the registered streams, alike many each; what plans once for one of them."""
        raise NotImplementedError

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
