"""kazoo's Lock on ZooKeeper: an ephemeral node a lock, which lives as long as its client's session.

kazoo pings for the session, so there is nothing to renew. A node's creation id can serve as a fencing token; nothing
checks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from benchmarks.contestant import AT_ITS_DEFAULT, OF_LEASES, TTL_S, Contestant, LockClient, Opener, needed, pool_of
from benchmarks.servers import Servers


class ZooKeeperClient(LockClient):
    def __init__(self, port: int, ttl_s: float | None) -> None:
        options = {} if ttl_s is None else {"timeout": ttl_s}
        self.client = needed("kazoo.client", "kazoo").KazooClient(hosts=f"127.0.0.1:{port}", **options)
        self.client.start(30)

    def renew(self, held: list[Any]) -> None:
        """The session's ping, of which kazoo takes care."""

    def acquire(self, stream: str) -> Any:
        lock = self.client.Lock(f"/{stream}")
        return lock if lock.acquire(blocking=False) else None

    def close(self) -> None:
        self.client.stop()
        self.client.close()


class ZooKeeper(Contestant):
    name = "zookeeper"
    title = "kazoo Lock on ZooKeeper"
    durability = "fsync"
    not_for: ClassVar[Mapping[str, str]] = {
        **AT_ITS_DEFAULT,
        **OF_LEASES,
        "heartbeat": "one ping keeps all locks of a process, however many",
        "fenced": "it has no fence",
    }

    def start(self, servers: Servers) -> None:
        needed("kazoo.client", "kazoo")
        self.port, self.server = servers.zookeeper

    def opener(self, ttl_s: float | None = TTL_S) -> Opener:
        return partial(ZooKeeperClient, self.port, ttl_s)

    def abandon(self, streams: Sequence[str]) -> None:
        """What has expired in ZooKeeper is gone."""
        client = ZooKeeperClient(self.port, TTL_S)
        client.client.delete(f"/{pool_of(streams)}", recursive=True)
        client.close()
