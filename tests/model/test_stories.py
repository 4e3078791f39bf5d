"""Stories that the model has found, the shortest of each, as tests of their own."""

from __future__ import annotations

from datetime import timedelta

from leases.model import EndReason
from tests.model.product import Product

TTL = timedelta(seconds=15)


def test_a_steal_whose_first_answer_was_lost_is_recorded_as_a_steal(product: Product) -> None:
    product.reset()
    product.store.acquire("a", owner="one", ttl=TTL)
    product.store.lose(1)
    product.store.steal("a", to="two", ttl=TTL, actor="op")
    assert product.store.grants("a")[1].end_reason == EndReason.STOLEN
