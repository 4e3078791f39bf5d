"""A link to the tests' PostgreSQL, whose faults are the test's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import postgres
from tests.chaos import proxy
from tests.chaos.proxy import Link


@pytest.fixture
def server_link(server: postgres.Server) -> Iterator[Link]:
    assert server.url.host is not None
    assert server.url.port is not None
    with proxy.running((server.url.host, server.url.port), seed=0) as running:
        yield running.link()
