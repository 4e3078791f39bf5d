"""How tests wait for what other threads and processes do: they ask until it is so, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 60.0
"""Long beyond what anything takes on a busy machine: whoever waits so long waits in vain."""

EVERY_S = 0.01


def until(condition: Callable[[], T], what: str = "what was waited for") -> T:
    """Ask until the answer is true, and return it; fail if that takes too long."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not (answer := condition()):
        assert time.monotonic() < give_up_at, f"it did not come true in {PATIENCE_S:g} s: {what}"
        time.sleep(EVERY_S)
    return answer
