"""The mechanism works: every mutant fits the product as it is, is really applied, and is applied to nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import layers
from tests.mutants.loader import environment
from tests.mutants.mutant import ROOT, DoesNotFit, Edit, Mutant
from tests.mutants.registry import MUTANTS, UnknownMutant, find

LATE_RELEASE = """
from datetime import timedelta
from leases import LeaseStore
store, ttl = LeaseStore("sqlite://"), timedelta(seconds=15)
store.migrate()
earlier = store.acquire("a", owner="one", ttl=ttl)
store.release(earlier)
store.acquire("a", owner="one", ttl=ttl)
print(store.release(earlier))
"""

OFF_THE_LIST = """
import sqlalchemy
from leases import LeaseStore
store = LeaseStore("sqlite://")
store.migrate()
names = store.run(lambda c: {found["name"] for found in sqlalchemy.inspect(c).get_unique_constraints("leases")})
print("leases_fence" in names)
"""


def said(program: str, mutant: Mutant | None, applied: Path) -> str:
    """What a program prints, under a mutant or without."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=None if mutant is None else environment(mutant, applied),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_fits_the_product_as_it_is(mutant: Mutant) -> None:
    mutant.check()
    assert all(mutant.apply(file, file.read_text()) != file.read_text() for file in mutant.files)
    assert mutant.layers
    for layer in mutant.layers:
        for word in layers.command(layer):
            assert not word.startswith("tests/") or (ROOT / word).exists(), word


def test_there_are_enough_and_no_two_of_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25


def test_a_mutant_is_really_applied(tmp_path: Path) -> None:
    applied = tmp_path / "applied"
    mutant = find("release-without-token")
    assert said(LATE_RELEASE, None, applied) == "False"
    assert said(LATE_RELEASE, mutant, applied) == "True"
    assert "statements.py" in applied.read_text()
    assert said(LATE_RELEASE, None, applied) == "False", "and leaves nothing behind"


def test_a_mutant_of_a_migration_is_really_applied(tmp_path: Path) -> None:
    applied = tmp_path / "applied"
    assert said(OFF_THE_LIST, None, applied) == "True"
    assert said(OFF_THE_LIST, find("no-unique-index"), applied) == "False"


def test_a_mutant_reaches_the_processes_of_a_process(tmp_path: Path) -> None:
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LATE_RELEASE!r}], check=True)"
    assert said(nested, find("release-without-token"), tmp_path / "applied") == "True"


def test_a_mutant_that_fits_no_more_is_refused() -> None:
    for old in ("nothing of the kind", "leases"):
        with pytest.raises(DoesNotFit, match=r"leases/statements\.py has \d+ times"):
            Mutant("m", "nothing", (Edit("leases/statements.py", old, ""),), ()).check()


def test_an_unknown_mutant_is_refused() -> None:
    with pytest.raises(UnknownMutant, match="no-such-mutant"):
        find("no-such-mutant")
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", "no-such-mutant"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no mutant is called 'no-such-mutant'" in done.stderr


def test_a_mutant_that_nothing_catches_is_told() -> None:
    layer = "tests/test_trust.py"  # which is of something else
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", "release-without-token", "--layer", layer],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "missed: ['release-without-token']" in done.stdout


def test_a_mutant_that_is_caught_is_told_with_the_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- mutants -->\nan older table\n<!-- /mutants -->\nafter\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", "trust-without-margin", "--docs", str(page)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 caught" in done.stdout
    assert "`pytest -x -n 0 tests/test_trust.py`" in done.stdout
    said = page.read_text()
    assert said.startswith("before\n<!-- mutants -->\n| mutant |")
    assert said.endswith(" |\n<!-- /mutants -->\nafter\n")
    assert "| trust-without-margin |" in said


def test_the_model_says_which_command_repeats_its_failure_and_it_does(tmp_path: Path) -> None:
    given = environment(find("release-without-token"), tmp_path / "applied")
    command = ["-m", "tests.model", "--seed", "40", "--steps", "5000"]
    endings = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=given, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stdout + done.stderr
        *_, where, printed = done.stdout.splitlines()
        endings.append(where)
        command = printed.split()[1:]
    assert endings[0] == endings[1]
    assert "5000" not in command, "it is shorter"
