"""The supervisor: starts the worker processes, strikes those that are to be struck, and ends them all whatever happens.

    starting ──> running ──(brink, kill)──> killed
                   │  └────(brink, freeze)─> frozen ──(TTL past, and its stream granted to another)──> running
                   └──> done

A victim reports that it stands at the brink (see `worker`). One to be killed is killed there. One to be frozen has
stopped itself; it is continued only when a later grant of the stream that it was about to write to has been reported,
and its TTL has passed, so that its write must be refused.

No process outlives the run: each worker ends when its standard input does, `close` kills those that are left, and
each has a process group of its own, so that Ctrl-C reaches the supervisor alone, and the kernel hangs up on one that is
stopped when the supervisor is killed.
"""

from __future__ import annotations

import json
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from sqlalchemy.exc import SQLAlchemyError

from leases import LeaseStore, SchemaOutdated, StoreError, StoreUnavailable
from leases.cli.demo import ground
from leases.cli.demo.board import Board, Seat, State
from leases.cli.demo.proof import Strike
from leases.cli.demo.worker import Orders
from leases.engine import BUSY_OPTION

TICK_S: Final = 0.05
NUDGE_S: Final = 1.0
"""How often a frozen worker that keeps everybody out is woken for a moment."""

START_S: Final = 60.0
"""How long workers may take to start."""

BATCHES: Final = 1000
"""About how many batches the file is cut into: a short one has small batches, so that there is something to see."""


class RunFailed(Exception):
    """The run could not go to its end: a worker ended that nobody struck, or nothing happens any more."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the run is to be."""

    workers: int
    ttl_s: float
    kill: int
    freeze: int

    @property
    def poll_s(self) -> float:
        """How often a worker looks for streams that were left behind."""
        return min(0.5, max(0.1, self.ttl_s / 10))

    def fault(self, number: int) -> str | None:
        """What is to happen to a worker, by its number from 1."""
        if number <= self.kill:
            return "kill"
        return "freeze" if number <= self.kill + self.freeze else None


