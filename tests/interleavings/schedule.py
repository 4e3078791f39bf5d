"""What is recorded of one schedule: its steps in their order, and what was committed after each COMMIT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from leases import Lease
from tests.interleavings.database import Committed

CLOCK = "*"
"""The letter of the clock's move in a schedule."""


@dataclass
class Step:
    """One statement of one client; times are by the schedule's clock."""

    number: int
    key: str
    statement: str
    began_s: float
    done_s: float | None = None
    done_after: int | None = None
    """The number of the step during which it was done: its own, unless it waited for a lock."""
    waited_for: list[str] = field(default_factory=list)

    @property
    def ends_transaction(self) -> bool:
        return self.statement in ("COMMIT", "ROLLBACK")


@dataclass(frozen=True)
class State:
    """What was committed after a step."""

    after: int
    """The step's number; −1 for the beginning."""
    key: str
    """Whose COMMIT it was."""
    at_s: float
    rows: Committed


@dataclass(frozen=True)
class Answer:
    """What came of one client."""

    result: Any
    error: BaseException | None
    conflicts: Sequence[str]
    fences: Sequence[tuple[int, Lease]]


@dataclass
class Trace:
    """One schedule."""

    steps: list[Step] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    failure: str | None = None
    """Why it did not come to an end, if it did not."""
    ended_s: float = 0.0

    @property
    def order(self) -> str:
        """The schedule, as the command takes it: whose turn it was."""
        return "".join(step.key for step in self.steps)

    def steps_of(self, key: str) -> list[Step]:
        return [step for step in self.steps if step.key == key]

    def transaction(self, state: State) -> list[Step]:
        """The steps of the transaction whose commit made a state, COMMIT included."""
        mine = [step for step in self.steps if step.key == state.key and step.number <= state.after]
        start = max((i + 1 for i, step in enumerate(mine[:-1]) if step.ends_transaction), default=0)
        return mine[start:]

    def state_at(self, number: int) -> State:
        """What was committed after so many steps."""
        return next(state for state in reversed(self.states) if state.after <= number)

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            waited = f"   [waited for {', '.join(step.waited_for)}" if step.waited_for else ""
            if step.waited_for:
                waited += f"; done during step {step.done_after}]" if step.done_after is not None else "; not done]"
            lines.append(f"{step.number:>3}  {step.key}  {step.began_s:>6g} s  {shortened(step.statement)}{waited}")
        return "\n".join(lines)


def shortened(statement: str, width: int = 150) -> str:
    """A statement in one line, its end kept, where most of them differ."""
    line = " ".join(statement.split())
    return line if len(line) <= width else f"{line[: width // 2]} … {line[-width // 2 :]}"
