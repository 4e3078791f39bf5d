"""A store that goes the direct way."""

from __future__ import annotations

import pytest

from leases import LeaseStore


@pytest.fixture
def looked(store: LeaseStore) -> LeaseStore:
    """A store that has looked at its tables."""
    store.register(["a", "b"])
    return store
