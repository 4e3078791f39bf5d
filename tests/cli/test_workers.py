"""work, workers, drain: as an operator meets them."""

from __future__ import annotations

import json
import signal
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from leases import LeaseStore, Worker
from leases.model import Membership
from tests.cli.conftest import PASSWORD, Leases, Start, ended
from tests.waiting import until

TTL = timedelta(seconds=60)
HANDLER = "tests.fleet.handlers:count_up"


def enlist(store: LeaseStore, name: str, ttl: timedelta = TTL, **terms: Any) -> None:
    store.enlist(Membership(name, "host", 7, "1", **{"pool": "default", **terms}), ttl=ttl)


# --- workers -------------------------------------------------------------------------------------------------------


def test_workers_shows_what_each_holds_and_its_share(leases: Leases, store: LeaseStore) -> None:
    store.register(f"s{number}" for number in range(9))
    enlist(store, "one", weight=2.0)
    enlist(store, "two", capacity=5)
    store.claim(owner="one", ttl=TTL, limit=4, held=0)
    done = leases("workers")
    assert done.code == 0
    heading, one, two = done.out.splitlines()
    assert heading.split() == ["WORKER", "STATE", "HELD", "SHARE", "CAPACITY", "LAST", "BEAT"]
    assert one.split()[:5] == ["one", "active", "4", "6", "-"]
    assert two.split()[:5] == ["two", "active", "0", "3", "5"]
    assert one.endswith("s ago")
    assert max(map(len, done.out.splitlines())) <= 80


def test_workers_shows_the_dead_when_asked(leases: Leases, store: LeaseStore) -> None:
    enlist(store, "dead", ttl=timedelta(milliseconds=10))
    until(lambda: not any(info.live for info in store.workers()))
    assert leases("workers").err == "leases: no worker is alive; --dead shows dead ones\n"
    assert leases("workers", "--dead").out.splitlines()[1].split()[:4] == ["dead", "dead", "-", "-"]


def test_workers_of_one_pool_as_json(leases: Leases, store: LeaseStore) -> None:
    enlist(store, "one", pool="orders")
    enlist(store, "two")
    enlist(store, "runs", pool=None)
    only = leases("workers", "--pool", "orders", "--json").object
    assert (only["worker_id"], only["share"], only["live"], only["lease_count"]) == ("one", 0, True, 0)
    assert {each["worker_id"]: each["share"] for each in leases("workers", "--json").objects} == {
        "one": 0, "two": 0, "runs": None,
    }  # fmt: skip


# --- drain ---------------------------------------------------------------------------------------------------------


def test_drain_waits_until_the_worker_has_left(leases: Leases, store: LeaseStore) -> None:
    worker = Worker(store, lambda _: timedelta(seconds=1), streams=["a", "b"], name="w1").start()
    until(lambda: [info.lease_count for info in store.workers()] == [2])
    done = leases("drain", "w1", "--yes", "--actor", "me")
    assert (done.code, done.out, done.err) == (0, "w1: has left; it held 2 streams\n", "")
    assert store.workers() == []
    assert worker.wait(timedelta(seconds=10))
    assert leases("audit", "--json").object["reason"] == "worker w1"


def test_drain_says_so_when_a_worker_does_not_leave(leases: Leases, store: LeaseStore) -> None:
    enlist(store, "w1")
    done = leases("drain", "w1", "--yes", "--timeout", "300ms", "--json")
    assert done.code == 1
    assert done.object == {"worker_id": "w1", "held_before": 0, "left": False, "held": 0}
    assert done.err == "leases: w1 has not left within 0.3 s: it holds 0 streams still\n"
    assert leases("drain", "w1", "--yes", "--no-wait").out == "w1: asked to leave; it holds 0 streams\n"


def test_drain_says_so_when_a_worker_dies_first(leases: Leases, store: LeaseStore) -> None:
    enlist(store, "w1", ttl=timedelta(seconds=1))
    done = leases("drain", "w1", "--yes")
    assert (done.code, "died before it had left" in done.err) == (1, True)


def test_drain_refuses_what_is_no_worker(leases: Leases, store: LeaseStore) -> None:
    assert leases("drain", "w1", "--yes").err == "leases: no live worker is called 'w1'; none is alive\n"
    enlist(store, "w2")
    assert leases("drain", "w1", "--yes").err == "leases: no live worker is called 'w1'; alive: w2\n"
    enlist(store, "runs", pool=None)
    done = leases("drain", "runs", "--yes")
    assert (done.code, "no worker of a pool" in done.err) == (1, True)
    assert leases("drain", "w2").code == 2  # nobody can be asked


