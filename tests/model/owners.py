"""The rules of time, and of what owners do: acquire, claim, renew, release, and write under the fence.

Grants are used long after they ended, and so are forged ones; attempts are repeated, soon or late.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from leases import fence, fleet, operations
from leases.events import append as append_on
from leases.model import Appended, Event, Lease
from tests.model.kinds import (
    BACKOFF,
    BATCH,
    BATCHED,
    CHECKPOINT,
    ERROR,
    GRANT,
    LIMIT,
    LOST,
    OWNER,
    POOL,
    POSITION,
    STREAM,
    TTL,
    Attempt,
    Choice,
    Kept,
    rule,
    seconds,
)
from tests.model.world import World

# --- time ------------------------------------------------------------------------------------------------------


@rule(40, by=Choice(seconds(0.001, 0.5, 1, 1, 2.5, 5)))
def time_passes(world: World, by: timedelta) -> None:
    world.move_clock(by)


@rule(25, stream=STREAM, by=Choice(seconds(-2.5, -0.001, 0, 0.001)))
def time_passes_to_an_expiry(world: World, stream: str, by: timedelta) -> None:
    """To the moment of it, or to just before or after it."""
    row = world.product.tables.lease(stream)
    if row is not None and row[3] is not None:
        ahead = row[3] + by - world.model.now
        if timedelta(0) < ahead <= timedelta(hours=25):
            world.move_clock(ahead)


@rule(8, by=Choice(seconds(-0.5, -60, *(-26 * 3600,) * 2)))
def the_clock_is_set_back(world: World, by: timedelta) -> None:
    world.move_clock(by)


# --- to acquire and to claim -----------------------------------------------------------------------------------


def _acquire(
    world: World, stream: str, owner: str, ttl: timedelta, pool: str, claim_id: UUID, lost: int = 0
) -> Lease | None:
    world.touch(stream)
    given: Any = {"owner": owner, "ttl": ttl, "pool": pool, "claim_id": claim_id}
    return world.both(
        lambda: world.store.acquire(stream, **given),
        lambda _: world.told(lambda: world.model.acquire(stream, **given), 1, lost),
        lost=lost,
    )


def _claim(
    world: World,
    owner: str,
    ttl: timedelta,
    limit: int,
    pool: str,
    claim_id: UUID,
    repeated: bool = True,
    lost: int = 0,
) -> list[Lease] | None:
    given: Any = {"owner": owner, "ttl": ttl, "limit": limit, "pool": pool, "claim_id": claim_id}
    tries = iter((repeated, True))

    def of_product() -> list[Lease]:
        if repeated or lost:  # the recipe, which says from the second try on that it has asked before
            return world.store.claim(**given)
        return world.store.run(lambda connection: operations.claim(connection, **given))

    def of_model(answer: list[Lease]) -> list[Lease]:
        chosen = [lease.stream_id for lease in answer]
        return world.told(lambda: world.model.claim(**given, repeated=next(tries), chosen=chosen), 1, lost)

    return world.both(of_product, of_model, lost=lost)


@rule(90, gives="grants", stream=STREAM, owner=OWNER, ttl=TTL, pool=POOL, lost=LOST)
def acquire(world: World, **given: Any) -> Lease | None:
    return _acquire(world, **given, claim_id=world.fresh())


@rule(50, gives="grants", owner=OWNER, ttl=TTL, limit=LIMIT, pool=POOL, lost=LOST)
def claim(world: World, **given: Any) -> list[Lease] | None:
    return _claim(world, **given, claim_id=world.fresh(), repeated=False)


@rule(25, gives="attempts", stream=STREAM, owner=OWNER, ttl=TTL, pool=POOL)
def acquire_in_vain(world: World, **given: Any) -> Attempt:
    """It is committed, and nobody learns the answer."""
    arguments = {**given, "claim_id": world.fresh()}
    _acquire(world, **arguments)
    return Attempt(_acquire, arguments)


@rule(15, gives="attempts", owner=OWNER, ttl=TTL, limit=LIMIT, pool=POOL)
def claim_in_vain(world: World, **given: Any) -> Attempt:
    arguments = {**given, "claim_id": world.fresh()}
    _claim(world, **arguments, repeated=False)
    return Attempt(_claim, arguments)


@rule(50, gives="grants", attempt=Kept("attempts"))
def ask_again(world: World, attempt: Attempt) -> Any:
    """Soon, late, or after somebody else was granted the stream."""
    return attempt.of(world, **attempt.arguments)


@rule(8, gives="grants", grant=GRANT, how=Choice(("token - 1", "token + 1", "token + 1000000", "owner", "stream")))
def forge(world: World, grant: Lease, how: str) -> Lease:
    """A grant that nobody was granted, or somebody else."""
    if how == "owner":
        return replace(grant, owner="two" if grant.owner == "one" else "one")
    if how == "stream":
        return replace(grant, stream_id="b" if grant.stream_id == "a" else "a")
    return replace(grant, fencing_token=max(0, grant.fencing_token + int(how[6:].replace(" ", ""))))


# --- to hold and to let go ---------------------------------------------------------------------------------------


@rule(110, grants=BATCHED, ttl=TTL, lost=LOST)
def renew(world: World, grants: list[Lease], ttl: timedelta, lost: int) -> None:
    """A heartbeat is of one owner."""
    owner = grants[0].owner
    batch = [grant for grant in grants if grant.owner == owner]
    world.touch(*(grant.stream_id for grant in batch))
    world.both(
        lambda: world.store.renew(batch, owner=owner, ttl=ttl, held=len(batch)),
        lambda _: world.told(lambda: world.model.renew(batch, owner=owner, ttl=ttl, held=len(batch)), 1, lost),
        lost=lost,
    )


@rule(80, grant=GRANT, checkpoint=CHECKPOINT, backoff=BACKOFF, error=ERROR, lost=LOST)
def release(world: World, grant: Lease, checkpoint: Any, backoff: timedelta, error: str | None, lost: int) -> None:
    given: Any = {"checkpoint": checkpoint, "backoff": backoff, "error": error}
    world.touch(grant.stream_id)
    ask = world.both if checkpoint is None else lambda *calls, lost: world.fenced([grant], *calls, lost=lost)
    ask(
        lambda: world.store.release(grant, **given),
        lambda _: world.told(lambda: world.model.release(grant, **given), 1, lost),
        lost=lost,
    )


@rule(12, owner=OWNER)
def let_go_expired(world: World, owner: str) -> None:
    world.touch(*world.model.streams)
    world.both(
        lambda: world.store.run(lambda connection: fleet.let_go_expired(connection, owner=owner)),
        lambda _: world.model.let_go_expired(owner),
    )


# --- fenced writes -----------------------------------------------------------------------------------------------


@rule(50, grant=GRANT, position=POSITION, lost=LOST)
def write_checkpoint(world: World, grant: Lease, position: Any, lost: int) -> None:
    world.fenced(
        [grant],
        lambda: world.store.write_checkpoint(grant, position),
        lambda _: world.told(lambda: world.model.write_checkpoint(grant, position), 1, lost),
        lost=lost,
    )


def _events(world: World, stream_id: str, batch: tuple[int, ...]) -> list[tuple[str, Any]]:
    """Each with a payload of its own, so that a second one of its name would show."""
    log = world.model.events.get(stream_id)
    following = (log[-1].seq if log else 0) + 1
    return [(f"e{max(1, following + distance)}", [world.steps, place]) for place, distance in enumerate(batch)]


def _accepted(world: World, grant: Lease, events: list[tuple[str, Any]]) -> None:
    """The product has accepted these events: those that are new are in its log from now on."""
    rows = {row[2]: row for row in world.product.tables.of(grant.stream_id)["lease_events"]}
    for event_id, payload in events:
        if (grant.stream_id, event_id) not in world.witness.accepted:
            row = rows.get(event_id)
            assert row is not None, f"6: {event_id} of {grant.stream_id} was accepted, and is not in the log"
            world.witness.accepted_event(grant.stream_id, event_id, row[1], row[4], payload)
            world.accepted += 1


@rule(110, grant=GRANT, batch=BATCH, checkpoint=CHECKPOINT, lost=LOST)
def append(world: World, grant: Lease, batch: tuple[int, ...], checkpoint: Any, lost: int) -> None:
    events = _events(world, grant.stream_id, batch)
    offered = [Event(*event) for event in events]
    answer = world.fenced(
        [grant],
        lambda: world.store.log.append(grant, offered, checkpoint=checkpoint),
        lambda _: world.told(lambda: world.model.append(grant, events, checkpoint=checkpoint), 1, lost),
        lost=lost,
    )
    if answer is not None:
        _accepted(world, grant, events)


@rule(20, grants=BATCHED)
def append_to_several(world: World, grants: list[Lease]) -> None:
    """One transaction under several fences: all that it writes is kept, or nothing."""
    batches = [(grant, _events(world, grant.stream_id, (0,))) for grant in {g.stream_id: g for g in grants}.values()]

    def of_product() -> list[Appended]:
        return world.store.run(
            lambda connection: [append_on(connection, grant, dict(events)) for grant, events in batches]
        )

    def of_model(_: Any) -> list[Appended]:
        for grant, _ in batches:
            world.model.fence(grant)
        return [world.model.append(grant, events, checkpoint=None) for grant, events in batches]

    answers = world.fenced([grant for grant, _ in batches], of_product, of_model)
    for grant, events in batches if answers is not None else []:
        _accepted(world, grant, events)


class Regret(Exception):
    """A caller's own reason to roll back."""


@rule(12, grants=BATCHED)
def fence_and_think_better_of_it(world: World, grants: list[Lease]) -> None:
    """A fenced transaction that is rolled back leaves no trace, and holds nobody up."""

    def regretted(connection: Connection) -> None:
        for grant in grants:
            fence(connection, grant)
        raise Regret

    def of_product() -> str:
        with suppress(Regret):
            world.store.run(regretted)
        return "passed"

    def of_model(_: Any) -> str:
        for grant in grants:
            world.model.fence(grant)
        return "passed"

    world.fenced(grants, of_product, of_model)
