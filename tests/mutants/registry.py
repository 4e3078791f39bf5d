"""All mutants. To add one, add an entry to one of the lists, or a list of your own here."""

from __future__ import annotations

from tests.mutants.mutant import Mutant
from tests.mutants.of_owners import OF_OWNERS
from tests.mutants.of_the_fence import OF_THE_FENCE
from tests.mutants.of_the_fleet import OF_THE_FLEET
from tests.mutants.of_the_rest import OF_THE_REST

MUTANTS: tuple[Mutant, ...] = (*OF_THE_FENCE, *OF_OWNERS, *OF_THE_FLEET, *OF_THE_REST)


class UnknownMutant(KeyError):
    """No mutant has this name."""

    def __str__(self) -> str:
        return f"no mutant is called {self.args[0]!r}; --list shows them"


def find(name: str) -> Mutant:
    """The mutant of a name."""
    for mutant in MUTANTS:
        if mutant.name == name:
            return mutant
    raise UnknownMutant(name)