# --- work ----------------------------------------------------------------------------------------------------------


def test_work_shares_streams_from_a_file_until_it_is_asked_to_end(
    start: Start, url: str, store: LeaseStore, tmp_path: Path
) -> None:
    (tmp_path / "streams.txt").write_text("a\n\nb \n")
    streams = str(tmp_path / "streams.txt")
    worker = start(url, "work", HANDLER, "--streams", streams, "--name", "w1", "--poll-interval", "100ms")
    until(lambda: store.checkpoint("a") and store.checkpoint("b"))
    worker.send_signal(signal.SIGTERM)
    outcome = ended(worker)
    assert outcome.code == 0
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert lines[0] == "leases: w1 works on pool 'default'; INT or TERM drains it"
    assert "leases: draining: asked to leave" in lines
    assert lines[-1] == "leases: w1 has ended"
    assert {info.owner for info in store.list()} == {None}


def test_work_reads_streams_from_stdin_and_tells_all_in_json(start: Start, url: str, store: LeaseStore) -> None:
    worker = start(url, "work", HANDLER, "--streams", "-", "--name", "w1", "--json", stdin=subprocess.PIPE)
    assert worker.stdin is not None
    worker.stdin.write("a\n")
    worker.stdin.close()
    worker.stdin = None
    until(lambda: store.checkpoint("a"))
    worker.send_signal(signal.SIGINT)
    outcome = ended(worker)
    assert outcome.code == 0
    happened = [json.loads(line) for line in outcome.out.splitlines()]
    assert [each["happening"] for each in happened] == ["started", "granted", "draining", "released", "stopped"]
    assert (happened[1]["stream_id"], happened[1]["fencing_token"], happened[1]["owner"]) == ("a", 1, "w1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "'nothing' is not MODULE:HANDLER"),
        (["no.such.module:handle"], "there is no module 'no.such.module'"),
        (["tests.fleet.handlers:nothing"], "has no 'nothing'"),
        (["tests.fleet:__doc__"], "is no function, but str"),
        ([HANDLER, "--streams", "no/such/file"], "cannot read the streams from 'no/such/file'"),
        ([HANDLER, "--capacity", "-1"], "capacity"),
        ([HANDLER, "--weight", "0"], "weight must be a number greater than 0"),
        ([HANDLER, "--weight", "nan"], "weight must be a number greater than 0"),
        ([HANDLER, "--ttl", "0s"], "ttl must be between"),
        ([HANDLER, "--poll-interval", "0s"], "more than 0"),
        ([HANDLER, "--concurrency", "0"], "concurrency"),
        ([HANDLER, "--name", ""], "owner must have 1 to 255 characters"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(leases: Leases, arguments: list[str], said: str) -> None:
    done = leases("work", *arguments)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import no_such_package", "needs 'no_such_package', which is not installed"),
        ("1 / 0", "ZeroDivisionError: division by zero (broken.py, line 1)"),
        ("def handle(:", "SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(
    start: Start, sqlite_url: str, tmp_path: Path, program: str, said: str
) -> None:
    (tmp_path / "broken.py").write_text(program)
    outcome = ended(start(sqlite_url, "work", "broken:handle", cwd=tmp_path))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert said in outcome.err


@pytest.mark.parametrize("content", ["", "\n \n", "ok\nno\x00t\n", "\xff"])
def test_a_file_of_streams_that_cannot_be_used_is_one_line(leases: Leases, tmp_path: Path, content: str) -> None:
    (tmp_path / "streams").write_bytes(content.encode("latin-1"))
    done = leases("work", HANDLER, "--streams", str(tmp_path / "streams"))
    assert (done.code, done.err.count("\n")) == (2, 1)


def test_a_store_that_is_not_there_is_exit_code_3_without_its_password(start: Start) -> None:
    url = f"postgresql://me:{PASSWORD}@127.0.0.1:1/none"
    outcome = ended(start(url, "work", HANDLER))
    assert outcome.code == 3
    assert PASSWORD not in outcome.err


def test_a_second_worker_of_the_name_is_refused(leases: Leases, store: LeaseStore) -> None:
    enlist(store, "w1")
    done = leases("work", HANDLER, "--name", "w1")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "a worker named 'w1' is alive, pid 7 on host" in done.err
