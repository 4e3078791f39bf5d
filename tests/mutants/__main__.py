"""`python -m tests.mutants`: every mutant against the layers that should catch it, and the table of what caught it.

Exits with 0 if every mutant was caught, and every layer passes without one; else with 1.
"""

# ruff: noqa: T201  # a command

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.mutants import layers
from tests.mutants.loader import environment
from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.registry import MUTANTS, UnknownMutant, find

PATIENCE_S = 300.0
FAILED = 1
"""The exit code of a layer that found a defect: of pytest, and of the others."""

BEGIN, END = "<!-- mutants -->", "<!-- /mutants -->"
"""The marks of the table's place in a page."""

EVIDENCE = (
    r"^(?:FAILED|ERROR) \S+?::(\S+)|"
    r"^(?:Mismatch|AssertionError): (?:the tables differ from the model's:\n)?(.{1,70})"
)


@dataclass(frozen=True)
class Run:
    """A layer that has been run: how it ended, and how long it took."""

    layer: str
    verdict: str
    seconds: float
    said: str

    @property
    def caught(self) -> bool:
        return self.verdict == "caught"

    @property
    def evidence(self) -> str:
        """The test that failed, or the difference that was seen."""
        found = re.search(EVIDENCE, self.said, re.M)
        return "" if found is None else (found[1] or found[2]).replace("|", "¦")


def run(layer: str, mutant: Mutant | None) -> Run:
    """Run a layer, under a mutant or without. Only a test that failed has caught it: not a crash, nor a time-out."""
    with tempfile.TemporaryDirectory() as directory:
        applied = Path(directory, "applied")
        given = dict(os.environ) if mutant is None else environment(mutant, applied)
        began = time.monotonic()
        process = subprocess.Popen(
            layers.command(layer),
            cwd=ROOT,
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            return Run(layer, f"no end in {PATIENCE_S:g} s", PATIENCE_S, _end(process))
        except BaseException:
            _end(process)
            raise
        took_s = time.monotonic() - began
        if process.returncode == 0:
            verdict = "passed"
        elif process.returncode != FAILED:
            verdict = f"broke with exit code {process.returncode}"
        elif mutant is not None and not applied.exists():
            verdict = "failed, but nothing of the mutant was loaded"
        else:
            verdict = "caught" if mutant is not None else "failed"
        return Run(layer, verdict, took_s, said)


def _end(process: subprocess.Popen[str]) -> str:
    """End a layer and its children: first as Ctrl-C does, so that the tests' servers are stopped."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        said, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    return said


def try_out(mutant: Mutant, *, in_all: bool) -> list[Run]:
    """Run a mutant against its layers, up to the first that catches it; or against all of them."""
    runs = []
    for layer in mutant.layers:
        runs.append(run(layer, mutant))
        if runs[-1].caught and not in_all:
            break
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants; all of them if none is named")
    parser.add_argument("--list", action="store_true", help="show the mutants, and run none")
    parser.add_argument("--layer", action="append", metavar="LAYER", help="try these layers, whatever a mutant says")
    parser.add_argument("--in-all", action="store_true", help="go on when a mutant is caught: which layers see it?")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the layers without a mutant, too")
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="try so many mutants at a time")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the table into this page, between its marks")
    parser.add_argument("--verbose", action="store_true", help="show the end of what each layer said")
    given = parser.parse_args()
    try:
        mutants = [find(name) for name in given.names] or list(MUTANTS)
    except UnknownMutant as error:
        parser.error(str(error))
    if given.list:
        for mutant in mutants:
            print(f"{mutant.name:34}{mutant.breaks}")
        return 0
    for mutant in mutants:
        mutant.check()
    if given.layer:
        mutants = [Mutant(m.name, m.breaks, m.edits, tuple(given.layer)) for m in mutants]
    lines = ["| mutant | what it breaks | caught by | seconds | command |", "| --- | --- | --- | --- | --- |"]
    missed = []
    used = []
    pool = ThreadPoolExecutor(given.jobs)
    tried = pool.map(partial(try_out, in_all=given.in_all), mutants)
    for number, (mutant, runs) in enumerate(zip(mutants, tried, strict=True), start=1):
        print(f"{number:3}/{len(mutants)} {mutant.name}:", end=" ", flush=True)
        print("; ".join(f"{r.layer}: {r.verdict} ({r.seconds:.1f} s) {r.evidence}" for r in runs), flush=True)
        if given.verbose or not any(r.caught for r in runs):
            print("\n".join(runs[-1].said.splitlines()[-25:]))
        caught = [r for r in runs if r.caught]
        if not caught:
            missed.append(mutant.name)
            lines.append(f"| {mutant.name} | {mutant.breaks} | **nothing** | | |")
        used += [r.layer for r in caught]
        for r in caught:
            command = f"`{layers.shown(r.layer)}`"
            lines.append(f"| {mutant.name} | {mutant.breaks} | {r.evidence} | {r.seconds:.1f} | {command} |")
    good = given.no_baseline or _baseline(dict.fromkeys(used))
    print("\n" + "\n".join(lines))
    if given.docs is not None:
        _write(given.docs, lines)
    print(f"\n{len(mutants) - len(missed)} of {len(mutants)} caught" + (f"; missed: {missed}" if missed else ""))
    return 0 if good and not missed else 1


def _write(page: Path, lines: list[str]) -> None:
    """Put the table into a page, in place of the one that it has."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} has no place for the table: {BEGIN} … {END}")
    page.write_text(f"{before}{begin}\n{chr(10).join(lines)}\n{end}{after}")


def _baseline(used: Iterable[str]) -> bool:
    """Run each layer that has caught something without a mutant: one that fails by itself proves nothing."""
    good = True
    for layer in used:
        result = run(layer, None)
        print(f"without a mutant: {layer}: {result.verdict} ({result.seconds:.1f} s)", flush=True)
        if result.verdict != "passed":
            good = False
            print("\n".join(result.said.splitlines()[-25:]))
    return good


if __name__ == "__main__":
    sys.exit(main())
