"""The PostgreSQL of a run: it can be crashed and started again, and its WAL tells the order of commits."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests import postgres

SETTINGS = {
    "max_connections": "90",
    "synchronous_commit": "off",  # what the protocol needs to be durable, it has to make so by itself
    "wal_writer_delay": "10s",  # what nobody waits for is lost in a crash, not only what is of the last moment
    "wal_keep_size": "20GB",  # the checker reads all of it
    "max_wal_size": "1GB",
    "log_min_messages": "fatal",
    "tcp_keepalives_idle": "5",
}

COMMIT = re.compile(r"tx:\s+(\d+), .*desc: COMMIT (.*)$")
OTHERS = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"""

SUBTRANSACTIONS = re.compile(r"subxacts:((?: \d+)+)")


class Postgres:
    """A running server that may be crashed. `url` leads to it directly, without the proxy."""

    def __init__(self, server: postgres.Server) -> None:
        if server.directory is None:
            raise RuntimeError("chaos crashes its server: it takes one of its own; unset LEASES_TEST_POSTGRES_URL")
        self.url = server.url
        self._directory = server.directory
        self._data = server.directory / "data"
        home = postgres.installed(os.environ.get("LEASES_TEST_POSTGRES_VERSION", "18"))
        copy = server.directory / "installed" / home.parent.name / home.name
        self._home = copy if copy.exists() else home
        self._user = pwd.getpwuid(self._data.stat().st_uid).pw_name if os.geteuid() == 0 else None
        with self.connect() as connection:
            (self._begin,) = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone() or ("",)

    @property
    def address(self) -> tuple[str, int]:
        assert self.url.host is not None
        assert self.url.port is not None
        return self.url.host, self.url.port

    def through(self, port: int) -> str:
        """The URL of the same database by another port."""
        return self.url.set(port=port).render_as_string(hide_password=False)

    def connect(self) -> psycopg.Connection[tuple[str, ...]]:
        host, port = self.address
        return psycopg.connect(
            host=host, port=port, user=self.url.username, dbname=self.url.database, autocommit=True, connect_timeout=5
        )

    def crash(self) -> None:
        self._control("-m", "immediate", "-w", "-t", "60", "stop")

    def start(self) -> None:
        self._control("-l", str(self._directory / "log"), "-w", "-t", "60", "start")

    def _control(self, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        subprocess.run(
            [str(self._home / "bin" / "pg_ctl"), "-D", str(self._data), *arguments],
            env={**environment, "HOME": str(self._directory), "LC_ALL": "C"},
            user=self._user, cwd=self._directory, check=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def commits(self) -> dict[int, int]:
        """The transactions in the order of their COMMIT records in the WAL: transaction id -> place."""
        with self.connect() as connection:
            while any(connection.execute(OTHERS)):  # what a dead client has sent may still be at work
                time.sleep(0.02)
            settle(connection)
            (end,) = connection.execute("SELECT pg_current_wal_flush_lsn()").fetchone() or ("",)
        command: list[str | Path] = [self._home / "bin" / "pg_waldump", "--path", self._data / "pg_wal"]
        command += ["--rmgr", "Transaction", "--start", self._begin, "--end", end]
        places: dict[int, int] = {}
        with subprocess.Popen(
            command, env={"LC_ALL": "C"}, user=self._user, cwd=self._directory, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ) as dump:  # fmt: skip
            assert dump.stdout is not None
            assert dump.stderr is not None
            for line in dump.stdout:
                found = COMMIT.search(line)
                if found is None:
                    continue
                inner = SUBTRANSACTIONS.search(found[2])
                for xid in (found[1], *(inner[1].split() if inner else ())):
                    if int(xid) in places:
                        raise RuntimeError(f"transaction {xid} is committed twice in the WAL")
                    places[int(xid)] = len(places)
            said = dump.stderr.read()
        if dump.returncode:
            raise RuntimeError(f"pg_waldump failed: {said}")
        return places


def settle(connection: psycopg.Connection[tuple[str, ...]]) -> None:
    """Make all that was committed durable: a commit that waits for the WAL's file waits for all before it.

    It has to write something, or it would not wait.
    """
    with connection.transaction():
        connection.execute("SET LOCAL synchronous_commit = on")
        connection.execute("SELECT pg_logical_emit_message(true, 'chaos', 'settled')")


@contextmanager
def running() -> Iterator[Postgres]:
    with postgres.running(SETTINGS) as server:
        yield Postgres(server)
