"""A process's sessions, with whatever a caller may pass; and in a forked child, whose they are not."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from leases import LeasesError, LeaseStore, SessionRegistry, StreamSession
from tests.hostile import surface, values
from tests.hostile.laws import PATIENCE_S, Broken, Hang, World, in_forks, judged
from tests.hostile.test_functions import OF_THE_CALLERS, shown

DAY = timedelta(hours=24)
"""A TTL whose heartbeats are so far apart that no row changes by itself."""


@pytest.fixture
def registry(world: World) -> Iterator[SessionRegistry]:
    """A registry that has sent its first heartbeat."""
    with LeaseStore(world.url) as store, SessionRegistry(store, owner="r", ttl=DAY) as registry:
        registry.open("first").close()
        give_up_at = time.monotonic() + PATIENCE_S
        while registry.health().beat_age is None:  # the next one is hours away
            assert time.monotonic() < give_up_at
            time.sleep(0.01)
        yield registry


def escapes(name: str, attempts: Iterable[tuple[str, Any, Callable[[], Any]]]) -> dict[surface.Escape, str]:
    """Make the attempts: (parameter, value, call); return what breaks a law."""
    found = {}
    for parameter, value, attempt in attempts:
        try:
            judged(attempt, also=OF_THE_CALLERS)
        except Broken as broken:
            found[name, parameter, broken.escaped] = f"{name}({parameter}={shown(value)}): {broken}"
    return found


CONSTRUCTED = {
    "owner": values.NAMES, "ttl": values.TTLS, "pool": values.NAMES, "on_lost": (None, 7), "on_granted": (None, 7),
    "on_renewed": (None, 7), "on_released": (None, 7), "clock": (time.monotonic, None, 7), "store": ("x", None, 7),
}  # fmt: skip


def test_a_registry(world: World, registry: SessionRegistry) -> None:
    known = values.parameters(world.held)
    found = escapes(
        "SessionRegistry",
        (
            (name, value, partial(SessionRegistry, **{"store": registry.store, name: value}))
            for name, given in CONSTRUCTED.items()
            for value in given
        ),
    )
    for name, parameters in OPENING.items():
        attempts = (
            (each, value, partial(_open, world, registry, name, each, value))
            for each in parameters
            for value in known[each]
        )
        found |= escapes(f"registry_{name}", attempts)
    surface.compare(found, tried=["SessionRegistry", *(f"registry_{name}" for name in OPENING)])


OPENING = {"open": ("stream_id", "wait"), "try_open": ("stream_id", "wait"), "claim": ("limit", "pool")}


def _open(world: World, registry: SessionRegistry, name: str, parameter: str, value: Any) -> None:
    before = world.look()
    good: dict[str, Any] = {"limit": 1} if name == "claim" else {"stream_id": "free"}
    try:
        opened = getattr(registry, name)(**{**good, parameter: value})
    except LeasesError as error:
        if world.look() != before:
            raise Broken(f"refused with {error!r}, and yet rows have changed") from None
        raise
    for session in opened if isinstance(opened, list) else [opened]:
        if session is not None:
            session.close()


def test_a_session(world: World, registry: SessionRegistry) -> None:
    known = values.parameters(world.held)
    session = registry.open("free")
    attempts: dict[str, list[tuple[str, Any, Callable[[], Any]]]] = {
        "session_append": [
            *(("events", value, partial(session.append, value)) for value in known["events"]),
            *(("checkpoint", value, partial(session.append, {}, checkpoint=value)) for value in values.DOCUMENTS),
        ],
        "session_save": [("checkpoint", value, partial(session.save, value)) for value in values.DOCUMENTS],
        "session_close": [
            ("checkpoint", value, partial(_close, registry, value)) for value in values.DOCUMENTS
        ],
    }  # fmt: skip
    found: dict[surface.Escape, str] = {}
    for name, given in attempts.items():
        found |= escapes(name, given)
    surface.compare(found, tried=attempts)
    session.check()


def _close(registry: SessionRegistry, checkpoint: Any) -> None:
    """A checkpoint that is refused leaves the session open; it can be closed without."""
    session = registry.open("second")
    try:
        session.close(checkpoint=checkpoint)
    finally:
        session.close()
        assert session.remaining() == timedelta(0)


def test_a_forked_child_owns_nothing(world: World, registry: SessionRegistry) -> None:
    """Whatever it calls, it gets our errors or nothing; and its parent's lease is as it was."""
    session = registry.open("free")
    before = world.look()
    attempts: list[Callable[[], Any]] = [
        session.check,
        partial(session.append, {"e": 1}),
        partial(session.save, 1),
        lambda: session.fenced().__enter__(),
        session.close,
        partial(registry.open, "child"),
        partial(registry.try_open, "child"),
        partial(registry.claim, 1),
        registry.health,
        registry.close,
    ]
    (told,) = in_forks(1, lambda _: "\n".join(filter(None, map(broken_by, attempts))))
    assert told == ""
    assert world.look() == before
    session.check()
    session.save("the parent's")
    assert threading.active_count() > 1  # the keeper's threads live on, in the parent


def broken_by(attempt: Callable[[], Any]) -> str:
    """What of the laws a call breaks, as text: nothing."""
    try:
        judged(attempt)
    except (Exception, Hang):  # noqa: BLE001  # told to the parent
        return traceback.format_exc()
    return ""


def test_a_session_is_made_by_a_registry_only(registry: SessionRegistry, world: World) -> None:
    """One that is made of a lease that the registry does not keep may nothing."""
    session = StreamSession(registry, world.held)
    for attempt in (session.check, partial(session.save, 1), partial(session.append, {"e": 1})):
        assert isinstance(judged(attempt), LeasesError)
    assert world.look()["lease_checkpoints"] == []
