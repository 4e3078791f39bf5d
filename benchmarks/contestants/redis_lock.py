"""Locks in Redis: redis-py's own Lock on one server, and pottery's Redlock on three.

Redis here keeps nothing on disk, as these libraries' own pages run it. A lock is one key with a random value; there is
no fencing token, and nobody is told that its lock was lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from benchmarks.contestant import AT_ITS_DEFAULT, OF_LEASES, TTL_S, Contestant, LockClient, Opener, needed
from benchmarks.servers import Servers

UNFENCED = "it has no fencing token"


def forget(port: int) -> None:
    """What has expired in Redis is gone."""
    client = needed("redis", "redis").Redis(host="127.0.0.1", port=port)
    client.flushdb()
    client.close()


class RedisClient(LockClient):
    """redis-py's Lock, one for each stream."""

    def __init__(self, port: int, ttl_s: float | None) -> None:
        self.redis = needed("redis", "redis").Redis(host="127.0.0.1", port=port)
        self.ttl_s = ttl_s

    def renew(self, held: list[Any]) -> None:
        for lock in held:
            lock.reacquire()  # back to its whole timeout

    def acquire(self, stream: str) -> Any:
        lock = self.redis.lock(stream, timeout=self.ttl_s, blocking=False, thread_local=False)
        return lock if lock.acquire() else None

    def close(self) -> None:
        self.redis.close()


class RedisLock(Contestant):
    name = "redis"
    title = "redis-py Lock"
    durability = "memory"
    not_for: ClassVar[Mapping[str, str]] = {
        **AT_ITS_DEFAULT,
        **OF_LEASES,
        "takeover": "never: by its default a lock has no timeout, and a dead owner keeps it",
        "fenced": UNFENCED,
    }

    def start(self, servers: Servers) -> None:
        needed("redis", "redis")
        self.port = servers.redis()
        self.server = servers.redis_version

    def opener(self, ttl_s: float | None = TTL_S) -> Opener:
        return partial(RedisClient, self.port, ttl_s)

    def abandon(self, streams: Sequence[str]) -> None:
        forget(self.port)


class RedlockClient(LockClient):
    """pottery's Redlock. It asks its servers by a pool of threads, as the library does."""

    def __init__(self, ports: Sequence[int], ttl_s: float | None) -> None:
        redis, self.pottery = needed("redis", "redis"), needed("pottery", "pottery")
        self.masters = {redis.Redis(host="127.0.0.1", port=port) for port in ports}
        self.options = {} if ttl_s is None else {"auto_release_time": ttl_s}

    def renew(self, held: list[Any]) -> None:
        for lock in held:
            lock.extend()

    def acquire(self, stream: str) -> Any:
        lock = self.pottery.Redlock(key=stream, masters=self.masters, num_extensions=1_000_000, **self.options)
        return lock if lock.acquire(blocking=False) else None

    def close(self) -> None:
        for master in self.masters:
            master.close()


class Redlock(Contestant):
    name = "pottery"
    title = "pottery Redlock, 3 Redis"
    durability = "memory"
    not_for: ClassVar[Mapping[str, str]] = {
        **AT_ITS_DEFAULT,
        **OF_LEASES,
        "heartbeat 100,000 leases": "minutes for each round; see its rate at 10,000",
        "fenced": UNFENCED,
    }

    def start(self, servers: Servers) -> None:
        needed("redis", "redis")
        needed("pottery", "pottery")
        self.ports = [servers.redis(number) for number in (1, 2, 3)]
        self.server = f"3 × {servers.redis_version}"

    def opener(self, ttl_s: float | None = TTL_S) -> Opener:
        return partial(RedlockClient, self.ports, ttl_s)

    def abandon(self, streams: Sequence[str]) -> None:
        for port in self.ports:
            forget(port)
