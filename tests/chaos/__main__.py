"""The command: `python -m tests.chaos --help`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tests.chaos import mutants, steps
from tests.chaos.run import FAILOVER, PLAIN, STEPPED, WORLDS, Outcome, Plan, run

ENGINES = ("postgresql", "sqlite")
SHOWN = 10
"""How many violations are told in full."""


LONG_S = 300.0
"""A run on PostgreSQL of so many seconds is divided among the worlds."""

SHARES = {PLAIN: 4, FAILOVER: 1, STEPPED: 1}
"""How, in sixths."""


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Worker and operator processes on a real database, a nemesis, and a checker of the promises.",
    )
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=0.0, help="both together; by default 45 s")
    parser.add_argument("--seed", type=int, help="the faults and their order; by default another each time")
    parser.add_argument("--engine", choices=ENGINES, default="postgresql")
    parser.add_argument("--ttl", type=float, default=3.0, help="of the leases, in seconds")
    parser.add_argument(
        "--mutant", choices=mutants.MUTANTS, default=os.environ.get(mutants.VARIABLE, ""), help="break the product so"
    )
    parser.add_argument(
        "--world", choices=WORLDS, help="what the server is; by default plain, and each in turn if a run is long"
    )
    parser.add_argument("--faults", default="", help="only these, by the names of the nemesis's methods, with commas")
    return parser.parse_args(arguments)


def plans_of(options: argparse.Namespace) -> Iterator[Plan]:
    """What to run, one after another: a long run on PostgreSQL is one in each world, if there is what it takes."""
    plan = plan_of(options)
    if options.world is not None or plan.engine != "postgresql" or plan.seconds < LONG_S:
        yield replace(plan, world=options.world or PLAIN)
        return
    for world, share in SHARES.items():
        if world == STEPPED and steps.library() is None:
            say("no clock is set: there is no libfaketime (apt-get install libfaketime)")
            continue
        yield replace(plan, world=world, seconds=plan.seconds * share / sum(SHARES.values()))


def plan_of(options: argparse.Namespace) -> Plan:
    seconds = options.minutes * 60 + options.seconds or 45.0
    seed = options.seed if options.seed is not None else int(time.time()) % 100_000
    return Plan(
        options.engine,
        seconds,
        seed,
        options.ttl,
        workers=6 if options.engine == "sqlite" else 5,
        mutant=options.mutant,
        faults=tuple(filter(None, options.faults.split(","))),
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def report(outcome: Outcome) -> None:
    say(f"\nfaults: {sum(outcome.faults.values())}")
    for name, count in sorted(outcome.faults.items()):
        say(f"{count:8}  {name}")
    say("seen:")
    for name, count in outcome.figures.items():
        say(f"{count:8}  {name}")
    if outcome.owned_after_s is not None:
        say(f"{outcome.owned_after_s:8.2f}  s after the last fault every stream was owned (at most 2 TTL)")
    if outcome.written_after_s is not None:
        say(f"{outcome.written_after_s:8.2f}  s after that every owner had written")
    say(f"violations: {len(outcome.violations)}")
    for promise, count in sorted(Counter(each.promise for each in outcome.violations).items()):
        say(f"{count:8}  {promise}")
    for violation in outcome.violations[:SHOWN]:
        say(f"  {violation}")
    if outcome.violations:
        say(f"the clients' records are in {outcome.kept}")
        say(f"run it again: {outcome.plan.command}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    if options.engine != "postgresql" and options.world not in (None, PLAIN):
        say(f"there is no {options.world} world on {options.engine}")
        return 2
    broken = 0
    for plan in plans_of(options):
        of_mutant = f", mutant {plan.mutant}" if plan.mutant else ""
        say(f"{plan.engine}, {plan.world}, {plan.seconds:g} s, seed {plan.seed}{of_mutant}")
        outcome = run(plan, say)
        report(outcome)
        broken += len(outcome.violations)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
