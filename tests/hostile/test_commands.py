"""Every command, with whatever an operator may type: one line that says why, an exit code, nothing changed."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leases.cli import main
from leases.cli.context import URL_VARIABLE
from leases.cli.run import HELD, NO_STORE, NOT_EXECUTABLE, NOT_FOUND
from tests.canary import CANARY
from tests.hostile.laws import World, in_time
from tests.hostile.values import SQL, TEXT_ARGUMENTS

OTHERWISE = {
    "demo": "starts workers of its own, for half a minute: its bad input alone is tried, by test_the_demo",
    "work": "works until it is asked to stop: its bad input alone is tried, by test_the_work",
    "migrate": "test_surroundings.test_many_migrate_at_once; takes no more than the common options",
}
"""The commands that are not attacked by their parameters, and why or where."""

GOOD: dict[str, tuple[str, ...]] = {
    "stream": ("free",), "streams": ("free",), "glob": ("*",), "to": ("w2",), "owner": ("w",), "reason": ("why",),
    "command": ("--", "/nowhere/command"), "older_than": ("30d",), "token": ("1",), "pool": ("default",),
    "worker": ("lively",),
}  # fmt: skip
"""What makes a command line whole, by the name of the parameter; a new required one must stand here."""

CODES = {0, 1, 2, 3, 4}
CODES_OF = {"run": {0, 2, HELD, NO_STORE, NOT_EXECUTABLE, NOT_FOUND}}
UNCHANGED = {2, 3, 4, HELD, NO_STORE}
"""Codes that say that nothing was done. 1 says so of some, where several streams are named; here it is one."""

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""The Unicode categories of what could move a terminal's cursor, or turn its text around."""

ATTACKED = sorted(main.load_all().keys() - OTHERWISE.keys())


@pytest.fixture
def database(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL_VARIABLE, world.url)
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this process: in time, its failures as lines, its output safe for a terminal, no password."""
    with in_time():
        result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    said = result.stdout + result.stderr
    assert CANARY not in said
    assert "Traceback" not in said
    assert not {each for each in said if unicodedata.category(each) in HIDDEN} - {"\n"}, said
    told = [line for line in result.stderr.splitlines() if not line.startswith("leases: ")]
    assert all(json.loads(line)["event"] for line in told), told  # `leases run --json` tells what it does
    return result.exit_code, result.stdout, result.stderr


def attacked(world: World, name: str, *arguments: str) -> int:
    """Run a command; if it says that it was refused it has changed no row, and printed nothing."""
    code, out, err = run(name, *arguments)
    assert code in CODES_OF.get(name, CODES), (code, out, err)
    if code in UNCHANGED:
        assert out == ""
        assert sum(said.startswith("leases: ") for said in err.splitlines()) == 1
    rows = world.look()
    if rows != world.rows:
        world.put_back()
        assert code not in UNCHANGED | {1}, f"exit code {code}, and yet rows have changed"
    return code


def line(command: click.Command, chosen: dict[str, str]) -> list[str]:
    """A command line: what the command needs, with the chosen texts in the places of their parameters."""
    options, arguments = [], []
    for parameter in command.params:
        name = str(parameter.name)
        if isinstance(parameter, click.Argument):
            given = GOOD[name] if parameter.required else ()
            arguments += [chosen[name], *given[1:]] if name in chosen else list(given)
        elif name in chosen:
            options += [parameter.opts[0]] if is_flag(parameter) else [parameter.opts[0], chosen[name]]
        elif parameter.required:
            options += [parameter.opts[0], *GOOD[name]]
    asked = {option for each in command.params for option in each.opts}
    options += [each for each in ("--yes", "--no-wait") if each in asked]
    return [*options, *arguments]


def is_flag(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Option) and bool(parameter.is_flag)


def parameters(command: click.Command) -> Iterator[click.Parameter]:
    """Those that are attacked; the database stays the test's."""
    yield from (each for each in command.params if each.name not in ("url", "yes", "no_wait", "help"))


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("name", ATTACKED)
def test_a_good_line_is_accepted(world: World, name: str) -> None:
    """So that what is refused below is refused for what is bad in it."""
    needs = {"expire": {"streams": "held"}, "release": {"stream": "held"}}.get(name, {})
    assert attacked(world, name, *line(main.load(name), needs)) in (0, NOT_FOUND)


@pytest.mark.usefixtures("database")
def test_any_line(world: World) -> None:
    """Any command, one or more of its parameters hostile."""

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(ATTACKED), label="command")
        command = main.load(name)
        texts = st.one_of(st.sampled_from(TEXT_ARGUMENTS), st.text(max_size=20))
        places = data.draw(st.lists(st.sampled_from(sorted(str(each.name) for each in parameters(command)))))
        arguments = line(command, {place: data.draw(texts, label=place) for place in places})
        attacked(world, name, *arguments)

    attack()


@pytest.mark.usefixtures("database")
def test_any_words(world: World) -> None:
    """Words that are no command's, in any order."""
    words = [*main.load_all(), "--json", "--url", "--schema", "-h", "--version", "--yes", "--", *TEXT_ARGUMENTS]

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.sampled_from([each for each in words if each not in ("demo", "run")]), max_size=5))
    def attack(arguments: list[str]) -> None:
        with in_time():
            result = CliRunner().invoke(main, arguments)
        assert isinstance(result.exception, SystemExit | None), arguments
        assert result.exit_code in CODES, (arguments, result.output)
        assert "Traceback" not in result.output
        if world.look() != world.rows:
            world.put_back()

    attack()