def batch_size(events: int) -> int:
    """How many events a worker writes at once: more of a longer file, so that the run ends in reasonable time."""
    return max(5, min(500, events // BATCHES))


@dataclass(slots=True)
class _Process:
    """A worker as its supervisor has it."""

    seat: Seat
    fault: str | None
    popen: subprocess.Popen[bytes]
    errors: Path
    listener: threading.Thread | None = None
    ready: bool = False
    claimed: bool = False
    finished: bool = False
    ended: bool = False
    frozen: _Frozen | None = None

    def say(self, word: str) -> None:
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):  # it has just ended, and its end will be heard
            self.popen.stdin.write(word.encode() + b"\n")
            self.popen.stdin.flush()


@dataclass(slots=True)
class _Frozen:
    stream_id: str
    token: int
    at_s: float
    awake_at_s: float
    look_at_s: float
    taken: bool = False
    thawed: bool = False


class Crew:
    """The worker processes of one run. A context manager: at its end none of them is left."""

    def __init__(self, store: LeaseStore, url: str, feed: Path, plan: Plan, board: Board, lengths: Mapping[str, int]):
        self.board = board
        self.strikes: list[Strike] = []
        self.unrefused: list[str] = []
        """The streams on which a thawed worker's write was not refused: there should be none."""
        self._store = store
        self._plan = plan
        self._reports: queue.SimpleQueue[tuple[_Process, dict[str, Any] | None]] = queue.SimpleQueue()
        self._heard_at_s = time.monotonic()
        self._processes: list[_Process] = []
        self._hire = (url, feed, lengths)

    def __enter__(self) -> Self:
        try:
            self._start(*self._hire)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, url: str, feed: Path, lengths: Mapping[str, int]) -> None:
        for seat in self.board.seats:
            orders = Orders(
                url=url,
                owner=seat.owner,
                ttl_s=self._plan.ttl_s,
                feed=str(feed),
                batch=batch_size(sum(lengths.values())),
                share=-(-len(lengths) // self._plan.workers),
                poll_s=self._plan.poll_s,
                fault=self._plan.fault(seat.number),
            )
            errors = feed.with_name(f"worker-{seat.number}.log")
            with errors.open("wb") as log:
                popen = subprocess.Popen(
                    # -P: a file in the current directory must not stand in for a module.
                    [sys.executable, "-P", "-m", "leases.cli.demo.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    process_group=0,
                )
            process = _Process(seat, orders.fault, popen, errors)
            self._processes.append(process)
            process.say(orders.as_json())
            process.listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
            process.listener.start()

    def _listen(self, process: _Process) -> None:
        assert process.popen.stdout is not None
        for line in process.popen.stdout:
            with suppress(ValueError):  # the last line of one that was killed
                self._reports.put((process, json.loads(line)))
        self._reports.put((process, None))

    def close(self) -> None:
        """Kill what is left, stopped or not, and wait for it. A second call is harmless."""
        for process in self._processes:
            process.popen.kill()
        for process in self._processes:
            process.popen.wait()
            if process.listener is not None:
                process.listener.join()
            for pipe in (process.popen.stdin, process.popen.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what it was told last, it need not hear
                        pipe.close()

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self, refresh: Callable[[], object]) -> None:
        """Let the workers work until every stream is done."""
        self._until(lambda: all(process.ready for process in self._processes), refresh, START_S)
        # The victims first, each alone: they must hold something to be struck at.
        for victim in (process for process in self._processes if process.fault):
            victim.say("begin")
            self._until(lambda victim=victim: victim.claimed, refresh, START_S)  # type: ignore[misc]
        for process in self._processes:
            if not process.fault:
                process.say("begin")
        self._until(lambda: all(process.claimed for process in self._processes), refresh, START_S)
        for process in self._processes:
            process.say("all_claimed")
        self._until(lambda: all(process.ended for process in self._processes), refresh, 60 + 5 * self._plan.ttl_s)

    def _until(self, condition: Callable[[], bool], refresh: Callable[[], object], patience_s: float) -> None:
        self._heard_at_s = time.monotonic()
        while not condition():
            with suppress(queue.Empty):
                self._hear(*self._reports.get(timeout=TICK_S))
                while not condition():
                    self._hear(*self._reports.get_nowait())
            for process in self._processes:
                if process.frozen is not None:
                    self._tend(process, process.frozen)
            refresh()
            if time.monotonic() - self._heard_at_s > patience_s:
                raise RunFailed(f"no worker has done anything for {patience_s:g} s; gave up")

    def _hear(self, process: _Process, report: dict[str, Any] | None) -> None:
        self._heard_at_s = time.monotonic()
        if report is None:
            self._ended(process)
            return
        self.board.hear(process.seat, report)
        match report:
            case {"kind": "ready"}:
                process.ready = True
            case {"kind": "claimed", "streams": streams}:
                process.claimed = True
                self._look_for_takeovers(process, streams)
            case {"kind": "brink", "fault": fault, "stream": stream_id, "token": token}:
                self._strike(process, fault, stream_id, token)
            case {"kind": "refused"}:
                process.frozen = None
            case {"kind": "wrote", "stream": stream_id, "thawed": True}:
                process.frozen = None
                self.unrefused.append(stream_id)
                self.board.tell(f"worker {process.seat.number}: its write to {stream_id} was NOT refused")
            case {"kind": "finished"}:
                process.finished = True
            case {"kind": "failed", "error": error, "of": kind}:
                raise _failure(kind, error)

    def _ended(self, process: _Process) -> None:
        code = process.popen.wait()
        process.ended = True
        if process.seat.state is State.KILLED or (process.finished and code == 0):
            return
        said = process.errors.read_text(errors="replace").strip().splitlines()
        raise RunFailed(
            f"worker {process.seat.number} ended by itself (exit {code}): {said[-1] if said else 'no word'}"
        )

    # --- the strikes -------------------------------------------------------------------------------------------

    def _strike(self, process: _Process, fault: str, stream_id: str, token: int) -> None:
        self.strikes.append(Strike(process.seat.owner, self._store.run(ground.clock, read_only=True)))
        if fault == "kill":
            process.popen.kill()
            process.popen.wait()
            self.board.struck(process.seat, State.KILLED, stream_id, token)
        else:
            now_s = time.monotonic()
            process.frozen = _Frozen(stream_id, token, now_s, now_s, now_s + 0.2)
            self.board.struck(process.seat, State.FROZEN, stream_id, token)

    def _look_for_takeovers(self, claimer: _Process, streams: list[tuple[str, int]]) -> None:
        for process in self._processes:
            frozen = process.frozen
            if frozen is not None and process is not claimer:
                frozen.taken |= any(name == frozen.stream_id and token > frozen.token for name, token in streams)

    def _tend(self, process: _Process, frozen: _Frozen) -> None:
        """Thaw a frozen worker if it is time; wake it for a moment if it keeps the others out."""
        now_s = time.monotonic()
        if frozen.taken and now_s >= frozen.at_s + self._plan.ttl_s:
            if not frozen.thawed:
                frozen.thawed = True
                process.say("thaw")
                self.board.thawed(process.seat)
            process.popen.send_signal(signal.SIGCONT)  # at every tick until it reports: it may have been stopping
        elif now_s >= frozen.look_at_s:
            # It may have rows locked that others wait for. Not more often: awake it may beat, and so look alive.
            overdue = now_s > frozen.awake_at_s + self._plan.ttl_s + 2 * self._plan.poll_s + 2
            if overdue or not self._may_write():
                process.popen.send_signal(signal.SIGCONT)
                frozen.awake_at_s = now_s
            frozen.look_at_s = now_s + NUDGE_S

    def _may_write(self) -> bool:
        """Whether a transaction can begin: on SQLite, one that is frozen with its own open keeps everybody out."""
        try:
            with self._store.engine.connect() as connection:
                with connection.execution_options(**{BUSY_OPTION: 300}).begin():
                    return True
        except SQLAlchemyError:
            return False


def owners(workers: int) -> list[str]:
    """Names for the workers of a run, which no other run has."""
    run = secrets.token_hex(3)
    return [f"demo-{run}-worker-{number}" for number in range(1, workers + 1)]


def _failure(kind: str, error: str) -> Exception:
    classes = {"StoreUnavailable": StoreUnavailable, "SchemaOutdated": SchemaOutdated}
    return classes.get(kind, StoreError)(error) if kind != "ConfigError" else RunFailed(error)
