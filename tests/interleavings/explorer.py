"""The explorer: runs one schedule after the other, until it has walked all of them.

A schedule is a word over the clients' letters: whose statement is next. After each statement the explorer waits until
the world is *settled*: every client stands before its next statement, has finished, or waits for a lock of one that
does (`pg_blocking_pids`). Then it chooses among those that can go on. Where clients wait for each other in a circle, it
waits until the server has refused one.

All orders of a scenario are a tree, which is walked by replay: each schedule begins anew from the saved state, follows
branches that have been taken, and ends in one that has not. Depth first; or, with a seed, in a random order, so
that a part of the tree is a fair sample of it. No order is walked twice, and `Tree.exhausted` says that none is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty
from random import Random
from typing import Any

from tests.interleavings.client import Client, Rewrite
from tests.interleavings.database import Database
from tests.interleavings.schedule import CLOCK, Answer, State, Step, Trace

PATIENCE_S = 20.0
"""How long a statement may take, and a deadlock stand, before it is a hang."""

ABANDON_S = 20.0
"""How long a client may take to leave."""

LOOK_AFTER_S = 0.0015
"""How long a statement is let run before it is asked for whom it waits."""

Body = Callable[[Client], Any]
Choose = Callable[[Sequence[str]], str]


class Explorer:
    """Runs the schedules of a scenario: a database, and a client for each letter."""

    def __init__(self, database: Database, isolations: Mapping[str, str], rewrite: Rewrite | None = None) -> None:
        self.database = database
        self._arrivals = database.clients.arrivals
        self.clients = database.clients.lend(isolations, rewrite)
        self._by_pid = {client.pid: client for client in self.clients.values()}

    def run(self, bodies: Mapping[str, Body], clock_steps: int, choose: Choose) -> Trace:
        """Run one schedule to its end, and say what happened."""
        database, trace = self.database, Trace()
        database.restore()
        trace.states.append(State(-1, "", 0.0, database.observe()))
        running: dict[str, Step] = {}
        for key, body in bodies.items():
            self.clients[key].start(body)
        for _ in bodies:
            self._arrivals.get(timeout=PATIENCE_S)
        left = clock_steps
        try:
            while True:
                ready = [key for key in bodies if self.clients[key].pending is not None]
                if not ready and not running:
                    break
                key = choose(ready + [CLOCK] * (left > 0 and bool(ready or running)))
                if key == CLOCK:
                    left -= 1
                    step = Step(len(trace.steps), CLOCK, "the clock moves on", database.at_s)
                    trace.steps.append(step)
                    database.step_clock()
                    step.done_s, step.done_after = database.at_s, step.number
                    continue
                client = self.clients[key]
                step = Step(len(trace.steps), key, client.pending or "", database.at_s)
                trace.steps.append(step)
                running[key] = step
                client.go()
                self._settle(trace, running)
                if step.statement == "COMMIT" and step.done_s is not None:
                    trace.states.append(State(step.number, key, database.at_s, database.observe()))
        except Hang as hang:
            trace.failure = str(hang)
            self._abandon(running)
        except BaseException:
            self._abandon(running)
            raise
        trace.ended_s = database.at_s
        for key in bodies:
            client = self.clients[key]
            trace.answers[key] = Answer(client.result, client.error, tuple(client.conflicts), tuple(client.fences))
        return trace

    def _settle(self, trace: Trace, running: dict[str, Step]) -> None:
        """Wait until every client stands, has finished, or waits for one that does."""
        give_up_at = time.monotonic() + PATIENCE_S
        wait_s = LOOK_AFTER_S
        while running:
            try:
                arrived = self._arrivals.get(timeout=wait_s) if wait_s else self._arrivals.get_nowait()
            except Empty:
                if self._all_wait(running):
                    return
                if time.monotonic() > give_up_at:
                    raise Hang(f"{', '.join(running)}: neither done nor waiting for one that can go on") from None
                wait_s = LOOK_AFTER_S / 4
                continue
            wait_s = 0  # those that are left waited before, and most of them still do
            step = running.pop(arrived.key)
            step.done_s, step.done_after = self.database.at_s, trace.steps[-1].number

    def _all_wait(self, running: Mapping[str, Step]) -> bool:
        """Whether all these wait for locks of those that stand; notes for whom."""
        blockers = self.database.blockers([self.clients[key].pid for key in running])
        waits = {
            key: [self._by_pid[pid].key for pid in blockers[self.clients[key].pid] if pid in self._by_pid]
            for key in running
            if self.clients[key].pid in blockers
        }
        for key, whom in waits.items():
            running[key].waited_for = sorted({*running[key].waited_for, *whom})
        return waits.keys() == running.keys() and not _circle(waits) and self._arrivals.empty()

    def _abandon(self, running: Mapping[str, Step]) -> None:
        """Make those leave that have not finished, and wait until they have."""
        left = {key for key, client in self.clients.items() if key in running or client.pending is not None}
        for key in left:
            self.clients[key].abandon()
        while left:
            client = self._arrivals.get(timeout=ABANDON_S)
            if client.finished:
                left.discard(client.key)
            else:  # it came to stand in this very moment
                client.abandon()


class Hang(Exception):
    """A schedule that does not come to an end."""


def _circle(waits: Mapping[str, Sequence[str]]) -> bool:
    """Whether clients wait for each other, so that the server has to refuse one."""
    left = dict(waits)
    while left:
        free = [key for key, whom in left.items() if not any(other in left for other in whom)]
        if not free:
            return True
        for key in free:
            del left[key]
    return False


# --- the tree of schedules ---------------------------------------------------------------------------------------


@dataclass
class Node:
    """A state of the world, and the choices that are left there; None is one that nobody has taken yet."""

    choices: dict[str, Node | None] = field(default_factory=dict)
    seen: frozenset[str] = frozenset()


class Tree:
    """All orders of one scenario: says which is next, and when there is none."""

    def __init__(self, seed: int | None = None) -> None:
        self._root = Node()
        self._random = None if seed is None else Random(seed)
        self._path: list[tuple[Node, str]] = []
        self._node = self._root
        self.exhausted = False
        self.diverged = 0
        """How often a replayed order offered other choices than before: 0, or the server's timing has a say."""

    def choose(self, enabled: Sequence[str]) -> str:
        """Choose among those that can go on, towards an order that was not walked before."""
        node = self._node
        if not node.seen:
            node.seen = frozenset(enabled)
            node.choices = dict.fromkeys(enabled)
        elif node.seen != frozenset(enabled):
            self.diverged += 1
            node.choices = {key: child for key, child in node.choices.items() if key in enabled}
            node.choices |= {key: None for key in enabled if key not in node.seen}
            node.seen |= frozenset(enabled)
        left = list(node.choices)
        if not left:  # only after a divergence
            return enabled[0]
        key = left[0] if self._random is None else self._random.choice(left)
        child = node.choices[key]
        if child is None:
            child = node.choices[key] = Node()
        self._path.append((node, key))
        self._node = child
        return key

    def end(self) -> None:
        """The schedule is over: its last choice is done with, and so is every node without choices."""
        while self._path:
            node, key = self._path.pop()
            node.choices.pop(key, None)
            if node.choices:
                break
        else:
            self.exhausted = True
        self._path.clear()
        self._node = self._root


def walk(
    run: Callable[[Choose], Trace], *, seed: int | None = None, limit: int | None = None
) -> Iterator[tuple[Trace, Tree]]:
    """Walk all orders, or as many as the limit says."""
    tree, count = Tree(seed), 0
    while not tree.exhausted and (limit is None or count < limit):
        trace = run(tree.choose)
        tree.end()
        count += 1
        yield trace, tree


def follow(order: str) -> Choose:
    """Choose as an order says; what it leaves open goes in the order of the clients."""
    letters = iter(order)

    def choose(enabled: Sequence[str]) -> str:
        for key in letters:
            if key in enabled:
                return key
            raise ValueError(f"the schedule says {key!r}, and only {', '.join(enabled)} can go on")
        return enabled[0]

    return choose
