"""The rules driven by Hypothesis: it looks for a story that shows a difference, and shrinks it to the shortest.

Each example is a world of its own, on empty tables; after every step all rows of all tables are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, multiple, rule

from tests.model.product import Product
from tests.model.rules import BUNDLES, RULES, Choice, Kept, Rule
from tests.model.world import World


def _strategy(kind: Choice | Kept, bundles: dict[str, Bundle[Any]]) -> st.SearchStrategy[Any]:
    if isinstance(kind, Choice):
        return st.sampled_from(list(dict.fromkeys(map(_Shown, kind.values)))).map(lambda shown: shown.value)
    bundle = bundles[kind.bundle]
    return bundle if kind.most == 1 else st.lists(bundle, min_size=1, max_size=kind.most)


class _Shown:
    """A value that may not be hashable, told from others by its looks: once is enough here."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return repr(self.value)


def _method(own: Rule) -> Callable[..., None]:
    def run(self: Any, **arguments: Any) -> None:
        self.world.step(own.run, arguments)

    run.__name__ = own.name
    return run


def _giving(own: Rule) -> Callable[..., Any]:
    def run(self: Any, **arguments: Any) -> Any:
        return multiple(*self.world.step(own.run, arguments))

    run.__name__ = own.name
    return run


def machine(product: Product) -> type[RuleBasedStateMachine]:
    """A state machine over a product, with all rules."""

    def __init__(self: Any) -> None:
        RuleBasedStateMachine.__init__(self)
        self.world = World(product)

    bundles: dict[str, Bundle[Any]] = {name: Bundle(name) for name in BUNDLES}
    body: dict[str, Any] = {"__init__": __init__, **bundles}
    for own in RULES:
        given = {name: _strategy(kind, bundles) for name, kind in own.arguments.items()}
        body[own.name] = (
            rule(target=bundles[own.gives], **given)(_giving(own)) if own.gives else rule(**given)(_method(own))  # type: ignore[call-overload]  # Hypothesis' types know no rules made by a program
        )
    return type("LeasesAsTheModel", (RuleBasedStateMachine,), body)
