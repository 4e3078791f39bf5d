"""The product is as the model: by Hypothesis, which shrinks, and by a seed, for volume."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model import volume
from tests.model.machine import machine
from tests.model.product import Product, on_postgresql, on_sqlite

STEPS = 20_000
STEPS_ON_POSTGRESQL = 4_000
SEED = 1


def test_no_story_that_hypothesis_finds_tells_the_product_from_the_model(product: Product) -> None:
    run_state_machine_as_test(
        machine(product),
        settings=settings(
            max_examples=40 if product.on_postgresql else 150,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_nor_do_very_many_steps_on_sqlite() -> None:
    with on_sqlite() as product:
        assert volume.run(product, steps=STEPS, seed=SEED).steps == STEPS


def test_nor_do_many_steps_on_postgresql(postgresql_url: str) -> None:
    with on_postgresql(postgresql_url) as product:
        assert volume.run(product, steps=STEPS_ON_POSTGRESQL, seed=SEED).steps == STEPS_ON_POSTGRESQL
