"""Workers, elections and what belongs to them, made of whatever a caller may pass; and an async session."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from leases import (
    AsyncLeaseStore,
    AsyncStreamSession,
    Backoff,
    ConfigError,
    LeaderElection,
    LeaseStore,
    SessionRegistry,
    Worker,
)
from tests.conformance.driver import Loop
from tests.hostile import surface, values
from tests.hostile.laws import World, judged
from tests.hostile.test_registry import escapes
from tests.hostile.values import HUGE, Endless, Opaque

LENGTHS = (timedelta(seconds=1), *values.TIMEOUTS, HUGE)

MADE_OF: dict[str, tuple[Any, ...]] = {
    "store": ("sqlite://", None, 7, Opaque()),
    "handler": (None, 7, "module:handler", Opaque()),
    "streams": (*values.SOME_NAMES, Endless(), Opaque()),
    "pool": values.NAMES,
    "name": values.NAMES,
    "candidate": values.NAMES,
    "capacity": values.COUNTS,
    "weight": (0.0, -1.0, 1e300, float("nan"), float("inf"), "1", True, None, HUGE, Opaque()),
    "concurrency": values.COUNTS,
    "ttl": values.TTLS,
    "poll_interval": LENGTHS,
    "stall_timeout": LENGTHS,
    "drain_timeout": LENGTHS,
    "discover_every": LENGTHS,
    "backoff": (None, 7, timedelta(1), Opaque()),
    "on_event": (None,),
}
"""What a worker and a candidate are made of, by the names of their parameters; a new one must stand here."""


def handler(session: Any) -> None:
    """A handler that nobody calls."""


@pytest.fixture
def store(world: World) -> Iterator[LeaseStore]:
    with LeaseStore(world.url) as store:
        yield store


@pytest.mark.parametrize(
    ("kind", "good"), [(Worker, {"handler": handler}), (LeaderElection, {"name": "a"})], ids=["worker", "election"]
)
def test_what_works_is_made(world: World, store: LeaseStore, kind: Any, good: dict[str, Any]) -> None:
    """Of nonsense none is made; and none that is made has begun anything yet."""
    attempts = [
        (parameter, value, partial(kind, **{"store": store, **good, parameter: value}))
        for parameter in inspect.signature(kind).parameters
        for value in MADE_OF[parameter]
    ]
    threads = threading.active_count()
    surface.compare(escapes(kind.__name__, attempts), tried=[kind.__name__])
    assert threading.active_count() == threads
    assert world.look() == world.rows


def test_a_worker(world: World, store: LeaseStore) -> None:
    """One that has not been started has nothing to wait for; one of a name that is alive is not started."""
    worker = Worker(store, handler)
    found = escapes(
        "worker_wait", (("timeout", value, partial(worker.wait, value)) for value in LENGTHS[2:] if value is not None)
    )
    surface.compare(found, tried=["worker_wait"])
    worker.stop()
    for backoff in MADE_OF["backoff"][1:]:
        assert isinstance(judged(partial(Worker, store, handler, backoff=backoff)), ConfigError)
    for doomed in (worker, Worker(store, handler, name="lively")):
        assert isinstance(judged(doomed.start), ConfigError)
    assert world.look() == world.rows


def test_an_election(world: World, store: LeaseStore) -> None:
    """Who asks for nonsense does not campaign."""
    election = LeaderElection(store, "free", candidate="c", ttl=timedelta(hours=24))

    def lead(wait: Any) -> None:
        with election.leading(wait=wait):
            raise AssertionError

    nonsense = [value for value in LENGTHS if value is not None and not isinstance(value, timedelta)]
    for wait in (*nonsense, timedelta(-1), timedelta.min, timedelta.max):
        assert isinstance(judged(partial(lead, wait)), ConfigError)
    assert election.leader() is None
    election.close()
    assert isinstance(judged(partial(lead, timedelta(0))), ConfigError)
    assert world.look() == world.rows


def test_a_backoff() -> None:
    attempts = [
        (parameter, value, partial(_rested, **{parameter: value}))
        for parameter in ("first", "most")
        for value in (*LENGTHS, *values.BACKOFFS)
    ]
    surface.compare(escapes("Backoff", attempts), tried=["Backoff"])


def _rested(**given: Any) -> None:
    backoff = Backoff(**given)
    for failures in (0, 1, 63, 10**9):
        for dice in (0.0, 0.999):
            assert timedelta(0) <= backoff.after(failures, lambda dice=dice: dice) <= timedelta(days=366)  # type: ignore[misc]


@pytest.mark.parametrize("of_its_own", [True, False], ids=["store", "threads"])
def test_an_async_session(world: World, store: LeaseStore, event_loop_thread: Loop, of_its_own: bool) -> None:
    """Through an async store, and without one, by threads."""
    known = values.parameters(world.held)
    asynchronous = AsyncLeaseStore(world.url) if of_its_own else None
    with SessionRegistry(store, owner="r", ttl=timedelta(hours=24)) as registry:
        session = AsyncStreamSession(registry.open("free"), asynchronous)

        def call(method: Callable[..., Any], *given: Any) -> None:
            event_loop_thread.wait(method(*given))

        found = escapes(
            "async_session",
            [
                *(("events", value, partial(call, session.append, value)) for value in known["events"]),
                *(("checkpoint", value, partial(call, session.save, value)) for value in values.DOCUMENTS),
            ],
        )
        surface.compare(found, tried=["async_session"])
        session.check()
        if asynchronous is None:
            assert isinstance(judged(partial(event_loop_thread.wait, _fenced(session))), ConfigError)
        else:
            event_loop_thread.wait(_fenced(session))
            event_loop_thread.wait(asynchronous.close())


async def _fenced(session: AsyncStreamSession) -> None:
    async with session.fenced():
        await asyncio.sleep(0)
