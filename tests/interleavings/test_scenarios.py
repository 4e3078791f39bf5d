"""No order of statements breaks a promise: a fair sample of every scenario's orders, or all of them where they are few.

`python -m tests.interleavings --all` walks them all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.interleavings.database import Database
from tests.interleavings.report import Walked, explore
from tests.interleavings.scenarios import SCENARIOS, Scenario

SAMPLE = 65
"""How many orders of a scenario are walked at each level, at the most."""

SEED = 20
"""Which: the same ones in each run, so that a failure repeats."""

AT_LEAST = 5000
"""How many orders are walked in all."""

CASES = [(scenario, level) for scenario in SCENARIOS for level in scenario.levels]

Walk = Callable[[Scenario, str], Walked]


@pytest.fixture(scope="module")
def walk(database: Database) -> Walk:
    """Walks a scenario once, whoever asks."""
    done: dict[tuple[str, str], Walked] = {}

    def walk(scenario: Scenario, level: str) -> Walked:
        key = (scenario.name, level)
        if key not in done:
            done[key] = explore(database, scenario, level, seed=SEED, limit=SAMPLE)
        return done[key]

    return walk


@pytest.mark.parametrize(("scenario", "level"), CASES, ids=[f"{case[0].name}-{case[1]}" for case in CASES])
def test_no_order_of_statements_breaks_a_promise(scenario: Scenario, level: str, walk: Walk) -> None:
    walked = walk(scenario, level)
    assert not walked.findings, "\n\n".join(str(finding) for finding in walked.findings)
    assert walked.exhausted or walked.schedules == SAMPLE
    assert walked.diverged == 0, "a replay met other choices than before: the server's timing had a say"


def test_enough_orders_are_walked(walk: Walk) -> None:
    total = sum(walk(scenario, level).schedules for scenario, level in CASES)
    assert total >= AT_LEAST, f"{total} orders in all"
