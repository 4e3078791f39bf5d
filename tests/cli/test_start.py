"""A command imports what it needs, and nothing else: an operator waits for each import."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATER = {"aiosqlite", "alembic", "rich", "sqlalchemy.ext.asyncio", "sqlalchemy.orm"}
"""What is imported when it is first used; together it takes as long as all the rest."""

LOADED = "import sys, leases.cli; leases.cli.main.load(sys.argv[1]); print(*sys.modules)"


@pytest.mark.parametrize(
    ("command", "uses"), [("run", set()), ("work", set()), ("list", {"rich"})], ids=["run", "work", "list"]
)
def test_a_command_does_not_wait_for_the_imports_of_others(command: str, uses: set[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, command], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "sqlalchemy" in loaded
    assert loaded & LATER == uses
