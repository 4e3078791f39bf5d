"""The command at a terminal and in a pipe: questions, Ctrl-C, a reader that goes away."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from leases import LeaseStore
from tests.cli.conftest import Start, ended
from tests.waiting import until

TTL = timedelta(seconds=60)


class Terminal:
    """A command at a terminal of its own: what it shows, and what is typed."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.shown = ""
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "LEASES_DATABASE_URL": url, "TERM": "xterm", "COLUMNS": "80"}
            os.execve(sys.executable, [sys.executable, "-m", "leases.cli", *arguments], environment)

    def expect(self, pattern: str, timeout_s: float = 15) -> None:
        give_up_at = time.monotonic() + timeout_s
        while not re.search(pattern, self.shown):
            assert time.monotonic() < give_up_at, self.shown
            assert self._read(), self.shown

    def _read(self) -> bool:
        if not select.select([self._descriptor], [], [], 0.1)[0]:
            return True
        try:
            more = os.read(self._descriptor, 10_000)
        except OSError:  # Linux's way of saying that nobody has it open any more
            return False
        self.shown += more.decode()
        return bool(more)

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def end(self, again: str = "") -> int:
        """Wait for the end; return the exit code. What may get lost while the terminal is set is typed `again`."""
        type_at = time.monotonic() + 2
        while self._read():
            if again and time.monotonic() >= type_at:
                type_at = time.monotonic() + 2
                self.type(again)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        assert "Traceback" not in self.shown
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._descriptor)


@contextmanager
def terminal(url: str, *arguments: str) -> Iterator[Terminal]:
    opened = Terminal(url, *arguments)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def held_url(sqlite_url: str) -> str:
    """A database in which w1 holds the stream s."""
    with LeaseStore(sqlite_url) as store:
        assert store.acquire("s", owner="w1", ttl=TTL)
    return sqlite_url


def owner(url: str) -> str | None:
    with LeaseStore(url) as store:
        return store.list()[0].owner


@pytest.mark.parametrize(
    "command",
    [
        ("expire", "s", "--reason", "x"),
        ("steal", "s", "--to", "w2", "--reason", "x"),
        ("release", "s"),
        ("raise-tokens",),
    ],
)
@pytest.mark.parametrize("answer", ["y", "n"])
def test_it_shows_what_is_about_to_happen_and_asks(command: tuple[str, ...], answer: str, held_url: str) -> None:
    with terminal(held_url, *command) as opened:
        opened.expect(r"\[y/N\]")
        shown = " ".join(opened.shown.split())
        assert held_url in shown
        assert "w1, token 1, " in shown or "1 stream, 1 of them held" in shown
        assert owner(held_url) == "w1"
        opened.type(f"{answer}\n")
        assert opened.end() == (0 if answer == "y" else 1)
        assert ("nothing was changed" in opened.shown) == (answer == "n")
    assert (owner(held_url) == "w1") == (answer == "n")


def test_prune_asks_only_if_something_goes(held_url: str) -> None:
    with terminal(held_url, "prune", "--older-than", "1h") as opened:
        assert opened.end() == 0
        assert "[y/N]" not in opened.shown


def test_ctrl_c_at_a_question_is_130(held_url: str) -> None:
    with terminal(held_url, "expire", "s", "--reason", "x") as opened:
        opened.expect(r"\[y/N\]")
        opened.type("\x03")
        assert opened.end(again="\x03") == 130
        assert "leases: interrupted" in opened.shown
    assert owner(held_url) == "w1"


def test_a_terminal_gets_colours_and_a_pipe_does_not(held_url: str, start: Start) -> None:
    with terminal(held_url, "list") as opened:
        assert opened.end() == 0
        assert "\x1b[32mheld" in opened.shown
    assert "\x1b" not in ended(start(held_url, "list")).out


def test_the_command_that_runs_has_the_terminal(sqlite_url: str) -> None:
    with terminal(sqlite_url, "run", "s", "-q", "--", "sh", "-c", "echo ready; read line; echo got $line") as opened:
        opened.expect("ready")
        opened.type("something\n")
        opened.expect("got something")
        assert opened.end() == 0


def test_ctrl_c_ends_the_command_that_runs(sqlite_url: str) -> None:
    with terminal(sqlite_url, "run", "s", "-q", "--", "sh", "-c", "echo ready; exec sleep 60") as opened:
        opened.expect("ready")
        opened.type("\x03")
        assert opened.end(again="\x03") == 130
    assert owner(sqlite_url) is None


def test_the_command_that_runs_cannot_be_suspended(sqlite_url: str) -> None:
    with terminal(sqlite_url, "run", "s", "-q", "--", "sh", "-c", "echo ready; read line; echo got $line") as opened:
        opened.expect("ready")
        opened.type("\x1a")
        opened.type("something\n")
        opened.expect("got something")
        assert opened.end() == 0


def test_a_reader_that_goes_away_is_no_failure(sqlite_url: str, start: Start) -> None:
    with LeaseStore(sqlite_url) as store:
        store.register([f"stream-{number}" for number in range(5000)])
    for options in ((), ("--json",)):
        process = start(sqlite_url, "list", *options)
        assert process.stdout is not None
        assert "STREAM" in process.stdout.readline().upper()
        process.stdout.close()
        process.stdout = None
        outcome = ended(process)
        assert (outcome.code, outcome.err) == (141, "")


def test_ctrl_c_is_one_line_and_130(postgresql_url: str, start: Start) -> None:
    with LeaseStore(postgresql_url) as store:
        lease = store.acquire("s", owner="w1", ttl=TTL)
        assert lease is not None
        with store.fenced(lease):
            process = start(postgresql_url, "expire", "s", "--reason", "x", "--yes", "--timeout", "50s")
            until(lambda: not store.list()[0].live)  # the first step is done, the second waits
            process.send_signal(signal.SIGINT)
            outcome = ended(process)
    assert (outcome.code, outcome.err) == (130, "leases: interrupted\n")


def test_an_output_that_is_full_is_one_line(held_url: str, start: Start) -> None:
    with open("/dev/full", "w") as full:
        outcome = ended(start(held_url, "list", "--json", stdout=full))
    assert outcome.code == 70
    assert "No space left" in outcome.err
    assert outcome.err.count("\n") == 1


def test_closed_outputs_are_no_failure(held_url: str) -> None:
    command = f"{sys.executable} -m leases.cli list --url {held_url} >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0


def test_a_terminal_without_unicode_is_no_failure(held_url: str, start: Start) -> None:
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    with LeaseStore(held_url) as store:
        store.register(["ストリーム"])
    for command in (("list",), ("expire", "s", "--reason", "x", "--yes")):
        assert ended(start(held_url, *command, environment=environment)).code == 0
