"""The world that is attacked, on each engine; and the stores, of both colours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from leases import LeaseStore
from tests.conformance.driver import Loop, opened
from tests.hostile.laws import World


@pytest.fixture(scope="session")
def event_loop_thread() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(params=["sync", "async"])
def loop(request: pytest.FixtureRequest) -> Loop | None:
    """The colour: None is sync."""
    if request.param == "sync":
        return None
    found: Loop = request.getfixturevalue("event_loop_thread")
    return found


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    world = World(url, tmp_path)
    yield world
    world.close()


@pytest.fixture
def attacked(world: World, loop: Loop | None) -> Iterator[LeaseStore]:
    """A store on the world, of each colour."""
    with opened(world.url, loop) as store:
        yield store
