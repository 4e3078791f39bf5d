"""Leases itself, through its public API, on PostgreSQL and on SQLite."""

from __future__ import annotations

import sqlite3
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy import text

from benchmarks.contestant import POLL_S, TTL_S, Client, Contestant, Opener, pool_of
from benchmarks.servers import Servers
from leases import EventLog, Lease, LeaseStore, SessionRegistry, StreamSession, Worker, balance, fleet
from leases.line import Line
from leases.model import Ending, Happening, Membership, WorkerEvent
from leases.registry import DEFAULT_TTL, incarnation

PATIENCE_S = 60.0

FREE = text(
    "UPDATE leases SET owner = NULL, expires_at = NULL, available_at = registered_at "
    "WHERE pool = :pool AND owner IS NOT NULL"
)
"""Past the library: what owners hold is free."""


class LeasesClient(Client):
    def __init__(self, url: str, ttl_s: float | None) -> None:
        self.store = LeaseStore(url)
        self.log = EventLog(self.store)
        self.owner = incarnation()
        self.ttl = DEFAULT_TTL if ttl_s is None else timedelta(seconds=ttl_s)
        self.registry: SessionRegistry | None = None
        self.worker: Worker | None = None
        self.poll = timedelta(seconds=POLL_S)
        self.renewed = threading.Event()

    def take(self, streams: Sequence[str]) -> list[Lease]:
        taken = self.store.claim(owner=self.owner, ttl=self.ttl, limit=len(streams), pool=pool_of(streams))
        assert len(taken) == len(streams), f"{len(taken)} of {len(streams)} were free"
        return taken

    def renew(self, held: list[Lease]) -> None:
        renewal = self.store.renew(held, owner=self.owner, ttl=self.ttl)
        assert not renewal.lost, renewal
        assert not renewal.skipped, renewal

    def let_go(self, held: list[Lease]) -> None:
        released = self.store.release_all([Ending(lease) for lease in held], owner=self.owner)
        assert len(released.released) == len(held), f"{len(released.locked)} were locked"

    def acquire(self, stream: str) -> Lease | None:
        return self.store.acquire(stream, owner=self.owner, ttl=self.ttl)

    def release(self, grant: Lease) -> None:
        assert self.store.release(grant)

    def write(self, grant: Lease, events: Mapping[str, Any]) -> None:
        assert self.log.append(grant, events).count == len(events)

    def reown(self, streams: Sequence[str], share: Sequence[str], batch: int) -> int:
        count = 0
        while taken := self.store.claim(owner=self.owner, ttl=self.ttl, limit=batch, pool=pool_of(streams)):
            count += len(taken)
        return count

    def hold(self, streams: Sequence[str]) -> SessionRegistry:
        if self.registry is None:
            self.registry = SessionRegistry(self.store, ttl=self.ttl)
        claimed = self.registry.claim(len(streams), pool=pool_of(streams))
        assert len(claimed) == len(streams), f"{len(claimed)} of {len(streams)} were free"
        return self.registry

    def serve(self, streams: Sequence[str]) -> Worker:
        self._work(streams, len(streams))
        assert self.worker is not None
        return self.worker

    def stand_by(self, streams: Sequence[str]) -> None:
        """Be a worker beside the other one: each has its share, and then nothing moves."""
        if self.worker is not None:  # the last round's
            self.worker.stop()
        self._work(streams, len(streams) // 2)

    def _work(self, streams: Sequence[str], count: int) -> None:
        def heard(event: WorkerEvent) -> None:
            if event.happening is Happening.RENEWED and event.count:
                self.renewed.set()

        self.worker = Worker(
            self.store, _idle, pool=pool_of(streams), ttl=self.ttl, poll_interval=self.poll, on_event=heard
        )
        self.worker.start()
        self._until(count)

    def _until(self, count: int) -> None:
        """Wait until the worker has so many streams."""
        assert self.worker is not None
        give_up_at_s = time.monotonic() + PATIENCE_S
        while len(self.worker.sessions) != count:
            assert time.monotonic() < give_up_at_s, f"{len(self.worker.sessions)} of {count} streams"
            time.sleep(0.002)

    def beaten(self) -> None:
        assert self.worker is not None
        self._until(len(self.worker.sessions))
        self.renewed.clear()
        assert self.renewed.wait(self.ttl.total_seconds())

    def take_over(self, streams: Sequence[str], poll_s: float) -> None:
        assert self.poll.total_seconds() == poll_s
        self._until(len(streams))

    def close(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        if self.registry is not None:
            self.registry.close()
        self.store.close()


def _idle(session: StreamSession) -> None:
    """A handler that has nothing to do."""


class _Leases(Contestant):
    url: str
    serving = 2

    def opener(self, ttl_s: float | None = TTL_S) -> Opener:
        return partial(LeasesClient, self.url, ttl_s)

    def register(self, streams: Sequence[str]) -> None:
        with LeaseStore(self.url) as store:
            store.register(streams, pool=pool_of(streams))

    def abandon(self, streams: Sequence[str]) -> None:
        pool = pool_of(streams)
        with LeaseStore(self.url) as store:
            # What the last round's owners hold is free first: the round begins with one dead owner.
            store.run(lambda connection: connection.execute(FREE, {"pool": pool}))
            taken = store.claim(owner="the dead", ttl=timedelta(seconds=TTL_S), limit=len(streams), pool=pool)
            assert len(taken) == len(streams)
            past = text("UPDATE leases SET expires_at = acquired_at WHERE pool = :pool")
            store.run(lambda connection: connection.execute(past, {"pool": pool}))

    @contextmanager
    def planning(self, streams: Sequence[str], workers: int) -> Iterator[Callable[[], None]]:
        pool, ttl, share = pool_of(streams), timedelta(seconds=TTL_S), len(streams) // workers
        names = [f"{pool}-worker-{n:03}" for n in range(workers)]
        with LeaseStore(self.url) as store:
            for n, name in enumerate(names):
                store.enlist(Membership(name, "benchmark", n, "1", pool), ttl=ttl)
                taken = store.claim(owner=name, ttl=ttl, limit=share, pool=pool, held=0)
                assert len(taken) == share, f"{len(taken)} of {share} were free"
            self.settle(store)
            line = Line(store)
            observe = partial(
                fleet.observe, pool=pool, worker_id=names[0], count_up_to=balance.ENOUGH, patience_s=1.5 * POLL_S
            )

            def once() -> None:
                view = line.run(observe, read_only=True)
                assert (len(view.workers), view.total) == (workers, len(streams)), view
                plan = balance.plan(names[0], view, held=share)
                assert (plan.claim, plan.shed) == (0, 0), plan

            yield once
            line.close()
            # A round costs by the owners that there are, of all pools: the next case has its own, and no others.
            store.run(lambda connection: connection.execute(FREE, {"pool": pool}))
            for name in names:
                store.dismiss(name)

    @abstractmethod
    def settle(self, store: LeaseStore) -> None:
        """Have the database clean up and count what it has, as it does by itself in time."""


class LeasesOnPostgreSQL(_Leases):
    name = "leases-postgresql"
    title = "leases on PostgreSQL"
    database = "leases_bench"

    def start(self, servers: Servers) -> None:
        self.running = servers.postgresql
        self.server, self.durability = self.running.version, self.running.durability
        self.url = self.running.database(self.database).render_as_string(hide_password=False)
        with LeaseStore(self.url) as store:
            store.migrate()

    def settle(self, store: LeaseStore) -> None:
        with store.base_engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")

    def complaints(self) -> list[str]:
        return self.running.complaints()


class LeasesOnSQLite(_Leases):
    name = "leases-sqlite"
    title = "leases on SQLite"
    durability = "fsync"

    def start(self, servers: Servers) -> None:
        self.server = f"SQLite {sqlite3.sqlite_version}"
        self.url = f"sqlite:///{servers.room / 'leases.db'}"
        with LeaseStore(self.url) as store:
            store.migrate()

    def settle(self, store: LeaseStore) -> None:
        store.run(lambda connection: connection.exec_driver_sql("ANALYZE"))
