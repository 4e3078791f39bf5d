"""No operation of a worker or an operator reads the whole lease table, however many streams there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, event, text

from leases import LeaseStore, fleet, operations
from leases.model import Ending, Membership

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