URLS = (
    f"postgresql://u:{CANARY}@127.0.0.1:1/db", f"postgresql://u:{CANARY}@127.0.0.1:99999/db", f"postgresql://:{CANARY}@",
    f"postgresql://u:{CANARY}@/x", f"postgresql://u:{CANARY}@127.0.0.1:1/db?connect_timeout=x&password={CANARY}",
    f"postgresql://u:{CANARY}@[::1/db", f"postgresql://u:{CANARY}%00@127.0.0.1:1/db", f"oracle://u:{CANARY}@h/db",
    f"postgresql+psycopg2://u:{CANARY}@h/db", f"postgresql://u:p@{CANARY}@127.0.0.1:1/db", f"sqlite://u:{CANARY}@h/db",
    f"://{CANARY}", f"postgresql:u:{CANARY}@h", f"host=127.0.0.1 password={CANARY}", f"\ud800{CANARY}", f"{CANARY}\n",
    f"postgresql://u:{CANARY}@127.0.0.1:1/db?sslmode={CANARY}", f"postgresql://u@127.0.0.1:1/db?options=-c+x={CANARY}",
    f"postgresql://u:{CANARY}@127.0.0.1:1/db?host=127.0.0.2:1&host=127.0.0.3:1", f"postgresql://u:{CANARY}@127.0.0.1:1/\x1b[2J",
    "sqlite:///", "sqlite:////", "sqlite:///.", "sqlite:////dev/null", "sqlite:////dev/full", "sqlite:////proc/self/mem",
    "sqlite:///file::memory:?uri=true", "sqlite:///x.db?mode=ro", "sqlite:///x\0.db", f"sqlite:////nowhere/{'x' * 300}",
    "", " ", "@", "@.", "@/dev/null", "@/proc/self/environ\0", f"@/nowhere/{'x' * 5000}",
)  # fmt: skip


@pytest.mark.parametrize("given_url", URLS, ids=ascii)
def test_any_url(given_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """By the option, and by the environment where that can hold it."""
    monkeypatch.setattr("leases.cli.context.RETRY_FOR", timedelta(0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    outcomes = [run(*command, "--url", given_url) for command in (["list"], ["register", "s"])]
    if given_url and "\0" not in given_url and "\ud800" not in given_url:
        monkeypatch.setenv(URL_VARIABLE, given_url)
        outcomes.append(run("list"))
    for code, out, err in outcomes:
        assert (code in (2, 3, 4), out) == (True, ""), (code, out, err)


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    "arguments",
    [
        ["/nowhere/file.csv"], ["/dev/null"], ["."], ["a\0b"], [""], ["--ttl", "nan"], ["--ttl", "-1"],
        ["--ttl", "inf"],
        ["--ttl", "1e308"], ["--workers", "0"], ["--workers", "9" * 5000], ["--kill", "-1"], ["--kill", "99"],
        ["--freeze", "x"], ["--stream-by", ""], ["--id-by", "no such column"], ["--stream-by", "a\0b"],
    ],
    ids=ascii,
)  # fmt: skip
def test_the_demo(world: World, arguments: list[str]) -> None:
    code, out, _ = run("demo", *arguments)
    assert (code, out) in ((1, ""), (2, ""))
    assert world.look() == world.rows


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    "arguments",
    [
        [""], [":"], ["json"], ["json:"], [":dumps"], ["no_such_module:f"],
        ["..x:f"], [".:f"], ["a\0b:f"], ["\ud800:f"],
        ["json:no"], ["json:\ud800"], ["json:a\0"], ["json:dumps.."], ["json:__name__"], ["x" * 5000 + ":f"],
        [SQL + ":f"],
        *(
            ["json:dumps", *options]
            for options in (
                ["--weight", "nan"], ["--weight", "inf"], ["--weight", "0"], ["--weight", "-1"],
                ["--weight", "9" * 5000], ["--capacity", "-1"], ["--capacity", "9" * 5000], ["--concurrency", "0"],
                ["--ttl", "nan"], ["--ttl", "0"],
                ["--poll-interval", "0"],
                ["--poll-interval", "400d"], ["--stall-timeout", "0"], ["--drain-timeout", "-1"],
                ["--name", "a\0"], ["--name", ""], ["--name", "lively"], ["--pool", "\ud800"],
                ["--streams", "/nowhere/streams"], ["--streams", "/dev/null"], ["--streams", "."], ["--streams", ""],
                ["--streams", "a\0b"], ["--streams", "/proc/self/exe"], ["--streams", "-"],
            )
        ),
    ],
    ids=lambda arguments: ascii(" ".join(arguments))[-40:],
)  # fmt: skip
def test_the_work(world: World, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is begun: no stream registered, no worker enlisted."""
    monkeypatch.setattr("sys.path", [*sys.path])
    code, out, _ = run("work", *arguments)
    assert (code, out) == (2, "")
    assert world.look() == world.rows


def test_every_command_is_attacked() -> None:
    """A new command is attacked as it is made; what it requires must stand in `GOOD`."""
    assert OTHERWISE.keys() <= main.load_all().keys()
    for name in ATTACKED:
        for parameter in main.load(name).params:
            assert not parameter.required or str(parameter.name) in GOOD, f"GOOD lacks {parameter.name!r}, of {name}"
