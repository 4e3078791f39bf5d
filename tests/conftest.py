"""The world of a test in one line: `store` is a migrated database of its own, on each engine in turn."""

from __future__ import annotations

import gc
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from leases import LeaseStore
from tests import postgres

NUMBER = itertools.count()


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


def _create_database(maintenance: Engine, template: str) -> str:
    name = f"leases_test_{next(NUMBER)}"
    with maintenance.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    return maintenance.url.set(database=name).render_as_string(hide_password=False)


def _drop_database(maintenance: Engine, url: str) -> None:
    with maintenance.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)"))


@pytest.fixture(scope="session")
def migrated_postgresql(maintenance: Engine) -> Iterator[str]:
    """The name of a migrated database, to copy from."""
    url = _create_database(maintenance, "template0")
    with LeaseStore(url) as store:
        store.migrate()
    yield url.rpartition("/")[2]
    _drop_database(maintenance, url)


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
    url = _create_database(maintenance, "template0")
    yield url
    _drop_database(maintenance, url)


@pytest.fixture
def postgresql_url(maintenance: Engine, migrated_postgresql: str) -> Iterator[str]:
    """A migrated database of its own."""
    url = _create_database(maintenance, migrated_postgresql)
    yield url
    _drop_database(maintenance, url)


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
