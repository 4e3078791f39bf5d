"""The world of a test in one line: `store` is a migrated database of its own, on each engine in turn."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from leases import LeaseStore
from tests import postgres
from tests.canary import CANARY, pytest_runtest_makereport  # noqa: F401  # the hook looks for it in all output

NUMBER = itertools.count()


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


def create_database(maintenance: Engine, template: str) -> str:
    name = f"leases_test_{next(NUMBER)}"
    with maintenance.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    url = maintenance.url.set(database=name, password=maintenance.url.password or CANARY)
    return url.render_as_string(hide_password=False)


def drop_database(maintenance: Engine, url: str) -> None:
    with maintenance.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)"))


@pytest.fixture(scope="session")
def migrated_postgresql(maintenance: Engine) -> Iterator[str]:
    """The name of a migrated database, to copy from."""
    url = create_database(maintenance, "template0")
    with LeaseStore(url) as store:
        store.migrate()
    yield url.rpartition("/")[2]
    drop_database(maintenance, url)


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
    url = create_database(maintenance, "template0")
    yield url
    drop_database(maintenance, url)


@pytest.fixture
def postgresql_url(maintenance: Engine, migrated_postgresql: str) -> Iterator[str]:
    """A migrated database of its own."""
    url = create_database(maintenance, migrated_postgresql)
    yield url
    drop_database(maintenance, url)


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
