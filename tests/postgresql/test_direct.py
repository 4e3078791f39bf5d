"""Statements that are transactions by themselves: one round trip, and all that the transaction would have promised."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.pool import QueuePool

from leases import (
    AsyncLeaseStore,
    EventLog,
    Lease,
    LeaseHeld,
    LeaseStore,
    OutcomeUnknown,
    StaleToken,
    StoreError,
    StoreUnavailable,
    direct,
)
from leases.direct import NOT_TAKEN, Direct, EitherWay, Shortcut
from leases.events import append_alone
from leases.model import Ending, Membership
from leases.operations import acquire, claim, release, release_all, renew
from tests.conformance.driver import TTL, take
from tests.postgresql.race import Background, Observer, locking
from tests.waiting import until

SHORT = timedelta(milliseconds=500)


@pytest.fixture
def looked(store: LeaseStore) -> LeaseStore:
    """A store that has looked at its tables."""
    store.register(["a", "b"])
    return store


def pooled(store: LeaseStore) -> Any:
    """The driver's connection that the store uses next; it is the only one. It is in the pool from now on."""
    store._shortcut.let_go()
    connection = store.engine.raw_connection()
    try:
        return connection.driver_connection
    finally:
        connection.close()


def exchanged(store: LeaseStore, deed: Callable[[], object]) -> tuple[int, str]:
    """How often a deed waited for the server, and what was said on the wire."""
    driver = pooled(store)
    with tempfile.TemporaryFile("w+") as file:
        driver.pgconn.trace(file.fileno())
        deed()
        driver.pgconn.untrace()
        file.seek(0)
        said = file.read()
    sent = [line.split("\t") for line in said.splitlines()]
    return sum("F" in line and ("Sync" in line or "Query" in line) for line in sent), said


def in_transactions(store: LeaseStore) -> LeaseStore:
    """The same store, none of whose calls goes the direct way any more: somebody listens."""
    event.listen(store.engine, "before_cursor_execute", lambda *_: None)
    return store


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


# --- the fence in the statement --------------------------------------------------------------------------------


