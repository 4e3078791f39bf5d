"""A fleet in virtual time keeps every promise, whatever happens to its processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta

import pytest

from leases import LeaseHeld, LeaseNotHeld
from tests.fleet.check import Check
from tests.fleet.world import World

CYCLE = 60
"""Rounds: of these in the first 20 everything happens, then nothing does."""


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(getattr(request, "param", 0), streams=2000)
    yield made
    made.close()


def disturb(world: World, check: Check) -> None:
    """Let one thing happen, or nothing."""
    dice = world.random
    awake = [member for member in world.members.values() if world.time.now_s >= member.frozen_until_s]
    member = dice.choice(awake)
    match dice.choices(
        ["crash", "freeze", "join", "drain", "steal", "expire", "pause", "nothing"], [2, 3, 3, 2, 4, 4, 1, 10]
    )[0]:
        case "crash" if len(awake) > 30:
            world.crash(member)
        case "freeze" if len(awake) > 30:
            world.freeze(member, dice.choice([2, 8, 14, 15, 16, 17]))
        case "join" if len(world.members) < 50:
            world.join(weight=1.0)
        case "drain" if len(awake) > 30:
            world.store.drain(member.name)
            world.happened["drain"] += 1
        case "steal":
            to = dice.choice([dice.choice(awake).name, "ghost"])
            operate(world, check, "steal", to=to, ttl=timedelta(seconds=dice.choice([5, 10, 15])))
        case "expire":
            operate(world, check, "expire")
        case "pause":
            stream_id = dice.choice(world.streams)
            world.store.pause(stream_id, actor="operator")
            world.store.resume(stream_id, actor="operator")


def operate(world: World, check: Check, action: str, **options: object) -> None:
    stream_id = world.random.choice(world.streams)
    before = world.store.get(stream_id)
    assert before is not None
    with suppress(LeaseNotHeld, LeaseHeld):
        getattr(world.store, action)(stream_id, actor="operator", **options)
        check.revoked.add((stream_id, before.fencing_token))
        world.happened[action] += 1


@pytest.mark.long(30)
@pytest.mark.parametrize("world", [20261125], indirect=True)
def test_fifty_workers_keep_every_promise_for_a_thousand_rounds(world: World) -> None:
    check = Check(world)
    for _ in range(50):
        world.join()
    for number in range(1020):
        moment = number % CYCLE
        world.loses = 0.02 if moment < 20 else 0.0
        if moment < 20:
            disturb(world, check)
        world.round()
        check()
        if moment == CYCLE - 10:
            check.balanced()
            check.count_grants()
        if moment == CYCLE - 1:
            check.balanced()
            assert check.count_grants() == 0, "leases move though nothing happens"
    check.whole()
    assert world.happened["write"] > 1_500
    for what in ("crash", "freeze", "drain", "steal", "expire", "refused"):
        assert world.happened[what] >= 5, f"{what} hardly happened: {world.happened}"
