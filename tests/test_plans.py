"""No operation reads the whole lease table, however many streams there are; no append the whole stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, event, text

from leases import EventLog, Lease, LeaseStore, dialects, events, fencing, fleet, operations
from leases.model import Ending, Membership
from tests.conformance.driver import take

TTL = timedelta(minutes=10)
STREAMS, WORKERS = 5000, 100


@contextmanager
def crowded(url: str) -> Iterator[LeaseStore]:
    """A hundred live workers who hold five thousand streams between them; ten more are free."""

    def fill(connection: Connection) -> None:
        for number in range(WORKERS):
            fleet.enlist(connection, Membership(f"w{number:03}", "h", number, "1", "default"), ttl=TTL)
        operations.register(connection, [f"s{number:05}" for number in range(STREAMS + 10)])
        for number in range(WORKERS):
            operations.claim(connection, owner=f"w{number:03}", ttl=TTL, limit=STREAMS // WORKERS, held=0)

    with LeaseStore(url) as store:
        store.run(fill)
        yield store


def work(store: LeaseStore) -> None:
    """Everything that a worker does, and an operator to one stream."""
    me = "w007"
    store.run(lambda connection: fleet.observe(connection, "default", me, count_up_to=50_000, patience_s=1))
    leases = store.claim(owner=me, ttl=TTL, limit=3)
    assert len(leases) == 3
    acquired = store.acquire("new", owner=me, ttl=TTL)
    assert acquired is not None
    store.renew([*leases, acquired], owner=me, ttl=TTL)
    store.release(acquired)
    store.release_all(map(Ending, leases), owner=me, held=50)
    store.run(lambda connection: fleet.let_go_expired(connection, owner="nobody"))
    stolen = store.steal("s00001", to=me, ttl=TTL, actor="op")
    (stray,) = store.run(lambda connection: fleet.strays(connection, ["s00001"], owner=me))
    assert store.run(lambda c: fleet.adopt(c, stray, owner=me, ttl=TTL, claim_id=uuid4())) is not None
    store.run(lambda connection: operations.recover(connection, stolen))
    store.expire("s00001", actor="op")
    store.pause("s00002", actor="op")
    store.resume("s00002", actor="op")
    store.retire(["s00003"])
    store.register(["s00003", "s00004"])
    assert store.get("s00005") is not None
    store.drain("w001")


def test_sqlite_searches_by_an_index_and_never_scans(sqlite_url: str) -> None:
    scans: list[tuple[str, str]] = []
    explained: list[str] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "WITH", "UPDATE", "INSERT", "DELETE")):
            plan = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            scans.extend((row[3], statement) for row in plan if row[3] == "SCAN leases")
            explained.append(statement)

    with crowded(sqlite_url) as store:
        event.listen(store.engine, "before_cursor_execute", explain)
        work(store)
    assert len(explained) > 30
    assert scans == []


def test_postgresql_reads_few_rows_for_a_plan_among_many(postgresql_url: str) -> None:
    with crowded(postgresql_url) as store:
        store.run(lambda connection: connection.execute(text("ANALYZE leases, lease_workers")))

        def read() -> tuple[int, int]:
            store.run(lambda connection: connection.execute(text("SELECT pg_stat_force_next_flush()")))
            query = text("SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'leases'")
            row = store.run(lambda connection: connection.execute(query).one())
            return row[0], row[1]

        def plan() -> None:
            store.run(lambda c: fleet.observe(c, "default", "w007", count_up_to=50_000, patience_s=1), read_only=True)

        for _ in range(12):  # the server has a plan for all parameters from the eleventh on
            plan()
        before = read()
        for _ in range(20):
            plan()
        in_sequence, by_index = (now - then for now, then in zip(read(), before, strict=True))
    assert in_sequence == 0
    assert 0 < by_index <= 20 * (3 * WORKERS + 30), "about as many as there are owners, and what is free"


def rows_read(plan: dict[str, Any], table: str) -> int:
    """How many rows of a table a plan that has run has read: what its scans gave, and what they threw away."""
    mine = 0
    if plan.get("Relation Name") == table and "Scan" in plan["Node Type"]:
        mine = int((plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)) * plan["Actual Loops"])
    return mine + sum(rows_read(child, table) for child in plan.get("Plans", []))


def locked_loops(plan: Any) -> list[int]:
    """How often each of a plan's nodes that lock rows was run."""
    mine = [plan["Actual Loops"]] if plan["Node Type"] == "LockRows" else []
    return mine + [loops for child in plan.get("Plans", []) for loops in locked_loops(child)]


def explained(
    store: LeaseStore, statement: Any, lease: Lease, offered: Sequence[tuple[str, str]], *, kind: str = "generic"
) -> Any:
    """The plan by which an append of events ran: a generic one knows nothing of them, a custom one their stream."""
    compiled = statement.compile(dialect=store.engine.dialect)
    given = {**compiled.params, **fencing.named(lease), **dialects.events_given(dialects.POSTGRESQL, offered)}

    def explain(connection: Connection) -> Any:
        connection.execute(text(f"SET LOCAL plan_cache_mode = force_{kind}_plan"))
        driver: Any = connection.connection.driver_connection
        return driver.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {compiled}", given, prepare=True).fetchone()[0]

    (answer,) = store.run(explain)
    return answer["Plan"]


STATEMENTS: dict[str, Any] = {
    "in a transaction": events._append(dialects.POSTGRESQL),
    "before 17": events._append_fenced(16, False, False),
    "alone": events._append_fenced(17, False, False),
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_postgresql_appends_without_reading_the_whole_stream_also_before_the_first_analyze(
    postgresql_url: str, statement: str
) -> None:
    with LeaseStore(postgresql_url) as store:
        lease = take(store)
        log = EventLog(store)
        for page in range(10):
            log.append(lease, {f"{page}-{n}": n for n in range(500)})
        if statement == "alone" and (store.engine.dialect.server_version_info or (0,)) < (17,):
            return  # it sets what came with 17
        offered = [(f"{n % 10}-{n * 9}", "1") for n in range(100)]  # some the stream has, some are new
        plan = explained(store, STATEMENTS[statement], lease, offered)
    assert 1 <= rows_read(plan, "lease_events") < 1_000, plan
    assert locked_loops(plan) == ([] if statement == "in a transaction" else [1]), "the fence is for all of them"


@pytest.mark.parametrize("kind", ["generic", "custom"])
@pytest.mark.parametrize("statement", STATEMENTS)
def test_postgresql_appends_without_reading_the_whole_stream_also_to_one_that_is_younger_than_the_statistics(
    postgresql_url: str, statement: str, kind: str
) -> None:
    with LeaseStore(postgresql_url) as store:
        log = EventLog(store)
        log.append(take(store, "old"), {f"{n}": n for n in range(2_000)})
        store.run(lambda connection: connection.execute(text("ANALYZE lease_events")))
        lease = take(store)
        for page in range(10):
            log.append(lease, {f"{page}-{n}": n for n in range(300)})
        if statement == "alone" and (store.engine.dialect.server_version_info or (0,)) < (17,):
            return  # it sets what came with 17
        plan = explained(store, STATEMENTS[statement], lease, [(f"new-{n}", "1") for n in range(100)], kind=kind)
    assert rows_read(plan, "lease_events") < 1_000, plan
