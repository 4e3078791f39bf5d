"""One suite, run four times: {SQLite, PostgreSQL} × {sync, async}, each test on a database and a clock of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from leases import EventLog, LeaseStore
from leases.schema import metadata
from tests import databases
from tests.clock import START, Clock, standing
from tests.conformance.driver import Caller, Loop, execute, log_of, opened


@pytest.fixture(scope="session")
def shared_postgresql(maintenance: Engine, migrated_postgresql: str) -> Iterator[tuple[str, Clock]]:
    """One database and its clock for the suite: to empty the tables takes a tenth of making a database anew."""
    url = databases.create(maintenance, migrated_postgresql)
    with standing(url) as clock:
        yield url, clock
    databases.drop(maintenance, url)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """A database with empty tables."""
    if request.param == "sqlite":
        result: str = request.getfixturevalue("sqlite_url")
        return result
    url: str
    url, clock = request.getfixturevalue("shared_postgresql")
    deletions = "; ".join(f"DELETE FROM {table}" for table in metadata.tables)
    with clock.engine.connect() as connection:  # in one transaction, and past the guards
        connection.exec_driver_sql(f"SET LOCAL session_replication_role = replica; {deletions}")
    return url


@pytest.fixture
def clock(url: str, request: pytest.FixtureRequest) -> Iterator[Clock]:
    if url.startswith("sqlite"):
        with standing(url) as clock:
            yield clock
    else:
        _, shared = request.getfixturevalue("shared_postgresql")
        shared.set(START)
        yield shared


@pytest.fixture
def store(url: str, clock: Clock, loop: Loop | None) -> Iterator[LeaseStore]:
    with opened(url, loop) as store:
        yield store


@pytest.fixture
def log(store: LeaseStore) -> EventLog:
    return log_of(store)


@pytest.fixture(params=["engine", "session"])
def caller(request: pytest.FixtureRequest, url: str, clock: Clock, loop: Loop | None) -> Iterator[Caller]:
    """The user's own program, by its engine and by its ORM sessions."""
    caller = Caller(url, loop, session=request.param == "session")
    yield caller
    caller.close()


@pytest.fixture
def work(store: LeaseStore) -> None:
    """A table of the user's own, `work(note)`, empty."""
    execute(store, "CREATE TABLE IF NOT EXISTS work (note text)")
    execute(store, "DELETE FROM work")
