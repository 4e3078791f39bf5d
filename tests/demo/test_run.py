"""Whole runs, as a user starts them: real processes, struck and proved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Row, select

from leases import LeaseStore
from leases.cli.demo.ground import POOL
from leases.cli.demo.plan import batch_size
from leases.model import State
from leases.schema import lease_grants

KEYS = [
    "events_in_file", "events_in_log", "missing", "duplicated", "stale_accepted", "stale_refused",
    "takeovers", "takeover_seconds_max", "moved", "joined", "drained", "workers", "streams", "seconds",
]  # fmt: skip

COMMAND = [sys.executable, "-m", "leases.cli.demo"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small file: 240 events of 12 streams."""
    rows = [f"{number},s{number % 12},{number * 7 % 5}" for number in range(240)]
    file = tmp_path / "orders.csv"
    file.write_text("\n".join(["id,stream,amount", *rows]))
    return file


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """The directory that a run takes for its temporary files."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    return directory


@pytest.fixture
def demo(file: Path, temporary: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*options: str, by: tuple[str, str] = ("stream", "id")) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, str(file), "--stream-by", by[0], "--id-by", by[1], "--ttl", "1", *options],
            capture_output=True, text=True, timeout=150, check=False, env={**os.environ, "TMPDIR": str(temporary)},
        )  # fmt: skip

    return run


def grants_of(store: LeaseStore) -> list[Row[Any]]:
    return store.run(lambda connection: list(connection.execute(select(lease_grants))), read_only=True)


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.long(10)
def test_a_killed_and_a_frozen_worker_cost_nothing(
    demo: Callable[..., subprocess.CompletedProcess[str]], url: str, temporary: Path
) -> None:
    done = demo("--url", url, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = figures(done)
    assert list(found) == KEYS
    assert found["events_in_file"] == found["events_in_log"] == 240
    assert (found["missing"], found["duplicated"], found["stale_accepted"]) == (0, 0, 0)
    assert found["stale_refused"] >= 1
    assert found["takeovers"] >= 2
    assert found["takeover_seconds_max"] > 0.5
    assert (found["workers"], found["streams"]) == (4, 12)
    assert list(temporary.iterdir()) == []
    with LeaseStore(url) as store:
        assert {info.state for info in store.list(pool=POOL)} == {State.RETIRED}
        assert store.workers() == []
    again = demo("--url", url, "--json", "--workers", "1", "--kill", "0", "--freeze", "0")
    assert again.returncode == 0, again.stderr
    assert "cleared away 240 events of an earlier demo" in again.stderr
    assert (figures(again)["events_in_log"], figures(again)["takeovers"]) == (240, 0)


@pytest.mark.long(11)
def test_workers_join_and_leave_and_others_are_struck_and_it_costs_nothing(
    demo: Callable[..., subprocess.CompletedProcess[str]], file: Path, url: str
) -> None:
    rows = [f"{number},s{number % 24},x" for number in range(2400)]
    file.write_text("\n".join(["id,stream,amount", *rows]))
    options = ("--workers", "6", "--kill", "2", "--freeze", "1", "--join", "2", "--drain", "1", "--ttl", "3")
    done = demo("--url", url, "--json", *options)
    assert done.returncode == 0, done.stderr
    found = figures(done)
    assert list(found) == KEYS
    assert (found["events_in_log"], found["streams"], found["workers"]) == (2400, 24, 6)
    assert (found["missing"], found["duplicated"], found["stale_accepted"]) == (0, 0, 0)
    assert found["stale_refused"] >= 1
    assert found["takeovers"] >= 3
    assert (found["joined"], found["drained"]) == (2, 1)
    assert found["moved"] >= 1
    said = done.stderr
    assert "6 workers on" in said
    assert "2 to kill, 1 to freeze, 2 more to join, 1 to drain" in said
    begun = said.index("all have their shares of 24 streams, and begin to write")
    assert begun < min(said.index(" killed before a write"), said.index(" frozen before a write"))
    assert [said.count(text) for text in ("has joined", "is asked to leave", "and left")] == [2, 1, 1]
    with LeaseStore(url) as store:
        assert {info.state for info in store.list(pool=POOL)} == {State.RETIRED}
        assert store.workers() == []
        grants = grants_of(store)
    # The one who was asked to leave has released what it had last; those who came later were the first with nothing.
    ended = {grant.ended_at: grant.end_reason for grant in grants if grant.owner.endswith("-04")}
    assert ended[max(ended)] == "released"
    assert {grant.owner[-2:] for grant in grants if grant.fencing_token == 1} <= {
        f"0{number}" for number in range(1, 7)
    }


@pytest.mark.long(5)
def test_of_one_event_its_frozen_writer_is_refused_all_the_same(
    demo: Callable[..., subprocess.CompletedProcess[str]], file: Path, url: str
) -> None:
    file.write_text("id,stream\n1,only\n")
    done = demo("--url", url, "--json", "--workers", "4", "--join", "1", "--drain", "1")
    assert done.returncode == 0, done.stderr
    found = figures(done)
    assert (found["events_in_log"], found["missing"], found["duplicated"], found["stale_accepted"]) == (1, 0, 0, 0)
    assert (found["stale_refused"], found["joined"], found["drained"]) == (1, 1, 1)


def test_without_the_fence_the_frozen_workers_write_is_accepted_and_the_proof_says_so(
    demo: Callable[..., subprocess.CompletedProcess[str]], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    # Python imports it in each process: the workers' log lets every write pass.
    (site / "sitecustomize.py").write_text(
        "from sqlalchemy import select\n"
        "from leases import events, statements\n"
        "events.fence = lambda connection, lease: None\n"
        "events.fenced_row = lambda *_, **__: select(statements.STREAM.label('stream_id')).subquery('fenced')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    done = demo("--url", url, "--json", "--workers", "3")
    assert done.returncode == 1
    assert "was not refused" in done.stderr
    assert "the proof does not hold" in done.stderr
    found = figures(done)
    assert found["stale_accepted"] >= 1
    assert found["stale_refused"] == 0


def test_without_a_url_it_leaves_nothing_behind(
    demo: Callable[..., subprocess.CompletedProcess[str]], temporary: Path
) -> None:
    done = demo("--workers", "2", "--kill", "0", "--freeze", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("frozen before a write" in line for line in lines)
    assert any("refused: token 1, current 2" in line for line in lines)
    assert lines[-1] == "Every event is in the log exactly once, and no stale write got in."
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert list(temporary.iterdir()) == []


def test_a_file_with_too_few_streams_is_run_all_the_same(
    demo: Callable[..., subprocess.CompletedProcess[str]], file: Path
) -> None:
    file.write_text("id,stream\n1,only\n2,only\n")
    done = demo("--json", "--workers", "3")
    assert done.returncode == 0, done.stderr
    assert "only 1 of 2 workers could be struck" in done.stderr
    assert figures(done)["events_in_log"] == 2


@pytest.mark.parametrize(
    ("options", "by", "said"),
    [
        ((), ("nothing", "id"), "has no column 'nothing'; it has id, stream, amount"),
        ((), ("stream", "amount"), "'0' is on line 2 and on line 7"),
        ((), ("stream,", "id"), "leaves a column without a name"),
        (("--workers", "2"), ("stream", "id"), "use --workers 3 or more"),
        (
            ("--workers", "4", "--drain", "2"),
            ("stream", "id"),
            "and --drain 2 leave none of 4 workers at work; use --workers 5",
        ),
        (("--ttl", "nan"), ("stream", "id"), "--ttl must be 0.5 seconds or more"),
        (("--ttl", "0"), ("stream", "id"), "--ttl must be 0.5 seconds or more"),
        (("--ttl", "90000"), ("stream", "id"), "24 h"),
        (("--url", "mysql://me:secret@localhost/x"), ("stream", "id"), "no driver for the URL scheme"),
        (("--url", "sqlite://"), ("stream", "id"), "name a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    demo: Callable[..., subprocess.CompletedProcess[str]],
    options: tuple[str, ...],
    by: tuple[str, str],
    said: str,
    tmp_path: Path,
) -> None:
    database = tmp_path / "new.db"
    done = demo(*(options if "--url" in options else (*options, "--url", f"sqlite:///{database}")), by=by)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert not database.exists()


def test_a_database_that_cannot_be_reached_is_exit_code_3(
    demo: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = demo("--url", f"sqlite:///{tmp_path}/none/leases.db")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)


def test_streams_of_another_pool_are_exit_code_1(
    demo: Callable[..., subprocess.CompletedProcess[str]], sqlite_url: str
) -> None:
    with LeaseStore(sqlite_url) as store:
        store.register(["s3"])
    done = demo("--url", sqlite_url)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "use another database" in done.stderr


# --- ends before the end ---------------------------------------------------------------------------------------


@pytest.fixture
def frozen(file: Path, temporary: Path, sqlite_url: str) -> Iterator[subprocess.Popen[str]]:
    """A run that has just frozen a worker, for a minute."""
    process = subprocess.Popen(
        [*COMMAND, str(file), "--stream-by", "stream", "--id-by", "id", "--ttl", "60", "--kill", "0",
         "--url", sqlite_url, "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert process.stdout is not None
    assert any("frozen before a write" in line for line in process.stdout)
    with process:
        yield process
        process.kill()


def workers_of(url: str) -> list[int]:
    """The two workers of the run, as they have enlisted."""
    deadline = time.monotonic() + 10
    with LeaseStore(url) as store:
        while len(workers := store.workers()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(workers) == 2
    return [worker.pid for worker in workers]


def alive(pid: int) -> bool:
    """Whether a process runs, or is stopped: not one that is dead and waits for its parent to hear of it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def end_of(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_its_workers_and_gives_everything_back(
    frozen: subprocess.Popen[str], temporary: Path, sqlite_url: str, number: int, code: int
) -> None:
    workers = workers_of(sqlite_url)
    frozen.send_signal(number)
    _, errors = frozen.communicate(timeout=20)
    assert frozen.returncode == code
    assert errors == "leases: interrupted; the workers have been ended\n"
    assert end_of(workers)
    assert list(temporary.iterdir()) == []
    with LeaseStore(sqlite_url) as store:
        assert not any(info.live for info in store.list(pool=POOL))


def test_workers_do_not_outlive_a_supervisor_that_was_killed(frozen: subprocess.Popen[str], sqlite_url: str) -> None:
    workers = workers_of(sqlite_url)
    frozen.kill()
    frozen.wait()
    assert end_of(workers)


def test_a_longer_file_is_written_in_longer_batches() -> None:
    assert [batch_size(events) for events in (1, 6099, 50_000, 10_000_000)] == [5, 6, 50, 500]
