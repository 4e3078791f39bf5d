"""The world that is attacked, on each engine; and the stores, of both colours."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from leases import LeaseStore
from tests import databases
from tests.conformance.driver import Loop, opened
from tests.hostile.laws import World


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def one_world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One for all tests that change nothing but rows."""
    room = tmp_path_factory.mktemp("hostile")
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_sqlite"), room / "leases.db")
        with closing(World(f"sqlite:///{room / 'leases.db'}", room)) as world:
            yield world
        return
    maintenance = request.getfixturevalue("maintenance")
    url = databases.create(maintenance, request.getfixturevalue("migrated_postgresql"))
    with closing(World(url, room)) as world:
        yield world
    databases.drop(maintenance, url)


@pytest.fixture
def world(one_world: World) -> World:
    """As it was at first."""
    return one_world.restored()


@pytest.fixture
def own_world(url: str, tmp_path: Path) -> Iterator[World]:
    """One that may be harmed."""
    with closing(World(url, tmp_path)) as world:
        yield world


@pytest.fixture
def attacked(world: World, loop: Loop | None) -> Iterator[LeaseStore]:
    """A store on the world, of each colour."""
    with opened(world.url, loop) as store:
        yield store
