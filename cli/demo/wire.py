"""What the supervisor and a worker process say to one another: orders and words one way, reports the other.

All of it is JSON, a line each. Orders come first, on the worker's standard input (never as arguments: the URL may hold
a password); then words. Reports come on its standard output.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO


@dataclass(frozen=True, slots=True)
class Orders:
    """What the supervisor tells a worker at its start."""

    url: str
    owner: str
    ttl_s: float
    poll_s: float
    feed: str
    batch: int

    def as_line(self) -> str:
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Words:
    """What the supervisor has said to a worker during the run."""

    begin: threading.Event = field(default_factory=threading.Event)
    """Become a worker of the pool: beat, and claim."""
    work: threading.Event = field(default_factory=threading.Event)
    """All have their share: write."""
    thaw: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    """Every stream is done: end."""
    fault: str | None = None
    """What is to happen to this worker."""
    spared: set[str] = field(default_factory=set)
    """Streams to which a frozen worker is about to write: whoever has them now lets it go first."""

    def hear(self, line: bytes) -> None:
        match json.loads(line):
            case ["strike", fault]:
                self.fault = fault
            case ["spare", stream_id]:
                self.spared.add(stream_id)
            case ["resume", stream_id]:
                self.spared.discard(stream_id)
            case [("begin" | "work" | "thaw" | "stop") as word]:
                event: threading.Event = getattr(self, word)
                event.set()
            case other:
                raise ValueError(f"not a word that a worker knows: {other}")


class Reporter:
    """Writes reports, a line each, whole, from any thread."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def __call__(self, kind: str, **fields: Any) -> None:
        with self._lock:
            self._out.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._out.flush()
