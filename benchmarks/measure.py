"""Runs cases: rounds, within which the contestants alternate, so that they share whatever else the machine does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from benchmarks.contestant import Absent, Contestant
from benchmarks.result import Entrant, Figure, Measured
from benchmarks.servers import Servers
from benchmarks.workload import Case, Round

ALLOWANCE_S = 60.0
"""What one contestant's rounds of a case may take together, before no more are begun: some peers are very slow."""

LONG_S = 10.0
"""A first round that takes longer counts: what is so slow is as slow when it is warm."""

Progress = Callable[[str], object]


def start(kinds: Iterable[type[Contestant]], servers: Servers) -> tuple[list[Contestant], list[Entrant]]:
    """Start the contestants; those that cannot be are told of as absent."""
    present: list[Contestant] = []
    entrants = []
    for kind in kinds:
        contestant = kind()
        try:
            contestant.start(servers)
        except Absent as reason:
            entrants.append(Entrant(kind.name, kind.title, absent=str(reason)))
        else:
            present.append(contestant)
            entrants.append(Entrant(kind.name, kind.title, contestant.server, contestant.durability))
    return present, entrants


def measure(case: Case, contestants: Sequence[Contestant], progress: Progress) -> Measured:
    """Measure one case: a round that does not count, then the rounds. One that fails is out, and told of."""
    out: dict[str, Figure] = {}
    figures: dict[str, list[float]] = {}
    spent: dict[str, float] = {}
    rounds: dict[str, Round] = {}

    def attempt(name: str, call: Callable[[], float]) -> float | None:
        began = time.monotonic()
        try:
            return call()
        except Exception as error:  # noqa: BLE001  # one contestant's failure is a result, not the end of the run
            out[name] = Figure(name, none=f"failed: {_last_line(error)}", failed=True)
            rounds.pop(name, None)
            return None
        finally:
            spent[name] = spent.get(name, 0.0) + time.monotonic() - began

    with ExitStack() as stack:
        for contestant in contestants:
            name = contestant.name
            reason = contestant.not_for.get(f"{case.workload} {case.variant}", contestant.not_for.get(case.workload))
            if reason is not None:
                out[name] = Figure(name, none=reason)
                continue
            progress(f"{case.workload}, {case.variant}: {contestant.title} prepares")

            def prepare(contestant: Contestant = contestant) -> float:
                rounds[contestant.name] = stack.enter_context(case.open(contestant))
                return 0.0

            attempt(name, prepare)
            if name in rounds and case.warms_up:
                began = time.monotonic()
                figure = attempt(name, rounds[name])
                if figure is not None and time.monotonic() - began > LONG_S:
                    figures[name] = [figure]
        names = list(rounds)
        for number in range(case.rounds):
            turn = number % len(names) if names else 0
            for name in [*names[turn:], *names[:turn]]:
                if name not in rounds or (figures.get(name) and spent[name] > ALLOWANCE_S):
                    continue
                progress(f"{case.workload}, {case.variant}: {name}, round {number + 1}")
                figure = attempt(name, rounds[name])
                if figure is not None:
                    figures.setdefault(name, []).append(figure)
    done = {name: Figure(name, tuple(rounds)) for name, rounds in figures.items()}
    told = {**done, **out}
    return Measured(
        case.workload, case.variant, case.unit, tuple(told[each.name] for each in contestants if each.name in told)
    )


def _last_line(error: Exception) -> str:
    """What it said last, without the paths of this machine: it is printed in the page."""
    lines = [line for line in str(error).strip().splitlines() if line.strip() and not line.startswith("(Background")]
    return (
        f"{type(error).__name__}: {re.sub(r'/[^ ]*/', '…/', lines[-1].strip())}"[:300]
        if lines
        else type(error).__name__
    )
