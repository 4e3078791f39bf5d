"""The command repeats what a violation printed."""

from __future__ import annotations

import io
import shlex

import pytest
from rich.console import Console

from tests.interleavings.__main__ import parsed, run_mutants, run_one, walk_all
from tests.interleavings.database import Database
from tests.interleavings.mutants import MUTANTS
from tests.interleavings.report import explore
from tests.interleavings.scenarios import BY_NAME


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200, soft_wrap=True)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", ["fence: no lock", "renew: a plain UPDATE", "fence: no lock (snapshot)"])
def test_a_violation_is_repeated_by_the_command_that_it_prints(name: str, database: Database, console: Console) -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    scenario = BY_NAME[mutant.scenario]
    walked = explore(database, scenario, mutant.level, seed=1, limit=150, rewrite=mutant.rewrite, until=mutant.promise)
    found = walked.findings[-1]
    words = shlex.split(found.command)
    assert words[:3] == ["python", "-m", "tests.interleavings"]
    assert run_one(database, parsed([*words[3:], "--mutant", name]), console) == 1
    assert all(violation.what in said(console) for violation in found.violations)
    assert found.command in said(console), "the same order, shown again"


def test_an_order_that_breaks_nothing_is_shown(database: Database, console: Console) -> None:
    assert run_one(database, parsed(["--scenario", "write-takeover", "--schedule", "WWWTTT"]), console) == 0
    assert "COMMIT" in said(console)


def test_an_order_that_cannot_be_is_refused(database: Database, console: Console) -> None:
    assert run_one(database, parsed(["--scenario", "write-takeover", "--schedule", "WWWW"]), console) == 2
    assert "only T, * can go on" in said(console)


def test_the_table_counts_the_orders_and_the_violations(database: Database, console: Console) -> None:
    assert walk_all(database, parsed(["--scenario", "late-release-reacquire", "--all"]), console) == 0
    line = next(line for line in said(console).splitlines() if "late-release" in line)
    assert [cell.strip() for cell in line.split("│")][3:5] == ["55", "all"]


def test_the_table_of_mutants_says_what_caught_each(database: Database, console: Console) -> None:
    assert run_mutants(database, parsed(["--mutant", "release: by owner only"]), console) == 0
    assert "named" in said(console)
