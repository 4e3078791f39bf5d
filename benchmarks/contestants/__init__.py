"""The contestants, in the order of the tables."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.contestant import Contestant
from benchmarks.contestants.advisory import Advisory
from benchmarks.contestants.bare import Bare, BareInOneText
from benchmarks.contestants.etcd import Etcd
from benchmarks.contestants.leases_store import LeasesOnPostgreSQL, LeasesOnSQLite
from benchmarks.contestants.redis_lock import RedisLock, Redlock
from benchmarks.contestants.zookeeper import ZooKeeper

CONTESTANTS: Mapping[str, type[Contestant]] = {
    each.name: each
    for each in (LeasesOnPostgreSQL, LeasesOnSQLite, Bare, BareInOneText, Advisory, RedisLock, Redlock, Etcd, ZooKeeper)
}
