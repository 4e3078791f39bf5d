"""The README runs: its Python as one program, its commands one after the other."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks("python")))
    assert "registry.open" in program.read_text()
    for _ in range(2):  # the second time on what the first one left
        done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_ten_lines_are_ten_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 10


@pytest.mark.long(25)
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) > 10
    environment = {**os.environ, "LEASES_DATABASE_URL": f"sqlite:///{tmp_path / 'leases.db'}"}
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "leases"
        done = subprocess.run(
            [sys.executable, "-m", "leases.cli", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def test_every_command_is_in_the_readme() -> None:
    from leases.cli import main

    documented = set(re.findall(r"`([a-z-]+)`", README))
    assert set(main.load_all()) <= documented
