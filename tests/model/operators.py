"""The rules of what operators do, of the list of workers, and of what only looks."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from leases import administration
from leases.model import Lease, Membership, Observed
from tests.model.kinds import (
    ACTOR,
    LOST,
    LOST_IN_TWO,
    NAMED,
    OWNER,
    POOL,
    POSITION,
    REASON,
    STREAM,
    STREAMS,
    TTL,
    Attempt,
    Choice,
    Kept,
    rule,
    seconds,
)
from tests.model.world import World

# --- operators: to end and to move -------------------------------------------------------------------------------


def _token(world: World, stream: str, named: int | None) -> int | None:
    current = world.model.streams.get(stream)
    return None if named is None or current is None else max(0, current.token + named)


def _end_now(world: World, stream: str, token: int | None, for_steal: bool) -> Observed:
    return world.model.end_now(stream, fencing_token=token, for_steal=for_steal)


def _first_step(world: World, stream: str, token: int | None, for_steal: bool, lost: int) -> Observed:
    """The first step within a steal or an expire. Asked again, it knows that the lease was live when it ended it."""
    ended = set()

    def attempt() -> Observed:
        observed = _end_now(world, stream, token, for_steal)
        if observed.live:
            ended.add(observed.fencing_token)
        return replace(observed, live=observed.fencing_token in ended)

    return world.told(attempt, 1, lost)


@rule(10, stream=STREAM, actor=ACTOR, reason=REASON, named=NAMED, lost=LOST_IN_TWO)
def expire(world: World, stream: str, actor: str, reason: str | None, named: int | None, lost: int) -> None:
    world.touch(stream)
    token = _token(world, stream, named)
    said: Any = {"actor": actor, "reason": reason}

    def of_model(_: Any) -> int:
        observed = _first_step(world, stream, token, False, lost)
        return world.told(lambda: world.model.revoke(observed, **said), 2, lost)

    world.both(lambda: world.store.expire(stream, fencing_token=token, **said), of_model, lost=lost)


@rule(12, gives="grants", stream=STREAM, to=OWNER, ttl=TTL, actor=ACTOR, reason=REASON, named=NAMED, lost=LOST_IN_TWO)
def steal(
    world: World, stream: str, to: str, ttl: timedelta, actor: str, reason: str | None, named: int | None, lost: int
) -> Lease | None:
    world.touch(stream)
    token = _token(world, stream, named)
    said: Any = {"to": to, "ttl": ttl, "actor": actor, "reason": reason}

    def of_model(_: Any) -> Lease:
        observed = _first_step(world, stream, token, True, lost)
        row = world.product.tables.lease(stream)
        claim_id = row[6] if row is not None and row[6] is not None else world.fresh()  # nobody but the row was told
        return world.told(lambda: world.model.hand_over(observed, **said, claim_id=claim_id), 2, lost)

    return world.both(lambda: world.store.steal(stream, fencing_token=token, **said), of_model, lost=lost)


@rule(8, gives="observed", stream=STREAM, named=NAMED, for_steal=Choice((False, True)))
def end_now(world: World, stream: str, named: int | None, for_steal: bool) -> Observed | None:
    """An operator's first step. The operator may die here, or go on later."""
    world.touch(stream)
    token = _token(world, stream, named)
    return world.both(
        lambda: world.store.run(
            lambda connection: administration.end_now(
                connection, stream, fencing_token=token, must_be_held=not for_steal, must_be_open=for_steal
            )
        ),
        lambda _: _end_now(world, stream, token, for_steal),
    )


@rule(8, observed=Kept("observed"), actor=ACTOR)
def revoke(world: World, observed: Observed, actor: str) -> None:
    """The second step of an expire, also if it was done before."""
    world.touch(observed.stream_id)
    world.both(
        lambda: world.store.run(lambda connection: administration.revoke(connection, observed, actor=actor)),
        lambda _: world.model.revoke(observed, actor=actor, reason=None),
    )


def _hand_over(world: World, observed: Observed, to: str, ttl: timedelta, actor: str, claim_id: UUID) -> Lease | None:
    world.touch(observed.stream_id)
    said: Any = {"to": to, "ttl": ttl, "actor": actor, "reason": None, "claim_id": claim_id}
    return world.both(
        lambda: world.store.run(lambda connection: administration.hand_over(connection, observed, **said)),
        lambda _: world.model.hand_over(observed, **said),
    )


@rule(4, gives="grants", observed=Kept("observed"), to=OWNER, ttl=TTL, actor=ACTOR)
def hand_over(world: World, **given: Any) -> Lease | None:
    """The second step of a steal."""
    return _hand_over(world, **given, claim_id=world.fresh())


