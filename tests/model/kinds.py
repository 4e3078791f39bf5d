"""How a rule is written: what it is called with, how often it is taken, and what it gives to keep.

A rule is a function of the world. `machine` and `volume` choose rules and arguments. An argument is a `Choice` of
values, or something `Kept`, which earlier rules gave: grants, real and forged, fresh and stale; attempts whose answer
was lost; leases as an operator's first step saw them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Choice:
    """One of some values; what is there several times is chosen more often by `volume`."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Kept:
    """One thing of a bundle; several, if `most` is more than 1."""

    bundle: str
    most: int = 1


@dataclass(frozen=True)
class Rule:
    """A rule, and how to call it; `weight` is how often `volume` takes it, beside the others."""

    name: str
    run: Callable[..., Any]
    weight: int
    gives: str | None
    arguments: dict[str, Choice | Kept]


@dataclass(frozen=True)
class Attempt:
    """A request that can be repeated, since it has a name."""

    of: Callable[..., Any]
    arguments: dict[str, Any]


RULES: list[Rule] = []
BUNDLES = ("grants", "attempts", "observed")


def rule(weight: int, gives: str | None = None, **arguments: Choice | Kept) -> Callable[[F], F]:
    """Make a rule of a function."""

    def add(function: F) -> F:
        RULES.append(Rule(function.__name__, function, weight, gives, arguments))
        return function

    return add


def seconds(*values: float) -> tuple[timedelta, ...]:
    return tuple(timedelta(seconds=value) for value in values)


STREAM = Choice(("a", "b", "c", "d", "e", "f"))
STREAMS = Choice((("a",), ("b", "c"), ("a", "c", "e"), ("d", "f", "d"), ()))
OWNER = Choice(("one", "two", "three"))
POOL = Choice(("default", "default", "default", "other"))
TTL = Choice(seconds(*(5, 15, 15, 15, 60) * 5, 24 * 3600))
LIMIT = Choice((0, 1, 2, 5))
BACKOFF = Choice(seconds(0, 0, 0, 5, -1))
ERROR = Choice((None, None, "it failed", ""))
ACTOR = Choice(("op", "root"))
REASON = Choice((None, "because"))
NAMED = Choice((None, None, -1, 0, 1))
"""Which token an operator names: none, or the current one, or one beside it."""
CHECKPOINT = Choice((None, None, 1, 2, {"at": [3]}))
POSITION = Choice((0, 7, "here", [None], False))
BATCH = Choice(((0,), (0,), (0, 1), (-1, 0), (-2, 0, 0, 1), (-1,), ()))
"""Events by their distance from the next new one: those below 0 are there already, unless they were pruned."""
LOST = Choice((0,) * 14 + (1,))
LOST_IN_TWO = Choice((0,) * 12 + (1, 2))
GRANT = Kept("grants")
BATCHED = Kept("grants", most=4)
