"""The laws that every attack is judged by, and the world that it happens in."""

from __future__ import annotations

import os
import signal
import sqlite3
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg
from sqlalchemy.engine import make_url

from leases import Lease, LeasesError, LeaseStore
from leases.model import Membership
from leases.schema import metadata
from tests.canary import CANARY

PATIENCE_S = 10
"""Within this every call is over: nothing in these tests waits for anybody longer than two seconds."""

TABLES = sorted(metadata.tables)
LOOKS = {table: f"SELECT * FROM {table} ORDER BY 1, 2" for table in TABLES}


class Hang(BaseException):
    """A call was not over in time. Not an Exception: nothing may take it for one of its own."""


@contextmanager
def in_time(seconds: float = PATIENCE_S) -> Iterator[None]:
    """Raise `Hang` in the main thread after so long."""

    def alarm(number: int, frame: FrameType | None) -> None:
        raise Hang(f"not over after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Broken(Exception):
    """A law was broken: by an error that is none of ours (its name is in `escaped`), or in another way."""

    @property
    def escaped(self) -> str:
        return type(self.__cause__).__name__


def judged(call: Callable[[], Any], *, also: tuple[type[Exception], ...] = ()) -> LeasesError | None:
    """Call, and return the error that came out: one of ours or nothing, in time, and without a password."""
    try:
        with in_time():
            call()
    except LeasesError as error:
        if CANARY in _said(error):
            raise Broken(f"the password is in the error {type(error).__name__}") from None
        return error
    except also:
        return None
    except Exception as error:
        raise Broken(f"{type(error).__name__}: {str(error)[:200]}") from error
    return None


def _said(error: BaseException) -> str:
    """All that a traceback would show of an error, but for the lines of code; and its fields."""
    said = ""
    shown: BaseException | None = error
    while shown is not None:
        said += "".join(traceback.format_exception_only(shown)) + repr(vars(shown))
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    return said


class World:
    """A migrated database with a few streams, one of them held, and a live worker; to be looked at, and put back."""

    def __init__(self, url: str, room: Path) -> None:
        self.url = url
        with LeaseStore(url) as store:
            store.register(["held", "free", "paused", "retired", "expired"])
            held = store.acquire("held", owner="w", ttl=timedelta(hours=24))
            store.acquire("expired", owner="dead", ttl=timedelta(milliseconds=10))
            store.pause("paused", actor="op")
            store.retire(["retired"])
            store.enlist(Membership("lively", "host", 1, "1", pool="default"), ttl=timedelta(hours=24))
        assert held is not None
        self.held: Lease = held
        parsed = make_url(url)
        self.connection: Any
        self._kept = room / "kept.db"
        if parsed.get_backend_name() == "sqlite":
            self.connection = sqlite3.connect(str(parsed.database), isolation_level=None, timeout=5)
            self.connection.execute("PRAGMA synchronous = OFF")
            with closing(sqlite3.connect(self._kept)) as kept:
                self.connection.backup(kept)
        else:
            plain = parsed.set(drivername="postgresql").render_as_string(hide_password=False)
            self.connection = psycopg.connect(plain, autocommit=True)
            self.connection.execute("CREATE SCHEMA kept; SET session_replication_role = replica")  # past the guards
            for table in TABLES:
                self.connection.execute(f"CREATE TABLE kept.{table} AS TABLE {table}")
        self.rows = self.look()

    def look(self) -> dict[str, list[tuple[Any, ...]]]:
        """All rows of all tables."""
        if isinstance(self.connection, sqlite3.Connection):
            return {table: self.connection.execute(query).fetchall() for table, query in LOOKS.items()}
        cursor = self.connection.execute("; ".join(LOOKS.values()))  # in one go
        rows = {}
        for table in TABLES:
            rows[table] = cursor.fetchall()
            cursor.nextset()
        return rows

    def attacked(self, call: Callable[[], Any], *, also: tuple[type[Exception], ...] = ()) -> LeasesError | None:
        """Judge a call: also a refused one must not have changed a row. What an accepted one did is undone."""
        error = judged(call, also=also)
        rows = self.look()
        if rows != self.rows:
            self.put_back()
            if error is not None:
                raise Broken(f"refused with {error!r}, and yet rows have changed")
        return error

    def restored(self) -> World:
        """Itself, with all rows what they were at first."""
        if self.look() != self.rows:
            self.put_back()
        return self

    def put_back(self) -> None:
        """Make all rows what they were at first."""
        if isinstance(self.connection, sqlite3.Connection):
            with closing(sqlite3.connect(self._kept)) as kept:
                kept.backup(self.connection)
            return
        with self.connection.transaction():
            self.connection.execute(
                "; ".join(f"DELETE FROM {table}; INSERT INTO {table} TABLE kept.{table}" for table in TABLES)
            )

    def close(self) -> None:
        self.connection.close()


def in_forks(count: int, call: Callable[[int], str]) -> list[str]:
    """Call in so many forked children at once, which end without any of the parent's endings; return what each said."""
    waiting, go = os.pipe()
    children = []
    for number in range(count):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: of a process with threads
            child = os.fork()
        if child == 0:
            said = ""
            try:
                os.close(go)
                os.read(waiting, 1)  # until the parent has forked all
                said = call(number)
            except BaseException:
                said = traceback.format_exc()
                raise
            finally:
                os.write(writer, said.encode(errors="replace")[:60_000])
                os._exit(0)
        os.close(writer)
        children.append((child, reader))
    os.close(go)
    os.close(waiting)
    told = []
    for child, reader in children:
        with os.fdopen(reader) as answer:
            told.append(answer.read())
        assert os.waitpid(child, 0)[1] == 0
    return told
