"""The product on each engine, to be compared with the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.model.product import Product, on_postgresql, on_sqlite


@pytest.fixture(params=["sqlite", "postgresql"])
def product(request: pytest.FixtureRequest) -> Iterator[Product]:
    """A product with a clock of its own, on each engine in turn."""
    if request.param == "sqlite":
        with on_sqlite() as product:
            yield product
    else:
        with on_postgresql(request.getfixturevalue("postgresql_url")) as product:
            yield product
