"""Balance: workers that each decide alone, from views that may be a round old, settle at once and move little."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import ceil, floor, log2
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from leases import balance
from leases.balance import Peer, View, plan, targets


@dataclass
class Fleet:
    """Workers that share streams by `plan` alone. Every stream has a name, so that its moves can be counted."""

    random: Random
    free: list[int]
    held: dict[str, list[int]] = field(default_factory=dict)
    terms: dict[str, Peer] = field(default_factory=dict)
    """What each worker is, with its count."""
    moves: Counter[int] = field(default_factory=Counter)

    def view(self) -> View:
        count = min(len(self.free), max(balance.ENOUGH, sum(map(len, self.held.values()))))
        peers = [self.terms[name] for name in sorted(self.held)]
        return View(peers, count, counted_all=count == len(self.free))

    def join(self, name: str, weight: float = 1.0, capacity: int | None = None) -> None:
        self.held[name] = []
        self.terms[name] = Peer(name, 0, weight, capacity)

    def leave(self, name: str) -> None:
        """Die: what it held is free when its leases have expired."""
        self.free += self.held.pop(name)

    def drain(self, name: str) -> None:
        self.terms[name] = replace(self.terms[name], draining=True)

    def round(self) -> int:
        """Let every worker act once, in any order, on a view that may be from before all others' deeds of the round.

        Return how many streams went from one hand to another, or from none to one.
        """
        names = sorted(self.held)
        self.random.shuffle(names)
        at_first = self.view()
        deeds = 0
        for name in names:
            fresh = self.random.random() < 0.5
            deeds += self.act(name, self.view() if fresh else at_first)
        return deeds

    def act(self, name: str, view: View) -> int:
        held = self.held[name]
        decided = plan(name, view, held=len(held))
        capacity = self.terms[name].capacity
        for _ in range(decided.shed):
            stream = held.pop()
            self.moves[stream] += 1
            self.free.append(stream)
        taken = min(decided.claim, len(self.free))
        for _ in range(taken):
            held.append(self.free.pop(0) if taken < 100 else self.free.pop())
        if taken:
            assert capacity is None or len(held) <= capacity, "a capacity is never exceeded"
        self.terms[name] = replace(self.terms[name], lease_count=len(held))
        return decided.shed + taken

    def shares(self) -> dict[str, float]:
        """The weighted share of each, by bisection: not by the product's way."""
        takers = {name: terms for name, terms in self.terms.items() if name in self.held and not terms.draining}
        total = len(self.free) + sum(map(len, self.held.values()))

        def poured(level: float) -> dict[str, float]:
            return {
                name: min(level * terms.weight, float("inf") if terms.capacity is None else terms.capacity)
                for name, terms in takers.items()
            }

        low, high = 0.0, total / min((terms.weight for terms in takers.values()), default=1) + 1
        for _ in range(100):
            middle = (low + high) / 2
            if sum(poured(middle).values()) < total:
                low = middle
            else:
                high = middle
        return poured(high)

    def settle(self) -> tuple[int, int]:
        """Go on until nothing moves; return the rounds until then, and the moves from hand to hand."""
        self.moves.clear()
        limit = ceil(log2(max(1, len(self.held)))) + 3
        for number in range(limit + 1):
            if not self.round():
                return number, self.moves.total()
        raise AssertionError(f"{len(self.held)} workers had not settled after {limit} rounds")

    def least_moves(self) -> int:
        """How many streams must leave the hand that they are in, if the odd ones stay where they are."""
        shares = self.shares()
        total = len(self.free) + sum(map(len, self.held.values()))
        whole = {name: floor(shares.get(name, 0) + 1e-6) for name in self.held}
        above = [len(held) - whole[name] for name, held in self.held.items() if len(held) > whole[name]]
        odd = round(min(total, sum(shares.values()))) - sum(whole.values())
        takers = sum(name in shares and len(self.held[name]) > whole[name] for name in self.held)
        return sum(above) - min(odd, takers)

    def check(self) -> None:
        shares = self.shares()
        for name, held in self.held.items():
            assert abs(len(held) - shares.get(name, 0)) <= 1 + 1e-6, f"{name} holds {len(held)} of {shares.get(name)}"
        room = any(
            terms.capacity is None or len(self.held[name]) < terms.capacity
            for name, terms in self.terms.items()
            if name in self.held and not terms.draining
        )
        assert not (self.free and room), "a stream that somebody has room for starves"
        assert all(count == 1 for count in self.moves.values()), "a stream moves twice in one rebalance"


def check_settles(fleet: Fleet) -> None:
    least = fleet.least_moves()
    _, moves = fleet.settle()
    fleet.check()
    assert moves <= 1.5 * least, f"{moves} moves, where {least} are enough"


