"""The database where nobody wants it: full, read-only, locked, of another version, or being migrated by many."""

from __future__ import annotations

import resource
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

from leases import LeaseStore, SchemaOutdated, StoreError, StoreUnavailable
from leases.cli import main
from tests.canary import CANARY
from tests.conformance.driver import Loop, log_of, opened
from tests.hostile import values
from tests.hostile.laws import World, in_forks, in_time, judged
from tests.hostile.test_commands import ATTACKED, line
from tests.hostile.test_functions import functions, methods

READING = {"get", "list", "grants", "workers", "audit", "checkpoint", "read"}
"""The methods that only look."""

STREAMS = ("stream", "streams")

LOOKING = {"list", "show", "history", "audit", "workers"}
"""The commands that only look."""

STREAM_OF = {"expire": "held", "steal": "held", "release": "held", "resume": "paused"}
"""The stream that a method or a command has something to do with, if it is not `free`."""


def every_call(store: LeaseStore, world: World) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each method with good values, on a stream where there is something to do for it; and `fence`."""
    known = {**values.parameters(world.held), "stream_ids": [["new"]], "timeout": [timedelta(milliseconds=50)]}
    for target in (*methods(store), *functions(store)):
        if target.name not in ("advance_watermark", "protect", "unprotect"):
            given: dict[str, Any] = {each: known[each][0] for each in target.needed}
            if "stream_id" in given:
                given["stream_id"] = STREAM_OF.get(target.name, "free")
            if target.name == "retire":
                given["stream_ids"] = ["free"]
            if "timeout" in target.parameters:
                given["timeout"] = known["timeout"][0]
            yield target.name, partial(target.call, **given)


def every_command(url: str) -> Iterator[tuple[str, int]]:
    """Each command with good values, by its exit code; said in one line, and no password."""
    for name in ATTACKED:
        command = main.load(name)
        chosen = {str(each.name): STREAM_OF.get(name, "free") for each in command.params if each.name in STREAMS}
        if any(each.name == "timeout" for each in command.params):
            chosen["timeout"] = "50ms"
        if name == "run":
            chosen["ttl"] = "300ms"  # it ends when its heartbeat has given up
        if name == "register":
            chosen["streams"] = "new"
        with in_time():
            result = CliRunner().invoke(main, [name, *line(command, chosen)], env={"LEASES_DATABASE_URL": url})
        assert isinstance(result.exception, SystemExit | None)
        assert CANARY not in result.output
        if result.exit_code:
            assert result.stdout == ""
            assert result.stderr.startswith("leases: ")
            assert result.stderr.count("\n") == 1, result.stderr
        yield name, result.exit_code


# --- another version, no tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["9999", None], ids=["newer", "none"])
def test_a_schema_of_another_version(own_world: World, loop: Loop | None, version: str | None) -> None:
    """No call does anything, and each says so; nor does a command."""
    world = own_world
    change = (
        "DELETE FROM leases_alembic_version"
        if version is None
        else "UPDATE leases_alembic_version SET version_num = '9999'"
    )
    world.connection.execute(change)
    with opened(world.url, loop) as store:
        for name, call in every_call(store, world):
            assert isinstance(world.attacked(call), SchemaOutdated), name
    if loop is None:
        assert dict(every_command(world.url)) == {name: 123 if name == "run" else 4 for name in ATTACKED}
        assert world.look() == world.rows


# --- read-only -------------------------------------------------------------------------------------------------


def test_a_database_that_may_only_be_read(own_world: World, loop: Loop | None) -> None:
    """Who only looks can; nobody else."""
    world = own_world
    if world.url.startswith("sqlite"):
        world.connection.execute("PRAGMA journal_mode = DELETE")  # WAL needs a file that can be written
        url = world.url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true"
    else:
        read_only = make_url(world.url).update_query_dict({"options": "-c default_transaction_read_only=on"})
        url = read_only.render_as_string(hide_password=False)
    with opened(url, loop) as store:
        for name, call in every_call(store, world):
            error = world.attacked(call)
            assert (error is None) if name in READING else isinstance(error, StoreError), (name, error)
            assert not isinstance(error, SchemaOutdated), (name, error)
    if loop is None:
        expected = {name: 0 if name in LOOKING else 3 for name in ATTACKED} | {"run": 123}
        assert dict(every_command(url)) == expected
        assert world.look() == world.rows


# --- locked ----------------------------------------------------------------------------------------------------


def test_a_locked_file(sqlite_url: str, tmp_path: Path, loop: Loop | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who only looks is not in the way of the writer; everybody else is told to try again, in time."""
    monkeypatch.setattr("leases.engine.BUSY_TIMEOUT_MS", 20)
    monkeypatch.setattr("leases.cli.context.RETRY_FOR", timedelta(0))
    with closing(World(sqlite_url, tmp_path)) as world, opened(sqlite_url, loop, retry_for=timedelta(0)) as store:
        store.get("held")  # the tables are looked at once
        with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for name, call in every_call(store, world):
                error = judged(call)
                if name in READING:
                    assert error is None, (name, error)
                elif name in ("expire", "steal"):
                    assert error is not None, name
                else:
                    assert isinstance(error, StoreUnavailable), (name, error)
            if loop is None:
                codes = dict(every_command(sqlite_url))
                assert {codes[name] for name in LOOKING} == {0}
                assert {code for name, code in codes.items() if name not in LOOKING} <= {0, 1, 3, 123}
            other.execute("ROLLBACK")
        assert world.look() == world.rows
        assert store.release(world.held)


