"""The schema's own guard: what psql, or a program in another language, must not do either."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import text

from leases import LeaseStore, StoreError
from leases.model import EndReason
from tests.clock import Clock
from tests.conformance.driver import TTL, execute, take

GRANT = (
    "UPDATE leases SET owner = :owner, fencing_token = fencing_token + 1, "
    "expires_at = (SELECT max(expires_at) FROM leases) WHERE stream_id = 'a'"
)

FORBIDDEN = {
    "a falling token": "UPDATE leases SET fencing_token = 0",
    "a falling token of a free stream": "UPDATE leases SET fencing_token = 0, owner = NULL, expires_at = NULL",
    "a deleted row": "DELETE FROM leases",
    "a changed name": "UPDATE leases SET stream_id = 'z' WHERE stream_id = 'a'",
    "a new owner without a new token": "UPDATE leases SET owner = 'two' WHERE stream_id = 'a'",
    "an owner of a free stream without a new token": (
        "UPDATE leases SET owner = 'two', expires_at = available_at WHERE stream_id = 'free'"
    ),
    "a stream that is born owned": (
        "INSERT INTO leases (stream_id, owner, expires_at, available_at, registered_at) "
        "SELECT 'new', 'two', expires_at, available_at, registered_at FROM leases WHERE stream_id = 'a'"
    ),
    "an owner without an expiry": "UPDATE leases SET expires_at = NULL WHERE stream_id = 'a'",
    "an expiry without an owner": "UPDATE leases SET owner = NULL WHERE stream_id = 'a'",
    "a negative token": (
        "INSERT INTO leases (stream_id, fencing_token, available_at, registered_at) "
        "SELECT 'new', -1, available_at, registered_at FROM leases WHERE stream_id = 'a'"
    ),
    "an empty name": (
        "INSERT INTO leases (stream_id, available_at, registered_at) "
        "SELECT '', available_at, registered_at FROM leases WHERE stream_id = 'a'"
    ),
    "an upsert over a row": (
        "INSERT INTO leases (stream_id, available_at, registered_at) "
        "SELECT 'a', available_at, registered_at FROM leases WHERE stream_id = 'a' "
        "ON CONFLICT (stream_id) DO UPDATE SET fencing_token = 0"
    ),
    "a token granted twice": (
        "INSERT INTO lease_grants (stream_id, fencing_token, owner, granted_at) "
        "SELECT stream_id, fencing_token, owner, granted_at FROM lease_grants"
    ),
}

FORBIDDEN_ON = {
    "sqlite": {
        "a replaced row": (
            "INSERT OR REPLACE INTO leases (stream_id, available_at, registered_at) "
            "SELECT 'a', available_at, registered_at FROM leases WHERE stream_id = 'a'"
        ),
        "an update that replaces another row": "UPDATE OR REPLACE leases SET stream_id = 'free' WHERE stream_id = 'a'",
        "a token that is no integer": "UPDATE leases SET fencing_token = 'x' WHERE stream_id = 'a'",
        "a token that overflows": "UPDATE leases SET fencing_token = 9223372036854775807 + 1 WHERE stream_id = 'a'",
    },
    "postgresql": {
        "an emptied table": "TRUNCATE leases",
        "a table that is emptied with others": "TRUNCATE lease_events, leases CASCADE",
    },
}


def test_what_would_break_the_promises_is_refused_whoever_asks(store: LeaseStore, clock: Clock) -> None:
    take(store)
    store.register(["free"])
    before = (store.list(), store.grants("a"))
    forbidden = FORBIDDEN | FORBIDDEN_ON[store.engine.dialect.name]
    for what, statement in forbidden.items():
        with pytest.raises(StoreError) as refused:
            execute(store, statement)
        assert "refused" in str(refused.value), what
        assert (store.list(), store.grants("a")) == before, what


@pytest.mark.parametrize(
    ("change", "after_s", "reason"),
    [
        ("owner = NULL, expires_at = NULL", 1, EndReason.RELEASED),
        ("owner = NULL, expires_at = NULL", 20, EndReason.EXPIRED),
        ("owner = NULL, expires_at = NULL, fencing_token = fencing_token + 1", 1, EndReason.REVOKED),
        ("owner = 'two', fencing_token = fencing_token + 1", 1, EndReason.STOLEN),
        ("owner = 'two', fencing_token = fencing_token + 1", 20, EndReason.EXPIRED),
        ("fencing_token = fencing_token + 1", 1, EndReason.STOLEN),
    ],
)
def test_a_grant_that_raw_sql_ends_is_recorded_with_its_end(
    store: LeaseStore, clock: Clock, change: str, after_s: float, reason: EndReason
) -> None:
    lease = take(store)
    clock.advance(after_s)
    execute(store, f"UPDATE leases SET {change}")
    grant = store.grants("a")[-1]
    assert (grant.fencing_token, grant.end_reason) == (1, reason)
    assert grant.ended_at == min(clock.now(), lease.expires_at)


def test_a_grant_that_raw_sql_makes_is_recorded(store: LeaseStore, clock: Clock) -> None:
    take(store, "other")
    store.register(["a"])
    assert execute(store, GRANT, owner="psql") == 1
    (grant,) = store.grants("a")
    assert (grant.fencing_token, grant.owner, grant.granted_at, grant.end_reason) == (1, "psql", clock.now(), None)
    assert store.acquire("a", owner="two", ttl=TTL) is None


def test_a_heartbeat_by_raw_sql_records_nothing(store: LeaseStore, clock: Clock) -> None:
    take(store, ttl=timedelta(seconds=5))
    before = store.grants("a")
    execute(store, "UPDATE leases SET expires_at = expires_at")
    assert store.grants("a") == before


def test_an_upgraded_guard_is_where_the_table_is(store: LeaseStore, clock: Clock) -> None:
    if store.engine.dialect.name == "sqlite":
        triggers = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'leases'"
        least = 4
    else:
        triggers = "SELECT tgname FROM pg_trigger WHERE tgrelid = 'leases'::regclass AND tgenabled = 'O'"
        least = 3
    found = store.run(lambda connection: len(connection.execute(text(triggers)).all()))
    assert found == least