weights = st.sampled_from([0.1, 0.5, 1.0, 1.0, 1.0, 2.0, 3.0, 10.0])
capacities = st.one_of(st.none(), st.none(), st.integers(0, 60))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    streams=st.integers(0, 400),
    fleet=st.lists(st.tuples(weights, capacities), min_size=1, max_size=25),
    changes=st.lists(st.sampled_from(["join", "leave", "drain", "register"]), max_size=6),
)
def test_a_fleet_settles_whatever_joins_leaves_and_drains(
    seed: int, streams: int, fleet: list[tuple[float, int | None]], changes: list[str]
) -> None:
    random = Random(seed)
    group = Fleet(random, list(range(streams)))
    for number, (weight, capacity) in enumerate(fleet):
        group.join(f"w{number}", weight, capacity)
    check_settles(group)
    for number, change in enumerate(changes):
        active = [name for name in group.held if not group.terms[name].draining]
        if change == "join":
            for each in range(random.randint(1, 5)):
                group.join(f"late{number}-{each}", random.choice([0.5, 1.0, 2.0]))
        elif change == "register":
            group.free += range(10_000 * (number + 1), 10_000 * (number + 1) + random.randint(0, 200))
        elif len(active) > 1:
            (group.leave if change == "leave" else group.drain)(random.choice(active))
        check_settles(group)


@pytest.mark.long(10)
@settings(max_examples=1, deadline=None)
@given(seed=st.integers(0, 2**32), workers=st.integers(200, 1000), streams=st.integers(0, 100_000))
@example(seed=1, workers=1000, streams=100_000)
@example(seed=2, workers=1000, streams=999)
def test_a_great_fleet_settles_too(seed: int, workers: int, streams: int) -> None:
    random = Random(seed)
    fleet = Fleet(random, list(range(streams)))
    for number in range(workers // 2):
        fleet.join(f"w{number}", random.choice([1.0, 1.0, 2.0]))
    check_settles(fleet)
    for number in range(workers // 2, workers):
        fleet.join(f"w{number}", random.choice([1.0, 1.0, 2.0]), random.choice([None, 150]))
    for name in random.sample(sorted(fleet.held), workers // 50):
        fleet.leave(name)
    check_settles(fleet)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_few_workers_take_many_streams_though_they_count_only_some(workers: int) -> None:
    fleet = Fleet(Random(workers), list(range(100_000)))
    for number in range(workers):
        fleet.join(f"w{number}")
    check_settles(fleet)


@given(
    peers=st.lists(st.tuples(st.integers(0, 1000), weights, capacities, st.booleans()), min_size=1, max_size=40),
    available=st.integers(0, 10_000),
)
def test_targets_add_up_to_all_that_there_is(peers: list[tuple[int, float, int | None, bool]], available: int) -> None:
    workers = [Peer(f"w{n}", *values) for n, values in enumerate(peers)]
    view = View(workers, available)
    found = targets(view)
    room = sum(view.total if peer.capacity is None else peer.capacity for peer in workers if not peer.draining)
    assert sum(found.values()) == min(view.total, room)
    for peer in workers:
        assert 0 <= found[peer.worker_id] <= (0 if peer.draining else view.total)
        assert peer.capacity is None or found[peer.worker_id] <= peer.capacity


def test_what_is_on_its_way_out_already_is_not_shed_again() -> None:
    view = View([Peer("a", 10), Peer("b", 0)], 0)
    assert plan("a", view, held=10).shed == 5
    assert plan("a", view, held=10, leaving=3).shed == 2
    assert plan("a", view, held=10, leaving=5).shed == 0


def test_nobody_sheds_while_more_is_free_than_was_counted() -> None:
    view = View([Peer("a", 100), Peer("b", 0)], 10, counted_all=False)
    assert plan("a", view, held=100).shed == 0
    assert plan("b", view, held=0).claim == 10


def test_a_capacity_that_was_exceeded_is_restored_all_the_same() -> None:
    view = View([Peer("a", 12, capacity=10), Peer("b", 0)], 100, counted_all=False)
    assert plan("a", view, held=12).shed == 2


def test_a_worker_that_drains_sheds_everything_and_claims_nothing() -> None:
    view = View([Peer("a", 12, draining=True), Peer("b", 0)], 100, counted_all=False)
    assert plan("a", view, held=12) == balance.Plan(claim=0, shed=12, target=0)


def test_a_worker_whose_row_is_gone_does_nothing() -> None:
    assert plan("me", View([Peer("b", 0)], 100), held=3) == balance.Plan(claim=0, shed=0, target=3)
