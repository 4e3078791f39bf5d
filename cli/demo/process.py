"""A worker process, as its supervisor has it: started, spoken to, listened to, ended."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from leases.cli.demo.board import Seat

Report = dict[str, Any]


@dataclass(slots=True)
class Frozen:
    """How a worker is that has stopped itself before a write to a stream."""

    stream_id: str
    token: int
    awake_at_s: float
    look_at_s: float
    taken: bool = False
    thawed: bool = False


@dataclass(slots=True)
class Process:
    """A worker as its supervisor has it."""

    seat: Seat
    popen: subprocess.Popen[bytes]
    errors: Path
    listener: threading.Thread | None = None
    ready: bool = False
    enlisted: bool = False
    finished: bool = False
    ended: bool = False
    frozen: Frozen | None = None

    def say(self, *words: str) -> None:
        self.write(json.dumps(words))

    def write(self, line: str) -> None:
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):  # it has just ended, and its end will be heard
            self.popen.stdin.write(line.encode() + b"\n")
            self.popen.stdin.flush()

    @classmethod
    def start(cls, seat: Seat, errors: Path) -> Self:
        """Start a worker in a process group of its own, which waits for orders; its log is `errors`."""
        with errors.open("wb") as log:
            popen = subprocess.Popen(
                # -P: a file in the current directory must not stand in for a module.
                [sys.executable, "-P", "-m", "leases.cli.demo.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                process_group=0,
            )
        return cls(seat, popen, errors)

    def listen(self, heard: Callable[[Self, Report | None], object]) -> None:
        """Pass on each report, from a thread; None when it has ended."""

        def pass_on() -> None:
            assert self.popen.stdout is not None
            for line in self.popen.stdout:
                with suppress(ValueError):  # the last line of one that was killed
                    heard(self, json.loads(line))
            heard(self, None)

        self.listener = threading.Thread(target=pass_on, daemon=True)
        self.listener.start()

    def last_words(self) -> str:
        """The last line that it wrote to its log."""
        said = self.errors.read_text(errors="replace").strip().splitlines()
        return said[-1] if said else "no word"

    def clear_away(self) -> None:
        """Wait for the end of one that was killed, and close what led to it."""
        self.popen.wait()
        if self.listener is not None:
            self.listener.join()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with suppress(OSError):  # what it was told last, it need not hear
                    pipe.close()
