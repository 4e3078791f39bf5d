"""A PostgreSQL of a run: it can be crashed and started again, copied to a standby and promoted, and its WAL read."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

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
    "wal_retrieve_retry_interval": "100ms",  # a standby whose primary has crashed is back soon
}

COMMIT = re.compile(r"tx:\s+(\d+), .*desc: COMMIT (.*)$")
SUBTRANSACTIONS = re.compile(r"subxacts:((?: \d+)+)")

Connection = psycopg.Connection[tuple[str, ...]]


class Postgres:
    """A server with its data directory. `environment` is what its processes are started with, beside the usual."""

    def __init__(self, home: Path, data: Path, port: int, user: str | None) -> None:
        self.port = port
        self.environment: Mapping[str, str] = {}
        self._home = home
        self._data = data
        self._user = user

    @classmethod
    def of(cls, server: postgres.Server) -> Self:
        """A server that the tests have started."""
        if server.directory is None or server.url.port is None:
            raise RuntimeError("chaos crashes its server: it takes one of its own; unset LEASES_TEST_POSTGRES_URL")
        data = server.directory / "data"
        home = postgres.installed(os.environ.get("LEASES_TEST_POSTGRES_VERSION", "18"))
        copy = server.directory / "installed" / home.parent.name / home.name
        user = pwd.getpwuid(data.stat().st_uid).pw_name if os.geteuid() == 0 else None
        return cls(copy if copy.exists() else home, data, server.url.port, user)

    def connect(self) -> Connection:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="leases", dbname="postgres", autocommit=True, connect_timeout=5
        )

    # --- its life --------------------------------------------------------------------------------------------------

    def crash(self) -> None:
        self._control("-m", "immediate", "-w", "-t", "60", "stop")

    def start(self) -> None:
        self._control("-l", str(self._data.with_name(f"{self._data.name}.log")), "-w", "-t", "60", "start")

    def promote(self) -> None:
        self._control("-w", "-t", "60", "promote")

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", self._data, *arguments)

    def _run(self, program: str, *arguments: str | Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        subprocess.run(
            [self._home / "bin" / program, *arguments],
            env={**environment, "HOME": str(self._data.parent), "LC_ALL": "C", **self.environment},
            user=self._user, cwd=self._data.parent, check=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def standby(self, number: int) -> Postgres:
        """Copy it, and start the copy as a standby that follows it."""
        copy = Postgres(self._home, self._data.with_name(f"data{number}"), postgres.free_port(), self._user)
        copy.environment = self.environment
        source = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "leases")
        self._run("pg_basebackup", "-D", copy._data, *source, "-R", "-X", "stream", "-c", "fast", "--no-sync")
        with (copy._data / "postgresql.conf").open("a") as configuration:
            configuration.write(f"port = {copy.port}\n")
        copy.start()
        return copy

    # --- its WAL ---------------------------------------------------------------------------------------------------

    def came_at(self, timeline: int) -> str:
        """Where in the WAL a timeline began that this server was promoted to."""
        history = (self._data / "pg_wal" / f"{timeline:08X}.history").read_text().splitlines()
        return [line for line in history if line.strip()][-1].split("\t")[1]

    def commits(self, timeline: int, begin: str, end: str) -> Iterator[int]:
        """The transactions in the order of their COMMIT records in a part of the WAL."""
        command: list[str | Path] = [self._home / "bin" / "pg_waldump", "--path", self._data / "pg_wal"]
        command += ["--rmgr", "Transaction", "--timeline", str(timeline), "--start", begin, "--end", end]
        with subprocess.Popen(
            command, env={"LC_ALL": "C"}, user=self._user, cwd=self._data.parent, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ) as dump:  # fmt: skip
            assert dump.stdout is not None
            assert dump.stderr is not None
            for line in dump.stdout:
                found = COMMIT.search(line)
                if found is not None:
                    inner = SUBTRANSACTIONS.search(found[2])
                    yield from map(int, (found[1], *(inner[1].split() if inner else ())))
            said = dump.stderr.read()
        if dump.returncode:
            raise RuntimeError(f"pg_waldump failed: {said}")


def settle(connection: Connection) -> None:
    """Make all that was committed durable: a commit that waits for the WAL's file waits for all before it.

    It has to write something, or it would not wait.
    """
    with connection.transaction():
        connection.execute("SET LOCAL synchronous_commit = on")
        connection.execute("SELECT pg_logical_emit_message(true, 'chaos', 'settled')")
