"""How every command behaves: its help has an example, its failures are one line on stderr and an exit code.

    0    done
    1    refused, or not held
    2    usage: an argument that can never work
    3    the store is unavailable, or refused
    4    the schema: missing, older or newer; run `leases migrate`
    70   a bug of ours; LEASES_DEBUG=1 shows where
    130  interrupted
    141  whoever read the output has gone

(`leases run` has codes of its own: see `run`.) No traceback and no password reaches the terminal.
"""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from leases.cli.text import scrub, shown
from leases.errors import ConfigError, LeasesError, SchemaOutdated, StoreError

REFUSED, USAGE, STORE, SCHEMA, BUG, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 4, 70, 130, 141


class Failed(Exception):
    """A command ends with this exit code; its message goes to stderr."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(Exception):
    """Ctrl-C."""


def code_of(error: LeasesError) -> int:
    """The exit code that an error of the library ends a command with."""
    if isinstance(error, ConfigError):
        return USAGE
    if isinstance(error, SchemaOutdated):
        return SCHEMA
    return STORE if isinstance(error, StoreError) else REFUSED


def advice(error: LeasesError) -> str:
    """What to do about a store that is not there, where the error does not say it."""
    text = str(error)
    if code_of(error) != STORE or "try again" in text or "look" in text:
        return ""
    if "sqlite:" in text:
        return "; check that the file and its directory exist and may be written to, or give another --url"
    return "; check --url, and that the server is up"


def say(message: str) -> None:
    """Write one line to stderr: safe to show, without a password, and never the cause of another failure."""
    with suppress(OSError, ValueError):
        click.echo("leases: " + shown(scrub(" ".join(message.split()))), err=True)


ALWAYS = {"prog_name": "leases", "standalone_mode": False}


class Command(click.Command):
    """A command whose help ends with an example."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example.strip().splitlines()
        self.epilog = "\n".join(["\b", "Example:", *(f"  {line}" for line in self.example)])


class Group(click.Group):
    """The group of all commands: finds the nearest name for a mistyped one, and turns failures into exit codes."""

    command_class = Command

    def __init__(self, *args: Any, places: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.places = places
        """Each command's name, with `module:variable`: no command waits for the imports of another."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's
        return sorted(self.places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # click's
        return self.load(cmd_name) if cmd_name in self.places else None

    def load(self, name: str) -> click.Command:
        """One of the commands."""
        module, _, variable = self.places[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), variable)
        return command

    def load_all(self) -> dict[str, click.Command]:
        """All commands."""
        return {name: self.load(name) for name in self.places}

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"did you mean `leases {near[0]}`?" if near else "`leases --help` lists the commands"
            raise click.UsageError(f"there is no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        # click would turn these two into exit code 1, which means "refused" here
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_output()
            raise click.exceptions.Exit(PIPE_CLOSED) from None
        except KeyboardInterrupt:
            raise Interrupted from None
        return result

    def main(self, args: Sequence[str] | None = None, **options: Any) -> NoReturn:  # type: ignore[override]
        # (mypy: click's own may return, when it is not to exit; this one always exits)
        _prepare()
        sys.exit(self._run(lambda: super(Group, self).main(args, **{**options, **ALWAYS})))

    def _run(self, call: Callable[[], Any]) -> int:
        try:
            result = call()
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            return USAGE
        except Failed as error:
            say(str(error))
            return error.exit_code
        except click.ClickException as error:
            say(_usage(error))
            return USAGE
        except (Interrupted, click.Abort):
            say("interrupted")
            return INTERRUPTED
        except LeasesError as error:
            say(f"{error}{advice(error)}")
            return code_of(error)
        except Exception as error:  # an operator gets a line, whatever went wrong
            if os.environ.get("LEASES_DEBUG"):
                raise
            why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            say(f"unexpected: {why}; set LEASES_DEBUG=1 to see where, and report it")
            if isinstance(error, OSError):
                _discard_output()
            return BUG
        return result if isinstance(result, int) else 0


def _usage(error: click.ClickException) -> str:
    message = error.format_message().rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return message
    path = " ".join(context.command_path.split()[1:])
    where = f"{path}: " if path else ""
    help_of = "" if message.endswith(("?", "commands")) else f"; see `{context.command_path} --help`"
    return f"{where}{message}{help_of}"


def _prepare() -> None:
    """Make sure that nothing but what the commands print reaches the terminal, and that printing cannot fail."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed: what is printed goes nowhere
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # open to the end of the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger().addHandler(_SILENT)


_SILENT = logging.NullHandler()
"""On the root logger: without a handler Python prints warnings to stderr, some with a traceback."""


def _discard_output() -> None:
    """Let what is still in stdout's buffer go nowhere: the interpreter flushes it at its end."""
    with suppress(OSError, ValueError, AttributeError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
