"""Fixtures of the tests of the worker: no test leaves a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.waiting import until
from tests.worker.helpers import Seen


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    until(
        lambda: not [each.name for each in threading.enumerate() if each.name.startswith("leases-")],
        f"no thread of a worker is left: {threading.enumerate()}",
    )
