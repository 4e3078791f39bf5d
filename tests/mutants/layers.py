"""The layers of the tests: commands, each of which fails with exit code 1 when it finds a defect.

To add a layer, add its command here. A path under `tests/` is a layer by itself: pytest, on that path.
"""

from __future__ import annotations

import sys

PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-n", "0")

LAYERS: dict[str, tuple[str, ...]] = {
    "model": (sys.executable, "-m", "tests.model", "--steps", "10000", "--seed", "1"),
    "model-postgresql": (sys.executable, "-m", "tests.model", "--steps", "2000", "--seed", "1", "--url", "postgresql"),
    "keeper": (*PYTEST, "tests/test_keeper.py", "-k", "trust or deadline or hangs or locked_row or child"),
    "hypothesis": (*PYTEST, "tests/model", "-k", "hypothesis and sqlite"),
}


def command(layer: str) -> tuple[str, ...]:
    """The command of a layer."""
    if layer in LAYERS:
        return LAYERS[layer]
    if layer.startswith("tests/"):
        return (*PYTEST, *layer.split())
    raise KeyError(f"no layer is called {layer!r}")


def shown(layer: str) -> str:
    """The command of a layer, for people: without what only makes its output short."""
    words = command(layer)
    if words[: len(PYTEST)] == PYTEST:
        words = ("pytest", "-x", "-n", "0", *words[len(PYTEST) :])
    words = tuple("python" if word == sys.executable else word for word in words)
    return " ".join(word if " " not in word else f"'{word}'" for word in words)