def test_an_append_that_waits_for_its_lock_sees_what_was_granted_meanwhile(
    looked: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(looked)
    with engine.connect() as connection, connection.begin() as granting:
        connection.execute(text("UPDATE leases SET fencing_token = 2, owner = 'two' WHERE stream_id = 'a'"))
        append = Background(EventLog(looked).append, lease, {"e": 1}, checkpoint=1)
        observer.wait_for(1)
        granting.commit()
    with pytest.raises(StaleToken) as refused:
        append.result()
    assert (refused.value.current_token, refused.value.current_owner) == (2, "two")
    assert EventLog(looked).read("a") == []
    assert looked.checkpoint("a") is None


def test_an_append_sees_an_expiry_that_happened_while_it_waited(
    looked: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(looked, ttl=SHORT)
    with locking(engine):  # a grant, which then rolls back
        append = Background(EventLog(looked).append, lease, {"e": 1}, checkpoint=1)
        observer.wait_for(1)
        observer.wait_for_expiry()
    with pytest.raises(StaleToken):
        append.result()
    assert EventLog(looked).read("a") == []
    assert looked.checkpoint("a") is None


@contextmanager
def in_its_way(engine: Engine, event_id: str = "e") -> Iterator[None]:
    """A transaction of somebody else's that has written an event of this name, and is not over."""
    insert = text(
        "INSERT INTO lease_events (stream_id, event_id, seq, fencing_token, recorded_at, payload) "
        "VALUES ('a', :event_id, 99, 1, now(), '1')"
    )
    with engine.connect() as connection, connection.begin() as transaction:
        connection.execute(insert, {"event_id": event_id})
        yield
        transaction.rollback()


@pytest.mark.parametrize("events", [{"e": 1}, {"d": 0, "e": 1}])
def test_nobody_is_granted_the_stream_while_an_append_is_in_flight(
    looked: LeaseStore, engine: Engine, observer: Observer, events: dict[str, int]
) -> None:
    lease = take(looked)
    with in_its_way(engine):
        append = Background(EventLog(looked).append, lease, events, checkpoint=1)
        observer.wait_for(1)
        with pytest.raises(LeaseHeld, match="not yet fenced"):
            looked.steal("a", to="two", ttl=TTL, actor="op", timeout=timedelta(seconds=0.3))
        assert not append.done()
    assert append.result().count == len(events)
    assert looked.steal("a", to="two", ttl=TTL, actor="op").fencing_token == 2
    assert [recorded.fencing_token for recorded in EventLog(looked).read("a")] == [1] * len(events)


@pytest.mark.parametrize("events", [{"e": 1}, {"d": 0, "e": 1}])
@pytest.mark.parametrize("version", [(16, 0), None])  # before 17 there is no transaction_timeout
def test_an_append_that_hangs_is_ended_at_its_leases_end(
    postgresql_url: str, engine: Engine, events: dict[str, int], version: tuple[int, int] | None
) -> None:
    with LeaseStore(postgresql_url, retry_for=timedelta(0)) as hasty, LeaseStore(postgresql_url) as other:
        lease = take(hasty, ttl=SHORT)
        dialect = hasty.engine.dialect
        dialect.server_version_info = version or dialect.server_version_info
        with in_its_way(engine):
            append = Background(EventLog(hasty).append, lease, events)
            until(lambda: other.acquire("a", owner="two", ttl=TTL), "the takeover")
            with pytest.raises(StoreUnavailable, match="nothing of it is kept"):
                append.result()


@pytest.mark.parametrize(("its_own", "least_s", "most_s"), [("0", 50, 60), ("2min", 50, 60), ("30s", 30, 30)])
@pytest.mark.parametrize("version", [(16, 0), None])
@pytest.mark.parametrize("events", [{"e": 1}, {"d": 0, "e": 1}])
def test_an_appends_limit_is_its_leases_end_or_the_sessions_own_if_that_is_shorter(
    looked: LeaseStore,
    events: dict[str, int],
    version: tuple[int, int] | None,
    its_own: str,
    least_s: int,
    most_s: int,
) -> None:
    lease = take(looked, ttl=timedelta(seconds=60))
    with looked.engine.connect() as owner, owner.begin():
        owner.dialect.server_version_info = version or owner.dialect.server_version_info
        new = owner.dialect.server_version_info and owner.dialect.server_version_info >= (17,)
        setting = "transaction_timeout" if new and len(events) > 1 else "lock_timeout"
        owner.exec_driver_sql(f"SET LOCAL {setting} = '{its_own}'")
        assert append_alone(cast(Any, Direct(looked._shortcut._statements, owner)), lease, events) is not NOT_TAKEN
        milliseconds = owner.scalar(text("SELECT setting::int FROM pg_settings WHERE name = :n"), {"n": setting})
        assert least_s * 1000 <= milliseconds <= most_s * 1000


# --- where it is not taken -------------------------------------------------------------------------------------


def attempted(store: LeaseStore) -> bool:
    """Whether a call that may go the direct way does."""
    direct = store._shortcut.take()
    if direct is not None:
        direct.give_back()
    return direct is not None


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_where_the_default_is_another_isolation_level_a_transaction_says_read_committed(
    postgresql_url: str, observer: Observer, level: str
) -> None:
    database = postgresql_url.rpartition("/")[2]
    observer.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = '{level}'")
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
    database = postgresql_url.rpartition("/")[2]
    observer.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    refusals = []
    for way in (lambda store: store, in_transactions):
        with LeaseStore(postgresql_url) as store:
            store.list()
            way(store)
            with pytest.raises(StoreError, match="read-only transaction") as refused:
                EventLog(store).append(lease, {"e": 1})
            refusals.append(type(refused.value))
    assert refusals == [StoreError, StoreError]


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


# --- the pool --------------------------------------------------------------------------------------------------


def test_a_callers_engine_gets_its_connections_back_as_they_were(engine: Engine, postgresql_url: str) -> None:
    own = create_engine(engine.url, pool_size=1, max_overflow=0, isolation_level="REPEATABLE READ")
    with LeaseStore(own) as store:
        lease = take(store)
        with pytest.raises(StaleToken):
            EventLog(store).append(Lease(**{**vars_of(lease), "fencing_token": 7}), {"e": 1})
        assert store.release(lease)
        assert not pooled(store).autocommit
        with own.connect() as connection:
            assert connection.execute(text("SHOW transaction_isolation")).scalar_one() == "repeatable read"
            connection.execute(text("INSERT INTO lease_audit (at, actor, action) VALUES (now(), 'me', 'x')"))
            connection.rollback()
        assert store.audit() == []
    own.dispose()


def test_a_callers_engine_that_commits_by_itself_still_does(engine: Engine, postgresql_url: str) -> None:
    own = create_engine(engine.url, pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT")
    with LeaseStore(own) as store:
        lease = take(store)
        store.renew([lease], owner="one", ttl=TTL)
        assert EventLog(store).append(lease, {"e": 1}).count == 1
    with own.connect() as connection:
        connection.execute(text("CREATE TABLE mine (n integer)"))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT to_regclass('mine')")).scalar_one() is not None
    own.dispose()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, psycopg.OperationalError])
def test_one_interrupted_while_it_is_asked_for_its_default_is_not_used_again(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    with LeaseStore(postgresql_url) as store:
        lease = take(store)  # in a transaction: it has not looked at its tables
        before = pooled(store)

        def interrupted(_: object) -> bool:
            raise error

        monkeypatch.setattr(direct, "_reads_committed", interrupted)
        if issubclass(error, psycopg.Error):
            assert store.release(lease), "in a transaction"
        else:
            with pytest.raises(error):
                store.release(lease)
        assert before.closed
        pool = store.base_engine.pool
        assert isinstance(pool, QueuePool)
        assert pool.checkedout() == 0
        assert not pooled(store).autocommit


def test_a_task_that_is_cancelled_while_it_is_asked_for_its_default_gives_it_back(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled(_: object) -> bool:
        raise asyncio.CancelledError

    async def story() -> int:
        async with AsyncLeaseStore(postgresql_url) as store:
            lease = await store.acquire("a", owner="one", ttl=TTL)
            assert lease is not None
            monkeypatch.setattr(direct, "_reads_committed", cancelled)
            with pytest.raises(asyncio.CancelledError):
                await store.release(lease)
            pool = store.base_engine.pool
            assert isinstance(pool, QueuePool)
            return pool.checkedout()

    assert asyncio.run(story()) == 0


def test_one_that_nobody_gives_back_begins_transactions_again(looked: LeaseStore) -> None:
    taken = looked._shortcut.take()
    assert taken is not None
    driver = taken.connection.driver_connection
    assert driver.autocommit
    del taken
    gc.collect()
    assert pooled(looked) is driver
    assert not driver.autocommit


def test_a_stream_named_as_sqlalchemy_marks_a_schema_is_itself(postgresql_url: str) -> None:
    name = "__[SCHEMA__none]"
    with LeaseStore(postgresql_url, schema="shop") as store:
        store.migrate()
        for other in ('"shop"', "shop"):
            assert store.acquire(other, owner="OTHER", ttl=TTL)
        lease = store.acquire(name, owner="one", ttl=TTL)
        assert lease is not None
        store.expire(name, actor="op")
        for log in (EventLog(store), EventLog(in_transactions(store))):
            with pytest.raises(StaleToken) as refused:
                log.append(lease, {"e": 1})
            assert (refused.value.current_token, refused.value.current_owner) == (2, None)


def vars_of(lease: Lease) -> dict[str, Any]:
    return {name: getattr(lease, name) for name in lease.__dataclass_fields__}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_connection_that_was_interrupted_is_not_used_again(looked: LeaseStore, error: type[BaseException]) -> None:
    before = pooled(looked)

    def interrupted(*_: object) -> None:
        raise error

    direct = looked._shortcut.take()
    assert direct is not None
    with pytest.raises(error):
        looked._shortcut.run(direct, EitherWay(interrupted, interrupted))
    assert before.closed
    assert attempted(looked)


def test_a_connection_that_breaks_meanwhile_is_replaced(looked: LeaseStore) -> None:
    before = pooled(looked)

    def ended(connection: Any, _: int) -> object:
        before.pgconn.finish()
        return acquire(connection, "a", owner="one", ttl=TTL)

    lease = looked._retried(EitherWay(lambda c, _: acquire(c, "a", owner="one", ttl=TTL), ended), {})
    assert isinstance(lease, Lease)
    assert before.closed


def test_an_answer_that_was_lost_is_no_refusal(postgresql_url: str) -> None:
    with LeaseStore(postgresql_url, retry_for=timedelta(0)) as hasty:
        hasty.register(["a"])

        def lost(connection: Any, _: int) -> object:
            lease = acquire(connection, "a", owner="one", ttl=TTL)
            assert lease is not None
            connection.connection.driver_connection.pgconn.finish()
            return acquire(connection, "b", owner="one", ttl=TTL)

        with pytest.raises(OutcomeUnknown):
            hasty._retried(EitherWay(lost, lost), {})


def test_a_server_that_cannot_be_reached_is_told_of_as_in_a_transaction(
    looked: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked.engine.pool.dispose()

    def refuse(*_: object, **__: object) -> None:
        raise psycopg.OperationalError("connection refused")

    monkeypatch.setattr(psycopg, "connect", refuse)
    looked.retry_for = timedelta(0)
    with pytest.raises(StoreUnavailable, match="connection refused"):
        looked.acquire("a", owner="one", ttl=TTL)


# --- durable ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("default", "expected"), [("off", "on"), ("local", "local"), ("on", "on")])
def test_each_statement_is_durable_by_itself(
    postgresql_url: str, observer: Observer, default: str, expected: str
) -> None:
    database = postgresql_url.rpartition("/")[2]
    observer.execute(f"ALTER DATABASE {database} SET synchronous_commit = '{default}'")
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


# --- the connection that is kept -------------------------------------------------------------------------------


def kept_pid(store: LeaseStore) -> int:
    (direct,) = store._shortcut._kept
    return int(direct.connection.driver_connection.info.backend_pid)


def test_a_store_of_its_own_keeps_its_connection_from_call_to_call(looked: LeaseStore, observer: Observer) -> None:
    take(looked)
    pid = kept_pid(looked)
    take(looked, "b")
    assert kept_pid(looked) == pid
    looked.get("a")  # in a transaction, on the same connection
    assert not looked._shortcut._kept
    take(looked, "c")
    assert kept_pid(looked) == pid
    looked.close()
    ours = "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"
    until(lambda: observer.scalar(ours, pid=pid) == 0, "it is closed with the store")


def test_one_that_the_server_has_ended_is_replaced_before_anything_is_tried(
    postgresql_url: str, observer: Observer
) -> None:
    with LeaseStore(postgresql_url, retry_for=timedelta(0)) as hasty:
        hasty.register(["a", "b"])
        take(hasty)
        pid = kept_pid(hasty)
        observer.execute(f"SELECT pg_terminate_backend({pid}, 10000)")
        take(hasty, "b")
        assert kept_pid(hasty) != pid


def test_it_is_let_go_where_it_is_the_last_of_its_pool(engine: Engine) -> None:
    own = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.5)
    with LeaseStore(own, retry_for=timedelta(0)) as store:
        store._shortcut = Shortcut(store.engine, ours=True, keeps=True)
        lease = take(store)
        for _ in range(2):
            assert EventLog(store).append(lease, {uuid4().hex: 1}).count == 1
            assert store.get("a") is not None
            assert EventLog(store).append(lease, {uuid4().hex: 1}).count == 1
            with store.fenced(lease) as connection:
                assert connection.execute(text("SELECT 1")).scalar_one() == 1
        store._shortcut.let_go()
    own.dispose()


def test_threads_share_it_one_at_a_time(looked: LeaseStore) -> None:
    def work(name: str) -> int:
        return sum(looked.release(take(looked, name)) for _ in range(50))

    assert [worker.result() for worker in [Background(work, f"{n}") for n in range(8)]] == [50] * 8
    assert len(looked._shortcut._kept) <= 8
    assert {grant.fencing_token for grant in looked.grants("3")} == set(range(1, 51))


def test_a_great_answer_is_not_kept_with_it(looked: LeaseStore) -> None:
    looked.register([f"{n}" for n in range(300)])
    assert len(looked.claim(owner="one", ttl=TTL, limit=300)) == 300
    (direct,) = looked._shortcut._kept
    assert direct._cursor.pgresult is None


def test_a_forked_child_has_one_of_its_own(looked: LeaseStore, observer: Observer) -> None:
    lease = take(looked)
    pid = kept_pid(looked)
    child = os.fork()
    if not child:
        took = False
        try:
            took = looked.acquire("b", owner="child", ttl=TTL) is not None and kept_pid(looked) != pid
            gc.collect()
        finally:
            os._exit(0 if took else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert looked.release(lease)
    assert kept_pid(looked) == pid
