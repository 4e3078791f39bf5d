"""The nemesis: chooses faults by a seed, begins them, and ends them again. Each fault is a method of one name."""

from __future__ import annotations

import heapq
import itertools
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from random import Random

import psycopg

from tests.chaos.cluster import Cluster
from tests.chaos.process import Client
from tests.chaos.proxy import DOWN, UP, Link, Proxy

Fault = Callable[[], None]


class Nemesis:
    """What befalls the processes of a run; on PostgreSQL also their connections and the server."""

    def __init__(
        self,
        clients: Sequence[Client],
        cluster: Cluster | None,
        proxy: Proxy | None,
        seed: int,
        ttl_s: float,
        only: Collection[str] = (),
    ) -> None:
        self.faults: Counter[str] = Counter()
        self._clients = clients
        self._workers = [client for client in clients if client.is_worker]
        self._cluster = cluster
        self._proxy = proxy
        self._random = Random(seed)
        self._ttl_s = ttl_s
        self._number = itertools.count()
        self._undo: list[tuple[float, int, Callable[[], object]]] = []
        self._next_s = time.monotonic() + ttl_s  # let the first of them come to work
        chances: dict[Fault, int] = {self.kill: 5, self.stop: 6, self.end: 2, self.freeze: 5, self.trickle: 3}
        if cluster is None:  # one file, one writer: whoever is frozen or slow in a transaction stops all the others
            chances |= {self.freeze: 2, self.trickle: 1}
        else:
            chances |= {
                self.copy: 4, self.partition: 4, self.half_partition: 4, self.partition_of_all: 1, self.drop: 3,
                self.reset: 5, self.delay: 4, self.swallow: 8, self.kill_backend: 6, self.restart: 2, self.exhaust: 1,
            }  # fmt: skip
            if cluster.replicated:
                chances[self.failover] = 3
            if cluster.clock is not None:
                chances[self.step] = 8
        self._chances = {fault: chance for fault, chance in chances.items() if not only or fault.__name__ in only}
        if not self._chances:
            raise ValueError(f"no such fault; there are {', '.join(fault.__name__ for fault in chances)}")

    def tick(self) -> None:
        """End what is due, tend the processes, and perhaps begin a fault."""
        now_s = time.monotonic()
        while self._undo and self._undo[0][0] <= now_s:
            heapq.heappop(self._undo)[2]()
        for client in self._clients:
            if client.tend(self._random, (0.8 * self._ttl_s, 2 * self._ttl_s)):
                self.faults["frozen inside a transaction or COPY"] += 1
        if now_s >= self._next_s:
            (fault,) = self._random.choices(list(self._chances), list(self._chances.values()))
            fault()
            self._next_s = time.monotonic() + self._random.uniform(0.1, 0.9)

    def heal(self) -> None:
        """End every fault. Processes that are dead start again with `tick`s of `calm`."""
        while self._undo:
            heapq.heappop(self._undo)[2]()
        if self._cluster is not None and self._cluster.clock is not None:
            self._cluster.clock.heal()
        for client in self._clients:
            client.stopped_by_us = False
            client.signal(signal.SIGCONT)
            client.say("calm")
            if client.link is not None:
                client.link.heal()

    def calm(self) -> None:
        """Tend the processes, and do nothing to them."""
        for client in self._clients:
            client.tend(self._random, (0, 0))

    # --- processes -------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        self._count("SIGKILL")
        self._random.choice(self._clients).signal(signal.SIGKILL)

    def end(self) -> None:
        self._count("SIGTERM (drain)")
        self._random.choice(self._workers).signal(signal.SIGTERM)

    def stop(self) -> None:
        client = self._random.choice(self._clients)
        client.stopped_by_us = True
        client.signal(signal.SIGSTOP)
        long = self._random.random() < 0.6
        self._count("SIGSTOP past the TTL" if long else "SIGSTOP, short")

        def thaw() -> None:
            client.stopped_by_us = False
            client.signal(signal.SIGCONT)

        self._after(self._random.uniform(1, 2) if long else self._random.uniform(0.1, 0.9), thaw)

    def freeze(self) -> None:
        self._say("freeze")

    def copy(self) -> None:
        self._say("copy")

    def trickle(self) -> None:
        self._count("trickle past the lease's end")
        self._say("trickle")

    def _say(self, word: str) -> None:
        self._random.choice(self._workers).say(word)

    # --- connections -----------------------------------------------------------------------------------------------

    def partition(self) -> None:
        self._count("partition")
        self._on_a_link(lambda link: link.hold(UP, DOWN), 0.2, 2)

    def half_partition(self) -> None:
        direction = self._random.choice([UP, DOWN])
        self._count(f"half partition ({'requests' if direction == UP else 'answers'} held)")
        self._on_a_link(lambda link: link.hold(direction), 0.2, 1.5)

    def partition_of_all(self) -> None:
        self._count("partition of all")
        for client in self._clients:
            if client.link is not None:
                client.link.hold(UP, DOWN)
                self._after(self._random.uniform(0.2, 1.5), client.link.heal)

    def drop(self) -> None:
        self._count("drop")
        self._on_a_link(Link.drop, 0.1, 1)

    def delay(self) -> None:
        self._count("delay")
        seconds = self._random.uniform(0.02, 0.4)
        self._on_a_link(lambda link: link.delay(seconds), 0.2, 1.5)

    def swallow(self) -> None:
        self._count("swallow the answer of COMMIT")
        count = self._random.randint(1, 4)
        self._on_a_link(lambda link: link.swallow(count), 0.2, 1)

    def reset(self) -> None:
        self._count("reset")
        link = self._random.choice(self._clients).link
        if link is not None:
            link.reset()

    def _on_a_link(self, begin: Callable[[Link], None], least: float, most: float) -> None:
        link = self._random.choice(self._clients).link
        if link is not None:
            begin(link)
            self._after(self._random.uniform(least, most), link.heal)

    # --- the server ------------------------------------------------------------------------------------------------

    def kill_backend(self) -> None:
        self._count("backend killed")
        statement = """SELECT pg_terminate_backend(pid) FROM (
            SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
            ORDER BY state = 'active' DESC, random() LIMIT %s) AS victim"""
        if self._cluster is not None:
            with suppress(psycopg.OperationalError), self._cluster.connect() as connection:
                connection.execute(statement, [self._random.randint(1, 3)])

    def restart(self) -> None:
        self._count("server crashed (pg_ctl -m immediate)")
        if self._cluster is not None:
            self._cluster.crash()
            self._stand_by(0.5)
            self._cluster.start()

    def failover(self) -> None:
        self._count("failover to the synchronous standby")
        assert self._cluster is not None
        assert self._proxy is not None
        self._cluster.synchronize()
        self._stand_by(0.3)
        self._cluster.promote(self._proxy)

    def step(self) -> None:
        assert self._cluster is not None
        assert self._cluster.clock is not None
        size = self._random.choice([0.1, 0.5, 1, 2, 5, 20]) * self._ttl_s * self._random.uniform(0.5, 1)
        forward = self._random.random() < 0.5
        self._count(f"server's clock set {'on' if forward else 'back'}")
        self._cluster.clock.step(size if forward else -size)

    def _stand_by(self, ttls: float) -> None:
        """Let a random time pass, in which the clients go on."""
        until_s = time.monotonic() + self._random.uniform(0, ttls) * self._ttl_s
        while time.monotonic() < until_s:
            time.sleep(0.02)

    def exhaust(self) -> None:
        self._count("connections exhausted")
        taken: list[psycopg.Connection[tuple[str, ...]]] = []
        assert self._cluster is not None
        with suppress(psycopg.OperationalError):
            for _ in range(200):
                taken.append(self._cluster.connect())

        def give_back() -> None:
            for connection in taken:
                connection.close()

        self._after(self._random.uniform(0.2, 1), give_back)

    # --- both ------------------------------------------------------------------------------------------------------

    def _count(self, name: str) -> None:
        self.faults[name] += 1

    def _after(self, ttls: float, undo: Callable[[], object]) -> None:
        heapq.heappush(self._undo, (time.monotonic() + ttls * self._ttl_s, next(self._number), undo))