# --- a full disk -----------------------------------------------------------------------------------------------


@contextmanager
def small_disk(room: Path) -> Iterator[Callable[[], Any]]:
    """A file system of a megabyte in `room`; to call what it gives fills it."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(room)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("NOT ALLOWED to mount a small tmpfs; the limit of the file's size is tried all the same")

    def fill() -> None:
        with (room / "filler").open("wb", buffering=0) as filler:
            while True:
                try:
                    filler.write(b"x" * 4096)
                except OSError:
                    return

    try:
        yield fill
    finally:
        subprocess.run(["umount", "-l", str(room)], check=True)


@contextmanager
def small_files(room: Path) -> Iterator[Callable[[], Any]]:
    """To call what it gives forbids this process to make any file longer than the database is now."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own: an error instead of the end

    def limit() -> None:
        longest = max(file.stat().st_size for file in room.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, before[1]))

    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("small", [small_disk, small_files], ids=["disk", "files"])
def test_a_full_disk(
    small: Any, migrated_sqlite: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, loop: Loop | None
) -> None:
    """What does not fit is refused as a whole; what was accepted stays; with room again, work goes on."""
    room = tmp_path / "disk"
    room.mkdir()
    big = {f"e{number}": "x" * 4000 for number in range(100)}
    with small(room) as fill:
        shutil.copy(migrated_sqlite, room / "leases.db")
        url = f"sqlite:///{room / 'leases.db'}"
        with closing(World(url, tmp_path_factory.mktemp("kept"))) as world, opened(url, loop) as store:
            world.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            fill()
            error = judged(lambda: log_of(store).append(world.held, big, checkpoint="x" * 4000))
            assert isinstance(error, StoreError), error
            assert world.look() == world.rows
            for name, call in every_call(store, world):
                assert judged(call) is None or name not in READING, name
            if loop is None:
                assert set(dict(every_command(url)).values()) <= {0, 1, 3, 120, 123, 127}
            assert world.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    # (with the disk of `small_disk` the database is gone too)
    if small is small_files:
        with opened(url, loop) as store:
            lease = store.acquire("new after all", owner="w", ttl=timedelta(seconds=15))
            assert lease is not None


# --- many at once ----------------------------------------------------------------------------------------------


def test_many_migrate_at_once(empty_url: str) -> None:
    """Six processes migrate and begin to work at once: all get there, and the tables are made once."""
    told = in_forks(6, partial(begin_to_work, empty_url))
    assert sorted(told) == ["lost"] * 5 + ["won"], "\n".join(told)
    with LeaseStore(empty_url) as store:
        query = text("SELECT count(*) FROM leases_alembic_version")
        assert store.run(partial(Connection.scalar, statement=query)) == 1


def begin_to_work(url: str, number: int) -> str:
    """What a process does at its start; every other one looks before, and is told that there are no tables yet."""
    with LeaseStore(url) as store:
        if number % 2:
            error = judged(partial(store.get, "s"))
            assert isinstance(error, SchemaOutdated | StoreUnavailable | None), error
        store.migrate()
        lease = store.acquire("s", owner=str(number), ttl=timedelta(seconds=60))
        return "lost" if lease is None else "won"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, on each engine in turn."""
    if request.param == "sqlite":
        (tmp_path / "empty.db").touch()
        return f"sqlite:///{tmp_path / 'empty.db'}"
    url: str = request.getfixturevalue("empty_postgresql_url")
    return url
