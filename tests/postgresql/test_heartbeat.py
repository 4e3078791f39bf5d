"""Heartbeats on PostgreSQL: they pass fenced writes, skip what is locked, revive nothing, and stay heap-only."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import Engine, text

from leases import EventLog, Lease, LeaseStore, operations
from leases.model import Loss, Membership
from leases.operations import put_checkpoint
from tests.conformance.driver import TTL, take
from tests.postgresql.race import Background, Observer, locking, writing
from tests.waiting import until


def claim(store: LeaseStore, count: int, ttl: timedelta = TTL, owner: str = "one") -> list[Lease]:
    store.register(f"s{number:04}" for number in range(count))
    leases = store.claim(owner=owner, ttl=ttl, limit=count)
    assert len(leases) == count
    return leases


def test_a_heartbeat_passes_fenced_writes_with_checkpoints_in_flight(store: LeaseStore, engine: Engine) -> None:
    leases = claim(store, 200)
    with writing(engine, *leases) as connection:
        for lease in leases:
            put_checkpoint(connection, lease, {"at": 1})
        renewal = Background(store.renew, leases, owner="one", ttl=TTL).result()
        assert (renewal.skipped, renewal.lost) == (frozenset(), {})
        renewal = Background(store.renew, leases, owner="one", ttl=TTL).result()
        assert (renewal.skipped, renewal.lost) == (frozenset(), {}), "nor the second"
        connection.commit()


def test_a_heartbeat_passes_at_every_append_of_a_busy_session(store: LeaseStore) -> None:
    leases = claim(store, 20)
    log = EventLog(store)
    stop = threading.Event()

    def work(mine: list[Lease]) -> int:
        count = 0
        while not stop.is_set():
            for lease in mine:
                log.append(lease, {f"e{count}": count}, checkpoint=count)
                count += 1
        return count

    workers = [Background(work, leases[start::2]) for start in range(2)]
    try:
        for _ in range(40):
            renewal = store.renew(leases, owner="one", ttl=TTL)
            assert (renewal.skipped, renewal.lost) == (frozenset(), {})
    finally:
        stop.set()
    assert sum(worker.result() for worker in workers) > 0


@pytest.mark.parametrize("how", ["FOR UPDATE", "FOR NO KEY UPDATE", "FOR SHARE"])
def test_a_locked_row_costs_a_worker_no_other_lease(store: LeaseStore, engine: Engine, how: str) -> None:
    leases = claim(store, 10)
    before = store.list()
    with locking(engine, "s0003", how):
        renewal = Background(store.renew, leases, owner="one", ttl=TTL).result()
    assert (renewal.skipped, renewal.lost) == (frozenset({"s0003"}), {})
    extended = [
        new.stream_id for new, old in zip(store.list(), before, strict=True) if new.expires_at != old.expires_at
    ]
    assert extended == [lease.stream_id for lease in leases if lease.stream_id != "s0003"]
    assert store.renew(leases, owner="one", ttl=TTL).skipped == frozenset()


def test_a_locked_worker_row_costs_no_lease(store: LeaseStore, engine: Engine) -> None:
    store.enlist(Membership(worker_id="one", host="h", pid=1, version="0"), ttl=TTL)
    leases = claim(store, 3)
    with engine.connect() as connection, connection.begin():
        connection.execute(text("SELECT 1 FROM lease_workers FOR UPDATE"))
        renewal = Background(store.renew, leases, owner="one", ttl=TTL).result()
        assert (renewal.skipped, renewal.lost, renewal.worker_known) == (frozenset(), {}, False)
    assert store.renew(leases, owner="one", ttl=TTL).worker_known


def test_a_heartbeat_that_met_a_lock_which_rolled_back_revives_nothing(
    store: LeaseStore, engine: Engine, observer: Observer
) -> None:
    lease = take(store, ttl=timedelta(milliseconds=400))
    with engine.connect() as grant:
        grant.execute(text("UPDATE leases SET fencing_token = fencing_token + 1"))
        heartbeat = Background(store.renew, [lease], owner="one", ttl=TTL)
        until(lambda: heartbeat.done() or observer.waiting(), "the heartbeat is back, or waits")
        observer.wait_for_expiry()
        grant.rollback()
    assert heartbeat.result().skipped == {"a"}
    info = store.get("a")
    assert info is not None
    assert (info.live, info.expires_at) == (False, lease.expires_at)
    assert store.renew([lease], owner="one", ttl=TTL).lost == {"a": Loss.EXPIRED}


def test_a_skipped_lease_that_somebody_takes_is_lost(store: LeaseStore, engine: Engine) -> None:
    lease = take(store)
    with engine.connect() as grant:
        grant.execute(text("UPDATE leases SET fencing_token = fencing_token + 1, owner = 'two'"))
        assert store.renew([lease], owner="one", ttl=TTL).skipped == {"a"}
        grant.commit()
    assert store.renew([lease], owner="one", ttl=TTL).lost == {"a": Loss.TAKEN}


def test_batches_in_opposite_orders_do_not_deadlock(store: LeaseStore, observer: Observer) -> None:
    leases = claim(store, 60)
    start = threading.Barrier(2)

    def beat(batch: list[Lease]) -> None:
        start.wait(10)
        for _ in range(40):
            assert store.renew(batch, owner="one", ttl=TTL).lost == {}

    for beating in [Background(beat, leases), Background(beat, leases[::-1])]:
        beating.result()
    assert observer.scalar("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == 0


def test_heartbeats_stay_heap_only(store: LeaseStore, observer: Observer) -> None:
    observer.execute("VACUUM leases")  # of the rows of other tests
    store.register(f"s{number:04}" for number in range(1000))
    observer.execute("ANALYZE leases")  # the server counts none from the VACUUM, and would plan for none
    with store.engine.connect() as connection:

        def counted(at_least: int) -> tuple[int, int]:
            """How many rows were updated, and how many of them heap-only, once the server has counted so many."""
            connection.execute(text("SELECT pg_stat_force_next_flush()"))
            connection.commit()

            def read(column: str) -> int:
                query = f"SELECT {column} FROM pg_stat_user_tables WHERE relname = 'leases'"
                return int(observer.scalar(query))

            until(lambda: read("n_tup_upd") >= at_least, "the server has counted")
            return read("n_tup_upd"), read("n_tup_hot_upd")

        before_grants, _ = counted(0)
        leases = operations.claim(connection, owner="one", ttl=TTL, limit=1000)
        connection.commit()
        assert len(leases) == 1000
        updated, hot = counted(before_grants + 1000)
        for _ in range(100):
            assert operations.renew(connection, leases, owner="one", ttl=TTL).lost == {}
            connection.commit()
        updated_after, hot_after = counted(updated + 100_000)
    assert updated_after - updated == 100_000
    assert (hot_after - hot) / 100_000 >= 0.99


def test_a_heartbeat_looks_no_row_up_but_by_its_key_whatever_the_statistics_say(
    store: LeaseStore, observer: Observer
) -> None:
    store.register(f"s{number:04}" for number in range(300))
    observer.execute("ANALYZE leases")  # of now, when nobody owns anything
    with store.engine.connect() as connection:
        leases = operations.claim(connection, owner="one", ttl=TTL, limit=300)
        connection.commit()

        def read() -> tuple[int, int]:
            """How many rows were read from the table in sequence, and by the index on owner."""
            connection.execute(text("SELECT pg_stat_force_next_flush()"))
            connection.commit()
            return (
                observer.scalar("SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'leases'"),
                observer.scalar("SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'leases_owned'"),
            )

        before = read()
        for _ in range(20):  # the server has a plan for all parameters from the eleventh on
            operations.renew(connection, leases, owner="one", ttl=TTL)
            connection.commit()
        in_sequence, by_owner = (now - then for now, then in zip(read(), before, strict=True))
    # For strays the owner's rows are read once, and not once for each that is asked for.
    assert by_owner <= 20 * 300 * 5
    assert in_sequence <= 20 * 300 * 2, "no more than twice the table a beat"
