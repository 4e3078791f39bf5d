"""Statements that are transactions by themselves: one round trip, and all that the transaction would have promised."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, event, text

from leases import EventLog, Lease, LeaseStore, StaleToken, StoreError, StoreUnavailable
from leases.direct import Direct
from leases.events import append_alone
from leases.model import Ending, Membership
from leases.operations import acquire, claim, release, release_all, renew
from tests.conformance.driver import TTL, take
from tests.postgresql.direct.ways import attempted, exchanged, in_transactions, pooled
from tests.postgresql.race import Background, Observer, locking
from tests.waiting import until

SHORT = timedelta(milliseconds=500)


def kinds_of(store: LeaseStore, lease: Lease) -> dict[str, Callable[[], object]]:
    """What a worker does again and again, each of which is one statement."""
    log = EventLog(store)
    return {
        "renew": lambda: store.renew([lease], owner="one", ttl=TTL),
        "append one": lambda: log.append(lease, {uuid4().hex: 1}),
        "append many": lambda: log.append(lease, {uuid4().hex: 1, uuid4().hex: 2}, checkpoint={"at": 2}),
        "release": lambda: store.release(lease),
        "acquire": lambda: take(store),
        "claim": lambda: store.claim(owner="one", ttl=TTL, limit=1),
        "release all": lambda: store.release_all([Ending(lease)], owner="two"),
    }


def test_what_is_one_statement_is_one_round_trip(looked: LeaseStore) -> None:
    lease = take(looked)
    for _ in range(2):  # the first connection is asked once what its default is
        looked.renew([lease], owner="one", ttl=TTL)
    trips = {name: exchanged(looked, deed) for name, deed in kinds_of(looked, lease).items()}
    assert {name: count for name, (count, _) in trips.items()} == {**dict.fromkeys(trips, 1), "release all": 2}
    assert not any("BEGIN" in said or "COMMIT" in said.replace("COMMITTED", "") for _, said in trips.values())


def test_in_a_transaction_it_is_three_or_more(looked: LeaseStore) -> None:
    lease = take(in_transactions(looked))
    for name, deed in kinds_of(looked, lease).items():
        count, said = exchanged(looked, deed)
        assert count >= 3, name
        assert "BEGIN ISOLATION LEVEL READ COMMITTED" in said, name


def told(store: LeaseStore) -> list[Any]:
    """The answers of a story, in which all that can be answered is; without what differs each time."""
    log = EventLog(store)
    answers: list[Any] = []

    def tell(call: Callable[[], Any]) -> Any:
        try:
            answer = call()
        except StoreError as error:
            answers.append((type(error), str(error).rpartition("/")[2]))
            return None
        except StaleToken as error:
            answers.append((StaleToken, error.fencing_token, error.current_token, error.current_owner))
            return None
        plain = answer
        if isinstance(answer, Lease):
            assert answer.expires_at - answer.acquired_at == TTL >= answer.remaining > TTL / 2
            assert answer.expires_at.utcoffset() == timedelta(0)
            plain = (answer.stream_id, answer.owner, answer.fencing_token, answer.pool, answer.failures)
        answers.append(plain)
        return answer

    claim_id = uuid4()
    a = tell(lambda: store.acquire("a", owner="one", ttl=TTL, claim_id=claim_id))
    tell(lambda: store.acquire("a", owner="one", ttl=TTL, claim_id=claim_id))
    tell(lambda: store.acquire("a", owner="two", ttl=TTL))
    tell(lambda: store.acquire("new % one", owner="one", ttl=TTL, pool="p"))
    tell(lambda: log.append(a, {"e": {"ü": [1, None, "%s %(x)s %"]}}))
    tell(lambda: log.append(a, {"e": 1}))
    tell(lambda: log.append(a, {"e": 1}, checkpoint="c%"))
    tell(lambda: log.append(a, {"e": 1, "f": None, "g": [], "h": "%"}, checkpoint={"n": 1}))
    tell(lambda: log.append(a, {}))
    tell(lambda: log.append(a, {}, checkpoint=0))
    tell(lambda: [(read.event_id, read.seq, read.fencing_token, read.payload) for read in log.read("a")])
    tell(lambda: store.checkpoint("a").checkpoint)  # type: ignore[union-attr]
    tell(lambda: store.renew([a], owner="one", ttl=TTL))
    tell(lambda: store.release(a, error="it failed, 100 %", backoff=timedelta(0)))
    tell(lambda: store.release(a))
    tell(lambda: log.append(a, {"late": 1}, checkpoint=9))
    tell(lambda: store.renew([a], owner="one", ttl=TTL))
    again = tell(lambda: store.acquire("a", owner="one", ttl=TTL))
    tell(lambda: again.failures)
    tell(lambda: log.append(a, {"late": 1}))
    tell(lambda: store.release_all([Ending(again), Ending(a)], owner="one"))
    claimed = store.claim(owner="one", ttl=TTL, limit=5)
    tell(lambda: [(lease.stream_id, lease.fencing_token) for lease in claimed])
    tell(lambda: store.claim(owner="one", ttl=TTL, limit=0))
    tell(lambda: [(event.event_id, event.seq) for event in log.read("a")])
    return answers


def test_both_ways_answer_the_same(looked: LeaseStore, postgresql_url: str, observer: Observer) -> None:
    directly = told(looked)
    emptied = "; ".join(
        f"DELETE FROM {table}" for table in ("leases", "lease_grants", "lease_events", "lease_checkpoints")
    )
    observer.execute(f"SET session_replication_role = replica; {emptied}")
    looked.register(["a", "b"])
    assert told(in_transactions(looked)) == directly


# --- where the direct way is not taken ---------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_where_the_default_is_another_isolation_level_a_transaction_says_read_committed(
    postgresql_url: str, observer: Observer, level: str
) -> None:
    observer.set_default(f"default_transaction_isolation = '{level}'")
    with LeaseStore(postgresql_url) as store:
        lease = take(store)
        assert not attempted(store)
        assert store.run(lambda c: c.execute(text("SHOW transaction_isolation")).scalar_one()) == "read committed"
        assert not pooled(store).autocommit
        assert EventLog(store).append(lease, {"e": 1}).count == 1
        assert store.release(lease)


def test_where_the_default_is_read_only_it_is_refused_as_in_a_transaction(
    postgresql_url: str, observer: Observer
) -> None:
    with LeaseStore(postgresql_url) as store:
        lease = take(store)
    observer.set_default("default_transaction_read_only = on")
    refusals = []
    for way in (lambda store: store, in_transactions):
        with LeaseStore(postgresql_url) as store:
            store.list()
            way(store)
            with pytest.raises(StoreError, match="read-only transaction") as refused:
                EventLog(store).append(lease, {"e": 1})
            refusals.append(type(refused.value))
    assert refusals == [StoreError, StoreError]


def test_a_lock_timeout_of_the_session_is_worth_another_try_either_way(
    postgresql_url: str, engine: Engine, observer: Observer
) -> None:
    with LeaseStore(postgresql_url) as store:
        lease = take(store)
    observer.set_default("lock_timeout = '50ms'")
    for way in (lambda store: store, in_transactions):
        with LeaseStore(postgresql_url, retry_for=timedelta(0)) as store, locking(engine):
            store.list()
            with pytest.raises(StoreUnavailable, match="lock timeout"):
                way(store).release(lease)
    with LeaseStore(postgresql_url) as store:
        with locking(engine):
            release = Background(store.release, lease)
            observer.wait_for(1)
        assert release.result()


def test_a_pooler_that_mixes_sessions_up_is_told_of_with_what_to_do(looked: LeaseStore) -> None:
    lease = take(looked)
    for _ in range(10):  # the driver prepares what comes often
        looked.renew([lease], owner="one", ttl=TTL)
    pooled(looked).pgconn.exec_(b"DEALLOCATE ALL")  # another session has not prepared it
    with pytest.raises(StoreError, match=r"append \?prepare_threshold=none to the URL"):
        looked.renew([lease], owner="one", ttl=TTL)


def test_who_listens_to_an_engine_or_has_it_logged_hears_of_every_statement(
    looked: LeaseStore, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert attempted(looked)
    with caplog.at_level(logging.INFO, logger="sqlalchemy.engine"):
        assert not attempted(looked)
    assert attempted(looked)
    engine = create_engine(postgresql_url.replace("postgresql://", "postgresql+psycopg://"))
    heard: list[str] = []
    with LeaseStore(engine) as store:
        store.list()
        assert not attempted(store), "it is the caller's"
    engine.dispose()
    event.listen(looked.base_engine, "before_cursor_execute", lambda *given: heard.append(given[2]))
    take(looked)
    assert any("UPDATE leases" in statement for statement in heard)


# --- what is promised all the same --------------------------------------------------------------------------------


@pytest.mark.parametrize(("default", "expected"), [("off", "on"), ("local", "local"), ("on", "on")])
def test_each_statement_is_durable_by_itself(
    postgresql_url: str, observer: Observer, default: str, expected: str
) -> None:
    observer.set_default(f"synchronous_commit = '{default}'")
    with LeaseStore(postgresql_url) as store:
        store.register(["a", "b"])
        lease = take(store)

        def after(call: Callable[[Any], object]) -> str:
            """The setting after a statement, in its transaction, which is then undone."""
            owner = store.engine.connect()
            connection = owner.connection
            try:
                call(Direct(store._shortcut._statements, owner))
                cursor = connection.cursor()
                cursor.execute("SHOW synchronous_commit")
                found = cursor.fetchone()
                assert found is not None
                return str(found[0])
            finally:
                connection.rollback()
                owner.close()

        calls: dict[str, Callable[[Any], object]] = {
            "acquire": lambda c: acquire(c, "b", owner="one", ttl=TTL),
            "claim": lambda c: claim(c, owner="one", ttl=TTL, limit=1),
            "renew": lambda c: renew(c, [lease], owner="one", ttl=TTL),
            "release": lambda c: release(c, lease),
            "release_all": lambda c: release_all(c, [Ending(lease)], owner="one"),
            "append one": lambda c: append_alone(c, lease, {"e": 1}),
            "append many": lambda c: append_alone(c, lease, {"e": 1, "f": 2}, checkpoint=1),
        }
        assert {name: after(call) for name, call in calls.items()} == dict.fromkeys(calls, expected)


def test_a_release_tells_those_who_may_wait_and_nobody_else(looked: LeaseStore) -> None:
    def told_of() -> bool:
        """Whether a release is notified, to a connection that listens; this one."""
        lease = take(looked)
        _, said = exchanged(looked, lambda: looked.release(lease))
        return "free:default" in said

    with looked.engine.connect() as connection, connection.begin():
        connection.exec_driver_sql("LISTEN leases")
    take(looked, "other")  # reads what has been said before
    assert not told_of(), "nobody is enlisted"
    looked.enlist(Membership("one", "h", 1, "1", None), ttl=TTL)
    assert not told_of(), "it is the one who releases"
    looked.enlist(Membership("w", "h", 1, "1", "another pool"), ttl=TTL)
    assert not told_of(), "a worker of another pool"
    looked.enlist(Membership("candidate", "h", 1, "1", None), ttl=TTL)
    assert told_of(), "one that may wait for any"
    looked.dismiss("candidate")
    looked.enlist(Membership("w2", "h", 1, "1", "default"), ttl=SHORT)
    assert told_of(), "a worker of the pool"
    until(lambda: not told_of(), "it has not been heard of in time")
