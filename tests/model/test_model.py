"""The product is as the model: by Hypothesis, which shrinks, and by a seed, for volume.

A longer run, or one that repeats a failure: `python -m tests.model --help`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model import volume
from tests.model.machine import machine
from tests.model.product import Product, on_postgresql, on_sqlite
from tests.model.world import World

STEPS = 200_000
SHARES = 8
"""In how many tests, for whatever processes pytest has."""
STEPS_ON_POSTGRESQL = 1_500


@pytest.mark.long(10)
def test_no_story_that_hypothesis_finds_tells_the_product_from_the_model(product: Product) -> None:
    run_state_machine_as_test(
        machine(product),
        settings=settings(
            max_examples=25 if product.on_postgresql else 100,
            stateful_step_count=40,
            deadline=None,
            phases=set(Phase) - {Phase.explain},  # which takes longer than to find and to shrink
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.long(12)
@pytest.mark.parametrize("share", range(SHARES))
def test_nor_do_very_many_steps_on_sqlite(share: int) -> None:
    steps = STEPS // SHARES
    with on_sqlite() as product:
        figures = volume.run(product, steps=steps, seed=1 + share * steps)
    assert figures.steps == steps
    assert figures.grants > steps // 20


@pytest.mark.long(6)
def test_nor_do_many_steps_on_postgresql(postgresql_url: str) -> None:
    with on_postgresql(postgresql_url) as product:
        figures = volume.run(product, steps=STEPS_ON_POSTGRESQL, seed=1)
    assert figures.steps == STEPS_ON_POSTGRESQL
    assert figures.grants > STEPS_ON_POSTGRESQL // 20


def steps(product: Product, seed: int) -> Iterator[tuple[World, str, list[Any]]]:
    """The world after each step of a seed, with the rule's name and what it gave."""
    world, chooser = World(product), volume.Chooser(seed)
    while True:
        rule, arguments = chooser.choose()
        given = world.step(rule.run, arguments)
        if rule.gives is not None:
            chooser.keep(rule.gives, given)
        yield world, rule.name, given


def test_a_seed_tells_the_same_story_each_time(product: Product) -> None:
    first, second = ([step[1:] for step in islice(steps(product, 5), 80)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("table", ["leases", "lease_grants", "lease_checkpoints", "lease_events"])
def test_a_row_that_is_changed_behind_its_back_is_seen(product: Product, table: str) -> None:
    for world, _, _ in steps(product, 3):
        if world.model.checkpoints and any(world.model.events.values()):
            break
    world.compare_all()
    change = {
        "leases": "UPDATE leases SET failures = failures + 1",
        "lease_grants": "UPDATE lease_grants SET owner = owner || '?'",
        "lease_checkpoints": "DELETE FROM lease_checkpoints",
        "lease_events": "UPDATE lease_events SET seq = seq + 1000",
    }[table]
    product.tables.driver.execute(change)
    with pytest.raises(AssertionError, match=rf"{table}|6: the accepted event"):
        world.compare_all()
