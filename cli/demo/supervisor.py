"""The supervisor: starts the worker processes, strikes those that are to be struck, and ends them all whatever happens.

    starting ──> running ──(brink, kill)──> killed
                   │ │ └────(brink, freeze)─> frozen ──(its stream granted to another)──> running
                   │ └──────(drain)─> draining ──> drained
    waiting ─(join)┘ └──(every stream is done, stop)──> done

The workers enlist first, then the streams are offered, and when each worker has its share they are told to write. So
all of them are at work when the first is struck. Workers that join are let in when a third of the events is written;
those that are to drain are asked to when half is, in the database, as `leases drain` does.

A victim reports that it stands at the brink (see `worker`). One to be killed is killed there. One to be frozen has
stopped itself; it is continued only when a later grant of the stream that it was about to write to has been reported,
so that its write must be refused.

No process outlives the run: each worker ends when its standard input does, `close` kills those that are left, and
each has a process group of its own, so that Ctrl-C reaches the supervisor alone, and the kernel hangs up on one that is
stopped when the supervisor is killed.
"""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from leases import LeaseStore, SchemaOutdated, StoreError, StoreUnavailable, fleet
from leases.cli.demo import ground
from leases.cli.demo.board import Board, State
from leases.cli.demo.plan import Plan, batch_size
from leases.cli.demo.process import Frozen, Process, Report
from leases.cli.demo.proof import Strike
from leases.cli.demo.wire import Orders
from leases.cli.text import plural
from leases.engine import BUSY_OPTION

TICK_S: Final = 0.05
NUDGE_S: Final = 1.0
"""How often a frozen worker that keeps everybody out is woken for a moment."""

SHARE_S: Final = 15.0
"""How long, and five TTLs, the workers may take to share the streams before they write."""

START_S: Final = 120.0
"""How long workers may take to start, or to end, without a sign of life."""

QUIET_S: Final = 1.0
"""When nothing was heard for so long, the database is asked whether there is anything left to do."""


class RunFailed(Exception):
    """The run could not go to its end: a worker ended that nobody struck, or nothing happens any more."""


