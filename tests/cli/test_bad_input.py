"""Bad input: one line on stderr that says what to do, the right exit code, nothing changed, no password."""

from __future__ import annotations

import shlex
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from leases import LeaseStore
from leases.cli import main
from leases.cli.command import Command
from tests.cli.conftest import PASSWORD, Leases, Outcome

COMMANDS = sorted(main.load_all())


def refused(outcome: Outcome, code: int, *parts: str) -> None:
    assert (outcome.code, outcome.out) == (code, ""), outcome
    assert outcome.err.startswith("leases: ")
    assert outcome.err.count("\n") == 1
    for part in parts:
        assert part in outcome.err


# --- the database ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "code", "part"),
    [
        (f"mysql://u:{PASSWORD}@host/db", 2, "no driver for the URL scheme 'mysql'"),
        (f"host=h user=u password={PASSWORD}", 2, "sqlite:///FILE or postgresql://"),
        (f"postgresql:/u:{PASSWORD}@host/db", 2, "sqlite:///FILE or postgresql://"),
        (f"postgresql://u:{PASSWORD}@host:port/db", 2, "sqlite:///FILE or postgresql://"),
        (f"postgresql://u:x@{PASSWORD}@host/db", 2, "%40"),
        (f"postgresql://u:{PASSWORD}@127.0.0.1:1/db", 3, "check --url, and that the server is up"),
        (f"postgresql://u@127.0.0.1:1/db?password={PASSWORD}", 3, "postgresql://u@127.0.0.1:1/db"),
        (f"postgresql://u:{PASSWORD}@127.0.0.1:1/db?nonsense=1", 3, "nonsense"),
        ("@/nowhere/url", 2, "cannot read a database URL from the file '/nowhere/url'"),
        ("sqlite:////tmp/\udcff.db", 2, "UTF-8"),
        (" ", 2, "empty"),
    ],
)
def test_a_url_that_does_not_work(url: str, code: int, part: str, bare: Leases) -> None:
    refused(bare("list", "--url", url), code, part)


