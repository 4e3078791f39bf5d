"""Starts the contestants' servers: on free ports of 127.0.0.1, in a temporary directory, and only those asked for.

Binaries are found on PATH, as Debian's packages install them; PostgreSQL comes as in the tests. What is missing is an
`Absent` that names the package. All servers end with the `Servers`.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Self

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from benchmarks.contestant import Absent
from tests import postgres

START_S = 60.0

DURABLE = {
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "autovacuum": "on",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",  # no checkpoint within a round
}
"""PostgreSQL as one would run it, in place of the tests' settings."""

ZOOKEEPER_JARS = ("/usr/share/java", "zookeeper.jar")


@dataclass(frozen=True)
class PostgreSQL:
    """A running PostgreSQL, and how it may be trusted."""

    server: postgres.Server
    version: str
    durability: str

    def database(self, name: str) -> URL:
        """Create an empty database."""
        engine = create_engine(self.server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
        return self.server.url.set(database=name)

    def complaints(self) -> list[str]:
        return [line for line in self.server.log().splitlines() if "deadlock" in line]


class Servers:
    """Each server is started when it is first asked for."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.room = Path(tempfile.mkdtemp(prefix="leases-benchmark-"))
        self._stack.callback(shutil.rmtree, self.room, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def postgresql(self) -> PostgreSQL:
        try:
            server = self._stack.enter_context(postgres.running(DURABLE))
        except RuntimeError as error:
            raise Absent(str(error)) from None
        engine = create_engine(server.url, poolclass=NullPool)
        with engine.connect() as connection:
            version, fsync, commit = (
                connection.execute(text(f"SHOW {name}")).scalar_one()
                for name in ("server_version", "fsync", "synchronous_commit")
            )
        kept = "fsync" if (fsync, commit) == ("on", "on") else f"none: fsync {fsync}, synchronous_commit {commit}"
        return PostgreSQL(server, f"PostgreSQL {version}", kept)

    @cache  # noqa: B019  # lives as long as the run
    def redis(self, number: int = 0) -> int:
        """The port of a Redis without persistence, as redis-py's and pottery's own pages start one."""
        port = free_port()
        binary = found("redis-server", "redis-server")
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._run(f"redis-{number}", [binary, *options], lambda: answers(port, b"PING\r\n", b"+PONG"))
        return port

    @cached_property
    def redis_version(self) -> str:
        said = subprocess.run(
            [found("redis-server", "redis-server"), "--version"], capture_output=True, text=True, check=True
        ).stdout
        return "Redis " + said.partition("v=")[2].partition(" ")[0]

    @cached_property
    def etcd(self) -> tuple[int, str]:
        """The client port of an etcd of one member, and its version."""
        binary = found("etcd", "etcd-server")
        port, peer = free_port(), free_port()
        client, member = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer}"
        self._run(
            "etcd",
            [binary, "--data-dir", str(self.room / "etcd" / "data"), "--name", "one",
             "--listen-client-urls", client, "--advertise-client-urls", client,
             "--listen-peer-urls", member, "--initial-advertise-peer-urls", member,
             "--initial-cluster", f"one={member}", "--log-level", "error"],
            lambda: healthy(port),
        )  # fmt: skip
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
        return port, "etcd " + said.partition("etcd Version: ")[2].split("\n")[0]

    @cached_property
    def zookeeper(self) -> tuple[int, str]:
        """The port of a ZooKeeper of one member, and its version."""
        java = found("java", "default-jre-headless")
        jar = Path(*ZOOKEEPER_JARS)
        if not jar.exists():
            raise Absent("there is no zookeeper.jar (apt-get install zookeeperd)")
        port = free_port()
        room = self.room / "zookeeper"
        room.mkdir()
        # Sessions as long as the workloads ask; no admin server, which would want a port of its own.
        settings = {
            "tickTime": 2000, "dataDir": room / "data", "clientPort": port, "clientPortAddress": "127.0.0.1",
            "admin.enableServer": "false", "maxClientCnxns": 0, "maxSessionTimeout": 600_000,
            "4lw.commands.whitelist": "srvr",
        }  # fmt: skip
        (room / "zoo.cfg").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        command = [java, "-Xmx512m", "-cp", f"{jar}:{jar.parent}/*", "-Dzookeeper.admin.enableServer=false"]
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        self._run(
            "zookeeper", [*command, main, str(room / "zoo.cfg")], lambda: answers(port, b"srvr", b"Zookeeper version")
        )
        said = ask(port, b"srvr").decode()
        return port, "ZooKeeper " + said.partition("version: ")[2].partition("-")[0]

    def _run(self, name: str, command: list[str], ready: Callable[[], bool]) -> None:
        room = self.room / name
        room.mkdir(exist_ok=True)
        with (room / "log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=room, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "LC_ALL": "C"}
            )
        self._stack.callback(_stop, process)
        give_up_at = time.monotonic() + START_S
        while not ready():
            if process.poll() is not None or time.monotonic() > give_up_at:
                tail = (room / "log").read_text(errors="replace")[-400:]
                raise Absent(f"{name} did not start: {' '.join(tail.split()) or 'it said nothing'}")
            time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def found(binary: str, package: str) -> str:
    path = shutil.which(binary)
    if path is None:
        raise Absent(f"there is no {binary} on PATH (apt-get install {package})")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(port: int, question: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(question)
        return connection.recv(4096)


def answers(port: int, question: bytes, expected: bytes) -> bool:
    try:
        return ask(port, question).startswith(expected)
    except OSError:
        return False


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return b'"true"' in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