@rule(4, gives="attempts", observed=Kept("observed"), to=OWNER, ttl=TTL, actor=ACTOR)
def hand_over_in_vain(world: World, **given: Any) -> Attempt:
    arguments = {**given, "claim_id": world.fresh()}
    _hand_over(world, **arguments)
    return Attempt(_hand_over, arguments)


# --- operators: streams ------------------------------------------------------------------------------------------


@rule(20, streams=STREAMS, pool=POOL, lost=LOST)
def register(world: World, streams: tuple[str, ...], pool: str, lost: int) -> None:
    world.touch(*streams)
    world.both(
        lambda: world.store.register(list(streams), pool=pool),
        lambda _: world.told(lambda: world.model.register(list(streams), pool=pool), 1, lost),
        lost=lost,
    )


@rule(3, streams=STREAMS, actor=Choice((None, "op")), reason=REASON)
def retire(world: World, streams: tuple[str, ...], actor: str | None, reason: str | None) -> None:
    world.touch(*streams)
    world.both(
        lambda: world.store.retire(list(streams), actor=actor, reason=reason),
        lambda _: world.model.retire(list(streams), actor=actor, reason=reason),
    )


@rule(5, stream=STREAM, actor=ACTOR, reason=REASON)
def pause(world: World, stream: str, **said: Any) -> None:
    world.touch(stream)
    world.both(lambda: world.store.pause(stream, **said), lambda _: world.model.pause(stream, **said))


@rule(20, stream=STREAM, actor=ACTOR, reason=REASON)
def resume(world: World, stream: str, **said: Any) -> None:
    world.touch(stream)
    world.both(lambda: world.store.resume(stream, **said), lambda _: world.model.resume(stream, **said))


@rule(8, stream=STREAM, position=POSITION, actor=ACTOR, reason=REASON)
def reset_checkpoint(world: World, stream: str, position: Any, **said: Any) -> None:
    world.touch(stream)
    world.both(
        lambda: world.store.reset_checkpoint(stream, position, **said),
        lambda _: world.model.reset_checkpoint(stream, position, **said),
    )


@rule(2, by=Choice((1, 5, 1_000_000)), actor=ACTOR, reason=REASON)
def raise_tokens(world: World, **given: Any) -> None:
    world.touch(*world.model.streams)
    world.both(lambda: world.store.raise_tokens(**given), lambda _: world.model.raise_tokens(**given))


@rule(6, age=Choice(seconds(0, 30, 120, -1)))
def prune(world: World, age: timedelta) -> None:
    before = world.model.now - age
    world.both(lambda: world.store.prune(before=before), lambda _: world.model.prune(before=before))
    world.witness.pruned(before, world.product.tables.everything())
    world.compare_all()


# --- workers -----------------------------------------------------------------------------------------------------


@rule(12, owner=OWNER, pool=Choice((None, "default")), capacity=Choice((None, 4)), ttl=TTL, lost=LOST)
def enlist(world: World, owner: str, pool: str | None, capacity: int | None, ttl: timedelta, lost: int) -> None:
    worker = Membership(owner, "host", 7, "1", pool=pool, capacity=capacity, weight=0.5)
    world.both(
        lambda: world.store.enlist(worker, ttl=ttl),
        lambda _: world.told(lambda: world.model.enlist(worker, ttl=ttl), 1, lost),
        lost=lost,
    )


@rule(10, owner=OWNER)
def dismiss(world: World, owner: str) -> None:
    world.both(lambda: world.store.dismiss(owner), lambda _: world.model.dismiss(owner))


# --- to look -----------------------------------------------------------------------------------------------------


@rule(12, stream=STREAM)
def look_at_a_stream(world: World, stream: str) -> None:
    store, model = world.store, world.model
    world.both(lambda: store.get(stream), lambda _: model.get(stream))
    world.both(lambda: store.checkpoint(stream), lambda _: model.checkpoint(stream))
    world.both(lambda: store.grants(stream, limit=1000), lambda _: model.history(stream))
    world.both(lambda: store.log.read(stream, after_seq=2), lambda _: model.read(stream, after_seq=2))


@rule(8, owner=Choice((None, "one", "two")), pool=Choice((None, "default")))
def look_around(world: World, **chosen: Any) -> None:
    world.both(lambda: world.store.list(**chosen), lambda _: world.model.list_leases(**chosen))
    world.both(lambda: world.store.workers(), lambda _: world.model.fleet())
