"""The rules under a seed, for volume: a hundred thousand steps a minute, and no shrinking.

The steps are cut into epochs, each on empty tables and with a seed of its own, seed + number; so that a failure in the
millionth step is repeated by a few hundred, from an epoch's beginning. In every fourth epoch the clock may be set back.
"""

from __future__ import annotations

import gc
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from typing import Any

from leases.model import Lease
from tests.model.product import Product
from tests.model.rules import BUNDLES, RULES, Choice, Kept, Rule
from tests.model.world import World

EPOCH = 1000
"""How many steps on the same tables."""

LOOK_EVERY = 50
"""How many steps from one comparison of all tables to the next; the streams of a step are compared at once."""

REMEMBERED = 60
"""How many things of a bundle are kept: the latest."""

LATEST = 0.7
"""How often a grant is the latest of its stream, and not just any that is kept."""

SET_BACK_EVERY = 4
STORY = 12
"""How many steps a failure tells."""


Told = tuple[int, datetime, str, dict[str, Any]]
"""A step: its number, the time, the rule and its arguments. `tell` writes it down, which costs more than the step."""


class Failed(Exception):
    """A step in which the product is not as the model, with what there is to know about it."""

    def __init__(self, seed: int, step: int, story: list[Told], why: BaseException) -> None:
        super().__init__(f"step {step} of seed {seed}: {why}")
        self.seed = seed
        self.step = step
        self.story = story
        self.why = why


@dataclass
class Figures:
    """What was done so far."""

    steps: int = 0
    grants: int = 0
    events: int = 0
    elapsed_s: float = 0.0
    by_rule: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return self.steps / self.elapsed_s if self.elapsed_s else 0.0


class Chooser:
    """Chooses rules and their arguments, by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.bundles: dict[str, deque[Any]] = {name: deque(maxlen=REMEMBERED) for name in BUNDLES}
        self.latest: dict[str, Lease] = {}
        rules = RULES if seed % SET_BACK_EVERY == 0 else [r for r in RULES if r.name != "the_clock_is_set_back"]
        self._rules = rules
        self._weights = list(accumulate(rule.weight for rule in rules))

    def choose(self) -> tuple[Rule, dict[str, Any]]:
        while True:
            (rule,) = self.random.choices(self._rules, cum_weights=self._weights)
            if all(self.bundles[kind.bundle] for kind in rule.arguments.values() if isinstance(kind, Kept)):
                return rule, {name: self._argument(kind) for name, kind in rule.arguments.items()}

    def _argument(self, kind: Choice | Kept) -> Any:
        if isinstance(kind, Choice):
            return self.random.choice(kind.values)
        if kind.most == 1:
            return self._kept(kind.bundle)
        return [self._kept(kind.bundle) for _ in range(self.random.randint(1, kind.most))]

    def _kept(self, bundle: str) -> Any:
        if bundle == "grants" and self.random.random() < LATEST:
            return self.random.choice(list(self.latest.values()))
        return self.random.choice(self.bundles[bundle])

    def keep(self, bundle: str, things: list[Any]) -> None:
        """Keep what a rule gave for later steps."""
        self.bundles[bundle].extend(things)
        if bundle == "grants":
            self.latest.update((lease.stream_id, lease) for lease in things)


def run(
    product: Product,
    *,
    steps: int,
    seed: int,
    look_every: int = LOOK_EVERY,
    progress: Callable[[Figures], object] = lambda _: None,
) -> Figures:
    """Do so many steps; `Failed` at the first in which the product is not as the model."""
    figures = Figures()
    began = time.monotonic()
    while figures.steps < steps:
        epoch = min(EPOCH, steps - figures.steps)
        with _garbage_left_alone():
            _epoch(product, epoch, seed, look_every, figures)
        figures.elapsed_s = time.monotonic() - began
        progress(figures)
        seed += 1
    return figures


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """Collect it at the end: to look for it all the time costs a fifth of a step."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(1)
        if was_on:
            gc.enable()


def _epoch(product: Product, steps: int, seed: int, look_every: int, figures: Figures) -> None:
    world = World(product, look_every=look_every)
    chooser = Chooser(seed)
    story: deque[Told] = deque(maxlen=STORY)
    for step in range(1, steps + 1):
        rule, arguments = chooser.choose()
        story.append((step, world.model.now, rule.name, arguments))
        try:
            given = world.step(rule.run, arguments)
            if step == steps:
                world.compare_all()
        except Exception as error:
            raise Failed(seed, step, list(story), error) from error
        if rule.gives is not None:
            chooser.keep(rule.gives, given)
        figures.by_rule[rule.name] += 1
        figures.refused[rule.name] += world.refused or (rule.gives is not None and not given)
        figures.steps += 1
    figures.grants += len(world.witness.owner_of)
    figures.events += world.accepted


def tell(entry: Told) -> str:
    """One step, for people."""
    step, at, name, arguments = entry
    return (
        f"{step:5} {at:%H:%M:%S.%f} {name}({', '.join(f'{key}={_short(value)}' for key, value in arguments.items())})"
    )


def _short(value: Any) -> str:
    if isinstance(value, Lease):
        return f"<{value.stream_id} {value.owner} {value.fencing_token}>"
    if isinstance(value, list):
        return f"[{', '.join(_short(part) for part in value)}]"
    return str(value)
