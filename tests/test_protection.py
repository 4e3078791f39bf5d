"""A protected table refuses a stale write, whoever writes."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from leases import LeaseStore, protect, unprotect
from leases.faults import sqlstate

TTL = timedelta(seconds=15)


@pytest.fixture
def protected(store: LeaseStore) -> LeaseStore:
    with store.base_engine.begin() as connection:
        connection.execute(text("CREATE TABLE results (stream_id text, fencing_token bigint, n integer)"))
        protect(connection, "results")
        protect(connection, "results")
    return store


def write(store: LeaseStore, stream_id: str, token: int) -> None:
    with store.base_engine.begin() as connection:
        connection.execute(text("INSERT INTO results VALUES (:s, :t, 1), (:s, :t, 2)"), {"s": stream_id, "t": token})


def count(store: LeaseStore) -> int:
    with store.base_engine.begin() as connection:
        return int(connection.execute(text("SELECT count(*) FROM results")).scalar_one())


def test_a_write_under_the_live_token_passes(protected: LeaseStore) -> None:
    lease = protected.acquire("s", owner="me", ttl=TTL)
    assert lease is not None
    write(protected, "s", lease.fencing_token)
    assert count(protected) == 2


@pytest.mark.parametrize("end", ["released", "expired", "stolen"])
def test_a_write_under_a_stale_token_is_refused(protected: LeaseStore, end: str) -> None:
    lease = protected.acquire("s", owner="me", ttl=TTL)
    assert lease is not None
    if end == "released":
        protected.release(lease)
    elif end == "expired":
        protected.expire("s", actor="operator")
    else:
        protected.steal("s", to="other", ttl=TTL, actor="operator")
    with pytest.raises(DBAPIError, match="leases:") as refusal:
        write(protected, "s", lease.fencing_token)
    assert sqlstate(refusal.value) in (None, "LS001")
    assert count(protected) == 0


def test_a_write_for_a_stream_that_nobody_knows_is_refused(protected: LeaseStore) -> None:
    with pytest.raises(DBAPIError, match="leases:"):
        write(protected, "unknown", 1)


def test_an_update_is_checked_too(protected: LeaseStore) -> None:
    lease = protected.acquire("s", owner="me", ttl=TTL)
    assert lease is not None
    write(protected, "s", lease.fencing_token)
    protected.expire("s", actor="operator")
    with pytest.raises(DBAPIError, match="leases:"), protected.base_engine.begin() as connection:
        connection.execute(text("UPDATE results SET n = n + 1"))


def test_copy_is_caught(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store, store.base_engine.connect() as connection:
        connection.execute(text("CREATE TABLE results (stream_id text, fencing_token bigint, n integer)"))
        protect(connection, "results")
        connection.commit()
        driver = connection.connection.driver_connection
        assert driver is not None
        with pytest.raises(Exception, match="refused: the current token is"):
            with driver.cursor() as cursor, cursor.copy("COPY results FROM STDIN") as copy:
                copy.write("s\t1\t1\n")
        connection.rollback()


def test_a_grant_does_not_pass_a_protected_write_in_flight(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url) as store:
        lease = store.acquire("s", owner="me", ttl=timedelta(seconds=0.3))
        assert lease is not None
        with store.base_engine.connect() as connection:
            connection.execute(text("CREATE TABLE results (stream_id text, fencing_token bigint, n integer)"))
            protect(connection, "results")
            connection.commit()
            connection.execute(text("INSERT INTO results VALUES ('s', 1, 1)"))
            # Expired or not: while the write is in flight nobody else is granted the stream …
            connection.execute(text("SELECT pg_sleep(0.4)"))
            assert store.acquire("s", owner="other", ttl=TTL) is None
            connection.commit()
        # … and then somebody is.
        assert store.acquire("s", owner="other", ttl=TTL) is not None


def test_an_unprotected_table_takes_any_write_again(protected: LeaseStore) -> None:
    with protected.base_engine.begin() as connection:
        unprotect(connection, "results")
        unprotect(connection, "results")
    write(protected, "unknown", 1)
    assert count(protected) == 2


def test_two_tables_whose_long_names_begin_alike_have_each_its_own(store: LeaseStore) -> None:
    names = [f"{'long_name_' * 5}{number}" for number in (1, 2)]  # 51 bytes, and 15 of ours before them
    with store.base_engine.begin() as connection:
        for name in names:
            connection.execute(text(f"CREATE TABLE {name} (stream_id text, fencing_token bigint)"))
            protect(connection, name)
        unprotect(connection, names[1])
        connection.execute(text(f"INSERT INTO {names[1]} VALUES ('s', 1)"))
    with pytest.raises(DBAPIError, match="leases:"):
        with store.base_engine.begin() as connection:
            connection.execute(text(f"INSERT INTO {names[0]} VALUES ('s', 1)"))
