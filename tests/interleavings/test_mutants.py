"""The explorer sees: every broken protocol is caught, and by few orders; and each promise by its own mutant."""

from __future__ import annotations

import pytest

from tests.interleavings import promises
from tests.interleavings.database import Database
from tests.interleavings.mutants import MUTANTS, Mutant, Replaced
from tests.interleavings.report import explore
from tests.interleavings.scenarios import BY_NAME

LIMIT = 500
"""Within how many orders a mutant is to be caught; most take fewer than ten, one of them three hundred."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_broken_protocol_is_caught(mutant: Mutant, database: Database) -> None:
    with mutant.breaking(database):
        walked = explore(
            database,
            BY_NAME[mutant.scenario],
            mutant.level,
            seed=1,
            limit=LIMIT,
            rewrite=mutant.rewrite,
            until=mutant.promise,
        )
    if isinstance(mutant.rewrite, Replaced):
        assert mutant.rewrite.count, "the product does not send what this mutant rewrites: it is no mutant any more"
    broken = {violation.promise for finding in walked.findings for violation in finding.violations}
    assert mutant.promise in broken, f"{walked.schedules} orders, and found: {sorted(broken)}"


def test_each_promise_has_a_mutant_that_breaks_it() -> None:
    promised = set(promises.PROMISES)
    assert {mutant.promise for mutant in MUTANTS} == promised
