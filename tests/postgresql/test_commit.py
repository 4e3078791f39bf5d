"""The COMMIT: its answer may be lost, and it is durable whatever the server's default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import Connection, text

from leases import Lease, LeaseStore, fence
from leases.administration import end_now, hand_over, raise_tokens, revoke
from leases.direct import Direct
from leases.events import append
from leases.operations import acquire, claim, release, renew, write_checkpoint
from tests.conformance.driver import TTL, Loop, log_of, opened, take
from tests.postgresql.race import Observer


@pytest.fixture(scope="module")
def event_loop_thread() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest, postgresql_url: str) -> Iterator[LeaseStore]:
    """A store of each colour."""
    loop = request.getfixturevalue("event_loop_thread") if request.param == "async" else None
    with opened(postgresql_url, loop) as store:
        store.list()  # it has looked at the schema
        yield store


@pytest.fixture(params=["before", "after"])
def breaking(request: pytest.FixtureRequest, colour: LeaseStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The next COMMIT breaks the connection, before or after the server has done it; returns what has happened.

    So does the next statement that is a transaction by itself.
    """
    dialect = colour.engine.dialect
    commit = dialect.do_commit
    happened: list[str] = []

    def broken(connection: Any) -> None:
        if happened:
            commit(connection)
            return
        happened.append(request.param)
        if request.param == "after":
            commit(connection)
        connection.driver_connection.pgconn.finish()  # as if the network had gone
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    execute = Direct.execute

    def broken_alone(direct: Direct, statement: Any, values: Any) -> Any:
        if not happened:
            happened.append(request.param)
            if request.param == "after":
                execute(direct, statement, values)
            direct.connection.driver_connection.pgconn.finish()
        return execute(direct, statement, values)

    monkeypatch.setattr(dialect, "do_commit", broken)
    monkeypatch.setattr(Direct, "execute", broken_alone)
    return happened


def test_an_acquire_whose_answer_was_lost_gets_its_one_grant(
    colour: LeaseStore, breaking: list[str], observer: Observer
) -> None:
    breaking.append("not yet")
    colour.register(["a"])
    breaking.clear()
    lease = take(colour)
    assert breaking
    assert lease.fencing_token == 1
    assert observer.scalar("SELECT count(*) FROM lease_grants") == 1
    assert colour.renew([lease], owner="one", ttl=TTL).lost == {}


def test_a_claim_whose_answer_was_lost_gets_its_grants(
    colour: LeaseStore, breaking: list[str], observer: Observer
) -> None:
    breaking.append("not yet")
    colour.register(["a", "b", "c"])
    breaking.clear()
    leases = colour.claim(owner="one", ttl=TTL, limit=2)
    assert breaking
    assert [(lease.stream_id, lease.fencing_token) for lease in leases] == [("a", 1), ("b", 1)]
    assert observer.scalar("SELECT count(*) FROM lease_grants") == 2


def test_a_steal_and_an_expire_whose_answers_were_lost_raise_the_token_once(
    colour: LeaseStore, breaking: list[str], observer: Observer
) -> None:
    breaking.append("not yet")
    take(colour)
    breaking.clear()
    assert colour.steal("a", to="two", ttl=TTL, actor="op").fencing_token == 2
    assert breaking
    breaking.clear()
    assert colour.expire("a", actor="op") == 3


def test_the_second_step_of_a_steal_whose_answer_was_lost_is_not_done_twice(
    colour: LeaseStore, breaking: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking.append("not yet")
    take(colour)
    real = hand_over

    def about_to_break(*args: Any, **kwargs: Any) -> Lease:
        if breaking == ["not yet"]:
            breaking.clear()
        return real(*args, **kwargs)

    monkeypatch.setattr("leases.administration.hand_over", about_to_break)
    assert colour.steal("a", to="two", ttl=TTL, actor="op").fencing_token == 2
    assert breaking in (["before"], ["after"])
    assert [grant.fencing_token for grant in colour.grants("a")] == [2, 1]
    assert len(colour.audit()) == 1


def test_an_append_whose_answer_was_lost_is_written_once(
    colour: LeaseStore, breaking: list[str], observer: Observer
) -> None:
    breaking.append("not yet")
    lease = take(colour)
    breaking.clear()
    log = log_of(colour)
    appended = log.append(lease, {"e1": 1, "e2": 2}, checkpoint=2)
    assert breaking
    assert appended.last_seq == 2
    assert [event.seq for event in log.read("a")] == [1, 2]


# --- durable ---------------------------------------------------------------------------------------------------


def durability(connection: Connection) -> str:
    return str(connection.execute(text("SHOW synchronous_commit")).scalar())


@pytest.mark.parametrize(("default", "expected"), [("off", "on"), ("local", "local"), ("on", "on")])
def test_commits_of_the_protocol_are_durable_whatever_the_default(
    postgresql_url: str, observer: Observer, default: str, expected: str
) -> None:
    observer.set_default(f"synchronous_commit = '{default}'")
    with LeaseStore(postgresql_url) as store:
        assert store.run(durability) == default
        store.register(["a", "b"])
        lease = take(store)

        def after(call: Any) -> str:
            """The setting after the call, in its transaction, which is then undone."""
            with store.engine.connect() as connection, connection.begin() as transaction:
                call(connection)
                found = durability(connection)
                transaction.rollback()
                return found

        calls: dict[str, Any] = {
            "acquire": lambda c: acquire(c, "b", owner="one", ttl=TTL),
            "claim": lambda c: claim(c, owner="one", ttl=TTL, limit=1),
            "renew": lambda c: renew(c, [lease], owner="one", ttl=TTL),
            "release": lambda c: release(c, lease),
            "expire": lambda c: revoke(c, end_now(c, "a"), actor="op"),
            "steal": lambda c: hand_over(c, end_now(c, "a"), to="two", ttl=TTL, claim_id=uuid4(), actor="op"),
            "raise_tokens": lambda c: raise_tokens(c, actor="op"),
            "append": lambda c: append(c, lease, {"e": 1}),
            "write_checkpoint": lambda c: write_checkpoint(c, lease, 1),
        }
        assert {name: after(call) for name, call in calls.items()} == dict.fromkeys(calls, expected)


def test_a_users_own_fenced_transaction_keeps_its_own_durability(postgresql_url: str, observer: Observer) -> None:
    observer.set_default("synchronous_commit = 'off'")
    with LeaseStore(postgresql_url) as store:
        lease = take(store)
        with store.engine.begin() as connection:
            fence(connection, lease)
            assert durability(connection) == "off"
