"""The world of a test in one line: `store` is a migrated database of its own, on each engine in turn."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool

from leases import LeaseStore
from tests import databases, postgres
from tests.conformance.driver import Loop


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have each of xdist's processes begin with its share of the long tests, so that all end at about the same time."""
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    short = [item for item in items if not item.get_closest_marker("long")]
    ordered: list[pytest.Item] = []
    for number, first in enumerate(_shares([item for item in items if item.get_closest_marker("long")], processes)):
        size = (len(items) - len(ordered)) // (processes - number)  # as xdist's worksteal cuts it
        ordered += first + short[: size - len(first)]
        del short[: size - len(first)]
    items[:] = ordered


def _shares(long: list[pytest.Item], processes: int) -> list[list[pytest.Item]]:
    """The long tests, each at the process that has least to do so far; those of chaos at one: they would disturb."""
    units: dict[object, list[pytest.Item]] = {}
    for item in long:
        units.setdefault(item.path if item.path.parent.name == "chaos" else item, []).append(item)
    shares: list[list[pytest.Item]] = [[] for _ in range(processes)]
    for unit in sorted(units.values(), key=_seconds, reverse=True):
        min(shares, key=_seconds).extend(unit)
    return shares


def _seconds(items: list[pytest.Item]) -> float:
    """About how long they take."""
    return sum(float(mark.args[0]) for item in items if (mark := item.get_closest_marker("long")) is not None)


def pytest_collection_finish() -> None:
    """Have the garbage collector look at what the tests make only, and less often: it took a tenth of their time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    """A PostgreSQL server; a missing one fails the run."""
    with postgres.running() as running:
        yield running


@pytest.fixture(scope="session")
def maintenance(server: postgres.Server) -> Iterator[Engine]:
    engine = create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def migrated_postgresql(maintenance: Engine) -> Iterator[str]:
    """The name of a migrated database, to copy from."""
    url = databases.create(maintenance, "template0")
    with LeaseStore(url) as store:
        store.migrate()
    yield url.rpartition("/")[2]
    databases.drop(maintenance, url)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file, to copy from."""
    file = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    with LeaseStore(f"sqlite:///{file}") as store:
        store.migrate()
    return file


@pytest.fixture
def empty_postgresql_url(maintenance: Engine) -> Iterator[str]:
    """A database of its own, without tables."""
    url = databases.create(maintenance, "template0")
    yield url
    databases.drop(maintenance, url)


@pytest.fixture(scope="session")
def migrated_databases(maintenance: Engine, migrated_postgresql: str) -> Iterator[databases.Databases]:
    """Migrated databases, for one test after the other."""
    lent = databases.Databases(maintenance, migrated_postgresql)
    yield lent
    lent.close()


@pytest.fixture
def postgresql_url(migrated_databases: databases.Databases) -> Iterator[str]:
    """A migrated database of its own."""
    url = migrated_databases.lend()
    yield url
    migrated_databases.take_back(url)


@pytest.fixture
def sqlite_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """A migrated file of its own."""
    shutil.copy(migrated_sqlite, tmp_path / "leases.db")
    return f"sqlite:///{tmp_path / 'leases.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """A migrated database of its own, on each engine in turn."""
    result: str = request.getfixturevalue(f"{request.param}_url")
    return result


@pytest.fixture
def store(url: str) -> Iterator[LeaseStore]:
    """A store on a migrated database of its own, on each engine in turn."""
    with LeaseStore(url) as opened:
        yield opened


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
