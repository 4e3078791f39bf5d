"""What a run has measured: values, and the JSON file that docs/performance.md is made of."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

FORMAT = 1


@dataclass(frozen=True)
class Entrant:
    """A contestant as this run saw it; `absent` says why it took no part."""

    name: str
    title: str
    server: str = ""
    durability: str = ""  # empty: it was absent
    absent: str | None = None


@dataclass(frozen=True)
class Figure:
    """What one contestant did in one case: a figure a round, in the order of the rounds, or why there is none."""

    contestant: str
    rounds: tuple[float, ...] = ()
    none: str | None = None
    failed: bool = False
    """Whether `none` is a failure of this run, and not a workload that makes no sense for it."""

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles, between which half of the rounds lie; lowest and highest where there are too few."""
        if len(self.rounds) < 4:
            return min(self.rounds), max(self.rounds)
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Measured:
    """One case with all contestants' figures."""

    workload: str
    variant: str
    unit: str
    figures: tuple[Figure, ...]

    @property
    def more_is_better(self) -> bool:
        return self.unit.endswith("/s")

    def of(self, contestant: str) -> Figure | None:
        """The contestant's figure, if it has one."""
        return next((each for each in self.figures if each.contestant == contestant and each.rounds), None)

    def ratio(self, contestant: str, to: str) -> tuple[float, float, float] | None:
        """How many times as fast one is as another: median and quartiles of the ratios within each round.

        Within a round both had the same machine, whatever else ran on it; so this is steadier than the figures.
        """
        one, other = self.of(contestant), self.of(to)
        if one is None or other is None or not all((*one.rounds, *other.rounds)):
            return None
        pairs = list(zip(one.rounds, other.rounds, strict=False))
        ratios = Figure("", tuple(a / b if self.more_is_better else b / a for a, b in pairs))
        return (ratios.median, *ratios.spread)


@dataclass(frozen=True)
class Run:
    """A whole run."""

    at: str
    version: str
    machine: Mapping[str, str]
    quick: bool
    entrants: tuple[Entrant, ...]
    measured: tuple[Measured, ...] = ()
    complaints: tuple[str, ...] = ()
    """What servers wrote to their logs that should not be there: deadlocks."""
    format: int = field(default=FORMAT)

    def case(self, workload: str, variant: str) -> Measured | None:
        return next((each for each in self.measured if (each.workload, each.variant) == (workload, variant)), None)

    def title(self, contestant: str) -> str:
        return next(each.title for each in self.entrants if each.name == contestant)

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Self:
        told: dict[str, Any] = json.loads(file.read_text())
        if told["format"] != FORMAT:
            raise ValueError(f"{file.name} is of format {told['format']}, this program reads {FORMAT}")
        told["entrants"] = tuple(Entrant(**each) for each in told["entrants"])
        told["measured"] = tuple(
            Measured(**{**each, "figures": tuple(_figure(figure) for figure in each["figures"])})
            for each in told["measured"]
        )
        told["complaints"] = tuple(told["complaints"])
        return cls(**told)


def _figure(told: dict[str, Any]) -> Figure:
    return Figure(**{**told, "rounds": tuple(told["rounds"])})
