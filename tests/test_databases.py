"""A database that is lent again is as it was at first; one that cannot be made so is not lent again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from leases import LeaseStore
from leases.schema import VERSION_TABLE, metadata
from tests.databases import Databases, definition

A_CONSTRAINT = "SELECT conname FROM pg_constraint WHERE conrelid = 'leases'::regclass AND contype = 'c' LIMIT 1"


@pytest.fixture
def lent(maintenance: Engine, migrated_postgresql: str) -> Iterator[Databases]:
    lent = Databases(maintenance, migrated_postgresql)
    yield lent
    lent.close()


def change(url: str, statement: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        constraint = connection.scalar(text(A_CONSTRAINT))
        connection.execute(text(statement.format(name=url.rpartition("/")[2], constraint=constraint)))


def test_after_changes_of_rows_it_is_lent_again_and_is_as_a_new_one(lent: Databases) -> None:
    url, new = lent.lend(), lent.lend()
    with LeaseStore(url) as store:
        store.register(["s", "t"])
        store.pause("s", actor="operator")
    lent.take_back(url)
    assert lent.lend() == url
    assert definition(url) == definition(new)
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        for table in metadata.tables:
            assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == 0
    with LeaseStore(url) as store:
        store.register(["s"])
        store.pause("s", actor="operator")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT audit_id FROM lease_audit")).scalars().all() == [1]
    for each in (url, new):
        lent.take_back(each)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE work (note text)",
        "ALTER TABLE leases ADD COLUMN more int",
        "ALTER TABLE leases DISABLE TRIGGER ALL",
        "ALTER TABLE leases DROP CONSTRAINT {constraint}",
        "CREATE INDEX one_more ON leases (owner)",
        "CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE SCHEMA ops",
        "GRANT SELECT ON leases TO PUBLIC",
        "ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'",
        "ALTER DATABASE {name} CONNECTION LIMIT 50",
        f"UPDATE {VERSION_TABLE} SET version_num = '9999'",
        "ANALYZE leases",
    ],
)
def test_after_any_other_change_it_is_not(lent: Databases, statement: str) -> None:
    url = lent.lend()
    with LeaseStore(url) as store:
        store.register(["s"])
    change(url, statement)
    lent.take_back(url)
    assert url not in lent.free


def test_while_somebody_is_connected_it_is_not(lent: Databases) -> None:
    url = lent.lend()
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        lent.take_back(url)
        assert url not in lent.free
        connection.invalidate()


def test_one_that_is_gone_is_not(lent: Databases, maintenance: Engine) -> None:
    url = lent.lend()
    with maintenance.connect() as connection:
        connection.execute(text(f"DROP DATABASE {url.rpartition('/')[2]}"))
    lent.take_back(url)
    assert url not in lent.free
