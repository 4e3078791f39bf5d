"""PostgreSQL's advisory locks, by sqlalchemy-dlock: locks of a session, in the server's memory, gone with it.

The connection is the heartbeat. There is no expiry, so that a frozen owner keeps its locks, and no fencing token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from benchmarks.contestant import AT_ITS_DEFAULT, OF_LEASES, Contestant, LockClient, Opener, needed
from benchmarks.servers import Servers


class AdvisoryClient(LockClient):
    def __init__(self, url: str) -> None:
        self.lock = needed("sqlalchemy_dlock", "sqlalchemy-dlock").create_sadlock
        self.engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        self.connection = self.engine.connect()

    def renew(self, held: list[Any]) -> None:
        """Nothing to do: the locks last as long as the connection."""

    def acquire(self, stream: str) -> Any:
        lock = self.lock(self.connection, stream)
        return lock if lock.acquire(block=False) else None

    def close(self) -> None:
        self.connection.close()
        self.engine.dispose()


class Advisory(Contestant):
    name = "advisory"
    title = "advisory lock (sqlalchemy-dlock)"
    durability = "memory: gone with its connection"
    not_for: ClassVar[Mapping[str, str]] = {
        **AT_ITS_DEFAULT,
        **OF_LEASES,
        "heartbeat": "its connection keeps all locks, and there is no expiry",
        "herd": "its locks do not expire: they are gone with their owner's connection",
        "fenced": "it has no fencing token",
    }

    def start(self, servers: Servers) -> None:
        needed("sqlalchemy_dlock", "sqlalchemy-dlock")
        self.server = servers.postgresql.version
        self.url = servers.postgresql.database("advisory_bench").render_as_string(hide_password=False)

    def opener(self, ttl_s: float | None = None) -> Opener:
        return partial(AdvisoryClient, self.url)

    def abandon(self, streams: Sequence[str]) -> None:
        """Nothing is left behind: its locks are gone with their owner's connection."""