def test_a_url_in_a_file(tmp_path: Path, sqlite_url: str, bare: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "url"
    file.write_text(f"{sqlite_url}  \nnot this\n")
    assert bare("list", "--url", f"@{file}").code == 0
    monkeypatch.setenv("LEASES_DATABASE_URL", f"@{file}")
    assert bare("register", "s").code == 0
    file.write_text(f"\n{PASSWORD}")
    refused(bare("list"), 2, "is empty")
    file.write_bytes(b"\xff")
    refused(bare("list"), 2, "not UTF-8")


def test_the_option_goes_before_the_environment_and_the_last_before_the_first(
    sqlite_url: str, bare: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEASES_DATABASE_URL", "mysql://nowhere")
    assert bare("--url", sqlite_url, "list").code == 0
    assert bare("--url", "mysql://nowhere", "list", "--url", sqlite_url).code == 0
    assert bare("--json", "--url", sqlite_url, "register", "s").object["stream_id"] == "s"


@pytest.mark.parametrize("command", ["list", "migrate"])
def test_a_file_that_cannot_be_made(command: str, tmp_path: Path, bare: Leases) -> None:
    """Below a file there is no directory: that holds for root too, whom no permission stops."""
    (tmp_path / "file").touch()
    outcome = bare(command, "--url", f"sqlite:///{tmp_path / 'file' / 'x.db'}")
    if command == "migrate":
        refused(outcome, 3, "unable to open", "its directory exist")
    else:
        refused(outcome, 4, "there is no database", "leases migrate")


def test_a_data_directory_that_cannot_be_made(tmp_path: Path, bare: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    outcome = bare("migrate")
    assert outcome.code == 3
    assert "cannot make" in outcome.err


def test_a_file_that_may_only_be_read(sqlite_url: str, bare: Leases) -> None:
    """As in a read-only directory; permissions would not stop root."""
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    read_only = sqlite_url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true"
    refused(bare("register", "s", "--url", read_only), 3, "readonly", "may be written to")


def test_a_file_that_is_no_database(tmp_path: Path, bare: Leases) -> None:
    file = tmp_path / "x.db"
    file.write_text("these are no lease tables, and far more than sixteen bytes of it")
    for command in ("list", "migrate"):
        refused(bare(command, "--url", f"sqlite:///{file}"), 3, "not a database")


def test_missing_tables(tmp_path: Path, empty_postgresql_url: str, bare: Leases) -> None:
    (tmp_path / "empty.db").touch()
    for url in (empty_postgresql_url, f"sqlite:///{tmp_path / 'empty.db'}", "sqlite://"):
        refused(bare("list", "--url", url), 4, "run `leases migrate`")
    assert (tmp_path / "empty.db").read_bytes() == b""


ON_TABLES = [("list",), ("register", "s"), ("run", "s", "--", "true")]


@pytest.mark.parametrize("command", ON_TABLES, ids=" ".join)
def test_older_tables(command: tuple[str, ...], leases: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leases.migrate.VERSION", "9999")
    refused(leases(*command), 123 if command[0] == "run" else 4, "older than", "run `leases migrate`")


@pytest.mark.parametrize("command", [*ON_TABLES, ("migrate",)], ids=" ".join)
def test_newer_tables(command: tuple[str, ...], store: LeaseStore, leases: Leases) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE leases_alembic_version SET version_num = '9999'"))
    refused(leases(*command), 123 if command[0] == "run" else 4, "upgrade the leases package")


def test_a_schema_is_for_postgresql(sqlite_url: str, bare: Leases) -> None:
    refused(bare("list", "--url", sqlite_url, "--schema", "x"), 2, "for PostgreSQL")


# --- arguments -------------------------------------------------------------------------------------------------

BAD_NAMES = ["", "x" * 256, "a\0b", "a\nb", "a\x1bb", "a\x85b", "a\udcffb", "a\u2028b"]
NAMED = [
    ("show", "{}"),
    ("list", "{}"),
    ("list", "--owner", "{}"),
    ("list", "--pool", "{}"),
    ("history", "{}"),
    ("audit", "{}"),
    ("register", "ok", "{}"),
    ("register", "ok", "--pool", "{}"),
    ("retire", "{}"),
    ("pause", "{}"),
    ("resume", "{}"),
    ("expire", "{}", "--reason", "x", "--yes"),
    ("expire", "--owner", "{}", "--reason", "x", "--yes"),
    ("steal", "{}", "--to", "w", "--reason", "x", "--yes"),
    ("steal", "ok", "--to", "{}", "--reason", "x", "--yes"),
    ("release", "{}", "--yes"),
    ("run", "{}", "--", "true"),
    ("run", "s", "--owner", "{}", "--", "true"),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
@pytest.mark.parametrize("command", NAMED, ids=" ".join)
def test_a_name_that_cannot_be_one(command: tuple[str, ...], name: str, sqlite_url: str, bare: Leases) -> None:
    refused(
        bare(*(part.format(name) for part in command), "--url", sqlite_url),
        2,
        "holds" if 0 < len(name) < 256 else "255",
    )
    with LeaseStore(sqlite_url) as store:
        assert store.list() == []


@pytest.mark.parametrize("ttl", ["0", "-1", "nan", "inf", "25h", "24.1h", "1e3", "soon", "", "0.001"])
@pytest.mark.parametrize("command", [("steal", "s", "--to", "w", "--reason", "x", "--yes"), ("run", "s")])
def test_a_ttl_that_cannot_be_one(command: tuple[str, ...], ttl: str, sqlite_url: str, bare: Leases) -> None:
    tail = ("--", "true") if command[0] == "run" else ()
    refused(bare(*command, "--url", sqlite_url, "--ttl", ttl, *tail), 2, "--ttl")


@pytest.mark.parametrize("token", ["", "x", "1.5", "-1", "1e3", "0x1", "1_000", "١", str(2**63), "9" * 5000])
def test_a_token_that_is_no_integer(token: str, leases: Leases) -> None:
    refused(leases("release", "s", "--owner", "w", "--token", token), 2, "fencing token")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("lsit",), "did you mean `leases list`?"),
        (("frobnicate",), "`leases --help` lists the commands"),
        ((f"postgresql://u:{PASSWORD}@h/d",), "***"),
        (("show", "a", f"postgresql://u:{PASSWORD}@h/d"), "***"),
        (("list", "--stat", "held"), "--state"),
        (("list", "--state", "gone"), "held"),
        (("list", "--limit", "0"), "--limit"),
        (("show",), "see `leases show --help`"),
        (("steal", "s", "--to", "w", "--yes"), "--reason"),
        (("steal", "s", "--to", "w", "--yes", "--reason", " "), "empty"),
        (("steal", "s", "--to", "w", "--yes", "--reason", "\udcff"), "surrogate"),
        (("pause", "s", "--actor", ""), "empty"),
        (("prune", "--yes"), "--older-than"),
        (("prune", "--yes", "--older-than", "0"), "0d"),
        (("expire", "s", "--reason", "x", "--yes", "--timeout", "0"), "--timeout"),
        (("history", "s", "--at", "noon"), "14:02"),
        (("run", "s"), "COMMAND"),
        (("run", "s", "ls", "-l"), "write -- before the command"),
        (("run", "s", "--wait", "-1", "--", "true"), "--wait"),
        (("run", "s", "--", "a\0b"), "NUL"),
    ],
)
def test_a_command_line_that_cannot_work(arguments: tuple[str, ...], part: str, leases: Leases) -> None:
    refused(leases(*arguments), 2, part)


# --- help ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, bare: Leases) -> None:
    outcome = bare(name, "--help")
    assert outcome.code == 0
    assert "Example:" in outcome.out
    assert f"leases {name}" in outcome.out.partition("Example:")[2]
    assert "--json" in outcome.out
    assert "--url" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80


@pytest.mark.parametrize("command", [each for each in main.load_all().values() if isinstance(each, Command)], ids=str)
def test_every_example_is_read(command: Command) -> None:
    name = str(command.name)
    for line in command.example:
        program, called, *arguments = shlex.split(line)
        assert (program, called) == ("leases", name)
        command.make_context(name, arguments, resilient_parsing=False)


def test_the_help_names_every_command_on_one_line(bare: Leases) -> None:
    outcome = bare("--help")
    assert outcome.code == 0
    assert "..." not in outcome.out.partition("Commands:")[2]
    assert bare().code == 2
    assert bare("--version").out.startswith("leases ")
