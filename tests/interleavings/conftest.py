"""One database for all walks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import postgres
from tests.interleavings.database import Database, opened


@pytest.fixture(scope="session")
def database(server: postgres.Server) -> Iterator[Database]:
    with opened(server) as database:
        yield database
