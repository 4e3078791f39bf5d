"""Races on a real PostgreSQL, by the server's own clock; each test finds empty tables and nobody else connected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from leases import LeaseStore
from leases.schema import metadata
from tests import databases
from tests.postgresql.race import Observer


@pytest.fixture(scope="session")
def shared_url(maintenance: Engine, migrated_postgresql: str) -> Iterator[str]:
    url = databases.create(maintenance, migrated_postgresql)
    yield url
    databases.drop(maintenance, url)


@pytest.fixture
def postgresql_url(shared_url: str, maintenance: Engine) -> str:
    """To empty the tables takes a tenth of making a database anew."""
    name = make_url(shared_url).database
    with maintenance.connect() as connection:
        connection.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name}
        )
        connection.execute(text(f"ALTER DATABASE {name} RESET ALL"))
        connection.execute(text(f"ALTER ROLE CURRENT_USER IN DATABASE {name} RESET ALL"))
    deletions = "; ".join(f"DELETE FROM {table}" for table in metadata.tables)
    emptying = create_engine(shared_url, poolclass=NullPool)
    with emptying.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL session_replication_role = replica; {deletions}")  # past the guards
        connection.exec_driver_sql("DROP TABLE IF EXISTS work")
    return shared_url


@pytest.fixture
def store(postgresql_url: str) -> Iterator[LeaseStore]:
    with LeaseStore(postgresql_url) as store:
        yield store


@pytest.fixture
def engine(postgresql_url: str) -> Engine:
    """The user's own engine, as SQLAlchemy makes it by default."""
    return create_engine(
        postgresql_url, poolclass=NullPool, connect_args={"application_name": "billing", "connect_timeout": 10}
    )


@pytest.fixture
def observer(engine: Engine) -> Observer:
    observer = Observer(engine)
    observer.execute("CREATE TABLE work (token bigint, note text)")
    return observer
