"""A short run on each engine; and a broken product, to show that a run sees what it is there to see."""

from __future__ import annotations

import pytest

from tests.chaos import mutants
from tests.chaos.__main__ import main
from tests.chaos.run import Outcome, Plan, run

SECONDS = {"postgresql": 45.0, "sqlite": 20.0}


def told(outcome: Outcome) -> str:
    lines = [str(violation) for violation in outcome.violations[:5]]
    return "\n".join([*lines, f"records: {outcome.kept}", f"run it again: {outcome.plan.command}"])


@pytest.mark.parametrize("engine", SECONDS)
def test_no_promise_is_broken(engine: str) -> None:
    outcome = run(Plan(engine, SECONDS[engine], seed=1, workers=6 if engine == "sqlite" else 5), print)
    assert not outcome.violations, told(outcome)
    # … and something was there to be broken.
    assert outcome.faults["SIGKILL"], outcome.faults
    assert outcome.faults["SIGSTOP past the TTL"], outcome.faults
    for what in ("grants", "takeovers of an expired lease", "events", "answered ok", "answered refused"):
        assert outcome.figures[what], outcome.figures
    assert outcome.owned_after_s is not None
    assert outcome.written_after_s is not None
    if engine == "postgresql":
        assert outcome.faults["server crashed (pg_ctl -m immediate)"], outcome.faults
        assert outcome.figures["answers of COMMIT swallowed"], outcome.figures


def test_a_broken_product_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--engine", "sqlite", "--seconds", "8", "--seed", "5", "--mutant", "no-fence", "--faults", "kill,stop"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "3 fenced" in said
    again = "python -m tests.chaos --engine sqlite --seconds 8 --seed 5 --faults kill,stop"
    assert f"{mutants.VARIABLE}=no-fence {again}" in said
