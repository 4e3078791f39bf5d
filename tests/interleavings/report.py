"""Walks scenarios and counts: what the tests and the command share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.interleavings.client import Rewrite
from tests.interleavings.database import Database
from tests.interleavings.explorer import Choose, Explorer, walk
from tests.interleavings.promises import Violation, check
from tests.interleavings.scenarios import Scenario
from tests.interleavings.schedule import Trace

ENOUGH = 3
"""After how many violations a walk ends."""


@dataclass(frozen=True)
class Finding:
    """A schedule with violations."""

    scenario: str
    level: str
    number: int
    trace: Trace
    violations: list[Violation]

    @property
    def command(self) -> str:
        return (
            f'python -m tests.interleavings --scenario {self.scenario} --isolation "{self.level}" '
            f"--schedule '{self.trace.order}'"
        )

    def __str__(self) -> str:
        wrong = "\n".join(f"     {violation.promise}: {violation.what}" for violation in self.violations)
        answers = "\n".join(
            f"     {key}: {answer.result if answer.error is None else repr(answer.error)}"
            for key, answer in self.trace.answers.items()
        )
        return (
            f"{self.scenario} at {self.level}, schedule number {self.number}: {self.trace.order}\n{wrong}\n"
            f"{self.trace}\n{answers}\n     again: {self.command}"
        )


@dataclass
class Walked:
    """What came of a walk."""

    scenario: str
    level: str
    schedules: int = 0
    steps: int = 0
    waits: int = 0
    conflicts: int = 0
    seconds: float = 0.0
    exhausted: bool = False
    diverged: int = 0
    findings: list[Finding] = field(default_factory=list)


@contextmanager
def exploring(
    database: Database, scenario: Scenario, level: str, rewrite: Rewrite | None = None
) -> Iterator[tuple[Callable[[Trace], list[Violation]], Callable[[Choose], Trace]]]:
    """A scenario in a database: how to judge a schedule, and how to run one."""
    held = database.set_up(scenario.build)
    parts = scenario.parts(level, held)
    explorer = Explorer(database, scenario.isolations(level), rewrite)

    def judge(trace: Trace) -> list[Violation]:
        return check(trace, parts) + (list(scenario.expect(trace)) if trace.failure is None else [])

    yield judge, lambda choose: explorer.run(scenario.bodies(held), scenario.clock_steps, choose)


def explore(
    database: Database,
    scenario: Scenario,
    level: str,
    *,
    seed: int | None = None,
    limit: int | None = None,
    rewrite: Rewrite | None = None,
    until: str | None = None,
    progress: Callable[[Walked], None] = lambda _: None,
) -> Walked:
    """Walk a scenario at one level: all of it, or to a limit, or until enough was found.

    Enough is an order that breaks the promise `until`; without one, any ENOUGH orders that break some.
    """
    walked = Walked(scenario.name, level)
    with exploring(database, scenario, level, rewrite) as (judge, run):
        began = time.monotonic()
        for trace, tree in walk(run, seed=seed, limit=limit):
            walked.schedules += 1
            walked.steps += len(trace.steps)
            walked.waits += any(step.waited_for for step in trace.steps)
            walked.conflicts += any(answer.conflicts for answer in trace.answers.values())
            walked.seconds = time.monotonic() - began
            walked.exhausted, walked.diverged = tree.exhausted, tree.diverged
            violations = judge(trace)
            if violations:
                walked.findings.append(Finding(scenario.name, level, walked.schedules, trace, violations))
                found = {violation.promise for violation in violations}
                if trace.failure is not None or until in found or (until is None and len(walked.findings) == ENOUGH):
                    break
            progress(walked)
    return walked
