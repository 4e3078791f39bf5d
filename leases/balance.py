"""Who should hold how many streams: pure arithmetic, no clock, no I/O, no names of streams.

Every worker of a pool looks at the same table, and decides for itself alone how many streams to claim, or to shed. No
coordinator, and no message between them: what one sheds is free, and who has too few claims it.

    T        all streams of the pool that somebody can have: what the live workers hold, and what is available
    share    a worker's part of T, by its weight; no more than its capacity, the rest goes to the others
    target   the share rounded down; the streams left over by that go, one each, to those that hold more already

From T both follow: who holds less than its target claims, who holds more sheds. Only what is free is ever claimed,
never a live lease of a peer; and only what is above a target is shed, so that each stream moves once, and as few as
possible.

One who is to have a stream may not come for it: it has just died, or stands still, and its row is live for a while yet.
So what has been free for longer than a poll (*overdue*) is anybody's, each taking its part of it beyond the target.

Two things make it settle at once, and then stand still. A view is of *one moment*: a worker's count is written by the
transaction that changes it (`fleet.report`), so that a stream on its way from one worker to the next is in T once, be
the view fresh or old. And the rule is the same for all: from the same view, the targets of all workers add up to T.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, fsum

ENOUGH = 50_000
"""So many available streams are counted at least, where somebody could take them: see `View.counted_all`."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A live worker, as its row tells: `lease_count` is what it holds, what it is about to let go among it."""

    worker_id: str
    lease_count: int = 0
    weight: float = 1.0
    capacity: int | None = None
    draining: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """A pool at one moment: its live workers, and how many streams anybody could claim, some of them for too long.

    Available streams are counted no further than is worth it; then `counted_all` is False, and there are more.
    """

    workers: Sequence[Peer]
    available: int
    overdue: int = 0
    counted_all: bool = True

    @property
    def total(self) -> int:
        """The streams that are shared, as far as they were counted."""
        return self.available + sum(peer.lease_count for peer in self.workers)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one worker is to do: claim so many, or begin to shed so many; `target` is what it should hold."""

    claim: int
    shed: int
    target: int


def plan(me: str, view: View, *, held: int, leaving: int = 0) -> Plan:
    """Decide what worker `me` does, that holds `held` streams of which it is already about to let go `leaving`.

    A worker that is not in the view (its row is missing, or has expired) does nothing: it is not alive to the others.
    While there is more available than was counted nobody sheds for the sake of balance: who has too few can claim.
    """
    own = next((peer for peer in view.workers if peer.worker_id == me), None)
    if own is None:
        return Plan(0, 0, held)
    target = targets(view)[me]
    keep = target
    if not (view.counted_all or own.draining):
        keep = held if own.capacity is None else own.capacity
    wanted = max(target - held, min(_part(view, own), room(own, held)))
    return Plan(
        claim=max(0, min(wanted, view.available)),
        shed=max(0, held - leaving - keep),
        target=target,
    )


def _part(view: View, own: Peer) -> int:
    """One worker's part of what nobody has come for."""
    if own.draining or not view.overdue:
        return 0
    return ceil(view.overdue * own.weight / fsum(peer.weight for peer in view.workers if not peer.draining))


def room(own: Peer, held: int) -> int:
    """How many more streams a worker can take."""
    return sys.maxsize if own.capacity is None else own.capacity - held


def targets(view: View) -> Mapping[str, int]:
    """How many streams each worker should hold; together all that there are, unless capacities are too small."""
    open_to_more = [peer for peer in view.workers if not peer.draining]
    result = {peer.worker_id: 0 for peer in view.workers}
    total = view.total
    weight = fsum(peer.weight for peer in open_to_more)
    # Those whose share is beyond their capacity hold just that; first who reaches it first as the level rises.
    bounded = sorted(
        (peer for peer in open_to_more if peer.capacity is not None),
        key=lambda peer: ((peer.capacity or 0) / peer.weight, peer.worker_id),
    )
    full = set()
    for peer in bounded:
        capacity = peer.capacity or 0
        if capacity * weight > total * peer.weight:
            break
        result[peer.worker_id] = capacity
        total -= capacity
        weight -= peer.weight
        full.add(peer.worker_id)
    open_to_more = [peer for peer in open_to_more if peer.worker_id not in full]
    if not open_to_more:
        return result
    weight = fsum(peer.weight for peer in open_to_more)  # exact again: a sum that was counted down is not
    left_over = total
    rest: list[tuple[bool, float, str]] = []
    for peer in open_to_more:
        share = total * peer.weight / weight
        whole = floor(share)
        result[peer.worker_id] = whole
        left_over -= whole
        if peer.capacity is None or whole < peer.capacity:
            rest.append((peer.lease_count <= whole, whole - share, peer.worker_id))
    rest.sort()
    for _, _, worker_id in rest[:left_over]:
        result[worker_id] += 1
    return result
