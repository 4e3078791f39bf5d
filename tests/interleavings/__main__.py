"""The command: `python -m tests.interleavings --help`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from tests import postgres
from tests.interleavings.database import Database, opened
from tests.interleavings.explorer import follow
from tests.interleavings.mutants import MUTANTS, Mutant
from tests.interleavings.report import Finding, Walked, explore, exploring
from tests.interleavings.scenarios import BY_NAME, LEVELS, READ_COMMITTED, SCENARIOS, Scenario

SAMPLE = 200
"""How many schedules of each scenario and level are walked if not all are asked for."""

MUTANT_LIMIT = 2000
"""How many schedules a mutant is looked for in."""


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.interleavings",
        description="Walk the orders of two or three clients' statements on a real PostgreSQL, and check the promises.",
    )
    parser.add_argument(
        "--scenario", action="append", choices=BY_NAME, metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument("--isolation", choices=LEVELS, help="only this level of the caller's transactions")
    parser.add_argument("--all", action="store_true", help="walk all schedules, not a sample")
    parser.add_argument("--limit", type=int, default=SAMPLE, help=f"how large a sample is (default {SAMPLE})")
    parser.add_argument("--seed", type=int, default=0, help="another sample")
    parser.add_argument("--schedule", help="run this one, and show it; needs --scenario")
    parser.add_argument("--mutants", action="store_true", help="break the product in each way, and see it caught")
    parser.add_argument("--mutant", choices=[mutant.name for mutant in MUTANTS], metavar="NAME", help="only this one")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> Iterator[tuple[Scenario, str]]:
    for scenario in SCENARIOS:
        if not options.scenario or scenario.name in options.scenario:
            for level in scenario.levels:
                if options.isolation in (None, level):
                    yield scenario, level


def walk_all(database: Database, options: argparse.Namespace, console: Console) -> int:
    """Walk what is chosen, show a table; return how many schedules broke a promise."""
    table = Table("scenario", "isolation", "schedules", "", "steps", "waited", "conflicts", "seconds", "violations")
    done: list[Walked] = []
    for scenario, level in chosen(options):
        said_at = time.monotonic()

        def progress(walked: Walked) -> None:
            nonlocal said_at
            if time.monotonic() - said_at > 5:
                said_at = time.monotonic()
                rate = walked.schedules / walked.seconds
                console.print(f"{walked.scenario}, {walked.level}: {walked.schedules:,} schedules, {rate:.0f}/s")

        limit, seed = (None, None) if options.all else (options.limit, options.seed)
        walked = explore(database, scenario, level, seed=seed, limit=limit, progress=progress)
        done.append(walked)
        for finding in walked.findings:
            console.print(str(finding), markup=False, highlight=False)
        table.add_row(
            walked.scenario, walked.level, f"{walked.schedules:,}", "all" if walked.exhausted else "sample",
            f"{walked.steps:,}", f"{walked.waits:,}", f"{walked.conflicts:,}", f"{walked.seconds:.1f}",
            str(len(walked.findings)),
        )  # fmt: skip
    total, seconds = sum(walked.schedules for walked in done), sum(walked.seconds for walked in done)
    table.add_section()
    table.add_row(
        "in all", "", f"{total:,}", "", f"{sum(walked.steps for walked in done):,}",
        f"{sum(walked.waits for walked in done):,}", f"{sum(walked.conflicts for walked in done):,}",
        f"{seconds:.1f}", str(sum(len(walked.findings) for walked in done)),
    )  # fmt: skip
    console.print(table)
    diverged = sum(walked.diverged for walked in done)
    console.print(
        f"{total / max(seconds, 1e-9):.0f} schedules/s; {diverged} orders offered other choices when replayed"
    )
    return sum(len(walked.findings) for walked in done)


def run_one(database: Database, options: argparse.Namespace, console: Console) -> int:
    """Run one schedule, show it; return 1 if it broke a promise, 2 if the clients cannot go in that order."""
    scenario = BY_NAME[options.scenario[0]]
    level = options.isolation or READ_COMMITTED
    mutant = next((mutant for mutant in MUTANTS if mutant.name == options.mutant), None) or Mutant("", "", "")
    with mutant.breaking(database), exploring(database, scenario, level, mutant.rewrite) as (judge, run):
        try:
            trace = run(follow(options.schedule))
        except ValueError as error:
            console.print(f"there is no such order: {error}", markup=False, highlight=False)
            return 2
        console.print(str(Finding(scenario.name, level, 1, trace, judge(trace))), markup=False, highlight=False)
        return int(bool(judge(trace)))


def run_mutants(database: Database, options: argparse.Namespace, console: Console) -> int:
    """Break the product in each way, show a table; return how many were not caught."""
    table = Table("mutant", "scenario", "isolation", "breaks", "schedules until then", "seconds")
    missed = 0
    for mutant in MUTANTS:
        if options.mutant not in (None, mutant.name):
            continue
        with mutant.breaking(database):
            walked = explore(
                database, BY_NAME[mutant.scenario], mutant.level, seed=options.seed, limit=MUTANT_LIMIT,
                rewrite=mutant.rewrite, until=mutant.promise,
            )  # fmt: skip
        caught = sorted({violation.promise for finding in walked.findings for violation in finding.violations})
        missed += mutant.promise not in caught
        table.add_row(
            mutant.name, mutant.scenario, mutant.level, ", ".join(caught) or "NOT CAUGHT", str(walked.schedules),
            f"{walked.seconds:.1f}",
        )  # fmt: skip
        if options.mutant:
            for finding in walked.findings[-1:]:
                console.print(f"{finding} --mutant '{mutant.name}'", markup=False, highlight=False)
    console.print(table)
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True)
    if options.list:
        for scenario in SCENARIOS:
            console.print(f"{scenario.name:32} {' '.join(scenario.actors)}  {', '.join(scenario.levels)}")
        return 0
    with postgres.running() as server, opened(server) as database:
        if options.schedule is not None:
            if not options.scenario:
                console.print("--schedule needs --scenario")
                return 2
            return run_one(database, options, console)
        if options.mutants or options.mutant:
            return min(1, run_mutants(database, options, console))
        return min(1, walk_all(database, options, console))


if __name__ == "__main__":
    sys.exit(main())
