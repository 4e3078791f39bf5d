"""The command as an operator meets it: in this process (`leases`), or in one of its own (`start`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from leases import LeaseStore
from leases.cli import main
from tests.canary import CANARY

PASSWORD = CANARY


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, and what it has printed."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def object(self) -> Any:
        (only,) = self.objects
        return only


Leases = Callable[..., Outcome]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def no_database_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test touches the data directory of whoever runs it, nor a database named in the environment."""
    monkeypatch.delenv("LEASES_DATABASE_URL", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def bare() -> Leases:
    """Run a command, of which no database is said."""

    def run(*arguments: str) -> Outcome:
        result = CliRunner().invoke(main, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        outcome = Outcome(result.exit_code, result.stdout, result.stderr)
        assert PASSWORD not in outcome.out + outcome.err
        assert "Traceback" not in outcome.err
        return outcome

    return run


@pytest.fixture
def leases(bare: Leases, url: str, monkeypatch: pytest.MonkeyPatch) -> Leases:
    """Run a command on a migrated database, on each engine in turn."""
    monkeypatch.setenv("LEASES_DATABASE_URL", url)
    return bare


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command in a process of its own; those that still run at the end are ended."""
    started: list[subprocess.Popen[str]] = []

    def run(url: str, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any) -> Any:
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        process = subprocess.Popen(
            [sys.executable, "-m", "leases.cli", *arguments],
            env={**os.environ, "LEASES_DATABASE_URL": url, **(environment or {})},
            text=True,
            **settings,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()  # first: `leases run` passes it on, and leaves no orphan
            try:
                process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def ended(process: subprocess.Popen[str], timeout_s: float = 20) -> Outcome:
    """Wait for a process to end."""
    out, err = process.communicate(timeout=timeout_s)
    assert "Traceback" not in (err or "")
    assert PASSWORD not in (out or "") + (err or "")
    return Outcome(process.returncode, out or "", err or "")


def held(store: LeaseStore, stream: str) -> Callable[[], bool]:
    def ask() -> bool:
        info = store.get(stream)
        return info is not None and info.live

    return ask
