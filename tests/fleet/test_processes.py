"""Workers as processes of their own: a fleet on PostgreSQL, signals, the end of the interpreter, forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from leases import LeaseStore
from tests.waiting import until

PATIENCE_S = 60.0
POLL_S = 1.0
ROOT = Path(__file__).parents[2]


class Process:
    """A worker that runs by `leases work`."""

    def __init__(self, url: str, name: str, *options: str, handler: str = "idle") -> None:
        self.name = name
        command = [sys.executable, "-m", "leases.cli", "work", f"tests.fleet.handlers:{handler}", "--name", name]
        self.popen = subprocess.Popen(
            [*command, *options],
            cwd=ROOT,
            env={**os.environ, "LEASES_DATABASE_URL": url},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Wait until it has ended; its exit code, and what it said."""
        _, said = self.popen.communicate(timeout=PATIENCE_S)
        return self.popen.returncode, said

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        if self.popen.stderr is not None:
            self.popen.stderr.close()


@pytest.fixture
def started() -> Iterator[Callable[..., Process]]:
    """Start workers; those that are left at the end are killed, stopped or not."""
    with ExitStack() as stack:

        def start(*arguments: str, **options: str) -> Process:
            process = Process(*arguments, **options)
            stack.callback(process.close)
            return process

        yield start


def counts(store: LeaseStore) -> dict[str, int]:
    """How many live leases each owner has."""
    query = (
        "SELECT owner, count(*) FROM leases WHERE owner IS NOT NULL AND expires_at > statement_timestamp() GROUP BY 1"
    )
    return store.run(lambda connection: {row[0]: row[1] for row in connection.execute(text(query))}, read_only=True)


def scalar(store: LeaseStore, query: str, **values: Any) -> Any:
    return store.run(lambda connection: connection.execute(text(query), values).scalar_one(), read_only=True)


@pytest.mark.long(18)
def test_a_fleet_of_processes_settles_after_kills_a_freeze_a_drain_and_joins(
    postgresql_url: str, started: Callable[..., Process]
) -> None:
    ttl = timedelta(seconds=4)
    options = ("--ttl", "4s", "--poll-interval", f"{POLL_S}s", "--quiet")
    with LeaseStore(postgresql_url) as store:
        store.register(f"s{number:03}" for number in range(400))
        fleet = {name: started(postgresql_url, name, *options) for name in (f"w{number}" for number in range(8))}

        def holds_all(names: set[str]) -> bool:
            found = counts(store)
            return (
                found.keys() == names and sum(found.values()) == 400 and max(found.values()) - min(found.values()) <= 1
            )

        until(lambda: holds_all(set(fleet)), "eight workers share 400 streams")

        for name in ("w0", "w1"):
            fleet[name].popen.kill()
        fleet["w2"].popen.send_signal(signal.SIGSTOP)
        assert store.drain("w3")
        for name in ("w8", "w9"):
            fleet[name] = started(postgresql_url, name, *options)
        left = {"w4", "w5", "w6", "w7", "w8", "w9"}
        until(lambda: holds_all(left), "the six that are left share them")
        assert fleet["w3"].end() == (0, "")

        # The last change: a lease of a dead or frozen worker that ended, the one that drained, one that joined.
        changed: datetime = scalar(
            store,
            "SELECT greatest((SELECT max(ended_at) FROM lease_grants WHERE owner IN ('w0', 'w1', 'w2', 'w3')), "
            "(SELECT max(started_at) FROM lease_workers WHERE worker_id IN ('w8', 'w9')))",
        )
        settled: datetime = scalar(store, "SELECT max(granted_at) FROM lease_grants")
        assert settled - changed <= timedelta(seconds=3 * POLL_S)
        quiet_at = settled + timedelta(seconds=10 * POLL_S)
        until(lambda: scalar(store, "SELECT statement_timestamp() > :at", at=quiet_at), "ten polls have passed")
        assert scalar(store, "SELECT max(granted_at) FROM lease_grants") == settled, (
            "leases move though nothing happens"
        )
        assert holds_all(left)
        assert ttl < timedelta(seconds=10 * POLL_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(url: str, started: Callable[..., Process], number: signal.Signals) -> None:
    with LeaseStore(url) as store:
        store.register(["a", "b"])
        worker = started(url, "w1", "--poll-interval", "100ms", handler="count_up")
        until(lambda: store.checkpoint("a") and store.checkpoint("b"), "it works on both")
        worker.popen.send_signal(number)
        code, said = worker.end()
        assert code == 0
        assert said.splitlines()[-1] == "leases: w1 has ended"
        assert "Traceback" not in said
        assert {info.owner for info in store.list()} == {None}
        assert store.workers() == []


PROGRAM = """
import logging, os, sys, threading, time
from datetime import timedelta
from leases import LeaseStore, Worker
from tests.fleet.handlers import count_up

store = LeaseStore(sys.argv[1])
holds = threading.Event()

def handle(session):
    holds.set()
    if sys.argv[2] == "deaf":
        threading.Event().wait()
    return count_up(session)

worker = Worker(store, handle, streams=["a"], name="w1", poll_interval=timedelta(seconds=0.1)).start()
assert holds.wait(30)
"""

ENDINGS = {
    "returns": "",
    "raises": "raise ZeroDivisionError('the program fails')",
    "exits": "sys.exit(7)",
    "deaf": "",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_that_ends_without_stopping_its_worker_releases_all_the_same(url: str, ending: str) -> None:
    with LeaseStore(url) as store:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM + ENDINGS[ending], url, ending],
            cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == {"raises": 1, "exits": 7}.get(ending, 0), done.stderr
        assert {info.owner for info in store.list()} == {None}
        assert store.workers() == []


FORKS = (
    PROGRAM
    + """
session = worker.sessions["a"]
child = os.fork()
if child == 0:
    # Nothing here is the child's: not the lease, and not the connections.
    wrong = [
        not session.lost.is_set(), not session.stopping.is_set(), session.remaining() > timedelta(0),
    ]
    if sys.argv[1].startswith("postgresql"):  # SQLite itself does not bear a fork while another thread uses it
        with LeaseStore(sys.argv[1]) as own:
            wrong.append(own.get("a").owner != "w1")
        wrong.append(store.get("a").owner != "w1")  # a store of the parent's opens connections of its own
    os._exit(1 if any(wrong) else 0)  # as multiprocessing's children do
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
at = session.wrote
deadline = time.monotonic() + 30
while session.wrote < at + 5:
    assert time.monotonic() < deadline
    time.sleep(0.01)
assert not session.lost.is_set() and worker.health().failures == 0
worker.stop()
"""
)


def test_a_forked_child_holds_nothing_and_costs_its_parent_nothing(url: str) -> None:
    with LeaseStore(url) as store:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", FORKS, url, "forks"],
            cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert {info.owner for info in store.list()} == {None}
