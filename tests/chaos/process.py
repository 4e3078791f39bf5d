"""The client processes of a run: started, killed, stopped, thawed, and started again. Each has its place in the run.

Only processes that were started here are ever signalled, by their own handle.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

from tests.chaos.client import Options
from tests.chaos.proxy import Link


class Client:
    """One place: a process at a time, under a new name each time; on PostgreSQL with a link of its own."""

    def __init__(self, options: Options, directory: Path, link: Link | None) -> None:
        self.link = link
        self.deaths = 0
        self.stopped_by_us = False
        self.stopped_at_s: float | None = None
        self.start_at_s: float | None = 0.0
        self._options = options
        self._directory = directory
        self._incarnation = 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def is_worker(self) -> bool:
        return self._options.role == "worker"

    @property
    def name(self) -> str:
        return f"{self._options.name}.{self._incarnation}"

    @property
    def record(self) -> Path:
        return self._directory / f"{self.name}.jsonl"

    def start(self) -> None:
        self._incarnation += 1
        self.start_at_s, self.stopped_at_s, self.stopped_by_us = None, None, False
        values = {
            **self._options.__dict__,
            "name": self.name,
            "record": str(self.record),
            "seed": self._options.seed + self._incarnation,
        }
        with (self._directory / f"{self.name}.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.client", Options(**values).as_argument()],
                stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether its process has come to its work."""
        return self.alive and self.record.exists() and self.record.stat().st_size > 0

    @property
    def stopped(self) -> bool:
        """Whether it stands still, be it by its own SIGSTOP."""
        if not self.alive or self._process is None:
            return False
        with suppress(OSError):
            return Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        return False

    def signal(self, number: int) -> None:
        if self._process is not None and self.alive:
            os.kill(self._process.pid, number)

    def say(self, word: str) -> None:
        """Give a worker's next call a word."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError, ValueError):  # it is dead, or not there
                self._process.stdin.write(word + "\n")
                self._process.stdin.flush()

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        if self._process is not None:
            if self.alive:
                self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with suppress(OSError):
                    self._process.stdin.close()

    def tend(self, random: Random, thaw_s: tuple[float, float]) -> bool:
        """Start a process that is due, thaw one that froze itself; True if it was seen to have frozen itself."""
        now_s = time.monotonic()
        if not self.alive:
            if self.start_at_s is None:
                self.end()
                self.deaths += 1
                self.start_at_s = now_s + random.random()
            elif now_s >= self.start_at_s:
                self.start()
            return False
        if self.stopped_by_us or not self.stopped:
            return False
        if self.stopped_at_s is None:
            self.stopped_at_s = now_s + random.uniform(*thaw_s)
            return True
        if now_s >= self.stopped_at_s:
            self.stopped_at_s = None
            self.signal(signal.SIGCONT)
        return False


def end_all(clients: Sequence[Client]) -> None:
    for client in clients:
        client.signal(signal.SIGCONT)
        client.end()