class Crew:
    """The worker processes of one run. A context manager: at its end none of them is left."""

    def __init__(self, store: LeaseStore, url: str, feed: Path, plan: Plan, board: Board, streams: Collection[str]):
        self.board = board
        self.strikes: list[Strike] = []
        self.unrefused: list[str] = []
        """The streams on which a thawed worker's write was not refused: there should be none."""
        self._store = store
        self._plan = plan
        self._streams = streams
        self._reports: queue.SimpleQueue[tuple[Process, Report | None]] = queue.SimpleQueue()
        self._heard_at_s = time.monotonic()
        self._look_at_s = 0.0
        self._trouble = ""
        self._processes: list[Process] = []
        self._to_join: list[Process] = []
        self._to_leave: list[Process] = []
        self._hire = (url, feed)

    def __enter__(self) -> Self:
        try:
            self._start(*self._hire)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, url: str, feed: Path) -> None:
        for seat in self.board.seats:
            orders = Orders(
                url=url,
                owner=seat.owner,
                ttl_s=self._plan.ttl_s,
                poll_s=self._plan.poll_s,
                feed=str(feed),
                batch=batch_size(self.board.events),
            )
            process = Process.start(seat, feed.with_name(f"worker-{seat.number}.log"))
            self._processes.append(process)
            process.write(orders.as_line())
            process.listen(lambda process, report: self._reports.put((process, report)))
        self._to_join = [process for process in self._processes if self._plan.joins(process.seat.number)]
        self._to_leave = [process for process in self._processes if self._plan.leaves(process.seat.number)]

    def close(self) -> None:
        """Kill what is left, stopped or not, and wait for it. A second call is harmless."""
        for process in self._processes:
            process.popen.kill()
        for process in self._processes:
            process.clear_away()

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self, refresh: Callable[[], object]) -> None:
        """Let the workers work until every stream is done."""
        first = [process for process in self._processes if process not in self._to_join]
        self._until(lambda: all(process.ready for process in self._processes), refresh, START_S)
        for process in first:
            process.say("begin")
        self._until(lambda: all(process.enlisted for process in first), refresh, START_S)
        self._store.run(lambda connection: ground.offer(connection, self._streams))
        begin_at_s = (
            time.monotonic() + SHARE_S + 5 * self._plan.ttl_s
        )  # a machine may be too slow for it ever to settle
        self._until(lambda: self.board.shared or time.monotonic() >= begin_at_s, refresh, START_S)
        self.board.tell(f"all have their shares of {plural(self.board.streams, 'stream')}, and begin to write")
        for process in first:
            fault = self._plan.fault(process.seat.number)
            if fault is not None and process.seat.held:  # else there is nothing to be struck at
                process.say("strike", fault)
        for process in self._processes:
            process.say("work")
        self._until(self._steer, refresh, 60 + 5 * self._plan.ttl_s)
        for process in self._processes:
            process.say("stop")
        self._until(lambda: all(process.ended for process in self._processes), refresh, START_S)

    def _until(self, condition: Callable[[], bool], refresh: Callable[[], object], patience_s: float) -> None:
        self._heard_at_s = time.monotonic()
        while not condition():
            with suppress(queue.Empty):
                self._hear(*self._reports.get(timeout=TICK_S))
                for _ in range(1000):  # then look whether there is something to do
                    self._hear(*self._reports.get_nowait())
            for process in self._processes:
                if process.frozen is not None:
                    self._tend(process, process.frozen)
            self.board.sum_up()
            refresh()
            if time.monotonic() - self._heard_at_s > patience_s:
                raise RunFailed(f"no worker has done anything for {patience_s:g} s{self._trouble}; gave up")

    def _hear(self, process: Process, report: Report | None) -> None:
        if report is None:
            self._heard_at_s = time.monotonic()
            self._ended(process)
            return
        if report["kind"] == "failed":
            self._trouble = f" (the last failure: {report['reason']})"
        else:
            self._heard_at_s = time.monotonic()
        self.board.hear(process.seat, report)
        match report:
            case {"kind": "ready"}:
                process.ready = True
            case {"kind": "enlisted"}:
                process.enlisted = True
            case {"kind": "granted", "stream": stream_id, "token": token}:
                self._look_for_takeovers(process, stream_id, token)
            case {"kind": "brink", "fault": fault, "stream": stream_id, "token": token}:
                self._strike(process, fault, stream_id, token)
            case {"kind": "refused"}:
                self._let_resume(process)
            case {"kind": "wrote", "stream": stream_id, "thawed": True}:
                self._let_resume(process)
                self.unrefused.append(stream_id)
                self.board.tell(f"worker {process.seat.number}: its write to {stream_id} was NOT refused")
            case {"kind": "finished"}:
                process.finished = True
            case {"kind": "gave up", "error": error, "of": kind}:
                raise _failure(kind, error)

    # --- joining, leaving, the end -----------------------------------------------------------------------------

    def _steer(self) -> bool:
        """Let join who is to, ask to leave who is to, when it is time; say whether all that was to happen has."""
        written, events = self.board.written, self.board.events
        over = self._over()
        if self._to_join and (3 * written >= events or over):
            for process in self._to_join:
                process.say("begin")
            self._to_join = []
        if self._to_leave and (2 * written >= events or over):
            self._to_leave = [process for process in self._to_leave if not self._ask_to_leave(process)]
        waited_for = any(
            process.frozen is not None or not process.enlisted or process.seat.state is State.DRAINING
            for process in self._processes
        )
        return over and not (waited_for or self._to_leave)

    def _over(self) -> bool:
        """Whether every stream is done. Asks the database: of what a killed worker did last there may be no report."""
        now_s = time.monotonic()
        expected = len(self.board.done) >= self.board.streams or now_s - self._heard_at_s > QUIET_S
        if not expected or now_s < self._look_at_s:
            return False
        self._look_at_s = now_s + TICK_S
        return self._store.run(ground.unfinished, read_only=True) == 0

    def _ask_to_leave(self, process: Process) -> bool:
        """Ask a worker to drain, as an operator would; False if that is to be tried again."""
        owner = process.seat.owner
        try:
            with self._impatient() as connection:
                asked = fleet.drain(connection, owner)
        except SQLAlchemyError:  # locked: the one who keeps us out is frozen, perhaps, and then `_tend` sees to it
            return False
        if asked:
            self.board.asked_to_leave(process.seat)
        return asked

    @contextmanager
    def _impatient(self) -> Iterator[Connection]:
        """A transaction that does not wait for long: while this process waits, it tends to nobody."""
        with self._store.engine.connect() as connection:
            with connection.execution_options(**{BUSY_OPTION: 300}).begin():
                yield connection

    def _ended(self, process: Process) -> None:
        code = process.popen.wait()
        process.ended = True
        if process.seat.state is State.KILLED:
            return
        if process.finished and code == 0:
            self.board.ended(process.seat)
            return
        raise RunFailed(f"worker {process.seat.number} ended by itself (exit {code}): {process.last_words()}")

    # --- the strikes -------------------------------------------------------------------------------------------

    def _strike(self, process: Process, fault: str, stream_id: str, token: int) -> None:
        self.strikes.append(Strike(process.seat.owner, self._store.run(ground.clock, read_only=True)))
        if fault == "kill":
            process.popen.kill()
            process.popen.wait()
            self.board.struck(process.seat, State.KILLED, stream_id, token)
            return
        now_s = time.monotonic()
        process.frozen = Frozen(stream_id, token, now_s, now_s + 0.2)
        for other in self._processes:
            if other is not process:
                other.say("spare", stream_id)
        self.board.struck(process.seat, State.FROZEN, stream_id, token)

    def _let_resume(self, process: Process) -> None:
        """Let whoever has the stream of a thawed worker go on, after that worker's write."""
        if process.frozen is not None:
            for other in self._processes:
                if other is not process:
                    other.say("resume", process.frozen.stream_id)
            process.frozen = None

    def _look_for_takeovers(self, claimer: Process, stream_id: str, token: int) -> None:
        for process in self._processes:
            frozen = process.frozen
            if frozen is not None and process is not claimer:
                frozen.taken |= stream_id == frozen.stream_id and token > frozen.token

    def _tend(self, process: Process, frozen: Frozen) -> None:
        """Thaw a frozen worker if it is time; wake it for a moment if it keeps the others out."""
        now_s = time.monotonic()
        if frozen.taken:
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
            with self._impatient():
                return True
        except SQLAlchemyError:
            return False


def _failure(kind: str, error: str) -> Exception:
    classes = {"StoreUnavailable": StoreUnavailable, "SchemaOutdated": SchemaOutdated}
    return classes.get(kind, StoreError)(error) if kind != "ConfigError" else RunFailed(error)
