"""The product and the model side by side: each step is done on both, their answers and their tables are compared.

`World.step` runs one rule. A rule calls `both` for each request; so the answer, or the error with its fields, must be
the same, and then the rows of every stream that the request named. Every so many steps all rows of all tables are
compared, and the promises are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

from leases.errors import LeaseNotHeld, LeasesError, OutcomeUnknown
from leases.model import Lease
from tests.clock import START
from tests.model import tables
from tests.model.invariants import Witness
from tests.model.operator import Table
from tests.model.product import Product

R = TypeVar("R")

SHORTEST_ON_POSTGRESQL = timedelta(seconds=2)
"""A fence tells the server to end its session at the lease's end, by the *server's* clock, which does not stand still:
on PostgreSQL no fence is tried with less than this to live."""


class Mismatch(AssertionError):
    """The product is not as the model."""


class World:
    """One product from its first step on. `look_every`: how many steps until all tables are compared again."""

    def __init__(self, product: Product, *, look_every: int = 1) -> None:
        product.reset()
        self.product = product
        self.store = product.store
        self.model = Table(START)
        self.witness = Witness()
        self.look_every = look_every
        self.steps = 0
        self._touched: set[str] = set()
        self._ids = 0
        self.accepted = 0
        self.refused = False

    # --- for the drivers ---------------------------------------------------------------------------------------

    def step(self, rule: Callable[..., Any], arguments: Mapping[str, Any]) -> list[Any]:
        """Run one rule, compare; return what it gives to keep for later steps."""
        self._touched.clear()
        self.refused = False
        given = rule(self, **arguments)
        self.steps += 1
        for stream_id in self._touched:
            self._compare_stream(stream_id)
        if self.steps % self.look_every == 0:
            self.compare_all()
        if given is None:
            return []
        return given if isinstance(given, list) else [given]

    def compare_all(self) -> None:
        """Compare all rows of all tables, and look at the promises."""
        found = self.product.tables.everything()
        self.witness.look_at_all(found, self.model.now)  # first: it says which promise is broken
        self._compare(found, tables.everything(self.model))

    def _compare_stream(self, stream_id: str) -> None:
        found = self.product.tables.of(stream_id)
        for row in found["leases"]:
            self.witness.look(row, self.model.now)
        self._compare(found, tables.of(self.model, stream_id))

    def _compare(self, found: tables.Rows, expected: tables.Rows) -> None:
        if found != expected:
            raise Mismatch(f"the tables differ from the model's:\n{tables.differences(found, expected)}")

    # --- for the rules -----------------------------------------------------------------------------------------

    def fresh(self) -> UUID:
        """The identity of an attempt that nobody has made before."""
        self._ids += 1
        return UUID(int=self._ids)

    def touch(self, *stream_ids: str) -> None:
        """Compare these streams when the step is done."""
        self._touched.update(stream_ids)

    def both(self, of_product: Callable[[], R], of_model: Callable[[R], R], *, lost: int = 0) -> R | None:
        """Ask both, and compare their answers; None if they refuse alike.

        The model is asked second, and told the product's answer, for where the promise leaves a choice. The answer of
        the product's `lost`-th transaction is lost, if that is not 0.
        """
        self.store.lose(lost)
        refusal, answer = _outcome(of_product)
        self.store.lose(0)
        for lease in answer if isinstance(answer, list) else [answer]:
            if isinstance(lease, Lease):
                self.witness.granted(lease)
                self.touch(lease.stream_id)
        expected_refusal, expected = _outcome(lambda: of_model(answer))  # type: ignore[arg-type]  # none if refused
        if (refusal, answer) != (expected_refusal, expected):
            raise Mismatch(f"the product says {refusal or answer!r}\nthe model says   {expected_refusal or expected!r}")
        self.refused = refusal is not None
        return answer

    def told(self, call: Callable[[], R], transaction: int, lost: int) -> R:
        """What the model answers in a transaction whose answer may be lost: then it is asked once more."""
        answer = call()
        if transaction != lost:
            return answer
        try:
            return call()
        except LeaseNotHeld:
            # It was accepted, and would be refused now: whoever asked cannot know.
            raise OutcomeUnknown("lost") from None

    def fenced(
        self, leases: Iterable[Lease], of_product: Callable[[], R], of_model: Callable[[R], R], *, lost: int = 0
    ) -> R | None:
        """`both`, for a write that is fenced by these leases: it passes only where their rows say so."""
        now = self.model.now
        rows = [(lease, self.product.tables.lease(lease.stream_id)) for lease in leases]
        self.touch(*(lease.stream_id for lease, _ in rows))
        if any(self.too_short_to_fence(lease) for lease, _ in rows):
            return None

        def watched() -> R:
            answer = of_product()
            for lease, row in rows:
                self.witness.passed(lease, row, now)
            return answer

        return self.both(watched, of_model, lost=lost)

    def too_short_to_fence(self, lease: Lease) -> bool:
        """Whether the server would end our session for real, while its clock stands still for us."""
        row = self.product.tables.lease(lease.stream_id) if self.product.on_postgresql else None
        left = timedelta(0) if row is None or row[3] is None else row[3] - self.model.now
        return timedelta(0) < left < SHORTEST_ON_POSTGRESQL

    def move_clock(self, by: timedelta) -> None:
        """Move the database's clock, and the model's."""
        if by < timedelta(0):
            self.witness.set_back = True
        self.model.now += by
        self.product.clock.set(self.model.now)


def _outcome(call: Callable[[], R]) -> tuple[str | None, R | None]:
    """The refusal, with the error's fields, or None and the answer."""
    try:
        return None, call()
    except OutcomeUnknown:
        return "OutcomeUnknown", None
    except LeasesError as error:
        said = "" if vars(error) else str(error)
        return f"{type(error).__name__} {vars(error)} {said}".strip(), None
