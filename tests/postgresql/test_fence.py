"""The fence on PostgreSQL: the server itself ends a writer at its lease's end, at every isolation level."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from leases import EventLog, Lease, LeaseStore, StaleToken, fence
from leases.faults import sqlstate
from tests.conformance.driver import TTL, take
from tests.postgresql.race import PATIENCE_S, Background, Observer, writing
from tests.waiting import until

LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

WRITE = text("INSERT INTO work VALUES (1, 'written')")

SHORT = timedelta(milliseconds=500)

IDLE = "idle_in_transaction_session_timeout"
WHOLE = "transaction_timeout"


def version(engine: Engine) -> int:
    with engine.connect():
        return int((engine.dialect.server_version_info or (0,))[0])


def take_over(store: LeaseStore) -> float:
    """Ask for the lease until it is there; how long it took in seconds."""
    began = time.monotonic()
    until(lambda: store.acquire("a", owner="two", ttl=TTL), "the takeover")
    return time.monotonic() - began


def test_a_writer_frozen_between_statements_is_thrown_out_at_its_leases_end(
    store: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(store, ttl=SHORT)
    with writing(engine, lease) as connection:
        connection.execute(WRITE)
        assert take_over(store) < 5
        with pytest.raises(DBAPIError):
            connection.commit()
    assert observer.scalar("SELECT count(*) FROM work") == 0


@pytest.mark.parametrize("own", [None, "1h"])
def test_a_writer_that_trickles_statements_is_thrown_out_too(
    store: LeaseStore, engine: Engine, observer: Observer, own: str | None
) -> None:
    if version(engine) < 17:  # transaction_timeout came with 17
        return
    if own is not None:
        observer.execute(f"ALTER ROLE CURRENT_USER IN DATABASE {engine.url.database} SET {WHOLE} = '{own}'")
    lease = take(store, ttl=SHORT)

    writes = threading.Event()

    def trickle() -> Any:
        try:
            with writing(engine, lease) as connection:
                while True:
                    connection.execute(WRITE)
                    writes.set()
                    connection.execute(text("SELECT pg_sleep(0.02)"))
        except DBAPIError as error:
            return sqlstate(error) or str(error)

    writer = Background(trickle)
    assert writes.wait(PATIENCE_S)
    assert take_over(store) < 5
    assert writer.result() is not None
    assert observer.scalar("SELECT count(*) FROM work") == 0


def limits_after_fence(connection: Connection, lease: Lease, **own: str) -> dict[str, float]:
    for name, value in own.items():
        connection.execute(text(f"SET {name} = '{value}'"))
    connection.commit()
    fence(connection, lease)
    found = {
        name: connection.execute(
            text("SELECT extract(epoch FROM current_setting(:name)::interval)"), {"name": name}
        ).scalar_one()
        for name in own
    }
    connection.rollback()
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("own", "least", "most"),
    [
        ("0", 55, 60),
        ("250ms", 0.25, 0.25),
        ("1s", 1, 1),
        ("59s", 55, 59),
        ("2min", 55, 60),
        ("1h", 55, 60),
        ("1d", 55, 60),
    ],
)
def test_fence_never_lengthens_the_callers_own_timeouts(
    store: LeaseStore, engine: Engine, own: str, least: float, most: float
) -> None:
    lease = take(store, ttl=timedelta(seconds=60))
    names = [IDLE, WHOLE] if version(engine) >= 17 else [IDLE]
    with engine.connect() as connection:
        for name, found in limits_after_fence(connection, lease, **dict.fromkeys(names, own)).items():
            assert least <= found <= most, name


def test_the_callers_timeouts_are_back_after_the_transaction(store: LeaseStore, engine: Engine) -> None:
    lease = take(store)
    with engine.connect() as connection:
        limits_after_fence(connection, lease, **{IDLE: "2min"})
        assert connection.execute(text(f"SHOW {IDLE}")).scalar() == "2min"


def test_of_several_leases_the_shortest_sets_the_limit(store: LeaseStore, engine: Engine) -> None:
    leases = [take(store, str(seconds), ttl=timedelta(seconds=seconds)) for seconds in (60, 20, 40)]
    with writing(engine, *leases) as connection:
        milliseconds = connection.execute(text("SELECT setting::int FROM pg_settings WHERE name = :n"), {"n": IDLE})
        assert 15_000 < milliseconds.scalar_one() <= 20_000


def test_what_the_callers_transaction_timeout_has_left_is_not_lengthened(store: LeaseStore, engine: Engine) -> None:
    if version(engine) < 17:  # transaction_timeout came with 17
        return
    lease = take(store, ttl=timedelta(seconds=10.6))
    with engine.connect() as connection:
        connection.execute(text(f"SET {WHOLE} = '10s'"))
        connection.commit()
        connection.execute(text("SELECT pg_sleep(1)"))  # 9 s are left to the transaction, 9.6 s to the lease
        fence(connection, lease)
        assert connection.execute(text(f"SHOW {WHOLE}")).scalar() == "10s", "its timer runs on"


@pytest.mark.parametrize("level", LEVELS)
def test_fence_sees_an_expiry_that_happened_while_it_waited(
    store: LeaseStore, engine: Engine, observer: Observer, level: str
) -> None:
    lease = take(store, ttl=timedelta(milliseconds=400))

    def write() -> None:
        with writing(engine, lease, isolation=level) as connection:
            connection.execute(WRITE)
            connection.commit()

    with engine.connect() as grant:
        grant.execute(text("UPDATE leases SET fencing_token = fencing_token + 1"))
        writer = Background(write)
        observer.wait_for(1)
        observer.wait_for_expiry()
        grant.rollback()
    with pytest.raises(StaleToken):
        writer.result()
    assert observer.scalar("SELECT count(*) FROM work") == 0


@pytest.mark.parametrize("level", LEVELS)
def test_a_grant_waits_for_a_fenced_write_at_every_level(
    store: LeaseStore, engine: Engine, observer: Observer, level: str
) -> None:
    lease = take(store)
    with writing(engine, lease, isolation=level) as connection:
        connection.execute(WRITE)
        operator = Background(store.expire, "a", actor="op")
        observer.wait_for(1)
        connection.commit()
    assert operator.result() == 2
    assert observer.scalar("SELECT count(*) FROM work") == 1


@pytest.mark.parametrize("level", LEVELS)
def test_a_committed_heartbeat_harms_no_fenced_transaction(
    store: LeaseStore, engine: Engine, observer: Observer, level: str
) -> None:
    lease = take(store)
    with engine.connect().execution_options(isolation_level=level) as connection:
        connection.execute(text("SELECT * FROM leases"))  # here is its snapshot
        assert store.renew([lease], owner="one", ttl=TTL).skipped == frozenset()
        fence(connection, lease)
        connection.execute(WRITE)
        assert store.renew([lease], owner="one", ttl=TTL).skipped == frozenset()
        fence(connection, lease)
        connection.commit()
    assert observer.scalar("SELECT count(*) FROM work") == 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("how", ["steal", "expire", "release and acquire"])
def test_a_grant_committed_since_the_snapshot_never_lets_a_stale_write_commit(
    store: LeaseStore, engine: Engine, observer: Observer, level: str, how: str
) -> None:
    lease = take(store)
    refusal = None
    with engine.connect().execution_options(isolation_level=level) as connection:
        connection.execute(text("SELECT * FROM leases"))  # here is its snapshot
        if how == "steal":
            store.steal("a", to="two", ttl=TTL, actor="op")
        elif how == "expire":
            store.expire("a", actor="op")
        else:
            store.release(lease)
            take(store)
        try:
            fence(connection, lease)
            connection.execute(WRITE)
            connection.commit()
        except StaleToken:
            refusal = "StaleToken"
        except DBAPIError as error:
            refusal = sqlstate(error)
    assert refusal == "StaleToken" if level == "READ COMMITTED" else refusal in ("StaleToken", "40001")
    assert observer.scalar("SELECT count(*) FROM work") == 0


def test_a_lease_that_expires_in_the_transaction_is_found_by_the_second_fence(
    store: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(store)
    with suppress(StaleToken), writing(engine, lease) as connection:
        connection.execute(WRITE)
        observer.execute("UPDATE leases SET expires_at = clock_timestamp()")
        fence(connection, lease)
        connection.commit()
    assert observer.scalar("SELECT count(*) FROM work") == 0


def test_appends_of_one_grant_from_several_threads_leave_no_gap(store: LeaseStore, observer: Observer) -> None:
    log = EventLog(store)
    lease = take(store)

    def append(name: str) -> None:
        for number in range(15):
            log.append(lease, {f"{name}-{number}": number, "shared": 0}, checkpoint=number)

    threads = [Background(append, f"t{number}") for number in range(4)]
    for thread in threads:
        thread.result()
    assert [event.seq for event in log.read("a")] == list(range(1, 62))
