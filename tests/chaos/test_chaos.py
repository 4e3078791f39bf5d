"""A short run on each engine; and a broken product, to show that a run sees what it is there to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import mutants, steps
from tests.chaos.__main__ import main, parsed, plans_of
from tests.chaos.run import FAILOVER, PLAIN, STEPPED, Outcome, Plan, run
from tests.chaos.steps import ServerClock

SECONDS = {"postgresql": 45.0, "sqlite": 12.0}


def told(outcome: Outcome) -> str:
    lines = [str(violation) for violation in outcome.violations[:5]]
    return "\n".join([*lines, f"records: {outcome.kept}", f"run it again: {outcome.plan.command}"])


@pytest.mark.long(45)
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


@pytest.mark.long(17)
def test_no_promise_is_broken_when_a_synchronous_standby_takes_over() -> None:
    faults = ("failover", "kill", "swallow")
    outcome = run(Plan("postgresql", 12.0, seed=3, world=FAILOVER, faults=faults), print)
    assert not outcome.violations, told(outcome)
    assert outcome.faults["failover to the synchronous standby"], outcome.faults
    assert outcome.figures["events"], outcome.figures
    assert outcome.written_after_s is not None


def test_a_long_run_is_one_in_each_world(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def worlds(*arguments: str) -> list[tuple[str, float]]:
        return [(plan.world, plan.seconds) for plan in plans_of(parsed([*arguments, "--seed", "1"]))]

    monkeypatch.setattr(steps, "library", lambda: Path("/there"))
    assert worlds() == [(PLAIN, 45)]
    assert worlds("--minutes", "30") == [(PLAIN, 1200), (FAILOVER, 300), (STEPPED, 300)]
    assert worlds("--minutes", "30", "--world", "failover") == [(FAILOVER, 1800)]
    assert worlds("--minutes", "10", "--engine", "sqlite") == [(PLAIN, 600)]
    monkeypatch.setattr(steps, "library", lambda: None)
    assert worlds("--minutes", "30") == [(PLAIN, 1200), (FAILOVER, 300)]
    assert "there is no libfaketime" in capsys.readouterr().out


def test_the_servers_clock_goes_both_ways_and_is_healed_to_the_furthest(tmp_path: Path) -> None:
    clock = ServerClock(tmp_path / "clock")
    shown = []
    for seconds in (5, -20, 1.5):
        clock.step(seconds)
        shown.append((tmp_path / "clock").read_text())
    clock.heal()
    assert [*shown, (tmp_path / "clock").read_text()] == ["+5.000\n", "-15.000\n", "-13.500\n", "+5.000\n"]


@pytest.mark.long(10)
def test_a_broken_product_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--engine", "sqlite", "--seconds", "8", "--seed", "5", "--mutant", "no-fence", "--faults", "kill,stop"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "3 fenced" in said
    again = "python -m tests.chaos --engine sqlite --seconds 8 --seed 5 --faults kill,stop"
    assert f"{mutants.VARIABLE}=no-fence {again}" in said
