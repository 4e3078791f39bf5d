"""Leases itself, through its public API, on PostgreSQL and on SQLite."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy import text

from benchmarks.contestant import TTL_S, Client, Contestant, Opener, pool_of
from benchmarks.servers import Servers
from leases import EventLog, Lease, LeaseStore, SessionRegistry, operations
from leases.registry import DEFAULT_TTL, incarnation


class LeasesClient(Client):
    def __init__(self, url: str, ttl_s: float | None) -> None:
        super().__init__()
        self.store = LeaseStore(url)
        self.log = EventLog(self.store)
        self.owner = incarnation()
        self.ttl = DEFAULT_TTL if ttl_s is None else timedelta(seconds=ttl_s)
        self.registry: SessionRegistry | None = None

    def take(self, streams: Sequence[str]) -> list[Lease]:
        taken = self.store.claim(owner=self.owner, ttl=self.ttl, limit=len(streams), pool=pool_of(streams))
        assert len(taken) == len(streams), f"{len(taken)} of {len(streams)} were free"
        return taken

    def renew(self, held: list[Lease]) -> None:
        renewal = self.store.renew(held, owner=self.owner, ttl=self.ttl)
        assert not renewal.lost, renewal
        assert not renewal.skipped, renewal

    def let_go(self, held: list[Lease]) -> None:
        self.store.run(lambda connection: [operations.release(connection, lease) for lease in held])

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

    # `leases.Worker(store, handler, streams=…, ttl=…, poll_interval=…)` takes the registry's place in the next two,
    # and the heir's loop in `workload.takeover`, once there is one.

    def hold(self, streams: Sequence[str]) -> SessionRegistry:
        """Own them by a registry, and wait for the first heartbeat that extends them: the worst moment to be killed."""
        renewed = threading.Event()
        if self.registry is None:
            self.registry = SessionRegistry(self.store, ttl=self.ttl, on_renewed=lambda _: renewed.set())
        claimed = self.registry.claim(len(streams), pool=pool_of(streams))
        assert len(claimed) == len(streams), f"{len(claimed)} of {len(streams)} were free"
        if self.ttl.total_seconds() < TTL_S:
            assert renewed.wait(self.ttl.total_seconds())
        return self.registry

    def take_over(self, streams: Sequence[str]) -> int:
        if self.registry is None:
            self.registry = SessionRegistry(self.store, ttl=self.ttl)
        self.registry.claim(len(streams), pool=pool_of(streams))
        return len(self.registry.sessions.keys() & set(streams))

    def close(self) -> None:
        if self.registry is not None:
            self.registry.close()
        self.store.close()


class _Leases(Contestant):
    url: str

    def opener(self, ttl_s: float | None = TTL_S) -> Opener:
        return partial(LeasesClient, self.url, ttl_s)

    def register(self, streams: Sequence[str]) -> None:
        with LeaseStore(self.url) as store:
            store.register(streams, pool=pool_of(streams))

    def abandon(self, streams: Sequence[str]) -> None:
        pool = pool_of(streams)
        with LeaseStore(self.url) as store:
            # What the last round's owners hold is free first: the round begins with one dead owner.
            free = text(
                "UPDATE leases SET owner = NULL, expires_at = NULL, available_at = registered_at "
                "WHERE pool = :pool AND owner IS NOT NULL"
            )
            store.run(lambda connection: connection.execute(free, {"pool": pool}))
            taken = store.claim(owner="the dead", ttl=timedelta(seconds=TTL_S), limit=len(streams), pool=pool)
            assert len(taken) == len(streams)
            past = text("UPDATE leases SET expires_at = acquired_at WHERE pool = :pool")
            store.run(lambda connection: connection.execute(past, {"pool": pool}))


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
