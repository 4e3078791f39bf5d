"""`Worker`: a process that shares a pool's streams with others, and calls a handler for each that it has.

    def handle(session):                      # one batch of one stream; called again and again
        batch = read(session.stream_id, after=session.checkpoint or 0)
        session.append(batch.events, checkpoint=batch.end)

    Worker(LeaseStore(url), handle, streams=["orders/1", "orders/2"]).run()

What it is, from its start to its end:

    start ──> active: beats, polls, claims up to its fair share, sheds what is beyond it
                └── SIGTERM, `stop`, `leases drain`, the end of the program ──> draining: claims nothing; each handler
                    finishes what it has in hand, and its lease is released ──> stopped: its row is gone

It assumes of its handler only that it looks at `session.stopping` if it loops, and that it writes under the fence
(`session.append`, `save`, `fenced`). It promises that the handler is called for a stream only while its lease can be
trusted, never twice at the same time; that a handler which fails costs its own stream a rest, and no other stream
anything; and that whatever it does not release, others have within the TTL and one poll interval.

Its threads: `leases-beat` and `leases-watch` (see `heart`), `leases-plan` (see `planner`), and its handlers'. All are
daemons: an interpreter that ends does not wait for them, but releases what they held.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self
from weakref import WeakMethod

from leases import fleet, limits, operations
from leases.backoff import Backoff
from leases.discovery import Discover
from leases.errors import ConfigError, LeasesError
from leases.keeper import Health
from leases.line import Line
from leases.model import DEFAULT_POOL, Happening, WorkerEvent
from leases.planner import Planner
from leases.registry import DEFAULT_TTL, SessionRegistry
from leases.runner import Handler, ThreadRunner, is_async
from leases.runs import Terms
from leases.session import StreamSession
from leases.store import LeaseStore
from leases.tasks import TaskRunner
from leases.trust import monotonic

if TYPE_CHECKING:
    from leases.async_store import AsyncLeaseStore

logger = logging.getLogger("leases")

THREADS = 8
"""How many threads call a sync handler, unless it is said otherwise."""

CLOSING_S = 5.0
"""How long, beyond the drain timeout, a worker tries to reach the database to release what it has."""

MOST_RETRY_S = 5.0

LOOK_EVERY_S = 0.5
"""How often `run` looks whether draining takes too long."""

SAME_SIGNAL_S = 1.0
"""A second signal ends a worker at once, if it comes later than this after the first."""


class Worker:
    """A worker of a pool. A context manager: started on the way in, drained on the way out.

    `handler` is called with a `StreamSession`, again and again, on one of `concurrency` threads; or, if it is `async
    def`, with an `AsyncStreamSession`, as a task. See `runner` for when it is called next. `streams` are registered at
    the start; or a callable is asked for them every `discover_every`, and what it does not name any more is retired;
    or, by default, the table alone says what there is. `name` is the owner in the table: unique among live processes.

    `capacity` is how many streams it takes at the most, `weight` how much of the pool is its share. `ttl` is how long
    its streams stay idle when it dies; `poll_interval` how soon it sees what others let go where no notification tells
    it. A handler that makes no progress (a call returns, something is written, `session.progress()`) for
    `stall_timeout` loses its stream; by default it may take for ever. `drain_timeout` bounds how long a handler that
    is asked to end may go on. A stream whose handler raised rests for `backoff`. `on_event` is told what happens, on
    whatever thread it does; it must be quick.
    """

    def __init__(
        self,
        store: LeaseStore | AsyncLeaseStore,
        handler: Handler,
        *,
        streams: Iterable[str] | Discover | None = None,
        pool: str = DEFAULT_POOL,
        name: str | None = None,
        capacity: int | None = None,
        weight: float = 1.0,
        concurrency: int | None = None,
        ttl: timedelta = DEFAULT_TTL,
        poll_interval: timedelta = timedelta(seconds=1),
        stall_timeout: timedelta | None = None,
        drain_timeout: timedelta = timedelta(seconds=30),
        discover_every: timedelta = timedelta(seconds=30),
        backoff: Backoff | None = None,
        on_event: Callable[[WorkerEvent], object] | None = None,
    ) -> None:
        if not callable(handler):
            raise ConfigError(f"the handler must be a function of a session, not {type(handler).__name__}")
        if capacity is not None:
            limits.count("capacity", capacity, least=0)
        if concurrency is not None:
            limits.count("concurrency", concurrency, most=10_000)
        if not isinstance(backoff, Backoff | None):
            raise ConfigError(f"backoff must be a Backoff, not {type(backoff).__name__}")
        self._store, self._async_store = _stores(store)
        self._handler = handler
        self._calls = concurrency
        self._streams = None if streams is None or callable(streams) else limits.stream_ids(streams)
        self._on_event = on_event
        self._stop_asked = False
        self._woken = threading.Event()
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop_by_s = math.inf
        self.registry = SessionRegistry(
            self._store,
            owner=name,
            ttl=ttl,
            pool=pool,
            on_granted=lambda session: self._planner.runs.granted(session),
            on_lost=lambda session, loss: self._planner.runs.lost(session, loss),
            on_released=lambda session: self._planner.tell(Happening.RELEASED, session),
            on_stopping=lambda session: self._planner.runs.stopping(session),
            on_beat=self._beaten,
            heard=self._heard,
            competes=True,
            capacity=capacity,
            weight=limits.weight(weight),
        )
        self._poll_s = _seconds("poll_interval", poll_interval, least_s=0.001)
        terms = Terms(
            poll_s=self._poll_s,
            drain_s=_seconds("drain_timeout", drain_timeout),
            stall_s=None if stall_timeout is None else _seconds("stall_timeout", stall_timeout, least_s=0.001),
            discover_s=_seconds("discover_every", discover_every, least_s=0.001),
            capacity=capacity,
            backoff=backoff or Backoff(),
        )
        self._drain_s = terms.drain_s
        self._line = Line(self._store)
        self._planner = Planner(
            self.registry,
            self._line,
            terms,
            tell=self._tell,
            discover=streams if callable(streams) else None,
            wake=self._woken.set,
        )

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The owner of its leases, and the `worker_id` of its row."""
        return self.registry.owner

    @property
    def sessions(self) -> Mapping[str, StreamSession]:
        """The open sessions by stream_id, as they are now."""
        return self.registry.sessions

    @property
    def draining(self) -> bool:
        """Whether it lets its streams go, to end."""
        return self._planner.draining

    def health(self) -> Health:
        """How the heartbeats are: for a liveness probe, compare `beat_age` with the ttl."""
        return self.registry.health()

    def __repr__(self) -> str:
        return f"<Worker {self.name!r} of pool {self.registry.pool!r}, {len(self.sessions)} streams>"

    # --- start, stop -----------------------------------------------------------------------------------------------

    def start(self, *, loop: asyncio.AbstractEventLoop | None = None) -> Self:
        """Begin to work. A second call is harmless; a worker that has stopped cannot be started again.

        What is wrong with the store, or with the streams, is raised here. `ConfigError` if another live process has the
        worker's name. The tasks of an async handler run on `loop`, or else on a loop and a thread of the worker's own.
        """
        with self._starting:
            if self._stop_asked:
                raise ConfigError("this worker has stopped; make a new one")
            if self._thread is not None:
                return self
            member = self.registry.keeper.member
            other = self._store.run(lambda connection: fleet.namesake(connection, member), read_only=True)
            if other is not None:
                raise ConfigError(
                    f"a worker named {self.name!r} is alive, pid {other[1]} on {other[0]}: choose another name, "
                    f"or wait {self.registry.ttl.total_seconds():g} s if it is dead"
                )
            if self._streams:
                streams, pool = self._streams, self.registry.pool
                self._store.run(lambda connection: operations.register(connection, streams, pool=pool))
            self._planner.runs.runner = self._runner(loop)
            self.registry.start()
            if self.registry.heart is not None:
                self.registry.heart.watched.append(self._line)
            self._thread = threading.Thread(target=self._plan_on, name="leases-plan", daemon=True)
            self._thread.start()
            atexit.register(_stop_at_exit, WeakMethod(self._end_with_interpreter))
            self._tell(WorkerEvent(Happening.STARTED, self.name))
        return self

    def _runner(self, loop: asyncio.AbstractEventLoop | None) -> ThreadRunner | TaskRunner:
        if is_async(self._handler):
            from leases.async_session import AsyncStreamSession

            return TaskRunner(
                self._handler,
                self._planner.runs.ended,
                wrap=lambda session: AsyncStreamSession(session, self._async_store),
                calls=self._calls,
                idle_s=self._poll_s,
                loop=loop,
            )
        return ThreadRunner(
            self._handler, self._planner.runs.ended, threads=self._calls or THREADS, idle_s=self._poll_s
        )

    def stop(self, drain: bool = True) -> None:
        """Let everything go, and end. A second call is harmless; called by a handler, it does not wait.

        With `drain` each handler finishes what it has in hand, within the drain timeout; else nothing is waited for:
        leases are released at once, and only the fence stops a handler that goes on.
        """
        self._ask_to_stop(at_once=not drain)
        if self._thread is None or self._thread is threading.current_thread():
            return
        if self._planner.runs.runner.owns_this_thread():
            return
        self._thread.join(max(0.0, self._stop_by_s - monotonic()))
        if self._thread.is_alive():  # the database does not answer
            self._line.cut()
            self._thread.join(CLOSING_S)

    def _ask_to_stop(self, *, at_once: bool) -> None:
        self._stop_asked = True
        stop_by_s = monotonic() + CLOSING_S + (0.0 if at_once else self._drain_s)
        self._stop_by_s = min(self._stop_by_s, stop_by_s)
        self._planner.drain(at_once=at_once)

    def _overdue(self) -> bool:
        """Whether it has been asked to stop, and takes longer than it may: then what is left is left to expire."""
        return monotonic() >= self._stop_by_s

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it has stopped, for whatever reason; False if it has not within `timeout`."""
        return self._stopped.wait(None if timeout is None else limits.duration("timeout", timeout).total_seconds())

    def run(self) -> None:
        """Start, work until it is asked to stop, and drain. In the main thread, SIGTERM and SIGINT ask for that.

        A second signal ends it at once. Raises what has ended the worker, if it did not end by itself.
        """
        self.start()
        with self._signals():
            try:
                while not self._stopped.wait(LOOK_EVERY_S):
                    if self._overdue():
                        break
            finally:
                self.stop()
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        heard_at_s: list[float] = []

        def hear(number: int, _: FrameType | None) -> None:
            # Some send a signal twice, to the process and to its group: that is one.
            again = self._stop_asked and not (heard_at_s and monotonic() - heard_at_s[0] < SAME_SIGNAL_S)
            heard_at_s.append(monotonic())
            logger.info("%s: %s", signal.Signals(number).name, "stopping at once" if again else "draining")
            self._ask_to_stop(at_once=again)

        before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        """Start; the tasks of an async handler run on the loop that is running."""
        loop = asyncio.get_running_loop()
        return await asyncio.to_thread(lambda: self.start(loop=loop))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    # --- its thread ------------------------------------------------------------------------------------------------

    def _plan_on(self) -> None:
        failures = 0
        try:
            while not self._planner.done and not self._overdue():
                if self._planner.draining:  # by an operator, perhaps: then nobody has said until when
                    self._stop_by_s = min(self._stop_by_s, monotonic() + self._drain_s + CLOSING_S)
                self._woken.clear()
                try:
                    pause_s = self._planner.tick()
                    failures = 0
                except LeasesError as error:
                    failures += 1
                    pause_s = min(0.1 * 2 ** min(failures, 10), MOST_RETRY_S)
                    logger.warning(
                        "%s could not plan, and tries again in %.1f s: %s", self.name, pause_s, error,
                        extra={"owner": self.name},
                    )  # fmt: skip
                if not self._planner.done:
                    self._woken.wait(pause_s)
        except BaseException as error:
            logger.exception("worker %s ends by an error that is not foreseen", self.name)
            self._failure = error
        finally:
            self._close()

    def _close(self) -> None:
        self._planner.runs.runner.close()
        try:
            with suppress(LeasesError):  # what could not be released expires by itself
                self.registry.close()
            self._line.close()
            if self._async_store is not None:
                self._store.close()
            self._tell(WorkerEvent(Happening.STOPPED, self.name))
        finally:
            self._stopped.set()

    def _end_with_interpreter(self) -> None:
        self._drain_s = min(self._drain_s, CLOSING_S)
        self.stop()

    # --- what it hears ---------------------------------------------------------------------------------------------

    def _beaten(self, count: int) -> None:
        if self._planner.view is None:
            self._woken.set()  # the first beat has enlisted it: now it can plan
        self._tell(WorkerEvent(Happening.RENEWED, self.name, count=count))

    def _heard(self, payload: str) -> None:
        if payload == f"free:{self.registry.pool}":
            self._planner.hurry()
        elif payload == f"look:{self.name}":
            self._planner.look()

    def _tell(self, event: WorkerEvent) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except BaseException:  # a listener's mistake, or its sys.exit(), must not end the worker
            logger.exception("on_event of %s failed", self.name)


def _stores(store: LeaseStore | AsyncLeaseStore) -> tuple[LeaseStore, AsyncLeaseStore | None]:
    """The store that plans and beats, and the one that async handlers write by, if they do."""
    if not isinstance(store, LeaseStore):
        from leases.async_store import AsyncLeaseStore

        if isinstance(store, AsyncLeaseStore):
            return store.sync_store(), store
    return store, None


def _stop_at_exit(stop: WeakMethod[Callable[[], None]]) -> None:
    still = stop()
    if still is not None:
        still()


def _seconds(what: str, value: timedelta, *, least_s: float = 0.0) -> float:
    return limits.duration(what, value, least=timedelta(seconds=least_s)).total_seconds()
