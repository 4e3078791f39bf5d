"""`leases run`: a command runs while the lease is held, and not longer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from leases import LeaseStore
from tests.cli.conftest import PASSWORD, Leases, Start, ended, held
from tests.waiting import until

TTL = timedelta(seconds=60)

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)

CATCHING = """
import signal, sys, time
def caught(*_):
    print('caught', flush=True)
    sys.exit(5)
signal.signal(int(sys.argv[1]), caught)
print('ready', flush=True)
time.sleep(60)
"""


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_command_finds_its_lease_in_its_environment(url: str, store: LeaseStore, start: Start) -> None:
    script = 'echo "$LEASE_STREAM_ID $LEASE_TOKEN $LEASE_OWNER $LEASES_DATABASE_URL"'
    outcome = ended(start(url, "run", "s", "--owner", "me", "--", "sh", "-c", script))
    assert (outcome.code, outcome.out) == (0, f"s 1 me {url}\n")
    assert outcome.err == "leases: holding 's' under token 1 as me\n"
    info = store.get("s")
    assert info is not None
    assert (info.owner, info.pool) == (None, "run")
    assert store.workers() == []


def test_a_url_given_as_an_option_is_passed_on(sqlite_url: str, start: Start) -> None:
    script = 'echo "$LEASES_DATABASE_URL"'
    process = start("mysql://not/this", "run", "s", "-q", "--url", sqlite_url, "--", "sh", "-c", script)
    assert ended(process).out == f"{sqlite_url}\n"


@pytest.mark.parametrize(
    ("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("exit 0", 0)]
)
def test_the_exit_code_of_the_command_is_passed_on(script: str, code: int, sqlite_url: str, start: Start) -> None:
    outcome = ended(start(sqlite_url, "run", "s", "--quiet", "--", "sh", "-c", script))
    assert (outcome.code, outcome.err) == (code, "")


def test_what_cannot_be_run_leaves_no_lease(sqlite_url: str, tmp_path: Path, start: Start) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for command, code in (("no-such-command", 127), (str(plain), 126)):
        outcome = ended(start(sqlite_url, "run", "s", "--quiet", "--", command))
        assert (outcome.code, outcome.out) == (code, "")
        assert outcome.err.startswith(f"leases: cannot run {command!r}: ")
        assert outcome.err.count("\n") == 1
    with LeaseStore(sqlite_url) as store:
        info = store.get("s")
        assert info is not None
        assert info.owner is None


def test_a_stream_that_another_holds_is_120(store: LeaseStore, leases: Leases) -> None:
    assert store.acquire("s", owner="w1", ttl=TTL)
    outcome = leases("run", "s", "--", "false")
    assert (outcome.code, outcome.out) == (120, "")
    assert outcome.err == "leases: 's' is held by w1; try again later, or wait for it\n"
    store.register(["paused"])
    store.pause("paused", actor="ann")
    assert leases("run", "paused", "--wait", "50ms", "--", "false").code == 120


def test_it_waits_for_the_stream(url: str, store: LeaseStore, start: Start) -> None:
    lease = store.acquire("s", owner="w1", ttl=TTL)
    assert lease is not None
    process = start(url, "run", "s", "--wait", "20s", "--", "echo", "done")
    until(lambda: len(store.workers()) == 1)
    assert process.poll() is None
    store.release(lease)
    outcome = ended(process)
    assert (outcome.code, outcome.out) == (0, "done\n")


def test_a_store_that_is_unavailable_is_123(bare: Leases) -> None:
    outcome = bare("run", "s", "--url", f"postgresql://u:{PASSWORD}@127.0.0.1:1/db", "--", "true")
    assert outcome.code == 123
    assert outcome.err.count("\n") == 1


def test_the_lease_is_kept_past_its_ttl(url: str, store: LeaseStore, start: Start) -> None:
    process = start(url, "run", "s", "--ttl", "500ms", "--", "sleep", "60")
    until(held(store, "s"))
    first = store.list()[0].expires_at
    assert first is not None
    until(lambda: (store.list()[0].expires_at or first) > first + timedelta(seconds=1))
    process.send_signal(signal.SIGTERM)
    assert ended(process).code == 143


def test_expired_by_an_operator_the_command_and_its_children_are_ended(
    url: str, store: LeaseStore, start: Start, bare: Leases
) -> None:
    process = start(url, "run", "s", "--ttl", "1s", "--", "sh", "-c", "sleep 60 & echo $!; wait")
    grandchild = int(line_of(process))
    assert bare("expire", "s", "--reason", "x", "--yes", "--url", url).code == 0
    outcome = ended(process)
    assert outcome.code == 121
    assert "lost the lease on 's', token 1 (revoked)" in outcome.err
    until(lambda: gone(grandchild))


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has reaped yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_what_ignores_term_is_killed_after_the_grace(sqlite_url: str, start: Start, bare: Leases) -> None:
    command = (sys.executable, "-c", STUBBORN)
    process = start(sqlite_url, "run", "s", "--ttl", "1s", "--grace", "300ms", "--json", "--", *command)
    assert line_of(process) == "ready"
    assert bare("expire", "s", "--reason", "x", "--yes", "--url", sqlite_url).code == 0
    outcome = ended(process)
    assert outcome.code == 121
    granted, lost = (json.loads(line) for line in outcome.err.splitlines())
    assert (granted["event"], granted["fencing_token"]) == ("granted", 1)
    assert (lost["event"], lost["reason"]) == ("lost", "revoked")


def test_a_lease_stolen_shortly_before_the_end_is_121(sqlite_url: str, start: Start, bare: Leases) -> None:
    """With this ttl no heartbeat tells it in time: the release finds it."""
    process = start(
        sqlite_url, "run", "s", "--ttl", "10m", "--", "sh", "-c", "echo ready; read line", stdin=subprocess.PIPE
    )
    assert line_of(process) == "ready"
    steal = ("steal", "s", "--to", "w2", "--reason", "x", "--yes", "--url", sqlite_url)
    assert bare(*steal).code == 0
    assert process.stdin is not None
    process.stdin.write("end\n")
    process.stdin.flush()
    outcome = ended(process)
    assert outcome.code == 121
    assert "lost the lease" in outcome.err
    with LeaseStore(sqlite_url) as store:
        assert store.list()[0].owner == "w2"


def test_frozen_past_its_ttl_it_ends_the_command_when_it_thaws(url: str, store: LeaseStore, start: Start) -> None:
    process = start(url, "run", "s", "--ttl", "1500ms", "--", "sh", "-c", "echo $$; exec sleep 60")
    child = int(line_of(process))
    first = store.list()[0].expires_at
    until(lambda: store.list()[0].expires_at != first)  # it has just beaten: it is frozen outside of a transaction
    process.send_signal(signal.SIGSTOP)
    until(lambda: not held(store, "s")())
    assert store.acquire("s", owner="w2", ttl=TTL)
    assert not gone(child)
    process.send_signal(signal.SIGCONT)
    assert ended(process).code == 121
    assert gone(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on(number: signal.Signals, sqlite_url: str, start: Start) -> None:
    process = start(sqlite_url, "run", "s", "--quiet", "--", sys.executable, "-c", CATCHING, str(int(number)))
    assert line_of(process) == "ready"
    process.send_signal(number)
    outcome = ended(process)
    assert (outcome.code, outcome.out, outcome.err) == (5, "caught\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_ends_it(number: signal.Signals, sqlite_url: str, start: Start) -> None:
    with LeaseStore(sqlite_url) as store:
        assert store.acquire("s", owner="w1", ttl=TTL)
        process = start(sqlite_url, "run", "s", "--wait", "1m", "--", "true")
        until(lambda: len(store.workers()) == 1)
        process.send_signal(number)
        outcome = ended(process)
        assert (outcome.code, outcome.err) == (128 + number, "leases: interrupted\n")
        assert store.workers() == []


def test_a_pause_lets_the_command_finish(sqlite_url: str, start: Start) -> None:
    process = start(
        sqlite_url, "run", "s", "--ttl", "500ms", "--", "sh", "-c", "echo ready; read line", stdin=subprocess.PIPE
    )
    assert line_of(process) == "ready"
    with LeaseStore(sqlite_url) as store:
        store.pause("s", actor="ann")
    assert process.stderr is not None
    assert "holding" in process.stderr.readline()
    assert "was paused or retired" in process.stderr.readline()
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    assert ended(process).code == 1


def drop(maintenance: Engine, url: str) -> None:
    with maintenance.connect() as connection:
        connection.execute(text(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)"))


def test_when_the_store_is_gone_the_command_ends_with_the_lease(
    postgresql_url: str, maintenance: Engine, start: Start
) -> None:
    process = start(postgresql_url, "run", "s", "--ttl", "1s", "--", "sh", "-c", "echo ready; exec sleep 60")
    assert line_of(process) == "ready"
    drop(maintenance, postgresql_url)
    outcome = ended(process)
    assert outcome.code == 121
    assert "(expired)" in outcome.err


def test_a_lease_that_cannot_be_let_go_does_not_change_the_exit_code(
    postgresql_url: str, maintenance: Engine, start: Start
) -> None:
    script = "echo ready; read line; exit 7"
    process = start(postgresql_url, "run", "s", "--ttl", "1h", "--", "sh", "-c", script, stdin=subprocess.PIPE)
    assert line_of(process) == "ready"
    drop(maintenance, postgresql_url)
    outcome = ended(process)
    assert outcome.code == 7
    assert "expires by itself" in outcome.err


def test_options_of_the_command_are_the_commands(sqlite_url: str, start: Start) -> None:
    outcome = ended(start(sqlite_url, "run", "s", "-q", "--", "echo", "--json", "--url", "x", "--", "-h"))
    assert outcome.out == "--json --url x -- -h\n"


def test_a_signal_that_is_ignored_stays_ignored(sqlite_url: str, start: Start) -> None:
    process = start(
        sqlite_url, "run", "s", "-q", "--", "sh", "-c", "echo ready; read line; exit 3",
        stdin=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert line_of(process) == "ready"
    os.kill(process.pid, signal.SIGHUP)
    assert ended(process).code == 3


def test_killed_itself_it_does_not_leave_the_command_behind(sqlite_url: str, start: Start) -> None:
    script = f"import os; print(os.getpid(), flush=True); {STUBBORN}"
    process = start(sqlite_url, "run", "s", "-q", "--grace", "1s", "--", sys.executable, "-c", script)
    command = int(line_of(process))
    assert line_of(process) == "ready"
    process.kill()
    until(lambda: gone(command))
